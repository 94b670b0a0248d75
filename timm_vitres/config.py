"""What an architecture is, in plain values, and the checks that name a wrong one.

A config is what a variant declares, what keyword arguments override, and what a saved model remembers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional, Tuple, Union

from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked, get_act_layer, get_norm_layer

GLOBAL_POOLS = ('', 'avg', 'avgmax', 'max', 'token', 'map', 'prr')
DUAL_GLOBAL_POOLS = ('', 'avg', 'token')
NO_CLASS_TOKEN = "global_pool: got 'token', but the model has no class token; use 'avg', 'max' or 'avgmax'."
MLP_LAYERS = {'mlp': Mlp, 'glu': GluMlp, 'swiglu': SwiGLU, 'swiglupacked': SwiGLUPacked}


@dataclass(frozen=True)
class VitResNetCfg:
    """A serial hybrid in plain values. None: what the backbone, or timm's ViT, has by itself.

    Raises:
        ValueError: for a value that no model has; the message names the field, the value and what is allowed.
    """

    # The ResNet
    backbone: str = 'resnet26d'  # a timm ResNet's name, 'resnetv2' (that of the R+ViT checkpoints), '' for none
    stage: Optional[int] = None  # the last stage kept; 0 keeps the stem alone
    # Its measures, in timm's words for `ResNet` and `ResNetV2`
    layers: Optional[Tuple[int, ...]] = None  # blocks of each stage
    channels: Optional[Tuple[int, ...]] = None  # width of each stage (of timm's ResNet: before the block's expansion)
    block: Optional[str] = None  # 'basic' or 'bottleneck'
    stem_stride: Optional[int] = None  # 4; 2 leaves out the pooling; 1 makes the first convolution's stride 1, too
    stem_type: Optional[str] = None  # '', 'deep', 'deep_tiered'; ResNetV2 also: 'same', 'fixed', 'deep_same', ...
    stem_width: Optional[int] = None  # ResNet: width of a deep stem's first convolutions, half that of its last
    stem_chs: Optional[int] = None  # ResNetV2: width of the stem
    replace_stem_pool: Optional[bool] = None  # ResNet: a convolution instead of the stem's max-pooling
    avg_down: Optional[bool] = None  # average pooling in the shortcuts
    cardinality: Optional[int] = None  # ResNet: groups of the 3x3 convolutions
    base_width: Optional[int] = None  # ResNet: bottleneck width factor
    block_reduce_first: Optional[int] = None  # ResNet: divisor of a block's first width
    down_kernel_size: Optional[int] = None  # ResNet: kernel size in the shortcuts
    width_factor: Optional[int] = None  # ResNetV2: factor on all widths
    bottle_ratio: Optional[float] = None  # ResNetV2: bottleneck width / block width
    preact: Optional[bool] = None  # ResNetV2: norm and activation before the convolutions
    output_stride: Optional[int] = None  # of the tokens: 32, 16 or 8, kept by dilation in place of strides
    backbone_norm_layer: Optional[str] = None
    backbone_act_layer: Optional[str] = None
    # The ViT
    patch_size: Union[None, int, Tuple[int, int]] = None  # in pixels of the ResNet's map; 1, without a backbone 16
    embed_dim: Optional[int] = None  # 384; with depth=0 it is the ResNet's width
    depth: int = 12  # blocks; 0 is the ResNet alone
    num_heads: int = 6
    mlp_ratio: float = 4.0
    class_token: Optional[bool] = None  # yes, but not with depth=0
    reg_tokens: int = 0  # register tokens
    global_pool: Optional[str] = None  # 'token' with a class token, else 'avg'
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True
    init_values: Optional[float] = None  # LayerScale's initial value; None leaves LayerScale out
    pre_norm: bool = False  # norm before the blocks (CLIP)
    final_norm: bool = True  # norm after the blocks
    fc_norm: Optional[bool] = None  # the final norm comes after pooling; None: where pooling is 'avg', 'max', 'avgmax'
    no_embed_class: bool = False  # prefix tokens have no position embedding
    norm_layer: Optional[str] = None
    act_layer: Optional[str] = None
    mlp_layer: Optional[str] = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # from JSON
                object.__setattr__(self, field.name, tuple(value))
        for name in ('layers', 'channels', 'patch_size'):
            check_positive(name, getattr(self, name))
        for name in ('embed_dim', 'num_heads', 'mlp_ratio', 'stem_width', 'stem_chs', 'width_factor', 'bottle_ratio'):
            check_positive(name, getattr(self, name))
        for name in ('depth', 'reg_tokens'):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f'{name}: got {value!r}, expected a whole number from 0 up.')
        check_choice('block', self.block, (None, 'basic', 'bottleneck'))
        check_choice('stem_stride', self.stem_stride, (None, 1, 2, 4))
        check_choice('output_stride', self.output_stride, (None, 8, 16, 32))
        check_choice('global_pool', self.global_pool, (None, *GLOBAL_POOLS))
        check_choice('mlp_layer', self.mlp_layer, (None, *MLP_LAYERS))
        for name in ('norm_layer', 'backbone_norm_layer'):
            check_named(name, getattr(self, name), get_norm_layer)
        for name in ('act_layer', 'backbone_act_layer'):
            check_named(name, getattr(self, name), get_act_layer)
        if self.depth == 0 and not self.backbone:
            raise ValueError("depth: got 0 with backbone='', which leaves nothing; give a backbone or a depth above 0.")


@dataclass(frozen=True)
class VitResNetDualCfg:
    """A parallel hybrid in plain values: `depth` units of ResNet and ViT, a third of them in each ResNet stage.

    Raises:
        ValueError: for a value that no model has; the message names the field, the value and what is allowed.
    """

    patch_size: int = 16  # pixels a side of a token: 16, or a multiple of it
    channels: Tuple[int, ...] = (256, 512, 1024)  # width of the ResNet's stages, of stride 4, 8 and 16
    stem_width: int = 64
    embed_dim: int = 384  # width of the tokens
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    global_pool: str = 'token'  # of the tokens: the class token, or 'avg'; '' returns map and tokens as they are

    def __post_init__(self):
        if isinstance(self.channels, list):  # from JSON
            object.__setattr__(self, 'channels', tuple(self.channels))
        for name in ('patch_size', 'channels', 'stem_width', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio'):
            check_positive(name, getattr(self, name))
        for name in ('patch_size', 'stem_width', 'embed_dim', 'depth', 'num_heads'):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f'{name}: got {getattr(self, name)!r}, expected a whole number.')
        if self.patch_size % 16:
            raise ValueError(f'patch_size: got {self.patch_size}, expected a multiple of 16, the stride of stage 3.')
        if len(self.channels) != 3 or any(width % 4 for width in self.channels):
            raise ValueError(f'channels: got {self.channels}, expected three multiples of 4, one for each stage.')
        if self.depth % 3 or self.depth < 6:
            raise ValueError(f'depth: got {self.depth}, expected a multiple of 3 from 6 up: a third for each stage.')
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f'num_heads: got {self.num_heads}, which does not divide embed_dim ({self.embed_dim}); '
                f'embed_dim must be a multiple of num_heads.'
            )
        check_choice('global_pool', self.global_pool, DUAL_GLOBAL_POOLS)


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless a value, or every value of a tuple, is a number above 0; None is none."""
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and (isinstance(number, (str, bool)) or not number > 0):
            raise ValueError(f'{name}: got {value!r}, expected numbers above 0.')


def check_choice(name: str, value: Any, choices: Tuple[Any, ...]) -> None:
    """Raise ValueError unless a value is one of `choices`."""
    if value not in choices:
        allowed = ', '.join(repr(choice) for choice in choices if choice is not None)
        raise ValueError(f'{name}: got {value!r}, expected one of {allowed}.')


def check_named(name: str, value: Optional[str], find) -> None:
    """Raise ValueError unless `find`, of timm.layers, knows a name."""
    try:
        find(value)
    except (KeyError, AssertionError):
        raise ValueError(
            f'{name}: got {value!r}, which is not a name that timm.layers.{find.__name__} knows.'
        ) from None


def check_rates(**rates: float) -> None:
    """Raise ValueError unless every rate is from 0 up to, but not including, 1."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f'{name}: got {rate}, expected a number from 0 up to, but not including, 1.')
