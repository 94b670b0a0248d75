"""Comparison of a checkpoint's tensors with a model's: keys, shapes and dtypes.

state dict in our layout -> `add_batch_counts` -> `check_dtypes`, `check_keys` -> a state dict that the model can load.
"""

from typing import List

import torch

from ..checks import some
from .layouts import StateDict

NAMED = 20  # keys of each kind in a message
COMPLEX_DTYPES = (torch.complex32, torch.complex64, torch.complex128)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def add_batch_counts(state_dict: StateDict, model: torch.nn.Module) -> StateDict:
    """Return a state dict with a count of 0 for each BatchNorm that lacks one; old torch and other programs save none.

    torch itself fills these counts in. Only a BatchNorm with momentum=None uses them.
    """
    state_dict = dict(state_dict)
    for key in model.state_dict():
        if key.endswith('.num_batches_tracked') and key.replace('num_batches_tracked', 'running_var') in state_dict:
            state_dict.setdefault(key, torch.tensor(0))
    return state_dict


def check_dtypes(state_dict: StateDict, model: torch.nn.Module) -> None:
    """Raise RuntimeError that lists the weights whose numbers would silently change: quantised, bool or complex ones.

    Counts (integers in the model) may be floating-point numbers, since a whole state dict may have been cast.
    """
    wrong = []
    for key, own in model.state_dict().items():
        value = state_dict.get(key)
        if value is None or value.dtype in (own.dtype, *FLOAT_DTYPES):
            continue
        if own.is_floating_point() or value.dtype in (torch.bool, *COMPLEX_DTYPES):
            wrong.append(f'{key} is {value.dtype} for {own.dtype}')
    if wrong:
        raise RuntimeError(
            f'The checkpoint holds other numbers than weights ({some(wrong, NAMED)}), which would not mean the same in '
            f'the model; expected one of {", ".join(map(str, FLOAT_DTYPES))}.'
        )


def check_keys(state_dict: StateDict, model: torch.nn.Module, adaptable=()) -> None:
    """Raise RuntimeError that lists missing keys, unexpected keys and wrong shapes, those in `adaptable` excepted."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = sorted(expected.keys() - state_dict.keys() - set(adaptable))
    unexpected = sorted(state_dict.keys() - expected.keys() - set(adaptable))
    wrong = [
        f'{key} {tuple(state_dict[key].shape)} for {shape}'
        for key, shape in expected.items()
        if key in state_dict and key not in adaptable and tuple(state_dict[key].shape) != shape
    ]
    if missing or unexpected or wrong:
        architecture = getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)
        raise RuntimeError(
            f'The checkpoint is not one of {architecture} as it was asked for: '
            f'missing keys: {some(missing, NAMED)}; unexpected keys: {some(unexpected, NAMED)}; '
            f'wrong shapes: {some(wrong, NAMED)}.{_norm_elsewhere(missing, unexpected)}'
        )


def _norm_elsewhere(missing: List[str], unexpected: List[str]) -> str:
    """Return what to do where only the place of a ViT's last norm differs, which timm moves with the pooling."""
    ours, theirs = ({key.partition('.')[0] for key in keys} for keys in (missing, unexpected))
    is_moved = (ours, theirs) == ({'fc_norm'}, {'norm'})
    return " global_pool 'avg' moves the norm behind the pooling; add fc_norm=False to leave it." if is_moved else ''
