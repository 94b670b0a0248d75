"""Where a run is followed from afar: TensorBoard and Weights & Biases, where they are installed."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Dict

from ..checks import is_installed, on_one_line
from .runs import Record

TENSORBOARD_NAME = 'tensorboard'
WANDB_NAME = 'wandb'  # wandb's own choice


def check_trackers(cfg: Any) -> None:
    """Raise ValueError for a tracker that is asked for, but not installed."""
    for name, package in (('log_wandb', 'wandb'), ('log_tensorboard', 'tensorboard')):
        if getattr(cfg, name) and not is_installed(package):
            raise ValueError(f'{name}: needs {package}, pip install {package}.')


class Trackers:
    """What a run tells others of its epochs; a resumed run goes on in the same place."""

    def __init__(self, record: Record, folder: Path, is_new: bool = True):
        self.folder = folder
        self.writer = self.wandb = None
        for name, open_ in (('log_tensorboard', self._open_tensorboard), ('log_wandb', self._open_wandb)):
            try:
                if getattr(record.cfg, name):
                    open_(record)
            except Exception as error:  # both raise errors of their own: without a login, for one
                (self.remove if is_new else self.close)()
                raise ValueError(f'{name}: can not be used here ({on_one_line(error)}).') from error

    def _open_tensorboard(self, record: Record) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder / TENSORBOARD_NAME))

    def _open_wandb(self, record: Record) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        settings = dataclasses.asdict(record.cfg)
        self.wandb = wandb.init(dir=str(self.folder), config=settings, id=record.id, resume='allow')

    def log(self, row: Dict[str, Any]) -> None:
        """Tell the figures of an epoch."""
        figures = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != 'epoch'}
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(name.replace('_', '/', 1), value, int(row['epoch']))
            self.writer.flush()
        if self.wandb is not None:
            self.wandb.log({**figures, 'epoch': row['epoch']}, step=int(row['epoch']))

    def close(self, failed: bool = False) -> None:
        """Say that there is no more to come, or that the run failed."""
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(failed))
        self.writer = self.wandb = None

    def remove(self) -> None:
        """Close, and remove what is in the run's folder, of a run that is no more."""
        self.close(failed=True)
        for name in (TENSORBOARD_NAME, WANDB_NAME):
            shutil.rmtree(self.folder / name, ignore_errors=True)
