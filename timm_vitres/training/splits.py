"""A run's training and validation sets, the split of one set into two, and the record from which both are reopened."""

import re
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from torch.utils.data import Dataset

from ..checks import some
from ..data import open_image
from ..walking import shown
from .checking import BackgroundCheck

_NAMING = re.compile(r' \(.*| as .*|(?<=^a link) to .*|(?<=^a copy) of .*', re.DOTALL)
SETS = ('train', 'validation')  # of a run, by the names that its record has for them
NAMED = 10  # at most this many paths are named for one reason: a million images may have a text file each


class Data(NamedTuple):
    """The training and the validation set of a run, and what is known of them."""

    train: Dataset
    val: Dataset
    label_names: List[str]
    counts: Optional[List[int]]  # training images of each class, where known
    description: str
    left_out: Dict[str, str]  # path -> reason
    lists: Dict[str, Any]  # the two sets' entries in the record
    check: Optional[BackgroundCheck] = None  # of images that are too many to be opened before the run begins

    @property
    def skipped(self) -> List[str]:
        """A sentence for each path that is left out; if a reason has many paths, a last sentence counts the rest."""
        by_reason: Dict[str, List[Tuple[str, str]]] = {}
        for path, reason in self.left_out.items():
            kind = _NAMING.sub('', reason)  # a reason that names another file is of a kind with its like
            by_reason.setdefault(kind, []).append((path, reason))
        sentences: List[str] = []
        for kind, named in by_reason.items():
            sentences += [f'{shown(path)}: {reason}' for path, reason in named[:NAMED]]
            if len(named) > NAMED:
                sentences.append(f'{len(named) - NAMED} more: {kind}')
        return sentences

    def record(self) -> Dict[str, Any]:
        """Return what `load_data` needs to open the same images again, as plain values for JSON.

        Returns:
            A dict of label_names, description, train and validation. For a folder, each set is a list of [path
            relative to the data folder, class name, bytes]; for a named dataset it is a dict of its split, the count
            and a sha256 of its labels, and the indices of its images if it is only a part of the split.
        """
        return {'label_names': self.label_names, 'description': self.description, **self.lists}


def read_record(recorded: Dict[str, Any], kind: type) -> Dict[str, Any]:
    """Return a record's two sets; raise ValueError unless both are of `kind`: list (image folder) or dict (dataset)."""
    what = 'an image folder' if kind is list else 'a named dataset'
    for name in (*SETS, 'label_names', 'description'):
        if not isinstance(recorded, dict) or name not in recorded:
            raise ValueError(f'recorded: the record of the images lacks {name!r}.')
    sets = {name: recorded[name] for name in SETS}
    labels, description = recorded['label_names'], recorded['description']
    good = isinstance(labels, list) and isinstance(description, str)
    good = good and all(isinstance(value, kind) for value in sets.values())
    if good and kind is list:
        known = {str(label) for label in labels}
        files = [file for value in sets.values() for file in value]
        good = all(isinstance(file, (list, tuple)) and len(file) == 3 for file in files)
        good = good and all(isinstance(name, str) and label in known for name, label, _ in files)
        good = good and not any(name.startswith('/') or '..' in name.split('/') for name, _, _ in files)
    if not good:
        raise ValueError(f'recorded: the run was not on {what}, or its record of the images is damaged.')
    return sets


def class_counts(targets: List[int], num_classes: int) -> List[int]:
    """Return the number of targets of each class index."""
    counter = Counter(targets)
    return [counter[index] for index in range(num_classes)]


def without(labels: Sequence[str]) -> str:
    """Return what a description says of classes that a set has no images of, and no figure of it tells of."""
    return f', with none of {some(map(shown, labels))}' if labels else ''


class Subset(Dataset):
    """Some images of a map-style dataset, with a transform of their own.

    The dataset returns PIL images, in `mode` if that is None, else as it stores them; `transform` is set by
    `create_loaders`, and `labels` returns the class index of a label as the dataset stores it.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        mode: Optional[str] = None,
        labels: Optional[Callable[[Any], int]] = None,
    ):
        self.dataset = dataset
        self.indices = list(indices)
        self.mode = mode
        self.labels = labels
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        image, target = self.dataset[self.indices[index]]
        if self.mode is not None:
            try:
                image = open_image(image, self.mode)
            except ValueError as error:  # an image of a named dataset has no path that could name it
                raise ValueError(f'dataset: image {self.indices[index]}: {error}') from error
        target = target if self.labels is None else self.labels(target)
        return image if self.transform is None else self.transform(image), target


def stratified_split(
    targets: Sequence[int], fraction: float, seed: int = 0, names: Sequence[str] = (), least: int = 1
) -> Tuple[List[int], List[int]]:
    """Split indices into two parts, class by class: the second holds `fraction` of each, and at least one.

    Args:
        fraction: From 0 to 1, without these two.
        seed: 0 or more.
        names: Those of the classes, for the error's sentence.
        least: So many of each class the first part holds at least, where there are as many and one more.

    Raises:
        ValueError: for a class of fewer than two targets.
    """
    generator = np.random.default_rng(seed)
    labels = np.asarray(targets)
    counts = sorted(Counter(labels.tolist()).items())
    order = np.argsort(labels, kind='stable')  # classes one behind the other, each in the order of its images
    own = np.split(order, np.cumsum([count for _, count in counts])[:-1])
    first: List[int] = []
    second: List[int] = []
    for (target, count), images in zip(counts, own):
        if count < 2:
            name = repr(names[target]) if names else target
            raise ValueError(f'val_frac: class {name} has {count} image, which cannot be split in two; add some.')
        indices = generator.permutation(images).tolist()
        cut = min(max(round(count * fraction), 1), max(count - least, 1))
        second += indices[:cut]
        first += indices[cut:]
    return sorted(first), sorted(second)
