"""Folded models compute what they did, with less in them."""

import copy

import pytest
import timm
import torch
from conftest import randomise_, relative_difference
from timm.layers import LayerScale
from timm.utils import reparameterize_model
from torch import nn
from torch.export import Dim

import timm_vitres
from timm_vitres.fold import fold
from timm_vitres.layers import StdConv2dSame

SIZES = [(224, 224), (97, 161), (33, 470)]
NAMES = ['vitresnet_tiny', 'vitresnet_small', 'vitresnet_nano', 'vitresnet', 'test_vitresnet', 'test_vitresnet_dual']
# ResNets whose blocks differ: norms before and after, pooled shortcuts, deep stems, anti-aliasing, attention, groups
BACKBONES = ['resnet18', 'resnet26t', 'resnetv2_18', 'resnetblur18', 'seresnet50', 'resnet50_gn']
SLOW_BACKBONES = ['resnetv2_50d_evos', 'resnext50_32x4d', 'resnet14t', 'ecaresnet26t', 'resnetv2_18d', 'resnetrs50']
BACKBONES += [pytest.param(name, marks=pytest.mark.slow) for name in SLOW_BACKBONES]


def create(name, **kwargs):
    model = timm.create_model(name, **{'num_classes': 7, **kwargs})
    randomise_(getattr(model, 'model', model))
    return model.eval()


def outputs(model, x):
    with torch.inference_mode():
        result = model(x)
    return [result] if torch.is_tensor(result) else list(result)


def left_over(model):
    return [name for name, module in model.named_modules() if isinstance(module, (nn.BatchNorm2d, StdConv2dSame))]


@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_the_same_at_every_size(name, features_only):
    kwargs = dict(features_only=True) if features_only else {}
    model = create(name, **kwargs)
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert left_over(model) and not left_over(folded)
    assert not [module for module in folded.modules() if isinstance(module, LayerScale)]
    by_timm = reparameterize_model(model)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        expected = outputs(model, x)
        for others in (outputs(folded, x), outputs(by_timm, x)):
            for one, other in zip(others, expected, strict=True):
                assert relative_difference(one, other) < 1e-5, size
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('backbone', BACKBONES)
def test_any_backbone(backbone):
    """What can be merged is, and the rest stays."""
    model = create('vitresnet', backbone=backbone, depth=1, embed_dim=48)
    folded = fold(model)
    merged = len(left_over(model)) - len(left_over(folded))
    assert merged > 0 or not left_over(model)
    # a BatchNorm that comes before a convolution, or after an addition, can't be merged
    assert not left_over(folded) or 'v2' in backbone
    for size in SIZES[1:3]:
        x = torch.randn(2, 3, *size)
        assert relative_difference(outputs(folded, x)[0], outputs(model, x)[0]) < 1e-5


@pytest.mark.parametrize('name', ['test_vitresnet', 'vitresnet_nano', 'test_vitresnet_dual'])
def test_low_precision_is_not_lower(name):
    """Folded and then in bfloat16 the error against float32 is no larger than the model's own."""
    model = create(name, num_classes=100)
    x = torch.randn(16, 3, 96, 96)
    expected = outputs(model, x)[0]
    half = copy.deepcopy(model).bfloat16()
    own = relative_difference(outputs(half, x.bfloat16())[0].float(), expected)
    folded = outputs(fold(model).bfloat16(), x.bfloat16())[0]
    assert relative_difference(folded.float(), expected) <= 1.1 * own
    # the other way round, weights are rounded twice
    folded = outputs(fold(half), x.bfloat16())[0]
    assert folded.dtype == torch.bfloat16 and relative_difference(folded.float(), expected) <= 2 * own


@pytest.mark.parametrize('name', [pytest.param('test_vitresnet', marks=pytest.mark.slow), 'vitresnet_nano'])
def test_it_scripts_exports_and_compiles(name):
    folded = fold(create(name))
    sizes = {0: Dim('batch'), 2: Dim('height', min=33, max=4096), 3: Dim('width', min=33, max=4096)}
    torch._dynamo.reset()
    others = [
        torch.jit.script(folded),
        torch.export.export(folded, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sizes,)).module(),
        torch.compile(folded, backend='eager', fullgraph=True, dynamic=True),
    ]
    for size in SIZES[1:3]:
        x = torch.randn(3, 3, *size)
        for other in others:
            assert relative_difference(other(x), folded(x)) < 1e-5


@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual'])
def test_it_is_for_inference(name, tmp_path):
    model = create(name)
    folded = fold(model)
    with pytest.raises(ValueError, match='folded for inference'):
        folded.train()
    assert not folded.eval().training
    for call in (timm_vitres.save, timm_vitres.push):
        with pytest.raises(ValueError, match='folded for inference'):
            call(folded, str(tmp_path / 'model'))
    assert model.train().training
    with pytest.raises(ValueError, match=r'model: it is in training mode; call model\.eval\(\)'):
        fold(model)
    model.eval().head_drop.train()
    with pytest.raises(ValueError, match='its head_drop is'):
        fold(model)
    backbone = fold(create(name, features_only=True))
    with pytest.raises(ValueError, match='folded for inference'):
        backbone.train()


def test_the_root_is_folded_too():
    """Whatever is given: a layer, an embedding, a model that timm's function would pass over."""
    embed = create('test_vitresnet').patch_embed
    conv = embed.backbone.stem.conv
    x = torch.randn(1, 3, 33, 65)
    for part in (conv, embed):
        assert not left_over(fold(part)) and left_over(part)
        assert relative_difference(fold(part)(x), part(x)) < 1e-5
    block_with_scale = create('vitresnet_nano')
    assert not [module for module in fold(block_with_scale).modules() if isinstance(module, LayerScale)]
    twice = fold(fold(embed))
    assert torch.equal(twice(x), fold(embed)(x))


def test_known_padding_is_static():
    folded = fold(create('test_vitresnet'))
    kinds = {}
    for module in folded.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            kinds.setdefault(module.stride, set()).add((type(module).__name__, module.padding))
    assert kinds == {(1, 1): {('Conv2d', (1, 1))}, (2, 2): {('Conv2dSame', (0, 0))}}
