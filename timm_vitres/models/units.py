"""Units of the parallel family: a ResNet's block and a ViT's block, with features going both ways between them.

Paper: `Conformer` (Peng et al. 2021, arXiv:2105.03889), figure 2. map (B, C, h, w), tokens (B, 1 + H' * W', D) ->
`ConvBlock`, `Down`, timm's `Block`, `Up`, `ConvBlock` -> map, tokens
"""

from functools import partial
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, register_notrace_module
from timm.models.resnet import Bottleneck, downsample_conv
from torch import nn

from .layers import checked_images, is_captured, pad_to, unflatten_tokens
from .merging import merge_batch_norm_

Norm = partial(nn.BatchNorm2d, eps=1e-6)  # the stem alone has torch's eps in the paper's code
MapAndTokens = Tuple[torch.Tensor, torch.Tensor]  # (B, C, h, w) of the ResNet, (B, 1 + N, D) of the ViT


@register_notrace_module  # it looks at the image's shape
class Stem(nn.Module):
    """timm's ResNet stem, up to its max-pooling. image (B, in_chans, H, W) -> (B, width, H / 2, W / 2)."""

    def __init__(self, in_chans: int, width: int, **dd: Any):
        super().__init__()
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, width, kernel_size=7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.act1 = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checked_images(x, self.in_chans)
        return self.act1(self.bn1(self.conv1(x)))

    def reparameterize(self) -> None:
        """Fold the BatchNorm into its convolution (timm's hook)."""
        merge_batch_norm_(self, 'conv1', 'bn1')


class ConvBlock(Bottleneck):
    """timm's bottleneck block, open in its middle: a map can be added there, and the map made there is returned.

    Args:
        project: The shortcut is a 1x1 convolution and BatchNorm, also where it need not be.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, project: bool = False, **dd: Any):
        shortcut = downsample_conv(in_chs, out_chs, 1, stride=stride, norm_layer=Norm, **dd) if project else None
        super().__init__(in_chs, out_chs // self.expansion, stride, shortcut, norm_layer=Norm, **dd)

    def forward(self, x: torch.Tensor, fused: Optional[torch.Tensor] = None) -> MapAndTokens:
        """Take x (B, C, H, W) and, from the ViT, `fused` (B, C' / 4, H, W) -> the block's map, that of its middle."""
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        if fused is not None:
            x = x + fused
        middle = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(middle))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x), middle

    def reparameterize(self) -> None:
        """Fold the BatchNorms into their convolutions (timm's hook)."""
        for i in (1, 2, 3):
            merge_batch_norm_(self, f'conv{i}', f'bn{i}')
        if self.downsample is not None:
            merge_batch_norm_(self.downsample, '0', '1')


class Down(nn.Module):
    """From the ResNet to the ViT: a map is averaged to one pixel a token, projected and normalised.

    The paper projects the map, by a 1x1 convolution, before it is averaged: the same, in stride^2 as many operations.
    """

    def __init__(self, in_chs: int, embed_dim: int, stride: int, **dd: Any):
        super().__init__()
        self.stride = stride
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.proj = nn.Linear(in_chs, embed_dim, **dd)
        self.norm = LayerNorm(embed_dim, eps=1e-6, **dd)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor, grid: Tuple[int, int]) -> torch.Tensor:
        """x: (B, C, h, w), grid: (H', W') -> patch tokens (B, H' * W', D)."""
        x = self.pool(pad_to(x, (grid[0] * self.stride, grid[1] * self.stride)))
        return self.act(self.norm(self.proj(x.flatten(2).transpose(1, 2))))


class Up(nn.Module):
    """From the ViT to the ResNet: patch tokens are projected, and every one covers stride x stride pixels."""

    def __init__(self, embed_dim: int, out_chs: int, stride: int, **dd: Any):
        super().__init__()
        self.stride = stride
        self.proj = nn.Linear(embed_dim, out_chs, **dd)
        self.norm = Norm(out_chs, **dd)
        self.act = nn.ReLU(inplace=True)

    def forward(self, tokens: torch.Tensor, grid: Tuple[int, int], size: Tuple[int, int]) -> torch.Tensor:
        """tokens: (B, 1 + H' * W', D), grid: (H', W'), size: (h, w) -> (B, C, h, w)."""
        x = self.act(self.norm(unflatten_tokens(self.proj(tokens[:, 1:]), grid)))
        if self.stride > 1:
            x = F.interpolate(x, size=(grid[0] * self.stride, grid[1] * self.stride))
        if is_captured():  # a captured graph would have to prove that a slice is smaller
            return F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))
        return x[:, :, : size[0], : size[1]]

    def reparameterize(self) -> None:
        """Fold the BatchNorm into the projection (timm's hook)."""
        merge_batch_norm_(self, 'proj', 'norm')


class FirstUnit(nn.Module):
    """The paper's unit 1, where the stem's map becomes the ResNet's first map and the ViT's first tokens."""

    def __init__(self, in_chs: int, out_chs: int, embed_dim: int, stride: int, block: nn.Module, **dd: Any):
        super().__init__()
        self.stride = stride
        self.conv_block = ConvBlock(in_chs, out_chs, project=True, **dd)
        self.patch_embed = nn.Conv2d(in_chs, embed_dim, kernel_size=stride, stride=stride, **dd)
        self.block = block

    def forward(self, x: torch.Tensor, tokens: torch.Tensor, grid: Tuple[int, int]) -> MapAndTokens:
        """x: (B, C, h, w), tokens: the class token (B, 1, D) -> map (B, C', h, w), tokens (B, 1 + H' * W', D)."""
        y = self.conv_block(x)[0]  # first, as it is registered: programs pair layers with gradients in this order
        patches = self.patch_embed(pad_to(x, (grid[0] * self.stride, grid[1] * self.stride)))
        tokens = self.block(torch.cat([tokens, patches.flatten(2).transpose(1, 2)], dim=1))
        return y, tokens


class Unit(nn.Module):
    """The paper's units 2 to 12: two blocks of the ResNet and one of the ViT, between which features go both ways."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        embed_dim: int,
        stride: int,
        block: nn.Module,
        conv_stride: int = 1,
        fusion_stride: int = 1,
        **dd: Any,
    ):
        super().__init__()
        self.conv_block = ConvBlock(in_chs, out_chs, conv_stride, project=conv_stride > 1, **dd)
        self.down = Down(out_chs // ConvBlock.expansion, embed_dim, stride, **dd)
        self.block = block
        self.up = Up(embed_dim, out_chs // ConvBlock.expansion, stride, **dd)
        self.fusion_block = ConvBlock(out_chs, out_chs, fusion_stride, project=fusion_stride > 1, **dd)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor, grid: Tuple[int, int]) -> MapAndTokens:
        """x: (B, C, h, w), tokens: (B, 1 + H' * W', D) -> the same of this unit; strides make the map smaller."""
        x, middle = self.conv_block(x)
        # the class token is doubled before every block, as published
        tokens = tokens + torch.cat([tokens[:, :1], self.down(middle, grid)], dim=1)
        tokens = self.block(tokens)
        fused = self.up(tokens, grid, (middle.shape[-2], middle.shape[-1]))
        return self.fusion_block(x, fused)[0], tokens
