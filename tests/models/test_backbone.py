"""Measures of a ResNet: each one changes it, or is refused by name."""

import pytest
import timm
import torch
from conftest import relative_difference
from timm.layers import StdConv2d, StdConv2dSame


def create(**kwargs):
    return timm.create_model('vitresnet', **{'depth': 1, 'img_size': 64, 'device': 'meta', **kwargs})


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(backbone='resnet18', stem_type='Deep'), "stem_type: got 'Deep'"),
        (dict(backbone='resnet18', stem_type='tiered'), "stem_type: got 'tiered'"),
        (dict(backbone='resnetv2_50', stem_type='deep_tiered'), "stem_type: got 'deep_tiered'"),
        (dict(backbone='resnet26d', down_kernel_size=3), 'down_kernel_size: got 3, which changes nothing'),
        (dict(backbone='resnet18', stage=1, avg_down=True), 'avg_down: got True, which changes nothing'),
        (dict(backbone='resnet18', stem_stride=2, replace_stem_pool=True), 'replace_stem_pool: got True'),
        (dict(backbone='resnet50', stage=0, cardinality=2), 'cardinality: got 2, which changes nothing'),
        (dict(backbone='resnet50', stage=0, layers=(1, 1)), 'layers: got'),
        (dict(backbone='resnetv2_50', channels=(64, 60, 64, 64)), 'channels: got'),
        (dict(backbone='resnetv2_50', stem_chs=63), 'stem_chs: got 63'),
        (dict(backbone='resnet18', cardinality=2), 'cardinality: got 2'),
        (dict(backbone='resnet18', base_width=32), 'base_width: got 32'),
        (dict(backbone='resnet18', down_kernel_size=2), 'down_kernel_size: got 2'),
        (dict(backbone='resnet18', stem_type='deep_tiered', stem_width=2), 'stem_width: got 2'),
        (dict(backbone='resnet18', block_reduce_first=1000), 'block_reduce_first: got 1000'),
        (dict(backbone='resnet18', channels=(10, 20, 30, 40), backbone_norm_layer='groupnorm'), 'backbone_norm_layer'),
        (dict(backbone='resnetv2', block='basic'), "block: got 'basic'"),
        (dict(backbone='resnetv2_50x1_bit', stem_type='deep'), "stem_type: got 'deep'"),
        (dict(backbone='resnet18', std_conv_eps=1e-6), "std_conv_eps: got 1e-06, but 'resnet18' has no convolutions"),
        (
            dict(backbone='', std_conv_eps=1e-6),
            "backbone: got '' .none., but measures of a ResNet were given: std_conv_eps",
        ),
        (dict(backbone='resnet18', depth=0, pos_embed_fit='crop'), "pos_embed_fit: got 'crop', but with depth=0"),
        (dict(backbone='resnet18', depth=0, qk_norm=True), 'qk_norm: got True, but with depth=0'),
        (dict(backbone='resnet18', depth=0, global_pool='map', num_heads=5), 'num_heads: got 5'),
        (dict(backbone='resnetv2_50d_evos', layers=(1, 1), channels=(64, 64)), r'channels: got \(64, 64\), with which'),
    ],
)
def test_a_measure_without_effect_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=f'^{message}|, {message}'):
        create(**kwargs)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(backbone='resnet26d', down_kernel_size=1, avg_down=True, stem_type='deep', stem_width=32),
        dict(backbone='resnet18', block='basic', cardinality=1, base_width=64, backbone_norm_layer='batchnorm2d'),
        dict(backbone='resnext50_32x4d', cardinality=32, base_width=4, block='bottleneck'),
        dict(backbone='resnetv2_50', preact=True, bottle_ratio=0.25, backbone_act_layer='relu'),
        dict(backbone='resnet18', depth=0, global_pool='map', num_heads=8, mlp_ratio=2.0),
    ],
)
def test_what_a_backbone_has_by_itself_may_be_said(kwargs):
    name, depth = kwargs['backbone'], kwargs.get('depth', 1)
    other = {key: value for key, value in kwargs.items() if key in ('global_pool', 'num_heads', 'mlp_ratio')}
    assert str(create(**kwargs).patch_embed) == str(create(backbone=name, depth=depth, **other).patch_embed)


@pytest.mark.parametrize('kwargs', [dict(), dict(stage=0), dict(stem_stride=2), dict(output_stride=8)])
def test_a_variant_of_measures_takes_changes_of_others(kwargs):
    """What the caller did not say himself is never held against him."""
    cfg = timm.create_model('vitresnet_nano', device='meta', **kwargs).cfg
    assert {name: getattr(cfg, name) for name in kwargs} == kwargs


@pytest.mark.parametrize('backbone', ['resnetv2', 'resnetv2_50x1_bit'])
def test_every_standardised_weight_takes_the_eps(backbone):
    model = timm.create_model('vitresnet', backbone=backbone, stage=1, depth=1, img_size=64, std_conv_eps=0.5)
    convs = [module for module in model.modules() if isinstance(module, (StdConv2d, StdConv2dSame))]
    assert len(convs) == 11 and {conv.eps for conv in convs} == {0.5}
    conv = model.patch_embed.backbone.blocks()[0].conv1
    weight = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
    weight = weight / (weight.square().mean((1, 2, 3), keepdim=True) + 0.5).sqrt()
    x = torch.randn(1, 64, 5, 7)
    assert relative_difference(conv(x), torch.nn.functional.conv2d(x, weight)) < 1e-5
