"""The serial family's embedding: image (B, C, H, W) -> ResNet -> map -> patches -> tokens (B, H', W', D).

It is timm's `HybridEmbed` without its forward pass in the constructor, so that it can be built on any device ('meta',
too) and takes any size.
"""

import math
from typing import List, Optional, Sequence, Tuple, Union, cast

import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d, HybridEmbed, register_notrace_module, to_2tuple
from torch import nn

from .layers import check_images, crop_pos_embed, is_captured, resample_pos_embed, same_padding
from .merging import batch_norms_of_convolutions, merge_batch_norm_

Size = Union[int, Tuple[int, int]]


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
        self._set_limits()

    def _set_limits(self) -> None:
        """Note which sizes the ResNet's anti-aliasing takes."""
        modules = list(self.backbone.modules())
        self.blurs = any(isinstance(module, BlurPool2d) for module in modules)
        # that by average pooling (timm's resnetaa*) rounds down where everything else rounds up
        self.only_multiples = any(isinstance(m, nn.AvgPool2d) and not m.ceil_mode for m in modules)

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
        what = 'one token'
        if isinstance(self.proj, nn.Identity):  # the ResNet alone takes a single pixel
            min_h = min_w = 1
            if self.blurs:  # by padding that mirrors, which a map of one pixel has not
                min_h = min_w = self.backbone.feature_info[-1]['reduction'] // 2 + 1
                what = 'what this backbone can blur'
        if height < min_h or width < min_w:
            raise ValueError(
                f'{name}: got an image of {height}x{width} pixels, which is smaller than {what}; '
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
        self._set_limits()
        self.num_levels = level + 1
        self.proj = nn.Identity()
        values = self._init_backbone(self.img_size, 1)
        self.img_size, self.patch_size, self.feature_size, self.feature_ratio = values[:4]
        self.feature_dim, self.grid_size, self.num_patches = values[4:]
