"""timm's named datasets (torch/cifar10, hfds/beans, ...) are opened as a run's training and validation sets.

name -> `load_named` -> `Data`; its record -> `reload_named` -> the same images in the same order.
"""

import difflib
import hashlib
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from ..checks import on_one_line
from ..folders import split_role
from .settings import FinetuneCfg
from .splits import Data, Subset, class_counts, class_names, read_record, stratified_split

PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
# these datasets of torchvision have two splits: timm takes any name but 'train' and 'training' for the test images
TWO_SPLITS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')
TORCH_NAMES = (*TWO_SPLITS, 'inaturalist', 'places365', 'imagenet')
COMPARED = 16  # two sets are compared by the images at this many even steps


def load_named(cfg: FinetuneCfg, mode: str) -> Data:
    """Open a dataset by timm's name for it, and split it where there is no validation split.

    Raises:
        ValueError: for a name or split that timm doesn't know, and for a validation split with training images in it.
    """
    _check_name(cfg)
    train_split = _split(cfg, cfg.train_split, 'train_split')
    val_split = _split(cfg, cfg.val_split, 'val_split') if cfg.val_split else ''
    if _overlap(train_split, val_split):
        raise ValueError(
            f'val_split: {cfg.val_split!r} has images of the train_split {cfg.train_split!r}; name another split, or '
            "hold a part out with val_split ''."
        )
    train = _create(cfg, mode, train_split, True)
    names = _names(train)
    if isinstance(train, IterableDataset):
        if not names or not val_split:
            raise ValueError(f'dataset: {cfg.dataset!r} is a stream; it needs class names and a val_split.')
        val = _create(cfg, mode, val_split, False)
        lists = {'train': _entry(train, train_split), 'validation': _entry(val, val_split)}
        return Data(train, val, names, None, cfg.dataset, {}, lists)
    targets = _targets(train, cfg)
    names = names or [str(index) for index in range(max(targets) + 1)]
    if not 0 <= min(targets) <= max(targets) < len(names):
        raise ValueError(
            f'dataset: {cfg.dataset!r}, split {train_split!r}, has labels from {min(targets)} to {max(targets)}, '
            f'expected 0 to {len(names) - 1}.'
        )
    if val_split:
        val = _create(cfg, mode, val_split, False)
        _check_apart(cfg, train, val)
        train_indices, val_indices = range(len(targets)), range(len(val))
        how = f'validation on split {cfg.val_split!r} ({len(val_indices)} images)'
        lists = {'train': _entry(train, train_split, targets), 'validation': _entry(val, val_split, _known(val))}
    else:
        val = train
        train_indices, val_indices = stratified_split(targets, cfg.val_frac, cfg.seed)
        how = f'validation on {len(val_indices)} of its training images, held out class by class (seed {cfg.seed})'
        lists = {
            'train': _entry(train, train_split, targets, train_indices),
            'validation': _entry(train, train_split, targets, val_indices),
        }
    counts = class_counts([targets[index] for index in train_indices], len(names))
    description = f'{cfg.dataset}, {len(train_indices)} images to train on; {how}'
    sets = Subset(train, train_indices, mode), Subset(val, val_indices, mode)
    return Data(*sets, names, counts, description, {}, lists)


def reload_named(cfg: FinetuneCfg, mode: str, recorded: Dict[str, Any]) -> Data:
    """Open the images that a record names.

    Raises:
        ValueError: where the dataset has other images or labels than the record says.
    """
    _check_name(cfg)
    lists = read_record(recorded, dict)
    sets: List[Dataset] = []
    counts: Optional[List[int]] = None
    for name, entry in lists.items():
        try:
            split, indices = entry['split'], entry['indices']
            expected = {key: entry[key] for key in ('count', 'labels_sha256')}
        except KeyError as error:
            raise ValueError(f'recorded: the record of {name} lacks {error}.') from None
        dataset = _create(cfg, mode, split, name == 'train')
        targets = None if expected['labels_sha256'] is None else _targets(dataset, cfg)
        found = _entry(dataset, split, targets)
        for key, value in expected.items():
            if found[key] != value:
                raise ValueError(
                    f'dataset: {cfg.dataset!r}, split {split!r}, is not what the run began with: its {key} is '
                    f'{found[key]}, not {value}.'
                )
        if isinstance(dataset, IterableDataset):
            sets.append(dataset)
            continue
        indices = list(range(len(dataset))) if indices is None else indices
        if name == 'train' and targets is not None:
            counts = class_counts([targets[index] for index in indices], len(recorded['label_names']))
        sets.append(Subset(dataset, indices, mode))
    return Data(sets[0], sets[1], recorded['label_names'], counts, recorded['description'], {}, lists)


def _check_name(cfg: FinetuneCfg) -> None:
    """Raise ValueError for a name without a prefix: timm would silently open an image folder instead."""
    prefix, _, rest = cfg.dataset.partition('/')
    if rest and prefix.lower() in PREFIXES:
        if prefix.lower() == 'torch' and not cfg.data_dir:
            raise ValueError(f'data_dir: no folder given; {cfg.dataset!r} is read from one, or downloaded into it.')
        return
    known = difflib.get_close_matches(cfg.dataset.lower().rpartition('/')[2], TORCH_NAMES, 1)
    hint = f'did you mean {"torch/" + known[0]!r}? A' if known else 'a'
    raise ValueError(
        f'dataset: got {cfg.dataset!r}; {hint} name begins with {", ".join(f"{name}/" for name in PREFIXES)}; an image '
        "folder is ''."
    )


def _split(cfg: FinetuneCfg, split: str, argument: str) -> str:
    """Return a split's name as timm takes it; raise ValueError for an unknown one: timm would read test images."""
    if not split:
        raise ValueError(f"{argument}: got '', expected the name of a split of {cfg.dataset!r}.")
    prefix, _, rest = cfg.dataset.lower().partition('/')
    if prefix != 'torch' or rest.rpartition('/')[2] not in TWO_SPLITS:
        return split
    role = split_role(split)
    if role is None:
        raise ValueError(f"{argument}: got {split!r}, but {cfg.dataset!r} has 'train' and 'validation'.")
    return 'train' if role == 'training' else 'validation'


def _overlap(first: str, second: str) -> bool:
    """Return whether the names of two splits say that they may share images, as train+test and train[:10%] do."""
    return any(_parts_overlap(one.strip(), other.strip()) for one in first.split('+') for other in second.split('+'))


def _parts_overlap(first: str, second: str) -> bool:
    if first.partition('[')[0] != second.partition('[')[0]:
        return False
    slices = [re.fullmatch(r'[^\[]+(?:\[(-?\d+%|\d*):(-?\d+%|\d*)\])?', split) for split in (first, second)]
    ends = [end for found in slices if found for end in found.groups(default='')]
    if None in slices or len({end.endswith('%') for end in ends if end}) > 1:
        return True  # slices in another notation, or in percent and in images, can't be compared

    def place(end: str, default: float) -> float:
        number = float(end.rstrip('%')) if end else default
        return number + 100 if end.startswith('-') else number

    (begin, end), (other_begin, other_end) = ((place(a, 0), place(b, float('inf'))) for a, b in (ends[:2], ends[2:]))
    return max(begin, other_begin) < min(end, other_end)


def _create(cfg: FinetuneCfg, mode: str, split: str, is_training: bool) -> Dataset:
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
    except Exception as error:  # torchvision, datasets, tensorflow-datasets and webdataset raise errors of any kind
        reason = (
            on_one_line(error).rstrip('.').replace('download=True', 'dataset_download')
        )  # the setting has this name here
        raise ValueError(f'dataset: {cfg.dataset!r}, split {split!r}, cannot be opened ({reason}).') from error


def _names(dataset: Dataset) -> List[str]:
    names = getattr(dataset, 'classes', None) or class_names(dataset)
    return [', '.join(name) if isinstance(name, tuple) else str(name) for name in names]


def _known(dataset: Dataset) -> Optional[List[int]]:
    """Return the labels of a dataset that says them without reading images, else None."""
    targets = getattr(dataset, 'targets', None)
    if targets is None and hasattr(getattr(dataset, 'reader', None), 'iter_targets'):
        targets = dataset.reader.iter_targets()
    return None if targets is None else [int(target) for target in targets]


def _targets(dataset: Dataset, cfg: FinetuneCfg) -> List[int]:
    try:
        targets = _known(dataset)
        if targets is None:
            targets = [int(dataset[index][1]) for index in tqdm(range(len(dataset)), desc='reading labels')]
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f'dataset: the labels of {cfg.dataset!r} are no class numbers ({error}).') from error
    if not targets:
        raise ValueError(f'dataset: {cfg.dataset!r} has no images.')
    return targets


def _entry(
    dataset: Dataset, split: str, targets: Optional[List[int]] = None, indices: Optional[Sequence[int]] = None
) -> Dict[str, Any]:
    """Return a set's entry in a record; `indices` are those of its images if it is only a part of the split."""
    digest = None if targets is None else hashlib.sha256(np.asarray(targets, dtype='<i8').tobytes()).hexdigest()
    return {
        'split': split,
        'count': len(dataset),
        'labels_sha256': digest,
        'indices': None if indices is None else list(indices),
    }


def _check_apart(cfg: FinetuneCfg, train: Dataset, val: Dataset) -> None:
    if _names(train) != _names(val):
        raise ValueError(f'val_split: {cfg.val_split!r} has other classes than {cfg.train_split!r}.')
    if not len(val):
        raise ValueError(f'val_split: {cfg.val_split!r} of {cfg.dataset!r} has no images.')
    if len(train) != len(val):
        return

    def seen(dataset: Dataset, index: int) -> Tuple[Any, ...]:
        image, target = dataset[index]
        return image.size, image.tobytes(), int(target)

    chosen = sorted({round(i * (len(val) - 1) / COMPARED) for i in range(COMPARED + 1)})
    if all(seen(train, index) == seen(val, index) for index in chosen):
        raise ValueError(
            f'val_split: {cfg.val_split!r} of {cfg.dataset!r} has the same images as {cfg.train_split!r}; name another '
            "split, or hold a part out with val_split ''."
        )
