"""A model's folder is written by one process at a time, and its model is replaced whole or not at all.

weights, config.json, card -> `replace_model`: a hidden folder inside, complete and on the disk -> named by the weights'
sha256 -> its files renamed into place, one after the other. A kill anywhere leaves the old model or the new one.
"""

import json
import logging
import os
import re
import secrets
import shutil
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Tuple

import torch

from ..weights.checksums import SHA256_FIELD, remember, sha256, told_sha256
from ..weights.files import CARD_HEAD, CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, write_safetensors
from ..writing import TEMPORARY, replace, sync

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None
_logger = logging.getLogger(__name__)
_READY = re.compile(re.escape(TEMPORARY) + '[0-9a-f]{64}')
_OWN = re.compile(re.escape(TEMPORARY) + '([0-9a-f]{16}|[0-9a-f]{64})')
# this process holds these folders: (device, inode) -> (the thread that holds it, the locked descriptor)
_held: Dict[Tuple[int, int], Tuple[int, int]] = {}


def _close_in_child() -> None:
    """Close the locks' descriptors in a forked process; else a folder would stay locked until that process ends."""
    for _, descriptor in _held.values():
        if descriptor >= 0:
            os.close(descriptor)
    _held.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder exclusively, make it if it is missing, and finish or clear what a killed writer left in it.

    The lock is the operating system's, so it ends with the process; a thread that holds it may take it again.

    Raises:
        OSError: at once, where another process or thread holds the folder, or it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f'{folder}: is no folder, and can not be made one ({error.strerror}).') from error
    status = folder.stat()
    key = (status.st_dev, status.st_ino)
    if _held.get(key, (None,))[0] == threading.get_ident():
        yield
        return
    descriptor = _lock(folder)
    _held[key] = (threading.get_ident(), descriptor)
    try:
        _recover(folder)
        yield
    finally:
        _held.pop(key, None)
        if descriptor >= 0:
            os.close(descriptor)


def _lock(folder: Path) -> int:
    """Lock a folder and return its descriptor, or -1 if the system, or the file system, has no such locks."""
    if fcntl is None:  # Windows; the documents say so
        return -1
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(f'{folder}: is being written by another process; wait for it, or name another folder.') from None
    except OSError as error:  # some network file systems have no locks
        os.close(descriptor)
        _logger.warning('%s: can not be locked (%s); let one process at a time write to it.', folder, error)
        return -1
    return descriptor


def _recover(folder: Path) -> None:
    """Finish what a killed writer began to put in place, and remove what else it left. The caller holds the lock."""
    for path in folder.glob(f'{TEMPORARY}*'):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            continue
        if not _OWN.fullmatch(path.name):  # an export's, which needs no lock
            continue
        if _READY.fullmatch(path.name) and _is_wanted(path, folder):
            _move(path, folder, config_first=False)  # where there is no config yet, nothing loads before it
        else:
            doomed = folder / f'{TEMPORARY}{secrets.token_hex(8)}'
            replace(path, doomed)  # half removed under its old name, it would be half put in place the next time
            shutil.rmtree(doomed)


def _is_wanted(ready: Path, folder: Path) -> bool:
    """Return whether what a killed writer left belongs to what the folder holds now, which may be put there since."""
    digest = ready.name.removeprefix(TEMPORARY)
    if not (ready / CONFIG_NAME).exists():
        with suppress(OSError):  # a config.json that tells no sha256
            return told_sha256(folder) == digest
        return False
    if not (ready / WEIGHTS_NAME).exists():
        return (folder / WEIGHTS_NAME).is_file() and sha256(folder / WEIGHTS_NAME) == digest
    return not (folder / CONFIG_NAME).exists()  # where there is none yet, nothing loads before it


def _move(ready: Path, folder: Path, config_first: bool) -> None:
    names = (CONFIG_NAME, WEIGHTS_NAME) if config_first else (WEIGHTS_NAME, CONFIG_NAME)
    for name in (*names, CARD_NAME):
        if (ready / name).exists():
            replace(ready / name, folder / name)
    ready.rmdir()


def replace_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Dict[str, Any],
    card: Callable[[str], Optional[bytes]],
    finds_pending: bool,
) -> None:
    """Replace the model in a folder. The caller holds the lock.

    For a model of this package config.json is renamed first: it tells the sha256, by which the loader finds the new
    weights before they are in place. timm's own loader reads `model.safetensors` alone: if the config changes by more
    than the sha256, the old config.json is removed first, so that a kill in between leaves a folder that can't be
    loaded, and not a mixed one; the next writer completes it.

    Args:
        folder: The model's folder; all other files in it stay.
        config: Content of config.json; the sha256 of the weights is added here.
        card: Returns the content of README.md for the sha256 of the weights, or None where the old card stays as it is;
            a sha256 in its head is updated here.
        finds_pending: Whether the model's loader looks for weights with the sha256 that config.json tells.

    Raises:
        OSError: where writing fails; the old model stays.
    """
    _recover(folder)  # a replacement may have failed in this process, which has held the lock since then
    stage = folder / f'{TEMPORARY}{secrets.token_hex(8)}'
    try:
        for name in (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME):
            if (folder / name).is_dir():
                raise OSError(f'{name} is a folder')
        stage.mkdir()
        digest = write_safetensors(tensors, stage / WEIGHTS_NAME)
        text = json.dumps(_told(config, digest), indent=2, allow_nan=False) + '\n'
        (stage / CONFIG_NAME).write_text(text, encoding='utf-8')
        readme = card(digest)
        if readme is not None:
            (stage / CARD_NAME).write_bytes(with_sha256(readme, digest))
        for path in stage.iterdir():
            sync(path)
        ready = folder / f'{TEMPORARY}{digest}'
        replace(stage, ready)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError if memory runs out
        shutil.rmtree(stage, ignore_errors=True)
        message = f'{folder / WEIGHTS_NAME} could not be written ({error}); the model that is there, if any, stays.'
        raise OSError(message) from error
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    try:
        if not finds_pending and _config(folder) not in (None, _untold(config)):
            (folder / CONFIG_NAME).unlink()
        _move(ready, folder, config_first=finds_pending)
    except OSError as error:
        raise OSError(f'{folder}: the new model could not take its place ({error}); save it again.') from error
    remember(folder / WEIGHTS_NAME, digest)


def _told(config: Dict[str, Any], digest: str) -> Dict[str, Any]:
    """Return a config with the weights' sha256 at its top and in the pretrained cfg, which timm hands to a loader."""
    config = _untold(config)
    cfg = config['pretrained_cfg']
    return {
        **config,
        'pretrained_cfg': {**cfg, 'notes': [*cfg.get('notes', ()), f'{SHA256_FIELD}: {digest}']},
        SHA256_FIELD: digest,
    }


def _untold(config: Dict[str, Any]) -> Dict[str, Any]:
    cfg = dict(config.get('pretrained_cfg') or {})
    notes = [note for note in cfg.pop('notes', None) or () if not str(note).startswith(f'{SHA256_FIELD}: ')]
    config = {**config, 'pretrained_cfg': {**cfg, 'notes': notes} if notes else cfg}
    config.pop(SHA256_FIELD, None)
    return config


def _config(folder: Path) -> Optional[Dict[str, Any]]:
    """Return the content of a folder's config.json without the sha256, or None if it can't be read."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return _untold(config) if isinstance(config, dict) else None


def with_sha256(card: bytes, digest: str) -> bytes:
    """Return a card with this sha256 in its head, if the head tells one of the weights; nothing else is changed."""
    text = card.decode('utf-8', 'surrogateescape')  # whatever else it holds
    found = CARD_HEAD.match(text)
    if not found:
        return card
    head = re.sub(rf'(?m)^{SHA256_FIELD}:[^\r\n]*', f'{SHA256_FIELD}: {digest}', found.group(1))
    return (text[: found.start(1)] + head + text[found.end(1) :]).encode('utf-8', 'surrogateescape')
