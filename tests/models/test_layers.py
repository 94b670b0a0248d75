import pytest
import timm
import torch

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
