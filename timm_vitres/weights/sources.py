"""Sources of a model's weights (file, folder, Hub repository, URL) are resolved to one path.

pretrained cfg -> `find_weights` -> `local_weights`, `hub_weights` or `url_file` -> a file, or the index of shards.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Optional, Sequence, Union
from urllib.parse import urlparse

from huggingface_hub.errors import HFValidationError
from timm.layers import to_2tuple
from timm.models import PretrainedCfg, list_pretrained

from ..writing import TEMPORARY
from .checkpoints import INDEX_NAMES, checkpoint_files
from .checksums import check_once, is_of_this_package, told_sha256
from .downloads import at_commit, hub_file, url_file
from .files import CONFIG_NAME, WEIGHTS_NAME, WEIGHTS_NAMES, WEIGHTS_SUFFIXES
from .shipped import is_shipped

LOCAL = 'local-dir:'
STARTS = (LOCAL, 'hf-hub:', 'hf_hub:')  # of names that timm takes for a folder, or a repository
# safetensors first, as transformers reads them: a pickle may be left of an older model
USUAL_NAMES = (WEIGHTS_NAME, INDEX_NAMES[0], *WEIGHTS_NAMES[1:], INDEX_NAMES[1])
# arguments of timm.create_model that say where weights come from; what names a model must not choose them, too
SOURCE_ARGUMENTS = frozenset(
    ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_model_args', 'checkpoint_path', 'cache_dir')
)


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
        found = sorted(file for file in path.glob(f'[!.]*{suffix}') if file.is_file())
        if len(found) > 1:
            raise ValueError(f'{path}: holds {", ".join(file.name for file in found)}; name the one that you mean.')
        if found:
            return found[0]
    raise FileNotFoundError(f'{path}: holds no weights ({", ".join(WEIGHTS_NAMES)}).')


def told_size(path: Path) -> Optional[Sequence[int]]:
    """Return height and width of the images that weights were saved for, as this package's config.json beside them
    tells; None where there is none.
    """
    with suppress(OSError, ValueError, TypeError, AttributeError):  # a file that can't be read, or is none of ours
        text = path.with_name(CONFIG_NAME).read_text(encoding='utf-8')
        if path.name == WEIGHTS_NAME and is_of_this_package(text):
            config = json.loads(text)
            built = (config.get('model_args') or {}).get('img_size')
            height, width = to_2tuple(built or config['pretrained_cfg'].get('input_size')[-2:])
            return int(height), int(width)
    return None


def pending_weights(folder: Path) -> Optional[Path]:
    """Return the weights that config.json tells of if a killed writer did not put them in place, else None."""
    told = told_sha256(folder)
    pending = folder / f'{TEMPORARY}{told}' / WEIGHTS_NAME
    return pending if told and pending.is_file() else None


def find_weights(cfg: PretrainedCfg, cache_dir: Union[None, str, Path] = None, token: Optional[str] = None) -> Path:
    """Return the file that a pretrained cfg names, downloaded if need be. The order of its sources is timm's.

    Args:
        token: Of the Hub; by default that of whoever is logged in.

    Returns:
        The file, or the index of a checkpoint in shards; the shards lie beside it.

    Raises:
        RuntimeError: where the cfg names no weights.
        ValueError: where the cfg names something that can't be a file, repository or address.
        OSError: where a weight that the package holds is missing or damaged.
    """
    if cfg.source == 'local-dir' or (cfg.file and cfg.source != 'hf-hub'):
        if not cfg.file or not isinstance(cfg.file, (str, Path)):
            raise ValueError(f'file: got {cfg.file!r:.80} in the pretrained_cfg, expected a path.')
        if is_shipped(Path(cfg.file)):  # before it is read, so that the error of a damaged file names the remedy
            check_once(Path(cfg.file))
        return local_weights(cfg.file)
    if cfg.hf_hub_id:
        names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else None
        return hub_weights(cfg.hf_hub_id, names, cache_dir, token)
    if cfg.url:
        if not isinstance(cfg.url, str) or not urlparse(cfg.url).scheme:
            raise ValueError(f'url: got {cfg.url!r:.200} in the pretrained_cfg, expected one like https://...')
        return url_file(cfg.url, cache_dir)
    tags = list_pretrained(f'{cfg.architecture}.*')
    ways = f'; there are some for {", ".join(tags)}' if tags else ''
    raise RuntimeError(
        f'No pretrained weights exist for {cfg.architecture}{ways}. Use `pretrained=False` for random init.'
    )


def local_weights(path: Union[str, Path]) -> Path:
    """Return a file itself, the weights in a folder (see `weights_file`), or the index of its shards."""
    folder = Path(path)
    if folder.is_dir() and not pending_weights(folder):
        first = next((folder / name for name in USUAL_NAMES if (folder / name).is_file()), None)
        if first is not None:
            return first
    return weights_file(path)


def hub_weights(
    model_id: str,
    filenames: Optional[Sequence[str]] = None,
    cache_dir: Union[None, str, Path] = None,
    token: Optional[str] = None,
) -> Path:
    """Return the weights in a Hub repository, downloaded: a file, or the index of shards that lie beside it.

    Args:
        model_id: 'owner/name' or 'owner/name@revision'.
        filenames: Names to look for, in this order; by default all usual names.

    Raises:
        ValueError: for an impossible name.
        OSError: where `hub_file` raises one.
    """
    try:
        path = hub_file(model_id, filenames or USUAL_NAMES, cache_dir, token)
        for shard in checkpoint_files(path):
            if shard != path:  # all shards must come from the index's commit
                hub_file(at_commit(model_id, path.parent.name), (shard.name,), cache_dir, token)
    except (HFValidationError, AttributeError) as error:  # a name that is no text has no `partition`
        raise ValueError(
            f"hf_hub_id: got {model_id!r:.200}, expected 'owner/name' or 'owner/name@revision'."
        ) from error
    return path
