"""The embedding of the serial family: its grid, the sizes that it takes, and its positions."""

import copy

import pytest
import timm
import torch
from conftest import randomise_, relative_difference

import timm_vitres

BACKBONES = ['resnet18', 'resnet26t', 'resnet50d', 'resnetblur18', 'resnetrs50', 'resnext50_32x4d', 'ecaresnet26t']
BACKBONES += ['resnetv2_18', 'resnetv2_50d', 'resnetv2_50x1_bit']


@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('stage, patch_size', [(4, 1), (3, 2), (0, 8)])
def test_grid_is_known_without_a_forward_pass(backbone, stage, patch_size):
    options = dict(backbone=backbone, stage=stage, patch_size=patch_size, depth=1, device='meta')
    model = timm.create_model('vitresnet', img_size=(97, 161), **options)
    for size in [(97, 161), (224, 224), (33, 70), (250, 226)]:
        tokens = model.patch_embed(torch.empty(1, 3, *size, device='meta'))
        assert tuple(tokens.shape[1:3]) == model.patch_embed.dynamic_feat_size(size)
    assert model.patch_embed.grid_size == model.patch_embed.dynamic_feat_size((97, 161))


def test_a_backbone_that_rounds_down_takes_multiples():
    model = timm.create_model('vitresnet', backbone='resnetaa34d', depth=1, img_size=64).eval()
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match='multiples of 32'):
        model(torch.randn(1, 3, 97, 64))
    options = dict(features_only=True, out_indices=(0,), stage=2, depth=1)  # what rounds down is cut off
    stem = timm.create_model('vitresnet', backbone='resnetaa34d', **options)
    assert stem(torch.randn(1, 3, 97, 65))[0].shape[-2:] == (49, 33)


def test_a_backbone_that_blurs_needs_what_it_can_mirror():
    model = timm.create_model('vitresnet', backbone='resnetblur18', depth=0, num_classes=3).eval()
    assert torch.isfinite(model(torch.randn(1, 3, 17, 17))).all()
    with pytest.raises(ValueError, match=r'16x40 pixels, which is smaller than what this backbone can blur; .* 17x17'):
        model(torch.randn(1, 3, 16, 40))
    plain = timm.create_model('vitresnet', backbone='resnet18', depth=0, num_classes=3).eval()
    assert torch.isfinite(plain(torch.randn(1, 3, 1, 1))).all()


@pytest.fixture(scope='module')
def cropping():
    """Return a model with positions for 64 x 160 pixels, 2 x 5 tokens, that crops them; register tokens beside."""
    return randomise_(timm.create_model('test_vitresnet', pos_embed_fit='crop', img_size=(64, 160), reg_tokens=2))


def first(table, rows, columns):
    """Return what a table of 3 prefix tokens and 2 x 5 positions has for a smaller grid, told one by one."""
    chosen = [*range(3), *(3 + 5 * row + column for row in range(rows) for column in range(columns))]
    return table[:, chosen]


@pytest.mark.parametrize(
    'size, rows, columns', [((64, 160), 2, 5), ((32, 160), 1, 5), ((64, 70), 2, 3), ((33, 31 + 2), 2, 2)]
)
@pytest.mark.parametrize('way', ['eager', 'script', 'set_input_size', 'load', 'file'])
def test_positions_are_cropped(way, size, rows, columns, cropping, tmp_path):
    """A model whose table is cut by hand, and which is asked for no other grid, computes the same."""
    by_hand = timm.create_model('test_vitresnet', img_size=(32 * rows, 32 * columns), reg_tokens=2).eval()
    weights = dict(cropping.state_dict(), pos_embed=first(cropping.pos_embed, rows, columns))
    torch.nn.Module.load_state_dict(by_hand, weights)
    options = dict(pos_embed_fit='crop', img_size=size, reg_tokens=2)
    if way == 'script':
        model = torch.jit.script(cropping)
    elif way == 'set_input_size':
        model = copy.deepcopy(cropping)
        model.set_input_size(size)
        assert torch.equal(model.pos_embed, weights['pos_embed']) and model.pos_embed.requires_grad
        folder = timm_vitres.save(model, tmp_path)
        saved = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert saved.cfg == model.cfg and torch.equal(saved.pos_embed, model.pos_embed)
    elif way == 'load':
        overlay = dict(state_dict=cropping.state_dict(), input_size=(3, 64, 160))
        model = timm.create_model('test_vitresnet', pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
        assert torch.equal(model.pos_embed, weights['pos_embed'])
    elif way == 'file':
        folder = timm_vitres.save(cropping, tmp_path)
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert model.cfg == cropping.cfg and model.patch_embed.img_size == (64, 160)
    else:
        model = cropping
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        assert relative_difference(model(x), by_hand(x)) < 1e-6


@pytest.mark.parametrize('size', [(65, 160), (64, 161), (160, 64)])
def test_a_cropped_table_serves_no_larger_image(size, cropping):
    x = torch.randn(1, 3, *size)
    message = f"got an image of {size[0]}x{size[1]} pixels, but with pos_embed_fit='crop' .* at most 64x160"
    for call in (cropping, cropping.forward_intermediates, cropping.forward_features):
        with pytest.raises(ValueError, match=f'input: {message}'):
            call(x)
    with pytest.raises(ValueError, match=f'img_size: {message}'):
        copy.deepcopy(cropping).set_input_size(size)
    with pytest.raises(torch.jit.Error, match='an image that is larger than the position table, which is cropped'):
        torch.jit.script(cropping)(x)
    overlay = dict(state_dict=cropping.state_dict(), input_size=(3, 64, 160))
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, img_size=size, reg_tokens=2)
    with pytest.raises(RuntimeError, match='pos_embed: the checkpoint has positions for 2x5 tokens'):
        timm.create_model('test_vitresnet', pos_embed_fit='crop', **options)
    # what is cut to the ResNet alone has no positions any more
    pruned = copy.deepcopy(cropping)
    pruned.prune_intermediate_layers([0])
    assert pruned(x).shape[0] == 1
