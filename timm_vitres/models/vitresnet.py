"""The serial family: image -> ResNet -> tokens -> ViT blocks -> head.

Papers: `An Image is Worth 16x16 Words` (Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1 'Hybrid Architecture')
and `How to train your ViT?` (Steiner et al. 2022, arXiv:2106.10270), whose R+ViT checkpoints tiny, small, base and
large load unchanged. A ViT of timm's takes tokens of a ResNet of timm's; `VitResNetCfg` says which ones, and its two
ends are the parents themselves: `depth=0` is the ResNet alone, `backbone=''` the ViT alone.
"""

import dataclasses
from functools import partial
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple
from timm.models import (
    ResNetV2,
    VisionTransformer,
    checkpoint,
    generate_default_cfgs,
    get_model_input_config,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from ..checks import Device, FloatType, NumClasses, Rate, Size, WeightInit, Width, checked
from ..weights.layouts import StateDict
from .backbone import RESNET_ARGS, backbone_blocks, check_effects, create_backbone
from .base import ExplainedParts, Hybrid, ImageSizes
from .config import MLP_LAYERS, NO_CLASS_TOKEN, GlobalPool, PatchSize, VitResNetCfg, check_block
from .layers import ResNetEmbed, feature_take_indices, resample_pos_embed, unflatten_tokens
from .loading import build_hybrid
from .merging import merge_layer_scale_
from .tables import fit_tables

__all__ = ['VitResNet', 'VitResNetCfg']
# Fields of a ViT's blocks, and those of them that a pooling with weights has a use for
_VIT_FIELDS = (
    *('num_heads', 'mlp_ratio', 'qkv_bias', 'qk_norm', 'proj_bias', 'init_values', 'final_norm', 'fc_norm'),
    *('no_embed_class', 'norm_layer', 'act_layer', 'mlp_layer'),
)
_POOL_FIELDS = {'map': ('num_heads', 'mlp_ratio', 'norm_layer', 'act_layer'), 'prr': ('num_heads', 'norm_layer')}


class VitResNet(Hybrid, VisionTransformer):
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

    # TorchScript can't tell what an empty list holds
    resnet_maps: List[int]
    token_maps: List[Tuple[int, int]]

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
        backbone = _create_backbone(cfg, in_chans=in_chans, device=device, dtype=dtype)
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
        self.cfg = cfg
        # which convolution sees the image depends on the backbone, so it is a trait of the instance, not of the cfg
        first_conv = next(name for name, module in self.named_modules() if isinstance(module, nn.Conv2d))
        self._traits = dict(first_conv=first_conv, classifier=('head',))
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
            mode = 'jax'  # there is no head to have a bias
        super().init_weights('reset' if mode == 'skip' else mode, needs_reset)
        if needs_reset:
            if mode in ('reset', 'skip'):  # with which timm leaves out what is no layer's own
                for module in self.modules():
                    if isinstance(module, ResNetV2):
                        module.init_weights(zero_init_last=False)  # as its constructor
                    elif module is not self and hasattr(module, 'init_weights'):
                        module.init_weights()  # pyright: ignore[reportCallIssue]
            self.init_non_persistent_buffers()

    def _init_drop_path(self, drop_path_rate: float) -> None:
        """Let the rate grow linearly from the first block of the ResNet to the last of the ViT."""
        if drop_path_rate == 0:
            return
        resnet_blocks = backbone_blocks(self.patch_embed.backbone)
        rates = calculate_drop_path_rates(drop_path_rate, len(resnet_blocks) + len(self.blocks))
        for block, rate in zip((*resnet_blocks, *self.blocks), rates):
            for name in ('drop_path', 'drop_path1', 'drop_path2'):
                if hasattr(block, name) and rate > 0:
                    setattr(block, name, DropPath(rate))

    def _init_feature_info(self) -> None:
        """List the maps: those of the pyramid, then the tokens of every block but the last, which ends the pyramid."""
        embed, depth = self.patch_embed, len(self.blocks)
        levels = list(getattr(embed.backbone, 'feature_info', []))
        resized: List[Tuple[int, int]] = []
        if depth and levels and embed.patch_size == (1, 1):
            levels = levels[:-1]  # the tokens take the place of the map that they are made of
        elif depth and levels:
            resized = _blocks_between(depth, embed.patch_size)
        # (block, by how much its map is enlarged)
        self.token_maps = [*resized, (depth - 1, 1), *((block, 1) for block in range(depth - 1))] if depth else []
        num_pyramid = len(levels) + (len(resized) + 1 if depth else 0)

        info = [dict(level, module='patch_embed.backbone.' + level['module']) for level in levels]
        stride = embed.feat_ratio()
        modules = set()
        for block, factor in self.token_maps:
            module = dict(module=f'blocks.{block}')
            if block in modules:
                # no two entries may have one name (transformers): what a block returns is what the next one takes
                module = dict(module=f'blocks.{block + 1}.norm1', hook_type='forward_pre')
            modules.add(block)
            info.append(dict(module, num_chs=self.embed_dim, reduction=stride // factor))
        # a stem that leaves its strides to the stages has the reduction of the first of them
        first = int(num_pyramid > 1 and info[0]['reduction'] == info[1]['reduction'])
        self.feature_info = info[first:]
        self.num_pyramid = num_pyramid - first
        self.resnet_maps = list(range(first, len(levels)))

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
            x = x + resample_pos_embed(self.pos_embed, (height, width), self.patch_embed.grid_size, 0)
        if len(prefix) > 0:
            prefix.append(x)
            x = torch.cat(prefix, dim=1)
        if not self.no_embed_class and self.pos_embed is not None:
            grid = self.patch_embed.grid_size
            x = x + resample_pos_embed(self.pos_embed, (height, width), grid, self.num_prefix_tokens)
        return self.pos_drop(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """Return the features, and the maps that `feature_info` lists.

        Args:
            x: (B, C, H, W).
            indices: Of `feature_info`, in the order wanted: None for all, a number for the last so many.
            return_prefix_tokens: Return (map, prefix tokens (B, P, D)) in place of each map; None for the ResNet's.
            norm: Apply the final norm to the maps that are tokens.
            stop_early: Leave out what no map needs; the features are then those of the last part that ran.
            output_fmt: 'NCHW': maps (B, C, H / reduction, W / reduction); 'NLC': tokens (B, N, C).
            intermediates_only: Return the maps alone.
            output_dict: Return {'image_intermediates', 'image_intermediates_prefix', 'image_features'}.
            attn_mask, is_causal: As in `forward`.

        Returns:
            (features (B, N, D), maps), or as the arguments say.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt: got '{output_fmt}', expected 'NCHW' or 'NLC'.")
        take_indices, _ = feature_take_indices(len(self.resnet_maps) + len(self.token_maps), indices)
        num_resnet = len(self.resnet_maps)
        last_level, last_block = -1, -1
        wanted: List[int] = []
        for i in take_indices:
            if i < num_resnet:
                last_level = max(last_level, self.resnet_maps[i])
            else:
                block = self.token_maps[i - num_resnet][0]
                wanted.append(block)
                last_block = max(last_block, block)
        whole = not stop_early or last_block >= 0  # past the ResNet
        if not stop_early:
            last_block = len(self.blocks) - 1

        size = (x.shape[-2], x.shape[-1])
        grid = (0, 0)
        levels = self.patch_embed.forward_levels(x, self.patch_embed.num_levels if whole else last_level + 1)
        outputs: Dict[int, torch.Tensor] = {}
        if len(levels) > 0:
            x = levels[-1]
        if whole:
            x = self.patch_embed.patchify(x)
            grid = (x.shape[1], x.shape[2])
            x = self._pos_embed(x)
            x = self.norm_pre(self.patch_drop(x))
            for i, block in enumerate(self.blocks):
                if i <= last_block:
                    if attn_mask is not None or is_causal:
                        x = block(x, attn_mask=attn_mask, is_causal=is_causal)
                    elif self.grad_checkpointing and not torch.jit.is_scripting():
                        x = checkpoint(block, x)
                    else:
                        x = block(x)
                    if i in wanted:
                        outputs[i] = self.norm(x) if norm else x
        else:
            x = x.flatten(2).transpose(1, 2)

        maps: List[torch.Tensor] = []
        prefixes: List[Optional[torch.Tensor]] = []
        for i in take_indices:
            if i < num_resnet:
                prefixes.append(None)
                y = levels[self.resnet_maps[i]]
            else:
                block_index, factor = self.token_maps[i - num_resnet]
                prefixes.append(outputs[block_index][:, : self.num_prefix_tokens])
                y = outputs[block_index][:, self.num_prefix_tokens :]
                if output_fmt == 'NLC' and factor == 1:
                    maps.append(y)
                    continue
                y = self.patch_embed.enlarge(unflatten_tokens(y, grid), size, factor)
            maps.append(y.flatten(2).transpose(1, 2) if output_fmt == 'NLC' else y)

        if not torch.jit.is_scripting():  # whose types neither of the two fits
            with_prefixes = return_prefix_tokens and self.num_prefix_tokens > 0
            if output_dict:
                result: Dict[str, Any] = {'image_intermediates': maps}
                if with_prefixes:
                    result['image_intermediates_prefix'] = prefixes
                if not intermediates_only:
                    result['image_features'] = self.norm(x) if whole else x
                return result
            if with_prefixes:
                maps = list(zip(maps, prefixes))  # pyright: ignore[reportAssignmentType]
        if intermediates_only:
            return maps
        return self.norm(x) if whole else x, maps

    def get_intermediate_layers(
        self,
        x: torch.Tensor,
        n: Union[int, List[int], Tuple[int, ...]] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Optional[torch.Tensor] = None,
    ) -> List[torch.Tensor]:
        """Return the tokens after blocks (DINO's interface): the last `n` blocks, or those numbered in `n`."""
        blocks, _ = feature_take_indices(len(self.blocks), list(n) if isinstance(n, tuple) else n)
        return self.forward_intermediates(  # pyright: ignore[reportReturnType]
            x,
            [len(self.resnet_maps) + self.token_maps.index((block, 1)) for block in blocks],
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt='NCHW' if reshape else 'NLC',
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove what the maps at `indices` of `feature_info` do not need; what the head needs stays with the head.

        Without a block the model becomes its ResNet up to the deepest level asked for, as with depth=0.

        Returns:
            The indices, counted from 0.
        """
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        num_resnet = len(self.resnet_maps)
        if prune_head:
            blocks = [self.token_maps[i - num_resnet][0] for i in take_indices if i >= num_resnet]
            if blocks:
                self.blocks = self.blocks[: max(blocks) + 1]
            else:
                self._prune_to_resnet(max(self.resnet_maps[i] for i in take_indices))
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, '')
        return take_indices

    def _prune_to_resnet(self, level: int) -> None:
        if self.cfg.stage == 0 and level == 0:
            self._change_cfg(stem_stride=min(self.cfg.stem_stride or 4, 2))  # a stem without its pooling
        self.patch_embed.prune(level)
        self.cls_token = self.reg_token = self.pos_embed = None
        self.num_prefix_tokens = self.num_reg_tokens = 0
        self.has_class_token = False
        for name in ('patch_drop', 'norm_pre', 'norm'):
            setattr(self, name, nn.Identity())
        self.blocks = nn.Sequential()
        self.num_features = self.head_hidden_size = self.embed_dim = self.patch_embed.feature_dim

    @torch.jit.ignore
    def fit_tables(self, state_dict: StateDict, img_size: Optional[Sequence[int]] = None) -> StateDict:
        """Fit position table and patch projection; see `Hybrid.fit_tables`."""
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return fit_tables(state_dict, self.patch_embed, prefix if self.pos_embed is not None else None, img_size)

    @torch.jit.ignore
    def image_sizes(self) -> ImageSizes:
        """See `Hybrid.image_sizes`."""
        stride = super().image_sizes().stride
        return ImageSizes(stride, stride if self.patch_embed.whole_strides else 1)

    @torch.jit.ignore
    def explained_parts(self) -> ExplainedParts:
        """See `Hybrid.explained_parts`."""
        embed = self.patch_embed
        return ExplainedParts(
            resnet=embed.backbone if self.cfg.backbone else None,
            resnet_stride=embed.feature_ratio,
            blocks=list(self.blocks),
            num_prefix_tokens=self.num_prefix_tokens,
            class_token=self.has_class_token,
            token_stride=embed.feat_ratio(as_scalar=False),
        )

    def reparameterize(self) -> None:
        """Merge the LayerScales of the blocks (timm's hook, for a model that is a part of another)."""
        for block in self.blocks:
            merge_layer_scale_(block)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Group parameters from the image on: stem, every ResNet stage, the embedding, every block (with the head)."""
        stem = r'^patch_embed\.backbone\.'
        if not isinstance(self.patch_embed.backbone, nn.Sequential):  # which is a stem itself
            stem += r'(?!layer\d|stages\.|norm\.)'
        return dict(
            stem=stem,
            stages=[(r'^patch_embed\.backbone\.(?:layer|stages\.)(\d+)', None)],
            embed=r'^(?:patch_embed|cls_token|reg_token|pos_embed|norm_pre)',
            blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        )

    @checked
    def set_input_size(self, img_size: Optional[Size] = None, patch_size: Optional[PatchSize] = None) -> None:
        """Make the position table for another size, and the projection for other patches; timm's resampling for both.

        Args:
            img_size: Height and width, in pixels; the present ones by default.
            patch_size: Height and width of a patch in the ResNet's pixels; the present ones by default.

        Raises:
            ValueError: for an impossible size, or patches that the model's output_stride rules out.
        """
        changes: Dict[str, Any] = {}
        if patch_size is not None:
            if not isinstance(self.patch_embed.proj, nn.Conv2d):
                raise ValueError(f'patch_size: got {patch_size}, but with depth=0 the model is the ResNet alone.')
            changes['patch_size'] = patch_size
            if self.cfg.output_stride is not None:  # which is that of the tokens, so it goes with their size
                changes['output_stride'] = self._output_stride(patch_size)
        old_size, old_patch_size = self.patch_embed.img_size, self.patch_embed.patch_size
        name = 'img_size' if img_size is not None else 'patch_size'
        self.patch_embed.check_size(name, img_size or old_size, patch_size or old_patch_size)
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        if changes:
            self._change_cfg(**changes)
            self._init_feature_info()

    def _output_stride(self, patch_size: PatchSize) -> Optional[int]:
        """Return the config's `output_stride` with which this very ResNet goes with other patches."""
        ratio = self.patch_embed.feature_ratio[0]
        undilated = _create_backbone(dataclasses.replace(self.cfg, output_stride=None), device='meta')
        if not self.cfg.backbone or undilated.feature_info[-1]['reduction'] == ratio:
            return None  # it keeps all its strides
        stride = ratio * max(to_2tuple(patch_size))
        if stride not in (8, 16, 32):
            raise ValueError(
                f"patch_size: got {patch_size}, with which the tokens would be {stride} pixels apart, but the model's "
                f'output_stride ({self.cfg.output_stride}) can only become 8, 16 or 32; make the model anew for these '
                f'patches.'
            )
        return stride

    def _change_cfg(self, **changes: Any) -> None:
        """Keep config and saved arguments those of the model that this one has become."""
        self.cfg = dataclasses.replace(self.cfg, **changes)
        self._model_args = {**getattr(self, '_model_args', {}), **changes}  # where timm keeps them

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


def _blocks_between(depth: int, patch_size: Tuple[int, int]) -> List[Tuple[int, int]]:
    """Return blocks, at even distances, for the strides that a patch leaps over, and how much to enlarge their maps."""
    side = patch_size[0]
    missing = side.bit_length() - 2
    if patch_size[1] != side or side != 2 ** (missing + 1) or missing >= depth:
        return []
    return [(round(depth * i / (missing + 1)) - 1, 2 ** (missing + 1 - i)) for i in range(1, missing + 1)]


def _backbone_arguments(cfg: VitResNetCfg) -> Dict[str, Any]:
    """Return the arguments of `create_backbone` that a config gives."""
    patch_stride = max(to_2tuple(cfg.patch_size or (1 if cfg.backbone else 16)))
    return dict(
        stage=cfg.stage,
        stem_stride=cfg.stem_stride,
        output_stride=cfg.output_stride // patch_stride if cfg.output_stride else None,
        **{arg: getattr(cfg, field) for field, arg in RESNET_ARGS.items() if getattr(cfg, field) is not None},
    )


def _create_backbone(cfg: VitResNetCfg, **kwargs) -> nn.Module:
    """Build the config's ResNet, and check that its strides suit `output_stride`."""
    backbone = create_backbone(cfg.backbone, **_backbone_arguments(cfg), **kwargs)
    patch_stride = max(to_2tuple(cfg.patch_size or (1 if cfg.backbone else 16)))
    stride = patch_stride * (backbone.feature_info[-1]['reduction'] if cfg.backbone else 1)
    if cfg.output_stride and stride > cfg.output_stride:
        raise ValueError(
            f'output_stride: got {cfg.output_stride}, but the tokens of this model cannot be closer than {stride} '
            f'pixels: dilation replaces the strides of ResNet stages 2 to 4, not those of the stem or of the patches.'
        )
    return backbone


def _check_overrides(cfg: VitResNetCfg, names: Iterable[str]) -> None:
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


def _resolve_vit(cfg: VitResNetCfg, backbone: nn.Module) -> VitResNetCfg:
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
    patch_size = cfg.patch_size or (1 if cfg.backbone else 16)
    resolved = dict(embed_dim=embed_dim, class_token=class_token, global_pool=global_pool, patch_size=patch_size)
    return dataclasses.replace(cfg, **resolved)


def _create_vitresnet(variant: str, pretrained: bool, cfg: VitResNetCfg, **kwargs) -> VitResNet:
    """Build a variant; keyword arguments named like the config's fields override them."""
    overrides = {field.name: kwargs[field.name] for field in dataclasses.fields(cfg) if field.name in kwargs}
    _check_overrides(dataclasses.replace(cfg, **overrides), overrides)
    # The position table must have the checkpoint's own grid; timm passes img_size on only where sizes are fixed.
    source = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    kwargs.setdefault('img_size', source.input_size[-2:])
    model = build_hybrid(VitResNet, variant, pretrained, cfg, **kwargs)
    model.pretrained_cfg['first_conv'] = get_model_input_config(model)['first_conv']
    return model


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

VitResNet.variants = tuple(default_cfgs)
VitResNet.foreign_names = {
    r'vit_tiny_r_s16_p8_\d+': 'vitresnet_tiny',
    r'vit_small_r26_s32_\d+': 'vitresnet_small',
    r'vit_base_r50_s16_\d+': 'vitresnet_base',
    r'vit_large_r50_s32_\d+': 'vitresnet_large',
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
