import argparse
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import randomise_, relative_difference
from layouts import google_layout, hybrid_layout

import timm_vitres
from timm_vitres.checkpoints import read_checkpoint
from timm_vitres.vitresnet import default_cfgs

TAGS = [
    # ours, timm's architecture
    ('vitresnet_tiny.augreg_in21k_ft_in1k', 'vit_tiny_r_s16_p8_224'),
    ('vitresnet_tiny.augreg_in21k_ft_in1k_384', 'vit_tiny_r_s16_p8_384'),
    ('vitresnet_tiny.augreg_in21k', 'vit_tiny_r_s16_p8_224'),
    ('vitresnet_small.augreg_in21k_ft_in1k', 'vit_small_r26_s32_224'),
    ('vitresnet_small.augreg_in21k_ft_in1k_384', 'vit_small_r26_s32_384'),
    ('vitresnet_small.augreg_in21k', 'vit_small_r26_s32_224'),
    ('vitresnet_base.orig_in21k', 'vit_base_r50_s16_224'),
    pytest.param('vitresnet_base.orig_in21k_ft_in1k_384', 'vit_base_r50_s16_384', marks=pytest.mark.slow),
    pytest.param('vitresnet_large.augreg_in21k_ft_in1k', 'vit_large_r50_s32_224', marks=pytest.mark.slow),
    pytest.param('vitresnet_large.augreg_in21k_ft_in1k_384', 'vit_large_r50_s32_384', marks=pytest.mark.slow),
    pytest.param('vitresnet_large.augreg_in21k', 'vit_large_r50_s32_224', marks=pytest.mark.slow),
]


@pytest.mark.parametrize('name, theirs', TAGS)
def test_timms_checkpoints_load_from_a_file(name, theirs, tmp_path):
    """Every published weight of timm's layout: as it is, at another size, with other classes and channels, as maps."""
    architecture, tag = name.split('.')
    cfg = default_cfgs[architecture].cfgs[tag]
    reference = randomise_(timm.create_model(theirs, num_classes=cfg.num_classes))
    file = str(tmp_path / 'weights.safetensors')
    safetensors.torch.save_file(reference.state_dict(), file)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=file)).eval()
    x = torch.randn(1, *cfg.input_size)
    with torch.inference_mode():
        assert relative_difference(model(x), reference(x)) < 1e-6
        if cfg.num_classes:
            # a 384 model of the same weights is what timm makes of them at 384
            larger = timm.create_model(
                name, pretrained=True, img_size=256, num_classes=0, pretrained_cfg_overlay=dict(file=file)
            ).eval()
            reference.set_input_size(img_size=(256, 256))
            reference.reset_classifier(0)
            x = torch.randn(1, 3, 256, 256)
            assert relative_difference(larger(x), reference(x)) < 1e-6


@pytest.mark.parametrize('name, theirs', [('vitresnet_tiny.augreg_in21k_ft_in1k', 'vit_tiny_r_s16_p8_224'), *TAGS[3:5]])
def test_changes_in_the_same_call(name, theirs, tmp_path):
    """Other classes, channels and size at once, and maps: against timm's class, loaded from the same file by timm."""
    file = str(tmp_path / 'weights.safetensors')
    safetensors.torch.save_file(randomise_(timm.create_model(theirs)).state_dict(), file)
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=file), in_chans=1)
    reference = timm.create_model(theirs, num_classes=0, **options).eval()
    reference.set_input_size(img_size=(128, 128))
    x = torch.randn(1, 1, 128, 128)
    model = timm.create_model(name, num_classes=9, img_size=128, **options).eval()
    maps = timm.create_model(name, features_only=True, img_size=128, **options).eval()
    with torch.inference_mode():
        expected = reference(x)
        assert model(x).shape == (1, 9) and model.head.weight.std() < 0.03
        assert relative_difference(model.forward_head(model.forward_features(x), pre_logits=True), expected) < 1e-6
        last = reference.forward_intermediates(x, intermediates_only=True)[-1]
        assert relative_difference(maps(x)[-1], last) < 1e-6


def test_timms_checkpoints_load_from_the_hubs_id(tmp_path):
    """The Hub's cache as a download leaves it, and a fresh process that may not ask the network."""
    reference = randomise_(timm.create_model('vit_tiny_r_s16_p8_224'))
    revision = '0123456789abcdef0123456789abcdef01234567'
    repo = tmp_path / 'models--timm--vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k'
    (repo / 'refs').mkdir(parents=True)
    (repo / 'refs' / 'main').write_text(revision)
    (repo / 'snapshots' / revision).mkdir(parents=True)
    safetensors.torch.save_file(reference.state_dict(), repo / 'snapshots' / revision / 'model.safetensors')
    code = (
        'import sys, timm, torch, timm_vitres\n'
        "model = timm.create_model('vitresnet_tiny.augreg_in21k_ft_in1k', pretrained=True, cache_dir=sys.argv[1])\n"
        'torch.save(model.eval()(torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)).detach(), sys.argv[2])\n'
    )
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1'}
    command = [sys.executable, '-c', code, str(tmp_path), str(tmp_path / 'logits.pt')]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with torch.inference_mode():
        expected = reference(torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224))
    assert relative_difference(torch.load(tmp_path / 'logits.pt'), expected) < 1e-6


@pytest.mark.parametrize(
    'name, theirs, classes, prefix',
    [
        ('vitresnet_tiny.augreg_in21k_ft_in1k', 'vit_tiny_r_s16_p8_224', 1000, ''),
        ('vitresnet_tiny.augreg_in21k_ft_in1k', 'vit_tiny_r_s16_p8_224', 1000, 'opt/target/'),
        ('vitresnet_small.augreg_in21k_ft_in1k', 'vit_small_r26_s32_224', 7, ''),
        ('vitresnet_base.orig_in21k', 'vit_base_r50_s16_224', 11, ''),
    ],
)
def test_googles_npz(name, theirs, classes, prefix, tmp_path):
    """The same file through timm's own loader of such files, and through ours, by each of its ways."""
    arrays = google_layout(randomise_(timm.create_model(theirs, num_classes=classes)), prefix)
    if prefix:
        arrays['opt/state/step'] = np.asarray(3)
    path = tmp_path / 'R50+ViT-B_16.npz'
    np.savez(path, **arrays)
    reference = timm.create_model(theirs, num_classes=classes).eval()
    reference.load_pretrained(str(path))
    other = tmp_path / 'weights'  # not by its name
    other.write_bytes(path.read_bytes())

    overlay = dict(file=str(other), num_classes=classes)
    loaded = timm.create_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay).eval()
    assert loaded.state_dict().keys() == reference.state_dict().keys()
    for key, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    if not prefix:
        options = dict(num_classes=classes, img_size=224, checkpoint_path=str(path))
        checkpoint = timm.create_model(name.split('.')[0], **options).eval()
        x = torch.randn(1, 3, 224, 224)
        with torch.inference_mode():
            assert relative_difference(checkpoint(x), reference(x)) < 1e-6


def test_transformers_vit_hybrid(tmp_path):
    """The layout by its published keys; against transformers itself in tests/test_vithybrid.py."""
    reference = randomise_(timm.create_model('vit_base_r50_s16_384'))
    weights = hybrid_layout(reference)
    assert len(weights) == len(reference.state_dict()) + 4 * 12  # two more for every qkv, weight and bias
    torch.save(weights, tmp_path / 'pytorch_model.bin')
    overlay = dict(file=str(tmp_path / 'pytorch_model.bin'))
    name = 'vitresnet_base.hf_in21k_ft_in1k_384'
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    for key, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    path = str(tmp_path / 'pytorch_model.bin')
    at_224 = timm.create_model(
        'vitresnet_base', img_size=224, checkpoint_path=path
    ).eval()  # its position table resampled
    reference.set_input_size(img_size=(224, 224))
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert relative_difference(at_224(x), reference.eval()(x)) < 1e-6
    weights.pop('vit.encoder.layer.3.attention.attention.key.bias')
    message = r'missing keys: blocks\.3\.attn\.qkv\.bias; unexpected keys: blocks\.3\.attn\.query\.bias'
    with pytest.raises(RuntimeError, match='not one of vitresnet_base as it was asked for: ' + message):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))


def training_checkpoint(model):
    """Return what timm's train.py saves (`CheckpointSaver._save`)."""
    args = argparse.Namespace(model='test_vitresnet', num_classes=3, mean=None, img_size=None)
    state_dict = model.state_dict()
    return dict(epoch=3, arch='test_vitresnet', state_dict=state_dict, version=2, args=args, metric=71.0)


@pytest.mark.parametrize('wrapper', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_timms_training_checkpoints(wrapper, tmp_path):
    model, averaged = (randomise_(timm.create_model('test_vitresnet', num_classes=3), seed=seed) for seed in (0, 1))
    checkpoint = training_checkpoint(model)
    checkpoint['state_dict'] = {wrapper + key: value for key, value in model.state_dict().items()}
    for name, expected in (('last.pth.tar', model), ('model_best.pth.tar', averaged)):
        if expected is averaged:
            checkpoint['state_dict_ema'] = averaged.state_dict()
        torch.save(checkpoint, tmp_path / name)
        overlay = dict(file=str(tmp_path / name), num_classes=3)
        loaded = [
            timm.create_model('test_vitresnet', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay),
            timm.create_model('test_vitresnet', num_classes=3, checkpoint_path=str(tmp_path / name)),
        ]
        for one in loaded:
            for key, value in expected.state_dict().items():
                assert torch.equal(one.state_dict()[key], value), key
    weights, about = read_checkpoint(tmp_path / 'model_best.pth.tar', use_ema=False)
    assert weights.keys() == checkpoint['state_dict'].keys() and about['epoch'] == 3 and about['args'].num_classes == 3
    assert torch.equal(weights[wrapper + 'norm.weight'], model.norm.weight)


@pytest.mark.parametrize(
    'theirs, ours', [('vit_tiny_r_s16_p8_384', 'vitresnet_tiny'), ('vit_small_r26_s32_384', 'vitresnet_small')]
)
def test_users_checkpoints_at_another_size(theirs, ours, tmp_path):
    """What was trained at 384 by timm's class, through checkpoint_path at 256."""
    reference = randomise_(timm.create_model(theirs, num_classes=5))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / 'model.safetensors')
    path = str(tmp_path / 'model.safetensors')
    loaded = timm.create_model(ours, num_classes=5, img_size=256, checkpoint_path=path).eval()
    reference.set_input_size(img_size=(256, 256))
    x = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        assert relative_difference(loaded(x), reference(x)) < 1e-6
    with pytest.raises(RuntimeError, match=r'size mismatch for head\.weight'):
        timm.create_model(ours, num_classes=6, checkpoint_path=path)


class Evil:
    def __reduce__(self):
        return os.system, ('touch EVIL',)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_with_code_is_never_run(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model('test_vitresnet', num_classes=3)
    checkpoint = dict(state_dict=model.state_dict(), args=Evil())
    torch.save(checkpoint, tmp_path / 'pytorch_model.bin', _use_new_zipfile_serialization=zipped)
    timm_vitres.save(model, tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    for options in (
        dict(model_name=f'local-dir:{tmp_path}', pretrained=True),
        dict(model_name='test_vitresnet', pretrained=True, pretrained_cfg_overlay=dict(file='pytorch_model.bin')),
    ):
        with pytest.raises(
            ValueError, match=r'was not opened: it holds Python objects besides weights .*(posix|system)'
        ):
            timm.create_model(**options)
    with pytest.raises(RuntimeError, match='weights_only'):  # timm's own sentence
        timm.create_model('test_vitresnet', checkpoint_path=str(tmp_path / 'pytorch_model.bin'))
    np.savez(tmp_path / 'evil.npz', evil=np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match='allow_pickle'):
        read_checkpoint(tmp_path / 'evil.npz')
    assert not (tmp_path / 'EVIL').exists()
    torch.load(tmp_path / 'pytorch_model.bin', weights_only=False)  # the file is what it says
    assert (tmp_path / 'EVIL').exists()


def wrong(change):
    weights = timm.create_model('test_vitresnet', num_classes=3).state_dict()
    change(weights)
    return weights


@pytest.mark.parametrize('num_classes', [3, 5])
@pytest.mark.parametrize(
    'change, message',
    [
        (lambda weights: weights.pop('blocks.1.attn.qkv.weight'), 'missing keys: blocks.1.attn.qkv.weight'),
        (lambda weights: weights.update(extra=torch.ones(1)), 'unexpected keys: extra'),
        (lambda weights: weights.pop('patch_embed.backbone.stem.conv.weight'), 'missing keys: patch_embed.backbone.st'),
        (
            lambda weights: weights.update({'norm.weight': torch.ones(3)}),
            r'wrong shapes: norm\.weight \(3,\) for \(64,\)',
        ),
        (lambda weights: weights.update(pos_embed=torch.ones(1, 8, 64)), 'no square grid'),
    ],
)
def test_wrong_keys_are_errors(change, message, num_classes):
    # with other classes than the checkpoint's, timm alone would load what it finds and say nothing
    overlay = dict(state_dict=wrong(change), num_classes=3)
    with pytest.raises(RuntimeError, match=message):
        timm.create_model('test_vitresnet', pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)


def test_patch_projection_is_resampled():
    model = randomise_(timm.create_model('vitresnet', backbone='', patch_size=16, depth=1, img_size=64, num_classes=3))
    overlay = dict(state_dict=model.state_dict(), num_classes=3, input_size=(3, 64, 64))
    options = dict(backbone='', patch_size=32, depth=1, img_size=128, num_classes=3)
    larger = timm.create_model('vitresnet', pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    flat = torch.full((1, 3, 64, 64), 0.7)
    with torch.inference_mode():  # FlexiViT: a plain image looks the same at both patch sizes
        expected = model.patch_embed(flat)
        actual = larger.patch_embed(torch.full((1, 3, 128, 128), 0.7))
    torch.testing.assert_close(actual.mean((1, 2)), expected.mean((1, 2)), rtol=0.1, atol=0.05)
