"""Folders of images on disk: which class an image belongs to, and what is left out and why.

folder -> `walking.find_images` -> its images -> `find_classes` -> each with its class; `find_splits` says which folder
of a data folder is trained on, and which one validates.
"""

import logging
import os
import re
import unicodedata
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

from .checks import some
from .walking import File, Found, below, count_files, find_images, is_hidden, natural_order, shown

_logger = logging.getLogger(__name__)
# Split folders have these names, in lower case, once `split_role` took years, separators and words like 'set' off.
SPLITS = {
    'training': ('train', 'training', 'trn'),
    'validation': ('val', 'valid', 'validation', 'validate', 'eval', 'evaluation', 'dev'),
    'test': ('test', 'testing', 'tst', 'holdout'),
}
DEFAULT_TRAIN, DEFAULT_VAL = 'train', 'validation'


class Classes(NamedTuple):
    """Images with their classes, class names in natural order, and the reason for each path that is left out."""

    samples: List[Tuple[str, str]]
    names: List[str]
    left_out: Dict[str, str]
    files: Dict[str, File]


class Splits(NamedTuple):
    """The training folder, the validation folder if there is one, and the reason for each other path left out."""

    train: Path
    validation: Optional[Path]
    left_out: Dict[str, str]


def split_role(name: str) -> Optional[str]:
    """Return the split ('training', 'validation', 'test') that a folder's name means: Train, val2017, test-set."""
    core = re.sub(r'(19|20)\d\d$', '', name.casefold())
    core = re.sub(r'[\s_.-]', '', core)
    core = re.sub(r'(data|images?|imgs?|split|set)+$', '', core)
    return next((role for role, names in SPLITS.items() if core in names), None)


def is_text(name: str) -> bool:
    """Return whether a name has no control characters, and no bytes that are no text."""
    return not any(unicodedata.category(c) in ('Cc', 'Cs') for c in name)


def composed(name: str) -> str:
    """Return a name as most machines spell it; some (macOS) write a letter and its accent as two characters."""
    return unicodedata.normalize('NFC', name)


def folders_in(root: Union[str, Path]) -> List[str]:
    """Return the names of the folders that are not hidden, in natural order.

    Raises:
        FileNotFoundError, NotADirectoryError: where there is no folder.
        ValueError: for two names that are one on machines which ignore case.
    """
    root = Path(root)
    if not root.is_dir():
        hint = '; unpack it' if root.is_file() and root.suffix in ('.zip', '.tar', '.gz', '.tgz', '.bz2', '.xz') else ''
        kind = NotADirectoryError if root.exists() else FileNotFoundError
        raise kind(f'data_dir: {shown(root)} is not a folder{hint}.')
    names = sorted((name for name in _listed(root) if (root / name).is_dir()), key=natural_order)
    alike: Dict[str, str] = {}
    for name in names:
        other = alike.setdefault(composed(name).casefold(), name)
        if other != name:
            raise ValueError(
                f'data_dir: {shown(root)} has the folders {shown(other)!r} and {shown(name)!r}, which are one folder '
                'on machines that ignore case; rename one of them, or put their images together.'
            )
    return names


def _listed(root: Path) -> List[str]:
    try:
        return [name for name in os.listdir(root) if not is_hidden(name)]
    except OSError as error:
        raise type(error)(f'the folder {shown(root)} cannot be read ({error.strerror}).') from error


def find_classes(root: Union[str, Path], any_name: bool = False) -> Classes:
    """Find the images of a folder that has one folder per class; images anywhere below a class folder are of its class.

    Args:
        root: The folder.
        any_name: Let a class have the name of a split, such as 'train'.

    Raises:
        FileNotFoundError: where there is no folder, or no image in it.
        ValueError: for images outside class folders, a class without an image, and whatever lets the classes be read
            in two ways; the message names the folder.
    """
    root = Path(root)
    names = folders_in(root)
    found = find_images(root)
    if not found.images:
        raise FileNotFoundError(f'data_dir: Found 0 images in {shown(root)} and its folders{_reason(root, found)}.')
    places = [tuple(path.split(os.sep)) for path in below(root, found.images)]
    loose = [parts[0] for parts in places if len(parts) == 1]
    if loose:
        raise ValueError(
            f'data_dir: {shown(root)} holds images outside class folders, such as {shown(loose[0])}; put each into its '
            'class folder.'
        )
    _check_names(root, names, any_name)
    filled = {parts[0] for parts in places}
    for name in names:
        if name not in filled:
            reason = _reason(root / name, found)
            raise ValueError(
                f'data_dir: the class folder {shown(root / name)} has no image{reason}; add some, or remove it.'
            )
        if (root / name / 'model.safetensors').is_file():
            raise ValueError(f'data_dir: {shown(root / name)} holds a model and is no class; move it elsewhere.')
    for path, other in found.same.items():
        if len({name.split(os.sep)[0] for name in below(root, (path, other))}) > 1:
            raise ValueError(f'data_dir: {shown(path)} and {shown(other)} are one file in two classes; remove one.')
    _check_nested(root, names, places, any_name)
    samples = [(path, parts[0]) for path, parts in zip(found.images, places)]
    return Classes(samples, names, found.left_out, found.files)


def _reason(folder: Path, found: Found) -> str:
    """Return the end of a sentence about a folder without images: why, where something in it was left out."""
    why = found.left_out.get(str(folder))
    if why:
        return f', since it is {why}'
    inside = [path for path in found.left_out if folder in Path(path).parents]
    if not inside:
        return ''
    first = shown(os.path.relpath(inside[0], folder))
    return f' ({len(inside)} files or folders in it are left out, such as {first}: {found.left_out[inside[0]]})'


def _check_names(root: Path, names: Sequence[str], any_name: bool) -> None:
    for name in names:
        if not is_text(name):
            raise ValueError(f'data_dir: the class folder {shown(root / name)} has a name that is no text; rename it.')
    splits = [] if any_name else [name for name in names if split_role(name)]
    if splits:
        others = [name for name in names if name not in splits]
        beside = f' beside {_some(others)}' if others else ''
        raise ValueError(
            f'data_dir: {shown(root)} holds {_some(splits)}{beside}, named like a split and not like a class. Images '
            f"to train on belong into {root.name or root}/train/<class>; train_split '' lets it be a class."
        )


def _check_nested(root: Path, names: Sequence[str], places: Sequence[Tuple[str, ...]], any_name: bool) -> None:
    """Raise ValueError for folders in class folders that may be the classes themselves; log a warning for others."""
    nested = [parts for parts in places if len(parts) > 2]
    if not nested:
        return
    inner: Dict[str, Set[str]] = {name: set() for name in names}
    for parts in nested:
        inner[parts[0]].add(parts[1])
    outer = {name.casefold(): name for name in names}
    for name, *folders in sorted({parts[:-1] for parts in nested}):
        wrong = [folder for folder in folders if split_role(folder) or outer.get(folder.casefold(), name) != name]
        if wrong:
            kind = 'a split' if split_role(wrong[0]) else 'a class'
            raise ValueError(
                f'data_dir: the class folder {shown(root / name)} holds the folder {shown(wrong[0])!r}, named like '
                f'{kind}; classes are the first level of folders, so move it, or rename it.'
            )
    roles = {name: role for name in names for part in re.split(r'[\s_.-]', name) if (role := split_role(part))}
    if len(nested) == len(places) and len(set(roles.values())) > 1 and not any_name:
        first = next(iter(roles))
        place = f'{first}/{min(inner[first])}' if len(inner[first]) == 1 else first
        raise ValueError(
            f'data_dir: {_some(list(roles))} in {shown(root)} hold no image, but folders, and are named like splits; '
            'name the folders that hold the classes by train_split and val_split, such as '
            f"{place}; train_split '' lets them be classes."
        )
    first = inner[names[0]]
    if (
        len(nested) == len(places)
        and len(first) > 1
        and (len(names) == 1 or all(folders == first for folders in inner.values()))
    ):
        raise ValueError(
            f'data_dir: {_some(names)} in {shown(root)} hold no image, but each the folders {_some(sorted(first))}; '
            'either could be the classes. Classes are the first level of folders: move the images or the folders up.'
        )
    _logger.warning(
        'data_dir: %d of %d images of %s are in folders inside class folders, such as %s; they belong to the class '
        'folder, whatever the inner folders are named.',
        *(len(nested), len(places), shown(root), shown('/'.join(nested[0]))),
    )


def find_splits(root: Union[str, Path], train_split: str, val_split: str) -> Splits:
    """Find the folders of the training and the validation images in a data folder.

    Args:
        root: The data folder: class folders, or folders of splits with class folders in them.
        train_split: Name of the training folder; '' takes the folders of `root` for classes, whatever their names.
        val_split: Name of the validation folder; '' for none.

    Raises:
        FileNotFoundError: for a missing folder.
        ValueError: for split folders beside class folders, and for all else that can be read in two ways.
    """
    root = Path(root)
    names = folders_in(root)
    if not train_split:
        if val_split and (root / val_split).is_dir():
            raise ValueError(f"val_split: {val_split!r} is a folder, but train_split '' says that there is no split.")
        return Splits(root, None, {})
    if train_split == val_split:
        raise ValueError(f"val_split: got {val_split!r}, the same as train_split; '' holds a part of it out.")
    train = split_folder(root, names, train_split, 'train_split', DEFAULT_TRAIN)
    validation = split_folder(root, names, val_split, 'val_split', DEFAULT_VAL)
    if train is None:
        if validation is not None or any(split_role(name) for name in names):
            splits = [validation] if validation else [name for name in names if split_role(name)]
            others = [name for name in names if name not in splits]
            beside = f' beside {_some(others)}' if others else ''
            raise ValueError(
                f'data_dir: {shown(root)} holds {_some(splits)}{beside}, named like a split, but no folder '
                f"{train_split}/; put the class folders to train on into it (train_split '' lets a class have such a "
                'name).'
            )
        return Splits(root, None, {})
    if validation is not None and os.path.samefile(root / train, root / validation):
        raise ValueError(f'val_split: {validation}/ and {train}/ in {shown(root)} are the same folder.')
    used = {Path(name).parts[0] for name in (train, validation) if name}
    beside = _beside_splits(root, used, train, custom=train_split != DEFAULT_TRAIN and not split_role(train_split))
    return Splits(root / train, root / validation if validation else None, beside)


def split_folder(root: Path, names: Sequence[str], name: str, argument: str, default: str) -> Optional[str]:
    """Return the name of a split's folder, or of the only one with a similar name; None where none is needed."""
    if not name:
        return None
    if Path(name).is_absolute() or '..' in Path(name).parts or not Path(name).parts:
        raise ValueError(f'{argument}: got {name!r}, expected the name of a folder in data_dir.')
    if (root / name).is_dir():  # where case does not count, it may be spelt otherwise
        spelt = [other for other in names if other.casefold() == name.casefold()]
        return name if name in names or not spelt else spelt[0]
    role = split_role(name)
    alike = [other for other in names if role and split_role(other) == role]
    if len(alike) > 1:
        raise ValueError(f'{argument}: {shown(root)} has no {name}/, but {_some(alike)}; name one of them.')
    if not alike and name != default:
        raise FileNotFoundError(f'{argument}: {shown(root)} has no folder {name!r}.')
    return alike[0] if alike else None


def _beside_splits(root: Path, used: Set[str], train: str, custom: bool) -> Dict[str, str]:
    left_out: Dict[str, str] = {}
    for name in sorted(os.listdir(root), key=natural_order):
        path = root / name
        if name in used:
            continue
        if not path.is_dir() or is_hidden(name):
            left_out[str(path)] = 'hidden' if is_hidden(name) else 'outside the folders of the splits'
        elif custom or split_role(name):
            left_out[str(path)] = f'a folder that this run does not use{count_files(str(path))}'
        elif find_images(path).images:
            raise ValueError(
                f'data_dir: {shown(root)} holds the split folder {train}/ beside {shown(name)}/ with images. Put class '
                f"folders into {train}/; or, if {train} is a class, say so by train_split ''."
            )
        else:
            left_out[str(path)] = 'a folder without images'
    return left_out


def _some(names: Iterable[str]) -> str:
    return some((f'{shown(name)}/' for name in names), 5)
