"""Formats that a program has taught Pillow, such as HEIC by pillow_heif: the workers of its runs must know them, too.

`taught` -> sent to a process -> `teach`. A process that is forked knows them already; one that is started anew
(Windows, macOS, Python 3.14) does not.
"""

import pickle
from typing import Any, Dict, NamedTuple

from PIL import Image


class Format(NamedTuple):
    """How Pillow opens a format: what makes an image of a file, and what knows a file by its first bytes."""

    factory: Any
    accept: Any


def taught() -> Dict[str, Format]:
    """Return the formats that Pillow opens by another package, and that another process can be told of."""
    Image.init()
    found = {}
    for name, (factory, accept) in Image.OPEN.items():
        if str(getattr(factory, '__module__', '')).partition('.')[0] == 'PIL':
            continue
        try:
            pickle.dumps((factory, accept))
        except (pickle.PicklingError, AttributeError, TypeError):  # a lambda, or a function within a function
            continue
        found[name] = Format(factory, accept)
    return found


def teach(formats: Dict[str, Format], worker: int = 0) -> None:
    """Let Pillow open formats in this process.

    Args:
        worker: The number that torch gives to the function which begins a worker; it changes nothing.
    """
    Image.init()
    for name, (factory, accept) in formats.items():
        if name not in Image.OPEN:
            Image.register_open(name, factory, accept)
