"""Image folders and timm's datasets as what a run trains on and what it is validated on.

folder or name -> `load_data` -> `Data`: a training and a validation set of PIL images, class names, counts.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from .data import open_image
from .settings import FinetuneCfg

VAL_FOLDERS = ('validation', 'val', 'valid', 'eval', 'evaluation')  # as timm's create_dataset looks for them


class Data(NamedTuple):
    """What a run trains on."""

    train: Dataset
    val: Dataset
    label_names: List[str]
    counts: Optional[List[int]]  # training images of each class, where known
    description: str
    skipped: List[str]

    def record(self) -> Dict:
        """Return the class names and both lists of files (name, label, size), as a run records them."""

        def rows(part):
            reader = getattr(getattr(part, 'dataset', None), 'reader', None)
            if not hasattr(part, 'indices') or reader is None or not hasattr(reader, 'samples'):
                return dict(count=len(part))
            root = Path(part.dataset.reader.root)
            chosen = [reader.samples[index] for index in part.indices]
            return [[str(Path(path).relative_to(root)), label, Path(path).stat().st_size] for path, label in chosen]

        return dict(label_names=list(self.label_names), train=rows(self.train), validation=rows(self.val))


def load_data(cfg: FinetuneCfg, mode: str, recorded: Optional[Dict] = None) -> Data:
    """Stand-in: the split is the recorded one."""
    data = _load_data(cfg, mode)
    if recorded is None or not isinstance(recorded['train'], list):
        return data
    skipped = list(data.skipped)
    for part, rows in ((data.train, recorded['train']), (data.val, recorded['validation'])):
        root = Path(part.dataset.reader.root)
        found = {str(Path(path).relative_to(root)): i for i, (path, _) in enumerate(part.dataset.reader.samples)}
        for name, _, size in rows:
            if name not in found:
                raise ValueError(f'data_dir: {name} is gone since the run began.')
            if (root / name).stat().st_size != size:
                raise ValueError(f'data_dir: {name} was changed since the run began.')
        part.indices = [found[name] for name, _, _ in rows]
        known = {name for key in ('train', 'validation') for name, _, _ in recorded[key]}
        skipped += [f'{name} is new' for name in found if name not in known]
    return data._replace(skipped=skipped)


def _load_data(cfg: FinetuneCfg, mode: str) -> Data:
    """Open the training and the validation set of a run, and split where only one is given.

    Args:
        cfg: The run.
        mode: PIL's mode of the images ('L', 'RGB', 'RGBA').

    Raises:
        FileNotFoundError, ValueError: for missing or impossible data; the message says what, and what is allowed.
    """
    if cfg.dataset:
        return _load_named(cfg, mode)
    root = Path(str(cfg.data_dir))
    folder = dict(input_img_mode=mode, check=not cfg.no_check, skip_bad=cfg.skip_bad)
    val_root = next((root / name for name in (cfg.val_split, *VAL_FOLDERS) if name and (root / name).is_dir()), None)
    train_root = root / cfg.train_split
    if cfg.val_split and val_root and train_root.is_dir():
        train = ImageFolder(train_root, **folder)
        val = ImageFolder(val_root, class_map=train.reader.class_to_idx, **folder)
        train_indices, val_indices = range(len(train)), range(len(val))
        how = f'validation on the {len(val)} images of {val_root.name}/'
        skipped = train.skipped + val.skipped
    else:
        train = val = ImageFolder(train_root if train_root.is_dir() else root, **folder)
        train_indices, val_indices = stratified_split(train.targets, cfg.val_frac, cfg.seed)
        how = f'validation on {len(val_indices)} of them, held out class by class ({cfg.val_frac:g}, seed {cfg.seed})'
        skipped = train.skipped
    if len(train.classes) < 2:
        raise ValueError(f'data_dir: {root} has the one class {train.classes[0]!r}; at least two are needed.')
    targets = train.targets  # a list made anew at every call
    counts = _class_counts([targets[index] for index in train_indices], len(train.classes))
    description = f'{len(train)} images of {len(train.classes)} classes in {root.name}; {how}'
    train_set, val_set = Subset(train, train_indices, mode), Subset(val, val_indices, mode)
    return Data(train_set, val_set, train.classes, counts, description, skipped)


def _load_named(cfg: FinetuneCfg, mode: str) -> Data:
    def create(split: str, is_training: bool) -> Dataset:
        try:
            return create_dataset(
                cfg.dataset,
                root=cfg.data_dir,
                split=split,
                is_training=is_training,
                download=cfg.dataset_download,
                batch_size=cfg.batch_size,
                input_img_mode=mode,
                seed=cfg.seed,
            )
        except (AssertionError, RuntimeError, OSError) as error:
            raise ValueError(f'dataset: {cfg.dataset!r}, split {split!r}, cannot be opened ({error}).') from error

    train = create(cfg.train_split, True)
    names = [str(name) for name in getattr(train, 'classes', None) or class_names(train)]
    if isinstance(train, IterableDataset):
        if not names or not cfg.val_split:
            raise ValueError(f'dataset: {cfg.dataset!r} is a stream; it needs class names and a val_split.')
        return Data(train, create(cfg.val_split, False), names, None, cfg.dataset, [])
    targets = getattr(train, 'targets', None)
    if targets is None:
        targets = [train[index][1] for index in tqdm(range(len(train)), desc='reading labels')]
    targets = [int(target) for target in targets]
    names = names or [str(index) for index in range(max(targets) + 1)]
    if cfg.val_split:
        val = create(cfg.val_split, False)
        train_indices, val_indices = range(len(targets)), range(len(val))
        how = f'validation on split {cfg.val_split!r} ({len(val_indices)} images)'
    else:
        val = train
        train_indices, val_indices = stratified_split(targets, cfg.val_frac, cfg.seed)
        how = f'validation on {len(val_indices)} of its training images, held out class by class (seed {cfg.seed})'
    counts = _class_counts([targets[index] for index in train_indices], len(names))
    return Data(
        Subset(train, train_indices, mode),
        Subset(val, val_indices, mode),
        names,
        counts,
        f'{cfg.dataset}, {len(train_indices)} images to train on; {how}',
        [],
    )


def _class_counts(targets: List[int], num_classes: int) -> List[int]:
    counter = Counter(targets)
    return [counter[index] for index in range(num_classes)]


class ImageFolder(ImageDataset):
    """timm's `ImageDataset` of a folder with one sub-folder per class, opened by `open_image`.

    Args:
        root: The folder.
        class_map: Class name -> index; by default the sub-folders' names in natural order.
        check: Open every image now: an unreadable one is an error.
        skip_bad: Leave unreadable images out (they are listed in `skipped`) instead of failing.

    Raises:
        FileNotFoundError: for a missing or empty folder.
        ValueError: for images outside class folders, a class without an image, an unknown class, or an unreadable
            image; the message names it.
    """

    def __init__(
        self,
        root: Union[str, Path],
        class_map: Optional[Dict[str, int]] = None,
        input_img_mode: str = 'RGB',
        check: bool = True,
        skip_bad: bool = False,
    ):
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f'data_dir: {root} is not a folder.')
        try:
            super().__init__(str(root), input_img_mode=input_img_mode)
        except RuntimeError as error:
            raise FileNotFoundError(f'data_dir: {error}') from None
        found = self.reader.class_to_idx
        if '' in found:
            raise ValueError(f'data_dir: {root} holds images outside class folders; put each into its class folder.')
        self._check_folders(root)
        if class_map is not None:
            unknown = sorted(found.keys() - class_map.keys())
            if unknown:
                raise ValueError(f'data_dir: {root} has classes that the training data lacks: {", ".join(unknown)}.')
            names = {index: name for name, index in found.items()}
            self.reader.samples = [(path, class_map[names[target]]) for path, target in self.reader.samples]
            self.reader.class_to_idx = class_map
        self.skipped: List[str] = self._check_images(skip_bad) if check else []

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

    def _check_folders(self, root: Path) -> None:
        filled = {Path(path).parent for path, _ in self.reader.samples}
        for folder in sorted(folder for folder in root.rglob('*') if folder.is_dir()):
            is_leaf = not any(child.is_dir() for child in folder.iterdir())
            if is_leaf and folder not in filled and not folder.name.startswith('.'):
                raise ValueError(f'data_dir: the class folder {folder} has no image; add some, or remove it.')

    def _check_images(self, skip_bad: bool) -> List[str]:
        def problem(sample: Tuple[str, int]) -> Optional[str]:
            try:
                open_image(sample[0], self.input_img_mode)
            except ValueError as error:
                return str(error)
            return None

        samples = self.reader.samples
        with ThreadPoolExecutor() as pool:
            bar = tqdm(pool.map(problem, samples), total=len(samples), desc='checking images', leave=False)
            problems = list(bar)
        bad = [text for text in problems if text]
        if bad and not skip_bad:
            more = f' {len(bad) - 1} more cannot be read either.' if len(bad) > 1 else ''
            raise ValueError(f'{bad[0]}{more} Mend or remove it, or leave such images out with --skip-bad.')
        kept = [sample for sample, text in zip(samples, problems) if not text]
        missing = {target for _, target in samples} - {target for _, target in kept}
        if missing:
            raise ValueError(f'data_dir: none of the images of class {self.classes[min(missing)]!r} can be read.')
        self.reader.samples = kept
        return [sample[0] for sample, text in zip(samples, problems) if text]


def class_names(dataset: Dataset) -> List[str]:
    """Return the class names of a dataset with one of timm's readers, by index; none where it names none."""
    class_to_idx = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or {}
    return sorted(class_to_idx, key=class_to_idx.__getitem__)


class Subset(Dataset):
    """Some images of a map-style dataset in a PIL mode, with a transform of their own.

    The dataset returns PIL images; `transform` is set by timm's `create_loader`.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int], mode: str = 'RGB'):
        self.dataset = dataset
        self.indices = list(indices)
        self.mode = mode
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        image, target = self.dataset[self.indices[index]]
        image = open_image(image, self.mode)
        return image if self.transform is None else self.transform(image), target


def stratified_split(targets: Sequence[int], fraction: float, seed: int = 0) -> Tuple[List[int], List[int]]:
    """Split indices into two parts, class by class: the second holds `fraction` of each, and at least one.

    Raises:
        ValueError: for a fraction outside (0, 1), or a class of fewer than two.
    """
    if not 0 < fraction < 1:
        raise ValueError(f'val_frac: got {fraction}, expected a fraction between 0 and 1.')
    generator = np.random.default_rng(seed)
    labels = np.asarray(targets)
    first: List[int] = []
    second: List[int] = []
    for target, count in sorted(Counter(labels.tolist()).items()):
        if count < 2:
            raise ValueError(f'val_frac: class {target} has {count} image, which cannot be split in two; add some.')
        indices = generator.permutation(np.flatnonzero(labels == target)).tolist()
        cut = min(max(round(count * fraction), 1), count - 1)
        second += indices[:cut]
        first += indices[cut:]
    return sorted(first), sorted(second)
