"""Images that are there twice, as files of the same content under several names.

files -> `find_copies` -> which of them have the content of an earlier one.
"""

import hashlib
import logging
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from tqdm import tqdm

from ..walking import shown
from ..weights.checksums import sha256
from .checking import MANY

_logger = logging.getLogger(__name__)
BEGINNING = 1 << 16  # bytes of a file that tell most files of equal size apart


def find_copies(files: Sequence[Tuple[str, int]]) -> Optional[Dict[str, str]]:
    """Return each path whose content an earlier one has, with the first that has it; None where nobody looked.

    Only files of equal size are read, and no more of them than tells them apart; none where more than `MANY` are, too
    many to be read before a run begins.

    Args:
        files: (path, bytes) of each. One that can't be read is no copy; whoever opens it as an image will say so.
    """
    sizes = dict(files)
    alike = _alike([list(sizes)], sizes.__getitem__)
    count = sum(map(len, alike))
    if count > MANY:
        _logger.warning('data_dir: nobody looks for copies, since %d images have the size of another one.', count)
        return None
    alike = _alike(tqdm(alike, desc='looking for copies', leave=False), _beginning)
    alike = _alike(alike, lambda path: sha256(Path(path)))
    return {path: first for first, *others in alike for path in others}


def _alike(groups: Iterable[List[str]], trait: Callable[[str], Any]) -> List[List[str]]:
    """Return the parts of groups of paths that have a trait in common, each of two paths or more."""
    found = []
    for paths in groups:
        parts: Dict[Any, List[str]] = defaultdict(list)
        for path in paths:
            with suppress(OSError):
                parts[trait(path)].append(path)
        found += [part for part in parts.values() if len(part) > 1]
    return found


def _beginning(path: str) -> bytes:
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read(BEGINNING)).digest()


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


def check_left(before: Iterable[str], after: Iterable[str]) -> None:
    """Raise ValueError where a class has no training image any more, since all of its were copies.

    Args:
        before: The class of each training image, copies among them.
        after: That of those that are left.
    """
    lost = sorted(set(before) - set(after))
    if lost:
        raise ValueError(
            f'data_dir: all training images of class {shown(lost[0])!r} are copies of others; add some of its own.'
        )
