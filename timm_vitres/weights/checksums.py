"""Checksums of weight files: they are computed, compared with the published ones, and remembered.

path -> `published_sha256` (the Hub's cache, config.json, card, package) -> `check_once` -> a file as it was published.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from huggingface_hub import constants

from ..writing import TEMPORARY, replacing
from .files import CARD_HEAD, CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from .shipped import REINSTALL, is_shipped, shipped_sha256

# transformers copies fields that it does not know from the config.json that it began with, and adds this one
COPIED_BY = 'transformers_version'
SHA256_FIELD = 'model_sha256'  # the field of config.json, or of a card's head, that a load is compared with


def hash_in_name(name: str) -> Optional[str]:
    """Return the beginning of a sha256 in a published file's name ('resnet18-5c106cde.pth'), if one is there."""
    # a hash has a letter, a date has none; and it is not the end of a UUID
    found = re.search(r'(?<![0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4})-(?=\d*[a-f])([0-9a-f]{8,64})\.', name)
    return found.group(1) if found else None


def sha256(path: Path) -> str:
    """Return a file's sha256, by which the Hub names large files."""
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
    """Return the sha256 that a folder's config.json tells of the weights, or its card where there is none; or None.

    Raises:
        OSError: where config.json tells something that is no sha256.
    """
    config: Any = None
    with suppress(OSError, ValueError):
        if (folder / CONFIG_NAME).is_file():  # opening a pipe would wait for a writer
            config = json.loads((folder / CONFIG_NAME).read_text(encoding='utf-8'))
    if isinstance(config, dict) and COPIED_BY in config:
        return None
    if isinstance(config, dict) and SHA256_FIELD in config:
        told = config[SHA256_FIELD]
        if not isinstance(told, str) or not re.fullmatch('[0-9a-f]{64}', told):
            raise OSError(f'{folder / CONFIG_NAME} is damaged: its {SHA256_FIELD} is {told!r:.80}, no sha256.')
        return told
    if isinstance(config, dict):  # another program wrote it, and a card may be of the model before
        return None
    with suppress(OSError):
        head = CARD_HEAD.match((folder / CARD_NAME).read_text(encoding='utf-8', errors='replace'))
        found = head and re.search(rf'^{SHA256_FIELD}: *[\'"]?([0-9a-f]{{64}})\b', head.group(1), re.MULTILINE)
        if found:
            return found.group(1)
    return None


def is_of_this_package(config: str) -> bool:
    """Return whether the text of a config.json is one that `save` wrote, and nobody else after it."""
    return SHA256_FIELD in config and COPIED_BY not in config


def check_noted(notes: Optional[Sequence[str]], folder: Path) -> None:
    """Raise OSError if a folder's model was replaced after the config.json with these notes was read."""
    told = told_sha256(folder)
    noted = [note.removeprefix(f'{SHA256_FIELD}: ') for note in notes or () if note.startswith(f'{SHA256_FIELD}: ')]
    if noted and told and noted[-1] != told:
        raise OSError(f'{folder}: its model was replaced while it was being read; load it again.')


def published_sha256(path: Path) -> Optional[str]:
    """Return the sha256 that a file must have, if something beside the file tells it, else None.

    The Hub's cache names a large file by its sha256; a folder's config.json, or its card, tells that of
    `model.safetensors`; the package tells those of the weights that it holds.

    Raises:
        OSError: where a part of the package is missing, and where a repository's config.json is of other weights.
    """
    if is_shipped(path):
        return shipped_sha256(path)
    blob = _blob(path)
    if blob is not None:
        told = told_sha256(path.parent) if path.name == WEIGHTS_NAME else None
        if told not in (None, blob.name):
            raise OSError(
                f'{path}: is not what {CONFIG_NAME} beside it tells of: one of them was replaced alone. Push both '
                f'again, or take {SHA256_FIELD} out of {CONFIG_NAME} there; name@revision gives an older commit.'
            )
        return blob.name
    if path.name != WEIGHTS_NAME:
        return None
    if re.fullmatch(rf'{re.escape(TEMPORARY)}[0-9a-f]{{64}}', path.parent.name):  # the name ends in the sha256
        return path.parent.name.removeprefix(TEMPORARY)
    return told_sha256(path.parent)


def is_cached(path: Path, place: Path) -> bool:
    """Return whether a path leads by a name that is the file's sha256 to its place, as in the Hub's cache."""
    blob = _blob(path)
    return blob is not None and sha256(place) == blob.name


def _blob(path: Path) -> Optional[Path]:
    """Return the place in the Hub's cache that a link leads to and that is named by a sha256, if there is one.

    It may be a link itself: into a store that repositories share, whose names are no sha256.
    """
    for _ in range(40):  # the system follows no more of them
        path = path.parent.resolve() / path.name
        if path.parent.name == 'blobs' and re.fullmatch(r'[0-9a-f]{64}', path.name):
            return path
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def check(path: Path, published: Optional[str] = None) -> str:
    """Return a file's sha256, compared with the published one.

    Args:
        published: The sha256 that the file must have, or its beginning; by default `published_sha256`.

    Raises:
        OSError: where the file's sha256 is not the published one.
    """
    actual, published = sha256(path), published or published_sha256(path)
    if published and not actual.startswith(published):
        remedy = 'Remove it and load again'
        if _blob(path) is not None:  # removing only the link to the blob would not help
            path = Path(os.path.realpath(path))
        elif is_shipped(path):
            remedy = REINSTALL
        elif path.name == WEIGHTS_NAME:
            teller = CONFIG_NAME if (path.parent / CONFIG_NAME).is_file() else CARD_NAME
            remedy = f'Restore it, or, if you changed it on purpose, take {SHA256_FIELD} out of {teller} beside it'
        raise OSError(
            f'{path} is damaged, or was changed after it was published: its sha256 is {actual}, not {published}. '
            f'{remedy}.'
        )
    return actual


def check_once(path: Path, published: Optional[str] = None) -> None:
    """`check` a file whose sha256 is published, and remember that it passed until it changes.

    Raises:
        OSError: where the file's sha256 is not the published one.
    """
    published = published or published_sha256(path)
    if published is not None and _checked().get(os.path.realpath(path)) != _state(path, published):
        check(path, published)
        remember(path, published)


def remember(path: Path, published: str) -> None:
    """Remember that a file has the sha256 that it must have."""
    memory = {known: state for known, state in _checked().items() if os.path.exists(known)}
    memory[os.path.realpath(path)] = _state(path, published)
    with suppress(OSError), replacing(_memory()) as beside:  # without a writable home, it is checked again next time
        beside.write_text(json.dumps(memory, indent=1))


def _state(path: Path, published: str) -> List[Any]:
    status = os.stat(path)
    return [published, status.st_size, status.st_mtime_ns, status.st_ino]


def _memory() -> Path:
    return Path(constants.HF_HOME) / 'timm-vitres' / 'checked.json'


def _checked() -> Dict[str, Any]:
    try:
        memory = json.loads(_memory().read_text())
    except (OSError, ValueError):  # there is no memory yet, or the file is not ours
        return {}
    return memory if isinstance(memory, dict) else {}
