"""Tables that depend on a size: those of a checkpoint are fitted to the model, as timm does it."""

import logging
import math
from typing import Any, Dict, Optional, Sequence

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, to_2tuple
from torch import nn

from ..checks import Size, checked
from ..weights.layouts import StateDict
from .composition import output_stride_with
from .config import PatchSize, VitResNetCfg
from .embedding import ResNetEmbed
from .layers import crop_pos_embed

_logger = logging.getLogger(__name__)


class SerialTables(nn.Module):
    """The methods of a serial hybrid that make its tables those of another size; a base class beside timm's
    `VisionTransformer`.
    """

    @torch.jit.ignore
    def fit_tables(self, state_dict: StateDict, img_size: Optional[Sequence[int]] = None) -> StateDict:
        """Fit position table and patch projection; see `Hybrid.fit_tables`."""
        return fit_tables(fit_norm(state_dict, self), self.patch_embed, self._num_table_prefix(), img_size)

    @torch.jit.ignore
    def check_without_tables(self, state_dict: StateDict) -> None:
        """See `Hybrid.check_without_tables`."""
        super().check_without_tables(fit_norm(state_dict, self))

    @torch.jit.ignore
    def size_of_tokens(self, source_cfg: VitResNetCfg, img_size: Sequence[int]) -> Sequence[int]:
        """See `Hybrid.size_of_tokens`."""
        return self.patch_embed.size_of_grid(type(self)(source_cfg, img_size, device='meta').patch_embed.grid_size)

    @torch.jit.ignore
    def table_size(self, state_dict: StateDict, candidates: Sequence[Any] = ()) -> Any:
        """See `Hybrid.table_size`."""
        table, prefix = state_dict.get('pos_embed'), self._num_table_prefix()
        if table is None or table.ndim != 3 or prefix is None:
            return None
        return table_size(table, self.patch_embed, prefix, candidates)

    @torch.jit.ignore
    def _num_table_prefix(self) -> Optional[int]:
        """Return how many positions of the table are those of prefix tokens; None where there is no table."""
        num_prefix_tokens: Any = self.num_prefix_tokens
        return None if self.pos_embed is None else 0 if self.no_embed_class else num_prefix_tokens

    @checked
    def set_input_size(self, img_size: Optional[Size] = None, patch_size: Optional[PatchSize] = None) -> None:
        """Make the position table for another size, and the projection for other patches, both resampled as timm does.

        With pos_embed_fit='crop' the table is cropped, and what is cut off is gone.

        Args:
            img_size: Height and width, in pixels; the present ones by default.
            patch_size: Height and width of a patch in the ResNet's pixels; the present ones by default.

        Raises:
            ValueError: for an impossible size, or patches that the model's output_stride rules out.
        """
        changes: Dict[str, Any] = {}
        if patch_size is not None:
            if not isinstance(self.patch_embed.proj, nn.Conv2d):
                is_alone = isinstance(self.patch_embed.proj, nn.Identity)
                why = (
                    'with depth=0 the model is the ResNet alone' if is_alone else 'proj has an adapter; merge it first'
                )
                raise ValueError(f'patch_size: got {patch_size}, but {why}.')
            changes['patch_size'] = patch_size
            if self.cfg.output_stride is not None:  # it is the stride of the tokens, so it goes with their size
                ratio = self.patch_embed.feature_ratio[0]
                changes['output_stride'] = output_stride_with(self.cfg, ratio, patch_size)
        old_size, old_patch_size = self.patch_embed.img_size, self.patch_embed.patch_size
        name = 'img_size' if img_size is not None else 'patch_size'
        self.patch_embed.check_size(name, img_size or old_size, patch_size or old_patch_size)
        table, grid, prefix = self.pos_embed, self.patch_embed.grid_size, self._num_table_prefix() or 0
        if self.patch_embed.crops_positions:
            self.pos_embed = None  # timm would resample it
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        if self.patch_embed.crops_positions and table is not None:
            cropped = crop_pos_embed(table.detach(), self.patch_embed.grid_size, grid, prefix)
            self.pos_embed = nn.Parameter(cropped, requires_grad=table.requires_grad)
        if changes:
            self._change_cfg(**changes)
            self._init_feature_info()


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
            _tell_of_guess(num_tokens, side)
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
        told = ', '.join(' x '.join(map(str, to_2tuple(size))) for size in candidates if size is not None)
        raise ValueError(
            f'img_size: {f"tried {told}" if told else "not given"}, and the {num_tokens} position embeddings of the '
            'checkpoint are no square grid; say which height and width they are for.'
        )
    _tell_of_guess(num_tokens, side)
    height, width = embed.size_of_grid((side, side))
    return height if height == width else (height, width)


def _tell_of_guess(num_tokens: int, side: int) -> None:
    _logger.warning(
        'pos_embed: %d positions are taken for %d x %d; if they are of another grid, say of which image size they are: '
        'input_size in the pretrained_cfg, --img-size of timm-vitres convert.',
        *(num_tokens, side, side),
    )


def _square_side(num_tokens: int) -> Optional[int]:
    """Return the side of a square grid of tokens; None where they are none."""
    side = math.isqrt(max(num_tokens, 0))
    return side if side > 0 and side * side == num_tokens else None
