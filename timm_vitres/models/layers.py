"""Layers and functions that the families share; this module knows no config and no registry."""

from contextlib import contextmanager
from typing import Any, Iterable, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import (
    StdConv2dSame,
    is_exporting,
    register_notrace_function,
    resample_abs_pos_embed,
)
from torch import nn

from ..checks import conform_indices
from ..timm_private import EXPORTING_FLAG
from ..timm_private import feature_take_indices as take_indices
from .merging import check_plain, make_channels_last_


def feature_take_indices(num_features: int, indices: Optional[Union[int, List[int]]] = None) -> Tuple[List[int], int]:
    """Return indices of features, counted from 0, and the highest: all of them, the last so many, or those listed.

    Raises:
        ValueError: for indices that the features do not have.
    """
    # indices are checked where a compiled graph is captured
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling() and indices is not None:
        indices = conform_indices('indices', indices, num_features)
    return take_indices(num_features, indices)


def is_captured() -> bool:
    """Return whether a graph is exported or traced, which images of other sizes may be given to."""
    if not torch.jit.is_scripting():
        return is_exporting() or torch.jit.is_tracing()
    return False


def fused_attentions(model: nn.Module) -> List[nn.Module]:
    """Return the layers of a model, timm's or ours, that attend in torch's fused kernel."""
    return [module for module in model.modules() if getattr(module, 'fused_attn', False)]


def unfuse_(attentions: Iterable[nn.Module]) -> None:
    """Let layers that `fused_attentions` returned attend step by step, holding the matrix of all pairs of tokens."""
    for attention in attentions:
        attention.fused_attn = False  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def unfused(attentions: List[nn.Module]) -> Iterator[None]:
    """Let such layers, or others of their kind, attend step by step until the context ends."""
    fused = [attention.fused_attn for attention in attentions]
    try:
        unfuse_(attentions)
        yield
    finally:
        for attention, value in zip(attentions, fused):
            attention.fused_attn = value  # pyright: ignore[reportAttributeAccessIssue]


def same_padding(size: int, kernel_size: int, stride: int, dilation: int = 1) -> int:
    """Return the zeros that TensorFlow's 'SAME' adds to `size` pixels, both ends together: timm's `get_same_padding`.

    It is negative for pixels at the end that a 1x1 kernel with a stride never sees; timm leaves those where they are.
    It is written so that the padded size does not contain `size` but by whole-number division: a captured graph then
    knows sizes that stay short, where those of timm's formula (by way of floats) grow with every layer.
    """
    reach = (kernel_size - 1) * dilation + 1
    padding = ((size + stride - 1) // stride - 1) * stride + reach - size
    return padding if reach >= stride or reach == 1 else max(padding, 0)


def pad_same(
    x: torch.Tensor,
    kernel_size: Tuple[int, int],
    stride: Tuple[int, int],
    dilation: Tuple[int, int],
    value: float = 0.0,
) -> torch.Tensor:
    """Pad as TensorFlow's 'SAME' does, the odd pixel to the right and below. x: (B, C, H, W)."""
    pad_h = same_padding(x.shape[-2], kernel_size[0], stride[0], dilation[0])
    pad_w = same_padding(x.shape[-1], kernel_size[1], stride[1], dilation[1])
    left, top = (pad_w // 2, pad_h // 2) if kernel_size[0] > 1 else (0, 0)
    return F.pad(x, (left, pad_w - left, top, pad_h - top), value=value)


class PadSameConv2d(nn.Conv2d):
    """A convolution with 'SAME' padding by `pad_same`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        if self.kernel_size != (1, 1) or is_captured():
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class PadSameStdConv2d(StdConv2dSame):
    """timm's weight-standardised convolution with 'SAME' padding, padded by `pad_same`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pads = self.same_pad  # timm pads itself where this is set
        self.same_pad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        if self.pads and (self.kernel_size != (1, 1) or is_captured()):
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, self.standardized_weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def standardized_weight(self) -> torch.Tensor:
        """Return the weight with mean 0 and variance 1 in every output channel (arXiv:1903.10520)."""
        weight = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(weight, None, None, training=True, momentum=0.0, eps=self.eps).reshape_as(self.weight)

    def fuse(self) -> nn.Conv2d:
        """Return a plain convolution with the standardised weight (timm's hook)."""
        check_plain('a convolution that standardises its weight', self)
        reach = [(size - 1) * dilation for size, dilation in zip(self.kernel_size, self.dilation)]
        conv_cls, padding = nn.Conv2d, self.padding
        if self.pads and (self.stride != (1, 1) or any(total % 2 for total in reach)):
            conv_cls = PadSameConv2d  # how much there is to pad depends on the image
        elif self.pads:
            padding = tuple(total // 2 for total in reach)
        conv = conv_cls(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            bias=self.bias is not None,
            device='meta',
        )
        # torch's public hook would keep the module, which `merging` may replace by its twin
        conv._register_load_state_dict_pre_hook(_refuse_weights)
        conv.weight = nn.Parameter(self.standardized_weight().detach(), requires_grad=self.weight.requires_grad)
        conv.bias = self.bias
        make_channels_last_(conv)
        return conv.train(self.training)


def _refuse_weights(state_dict: Any, prefix: str, *args: Any) -> None:
    """Let loading fail: weights that are to be standardised have the same name and shape (torch's hook)."""
    errors = args[-1]
    if f'{prefix}weight' in state_dict:
        errors.append(f'{prefix}weight: the model is folded for inference; load into an original, and fold that.')


class PadSameMaxPool2d(nn.MaxPool2d):
    """Max pooling with 'SAME' padding by `pad_same`. Kernel size, stride and dilation are pairs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""
        x = pad_same(x, self.kernel_size, self.stride, self.dilation, value=-float('inf'))
        return F.max_pool2d(x, self.kernel_size, self.stride, 0, self.dilation)


@register_notrace_function
def resample_pos_embed(
    pos_embed: torch.Tensor, grid: Tuple[int, int], old_grid: Tuple[int, int], num_prefix_tokens: int
) -> torch.Tensor:
    """Resample position embeddings as timm does (bicubic, antialiased). (1, P + h * w, D) -> (1, P + H' * W', D).

    PyTorch (2.14) has no backward of that resize for the symbolic sizes that a compiled training step has, so there it
    is written as what it is, a product with a matrix along each side.
    """
    if not torch.jit.is_scripting():
        if (
            torch.compiler.is_compiling()  # it is asked first, since torch.fx can't follow conditions on a tensor
            and not getattr(torch.compiler, EXPORTING_FLAG, False)
            and torch.is_grad_enabled()
            and pos_embed.requires_grad
        ):
            prefix, table = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
            table = table.to(_exact(pos_embed.device)).reshape(old_grid[0], old_grid[1], -1)
            rows = _resize_matrix(old_grid[0], grid[0], pos_embed.device)
            columns = _resize_matrix(old_grid[1], grid[1], pos_embed.device)
            with torch.autocast(pos_embed.device.type, enabled=False):  # it would make products of 16 bits of it
                table = torch.einsum('ih,hwd,jw->ijd', rows, table, columns)
            table = table.reshape(1, grid[0] * grid[1], -1)
            return torch.cat([prefix, table.to(pos_embed.dtype)], dim=1)
        if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():  # timm leaves out a resize to the same size
            prefix, table = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
            table = table.float().reshape(1, old_grid[0], old_grid[1], -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=(grid[0], grid[1]), mode='bicubic', antialias=True).flatten(2)
            # a dtype would be a constant of the trace, which may be cast later
            return torch.cat([prefix, table.transpose(1, 2).type_as(pos_embed)], dim=1)
    return resample_abs_pos_embed(
        pos_embed, [grid[0], grid[1]], [old_grid[0], old_grid[1]], num_prefix_tokens=num_prefix_tokens
    )


@register_notrace_function
def crop_pos_embed(
    pos_embed: torch.Tensor, grid: Tuple[int, int], old_grid: Tuple[int, int], num_prefix_tokens: int
) -> torch.Tensor:
    """Return the positions of a grid's upper left corner. (1, P + h * w, D) -> (1, P + H' * W', D), H' <= h, W' <= w.

    Raises:
        ValueError: for a grid that is larger than the table; an exported graph has an error of its own.
    """
    if not is_exporting() and (grid[0] > old_grid[0] or grid[1] > old_grid[1]):
        raise ValueError('input: got an image that is larger than the position table, which is cropped.')
    # rows and columns are chosen by their numbers: an exported graph would have to prove that a slice is smaller
    rows = torch.arange(grid[0], device=pos_embed.device)
    columns = torch.arange(grid[1], device=pos_embed.device)
    table = pos_embed[:, num_prefix_tokens:].reshape(1, old_grid[0], old_grid[1], -1)
    table = table[:, rows][:, :, columns].flatten(1, 2)
    return torch.cat([pos_embed[:, :num_prefix_tokens], table], dim=1)


def _exact(device: torch.device) -> torch.dtype:
    """Return a dtype whose products are not rounded to TensorFloat32, which is CUDA's; others may have no float64."""
    return torch.float64 if device.type in ('cpu', 'cuda') else torch.float32


def _resize_matrix(old: int, new: int, device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        points = torch.eye(old, dtype=_exact(device), device=device)[None, None]
        return F.interpolate(points, size=(new, old), mode='bicubic', antialias=True)[0, 0]


@register_notrace_function  # it looks at the number of tokens
def unflatten_tokens(x: torch.Tensor, grid: Tuple[int, int]) -> torch.Tensor:
    """Lay patch tokens out as the map that they were. x: (B, H' * W', D), grid: (H', W') -> (B, D, H', W').

    Raises:
        ValueError: where there are more or fewer tokens than that, as while training with patch_drop_rate.
    """
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling() and x.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f'patch_drop_rate: {x.shape[1]} tokens are left of {grid[0]}x{grid[1]}, which are no map any more; use '
            f"output_fmt='NLC', or no patch_drop_rate."
        )
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], grid[0], grid[1])


@register_notrace_function
def pad_to(x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Repeat the last pixels to the right and below until a map has `size`. (B, C, h, w) -> (B, C, *size)."""
    pad_h, pad_w = size[0] - x.shape[-2], size[1] - x.shape[-1]
    if is_captured() or pad_h > 0 or pad_w > 0:  # padding tells a captured graph the size that it has then
        x = F.pad(x, (0, pad_w, 0, pad_h), mode='replicate')
    return x


def check_images(x: torch.Tensor, in_chans: int) -> None:
    """Raise ValueError unless x is a tensor (B, in_chans, H, W) of floating-point numbers."""
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            'input: got a torch.fx.Proxy, but this model looks at the size of images, which torch.fx can not follow; '
            'use timm.models.create_feature_extractor.'
        )
    if not isinstance(x, torch.Tensor):
        raise ValueError(f'input: got {type(x).__name__}, expected a tensor (B, {in_chans}, H, W).')
    if x.ndim != 4 or x.shape[1] != in_chans:
        are_chans = x.ndim == 4 and x.shape[1] <= 16  # more are rather the side of an image (B, H, W, C)
        hint = f'; in_chans={x.shape[1]} makes a model for such images' if are_chans else ''
        raise ValueError(f'input: got shape {tuple(x.shape)}, expected (B, {in_chans}, H, W){hint}.')
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f'input: got shape {tuple(x.shape)}, which has no pixels.')
    if not x.is_floating_point():
        raise ValueError(f'input: got {x.dtype}, expected floating-point numbers: images that are preprocessed.')


def keep_mode_(model: nn.Module) -> None:
    """Put modules that are new in a model in evaluation mode, where the model is."""
    if not model.training:
        model.eval()


@register_notrace_function  # it looks at the shape
def checked_images(x: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Return what `check_images` lets pass; shapes are checked where a compiled or exported graph is captured."""
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
        check_images(x, in_chans)
    return x
