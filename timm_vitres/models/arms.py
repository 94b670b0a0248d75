"""The arms of a comparison: a ResNet, a ViT and their hybrids, small, and of about as many parameters as each other.

name -> `ARMS` -> the name of a model, and its arguments. The widths are chosen so that each has, with 10 classes and at
64 pixels, as many parameters as the interleaved arm, to 5%.
"""

import dataclasses
from typing import Any, Dict

import timm


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model to compare.

    Attributes:
        model: A timm model's name.
        text: What it is, in a few words.
        kwargs: Arguments of the model.
        attends: Whether the blocks that attend are kept; without them an interleaved hybrid is its ResNet parent.
    """

    model: str
    text: str
    kwargs: Dict[str, Any] = dataclasses.field(default_factory=dict)
    attends: bool = True

    @property
    def model_kwargs(self) -> Dict[str, Any]:
        """All arguments of the model."""
        if self.attends:
            return self.kwargs
        cfg = timm.create_model(self.model, device='meta', **self.kwargs).cfg
        kept = tuple(depth - len(cfg.attending(stage)) for stage, depth in enumerate(cfg.layers))
        return dict(self.kwargs, layers=kept, attn_blocks=(0,) * len(kept))


ARMS = {
    'resnet': Arm('vitresnet_mix_nano', 'the interleaved arm without its attention, a thin ResNet', attends=False),
    'vit': Arm(
        'vitresnet',
        'six blocks of ViT on patches of 4 pixels',
        dict(backbone='', patch_size=4, embed_dim=132, depth=6, num_heads=3, class_token=False),
    ),
    'serial': Arm('vitresnet_nano', 'three blocks of ViT on the map of a thin ResNet', dict(depth=3)),
    'parallel': Arm(
        'test_vitresnet_dual',
        'a thin ResNet and a ViT side by side that exchange features, as in Conformer',
        dict(channels=(48, 96, 192), stem_width=32, embed_dim=112, depth=6, num_heads=4),
    ),
    'interleaved': Arm('vitresnet_mix_nano', 'a thin ResNet with attention at the end of its last two stages'),
}
