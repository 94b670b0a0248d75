"""Images that are there twice, as files of the same content under several names.

files -> `find_copies` -> which of them have the content of an earlier one.
"""

from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from ..folders import shown
from ..weights.checksums import sha256
from .checking import MANY


def find_copies(files: Sequence[Tuple[str, int]]) -> Dict[str, str]:
    """Return each path whose content an earlier one has, with the first that has it.

    Only files of equal size are read. Of more than `MANY` none are: they are too many to be read before a run begins.

    Args:
        files: (path, bytes) of each. One that can't be read is no copy; whoever opens it as an image will say so.
    """
    by_size: Dict[int, List[str]] = defaultdict(list)
    for path, size in files if len(files) <= MANY else ():
        by_size[size].append(path)
    copies: Dict[str, str] = {}
    for paths in by_size.values():
        first: Dict[str, str] = {}
        for path in paths if len(paths) > 1 else ():
            with suppress(OSError):
                digest = sha256(Path(path))
                if first.setdefault(digest, path) != path:
                    copies[path] = first[digest]
    return copies


def split_argument(role: str) -> str:
    """Return the argument that names the images of a role, such as 'validation'."""
    return 'val_split' if role == 'validation' else f'{role}_split'


def check_copies(copies: Dict[str, str], count: int, role: str) -> None:
    """Raise ValueError where half or more of the images of a role are copied in the training set: no accident is that.

    Args:
        copies: Training images, with the image of that role that each is a copy of.
        count: Images of the role.
    """
    number = len(set(copies.values()))
    if copies and 2 * number >= count:
        path, first = next(iter(copies.items()))
        raise ValueError(
            f'{split_argument(role)}: {number} of {count} {role} images are copies of training images, such as '
            f'{shown(first)}, which is {shown(path)}; take other images.'
        )
