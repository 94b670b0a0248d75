"""A folder that one process writes at a time."""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is missing, alone, and clear what a killed writer left in it.

    Raises:
        OSError: at once, where another process holds the folder, or it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f'{folder}: is no folder, and can not be made one ({error.strerror}).') from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.glob('.*.tmp'):
            path.unlink()
        yield
    except BlockingIOError:
        raise OSError(f'{folder}: is being written by another process; wait for it, or name another folder.') from None
    finally:
        os.close(descriptor)
