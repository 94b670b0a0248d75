"""How an interleaved hybrid goes together: the strides of its stages, the maps that it attends to, and timm's config.

`VitResNetMixCfg`, height and width of an image -> `attn_sizes` -> `byob_cfg` -> timm's `ByobNet`; and the tables of
relative positions, whose sizes are those of the maps that blocks attend to.
"""

from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.layers import to_2tuple
from timm.models import checkpoint_seq
from timm.models.byobnet import ByoBlockCfg, ByoModelCfg, Stem
from torch import nn

from ..weights.layouts import StateDict
from .attention import AttnBlock, RelPosAttn, resample_rel_pos
from .config import VitResNetMixCfg
from .features import as_format, check_output_fmt
from .layers import checked_images, feature_take_indices, keep_mode_

TABLES = ('pos_embed.height_rel', 'pos_embed.width_rel')
Place = Tuple[int, int]  # a stage and a block of it, counted from 0


def stage_strides(cfg: VitResNetMixCfg) -> List[Tuple[int, int]]:
    """Return the stride of every stage's map before its own stride and behind it, as dilation leaves them."""
    stride = cfg.stem_stride or cfg.own_stem_stride
    result: List[Tuple[int, int]] = []
    for own in cfg.strides:
        before = stride
        stride *= own if stride < cfg.output_stride else 1
        result.append((before, stride))
    return result


def input_stride(cfg: VitResNetMixCfg, stage: int, block: int) -> int:
    """Return the stride of the map that a block is given: a stage's first block is the one with a stride."""
    return stage_strides(cfg)[stage][int(block > 0)]


def attn_sizes(
    cfg: VitResNetMixCfg, img_size: Tuple[int, int], num_stages: Optional[int] = None
) -> Dict[Place, Tuple[int, int]]:
    """Return height and width of the map that each (stage, block) attends to, for an image of height and width.

    Args:
        num_stages: Of a model that has fewer than its config.
    """
    result: Dict[Place, Tuple[int, int]] = {}
    for stage in range(len(cfg.layers))[:num_stages]:
        for block in cfg.attending(stage):
            stride = input_stride(cfg, stage, block)
            result[stage, block] = (-(-img_size[0] // stride), -(-img_size[1] // stride))
    return result


def byob_cfg(cfg: VitResNetMixCfg, img_size: Tuple[int, int]) -> ByoModelCfg:
    """Return the config of timm's `ByobNet`, with tables of relative positions for an image of height and width."""
    sizes = attn_sizes(cfg, img_size)

    def block_cfg(stage: int, block: int) -> ByoBlockCfg:
        attends = (stage, block) in sizes
        ratio = cfg.inner_ratio(stage, attends)
        shape: Dict[str, Any] = dict(d=1, c=cfg.channels[stage], s=cfg.strides[stage], br=ratio)
        if not attends:
            return ByoBlockCfg('bottle' if cfg.block == 'bottleneck' else 'basic', gs=cfg.group_size, **shape)
        attn_kwargs = dict(
            feat_size=sizes[stage, block],
            num_heads=cfg.of_stage('num_heads', stage),
            dim_head=cfg.dim_head,
            qkv_bias=cfg.qkv_bias,
        )
        kind: Any = partial(AttnBlock)  # timm takes a block in place of its name, if it is not a class
        return ByoBlockCfg(kind, gs=0, self_attn_layer=RelPosAttn, self_attn_kwargs=attn_kwargs, **shape)  # pyright: ignore

    return ByoModelCfg(
        blocks=tuple(
            tuple(block_cfg(stage, block) for block in range(depth)) for stage, depth in enumerate(cfg.layers)
        ),
        downsample=cfg.downsample,
        stem_type=cfg.stem_type,
        stem_pool=cfg.stem_pool,
        stem_chs=cfg.stem_chs,
        num_features=cfg.num_features,
        act_layer=cfg.act_layer,
        attn_layer=cfg.channel_attn,
    )


def set_stem_stride_(stem: nn.Module, stride: int) -> None:
    """Leave out the last strides of a stem, down to a stride of 1, 2 or 4."""
    strided = [(name, module) for name, module in stem.named_modules() if _is_strided(module)]
    for name, module in strided[stride.bit_length() - 1 :]:
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        else:
            stem.set_submodule(name, nn.Identity())
        if isinstance(stem, Stem):
            stem.last_feat_idx = -1  # there is no map of another stride inside it any more; a script wants a number


def fit_stem(state_dict: StateDict, stem: nn.Module) -> StateDict:
    """Rename a stem of one convolution, which timm calls otherwise with a pooling behind it than without."""
    with_pool, without = 'stem.conv1.', 'stem.'
    own, other = (with_pool, without) if isinstance(stem, Stem) else (without, with_pool)
    if 'stem.conv2.conv.weight' in state_dict or f'{other}conv.weight' not in state_dict:
        return state_dict
    return {own + key.removeprefix(other) if key.startswith(other) else key: value for key, value in state_dict.items()}


def _is_strided(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)) and to_2tuple(module.stride) == (2, 2)


def find_levels(cfg: VitResNetMixCfg, stem: nn.Module, num_features: int) -> Tuple[List[Dict[str, Any]], List[int]]:
    """Return all maps that a model makes, as `feature_info` describes them, and which of them are the pyramid.

    Of maps with one stride it is the last, but for strides that dilation replaces. None has a stride of 1, for which
    programs such as smp take the image itself.
    """
    stride = cfg.stem_stride or cfg.own_stem_stride
    levels: List[Dict[str, Any]] = [dict(num_chs=cfg.stem_chs, reduction=stride, module='stem', stage=0)]
    if isinstance(stem, Stem) and stem.last_feat_idx is not None and stem.last_feat_idx >= 0:
        name, layer = list(stem.named_children())[stem.last_feat_idx]
        levels.insert(0, dict(num_chs=layer.out_channels, reduction=2, module=f'stem.{name}', stage=0))
    is_kept = [True] * len(levels)
    for stage, (own_stride, (_, reduction)) in enumerate(zip(cfg.strides, stage_strides(cfg))):
        is_kept[-1] = own_stride > 1
        is_kept.append(True)
        levels.append(dict(num_chs=cfg.channels[stage], reduction=reduction, module=f'stages.{stage}', stage=stage + 1))
    levels[-1].update(num_chs=num_features, module='final_conv')
    return levels, [i for i, kept in enumerate(is_kept) if kept and levels[i]['reduction'] > 1]


def attn_name(place: Place) -> str:
    """Return the name of the layer that attends in a block."""
    return f'stages.{place[0]}.{place[1]}.self_attn'


def fit_rel_tables(state_dict: StateDict, own: StateDict) -> StateDict:
    """Return a state dict whose tables of relative positions have the sizes of a model's `own`.

    Raises:
        RuntimeError: for a table that is of no size.
    """
    state_dict = dict(state_dict)
    for key, tensor in own.items():
        table = state_dict.get(key)
        if not key.endswith(TABLES) or table is None or table.shape == tensor.shape:
            continue
        if table.ndim != 2 or table.shape[0] % 2 == 0:
            raise RuntimeError(
                f'{key}: the checkpoint has shape {tuple(table.shape)}, expected (2 * side - 1, {tensor.shape[1]}).'
            )
        state_dict[key] = resample_rel_pos(table, (tensor.shape[0] + 1) // 2)
    return state_dict


def rel_table_size(state_dict: StateDict, cfg: VitResNetMixCfg, candidates: Sequence[Any]) -> Any:
    """Return the image size that the tables of a state dict are made for; see `Hybrid.table_size`."""
    sides: Dict[Place, Tuple[int, int]] = {}
    for place in attn_sizes(cfg, (1, 1)):
        tables = [state_dict.get(f'{attn_name(place)}.{table}') for table in TABLES]
        lengths = [len(table) for table in tables if table is not None and table.ndim == 2]
        if len(lengths) < 2:
            return None  # the comparison with the model says what is missing
        sides[place] = ((lengths[0] + 1) // 2, (lengths[1] + 1) // 2)
    if not sides:
        return None
    height, width = (min(side[axis] * input_stride(cfg, *place) for place, side in sides.items()) for axis in (0, 1))
    for size in (*candidates, height if height == width else (height, width)):
        if size is not None and attn_sizes(cfg, to_2tuple(size)) == sides:
            return size
    raise ValueError(
        f'img_size: not given, and the relative positions of the checkpoint are those of no height and width: blocks '
        f'would attend to maps of {", ".join(f"{h}x{w}" for h, w in sides.values())}.'
    )


class InterleavedFeatures(nn.Module):
    """The methods of an interleaved hybrid by which timm takes its maps; a base class beside timm's `ByobNet`.

    Attributes:
        num_levels: How many maps there are: of the stem (without and with its second stride), of every stage.
        level_indices: For the entries of `feature_info`: which of these maps each one is.
    """

    num_levels: int
    level_indices: List[int]

    def _run(self, x: torch.Tensor, last_level: int, exclude_final_conv: bool) -> List[torch.Tensor]:
        """Return the maps of all levels up to one: of the stem (without and with its second stride), of every stage."""
        x = checked_images(x, self.in_chans)
        levels: List[torch.Tensor] = []
        if hasattr(self.stem, 'forward_intermediates'):
            x, tap = self.stem.forward_intermediates(x)
            if tap is not None:
                levels.append(tap)
        else:
            x = self.stem(x)
        levels.append(x)
        for stage in self.stages:
            if len(levels) <= last_level:
                if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108 (a script can't choose)
                    x = checkpoint_seq(stage, x)
                else:
                    x = stage(x)
                levels.append(x)
        if len(levels) == self.num_levels and not exclude_final_conv:
            levels[-1] = self.final_conv(levels[-1])
        return levels

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        exclude_final_conv: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Return the last map, and the maps that `feature_info` lists.

        Args:
            x: (B, C, H, W).
            indices: Of `feature_info`, in the order wanted: None for all, a number for the last so many.
            norm: Taken for timm's sake; these maps are not normalised.
            stop_early: Leave out the stages that no map needs; the last map is then that of the last that ran.
            output_fmt: 'NCHW': maps (B, C, H / reduction, W / reduction); 'NLC': (B, N, C).
            intermediates_only: Return the maps alone.
            exclude_final_conv: Leave the convolution behind the last stage out of the maps.

        Returns:
            (map, maps), or as the arguments say.
        """
        check_output_fmt(output_fmt)
        take_indices, max_index = feature_take_indices(len(self.level_indices), indices)
        levels = self._run(x, self.level_indices[max_index] if stop_early else self.num_levels, exclude_final_conv)
        maps = [as_format(levels[self.level_indices[i]], output_fmt) for i in take_indices]
        if intermediates_only:
            return maps
        x = levels[-1]
        if exclude_final_conv and len(levels) == self.num_levels:
            x = self.final_conv(x)
        return x, maps

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove what the maps at `indices` of `feature_info` do not need; what the head needs stays with the head.

        Returns:
            The indices, counted from 0.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        *kept, last = self.feature_info[: max_index + 1]
        if prune_head:
            if max_index < len(self.feature_info) - 1:
                self.stages, self.final_conv = self.stages[: last['stage']], nn.Identity()
                self.num_features = self.head_hidden_size = last['num_chs']
                if last['module'].startswith('stem.'):
                    self.stem.prune_to_tap()
            self.feature_info, self.level_indices = [*kept, last], self.level_indices[: max_index + 1]
            self.reset_classifier(0, '')
        keep_mode_(self)
        return take_indices
