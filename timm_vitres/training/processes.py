"""One process or many: who writes and speaks, what all of them must agree on, which images are whose.

torchrun's environment -> `joined` -> `Processes`; without it a run is one process, and asks nobody. What is agreed on
goes over gloo, between CPUs, wherever the model computes.
"""

import inspect
import itertools
import json
import logging
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, TypeVar

import torch
from torch import distributed as dist
from tqdm import tqdm

_logger = logging.getLogger(__name__)
T = TypeVar('T')
BEGUN = 'timm-vitres/'  # how the keys begin under which torchrun's store has the runs that were begun
_JOINED = itertools.count()  # each group of processes has keys of its own
PATIENCE = timedelta(hours=2)  # until all processes have come to the same place
START = timedelta(days=2)  # the first process may open every one of many million images while the others wait for it


class FirstFailed(ValueError):
    """What went wrong in the first process, which says it; the others end without a word of their own."""

    is_told = True


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: The number of this process; the first, 0, writes and speaks.
        count: How many there are.
        local_rank: The number of this process on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: Optional[Any] = None
    patient_group: Optional[Any] = None  # whose waits may last as long as the start of a run
    store: Optional[Any] = None  # torchrun's, which outlives the processes

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def of_first(self, function: Callable[[], T], is_long: bool = False) -> T:
        """Call a function in the first process, and return its result in all of them.

        Args:
            is_long: Whether it may take longer than a step ever does.

        Raises:
            FirstFailed: in all others where it raised an error in the first.
        """
        if self.count == 1:
            return function()
        told: List[Any] = [None, None]
        try:
            if self.is_first:
                told[0] = function()
        except BaseException as error:
            told[1] = f'{type(error).__name__}: {error}'
            raise
        finally:
            dist.broadcast_object_list(told, src=0, group=self.patient_group if is_long else self.group)
        if told[1] is not None:
            raise FirstFailed(told[1])
        return told[0]

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        if self.count == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return bool(found)

    def mean(self, number: float) -> float:
        """Return the mean of a number over all processes."""
        if self.count == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.item() / self.count

    def gathered(self, value: T) -> List[T]:
        """Return what every process has, by rank."""
        if self.count == 1:
            return [value]
        values: List[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def begin(self, run: str) -> None:
        """Tell the processes that torchrun may start after these which run they began."""
        if self.store is not None:
            self.store.set(BEGUN + run, '')

    def began(self, record: Path) -> bool:
        """Return whether a record is that of the run which processes began that torchrun has started before these."""
        if not record.is_file():
            return False
        if self.store is None:  # what is known then is whether these are the first processes
            return int(os.environ.get('TORCHELASTIC_RESTART_COUNT') or 0) > 0
        with suppress(ValueError, LookupError, TypeError):  # a record that is damaged is named by whoever reads it
            return self.store.check([BEGUN + json.loads(record.read_text(encoding='utf-8'))['id']])
        return False

    def bar(self, batches: Any, what: str) -> Any:
        """Return a progress bar over batches, in the first process; one in a file is written seldom."""
        is_terminal = getattr(sys.stderr, 'isatty', bool)()  # what a program puts in its place may lack it
        seconds = 0.1 if is_terminal else 10.0
        return tqdm(batches, desc=what, leave=False, disable=not self.is_first, mininterval=seconds)

    def device(self, name: str) -> str:
        """Return the device of this process: where a name is one of cuda, each process has its own."""
        name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
        # as timm does: one GPU can not be that of many processes; where each sees one alone, all call it cuda:0
        if self.count > 1 and name.startswith('cuda:') and torch.cuda.device_count() > 1:
            _logger.warning('device: %s is one GPU, but there are %d processes; each takes its own.', name, self.count)
            name = 'cuda'
        if self.count > 1 and name == 'cuda' and self.local_rank >= torch.cuda.device_count():
            raise ValueError(f'device: got cuda, but process {self.local_rank} finds {torch.cuda.device_count()} GPUs.')
        return f'{name}:{self.local_rank}' if self.count > 1 and name == 'cuda' else name


def check_main(what: str) -> None:
    """Raise RuntimeError in a worker that was started anew, and imports the script that it belongs to.

    Args:
        what: The function that the script calls.
    """
    frame = inspect.currentframe()
    while frame is not None:
        # multiprocessing runs the script under this name; what the script's functions do later is theirs
        if frame.f_code.co_name == '<module>' and frame.f_globals.get('__name__') == '__mp_main__':
            raise RuntimeError(
                f'{what}: a worker imports this script and would start it again; write the call below if __name__ == '
                "'__main__':."
            )
        frame = frame.f_back


def _init() -> None:
    backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
    store, rank, count = next(dist.rendezvous('env://'))
    if os.environ.get('LOCAL_WORLD_SIZE') == os.environ['WORLD_SIZE']:
        # torchrun's store outlives a restart on one machine, and gloo would look for the processes that are gone
        store = dist.PrefixStore(f'attempt-{os.environ.get("TORCHELASTIC_RESTART_COUNT")}', store)
    store = dist.PrefixStore(f'group-{next(_JOINED)}', store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)


def _torchruns_store() -> Any:
    """Return the store of torchrun, which outlives the processes that it starts; None where it has no such store."""
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        with suppress(ValueError, RuntimeError):
            return next(dist.rendezvous('env://'))[0]
    return None


def told_number(name: str, default: int) -> int:
    """Return a number that torchrun gives to its processes; ValueError where the environment holds something else."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f'{name}: got {text!r} in the environment, expected the number that torchrun puts there.')
    return int(text)


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun has started, and leave them at the end; alone without torchrun.

    A program that has joined them itself (`torch.distributed.init_process_group`) stays joined.

    Raises:
        ValueError: where torchrun's environment is there, but the others can't be reached.
    """
    is_ours = not (dist.is_available() and dist.is_initialized())
    if is_ours and told_number('WORLD_SIZE', 1) == 1:
        yield Processes(store=_torchruns_store())
        return
    local_rank = told_number('LOCAL_RANK', 0)
    if not is_ours and 'LOCAL_RANK' not in os.environ and torch.cuda.is_initialized():
        local_rank = torch.cuda.current_device()  # a program that was not started by torchrun has chosen it
    try:
        if is_ours:
            if local_rank < torch.cuda.device_count():  # others compute on CPUs
                torch.cuda.set_device(local_rank)
            _init()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'processes: the others can not be reached ({error}); start them all by torchrun.') from error
    processes = Processes(
        rank=dist.get_rank(),
        count=dist.get_world_size(),
        local_rank=local_rank,
        store=_torchruns_store(),
        # ours speaks gloo on CPUs, too
        group=None if is_ours else dist.new_group(backend='gloo', timeout=PATIENCE),
        patient_group=dist.new_group(backend='gloo', timeout=START),
    )
    logger = logging.getLogger(__name__.partition('.')[0])
    level = logger.level
    if not processes.is_first:
        logger.setLevel(logging.ERROR)  # the first process says it
    has_failed = True
    try:
        yield processes
        has_failed = False
    finally:
        logger.setLevel(level)
        # NCCL is left by all processes together: one that failed alone would wait here, and its error never be told
        if is_ours and not (has_failed and torch.cuda.is_available()):
            dist.destroy_process_group()
