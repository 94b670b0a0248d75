"""Tables that depend on a size: those of a checkpoint are fitted to the model, as timm does it."""

import math
from typing import Any, Optional, Sequence

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, to_2tuple
from torch import nn

from ..weights.layouts import StateDict
from .layers import ResNetEmbed, crop_pos_embed


def fit_tables(
    state_dict: StateDict,
    embed: ResNetEmbed,
    num_prefix_tokens: Optional[int],
    img_size: Optional[Sequence[int]] = None,
) -> StateDict:
    """Return a state dict whose `pos_embed` has the grid of `embed`, and whose projection has its patch size.

    Args:
        num_prefix_tokens: How many of the table's tokens are no patches; None where the model has no table.
        img_size: Height and width that the table was made for, where they are known.

    Raises:
        RuntimeError: for a table that is of no grid that is told, and of no square one, or too small to be cropped.
    """
    state_dict = dict(state_dict)
    table = state_dict.get('pos_embed')
    if table is not None and num_prefix_tokens is not None:
        if table.ndim != 3:
            raise RuntimeError(
                f'pos_embed: the checkpoint has shape {tuple(table.shape)}, expected (1, tokens, width).'
            )
        state_dict['pos_embed'] = _fit_pos_embed(table, embed, num_prefix_tokens, img_size)
    weight = state_dict.get('patch_embed.proj.weight')
    patch_size = tuple(embed.patch_size)
    if weight is not None and weight.ndim == 4 and tuple(weight.shape[-2:]) != patch_size:
        state_dict['patch_embed.proj.weight'] = resample_patch_embed(weight, list(patch_size))
    return state_dict


def fit_norm(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Rename the norm behind the blocks, which is `fc_norm` where a mean comes before it, as a model that does not pool
    calls it: there the two are the same.
    """
    has = {name: not isinstance(getattr(model, name), nn.Identity) for name in ('norm', 'fc_norm')}
    own, other = ('norm', 'fc_norm') if has['norm'] else ('fc_norm', 'norm')
    if model.global_pool or all(has.values()) or any(key.startswith(f'{own}.') for key in state_dict):
        return state_dict
    start = f'{other}.'
    return {own + key[len(other) :] if key.startswith(start) else key: value for key, value in state_dict.items()}


def _fit_pos_embed(
    pos_embed: torch.Tensor, embed: ResNetEmbed, num_prefix_tokens: int, img_size: Optional[Sequence[int]]
) -> torch.Tensor:
    num_tokens = pos_embed.shape[1] - num_prefix_tokens
    grid = tuple(embed.grid_size)
    old_grid = tuple(embed.dynamic_feat_size(to_2tuple(img_size))) if img_size is not None else grid
    if math.prod(old_grid) != num_tokens:  # the size that is told is not this table's
        side = _square_side(num_tokens)
        if math.prod(grid) == num_tokens:
            old_grid = grid
        elif side is not None:
            old_grid = (side, side)
        else:
            raise RuntimeError(
                f'pos_embed: the checkpoint has {num_tokens} position embeddings, which are no square grid, and its '
                f'metadata names no image size that gives that many; say its input_size in the pretrained_cfg.'
            )
    if old_grid == grid:
        return pos_embed
    if embed.crops_positions and (old_grid[0] < grid[0] or old_grid[1] < grid[1]):
        raise RuntimeError(
            f'pos_embed: the checkpoint has positions for {old_grid[0]}x{old_grid[1]} tokens, and with '
            f"pos_embed_fit='crop' none can be made of them for {grid[0]}x{grid[1]}; ask for a smaller img_size."
        )
    if embed.crops_positions:
        return crop_pos_embed(pos_embed, (grid[0], grid[1]), (old_grid[0], old_grid[1]), num_prefix_tokens)
    return resample_abs_pos_embed(
        pos_embed, new_size=list(grid), old_size=list(old_grid), num_prefix_tokens=num_prefix_tokens
    )


def table_size(table: torch.Tensor, embed: ResNetEmbed, num_prefix_tokens: int, candidates: Sequence[Any]) -> Any:
    """Return the image size whose grid of tokens a position table (1, tokens, width) has; see `Hybrid.table_size`."""
    num_tokens = table.shape[1] - num_prefix_tokens
    for size in candidates:
        if size is not None and math.prod(embed.dynamic_feat_size(to_2tuple(size))) == num_tokens:
            return size
    side = _square_side(num_tokens)
    if side is None:
        raise ValueError(
            f'img_size: not given, and the {num_tokens} position embeddings of the checkpoint are no square grid; say '
            f'which height and width they are for.'
        )
    height, width = embed.size_of_grid((side, side))
    return height if height == width else (height, width)


def _square_side(num_tokens: int) -> Optional[int]:
    """Return the side of a square grid of tokens; None where they are none."""
    side = math.isqrt(max(num_tokens, 0))
    return side if side > 0 and side * side == num_tokens else None
