"""The model that a run trains: created, its weights taken from where the settings say, adapted, partly frozen."""

import copy
import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
from timm.models import load_state_dict, resolve_model_input_args
from torch import nn

from ..checks import is_installed, on_one_line, some
from ..labels import own_names
from ..models.base import Hybrid
from ..publishing.config_file import check_config_of
from ..weights.checksums import check_once
from ..weights.files import CONFIG_NAME
from ..weights.sources import SOURCE_ARGUMENTS, STARTS
from .class_maps import first_other, order_of
from .settings import FinetuneCfg

_logger = logging.getLogger(__name__)
# timm's are of these classes, too
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# where peft puts adapters: attention and MLP of timm's blocks, ours included
ADAPTED = r'(.*\.)?(qkv|attn\.proj|fc1|fc2)'


def create_finetune_model(cfg: FinetuneCfg, num_classes: int, label_names: Optional[List[str]] = None) -> nn.Module:
    """Create the model of a run, its position table made for the run's image size where it has one.

    Args:
        label_names: The run's classes, where they are known; a head that comes with weights is brought to their order.

    Raises:
        ValueError, TypeError, RuntimeError: for a model, arguments of it, or weights, that timm does not know.
    """
    kwargs = dict(cfg.model_kwargs or {})
    for name in ('num_classes', 'features_only', *sorted(SOURCE_ARGUMENTS)):
        if name in kwargs:
            raise ValueError(f'model_kwargs: {name} is not for a run to choose so; leave it out.')
    for name, value in (('in_chans', cfg.in_chans), ('drop_rate', cfg.drop), ('drop_path_rate', cfg.drop_path)):
        if value is not None:
            kwargs[name] = value
    source = {**_weights(cfg), **_size(cfg)}
    try:
        model = timm.create_model(cfg.model, num_classes=num_classes, **source, **kwargs)
    except (TypeError, AttributeError, LookupError, AssertionError, ArithmeticError) as error:
        # constructors raise these for arguments that they do not know, or can't work with
        reason = f' ({error})' if str(error) else ''
        raise TypeError(f'model_kwargs: {cfg.model} can not be made with {kwargs}{reason}.') from error
    except (RuntimeError, ValueError) as error:
        name = 'pretrained_path' if cfg.pretrained_path else 'initial_checkpoint' if cfg.initial_checkpoint else ''
        if name:
            told = f'{getattr(cfg, name)} does not fit {cfg.model} ({on_one_line(error)})'
            raise ValueError(f'{name}: {told}.') from error
        if isinstance(error, ValueError):
            raise
        # timm's, for names and tags that it does not know, and weights that do not fit
        raise ValueError(f'model: {cfg.model!r} can not be made ({on_one_line(error)}).') from error
    if cfg.pretrained and label_names:
        _order_head_(model, cfg.model, label_names)
    if cfg.pretrained_path and not isinstance(model, Hybrid):
        _check_arrived(model, cfg.pretrained_path)
    if cfg.img_size is not None and hasattr(model, 'set_input_size'):
        model.set_input_size(img_size=image_size(cfg.img_size))
    _set_head_loss_(model, cfg)
    if cfg.lora:
        add_adapters_(model, cfg.lora)
    if cfg.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(f'grad_checkpointing: {cfg.model} has none; leave it out.') from error
    return model


def _order_head_(model: nn.Module, name: str, label_names: List[str]) -> None:
    """Bring a head that knows the run's classes into their order; tell of one that knows as many others."""
    known = own_names(model)
    if len(known) != len(label_names):
        return  # without names, or with another number of classes, whose head is new
    order = order_of(label_names, known)
    if order is None:
        other = first_other(known, label_names)
        _logger.warning('model: the head of %s begins with as many other classes, such as %r.', name, other)
        return
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        for parameter in head.parameters():
            parameter.data = parameter.data[order].contiguous()


def tell_of_random_weights(cfg: FinetuneCfg) -> None:
    """Warn of a run or an arm that takes no more than the architecture from a name that elsewhere means weights."""
    if cfg.pretrained or cfg.pretrained_path or cfg.initial_checkpoint:
        return
    if cfg.model.startswith(STARTS) or ('.' in cfg.model and timm.is_model_pretrained(cfg.model)):
        _logger.warning('model: of %s only the architecture is taken; --pretrained begins with its weights.', cfg.model)


def without_weights(cfg: FinetuneCfg) -> FinetuneCfg:
    """Return the settings of a model whose weights come from a checkpoint, wherever those it started from may be."""
    return dataclasses.replace(cfg, pretrained=False, pretrained_path=None, initial_checkpoint='')


def _weights(cfg: FinetuneCfg) -> Dict[str, Any]:
    """Return the arguments of `timm.create_model` that say where weights come from."""
    given = [name for name in ('pretrained_path', 'initial_checkpoint') if getattr(cfg, name)]
    for name in given:
        if not Path(getattr(cfg, name)).is_file():
            raise FileNotFoundError(f'{name}: there is no file {getattr(cfg, name)}.')
        check_once(Path(getattr(cfg, name)))  # timm, which reads the latter, compares no checksum
    if len(given) == 2 or (cfg.initial_checkpoint and cfg.pretrained):
        raise ValueError('initial_checkpoint: give only one of initial_checkpoint, pretrained_path and pretrained.')
    if cfg.pretrained_path:  # timm compares the classes of a file by its cfg, and -1 are no model's
        # a model of timm's that has a name on the Hub would have its own weights without a word
        overlay = dict(file=cfg.pretrained_path, source='', hf_hub_id=None, url=None, num_classes=-1)
        return dict(pretrained=True, pretrained_cfg_overlay=overlay)
    return dict(pretrained=cfg.pretrained, checkpoint_path=cfg.initial_checkpoint)


def _size(cfg: FinetuneCfg) -> Dict[str, Any]:
    """Return the run's image size as an argument, where the model takes one.

    Made for it from the start, the model has its position table resampled once at most: from the file's size. And some
    of timm's (LeViT, CoAtNet) know no other way to have a size.
    """
    if cfg.img_size is None or 'img_size' in (cfg.model_kwargs or {}):
        return {}
    known = input_args(cfg.model)['pretrained_cfg']
    is_ours = any(known['architecture'] in family.variants for family in Hybrid.families)
    return dict(img_size=image_size(cfg.img_size)) if is_ours or known.get('fixed_input_size') else {}


def input_args(name: str, **kwargs: Any) -> Dict[str, Any]:
    """Return what timm says of the images of a model by its name (`resolve_model_input_args`), and of its cfg.

    Raises:
        ValueError: for arguments that do not fit, and for a folder or repository whose config.json is not timm's.
    """
    try:
        check_config_of(name)
        return resolve_model_input_args(name, **kwargs)
    except (json.JSONDecodeError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"model: {name} has no {CONFIG_NAME} of timm's ({on_one_line(error)}); if it holds a checkpoint of another "
            f'layout, timm-vitres convert makes a folder of it.'
        ) from error
    except (ValueError, TypeError, RuntimeError) as error:  # the last for names and tags that timm does not know
        given = f' with {kwargs} as given' if kwargs else ''
        raise ValueError(f'model: {name} can not be made{given} ({on_one_line(error)}).') from error


def _check_arrived(model: nn.Module, path: str) -> None:
    """Raise ValueError where most of a file's weights are not in a model of timm's: it takes what fits, and is silent
    about the rest. Our own models compare every key.

    Tensors are known by their size and sum, whatever they are called in the file.
    """

    def known(tensor: torch.Tensor) -> Tuple[int, float]:
        return tensor.numel(), tensor.double().sum().item()

    there = {known(tensor) for tensor in load_state_dict(path).values() if torch.is_tensor(tensor)}
    body = part_parameters(model, 'body')
    missing = [name for name, parameter in body.items() if known(parameter.detach()) not in there]
    if len(missing) * 2 > len(body):
        raise ValueError(
            f'pretrained_path: {path} does not fit {type(model).__name__}: it gives only {len(body) - len(missing)} of '
            f'{len(body)} tensors; {missing[0]} is not there.'
        )
    if missing:
        _logger.warning('pretrained_path: %d tensors are not as in %s: %s.', len(missing), path, ', '.join(missing[:3]))


def _set_head_loss_(model: nn.Module, cfg: FinetuneCfg) -> None:
    """Let a model with two heads return what `head_loss` is computed of."""
    if cfg.head_loss == 'sum':
        return
    heads = model.get_classifier()
    if not isinstance(heads, tuple):
        raise ValueError(f'head_loss: got {cfg.head_loss!r}, but {cfg.model} has one head; leave head_loss out.')
    if cfg.head_loss == 'both':
        model.set_distilled_training(True)
        return
    head = f'head_{cfg.head_loss}'
    if not isinstance(model, Hybrid) or head not in model.heads:
        raise ValueError(f"head_loss: got {cfg.head_loss!r}, but {cfg.model} has no head of that name; use 'both'.")
    model.train_one_head(head)


def image_size(img_size: Union[int, Tuple[int, ...]]) -> Tuple[int, int]:
    """Return height and width of a setting that may be one number."""
    size = img_size if isinstance(img_size, tuple) else (img_size,)
    return size[0], size[-1]


def add_adapters_(model: nn.Module, rank: int) -> None:
    """Put low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) beside attention and MLPs, and freeze all but them
    and the head.

    Raises:
        ValueError: without peft, or where it can not be used, and for a model that has no such layers.
    """
    if not is_installed('peft'):
        raise ValueError('lora: needs peft, pip install "timm-vitres[lora]".')
    layers = dict(model.named_modules())
    found = [name for name, layer in layers.items() if re.fullmatch(ADAPTED, name) and _is_dense(name, layer)]
    # BEiT's, EVA's and Swin V2's attention adds a bias of its own to a product with the layer's weight
    past = [name for name in found if name.endswith('.qkv') and _is_passed_over(layers[name.rpartition('.')[0]])]
    adapted = [name for name in found if name not in past]
    if past:
        _logger.warning('lora: %s has no adapters beside %s, which it computes past.', type(model).__name__, some(past))
    if not adapted:
        raise ValueError(f'lora: {type(model).__name__} has no attention or MLP to put adapters beside.')
    heads = head_parameters(model)
    trained = {id(parameter) for parameter in heads if parameter.requires_grad}
    try:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=adapted), model)
    except ImportError as error:  # peft refuses versions of torchao and transformers that it was not made for
        raise ValueError(f'lora: peft does not go with what else is installed ({on_one_line(error)}).') from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('lora_' in name or id(parameter) in trained)


def _is_passed_over(attn: nn.Module) -> bool:
    return getattr(attn, 'q_bias', None) is not None and not getattr(attn, 'qkv_bias_separate', False)


def _is_dense(name: str, layer: nn.Module) -> bool:
    # where a map attends, the layer is a 1x1 convolution; those of channel attention (SE) have an MLP's names
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and name.endswith('qkv'))


def merged(model: nn.Module) -> nn.Module:
    """Return a model whose adapters are merged into the layers beside them: a copy, or itself where it has none."""
    if not any(hasattr(layer, 'lora_A') for layer in model.modules()):
        return model
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if hasattr(layer, 'lora_A'):
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
    return model.requires_grad_(True)


def head_parameters(model: nn.Module) -> List[nn.Parameter]:
    """Return the parameters of a model's head, or heads."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]
    return [parameter for head in heads for parameter in head.parameters()]


def part_parameters(model: nn.Module, part: str) -> Dict[str, nn.Parameter]:
    """Return the parameters of a part of a model by name: of its 'resnet', its 'vit', or its 'body', all but the heads.

    Raises:
        ValueError: for a part that the model does not have.
    """
    if part == 'body':
        heads = {id(parameter) for parameter in head_parameters(model)}
        found = {name: value for name, value in model.named_parameters() if id(value) not in heads}
    elif isinstance(model, Hybrid):
        pattern = re.compile(model.resnet_names if part == 'resnet' else model.vit_names)
        found = {name: value for name, value in model.named_parameters() if pattern.match(name)}
    else:
        raise ValueError(f"freeze: got {part!r}, but {type(model).__name__} is no hybrid of ours; use 'body'.")
    if not found:
        raise ValueError(f'freeze: got {part!r}, but this model has none.')
    return found


def still_norms(model: nn.Module) -> List[nn.Module]:
    """Return the BatchNorms that are not trained, whose statistics shall stay, too."""
    norms = [layer for layer in model.modules() if isinstance(layer, BATCH_NORMS)]
    return [norm for norm in norms if not any(value.requires_grad for value in norm.parameters())]


class Frozen:
    """A part of a model that stays as it is for a while; its BatchNorms keep their statistics, too."""

    def __init__(self, model: nn.Module, part: str):
        parameters = part_parameters(model, part)
        self.parameters = [value for value in parameters.values() if value.requires_grad]
        prefixes = {name.rpartition('.')[0] for name in parameters}
        self.norms = [
            layer for name, layer in model.named_modules() if name in prefixes and isinstance(layer, BATCH_NORMS)
        ]
        frozen = set(map(id, self.parameters))
        if not any(value.requires_grad for value in model.parameters() if id(value) not in frozen):
            raise ValueError(f'freeze: got {part!r}, which leaves nothing to train.')

    def set_(self, is_frozen: bool) -> None:
        """Freeze the part, or let it be trained; to be called after the model was set to training mode."""
        for parameter in self.parameters:
            parameter.requires_grad_(not is_frozen)
        for norm in self.norms if is_frozen else ():
            norm.eval()


def state_of(model: nn.Module) -> Dict[str, torch.Tensor]:
    """Return a model's state dict, on the CPU and whole where it is sharded; every process must ask for it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # pyright: ignore
