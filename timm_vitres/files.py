"""Files that can be trusted: written beside and renamed, downloaded with retries, checked against their sha256.

Hub id, URL or folder -> `hub_file`, `url_file`, `weights_file` -> path -> `check_once` -> a file as it was published.
"""

import hashlib
import json
import os
import re
import secrets
import stat
import struct
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, TypeVar, Union
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

import safetensors
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

WEIGHTS_NAME = 'model.safetensors'
CONFIG_NAME = 'config.json'
CARD_NAME = 'README.md'
# a folder's weights, in timm's order of preference
WEIGHTS_NAMES = (WEIGHTS_NAME, 'pytorch_model.bin', 'pytorch_model.pth', 'model.pth')
WEIGHTS_SUFFIXES = ('.safetensors', '.pth', '.pth.tar', '.bin', '.npz')
ALIGNMENT = 64  # bytes
_DTYPES = {
    **{torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16', torch.float64: 'F64'},
    **{torch.int64: 'I64', torch.int32: 'I32', torch.int16: 'I16', torch.int8: 'I8', torch.uint8: 'U8'},
    torch.bool: 'BOOL',
}
PATIENCE = 10.0  # seconds
SHA256_FIELD = 'model_sha256'  # of config.json, which every load is compared with, and of a card's head
TEMPORARY = '.timm-vitres-'  # how all begins that is written beside something, to replace it

Result = TypeVar('Result')


def check_output(name: str, path: Union[str, Path]) -> Path:
    """Return a path where a file can be written, before long work is done for it.

    Args:
        name: The argument that says the path.

    Raises:
        ValueError: for an empty path.
        OSError: where a folder or a device is, or no file can be made.
    """
    if not isinstance(path, (str, Path)) or not Path(path).name or '\0' in str(path):
        raise ValueError(f'{name}: got {str(path)!r}, expected the path of a file.')
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{name}: {path} is a folder, expected the path of a file.')
    if path.exists() and not path.is_file():
        raise OSError(f'{name}: {path} is no ordinary file, and is not written over.')
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise OSError(f'{name}: {path} can not be written, since {above} is no folder.')
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise OSError(f'{name}: {path} can not be written ({error.strerror} in {above}).') from error
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, which replaces it when the block ends, and only then.

    A file that is mapped into memory, as a loaded model's weights are, can be replaced so: the model keeps the old one.

    Raises:
        OSError: where writing fails (a full disk); what was at `path` stays as it was.
    """
    with _sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f'{TEMPORARY}{secrets.token_hex(8)}-{path.name}')
        try:
            mode = _create(beside)
            yield beside
            beside.chmod(mode)  # safetensors makes files that no one else may read
            sync(beside)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def _create(path: Path) -> int:
    """Make a new file, never through a link that somebody planted, and return the mode that the umask gives it."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


@contextmanager
def _sentence(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is written, torch's and safetensors' own errors too, into one OSError."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(f'{path} could not be written ({error}); its last version, if any, is untouched.') from error


def sync(path: Path) -> None:
    """Wait until a file is on the disk, so that a power cut after its renaming finds all of it."""
    with path.open('rb+') as file:
        os.fsync(file.fileno())


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Write a safetensors file whose tensors begin at multiples of 64 bytes, as torch's own do in memory.

    A matrix product may round differently where its operands do not, so this is what makes a model whose weights are
    mapped from the file compute, bit for bit, what the saved one computed. The format does not allow gaps, so tensors
    whose size is no multiple of 64 bytes come last; whoever maps the file copies those.

    Returns:
        The sha256 of what was written.

    Raises:
        ValueError: for a tensor that safetensors can not hold.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, name))
    header: Dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f'{name}: has dtype {tensor.dtype}, expected one of {", ".join(map(str, _DTYPES))}.')
        start, end = end, end + tensor.nbytes
        header[name] = {'dtype': _DTYPES[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': [start, end]}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-(8 + len(text)) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open('wb') as file:

        def write(part: Any) -> None:
            file.write(part)
            digest.update(part)

        write(struct.pack('<Q', len(text)) + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            write(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def is_transient(error: BaseException) -> bool:
    """Return whether trying again may help: a server's 5xx or 429, or a connection that broke."""
    if isinstance(error, LocalEntryNotFoundError):  # the client has tried long enough
        return False
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, 'status_code', None)
        return status is None or status == 429 or status >= 500
    if isinstance(error, HTTPError):
        return error.code == 429 or error.code >= 500
    if isinstance(error, URLError):
        return isinstance(error.reason, (ConnectionError, TimeoutError))
    # the errors of what huggingface_hub speaks through (httpx2, httpx, requests) are no ConnectionError
    libraries = ('httpx', 'httpcore', 'requests', 'urllib3')
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(libraries)


def retrying(function: Callable[[], Result], tries: int = 4, wait: float = 1.0) -> Result:
    """Call a function that speaks to the Hub, and again after `wait`, 2 * `wait`, ... seconds while that may help.

    Some calls the client repeats by itself, which takes it longer than `PATIENCE`; those are not repeated here.
    """
    for attempt in range(tries - 1):
        start = time.monotonic()
        try:
            return function()
        except Exception as error:
            if not is_transient(error) or time.monotonic() - start > PATIENCE:
                raise
            time.sleep(wait * 2**attempt)
    return function()


def hub_file(
    model_id: str,
    filenames: Sequence[str] = WEIGHTS_NAMES,
    cache_dir: Union[None, str, Path] = None,
) -> Path:
    """Return the first of `filenames` that a Hub repository has, downloaded into the cache.

    Args:
        model_id: 'owner/name' or 'owner/name@revision'.

    Raises:
        FileNotFoundError: where the repository has none of them, or the Hub can't be reached and the cache is empty.
        ConnectionError: where the connection breaks again and again.
        huggingface_hub.errors.HfHubHTTPError: where the Hub refuses (no such repository, no right to read it).
    """
    repo_id, _, revision = model_id.partition('@')
    options: Dict[str, Any] = dict(revision=revision or None, cache_dir=cache_dir, library_name='timm-vitres')
    unreachable: Optional[LocalEntryNotFoundError] = None
    for filename in filenames:
        try:
            return Path(retrying(lambda: hf_hub_download(repo_id, filename, **options)))  # noqa: B023
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error
            options['local_files_only'] = True  # nobody is asked, and waited for, again
        except EntryNotFoundError:
            pass
        except Exception as error:
            if isinstance(error, OSError) or not is_transient(error):
                raise
            raise ConnectionError(f'{model_id}: the Hub does not answer as it should ({error}); try again.') from error
    names = ' or '.join(filenames)
    if unreachable is not None:
        raise FileNotFoundError(
            f'{model_id}: {names} is not in the cache, and the Hub can not be reached ({unreachable}).'
        ) from unreachable
    raise FileNotFoundError(f'{model_id}: the repository has no {names}.')


def url_file(url: str, cache_dir: Union[None, str, Path] = None) -> Path:
    """Return a file that a URL names, downloaded into torch's cache of checkpoints (or `cache_dir`).

    Raises:
        OSError: where it can't be downloaded, or a name like 'resnet18-5c106cde.pth' holds the beginning of another
            sha256 than the file's.
    """
    folder = Path(cache_dir or Path(torch.hub.get_dir()) / 'checkpoints')
    path = folder / Path(urlparse(url).path).name
    published = hash_in_name(path.name)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            retrying(lambda: torch.hub.download_url_to_file(url, str(path), published))
        except RuntimeError as error:  # its hash, before it is in the cache
            raise OSError(f'{url}: what arrived is not what the name says ({error}); try again.') from error
        except OSError as error:
            raise OSError(
                f'{url}: could not be downloaded ({error}). Once it is here by other means, '
                f"pretrained_cfg_overlay=dict(file='...') takes it."
            ) from error
    if published:
        check_once(path, published)
    return path


def hash_in_name(name: str) -> Optional[str]:
    """Return the beginning of a sha256 in a published file's name ('resnet18-5c106cde.pth'), if one is there."""
    found = re.search(r'-(?=\d*[a-f])([0-9a-f]{8,64})\.', name)  # with a letter: a date is no hash
    return found.group(1) if found else None


def weights_file(path: Union[str, Path]) -> Path:
    """Return a file itself, or the weights in a folder, whatever they are called.

    Raises:
        FileNotFoundError: where there are none.
        ValueError: where there are several of one kind and none has a usual name.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f'{path}: there is no such file or folder.')
    if pending := pending_weights(path):
        return pending
    for name in WEIGHTS_NAMES:
        if (path / name).is_file():
            return path / name
    for suffix in WEIGHTS_SUFFIXES:
        found = sorted(path.glob(f'[!.]*{suffix}'))
        if len(found) > 1:
            raise ValueError(f'{path}: holds {", ".join(file.name for file in found)}; name the one that you mean.')
        if found:
            return found[0]
    raise FileNotFoundError(f'{path}: holds no weights ({", ".join(WEIGHTS_NAMES)}).')


def pending_weights(folder: Path) -> Optional[Path]:
    """Return the weights that config.json tells of, where their writer was killed before he put them in their place."""
    told = told_sha256(folder)
    pending = folder / f'{TEMPORARY}{told}' / WEIGHTS_NAME
    return pending if told and pending.is_file() else None


def sha256(path: Path) -> str:
    """Return a file's sha256, which is what the Hub calls a large file."""
    return _digest(path, hashlib.sha256())


def git_sha1(path: Path) -> str:
    """Return the name that git, and so the Hub, gives to a small file."""
    return _digest(path, hashlib.sha1(f'blob {path.stat().st_size}\0'.encode()))


def _digest(path: Path, digest: Any) -> str:
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def told_sha256(folder: Path) -> Optional[str]:
    """Return what the sha256 of a folder's weights must be, as its config.json says, or else its card; None: nobody.

    Raises:
        OSError: where config.json says something that is none.
    """
    config: Any = None
    with suppress(OSError, ValueError):
        if (folder / CONFIG_NAME).is_file():  # opening a pipe would wait for a writer
            config = json.loads((folder / CONFIG_NAME).read_text(encoding='utf-8'))
    if isinstance(config, dict) and SHA256_FIELD in config:
        told = config[SHA256_FIELD]
        if not isinstance(told, str) or not re.fullmatch('[0-9a-f]{64}', told):
            raise OSError(f'{folder / CONFIG_NAME} is damaged: its {SHA256_FIELD} is {told!r:.80}, no sha256.')
        return told
    with suppress(OSError):
        head = (folder / CARD_NAME).read_text(encoding='utf-8', errors='replace').partition('\n---\n')[0]
        found = re.search(rf'^{SHA256_FIELD}: *[\'"]?([0-9a-f]{{64}})\b', head, re.MULTILINE)
        if found:
            return found.group(1)
    return None


def check_noted(notes: Optional[Sequence[str]], folder: Path) -> None:
    """Raise OSError where a config.json that was read before tells of other weights than the folder has by now."""
    told = told_sha256(folder)
    noted = [note.removeprefix(f'{SHA256_FIELD}: ') for note in notes or () if note.startswith(f'{SHA256_FIELD}: ')]
    if noted and told and noted[-1] != told:
        raise OSError(f'{folder}: its model was replaced while it was being read; load it again.')


def published_sha256(path: Path) -> Optional[str]:
    """Return what a file's sha256 must be, where something beside the file says it, else None.

    In the Hub's cache a large file is called by it; a folder's config.json, or its card, tells that of
    `model.safetensors`.
    """
    blob = Path(os.path.realpath(path))
    if blob.parent.name == 'blobs' and re.fullmatch(r'[0-9a-f]{64}', blob.name):
        return blob.name
    if path.name != WEIGHTS_NAME:
        return None
    if re.fullmatch(rf'{re.escape(TEMPORARY)}[0-9a-f]{{64}}', path.parent.name):  # the folder is called by it
        return path.parent.name.removeprefix(TEMPORARY)
    return told_sha256(path.parent)


def check(path: Path, published: Optional[str] = None) -> str:
    """Return a file's sha256.

    Args:
        published: What it must be, or begin with; by default `published_sha256`.

    Raises:
        OSError: where it is not the published one.
    """
    actual, published = sha256(path), published or published_sha256(path)
    if published and not actual.startswith(published):
        remedy = 'Remove it and load again'
        if Path(os.path.realpath(path)).parent.name == 'blobs':  # removing the link to it would not be enough
            path = Path(os.path.realpath(path))
        elif path.name == WEIGHTS_NAME:
            remedy = f'Restore it, or, if you changed it on purpose, take {SHA256_FIELD} out of {CONFIG_NAME}'
            remedy += f' and {CARD_NAME} beside it' if (path.parent / CARD_NAME).is_file() else ' beside it'
        raise OSError(
            f'{path} is damaged, or was changed after it was published: its sha256 is {actual}, not {published}. '
            f'{remedy}.'
        )
    return actual


def check_once(path: Path, published: Optional[str] = None) -> None:
    """`check` a file if something says what it must be, and remember that it was, until it changes.

    Raises:
        OSError: where its sha256 is not the published one.
    """
    published = published or published_sha256(path)
    if published is not None and _checked().get(os.path.realpath(path)) != _state(path, published):
        check(path, published)
        remember(path, published)


def remember(path: Path, published: str) -> None:
    """Remember that a file has the sha256 that it must have."""
    memory = {known: state for known, state in _checked().items() if os.path.exists(known)}
    memory[os.path.realpath(path)] = _state(path, published)
    with suppress(OSError), replacing(_memory()) as beside:  # a home that can't be written to: checked again next time
        beside.write_text(json.dumps(memory, indent=1))


def _state(path: Path, published: str) -> List[Any]:
    status = os.stat(path)
    return [published, status.st_size, status.st_mtime_ns, status.st_ino]


def _memory() -> Path:
    return Path(constants.HF_HOME) / 'timm-vitres' / 'checked.json'


def _checked() -> Dict[str, Any]:
    try:
        memory = json.loads(_memory().read_text())
    except (OSError, ValueError):  # none yet, or not ours
        return {}
    return memory if isinstance(memory, dict) else {}
