"""Test-time augmentation: a model sees several views of each image, and its logits are averaged.

images -> `averaged` -> logits.
"""

from typing import Iterator, Tuple

import torch
from torch import nn
from torch.nn import functional as F

from .checks import check_choice

TTA = ('', 'flip', 'shift')


def averaged(model: nn.Module, x: torch.Tensor, tta: str = '') -> torch.Tensor:
    """Return the mean of a model's logits over views of each image: (B, C, H, W) -> (B, classes), float32.

    Args:
        model: It returns one logits tensor.
        x: Images as the model takes them.
        tta: '' is the image alone. 'flip' is the image and its mirror image. 'shift' is these two, which count a half,
            and both again of the image moved up and left, and of it moved down and right, which count a quarter each
            (Jordan, arXiv:2404.00498). It is moved by one pixel in 32, and what comes in at the edge is reflected.
            'flip' takes twice the time of '', 'shift' six times; memory is that of one view.

    Raises:
        ValueError: for another `tta`.
    """
    check_choice('tta', tta, TTA)
    logits = [weight * model(view).float() for view, weight in _views(x, tta)]
    return torch.stack(logits).sum(0)


def _views(x: torch.Tensor, tta: str) -> Iterator[Tuple[torch.Tensor, float]]:
    """Yield the views of a batch one by one, each with its weight; the weights add up to 1."""
    if not tta:
        yield x, 1.0
        return
    shifted = [(x, 1.0)]
    if tta == 'shift':
        height, width = x.shape[-2:]
        rows, columns = _shift(height), _shift(width)
        around = F.pad(x, (columns, columns, rows, rows), mode='reflect')
        up_left = around[..., 2 * rows :, 2 * columns :]
        down_right = around[..., :height, :width]
        shifted = [(x, 0.5), (up_left, 0.25), (down_right, 0.25)]
    for view, weight in shifted:
        yield view, weight / 2
        yield view.flip(-1), weight / 2


def _shift(side: int) -> int:
    """Return how far a side of so many pixels is moved; a single pixel has nothing beside it to reflect."""
    return min(max(1, round(side / 32)), side - 1)
