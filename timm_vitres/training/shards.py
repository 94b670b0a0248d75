"""webdataset's tar files: dealt to processes so that an epoch is exact, and read without leaving anything out.

timm's `ReaderWds` understands the info file, the splits and the keys, but it logs what it can't read and goes on, and
in training a process repeats its own shards until it has its share: an epoch has some images twice, and others never.
"""

import io
import json
import math
import os
import random
import re
import tarfile
from typing import Any, Dict, Iterator, List, Optional, Tuple

from PIL import Image
from timm.data.readers.reader_wds import ReaderWds
from timm.data.readers.targets import get_field, has_field
from torch.utils.data import get_worker_info
from tqdm import tqdm

from ..checks import on_one_line
from ..data import open_image
from ..labels import normalise_label_names
from ..walking import image_formats, shown

META = re.compile(r'__[^/]*__($|/)')  # webdataset skips files of these names
MEMBER = re.compile(r'((?:.*/|)[^.]+)[.]([^/]*)')  # key and extension of a sample's file
NAMES = ('label_names', 'class_names', 'classes')  # an info file may name the classes under any of these


def open_bytes(data: bytes, mode: str, name: str) -> Image.Image:
    """Open an encoded image upright and in a PIL mode; raise ValueError, which names it, if it can't be read."""
    try:
        return open_image(Image.open(io.BytesIO(data), formats=image_formats()), mode)
    except Exception as error:  # Pillow's plug-ins raise errors of any kind for damaged bytes
        text = on_one_line(error).removeprefix('image: the image that was given ').rstrip('.')
        if not text.startswith('cannot be read as an image'):
            reason = 'its bytes are of no known format' if 'BytesIO' in text else text
            text = f'cannot be read as an image ({reason})'
        raise ValueError(f'image: {name} {text}.') from error


class ShardReader(ReaderWds):
    """timm's reader of tar files, whose processes share each epoch: every image comes once.

    In training, shards come in an order that the seed and the epoch decide, the images of a process are shuffled by a
    buffer, and as many images as do not fill a batch for every process group are left out, others in each epoch. In
    validation, every image comes, in order.

    Args:
        root: The folder of the shards, or its URL.
        split: A split of the info file, or a pattern of names such as 'train-{000..009}.tar'.
        mode: PIL's mode of the images.
        num_samples: How many images the split must have; None for as many as there are.
        kwargs: More of `ReaderWds`.

    Attributes:
        shards: (path or URL, number of images) of each shard.
        names: The class names of the info file; empty if it has none.

    Raises:
        ValueError: for a shard that is missing or damaged, and for shards of unknown or other length.
    """

    def __init__(
        self, root: str, split: str, mode: str, is_training: bool, num_samples: Optional[int] = None, **kwargs: Any
    ):
        # timm wants a number before the shards are counted
        super().__init__(root, split=split, is_training=is_training, num_samples=num_samples or 1, **kwargs)
        self.mode = mode
        self.shards = self._find_shards()
        self.num_samples = sum(count for _, count in self.shards)
        if not self.num_samples:
            raise ValueError(f'the split {split!r} has no images')
        if num_samples not in (None, self.num_samples):
            name = 'train_num_samples' if is_training else 'val_num_samples'
            raise ValueError(f'{name} is {num_samples}, but the split {split!r} has {self.num_samples} images')
        names = next((self.info[key] for key in NAMES if key in self.info), [])
        self.names = normalise_label_names(names, len(names)) if names else []

    def _find_shards(self) -> List[Tuple[str, int]]:
        paths = [os.path.join(self.root, name) for name in self.split_info.filenames]
        counts = list(map(int, self.split_info.shard_lengths))
        for path in paths:
            if is_local(path) and not os.path.isfile(path):
                raise ValueError(f'there is no shard {shown(path)}')
        if len(counts) == len(paths):
            return list(zip(paths, counts))
        remote = [path for path in paths if not is_local(path)]
        if remote:
            raise ValueError(f'no _info.json says how many images {shown(remote[0])} has, and it is no local file')
        return [(path, _count(path)) for path in tqdm(paths, desc='counting images', leave=False)]

    def _share(self) -> Tuple[int, int]:
        """Return the first of this rank's batches, and the one after its last."""
        size = self._batch_size()
        total = self.num_samples // size if self.is_training else math.ceil(self.num_samples / size)
        if self.is_training:
            total -= total % self.dist_num_replicas  # else one process would wait for the others
        first, after = (total * rank // self.dist_num_replicas for rank in (self.dist_rank, self.dist_rank + 1))
        return first, after

    def _batch_size(self) -> int:
        if not self.is_training:
            return self.batch_size
        # images that are too few for a batch make a smaller one, as in create_loaders
        return min(self.batch_size, max(self.num_samples // self.dist_num_replicas // 2 * 2, 1))

    def __len__(self) -> int:
        """Return the number of images of this rank in an epoch."""
        begin, end = (min(batch * self._batch_size(), self.num_samples) for batch in self._share())
        return end - begin

    def __iter__(self) -> Iterator[Tuple[Image.Image, Any]]:
        """Yield the images of one loader process in one epoch, with their labels as they are stored."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first, last = self._share()
        batches = [first + (last - first) * number // workers for number in (worker, worker + 1)]
        begin, end = (min(batch * self._batch_size(), self.num_samples) for batch in batches)
        samples = self._samples(begin, end)
        if self.is_training:
            import webdataset

            chance = random.Random(f'{self.common_seed} {self.epoch_count.value} {begin}')
            buffer = dict(bufsize=self.sample_shuffle_size, initial=self.sample_initial_size, rng=chance)
            samples = webdataset.shuffle(**buffer)(samples)
        for sample in samples:
            yield self._decoded(sample)

    def _samples(self, begin: int, end: int) -> Iterator[Dict[str, Any]]:
        """Yield the raw samples from one place in the epoch to another."""
        shards = list(self.shards)
        start = 0
        if self.is_training:
            chance = random.Random(f'{self.common_seed} {self.epoch_count.value}')
            chance.shuffle(shards)
            start = chance.randrange(self.num_samples)  # else one shard's last images would never fill a batch
        begin, end, length = begin + start, end + start, self.num_samples
        for low, high in ((begin, min(end, length)), (max(begin, length) - length, end - length)):
            place = 0
            for path, count in shards:
                if place < high and place + count > low:
                    yield from _read(path, count, max(low - place, 0), min(high - place, count))
                place += count

    def _decoded(self, sample: Dict[str, Any]) -> Tuple[Image.Image, Any]:
        key, data = self._encoded(sample)
        return open_bytes(data, self.mode, f'{_place(sample)}.{key}'), self._label(sample)

    def _encoded(self, sample: Dict[str, Any]) -> Tuple[str, bytes]:
        key = next((key for key in self.input_key.split(';') if key in sample), None)
        if key is None:
            known = ', '.join(sorted(name for name in sample if not name.startswith('__')))
            raise ValueError(f'input_key: {_place(sample)} has no {self.input_key!r}; it has {known}.')
        return key, sample[key]

    def _label(self, sample: Dict[str, Any]) -> Any:
        field, place = self.target_key or self.split_info.alt_label, _place(sample)
        if not field:
            if 'cls' not in sample:
                raise ValueError(f'target_key: {place} has no label (cls); name the field of its json that is one.')
            text = sample['cls'].decode(errors='replace').strip()
            return int(text) if re.fullmatch(r'-?\d+', text) else text
        try:
            meta = json.loads(sample['json'])
        except (KeyError, ValueError) as error:
            raise ValueError(f'target_key: {place} has no json with {field!r} ({error}).') from error
        if not isinstance(meta, dict) or not has_field(meta, field):
            raise ValueError(f'target_key: the json of {place} has no {field!r}; it has {", ".join(meta)}.')
        return get_field(meta, field)

    def listed(self) -> List[List[Any]]:
        """Return what a record says of each shard: its name below the root, its number of images, its bytes."""
        sizes = [os.path.getsize(path) if is_local(path) else None for path, _ in self.shards]
        return [[name, count, size] for name, (_, count), size in zip(self.split_info.filenames, self.shards, sizes)]

    def first(self, count: int) -> List[Tuple[bytes, Any]]:
        """Return the bytes of up to so many images from the beginning, each with its label."""
        path, length = next(shard for shard in self.shards if shard[1])
        samples = _read(path, length, 0, min(count, length))
        return [(self._encoded(sample)[1], self._label(sample)) for sample in samples]


def is_local(path: str) -> bool:
    """Return whether a shard is a file of this machine, and no URL or command."""
    return '://' not in path and not path.startswith('pipe:')


def _place(sample: Dict[str, Any]) -> str:
    return f'{shown(sample["__url__"])}/{shown(sample["__key__"])}'


def _count(path: str) -> int:
    """Return the number of samples of a tar file: files of one key that follow on one another."""
    count, last = 0, None
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                found = MEMBER.fullmatch(member.name) if member.isreg() and not META.match(member.name) else None
                if found and found[1] != last:
                    count, last = count + 1, found[1]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f'the shard {shown(path)} cannot be read ({on_one_line(error)})') from error
    return count


def _read(path: str, count: int, begin: int, end: int) -> Iterator[Dict[str, Any]]:
    """Yield some of a shard's samples; raise ValueError if it can't be read, or has not `count` of them."""
    import webdataset

    pipeline = webdataset.DataPipeline(webdataset.SimpleShardList([path]), webdataset.tarfile_to_samples())
    found = 0
    try:
        for sample in pipeline:
            if begin <= found < end:
                yield sample
            found += 1
            if found == end < count:
                return
    except Exception as error:  # webdataset raises whatever a file, a server or a command does
        raise ValueError(f'dataset: the shard {shown(path)} cannot be read ({on_one_line(error)}).') from error
    if found != count:
        raise ValueError(f'dataset: the shard {shown(path)} has {found} images, expected {count}.')
