"""Image folders and timm's datasets are opened as a run's training and validation sets.

folder or name -> `load_data` -> `Data`: a training and a validation set of PIL images, class names, counts. Given the
result of `Data.record`, `load_data` returns the same images in the same order again.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple, Union

from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from tqdm import tqdm

from ..data import open_image
from ..folders import find_classes, find_images, find_splits, folders_in, shown
from .named_datasets import load_named, reload_named
from .settings import FinetuneCfg
from .splits import Data, Subset, check_fraction, class_counts, class_names, read_record, stratified_split

# A dataset of one of these names is an image folder; timm would open it by its own reader or by torchvision's.
FOLDER_NAMES = ('', 'folder', 'image_folder', 'imagefolder', 'torch/folder', 'torch/image_folder')


def load_data(cfg: FinetuneCfg, mode: str, recorded: Optional[Dict[str, Any]] = None) -> Data:
    """Open the training and the validation set of a run; if only one set is given, split it.

    Args:
        cfg: The run.
        mode: PIL's mode of the images ('L', 'RGB', 'RGBA').
        recorded: The result of `Data.record` when the run began: its images, split and classes are taken, whatever the
            settings say, and images that were added since are left out.

    Raises:
        FileNotFoundError, ValueError: for missing or impossible data; the message says what, and what is allowed.
        OSError: for a folder that can't be read.
    """
    is_folder = (cfg.dataset or '').lower() in FOLDER_NAMES
    if is_folder and not cfg.data_dir:
        raise ValueError('data_dir: no folder given; give an image folder.')
    if not is_folder:
        return load_named(cfg, mode) if recorded is None else reload_named(cfg, mode, recorded)
    return _load_folder(cfg, mode) if recorded is None else _reload_folder(cfg, mode, recorded)


def _load_folder(cfg: FinetuneCfg, mode: str) -> Data:
    root = Path(str(cfg.data_dir))
    splits = find_splits(root, cfg.train_split, cfg.val_split)
    any_name = splits.train != root or not cfg.train_split
    # names are checked first, since opening all images takes long
    train = val = ImageFolder(splits.train, input_img_mode=mode, check=False, any_name=any_name)
    if len(train.classes) < 2:
        raise ValueError(
            f'data_dir: {shown(splits.train)} has the one class {shown(train.classes[0])!r}; at least two are needed.'
        )
    if splits.validation is None:
        check_fraction(cfg.val_frac, cfg.seed)
    else:
        class_map = train.reader.class_to_idx
        val = ImageFolder(splits.validation, class_map, input_img_mode=mode, check=False, any_name=True)
        _check_apart(train, val)
    for folder in [train] if train is val else [train, val]:
        if not cfg.no_check:
            folder.check_images(cfg.skip_bad)
    left_out = {**splits.left_out, **train.left_out, **val.left_out}
    if splits.validation is None:
        train_indices, val_indices = stratified_split(train.targets, cfg.val_frac, cfg.seed, train.classes)
        how = f'validation on {len(val_indices)} of them, held out class by class ({cfg.val_frac:g}, seed {cfg.seed})'
    else:
        train_indices, val_indices = range(len(train)), range(len(val))
        how = f'validation on the {len(val)} images of {splits.validation.name}/'
    sets = Subset(train, train_indices, mode), Subset(val, val_indices, mode)
    description = f'{len(train)} images of {len(train.classes)} classes in {root.resolve().name}; {how}'
    if left_out:
        description += f'; {len(left_out)} files or folders left out'
    return _folder_data(root, *sets, description, left_out)


def _folder_data(root: Path, train: Subset, val: Subset, description: str, left_out: Dict[str, str]) -> Data:
    lists = {'train': _files(root, train), 'validation': _files(root, val)}
    names = train.dataset.classes
    targets = train.dataset.targets
    counts = class_counts([targets[index] for index in train.indices], len(names))
    return Data(train, val, names, counts, description, left_out, lists)


def _files(root: Path, images: Subset) -> List[List[Any]]:
    samples, names = images.dataset.reader.samples, images.dataset.classes
    chosen = [samples[index] for index in images.indices]
    return [[Path(path).relative_to(root).as_posix(), names[target], os.path.getsize(path)] for path, target in chosen]


def _check_apart(train: 'LabelledImages', val: 'LabelledImages') -> None:
    """Raise ValueError if the validation set shares files with the training set, or is a copy of it."""

    def identities(images: LabelledImages) -> Dict[Any, str]:
        infos = [(os.stat(path), path) for path, _ in images.reader.samples]
        return {(info.st_dev, info.st_ino) if info.st_ino else os.path.realpath(path): path for info, path in infos}

    ours, theirs = identities(train), identities(val)
    both = [(ours[key], path) for key, path in theirs.items() if key in ours]
    if both:
        raise ValueError(
            f'val_split: {len(both)} of {len(val)} validation images are training images, such as {shown(both[0][1])}, '
            f'which is {shown(both[0][0])}.'
        )

    def contents(images: LabelledImages) -> List[Tuple[str, int]]:
        paths = [path for path, _ in images.reader.samples]
        return [(os.path.relpath(path, images.reader.root), os.path.getsize(path)) for path in paths]

    if len(train) == len(val) and contents(train) == contents(val):
        raise ValueError(
            f'val_split: {shown(val.reader.root)} is a copy of {shown(train.reader.root)} (all names and sizes are the '
            'same); validate on other images.'
        )


def _reload_folder(cfg: FinetuneCfg, mode: str, recorded: Dict[str, Any]) -> Data:
    root = Path(str(cfg.data_dir))
    folders_in(root)  # this raises if the folder can't be used
    lists = read_record(recorded, list)
    names = [str(name) for name in recorded['label_names']]
    class_to_idx = {name: index for index, name in enumerate(names)}
    samples: Dict[str, List[Tuple[str, int]]] = {}
    changed: List[str] = []
    for split, files in lists.items():
        samples[split] = []
        for name, label, size in files:
            path = root / name
            samples[split].append((str(path), class_to_idx[label]))
            if not path.is_file():
                changed.append(f'{shown(name)} (gone)')
            elif path.stat().st_size != size:
                changed.append(f'{shown(name)} ({path.stat().st_size} bytes, not {size})')
    if changed:
        more = f' and {len(changed) - 5} more' if len(changed) > 5 else ''
        raise ValueError(
            f'data_dir: images of this run are gone or changed in {shown(root)}: {", ".join(changed[:5])}{more}; put '
            'them back, or begin another run.'
        )
    known: Set[str] = {path for split in samples.values() for path, _ in split}
    if len(known) < sum(map(len, samples.values())):
        raise ValueError('recorded: an image is named twice; begin another run.')
    found = find_images(root)
    left_out = {path: reason for path, reason in found.left_out.items() if path not in known}
    left_out.update({path: 'not part of this run' for path in found.images if path not in known})
    sets: List[Subset] = []
    for split in ('train', 'validation'):
        images = LabelledImages(FolderReader(root, samples[split], class_to_idx), mode)
        if not cfg.no_check:
            images.check('It could be read when the run began; put it back.')
        sets.append(Subset(images, range(len(images)), mode))
    return _folder_data(root, *sets, recorded['description'], left_out)


class FolderReader(Reader):
    """A timm reader of known files: `samples` holds (path, class index), `class_to_idx` class name -> index."""

    def __init__(self, root: Union[str, Path], samples: List[Tuple[str, int]], class_to_idx: Dict[str, int]):
        super().__init__()
        self.root = str(root)
        self.samples = samples
        self.class_to_idx = class_to_idx

    def __getitem__(self, index: int):
        path, target = self.samples[index]
        return open(path, 'rb'), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


class LabelledImages(ImageDataset):
    """timm's `ImageDataset` of files with classes, opened by `open_image`."""

    def __init__(self, reader: FolderReader, input_img_mode: str = 'RGB'):
        super().__init__(reader.root, reader=reader, input_img_mode=input_img_mode)

    @property
    def targets(self) -> List[int]:
        """The class index of every image."""
        return [target for _, target in self.reader.samples]

    @property
    def classes(self) -> List[str]:
        """The class names, by index."""
        return class_names(self)

    def __getitem__(self, index: int):
        path, target = self.reader.samples[index]
        image = open_image(path, self.input_img_mode)
        return image if self.transform is None else self.transform(image), target

    def check(self, advice: str) -> None:
        """Open every image; raise ValueError, with an advice, for the first that can't be read."""
        bad = self._unreadable()
        if bad:
            path, reason = next(iter(bad.items()))
            more = f' {len(bad) - 1} more cannot be read either.' if len(bad) > 1 else ''
            raise ValueError(f'image: {shown(path)} {reason}.{more} {advice}')

    def _unreadable(self) -> Dict[str, str]:
        def problem(sample: Tuple[str, int]) -> Optional[str]:
            try:
                open_image(sample[0], self.input_img_mode)
            except (OSError, ValueError) as error:
                return str(error).removeprefix(f'image: {shown(sample[0])} ').rstrip('.')
            return None

        samples = self.reader.samples
        pool = ThreadPoolExecutor()
        try:
            bar = tqdm(pool.map(problem, samples), total=len(samples), desc='checking images', leave=False)
            problems = list(bar)
        finally:
            pool.shutdown(cancel_futures=True)  # else an interrupted check would first open all other images
        return {path: text for (path, _), text in zip(samples, problems) if text}


class ImageFolder(LabelledImages):
    """A folder with one sub-folder per class; images anywhere below a sub-folder are of its class.

    Args:
        root: The folder.
        class_map: Class name -> index; by default the sub-folders' names in natural order.
        check: Open every image now: an unreadable one is an error.
        skip_bad: Leave unreadable images out (they are listed in `left_out`) instead of failing.
        any_name: Let a class have the name of a split, such as 'train'.

    Attributes:
        left_out: The reason for each path that is no image of the set.

    Raises:
        FileNotFoundError: for a missing or empty folder.
        ValueError: for images outside class folders, a class without an image, an unknown class, folders that can be
            read in two ways, or an unreadable image; the message names it.
    """

    def __init__(
        self,
        root: Union[str, Path],
        class_map: Optional[Dict[str, int]] = None,
        input_img_mode: str = 'RGB',
        check: bool = True,
        skip_bad: bool = False,
        any_name: bool = False,
    ):
        found = find_classes(root, any_name)
        class_map = class_map or {name: index for index, name in enumerate(found.names)}
        unknown = [shown(name) for name in found.names if name not in class_map]
        if unknown:
            raise ValueError(f'data_dir: {shown(root)} has classes that the training data lacks: {", ".join(unknown)}.')
        samples = [(path, class_map[name]) for path, name in found.samples]
        super().__init__(FolderReader(root, samples, class_map), input_img_mode)
        self.left_out = found.left_out
        if check:
            self.check_images(skip_bad)

    @property
    def skipped(self) -> List[str]:
        """The paths that are left out."""
        return list(self.left_out)

    def check_images(self, skip_bad: bool = False) -> None:
        """Open every image; raise ValueError if one is unreadable or, with `skip_bad`, if all of a class are."""
        if not skip_bad:
            return self.check('Mend or remove it, or leave such images out with --skip-bad.')
        bad = self._unreadable()
        kept = [sample for sample in self.reader.samples if sample[0] not in bad]
        missing = set(self.targets) - {target for _, target in kept}
        if missing:
            name = shown(self.classes[min(missing)])
            raise ValueError(f'data_dir: none of the images of class {name!r} can be read.')
        self.reader.samples = kept
        self.left_out = {**self.left_out, **bad}
