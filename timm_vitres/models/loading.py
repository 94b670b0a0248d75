"""A pretrained model without initialising it first: built on 'meta', its weights taken over from the file.

pretrained_cfg -> `find_weights` -> file, checked -> state dict (mapped into memory) -> model on 'meta' -> assigned.

timm initialises a model, reads the file beside it, and copies. Here parameters *are* what was read; only what the file
does not give (a new head, buffers that no file holds) is initialised.
"""

import dataclasses
import logging
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Type, TypeVar, Union

import torch
from timm.models import (
    FeatureDictNet,
    FeatureListNet,
    PretrainedCfg,
    adapt_input_conv,
    build_model_with_cfg,
    get_model_input_config,
    resolve_pretrained_cfg,
)
from torch import nn

from ..checks import WeightInit, check_choice, conform, conform_arguments, conform_indices, show
from ..timm_private import FeatureGetterNet
from ..weights.checkpoints import checkpoint_files, is_mapped, read_checkpoint
from ..weights.checksums import check_noted, check_once
from ..weights.comparison import check_keys
from ..weights.downloads import at_commit, hub_commit, hub_file
from ..weights.files import CONFIG_NAME, WEIGHTS_NAME
from ..weights.layouts import StateDict, convert_layout, widened
from ..weights.sources import find_weights, told_size
from .base import Hybrid

_logger = logging.getLogger(__name__)
ModelT = TypeVar('ModelT', bound=Hybrid)
SOURCES = ('state_dict', 'file', 'hf_hub_id', 'url')  # of a pretrained cfg: where weights are


class Pyramid(FeatureGetterNet):
    """timm's wrapper of a model that returns features; its script returns a list, over which its caller can loop."""

    def forward(self, x: torch.Tensor):
        """x: (B, C, H, W) -> the maps."""
        maps = self.model.forward_intermediates(
            x, indices=self.out_indices, norm=self.norm, output_fmt=self.output_fmt, intermediates_only=True
        )
        if torch.jit.is_scripting():  # the model's method may return other things, too
            assert torch.jit.isinstance(maps, List[torch.Tensor])
            return maps
        return maps


def build_hybrid(model_cls: Type[ModelT], variant: str, pretrained: bool, cfg: Any, **kwargs: Any) -> ModelT:
    """Build a variant of a family; keyword arguments named like the config's fields override them.

    Args:
        model_cls: Takes the config as `cfg`, and says with `num_pyramid` how many maps its pyramid has.
        cfg: The family's dataclass.
        kwargs: As `timm.create_model` passes them, and `mmap` (see `is_mapped`).
    """
    mmap = is_mapped(kwargs.pop('mmap', None))
    for name in ('pretrained_filter_fn', 'pretrained_strict'):
        if name in kwargs:
            raise TypeError(
                f'{name}: is no argument of {model_cls.__name__}, which knows its layouts and compares keys.'
            )
    kwargs = conform_arguments(model_cls, cfg, kwargs, build_model_with_cfg, build_hybrid)
    fields = {field.name for field in dataclasses.fields(cfg)}
    source_cfg = cfg
    cfg = dataclasses.replace(cfg, **{name: kwargs.pop(name) for name in fields & kwargs.keys()})
    if isinstance(kwargs.get('feature_cls'), str):
        kwargs['feature_cls'] = kwargs['feature_cls'].lower()  # as timm takes them
        check_choice('feature_cls', kwargs['feature_cls'], model_cls.feature_classes)
    _check_overlay(kwargs.get('pretrained_cfg_overlay'))
    feature_cfg: Dict[str, Any] = dict(feature_cls=Pyramid)
    if kwargs.get('feature_cls') == 'getter':
        kwargs.pop('feature_cls')
    if kwargs.get('feature_cls') in ('list', 'dict', FeatureListNet, FeatureDictNet):
        # these look into an nn.Sequential if they are told to
        feature_cfg['flatten_sequential'] = True
    if kwargs.get('features_only'):
        kwargs['num_classes'] = 0
        twin = model_cls(cfg, img_size=kwargs.get('img_size'), num_classes=0, device='meta')
        indices = kwargs.pop('out_indices', None)
        feature_cfg['out_indices'] = tuple(range(twin.num_pyramid))  # further features are for those who ask for them
        if indices is not None:
            feature_cfg['out_indices'] = conform_indices('out_indices', indices, len(twin.feature_info), distinct=True)
            _tell_of_blocks(indices, twin)
    create: Any = model_cls
    own, overlay = kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay') or {}
    is_tag = own is None or isinstance(own, str)
    given = {name: overlay[name] for name in SOURCES if overlay.get(name)}
    if pretrained:  # timm would initialise the whole model, and then copy the weights into it
        img_sizes, args = [resolve_pretrained_cfg(variant, own).input_size[-2:]], kwargs.get('pretrained_model_args')
        source = resolve_pretrained_cfg(variant, own, overlay)
        if given:  # they take the place of what the cfg names, and nothing else tells of what model they are
            given['hf_hub_filename'] = overlay.get('hf_hub_filename')
            source = dataclasses.replace(source, **{**dict.fromkeys(SOURCES), 'source': '', **given})
            img_sizes = [kwargs.get('img_size'), *img_sizes]
            if overlay.get('input_size'):
                img_sizes = [source.input_size[-2:]]
        elif args and args.get('img_size'):
            img_sizes = [args['img_size']]
        if given or overlay.get('hf_hub_filename') or (overlay and args is None and not is_tag):
            source_cfg = cfg
        elif args:
            source_cfg = dataclasses.replace(source_cfg, **{name: args[name] for name in fields & args.keys()})
        source_cfg = source_cfg if source_cfg != cfg else None
        adapts = kwargs.get('in_chans') is not None
        cache_dir = kwargs.get('cache_dir')
        asks = bool(given.get('hf_hub_id'))
        create = partial(create_pretrained, model_cls, source, cache_dir, img_sizes, mmap, source_cfg, adapts, asks)
    model = build_model_with_cfg(create, variant, False, model_cfg=cfg, feature_cfg=feature_cfg, **kwargs)
    # the registry's names are those of its weights' classes
    _forget_other_labels(model, not is_tag or (pretrained and not given) or bool(overlay.get('label_names')))
    return model


def build_with_tables(model_cls: Type[ModelT], variant: str, pretrained: bool, cfg: Any, **kwargs: Any) -> ModelT:
    """Build a variant of a family whose models have tables of positions, as `build_hybrid` does.

    The tables have the checkpoint's own size unless the caller gives another: timm passes `img_size` on only where
    sizes are fixed. The cfg tells the first convolution, whose name depends on the config.
    """
    _check_overlay(kwargs.get('pretrained_cfg_overlay'))
    source = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    kwargs.setdefault('img_size', source.input_size[-2:])
    model = build_hybrid(model_cls, variant, pretrained, cfg, **kwargs)
    model.pretrained_cfg['first_conv'] = get_model_input_config(model)['first_conv']
    return model


def _check_overlay(overlay: Any) -> None:
    if not isinstance(overlay, (dict, type(None))):
        raise TypeError(f'pretrained_cfg_overlay: got {show(overlay)}, expected a dict.')


def _tell_of_blocks(indices: Any, model: Any) -> None:
    """Warn of indices that run past the pyramid into the tokens of single blocks, which begin with an early one.

    Raises:
        ValueError: for numbers in a row, up to 5, that begin in the pyramid: so a decoder asks, which counts levels.
    """
    first = model.num_pyramid
    asked = [] if isinstance(indices, int) else list(indices)
    runs = [list(range(start, end)) for start in range(first) for end in range(first + 1, 7)]
    counts = first > 2 and len(asked) > 1 and asked in runs
    if counts and len(asked) < len(model.feature_info):
        raise ValueError(
            f'out_indices: got {asked}, but the pyramid has {first} levels, 0 to {first - 1}; what follows are tokens '
            f'of single blocks, early ones first. For segmentation_models_pytorch give encoder_depth={first}.'
        )
    if asked == [first] or (any(i >= first for i in asked) and any(0 <= i < first for i in asked)):
        maps = [f'{i} {entry["module"]}' for i, entry in enumerate(model.feature_info)]
        _logger.warning(
            'out_indices: got %s, but the pyramid ends with %d; what follows are tokens of single blocks, early ones '
            'first: %s.',
            *(asked, first - 1, ', '.join(maps)),
        )


def _forget_other_labels(model: nn.Module, are_of_weights: bool) -> None:
    """Take names out of a model's cfg that are not those of its classes: of other weights, of another number, or before
    a new head.
    """
    if not isinstance(model, Hybrid):  # features have no classes
        return
    names = model.pretrained_cfg.get('label_names') or ()
    counted = isinstance(names, (list, tuple, dict)) and len(names) in (0, model.num_classes)
    is_new = (model.pretrained_cfg.get('num_classes') or 0) < 0  # `_drop_other_head_` says what -1 means
    if not are_of_weights or not counted or is_new:
        model.forget_labels()


def create_pretrained(
    model_cls: Type[ModelT],
    source: PretrainedCfg,
    cache_dir: Union[None, str, Path] = None,
    img_sizes: Sequence[Any] = (),
    mmap: Optional[bool] = None,
    source_cfg: Any = None,
    adapts: bool = True,
    asks_config: bool = False,
    device: Union[None, str, torch.device] = None,
    dtype: Optional[torch.dtype] = None,
    weight_init: str = '',
    **kwargs: Any,
) -> ModelT:
    """Build `model_cls(**kwargs)` with the weights that `source` names.

    Args:
        source: Where the weights are, and what they were made for.
        img_sizes: What the checkpoint's position table may have been made for; the first with as many tokens is it.
        mmap: Whether weights are mapped into memory, where their file allows it; see `is_mapped`.
        source_cfg: The config of the model that they were saved of, where it is known, and not this one's.
        adapts: Whether the caller asked for a number of image channels, so that the first convolution may be adapted.
        asks_config: Whether the config.json beside weights on the Hub is fetched, for the size of their table.
        device: Where the model shall be.
        dtype: Of its parameters, whatever the file's; torch's default dtype by default.
        weight_init: How a new head is initialised: timm's names for it.

    Raises:
        RuntimeError: for a checkpoint that is not one of this model: missing and unexpected keys, wrong shapes.
        OSError: for a file that is damaged, or is not the one that was published.
    """
    device = torch.empty(0, device=device).device  # None becomes torch's default device
    if device.type == 'meta':
        raise ValueError("device: got 'meta', where no weights can be; use pretrained=False.")
    conform('weight_init', weight_init, WeightInit)
    model = model_cls(device='meta', dtype=dtype, weight_init='skip', **kwargs)
    model.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
    model.pretrained_cfg = source.to_dict()
    if source.state_dict and not source.source:  # the caller may change his tensors, so they are copied
        state_dict: Dict[str, Any] = {
            key: value.detach().clone(memory_format=torch.contiguous_format)
            for key, value in convert_layout(source.state_dict).items()
        }
    else:
        if source.source == 'hf-hub' and source.hf_hub_id:  # timm has read a config.json there; one commit has both
            commit = hub_commit(source.hf_hub_id, CONFIG_NAME, cache_dir)
            source = dataclasses.replace(source, hf_hub_id=at_commit(source.hf_hub_id, commit))
        path = find_weights(source, cache_dir)
        try:
            state_dict, _ = read_checkpoint(path, mmap=mmap)
            for file in checkpoint_files(path):
                check_once(file)
        except FileNotFoundError as error:
            raise OSError(f'{path}: was replaced while it was being read; load it again.') from error
        if source.source in ('local-dir', 'hf-hub'):
            check_noted(source.notes, Path(source.file or '') if source.source == 'local-dir' else path.parent)
        if asks_config and path.name == WEIGHTS_NAME:  # which the caller names without it
            with suppress(OSError, ValueError):
                hub_file(at_commit(str(source.hf_hub_id), path.parent.name), (CONFIG_NAME,), cache_dir)
        img_sizes = [told_size(path), *img_sizes]
    state_dict = widened(state_dict, dtype or torch.get_default_dtype())
    img_sizes = [size for size in img_sizes if size is not None]
    size = img_sizes[0] if img_sizes else None
    if source_cfg is not None:  # of that model, whose strides may be others
        size = model.size_of_tokens(source_cfg, size)
    else:
        with suppress(ValueError):  # it is of none of them, which is told where it is fitted
            state_dict = convert_layout(state_dict)
            size = model.table_size(state_dict, img_sizes) or size
    state_dict = model.filter_state_dict(state_dict, size)
    _adapt_first_conv_(state_dict, model, adapts)
    new_head = _drop_other_head_(state_dict, model, source)
    check_keys(state_dict, model, model.head_keys() if new_head else ())
    assign_(model, state_dict, device)
    for name in model.heads if new_head else ():
        model.get_submodule(name).to_empty(device=device)
        model.init_head_(name)
    fill_buffers_(model, device)
    return model


def assign_(model: nn.Module, state_dict: StateDict, device: Union[str, torch.device] = 'cpu') -> None:
    """Make the tensors of a state dict the model's own, in the model's dtype; nothing is copied that fits as it is."""
    own = model.state_dict()
    tensors = {key: value.to(device=device, dtype=own[key].dtype) for key, value in state_dict.items()}
    nn.Module.load_state_dict(model, tensors, strict=False, assign=True)  # the keys were compared before


def _adapt_first_conv_(state_dict: StateDict, model: Hybrid, is_asked: bool) -> None:
    """Sum or repeat the image channels of the first convolution, as timm does; refuse it where nobody asked for it."""
    key = f'{model.first_conv}.weight'
    weight, in_chans = state_dict.get(key), model.state_dict()[key].shape[1]
    if weight is None or weight.ndim != 4 or weight.shape[1] == in_chans:
        return
    channels = weight.shape[1]
    if not is_asked:
        raise RuntimeError(
            f'{key}: the checkpoint is of images of {channels} channels, the model of {in_chans}; give '
            f'in_chans={channels}, or in_chans={in_chans} to have the first convolution adapted.'
        )
    # what timm returns may be a view, which safetensors does not write
    state_dict[key] = adapt_input_conv(in_chans, weight, base_chans=channels).contiguous()


def _drop_other_head_(state_dict: StateDict, model: Hybrid, source: PretrainedCfg) -> bool:
    """Take a head of other classes out of a state dict, and return whether the model needs a new one.

    A head that fits is kept, whatever the cfg says of its classes: it was trained (but for -1, which timm's train.py
    sets for --pretrained-path, to have a new one). One of other classes, or none, is replaced where the caller asked
    for other classes than the source's; where he did not, or one of as many has lost a part, the comparison lists it.
    """
    keys = model.head_keys()
    own = {key: value.shape for key, value in model.state_dict().items() if key in keys}
    fits = source.num_classes >= 0 and all(
        key in state_dict and state_dict[key].shape == shape for key, shape in own.items()
    )
    is_other = all(state_dict[key].shape[:1] != shape[:1] for key, shape in own.items() if key in state_dict)
    if own and (fits or source.num_classes == model.num_classes or (source.num_classes >= 0 and not is_other)):
        return False
    for key in keys:
        state_dict.pop(key, None)
    return bool(own)


def fill_buffers_(model: nn.Module, device: Union[str, torch.device] = 'cpu') -> None:
    """Compute the buffers that no checkpoint holds, of a model that was built on 'meta'."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    model.init_non_persistent_buffers()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f'No weights were found for {", ".join(left)}.')
