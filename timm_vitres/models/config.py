"""What an architecture is, in plain values, and the checks that name a wrong one.

A config is what a variant declares, what keyword arguments override, and what a saved model remembers.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Optional, Tuple, Union

from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked, make_divisible

from ..checks import (
    Activation,
    Count,
    Factor,
    MapNorm,
    PatchSide,
    Ratio,
    Rule,
    TokenNorm,
    Width,
    annotations_of,
    between,
    conform,
)

GlobalPool = Literal['', 'avg', 'avgmax', 'max', 'token', 'map', 'prr']
StemType = Literal['', 'deep', 'deep_tiered', 'tiered', 'fixed', 'deep_fixed', 'same', 'deep_same']
DualGlobalPool = Literal['', 'avg', 'token']
MapGlobalPool = Literal['', 'avg', 'max', 'avgmax', 'catavgmax']
NO_CLASS_TOKEN = "global_pool: got 'token', but the model has no class token; use 'avg', 'max' or 'avgmax'."
MLP_LAYERS = {'mlp': Mlp, 'glu': GluMlp, 'swiglu': SwiGLU, 'swiglupacked': SwiGLUPacked}
Scale = Annotated[float, between(0, 1000.0, above=True)]
Eps = Annotated[float, between(0, 1.0, above=True)]
OddSide = Annotated[int, Rule(lambda side: side in range(1, 32, 2), 'an odd number from 1 to 31')]
PatchSize = Union[PatchSide, Tuple[PatchSide, PatchSide]]
Index = Annotated[int, between(0, 511)]


@dataclass(frozen=True)
class VitResNetCfg:
    """A serial hybrid in plain values. None: what the backbone, or timm's ViT, has by itself.

    Raises:
        ValueError: for a value that no model has; the message names the field, the value and what is allowed.
    """

    # The ResNet
    backbone: str = 'resnet26d'  # a timm ResNet's name, 'resnetv2' (that of the R+ViT checkpoints), '' for none
    stage: Optional[Annotated[int, between(0, 4)]] = None  # the last stage kept; 0 keeps the stem alone
    # Its measures, in timm's words for `ResNet` and `ResNetV2`
    layers: Optional[Tuple[Count, ...]] = None  # blocks of each stage
    channels: Optional[Tuple[Width, ...]] = None  # width of each stage (timm's ResNet: before the block's expansion)
    block: Optional[Literal['basic', 'bottleneck']] = None
    # 4; 2 leaves out the pooling; 1 makes the first convolution's stride 1, too
    stem_stride: Optional[Literal[1, 2, 4]] = None
    stem_type: Optional[StemType] = None  # ResNet: '', 'deep' or 'deep_tiered'; ResNetV2: all but 'deep_tiered'
    stem_width: Optional[Width] = None  # ResNet: width of a deep stem's first convolutions, half that of its last
    stem_chs: Optional[Width] = None  # ResNetV2: width of the stem
    replace_stem_pool: Optional[bool] = None  # ResNet: a convolution instead of the stem's max-pooling
    avg_down: Optional[bool] = None  # average pooling in the shortcuts
    cardinality: Optional[Factor] = None  # ResNet: groups of the 3x3 convolutions
    base_width: Optional[Factor] = None  # ResNet: bottleneck width factor
    block_reduce_first: Optional[Factor] = None  # ResNet: divisor of a block's first width
    down_kernel_size: Optional[OddSide] = None  # ResNet: kernel size in the shortcuts
    width_factor: Optional[Factor] = None  # ResNetV2: factor on all widths
    bottle_ratio: Optional[Ratio] = None  # ResNetV2: bottleneck width / block width
    preact: Optional[bool] = None  # ResNetV2: norm and activation before the convolutions
    output_stride: Optional[Literal[8, 16, 32]] = None  # stride of the tokens, kept by dilation in place of strides
    backbone_norm_layer: Optional[MapNorm] = None
    backbone_act_layer: Optional[Activation] = None
    # added to the variance of weights that are standardised; None: what the backbone has, 1e-8 with 'resnetv2'
    std_conv_eps: Optional[Eps] = None
    # The ViT
    patch_size: Optional[PatchSize] = None  # in pixels of the ResNet's map; 1, without a backbone 16
    embed_dim: Optional[Width] = None  # 384; with depth=0 it is the ResNet's width
    depth: Annotated[int, between(0, 512)] = 12  # blocks; 0 is the ResNet alone
    num_heads: Width = 6
    mlp_ratio: Ratio = 4.0
    class_token: Optional[bool] = None  # yes, but not with depth=0
    reg_tokens: Annotated[int, between(0, 1024)] = 0  # register tokens
    global_pool: Optional[GlobalPool] = None  # 'token' with a class token, else 'avg'
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True
    init_values: Optional[Scale] = None  # LayerScale's initial value; None leaves LayerScale out
    pre_norm: bool = False  # norm before the blocks (CLIP)
    final_norm: bool = True  # norm after the blocks
    fc_norm: Optional[bool] = None  # the final norm comes after pooling; None: where pooling is 'avg', 'max', 'avgmax'
    no_embed_class: bool = False  # prefix tokens have no position embedding
    # how the position table is fitted to a smaller grid; cropped, it serves none that is larger
    pos_embed_fit: Literal['resample', 'crop'] = 'resample'
    norm_layer: Optional[TokenNorm] = None
    act_layer: Optional[Activation] = None
    mlp_layer: Optional[Literal['mlp', 'glu', 'swiglu', 'swiglupacked']] = None

    def __post_init__(self):
        _conform_fields(self)
        if self.depth == 0 and not self.backbone:
            raise ValueError("depth: got 0 with backbone='', which leaves nothing; give a backbone or a depth above 0.")


@dataclass(frozen=True)
class VitResNetDualCfg:
    """A parallel hybrid in plain values: `depth` units of ResNet and ViT, a third of them in each ResNet stage.

    Raises:
        ValueError: for a value that no model has; the message names the field, the value and what is allowed.
    """

    patch_size: PatchSide = 16  # pixels a side of a token: 16, or a multiple of it
    channels: Tuple[Width, Width, Width] = (256, 512, 1024)  # width of the ResNet's stages, of stride 4, 8 and 16
    stem_width: Width = 64
    embed_dim: Width = 384  # width of the tokens
    depth: Count = 12
    num_heads: Width = 6
    mlp_ratio: Ratio = 4.0
    qkv_bias: bool = True
    # how tokens are pooled: 'token' takes the class token; '' returns map and tokens as they are
    global_pool: DualGlobalPool = 'token'

    def __post_init__(self):
        _conform_fields(self)
        if self.patch_size % 16:
            raise ValueError(f'patch_size: got {self.patch_size}, expected a multiple of 16, the stride of stage 3.')
        if any(width % 4 for width in self.channels):
            raise ValueError(f'channels: got {self.channels}, expected three multiples of 4, one for each stage.')
        if self.depth % 3 or self.depth < 6:
            raise ValueError(f'depth: got {self.depth}, expected a multiple of 3 from 6 up: a third for each stage.')
        check_block(self.embed_dim, self.num_heads, self.mlp_ratio)


@dataclass(frozen=True)
class VitResNetMixCfg:
    """An interleaved hybrid in plain values: a ResNet of timm's `ByobNet`, some of whose blocks attend.

    Where a field takes one value or a tuple, the tuple has one for each stage.

    Raises:
        ValueError: for a value that no model has; the message names the field, the value and what is allowed.
    """

    layers: Tuple[Count, ...] = (2, 2, 2, 2)  # blocks of each stage
    channels: Tuple[Width, ...] = (256, 512, 1024, 2048)  # width of the map that each stage returns
    strides: Tuple[Literal[1, 2], ...] = (1, 2, 2, 2)
    # how many of a stage's last blocks attend, or which ones, counted from 0: (0, 1, (1, 3, 5), 2)
    attn_blocks: Tuple[Union[Index, Tuple[Index, ...]], ...] = (0, 0, 1, 2)
    # The blocks
    block: Literal['basic', 'bottleneck'] = 'bottleneck'  # those that do not attend
    bottle_ratio: Union[Ratio, Tuple[Ratio, ...]] = 0.25  # width inside a block / width of its map
    attn_ratio: Union[None, Ratio, Tuple[Ratio, ...]] = None  # the same of the blocks that attend; None: bottle_ratio
    group_size: Annotated[int, between(0, 16384)] = 0  # channels of a group of the 3x3 convolutions; 0 for no groups
    num_heads: Union[Width, Tuple[Width, ...]] = 4
    dim_head: Optional[Width] = None  # width of a head's queries and keys; None: that of its values
    qkv_bias: bool = False
    channel_attn: Optional[Literal['se', 'ese', 'eca', 'gca']] = None  # of the blocks that do not attend
    downsample: Literal['conv1x1', 'avg'] = 'conv1x1'  # in the shortcuts
    act_layer: Activation = 'relu'
    # The stem
    stem_type: Literal['', 'tiered', 'deep', 'quad', '7x7'] = 'tiered'  # '' is one 3x3 convolution
    stem_pool: Literal['', 'max', 'avg'] = 'max'
    stem_chs: Width = 64
    stem_stride: Optional[Literal[1, 2, 4]] = None  # None: what type and pooling give; a smaller one leaves out strides
    # The whole
    output_stride: Literal[8, 16, 32] = 32  # kept by dilation in place of strides
    num_features: Annotated[int, between(0, 16384)] = 0  # width of a last 1x1 convolution; 0 for none
    global_pool: MapGlobalPool = 'avg'

    def __post_init__(self):
        _conform_fields(self)
        number = len(self.layers)
        if not 2 <= number <= 8:
            raise ValueError(f'layers: got {self.layers}, expected the blocks of 2 to 8 stages.')
        for name in ('channels', 'strides', 'attn_blocks', 'bottle_ratio', 'attn_ratio', 'num_heads'):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != number:
                raise ValueError(f'{name}: got {value}, expected {number} values, one for each stage of layers.')
        if any(width % 8 for width in self.channels):
            raise ValueError(f'channels: got {self.channels}, expected multiples of 8.')
        if (self.stem_stride or 1) > self.own_stem_stride:
            raise ValueError(
                f'stem_stride: got {self.stem_stride}, but a stem of type {self.stem_type!r} without pooling has '
                f'{self.own_stem_stride}.'
            )
        least = dict(tiered=3, quad=5).get(self.stem_type, 1)  # of which timm makes a first layer's width, rounded
        if self.stem_chs < least:
            raise ValueError(
                f'stem_chs: got {self.stem_chs}, expected {least} or more for stem_type {self.stem_type!r}.'
            )
        if (self.stem_stride or self.own_stem_stride) * math.prod(self.strides) == 1:
            raise ValueError(f'strides: got {self.strides} behind a stem of stride 1, expected one of 2 or more.')
        for stage in range(number):
            self._check_stage(stage)

    @property
    def own_stem_stride(self) -> int:
        """The stride of the stem without `stem_stride`."""
        return 4 if self.stem_pool or self.stem_type not in ('', '7x7') else 2

    def of_stage(self, name: str, stage: int) -> Any:
        """Return a stage's value of a field that takes one value, or one for each stage."""
        value = getattr(self, name)
        return value[stage] if isinstance(value, tuple) else value

    def attending(self, stage: int) -> Tuple[int, ...]:
        """Return which blocks of a stage attend, by their indices."""
        depth, blocks = self.layers[stage], self.attn_blocks[stage]
        return tuple(range(depth - blocks, depth)) if isinstance(blocks, int) else tuple(sorted(blocks))

    def inner_ratio(self, stage: int, attends: bool) -> float:
        """Return the width inside the blocks of a stage, those that attend, or the others, by that of its map."""
        return self.of_stage('attn_ratio' if attends and self.attn_ratio is not None else 'bottle_ratio', stage)

    def _check_stage(self, stage: int) -> None:
        """Raise ValueError unless the measures of a stage fit together."""
        depth, attending = self.layers[stage], self.attending(stage)
        if not set(attending) <= set(range(depth)) or len(set(attending)) < len(attending):
            raise ValueError(
                f'attn_blocks: got {self.attn_blocks}, but stage {stage} (from 0) has {depth} blocks; expected at most '
                f'so many, or their indices.'
            )
        width, attn_width = (  # as timm rounds them
            make_divisible(self.channels[stage] * self.inner_ratio(stage, attends)) for attends in (False, True)
        )
        heads = self.of_stage('num_heads', stage)
        if len(attending) < depth and self.group_size and width % self.group_size:
            raise ValueError(
                f'group_size: got {self.group_size}, which does not divide {width}, the width inside the blocks of '
                f'stage {stage} (from 0).'
            )
        if len(attending) < depth and self.group_size and self.block == 'basic':
            groups = width // self.group_size
            if self.channels[stage] % groups:  # of which its second convolution has as many
                raise ValueError(
                    f'group_size: got {self.group_size}, which makes {groups} groups in blocks of stage {stage} '
                    f'(from 0), by which its channels, {self.channels[stage]}, can not be divided.'
                )
        if attending and attn_width % heads:
            raise ValueError(
                f'num_heads: got {self.num_heads}, but {heads} does not divide {attn_width}, the width inside the '
                f'attending blocks of stage {stage} (from 0).'
            )


def _conform_fields(cfg: Any) -> None:
    """Make every field of a frozen config what its annotation says, or raise ValueError."""
    for name, annotation in annotations_of(type(cfg)).items():
        object.__setattr__(cfg, name, conform(name, getattr(cfg, name), annotation))


def check_block(embed_dim: int, num_heads: int, mlp_ratio: float, mlp_layer: Optional[str] = None) -> None:
    """Raise ValueError unless the measures of a ViT's block fit together."""
    if embed_dim % num_heads:
        raise ValueError(
            f'num_heads: got {num_heads}, which does not divide embed_dim ({embed_dim}); '
            f'embed_dim must be a multiple of num_heads.'
        )
    hidden = int(embed_dim * mlp_ratio)
    if not 1 <= hidden <= 2**18 or (mlp_layer in ('glu', 'swiglupacked') and hidden % 2):
        raise ValueError(
            f'mlp_ratio: got {mlp_ratio}, which makes {hidden} hidden features of embed_dim ({embed_dim}); expected '
            f'from 1 to {2**18}, and an even number for glu and swiglupacked.'
        )


def check_pooling(global_pool: str, num_classes: int) -> None:
    """Raise ValueError for a head without pooling: it classifies pooled features."""
    if global_pool == '' and num_classes > 0:
        raise ValueError(
            f"global_pool: got '' with num_classes={num_classes}, but only a model without classes can leave its map "
            f"unpooled; use num_classes=0, or global_pool='avg'."
        )
