"""The parallel family: a ResNet and a ViT side by side, coupled at every block.

Paper: `Conformer: Local Features Coupling Global Representations for Visual Recognition` (Peng et al. 2021,
arXiv:2105.03889), whose published weights load unchanged. Its figure 2, as it stands in the code below:

                       image
                         |
                       Stem, stride 4
             +-----------+-----------+
         ConvBlock           patches, class token      FirstUnit
             |                    Block
             |                       |
         ConvBlock ----- Down -----> +
             |                     Block               Unit, eleven times
         ConvBlock <----- Up ------- |
             |                       |
       global average           class token
             |                       |
        head_resnet    (sum)     head_vit
"""

import dataclasses
import math
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, get_init_weights_vit
from torch import nn

from ..checks import Device, FloatType, NumClasses, Rate, Size, WeightInit, Width, checked
from .base import ExplainedParts, Hybrid, ImageSizes
from .config import DualGlobalPool, VitResNetDualCfg
from .features import as_format, check_output_fmt
from .layers import feature_take_indices, keep_mode_
from .loading import build_hybrid
from .units import FirstUnit, MapAndTokens, Stem, Unit

__all__ = ['VitResNetDual', 'VitResNetDualCfg']


class VitResNetDual(Hybrid):
    """A ResNet and a ViT side by side, with a head each, whose logits are added; one class for the family.

    `forward_features` returns the ResNet's map (B, C, H / 32, W / 32) and the ViT's tokens (B, 1 + N, D), the class
    token first; `forward_head` pools both and classifies. Any height and width is taken: tokens have no positions but
    those that the ResNet gives them, and where a token reaches over the edge of a map, the map's last pixels are
    repeated for it.

    Args:
        cfg: The architecture.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves both heads out: the model returns the two pooled features, concatenated.
        drop_path_rate: Of the ViT's blocks, from 0 in the first to this in the last, as published.
        img_size, dynamic_img_size, dynamic_img_pad, strict_img_size: taken for timm's sake; every size works.

    Raises:
        ValueError: for an impossible argument (which one, what it was, what is allowed).
        TypeError: for an unknown argument.
    """

    @checked
    def __init__(
        self,
        cfg: VitResNetDualCfg,
        img_size: Optional[Size] = None,
        in_chans: Width = 3,
        num_classes: NumClasses = 1000,
        drop_rate: Rate = 0.0,
        proj_drop_rate: Rate = 0.0,
        attn_drop_rate: Rate = 0.0,
        drop_path_rate: Rate = 0.0,
        weight_init: WeightInit = '',
        dynamic_img_size: bool = True,
        dynamic_img_pad: bool = True,
        strict_img_size: bool = False,
        device: Optional[Device] = None,
        dtype: Optional[FloatType] = None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.cfg = cfg
        self.in_chans = in_chans
        self.embed_dim = cfg.embed_dim
        self.num_features = self.head_hidden_size = cfg.channels[-1] + cfg.embed_dim
        self.token_stride = cfg.patch_size // 4  # in pixels of the stem's map
        self.distilled_training = False
        self.grad_checkpointing = False

        self.stem = Stem(in_chans, cfg.stem_width, **dd)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.cls_token = nn.Parameter(torch.empty(1, 1, cfg.embed_dim, **dd))
        self.units = nn.ModuleList()
        width = cfg.stem_width
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, cfg.depth)):
            stage, position = divmod(i, cfg.depth // 3)
            block = Block(
                cfg.embed_dim,
                cfg.num_heads,
                cfg.mlp_ratio,
                cfg.qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rate,
                **dd,
            )
            measures = (width, cfg.channels[stage], cfg.embed_dim, self.token_stride // 2**stage, block)
            if i == 0:
                unit = FirstUnit(*measures, **dd)
            else:
                conv_stride = 2 if stage > 0 and position == 0 else 1
                unit = Unit(*measures, conv_stride, fusion_stride=2 if i == cfg.depth - 1 else 1, **dd)
            self.units.append(unit)
            width = cfg.channels[stage]
        self.norm = nn.LayerNorm(cfg.embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, cfg.global_pool)
        heads = ('head_resnet', 'head_vit')
        self._traits = dict(first_conv='stem.conv1', classifier=heads, fixed_input_size=False)

        third = cfg.depth // 3
        self.units_of_level = [0, third, 2 * third, cfg.depth - 1, cfg.depth]  # how many units each map comes after
        self.feature_info = [dict(num_chs=cfg.stem_width, reduction=2, module='stem')]
        for reduction, count in zip((4, 8, 16, 32), self.units_of_level[1:]):
            last = count - 1
            module = f'units.{last}.fusion_block.act3'  # the unit itself returns its tokens, too
            self.feature_info.append(dict(num_chs=cfg.channels[last // third], reduction=reduction, module=module))
        self.num_pyramid = len(self.feature_info)

        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    @checked
    @torch.jit.ignore
    def init_weights(self, mode: WeightInit = '', needs_reset: bool = True) -> None:
        """Initialise every parameter and buffer as published, also after building on the meta device and `to_empty`.

        Args:
            mode: timm's name for another way to do so with the linear layers; by default the one that the model was
                made with.
            needs_reset: Whether to begin with the layers' own initialisation; False where they have just been made.
        """
        mode = mode or self.weight_init_mode  # pyright: ignore[reportAssignmentType]
        trunc_normal_(self.cls_token, std=0.02)
        head_bias = -math.log(self.num_classes) if mode == 'jax_nlhb' and self.num_classes > 0 else 0.0
        init_linear = get_init_weights_vit('reset' if mode == 'skip' else mode, head_bias, needs_reset)
        for name, module in self.named_modules():
            if needs_reset and hasattr(module, 'reset_parameters'):
                module.reset_parameters()  # pyright: ignore[reportCallIssue]
            # the projections between the parts are 1x1 convolutions in the paper
            if isinstance(module, nn.Conv2d) or name.endswith(('.down.proj', '.up.proj')):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, nn.Linear):
                init_linear(module, name)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Return the names of the parameters that weight decay spares, besides biases and norms."""
        return {'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Group parameters for layer-wise learning rates: the stem with the class token, every unit, the heads."""
        return dict(stem=r'^(?:stem|cls_token)', blocks=[(r'^units\.(\d+)', None), (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the input of every unit alone, and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Let the model return (the ResNet's logits, the ViT's logits) while it trains, for a loss on each."""
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> Tuple[nn.Module, nn.Module]:
        """Return the ResNet's head and the ViT's."""
        return self.head_resnet, self.head_vit

    @checked
    def reset_classifier(self, num_classes: NumClasses, global_pool: Optional[DualGlobalPool] = None) -> None:
        """Replace both heads by new ones of `num_classes` (0: none), and the pooling if one is given.

        Raises:
            ValueError: for an impossible number of classes, or an unknown pooling.
        """
        if global_pool is not None:
            self.global_pool = global_pool
            self.cfg = dataclasses.replace(self.cfg, global_pool=global_pool)
        self.num_classes = num_classes
        dd = dict(device=self.cls_token.device, dtype=self.cls_token.dtype)
        widths = (self.num_features - self.cfg.embed_dim, self.cfg.embed_dim)
        heads = [nn.Linear(width, num_classes, **dd) if num_classes > 0 else nn.Identity() for width in widths]
        self.head_resnet, self.head_vit = (head.train(self.training) for head in heads)
        self.forget_labels()

    @torch.jit.ignore
    def explained_parts(self) -> ExplainedParts:
        """See `Hybrid.explained_parts`."""
        stride, side = self.feature_info[-1]['reduction'], self.cfg.patch_size
        return ExplainedParts(
            resnet=self.units[-1],
            resnet_stride=(stride, stride),
            attentions=[unit.block.attn for unit in self.units],
            num_prefix_tokens=1,
            class_token=self.global_pool == 'token',
            token_stride=(side, side),
        )

    def forward_features(self, x: torch.Tensor) -> MapAndTokens:
        """Take x (B, C, H, W) -> the ResNet's map (B, C', H / 32, W / 32), the ViT's tokens (B, 1 + N, D)."""
        kept: List[int] = []
        x, tokens, _ = self._run(x, len(self.units), kept)
        return x, self.norm(tokens)

    def _run(
        self, x: torch.Tensor, num_units: int, kept: List[int]
    ) -> Tuple[torch.Tensor, torch.Tensor, List[torch.Tensor]]:
        """Run the stem and the first units. x: (B, C, H, W) -> map, tokens, and the maps after `kept` many units."""
        levels: List[torch.Tensor] = []
        x = self.stem(x)
        if 0 in kept:
            levels.append(x)
        x = self.maxpool(x)
        stride = self.token_stride
        grid = ((x.shape[-2] + stride - 1) // stride, (x.shape[-1] + stride - 1) // stride)
        tokens = self.cls_token.expand(x.shape[0], -1, -1)
        for i, unit in enumerate(self.units):
            if i < num_units:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x, tokens = checkpoint(unit, x, tokens, grid)
                else:
                    x, tokens = unit(x, tokens, grid)
                if i + 1 in kept:
                    levels.append(x)
        return x, tokens, levels

    def forward_head(self, x: MapAndTokens, pre_logits: bool = False) -> torch.Tensor:
        """Return the sum of both heads' logits (B, num_classes) of what `forward_features` returns.

        Without heads, or with pre_logits: the pooled features (B, C' + D). With global_pool='': x, as it is.
        """
        if self.global_pool == '':
            if not torch.jit.is_scripting():
                return x  # pyright: ignore[reportReturnType]
            raise RuntimeError("global_pool: got '', with which a script can't return (map, tokens).")
        resnet = x[0].mean((2, 3))
        has_patches = len(self.units) > 0  # of a pruned model the class token may be all there is
        vit = x[1][:, 1:].mean(1) if self.global_pool == 'avg' and has_patches else x[1][:, 0]
        resnet, vit = self.head_drop(resnet), self.head_drop(vit)
        if pre_logits or self.num_classes == 0:
            return torch.cat([resnet, vit], dim=1)
        resnet, vit = self.head_resnet(resnet), self.head_vit(vit)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return resnet, vit  # pyright: ignore[reportReturnType]
        return resnet + vit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, in_chans, H, W) -> logits (B, num_classes); see `forward_head` and `set_distilled_training`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[MapAndTokens, List[torch.Tensor]]]:
        """Return the features, and the maps of the ResNet that `feature_info` lists.

        Args:
            x: (B, C, H, W).
            indices: Of `feature_info`, in the order wanted: None for all, a number for the last so many.
            norm: Taken for timm's sake; these maps are not normalised.
            stop_early: Leave out the units that no map needs; the features are then those of the last that ran.
            output_fmt: 'NCHW': maps (B, C, H / reduction, W / reduction); 'NLC': (B, N, C).
            intermediates_only: Return the maps alone.

        Returns:
            ((map, tokens), maps), or as the arguments say.
        """
        check_output_fmt(output_fmt)
        take_indices, max_index = feature_take_indices(len(self.units_of_level), indices)
        num_units = self.units_of_level[max_index] if stop_early else len(self.units)
        x, tokens, levels = self._run(x, num_units, self.units_of_level)
        maps: List[torch.Tensor] = []
        for i in take_indices:
            maps.append(as_format(levels[i], output_fmt))
        if intermediates_only:
            return maps
        return (x, self.norm(tokens)), maps

    @torch.jit.ignore
    def image_sizes(self) -> ImageSizes:
        """See `Hybrid.image_sizes`; tokens stay as far apart as they are where only shallow maps are left."""
        sizes = super().image_sizes()
        return sizes._replace(stride=max(sizes.stride, self.cfg.patch_size)) if len(self.units) else sizes

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove what the maps at `indices` of `feature_info` do not need; what the heads need stays with the heads.

        Returns:
            The indices, counted from 0.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.units = self.units[: self.units_of_level[max_index]]
            self.feature_info = self.feature_info[: max_index + 1]
            self.num_features = self.head_hidden_size = self.feature_info[-1]['num_chs'] + self.cfg.embed_dim
            self.units_of_level = self.units_of_level[: max_index + 1]
            if max_index == 0:
                self.maxpool = nn.Identity()
                self.cls_token.requires_grad_(False)  # nothing depends on it: DDP would wait for its gradient
            self.reset_classifier(0, '')
        keep_mode_(self)
        return take_indices


_MMPRETRAIN = 'https://download.openmmlab.com/mmclassification/v0/conformer/'


def _cfg(**kwargs) -> Dict[str, Any]:
    """Return a weight's facts, with those that the Conformer weights share as defaults."""
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'fixed_input_size': False,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1',
        'classifier': ('head_resnet', 'head_vit'),
        'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'vitresnet_dual_tiny.conformer_in1k': _cfg(
            url=_MMPRETRAIN + 'conformer-tiny-p16_3rdparty_8xb128_in1k_20211206-f6860372.pth'
        ),
        'vitresnet_dual_small.conformer_in1k': _cfg(
            url=_MMPRETRAIN + 'conformer-small-p16_3rdparty_8xb128_in1k_20211206-3065dcf5.pth'
        ),
        'vitresnet_dual_small_p32.conformer_in1k': _cfg(
            url=_MMPRETRAIN + 'conformer-small-p32_8xb128_in1k_20211206-947a0816.pth'
        ),
        'vitresnet_dual_base.conformer_in1k': _cfg(
            url=_MMPRETRAIN + 'conformer-base-p16_3rdparty_8xb128_in1k_20211206-bfdf8637.pth'
        ),
        'vitresnet_dual.untrained': _cfg(),
        'test_vitresnet_dual.untrained': _cfg(input_size=(3, 96, 96)),
    }
)

VitResNetDual.variants = tuple(default_cfgs)
VitResNetDual.resnet_names = r'stem\.|units\.\d+\.(conv_block|fusion_block)\.'
VitResNetDual.vit_names = r'cls_token|norm\.|units\.\d+\.(patch_embed|block)\.'
VitResNetDual.foreign_names = {
    r'Conformer_tiny_patch16': 'vitresnet_dual_tiny',
    r'Conformer_small_patch16': 'vitresnet_dual_small',
    r'Conformer_small_patch32': 'vitresnet_dual_small_p32',
    r'Conformer_base_patch16': 'vitresnet_dual_base',
}


@register_model
def vitresnet_dual_tiny(pretrained: bool = False, **kwargs) -> VitResNetDual:
    """Conformer-Ti/16: a thin ResNet and ViT-S; 23.5M parameters."""
    cfg = VitResNetDualCfg(channels=(64, 128, 256))
    return build_hybrid(VitResNetDual, 'vitresnet_dual_tiny', pretrained, cfg, **kwargs)


@register_model
def vitresnet_dual_small(pretrained: bool = False, **kwargs) -> VitResNetDual:
    """Conformer-S/16: a ResNet of ResNet-50's widths and ViT-S; 37.7M parameters."""
    return build_hybrid(VitResNetDual, 'vitresnet_dual_small', pretrained, VitResNetDualCfg(), **kwargs)


@register_model
def vitresnet_dual_small_p32(pretrained: bool = False, **kwargs) -> VitResNetDual:
    """Conformer-S/32: a quarter of the small one's tokens; 38.9M parameters."""
    return build_hybrid(
        VitResNetDual, 'vitresnet_dual_small_p32', pretrained, VitResNetDualCfg(patch_size=32), **kwargs
    )


@register_model
def vitresnet_dual_base(pretrained: bool = False, **kwargs) -> VitResNetDual:
    """Conformer-B/16: half as wide again, with 9 heads; 83.3M parameters."""
    cfg = VitResNetDualCfg(channels=(384, 768, 1536), embed_dim=576, num_heads=9)
    return build_hybrid(VitResNetDual, 'vitresnet_dual_base', pretrained, cfg, **kwargs)


@register_model
def vitresnet_dual(pretrained: bool = False, **kwargs) -> VitResNetDual:
    """A parallel hybrid of any widths, depth and heads (see `VitResNetDualCfg`); by default the small one, 37.7M."""
    return build_hybrid(VitResNetDual, 'vitresnet_dual', pretrained, VitResNetDualCfg(), **kwargs)


@register_model
def test_vitresnet_dual(pretrained: bool = False, **kwargs) -> VitResNetDual:
    """A parallel hybrid for tests, of every part that the larger ones have; 0.3M parameters."""
    cfg = VitResNetDualCfg(channels=(32, 48, 64), stem_width=32, embed_dim=48, depth=6, num_heads=3)
    return build_hybrid(VitResNetDual, 'test_vitresnet_dual', pretrained, cfg, **kwargs)
