"""Every argument of a model, tried with values that it can't have: each ends in one sentence, or in a model."""

import dataclasses
import inspect
import random
import re

import numpy as np
import pytest
import timm
import torch

import timm_vitres
from timm_vitres import VitResNet, VitResNetCfg, VitResNetDual, VitResNetDualCfg, VitResNetMix, VitResNetMixCfg

# What no argument takes
NONSENSE = [-1, float('nan'), float('inf'), 10**9, 10**400, 'nonsense', (), {}, b'x', object(), torch.nn.BatchNorm2d]
# What some arguments take
VALUES = [True, 0, 1, 2, 1.5, '', 'Deep', (0,), (2, 2), ('a',), (1, 2, 3, 4, 5), np.int64(2), torch.tensor(1)]
VALUES += ['batchnorm2d', 'layernorm', 'gelu', 'same', 'glu', 'map', 'basic']
THIN = dict(layers=(1, 1), channels=(8, 16), embed_dim=24, num_heads=3, depth=1)
BASES = {
    'resnet': ('vitresnet', dict(backbone='resnet18', **THIN)),
    'resnet-d': ('vitresnet', dict(backbone='seresnetaa50d', **THIN)),
    'resnetv2': ('test_vitresnet', dict(depth=1)),
    'bit': ('vitresnet', dict(backbone='resnetv2_50x1_bit', stage=1, embed_dim=24, num_heads=3, depth=1)),
    'vit': ('vitresnet', dict(backbone='', embed_dim=24, num_heads=3, depth=1)),
    'alone': ('vitresnet', dict(backbone='resnet18', layers=(1,), channels=(8,), depth=0)),
    'dual': ('test_vitresnet_dual', {}),
    'mix': ('test_vitresnet_mix', {}),
}
CLASSES = {'dual': (VitResNetDual, VitResNetDualCfg), 'mix': (VitResNetMix, VitResNetMixCfg)}
FREE = ('device', 'dtype', 'cfg', 'self')


def names_of(architecture):
    model_cls, cfg_cls = next(
        (pair for word, pair in CLASSES.items() if word in architecture), (VitResNet, VitResNetCfg)
    )
    arguments = [name for name in inspect.signature(model_cls.__init__).parameters if name not in FREE]
    return [field.name for field in dataclasses.fields(cfg_cls)] + arguments


def outcome(architecture, **kwargs):
    """Return 'ok', or the sentence; anything else that is raised goes on."""
    try:
        timm.create_model(architecture, **{'device': 'meta', 'img_size': 64, **kwargs})
    except ValueError as error:
        sentence = str(error)
        assert re.match(r'[a-z_]+(, [a-z_]+)*: ', sentence) and '\n' not in sentence and len(sentence) < 700, sentence
        return sentence
    return 'ok'


@pytest.mark.parametrize('base', BASES)
def test_nonsense_is_refused_by_name(base):
    architecture, kwargs = BASES[base]
    for name in names_of(architecture):
        for value in NONSENSE:
            sentence = outcome(architecture, **{**kwargs, name: value})
            assert sentence.startswith(f'{name}: got '), (name, value, sentence)


@pytest.mark.parametrize('base', BASES)
def test_what_may_fit_ends_in_a_sentence_or_a_model(base):
    architecture, kwargs = BASES[base]
    rng = random.Random(base)
    for name in names_of(architecture):
        for value in rng.sample(VALUES, 6):
            outcome(architecture, **{**kwargs, name: value})


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(norm_layer='batchnorm2d'), "norm_layer: got 'batchnorm2d'"),
        (dict(norm_layer='groupnorm'), "norm_layer: got 'groupnorm'"),
        (dict(norm_layer='layernorm2d'), "norm_layer: got 'layernorm2d'"),
        (dict(norm_layer=torch.nn.LayerNorm), 'a class can not'),
        (dict(backbone_norm_layer='layernorm'), "backbone_norm_layer: got 'layernorm'"),
        (dict(backbone_norm_layer='batchnorm1d'), "backbone_norm_layer: got 'batchnorm1d'"),
        (dict(backbone_norm_layer='frozenbatchnorm2d'), 'backbone_norm_layer: got'),
        (dict(layers=(1, 1.5)), 'layers: got'),
        (dict(depth=True), 'depth: got True'),
        (dict(num_heads=4.0), 'num_heads: got 4.0'),
        (dict(qkv_bias=1), 'qkv_bias: got 1'),
        (dict(mlp_ratio='4'), "mlp_ratio: got '4'"),
        (dict(mlp_ratio=1e-4), 'mlp_ratio: got 0.0001'),
        (dict(mlp_layer='glu', mlp_ratio=0.0125, embed_dim=240), 'mlp_ratio: got 0.0125'),
        (dict(init_values=0), 'init_values: got 0'),
        (dict(init_values=float('nan')), 'init_values: got nan'),
        (dict(patch_size=(1, 2, 3)), 'patch_size: got'),
        (dict(final_norm=False, fc_norm=True), 'fc_norm: got True'),
        (dict(img_size='224'), "img_size: got '224'"),
        (dict(img_size=(224,)), 'img_size: got'),
        (dict(img_size=1.5), 'img_size: got 1.5'),
        (dict(num_classes='10'), "num_classes: got '10'"),
        (dict(num_classes=True), 'num_classes: got True'),
        (dict(drop_rate='0.1'), "drop_rate: got '0.1'"),
        (dict(weight_init='jaxx'), "weight_init: got 'jaxx'"),
        (dict(device='cudda'), "device: got 'cudda'"),
        (dict(dtype=torch.int64), 'dtype: got torch.int64'),
        (dict(dtype='float32'), "dtype: got 'float32'"),
    ],
)
def test_mistakes_of_type_are_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model('vitresnet', **{'depth': 1, 'device': 'meta', **kwargs})


@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'])
@pytest.mark.parametrize('x', [torch.ones(1, 3, 96, 96, dtype=torch.uint8), np.ones((1, 3, 96, 96)), None])
def test_what_is_no_image_is_named(name, x):
    with pytest.raises(ValueError, match=r'^input: got'):
        timm.create_model(name)(x)


def test_methods_name_their_arguments_too():
    model = timm.create_model('test_vitresnet')
    for kwargs in (dict(img_size='64'), dict(img_size=(1, 2, 3)), dict(img_size=float('nan')), dict(patch_size=1.5)):
        with pytest.raises(ValueError, match=f'^{next(iter(kwargs))}: got'):
            model.set_input_size(**kwargs)
    with pytest.raises(ValueError, match=r'^img_size: got'):
        model.set_input_size(img_size=16)
    with pytest.raises(ValueError, match=r'^indices: got 99'):
        model.forward_intermediates(torch.randn(1, 3, 96, 96), 99)
    for name in ('test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'):
        model = timm.create_model(name)
        with pytest.raises(ValueError, match=r'^num_classes: got 1.5'):
            model.reset_classifier(1.5)
        with pytest.raises(ValueError, match=r'^mode: got'):
            model.init_weights('none')


def test_a_config_is_checked_by_itself():
    with pytest.raises(ValueError, match=r'^cfg: got'):
        VitResNet(dict(depth=1))
    with pytest.raises(ValueError, match=r'^channels: got'):
        VitResNetDualCfg(channels=(64, 128))
    assert timm_vitres.VitResNetCfg(patch_size=[2, 4]).patch_size == (2, 4)


@pytest.mark.parametrize(
    'fields, message',
    [
        (dict(stem_chs=2), 'stem_chs: got 2, expected 3 or more'),
        (dict(stem_chs=4, stem_type='quad'), 'stem_chs: got 4, expected 5 or more'),
        (
            dict(block='basic', channels=(64,) * 4, bottle_ratio=0.75, group_size=16, attn_blocks=(0,) * 4),
            'group_size: got 16, which makes 3 groups in blocks of stage 0',
        ),
    ],
)
def test_measures_that_timm_can_not_build_are_named(fields, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        timm.create_model('vitresnet_mix', **fields)
    timm.create_model('vitresnet_mix', **{**fields, 'stem_chs': 5, 'group_size': 0})
