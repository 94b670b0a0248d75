"""Layouts are rows, and each one is read back from what others write."""

import re

import numpy as np
import pytest
import timm
import torch
from conftest import randomise_
from layouts import EXAMPLES, WITHOUT_HEAD, google_layout, hybrid_layout

from timm_vitres.publishing.conversion import convert
from timm_vitres.weights.layouts import LAYOUTS, TIMM, convert_layout, find_layout, plain_names


@pytest.mark.parametrize('name', [layout.name for layout in LAYOUTS])
def test_every_layout_is_read_back(name, caplog):
    assert name in EXAMPLES, f'the layout {name!r} has no checkpoint: write one in tests/layouts.py, and name it there.'
    architecture, write = EXAMPLES[name]
    model = randomise_(timm.create_model(architecture, num_classes=5))
    written = write(model)
    if name in WITHOUT_HEAD:
        model.reset_classifier(0)
    own = model.state_dict()
    assert find_layout(written).name == name
    converted = convert_layout(written)
    assert converted.keys() == own.keys()
    assert caplog.messages == ([f'{name}: {WITHOUT_HEAD[name]}'] if name in WITHOUT_HEAD else [])
    for key, value in own.items():
        assert torch.equal(converted[key], value), key


def test_googles_arrays_of_a_training_state():
    """As flax names them; timm reads the same without a prefix, or below 'opt/target/' (test_checkpoints.py)."""
    model = randomise_(timm.create_model('vitresnet_tiny', num_classes=3))
    written = {key: torch.from_numpy(array.copy()) for key, array in google_layout(model, 'params/').items()}
    assert all(key.startswith('params/') for key in written)
    converted = convert_layout({**written, 'step': torch.tensor(3)})
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())


def test_a_vit_hybrid_without_its_classifier():
    """transformers' ViTHybridModel: no 'vit.' before its names, no classifier, and a pooler that none uses."""
    own = randomise_(timm.create_model('test_vitresnet', num_classes=0))
    written = {key.removeprefix('vit.'): value for key, value in hybrid_layout(own).items()}
    assert not any(key.startswith(('vit.', 'classifier')) for key in written)
    pooler = {'pooler.dense.weight': torch.ones(4, 4), 'pooler.dense.bias': torch.ones(4)}
    converted = convert_layout({**written, **pooler})
    assert converted.keys() == own.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in own.state_dict().items())


@pytest.mark.parametrize('name', WITHOUT_HEAD)
def test_other_keys_of_a_decoder_are_errors(name):
    """Only the parts that are known are left out; what is unknown, or merely begins like them, is listed."""
    architecture, write = EXAMPLES[name]
    model = timm.create_model(architecture, num_classes=0)
    unknown = ['necks.bias', 'pretrained.act_postprocessor.bias', 'scratches.bias', 'decoders.bias']
    unknown += ['pretrained.model.header.bias'] if name == 'MiDaS DPT' else []
    weights = {**write(model), **dict.fromkeys(unknown, torch.ones(1))}
    with pytest.raises(RuntimeError) as caught:
        model.filter_state_dict(weights)
    names = sorted(key.removeprefix('pretrained.model.' if name == 'MiDaS DPT' else '') for key in unknown)
    assert f'missing keys: none; unexpected keys: {", ".join(names)}; wrong shapes: none.' in str(caught.value)


@pytest.mark.parametrize('name', WITHOUT_HEAD)
def test_a_backbone_without_its_decoder_gets_a_new_head_where_one_is_asked_for(name, tmp_path):
    architecture, write = EXAMPLES[name]
    own = randomise_(timm.create_model(architecture, num_classes=5))
    torch.save(write(own), tmp_path / 'dpt.pt')
    overlay = dict(file=str(tmp_path / 'dpt.pt'), num_classes=0)  # the file has no classes
    images = torch.rand(1, 3, 96, 96)
    for num_classes in (0, 10):
        model = timm.create_model(
            architecture, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes
        ).eval()
        assert model.num_classes == num_classes
        assert torch.equal(model.forward_features(images), own.forward_features(images))
    assert model.head.weight.std() > 0
    with pytest.raises(RuntimeError, match=r'missing keys: head\.bias, head\.weight'):
        timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay={**overlay, 'num_classes': 1000})


@pytest.mark.parametrize(
    'name, file, license',
    [
        ('MiDaS DPT', 'dpt_hybrid-midas-501f0c75.pt', 'mit'),
        ('MiDaS DPT', 'mine.pt', None),
        ('pix2tex', 'weights.pth', 'mit'),
        ('pix2tex', 'my-encoder.pth', None),  # anybody may call a part so
        ('transformers DPT-Hybrid', 'pytorch_model.bin', None),
        ('Conformer', 'Conformer_tiny_patch16.pth', 'apache-2.0'),
        ('Conformer', 'checkpoint.pth', None),
        ('mmpretrain Conformer', 'conformer-small-p32_8xb128_in1k_20211206-947a0816.pth', 'apache-2.0'),
        ('mmpretrain Conformer', 'conformer-mine-p16_in1k.pth', None),
    ],
)
def test_a_published_file_has_its_writers_licence_and_nobody_elses(name, file, license, tmp_path):
    architecture, write = EXAMPLES[name]
    torch.save(write(timm.create_model(architecture)), tmp_path / file)
    out = convert(tmp_path / file, tmp_path / 'out', architecture)
    assert (f'\nlicense: {license}\n' if license else 'license:') in (out / 'README.md').read_text() or not license
    assert license or 'license:' not in (out / 'README.md').read_text()
    assert timm.create_model(f'local-dir:{out}', pretrained=True).pretrained_cfg.get('license') == license


def test_our_own_layout_is_left_as_it_is():
    own = randomise_(timm.create_model('test_vitresnet_dual')).state_dict()
    assert find_layout(own) is TIMM
    assert all(convert_layout(own)[key] is value for key, value in own.items())
    assert len({layout.name for layout in (TIMM, *LAYOUTS)}) == len(LAYOUTS) + 1


@pytest.mark.parametrize(
    'weights, layout',
    [
        ({'conv_root/kernel': torch.ones(()), 'a/MultiHead_1/out/kernel': torch.ones(())}, 'Google JAX'),
        ({'trans_patch_conv.weight': torch.ones(2), 'down.conv_project.weight': torch.ones(())}, 'Conformer'),
    ],
)
def test_names_of_a_layout_with_other_shapes(weights, layout):
    assert find_layout(weights).name == layout
    with pytest.raises(RuntimeError, match=f'has the names of the {layout} layout, but not its shapes'):
        convert_layout(weights)


@pytest.mark.parametrize('weights', [{'a': 1}, {1: torch.ones(1)}, {'a': np.ones(1)}, {'model': {'a': None}}])
def test_what_is_no_state_dict(weights):
    with pytest.raises(ValueError, match=r'state_dict: .* has \w+, expected names with tensors'):
        convert_layout(weights)


@pytest.mark.parametrize('prefix', ['model.', 'net.', 'backbone.', 'timm_model.', 'model._orig_mod.'])
@pytest.mark.parametrize('wrapper', ['state_dict', 'model_state_dict'])
def test_names_below_a_module_that_held_the_model(prefix, wrapper):
    model = timm.create_model('test_vitresnet', num_classes=3)
    found = convert_layout({wrapper: {prefix + key: value for key, value in model.state_dict().items()}})
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


def test_names_below_modules_in_modules_and_beside_a_loss(caplog):
    model = randomise_(timm.create_model('test_vitresnet'))
    expected = model.state_dict()
    for rename in (
        lambda key: f'model.net.{key}',
        lambda key: re.sub(r'^(blocks\.\d+)\.', r'\1._orig_mod.', key),  # compiled one by one
        lambda key: 'module.' + re.sub(r'^(blocks\.\d+)\.', r'\1._checkpoint_wrapped_module.', key),
    ):
        found = plain_names({rename(key): value for key, value in expected.items()})
        assert found.keys() == expected.keys() and all(found[key] is expected[key] for key in expected)
    assert not caplog.text
    beside = {'criterion.weight': torch.ones(3), **{f'model.{key}': value for key, value in expected.items()}}
    assert plain_names(beside).keys() == expected.keys()
    assert 'what stands beside model.* is left out: criterion (1)' in caplog.text
    other = {'encoder.weight': torch.ones(3), 'model.x': torch.ones(3)}  # of no model that we know
    assert plain_names(other) == other


def test_tables_of_16_bits_are_resampled_in_the_models_own(tmp_path):
    """Whichever way a file is loaded: rounded to 16 bits a second time, its positions would be others."""
    first = randomise_(timm.create_model('test_vitresnet', img_size=64)).bfloat16()
    torch.save(first.state_dict(), tmp_path / 'w.pth')
    models = [timm.create_model('test_vitresnet', img_size=96) for _ in range(3)]
    models[0].load_state_dict(torch.load(tmp_path / 'w.pth'))
    models[1].load_pretrained(tmp_path / 'w.pth')
    overlay = dict(file=str(tmp_path / 'w.pth'), num_classes=first.num_classes)
    models[2] = timm.create_model('test_vitresnet', img_size=96, pretrained=True, pretrained_cfg_overlay=overlay)
    tables = [model.pos_embed for model in models]
    assert torch.equal(tables[0], tables[2]) and torch.equal(tables[1], tables[2])
    assert not torch.equal(tables[0], tables[0].bfloat16().float())
    assert torch.equal(models[0].head.weight, first.head.weight.float())


def test_averaged_weights_of_torch():
    averaged = torch.optim.swa_utils.AveragedModel(timm.create_model('test_vitresnet', num_classes=3))
    found, expected = convert_layout(averaged.state_dict()), averaged.module.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize('layer', ['pre_logits.fc', 'pre_logits'])
def test_a_head_that_learnt_behind_a_layer_which_we_lack_is_left_out(layer, caplog):
    own = timm.create_model('test_vitresnet', num_classes=3).state_dict()
    weights = {**own, f'{layer}.weight': torch.ones(64, 64), f'{layer}.bias': torch.ones(64)}
    weights['head.weight'] = torch.ones_like(own['head.weight'])
    weights['head.bias'] = torch.zeros_like(own['head.bias'])
    assert own.keys() - convert_layout(weights).keys() == {'head.weight', 'head.bias'}
    assert 'the head behind it, too: head.bias, head.weight' in caplog.text
    weights['head.weight'] = torch.zeros_like(own['head.weight'])
    assert convert_layout(weights).keys() == own.keys()
