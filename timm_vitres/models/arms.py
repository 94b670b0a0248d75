"""The arms of a comparison: a ResNet, a ViT and their hybrids, small, and of about as many parameters as each other.

name -> `ARMS` -> the name of a model, and its arguments for images of a size. The widths are chosen so that each has,
with 10 classes and at 64 pixels, as many parameters as the interleaved arm, to 5%.

What comes before the stages of a ResNet, and the side of a patch, grow with the images, as in ResNets and ViTs made for
CIFAR and for ImageNet: a step of training on 64 pixels then costs about as much as one on 28.
"""

import dataclasses
from typing import Any, Callable, Dict, Tuple

MANY_PIXELS = 48  # images with as many a side begin at a stride of 4, smaller ones at 2


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model to compare.

    Attributes:
        model: A timm model's name.
        text: What it is, in a few words.
        kwargs: Arguments of the model, for the stride at which its stages begin.
    """

    model: str
    text: str
    kwargs: Callable[[int], Dict[str, Any]]

    def model_kwargs(self, img_size: int) -> Dict[str, Any]:
        """Return all arguments of the model for images of so many pixels a side."""
        return self.kwargs(4 if img_size >= MANY_PIXELS else 2)


def _mix(stride: int, layers: Tuple[int, ...], attn_blocks: Tuple[int, ...]) -> Dict[str, Any]:
    """Return a ResNet of three stages, some of whose last blocks attend."""
    stem = dict(stem_chs=48, stem_stride=stride, stem_pool='max' if stride == 4 else '')
    return dict(layers=layers, channels=(48, 96, 160), strides=(1, 2, 2), attn_blocks=attn_blocks, **stem)


def _vit(stride: int) -> Dict[str, Any]:
    return dict(backbone='', patch_size=2 * stride, embed_dim=132, depth=6, num_heads=3, class_token=False)


def _dual(_: int) -> Dict[str, Any]:
    return dict(channels=(48, 96, 192), stem_width=32, embed_dim=112, depth=6, num_heads=4)


ARMS = {
    'resnet': Arm(
        'vitresnet_mix_nano',
        'a thin ResNet: the interleaved arm without attention',
        lambda stride: _mix(stride, (2, 2, 2), (0, 0, 0)),
    ),
    'vit': Arm('vitresnet', 'six blocks of ViT on patches of 4 pixels, from 48 pixels of 8', _vit),
    'serial': Arm(
        'vitresnet_nano',
        'three blocks of ViT on the map of a thin ResNet',
        lambda stride: dict(depth=3, stem_stride=stride),
    ),
    'parallel': Arm(
        'vitresnet_dual',
        'a thin ResNet and a ViT side by side that exchange features, as in Conformer',
        _dual,
    ),
    'interleaved': Arm(
        'vitresnet_mix_nano',
        'a thin ResNet with a block of attention at the end of its last two stages',
        lambda stride: _mix(stride, (2, 3, 3), (0, 1, 1)),
    ),
}
