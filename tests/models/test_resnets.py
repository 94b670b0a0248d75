"""One class per kind of ResNet: timm's own outputs and tensors, cut to any stage, with the same answers."""

import copy
import math
import re

import pytest
import timm
import torch
from conftest import randomise_
from timm.models.resnetv2 import create_resnetv2_stem

from timm_vitres.models.backbone import create_backbone
from timm_vitres.models.resnets import NoBackbone, ResNetBackbone, ResNetV2Backbone, StemBackbone, kind_of

KINDS = [('resnet18', 4), ('resnet26d', 2), ('resnetv2_18', 4), ('resnetv2', 3), ('resnetv2_18', 0), ('resnet18', 0)]


@pytest.mark.parametrize('name, stage', KINDS)
def test_it_is_timms_model_and_has_timms_tensors(name, stage):
    backbone = randomise_(create_backbone(name, stage))
    if name == 'resnetv2':
        arguments = dict(layers=(3, 4, 6), preact=False, stem_type='same', conv_layer=timm.layers.StdConv2dSame)
        timms = timm.models.ResNetV2(**arguments, num_classes=0, global_pool='')
        for module in timms.modules():
            if isinstance(module, timm.layers.StdConv2dSame):
                module.eps = 1e-8
    else:
        timms = timm.create_model(name, num_classes=0, global_pool='')
    own = backbone.state_dict()
    if isinstance(backbone, StemBackbone):
        own = {f'stem.{key}': value for key, value in own.items()}
    missing, unexpected = timms.eval().load_state_dict(own, strict=False)
    deeper = [re.match(r'layer(\d)|stages\.(\d)', key) for key in missing]
    assert not unexpected and all(int(found[1] or int(found[2]) + 1) > stage for found in deeper if found)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        levels = backbone.forward_levels(x, len(backbone.feature_info))
        expected = timms.forward_intermediates(x, norm=True, intermediates_only=True)
        assert torch.equal(levels[-1], backbone(x))
        for level, other in zip(levels[: stage + 1], expected):
            torch.testing.assert_close(level, other)


@pytest.mark.parametrize('name, stage', KINDS)
def test_pruned_it_ends_at_the_level(name, stage):
    backbone = randomise_(create_backbone(name, stage))
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        levels = backbone.forward_levels(x, len(backbone.feature_info))
        for i, level in enumerate(levels):
            pruned = copy.deepcopy(backbone).prune(i)
            assert len(pruned.feature_info) == i + 1
            (*_, last) = pruned.forward_levels(x, i + 1)
            assert torch.equal(last, level) or (i + 1 < len(levels) and isinstance(pruned, StemBackbone))
            assert sum(p.numel() for p in pruned.parameters()) <= sum(p.numel() for p in backbone.parameters())


@pytest.mark.parametrize('name, stage', KINDS)
def test_a_script_computes_the_levels(name, stage):
    class Levels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = randomise_(create_backbone(name, stage))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return self.backbone.forward_levels(x, 5)

    net = Levels().eval()
    x = torch.randn(1, 3, 64, 64)
    count = len(net.backbone.feature_info)
    with torch.inference_mode():
        for level, other in zip(torch.jit.script(net)(x)[:count], net.backbone.forward_levels(x, count), strict=True):
            torch.testing.assert_close(level, other)


@pytest.mark.parametrize(
    'name, stage, count',
    [('resnet18', 4, 8), ('resnet26d', 2, 4), ('resnetv2', 3, 13), ('resnetv2_18', 0, 0), ('', None, 0)],
)
def test_blocks_come_in_the_order_in_which_they_run(name, stage, count):
    backbone = create_backbone(name, stage)
    blocks = backbone.blocks()
    assert len(blocks) == count
    ran = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: ran.append(module))
    backbone(torch.randn(1, 3, 64, 64))
    assert ran == blocks


@pytest.mark.parametrize('stem_stride', [1, 2, 4])
@pytest.mark.parametrize('name', ['resnet18', 'resnetv2_18', 'resnetv2_50d'])
def test_feature_info_tells_strides(name, stem_stride):
    for stage in range(5):
        backbone = create_backbone(name, stage, stem_stride=stem_stride).eval()
        info = backbone.feature_info
        with torch.inference_mode():
            levels = backbone.forward_levels(torch.randn(1, 3, 64, 96), len(info))
        for level, entry in zip(levels, info, strict=True):
            assert level.shape[1] == entry['num_chs']
            assert level.shape[2:] == tuple(math.ceil(side / entry['reduction']) for side in (64, 96))
            assert backbone.get_submodule(entry['module']) is not None


@pytest.mark.parametrize('name, stage', KINDS)
def test_initialised_as_built(name, stage):
    """The same distributions as the constructor's, zeros of last norms included."""
    torch.manual_seed(0)
    backbone = create_backbone(name, stage)
    expected = {key: value.clone() for key, value in backbone.state_dict().items()}
    for module in backbone.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    backbone.init_as_built()
    for key, value in backbone.state_dict().items():
        if value.numel() > 50 and expected[key].float().std() > 0:
            few = 3 / value.numel() ** 0.5  # three standard errors of each
            assert value.std() == pytest.approx(
                expected[key].std().item(), rel=0.15 if value.numel() > 1000 else few
            ), key
        elif value.numel() > 1 and expected[key].float().std() > 0:
            assert value.std() > 0, key
        else:  # norms and biases
            assert torch.equal(value, expected[key]), key


def test_kinds_by_name():
    assert kind_of('resnet18') is ResNetBackbone and kind_of('seresnet50') is ResNetBackbone
    assert kind_of('resnetv2_50') is ResNetV2Backbone and kind_of('resnetv2') is ResNetV2Backbone
    for name in ('vit_tiny_patch16_224', 'resnet18.a1_in1k', 'resnet', ''):
        with pytest.raises(ValueError, match=rf"^backbone: got '{name}', expected the name \(without a tag\)"):
            kind_of(name)
    x = torch.randn(1, 3, 8, 8)
    nothing = create_backbone('')
    assert isinstance(nothing, NoBackbone) and nothing(x) is x and nothing.forward_levels(x, 0) == []


def test_stem_types_are_those_that_timm_knows():
    for stem_type in ResNetV2Backbone.stem_types:
        create_resnetv2_stem(3, 16, stem_type, norm_layer=lambda width, **_: torch.nn.BatchNorm2d(width))
    for stem_type in ('Deep', 'deep_tiered', 'none'):
        with pytest.raises(AssertionError):
            create_resnetv2_stem(3, 16, stem_type)
