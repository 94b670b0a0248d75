"""The ResNet of a serial hybrid: any of timm's, by name and measures, up to any stage.

image (B, in_chans, H, W) -> `create_backbone(...)` -> map (B, C, H / r, W / r)
"""

import inspect
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Dict, Iterable, List, Optional, Type, Union

import torch
from timm.models import ResNet, ResNetV2, is_model, is_model_in_modules, model_entrypoint
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ..checks import check_choice, show
from .layers import MaxPool2dSame, StdConv2dSame

# What timm's classes have a use for: `ResNet` looks for these words, and passes over others
STEM_TYPES = {
    ResNet: ('', 'deep', 'deep_tiered'),
    ResNetV2: ('', 'fixed', 'same', 'deep', 'deep_fixed', 'deep_same', 'tiered'),
}
# A config's fields that are measures of a ResNet, and their names in timm's classes
RESNET_ARGS = {
    **{
        name: name
        for name in (
            *('layers', 'channels', 'block', 'stem_type', 'stem_width', 'stem_chs', 'replace_stem_pool', 'avg_down'),
            *('cardinality', 'base_width', 'block_reduce_first', 'down_kernel_size', 'width_factor', 'bottle_ratio'),
            'preact',
        )
    },
    'backbone_norm_layer': 'norm_layer',
    'backbone_act_layer': 'act_layer',
}
_FIELDS = {arg: field for field, arg in RESNET_ARGS.items()}
_OTHERS = {
    'block': ('basic', 'bottleneck'),
    'stem_type': ('deep', ''),
    'norm_layer': ('batchnorm2d', 'groupnorm1'),
    'act_layer': ('gelu', 'silu'),
}


class ResNetV2Stem(nn.Sequential):
    """The stem of timm's ResNetV2 as a model of its own, initialised as the whole is."""

    feature_info: List[Dict[str, Any]]
    stem_feat_idx: int

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise the convolutions as timm's ResNetV2 does."""
        ResNetV2.init_weights(self)  # pyright: ignore[reportArgumentType]


def create_backbone(
    name: str,
    stage: Optional[int] = None,
    stem_stride: Optional[int] = None,
    output_stride: Optional[int] = None,
    in_chans: int = 3,
    device=None,
    dtype=None,
    **measures: Any,
) -> nn.Module:
    """Build a ResNet of timm's up to a stage; its `feature_info` lists {num_chs, reduction, module} of every level.

    Args:
        name: A timm ResNet's name, 'resnetv2' (that of the R+ViT checkpoints), or '' for none (`nn.Identity`).
        stage: The last stage kept; 0 keeps the stem alone. All of them by default.
        stem_stride: 4; 2 leaves out the pooling; 1 makes the first convolution's stride 1, too.
        output_stride: Stride of the map that dilation is to keep to, as far as the stages allow it.
        measures: Arguments of timm's `ResNet` or `ResNetV2`, and `block`: 'basic' or 'bottleneck'.

    Raises:
        ValueError: for an unknown backbone or stage, or a measure that this backbone does not take.
    """
    if not name:
        given = [
            *(_FIELDS.get(key, key) for key in measures),
            *(['stage'] if stage is not None else []),
            *(['stem_stride'] if stem_stride else []),
        ]
        if given:
            raise ValueError(f"backbone: got '' (none), but measures of a ResNet were given: {', '.join(given)}.")
        return nn.Identity()
    resnet = _resnet_class(name)
    is_v2 = resnet is ResNetV2
    known = {*inspect.signature(resnet.__init__).parameters, 'block'}
    for measure, value in measures.items():
        if measure not in known:
            raise ValueError(f"{_FIELDS.get(measure, measure)}: got {value!r}, but timm's {resnet.__name__} has none.")
    if 'stem_type' in measures:
        check_choice('stem_type', measures['stem_type'], STEM_TYPES[resnet])
    for measure in ('stem_chs', 'channels') if is_v2 else ():
        widths = measures.get(measure, ())
        if any(width % 8 for width in (widths if isinstance(widths, tuple) else (widths,))):
            raise ValueError(f"{measure}: got {widths}, but timm's ResNetV2 has only multiples of 8.")

    layers, channels = measures.get('layers'), measures.get('channels')
    num_stages = len(layers) if layers else 4
    if not 1 <= num_stages <= 4 or (channels and len(channels) != num_stages):
        raise ValueError(
            f'layers: got {layers}, channels: got {channels}; expected one number of blocks and one width for each '
            f'of 1 to 4 stages.'
        )
    stage = num_stages if stage is None else stage
    if not 0 <= stage <= num_stages:
        raise ValueError(f'stage: got {stage!r}, expected a whole number from 0 (the stem) to {num_stages}.')

    fixed: Dict[str, Any] = dict(in_chans=in_chans, num_classes=0, global_pool='', dtype=dtype)
    stem_stride = stem_stride or 4
    if output_stride is not None:  # timm counts from a stem of stride 4, and knows these three
        fixed['output_stride'] = min(max(output_stride * 4 // stem_stride, 8), 32)

    def build(device: Any, measures: Dict[str, Any]) -> nn.Module:
        return _build(name, is_v2, stage, measures, device=device, **fixed)

    try:
        backbone = build(device, measures)
    except Exception as error:  # timm's classes and entrypoints raise whatever their layers do
        raise ValueError(_blame(name, build, measures, error)) from error
    return (_trim_resnetv2 if is_v2 else _trim_resnet)(backbone, stage, stem_stride)


def _resnet_class(name: str) -> Union[Type[ResNet], Type[ResNetV2]]:
    """Return timm's class of a backbone, or raise ValueError for a name that is none."""
    if name != 'resnetv2' and (
        '.' in name or not is_model(name) or not is_model_in_modules(name, ('resnet', 'resnetv2'))
    ):
        raise ValueError(
            f"backbone: got {show(name)}, expected the name (without a tag) of one of timm's ResNets, see "
            f"timm.list_models(module='resnet') and timm.list_models(module='resnetv2'), or 'resnetv2', or ''."
        )
    return ResNetV2 if name == 'resnetv2' or is_model_in_modules(name, ('resnetv2',)) else ResNet


def _build(name: str, is_v2: bool, stage: int, measures: Dict[str, Any], **fixed: Any) -> nn.Module:
    """Build timm's ResNet by our measures, with all its stages (of 'resnetv2': up to `stage`)."""
    kwargs = {**measures, **fixed}
    layers, channels = measures.get('layers'), measures.get('channels')
    if 'block' in kwargs:
        is_basic = kwargs.pop('block') == 'basic'
        kwargs.update({'basic': is_basic} if is_v2 else {'block': BasicBlock if is_basic else Bottleneck})
    if name == 'resnetv2':
        kwargs['layers'] = (layers or (3, 4, 6, 3))[: max(stage, 1)]
        defaults = dict(preact=False, stem_type='same', conv_layer=partial(StdConv2dSame, eps=1e-8))
        backbone = ResNetV2(**{**defaults, **kwargs})
        if 'same' in kwargs.get('stem_type', 'same'):
            backbone.stem.pool = MaxPool2dSame((3, 3), (2, 2), dilation=(1, 1))
    else:
        if not is_v2 and layers:  # timm's ResNet always has four
            missing = 4 - len(layers)
            kwargs['layers'] = (*layers, *(1,) * missing)
            if channels:
                kwargs['channels'] = (*channels, *channels[-1:] * missing)
        backbone = model_entrypoint(name)(pretrained=False, **kwargs)
        if 'stem_width' in measures and not isinstance(backbone.conv1, nn.Sequential):  # timm would pass over it
            raise ValueError("only a deep stem has one; give stem_type='deep'")
    empty = [key for key, value in backbone.named_parameters() if value.numel() == 0]
    if empty:
        raise ValueError(f'{empty[0]} has no values')
    return backbone


def _blame(name: str, build: Callable[..., nn.Module], measures: Dict[str, Any], error: Exception) -> str:
    """Return a sentence that names the measures without which timm builds what it did not."""
    guilty = []
    for measure in measures:
        try:
            build('meta', {key: value for key, value in measures.items() if key != measure})
        except Exception:  # with this measure or without it
            continue
        guilty.append(measure)
    got = ', '.join(f'{_FIELDS.get(key, key)}: got {measures[key]!r}' for key in guilty or measures)
    reason = ' '.join(str(error).split()).rstrip('.') or type(error).__name__
    return f'{got or f"backbone: got {name!r}"}, with which timm can not build {name!r}: {reason}.'


def check_effects(name: str, given: Iterable[str], **arguments: Any) -> None:
    """Raise ValueError for a measure that changes nothing: timm's ResNets pass over what they have no use for.

    A value that the backbone has by itself, or by timm's default, changes nothing either; it is no mistake.

    Args:
        given: Names of the measures in question.
        arguments: Of `create_backbone`, the other measures among them.
    """
    defaults = inspect.signature(_resnet_class(name).__init__).parameters
    with_all = _describe(create_backbone(name, device='meta', **arguments))
    for measure in given:
        value = arguments[measure]
        without = {key: other for key, other in arguments.items() if key != measure}
        is_default = measure in defaults and value == defaults[measure].default
        if is_default or _structure(name, without) != with_all:
            continue
        if _structure(name, {**arguments, measure: _other(measure, value)}) == with_all:
            others = ', '.join(f'{key}={other!r}' for key, other in without.items() if other is not None)
            raise ValueError(
                f'{_FIELDS.get(measure, measure)}: got {value!r}, which changes nothing of backbone={name!r}'
                f'{" with " + others if others else ""}; leave it out.'
            )


def _structure(name: str, arguments: Dict[str, Any]) -> Optional[str]:
    """Return what a backbone consists of; None where these measures do not fit together."""
    try:
        return _describe(create_backbone(name, device='meta', **arguments))
    except ValueError:
        return None


def _describe(backbone: nn.Module) -> str:
    # what was taken out is no part of it, whether timm makes it or not
    lines = [line for line in str(backbone).splitlines() if 'Identity()' not in line]
    return '\n'.join([*lines, *map(str, backbone.feature_info)])


def _other(measure: str, value: Any) -> Any:
    """Return another value of a measure, which a ResNet that has a use for it would be changed by."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(2 * item for item in value)
    if isinstance(value, str):
        return next(other for other in _OTHERS[measure] if other != value)
    return 2 * value


def _trim_resnet(backbone: ResNet, stage: int, stem_stride: int) -> nn.Module:
    """Keep the stages up to `stage` of timm's ResNet, whose forward pass wants four."""
    for i in range(stage + 1, 5):
        setattr(backbone, f'layer{i}', nn.Sequential())
    if stem_stride < 4:
        backbone.maxpool = nn.Identity()
    _finish_backbone(backbone, stage, stem_stride, backbone.conv1, pool='maxpool')
    return backbone


def _trim_resnetv2(backbone: ResNetV2, stage: int, stem_stride: int) -> nn.Module:
    """Keep the stages up to `stage` of timm's ResNetV2; at 0 it is the stem itself, as in vit_tiny_r_s16_p8_224."""
    if stage < len(backbone.stages):
        backbone.norm = nn.Identity()  # made for the last stage
    backbone.stages = backbone.stages[:stage]
    if stem_stride < 4:
        for name in ('pad', 'pool'):
            if hasattr(backbone.stem, name):
                setattr(backbone.stem, name, nn.Identity())
    _finish_backbone(backbone, stage, stem_stride, backbone.stem, pool='stem.pool')
    if stage > 0:
        if not isinstance(backbone.norm, nn.Identity):
            backbone.feature_info[-1]['module'] = 'norm'
        return backbone
    stem = ResNetV2Stem(OrderedDict(backbone.stem.named_children()))
    stem.stem_feat_idx = backbone.stem_feat_idx
    stem.feature_info = [dict(info, module=info['module'].removeprefix('stem.')) for info in backbone.feature_info]
    return stem


def _finish_backbone(backbone: nn.Module, stage: int, stem_stride: int, stem: nn.Module, pool: str) -> None:
    """Set the stem's stride, and make `feature_info` end with what the trimmed backbone returns."""
    if stem_stride == 1:
        first = next(module for module in stem.modules() if isinstance(module, nn.Conv2d))
        first.stride = (1, 1)
    info = backbone.feature_info[: stage + 1]
    info = [dict(level, reduction=level['reduction'] * stem_stride // 4) for level in info]
    info[0]['reduction'] = min(stem_stride, 2)
    if stage == 0 and stem_stride == 4:
        info.append(dict(info[0], reduction=4, module=pool))
    backbone.feature_info = info
    backbone.num_features = backbone.head_hidden_size = info[-1]['num_chs']


def backbone_blocks(backbone: nn.Module) -> List[nn.Module]:
    """Return the residual blocks of a ResNet that `create_backbone` made, from the first to the last."""
    if isinstance(backbone, ResNetV2):
        return [block for stage in backbone.stages.children() for block in stage.get_submodule('blocks').children()]
    if isinstance(backbone, ResNet):
        return [block for i in range(1, 5) for block in getattr(backbone, f'layer{i}')]
    return []
