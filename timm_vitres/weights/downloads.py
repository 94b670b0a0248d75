"""Downloads from the Hub and from URLs, with retries.

Hub id -> `hub_file` -> a path in the Hub's cache; URL -> `url_file` -> a path in torch's cache, its hash checked.
"""

import hashlib
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, TypeVar, Union
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from ..writing import TEMPORARY, replace
from .checksums import check_once, hash_in_name
from .files import WEIGHTS_NAMES, is_whole

PATIENCE = 10.0  # seconds; a call that took longer is not repeated
Result = TypeVar('Result')


class NotInRepository(FileNotFoundError):
    """A Hub repository was asked, and has no such file."""


def is_transient(error: BaseException) -> bool:
    """Return whether trying again may help: a server's 5xx or 429, or a connection that broke."""
    # the client has tried long enough, or may not
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return False
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, 'status_code', None)
        return status is None or status == 429 or status >= 500
    if isinstance(error, HTTPError):
        return error.code == 429 or error.code >= 500
    if isinstance(error, URLError):
        return isinstance(error.reason, (ConnectionError, TimeoutError))
    # huggingface_hub's HTTP libraries (httpx2, httpx, requests) raise errors of their own, no ConnectionError
    libraries = ('httpx', 'httpcore', 'requests', 'urllib3')
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(libraries)


def retrying(function: Callable[[], Result], tries: int = 4, wait: float = 1.0) -> Result:
    """Call a function that speaks to the Hub; repeat it after `wait`, 2 * `wait`, ... seconds while that may help.

    The client repeats some calls by itself, which takes longer than `PATIENCE`; those are not repeated here.
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
    token: Optional[str] = None,
) -> Path:
    """Return the first of `filenames` that a Hub repository has, downloaded into the cache.

    Args:
        model_id: 'owner/name' or 'owner/name@revision'.
        token: By default that of whoever is logged in.

    Raises:
        FileNotFoundError: where the repository has none of them (`NotInRepository`), or the Hub can't be reached and
            the cache is empty.
        ConnectionError: where the connection breaks again and again.
        huggingface_hub.errors.HfHubHTTPError: where the Hub refuses (no such repository, no right to read it).
    """
    repo_id, _, revision = model_id.partition('@')
    options: Dict[str, Any] = dict(revision=revision or None, cache_dir=cache_dir, library_name='timm-vitres')
    options.update(dict(token=token) if token else {})
    unreachable: Optional[LocalEntryNotFoundError] = None
    for filename in filenames:
        try:
            return Path(retrying(lambda: hf_hub_download(repo_id, filename, **options)))  # noqa: B023
        except LocalEntryNotFoundError as error:
            if hub_cached(model_id, filename, cache_dir) is not _CACHED_NO_EXIST:  # when the Hub was asked, it had none
                unreachable = unreachable or error
            options['local_files_only'] = True  # the Hub is not asked, and waited for, again
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
    raise NotInRepository(f'{model_id}: the repository has no {names}.')


def hub_commit(model_id: str, filename: str, cache_dir: Union[None, str, Path] = None) -> Optional[str]:
    """Return the commit of which the cache has a repository's file; None where it has none. The Hub is not asked."""
    found = hub_cached(model_id, filename, cache_dir)
    return Path(found).parent.name if isinstance(found, str) else None


def hub_cached(model_id: str, filename: str, cache_dir: Union[None, str, Path] = None) -> Any:
    """Return where the cache has a file, `_CACHED_NO_EXIST` where its commit is known to have none, else None."""
    repo_id, _, revision = str(model_id).partition('@')
    with suppress(HFValidationError):
        return try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision or None)
    return None


def at_commit(model_id: str, commit: Optional[str]) -> str:
    """Return a repository's name with a commit in place of its revision; None leaves it as it is."""
    return f'{model_id.partition("@")[0]}@{commit}' if commit else model_id


def _download(url: str, path: Path, published: Optional[str]) -> None:
    torch.hub.download_url_to_file(url, str(path), published)
    if not is_whole(path):  # a connection may end without an error
        raise ConnectionError('it ended too early')


def without_secrets(url: str) -> str:
    """Return an address as it may be told: without user, password and query."""
    parts = urlparse(url)
    return parts._replace(netloc=parts.netloc.rpartition('@')[2], params='', query='', fragment='').geturl()


def url_file(url: str, cache_dir: Union[None, str, Path] = None) -> Path:
    """Return a file that a URL names, downloaded into torch's cache of checkpoints (or `cache_dir`).

    A file whose name holds a hash lies where torch.hub puts it. Others may have one name and differ: each address has
    a folder of its own.

    Raises:
        OSError: where it can't be downloaded, or a name like 'resnet18-5c106cde.pth' holds the beginning of another
            sha256 than the file's.
    """
    folder = Path(cache_dir or Path(torch.hub.get_dir()) / 'checkpoints')
    name = Path(urlparse(url).path).name
    published = hash_in_name(name)
    path = folder / name if published else folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f'{TEMPORARY}{secrets.token_hex(8)}-{name}')
        try:
            retrying(lambda: _download(url, part, published))
            replace(part, path)
        except RuntimeError as error:  # torch compares the hash before the file is in the cache
            raise OSError(
                f'{without_secrets(url)}: what arrived is not what the name says ({error}). Try again; if it is no '
                "sha256 that the name has, load it by other means: pretrained_cfg_overlay=dict(file='...') takes it."
            ) from error
        except OSError as error:
            raise OSError(
                f'{without_secrets(url)}: could not be downloaded ({error}). Once it is here by other means, '
                f"pretrained_cfg_overlay=dict(file='...') takes it."
            ) from error
        finally:
            part.unlink(missing_ok=True)
            if not published:
                with suppress(OSError):  # it is not empty
                    path.parent.rmdir()
    if published:
        check_once(path, published)
    return path
