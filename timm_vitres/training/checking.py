"""A run's images are opened before it needs them: all before it begins, or, of a big folder, while it trains.

paths -> `unreadable` -> those that can't be read, and why; paths -> `BackgroundCheck` -> the same, in another process.
"""

import logging
import multiprocessing
import os
import signal
from contextlib import suppress
from functools import partial
from typing import Any, Dict, List, Optional, Sequence

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data import open_image
from ..plugins import Format, taught, teach
from ..walking import shown

_logger = logging.getLogger(__name__)
MANY = 20_000  # opening more images than these takes minutes, so they are checked while the run trains
FEW = 1000  # so many images are opened within a second, by this process alone
MOST_WORKERS = 16
REPORTED = 10  # a background check ends at so many bad images, which fit into a pipe that nobody reads


def problem(path: str, mode: str) -> Optional[str]:
    """Return why an image can't be opened in a PIL mode, as the end of a sentence about it; None if it can."""
    try:
        open_image(path, mode)
    except (OSError, ValueError) as error:
        return str(error).removeprefix(f'image: {shown(path)} ').rstrip('.')
    return None


class _Problems(Dataset):
    """The problem, or None, of each image."""

    def __init__(self, paths: Sequence[str], mode: str):
        self.paths, self.mode = paths, mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Optional[str]:
        return problem(self.paths[index], self.mode)


def unreadable(paths: Sequence[str], mode: str, workers: int = 1) -> Dict[str, str]:
    """Open all images, with a bar; return the reason for each that can't be read.

    Args:
        workers: 0 opens them in this process; otherwise many are opened by as many processes as there are cores.
    """
    # Processes open small images several times as fast as threads do, which wait for Python's lock
    workers = min(os.cpu_count() or 1, MOST_WORKERS) if workers and len(paths) > FEW else 0
    begin = partial(teach, taught())
    loader = DataLoader(
        _Problems(paths, mode), batch_size=64, num_workers=workers, collate_fn=list, worker_init_fn=begin
    )
    with tqdm(total=len(paths), desc='checking images', leave=False) as bar:
        bad: Dict[str, str] = {}
        rest = iter(paths)  # a bar that is switched off counts nothing
        for reasons in loader:
            bad.update({path: reason for reason, path in zip(reasons, rest) if reason})
            bar.update(len(reasons))
    return bad


def raise_for(bad: Dict[str, str], advice: str) -> None:
    """Raise ValueError, with an advice, for the first of the images that can't be read, if there is one."""
    if bad:
        path, reason = next(iter(bad.items()))
        more = f' {len(bad) - 1} more cannot be read either.' if len(bad) > 1 else ''
        raise ValueError(f'image: {shown(path)} {reason}.{more} {advice}')


class BackgroundCheck:
    """Images that one process opens in their order, in time that the run's own processes leave, while it trains.

    The process ends with the last image, by `stop`, and with the process that started it, however that ends.

    Args:
        paths: The images; those that the run needs last may come first.
        mode: PIL's mode of the images.
        advice: The end of the error message.
    """

    def __init__(self, paths: Sequence[str], mode: str, advice: str):
        self.paths, self.mode, self.advice = paths, mode, advice
        self.bad: Dict[str, str] = {}
        self.is_done = False
        self.process: Optional[multiprocessing.Process] = None
        self.results: Any = None

    def start(self) -> None:
        """Begin to open the images; nothing happens if the check has begun before."""
        if self.process is not None:
            return
        self.results, sending = multiprocessing.Pipe(duplex=False)
        arguments = (list(self.paths), self.mode, taught(), sending)
        self.process = multiprocessing.Process(target=_open_all, args=arguments, name='checking images', daemon=True)
        self.process.start()
        sending.close()

    def raise_if_bad(self) -> None:
        """Raise ValueError if an image was found that can't be read; the message names it. This waits for nothing."""
        try:
            while self.results is not None and not self.is_done and self.results.poll():
                found = self.results.recv()
                self.is_done = found is None
                self.bad.update(found or {})
        except (EOFError, OSError):  # the process was killed
            self.is_done = True
            _logger.warning('the check of images ended early; an image that cannot be read ends the run when it comes.')
        raise_for(self.bad, self.advice)

    def wait(self, seconds: Optional[float] = None) -> None:
        """Wait until all images are opened, at most for so many seconds."""
        if self.process is not None:
            self.process.join(seconds)

    def stop(self) -> None:
        """End the check, finished or not; a check that has not begun is none."""
        if self.process is not None and self.process.is_alive():
            self.process.terminate()
            self.process.join()
            self.is_done = True  # nothing more comes

    def __enter__(self) -> 'BackgroundCheck':
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def _open_all(paths: List[str], mode: str, formats: Dict[str, Format], sending: Any) -> None:
    """Open the images in a process of its own; send {path: reason} of each bad one, and None at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run answers Ctrl-C, and then ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process has the handlers of the run
    teach(formats)
    if hasattr(os, 'nice'):
        os.nice(19)
    with suppress(OSError, AttributeError):  # Linux has this, and a sandbox may forbid it
        # niceness alone slowed training on two busy cores by a quarter, and this by a fourteenth
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    parent = multiprocessing.parent_process()
    bad = 0
    for path in paths:
        # the run was killed: nobody ends this process, or reads its results
        if parent is not None and not parent.is_alive():
            return
        reason = problem(path, mode)
        if reason:
            sending.send({path: reason})
            bad += 1
        if bad == REPORTED:
            break
    sending.send(None)
