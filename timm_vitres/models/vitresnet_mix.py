"""The interleaved family: a ResNet, some of whose blocks attend where others convolve.

Papers: `Bottleneck Transformers for Visual Recognition` (BoTNet, Srinivas et al. 2021, arXiv:2101.11605), whose
variants in timm load unchanged; `How Do Vision Transformers Work?` (AlterNet, Park and Kim 2022, arXiv:2202.06709),
which finds attention at the end of each stage best, also on small data. It is timm's `ByobNet`:

    image -> stem -> stage of blocks -> ... -> stage whose last blocks attend -> map -> pooling -> head
"""

import dataclasses
from functools import partial
from typing import Any, Dict, Optional, Sequence, Set

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ConvNormAct, to_2tuple
from timm.models import checkpoint_seq, generate_default_cfgs, named_apply, register_model
from timm.models.byobnet import ByobNet
from torch import nn

from ..checks import Device, FloatType, NumClasses, Rate, Size, WeightInit, Width, checked
from ..timm_private import init_byob_weights
from ..weights.layouts import StateDict
from ..weights.shipped import shipped
from .attention import MergingConvNormAct
from .base import ExplainedParts, Hybrid
from .config import MapGlobalPool, VitResNetMixCfg, check_pooling
from .interleaving import (
    TABLES,
    InterleavedFeatures,
    attn_name,
    attn_sizes,
    byob_cfg,
    find_levels,
    fit_rel_tables,
    fit_stem,
    input_stride,
    rel_table_size,
    set_stem_stride_,
)
from .layers import checked_images
from .loading import build_with_tables

__all__ = ['VitResNetMix', 'VitResNetMixCfg']


class VitResNetMix(InterleavedFeatures, Hybrid, ByobNet):
    """A ResNet, some of whose blocks attend where others convolve; one class for the family.

    It is timm's `ByobNet`, and keeps its interface: `forward_features` returns a map (B, C, H / stride, W / stride).
    Any height and width is taken: relative positions are resampled in the forward pass.

    Args:
        cfg: The architecture.
        img_size: Height and width, in pixels, of the images that the tables of relative positions are made for.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the head out.
        drop_block_rate: Of DropBlock in the last two stages.
        drop_path_rate: Of the blocks, from 0 in the first to this in the last.
        zero_init_last: Whether a block begins as its shortcut alone: the weights of its last norm are 0.
        dynamic_img_size, dynamic_img_pad, strict_img_size: taken for timm's sake; every size works without them.

    Raises:
        ValueError: for an impossible argument (which one, what it was, what is allowed).
        TypeError: for an unknown argument.
    """

    @checked
    def __init__(
        self,
        cfg: VitResNetMixCfg,
        img_size: Optional[Size] = None,
        in_chans: Width = 3,
        num_classes: NumClasses = 1000,
        drop_rate: Rate = 0.0,
        drop_block_rate: Rate = 0.0,
        drop_path_rate: Rate = 0.0,
        zero_init_last: bool = True,
        weight_init: WeightInit = '',
        dynamic_img_size: bool = True,
        dynamic_img_pad: bool = True,
        strict_img_size: bool = False,
        device: Optional[Device] = None,
        dtype: Optional[FloatType] = None,
    ):
        check_pooling(cfg.global_pool, num_classes)
        super().__init__(
            byob_cfg(cfg, to_2tuple(img_size or 224)),
            num_classes,
            in_chans,
            cfg.global_pool,
            output_stride=cfg.output_stride * cfg.own_stem_stride // (cfg.stem_stride or cfg.own_stem_stride),
            drop_rate=drop_rate,
            drop_block_rate=drop_block_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_last,
            device=device,
            dtype=dtype,
        )
        self.cfg = cfg
        self.zero_init_last = zero_init_last
        for module in self.modules():
            if type(module) is ConvNormAct:  # timm's stages make no other class than timm's
                module.__class__ = MergingConvNormAct
        if cfg.stem_stride is not None:
            set_stem_stride_(self.stem, cfg.stem_stride)
        levels, self.level_indices = find_levels(cfg, self.stem, self.num_features)
        self.num_levels = len(levels)
        self.feature_info = [levels[i] for i in self.level_indices]
        self.num_pyramid = len(self.feature_info)
        first_conv = next(name for name, module in self.named_modules() if isinstance(module, nn.Conv2d))
        self._traits = dict(first_conv=first_conv, classifier=('head.fc',), fixed_input_size=False)
        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        if weight_init not in ('', 'skip') and num_classes > 0:
            self.init_head_('head.fc')

    @checked
    @torch.jit.ignore
    def init_weights(self, mode: WeightInit = '', needs_reset: bool = True) -> None:
        """Initialise every parameter and buffer, as after building on the meta device and `to_empty`.

        Args:
            mode: timm's name of a ViT's way to do so with the head; by default the one that the model was made with.
            needs_reset: Whether to begin with the layers' own initialisation; False where they have just been made.
        """
        for module in self.modules():
            if needs_reset and module is not self and hasattr(module, 'reset_parameters'):
                module.reset_parameters()  # pyright: ignore[reportCallIssue]
        named_apply(partial(init_byob_weights, zero_init_last=self.zero_init_last), self)
        self.weight_init_mode = mode or self.weight_init_mode
        if self.num_classes > 0:
            self.init_head_('head.fc')

    @torch.jit.ignore
    def init_head_(self, name: str) -> None:
        """See `Hybrid.init_head_`; timm's `ByobNet` has a way of its own."""
        if self.weight_init_mode:
            super().init_head_(name)
        else:
            init_byob_weights(self.get_submodule(name), name)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Return the names of the parameters that weight decay spares, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith(self.tables)}

    @torch.jit.ignore
    def fit_tables(self, state_dict: StateDict, img_size: Optional[Sequence[int]] = None) -> StateDict:
        """Resample the tables of relative positions; see `Hybrid.fit_tables`."""
        return fit_rel_tables(state_dict, self.state_dict())

    @torch.jit.ignore
    def filter_state_dict(self, state_dict: StateDict, img_size: Optional[Sequence[int]] = None) -> StateDict:
        """See `Hybrid.filter_state_dict`; a stem of one convolution may have gained or lost its pooling."""
        return super().filter_state_dict(fit_stem(state_dict, self.stem), img_size)

    @torch.jit.ignore
    def table_size(self, state_dict: StateDict, candidates: Sequence[Any] = ()) -> Any:
        """See `Hybrid.table_size`."""
        return rel_table_size(state_dict, self.cfg, candidates)

    @checked
    def set_input_size(self, img_size: Size) -> None:
        """Make the tables of relative positions for images of another height and width, in pixels."""
        size = to_2tuple(img_size)
        for place, sides in attn_sizes(self.cfg, size, len(self.stages)).items():
            self.get_submodule(attn_name(place)).set_feat_size(sides)
        self._model_args = {**self._model_args, 'img_size': size}  # timm writes these into config.json
        self._traits = {**self._traits, 'img_size': size}  # and makes the data config of these

    @checked
    def reset_classifier(self, num_classes: NumClasses, global_pool: Optional[MapGlobalPool] = None) -> None:
        """Replace the head by a new one of `num_classes` (0: none), and the pooling if one is given.

        Raises:
            ValueError: for an impossible number of classes, or an unknown pooling.
        """
        check_pooling(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool)
        if global_pool is not None:
            self.cfg = dataclasses.replace(self.cfg, global_pool=global_pool)

    @torch.jit.ignore
    def explained_parts(self) -> ExplainedParts:
        """See `Hybrid.explained_parts`: attention is that of the blocks that attend to the smallest map."""
        strides = {place: input_stride(self.cfg, *place) for place in attn_sizes(self.cfg, (1, 1), len(self.stages))}
        stride = max(strides.values(), default=1)
        last = self.feature_info[-1]['reduction']
        return ExplainedParts(
            resnet=self.final_conv,
            resnet_stride=(last, last),
            attentions=[self.get_submodule(attn_name(place)) for place, own in strides.items() if own == stride],
            num_prefix_tokens=0,
            class_token=False,
            token_stride=(stride, stride),
        )

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W) -> the last map (B, C', H / stride, W / stride)."""
        x = checked_images(x, self.in_chans)
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x)
        else:
            x = self.stages(x)
        return self.final_conv(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in_chans, H, W) -> logits (B, num_classes); see `forward_head`."""
        return self.forward_head(self.forward_features(x))


_ATTN_WEIGHTS = 'https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights/'


def _cfg(**kwargs) -> Dict[str, Any]:
    """Return a weight's facts, with those that timm's BoTNets share as defaults."""
    return {
        'num_classes': 1000,
        'input_size': (3, 256, 256),
        'fixed_input_size': False,
        'pool_size': (8, 8),
        'crop_pct': 0.95,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1.conv',
        'classifier': 'head.fc',
        'license': 'apache-2.0',
        **kwargs,
    }


# A name without a tag means its first tag that has weights
default_cfgs = generate_default_cfgs(
    {
        'vitresnet_mix_bot26t.c1_in1k': _cfg(
            hf_hub_id='timm/botnet26t_256.c1_in1k', url=_ATTN_WEIGHTS + 'botnet26t_c1_256-167a0e9f.pth'
        ),
        'vitresnet_mix_eca_bot26ts.c1_in1k': _cfg(
            hf_hub_id='timm/eca_botnext26ts_256.c1_in1k', url=_ATTN_WEIGHTS + 'eca_botnext26ts_c_256-95a898f6.pth'
        ),
        'vitresnet_mix_se_bot33ts.a1h_in1k': _cfg(
            hf_hub_id='timm/sebotnet33ts_256.a1h_in1k',
            url=_ATTN_WEIGHTS + 'sebotnet33ts_a1h2_256-957e3c3e.pth',
            crop_pct=0.94,
        ),
        'vitresnet_mix_bot50ts.untrained': _cfg(),
        'vitresnet_mix_alter50ts.untrained': _cfg(),
        'vitresnet_mix_nano.fmnist': _cfg(
            file=shipped('vitresnet_mix_nano.fmnist'),
            num_classes=10,
            input_size=(1, 28, 28),
            pool_size=(4, 4),
            mean=(0.286,),
            std=(0.353,),
            interpolation='bilinear',
            crop_pct=1.0,
            crop_mode='center',
            first_conv='stem.conv',
            label_names=(
                *('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat'),
                *('Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
            ),
        ),
        # the name without a tag is one for colours and any classes; timm takes the last of those that could be it
        'vitresnet_mix_nano.untrained*': _cfg(input_size=(3, 64, 64), crop_pct=1.0, first_conv='stem.conv'),
        'vitresnet_mix.untrained': _cfg(),
        'test_vitresnet_mix.untrained': _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)

_ATTENDS = r'stages\.\d+\.\d+\.(self_attn|post_attn)\.'
VitResNetMix.variants = tuple(default_cfgs)
VitResNetMix.tables = TABLES
VitResNetMix.resnet_names = rf'(?!head\.|{_ATTENDS})'
VitResNetMix.vit_names = _ATTENDS
VitResNetMix.feature_classes = ('getter', 'hook', 'fx', 'list', 'dict')
VitResNetMix.foreign_names = {
    r'botnet26t_256': 'vitresnet_mix_bot26t',
    r'eca_botnext26ts_256': 'vitresnet_mix_eca_bot26ts',
    r'sebotnet33ts_256': 'vitresnet_mix_se_bot33ts',
    r'botnet50ts_256': 'vitresnet_mix_bot50ts',
}


@register_model
def vitresnet_mix_bot26t(pretrained: bool = False, **kwargs) -> VitResNetMix:
    """BoTNet-26-T: attention in the last block of stage 3 and all of stage 4; 12.5M parameters."""
    return build_with_tables(VitResNetMix, 'vitresnet_mix_bot26t', pretrained, VitResNetMixCfg(), **kwargs)


@register_model
def vitresnet_mix_eca_bot26ts(pretrained: bool = False, **kwargs) -> VitResNetMix:
    """BoTNeXt-26-TS with ECA: groups of 16 channels, narrow queries and keys, SiLU; 10.6M parameters."""
    cfg = VitResNetMixCfg(group_size=16, dim_head=16, channel_attn='eca', act_layer='silu')
    return build_with_tables(VitResNetMix, 'vitresnet_mix_eca_bot26ts', pretrained, cfg, **kwargs)


@register_model
def vitresnet_mix_se_bot33ts(pretrained: bool = False, **kwargs) -> VitResNetMix:
    """BoTNet-33-TS with SE: attention at the end of stages 2, 3 and 4; 13.7M parameters."""
    cfg = VitResNetMixCfg(
        layers=(2, 3, 3, 2),
        channels=(256, 512, 1024, 1536),
        attn_blocks=(0, 1, 1, 2),
        bottle_ratio=(0.25, 0.25, 0.25, 0.333),
        channel_attn='se',
        act_layer='silu',
        stem_pool='',
        num_features=1280,
    )
    return build_with_tables(VitResNetMix, 'vitresnet_mix_se_bot33ts', pretrained, cfg, **kwargs)


@register_model
def vitresnet_mix_bot50ts(pretrained: bool = False, **kwargs) -> VitResNetMix:
    """BoTNet-50-TS: attention in stages 2, 3 and 4, every second block of the longest; 22.7M parameters."""
    cfg = VitResNetMixCfg(layers=(3, 4, 6, 3), attn_blocks=(0, 1, (1, 3, 5), (1,)), act_layer='silu')
    return build_with_tables(VitResNetMix, 'vitresnet_mix_bot50ts', pretrained, cfg, **kwargs)


@register_model
def vitresnet_mix_alter50ts(pretrained: bool = False, **kwargs) -> VitResNetMix:
    """As in AlterNet-50, convolution and attention take turns towards the end of stages 2 to 4; 25.6M parameters."""
    cfg = VitResNetMixCfg(
        layers=(3, 4, 6, 4),
        attn_blocks=(0, 1, (1, 3, 5), (1, 3)),
        num_heads=(2, 4, 8, 16),
        act_layer='silu',
    )
    return build_with_tables(VitResNetMix, 'vitresnet_mix_alter50ts', pretrained, cfg, **kwargs)


@register_model
def vitresnet_mix_nano(pretrained: bool = False, **kwargs) -> VitResNetMix:
    """Thin ResNet for images of 28 to 128 pixels, attention at the end of its last two stages; 1.5M parameters."""
    cfg = VitResNetMixCfg(
        layers=(1, 2, 3, 3),
        channels=(24, 48, 96, 160),
        strides=(1, 2, 2, 2),
        attn_blocks=(0, 0, 1, 1),
        block='basic',
        bottle_ratio=1.0,
        attn_ratio=0.5,
        stem_type='',
        stem_pool='',
        stem_chs=24,
        stem_stride=1,
    )
    return build_with_tables(VitResNetMix, 'vitresnet_mix_nano', pretrained, cfg, **kwargs)


@register_model
def vitresnet_mix(pretrained: bool = False, **kwargs) -> VitResNetMix:
    """A ResNet with attention in any of its blocks, by `VitResNetMixCfg`'s fields; BoTNet-26-T by default."""
    return build_with_tables(VitResNetMix, 'vitresnet_mix', pretrained, VitResNetMixCfg(), **kwargs)


@register_model
def test_vitresnet_mix(pretrained: bool = False, **kwargs) -> VitResNetMix:
    """An interleaved hybrid for tests, of every part that the larger ones have; 0.1M parameters."""
    cfg = VitResNetMixCfg(
        layers=(1, 2, 2, 2),
        channels=(32, 48, 64, 96),
        attn_blocks=(0, 1, (0,), 2),
        bottle_ratio=0.5,
        group_size=8,
        num_heads=(1, 2, 2, 4),
        channel_attn='se',
        act_layer='silu',
        stem_chs=16,
        num_features=64,
    )
    return build_with_tables(VitResNetMix, 'test_vitresnet_mix', pretrained, cfg, **kwargs)
