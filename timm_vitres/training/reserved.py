"""Images of a comparison: those that nothing is trained on or chosen by, and, for every seed, a split of the others.

settings -> `reserve` -> a dict for JSON -> `images_of` (what a run of a seed takes), `for_verdict` (what is left for
the verdict), each as `Data.record` says the images of a run.
"""

import dataclasses
import logging
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from torch.utils.data import IterableDataset

from ..folders import find_splits, folders_in, split_folder
from ..walking import shown
from ..weights.sources import LOCAL
from .checking import raise_for, unreadable
from .copies import check_copies, check_left, find_copies, split_argument
from .datasets import UNREADABLE, ImageFolder, check_apart, listed, load_data
from .named_datasets import load_named
from .runs import Record
from .settings import FinetuneCfg
from .splits import Data, Subset, class_counts, stratified_split, without

_logger = logging.getLogger(__name__)
TEST_SEED = 0  # the test images are the same for all arms and all seeds of training
TEST = 'test'


def reserve(cfg: FinetuneCfg, mode: str, test_split: str = TEST, test_frac: float = 0.25) -> Dict[str, Any]:
    """Choose the test images: those of a split, or a part of each class, drawn with a fixed seed.

    Args:
        cfg: Where the images are.
        mode: PIL's mode of the images.
        test_split: Its name. A part is held out with '', and where an image folder has none of that or a similar name.
        test_frac: That part.

    Returns:
        A dict of label_names, description, train, validation (None where each seed splits it off) and test; a set is
        what `Data.record` says of it.

    Raises:
        ValueError, OSError: where `load_data` raises them, for a class of too few images, for test images that are
            trained on, and for a stream, of which nothing can be held out.
    """
    if not cfg.is_folder:
        return _of_dataset(cfg, mode, test_split)
    root = Path(str(cfg.data_dir))
    splits = find_splits(root, cfg.train_split, cfg.val_split)
    name = None
    if splits.train != root and test_split:
        name = split_folder(root, folders_in(root), test_split, 'test_split', TEST)
    data = load_data(cfg, mode, holds_out=False)
    if data.check is not None:  # a bad test image would end the comparison after its first run
        raise_for(unreadable(data.check.paths, mode, cfg.workers), UNREADABLE)
    rows = {'train': data.lists['train'], 'validation': data.lists['validation']}
    if splits.validation is None:
        rows = {'train': sorted(rows['train']), 'validation': None}
    if name is not None:
        rows['test'], left_out = _of_folder(cfg, mode, root, name, data)
        others = {path: reason for path, reason in data.left_out.items() if path != str(root / name)}
        data = data._replace(left_out={**others, **left_out})
    for text in data.skipped:
        _logger.warning('left out: %s', text)
    copies = _leave_out_copies(root, rows)
    how = f'test images are the {len(rows.get(TEST, ()))} of {name}/'
    least = 1 + (splits.validation is None)  # of what is not tested on, validation images may be split off, too
    _check_counts(rows['train'], least + (name is None))
    if name is None:
        targets = _targets(rows['train'], data.label_names)
        kept, held = stratified_split(targets, test_frac, TEST_SEED, data.label_names, least)
        rows['train'], rows['test'] = ([rows['train'][index] for index in part] for part in (kept, held))
        how = f'test images are {len(held)} of them, held out class by class ({test_frac:g}, seed {TEST_SEED})'
    _check_number(len(rows['test']), str(cfg.data_dir))
    found = {label for _, label, _ in rows['test']}
    how += without([label for label in data.label_names if label not in found])
    count = sum(len(part) for part in rows.values() if part)
    description = f'{count} images of {len(data.label_names)} classes in {shown(root.resolve().name)}; {how}'
    left_out = len(data.left_out) + (copies or 0)
    if left_out:
        description += f'; {left_out} files or folders left out'
    return {
        'label_names': data.label_names,
        'description': description,
        'copies_are_out': copies is not None,
        **rows,
    }


def check_unseen(cfg: FinetuneCfg, model: str, images: Dict[str, Any]) -> None:
    """Raise ValueError where a model of ours learnt from test images, or was chosen by them, as its run's record says.

    Args:
        cfg: Where the images are.
        model: An arm that begins with its weights; of other than `local-dir:` nothing is known.
        images: The result of `reserve`.
    """
    known: Dict[Path, Record] = {}
    waiting = [model] if model.startswith(LOCAL) else []
    while waiting:  # what a run began with may be a run's, too
        folder = Path(waiting.pop().removeprefix(LOCAL)).resolve()
        if folder in known:
            continue
        with suppress(ValueError, OSError):  # no run of ours
            known[folder] = record = Record.read(folder)
            began = record.cfg
            waiting += [name for name in (began.model, began.kd_model_name or '') if name.startswith(LOCAL)]
            paths = (began.pretrained_path, began.initial_checkpoint)
            waiting += [os.path.dirname(os.path.abspath(path)) for path in paths if path]
    for record in known.values():
        seen = _seen(cfg, record, images[TEST])
        if seen:
            count = len(_indices(images[TEST]) if isinstance(images[TEST], dict) else images[TEST])
            example = f', such as {shown(min(seen))}' if isinstance(images[TEST], list) else ''
            raise ValueError(
                f'models: {model} learnt from {len(seen)} of the {count} test images, or was chosen by '
                f'them{example}; compare it on images that it has not seen (test_split).'
            )


def _seen(cfg: FinetuneCfg, record: Record, test: Any) -> Set[Any]:
    """Return the test images that are among a run's own: paths, or, of a named dataset, indices."""
    own = [record.data[name] for name in ('train', 'validation')]
    if isinstance(test, dict):
        same = (record.cfg.dataset or '').lower() == (cfg.dataset or '').lower()
        alike = [entry for entry in own if same and isinstance(entry, dict) and entry['split'] == test['split']]
        return {index for entry in alike for index in _indices(entry)} & set(_indices(test))
    if not all(isinstance(entry, list) for entry in own):
        return set()
    place = str(record.cfg.data_dir) if os.path.isdir(str(record.cfg.data_dir)) else str(cfg.data_dir)
    root = os.path.realpath(str(cfg.data_dir))
    theirs = {os.path.join(os.path.realpath(place), name): size for entry in own for name, _, size in entry}
    ours = {os.path.join(root, name): size for name, _, size in test}
    same = {path for path, size in ours.items() if theirs.get(path) == size}
    files = [*theirs.items(), *((path, size) for path, size in ours.items() if path not in theirs)]
    copies = find_copies(files) or {}
    return same | {path for path, first in copies.items() if path in ours and first in theirs}


def _indices(entry: Dict[str, Any]) -> Sequence[int]:
    return range(entry['count']) if entry['indices'] is None else entry['indices']


def _of_dataset(cfg: FinetuneCfg, mode: str, test_split: str) -> Dict[str, Any]:
    if not test_split:
        raise ValueError(f"test_split: got '', expected the name of a split of {cfg.dataset!r}.")
    if cfg.val_split not in ('', type(cfg).val_split):
        raise ValueError(
            f'val_split: got {cfg.val_split!r}, but a comparison splits the validation images of a dataset off its '
            'training split; leave it out.'
        )
    data = load_named(dataclasses.replace(cfg, val_split=test_split), mode, 'test_split')
    if isinstance(data.train, IterableDataset):
        raise ValueError(f'dataset: {cfg.dataset!r} is a stream, of which no validation images can be held out.')
    _check_number(len(data.val), repr(cfg.dataset))
    sets = {'train': data.lists['train'], 'validation': None, 'test': data.lists['validation']}
    return {
        'label_names': data.label_names,
        'description': data.description,
        'counts': data.counts,
        'copies_are_out': False,
        **sets,
    }


def _of_folder(
    cfg: FinetuneCfg, mode: str, root: Path, name: str, data: Data
) -> Tuple[List[List[Any]], Dict[str, str]]:
    """Return what a record says of the images in a folder of test images, and what is left out there, with reasons."""
    class_map = data.train.dataset.class_to_idx
    test = ImageFolder(root / name, class_map, mode, any_name=True)
    check_apart(data.train.dataset, test, TEST)
    if data.val.dataset is not data.train.dataset:
        check_apart(data.val.dataset, test, TEST, 'validation')
    if not cfg.no_check:
        test.check_images(cfg.skip_bad, cfg.workers)
    return listed(root, Subset(test, range(len(test)))), test.left_out


def _leave_out_copies(root: Path, rows: Dict[str, Any]) -> Optional[int]:
    """Leave out copies of test images, of validation images, and of any image of a set that is still to be split.

    Test images count once, too: their number is that of what a verdict rests on.

    Returns:
        How many were left out; None where nobody looked, since there are too many images.
    """
    files = {
        os.path.join(root, place): (name, size)
        for name in ('test', 'validation', 'train')
        for place, _, size in rows.get(name) or ()
    }
    copies = find_copies([(path, size) for path, (_, size) in files.items()])
    if copies is None:
        return None
    role = {path: name for path, (name, _) in files.items()}
    for name in (TEST, 'validation'):
        copied = {path: first for path, first in copies.items() if role[first] == name != role[path]}
        check_copies(copied, len(rows.get(name) or ()), name)
    is_split = rows['validation'] is None or TEST not in rows
    once = {TEST, *(('train',) if is_split else ())}
    gone = {path for path, first in copies.items() if role[path] != role[first] or role[path] in once}
    if gone:
        labels = [label for _, label, _ in rows['train']]
        example = min(gone)
        found = len(gone), shown(example), shown(copies[example])
        _logger.warning('left out: %d images are copies of others, such as %s of %s.', *found)
        for name, part in rows.items():
            rows[name] = part and [row for row in part if os.path.join(root, row[0]) not in gone]
            if part and not rows[name]:
                raise ValueError(
                    f'{split_argument(name)}: all {len(part)} {name} images are copies of test images, such as '
                    f'{shown(example)} of {shown(copies[example])}; take other images.'
                )
        check_left(labels, (label for _, label, _ in rows['train']))
    return len(gone)


def _check_counts(rows: List[List[Any]], least: int) -> None:
    for label, count in sorted(Counter(label for _, label, _ in rows).items()):
        if count < least:
            raise ValueError(
                f'data_dir: class {shown(label)!r} has {count} image{"s" * (count != 1)}, but {least} or more are '
                'needed, some to train on, and others to choose by and to test on; add some.'
            )


def _check_number(count: int, where: str) -> None:
    if count < 2:
        raise ValueError(f'test_split: {where} has {count} test image{"s" * (count != 1)}, expected two or more.')


def _targets(rows: List[List[Any]], label_names: List[str]) -> List[int]:
    indices = {name: index for index, name in enumerate(label_names)}
    return [indices[label] for _, label, _ in rows]


def images_of(images: Dict[str, Any], val_frac: float, seed: int) -> Optional[Dict[str, Any]]:
    """Return the training and validation images of a seed; None of a named dataset, which a run splits by its seed."""
    if isinstance(images['train'], dict):
        return None
    train, val = images['train'], images['validation']
    if val is None:
        kept, held = stratified_split(_targets(train, images['label_names']), val_frac, seed, images['label_names'])
        train, val = ([images['train'][index] for index in part] for part in (kept, held))
    return _record(images, train, val)


def for_verdict(images: Dict[str, Any]) -> Dict[str, Any]:
    """Return the test images, in the place of validation images."""
    return _record(images, images['train'], images['test'])


def _record(images: Dict[str, Any], train: Any, validation: Any) -> Dict[str, Any]:
    names = {name: images[name] for name in ('label_names', 'description')}
    return {**names, 'train': train, 'validation': validation}


def num_training(images: Dict[str, Any], val_frac: float, seed: int) -> int:
    """Return how many images a run of a seed is trained on; of a named dataset, about so many."""
    chosen = images_of(images, val_frac, seed)
    return round(images['train']['count'] * (1 - val_frac)) if chosen is None else len(chosen['train'])


def training_counts(images: Dict[str, Any], val_frac: float, seed: int) -> Optional[List[int]]:
    """Return the training images of each class of a seed; of a named dataset, those of all seeds, if it knows them."""
    chosen = images_of(images, val_frac, seed)
    if chosen is None:
        return images['counts']
    return class_counts(_targets(chosen['train'], images['label_names']), len(images['label_names']))
