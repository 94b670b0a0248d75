"""Pushing a model's folder to a Hub repository, and verifying weights against what was published.

folder -> `push` -> repository, one commit, its checksums compared -> timm.create_model('hf-hub:me/name')
"""

import logging
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

import timm
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from timm.models import PretrainedCfg, get_pretrained_cfg, parse_model_name
from torch import nn

from ..checks import some
from ..weights.checkpoints import checkpoint_files
from ..weights.checksums import SHA256_FIELD, check, git_sha1, hash_in_name, is_cached, published_sha256, sha256
from ..weights.downloads import is_transient, retrying
from ..weights.files import CARD_NAME, CONFIG_NAME, CURVES_NAME, SUMMARY_NAME, WEIGHTS_NAME
from ..weights.shipped import is_shipped
from ..weights.sources import find_weights
from .cards import (
    TEXT_FIELD,
    are_of_same_weights,
    fields_of,
    merge_cards,
    plain_card,
    read_card,
    set_field,
    set_source,
    tells_of_run,
    text_sha256,
)
from .config_file import read_config
from .model_folder import locked
from .neighbours import PREPROCESSOR_NAME
from .saving import save

# these files show how the training went; they are pushed beside weights, config and card
EXTRA_NAMES = (CURVES_NAME, SUMMARY_NAME)
# weights under the other names that libraries look for; a commit that left them there would hold two models
OTHER_WEIGHTS = re.compile(
    r'pytorch_model\.(bin|pth)|model\.pth|(pytorch_model|model)-\d{5}-of-\d{5}\.(bin|safetensors)'
    r'|pytorch_model\.bin\.index\.json|model\.safetensors\.index\.json'
)
Result = TypeVar('Result')
_logger = logging.getLogger(__name__)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder that is there, as what it was meant to be: what a killed writer left is completed, and no one else
    can change the files meanwhile.

    Raises:
        ValueError: where there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f'{folder}: there is no such folder.')
    with locked(folder):
        yield


def check_folder(folder: Path) -> nn.Module:
    """Return the model that a folder holds, loaded as a user will load it.

    Raises:
        ValueError: where it can't be loaded; the message says why.
    """
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f'{folder}: has no {name}; `timm_vitres.save` or `timm-vitres convert` make a folder that is complete.'
            )
    try:
        read_config(folder)
        return timm.create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as error:  # whatever the error is, the folder must not go to the Hub
        raise ValueError(f'{folder}: is not pushed, since it does not load: {error}') from error


def push_files(folder: Path) -> List[Path]:
    """Return the files of a folder that `push` sends: weights, config, card, and how the training went.

    Raises:
        ValueError: for a link to a file that is neither in the folder nor in the Hub's cache: a folder that came from
            somebody may name any file of this machine.
    """
    card = folder / CARD_NAME
    text = card.read_text(encoding='utf-8', errors='replace') if card.is_file() else ''
    # where another model was saved over a run's, its curves are still there
    names = (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, *(() if tells_of_run(text) is False else EXTRA_NAMES))
    files = [folder / name for name in names if (folder / name).is_file()]
    root = folder.resolve()
    own = [root, root.parents[1] / 'blobs'] if root.parent.name == 'snapshots' else [root]
    for file in files:
        place = file.resolve()
        if not any(place.is_relative_to(one) for one in own) and not is_cached(file, place):
            raise ValueError(f'{file}: is a link to {place}, outside of the folder, and is not pushed; copy the file.')
    return files


def push(
    model: Union[nn.Module, str, Path],
    repo_id: str,
    revision: Optional[str] = None,
    private: Optional[bool] = None,
    token: Optional[str] = None,
    commit_message: str = 'Upload model with timm-vitres',
    label_names: Union[None, Sequence[str], Dict[Any, str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    card: Optional[str] = None,
) -> str:
    """Push a model to the Hub, as safetensors, in one commit, so that nobody ever sees half of it.

    The repository is created if it is missing; a card that is there is updated, not replaced. Weights under the other
    names that libraries look for (`pytorch_model.bin`, shards) are of an earlier model, and deleted by the same commit,
    unless `model.safetensors` there is the same already; and so are the curves of a run that an earlier card of ours
    shows, and the preprocessor_config.json of transformers.
    The Hub's checksums are then compared with those of the files that were sent. After a failure the same call
    completes what is missing.

    Args:
        model: A model made by `timm.create_model`, or a folder that holds one (`save`, `finetune`, `convert`).
        repo_id: 'owner/name'.
        revision: Branch to commit to, created if it is missing; 'main' by default.
        private: Whether a new repository is private; by default what the owner's settings say. With True, nothing is
            sent to one that is there and public.
        token: The Hub's token; by default the one that `hf auth login` stored, or HF_TOKEN.
        label_names, data_config, card: For a model, as in `save`; a folder has its own.

    Returns:
        The commit's address.

    Raises:
        ValueError: for a model or folder that would not load again, and for a public repository that shall be private.
        OSError: where another process writes to the folder, or its files can't be read.
        RuntimeError: where the Hub refuses, can't be reached, or has got something else than was sent.
    """
    if isinstance(model, nn.Module):
        with tempfile.TemporaryDirectory() as temporary:
            folder = save(model, temporary, label_names, data_config, card)
            return push(folder, repo_id, revision, private, token, commit_message)
    folder = Path(model)
    if label_names is not None or data_config is not None or card is not None:
        raise ValueError('label_names, data_config, card: go with a model; a folder has its own.')
    with held(folder):
        return _push_folder(folder, repo_id, revision, private, token, commit_message)


def _push_folder(
    folder: Path, repo_id: str, revision: Optional[str], private: Optional[bool], token: Optional[str], message: str
) -> str:
    loaded = check_folder(folder)
    push_files(folder)  # like a broken card, a link out of the folder raises before anything is created
    card = read_card(folder / CARD_NAME)
    digest = check(folder / WEIGHTS_NAME)
    api = HfApi(token=token, library_name='timm-vitres')

    def ask(what: str, function: Callable[[], Result]) -> Result:
        return _ask(what, repo_id, function)

    repo_id = ask('create the repository', lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    if private and ask('look at the repository', lambda: api.repo_info(repo_id)).private is False:
        raise ValueError(f'private: {repo_id} is there, and public; nothing was sent. Leave private out to push to it.')
    if revision is not None:
        branch = revision
        ask('create the branch', lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
    if card is None:
        card = plain_card(loaded, repo_id.rpartition('/')[2], model_name(repo_id))
    card = set_field(set_source(card, model_name(repo_id, revision)), SHA256_FIELD, digest)
    text = set_field(card, TEXT_FIELD, text_sha256(card))
    for attempt in range(3):
        try:
            commit, sent = _commit(api, repo_id, revision, folder, text, message)
            break
        except RuntimeError as error:
            # someone else committed in between, and their changes to the card must be kept, too
            if getattr(getattr(error.__cause__, 'response', None), 'status_code', None) != 412 or attempt == 2:
                raise
    ask('compare checksums', lambda: _compare(api, repo_id, commit.oid, sent))
    return commit.commit_url


def _commit(
    api: HfApi, repo_id: str, revision: Optional[str], folder: Path, card: str, message: str
) -> Tuple[CommitInfo, Dict[str, Union[Path, bytes]]]:
    """Send a folder's files, and a card merged with the Hub's, in one commit; return the commit and what was sent."""
    info = _ask('look at the repository', repo_id, lambda: api.repo_info(repo_id, revision=revision))
    parent = info.sha
    old = _ask('read its card', repo_id, lambda: _read_card(api, repo_id, parent))
    sent: Dict[str, Union[Path, bytes]] = {path.name: path for path in push_files(folder)}
    sent[CARD_NAME] = (merge_cards(old, card) if old else card).encode()
    there = [file.rfilename for file in info.siblings or ()]
    others = [name for name in there if OTHER_WEIGHTS.fullmatch(name)]
    if others and _has_same_weights(api, repo_id, parent, folder / WEIGHTS_NAME):
        others = []  # they are these weights in another form, as timm pushes them
    others += [name for name in _told_of(old, card) if name in there and name not in sent] if old else []

    def commit() -> CommitInfo:
        # an operation works only once
        operations: List[Any] = [CommitOperationAdd(name, file) for name, file in sent.items()]
        operations += [CommitOperationDelete(name) for name in others]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=parent)

    done = _ask('commit', repo_id, commit)
    if others:
        told = repo_id, some(others)
        _logger.warning('%s: %s went, files of an earlier model; earlier commits still have them.', *told)
    return done, sent


def _told_of(old: str, new: str) -> List[str]:
    """Return the files of an earlier model, beside its weights, that would be taken for the new one's, by the cards."""
    if are_of_same_weights(old, new):
        return []
    is_run = tells_of_run(old)
    if is_run is not None:
        return list(EXTRA_NAMES) if is_run else []
    # transformers reads this one before timm's config.json
    return [PREPROCESSOR_NAME] if fields_of(old).get('library_name') == 'transformers' else []


def model_name(repo_id: str, revision: Optional[str] = None) -> str:
    """Return the name by which `timm.create_model` loads a repository's model."""
    return f'hf-hub:{repo_id}' + (f'@{revision}' if revision else '')


def _read_card(api: HfApi, repo_id: str, revision: Optional[str]) -> Optional[str]:
    with tempfile.TemporaryDirectory() as temporary:
        try:
            path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, cache_dir=temporary)
        except LocalEntryNotFoundError as error:  # it is there, perhaps, but the Hub does not say so
            raise ConnectionError(_short(error.__cause__ or error)) from error
        except EntryNotFoundError:
            return None
        return read_card(Path(path), f'{repo_id}: {CARD_NAME}')


def _has_same_weights(api: HfApi, repo_id: str, revision: Optional[str], path: Path) -> bool:
    """Return whether a repository has the weights of a file under its name."""
    entries = _ask('look at its weights', repo_id, lambda: api.get_paths_info(repo_id, [path.name], revision=revision))
    pairs = [_checksums(entry, path) for entry in entries if isinstance(entry, RepoFile)]
    return any(found == own for found, own in pairs)


def _compare(api: HfApi, repo_id: str, revision: str, sent: Dict[str, Union[Path, bytes]]) -> None:
    """Raise RuntimeError unless the Hub's own checksums are those of what was sent."""
    entries = api.get_paths_info(repo_id, list(sent), revision=revision)
    remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    with tempfile.TemporaryDirectory() as temporary:
        for name, file in sent.items():
            path = file if isinstance(file, Path) else Path(temporary) / name
            if isinstance(file, bytes):
                path.write_bytes(file)
            found, own = _checksums(remote.get(name), path)
            if found != own:
                raise RuntimeError(
                    f'{repo_id}: {name} on the Hub has the checksum {found}, not {own}: it is not what was sent. '
                    f'Push it again.'
                )


def _checksums(entry: Optional[RepoFile], path: Path, known: Optional[str] = None) -> Tuple[Optional[str], str]:
    """Return the Hub's checksum of a file (None if it has no such file), and a local file's checksum of the same kind.

    `known` is the sha256 of the local file, where it was computed before.
    """
    if entry is None or entry.lfs is None:
        return (entry.blob_id if entry else None), git_sha1(path)
    return entry.lfs.sha256, known or sha256(path)


def _ask(what: str, repo_id: str, function: Callable[[], Result]) -> Result:
    """Call a function that speaks to the Hub, with retries, and turn what goes wrong into one sentence."""
    try:
        return retrying(function)
    except Exception as error:
        # the client wraps the true error of a failed upload in a RuntimeError
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        status = getattr(getattr(cause, 'response', None), 'status_code', None)
        if isinstance(cause, GatedRepoError):  # one of the next kind, too
            reason = 'its owner gives access on request; ask for it on its page, and log in with `hf auth login`'
        elif isinstance(cause, RepositoryNotFoundError):
            reason = 'there is no such repository, or the token may not see it (log in with `hf auth login`)'
        elif status == 401:
            reason = 'the Hub does not know the token; log in with `hf auth login`, or set HF_TOKEN'
        elif status == 403:
            reason = 'the token has no right to do so; it must be one with write access to that repository'
        elif status == 412:
            reason = 'someone else committed meanwhile; push again'
        elif is_transient(cause):
            again = 'run the same again later: what has arrived is not sent twice, and nobody sees half of it'
            reason = f'the Hub does not answer as it should ({_short(cause)}); {again}'
        elif isinstance(cause, OSError):  # the Hub refuses for another reason, or a file can't be read
            reason = _short(cause)
        else:
            raise
        raise RuntimeError(f'{repo_id}: could not {what}: {reason}.') from error


def _short(error: BaseException) -> str:
    return (str(error).strip().partition('\n')[0] or type(error).__name__).rstrip('.')


class Verification(NamedTuple):
    """A file of weights, its sha256, and who published that."""

    file: Path
    sha256: str
    published_by: Optional[str]  # the publisher, such as 'the Hub', 'the cache' or 'its folder'; None if there is none


def verify(
    name: str,
    repo_id: Optional[str] = None,
    cache_dir: Union[None, str, Path] = None,
    token: Optional[str] = None,
) -> Verification:
    """Hash a model's weights and compare them with what was published.

    Args:
        name: 'vitresnet_small.<tag>', 'hf-hub:owner/name', 'local-dir:<folder>', or the path of a file or folder.
            Weights that are not in the cache are downloaded.
        repo_id: Hub repository ('owner/name' or 'owner/name@revision') to compare a local file with.
        cache_dir: Where downloads are kept, by default the Hub's cache.
        token: The Hub's token; by default the one that `hf auth login` stored, or HF_TOKEN.

    Returns:
        The file, its sha256 and who published it.

    Raises:
        OSError: where the file is damaged, or is not the one that was published.
        RuntimeError: where the name names no weights, or the repository `repo_id` can't be reached.
    """
    if repo_id and constants.HF_HUB_OFFLINE:
        raise RuntimeError(f'{repo_id}: is not asked for its checksums, since HF_HUB_OFFLINE is set; unset it.')
    cfg = _pretrained_cfg(name)
    path = find_weights(cfg, cache_dir, token)
    in_name = hash_in_name(path.name) if cfg.url and not (cfg.file or cfg.hf_hub_id) else None
    shards = [file for file in checkpoint_files(path) if file != path]  # of which `path` is then the index
    hashes = {shard: check(shard) for shard in shards}
    actual = check(path, in_name)
    hub_id = repo_id or (cfg.hf_hub_id if cfg.source != 'local-dir' and not cfg.file else None)
    if hub_id and not constants.HF_HUB_OFFLINE:
        repository, _, revision = hub_id.partition('@')
        if repo_id is None and path.parent.parent.name == 'snapshots':
            revision = path.parent.name  # the folder's name is the commit of the file
        api = HfApi(token=token, library_name='timm-vitres')
        hashes[path] = actual
        names = {file: file.relative_to(path.parent).as_posix() for file in hashes}
        try:
            entries = _ask(
                'ask for its checksums',
                repository,
                lambda: api.get_paths_info(repository, list(names.values()), revision=revision or None),
            )
        except RuntimeError:
            if repo_id is not None:
                raise
            entries = None  # the cache tells a checksum, too
        if entries is not None:
            remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
            for file, name in names.items():
                if name not in remote:
                    raise OSError(f'{file}: {hub_id} has no {name} to compare it with.')
                found, own = _checksums(remote[name], file, hashes[file])
                if found != own:
                    raise OSError(
                        f'{file}: its checksum is {own}, but that of {name} in {hub_id} is {found}: it is damaged, or '
                        f'another version.'
                    )
            return Verification(path, actual, 'the Hub')
    if in_name:
        return Verification(path, actual, f'the name in its address (it begins with {in_name})')
    if is_shipped(path):
        return Verification(path, actual, 'the package that it is shipped in')
    if published_sha256(path):
        return Verification(path, actual, 'the cache' if path.is_symlink() else 'its folder')
    return Verification(path, actual, None)


def _pretrained_cfg(name: str) -> PretrainedCfg:
    if Path(name).exists():
        return PretrainedCfg(file=name)
    source, model_id = parse_model_name(name)
    if source == 'hf-hub':
        return PretrainedCfg(hf_hub_id=model_id, source=source)
    if source == 'local-dir':
        return PretrainedCfg(file=model_id, source=source)
    cfg = get_pretrained_cfg(model_id, allow_unregistered=False)
    if cfg is None:
        raise RuntimeError(f"{name}: timm knows no such model; see timm.list_models('vitresnet*', pretrained=True).")
    return cfg
