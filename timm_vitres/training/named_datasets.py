"""timm's named datasets (torch/cifar10, hfds/beans, ...) are opened as a run's training and validation sets.

name -> `load_named` -> `Data`; its record -> `reload_named` -> the same images in the same order.
"""

import difflib
import hashlib
import os
import re
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from ..checks import on_one_line
from ..data import open_image
from ..folders import split_role
from ..walking import public_name, shown
from .class_maps import Labels, read_class_map
from .processes import told_number
from .settings import FinetuneCfg
from .shards import ShardReader, is_local, open_bytes
from .splits import SETS, Data, Subset, class_counts, read_record, stratified_split, without

PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
STREAMS = ('hfids', 'tfds', 'wds')
KEYED = ('hfds', *STREAMS)  # samples of these datasets have fields with names
# these datasets of torchvision have two splits: timm takes any name but 'train' and 'training' for the test images
TWO_SPLITS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')
TORCH_NAMES = (*TWO_SPLITS, 'inaturalist', 'places365', 'imagenet')
COMPARED = 16  # two sets are compared by the images at this many even steps


def load_named(cfg: FinetuneCfg, mode: str, argument: str = 'val_split') -> Data:
    """Open a dataset by timm's name for it, and split it where there is no validation split.

    Args:
        argument: What the caller calls the split in the settings' `val_split`: it may be of test images.

    Raises:
        ValueError: for a name or split that timm doesn't know, and for a validation split with training images in it.
    """
    _check_name(cfg)
    if cfg.skip_bad:
        raise ValueError(f'skip_bad: leaves images of folders out, and none of {cfg.dataset!r}; leave it away.')
    train_split = _split(cfg, cfg.train_split, 'train_split')
    val_split = _split(cfg, cfg.val_split, argument) if cfg.val_split else ''
    if _overlap(train_split, val_split):
        raise ValueError(
            f'{argument}: {cfg.val_split!r} has images of the train_split {cfg.train_split!r}; {_remedy(argument)}.'
        )
    class_map = read_class_map(cfg.class_map) if cfg.class_map else None
    train, labels = _open(cfg, mode, train_split, True, class_map)
    if isinstance(train, IterableDataset):
        _check_processes(cfg)
        return _load_stream(cfg, mode, train, labels, (train_split, val_split), class_map, argument)
    targets = _targets(train, cfg, train_split, labels)
    names = labels.names or [str(index) for index in range(max(targets) + 1)]
    if val_split:
        val, val_labels = _open(cfg, mode, val_split, False, class_map)
        _check_apart(cfg, train, val, argument)
        known = _known(val, cfg, val_split, val_labels)
        if known is not None and max(known, default=0) >= len(names):
            raise ValueError(
                f'{argument}: {cfg.val_split!r} has the label {max(known)}, which {train_split!r} has not.'
            )
        train_indices, val_indices = range(len(targets)), range(len(val))
        how = f'{_role(argument)} on split {cfg.val_split!r} ({len(val_indices)} images)'
        lists = {'train': _entry(train, train_split, targets), 'validation': _entry(val, val_split, known)}
        if known is not None:
            found = set(known)
            how += without([name for index, name in enumerate(names) if index not in found])
    else:
        val = train
        train_indices, val_indices = stratified_split(targets, cfg.val_frac, cfg.seed)
        how = f'validation on {len(val_indices)} of its training images, held out class by class (seed {cfg.seed})'
        lists = {
            'train': _entry(train, train_split, targets, train_indices),
            'validation': _entry(train, train_split, targets, val_indices),
        }
    counts = class_counts([targets[index] for index in train_indices], len(names))
    description = f'{public_name(str(cfg.dataset))}, {len(train_indices)} images to train on; {how}'
    sets = _subset(train, train_indices, mode, labels), _subset(val, val_indices, mode, labels)
    return Data(*sets, names, counts, description, {}, lists)


def _role(argument: str) -> str:
    return 'validation' if argument == 'val_split' else 'test'


def _remedy(argument: str) -> str:
    return 'name another split' + (", or hold a part out with val_split ''" if argument == 'val_split' else '')


def _load_stream(
    cfg: FinetuneCfg,
    mode: str,
    train: IterableImageDataset,
    labels: Labels,
    splits: Tuple[str, str],
    class_map: Optional[List[str]],
    argument: str,
) -> Data:
    """Return the data of a stream, which nobody can split, or ask for its labels."""
    if not labels.names:
        raise ValueError(f'class_map: {cfg.dataset!r} is a stream that does not name its classes; name them by a map.')
    if not splits[1]:
        raise ValueError(f'{argument}: {cfg.dataset!r} is a stream, of which no part can be held out; name a split.')
    val, _ = _open(cfg, mode, splits[1], False, class_map)
    if isinstance(train.reader, ShardReader):
        _check_shards_apart(cfg, train.reader, val.reader, argument)
    lists = {name: _entry(dataset, split) for name, dataset, split in zip(SETS, (train, val), splits)}
    how = f'{_role(argument)} on split {splits[1]!r} ({val.reader.num_samples} images)'
    description = f'{public_name(str(cfg.dataset))}, {train.reader.num_samples} images to train on; {how}'
    return Data(train, val, labels.names, None, description, {}, lists)


def reload_named(cfg: FinetuneCfg, mode: str, recorded: Dict[str, Any]) -> Data:
    """Open the images that a record names.

    Raises:
        ValueError: where the dataset has other images or labels than the record says.
    """
    _check_name(cfg)
    lists = read_record(recorded, dict)
    names = [str(name) for name in recorded['label_names']]
    sets: List[Dataset] = []
    counts: Optional[List[int]] = None
    for name, entry in lists.items():
        try:
            split, indices = entry['split'], entry['indices']
            expected = {key: entry[key] for key in ('count', 'labels_sha256')}
            expected.update({key: entry[key] for key in ('images_sha256', 'shards') if key in entry})
        except KeyError as error:
            raise ValueError(f'recorded: the record of {name} lacks {error}.') from None
        # the record has the names of a class map, whose file may be gone by now
        dataset, labels = _open(cfg, mode, split, name == 'train', names if cfg.class_map else None)
        if labels.names and labels.names != names:
            raise ValueError(f'dataset: {cfg.dataset!r}, split {split!r}, has other classes than when the run began.')
        targets = None if expected['labels_sha256'] is None else _targets(dataset, cfg, split, labels)
        found = _entry(dataset, split, targets)
        for key, value in expected.items():
            if found.get(key) != value:
                what = '' if key == 'shards' else f': its {key} is {found.get(key)}, not {value}'
                raise ValueError(
                    f'dataset: {cfg.dataset!r}, split {split!r}, is not what the run began with'
                    f'{what or _changed(value, found["shards"])}.'
                )
        if isinstance(dataset, IterableDataset):
            _check_processes(cfg)
            sets.append(dataset)
            continue
        indices = list(range(len(dataset))) if indices is None else indices
        if name == 'train' and targets is not None:
            counts = class_counts([targets[index] for index in indices], len(names))
        sets.append(_subset(dataset, indices, mode, labels))
    return Data(sets[0], sets[1], names, counts, recorded['description'], {}, lists)


def _subset(dataset: Dataset, indices: Sequence[int], mode: str, labels: Labels) -> Subset:
    """Return some images of a dataset in a PIL mode, in which `ReaderImages` has opened them already."""
    return Subset(dataset, indices, None if isinstance(dataset, ReaderImages) else mode, labels)


def _check_processes(cfg: FinetuneCfg) -> None:
    """Raise ValueError for a stream under fsdp, whose processes would wait for ever for one that has a batch less, and
    for one of tfds in many processes.
    """
    if cfg.dataset.startswith('tfds/') and told_number('WORLD_SIZE', 1) > 1:
        raise ValueError(
            f'dataset: {cfg.dataset!r} is for one process alone: its reader repeats validation images for others, and '
            'without workers gives all of them the same part; use wds/ or hfds/.'
        )
    if cfg.fsdp:
        raise ValueError(
            f'fsdp: {cfg.dataset!r} is a stream, whose processes validate on different numbers of batches; leave fsdp '
            'out, or use an hfds/ dataset or an image folder.'
        )


def _changed(before: List[List[Any]], now: List[List[Any]]) -> str:
    """Return the end of a sentence that names the first shard that is another one than before."""
    pairs = zip([*before, ('no shard', 0, 0)], [*now, ('no shard', 0, 0)])
    old, new = next((old, new) for old, new in pairs if list(old) != list(new))
    shard, other = (f'{shown(name)} ({count} images, {size} bytes)' for name, count, size in (old, new))
    return f': {shard} became {other}'


def _prefix(cfg: FinetuneCfg) -> str:
    return cfg.dataset.partition('/')[0].lower()


def _check_name(cfg: FinetuneCfg) -> None:
    """Raise ValueError for a name without a prefix: timm would silently open an image folder instead."""
    prefix, rest = _prefix(cfg), cfg.dataset.partition('/')[2]
    if rest and prefix in PREFIXES:
        if prefix in ('torch', 'wds') and not cfg.data_dir:
            how = 'or downloaded into it' if prefix == 'torch' else 'the folder of its shards'
            raise ValueError(f'data_dir: no folder given; {cfg.dataset!r} is read from one, {how}.')
        if prefix == 'wds' and str(cfg.data_dir).lower().startswith('pipe:'):  # webdataset would run it in a shell
            raise ValueError(f'data_dir: got {cfg.data_dir!r}, a command, expected the folder or address of shards.')
        if prefix == 'wds' and '://' in str(cfg.data_dir) and re.search(r'[\s\'"`\\]', str(cfg.data_dir)):
            raise ValueError(
                f'data_dir: got {cfg.data_dir!r}, an address with blanks or quotes; write them as %20, %27.'
            )
        for name in ('input_key', 'target_key', 'train_num_samples', 'val_num_samples'):
            allowed = STREAMS if name.endswith('num_samples') else KEYED
            if getattr(cfg, name) is not None and prefix not in allowed:
                raise ValueError(f'{name}: {cfg.dataset!r} takes none; {", ".join(f"{one}/" for one in allowed)} do.')
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
    pairs = ((one.strip(), other.strip()) for one in first.split('+') for other in second.split('+'))
    return bool(first and second) and any(_parts_overlap(one, other) for one, other in pairs)  # '' is a part held out


def _parts_overlap(first: str, second: str) -> bool:
    names = {split.partition('[')[0] for split in (first, second)}
    if 'all' in names:  # as datasets and tensorflow-datasets call all of their splits together
        return True
    if len(names) > 1:
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


def _open(
    cfg: FinetuneCfg, mode: str, split: str, is_training: bool, class_map: Optional[List[str]]
) -> Tuple[Dataset, Labels]:
    """Open one split; return it with what its labels stand for. A stream gives class indices, a set what it stores."""
    where = f'{cfg.dataset!r}, split {split!r}'
    try:
        dataset = _create(cfg, mode, split, is_training)
    except Exception as error:  # torchvision, datasets, tensorflow-datasets and webdataset raise errors of any kind
        reason = (
            on_one_line(error).rstrip('.').replace('download=True', 'dataset_download')
        )  # the setting has this name here
        missing = isinstance(error, ImportError) or 'install webdataset' in reason
        hint = '; pip install "timm-vitres[datasets]"' if missing else ''
        raise ValueError(f'dataset: {where}, cannot be opened ({reason}{hint}).') from error
    labels = Labels(_names(dataset), class_map)
    if isinstance(dataset, IterableDataset):
        dataset.target_transform = labels
    return dataset, labels


def _create(cfg: FinetuneCfg, mode: str, split: str, is_training: bool) -> Dataset:
    prefix = _prefix(cfg)
    options: Dict[str, Any] = dict(input_key=cfg.input_key, target_key=cfg.target_key) if prefix in KEYED else {}
    options = {name: value for name, value in options.items() if value is not None}
    batch_size = cfg.batch_size if is_training else cfg.validation_batch_size or cfg.batch_size
    shared = dict(
        root=cfg.data_dir,
        split=split,
        is_training=is_training,
        batch_size=batch_size,
        num_samples=cfg.train_num_samples if is_training else cfg.val_num_samples,
        seed=cfg.seed,
        **options,
    )
    if prefix == 'wds':
        return IterableImageDataset(None, reader=ShardReader(mode=mode, **shared))
    dataset = create_dataset(cfg.dataset, download=cfg.dataset_download, input_img_mode=mode, **shared)
    if prefix == 'hfids':
        dataset.reader.input_img_mode = None
        dataset.reader = OpenedReader(dataset.reader, mode)
    if prefix == 'hfds':
        dataset = ReaderImages(dataset.reader, mode)
        dataset.check_keys()
    return dataset


class OpenedReader(Reader):
    """A timm reader of a stream of PIL images, which are brought upright and into a mode as all others are."""

    def __init__(self, reader: Reader, mode: str):
        super().__init__()
        self.reader, self.mode = reader, mode

    def __iter__(self) -> Iterator[Tuple[Any, Any]]:
        for image, target in iter(self.reader):  # pyright: ignore[reportArgumentType, reportCallIssue]
            yield open_image(image, self.mode), target

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name == 'reader':  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.reader, name)


class ReaderImages(ImageDataset):
    """timm's `ImageDataset` of encoded images by their number; timm's own takes the next image for one that is bad."""

    def __init__(self, reader: Reader, mode: str):
        super().__init__('', reader=reader, input_img_mode=mode)

    def check_keys(self) -> None:
        """Raise ValueError if the reader's keys for image and label are no columns."""
        rows, image, label = self.reader.dataset, self.reader.image_key, self.reader.label_key
        columns = [name for name in rows.column_names if name != image]
        if label.partition('/')[0] not in rows.column_names:
            raise ValueError(f'target_key: it has no {label!r}, but {", ".join(columns)}')
        if len(rows) and rows[0][image] is None:  # timm adds a column of that name, if there is none
            raise ValueError(f'input_key: it has no image under {image!r}; other columns are {", ".join(columns)}')

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        data, target = self.encoded(index)
        return open_bytes(data, self.input_img_mode, f'{index} of the split'), target

    def encoded(self, index: int) -> Tuple[bytes, Any]:
        """Return the bytes of an image, and its label as it is stored."""
        try:
            opened: Any = self.reader[index]  # (a file, a label)
            with opened[0] as file:
                return file.read(), opened[1]
        except Exception as error:  # a row may lack its image, or name a file that is gone
            raise ValueError(f'image: {index} of the split cannot be read ({on_one_line(error)}).') from error


def _names(dataset: Dataset) -> List[str]:
    """Return the class names of a dataset, by index; the list is empty if it names none."""
    reader = getattr(dataset, 'reader', None)
    names = getattr(dataset, 'classes', None) or getattr(reader, 'names', None)
    class_to_idx = getattr(reader, 'class_to_idx', None) or {}
    names = names or sorted(class_to_idx, key=class_to_idx.__getitem__)
    return [', '.join(name) if isinstance(name, tuple) else str(name) for name in names]


def _known(dataset: Dataset, cfg: FinetuneCfg, split: str, labels: Labels) -> Optional[List[int]]:
    """Return the class indices of a dataset that says its labels without reading images, else None."""
    targets = getattr(dataset, 'targets', None)
    if targets is None and hasattr(getattr(dataset, 'reader', None), 'iter_targets'):
        bar = tqdm(dataset.reader.iter_targets(), total=len(dataset), desc='reading labels', leave=False)
        return _indices(bar, cfg, split, labels)
    if isinstance(targets, torch.Tensor):  # those of qmnist are rows of facts, the class being the first
        targets = (targets[:, 0] if targets.ndim > 1 else targets).tolist()
    return None if targets is None else _indices(targets, cfg, split, labels)


def _targets(dataset: Dataset, cfg: FinetuneCfg, split: str, labels: Labels) -> List[int]:
    targets = _known(dataset, cfg, split, labels)
    if targets is None:
        rows = tqdm(range(len(dataset)), desc='reading labels', leave=False)
        targets = _indices((dataset[index][1] for index in rows), cfg, split, labels)
    if not targets:
        raise ValueError(f'dataset: {cfg.dataset!r}, split {split!r}, has no images.')
    return targets


def _indices(targets: Iterable[Any], cfg: FinetuneCfg, split: str, labels: Labels) -> List[int]:
    try:
        return [labels(target) for target in targets]
    except ValueError as error:
        raise ValueError(f'{error} (This is of {cfg.dataset!r}, split {split!r}.)') from error
    except (TypeError, KeyError) as error:
        raise ValueError(f'dataset: the labels of {cfg.dataset!r} are no class numbers ({error}).') from error


def _entry(
    dataset: Dataset, split: str, targets: Optional[List[int]] = None, indices: Optional[Sequence[int]] = None
) -> Dict[str, Any]:
    """Return a set's entry in a record; `indices` are those of its images if it is only a part of the split."""
    digest = None if targets is None else hashlib.sha256(np.asarray(targets, dtype='<i8').tobytes()).hexdigest()
    reader = getattr(dataset, 'reader', None)
    # a stream's length is that of a process's share
    count = getattr(reader, 'num_samples', None) if isinstance(dataset, IterableDataset) else None
    count = len(dataset) if count is None else count
    entry: Dict[str, Any] = {'split': split, 'count': count, 'labels_sha256': digest}
    entry['indices'] = None if indices is None else list(indices)
    if isinstance(dataset, ReaderImages):
        images = hashlib.sha256()
        for index in steps(len(dataset)):
            images.update(dataset.encoded(index)[0])
        entry['images_sha256'] = images.hexdigest()
    if isinstance(reader, ShardReader):
        entry['shards'] = reader.listed()
    return entry


def steps(length: int) -> List[int]:
    """Return the places of a few of so many samples, as far apart as they can be, the first and the last among them."""
    return sorted({round(i * (length - 1) / COMPARED) for i in range(COMPARED + 1)})


def _check_shards_apart(cfg: FinetuneCfg, train: ShardReader, val: ShardReader, argument: str) -> None:
    """Raise ValueError if two splits have a shard in common, or begin with the same images."""
    ours = {os.path.realpath(path) if is_local(path) else path for path, _ in train.shards}
    both = [path for path, _ in val.shards if (os.path.realpath(path) if is_local(path) else path) in ours]
    if both:
        raise ValueError(f'{argument}: {cfg.val_split!r} has the shard {shown(both[0])}, which is trained on.')
    if train.num_samples == val.num_samples and train.first(COMPARED) == val.first(COMPARED):
        raise ValueError(
            f'{argument}: {cfg.val_split!r} has the same images as {cfg.train_split!r}; name another split.'
        )


def _check_apart(cfg: FinetuneCfg, train: Dataset, val: Dataset, argument: str) -> None:
    if _names(train) != _names(val):
        raise ValueError(f'{argument}: {cfg.val_split!r} has other classes than {cfg.train_split!r}.')
    if not len(val):
        raise ValueError(f'{argument}: {cfg.val_split!r} of {cfg.dataset!r} has no images.')
    if len(train) != len(val):
        return

    def seen(dataset: Dataset, index: int) -> Tuple[Any, ...]:
        image, target = dataset[index]
        return image.size, image.tobytes(), target

    if all(seen(train, index) == seen(val, index) for index in steps(len(val))):
        raise ValueError(
            f'{argument}: {cfg.val_split!r} of {cfg.dataset!r} has the same images as {cfg.train_split!r}; '
            f'{_remedy(argument)}.'
        )
