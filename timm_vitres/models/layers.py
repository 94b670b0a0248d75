"""Blocks that the families share; this module knows no config and no registry.

`ResNetEmbed`: image (B, C, H, W) -> ResNet -> map -> patches -> tokens (B, H', W', D). It is timm's `HybridEmbed`
without its forward pass in the constructor, so that it can be built on any device ('meta' too) and takes any size.
"""

import math
from typing import Any, List, Optional, Sequence, Tuple, Union, cast

import torch
import torch.nn.functional as F
from timm.layers import (
    BlurPool2d,
    HybridEmbed,
    StdConv2dSame,
    is_exporting,
    register_notrace_function,
    register_notrace_module,
    resample_abs_pos_embed,
    to_2tuple,
)
from torch import nn

from ..checks import conform_indices
from ..timm_private import EXPORTING_FLAG
from ..timm_private import feature_take_indices as take_indices
from .merging import batch_norms_of_convolutions, check_plain, make_channels_last_, merge_batch_norm_

__all__ = [
    'PadSameConv2d',
    'PadSameMaxPool2d',
    'PadSameStdConv2d',
    'ResNetEmbed',
    'check_images',
    'checked_images',
    'crop_pos_embed',
    'feature_take_indices',
    'pad_to',
    'resample_pos_embed',
    'unflatten_tokens',
]
Size = Union[int, Tuple[int, int]]


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
    if not torch.jit.is_scripting():  # noqa: SIM102 (a script leaves out what is behind this condition alone)
        if (
            torch.compiler.is_compiling()  # it is asked first, since torch.fx can't follow conditions on a tensor
            and not getattr(torch.compiler, EXPORTING_FLAG, False)
            and torch.is_grad_enabled()
            and pos_embed.requires_grad
        ):
            prefix, table = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
            table = table.float().reshape(old_grid[0], old_grid[1], -1)
            rows = _resize_matrix(old_grid[0], grid[0], pos_embed.device)
            columns = _resize_matrix(old_grid[1], grid[1], pos_embed.device)
            with torch.autocast(pos_embed.device.type, enabled=False):  # it would make products of 16 bits of it
                table = torch.einsum('ih,hwd,jw->ijd', rows, table, columns)
            table = table.reshape(1, grid[0] * grid[1], -1)
            return torch.cat([prefix, table.to(pos_embed.dtype)], dim=1)
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


def _resize_matrix(old: int, new: int, device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        points = torch.eye(old, dtype=torch.float32, device=device)[None, None]
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
    if not isinstance(x, torch.Tensor):
        raise ValueError(f'input: got {type(x).__name__}, expected a tensor (B, {in_chans}, H, W).')
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f'input: got shape {tuple(x.shape)}, expected (B, {in_chans}, H, W).')
    if not x.is_floating_point():
        raise ValueError(f'input: got {x.dtype}, expected floating-point numbers: images that are preprocessed.')


@register_notrace_function  # it looks at the shape
def checked_images(x: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Return what `check_images` lets pass; shapes are checked where a compiled or exported graph is captured."""
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
        check_images(x, in_chans)
    return x


@register_notrace_module  # its padding depends on the size, which torch.fx can't follow
class ResNetEmbed(HybridEmbed):
    """A ResNet as the patch embedding of a ViT.

    The map is padded at its right and lower edge to a multiple of `patch_size`, so every height and width from one
    token up has a grid: ceil(H / stride) x ceil(W / stride), where stride is the ResNet's times the patch's.

    Args:
        backbone: One of the kinds in `resnets`; `NoBackbone()` for the ViT's own patch embedding.
        img_size: Height and width, in pixels, that `grid_size` (and so the position table) is made for.
        patch_size: Height and width of a patch, in the ResNet's pixels.
        proj: False leaves the map as it is (the ResNet alone); `embed_dim` must then be the ResNet's width.

    Raises:
        ValueError: in the forward pass, for an input of another shape than (B, in_chans, H, W), or one that is
            smaller than one token.
    """

    def __init__(
        self,
        backbone: nn.Module,
        img_size: Size = 224,
        patch_size: Size = 1,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        proj: bool = True,
        output_fmt: Optional[str] = 'NHWC',
        strict_img_size: bool = False,
        dynamic_img_pad: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(
            backbone=backbone,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=bias,
            proj=proj,
            output_fmt=output_fmt,
            strict_img_size=False,
            dynamic_img_pad=True,
            device=device,
            dtype=dtype,
        )
        self.num_levels = len(backbone.feature_info)
        self.crops_positions = False  # the ViT has positions for `img_size` and smaller images alone
        self.blurs = any(isinstance(module, BlurPool2d) for module in backbone.modules())
        # anti-aliasing by average pooling (timm's resnetaa*) rounds down where everything else rounds up
        self.only_multiples = any(isinstance(m, nn.AvgPool2d) and not m.ceil_mode for m in backbone.modules())

    def _init_backbone(self, img_size: Size = 224, patch_size: Size = 1, **kwargs):
        # timm runs the backbone here to see what it returns; feature_info tells it without running anything
        height, width = cast(Tuple[int, int], to_2tuple(img_size))
        patch_h, patch_w = cast(Tuple[int, int], to_2tuple(patch_size))
        info = self.backbone.feature_info
        feature_dim = info[-1]['num_chs'] if info else self.in_chans
        ratio = info[-1]['reduction'] if info else 1
        feature_size = (math.ceil(height / ratio), math.ceil(width / ratio))
        grid_size = (math.ceil(feature_size[0] / patch_h), math.ceil(feature_size[1] / patch_w))
        num_patches = grid_size[0] * grid_size[1]
        return (height, width), (patch_h, patch_w), feature_size, (ratio, ratio), feature_dim, grid_size, num_patches

    def dynamic_feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Return the token grid (H', W') of an image of height and width `img_size`, in pixels."""
        (ratio_h, ratio_w), (patch_h, patch_w) = self.feature_ratio, self.patch_size  # pyright: ignore
        stride_h, stride_w = ratio_h * patch_h, ratio_w * patch_w
        return (img_size[0] + stride_h - 1) // stride_h, (img_size[1] + stride_w - 1) // stride_w

    def check_input(self, x: torch.Tensor) -> None:
        """Raise ValueError unless x is (B, in_chans, H, W), in floating point, with H and W of at least one token."""
        check_images(x, self.in_chans)
        self.check_size('input', (x.shape[2], x.shape[3]))

    def check_size(self, name: str, img_size: Size, patch_size: Optional[Size] = None) -> None:
        """Raise ValueError, about the argument `name`, unless images of a height and width have at least one token."""
        height, width = cast(Tuple[int, int], to_2tuple(img_size))
        patch_h, patch_w = cast(Tuple[int, int], to_2tuple(patch_size or self.patch_size))
        min_h, min_w = self.feature_ratio[0] * patch_h, self.feature_ratio[1] * patch_w
        if isinstance(self.proj, nn.Identity):  # the ResNet alone takes a single pixel
            min_h = min_w = 1
            if self.blurs:  # by padding that mirrors, which a map of one pixel has not
                min_h = min_w = self.backbone.feature_info[-1]['reduction'] // 2 + 1
        if height < min_h or width < min_w:
            raise ValueError(
                f'{name}: got an image of {height}x{width} pixels, which is smaller than '
                f'{"what this backbone can blur" if self.blurs else "one token"}; '
                f'height and width must be at least {min_h}x{min_w}.'
            )
        largest = self.largest_image(patch_size)
        if largest is not None and (height > largest[0] or width > largest[1]):
            raise ValueError(
                f"{name}: got an image of {height}x{width} pixels, but with pos_embed_fit='crop' there are positions "
                f'for at most {largest[0]}x{largest[1]}.'
            )
        stride = self.backbone.feature_info[-1]['reduction'] if self.only_multiples else 1
        if height % stride or width % stride:
            raise ValueError(
                f'{name}: got an image of {height}x{width} pixels, but the anti-aliased pooling of this backbone '
                f'takes only multiples of {stride}.'
            )

    def patchify(self, x: torch.Tensor) -> torch.Tensor:
        """Project the ResNet's map to tokens. x: (B, C, h, w) -> (B, H', W', D)."""
        pad_h = same_padding(x.shape[-2], self.patch_size[0], self.patch_size[0])
        pad_w = same_padding(x.shape[-1], self.patch_size[1], self.patch_size[1])
        if self.patch_size != (1, 1) and (is_captured() or pad_h > 0 or pad_w > 0):
            x = F.pad(x, (0, pad_w, 0, pad_h))
        return self.proj(x).permute(0, 2, 3, 1)

    @torch.jit.ignore
    def size_of_grid(self, grid: Sequence[int]) -> Tuple[int, ...]:
        """Return the height and width, in pixels, of images of which so many rows and columns of tokens are made."""
        return tuple(count * stride for count, stride in zip(grid, self.feat_ratio(as_scalar=False)))

    @torch.jit.ignore
    def largest_image(self, patch_size: Optional[Size] = None) -> Optional[Tuple[int, int]]:
        """Return height and width up to which there are positions; None where they are resampled for any.

        Args:
            patch_size: Of patches, if they were others than the present ones.
        """
        if not self.crops_positions or isinstance(self.proj, nn.Identity):
            return None
        patch = cast(Tuple[int, int], to_2tuple(patch_size or self.patch_size))
        strides = (ratio * side for ratio, side in zip(self.feature_ratio, patch))
        height, width = (tokens * stride for tokens, stride in zip(self.grid_size, strides))
        return height, width

    def positions(self, pos_embed: torch.Tensor, grid: Tuple[int, int], num_prefix_tokens: int) -> torch.Tensor:
        """Return a position table, (1, P + h * w, D), as it is for a grid: (1, P + H' * W', D)."""
        if self.crops_positions:
            return crop_pos_embed(pos_embed, grid, self.grid_size, num_prefix_tokens)
        return resample_pos_embed(pos_embed, grid, self.grid_size, num_prefix_tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W) -> tokens (B, H', W', D)."""
        # shapes are checked where a compiled or exported graph is captured
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            self.check_input(x)
        return self.patchify(self.backbone(x))

    def forward_levels(self, x: torch.Tensor, num_levels: int) -> List[torch.Tensor]:
        """Return the maps of the first levels of the ResNet's `feature_info`; the last one is what it returns.

        x: (B, C, H, W) -> `num_levels` of (B, num_chs, H / reduction, W / reduction). A script computes them all.
        """
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            self.check_input(x)
        return self.backbone.forward_levels(x, num_levels)

    def reparameterize(self) -> None:
        """Merge the BatchNorms of the ResNet into its convolutions (timm's hook)."""
        for layer, norm in batch_norms_of_convolutions(self.backbone):
            merge_batch_norm_(self.backbone, layer, norm)

    def enlarge(self, x: torch.Tensor, size: Tuple[int, int], factor: int) -> torch.Tensor:
        """Resize a map of tokens bilinearly. x: (B, D, H', W') -> (B, D, H' * factor, W' * factor).

        What lies beyond the image, whose height and width is `size`, is cut off: patches may reach over its edge.
        """
        if factor == 1:
            return x
        x = F.interpolate(x, size=(x.shape[-2] * factor, x.shape[-1] * factor), mode='bilinear', align_corners=False)
        stride_h = self.feature_ratio[0] * self.patch_size[0] // factor
        stride_w = self.feature_ratio[1] * self.patch_size[1] // factor
        height, width = (size[0] + stride_h - 1) // stride_h, (size[1] + stride_w - 1) // stride_w
        # padding may be negative; an exported graph would have to prove that a slice is smaller
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))

    def prune(self, level: int) -> None:
        """Cut off what comes after a level of the ResNet: its map, unprojected, is then what the tokens are."""
        self.backbone = self.backbone.prune(level)
        self.num_levels = level + 1
        self.proj = nn.Identity()
        values = self._init_backbone(self.img_size, 1)
        self.img_size, self.patch_size, self.feature_size, self.feature_ratio = values[:4]
        self.feature_dim, self.grid_size, self.num_patches = values[4:]
