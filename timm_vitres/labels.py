"""Names of classes: what users, config.json and transformers give -> a list of strings, one for each class."""

import os
from numbers import Number
from typing import Any, Iterable, List, Mapping

import numpy as np


def normalise_label_names(names: Any, num_classes: int) -> List[str]:
    """Return the names of a model's classes as plain strings, by index: what config.json can hold.

    Args:
        names: A sequence of names by index, or a dict of them whose keys are the indices, as numbers or strings
            (`id2label` of transformers). Numbers and paths become strings.

    Raises:
        ValueError: for another number of names than `num_classes`, a dict whose keys are not 0, 1, 2 and so on, what
            has no order (a set), and a name that is neither text, number nor path.
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
