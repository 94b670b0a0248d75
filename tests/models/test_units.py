"""Units of the parallel family are the paper's: timm's bottleneck, and projections that are cheaper, but the same."""

from functools import partial

import timm
import torch
import torch.nn.functional as F
from conformer_reference import fill_
from conftest import relative_difference
from torch import nn

from timm_vitres.models.units import ConvBlock, Down, Up


def test_a_token_over_the_edge_sees_the_last_pixels_again():
    """What goes down and up at a size that the tokens do not divide."""
    down, up = fill_(Down(8, 12, 4)), fill_(Up(12, 8, 4))
    x, tokens, grid = torch.randn(2, 8, 13, 10), torch.randn(2, 1 + 4 * 3, 12), (4, 3)
    with torch.inference_mode():
        padded = F.pad(x, (0, 2, 0, 3), mode='replicate')
        assert torch.equal(down(x, grid), down(padded, grid))
        # as published: projected by a 1x1 convolution, averaged, normalised
        projected = F.conv2d(padded, down.proj.weight[:, :, None, None], down.proj.bias)
        published = F.gelu(down.norm(F.avg_pool2d(projected, 4).flatten(2).transpose(1, 2)))
        torch.testing.assert_close(down(x, grid), published)
        whole, cut = up(tokens, grid, (16, 12)), up(tokens, grid, (13, 10))
        assert torch.equal(whole[:, :, :13, :10], cut)
        blocks = whole.unfold(2, 4, 4).unfold(3, 4, 4).flatten(-2)
        assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))


def test_the_block_is_timms_bottleneck_but_for_its_middle():
    block = fill_(ConvBlock(16, 32, stride=2, project=True))
    norm_layer = partial(nn.BatchNorm2d, eps=1e-6)
    reference = timm.models.resnet.Bottleneck(16, 8, 2, block.downsample, norm_layer=norm_layer).eval()
    reference.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 9, 9)
    with torch.inference_mode():
        out, middle = block(x)
        assert relative_difference(reference(x), out) < 1e-5
        assert middle.shape == (2, 8, 5, 5)
        torch.testing.assert_close(block(x, torch.zeros(2, 8, 9, 9))[0], out)
        assert relative_difference(block(x, torch.ones(2, 8, 9, 9))[0], out) > 0.01
