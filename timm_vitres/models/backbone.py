"""The ResNet of a serial hybrid: any of timm's, by name and measures, up to any stage.

name, measures -> checks -> timm's model (see `resnets`) -> trimmed to a stage and a stem's stride. A measure that timm
would pass over is refused, since it would be recorded with a model that does not have it.
"""

import inspect
from typing import Any, Callable, Dict, Iterable, Optional

from timm.layers import EvoNorm2dS0, StdConv2d, StdConv2dSame
from torch import nn

from ..checks import check_choice, on_one_line
from .resnets import Kind, NoBackbone, kind_of

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


def create_backbone(
    name: str,
    stage: Optional[int] = None,
    stem_stride: Optional[int] = None,
    output_stride: Optional[int] = None,
    std_conv_eps: Optional[float] = None,
    in_chans: int = 3,
    device=None,
    dtype=None,
    **measures: Any,
) -> nn.Module:
    """Build a ResNet of timm's up to a stage; its `feature_info` lists {num_chs, reduction, module} of every level.

    Args:
        name: A timm ResNet's name, 'resnetv2' (that of the R+ViT checkpoints), or '' for none (`NoBackbone`).
        stage: The last stage kept; 0 keeps the stem alone. All of them by default.
        stem_stride: 4; 2 leaves out the pooling; 1 makes the first convolution's stride 1, too.
        output_stride: Stride of the map that dilation is to keep to, as far as the stages allow it.
        std_conv_eps: Added to the variance of the weights that are standardised.
        measures: Arguments of timm's `ResNet` or `ResNetV2`, and `block`: 'basic' or 'bottleneck'.

    Raises:
        ValueError: for an unknown backbone or stage, or a measure that this backbone does not take.
    """
    if not name:
        _check_nothing_given(measures, stage, stem_stride, std_conv_eps)
        return NoBackbone()
    kind = kind_of(name)
    _check_measures(kind, measures)
    stage = _check_stage(stage, measures)
    stem_stride = stem_stride or 4
    fixed: Dict[str, Any] = dict(in_chans=in_chans, num_classes=0, global_pool='', dtype=dtype)
    if output_stride is not None:  # timm counts from a stem of stride 4, and knows these three
        fixed['output_stride'] = min(max(output_stride * 4 // stem_stride, 8), 32)

    def build(device: Any, measures: Dict[str, Any]) -> nn.Module:
        backbone = kind.build(name, stage, measures, device=device, **fixed)
        empty = [key for key, value in backbone.named_parameters() if value.numel() == 0]
        if empty:
            raise ValueError(f'{empty[0]} has no values')
        for key, module in backbone.named_modules():  # whose groups are compared with the map's channels only in use
            if isinstance(module, EvoNorm2dS0) and module.weight.numel() % module.groups:
                raise ValueError(f'{key} can not normalise {module.weight.numel()} channels in {module.groups} groups')
        return backbone

    try:
        backbone = build(device, measures)
    except Exception as error:  # timm's classes and entrypoints raise whatever their layers do
        raise ValueError(_blame(name, build, measures, error)) from error
    if std_conv_eps is not None:
        _set_std_conv_eps_(backbone, name, std_conv_eps)
    return backbone.keep(stage, stem_stride)


def _set_std_conv_eps_(backbone: nn.Module, name: str, eps: float) -> None:
    """Give all convolutions that standardise their weights an eps; ValueError where there are none."""
    convs = [module for module in backbone.modules() if isinstance(module, (StdConv2d, StdConv2dSame))]
    if not convs:
        raise ValueError(f'std_conv_eps: got {eps}, but {name!r} has no convolutions that standardise their weights.')
    for conv in convs:
        conv.eps = eps


def _check_nothing_given(
    measures: Dict[str, Any], stage: Optional[int], stem_stride: Optional[int], std_conv_eps: Optional[float]
) -> None:
    """Raise ValueError for measures of a ResNet that is not there."""
    given = [
        *(_FIELDS.get(key, key) for key in measures),
        *(['stage'] if stage is not None else []),
        *(['stem_stride'] if stem_stride else []),
        *(['std_conv_eps'] if std_conv_eps else []),
    ]
    if given:
        raise ValueError(f"backbone: got '' (none), but measures of a ResNet were given: {', '.join(given)}.")


def _check_measures(kind: Kind, measures: Dict[str, Any]) -> None:
    """Raise ValueError for a measure that a kind of ResNet does not have, or can not have so."""
    known = {*inspect.signature(kind.timms.__init__).parameters, 'block'}
    for measure, value in measures.items():
        if measure not in known:
            name = kind.timms.__name__
            raise ValueError(f"{_FIELDS.get(measure, measure)}: got {value!r}, but timm's {name} has none.")
    if 'stem_type' in measures:
        check_choice('stem_type', measures['stem_type'], kind.stem_types)
    multiple = kind.width_multiple
    for measure in ('stem_chs', 'channels'):
        widths = measures.get(measure, ())
        if any(width % multiple for width in (widths if isinstance(widths, tuple) else (widths,))):
            name = kind.timms.__name__
            raise ValueError(f"{measure}: got {widths}, but timm's {name} has only multiples of {multiple}.")


def _check_stage(stage: Optional[int], measures: Dict[str, Any]) -> int:
    """Return the last stage that is kept; ValueError where there is none such, or its measures do not match."""
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
    return stage


def _blame(name: str, build: Callable[..., nn.Module], measures: Dict[str, Any], error: Exception) -> str:
    """Return a sentence that names the measures without which timm builds what it did not."""
    guilty = []
    for measure in measures:
        try:
            build('meta', {key: value for key, value in measures.items() if key != measure})
        except Exception:  # it fails without this measure, too
            continue
        guilty.append(measure)
    got = ', '.join(f'{_FIELDS.get(key, key)}: got {measures[key]!r}' for key in guilty or measures)
    return (
        f'{got or f"backbone: got {name!r}"}, with which timm can not build {name!r}: {on_one_line(error).rstrip(".")}.'
    )


def check_effects(name: str, given: Iterable[str], **arguments: Any) -> None:
    """Raise ValueError for a measure that changes nothing: timm's ResNets pass over what they have no use for.

    A value that the backbone has by itself, or by timm's default, changes nothing either; it is no mistake.

    Args:
        given: Names of the measures in question.
        arguments: Of `create_backbone`, the other measures among them.
    """
    defaults = inspect.signature(kind_of(name).timms.__init__).parameters
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
    # a part that was taken out is no difference, whether timm makes it or not
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
