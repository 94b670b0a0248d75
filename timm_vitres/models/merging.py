"""Layers merged into the layers before them: what the hooks of timm's `reparameterize_model` are made of.

convolution or linear layer, BatchNorm or LayerScale -> one layer that computes both. A layer is never changed, since
others may share it, and what merging would lose (hooks, adapters, parametrizations) is refused by name.
"""

import copy
from collections import Counter, OrderedDict
from contextlib import contextmanager
from typing import Iterator, List, Optional, Tuple, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, LayerScale, SyncBatchNormAct, get_notrace_modules
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

ModelT = TypeVar('ModelT', bound=nn.Module)
# Their subclasses may compute something else, so types are compared exactly
_CONVS = (nn.Conv2d, Conv2dSame)
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)


class CannotFold(ValueError):
    """A layer that can't be merged: the part that it has in a block, the module, and what is in the way."""

    def __init__(self, part: str, module: nn.Module, reason: str):
        super().__init__(f'model: {part} {reason}')
        self.module, self.reason = module, reason


def check_eval(model: nn.Module) -> None:
    """Raise ValueError where a module, or one of its parts, is in training mode, and TypeError where it is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: got {type(model).__name__}, expected a torch.nn.Module.')
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError('model: got a TorchScript module, which can not be changed; fold the model, then script it.')
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f' (its {training} is)' if training else ''
        raise ValueError(f'model: it is in training mode{where}; call model.eval() before it is folded.')


def check_plain(part: str, module: nn.Module) -> None:
    """Raise CannotFold where merging would lose what a layer computes beside its own forward pass.

    Args:
        part: How the layer is called in the block that it belongs to.
    """
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    foreign = sorted(
        {type(value).__name__ for value in module._parameters.values() if value is not None} - {'Parameter'}
    )
    reason = None
    if hasattr(module, 'base_layer'):
        reason = f'is an adapter ({type(module).__name__}); merge it first (of peft: model.merge_and_unload()).'
    elif parametrize.is_parametrized(module):
        remedy = 'torch.nn.utils.parametrize.remove_parametrizations'
        reason = f'has parametrizations, which folding would lose; call {remedy} on it first.'
    elif hooks:
        shown = ', '.join(getattr(hook, '__qualname__', type(hook).__name__) for hook in hooks)
        remedy = 'remove them first (those of weight_norm by torch.nn.utils.remove_weight_norm)'
        reason = f'has forward hooks ({shown}), which folding would bypass; {remedy}.'
    elif 'forward' in vars(module):
        reason = 'has a forward method set from outside, which folding would bypass; remove it first.'
    elif foreign:
        reason = f'holds weights of type {", ".join(foreign)}, as quantised layers do; fold the model before that.'
    if reason:
        raise CannotFold(part, module, reason)


def _check_type(part: str, module: nn.Module, types: Tuple[type, ...]) -> None:
    if type(module) not in types:
        names = ' or '.join(dict.fromkeys(allowed.__name__ for allowed in types))
        raise CannotFold(part, module, f'is a {type(module).__name__}, and only a {names} can be folded.')


def merge_batch_norm_(module: nn.Module, layer: str, norm: str) -> None:
    """Merge a BatchNorm below a module into the convolution, or the linear layer, before it.

    The activation that timm's BatchNormAct has stays, and a convolution's weight is laid out for speed. Where it is
    done already, or the BatchNorm has no statistics but those of each batch, nothing happens. A norm of fewer channels
    than the layer has is that of the last ones, as of the values behind queries and keys. The layer, and what holds it,
    are replaced, not changed, since another block may share them. The mode of the module is not asked for, as in timm's
    own hooks: timm's validate.py reparameterizes a model before it calls `eval()`.

    Raises:
        ValueError: where the layer or the BatchNorm is not plain (see `check_plain`).
    """
    before, batch_norm = module.get_submodule(layer), module.get_submodule(norm)
    if parametrize.type_before_parametrizations(batch_norm) not in _BATCH_NORMS or batch_norm.running_mean is None:
        return
    for name, part in ((layer, before), (norm, batch_norm)):
        check_plain(name, part)
    _check_type(layer, before, (*_CONVS, nn.Linear))
    merge = fuse_linear_bn_weights if isinstance(before, nn.Linear) else fuse_conv_bn_weights
    norm_weight = torch.ones_like(batch_norm.running_mean) if batch_norm.weight is None else batch_norm.weight
    norm_bias = torch.zeros_like(batch_norm.running_mean) if batch_norm.bias is None else batch_norm.bias
    tensors = (before.weight, before.bias, batch_norm.running_mean, batch_norm.running_var, norm_weight, norm_bias)
    # all is computed in float32 or better, so that only the result is rounded to a lower precision
    wide = torch.promote_types(before.weight.dtype, torch.float32)
    weight, bias, mean, var, norm_weight, norm_bias = (None if t is None else t.detach().to(wide) for t in tensors)
    others = len(weight) - len(mean)
    mean, norm_bias = (F.pad(tensor, (others, 0)) for tensor in (mean, norm_bias))
    norm_weight, var = F.pad(norm_weight, (others, 0), value=1), F.pad(var, (others, 0), value=1 - batch_norm.eps)
    weight, bias = merge(weight, bias, mean, var, batch_norm.eps, norm_weight, norm_bias)
    merged = _with_weights(before, weight, bias)
    if weight.ndim == 4:
        make_channels_last_(merged)
    parent = layer.rpartition('.')[0]
    if parent:
        module.set_submodule(parent, _twin(module.get_submodule(parent)))
    module.set_submodule(layer, merged)
    module.set_submodule(norm, getattr(batch_norm, 'act', nn.Identity().eval()))


def _twin(module: ModelT) -> ModelT:
    """Return a module of the same parts, of which some can be replaced without changing the other."""
    twin = copy.copy(module)
    vars(twin).update({key: value.copy() for key, value in vars(module).items() if isinstance(value, dict)})
    return twin


def _with_weights(layer: ModelT, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> ModelT:
    """Return a layer's twin with other weights, in its own dtype; what is frozen stays so."""
    twin, own = _twin(layer), layer.weight
    for name, value in (('weight', weight), ('bias', bias)):
        if value is not None:
            twin.register_parameter(name, nn.Parameter(value.to(own.dtype), requires_grad=own.requires_grad))
    return twin


def make_channels_last_(conv: nn.Module) -> None:
    """Make a convolution's weight, and so its map, channels-last, but on CUDA, where GroupNorms are slower so."""
    if conv.weight.device.type != 'cuda':
        conv.to(memory_format=torch.channels_last)


def merge_layer_scale_(block: nn.Module) -> None:
    """Merge the LayerScales of a timm `Block` into the linear layers before them.

    Raises:
        ValueError: where a layer, its LayerScale, or what lies between them is not plain (see `check_plain`).
    """
    for name, branch, layer, drop in (('ls1', 'attn', 'proj', 'proj_drop'), ('ls2', 'mlp', 'fc2', 'drop2')):
        scale, parent = getattr(block, name), getattr(block, branch)
        if parametrize.type_before_parametrizations(scale) is not LayerScale:
            continue
        linear = getattr(parent, layer)
        parts = ((f'{branch}.{layer}', linear), (f'{branch}.{drop}', getattr(parent, drop)), (name, scale))
        for part, module in parts:
            check_plain(part, module)
        # hooks would see outputs that are scaled already, and a forward from outside may be bound to other parts
        if parent._forward_hooks or 'forward' in vars(parent):
            check_plain(branch, parent)
        _check_type(f'{branch}.{layer}', linear, (nn.Linear,))
        gamma = scale.gamma.detach()
        bias = None if linear.bias is None else linear.bias.detach() * gamma
        merged = _with_weights(linear, linear.weight.detach() * gamma[:, None], bias)
        parent = _twin(parent)  # another block may share it
        setattr(parent, layer, merged)
        setattr(block, branch, parent)
        setattr(block, name, nn.Identity().train(scale.training))


class _LayerTracer(fx.Tracer):
    """Goes into blocks, but not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # an adapter and a parametrised layer have children, but are layers
        is_layer = isinstance(m, _BATCH_NORMS) or hasattr(m, 'base_layer') or parametrize.is_parametrized(m)
        return is_layer or next(m.children(), None) is None or isinstance(m, tuple(get_notrace_modules()))


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Keep tracing, which calls modules on what are no tensors, from calling their hooks."""
    kept = [(part, part._forward_hooks, part._forward_pre_hooks) for part in module.modules()]
    try:
        for part, _, _ in kept:
            part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for part, hooks, pre_hooks in kept:
            part._forward_hooks, part._forward_pre_hooks = hooks, pre_hooks


def batch_norms_of_convolutions(module: nn.Module) -> List[Tuple[str, str]]:
    """Return (convolution, BatchNorm) by name, wherever the one's output is nothing but the other's input.

    A layer that is called more than once, or known by more than one name, is left out: what suits one of its places
    need not suit the others.
    """
    names = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    with _without_hooks(module):
        nodes = [node for node in _LayerTracer().trace(module).nodes if node.op == 'call_module']
    calls = Counter(node.target for node in nodes)
    pairs = []
    for node in nodes:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != 'call_module' or len(before.users) > 1:
            continue
        layer, norm = str(before.target), str(node.target)
        parts = [module.get_submodule(name) for name in (layer, norm)]
        kinds = [parametrize.type_before_parametrizations(part) for part in parts]
        # subclasses are left out, since they change their weights; an adapter is kept, to be refused by name
        plain = kinds[0] in _CONVS or hasattr(parts[0], 'base_layer')
        once = all(calls[name] == 1 and names[id(part)] == 1 for name, part in zip((layer, norm), parts))
        if plain and once and kinds[1] in _BATCH_NORMS and parts[1].running_mean is not None:
            pairs.append((layer, norm))
    return pairs
