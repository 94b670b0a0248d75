"""Attention between the pixels of a ResNet's map, at any size.

Paper: `Bottleneck Transformers for Visual Recognition` (BoTNet, Srinivas et al. 2021, arXiv:2101.11605). map
(B, C, h, w) -> 1x1 convolution -> attention with relative positions -> 1x1 convolution -> map. The layers are those of
timm's BoTNets, with their names of tensors.
"""

from typing import Any, Tuple

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, is_exporting, register_notrace_module, use_fused_attn
from timm.layers.bottleneck_attn import BottleneckAttn, PosEmbedRel
from timm.models.byobnet import SelfAttnBlock
from torch import nn

from .layers import pad_to, resample_pos_embed
from .merging import check_plain, merge_batch_norm_


def resample_rel_pos(table: torch.Tensor, size: int) -> torch.Tensor:
    """Resample a table of relative positions along one side for another size. (2 * old - 1, d) -> (2 * size - 1, d)."""
    return resample_pos_embed(table[None], (2 * size - 1, 1), (table.shape[0], 1), 0)[0]


def _between_all(table: torch.Tensor, size: int) -> torch.Tensor:
    """Return the embedding of every pixel's distance to every other, along one side: (size, size, d)."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (a script leaves out what is behind this condition alone)
        if torch.jit.is_tracing():
            size = int(size)  # a trace keeps the table of its size, so that it shall fail at any other
            if int(table.shape[0]) == 2 * size - 1:  # and no resize in vain, which converters may not know
                return table[_distances(size, table.device)]
    return resample_rel_pos(table, size)[_distances(size, table.device)]


def _distances(size: int, device: torch.device) -> torch.Tensor:
    """Return every pixel's distance to every other along one side, counted from 0: (size, size)."""
    pixels = torch.arange(size, device=device)
    return pixels[None, :] - pixels[:, None] + (size - 1)


class RelPosEmbed(PosEmbedRel):
    """timm's `PosEmbedRel` for maps of any size. queries (B, heads, h * w, d) -> (B, heads, h * w, h), (..., w)."""

    def forward(self, queries: torch.Tensor, height: int, width: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return what the positions of rows, and those of columns, add to the logits."""
        queries = queries.unflatten(2, (height, width))
        rows = torch.einsum('bnhwd,hkd->bnhwk', queries, _between_all(self.height_rel, height))
        columns = torch.einsum('bnhwd,wkd->bnhwk', queries, _between_all(self.width_rel, width))
        return rows.flatten(2, 3), columns.flatten(2, 3)


class Seen(nn.Identity):
    """Where a hook may look at what is passed on."""

    __jit_unused_properties__ = ['is_watched']

    @property
    def is_watched(self) -> bool:
        """Whether one does."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks)


@register_notrace_module  # it looks at the size of the map
class RelPosAttn(BottleneckAttn):
    """timm's `BottleneckAttn` for maps of any size: the tables of relative positions are resampled.

    Where attention is fused, as of larger maps in eager mode, a pixel's two position terms stand beside its query, and
    an indicator of row and column beside every key, so that one product gives the logits: no matrix of all pairs of
    pixels is held.

    torch's kernel has no second derivatives, and no forward mode: for a gradient penalty or `torch.func.jvp` call
    `timm.layers.set_fused_attn(False)` before the model is made.

    Args:
        feat_size: Height and width of the map that the tables are made for.
        stride: 2 averages over 2 x 2 pixels behind the attention; an odd edge over what there is.
    """

    def __init__(self, dim: int, *args: Any, stride: int = 1, **kwargs: Any):
        super().__init__(dim, *args, stride=stride, **kwargs)
        self.stride = stride
        timms = self.pos_embed
        self.pos_embed = RelPosEmbed((timms.height, timms.width), timms.dim_head, timms.scale, device='meta')
        self.pos_embed.height_rel, self.pos_embed.width_rel = timms.height_rel, timms.width_rel
        self.attn_drop = Seen()  # here attention can be seen (`explain`, timm's AttentionExtract)
        self.fused_attn = use_fused_attn()
        self.fused_from = 512  # pixels; of smaller maps the matrix costs less than what the kernel needs beside it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, h, w) -> (B, C', ceil(h / stride), ceil(w / stride))."""
        batch, _, height, width = x.shape
        queries, keys, values = self.qkv(x).flatten(2).split([self.dim_out_qk, self.dim_out_qk, self.dim_out_v], dim=1)
        queries = queries.reshape(batch, self.num_heads, self.dim_head_qk, height * width).transpose(-1, -2)
        keys = keys.reshape(batch, self.num_heads, self.dim_head_qk, height * width).transpose(-1, -2)
        values = values.reshape(batch, self.num_heads, self.dim_head_v, height * width).transpose(-1, -2)
        rows, columns = self.pos_embed(queries, height, width)
        if self.scale_pos_embed:
            rows, columns = rows * self.scale, columns * self.scale
        queries = queries * self.scale
        # a graph that is captured would be bound to one side of the comparison below, and torch (2.14) computes wrong
        # strides for this kernel's backward in a compiled one
        by_kernel = self.fused_attn and not is_exporting()
        if not torch.jit.is_scripting():  # and a trace would keep device and dtype of the indicators as constants
            by_kernel = by_kernel and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
            # the kernel holds no matrix that could be seen, or changed by a layer that somebody has put there
            by_kernel = by_kernel and not getattr(self.attn_drop, 'is_watched', True)
        if by_kernel and height * width >= self.fused_from:
            x = self._attend_fused(queries, keys, values, rows, columns)
        else:
            attention = (queries @ keys.transpose(-1, -2)).unflatten(-1, (height, width))
            attention += rows.unsqueeze(-1)
            attention += columns.unsqueeze(-2)
            x = self.attn_drop(attention.flatten(-2).softmax(dim=-1)) @ values
        x = x.transpose(-1, -2).reshape(batch, self.dim_out_v, height, width)
        if self.stride == 2:  # the block's shortcut keeps an odd edge, which the pooling would drop
            x = pad_to(x, (2 * ((height - 1) // 2 + 1), 2 * ((width - 1) // 2 + 1)))
        return self.pool(x)

    @torch.jit.ignore
    def set_feat_size(self, feat_size: Tuple[int, int]) -> None:
        """Make the tables for maps of another height and width."""
        embed = self.pos_embed
        embed.height, embed.width = feat_size
        for name, side in (('height_rel', embed.height), ('width_rel', embed.width)):
            table = getattr(embed, name)
            new = resample_rel_pos(table.detach(), side)
            setattr(embed, name, nn.Parameter(new, requires_grad=table.requires_grad))

    def _attend_fused(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        """Attend in one kernel. queries, keys: (B, heads, N, d); values: (B, heads, N, d') -> (B, heads, N, d')."""
        height, width = rows.shape[-1], columns.shape[-1]
        is_row = torch.eye(height, dtype=keys.dtype, device=keys.device).repeat_interleave(width, 0)
        is_column = torch.eye(width, dtype=keys.dtype, device=keys.device).repeat(height, 1)
        place = torch.cat([is_row, is_column], dim=1).expand(keys.shape[0], keys.shape[1], -1, -1)
        queries = torch.cat([queries, rows.to(queries.dtype), columns.to(queries.dtype)], dim=-1)
        keys = torch.cat([keys, place], dim=-1)
        # the kernels that hold no matrix want queries, keys and values of one width, on GPUs a multiple of 8
        wanted, own = queries.shape[-1], values.shape[-1]
        width = -(-max(wanted, own) // 8) * 8
        queries, keys = F.pad(queries, (0, width - wanted)), F.pad(keys, (0, width - wanted))
        values = F.pad(values, (0, width - own)).contiguous()
        return F.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., :own]


class MergingConvNormAct(ConvNormAct):
    """timm's `ConvNormAct` whose norm can be merged into its convolution."""

    def reparameterize(self) -> None:
        """Merge the BatchNorm into the convolution (timm's hook)."""
        merge_batch_norm_(self, 'conv', 'bn')


class AttnBlock(SelfAttnBlock):
    """timm's `SelfAttnBlock`, whose norm behind the attention can be merged into the projection before it."""

    def reparameterize(self) -> None:
        """Merge the BatchNorm behind the attention into the projection of the values (timm's hook).

        Attention averages values with weights whose sum is 1, and so does the pooling: scaling and shifting them
        before is the same as behind.
        """
        if hasattr(self.post_attn, 'running_mean'):
            check_plain('self_attn', self.self_attn)
        merge_batch_norm_(self, 'self_attn.qkv', 'post_attn')
