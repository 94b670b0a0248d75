"""The serial family: image -> ResNet -> tokens -> ViT blocks -> head.

Papers: `An Image is Worth 16x16 Words` (Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1 'Hybrid Architecture')
and `How to train your ViT?` (Steiner et al. 2022, arXiv:2106.10270), whose R+ViT checkpoints tiny, small, base and
large load unchanged. A ViT of timm's takes tokens of a ResNet of timm's; `VitResNetCfg` says which ones, and its two
ends are the parents themselves: `depth=0` is the ResNet alone, `backbone=''` the ViT alone.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, Optional, Tuple, Union

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.layers import GluMlp, Mlp, StdConv2dSame, SwiGLU, SwiGLUPacked, get_act_layer, get_norm_layer
from timm.models import (
    ResNet,
    ResNetV2,
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    is_model_in_modules,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from .checkpoints import checkpoint_filter_fn
from .layers import ResNetEmbed

__all__ = ['VitResNet', 'VitResNetCfg']

GLOBAL_POOLS = ('', 'avg', 'avgmax', 'max', 'token', 'map', 'prr')
NO_CLASS_TOKEN = "global_pool: got 'token', but the model has no class token; use 'avg', 'max' or 'avgmax'."
MLP_LAYERS = {'mlp': Mlp, 'glu': GluMlp, 'swiglu': SwiGLU, 'swiglupacked': SwiGLUPacked}


@dataclass(frozen=True)
class VitResNetCfg:
    """A serial hybrid in plain values. None: what the backbone, or timm's ViT, has by itself.

    Raises:
        ValueError: for a value that no model has; the message names the field, the value and what is allowed.
    """

    # The ResNet
    backbone: str = 'resnet26d'  # a timm ResNet's name, 'resnetv2' (that of the R+ViT checkpoints), '' for none
    stage: Optional[int] = None  # the last stage kept; 0 keeps the stem alone
    # Its measures, in timm's words for `ResNet` and `ResNetV2`
    layers: Optional[Tuple[int, ...]] = None  # blocks of each stage
    channels: Optional[Tuple[int, ...]] = None  # width of each stage (of timm's ResNet: before the block's expansion)
    block: Optional[str] = None  # 'basic' or 'bottleneck'
    stem_stride: Optional[int] = None  # 4; 2 leaves out the pooling; 1 makes the first convolution's stride 1, too
    stem_type: Optional[str] = None  # '', 'deep', 'deep_tiered'; ResNetV2 also: 'same', 'fixed', 'deep_same', ...
    stem_width: Optional[int] = None  # ResNet: width of a deep stem's first convolutions, half that of its last
    stem_chs: Optional[int] = None  # ResNetV2: width of the stem
    replace_stem_pool: Optional[bool] = None  # ResNet: a convolution instead of the stem's max-pooling
    avg_down: Optional[bool] = None  # average pooling in the shortcuts
    cardinality: Optional[int] = None  # ResNet: groups of the 3x3 convolutions
    base_width: Optional[int] = None  # ResNet: bottleneck width factor
    block_reduce_first: Optional[int] = None  # ResNet: divisor of a block's first width
    down_kernel_size: Optional[int] = None  # ResNet: kernel size in the shortcuts
    width_factor: Optional[int] = None  # ResNetV2: factor on all widths
    bottle_ratio: Optional[float] = None  # ResNetV2: bottleneck width / block width
    preact: Optional[bool] = None  # ResNetV2: norm and activation before the convolutions
    output_stride: Optional[int] = None  # 32, 16 or 8: dilation instead of stride beyond it
    backbone_norm_layer: Optional[str] = None
    backbone_act_layer: Optional[str] = None
    # The ViT
    patch_size: Union[None, int, Tuple[int, int]] = None  # in pixels of the ResNet's map; 1, without a backbone 16
    embed_dim: Optional[int] = None  # 384; with depth=0 it is the ResNet's width
    depth: int = 12  # blocks; 0 is the ResNet alone
    num_heads: int = 6
    mlp_ratio: float = 4.0
    class_token: Optional[bool] = None  # yes, but not with depth=0
    reg_tokens: int = 0  # register tokens
    global_pool: Optional[str] = None  # 'token' with a class token, else 'avg'
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True
    init_values: Optional[float] = None  # LayerScale's initial value; None leaves LayerScale out
    pre_norm: bool = False  # norm before the blocks (CLIP)
    final_norm: bool = True  # norm after the blocks
    fc_norm: Optional[bool] = None  # the final norm comes after pooling; None: where pooling is 'avg', 'max', 'avgmax'
    no_embed_class: bool = False  # prefix tokens have no position embedding
    norm_layer: Optional[str] = None
    act_layer: Optional[str] = None
    mlp_layer: Optional[str] = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # from JSON
                object.__setattr__(self, field.name, tuple(value))
        for name in ('layers', 'channels', 'patch_size'):
            _check_positive(name, getattr(self, name))
        for name in ('embed_dim', 'num_heads', 'mlp_ratio', 'stem_width', 'stem_chs', 'width_factor', 'bottle_ratio'):
            _check_positive(name, getattr(self, name))
        for name in ('depth', 'reg_tokens'):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f'{name}: got {value!r}, expected a whole number from 0 up.')
        _check_choice('block', self.block, (None, 'basic', 'bottleneck'))
        _check_choice('stem_stride', self.stem_stride, (None, 1, 2, 4))
        _check_choice('output_stride', self.output_stride, (None, 8, 16, 32))
        _check_choice('global_pool', self.global_pool, (None, *GLOBAL_POOLS))
        _check_choice('mlp_layer', self.mlp_layer, (None, *MLP_LAYERS))
        for name in ('norm_layer', 'backbone_norm_layer'):
            _check_named(name, getattr(self, name), get_norm_layer)
        for name in ('act_layer', 'backbone_act_layer'):
            _check_named(name, getattr(self, name), get_act_layer)
        if self.depth == 0 and not self.backbone:
            raise ValueError("depth: got 0 with backbone='', which leaves nothing; give a backbone or a depth above 0.")


def _check_positive(name: str, value: Any) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and (isinstance(number, (str, bool)) or not number > 0):
            raise ValueError(f'{name}: got {value!r}, expected numbers above 0.')


def _check_choice(name: str, value: Any, choices: Tuple[Any, ...]) -> None:
    if value not in choices:
        allowed = ', '.join(repr(choice) for choice in choices if choice is not None)
        raise ValueError(f'{name}: got {value!r}, expected one of {allowed}.')


def _check_named(name: str, value: Optional[str], find) -> None:
    try:
        find(value)
    except (KeyError, AssertionError):
        raise ValueError(
            f'{name}: got {value!r}, which is not a name that timm.layers.{find.__name__} knows.'
        ) from None


# The config's fields that are arguments of timm's ResNets, and their names there
_RESNET_ARGS = {
    **{
        name: name
        for name in (
            *('layers', 'channels', 'block', 'stem_type', 'stem_width', 'stem_chs', 'replace_stem_pool', 'avg_down'),
            *('cardinality', 'base_width', 'block_reduce_first', 'down_kernel_size', 'width_factor', 'bottle_ratio'),
            *('preact', 'output_stride'),
        )
    },
    'backbone_norm_layer': 'norm_layer',
    'backbone_act_layer': 'act_layer',
}


def create_backbone(cfg: VitResNetCfg, in_chans: int = 3, device=None, dtype=None) -> nn.Module:
    """Build the ResNet of a config, up to its stage: image (B, in_chans, H, W) -> map (B, C, H / r, W / r).

    Its `feature_info` lists num_chs, reduction and module of every level, the last being what it returns.

    Raises:
        ValueError: for an unknown backbone or stage, or a measure that this backbone does not take.
    """
    name = cfg.backbone
    given = {arg: getattr(cfg, field) for field, arg in _RESNET_ARGS.items() if getattr(cfg, field) is not None}
    if not name:
        if given or cfg.stage is not None or cfg.stem_stride is not None:
            raise ValueError(f"backbone: got '' (none), but measures of a ResNet were given: {', '.join(given)}.")
        return nn.Identity()
    if name != 'resnetv2' and (
        '.' in name or not is_model(name) or not is_model_in_modules(name, ('resnet', 'resnetv2'))
    ):
        raise ValueError(
            f"backbone: got {name!r}, expected the name (without a tag) of one of timm's ResNets, see "
            f"timm.list_models(module='resnet') and timm.list_models(module='resnetv2'), or 'resnetv2', or ''."
        )
    is_v2 = name == 'resnetv2' or is_model_in_modules(name, ('resnetv2',))

    # arguments in the words of the class
    foreign = {'stem_width', 'replace_stem_pool', 'cardinality', 'base_width', 'block_reduce_first', 'down_kernel_size'}
    if not is_v2:
        foreign = {'stem_chs', 'width_factor', 'bottle_ratio', 'preact'}
    for arg in given:
        if arg in foreign:
            raise ValueError(f"{arg}: got {given[arg]!r}, but timm's {'ResNetV2' if is_v2 else 'ResNet'} has no {arg}.")
    if 'block' in given:
        is_basic = given.pop('block') == 'basic'
        given.update({'basic': is_basic} if is_v2 else {'block': BasicBlock if is_basic else Bottleneck})
    num_stages = len(given['layers']) if 'layers' in given else 4
    if not 1 <= num_stages <= 4 or len(given.get('channels', range(num_stages))) != num_stages:
        raise ValueError(
            f'layers: got {cfg.layers}, channels: got {cfg.channels}; expected one number of blocks and one width '
            f'for each of 1 to 4 stages.'
        )
    stage = num_stages if cfg.stage is None else cfg.stage
    if not isinstance(stage, int) or not 0 <= stage <= num_stages:
        raise ValueError(f'stage: got {stage!r}, expected a whole number from 0 (the stem) to {num_stages}.')

    kwargs: Dict[str, Any] = dict(given, in_chans=in_chans, num_classes=0, global_pool='', device=device, dtype=dtype)
    if name == 'resnetv2':
        kwargs['layers'] = kwargs.get('layers', (3, 4, 6, 3))[: max(stage, 1)]
        defaults = dict(preact=False, stem_type='same', conv_layer=partial(StdConv2dSame, eps=1e-8))
        backbone = ResNetV2(**{**defaults, **kwargs})
    else:
        if not is_v2 and 'layers' in kwargs:  # timm's ResNet always has four
            missing = 4 - num_stages
            kwargs['layers'] += (1,) * missing
            if 'channels' in kwargs:
                kwargs['channels'] += kwargs['channels'][-1:] * missing
        backbone = model_entrypoint(name)(pretrained=False, **kwargs)
        if 'stem_width' in given and not isinstance(backbone.conv1, nn.Sequential):  # timm would pass over it
            raise ValueError(f"stem_width: got {cfg.stem_width}, but only a deep stem has one; give stem_type='deep'.")
    return (_trim_resnetv2 if is_v2 else _trim_resnet)(backbone, stage, cfg.stem_stride or 4)


def _trim_resnet(backbone: ResNet, stage: int, stem_stride: int) -> nn.Module:
    """Keep the stages up to `stage` of timm's ResNet, whose forward pass wants four."""
    for i in range(stage + 1, 5):
        setattr(backbone, f'layer{i}', nn.Sequential())
    if stem_stride < 4:
        backbone.maxpool = nn.Identity()
    _finish_backbone(backbone, stage, stem_stride, backbone.conv1, pool='maxpool')
    backbone.num_features = backbone.head_hidden_size = backbone.feature_info[-1]['num_chs']
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
    backbone.num_features = backbone.head_hidden_size = backbone.feature_info[-1]['num_chs']
    if stage > 0:
        return backbone
    stem = backbone.stem
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


class VitResNet(VisionTransformer):
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

    def __init__(
        self,
        cfg: VitResNetCfg,
        img_size: Union[int, Tuple[int, int]] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = '',
        fix_init: bool = False,
        dynamic_img_size: bool = True,
        dynamic_img_pad: bool = True,
        strict_img_size: bool = False,
        device=None,
        dtype=None,
    ):
        _check_positive('img_size', tuple(img_size) if isinstance(img_size, (tuple, list)) else img_size)
        _check_positive('in_chans', in_chans)
        if num_classes < 0:
            raise ValueError(f'num_classes: got {num_classes}, expected 0 (no head) or more.')
        backbone = create_backbone(cfg, in_chans=in_chans, device=device, dtype=dtype)
        has_vit = cfg.depth > 0
        cfg = _resolve_vit(cfg, backbone)

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
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            patch_drop_rate=patch_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            weight_init=weight_init,
            fix_init=fix_init,
            embed_layer=partial(ResNetEmbed, backbone=backbone, proj=has_vit),
            norm_layer=cfg.norm_layer,
            act_layer=cfg.act_layer,
            mlp_layer=MLP_LAYERS[cfg.mlp_layer or 'mlp'],
            device=device,
            dtype=dtype,
        )
        self.patch_embed.check_input(torch.Size((1, in_chans, *self.patch_embed.img_size)))
        self.cfg = cfg
        # which convolution sees the image depends on the backbone, so it is a trait of the instance, not of the cfg
        first_conv = next(name for name, module in self.named_modules() if isinstance(module, nn.Conv2d))
        self._traits = dict(first_conv=first_conv)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head by a new one of `num_classes` (0: none), and the pooling if one is given.

        Raises:
            ValueError: for an unknown pooling, or one that the model's tokens can't serve.
        """
        if num_classes < 0:
            raise ValueError(f'num_classes: got {num_classes}, expected 0 (no head) or more.')
        _check_choice('global_pool', global_pool, (None, *GLOBAL_POOLS))
        if global_pool == 'token' and not self.has_class_token:
            raise ValueError(NO_CLASS_TOKEN)
        super().reset_classifier(num_classes, global_pool)


def _resolve_vit(cfg: VitResNetCfg, backbone: nn.Module) -> VitResNetCfg:
    """Fill in what the config leaves open, now that the ResNet's width is known, and check that it fits together."""
    class_token = cfg.class_token if cfg.class_token is not None else cfg.depth > 0
    global_pool = cfg.global_pool if cfg.global_pool is not None else ('token' if class_token else 'avg')
    if global_pool == 'token' and not class_token:
        raise ValueError(NO_CLASS_TOKEN)
    if cfg.depth > 0:
        embed_dim = cfg.embed_dim or 384
        if embed_dim % cfg.num_heads:
            raise ValueError(
                f'num_heads: got {cfg.num_heads}, which does not divide embed_dim ({embed_dim}); '
                f'embed_dim must be a multiple of num_heads.'
            )
    else:
        width = int(backbone.feature_info[-1]['num_chs'])
        embed_dim = cfg.embed_dim or width
        alone = 'with depth=0 the model is the ResNet alone'
        if embed_dim != width:
            raise ValueError(f"embed_dim: got {embed_dim}; {alone}, so it must be the ResNet's width, {width}.")
        if class_token or cfg.reg_tokens or cfg.pre_norm:
            raise ValueError(f'class_token, reg_tokens, pre_norm: {alone}, which has none of them.')
        if cfg.patch_size not in (None, 1, (1, 1)):
            raise ValueError(f'patch_size: got {cfg.patch_size}; {alone}, so it must be 1.')
    patch_size = cfg.patch_size or (1 if cfg.backbone else 16)
    resolved = dict(embed_dim=embed_dim, class_token=class_token, global_pool=global_pool, patch_size=patch_size)
    return dataclasses.replace(cfg, **resolved)


def _create_vitresnet(variant: str, pretrained: bool, cfg: VitResNetCfg, **kwargs) -> VitResNet:
    """Build a variant; keyword arguments named like the config's fields override them."""
    fields = {field.name for field in dataclasses.fields(VitResNetCfg)}
    cfg = dataclasses.replace(cfg, **{name: kwargs.pop(name) for name in fields & kwargs.keys()})
    # The position table must have the checkpoint's own grid; timm passes img_size on only where sizes are fixed.
    source = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    kwargs.setdefault('img_size', source.input_size[-2:])
    return build_model_with_cfg(
        VitResNet,
        variant,
        pretrained,
        model_cfg=cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=3, feature_cls='getter'),
        **kwargs,
    )


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

# The first tag with weights is a name's default
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
        'vitresnet_large.augreg_in21k_ft_in1k': _cfg(hf_hub_id='timm/vit_large_r50_s32_224.augreg_in21k_ft_in1k'),
        'vitresnet_large.augreg_in21k_ft_in1k_384': _cfg_384(
            hf_hub_id='timm/vit_large_r50_s32_384.augreg_in21k_ft_in1k'
        ),
        'vitresnet_large.augreg_in21k': _cfg(hf_hub_id='timm/vit_large_r50_s32_224.augreg_in21k', num_classes=21843),
        'vitresnet_nano.untrained': _cfg(input_size=(3, 64, 64), crop_pct=1.0, **_IMAGENET),
        'vitresnet.untrained': _cfg(**_IMAGENET),
        'test_vitresnet.untrained': _cfg(input_size=(3, 96, 96), **_IMAGENET),
    }
)


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
    """Thin ResNet + ViT for small images (28 to 128 pixels), tokens at stride 8; 1.2M parameters."""
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
