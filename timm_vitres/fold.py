"""The same function with fewer operations, for inference.

model in evaluation mode -> `fold` -> a copy: weights standardised once and for all, BatchNorms and LayerScales merged
into the layers before them, padding that does not depend on the image static. Blocks say how, by the hooks of timm's
`reparameterize_model`; this module holds what those hooks are made of.
"""

from typing import List, Tuple, TypeVar

import torch
from timm.layers import Conv2dSame, LayerScale, get_notrace_modules
from timm.utils import reparameterize_model
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

ModelT = TypeVar('ModelT', bound=nn.Module)


def fold(model: ModelT) -> ModelT:
    """Return a copy of a model that computes the same with fewer operations.

    It scripts, exports and compiles like the model itself, but can be neither trained nor saved as a checkpoint.
    Convolutions are channels-last on CPU, and so are the maps that they make, since that is faster there
    (benchmarks/dual.py). For a lower precision fold first: `fold(model).bfloat16()` rounds merged weights once.

    Args:
        model: A model of this package (also with features_only), or a part of one, in evaluation mode.

    Raises:
        ValueError: for a model that is in training mode, when BatchNorms depend on the batch.
    """
    check_eval(model)
    # timm's function folds what is below a module, not the module itself
    folded = reparameterize_model(nn.ModuleList([model]).eval())[0]
    for module in folded.modules():
        if hasattr(module, 'folded'):
            module.folded = True
    return folded  # pyright: ignore[reportReturnType]


def check_eval(model: nn.Module) -> None:
    """Raise ValueError where a module, or one of its parts, is in training mode."""
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f' (its {training} is)' if training else ''
        raise ValueError(f'model: it is in training mode{where}; call model.eval() before it is folded.')


def merge_batch_norm_(module: nn.Module, layer: str, norm: str) -> None:
    """Merge a BatchNorm below a module into the convolution, or the linear layer, before it.

    The activation that timm's BatchNormAct has stays, and a convolution's weight is laid out for speed. Where it is
    done already, nothing happens.

    Raises:
        ValueError: while the module trains, when the BatchNorm's statistics are those of each batch.
    """
    before, batch_norm = module.get_submodule(layer), module.get_submodule(norm)
    if not isinstance(batch_norm, nn.BatchNorm2d):
        return
    check_eval(batch_norm)
    merge = fuse_linear_bn_weights if isinstance(before, nn.Linear) else fuse_conv_bn_weights
    norm_weight = batch_norm.weight if batch_norm.affine else torch.ones_like(batch_norm.running_mean)
    norm_bias = batch_norm.bias if batch_norm.affine else torch.zeros_like(batch_norm.running_mean)
    tensors = (before.weight, before.bias, batch_norm.running_mean, batch_norm.running_var, norm_weight, norm_bias)
    # in float32, so that what is rounded to a lower precision is the result alone
    weight, bias, mean, var, norm_weight, norm_bias = (None if t is None else t.detach().float() for t in tensors)
    weight, bias = merge(weight, bias, mean, var, batch_norm.eps, norm_weight, norm_bias)
    dtype = before.weight.dtype
    before.weight, before.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))
    if weight.ndim == 4:
        lay_out_(before)
    module.set_submodule(norm, getattr(batch_norm, 'act', nn.Identity()))


def lay_out_(conv: nn.Module) -> None:
    """Make a convolution's weight, and so its map, channels-last, but on CUDA, where GroupNorms are slower so."""
    if conv.weight.device.type != 'cuda':
        conv.to(memory_format=torch.channels_last)


def merge_layer_scale_(block: nn.Module) -> None:
    """Merge the LayerScales of a timm `Block` into the linear layers before them."""
    for name, linear in (('ls1', block.attn.proj), ('ls2', block.mlp.fc2)):
        scale = getattr(block, name)
        if isinstance(scale, LayerScale):
            gamma = scale.gamma.detach()
            linear.weight = nn.Parameter(linear.weight.detach() * gamma[:, None])
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach() * gamma)
            setattr(block, name, nn.Identity())


class _LayerTracer(fx.Tracer):
    """Goes into blocks, but not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = isinstance(m, nn.BatchNorm2d) or next(m.children(), None) is None
        return is_layer or isinstance(m, tuple(get_notrace_modules()))


def batch_norms_of_convolutions(module: nn.Module) -> List[Tuple[str, str]]:
    """Return (convolution, BatchNorm) by name, wherever the one's output is nothing but the other's input."""
    modules = dict(module.named_modules())
    pairs = []
    for node in _LayerTracer().trace(module).nodes:
        before = node.args[0] if node.op == 'call_module' and node.args else None
        if not isinstance(before, fx.Node) or before.op != 'call_module' or len(before.users) > 1:
            continue
        layer, norm = modules[str(before.target)], modules[str(node.target)]
        plain = type(layer) in (nn.Conv2d, Conv2dSame)  # others do something with their weights
        if plain and isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            pairs.append((str(before.target), str(node.target)))
    return pairs
