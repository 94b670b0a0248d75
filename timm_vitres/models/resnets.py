"""The kinds of ResNet that a hybrid can begin with: one class for each, which answers whatever depends on the kind.

image (B, C, H, W) -> `ResNetBackbone`, `ResNetV2Backbone`, `StemBackbone` or `NoBackbone` -> map (B, C', H / r, W / r)

They are timm's own models, with timm's names of tensors. Each of them has

    feature_info                    [{num_chs, reduction, module}] of its levels; the last one is what it returns
    stem_pattern, stage_pattern     regular expressions for the names of its parameters, for layer decay
    keep(stage, stem_stride)        -> a backbone of the stages up to `stage` (0: the stem alone)
    forward_levels(x, num_levels)   -> the maps of its first levels; a script computes them all
    blocks()                        -> its residual blocks, from the first to the last
    prune(level)                    -> a backbone that ends at a level
    init_as_built()                 initialises it as its constructor does
"""

from collections import OrderedDict
from functools import partial
from typing import Any, Dict, List, Type, Union

import torch
from timm.models import ResNet, ResNetV2, checkpoint_seq, is_model, is_model_in_modules, model_entrypoint
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ..checks import show
from .layers import PadSameMaxPool2d, PadSameStdConv2d

RESNETV2 = 'resnetv2'  # the name of the R+ViT checkpoints' ResNet, which timm has no name for
Info = List[Dict[str, Any]]


class ResNetBackbone(ResNet):
    """timm's `ResNet` up to any stage."""

    timms: Type[nn.Module] = ResNet
    # `ResNet` looks for these words in a stem's type, and passes over others
    stem_types = ('', 'deep', 'deep_tiered')
    width_multiple = 1  # of which its channels must be multiples
    stem_pattern = r'(?!layer\d)'
    stage_pattern = r'layer(\d+)'

    @classmethod
    def build(cls, name: str, stage: int, measures: Dict[str, Any], **fixed: Any) -> 'ResNetBackbone':
        """Build timm's model `name` by measures of ours, with all four stages; `fixed` are arguments of timm's."""
        kwargs = {**measures, **fixed}
        if 'block' in kwargs:
            kwargs['block'] = BasicBlock if kwargs['block'] == 'basic' else Bottleneck
        if 'layers' in kwargs:
            missing = 4 - len(kwargs['layers'])
            kwargs['layers'] = (*kwargs['layers'], *(1,) * missing)
            if 'channels' in kwargs:
                kwargs['channels'] = (*kwargs['channels'], *kwargs['channels'][-1:] * missing)
        backbone = model_entrypoint(name)(pretrained=False, **kwargs)
        if 'stem_width' in measures and not isinstance(backbone.conv1, nn.Sequential):  # timm would pass over it
            raise ValueError("only a deep stem has one; give stem_type='deep'")
        backbone.__class__ = cls  # timm's entrypoints make no other class than timm's
        return backbone

    def keep(self, stage: int, stem_stride: int) -> 'ResNetBackbone':
        """Return the stages up to `stage`, behind a stem of a stride."""
        for i in range(stage + 1, 5):
            setattr(self, f'layer{i}', nn.Sequential())
        if stem_stride < 4:
            self.maxpool = nn.Identity()
        _set_first_stride_(self.conv1, stem_stride)
        _end_with_(self, _levels(self.feature_info, stage, stem_stride, pool='maxpool'))
        return self

    def forward_levels(self, x: torch.Tensor, num_levels: int) -> List[torch.Tensor]:
        """x: (B, C, H, W) -> `num_levels` maps (B, num_chs, H / reduction, W / reduction)."""
        x = self.act1(self.bn1(self.conv1(x)))
        levels: List[torch.Tensor] = [x]
        x = self.maxpool(x)
        if torch.jit.is_scripting():  # a script can't choose a module by its name
            levels.append(self.layer1(x))
            levels.append(self.layer2(levels[-1]))
            levels.append(self.layer3(levels[-1]))
            levels.append(self.layer4(levels[-1]))
        else:
            for i in range(1, num_levels):
                layer = getattr(self, f'layer{i}')
                x = checkpoint_seq(layer, x) if self.grad_checkpointing and len(layer) else layer(x)
                levels.append(x)
        return levels

    def blocks(self) -> List[nn.Module]:
        """Return the residual blocks, from the first to the last."""
        return [block for i in range(1, 5) for block in getattr(self, f'layer{i}')]

    def prune(self, level: int) -> 'ResNetBackbone':
        """Cut off, in place, what comes after a level."""
        _prune_stages_(self, level)
        return self

    @torch.jit.ignore
    def init_as_built(self) -> None:
        """Initialise all convolutions and norms as the constructor does."""
        self.init_weights()


class ResNetV2Backbone(ResNetV2):
    """timm's `ResNetV2` up to any stage."""

    timms: Type[nn.Module] = ResNetV2
    stem_types = ('', 'fixed', 'same', 'deep', 'deep_fixed', 'deep_same', 'tiered')
    width_multiple = 8
    stem_pattern = r'(?!stages\b|norm\b)'
    stage_pattern = r'stages\.(\d+)'

    @classmethod
    def build(cls, name: str, stage: int, measures: Dict[str, Any], **fixed: Any) -> 'ResNetV2Backbone':
        """Build timm's model `name`, or 'resnetv2' up to `stage`, by measures of ours."""
        kwargs = {**measures, **fixed}
        if 'block' in kwargs:
            kwargs['basic'] = kwargs.pop('block') == 'basic'
        if name != RESNETV2:
            backbone = model_entrypoint(name)(pretrained=False, **kwargs)
            backbone.__class__ = cls  # timm's entrypoints make no other class than timm's
            return backbone
        kwargs['layers'] = kwargs.get('layers', (3, 4, 6, 3))[: max(stage, 1)]
        defaults = dict(preact=False, stem_type='same', conv_layer=partial(PadSameStdConv2d, eps=1e-8))
        backbone = cls(**{**defaults, **kwargs})
        if 'same' in kwargs.get('stem_type', 'same'):
            backbone.stem.pool = PadSameMaxPool2d((3, 3), (2, 2), dilation=(1, 1))
        return backbone

    def keep(self, stage: int, stem_stride: int) -> Union['ResNetV2Backbone', 'StemBackbone']:
        """Return the stages up to `stage`, behind a stem of a stride; at 0 the stem itself."""
        if stage < len(self.stages):
            self.norm = nn.Identity()  # it was made for the last stage
        self.stages = self.stages[:stage]
        if stem_stride < 4:
            for name in ('pad', 'pool'):
                if hasattr(self.stem, name):
                    setattr(self.stem, name, nn.Identity())
        _set_first_stride_(self.stem, stem_stride)
        info = _levels(self.feature_info, stage, stem_stride, pool='stem.pool')
        if stage == 0:
            return StemBackbone.of(self, info)
        if not isinstance(self.norm, nn.Identity):
            info[-1]['module'] = 'norm'
        _end_with_(self, info)
        return self

    def forward_levels(self, x: torch.Tensor, num_levels: int) -> List[torch.Tensor]:
        """x: (B, C, H, W) -> `num_levels` maps (B, num_chs, H / reduction, W / reduction)."""
        levels: List[torch.Tensor] = []
        for i, module in enumerate(self.stem):
            x = module(x)
            if i == self.stem_feat_idx:
                levels.append(x)
        for stage in self.stages:
            if len(levels) < num_levels:
                x = stage(x)
                levels.append(x)
        if len(levels) == len(self.stages) + 1:
            levels[-1] = self.norm(levels[-1])
        return levels

    def blocks(self) -> List[nn.Module]:
        """Return the residual blocks, from the first to the last."""
        return [block for stage in self.stages for block in stage.get_submodule('blocks').children()]

    def prune(self, level: int) -> 'ResNetV2Backbone':
        """Cut off, in place, what comes after a level."""
        _prune_stages_(self, level)
        return self

    @torch.jit.ignore
    def init_as_built(self) -> None:
        """Initialise all convolutions as the constructor does: timm's method has another default for the last norms."""
        self.init_weights(zero_init_last=False)


class StemBackbone(nn.Sequential):
    """The stem of timm's `ResNetV2` as a model of its own, as in vit_tiny_r_s16_p8_224."""

    feature_info: Info
    stem_feat_idx: int  # of the layer that returns the first level
    stem_pattern = r''
    stage_pattern = r'stages\.(\d+)'  # it has none

    @classmethod
    def of(cls, resnet: ResNetV2, info: Info) -> 'StemBackbone':
        """Return the stem of a ResNet, whose levels are `info`."""
        stem = cls(OrderedDict(resnet.stem.named_children()))
        stem.stem_feat_idx = resnet.stem_feat_idx
        stem.feature_info = [dict(level, module=level['module'].removeprefix('stem.')) for level in info]
        return stem

    def forward_levels(self, x: torch.Tensor, num_levels: int) -> List[torch.Tensor]:
        """x: (B, C, H, W) -> the stem's map without pooling, and that with it."""
        levels: List[torch.Tensor] = []
        for i, module in enumerate(self):
            x = module(x)
            if i == self.stem_feat_idx:
                levels.append(x)
        levels.append(x)
        return levels[:num_levels]

    def blocks(self) -> List[nn.Module]:
        """Return no block: a stem has none."""
        return []

    def prune(self, level: int) -> 'StemBackbone':
        """Return what is left without the layers after a level."""
        if level + 1 == len(self.feature_info):
            return self
        pruned: Any = self[: self.stem_feat_idx + 1]
        pruned.stem_feat_idx = self.stem_feat_idx
        pruned.feature_info = self.feature_info[: level + 1]
        return pruned

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise the convolutions as timm's ResNetV2 does."""
        ResNetV2.init_weights(self)  # pyright: ignore[reportArgumentType]

    @torch.jit.ignore
    def init_as_built(self) -> None:
        """Initialise the convolutions as they are in a whole ResNetV2."""
        self.init_weights()


class NoBackbone(nn.Identity):
    """No ResNet at all: the ViT's patches are those of the image."""

    stem_pattern = r''
    stage_pattern = r'stages\.(\d+)'  # it has none

    def __init__(self):
        super().__init__()
        self.feature_info: Info = []

    def forward_levels(self, x: torch.Tensor, num_levels: int) -> List[torch.Tensor]:
        """Return no map."""
        levels: List[torch.Tensor] = []
        return levels

    def blocks(self) -> List[nn.Module]:
        """Return no block."""
        return []

    def init_as_built(self) -> None:
        """Do nothing: there is no parameter."""


Kind = Union[Type[ResNetBackbone], Type[ResNetV2Backbone]]


def kind_of(name: str) -> Kind:
    """Return the class of a backbone, by timm's name or 'resnetv2'; ValueError for a name that is none."""
    if name == RESNETV2:
        return ResNetV2Backbone
    for kind, module in ((ResNetV2Backbone, 'resnetv2'), (ResNetBackbone, 'resnet')):
        if '.' not in name and is_model(name) and is_model_in_modules(name, (module,)):
            return kind
    raise ValueError(
        f"backbone: got {show(name)}, expected the name (without a tag) of one of timm's ResNets, see "
        f"timm.list_models(module='resnet') and timm.list_models(module='resnetv2'), or 'resnetv2', or ''."
    )


def _set_first_stride_(stem: nn.Module, stem_stride: int) -> None:
    """Give the first convolution of a stem the stride 1, where the whole stem is to have it."""
    if stem_stride == 1:
        next(module for module in stem.modules() if isinstance(module, nn.Conv2d)).stride = (1, 1)


def _levels(info: Any, stage: int, stem_stride: int, pool: str) -> Info:
    """Return timm's list of a ResNet's levels up to a stage, as it is behind a stem of a stride.

    Args:
        pool: Name of the stem's pooling, which ends a ResNet without stages.
    """
    levels = [dict(level, reduction=level['reduction'] * stem_stride // 4) for level in info[: stage + 1]]
    levels[0]['reduction'] = min(stem_stride, 2)
    if stage == 0 and stem_stride == 4:
        levels.append(dict(levels[0], reduction=4, module=pool))
    return levels


def _end_with_(backbone: Any, info: Info) -> None:
    """Let a backbone tell its levels, the last of which it returns."""
    backbone.feature_info = info
    backbone.num_features = backbone.head_hidden_size = info[-1]['num_chs']


def _prune_stages_(backbone: Any, level: int) -> None:
    info = backbone.feature_info[: level + 1]
    if len(info) < len(backbone.feature_info):
        backbone.prune_intermediate_layers([level])
        backbone.feature_info = info
