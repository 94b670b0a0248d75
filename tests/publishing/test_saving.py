"""`save` writes the model bit for bit, with the names of its classes and its preprocessing, or it writes nothing."""

import json
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import FACTS, randomise_, two
from huggingface_hub import EvalResult, ModelCard
from timm.utils import ModelEmaV3

import timm_vitres
from timm_vitres.publishing.cards import MEASURED, render_card
from timm_vitres.publishing.hub import push, push_files
from timm_vitres.publishing.saving import check_unchanged, render_config, save
from timm_vitres.weights.checksums import sha256, told_sha256
from timm_vitres.writing import replacing

# every registered name that fits in memory, each with other classes, channels and size
CHANGES = [
    ('test_vitresnet', {}),
    ('vitresnet_tiny', dict(num_classes=3, img_size=(96, 160))),
    ('vitresnet_small', dict(in_chans=1, img_size=(64, 96), num_classes=0)),
    ('vitresnet_base', dict(num_classes=5, img_size=64)),
    pytest.param('vitresnet_large', dict(num_classes=5, img_size=64), marks=pytest.mark.slow),
    ('vitresnet_nano', dict(num_classes=10, in_chans=1, img_size=28)),
    ('vitresnet', dict(backbone='resnet18', depth=0, num_classes=4)),
    ('vitresnet', dict(backbone='', embed_dim=96, num_heads=3, depth=2, img_size=(64, 32))),
    # every field of the config that a ResNet takes, and every field of the ViT
    (
        'vitresnet',
        dict(
            **dict(backbone='resnet26d', stage=2, layers=(1, 2, 1), channels=(8, 16, 32), block='basic', stem_stride=2),
            **dict(stem_type='deep_tiered', stem_width=16, avg_down=False, replace_stem_pool=False, cardinality=1),
            **dict(base_width=64, block_reduce_first=1, down_kernel_size=3, output_stride=16),
            **dict(backbone_norm_layer='groupnorm1', backbone_act_layer='silu'),
            **dict(patch_size=(2, 4), embed_dim=48, depth=2, num_heads=4, mlp_ratio=2.0, class_token=True),
            **dict(reg_tokens=2, global_pool='avg', qkv_bias=False, qk_norm=True, proj_bias=False, init_values=0.1),
            **dict(pre_norm=True, final_norm=True, fc_norm=False, no_embed_class=True, norm_layer='rmsnorm'),
            **dict(act_layer='silu', mlp_layer='swiglu', img_size=(64, 96), num_classes=3, in_chans=4),
        ),
    ),
    (
        'vitresnet',
        dict(
            **dict(backbone='resnetv2_50', layers=(1, 1), channels=(64, 64), stem_chs=32, width_factor=1),
            **dict(bottle_ratio=0.5, preact=False, depth=1, embed_dim=32, num_heads=2, img_size=64),
        ),
    ),
]


@pytest.mark.parametrize('name, changes', CHANGES)
def test_save_and_load_is_bit_equal(name, changes, tmp_path):
    model = randomise_(timm.create_model(name, **changes))
    save(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
    assert loaded.cfg == model.cfg
    x = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    assert {path.name for path in (tmp_path / 'model').iterdir()} == {'model.safetensors', 'config.json'}
    # once more: what was loaded is saved as the same
    save(loaded, tmp_path / 'again')
    for file in ('model.safetensors', 'config.json'):
        assert (tmp_path / 'again' / file).read_bytes() == (tmp_path / 'model' / file).read_bytes()


@pytest.mark.parametrize('size', [(128, 96), (224, 224), (33, 70)])
def test_reloaded_at_another_size(size, tmp_path):
    model = randomise_(timm.create_model('test_vitresnet', img_size=(96, 160), num_classes=3))
    save(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=size).eval()
    assert loaded.patch_embed.img_size == size
    x = torch.randn(1, 3, *size)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_reloaded_with_other_classes_and_channels(tmp_path):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3))
    save(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=7, in_chans=1).eval()
    assert loaded.num_classes == 7 and loaded.in_chans == 1
    assert torch.equal(loaded.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    grey = loaded.patch_embed.backbone.stem.conv.weight
    torch.testing.assert_close(grey, model.patch_embed.backbone.stem.conv.weight.sum(1, keepdim=True))


def test_what_was_changed_after_creation_is_saved(tmp_path):
    model = timm.create_model('test_vitresnet', num_classes=3)
    model.set_input_size(img_size=(64, 128))
    model.reset_classifier(4, 'avg')
    randomise_(model).to(memory_format=torch.channels_last)
    save(model, tmp_path, label_names=['a', 'b', 'c', 'd'])
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 128)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert loaded.pretrained_cfg['label_names'] == ['a', 'b', 'c', 'd']


def test_config_says_what_the_weights_were_trained_with(tmp_path):
    model = timm.create_model('vitresnet_nano', num_classes=2, img_size=28)
    config = dict(input_size=(3, 48, 48), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.8)
    save(model, tmp_path, label_names=['cat', 'dog'], data_config=config)
    written = json.loads((tmp_path / 'config.json').read_text())
    assert written['label_names'] == ['cat', 'dog'] and written['num_classes'] == 2
    assert 'num_classes' not in written['model_args']  # transformers would pass it twice
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    resolved = timm.data.resolve_model_data_config(loaded)
    assert resolved['input_size'] == [3, 48, 48] or resolved['input_size'] == (3, 48, 48)
    assert tuple(resolved['mean']) == (0.1, 0.2, 0.3) and resolved['crop_pct'] == 0.8
    assert loaded.patch_embed.img_size == (28, 28)


def test_what_was_measured_goes_with_the_model_that_is_replaced(tmp_path):
    """What a run wrote stays in its folder; what the user wrote in its card stays there, too."""
    first, second = (randomise_(timm.create_model('test_vitresnet', num_classes=count)) for count in (2, 5))
    task = dict(task_type='image-classification', dataset_type='imagefolder', dataset_name='x', metric_type='accuracy')
    facts = {**FACTS, 'results': [EvalResult(**task, metric_value=93.5)], 'result_note': f'{MEASURED} 3.'}
    save(first, tmp_path, card=render_card(first, **facts))
    (tmp_path / 'curves.png').write_bytes(b'curves')
    (tmp_path / 'README.md').write_text((tmp_path / 'README.md').read_text() + '\nMine.\n')
    before = (tmp_path / 'README.md').read_text()
    save(first, tmp_path)
    assert (tmp_path / 'README.md').read_text() == before
    assert {path.name for path in push_files(tmp_path)} >= {'README.md', 'curves.png'}
    save(second, tmp_path)
    card = ModelCard.load(tmp_path / 'README.md')
    assert '93.5' not in str(card) and card.text.endswith('Mine.\n') and 'Classes (5)' in card.text
    assert card.data['model_sha256'] == sha256(tmp_path / 'model.safetensors')
    assert {path.name for path in push_files(tmp_path)} == {'README.md', 'config.json', 'model.safetensors'}
    save(first, tmp_path, ['cat', 'dog'], dict(input_size=(3, 64, 64), mean=(0.1, 0.2, 0.3)))
    card = ModelCard.load(tmp_path / 'README.md')
    assert 'Classes (2): cat, dog' in card.text and '(3, 64, 64)' in card.text and 'mean (0.1, 0.2, 0.3)' in card.text


@pytest.mark.parametrize(
    'folder, options, message',
    [
        ('', {}, "folder: got '', expected the name of a folder"),
        ('new', dict(card=5), 'card: got 5, expected the text of a card'),
        ('new', dict(data_config='x'), "data_config: got 'x', expected a dict"),
        ('new', dict(data_config={'crop_ptc': 0.9}), 'crop_ptc: is no argument of data_config; did you mean crop_pct'),
    ],
)
def test_what_can_not_be_saved_so_is_refused_before_anything_is_written(
    folder, options, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=f'^{message}'):
        save(timm.create_model('test_vitresnet', num_classes=2), folder, **options)
    assert not list(tmp_path.iterdir())


def test_the_card_knows_the_weights(tmp_path):
    """Its sha256 follows what is saved, by whom ever; a file that is not the card's is refused."""
    first, second = (randomise_(timm.create_model('test_vitresnet', num_classes=2), seed=seed) for seed in (0, 1))
    save(first, tmp_path, card=render_card(first, **FACTS))
    card = ModelCard.load(tmp_path / 'README.md')
    assert card.data['model_sha256'] == sha256(tmp_path / 'model.safetensors')
    save(first, tmp_path, ['Katze', 'Hund'])  # what is corrected stands in the card, too
    text = (tmp_path / 'README.md').read_text()
    assert 'Classes (2): Katze, Hund' in text and f'# {FACTS["model_name"]}\n' in text and FACTS['recipe'] in text
    (tmp_path / 'README.md').write_bytes(f'{text}\n## Limits\n\n- Classes (0): mine\n'.replace('\n', '\r\n').encode())
    save(first, tmp_path, ['chat', 'chien'])
    edited = (tmp_path / 'README.md').read_bytes()  # nothing but that, letter by letter
    assert edited.replace(b'chat, chien', b'Katze, Hund').replace(b'\r\n', b'\n').decode().startswith(text)
    assert edited.count(b'\n') == edited.count(b'\r\n') and edited.endswith(b'- Classes (0): mine\r\n')
    save(second, tmp_path)
    assert ModelCard.load(tmp_path / 'README.md').data['model_sha256'] == sha256(tmp_path / 'model.safetensors')
    text = ModelCard.load(tmp_path / 'README.md').text  # results are of the weights that they were measured with
    assert '## Result\n\nNot measured.\n' in text and f'# {tmp_path.name}\n' in text and 'test_vitresnet' in text
    timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    safetensors.torch.save_file(first.state_dict(), tmp_path / 'model.safetensors')
    with pytest.raises(
        OSError, match=r'or, if you changed it on purpose, take model_sha256 out of config\.json beside it'
    ):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    # whoever takes it out, such as another program that writes config.json anew, is not asked again
    config = json.loads((tmp_path / 'config.json').read_text())
    del config['model_sha256']
    (tmp_path / 'config.json').write_text(json.dumps(config))
    timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    (tmp_path / 'README.md').write_text('# mine\n')
    timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    save(second, tmp_path)
    assert (tmp_path / 'README.md').read_text() == '# mine\n'


def fold_a_convolution(model):
    conv = model.patch_embed.backbone.stem.conv
    plain = torch.nn.Conv2d(3, conv.out_channels, 7, 2, bias=False)
    plain.weight.data = conv.standardized_weight().detach()
    model.patch_embed.backbone.stem.conv = plain


def quantise_the_head(model):
    model.head.weight = torch.nn.Parameter(model.head.weight.data.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    'change, where',
    [
        (fold_a_convolution, 'stem.conv'),
        (lambda model: setattr(model, 'norm', torch.nn.Identity()), 'norm.bias, norm.weight'),
        (lambda model: model.prune_intermediate_layers([1]), 'blocks.0.attn'),
        (lambda model: setattr(model, 'head', torch.nn.Linear(64, 5)), 'head'),
        (quantise_the_head, 'head.weight'),
    ],
)
def test_what_was_changed_for_inference_is_refused(change, where, tmp_path):
    model = timm.create_model('test_vitresnet', num_classes=3).eval()
    change(model)
    with pytest.raises(ValueError, match='it was changed for inference') as error:
        save(model, tmp_path)
    assert where in str(error.value) and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match='it was changed for inference'):
        push(model, 'me/name')
    with pytest.raises(ValueError, match='without features_only'):
        save(timm.create_model('test_vitresnet', features_only=True), tmp_path)


def test_wrappers_are_taken_off(tmp_path):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3))
    for number, wrapped in enumerate((torch.compile(model), ModelEmaV3(model), torch.nn.DataParallel(model))):
        save(wrapped, tmp_path / str(number))
        saved = safetensors.torch.load_file(tmp_path / str(number) / 'model.safetensors')
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())


def test_models_of_timm_are_saved_too(tmp_path):
    model = randomise_(timm.create_model('resnet18', num_classes=3))
    loaded = timm.create_model(f'local-dir:{save(model, tmp_path)}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_others_may_read_what_is_saved(tmp_path):
    save(timm.create_model('test_vitresnet'), tmp_path)
    (tmp_path / 'plain').touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_save_refuses_mistakes(tmp_path):
    with pytest.raises(ValueError, match='label_names: got 1'):
        save(timm.create_model('test_vitresnet', num_classes=2), tmp_path, label_names=['one'])
    with pytest.raises(ValueError, match='expected a model made by'):
        save(torch.nn.Linear(1, 1), tmp_path)
    heads = timm.create_model('test_vitresnet').cfg.num_heads
    with pytest.raises(ValueError, match=f'model: its cfg has num_heads={2 * heads}, which it does not remember'):
        save(timm.models.model_entrypoint('test_vitresnet')(num_heads=2 * heads), tmp_path)
    save(timm.create_model('test_vitresnet', num_heads=2 * heads), tmp_path)


def test_a_full_disk_leaves_the_last_good_file(tmp_path):
    model = randomise_(timm.create_model('test_vitresnet'))
    save(model, tmp_path)
    before = safetensors.torch.load_file(tmp_path / 'model.safetensors')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r'model\.safetensors could not be written'):
            save(randomise_(model, seed=1), tmp_path)
        with pytest.raises(OSError, match=r'state\.pt could not be written'), replacing(tmp_path / 'state.pt') as p:
            torch.save(model.state_dict(), p)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    after = safetensors.torch.load_file(tmp_path / 'model.safetensors')
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'model.safetensors']


class Odd:
    pass


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(label_names=[b'a', b'b']), 'label_names: the name of class 0 is'),
        (dict(label_names={0: 'a', 2: 'b'}), 'label_names: got a dict with the keys'),
        (dict(label_names=[Odd(), Odd()]), 'label_names: the name of class 0 is'),
        (dict(data_config=dict(mean=Odd())), 'data_config: mean: got <test_saving.Odd'),
        (dict(data_config=dict(mean=(0.5, float('nan'), 0.5))), 'data_config: mean: got'),
        (dict(data_config=dict(std=0.0)), 'data_config: std: got'),
        (dict(data_config=dict(crop_pct=-1)), 'data_config: crop_pct: got'),
        (dict(data_config=dict(crop_mode='middle')), 'data_config: crop_mode: got'),
        (dict(data_config=dict(interpolation='best')), 'data_config: interpolation: got'),
        (dict(data_config=dict(input_size=(3, 0, 9))), 'data_config: input_size: got'),
        (dict(card='---\nno: [yaml\n---\n'), 'card: the head of the card is no valid YAML'),
        (dict(card='---\n- a list\n---\n'), 'card: the head of the card'),
    ],
)
def test_what_can_not_be_written_leaves_the_old_model(wrong, message, tmp_path):
    (first, of_first), (second, of_second) = two()
    folder = save(first, tmp_path / 'model', **of_first)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        save(second, folder, **{**of_second, **wrong})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_class_as_an_argument_is_refused_before_anything_is_touched(tmp_path):
    folder = save(timm.create_model('test_resnet', num_classes=2), tmp_path / 'model')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = timm.create_model('test_resnet', num_classes=2, norm_layer=torch.nn.BatchNorm2d)
    with pytest.raises(ValueError, match='norm_layer'):
        save(other, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_plain_values_are_made_of_what_users_give(tmp_path):
    measures = dict(embed_dim=np.int64(48), img_size=(np.int32(64), 96), init_values=np.float32(0.5))
    model = timm.create_model('test_vitresnet', num_classes=2, **measures)
    loaded = timm.create_model(f'local-dir:{save(model, tmp_path / "numpy")}', pretrained=True)
    assert loaded.cfg == model.cfg and loaded.patch_embed.img_size == (64, 96)
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    config = dict(mean=torch.tensor([0.25, 0.5, 0.75]), std=np.float32(0.5), crop_pct=np.float64(0.5))
    save(model, tmp_path, label_names=np.array([3, 7]), data_config=config)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert loaded.pretrained_cfg['label_names'] == ['3', '7']
    assert loaded.pretrained_cfg['mean'] == [0.25, 0.5, 0.75] and loaded.pretrained_cfg['crop_pct'] == 0.5
    save(model, tmp_path, label_names=[Path('a/cat'), Path('dog')])
    assert json.loads((tmp_path / 'config.json').read_text())['label_names'] == ['a/cat', 'dog']
    save(model, tmp_path, label_names={'1': 'dog', '0': 'cat'})
    # and what is loaded is saved with its names, where transformers looks for them
    save(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), tmp_path / 'again')
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['label_names'] == ['cat', 'dog']


def test_a_broken_readme_of_the_users_stays_as_it_is(tmp_path):
    (first, of_first), (second, _) = two()
    save(first, tmp_path, label_names=of_first['label_names'])
    for text in (
        b'---\nno: [yaml\n---\n',
        'caf\xe9'.encode('latin-1'),
        b'\xef\xbb\xbf# BOM\r\n',
        b'---\nlicense: mit\n',
    ):
        (tmp_path / 'README.md').write_bytes(text)
        save(second, tmp_path)
        assert (tmp_path / 'README.md').read_bytes() == text
    # a card of ours whose head he broke is told the new sha256, and nothing else
    text = b'---\nmine: [\nmodel_sha256: ' + b'0' * 64 + b'\n---\nmodel_sha256: is a field\n'
    (tmp_path / 'README.md').write_bytes(text)
    save(second, tmp_path)
    digest = sha256(tmp_path / 'model.safetensors').encode()
    assert (tmp_path / 'README.md').read_bytes() == text.replace(b'0' * 64, digest)
    # before a head there may be empty lines, and a mark of some editors
    for before in (b'\n', b'\xef\xbb\xbf', b'\xef\xbb\xbf\r\n'):
        text = before + b'---\r\nmodel_sha256: ' + b'0' * 64 + b'\r\n---\r\n\xff\r\n'
        (tmp_path / 'README.md').write_bytes(text)
        save(second, tmp_path)
        assert (tmp_path / 'README.md').read_bytes() == text.replace(b'0' * 64, digest)
        (tmp_path / 'config.json').unlink()
        assert told_sha256(tmp_path) == digest.decode()


def test_what_the_user_wrote_around_our_card_stays(tmp_path):
    (first, of_first), (second, of_second) = two()
    path = save(first, tmp_path, **of_first) / 'README.md'
    head, end, text = path.read_text().partition('\n---\n')
    path.write_text(f'{head}\nlanguage: en{end}# Mine\n\n{text}\nBy hand.\n')
    save(second, tmp_path, **of_second)
    card = ModelCard.load(path)
    assert card.text.lstrip().startswith('# Mine\n') and card.text.endswith('By hand.\n')
    assert 'Second.' in card.text and 'First.' not in card.text
    assert card.data['language'] == 'en' and card.data['model_sha256'] == sha256(tmp_path / 'model.safetensors')
    # as does what is there without our part, or with half of its marks; only a card of his own is taken as it is
    for old in ('# Mine\n', path.read_text().replace('<!-- end of timm-vitres -->', '')):
        path.write_text(old)
        save(first, tmp_path, **of_first)
        assert '# Mine' in path.read_text() and 'First.' in path.read_text()
        assert ModelCard.load(path).data['model_sha256'] == sha256(tmp_path / 'model.safetensors')
    save(first, tmp_path, card='---\nlicense: mit\n---\n# Other\n')
    assert '# Mine' not in path.read_text() and '# Other' in path.read_text()


def test_a_config_builds_the_model_that_it_was_rendered_from():
    model = timm.create_model('test_vitresnet', num_classes=2, img_size=(64, np.int64(96)))
    config = render_config(model, ['cat', 'dog'])
    assert json.loads(json.dumps(config, allow_nan=False))['model_args']['img_size'] == [64, 96]
    assert config['label_names'] == ['cat', 'dog'] and 'label_names' not in config['pretrained_cfg']
    check_unchanged(model, config)
    model.head.bias = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(
        ValueError, match=r"^model: is not what timm\.create_model\('test_vitresnet', .* in head\.bias\. "
    ):
        check_unchanged(model, config)
    model.blocks = torch.nn.Sequential()
    with pytest.raises(ValueError, match=r'blocks\.0\.attn\.proj\.bias, .* and more\. Save the model that was trained'):
        check_unchanged(model, config)


@pytest.mark.parametrize(
    'name, part', [('test_vitresnet_mix', 'stem'), ('test_vitresnet_dual', 'stem'), ('resnet10t', 'bn1')]
)
def test_a_model_whose_norms_timm_has_frozen_is_saved(name, part, tmp_path):
    model = randomise_(timm.create_model(name, num_classes=2))
    timm.utils.freeze(model, [part])
    assert not any(key.startswith(part) and 'num_batches' in key for key in model.state_dict())
    loaded = timm.create_model(f'local-dir:{save(model, tmp_path)}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-5, atol=1e-4)


def test_descriptions_of_other_classes_are_forgotten(tmp_path):
    model = timm.create_model('test_vitresnet', num_classes=2)
    described = {'cat': 'a cat', 'dog': 'a dog'}
    model.pretrained_cfg.update(num_classes=2, label_names=['cat', 'dog'], label_descriptions=described)
    for names, kept in ((None, True), (['cat', 'dog'], True), (['x', 'y'], False)):
        text = (timm_vitres.save(model, tmp_path / str(names), names) / 'config.json').read_text()
        assert ('a cat' in text) == kept
    model.pretrained_cfg['label_names'] = {'n01440764': 'cat', 'n01443537': 'dog'}  # whose order nobody knows
    text = (timm_vitres.save(model, tmp_path / 'named', ['x', 'y']) / 'config.json').read_text()
    assert json.loads(text)['label_names'] == ['x', 'y'] and 'a cat' not in text
    assert 'label_names' not in json.loads((timm_vitres.save(model, tmp_path / 'none') / 'config.json').read_text())


def test_what_a_config_says_of_tests_survives_saving_again(tmp_path):
    model = timm.create_model('test_vitresnet', num_classes=2)
    config = {**timm.data.resolve_model_data_config(model), 'test_input_size': (3, 128, 128), 'test_crop_pct': 1.0}
    save(model, tmp_path / 'a', data_config=config)
    first = json.loads((tmp_path / 'a' / 'config.json').read_text())['pretrained_cfg']
    save(timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True), tmp_path / 'b')
    assert json.loads((tmp_path / 'b' / 'config.json').read_text())['pretrained_cfg'] == first
    loaded = timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True)
    assert timm.data.resolve_model_data_config(loaded, use_test_size=True)['input_size'] == (3, 128, 128)
    other = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True, img_size=64)
    save(other, tmp_path / 'c')  # of a model for another size, that of its tests is not known
    told = json.loads((tmp_path / 'c' / 'config.json').read_text())['pretrained_cfg']
    assert 'test_input_size' not in told and 'test_crop_pct' not in told
    loaded.pretrained_cfg['input_size'] = list(loaded.pretrained_cfg['input_size'])  # as in a cfg of the Hub
    save(loaded, tmp_path / 'd')
    assert json.loads((tmp_path / 'd' / 'config.json').read_text())['pretrained_cfg'] == first


def test_a_mean_for_each_channel(tmp_path):
    model = timm.create_model('test_vitresnet', num_classes=2, in_chans=6)
    save(model, tmp_path, data_config=dict(mean=[0.1] * 6, std=[0.2] * 6))
    assert json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']['mean'] == [0.1] * 6
    with pytest.raises(ValueError, match=r'mean: got .*one for each channel'):
        save(model, tmp_path, data_config=dict(mean=[0.1] * 4))
