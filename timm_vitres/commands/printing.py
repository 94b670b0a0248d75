"""What the command prints beside its results: errors as one sentence, and what the library logs."""

import logging
import os
import sys
import traceback
from contextlib import contextmanager
from typing import Iterator

from ..arguments import one_line
from ..labels import printable


def own_rank() -> int:
    """Return which of torchrun's processes this is; 0 where there is but one, whatever the environment says."""
    rank, count = (os.environ.get(name, '') for name in ('RANK', 'WORLD_SIZE'))
    return int(rank) if rank.isdecimal() and count not in ('', '1') else 0


def say(error: BaseException) -> None:
    """Print a mistake as one sentence to stderr; of many processes, with the number of the one that says it."""
    traceback.clear_frames(error.__traceback__)  # this closes the progress bars in them, so that the line is ours
    rank = own_rank()
    name = f'timm-vitres (process {rank})' if rank else 'timm-vitres'
    print(f'{name}: {one_line(error)}', file=sys.stderr)


class _Printer(logging.Handler):
    """Prints what the library logs: its course to stdout, its warnings to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; what goes wrong is for `main`, as with every other print."""
        text = '\n'.join(map(printable, record.getMessage().split('\n')))  # names may move a cursor
        print(text, file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout, flush=True)


@contextmanager
def printed_logs() -> Iterator[None]:
    """Print what the library logs while the block runs."""
    logger, printer = logging.getLogger(str(__package__).partition('.')[0]), _Printer()
    level = logger.level
    logger.addHandler(printer)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(printer)
        logger.setLevel(level)
