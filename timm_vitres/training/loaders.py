"""Augmentation, seeds and batches of a run's images.

`Data` -> `create_loaders` -> batches of images (B, C, H, W) and class indices (B,). An image's augmentation depends on
the run's seed, the epoch and the image's place in the data, but neither on the number of workers nor on interruptions.
"""

import copy
import itertools
import logging
import multiprocessing
import random
import re
from contextlib import contextmanager
from functools import partial
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment_transform, create_transform, rand_augment_transform
from timm.data.auto_augment import AugmentOp, augment_and_mix_transform
from timm.data.transforms import ResizeKeepRatio
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info
from torchvision import transforms

from ..checks import on_one_line
from ..plugins import taught, teach
from .datasets import Data
from .processes import Processes
from .settings import FinetuneCfg

_logger = logging.getLogger(__name__)
# timm silently ignores a section that it does not understand
_POLICY = re.compile(r'(rand|augmix|original|originalr|v0|v0r|3a)(-([a-su-z][a-z]*\d{1,3}(\.\d+)?|t(weights|3aw?)))*')


def create_loaders(
    cfg: FinetuneCfg,
    data: Data,
    config: Dict[str, Any],
    lists: Dict[str, Any],
    processes: Optional[Processes] = None,
) -> Tuple['Batches', 'Batches']:
    """Return the batches that a run trains on, and those that it is validated on.

    Args:
        processes: Those that share the images; this one alone by default. Each trains on `batch_size` images a step.
        config: timm's data config: input_size, interpolation, mean, std, crop_pct, crop_mode.
        lists: What `Data.record` says of both sets; an image that fails is called by its name there.
    """
    processes = processes or Processes()
    shared = {name: config[name] for name in ('input_size', 'interpolation', 'mean', 'std')}
    has_colours = config['input_size'][0] == 3
    # images that are not augmented are resized as those of validation, as timm's train.py does it
    interpolation = config['interpolation'] if cfg.no_aug else cfg.train_interpolation or config['interpolation']
    train = create_transform(
        **{**shared, 'interpolation': interpolation},
        is_training=True,
        no_aug=cfg.no_aug,
        scale=cfg.scale,
        ratio=cfg.ratio,
        hflip=cfg.hflip,
        vflip=cfg.vflip,
        color_jitter=cfg.color_jitter,
        color_jitter_prob=cfg.color_jitter_prob,
        grayscale_prob=cfg.grayscale_prob if has_colours else 0.0,  # it would make RGB of other images
        gaussian_blur_prob=cfg.gaussian_blur_prob,
        train_crop_mode=cfg.train_crop_mode,
        auto_augment=cfg.aa or None,
        re_prob=cfg.reprob,
        re_mode=cfg.remode,
        re_count=cfg.recount,
    )
    if cfg.crop_padding is not None:  # timm has no such crop; what it begins with is a crop of its own
        train.transforms[0] = padded_crop(config['input_size'][-2:], cfg.crop_padding, interpolation)
    data.train.transform = mend_(train)
    data.val.transform = create_transform(**shared, crop_pct=config['crop_pct'], crop_mode=config['crop_mode'])
    batch_size = cfg.batch_size
    is_stream = isinstance(data.train, IterableDataset)  # its length is that of this process's share
    share = len(data.train) // (1 if is_stream else processes.count)
    if len(data.train) > 0 and share < batch_size:
        if not share:
            raise ValueError(f'data_dir: {len(data.train)} images are too few for {processes.count} processes.')
        # the last batch is dropped if it is not full, so that none would be left
        batch_size = max(share // 2 * 2, 1)
        _logger.warning('batch_size: %d, since there are no more images to train on.', batch_size)
    if cfg.aug_repeats > 1 and isinstance(data.train, IterableDataset):
        raise ValueError(f'aug_repeats: got {cfg.aug_repeats}, but a stream gives each image once; leave it out.')
    val_batch_size = cfg.validation_batch_size or cfg.batch_size
    return (
        Batches(
            data.train, batch_size, cfg.workers, cfg.seed, names_of(lists['train']), True, cfg.aug_repeats, processes
        ),
        Batches(data.val, val_batch_size, cfg.workers, cfg.seed, names_of(lists['validation']), processes=processes),
    )


def padded_crop(size: Sequence[int], padding: int, interpolation: str) -> transforms.Compose:
    """Return a random crop of an image whose shorter side was resized, padded by black pixels; PIL -> PIL.

    The usual augmentation of images as small as CIFAR's (He et al. 2015, arXiv:1512.03385, section 4.2).

    Args:
        size: Height and width of the crop, in pixels.
    """
    return transforms.Compose(
        [
            ResizeKeepRatio(tuple(size), longest=0.0, interpolation=interpolation),
            transforms.RandomCrop(tuple(size), padding=padding, pad_if_needed=True),
        ]
    )


def names_of(entry: Any) -> List[str]:
    """Return the images' names that a record's entry has: paths in a folder, or the numbers of a part of a dataset's
    split; none of a whole split, whose images count from 0.
    """
    if isinstance(entry, (list, tuple)):
        return [str(row[0]) for row in entry]
    return [f'image {index}' for index in (entry or {}).get('indices') or ()]


def check_policy(aa: Optional[str], mode: str) -> None:
    """Raise ValueError unless timm knows an augmentation policy, and all of it works on images of PIL's mode `mode`."""
    if not aa:
        return
    transforms = dict(rand=rand_augment_transform, augmix=augment_and_mix_transform)
    make = transforms.get(aa.partition('-')[0], auto_augment_transform)
    try:
        if not _POLICY.fullmatch(aa):
            raise ValueError('its parts are a name, letters and a number each')
        policy = mend_(make(aa, dict(translate_const=1, img_mean=(128,) * len(mode))))
    except (AssertionError, ValueError) as error:
        reason = f' ({error})' if str(error) else ''
        message = f'aa: got {aa!r}, expected a policy of timm, e.g. rand-m9-mstd0.5-inc1, augmix-m5-w4, original or 3a'
        raise ValueError(f'{message}{reason}.') from None
    image = Image.new(mode, (8, 8))
    certain = [copy.copy(operation) for operation in _operations(policy)]
    for operation in certain:
        operation.prob = 1.0
    for step in (*certain, policy):
        try:
            with seeded(0):
                step(image)
        except Exception as error:  # each operation of Pillow fails its own way
            what = f'{step.name} ' if isinstance(step, AugmentOp) else ''
            raise ValueError(f'aa: got {aa!r}, but {what}fails on images of mode {mode} ({error}).') from error


def mend_(transform: Any) -> Any:
    """Make posterization inside of one of timm's transforms keep at least one bit, and return the transform.

    timm's strongest setting keeps no bit, which recent versions of Pillow refuse.
    """
    for operation in _operations(transform):
        if operation.name.startswith('Posterize'):
            operation.aug_fn = _AtLeastOneBit(operation.aug_fn)
    return transform


class _AtLeastOneBit:
    """Posterization by `function` that keeps one bit or more."""

    def __init__(self, function: Any):
        self.function = function

    def __call__(self, image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
        return self.function(image, max(bits_to_keep, 1), **kwargs)


def _operations(transform: Any) -> List[AugmentOp]:
    """Return all operations of timm's policies inside of a transform, however deep."""
    if isinstance(transform, AugmentOp):
        return [transform]
    parts = transform if isinstance(transform, (list, tuple)) else ()
    for name in ('transforms', 'ops', 'policy'):
        parts = getattr(transform, name, parts)
    return [operation for part in parts for operation in _operations(part)]


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python, numpy and torch (on the CPU) by `key` for a block, then restore their states."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derived(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators, too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def derived(*key: int) -> int:
    """Return a seed of 63 bits made from `key`; other keys give other seeds."""
    # numpy pads keys with zeros: without their length, (0, 1) and (0, 1, 0) were one
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]) >> 1


class Failure(NamedTuple):
    """A stand-in for a sample that could not be made; an exception would cross processes as a stack trace."""

    sentence: str


class _Seeded(Dataset):
    """A dataset whose random numbers depend on (seed, epoch, index) alone.

    An index beyond the end is a further augmentation of an image, whose number is part of the seed.
    """

    def __init__(self, dataset: Any, seed: int, epoch: Any, names: Sequence[str]):
        self.dataset, self.seed, self.epoch, self.names = dataset, seed, epoch, names

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        repeat, index = divmod(index, len(self.dataset))
        try:
            with seeded(self.seed, self.epoch.value, index, *([repeat] if repeat else [])):
                return self.dataset[index]
        except Exception as error:
            name = self.names[index] if index < len(self.names) else f'image {index}'
            return Failure(_sentence(name, error))


class _SeededStream(IterableDataset):
    """A stream whose random numbers depend on (seed, epoch, worker, position, process), thus on how many there are."""

    def __init__(self, dataset: Any, seed: int, epoch: Any, rank: int = 0):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch
        self.rank = [rank] if rank else []

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        samples: Optional[Iterator[Any]] = None
        for position in itertools.count():
            try:
                with seeded(self.seed, self.epoch.value, worker.id if worker else 0, position, *self.rank):
                    samples = samples or iter(self.dataset)
                    sample = next(samples, None)
            except Exception as error:  # the stream has ended with it, and a batch that is not full would be dropped
                yield from itertools.repeat(Failure(_sentence(f'image {position} of the stream', error)))
            if sample is None:
                return
            yield sample


def _sentence(name: str, error: Exception) -> str:
    text = on_one_line(error)
    return text if name in text else f'{name}: {text}'


class _Share(Sampler):
    """The indices of a dataset that a process takes: every `count`-th of them, in an order that (seed, epoch) decides.

    Batches of all processes together are those of one process with batches as many times as large. Shares have the
    same length: in training, what is left over is dropped; else the last one is repeated, beyond `num_valid`.

    Args:
        repeats: Of so many augmentations of each image that is drawn, an epoch then has fewer images; 0 and 1 are one.
    """

    def __init__(self, length: int, seed: int, epoch: Any, shuffle: bool, repeats: int, processes: Processes):
        self.length, self.seed, self.epoch, self.shuffle = length, seed, epoch, shuffle
        self.repeats, self.processes = max(repeats, 1), processes
        self.num_valid = len(range(processes.rank, length, processes.count))

    def __len__(self) -> int:
        count = self.processes.count
        return self.length // count if self.shuffle else -(-self.length // count)

    def __iter__(self) -> Iterator[int]:
        rank, count = self.processes.rank, self.processes.count
        if not self.shuffle:
            order = torch.arange(self.length)
            order = torch.cat([order, order[-1:].repeat(-self.length % count)])
        else:
            generator = torch.Generator().manual_seed(derived(self.seed, self.epoch.value))
            order = torch.randperm(self.length, generator=generator)
            if self.repeats > 1:
                order = (order[:, None] + self.length * torch.arange(self.repeats)).flatten()
        yield from order[rank::count][: len(self)].tolist()


class Batches:
    """Batches of a dataset's images (B, C, H, W) and class indices (B,); training batches are shuffled and full.

    Iterating raises ValueError where an image can't be read or augmented; the message names it.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        workers: int,
        seed: int,
        names: Sequence[str],
        shuffle: bool = False,
        repeats: int = 0,
        processes: Optional[Processes] = None,
    ):
        self.dataset, self.batch_size = dataset, batch_size
        self.processes = processes or Processes()
        self.share: Optional[_Share] = None
        self.epoch: Any = multiprocessing.Value('q', 0, lock=False)  # in memory that loader processes share
        options: Dict[str, Any] = {}
        if isinstance(dataset, IterableDataset):
            if hasattr(dataset, 'set_loader_cfg'):
                dataset.set_loader_cfg(num_workers=workers)  # timm's streams estimate their length by this
            wrapped: Dataset = _SeededStream(dataset, seed, self.epoch, self.processes.rank)
        else:
            wrapped = _Seeded(dataset, seed, self.epoch, names)
            self.share = _Share(len(dataset), seed, self.epoch, shuffle, repeats, self.processes)
            options = dict(sampler=self.share)
        self.loader = DataLoader(
            wrapped,
            batch_size=batch_size,
            drop_last=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            worker_init_fn=partial(teach, taught()),
            # else starting the workers would draw from torch's own generator; it is where torch's default device is
            generator=torch.Generator(torch.empty(0).device),
            **options,
        )

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def num_valid(self) -> Optional[int]:
        """How many images are this process's own, of a dataset that is no stream; more only fill its batches up."""
        return None if self.share is None else self.share.num_valid

    def indices(self) -> Iterator[int]:
        """Yield the index in the dataset of every image that comes; of a stream, a number of its own for each."""
        rank, count = self.processes.rank, self.processes.count
        return itertools.count(rank, count) if self.share is None else iter(self.share)

    def set_epoch(self, epoch: int) -> None:
        """Use the random numbers of an epoch from the next iteration on."""
        self.epoch.value = epoch
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.loader:
            if isinstance(batch, Failure):
                raise ValueError(batch.sentence)
            yield batch


def _collate(samples: List[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, Failure)), None) or default_collate(samples)


def check_cutmix(minmax: Optional[Tuple[float, ...]], input_size: Sequence[int]) -> None:
    """Raise ValueError where no rectangle of whole pixels has a side between two parts of an image's (C, H, W)."""
    if minmax is not None and not all(int(side * minmax[0]) < int(side * minmax[1]) for side in input_size[-2:]):
        size = ' x '.join(map(str, input_size[-2:]))
        raise ValueError(
            f'cutmix_minmax: got {minmax[0]:g} and {minmax[1]:g}, between which images of {size} pixels have no whole '
            'pixel; give parts farther apart.'
        )
