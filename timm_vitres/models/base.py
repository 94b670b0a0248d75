"""What every family answers for itself, and how a hybrid takes weights in.

Other modules ask a `Hybrid`: which convolution sees the image, which layers are heads, how tables of another size are
fitted, which parts a picture explains, what sizes it takes. No module outside of the families names one of them.
"""

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type, Union

import torch
from timm.models.vision_transformer import get_init_weights_vit
from torch import nn

from ..checks import check_choice
from ..weights.checkpoints import read_checkpoint
from ..weights.comparison import add_batch_counts, check_dtypes, check_keys
from ..weights.layouts import StateDict, convert_layout, widened
from .layers import check_images

LABEL_KEYS = ('label_names', 'label_descriptions')  # where a pretrained cfg has the names of classes


class ImageSizes(NamedTuple):
    """Which heights and widths, in pixels, a model takes in a graph that serves them all."""

    stride: int  # the deepest map has one pixel for so many of the image's
    multiple: int  # height and width must be multiples of it; 1 where every size is taken
    largest: Optional[Tuple[int, int]] = None  # height and width up to which images are taken; None for any


class ExplainedParts(NamedTuple):
    """Where a picture looks into the two parts of a hybrid."""

    resnet: Optional[nn.Module]  # returns a map, or a tuple that begins with one; None where there is no ResNet
    resnet_stride: Tuple[int, int]
    attentions: List[nn.Module]  # the layers of the ViT that attend to the same tokens, from the first to the last
    num_prefix_tokens: int
    class_token: bool  # whether the head sees a class token
    token_stride: Tuple[int, int]


class Hybrid(nn.Module):
    """The base class of all families: what others ask of a model, and how it takes weights in.

    Weights may have any layout, and tables any size; nothing is left out silently.

    Attributes:
        families: Every class of hybrids that was defined.
        variants: Names of the registered architectures of a family.
        foreign_names: Regular expression for an architecture's name elsewhere -> the variant that loads its weights.
        resnet_names: Regular expression for the beginning of the names of the parameters that are the ResNet's.
        vit_names: The same of those that are the ViT's; what couples both, and heads, are of neither.
        tables: How the names of what is fitted to an image size end.
        feature_classes: timm's wrappers that can return the family's features, or some: 'list' and 'dict' take modules
            in a row, and 'fx', of the serial family, single blocks.
        num_pyramid: How many of `feature_info` are the pyramid.
    """

    families: ClassVar[List[Type['Hybrid']]] = []
    variants: ClassVar[Sequence[str]] = ()
    foreign_names: ClassVar[Dict[str, str]] = {}
    tables: ClassVar[Tuple[str, ...]] = ()
    resnet_names: ClassVar[str]
    vit_names: ClassVar[str]
    feature_classes: ClassVar[Tuple[str, ...]] = ('getter', 'hook', 'fx')
    num_pyramid: int
    weight_init_mode: str  # timm's name for how the head of a ViT is initialised
    folded: bool = False  # whether `fold` made it
    __jit_unused_properties__ = ['_model_args', 'first_conv', 'heads']

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        Hybrid.families.append(cls)

    @property
    def first_conv(self) -> str:
        """Name of the convolution that sees the image."""
        return self._traits['first_conv']  # pyright: ignore[reportReturnType]

    @property
    def heads(self) -> Tuple[str, ...]:
        """Names of the layers that classify."""
        return self._traits['classifier']  # pyright: ignore[reportReturnType]

    @torch.jit.ignore
    def head_keys(self) -> List[str]:
        """Return the names of the tensors of the head, or of the heads."""
        return [f'{head}.{tensor}' for head in self.heads for tensor in ('weight', 'bias')]

    @torch.jit.ignore
    def fit_tables(self, state_dict: StateDict, img_size: Optional[Sequence[int]] = None) -> StateDict:
        """Return a state dict in our layout whose tables (positions, patches) have the sizes of this model's.

        Args:
            img_size: Height and width that the state dict was made for, where they are known.

        Raises:
            RuntimeError: for a table that can't be fitted.
        """
        return dict(state_dict)

    @torch.jit.ignore
    def table_size(self, state_dict: StateDict, candidates: Sequence[Any] = ()) -> Any:
        """Return the `img_size` with which a model like this has tables as large as a state dict's; None for any.

        Args:
            candidates: Sizes, or None, of which the first that fits is returned; else the size of a square grid is.

        Raises:
            ValueError: for a table that fits none of them and is of no square grid.
        """
        return None

    @torch.jit.ignore
    def image_sizes(self) -> ImageSizes:
        """Return which sizes an exported graph must keep to."""
        return ImageSizes(max(info['reduction'] for info in self.feature_info), 1)  # pyright: ignore

    @torch.jit.ignore
    def check_input(self, x: torch.Tensor) -> None:
        """Raise ValueError for what the forward pass refuses; another program that runs a model's graph asks, too."""
        check_images(x, self.in_chans)  # pyright: ignore

    @torch.jit.ignore
    def size_of_tokens(self, source_cfg: Any, img_size: Sequence[int]) -> Sequence[int]:
        """Return the height and width of images of which this model makes as many tokens as another does of its own.

        Args:
            source_cfg: That of the other, a model of the same family, whose position table is to be fitted.
            img_size: Height and width that the other's table is made for.
        """
        return img_size

    @torch.jit.ignore
    def explained_parts(self) -> ExplainedParts:
        """Return the parts of which `explain` draws pictures."""
        raise NotImplementedError

    @torch.jit.ignore
    def init_head_(self, name: str) -> None:
        """Initialise one of `heads`, which is new, as the constructor does."""
        mode = self.weight_init_mode
        init = get_init_weights_vit(mode, -math.log(self.num_classes) if 'nlhb' in mode else 0.0)
        init(self.get_submodule(name), name)

    @torch.jit.ignore
    def train_one_head(self, head: str) -> None:
        """Set every head but the one of this name to zero, and freeze it, so that the sum of logits is that one's."""
        check_choice('head', head, tuple(self.heads))
        for name in self.heads:
            for parameter in self.get_submodule(name).parameters() if name != head else ():
                nn.init.zeros_(parameter).requires_grad_(False)

    def train(self, mode: bool = True):
        """Set training mode, as torch does.

        Raises:
            ValueError: for a model that `fold` made.
        """
        if mode and self.folded:
            raise ValueError('model: it is folded for inference, and has nothing left to train; train the original.')
        return super().train(mode)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Load as torch does; other layouts (see `layouts`) are converted, tables of other sizes resampled.

        A table with as many tokens as the model's is taken as it is: a state dict does not say what its grid was.

        Raises:
            RuntimeError: for wrong keys and shapes, as torch's, and for weights that are no floating-point numbers.
            TypeError, ValueError: for what is no dict of names with tensors, and for a model that `fold` made.
        """
        if self.folded:
            raise ValueError('model: it is folded for inference; load the weights into an original, and fold that.')
        if not isinstance(state_dict, Mapping):
            raise TypeError(f'state_dict: got {type(state_dict).__name__}, expected a dict of names with tensors.')
        # torch's quantised layers store tuples and dtypes, too
        own = {} if all(map(torch.is_tensor, state_dict.values())) else self.state_dict()
        keys = {key for key, value in own.items() if not torch.is_tensor(value)}
        others = {key: value for key, value in state_dict.items() if key in keys}
        converted = convert_layout({key: value for key, value in state_dict.items() if key not in others})
        check_dtypes(converted, self)
        if not assign:  # else the model takes the file's dtype
            converted = widened(converted, next((own.dtype for own in self.parameters()), torch.float32))
        converted = OrderedDict({**self.fit_tables(converted), **others})
        if hasattr(state_dict, '_metadata'):  # torch keeps the versions of its modules there
            converted._metadata = state_dict._metadata  # pyright: ignore[reportAttributeAccessIssue]
        return super().load_state_dict(converted, strict=strict, assign=assign)

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: Union[str, Path], prefix: str = '') -> None:
        """Load a checkpoint file of any layout, Google's npz too, which must have the model's classes and channels."""
        state_dict, _ = read_checkpoint(Path(checkpoint_path))
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        state_dict = widened(convert_layout(state_dict), next(self.parameters()).dtype)
        state_dict = add_batch_counts(self.fit_tables(state_dict), self)
        check_keys(state_dict, self)
        self.load_state_dict(state_dict)

    @torch.jit.ignore
    def filter_state_dict(self, state_dict: Dict[str, Any], img_size: Optional[Sequence[int]] = None) -> StateDict:
        """Return a state dict of any layout in ours, completed, its tables fitted, and compared with this model.

        Args:
            img_size: Height and width that the state dict was made for, where they are known.

        Raises:
            RuntimeError: for missing or unexpected keys, wrong shapes and dtypes, all of which it lists; the shapes of
                the heads and of the first convolution excepted, which are the caller's to compare.
        """
        state_dict = add_batch_counts(convert_layout(state_dict), self)
        check_dtypes(state_dict, self)
        try:
            state_dict = self.fit_tables(state_dict, img_size)
        except RuntimeError:  # because of tokens that it lacks, or has besides
            self.check_without_tables(state_dict)
            raise
        check_keys(state_dict, self, {*self.head_keys(), f'{self.first_conv}.weight'})
        return state_dict

    @torch.jit.ignore
    def check_without_tables(self, state_dict: StateDict) -> None:
        """Raise RuntimeError as `filter_state_dict` does, before tables are fitted, which are left out."""
        others = {key for key in self.state_dict() if key.endswith(self.tables)}
        check_keys(add_batch_counts(state_dict, self), self, {*self.head_keys(), f'{self.first_conv}.weight', *others})

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head as timm does, and forget what the old one's classes were called."""
        super().reset_classifier(num_classes, global_pool)  # pyright: ignore[reportAttributeAccessIssue]
        self.forget_labels()

    @torch.jit.ignore
    def forget_labels(self) -> None:
        """Take the names of classes out of the model's cfg, which may be another model's or the registry's, too."""
        cfg = getattr(self, 'pretrained_cfg', None)  # there is none while the model is built
        if cfg and any(key in cfg for key in LABEL_KEYS):
            self.pretrained_cfg = {key: value for key, value in cfg.items() if key not in LABEL_KEYS}
            self.default_cfg = self.pretrained_cfg  # timm has both names for it

    @property
    def _model_args(self) -> Dict[str, Any]:
        """The arguments that timm records, and writes into config.json; how weights were read is not one of them."""
        return vars(self).get('model_args', {})

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        vars(self)['model_args'] = {key: value for key, value in args.items() if key != 'mmap'}

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Fill in the buffers that no checkpoint holds, as after building on the meta device."""
        for module in self.modules():
            if module is not self and hasattr(module, 'init_non_persistent_buffers'):
                module.init_non_persistent_buffers()
