"""Output paths are checked before long work, and files appear there only when they are complete.

path -> `check_output` -> `replacing` -> a temporary file beside it -> `sync` -> renamed to the path.
"""

import os
import secrets
import stat
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Union

import safetensors

TEMPORARY = '.timm-vitres-'  # the names of temporary files and folders begin with this
# seconds between attempts to rename what another program has open, which Windows alone refuses
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2) if os.name == 'nt' else ()


def check_output(name: str, path: Union[str, Path]) -> Path:
    """Return a path where a file can be written, before long work is done for it.

    Args:
        name: The argument that gave the path.

    Raises:
        ValueError: for an empty path.
        OSError: where the path is a folder or a device, or no file can be made.
    """
    if not isinstance(path, (str, Path)) or not Path(path).name or '\0' in str(path):
        raise ValueError(f'{name}: got {str(path)!r}, expected the path of a file.')
    path = Path(path)
    check_home(name, path)
    if path.is_dir():
        raise IsADirectoryError(f'{name}: {path} is a folder, expected the path of a file.')
    if path.exists() and not path.is_file():
        raise OSError(f'{name}: {path} is no ordinary file, and is not written over.')
    above = next((folder for folder in path.absolute().parents if os.path.lexists(folder)), None)
    if above is None:  # a drive of Windows that is not there
        raise OSError(f'{name}: {path} can not be written, since there is no {path.absolute().anchor}.')
    if not above.is_dir():
        raise OSError(f'{name}: {path} can not be written, since {above} is no folder.')
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise OSError(f'{name}: {path} can not be written ({error.strerror} in {above}).') from error
    return path


def check_home(name: str, path: Path) -> None:
    """Raise ValueError for a path from '~': no shell has put the home folder there, and a folder '~' is a trap."""
    if path.parts and path.parts[0].startswith('~'):
        raise ValueError(f"{name}: got {path}, which begins with '~'; give {Path.cwd() / path} if that is meant.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, which replaces it when the block ends, and only then.

    Even a file that is mapped into memory, such as a loaded model's weights, is safe: the model keeps the old file.

    Raises:
        OSError: where writing fails (a full disk); what was at `path` stays as it was.
    """
    with _sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # without the name, which may be as long as names can be; writers go by the suffix
        beside = path.with_name(f'{TEMPORARY}{secrets.token_hex(8)}-new{path.suffix}')
        try:
            mode = _create(beside)
            yield beside
            if stat.S_IMODE(beside.stat().st_mode) != mode:  # safetensors makes files that only their owner may read
                with suppress(OSError):  # a mounted folder may have one owner and one mode for all
                    beside.chmod(mode)
            sync(beside)
            replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def replace(source: Path, target: Path) -> None:
    """Rename a file, or a folder, in the place of another; on Windows it is tried for some seconds."""
    for pause in PAUSES:
        try:
            os.replace(source, target)
            return
        except PermissionError:  # some program looks at it: a virus scanner, an indexer
            time.sleep(pause)
    os.replace(source, target)


def _create(path: Path) -> int:
    """Make a new file, never through a link that somebody planted, and return the mode that the umask gives it."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


@contextmanager
def _sentence(path: Path) -> Iterator[None]:
    """Turn all errors of writing a file, those of torch and safetensors included, into one OSError."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(f'{path} could not be written ({error}); its last version, if any, is untouched.') from error


def sync(path: Path) -> None:
    """Wait until a file is on the disk, so that a power cut after its renaming finds all of it."""
    with path.open('rb+') as file:
        os.fsync(file.fileno())
