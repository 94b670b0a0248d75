"""Reading checkpoint files of any container: safetensors, torch, npz, and shards with their index.

file -> `read_checkpoint` (the first bytes tell the container) -> a state dict in the file's own layout ->
`convert_layout` (see `layouts`) -> a state dict in our layout.
Nothing in a checkpoint is run, and nothing in it is left out silently.
"""

import argparse
import json
import logging
import math
import os
import pickle
import pickletools
import re
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import safetensors.torch
import torch

from .files import ALIGNMENT
from .layouts import WRAPPERS, StateDict

_logger = logging.getLogger(__name__)
MMAP_VARIABLE = 'TIMM_VITRES_MMAP'
# Hugging Face's libraries write such an index beside the shards of a checkpoint: it says which shard has which tensor
INDEX_NAMES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
DEFLATE_RATIO = 1032  # deflate, zip's usual compression, shrinks nothing by more than this factor


class NoCheckpointError(ValueError):
    """A file is not read as a checkpoint, since it holds something other than weights, or more than weights."""


def read_checkpoint(path: Path, use_ema: bool = True, mmap: Optional[bool] = None) -> Tuple[StateDict, Dict[str, Any]]:
    """Return the state dict in a file, in the file's own layout, and the other entries of a training checkpoint.

    Every tensor has memory of its own, even if tensors share memory in the file.

    Args:
        path: The file, or the index of a checkpoint in shards.
        use_ema: Take the averaged weights of a training checkpoint, where it has them.
        mmap: Whether the tensors of safetensors files are mapped into memory: they are read when they are used, and
            never written back. By default `is_mapped` decides.

    Raises:
        OSError: for a damaged file, and shards that do not match their index.
        ValueError: for a file that is no checkpoint, or one that holds more than weights and plain values, which
            could run code.
    """
    mmap = is_mapped(mmap)
    if path.name.endswith(INDEX_NAMES):
        return _read_shards(path, mmap), {}
    return _read_file(path, use_ema, mmap)


def is_mapped(mmap: Optional[bool] = None) -> bool:
    """Return whether weights are mapped into memory.

    `mmap` decides, else the variable TIMM_VITRES_MMAP, else whether the system can replace a file that is mapped.

    Raises:
        ValueError: for an `mmap` that is neither True nor False, or a variable that is neither 0 nor 1.
    """
    if mmap is None:
        told = os.environ.get(MMAP_VARIABLE, '')
        if told not in ('', '0', '1'):
            raise ValueError(f'{MMAP_VARIABLE}: got {told!r}, expected 0 (read weights) or 1 (map them into memory).')
        return told == '1' if told else os.name != 'nt'  # Windows can't replace a mapped file
    if not isinstance(mmap, bool):
        raise ValueError(f'mmap: got {mmap!r:.80}, expected True or False.')
    return mmap


def checkpoint_files(path: Path) -> List[Path]:
    """Return the files that hold a checkpoint's tensors: `path` itself, or the shards that it names as an index."""
    if not path.name.endswith(INDEX_NAMES):
        return [path]
    return [path.with_name(name) for name in dict.fromkeys(_read_index(path).values())]


def _read_index(path: Path) -> Dict[str, str]:
    with _damage(path):
        index = json.loads(path.read_text(encoding='utf-8'))
    shards = index.get('weight_map') if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise NoCheckpointError(f'{path} is no index of shards: it has no "weight_map" with the shard of each tensor.')
    outside = [name for name in shards.values() if Path(name).name != name or name.endswith(INDEX_NAMES)]
    if outside:
        raise NoCheckpointError(f'{path} names {outside[0]!r} as a shard, expected the name of a file beside it.')
    return shards


def _read_shards(path: Path, mmap: bool) -> StateDict:
    index = _read_index(path)
    result: StateDict = {}
    for shard in checkpoint_files(path):
        if not shard.is_file():
            raise FileNotFoundError(f'{shard} is missing: {path.name} beside it says that it holds tensors.')
        tensors, _ = _read_file(shard, True, mmap)
        for name in tensors:
            if index.get(name) != shard.name:
                told = f'in {index[name]}' if name in index else 'in no shard'
                raise OSError(
                    f'{shard} holds {name}, which is {told} as {path.name} says: they do not belong together.'
                )
        result.update(tensors)
    missing = sorted(index.keys() - result.keys())
    if missing:
        raise OSError(f'{path} says that {index[missing[0]]} holds {missing[0]}, but it does not: it is another file.')
    return result


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises into one OSError: damaged bytes raise errors of any kind, none documented."""
    try:
        yield
    except NoCheckpointError:
        raise
    except PermissionError as error:
        raise PermissionError(f'{path} could not be opened: {error.strerror or error}.') from error
    except Exception as error:
        raise OSError(f'{path} is damaged or incomplete ({_first_line(error)}).') from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition('\n')[0][:200].rstrip('.')
    return text if ' ' in text else f'{type(error).__name__} {text}'.strip()  # a KeyError's text is only its key


def _read_file(path: Path, use_ema: bool, mmap: bool) -> Tuple[StateDict, Dict[str, Any]]:
    if path.is_dir():
        raise NoCheckpointError(f'{path} is a folder, expected a file.')
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise NoCheckpointError(f'{path} is no regular file.')
    if not path.exists():
        raise FileNotFoundError(f'{path}: there is no such file.')
    with _damage(path):
        with path.open('rb') as file:
            start = file.read(9)
        if start[8:] == b'{':
            return _read_safetensors(path, mmap), {}
        if start.startswith(b'PK'):
            return _read_zip(path, use_ema)
        if start.startswith(b'\x80'):
            _check_old_torch(path)
            return _unwrap(_read_torch(path), use_ema, path)
    hint = ': it is a pointer of Git LFS, run `git lfs pull`' if start.startswith(b'version h') else ''
    raise NoCheckpointError(f'{path} is no safetensors, torch or npz file{hint}. It begins with {start!r}.')


def _read_safetensors(path: Path, mmap: bool) -> StateDict:
    if mmap:
        # `write_safetensors` aligns only tensors whose size is a multiple of ALIGNMENT; others are copied
        tensors = safetensors.torch.load_file(path)
        return {key: value.clone() if value.nbytes % ALIGNMENT else value for key, value in tensors.items()}
    if os.name == 'nt':  # safetensors can't read a file there without mapping it
        tensors = safetensors.torch.load(path.read_bytes())
    else:
        tensors = safetensors.torch.load_file(path, backend='pread')
    aligned = {}
    while tensors:  # tensors are copied one by one, so that only one at a time takes memory twice
        key, value = tensors.popitem()
        aligned[key] = value.clone() if value.data_ptr() % ALIGNMENT else value
    return aligned


def _read_zip(path: Path, use_ema: bool) -> Tuple[StateDict, Dict[str, Any]]:
    with zipfile.ZipFile(path) as archive:
        _check_archive(archive, path)
        names = [Path(name).name for name in archive.namelist()]
        size = sum(info.file_size for info in archive.infolist())
        if any(name.endswith('.npy') for name in names):
            return _read_npz(archive, path), {}
    if 'constants.pkl' in names:
        raise NoCheckpointError(f'{path} is a TorchScript archive, which holds code; save its state dict alone.')
    if 'data.pkl' not in names:
        raise NoCheckpointError(f'{path} is a zip archive without weights of torch or numpy.')
    with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it writes
        if damaged := archive.testzip():
            option = 'if it was saved without checksums (torch.serialization.set_crc32_options), load and save it again'
            raise OSError(f'{damaged} in it has another checksum than it was saved with; {option}')
    return _unwrap(_read_torch(path), use_ema, path, size)


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise OSError, before memory is allocated, where an archive's directory promises more than the file can hold."""
    promised = 0
    for info in archive.infolist():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NoCheckpointError(f'{path}: {info.filename} in it is compressed in a way that no checkpoint is.')
        promised += info.compress_size
        most = info.compress_size * (DEFLATE_RATIO if info.compress_type == zipfile.ZIP_DEFLATED else 1)
        if promised > path.stat().st_size or info.file_size > most:
            raise OSError(f'{info.filename} would have {info.file_size} bytes, more than there are')


def _read_npz(archive: zipfile.ZipFile, path: Path) -> StateDict:
    result: StateDict = {}
    for info in archive.infolist():
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](file)
            if dtype.kind not in 'fiubc':
                raise NoCheckpointError(
                    f'{path}: {info.filename} in it has the dtype {dtype}, expected numbers (allow_pickle=False).'
                )
            size = math.prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0 or size != info.file_size - file.tell():
                raise OSError(f'{info.filename} promises {size} bytes and has {info.file_size - file.tell()}')
        with archive.open(info) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        array = array.astype(dtype.newbyteorder('='), copy=False)
        try:
            result[info.filename.removesuffix('.npy')] = torch.from_numpy(array)
        except TypeError:
            raise NoCheckpointError(f'{path}: {info.filename} in it has the dtype {dtype}, unknown to torch.') from None
    return result


# pickle's opcodes of whole numbers
_NUMBERS = {'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4'}


def _check_old_torch(path: Path) -> None:
    """Raise OSError where a file in torch's format before zip promises more than it has: torch would allocate all."""
    size = path.stat().st_size
    with path.open('rb') as file, suppress(ValueError):  # torch itself refuses a file of another format
        for _ in range(4):  # the file holds a magic number, a version, the machine and the checkpoint
            number = 0
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in _NUMBERS:
                    number = argument or 0
                elif opcode.name == 'BINPERSID' and number > size:  # the last number is the storage's length
                    raise OSError(f'it promises {number} numbers and has {size} bytes')


def _read_torch(path: Path) -> Any:
    # the file is not mapped, since torch.save would write into it while a model uses it
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's train.py stores settings as one
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r'(GLOBAL [\w.]+|Unsupported \w+ [\w.]+|Unsupported operand \d+)', str(error))
        raise NoCheckpointError(
            f'{path} was not opened: it holds Python objects besides weights and plain values, which could run code '
            f'({found.group(1) if found else _first_line(error)}). Save its state dict alone, with safetensors.'
        ) from error


def _unwrap(checkpoint: Any, use_ema: bool, path: Path, size: Optional[int] = None) -> Tuple[StateDict, Dict[str, Any]]:
    about: Dict[str, Any] = {}
    for _ in range(len(WRAPPERS)):  # the loop is bounded, since a dict may hold itself
        wrappers = [key for key in WRAPPERS if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict)]
        averages = [key for key in wrappers if key.endswith('_ema')]
        left = [key for key in averages if not use_ema or not _holds_tensors(checkpoint[key])]
        if use_ema and left:
            _logger.warning('%s: its %s holds no averaged weights; those beside it are taken.', path.name, left[0])
        wrappers = [key for key in wrappers if key not in left]
        if not wrappers:
            break
        about = {**checkpoint, **about}
        checkpoint = checkpoint[wrappers[0]]
    if not isinstance(checkpoint, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in checkpoint.items()
    ):
        raise NoCheckpointError(
            f'{path} holds no state dict (names with tensors), alone or as {" or ".join(WRAPPERS)}.'
        )
    for key, value in checkpoint.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise NoCheckpointError(f'{path}: {key} is quantised, sparse or empty, expected a plain tensor.')
    about = {key: value for key, value in about.items() if key not in WRAPPERS}
    return _independent(checkpoint, path.stat().st_size if size is None else size), about


def _holds_tensors(average: Dict[str, Any], depth: int = 5) -> bool:
    """Return whether averaged weights are some, wherever they stand, and not the counts of an average that was never
    begun.
    """
    inner = [value for value in average.values() if isinstance(value, dict)]
    return any(torch.is_tensor(value) and value.ndim for value in average.values()) or (
        depth > 0 and any(_holds_tensors(value, depth - 1) for value in inner)
    )


def _independent(state_dict: StateDict, size: int) -> StateDict:
    """Return tensors with memory of their own: tensors that share it would become one parameter of a model.

    Args:
        size: Number of bytes in the file; some versions of torch make storages that end beyond them.
    """
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state_dict.values()}
    if sum(storages.values()) > size:
        raise OSError(f'its tensors would have {sum(storages.values())} bytes, more than there are')
    uses = Counter(value.untyped_storage().data_ptr() for value in state_dict.values())
    result: StateDict = {}
    for key, value in state_dict.items():
        storage = value.untyped_storage()
        alone = uses[storage.data_ptr()] == 1 and storage.nbytes() == value.nbytes and value.is_contiguous()
        result[key] = value.detach() if alone else value.detach().clone(memory_format=torch.contiguous_format)
    return result
