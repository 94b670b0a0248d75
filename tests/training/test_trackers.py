"""TensorBoard and Weights & Biases are told the rows of a run's table."""

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_loop import rows, settings

from timm_vitres.training import loop, trackers
from timm_vitres.training.loop import finetune
from timm_vitres.training.runs import Record
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.trackers import Trackers, check_trackers


def test_tensorboard_has_the_rows_of_the_table(image_folder, tmp_path, no_pictures):
    cfg = settings(image_folder, tmp_path / 'run', epochs=2, log_tensorboard=True, model_ema=True, no_check=True)
    finetune(cfg)
    folder = finetune(dataclasses.replace(cfg, epochs=3, resume=True))
    events = EventAccumulator(str(folder / 'tensorboard')).Reload()
    history = rows(folder)
    assert len(history) == 3 and {'train/loss', 'eval/top1', 'ema/macro_f1', 'lr'} <= {*events.Tags()['scalars']}
    assert len(events.Tags()['scalars']) == len(history[0]) - 1  # the epoch is the step
    for name in history[0]:
        if name != 'epoch':
            found = [(event.step, event.value) for event in events.Scalars(name.replace('_', '/', 1))]
            assert found == [(step, pytest.approx(float(row[name]), rel=1e-5)) for step, row in enumerate(history)]


def test_an_epoch_whose_model_could_not_be_written_is_told_all_the_same(
    image_folder, tmp_path, monkeypatch, no_pictures
):
    cfg = settings(image_folder, tmp_path / 'run', epochs=2, log_tensorboard=True, no_check=True)

    def full(*args):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(loop, 'write_summary', full)
        with pytest.raises(OSError, match='No space left'):
            finetune(cfg)
    folder = finetune(dataclasses.replace(cfg, resume=True))
    events = EventAccumulator(str(folder / 'tensorboard')).Reload()
    assert {event.step for event in events.Scalars('train/loss')} == {0, 1} and len(rows(folder)) == 2


def test_a_run_that_fails_in_its_first_epoch_leaves_its_folder_free(image_folder, tmp_path, monkeypatch, no_pictures):
    cfg = settings(image_folder, tmp_path / 'run', epochs=1, log_tensorboard=True, no_check=True)

    def no_memory(*args):
        raise RuntimeError('out of memory')

    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, '_step', no_memory)
        with pytest.raises(RuntimeError, match='out of memory'):
            finetune(cfg)
    assert not (tmp_path / 'run').exists()
    assert len(rows(finetune(cfg))) == 1


class Stand(ModuleType):
    """What a run asks of wandb, written down."""

    def __init__(self):
        super().__init__('wandb')
        self.__spec__ = ModuleSpec('wandb', None)  # by which it counts as installed
        self.begun, self.told, self.ended = [], [], []

    def init(self, **kwargs):
        self.begun.append(kwargs)
        Path(kwargs['dir'], 'wandb').mkdir(exist_ok=True)
        return self

    def log(self, figures, step):
        self.told.append((step, figures))

    def finish(self, exit_code):
        self.ended.append(exit_code)


def test_wandb_has_the_rows_of_the_table(image_folder, tmp_path, monkeypatch, no_pictures):
    stand = Stand()
    monkeypatch.setitem(sys.modules, 'wandb', stand)
    cfg = settings(image_folder, tmp_path / 'run', epochs=1, log_wandb=True, no_check=True)
    finetune(cfg)
    folder = finetune(dataclasses.replace(cfg, epochs=2, resume=True))
    first, second = stand.begun
    assert first['id'] == second['id'] == Record.read(folder).id and second['resume'] == 'allow'
    assert first['config']['lr'] == cfg.lr and first['dir'] == str(folder) and stand.ended == [0, 0]
    for step, (told, row) in enumerate(zip(stand.told, rows(folder), strict=True)):
        assert told == (step, {**{name: pytest.approx(float(value)) for name, value in row.items()}, 'epoch': step})


def test_a_run_that_fails_says_that_there_is_no_more(image_folder, tmp_path, monkeypatch, no_pictures):
    stand = Stand()
    monkeypatch.setitem(sys.modules, 'wandb', stand)
    with pytest.raises(ValueError, match='lr: the'):
        finetune(settings(image_folder, tmp_path / 'run', opt='sgd', lr=1e30, log_wandb=True))
    assert stand.ended == [1] and not stand.told


def test_a_run_that_fails_at_once_leaves_nothing_in_its_own_way(image_folder, tmp_path, monkeypatch, no_pictures):
    monkeypatch.setitem(sys.modules, 'wandb', Stand())
    follow = dict(log_tensorboard=True, log_wandb=True)
    for _ in range(2):
        with pytest.raises(ValueError, match='lr: the'):
            finetune(settings(image_folder, tmp_path / 'run', opt='sgd', lr=1e30, **follow))
        assert not (tmp_path / 'run').exists()


def test_what_is_not_installed_is_said_before_anything_is_done(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, 'is_installed', lambda package: False)
    for name, package in (('log_wandb', 'wandb'), ('log_tensorboard', 'tensorboard')):
        with pytest.raises(ValueError, match=f'{name}: needs {package}, pip install {package}'):
            finetune(settings(image_folder, tmp_path / 'run', **{name: True}))
        assert not (tmp_path / 'run').exists()
    check_trackers(FinetuneCfg(data_dir='x'))


def test_a_run_without_trackers_tells_nobody(tmp_path):
    quiet = Trackers(Record(FinetuneCfg(data_dir='x'), {}, {}), tmp_path)
    quiet.log(dict(epoch=0, train_loss=1.0))
    quiet.close()
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_can_not_be_used_is_named_and_leaves_nothing(image_folder, tmp_path, monkeypatch, no_pictures):
    class UsageError(Exception):
        pass

    class Refusing(Stand):
        def init(self, **kwargs):
            raise UsageError('api_key not configured')

    monkeypatch.setitem(sys.modules, 'wandb', Refusing())
    for _ in range(2):
        with pytest.raises(ValueError, match=r'^log_wandb: can not be used here \(.*api_key not configured'):
            finetune(settings(image_folder, tmp_path / 'run', log_tensorboard=True, log_wandb=True))
        assert not (tmp_path / 'run').exists()
