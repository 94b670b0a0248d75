"""How the parts of a serial hybrid go together: what is left open is filled in, and what does not fit is named."""

import dataclasses

import pytest

from timm_vitres import VitResNetCfg
from timm_vitres.models.composition import check_overrides, compose_backbone, resolve_vit


def resolved(**kwargs):
    cfg = VitResNetCfg(**kwargs)
    return resolve_vit(cfg, compose_backbone(cfg, device='meta'))


@pytest.mark.parametrize(
    'kwargs, expected',
    [
        (dict(), dict(embed_dim=384, class_token=True, global_pool='token', patch_size=1)),
        (dict(class_token=False), dict(class_token=False, global_pool='avg')),
        (dict(global_pool='avg'), dict(class_token=True, global_pool='avg')),
        (dict(backbone=''), dict(embed_dim=384, patch_size=16)),
        (dict(depth=0), dict(embed_dim=2048, class_token=False, global_pool='avg', patch_size=1)),
        (dict(depth=0, backbone='resnet18', stage=2), dict(embed_dim=128)),
    ],
)
def test_what_is_left_open_is_filled_in(kwargs, expected):
    cfg = resolved(**kwargs)
    assert {name: getattr(cfg, name) for name in expected} == expected
    assert {name: getattr(cfg, name) for name in kwargs} == kwargs


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(depth=0, embed_dim=64), "embed_dim: got 64; with depth=0 .* the ResNet's width, 2048"),
        (dict(depth=0, reg_tokens=2), 'class_token, reg_tokens, pre_norm: with depth=0'),
        (dict(depth=0, patch_size=2), 'patch_size: got 2; with depth=0'),
        (dict(class_token=False, global_pool='token'), "global_pool: got 'token', but the model has no class token"),
        (dict(num_heads=7), 'num_heads: got 7, which does not divide embed_dim'),
        (dict(depth=0, global_pool='map', num_heads=7), 'num_heads: got 7'),
        (dict(stage=3, patch_size=2, output_stride=16), None),
        (dict(patch_size=16, output_stride=8), 'output_stride: got 8, but the tokens of this model cannot be closer'),
    ],
)
def test_what_does_not_fit_is_named(kwargs, message):
    if message is None:
        assert resolved(**kwargs).output_stride == kwargs['output_stride']
        return
    with pytest.raises(ValueError, match=message):
        resolved(**kwargs)


@pytest.mark.parametrize(
    'name, value, kwargs, message',
    [
        ('qk_norm', True, dict(depth=0), 'qk_norm: got True, but with depth=0'),
        ('fc_norm', True, dict(final_norm=False), 'fc_norm: got True, but with final_norm=False'),
        ('avg_down', True, dict(backbone='resnet18', stage=1), 'avg_down: got True, which changes nothing'),
    ],
)
def test_a_field_without_effect_is_named_where_it_is_given(name, value, kwargs, message):
    cfg = dataclasses.replace(VitResNetCfg(**kwargs), **{name: value})
    check_overrides(cfg, [])
    with pytest.raises(ValueError, match=message):
        check_overrides(cfg, [name])
