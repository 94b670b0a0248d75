"""A run's folder: where a run may begin, what it was started with, and how it goes on.

settings, file lists -> `Record` -> folder/run.json, before the first step -> `Record.resumed` -> the same settings.
"""

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Collection, Dict, Iterator, List, Optional

import timm
import torch

from .. import __version__
from ..checks import plain, some
from ..publishing.model_folder import locked
from ..weights.sources import LOCAL
from ..writing import check_home, replacing
from .settings import FinetuneCfg, idle

_logger = logging.getLogger(__name__)
RECORD_NAME = 'run.json'
CHECKPOINT_NAME = 'last.pth.tar'
UPWARD = ('epochs', 'early_stopping')
CHANGEABLE = (*UPWARD, 'workers', 'device', 'validation_batch_size', 'data_dir')
PATHS = ('data_dir', 'model', 'kd_model_name', 'pretrained_path', 'initial_checkpoint', 'class_map')
_PLACES = ('output', 'resume')  # these settings say where a run lies, and are not recorded


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder exclusively; one that is made here, and stays empty, is removed again."""
    is_new = not folder.exists()
    try:
        with locked(folder):
            yield
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def run_folder(cfg: FinetuneCfg, given: Collection[str]) -> Iterator[Path]:
    """Hold the folder of a run, as `held` does: a new or empty one, or that of the run to resume.

    Args:
        given: Names of the settings that were given, rather than left at their default.

    Raises:
        ValueError, OSError: for a folder that the run must not, or can't, write to.
        FileNotFoundError: where there is no run to resume.
    """
    if cfg.resume:
        folder = _resumed_folder(cfg, given)
        with locked(folder):
            yield folder
        return
    folder = Path(cfg.output)
    check_place(cfg, folder)
    with held(folder):
        _check_empty(cfg, folder)
        check_writable(folder)
        yield folder


def _resumed_folder(cfg: FinetuneCfg, given: Collection[str]) -> Path:
    if cfg.resume is True:
        folder = Path(cfg.output)
    else:
        folder = Path(str(cfg.resume))
        folder = folder.parent if folder.name in (CHECKPOINT_NAME, RECORD_NAME) else folder
    if not (folder / RECORD_NAME).is_file():
        raise FileNotFoundError(f'resume: {folder} has no {RECORD_NAME}, so there is no run to go on with.')
    if 'output' in given and Path(cfg.output).resolve() != folder.resolve():
        raise ValueError(f'output: got {cfg.output}, but the run in {folder} goes on there; leave output out.')
    return folder


def check_place(cfg: FinetuneCfg, folder: Path) -> None:
    """Raise ValueError for a folder that would lie among the images, or holds the model that a run starts from."""
    check_home('output', folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f'output: {folder} is no folder; name a new one.')
    if cfg.model.startswith(LOCAL) and _is_inside(Path(cfg.model.removeprefix(LOCAL)), folder):
        raise ValueError(f'output: {folder} holds the model that the run starts from ({cfg.model}); name a new folder.')
    if cfg.data_dir and cfg.is_folder and _is_inside(folder, Path(cfg.data_dir)):
        raise ValueError(f'output: {folder} lies in the data folder {cfg.data_dir}, as a class would; name another.')


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _check_empty(cfg: FinetuneCfg, folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    if RECORD_NAME in names:
        raise ValueError(f'output: {folder} holds a run already; go on with --resume, or name another folder.')
    if names:
        raise ValueError(f'output: {folder} is not empty (it holds {some(names)}); name a new folder.')


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be written into a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(f'output: {folder} can not be written to ({error.strerror}); name another folder.') from error


def current_versions() -> Dict[str, str]:
    """Return the versions that a run is of."""
    return {'timm-vitres': __version__, 'torch': torch.__version__, 'timm': timm.__version__}


def from_anywhere(name: str, value: Any, is_there: bool = True) -> Any:
    """Return a setting that names a file or folder so that a run which is resumed from elsewhere finds the same one.

    Args:
        is_there: Whether what is not there is no file's name, but another one: of a class map, for example.
    """
    start = LOCAL if name in ('model', 'kd_model_name') else ''
    if name not in PATHS or not value or not value.startswith(start):
        return value
    path = value[len(start) :]
    return start + os.path.abspath(path) if os.path.exists(path) or not is_there else value


@dataclass(frozen=True)
class Record:
    """The settings and data that a run was started with; its folder holds them, and its card is rendered from them."""

    cfg: FinetuneCfg
    data: Dict[str, Any]  # the result of `Data.record`: class names, a description, both file lists
    data_config: Dict[str, Any]  # timm's data config: input_size, mean, std, ...
    autotuned: Optional[Dict[str, bool]] = None
    processes: int = 1  # how many the run was started with
    is_muon_in_float32: bool = False  # that of the machine where it began, and of the whole run
    teacher: Optional[str] = None  # the sha256 of its weights
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    versions: Dict[str, str] = dataclasses.field(default_factory=current_versions)

    @property
    def label_names(self) -> List[str]:
        """The names of the classes, by index."""
        return self.data['label_names']

    @property
    def trained_cfg(self) -> FinetuneCfg:
        """The settings, with those that autotune chose."""
        return dataclasses.replace(self.cfg, **(self.autotuned or {}))

    def write(self, folder: Path) -> None:
        """Write the record into the folder of the run."""
        settings = {name: from_anywhere(name, value) for name, value in dataclasses.asdict(self.cfg).items()}
        for name in _PLACES:
            del settings[name]
        content = dict(
            id=self.id,
            versions=self.versions,
            settings=settings,
            autotuned=self.autotuned,
            processes=self.processes,
            is_muon_in_float32=self.is_muon_in_float32,
            teacher=self.teacher,
            data_config=self.data_config,
            data=self.data,
        )
        content['sha256'] = _digest(content)
        lines = [f'{json.dumps(name)}: {json.dumps(value)}' for name, value in content.items()]
        with replacing(folder / RECORD_NAME) as path:
            path.write_text('{\n' + ',\n'.join(lines) + '\n}\n')

    @classmethod
    def read(cls, folder: Path) -> 'Record':
        """Read the record that `write` wrote; raise ValueError for anything else."""
        path = folder / RECORD_NAME
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            told = content.pop('sha256')
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f'resume: {path} is not the record of a run ({error}).') from error
        if told != _digest(content):
            raise ValueError(f'resume: {path} was changed after the run wrote it, so nobody can say what the run is.')
        try:
            settings = content.pop('settings')
            for name in idle(settings):  # older versions took such
                del settings[name]
            cfg = FinetuneCfg(**settings, output=str(folder))
            return cls(cfg=cfg, **{**content, 'data_config': plain('data_config', content['data_config'])})
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f'resume: {path} is of a run of another version of timm-vitres ({error}).') from error

    def with_teacher(self, sha256: str) -> 'Record':
        """Return the record, with its teacher's weights; raise ValueError for others than when the run began."""
        if self.teacher not in (None, sha256):
            name, place = self.cfg.kd_model_name, self.cfg.output
            what = f'kd_model_name: {name!r} has other weights than when the run in {place} began'
            if self.versions == current_versions():
                raise ValueError(f'{what}; give them back, or start a new run.')
            _logger.warning('%s, or other versions of timm and torch name and adapt them otherwise.', what)
        return dataclasses.replace(self, teacher=sha256)

    def resumed(self, cfg: FinetuneCfg, given: Collection[str]) -> 'Record':
        """Return the record, updated by those of the given settings that may change.

        Raises:
            ValueError: for any other given setting that contradicts the record.
        """
        changes, refused = {}, []
        for name in sorted(set(given) - set(_PLACES)):
            new, old = getattr(cfg, name), getattr(self.cfg, name)
            chosen = (self.autotuned or {}).get(name, old)
            if new == old != chosen:  # the run may have been started so: the same call resumes it
                told = name, new, chosen
                _logger.warning('%s: got %r, but autotune chose %r when the run began, and it goes on so.', *told)
            if new == chosen:
                continue
            if new != old:  # what a run began with may be gone: it goes on without
                new = from_anywhere(name, new, is_there=not os.path.isabs(str(old).removeprefix(LOCAL)))
            if new == old:
                continue
            if name not in CHANGEABLE or (name in UPWARD and (None in (new, old) or new < old)):
                began = f'lr_base {self.cfg.lr_base!r}' if name == 'lr' and self.cfg.lr_base is not None else repr(old)
                refused.append(f'{name}: got {new!r}, but the run in {self.cfg.output} was started with {began}')
            changes[name] = new
        if refused:
            raise ValueError(
                f'{"; ".join(refused)}. A run goes on as it was started; only epochs and early_stopping '
                f'(upward), workers, device, validation_batch_size and data_dir may be given anew.'
            )
        if self.versions != current_versions():
            told = [', '.join(f'{k} {v}' for k, v in each.items()) for each in (self.versions, current_versions())]
            _logger.warning('resume: the run was started with %s; now it goes on with %s.', *told)
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, **changes))


def given_settings(cfg: FinetuneCfg) -> List[str]:
    """Return the names of the settings that are not at their default."""
    return [field.name for field in dataclasses.fields(cfg) if getattr(cfg, field.name) != field.default]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
