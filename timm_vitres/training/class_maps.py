"""Class maps: the order of classes that the user gives, and the class indices of labels as a dataset stores them.

text file -> `read_class_map` -> names by index; a dataset's names and a map's -> `Labels` -> label -> class index.
"""

import re
from numbers import Integral
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from ..checks import read_text, some
from ..folders import composed, is_text
from ..walking import shown


def read_class_map(path: str) -> List[str]:
    """Read class names from a text file, one a line, in the order of their indices.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that is no text, an empty line between names, a name that comes twice, and fewer than
            two names.
    """
    file = Path(path)
    if file.suffix.lower() in ('.pkl', '.pickle'):
        raise ValueError(f'class_map: {shown(file)} is a pickle, expected a text file with one class name a line.')
    if not file.is_file():
        raise FileNotFoundError(f'class_map: there is no file {shown(file)}.')
    names = [line.strip() for line in read_text('class_map', file).rstrip().splitlines()]
    lines: Dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name or not is_text(name):
            raise ValueError(f'class_map: line {number} of {shown(file)} is {name!r}, expected the name of a class.')
        first = lines.setdefault(composed(name), number)
        if first != number:
            raise ValueError(f'class_map: {shown(file)} names {name!r} twice, in lines {first} and {number}.')
    if len(names) < 2:
        raise ValueError(f'class_map: {shown(file)} has {len(names)} class names; at least two are needed.')
    return names


def order_of(names: Sequence[Any], known: Sequence[Any]) -> Optional[List[int]]:
    """Return the place of each name among as many known ones, however both are spelt; None where they are others."""
    spelt, others = ([composed(str(name)) for name in each] for each in (names, known))
    if spelt == others:  # names may repeat: ImageNet has two cranes
        return list(range(len(others)))
    places = {name: index for index, name in enumerate(others)}
    order = [places.get(name, -1) for name in spelt]
    return order if sorted(order) == list(range(len(known))) else None


def first_other(names: Sequence[Any], known: Sequence[Any]) -> Any:
    """Return the first name that is not among known ones; where all are, the first."""
    spelt = {composed(str(name)) for name in known}
    return next((name for name in names if composed(str(name)) not in spelt), names[0])


class Labels:
    """Labels as a dataset stores them -> class indices.

    Labels are numbers or text. A class map orders the classes by their names, where the dataset has names or the
    labels are text; where labels are numbers without names, the map names them.

    Args:
        source: The dataset's own class names by label; empty if it has none.
        class_map: The names of a class map by class index, if there is one.

    Attributes:
        names: The class names by class index; empty if nothing names them.

    Raises:
        ValueError: for a class of the dataset that the class map lacks.
    """

    def __init__(self, source: Sequence[str], class_map: Optional[Sequence[str]] = None):
        self.names = list(source if class_map is None else class_map)
        self.indices = {composed(name): index for index, name in enumerate(self.names)}
        self.is_mapped = class_map is not None
        self.moved: Optional[List[int]] = None
        lines = {line: int(name) for line, name in enumerate(self.names) if re.fullmatch('[0-9]+', name)}
        numbers, are_all = list(lines.values()), len(lines) == len(self.names)
        # a label that is a number could mean a name as well as a line; where all are numbers that rise, it is a line
        is_rising = are_all and numbers == sorted(numbers)
        is_clear = is_rising or all(line == number or number >= len(self.names) for line, number in lines.items())
        self.are_disordered = self.is_mapped and not source and not is_clear
        if class_map is not None and source:
            missing = [shown(name) for name in source if composed(name) not in self.indices]
            if missing:
                raise ValueError(f'class_map: the map lacks classes of the dataset: {some(missing, 5)}.')
            self.moved = [self.indices[composed(name)] for name in source]

    def __call__(self, label: Any) -> int:
        """Return the class index of a label; ValueError for a label that stands for no class."""
        if isinstance(label, str):
            if composed(label) not in self.indices:
                hint = 'the map lacks it' if self.is_mapped else 'name the classes, in their order, by class_map'
                raise ValueError(f'class_map: a label is {label!r}; {hint}.')
            return self.indices[composed(label)]
        if not isinstance(label, Integral):
            raise ValueError(f'target_key: a label is {label!r:.80}, expected a class number or the name of a class.')
        index = int(label)
        limit = len(self.names) if self.moved is None else len(self.moved)
        if index < 0 or (limit and index >= limit):
            expected = f'0 to {limit - 1}' if limit else '0 or more'
            raise ValueError(f'dataset: a label is {index}, expected {expected}.')
        if self.are_disordered:
            raise ValueError(
                f'class_map: a label is {index}, but names in the map are numbers of other lines than their own; give '
                'a map whose numbers are those of its lines, counted from 0, or names of another kind.'
            )
        return index if self.moved is None else self.moved[index]
