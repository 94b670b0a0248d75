"""The same function with fewer operations, for inference.

model in evaluation mode -> `fold` -> a copy: weights standardised once and for all, BatchNorms and LayerScales merged
into the layers before them, padding that does not depend on the image static. Blocks say how, by the hooks of timm's
`reparameterize_model`; `merging` holds what those are made of.
"""

import copy
from typing import TypeVar

import torch
from timm.utils import reparameterize_model
from torch import nn

from ..models.merging import CannotFold, check_eval

ModelT = TypeVar('ModelT', bound=nn.Module)


def fold(model: ModelT) -> ModelT:
    """Return a copy of a model that computes the same with fewer operations; of a folded model, its like.

    It scripts, exports and compiles like the model itself, but can be neither trained nor saved as a checkpoint.
    Convolutions are channels-last on CPU, and so are the maps that they make, since that is faster there
    (benchmarks/dual.py). For a lower precision fold first: `fold(model).bfloat16()` rounds merged weights once.

    Args:
        model: A model of this package (also with features_only), or a part of one, in evaluation mode.

    Raises:
        ValueError: for a model in training mode, when BatchNorms depend on the batch; and where a layer to be merged
            has hooks, parametrizations, adapters or quantised weights, which would be lost.
        TypeError: for what is no module.
    """
    check_eval(model)
    copied = nn.ModuleList([copy_model(model)])
    names = {id(module): name for name, module in copied[0].named_modules()}
    try:
        # timm's function folds what is below a module, not the module itself
        folded = reparameterize_model(copied, inplace=True)[0]
    except CannotFold as error:
        name = names.get(id(error.module))
        if not name:
            raise
        raise CannotFold(name, error.module, error.reason) from None
    for module in folded.modules():
        if hasattr(module, 'folded'):
            module.folded = True
    return folded  # pyright: ignore[reportReturnType]


def copy_model(model: ModelT) -> ModelT:
    """Return a copy of a model; CannotFold names a layer that torch can not copy."""
    for name, module in model.named_modules():
        # timm's LeViT, EfficientViT and TinyViT keep what they computed here, and compute it again
        getattr(module, 'attention_bias_cache', {}).clear()
        for key, value in vars(module).items():
            if torch.is_tensor(value) and value.grad_fn is not None:  # torch copies no tensor that was computed
                remedy = 'torch.nn.utils.remove_weight_norm undoes weight_norm, prune.remove undoes pruning'
                raise CannotFold(name, module, f'computes its {key}, so it can not be copied; {remedy}.')
    return copy.deepcopy(model)
