import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from conftest import randomise_, relative_difference

from timm_vitres.vitresnet import default_cfgs

TAGS = [
    # ours, timm's architecture
    ('vitresnet_tiny.augreg_in21k_ft_in1k', 'vit_tiny_r_s16_p8_224'),
    ('vitresnet_tiny.augreg_in21k_ft_in1k_384', 'vit_tiny_r_s16_p8_384'),
    ('vitresnet_tiny.augreg_in21k', 'vit_tiny_r_s16_p8_224'),
    ('vitresnet_small.augreg_in21k_ft_in1k', 'vit_small_r26_s32_224'),
    ('vitresnet_small.augreg_in21k_ft_in1k_384', 'vit_small_r26_s32_384'),
    ('vitresnet_base.orig_in21k', 'vit_base_r50_s16_224'),
]


@pytest.mark.parametrize('name, theirs', TAGS)
def test_timms_checkpoints_load_from_a_file(name, theirs, tmp_path):
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
        (lambda weights: weights.update({'norm.weight': torch.ones(3)}), 'norm.weight'),
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
