"""The serial family: image -> ResNet -> tokens -> ViT blocks -> head.

Papers: `An Image is Worth 16x16 Words` (Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1 'Hybrid Architecture')
and `How to train your ViT?` (Steiner et al. 2022, arXiv:2106.10270), whose R+ViT checkpoints tiny, small, base and
large load unchanged. A ViT of timm's takes tokens of a ResNet of timm's; `VitResNetCfg` says which ones, and its two
ends are the parents themselves: `depth=0` is the ResNet alone, `backbone=''` the ViT alone.
"""

import dataclasses
from functools import partial
from typing import Any, Dict, List, Optional

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import VisionTransformer, generate_default_cfgs, register_model
from torch import nn

from ..checks import Device, FloatType, NumClasses, Rate, Size, WeightInit, Width, checked
from ..weights.shipped import shipped
from .base import ExplainedParts, Hybrid, ImageSizes
from .composition import check_overrides, compose_backbone, resolve_vit
from .config import MLP_LAYERS, NO_CLASS_TOKEN, GlobalPool, VitResNetCfg
from .embedding import ResNetEmbed
from .features import SerialFeatures
from .loading import build_with_tables
from .merging import merge_layer_scale_
from .tables import SerialTables

__all__ = ['VitResNet', 'VitResNetCfg']


class VitResNet(SerialFeatures, SerialTables, Hybrid, VisionTransformer):
    """A ResNet whose map is the patches of a Vision Transformer; one class for the family.

    It is timm's `VisionTransformer`, and keeps its interface: `forward_features` returns tokens (B, N, D), the prefix
    tokens (class, registers) first; `forward_head` pools them (`global_pool`) and classifies. Any height and width
    from one token up is taken: position embeddings are resampled in the forward pass.

    Args:
        cfg: The architecture.
        img_size: Height and width, in pixels, of the images that the position table is made for.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the head out.
        dynamic_img_size, dynamic_img_pad, strict_img_size: taken for timm's sake; every size works without them.

    Raises:
        ValueError: for an impossible architecture or size (which argument, what it was, what is allowed).
        TypeError: for an unknown argument.
    """

    @checked
    def __init__(
        self,
        cfg: VitResNetCfg,
        img_size: Size = 224,
        in_chans: Width = 3,
        num_classes: NumClasses = 1000,
        drop_rate: Rate = 0.0,
        pos_drop_rate: Rate = 0.0,
        patch_drop_rate: Rate = 0.0,
        proj_drop_rate: Rate = 0.0,
        attn_drop_rate: Rate = 0.0,
        drop_path_rate: Rate = 0.0,
        weight_init: WeightInit = '',
        fix_init: bool = False,
        dynamic_img_size: bool = True,
        dynamic_img_pad: bool = True,
        strict_img_size: bool = False,
        device: Optional[Device] = None,
        dtype: Optional[FloatType] = None,
    ):
        rates = dict(drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, patch_drop_rate=patch_drop_rate)
        rates.update(proj_drop_rate=proj_drop_rate, attn_drop_rate=attn_drop_rate)
        backbone = compose_backbone(cfg, in_chans=in_chans, device=device, dtype=dtype)
        has_vit = cfg.depth > 0
        cfg = resolve_vit(cfg, backbone)

        super().__init__(
            img_size=img_size,
            patch_size=cfg.patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=cfg.global_pool,
            embed_dim=cfg.embed_dim,
            depth=cfg.depth,
            num_heads=cfg.num_heads,
            mlp_ratio=cfg.mlp_ratio,
            qkv_bias=cfg.qkv_bias,
            qk_norm=cfg.qk_norm,
            proj_bias=cfg.proj_bias,
            init_values=cfg.init_values,
            class_token=cfg.class_token,
            pos_embed='learn' if has_vit else 'none',
            no_embed_class=cfg.no_embed_class,
            reg_tokens=cfg.reg_tokens,
            pre_norm=cfg.pre_norm,
            final_norm=cfg.final_norm and has_vit,
            fc_norm=cfg.fc_norm,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            **rates,
            weight_init=weight_init,
            fix_init=fix_init,
            embed_layer=partial(ResNetEmbed, backbone=backbone, proj=has_vit),
            norm_layer=cfg.norm_layer,
            act_layer=cfg.act_layer,
            mlp_layer=MLP_LAYERS[cfg.mlp_layer or 'mlp'],
            device=device,
            dtype=dtype,
        )
        self.patch_embed.check_size('img_size', self.patch_embed.img_size)
        self.patch_embed.crops_positions = cfg.pos_embed_fit == 'crop'
        self.cfg = cfg
        # the first convolution depends on the backbone, so its name is a trait of the instance, not of the cfg
        first_conv = next(name for name, module in self.named_modules() if isinstance(module, nn.Conv2d))
        self._traits = dict(first_conv=first_conv, classifier=('head',), fixed_input_size=False)
        self._init_drop_path(drop_path_rate)
        self._init_feature_info()

    @checked
    @torch.jit.ignore
    def init_weights(self, mode: WeightInit = '', needs_reset: bool = True) -> None:
        """Initialise every parameter and buffer, as after building on the meta device and `to_empty`.

        Args:
            mode: timm's name for a way to do so; by default the one that the model was made with.
            needs_reset: Whether to begin with the layers' own initialisation; False where they have just been made.
        """
        mode = mode or self.weight_init_mode  # pyright: ignore[reportAssignmentType]
        if mode == 'jax_nlhb' and self.num_classes == 0:
            mode = 'jax'  # the two differ in the head's bias alone
        super().init_weights('reset' if mode == 'skip' else mode, needs_reset)
        if needs_reset:
            if mode in ('reset', 'skip'):  # timm then initialises nothing but the layers that can do it themselves
                backbone = self.patch_embed.backbone
                backbone.init_as_built()
                known = {self, *backbone.modules()}
                for module in self.modules():
                    if module not in known and hasattr(module, 'init_weights'):
                        module.init_weights()  # pyright: ignore[reportCallIssue]
            self.init_non_persistent_buffers()

    def _init_drop_path(self, drop_path_rate: float) -> None:
        """Let the rate grow linearly from the first block of the ResNet to the last of the ViT."""
        if drop_path_rate == 0:
            return
        resnet_blocks = self.patch_embed.backbone.blocks()
        rates = calculate_drop_path_rates(drop_path_rate, len(resnet_blocks) + len(self.blocks))
        for block, rate in zip((*resnet_blocks, *self.blocks), rates):
            for name in ('drop_path', 'drop_path1', 'drop_path2'):
                if hasattr(block, name) and rate > 0:
                    setattr(block, name, DropPath(rate))

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """Prepend class and register tokens, and add positions of x's own grid. x: (B, H', W', D) -> (B, N, D)."""
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height * width, dim)
        prefix: List[torch.Tensor] = []
        if self.cls_token is not None:
            prefix.append(self.cls_token.expand(batch, -1, -1))
        if self.reg_token is not None:
            prefix.append(self.reg_token.expand(batch, -1, -1))
        if self.no_embed_class and self.pos_embed is not None:
            x = x + self.patch_embed.positions(self.pos_embed, (height, width), 0)
        if len(prefix) > 0:
            prefix.append(x)
            x = torch.cat(prefix, dim=1)
        if not self.no_embed_class and self.pos_embed is not None:
            x = x + self.patch_embed.positions(self.pos_embed, (height, width), self.num_prefix_tokens)
        return self.pos_drop(x)

    @torch.jit.ignore
    def image_sizes(self) -> ImageSizes:
        """See `Hybrid.image_sizes`."""
        stride = super().image_sizes().stride
        return ImageSizes(stride, stride if self.patch_embed.only_multiples else 1, self.patch_embed.largest_image())

    @torch.jit.ignore
    def check_input(self, x: torch.Tensor) -> None:
        """See `Hybrid.check_input`; images may be too small for a token, or too large for the position table."""
        self.patch_embed.check_input(x)

    @torch.jit.ignore
    def explained_parts(self) -> ExplainedParts:
        """See `Hybrid.explained_parts`."""
        embed = self.patch_embed
        return ExplainedParts(
            resnet=embed.backbone if self.cfg.backbone else None,
            resnet_stride=embed.feature_ratio,
            attentions=[block.attn for block in self.blocks],
            num_prefix_tokens=self.num_prefix_tokens,
            class_token=self.global_pool == 'token',
            token_stride=embed.feat_ratio(as_scalar=False),
        )

    def reparameterize(self) -> None:
        """Merge the LayerScales of the blocks (timm's hook, for a model that is a part of another)."""
        for block in self.blocks:
            merge_layer_scale_(block)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Group parameters from the image on: stem, every ResNet stage, the embedding, every block (with the head)."""
        backbone = self.patch_embed.backbone
        return dict(
            stem=rf'^patch_embed\.backbone\.{backbone.stem_pattern}',
            stages=[(rf'^patch_embed\.backbone\.{backbone.stage_pattern}', None)],
            embed=r'^(?:patch_embed|cls_token|reg_token|pos_embed|norm_pre)',
            blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        )

    def _change_cfg(self, **changes: Any) -> None:
        """Keep config and saved arguments those of the model that this one has become."""
        self.cfg = dataclasses.replace(self.cfg, **changes)
        self._model_args = {**getattr(self, '_model_args', {}), **changes}  # timm writes these into config.json

    @checked
    def reset_classifier(self, num_classes: NumClasses, global_pool: Optional[GlobalPool] = None) -> None:
        """Replace the head by a new one of `num_classes` (0: none), and the pooling if one is given.

        The final norm stays where it is, before or after the pooling; `fc_norm` is recorded accordingly.

        Raises:
            ValueError: for an unknown pooling, or one that the model's tokens can't serve.
        """
        if global_pool == 'token' and not self.has_class_token:
            raise ValueError(NO_CLASS_TOKEN)
        if global_pool in ('map', 'prr') and global_pool != self.global_pool:
            raise ValueError(f'global_pool: got {global_pool!r}, whose weights are made only with the model.')
        super().reset_classifier(num_classes, global_pool)
        if global_pool is not None:
            self.pool_include_prefix = global_pool == 'prr'  # timm leaves it as it was
            self._change_cfg(global_pool=global_pool, fc_norm=not isinstance(self.fc_norm, nn.Identity))


def _create_vitresnet(variant: str, pretrained: bool, cfg: VitResNetCfg, **kwargs) -> VitResNet:
    """Build a variant; keyword arguments named like the config's fields override them."""
    overrides = {field.name: kwargs[field.name] for field in dataclasses.fields(cfg) if field.name in kwargs}
    check_overrides(dataclasses.replace(cfg, **overrides), overrides)
    return build_with_tables(VitResNet, variant, pretrained, cfg, **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    """Return a weight's facts, with those that Google's R+ViT weights share as defaults."""
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'fixed_input_size': False,
        'crop_pct': 0.9,
        'interpolation': 'bicubic',
        'mean': IMAGENET_INCEPTION_MEAN,
        'std': IMAGENET_INCEPTION_STD,
        'classifier': 'head',
        'license': 'apache-2.0',
        **kwargs,
    }


def _cfg_384(**kwargs) -> Dict[str, Any]:
    return _cfg(**{'input_size': (3, 384, 384), 'crop_pct': 1.0, **kwargs})


_IMAGENET = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
_NANO = dict(input_size=(3, 64, 64), crop_pct=1.0, **_IMAGENET)
_DRAWINGS = ('animals', 'computer', 'food', 'geography', 'office', 'people', 'plants', 'recreation')
_DRAWINGS += ('shapes', 'signs_and_symbols', 'tools', 'transportation')
# the mean and deviation of pix2tex's grey images, which have 32x32 to 192x672 pixels and no classes
_FORMULAS = dict(input_size=(1, 192, 672), mean=(0.7931,), std=(0.1738,), crop_pct=1.0, num_classes=0)
# A name without a tag means its first tag that has weights
default_cfgs = generate_default_cfgs(
    {
        'vitresnet_tiny.augreg_in21k_ft_in1k': _cfg(hf_hub_id='timm/vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k'),
        'vitresnet_tiny.augreg_in21k_ft_in1k_384': _cfg_384(
            hf_hub_id='timm/vit_tiny_r_s16_p8_384.augreg_in21k_ft_in1k'
        ),
        'vitresnet_tiny.augreg_in21k': _cfg(hf_hub_id='timm/vit_tiny_r_s16_p8_224.augreg_in21k', num_classes=21843),
        'vitresnet_small.augreg_in21k_ft_in1k': _cfg(hf_hub_id='timm/vit_small_r26_s32_224.augreg_in21k_ft_in1k'),
        'vitresnet_small.augreg_in21k_ft_in1k_384': _cfg_384(
            hf_hub_id='timm/vit_small_r26_s32_384.augreg_in21k_ft_in1k'
        ),
        'vitresnet_small.augreg_in21k': _cfg(hf_hub_id='timm/vit_small_r26_s32_224.augreg_in21k', num_classes=21843),
        'vitresnet_base.orig_in21k_ft_in1k_384': _cfg_384(hf_hub_id='timm/vit_base_r50_s16_384.orig_in21k_ft_in1k'),
        'vitresnet_base.orig_in21k': _cfg(hf_hub_id='timm/vit_base_r50_s16_224.orig_in21k', num_classes=0),
        'vitresnet_base.hf_in21k_ft_in1k_384': _cfg_384(hf_hub_id='google/vit-hybrid-base-bit-384'),
        'vitresnet_base.dpt_hybrid_midas': _cfg_384(hf_hub_id='Intel/dpt-hybrid-midas', num_classes=0),
        'vitresnet_large.augreg_in21k_ft_in1k': _cfg(hf_hub_id='timm/vit_large_r50_s32_224.augreg_in21k_ft_in1k'),
        'vitresnet_large.augreg_in21k_ft_in1k_384': _cfg_384(
            hf_hub_id='timm/vit_large_r50_s32_384.augreg_in21k_ft_in1k'
        ),
        'vitresnet_large.augreg_in21k': _cfg(hf_hub_id='timm/vit_large_r50_s32_224.augreg_in21k', num_classes=21843),
        'vitresnet_nano.openclipart': _cfg(
            file=shipped('vitresnet_nano.openclipart'), num_classes=12, label_names=_DRAWINGS, **_NANO
        ),
        'vitresnet_nano.untrained': _cfg(**_NANO),
        'vitresnet_ocr.untrained': _cfg(**_FORMULAS),
        'vitresnet.untrained': _cfg(**_IMAGENET),
        'test_vitresnet.untrained': _cfg(input_size=(3, 96, 96), **_IMAGENET),
    }
)

VitResNet.variants = tuple(default_cfgs)
VitResNet.tables = ('pos_embed', 'patch_embed.proj.weight')
VitResNet.resnet_names = r'patch_embed\.backbone\.'
VitResNet.vit_names = r'(?!patch_embed\.backbone\.|head\.)'
VitResNet.foreign_names = {  # timm's, and Google's of files and of their code
    r'vit_tiny_r_s16_p8_\d+(_in21k)?|R_Ti_16|R\+ViT-Ti_16': 'vitresnet_tiny',
    r'vit_small_r26_s32_\d+(_in21k)?|R26_S_32|R26\+ViT-S_32': 'vitresnet_small',
    r'vit_base_(r50_s16|resnet50)_\d+(_in21k)?|R50\+ViT-B_16': 'vitresnet_base',
    r'vit_large_r50_s32_\d+(_in21k)?|R50_L_32|R50\+ViT-L_32': 'vitresnet_large',
}


@register_model
def vitresnet_tiny(pretrained: bool = False, **kwargs) -> VitResNet:
    """R + ViT-Ti/8 on a stem of stride 4, tokens at stride 32; 6.3M parameters."""
    cfg = VitResNetCfg(backbone='resnetv2', stage=0, patch_size=8, embed_dim=192, depth=12, num_heads=3)
    return _create_vitresnet('vitresnet_tiny', pretrained, cfg, **kwargs)


@register_model
def vitresnet_small(pretrained: bool = False, **kwargs) -> VitResNet:
    """R26 + ViT-S, tokens at stride 32; 36.4M parameters."""
    cfg = VitResNetCfg(backbone='resnetv2', layers=(2, 2, 2, 2), embed_dim=384, depth=12, num_heads=6)
    return _create_vitresnet('vitresnet_small', pretrained, cfg, **kwargs)


@register_model
def vitresnet_base(pretrained: bool = False, **kwargs) -> VitResNet:
    """R50 without its last stage + ViT-B, tokens at stride 16; 99M parameters."""
    cfg = VitResNetCfg(backbone='resnetv2', layers=(3, 4, 9), embed_dim=768, depth=12, num_heads=12)
    return _create_vitresnet('vitresnet_base', pretrained, cfg, **kwargs)


@register_model
def vitresnet_large(pretrained: bool = False, **kwargs) -> VitResNet:
    """R50 + ViT-L, tokens at stride 32; 329M parameters."""
    cfg = VitResNetCfg(backbone='resnetv2', layers=(3, 4, 6, 3), embed_dim=1024, depth=24, num_heads=16)
    return _create_vitresnet('vitresnet_large', pretrained, cfg, **kwargs)


@register_model
def vitresnet_nano(pretrained: bool = False, **kwargs) -> VitResNet:
    """Thin ResNet + ViT for small images (28 to 128 pixels), tokens at stride 8; 1.1M parameters."""
    cfg = VitResNetCfg(
        backbone='resnet18',
        layers=(2, 2),
        channels=(64, 128),
        stem_type='deep',
        stem_width=16,
        embed_dim=128,
        depth=2,
        num_heads=4,
        init_values=0.1,
        class_token=False,
    )
    return _create_vitresnet('vitresnet_nano', pretrained, cfg, **kwargs)


@register_model
def vitresnet_ocr(pretrained: bool = False, **kwargs) -> VitResNet:
    """R(2, 3, 7) + 4 blocks for grey images of formulas, up to 192x672: the encoder of pix2tex (LaTeX-OCR); 12.9M."""
    cfg = VitResNetCfg(
        backbone='resnetv2',
        layers=(2, 3, 7),
        std_conv_eps=1e-6,
        embed_dim=256,
        depth=4,
        num_heads=8,
        pos_embed_fit='crop',
    )
    return _create_vitresnet('vitresnet_ocr', pretrained, cfg, **kwargs)


@register_model
def vitresnet(pretrained: bool = False, **kwargs) -> VitResNet:
    """Any timm ResNet up to any stage + any ViT, by `VitResNetCfg`'s fields; R26-D + ViT-S by default."""
    return _create_vitresnet('vitresnet', pretrained, VitResNetCfg(), **kwargs)


@register_model
def test_vitresnet(pretrained: bool = False, **kwargs) -> VitResNet:
    """A hybrid for tests, of every part that the larger ones have; 0.4M parameters."""
    cfg = VitResNetCfg(
        backbone='resnetv2',
        layers=(1, 1, 1, 1),
        channels=(128, 128, 128, 256),
        stem_chs=32,
        embed_dim=64,
        depth=2,
        num_heads=2,
    )
    return _create_vitresnet('test_vitresnet', pretrained, cfg, **kwargs)
