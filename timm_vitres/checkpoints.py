"""Checkpoints of any container and layout -> a state dict of ours (the serial family's is timm's), ready for a model.

file -> `read_checkpoint` (safetensors, torch, npz, known by its first bytes; shards by their index) -> `convert_layout`
(see `layouts`) -> `checkpoint_filter_fn` (compared with the model, tables resampled).
Nothing in a checkpoint is run, and nothing in it is left out silently.
"""

import argparse
import json
import math
import os
import pickle
import pickletools
import re
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, to_2tuple

from .files import ALIGNMENT
from .layouts import WRAPPERS, StateDict, convert_layout

MMAP_VARIABLE = 'TIMM_VITRES_MMAP'
# what Hugging Face's libraries put beside the shards of a checkpoint: which of them has which tensor
INDEX_NAMES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
COMPLEX_DTYPES = (torch.complex32, torch.complex64, torch.complex128)
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEFLATE_RATIO = 1032  # zip's usual compression makes nothing smaller than by this factor


class NoCheckpointError(ValueError):
    """Why a file is not read as a checkpoint: it holds something else than weights, or more."""


def read_checkpoint(path: Path, use_ema: bool = True, mmap: Optional[bool] = None) -> Tuple[StateDict, Dict[str, Any]]:
    """Return the state dict in a file, in the file's own layout, and what else a training checkpoint says.

    Every tensor has its memory to itself, whatever they shared in the file.

    Args:
        path: The file, or the index of a checkpoint in shards.
        use_ema: Take the averaged weights of a training checkpoint, where it has them.
        mmap: Whether the tensors of safetensors files are mapped into memory: they are read when they are used, and
            never written back. By default what `is_mapped` says.

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
    """Return whether weights are mapped: as asked, else as TIMM_VITRES_MMAP says, else wherever files can be replaced.

    Raises:
        ValueError: for anything but True or False, and 0 or 1 in the variable.
    """
    if mmap is None:
        told = os.environ.get(MMAP_VARIABLE, '')
        if told not in ('', '0', '1'):
            raise ValueError(f'{MMAP_VARIABLE}: got {told!r}, expected 0 (read weights) or 1 (map them into memory).')
        return told == '1' if told else os.name != 'nt'  # where a file that is mapped can't be replaced
    if not isinstance(mmap, bool):
        raise ValueError(f'mmap: got {mmap!r:.80}, expected True or False.')
    return mmap


def checkpoint_files(path: Path) -> List[Path]:
    """Return the files that hold the tensors of a checkpoint: itself, or the shards that it names as an index."""
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
    """Turn whatever a reader raises into one OSError: on damaged bytes it can be any kind, and none is documented."""
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
    return text if ' ' in text else f'{type(error).__name__} {text}'.strip()  # as of a KeyError


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
        # see `write_safetensors`
        tensors = safetensors.torch.load_file(path)
        return {key: value.clone() if value.nbytes % ALIGNMENT else value for key, value in tensors.items()}
    if os.name == 'nt':  # where safetensors has no other way
        tensors = safetensors.torch.load(path.read_bytes())
    else:
        tensors = safetensors.torch.load_file(path, backend='pread')
    aligned = {}
    while tensors:  # one after the other, so that no more than one is there twice
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
    return _unwrap(_read_torch(path), use_ema, path, size)


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise where the directory of an archive promises more than the file can hold, before memory is asked for it."""
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


def _check_old_torch(path: Path) -> None:
    """Raise where a file of torch's format before zip names a storage larger than itself: torch would allocate it."""
    size = path.stat().st_size
    with path.open('rb') as file, suppress(ValueError):  # what is no such file, torch refuses itself
        for _ in range(4):  # a magic number, a version, the machine, and the checkpoint
            number = 0
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name.startswith(('INT', 'LONG', 'BININT')):
                    number = argument or 0
                elif opcode.name == 'BINPERSID' and number > size:  # the last number is the storage's length
                    raise OSError(f'it promises {number} numbers and has {size} bytes')


def _read_torch(path: Path) -> Any:
    # not mapped: torch.save writes into the file itself, under a live model's feet
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the settings in timm's training checkpoints
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r'(GLOBAL [\w.]+|Unsupported \w+ [\w.]+|Unsupported operand \d+)', str(error))
        raise NoCheckpointError(
            f'{path} was not opened: it holds Python objects besides weights and plain values, which could run code '
            f'({found.group(1) if found else _first_line(error)}). Save its state dict alone, with safetensors.'
        ) from error


def _unwrap(checkpoint: Any, use_ema: bool, path: Path, size: Optional[int] = None) -> Tuple[StateDict, Dict[str, Any]]:
    about: Dict[str, Any] = {}
    for _ in range(len(WRAPPERS)):  # not for ever: a dict may hold itself
        wrappers = [key for key in WRAPPERS if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict)]
        wrappers = [key for key in wrappers if use_ema or not key.endswith('_ema')]
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


def _independent(state_dict: StateDict, size: int) -> StateDict:
    """Return tensors that have their memory to themselves: what shares it would become one parameter of a model.

    Args:
        size: Bytes that there were to be read; some versions of torch make storages that end behind them.
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


def checkpoint_filter_fn(
    state_dict: Dict[str, Any], model: torch.nn.Module, img_size: Optional[Sequence[int]] = None
) -> StateDict:
    """Return a state dict of any layout in timm's, completed, resampled and compared: ready for `model`.

    Position embeddings are resampled from the checkpoint's grid to the model's, and the patch projection to its
    patch size, both as timm does.

    Args:
        img_size: Height and width that the checkpoint was made for, where they are known.

    Raises:
        RuntimeError: for missing or unexpected keys, wrong shapes and dtypes, all of which it lists; the shapes of the
            head and of the first convolution excepted, which are the caller's to compare.
    """
    state_dict = add_batch_counts(convert_layout(state_dict), model)
    check_dtypes(state_dict, model)
    state_dict = resample(state_dict, model, img_size)
    adaptable = {*classifier_keys(model), f'{model._traits["first_conv"]}.weight'}
    check_keys(state_dict, model, adaptable)
    return state_dict


def add_batch_counts(state_dict: StateDict, model: torch.nn.Module) -> StateDict:
    """Return a state dict with a count of 0 for each BatchNorm that lacks it, as of old torch and other programs.

    torch itself fills these counts in. Nothing but their own momentum of None makes use of them.
    """
    state_dict = dict(state_dict)
    for key in model.state_dict():
        if key.endswith('.num_batches_tracked') and key.replace('num_batches_tracked', 'running_var') in state_dict:
            state_dict.setdefault(key, torch.tensor(0))
    return state_dict


def check_dtypes(state_dict: StateDict, model: torch.nn.Module) -> None:
    """Raise RuntimeError that lists what would silently become other numbers: quantised, bool or complex weights.

    Counts (integers in the model) may be floating-point numbers, as where a whole state dict was cast.
    """
    wrong = []
    for key, own in model.state_dict().items():
        value = state_dict.get(key)
        if value is None or value.dtype in (own.dtype, *FLOAT_DTYPES):
            continue
        if own.is_floating_point() or value.dtype in (torch.bool, *COMPLEX_DTYPES):
            wrong.append(f'{key} is {value.dtype} for {own.dtype}')
    if wrong:
        raise RuntimeError(
            f'The checkpoint holds other numbers than weights ({_listed(wrong)}), which would not mean the same in '
            f'the model; expected one of {", ".join(map(str, FLOAT_DTYPES))}.'
        )


def resample(state_dict: StateDict, model: torch.nn.Module, img_size: Optional[Sequence[int]] = None) -> StateDict:
    """Return a state dict of timm's layout with the model's position table and patch size."""
    state_dict = dict(state_dict)
    if not hasattr(model, 'patch_embed'):  # the parallel family has neither
        return state_dict
    table = state_dict.get('pos_embed')
    if table is not None and getattr(model, 'pos_embed', None) is not None:
        if table.ndim != 3:
            raise RuntimeError(
                f'pos_embed: the checkpoint has shape {tuple(table.shape)}, expected (1, tokens, width).'
            )
        state_dict['pos_embed'] = _resample_pos_embed(table, model, img_size)
    weight = state_dict.get('patch_embed.proj.weight')
    patch_size = tuple(model.patch_embed.patch_size)
    if weight is not None and weight.ndim == 4 and tuple(weight.shape[-2:]) != patch_size:
        state_dict['patch_embed.proj.weight'] = resample_patch_embed(weight, list(patch_size))
    return state_dict


def classifier_keys(model: torch.nn.Module) -> List[str]:
    """Return the names of the tensors of a model's head, or of its heads."""
    return [f'{head}.{tensor}' for head in model._traits['classifier'] for tensor in ('weight', 'bias')]


def check_keys(state_dict: StateDict, model: torch.nn.Module, adaptable=()) -> None:
    """Raise RuntimeError that lists missing keys, unexpected keys and wrong shapes, those in `adaptable` excepted."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = sorted(expected.keys() - state_dict.keys() - set(adaptable))
    unexpected = sorted(state_dict.keys() - expected.keys() - set(adaptable))
    wrong = [
        f'{key} {tuple(state_dict[key].shape)} for {shape}'
        for key, shape in expected.items()
        if key in state_dict and key not in adaptable and tuple(state_dict[key].shape) != shape
    ]
    if missing or unexpected or wrong:
        architecture = getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)
        raise RuntimeError(
            f'The checkpoint is not one of {architecture} as it was asked for: '
            f'missing keys: {_listed(missing)}; unexpected keys: {_listed(unexpected)}; '
            f'wrong shapes: {_listed(wrong)}.'
        )


def _listed(keys: Sequence[str], limit: int = 20) -> str:
    more = f' and {len(keys) - limit} more' if len(keys) > limit else ''
    return (', '.join(keys[:limit]) or 'none') + more


def _resample_pos_embed(
    pos_embed: torch.Tensor, model: torch.nn.Module, img_size: Optional[Sequence[int]]
) -> torch.Tensor:
    num_prefix_tokens = 0 if model.no_embed_class else model.num_prefix_tokens
    num_tokens = pos_embed.shape[1] - num_prefix_tokens
    grid = tuple(model.patch_embed.grid_size)
    old_grid = tuple(model.patch_embed.dynamic_feat_size(to_2tuple(img_size))) if img_size is not None else grid
    if math.prod(old_grid) != num_tokens:  # what is told is not about this table
        side = math.isqrt(max(num_tokens, 0))
        if math.prod(grid) == num_tokens:
            old_grid = grid
        elif side > 0 and side * side == num_tokens:
            old_grid = (side, side)
        else:
            raise RuntimeError(
                f'pos_embed: the checkpoint has {num_tokens} position embeddings, which are no square grid, and its '
                f'metadata names no image size that gives that many; say its input_size in the pretrained_cfg.'
            )
    if old_grid == grid:
        return pos_embed
    return resample_abs_pos_embed(
        pos_embed, new_size=list(grid), old_size=list(old_grid), num_prefix_tokens=num_prefix_tokens
    )
