"""How the parts of a serial hybrid go together: what its config leaves open, and what does not fit, by name."""

import dataclasses
from typing import Any, Dict, Iterable, Optional, Tuple, Union

from timm.layers import to_2tuple
from torch import nn

from .backbone import RESNET_ARGS, check_effects, create_backbone
from .config import NO_CLASS_TOKEN, VitResNetCfg, check_block

# Fields of a ViT's blocks, and those of them that a pooling with weights has a use for
_VIT_FIELDS = (
    *('num_heads', 'mlp_ratio', 'qkv_bias', 'qk_norm', 'proj_bias', 'init_values', 'final_norm', 'fc_norm'),
    *('no_embed_class', 'pos_embed_fit', 'norm_layer', 'act_layer', 'mlp_layer'),
)
_POOL_FIELDS = {'map': ('num_heads', 'mlp_ratio', 'norm_layer', 'act_layer'), 'prr': ('num_heads', 'norm_layer')}


def _patch_size(cfg: VitResNetCfg) -> Union[int, Tuple[int, int]]:
    return cfg.patch_size or (1 if cfg.backbone else 16)


def _backbone_arguments(cfg: VitResNetCfg) -> Dict[str, Any]:
    """Return the arguments of `create_backbone` that a config gives."""
    patch_stride = max(to_2tuple(_patch_size(cfg)))
    return dict(
        stage=cfg.stage,
        stem_stride=cfg.stem_stride,
        std_conv_eps=cfg.std_conv_eps,
        output_stride=cfg.output_stride // patch_stride if cfg.output_stride else None,
        **{arg: getattr(cfg, field) for field, arg in RESNET_ARGS.items() if getattr(cfg, field) is not None},
    )


def compose_backbone(cfg: VitResNetCfg, **kwargs) -> nn.Module:
    """Build the config's ResNet, and check that its strides suit `output_stride`."""
    backbone = create_backbone(cfg.backbone, **_backbone_arguments(cfg), **kwargs)
    stride = max(to_2tuple(_patch_size(cfg))) * (backbone.feature_info[-1]['reduction'] if cfg.backbone else 1)
    if cfg.output_stride and stride > cfg.output_stride:
        raise ValueError(
            f'output_stride: got {cfg.output_stride}, but the tokens of this model cannot be closer than {stride} '
            f'pixels: dilation replaces the strides of ResNet stages 2 to 4, not those of the stem or of the patches.'
        )
    return backbone


def output_stride_with(cfg: VitResNetCfg, ratio: int, patch_size: Union[int, Tuple[int, int]]) -> Optional[int]:
    """Return the `output_stride` with which the config's ResNet, of stride `ratio`, goes with other patches.

    Raises:
        ValueError: where there is none such.
    """
    undilated = compose_backbone(dataclasses.replace(cfg, output_stride=None), device='meta')
    if not cfg.backbone or undilated.feature_info[-1]['reduction'] == ratio:
        return None  # it keeps all its strides
    stride = ratio * max(to_2tuple(patch_size))
    if stride not in (8, 16, 32):
        raise ValueError(
            f"patch_size: got {patch_size}, with which the tokens would be {stride} pixels apart, but the model's "
            f'output_stride ({cfg.output_stride}) can only become 8, 16 or 32; make the model anew for these patches.'
        )
    return stride


def check_overrides(cfg: VitResNetCfg, names: Iterable[str]) -> None:
    """Raise ValueError for one of the fields `names` that changes nothing of what the whole config describes."""
    measures = [RESNET_ARGS[name] for name in names if name in RESNET_ARGS]
    if cfg.backbone and measures:
        check_effects(cfg.backbone, measures, **_backbone_arguments(cfg))
    alone = set(_VIT_FIELDS) - set(_POOL_FIELDS.get(cfg.global_pool or '', ())) if cfg.depth == 0 else set()
    defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
    for name in names:
        value = getattr(cfg, name)
        if name in alone and value != defaults[name] and not (name in ('fc_norm', 'final_norm') and not value):
            raise ValueError(f'{name}: got {value!r}, but with depth=0 the model is the ResNet alone.')
        if name == 'fc_norm' and value and not cfg.final_norm:
            raise ValueError(
                f'{name}: got {value!r}, but with final_norm=False there is no norm to come after pooling.'
            )


def resolve_vit(cfg: VitResNetCfg, backbone: nn.Module) -> VitResNetCfg:
    """Fill in what the config leaves open, now that the ResNet's width is known, and check that it fits together."""
    class_token = cfg.class_token if cfg.class_token is not None else cfg.depth > 0
    global_pool = cfg.global_pool if cfg.global_pool is not None else ('token' if class_token else 'avg')
    if global_pool == 'token' and not class_token:
        raise ValueError(NO_CLASS_TOKEN)
    if cfg.depth > 0:
        embed_dim = cfg.embed_dim or 384
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
    if cfg.depth > 0 or global_pool in _POOL_FIELDS:
        check_block(embed_dim, cfg.num_heads, cfg.mlp_ratio, cfg.mlp_layer)
    resolved = dict(embed_dim=embed_dim, class_token=class_token, global_pool=global_pool, patch_size=_patch_size(cfg))
    return dataclasses.replace(cfg, **resolved)
