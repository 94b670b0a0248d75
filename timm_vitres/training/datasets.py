"""Image folders and timm's datasets are opened as a run's training and validation sets.

folder or name -> `load_data` -> `Data`: a training and a validation set of PIL images, class names, counts. Given the
result of `Data.record`, `load_data` returns the same images in the same order again.
"""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

from PIL import Image
from torch.utils.data import Dataset

from ..checks import some
from ..data import open_image
from ..folders import composed, find_classes, find_splits, folders_in
from ..walking import File, Found, below, find_images, shown
from .checking import MANY, BackgroundCheck, raise_for, unreadable
from .class_maps import read_class_map
from .copies import check_copies, check_left, find_copies, split_argument
from .named_datasets import load_named, reload_named, steps
from .settings import FinetuneCfg
from .splits import SETS, Data, Subset, class_counts, read_record, stratified_split

_logger = logging.getLogger(__name__)
UNREADABLE = 'Mend or remove it, or leave such images out with --skip-bad.'
FOUND_LATE = 'Mend or remove it, or leave such images out with --skip-bad; then begin another run.'


def load_data(
    cfg: FinetuneCfg,
    mode: str,
    recorded: Optional[Dict[str, Any]] = None,
    looks: bool = True,
    holds_out: bool = True,
) -> Data:
    """Open the training and the validation set of a run; if only one set is given, split it.

    Args:
        cfg: The run.
        mode: PIL's mode of the images ('L', 'RGB', 'RGBA').
        recorded: The result of `Data.record` when the run began: its images, split and classes are taken, whatever the
            settings say, and images that were added since are left out.
        looks: Whether a recorded folder is looked through for images that are gone; another process may have done it.
        holds_out: Whether a part of a folder without validation images is held out; else its validation set is empty.

    Raises:
        FileNotFoundError, ValueError: for missing or impossible data; the message says what, and what is allowed.
        OSError: for a folder that can't be read.
    """
    if cfg.is_folder and not cfg.data_dir:
        raise ValueError('data_dir: no folder given; give an image folder.')
    if not cfg.is_folder:
        return load_named(cfg, mode) if recorded is None else reload_named(cfg, mode, recorded)
    for name in ('input_key', 'target_key', 'train_num_samples', 'val_num_samples'):
        if getattr(cfg, name) is not None:
            raise ValueError(f'{name}: an image folder takes none; it is for datasets that are named by dataset.')
    if recorded is None and cfg.skip_bad and cfg.no_check:
        raise ValueError('skip_bad: got no_check, too, by which no bad image is found; give one.')
    return _load_folder(cfg, mode, holds_out) if recorded is None else _reload_folder(cfg, mode, recorded, looks)


def _load_folder(cfg: FinetuneCfg, mode: str, holds_out: bool) -> Data:
    root = Path(str(cfg.data_dir))
    splits = find_splits(root, cfg.train_split, cfg.val_split)
    names = read_class_map(cfg.class_map) if cfg.class_map else []
    class_map = {name: index for index, name in enumerate(names)}
    known_to = f'class_map {shown(cfg.class_map)}' if names else 'the training data'
    shared = dict(mode=mode, known_to=known_to)
    # names are checked first, since opening all images takes long
    train = val = ImageFolder(splits.train, class_map, any_name=splits.train != root or not cfg.train_split, **shared)
    if len(train.classes) < 2:
        raise ValueError(
            f'data_dir: {shown(splits.train)} has the one class {shown(train.classes[0])!r}; at least two are needed.'
        )
    if splits.validation is not None:
        val = ImageFolder(splits.validation, train.class_to_idx, any_name=True, **shared)
        check_apart(train, val)
    folders = [train] if train is val else [val, train]
    count = sum(map(len, folders))
    is_checked_now = not cfg.no_check and (cfg.skip_bad or count <= MANY)
    if is_checked_now and count > MANY:
        _logger.info('skip_bad: all %d images are opened before training, which may take minutes.', count)
    for folder in folders if is_checked_now else []:
        folder.check_images(cfg.skip_bad, cfg.workers)
    copies = _copies(folders)
    if splits.validation is None and not holds_out:
        train_indices, val_indices, how = range(len(train)), range(0), 'none held out'
    elif splits.validation is None:
        train_indices, val_indices = _split(cfg, train, copies)
        how = f'validation on {len(val_indices)} of them, held out class by class ({cfg.val_frac:g}, seed {cfg.seed})'
        count = len(train_indices) + len(val_indices)
    else:
        of_val = {path for path, _ in val.samples}
        copied = {path: first for path, first in copies.items() if first in of_val and path not in of_val}
        check_copies(copied, len(val), 'validation')
        targets, names = train.targets, train.classes
        train.leave_out({path: f'a copy of {shown(first)}, which is validated on' for path, first in copied.items()})
        check_left(*({names[target] for target in set(kept)} for kept in (targets, train.targets)))
        train_indices, val_indices = range(len(train)), range(len(val))
        how = f'validation on the {len(val)} images of {splits.validation.name}/'
        count = len(train)
    left_out = {**splits.left_out, **train.left_out, **val.left_out}
    sets = Subset(train, train_indices), Subset(val, val_indices)
    check = None if cfg.no_check or is_checked_now else _background_check(sets, FOUND_LATE)
    _say_empty(train)
    description = f'{count} images of {len(train.classes)} classes in {shown(root.resolve().name)}; {how}'
    if left_out:
        description += f'; {len(left_out)} files or folders left out'
    return _folder_data(root, sets, description, left_out, check)


def _copies(folders: Sequence['LabelledImages']) -> Dict[str, str]:
    """Return the copies among the images of folders, of which the first one's are kept; see `find_copies`."""
    labels = {path: label for folder in folders for path, label in folder.samples}
    files = {path: file for folder in folders for path, file in folder.files.items()}
    copies = find_copies([(path, files[path].size) for path in labels]) or {}
    others = [(path, first) for path, first in copies.items() if labels[path] != labels[first]]
    if others:
        names = map(shown, others[0])
        _logger.warning('data_dir: %d images are copies of one of another class: %s of %s.', len(others), *names)
    return copies


def _split(cfg: FinetuneCfg, images: 'ImageFolder', copies: Dict[str, str]) -> Tuple[List[int], List[int]]:
    """Hold a part of each class out; copies of what is trained on are so, too, those of what is held out left out."""
    paths, targets = [path for path, _ in images.samples], images.targets
    once = [index for index, path in enumerate(paths) if path not in copies]
    own = Counter(targets[index] for index in once)
    for target, count in Counter(targets).items():
        if own[target] < min(count, 2):
            raise ValueError(
                f'data_dir: of the {count} images of class {shown(images.classes[target])!r} {own[target]} is no copy, '
                'but two or more are needed; add some.'
            )
    parts = stratified_split([targets[index] for index in once], cfg.val_frac, cfg.seed, images.classes)
    kept, held = ([once[index] for index in part] for part in parts)
    trained = {paths[index] for index in kept}
    kept = sorted(kept + [index for index, path in enumerate(paths) if copies.get(path) in trained])
    others = {path: first for path, first in copies.items() if first not in trained}
    images.left_out.update({path: f'a copy of {shown(first)}, which is held out' for path, first in others.items()})
    return kept, held


def _folder_data(
    root: Path,
    sets: Tuple[Subset, Subset],
    description: str,
    left_out: Dict[str, str],
    check: Optional[BackgroundCheck],
) -> Data:
    train = sets[0].dataset
    lists = {split: listed(root, images) for split, images in zip(SETS, sets)}
    targets = train.targets
    counts = class_counts([targets[index] for index in sets[0].indices], len(train.classes))
    return Data(*sets, train.classes, counts, description, left_out, lists, check)


def listed(root: Path, images: Subset) -> List[List[Any]]:
    """Return a record's entry of images in a folder: [path in it, class name, bytes] of each."""
    folder, names = images.dataset, images.dataset.classes
    chosen = [folder.samples[index] for index in images.indices]
    places = below(root, (path for path, _ in chosen))
    return [
        [place.replace(os.sep, '/'), names[target], folder.files[path].size]
        for place, (path, target) in zip(places, chosen)
    ]


def _background_check(sets: Tuple[Subset, Subset], advice: str) -> BackgroundCheck:
    """Return a check of both sets, not begun; validation images come first, since a run needs them last."""
    train, val = ([images.dataset.samples[index][0] for index in images.indices] for images in sets)
    _logger.info('%d images: they are opened while the run trains; one that cannot be read ends it.', len(train + val))
    return BackgroundCheck(val + train, sets[0].dataset.mode, advice)


def _say_empty(train: 'LabelledImages') -> None:
    filled = set(train.targets)
    empty = [shown(name) for index, name in enumerate(train.classes) if index not in filled]
    if empty:
        _logger.warning(
            'class_map: %d of its %d classes have no image to train on, such as %s.',
            *(len(empty), len(train.classes), empty[0]),
        )


def check_apart(
    train: 'LabelledImages', val: 'LabelledImages', role: str = 'validation', other: str = 'training'
) -> None:
    """Raise ValueError if the images of a role share files with another set, that of training, or are a copy of it."""
    argument = split_argument(role)

    def identities(images: LabelledImages) -> Dict[Any, str]:
        files = images.files
        keys = [(files[path].identity, path) for path, _ in images.samples]
        return {key if key[1] else os.path.realpath(path): path for key, path in keys}

    ours, theirs = identities(train), identities(val)
    both = [(ours[key], path) for key, path in theirs.items() if key in ours]
    if both:
        raise ValueError(
            f'{argument}: {len(both)} of {len(val)} {role} images are {other} images, such as {shown(both[0][1])}, '
            f'which is {shown(both[0][0])}.'
        )

    def contents(images: LabelledImages) -> List[Tuple[str, int]]:
        paths = [path for path, _ in images.samples]
        return [(place, images.files[path].size) for place, path in zip(below(images.root, paths), paths)]

    def begin_alike() -> bool:
        pairs = list(zip(train.samples, val.samples))
        return all(find_copies([(path, 0) for path, _ in pairs[index]]) for index in steps(len(pairs)))

    # other images may have the same names and sizes, such as numbered ones that are not compressed
    if len(train) == len(val) and contents(train) == contents(val) and begin_alike():
        raise ValueError(
            f'{argument}: {shown(val.root)} is a copy of {shown(train.root)} (all names and sizes are '
            'the same); take other images.'
        )


def _reload_folder(cfg: FinetuneCfg, mode: str, recorded: Dict[str, Any], looks: bool) -> Data:
    root = Path(str(cfg.data_dir))
    folders_in(root)  # this raises if the folder can't be used
    lists = read_record(recorded, list)
    names = [str(name) for name in recorded['label_names']]
    class_to_idx = {name: index for index, name in enumerate(names)}
    # what the run does not use may be unreadable
    found = find_images(root, strict=False) if looks else Found([], {}, {}, {})
    samples: Dict[str, List[Tuple[str, int]]] = {}
    sizes: Dict[str, File] = {}
    changed: List[str] = []
    start = '' if str(root) == '.' else os.path.join(root, '')
    for split, files in lists.items():
        samples[split] = []
        for name, label, size in files:
            path = start + name.replace('/', os.sep)
            samples[split].append((path, class_to_idx[label]))
            file = (found.files.get(path) or _file(path)) if looks else File(size, (0, 0))
            if file is None:
                places = (path, *map(str, Path(path).parents))
                reason = next((found.left_out[place] for place in places if place in found.left_out), 'gone')
                changed.append(f'{shown(name)} ({reason})')
            elif file.size != size:
                changed.append(f'{shown(name)} ({file.size} bytes, not {size})')
            else:
                sizes[path] = file
    if changed:
        raise ValueError(
            f'data_dir: images of this run are gone or changed in {shown(root)}: {some(changed, 5)}; put them back, or '
            'begin another run.'
        )
    known: Set[str] = {path for split in samples.values() for path, _ in split}
    if len(known) < sum(map(len, samples.values())):
        raise ValueError('recorded: an image is named twice; begin another run.')
    left_out = {path: reason for path, reason in found.left_out.items() if path not in known}
    left_out.update({path: 'not part of this run' for path in found.images if path not in known})
    both = [LabelledImages(root, samples[split], class_to_idx, sizes, mode) for split in SETS]
    sets = Subset(both[0], range(len(both[0]))), Subset(both[1], range(len(both[1])))
    check = None
    if not cfg.no_check and len(known) > MANY:
        check = _background_check(sets, 'The run began with it: put the file back as it was, or begin another run.')
    for images in both if not cfg.no_check and check is None else []:
        images.check('It could be read when the run began; put it back.', cfg.workers)
    return _folder_data(root, sets, recorded['description'], left_out, check)


def _file(path: str) -> Optional[File]:
    """Return what is known of a file that is no longer found as an image: a link to it may have taken its place."""
    if not os.path.isfile(path):
        return None
    info = os.stat(path)
    return File(info.st_size, (info.st_dev, info.st_ino))


class LabelledImages(Dataset):
    """Image files with classes, opened by `open_image`.

    Args:
        root: The folder that they are in.
        samples: (path, class index) of each.
        class_to_idx: Class name -> index.
        files: Path -> what is known of the file, its size among it.
        mode: The PIL mode of the images.
    """

    def __init__(
        self,
        root: Union[str, Path],
        samples: List[Tuple[str, int]],
        class_to_idx: Dict[str, int],
        files: Dict[str, File],
        mode: str = 'RGB',
    ):
        self.root = str(root)
        self.samples = samples
        self.class_to_idx = class_to_idx
        self.files = files
        self.mode = mode

    @property
    def targets(self) -> List[int]:
        """The class index of every image."""
        return [target for _, target in self.samples]

    @property
    def classes(self) -> List[str]:
        """The class names, by index."""
        return sorted(self.class_to_idx, key=self.class_to_idx.__getitem__)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        path, target = self.samples[index]
        return open_image(path, self.mode), target

    def check(self, advice: str, workers: int) -> None:
        """Open every image; raise ValueError, with an advice, for the first that can't be read."""
        raise_for(self.unreadable(workers), advice)

    def unreadable(self, workers: int = 1) -> Dict[str, str]:
        """Open every image; return the reason for each path that can't be read."""
        return unreadable([path for path, _ in self.samples], self.mode, workers)


class ImageFolder(LabelledImages):
    """A folder with one sub-folder per class; images anywhere below a sub-folder are of its class.

    Args:
        root: The folder.
        class_map: Class name -> index; by default the sub-folders' names in natural order.
        any_name: Let a class have the name of a split, such as 'train'.
        known_to: What has all the classes of `class_map`, in the words of an error message.

    Attributes:
        left_out: The reason for each path that is no image of the set.

    Raises:
        FileNotFoundError: for a missing or empty folder.
        ValueError: for images outside class folders, a class without an image, an unknown class, folders that can be
            read in two ways; the message names it.
    """

    def __init__(
        self,
        root: Union[str, Path],
        class_map: Optional[Dict[str, int]] = None,
        mode: str = 'RGB',
        any_name: bool = False,
        known_to: str = 'the training data',
    ):
        found = find_classes(root, any_name)
        class_map = class_map or {name: index for index, name in enumerate(found.names)}
        indices = {composed(name): index for name, index in class_map.items()}
        unknown = [shown(name) for name in found.names if composed(name) not in indices]
        if unknown:
            raise ValueError(f'data_dir: {shown(root)} has classes that {known_to} lacks: {", ".join(unknown)}.')
        samples = [(path, indices[composed(name)]) for path, name in found.samples]
        super().__init__(root, samples, class_map, found.files, mode)
        self.left_out = found.left_out

    def check_images(self, skip_bad: bool = False, workers: int = 1) -> None:
        """Open every image; raise ValueError if one is unreadable or, with `skip_bad`, if all of a class are."""
        if not skip_bad:
            return self.check(UNREADABLE, workers)
        bad = self.unreadable(workers)
        missing = set(self.targets) - {target for path, target in self.samples if path not in bad}
        if missing:
            name = shown(self.classes[min(missing)])
            raise ValueError(f'data_dir: none of the images of class {name!r} can be read.')
        self.leave_out(bad)

    def leave_out(self, reasons: Dict[str, str]) -> None:
        """Leave images out, for a reason each."""
        self.samples = [sample for sample in self.samples if sample[0] not in reasons]
        self.left_out = {**self.left_out, **reasons}
