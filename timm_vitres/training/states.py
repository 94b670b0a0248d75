"""A run's checkpoint: what the next epoch needs, in one file, or, of a sharded model, in a folder beside it.

`write_state` -> folder/last.pth.tar (and folder/last-<epoch>.sharded) -> `read_state`.
"""

import pickle
import re
import shutil
from enum import Enum
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from torch import nn

from ..checks import on_one_line
from ..writing import replacing
from .processes import Processes
from .runs import CHECKPOINT_NAME, RECORD_NAME, Record

KEPT_NAME = 'checkpoint-{}.pth.tar'  # of an epoch, as timm's train.py calls them, for its avg_checkpoints.py


def read_state(folder: Path, record: Record, has_model: bool) -> Optional[Dict[str, Any]]:
    """Return the checkpoint of a run; None where it was killed before it had one.

    Args:
        has_model: Whether the folder holds a model, which is made after a checkpoint.

    Raises:
        ValueError: for a file that is no checkpoint, or one of another run.
        FileNotFoundError: where there is none, but should be.
    """
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        if has_model:
            raise FileNotFoundError(f'resume: {folder} holds a model, but no {CHECKPOINT_NAME} to go on from.')
        return None
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a truncated file fails in the unpickler, in zip, or in torch, each its own way
        raise ValueError(f'resume: {path} is not a checkpoint of a fine-tuning run ({error}).') from error
    if not isinstance(state, dict) or not {'id', 'history', 'epoch'} <= state.keys():
        raise ValueError(f'resume: {path} is not a checkpoint of a fine-tuning run (it lacks what one holds).')
    if state['id'] != record.id:
        raise ValueError(f'resume: {path} is of another run than {RECORD_NAME} beside it.')
    if 'sharded' in state and not re.fullmatch(r'last-\d+\.sharded', str(state['sharded'])):
        raise ValueError(f'resume: {path} names {state["sharded"]!r}, which is no folder of shards of a run.')
    if 'sharded' in state and not (folder / state['sharded']).is_dir():
        raise FileNotFoundError(f'resume: {folder} lacks {state["sharded"]}, which holds the weights to go on from.')
    return state


def write_state(folder: Path, state: Dict[str, Any]) -> None:
    """Write a checkpoint, and remove the shards of those before it."""
    with replacing(folder / CHECKPOINT_NAME) as path:
        torch.save(state, path)
    for path in folder.glob('last-*.sharded'):
        if path.name != state.get('sharded'):
            shutil.rmtree(path, ignore_errors=True)


def write_shards(folder: Path, epoch: int, model: nn.Module, optimizer: Any, processes: Processes) -> str:
    """Let every process write its part of model and optimizer; return the name of the folder that holds them."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    name = f'last-{epoch}.sharded'
    # what a killed process has left of this epoch is of no use
    processes.of_first(lambda: shutil.rmtree(folder / name, ignore_errors=True))
    weights, steps = get_state_dict(model, optimizer)
    try:
        checkpoint.save(dict(model=weights, optimizer=steps), checkpoint_id=folder / name)
    except checkpoint.CheckpointException as error:
        raise OSError(f'{folder / name} could not be written ({_reason(error)}).') from error
    return name


def _member(owner: Any, name: str) -> Any:
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise pickle.UnpicklingError(f'it asks for {name} of {owner!r}, which could run code')
    return owner[name]


class _Metadata(pickle.Unpickler):
    """Reads torch's table of shards, which is a pickle, and refuses whatever else is in it."""

    known = {
        'torch.distributed.checkpoint.metadata': (
            *('Metadata', 'StorageMeta', 'MetadataIndex', 'ChunkStorageMetadata', 'BytesStorageMetadata'),
            *('TensorStorageMetadata', 'TensorProperties', '_MEM_FORMAT_ENCODING'),
        ),
        'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
        'torch.serialization': ('_get_layout',),
        'torch': ('Size', *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
        'pathlib': ('PosixPath', 'WindowsPath'),
        'pathlib._local': ('PosixPath', 'WindowsPath'),  # of Python 3.13
        'collections': ('OrderedDict',),
        'builtins': ('getattr',),  # by which some releases of Python 3.11 name a member of an enumeration
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.known.get(module, ()):
            raise pickle.UnpicklingError(f'it holds {module}.{name}, which could run code')
        return _member if module == 'builtins' else super().find_class(module, name)


def read_shards(path: Path, model: nn.Module, optimizer: Any) -> None:
    """Load model and optimizer from what any number of processes have written; ValueError where it does not fit."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    class Planner(checkpoint.DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            torch.load(value, weights_only=True)  # torch itself takes any pickle here
            value.seek(0)
            super().load_bytes(read_item, value)

    weights, steps = get_state_dict(model, optimizer)
    try:
        with (path / '.metadata').open('rb') as stream:  # the file that torch reads
            _Metadata(stream).load()
        checkpoint.load(dict(model=weights, optimizer=steps), checkpoint_id=path, planner=Planner())
    except (Exception, checkpoint.CheckpointException) as error:  # the latter is a BaseException
        # a damaged shard fails in pickle, in torch, or in a collective, each its own way
        raise ValueError(f'resume: {path} does not fit the model of the run ({_reason(error)}).') from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=steps)


def _reason(error: BaseException) -> str:
    """Return what went wrong, without the stack traces of all processes that torch's exception holds."""
    failures = list(getattr(error, 'failures', {}).values())
    return on_one_line(failures[0][0] if failures else error)


def keep_best(folder: Path, state: Dict[str, Any], metrics: List[float], number: int, arch: str) -> None:
    """Keep the checkpoints of the best epochs, as files that timm's avg_checkpoints.py takes.

    Args:
        state: The checkpoint of the last epoch.
        metrics: How good each epoch was; more is better.
        number: How many checkpoints to keep.
    """
    best = sorted(range(len(metrics)), key=lambda epoch: (-metrics[epoch], epoch))[:number]
    names = {KEPT_NAME.format(epoch) for epoch in best}
    epoch = state['epoch']
    if epoch in best:
        kept = {name: value for name, value in state.items() if name in ('epoch', 'state_dict', 'state_dict_ema')}
        with replacing(folder / KEPT_NAME.format(epoch)) as path:
            torch.save(dict(kept, arch=arch, version=2, metric=metrics[epoch]), path)
    for path in folder.glob(KEPT_NAME.format('*')):
        is_ours = re.fullmatch(KEPT_NAME.format(r'\d+'), path.name)  # and no average of some of them
        if is_ours and path.name not in names:
            path.unlink()
