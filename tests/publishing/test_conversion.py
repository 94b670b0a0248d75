import argparse
import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import randomise_, relative_difference, write_folder
from layouts import EXAMPLES, conformer_layout, google_layout, hybrid_layout, mmpretrain_layout
from PIL import Image

import timm_vitres
from timm_vitres.cli import main
from timm_vitres.publishing import neighbours
from timm_vitres.publishing.conversion import convert, our_name
from timm_vitres.weights.augreg import read_name


def logits(model, size):
    with torch.inference_mode():
        return model.eval()(torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size))


@pytest.mark.parametrize(
    'args, about, told',
    [
        (dict(epochs=3), dict(epoch=7), 'A run (model=test_vitresnet, epochs=3); it recorded epoch 7, no metric.'),
        (dict(data={'train': 'x'}, dataset=['a']), dict(metric={'top1': 3.0}), 'epoch unknown, no metric.'),
        (dict(data_dir=['x']), dict(arch='test_vitresnet', version=2, metric=3), "A run of timm's train.py"),
    ],
)
def test_settings_of_other_programs(args, about, told, tmp_path):
    """DeiT's and Conformer's code writes args, too, and mmengine's anything."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    settings = argparse.Namespace(model='test_vitresnet', **args)
    torch.save(dict(model=model.state_dict(), args=settings, **about), tmp_path / 'checkpoint.pth')
    folder = convert(tmp_path / 'checkpoint.pth', tmp_path / 'out')
    assert told in ' '.join((folder / 'README.md').read_text().split())


@pytest.mark.parametrize('average', [{}, {'decay': 0.9, 'updates': 10}, {'state_dict': {}}])
def test_an_average_that_is_none_is_passed_over(average, tmp_path, caplog):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2)).eval()
    torch.save(dict(state_dict=model.state_dict(), state_dict_ema=average, arch='test_vitresnet'), tmp_path / 'a.ckpt')
    folder = convert(tmp_path, tmp_path / 'out')  # the folder's only file
    assert torch.equal(logits(timm.create_model(f'local-dir:{folder}', pretrained=True), 64), logits(model, 64))
    assert 'a.ckpt: its state_dict_ema holds no averaged weights; those beside it are taken' in caplog.text


def test_an_average_in_an_unknown_place_is_not_passed_over(tmp_path):
    weights = randomise_(timm.create_model('test_vitresnet', num_classes=2)).state_dict()
    torch.save(dict(state_dict=weights, state_dict_ema={'shadow': weights, 'decay': 0.9}), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='holds no state dict'):
        convert(tmp_path / 'a.pth', tmp_path / 'out', 'test_vitresnet')


def test_a_table_of_the_architectures_own_size_is_no_guess(tmp_path, caplog):
    torch.save(timm.create_model('vitresnet_nano').state_dict(), tmp_path / 'nano.pth')
    convert(tmp_path / 'nano.pth', tmp_path / 'out', 'vitresnet_nano')
    assert 'positions are taken' not in caplog.text
    torch.save(timm.create_model('vitresnet_nano', img_size=(32, 128 + 16)).state_dict(), tmp_path / 'strips.pth')
    with pytest.raises(ValueError, match='are no square grid'):
        convert(tmp_path / 'strips.pth', tmp_path / 'strips', 'vitresnet_nano')
    torch.save(timm.create_model('vitresnet_nano', img_size=(32, 72)).state_dict(), tmp_path / 'square.pth')
    convert(tmp_path / 'square.pth', tmp_path / 'square', 'vitresnet_nano')
    assert 'pos_embed: 36 positions are taken for 6 x 6' in caplog.text


def test_timms_training_checkpoint(tmp_path, capsys):
    """What train.py leaves, with its settings: name, classes, size, normalisation, averaged weights."""
    root = write_folder(tmp_path / 'images', per_class=1)
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2, img_size=64, global_pool='avg'))
    averaged = randomise_(timm.create_model('test_vitresnet', num_classes=2, img_size=64, global_pool='avg'), seed=1)
    args = argparse.Namespace(
        **dict(model='test_vitresnet', data_dir=str(root), num_classes=2, img_size=64, input_size=None, in_chans=None),
        **dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], crop_pct=0.8, interpolation='', gp='avg', epochs=7, lr=0.01),
        **dict(model_kwargs={}, class_map='', train_split='train', eval_metric='top1', opt='adamw'),
    )
    checkpoint = dict(epoch=5, arch='test_vitresnet', state_dict=model.state_dict(), args=args, version=2, metric=71.5)
    checkpoint['state_dict_ema'] = {'module.' + key: value for key, value in averaged.state_dict().items()}
    torch.save(checkpoint, tmp_path / 'model_best.pth.tar')
    for flags, expected in (([], averaged), (['--no-ema'], model)):
        folder = tmp_path / f'out{len(flags)}'
        assert main(['convert', str(tmp_path / 'model_best.pth.tar'), '--output', str(folder), *flags]) == 0
        assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in capsys.readouterr().out
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert torch.equal(logits(loaded, 64), logits(expected, 64))
        assert loaded.pretrained_cfg['label_names'] == ['across', 'down']
        config = timm.data.resolve_model_data_config(loaded)
        assert tuple(config['mean']) == (0.1, 0.2, 0.3) and config['crop_pct'] == 0.8
        assert tuple(config['input_size']) == (3, 64, 64)
        card = (folder / 'README.md').read_text()
        assert 'epochs=7' in card and 'epoch 5, top1 71.50' in card and 'Not measured.' in card


def test_a_table_stays_what_it_was(tmp_path):
    """train.py --img-size 64 leaves the table of 96 pixels: it is kept, and the images' size is in the data config."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    args = argparse.Namespace(model='test_vitresnet', img_size=64)
    torch.save(dict(arch='test_vitresnet', state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    loaded = timm.create_model(f'local-dir:{convert(tmp_path / "last.pth.tar", tmp_path / "out")}', pretrained=True)
    assert torch.equal(loaded.pos_embed, model.pos_embed) and loaded.patch_embed.img_size == (96, 96)
    assert tuple(timm.data.resolve_model_data_config(loaded)['input_size']) == (3, 64, 64)
    assert torch.equal(logits(loaded, 64), logits(model, 64)) and torch.equal(logits(loaded, 128), logits(model, 128))


def test_timms_hybrids_become_ours(tmp_path):
    model = randomise_(timm.create_model('vit_tiny_r_s16_p8_384', num_classes=4, in_chans=1, global_pool='avg'))
    args = argparse.Namespace(gp='avg', model_kwargs={})
    checkpoint = dict(state_dict=model.state_dict(), arch='vit_tiny_r_s16_p8_384', args=args)
    torch.save(checkpoint, tmp_path / 'last.pth.tar')
    folder = convert(tmp_path / 'last.pth.tar', tmp_path / 'out', label_names=list('abcd'))
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(1, 1, 384, 384)
    with torch.inference_mode():
        assert relative_difference(loaded(x), model(x)) < 1e-6
    assert loaded.pretrained_cfg['architecture'] == 'vitresnet_tiny' and loaded.patch_embed.img_size == (384, 384)
    assert loaded.pretrained_cfg['label_names'] == list('abcd') and loaded.pretrained_cfg['crop_pct'] == 1.0


def test_googles_npz(tmp_path):
    """Without a word: the architecture from the shapes, the preprocessing of the published weights of that size."""
    model = randomise_(timm.create_model('vit_small_r26_s32_224', num_classes=6))
    np.savez(tmp_path / 'R26_S_32.npz', **google_layout(model))
    folder = convert(tmp_path / 'R26_S_32.npz', tmp_path / 'out')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert relative_difference(logits(loaded, 224), logits(model, 224)) < 1e-6
    config = timm.data.resolve_model_data_config(loaded)
    assert config['crop_pct'] == 0.9 and tuple(config['mean']) == (0.5, 0.5, 0.5)
    assert 'Google JAX layout' in (folder / 'README.md').read_text()


@pytest.mark.parametrize('resample, interpolation', [(2, 'bilinear'), (4, 'box'), (None, 'bicubic')])
def test_transformers_folder(resample, interpolation, tmp_path):
    """Class names and preprocessing stand beside the weights."""
    model = randomise_(timm.create_model('vit_base_r50_s16_384', num_classes=3))
    safetensors.torch.save_file(hybrid_layout(model), tmp_path / 'model.safetensors')
    names = {'2': 'two', '0': 'zero', '1': 'one'}
    (tmp_path / 'config.json').write_text(json.dumps(dict(id2label=names, image_size=384, model_type='vit-hybrid')))
    preprocessor = dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], size=dict(height=384))
    preprocessor.update(dict(resample=resample) if resample else {})
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(preprocessor))
    loaded = timm.create_model(f'local-dir:{convert(tmp_path, tmp_path / "out")}', pretrained=True)
    assert loaded.pretrained_cfg['label_names'] == ['zero', 'one', 'two']
    assert timm.data.resolve_model_data_config(loaded)['interpolation'] == interpolation
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize(
    'config, message',
    [
        (dict(architecture='test_vitresnet', model_args=dict(cache_dir='/x')), 'model_args: cache_dir says nothing'),
        (dict(architecture='resnet18', model_args=dict(pretrained=True)), 'model_args: pretrained says nothing'),
        (dict(architecture='vitresnet', model_args=dict(features_only=True)), 'model_args: features_only says nothing'),
    ],
)
def test_a_config_chooses_no_weights(config, message, tmp_path, monkeypatch):
    """What it says is given to timm, which would write a download to a place of its choice."""
    weights = timm.create_model('test_vitresnet').state_dict()
    safetensors.torch.save_file(weights, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'pretrained_cfg': {}}))
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: pytest.fail('a model was made'))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / 'out')


def test_what_an_address_hides_stays_out_of_the_card(tmp_path, monkeypatch):
    torch.save(timm.create_model('test_vitresnet', num_classes=2).state_dict(), tmp_path / 'w.pth')
    monkeypatch.setattr(neighbours, 'url_file', lambda url: tmp_path / 'w.pth')
    address = 'https://example.org/a%20b/w.pth?sig=SECRET&x=/tail'
    card = (convert(address, tmp_path / 'out', 'test_vitresnet') / 'README.md').read_text()
    assert 'Converted from `w.pth`' in card and 'SECRET' not in card and 'tail' not in card


def test_a_generic_hybrid_with_its_arguments(tmp_path):
    options = dict(backbone='resnet18', stage=1, embed_dim=32, num_heads=2, depth=1)
    model = randomise_(timm.create_model('vitresnet', num_classes=2, img_size=(32, 64), **options))
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='model: not given, and the checkpoint has the tensors of none of'):
        convert(tmp_path / 'weights.pth', tmp_path / 'out')
    flags = [f'{key}={value!r}' for key, value in options.items()]
    command = ['convert', str(tmp_path / 'weights.pth'), '--output', str(tmp_path / 'out'), '--model', 'vitresnet']
    assert main([*command, '--img-size', '32', '64', '--model-kwargs', *flags]) == 0
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert torch.equal(logits(loaded, 64), logits(model, 64)) and loaded.patch_embed.img_size == (32, 64)


def test_what_is_refused(tmp_path, capsys):
    model = timm.create_model('test_vitresnet', num_classes=2)
    weights = model.state_dict()
    weights['extra'] = torch.ones(1)
    torch.save(dict(arch='test_vitresnet', state_dict=weights), tmp_path / 'a.pth')
    assert main(['convert', str(tmp_path / 'a.pth'), '--output', str(tmp_path / 'out')]) == 1
    assert 'unexpected keys: extra' in capsys.readouterr().err and not (tmp_path / 'out').exists()
    torch.save(dict(arch='resnet18', state_dict=weights), tmp_path / 'b.pth')
    with pytest.raises(ValueError, match="model: got 'resnet18', which is none of timm-vitres"):
        convert(tmp_path / 'b.pth', tmp_path / 'out')
    torch.save(dict(arch='no_such', state_dict=weights), tmp_path / 'c.pth')
    with pytest.raises(ValueError, match="got 'no_such', which timm does not know"):
        convert(tmp_path / 'c.pth', tmp_path / 'out')
    torch.save([1, 2], tmp_path / 'd.pth')
    with pytest.raises(ValueError, match='holds no state dict'):
        convert(tmp_path / 'd.pth', tmp_path / 'out')
    weights = model.state_dict()
    weights['pos_embed'] = torch.zeros(1, 7, 64)
    torch.save(dict(arch='test_vitresnet', state_dict=weights), tmp_path / 'e.pth')
    with pytest.raises(ValueError, match='img_size: tried 96 x 96, and the 6 position embeddings'):
        convert(tmp_path / 'e.pth', tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match='there is no such file or folder'):
        convert(tmp_path / 'none.pth', tmp_path / 'out')


def test_a_table_is_of_the_size_of_the_model_that_was_trained_not_of_its_images(tmp_path):
    """Images of 32 x 288 pixels have as many tokens as those of 96 x 96, which the table is of."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    args = argparse.Namespace(model='test_vitresnet', input_size=[3, 32, 288])
    torch.save(dict(arch='test_vitresnet', state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    loaded = timm.create_model(f'local-dir:{convert(tmp_path / "last.pth.tar", tmp_path / "out")}', pretrained=True)
    assert loaded.patch_embed.img_size == (96, 96)
    x = torch.linspace(-1, 1, 3 * 32 * 288).view(1, 3, 32, 288)
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(x), model.eval()(x))


@pytest.mark.parametrize('by', ['argument', 'config'])
def test_a_size_that_is_told_helps_to_find_the_architecture(by, tmp_path):
    model = randomise_(timm.create_model('vitresnet_nano', num_classes=2, img_size=(32, 64)))
    folder = tmp_path / 'source'
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / 'model.safetensors')
    size = dict(img_size=(32, 64)) if by == 'argument' else {}
    if by == 'config':
        (folder / 'config.json').write_text(json.dumps(dict(image_size=[32, 64])))
    loaded = timm.create_model(f'local-dir:{convert(folder, tmp_path / "out", **size)}', pretrained=True)
    assert torch.equal(loaded.pos_embed, model.pos_embed) and loaded.patch_embed.img_size == (32, 64)


def test_a_square_that_has_as_many_tokens_does_not_take_the_place_of_a_size_that_is_told(tmp_path):
    model = randomise_(timm.create_model('vitresnet_nano', num_classes=2, img_size=(16, 64)))
    grid = model.patch_embed.grid_size
    assert grid[0] * grid[1] == (grid[0] * 2) ** 2
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    loaded = timm.create_model(
        f'local-dir:{convert(tmp_path / "w.pth", tmp_path / "out", img_size=(16, 64))}', pretrained=True
    )
    assert loaded.patch_embed.img_size == (16, 64)


def test_the_architecture_alone_is_given_of_a_run_that_began_with_a_folder(tmp_path):
    """Its arguments, mean and crop are still those of what it began with; of another architecture nothing is."""
    first = timm.create_model('vitresnet_nano', num_classes=5, num_heads=2, act_layer='relu')
    timm_vitres.save(first, tmp_path / 'first', data_config=dict(mean=(0.1,) * 3, crop_pct=0.5))
    model = randomise_(timm.create_model('vitresnet_nano', num_classes=2, num_heads=2, act_layer='relu'))
    args = argparse.Namespace(model=f'local-dir:{tmp_path}/first', model_kwargs={})
    torch.save(dict(arch=args.model, state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    folder = convert(tmp_path / 'last.pth.tar', tmp_path / 'out', model='vitresnet_nano')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(logits(loaded, 32), logits(model, 32))
    data = timm.data.resolve_model_data_config(loaded)
    assert data['crop_pct'] == 0.5 and tuple(data['mean']) == (0.1, 0.1, 0.1)
    other = randomise_(timm.create_model('test_vitresnet_mix', num_classes=2))
    torch.save(dict(arch=args.model, state_dict=other.state_dict(), args=args), tmp_path / 'last.pth.tar')
    folder = convert(tmp_path / 'last.pth.tar', tmp_path / 'other', model='test_vitresnet_mix')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(logits(loaded, 64), logits(other, 64))
    assert tuple(timm.data.resolve_model_data_config(loaded)['mean']) != (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    'name, ours',
    [
        ('vit_tiny_r_s16_p8_224_in21k', 'vitresnet_tiny'),
        ('vit_small_r26_s32_224_in21k', 'vitresnet_small'),
        ('vit_base_resnet50_224_in21k', 'vitresnet_base'),
        ('vit_base_resnet50_384', 'vitresnet_base'),
        ('vit_base_r50_s16_224_in21k', 'vitresnet_base'),
        ('vit_large_r50_s32_384.augreg_in21k_ft_in1k', 'vitresnet_large'),
        ('hf-hub:timm/vit_large_r50_s32_224.augreg_in21k', 'vitresnet_large'),
        ('resnet50', 'resnet50'),
    ],
)
def test_names_of_timm_old_and_new(name, ours):
    assert our_name(name) == ours


@pytest.mark.parametrize('begun', ['folder', 'gone'])
def test_a_run_that_began_with_a_folder(begun, tmp_path, caplog):
    """timm writes its name as the architecture's; arguments that no shape shows are in its config.json alone."""
    model = randomise_(timm.create_model('vitresnet_nano', num_classes=2, num_heads=2, act_layer='relu'))
    folder = tmp_path / 'vitresnet_small'  # by this name it would be another architecture
    if begun == 'folder':  # as timm itself saves, which writes num_classes into the arguments, too
        first = timm.create_model('vitresnet_nano', num_classes=5, num_heads=2, act_layer='relu')
        timm_vitres.save(first, folder, label_names=list('abcde'), data_config=dict(mean=(0.1,) * 3, crop_pct=0.5))
        config = json.loads((folder / 'config.json').read_text())
        config['model_args']['num_classes'] = 5
        (folder / 'config.json').write_text(json.dumps(config))
    args = argparse.Namespace(model=f'local-dir:{folder}', model_kwargs={})
    torch.save(dict(arch=args.model, state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    loaded = timm.create_model(f'local-dir:{convert(tmp_path / "last.pth.tar", tmp_path / "out")}', pretrained=True)
    assert loaded.pretrained_cfg['architecture'] == 'vitresnet_nano'
    assert torch.equal(logits(loaded, 32), logits(model, 32)) == (begun == 'folder')
    assert ('is found by its tensors' in caplog.text) == (begun == 'gone')
    data = timm.data.resolve_model_data_config(loaded)
    assert (data['crop_pct'] == 0.5 and tuple(data['mean']) == (0.1, 0.1, 0.1)) == (begun == 'folder')
    assert 'label_names' not in loaded.pretrained_cfg


def test_settings_of_other_programs_and_channels(tmp_path):
    """Conformer's own code, as DeiT's, calls the side of images input_size; means are one for each channel."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2, in_chans=4))
    args = argparse.Namespace(
        model='test_vitresnet', input_size=64, in_chans=4, mean=[0.1, 0.2, 0.3, 0.4], std=[0.5, 0.5, 0.5, 0.6]
    )
    torch.save(dict(model=model.state_dict(), args=args), tmp_path / 'checkpoint.pth')
    loaded = timm.create_model(f'local-dir:{convert(tmp_path / "checkpoint.pth", tmp_path / "out")}', pretrained=True)
    config = timm.data.resolve_model_data_config(loaded)
    assert tuple(config['input_size']) == (4, 64, 64) and tuple(config['mean']) == (0.1, 0.2, 0.3, 0.4)
    args.mean = [0.1, 0.2]
    torch.save(dict(model=model.state_dict(), args=args), tmp_path / 'checkpoint.pth')
    with pytest.raises(ValueError, match=r'mean: got \(0\.1, 0\.2\), expected one number, or one for each channel'):
        convert(tmp_path / 'checkpoint.pth', tmp_path / 'out')


def test_a_licence_is_the_sources_own(tmp_path):
    folder = timm_vitres.save(timm.create_model('test_vitresnet', num_classes=2), tmp_path / 'source')
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg'].update(license='cc-by-nc-4.0', tag='mine', description='of cats')
    (folder / 'config.json').write_text(json.dumps(config))
    told = json.loads((convert(folder, tmp_path / 'out') / 'config.json').read_text())['pretrained_cfg']
    assert (told['license'], told['tag'], told['description']) == ('cc-by-nc-4.0', 'mine', 'of cats')
    assert 'license: cc-by-nc-4.0' in (tmp_path / 'out' / 'README.md').read_text()
    torch.save(timm.create_model('vitresnet_nano', num_classes=2).state_dict(), tmp_path / 'mine.pth')
    told = json.loads((convert(tmp_path / 'mine.pth', tmp_path / 'b') / 'config.json').read_text())['pretrained_cfg']
    assert not told.get('license') and not told.get('tag')  # those of the registry are of other weights
    # the card beside weights tells their owner's licence, where config.json, such as transformers', does not
    (tmp_path / 'theirs').mkdir()
    _, write = EXAMPLES['transformers DPT-Hybrid']
    torch.save(write(timm.create_model('vitresnet_base', num_classes=0)), tmp_path / 'theirs' / 'pytorch_model.bin')
    (tmp_path / 'theirs' / 'README.md').write_text('---\nlicense: cc-by-nc-4.0\n---\n# Theirs\n')
    assert 'license: cc-by-nc-4.0' in (convert(tmp_path / 'theirs', tmp_path / 'c') / 'README.md').read_text()


def test_tokens_that_are_missing_or_too_many_are_named(tmp_path):
    for options, said in ((dict(class_token=False, global_pool='avg'), 'cls_token'), (dict(reg_tokens=4), 'reg_token')):
        model = timm.create_model('test_vitresnet', num_classes=2, **options)
        torch.save(dict(arch='test_vitresnet', state_dict=model.state_dict()), tmp_path / 'w.pth')
        with pytest.raises(RuntimeError, match=f'The checkpoint is not one of test_vitresnet.* keys: .*{said}'):
            convert(tmp_path / 'w.pth', tmp_path / 'out')
        overlay = dict(file=str(tmp_path / 'w.pth'), num_classes=2)
        with pytest.raises(RuntimeError, match=f'The checkpoint is not one of test_vitresnet.* keys: .*{said}'):
            timm.create_model('test_vitresnet', pretrained=True, num_classes=2, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('told', [True, False])
def test_conformers_become_ours(told, tmp_path):
    """By the name in their authors' training checkpoint, or, of mmpretrain, by the shapes of the tensors."""
    name = 'vitresnet_dual_small_p32' if told else 'vitresnet_dual_tiny'
    model = randomise_(timm.create_model(name, num_classes=4))
    checkpoint = dict(model=conformer_layout(model.state_dict()), epoch=3)
    checkpoint['args'] = argparse.Namespace(model='Conformer_small_patch32')
    if not told:
        checkpoint = dict(state_dict=mmpretrain_layout(model.state_dict()), meta=dict(epoch=3))
    torch.save(checkpoint, tmp_path / 'checkpoint.pth')
    folder = convert(tmp_path / 'checkpoint.pth', tmp_path / 'out')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert loaded.pretrained_cfg['architecture'] == name and loaded.num_classes == 4
    assert torch.equal(logits(loaded, 64), logits(model, 64))
    assert timm.data.resolve_model_data_config(loaded)['crop_pct'] == 0.875
    layout = 'Conformer layout' if told else 'mmpretrain Conformer layout'
    assert layout in (folder / 'README.md').read_text()


@pytest.mark.parametrize('names', [{'1': 'dog', '0': 'cat'}, {1: 'dog', 0: 'cat'}, np.array(['cat', 'dog'])])
def test_names_are_given_in_any_form(names, tmp_path):
    torch.save(timm.create_model('test_vitresnet', num_classes=2).state_dict(), tmp_path / 'a.pth')
    folder = convert(tmp_path / 'a.pth', tmp_path / 'out', 'test_vitresnet', names)
    config = json.loads((folder / 'config.json').read_text())
    assert config['label_names'] == ['cat', 'dog'] and 'cat, dog' in (folder / 'README.md').read_text()
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).pretrained_cfg['label_names'] == ['cat', 'dog']


@pytest.mark.parametrize('names', [['cat'], {'0': 'cat', '2': 'dog'}, {'cat': 0, 'dog': 1}, 'ab', [b'cat', b'dog']])
def test_names_that_are_none(names, tmp_path):
    torch.save(timm.create_model('test_vitresnet', num_classes=2).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='label_names: '):
        convert(tmp_path / 'a.pth', tmp_path / 'out', 'test_vitresnet', names)
    assert not (tmp_path / 'out').exists()


FLAT = dict(
    **dict(architecture='test_vitresnet', num_classes=2, num_features=64, input_size=[3, 64, 64], crop_pct=0.8),
    **dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation='bilinear', labels=['cat', 'dog']),
    **dict(fixed_input_size=False, classifier='head', first_conv='patch_embed.backbone.stem.conv'),
)


@pytest.mark.parametrize('flat', [True, False])
def test_timms_older_config_is_read(flat, tmp_path):
    """The pretrained cfg at the top of config.json, where timm had it, means what it means below `pretrained_cfg`."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2, img_size=64))
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'model.safetensors')
    cfg = {key: value for key, value in FLAT.items() if key not in ('architecture', 'num_features', 'labels')}
    nested = dict(architecture='test_vitresnet', num_classes=2, label_names=['cat', 'dog'], pretrained_cfg=cfg)
    (tmp_path / 'config.json').write_text(json.dumps(FLAT if flat else nested))
    loaded = timm.create_model(f'local-dir:{convert(tmp_path, tmp_path / "out")}', pretrained=True)
    assert torch.equal(logits(loaded, 64), logits(model, 64))
    assert loaded.pretrained_cfg['label_names'] == ['cat', 'dog']
    data = timm.data.resolve_model_data_config(loaded)
    assert tuple(data['mean']) == (0.1, 0.2, 0.3) and tuple(data['std']) == (0.4, 0.5, 0.6)
    assert data['crop_pct'] == 0.8 and data['interpolation'] == 'bilinear' and tuple(data['input_size']) == (3, 64, 64)


def test_what_is_converted_again_is_the_same(tmp_path):
    """A model trained on images of another size than its table's keeps both."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    data = dict(timm.data.resolve_model_data_config(model), input_size=(3, 64, 64), crop_pct=0.7)
    first = timm_vitres.save(model, tmp_path / 'first', ['cat', 'dog'], data)
    loaded = timm.create_model(f'local-dir:{convert(first, tmp_path / "out")}', pretrained=True)
    found = timm.data.resolve_model_data_config(loaded)
    assert tuple(found['input_size']) == (3, 64, 64) and found['crop_pct'] == 0.7
    assert loaded.patch_embed.img_size == (96, 96) and torch.equal(loaded.pos_embed, model.pos_embed)


@pytest.mark.parametrize('text', ['{', '[1]', '"text"', '\ud800'])
def test_a_config_beside_that_is_none(text, tmp_path):
    torch.save(timm.create_model('test_vitresnet', num_classes=2).state_dict(), tmp_path / 'a.pth')
    for name in ('config.json', 'preprocessor_config.json'):
        (tmp_path / name).write_bytes(text.encode(errors='surrogatepass'))
        with pytest.raises(ValueError, match=rf'{name} (is no JSON|holds \w+, expected an object)'):
            convert(tmp_path, tmp_path / 'out', 'test_vitresnet')
        (tmp_path / name).unlink()


def test_settings_as_a_dict(tmp_path):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2, img_size=64))
    checkpoint = dict(state_dict=model.state_dict(), args=dict(model='test_vitresnet', img_size=64, crop_pct=0.6))
    torch.save(checkpoint, tmp_path / 'a.pth')
    loaded = timm.create_model(f'local-dir:{convert(tmp_path / "a.pth", tmp_path / "out")}', pretrained=True)
    assert torch.equal(logits(loaded, 64), logits(model, 64))
    assert timm.data.resolve_model_data_config(loaded)['crop_pct'] == 0.6


def test_nothing_of_the_users_is_written_over(tmp_path):
    torch.save(timm.create_model('test_vitresnet').state_dict(), tmp_path / 'weights.pth')
    for name in ('README.md', 'config.json'):
        (tmp_path / 'mine').mkdir(exist_ok=True)
        (tmp_path / 'mine' / name).write_text('mine')
        with pytest.raises(FileExistsError, match=f'^folder: .*mine holds {name} already'):
            convert(tmp_path / 'weights.pth', tmp_path / 'mine', 'test_vitresnet')
        assert (tmp_path / 'mine' / name).read_text() == 'mine'
        (tmp_path / 'mine' / name).unlink()
    for _ in range(2):  # its own is replaced
        convert(tmp_path / 'weights.pth', tmp_path / 'out', 'test_vitresnet')


@pytest.mark.parametrize(
    'dataset, expected',
    [('', ['1', '2', '10']), ('torch/image_folder', ['1', '10', '2']), ('torch/cifar10', None)],
)
def test_class_names_are_in_the_order_of_the_dataset(dataset, expected, tmp_path):
    for name in ('1', '2', '10'):
        (tmp_path / 'images' / 'train' / name).mkdir(parents=True)
    model = timm.create_model('test_vitresnet', num_classes=3)
    args = argparse.Namespace(
        model='test_vitresnet', dataset=dataset, data_dir=str(tmp_path / 'images'), train_split='train'
    )
    torch.save(dict(state_dict=model.state_dict(), arch='test_vitresnet', args=args), tmp_path / 'last.pth.tar')
    folder = convert(tmp_path / 'last.pth.tar', tmp_path / 'out')
    assert json.loads((folder / 'config.json').read_text()).get('label_names') == expected


def test_class_folders_are_those_that_timm_took(tmp_path):
    for split in ('training', 'validation'):
        for name in ('cat', 'dog'):
            (tmp_path / 'images' / split / name).mkdir(parents=True)
    model = timm.create_model('test_vitresnet', num_classes=2)
    for folder, expected in (('images', ['cat', 'dog']), ('elsewhere', None)):
        args = argparse.Namespace(model='test_vitresnet', data_dir=str(tmp_path / folder), train_split='train')
        torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
        written = convert(tmp_path / 'last.pth.tar', tmp_path / f'out of {folder}')
        assert json.loads((written / 'config.json').read_text()).get('label_names') == expected
        (tmp_path / 'elsewhere' / 'val').mkdir(parents=True, exist_ok=True)
        (tmp_path / 'elsewhere' / 'test').mkdir(exist_ok=True)


@pytest.mark.parametrize('dataset, expected', [('', ['whole', 'zoom']), ('torch/image_folder', ['broken', 'whole'])])
def test_class_folders_are_those_that_hold_the_images_where_timm_read_them(dataset, expected, tmp_path):
    for place in ('broken/zoom', 'whole'):
        path = tmp_path / 'images/train' / place / '1.png'
        path.parent.mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(path)
    model = timm.create_model('test_vitresnet', num_classes=2)
    args = argparse.Namespace(model='test_vitresnet', dataset=dataset, data_dir=str(tmp_path / 'images'))
    torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    images = timm.data.create_dataset(dataset, root=tmp_path / 'images', split='train')
    read = (images if dataset else images.reader).class_to_idx
    assert sorted(read, key=read.get) == expected
    (tmp_path / 'images/train/whole/again').symlink_to(tmp_path / 'images/train/whole')  # whoever walks goes in circles
    folder = convert(tmp_path / 'last.pth.tar', tmp_path / 'out')
    assert json.loads((folder / 'config.json').read_text())['label_names'] == expected


@pytest.mark.parametrize('name, size', [('vitresnet_mix_nano.fmnist', 64), ('vitresnet_tiny', 384)])
def test_preprocessing_is_that_of_the_model_that_was_trained(name, size, tmp_path):
    """Weights of its size, which another tag has, are others."""
    model = timm.create_model(name, num_classes=2, img_size=size)
    args = argparse.Namespace(model=name, img_size=size, num_classes=2)
    torch.save(dict(state_dict=model.state_dict(), arch=name, args=args), tmp_path / 'last.pth.tar')
    folder = convert(tmp_path / 'last.pth.tar', tmp_path / 'out')
    expected = timm.data.resolve_data_config(vars(args), model=model)
    found = timm.data.resolve_model_data_config(timm.create_model(f'local-dir:{folder}'))
    for key in ('mean', 'std', 'interpolation', 'crop_pct'):
        value, wanted = found[key], expected[key]
        assert tuple(value) == tuple(wanted) if key in ('mean', 'std') else value == wanted, key


def test_a_config_of_another_model_beside_a_file_is_left_alone(tmp_path, caplog):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    torch.save(model.state_dict(), tmp_path / 'mine.pth')
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='bert', id2label={'0': 'no', '1': 'yes'})))
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(dict(image_mean=[0, 0, 0], image_std=[1, 1, 1])))
    config = json.loads(
        (convert(tmp_path / 'mine.pth', tmp_path / 'out', 'test_vitresnet') / 'config.json').read_text()
    )
    assert 'label_names' not in config
    assert tuple(config['pretrained_cfg']['mean']) == tuple(model.pretrained_cfg['mean'])
    assert f'{tmp_path / "config.json"}: is of another model than mine.pth, and left alone' in caplog.text
    (tmp_path / 'config.json').unlink()  # a preprocessor alone is of nobody knows what
    folder = convert(tmp_path / 'mine.pth', tmp_path / 'out', 'test_vitresnet')
    assert tuple(json.loads((folder / 'config.json').read_text())['pretrained_cfg']['mean']) == tuple(
        model.pretrained_cfg['mean']
    )
    (tmp_path / 'config.json').write_text(json.dumps(dict(id2label={'0': 'no', '1': 'yes'})))  # of no other
    folder = convert(tmp_path / 'mine.pth', tmp_path / 'out', 'test_vitresnet')
    config = json.loads((folder / 'config.json').read_text())
    assert config['label_names'] == ['no', 'yes'] and config['pretrained_cfg']['mean'] == [0, 0, 0]


@pytest.mark.parametrize(
    'told, expected',
    [
        (dict(size=dict(shortest_edge=110), crop_size=dict(height=96, width=96)), (96 / 110, 'center')),
        (dict(size=110, crop_size=96, do_center_crop=True), (96 / 110, 'center')),
        (dict(size=dict(height=96, width=96)), (1.0, 'squash')),
        (dict(size=dict(height=96, width=96), keep_aspect_ratio=True), (1.0, 'center')),
        (dict(size=dict(shortest_edge=96), do_center_crop=False), (1.0, 'center')),
        ({}, (1.0, 'center')),
    ],
)
def test_transformers_names_for_a_crop(told, expected, tmp_path):
    torch.save(timm.create_model('test_vitresnet', num_classes=2).state_dict(), tmp_path / 'model.pth')
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(dict(told, image_mean=[0.5, 0.5, 0.5])))
    folder = convert(tmp_path / 'model.pth', tmp_path / 'out', 'test_vitresnet')
    config = timm.data.resolve_model_data_config(timm.create_model(f'local-dir:{folder}'))
    assert (config['crop_pct'], config['crop_mode']) == expected


def test_the_layout_is_known_in_a_process_groups_wrapper(tmp_path):
    model = randomise_(timm.create_model('vitresnet_dual_tiny', num_classes=2))
    weights = {f'module.{key}': value for key, value in conformer_layout(model.state_dict()).items()}
    torch.save(weights, tmp_path / 'conformer.pth')
    folder = convert(tmp_path / 'conformer.pth', tmp_path / 'out')
    assert '(Conformer layout)' in (folder / 'README.md').read_text()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x)
        assert relative_difference(loaded, model.eval()(x)) < 1e-6


def test_a_file_that_was_downloaded_is_known_by_its_address(tmp_path, monkeypatch):
    """In a cache its folder is another one, by which files of the first paper are known."""
    monkeypatch.setattr(neighbours, 'url_file', lambda url: tmp_path / 'R50%2BViT-B_16.npz')

    def stop(path):
        raise InterruptedError(read_name(path))

    monkeypatch.setattr('timm_vitres.publishing.conversion.read_name', stop)
    for source in ('imagenet21k/R50+ViT-B_16', 'gs://vit_models/imagenet21k/R50+ViT-B_16.npz'):
        with pytest.raises(InterruptedError, match='it was pretrained on imagenet21k'):
            convert(source, tmp_path / 'out')


def test_class_folders_that_got_folders_of_their_own_since(tmp_path):
    for place in ('cat/old', 'cat', 'dog'):
        (tmp_path / 'images/train' / place).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 32)).save(tmp_path / 'images/train' / place / '1.png')
    model = timm.create_model('test_vitresnet', num_classes=2)
    args = argparse.Namespace(model='test_vitresnet', dataset='', data_dir=str(tmp_path / 'images'))
    torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    folder = convert(tmp_path / 'last.pth.tar', tmp_path / 'out')
    assert json.loads((folder / 'config.json').read_text())['label_names'] == ['cat', 'dog']
