"""Names of classes: what users, config.json and transformers give -> a list of strings, one for each class."""

import os
import unicodedata
from contextlib import suppress
from numbers import Number
from typing import Any, Iterable, List, Mapping, Sequence

import numpy as np
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn


def label_names(model: nn.Module) -> List[str]:
    """Return the names of a model's classes: its config's, else ImageNet's if their number fits, else 'class 0', ..."""
    num_classes = int(model.num_classes)
    if names := own_names(model):
        return names
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(num_classes)]
    return [f'class {index}' for index in range(num_classes)]


def own_names(model: nn.Module) -> List[str]:
    """Return the names that a model's cfg has for its classes; [] where it has none, or those of others."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    with suppress(ValueError):
        return normalise_label_names(cfg.get('label_names'), int(model.num_classes))
    return []


def printable(text: str) -> str:
    """Return text on one line: its control characters, bytes that are no text, and turns of direction are escaped."""
    return ''.join(c.encode('unicode_escape').decode() if _moves(c) else c for c in text)


def _moves(c: str) -> bool:
    is_control = unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp')
    return is_control or c in '\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069'


def check_logits(logits: torch.Tensor, names: Sequence[str]) -> None:
    """Raise ValueError where a model returns other classes than it says, such as one whose head was set by hand."""
    if logits.shape[-1] != len(names):
        raise ValueError(
            f'model: it returns {logits.shape[-1]} logits, but says that it has {len(names)} classes; '
            'reset_classifier makes a head of another number.'
        )


def normalise_label_names(names: Any, num_classes: int) -> List[str]:
    """Return the names of a model's classes as plain strings, by index, for config.json.

    Args:
        names: A sequence of names by index, or a dict of them whose keys are the indices, as numbers or strings
            (`id2label` of transformers). Numbers and paths become strings.

    Raises:
        ValueError: for another number of names than `num_classes`, a dict whose keys are not 0, 1, 2 and so on, names
            without an order (a set), and a name that is neither text, number nor path.
    """
    if isinstance(names, (str, bytes, set, frozenset)) or not isinstance(names, (Mapping, Iterable)):
        raise ValueError(f'label_names: got {names!r:.80}, expected a list of names, one for each class.')
    names = _by_index(names) if isinstance(names, Mapping) else list(names)
    if len(names) != num_classes:
        raise ValueError(f'label_names: got {len(names)}, but the model has {num_classes} classes.')
    return [_text(index, name) for index, name in enumerate(names)]


def _by_index(names: Mapping[Any, Any]) -> List[Any]:
    by_index = {str(key): name for key, name in names.items()}  # JSON has no other keys than strings
    indices = [str(index) for index in range(len(names))]
    if sorted(by_index) != sorted(indices):
        raise ValueError(
            f'label_names: got a dict with the keys {", ".join(map(repr, names))!s:.80}, expected 0 to '
            f'{len(names) - 1}, with the names as values.'
        )
    return [by_index[index] for index in indices]


def _text(index: int, name: Any) -> str:
    if isinstance(name, (str, Number, np.generic, os.PathLike)) and not isinstance(name, bytes):
        return str(name)
    raise ValueError(
        f'label_names: the name of class {index} is {name!r:.80}, which is {type(name).__name__}; expected text, a '
        f'number or a path.'
    )
