"""Fine-tuning on timm.task, timm.data, timm.optim and timm.scheduler; the flags keep the names of timm's train.py.

images -> `load_data` -> `finetune` -> folder/{run.json, model.safetensors, config.json, README.md, summary.csv,
curves.png, last.pth.tar}. A run that was killed goes on with `resume` as if it had not been, from its last whole epoch.
"""

import dataclasses
import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Tuple, Union

import timm
import torch
from timm.data import Mixup
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad, random_seed
from torch import nn
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from ..checks import on_one_line, plain
from ..data import data_config, image_mode
from ..measure import fastest_training
from ..models.base import Hybrid
from ..pictures import draws_curves
from ..publishing.saving import save
from ..weights.files import CONFIG_NAME, WEIGHTS_NAME
from ..writing import replacing
from .datasets import Data, load_data
from .loaders import check_policy, create_loaders
from .report import CURVES_NAME, best_epoch, count_epochs, evaluate, run_card, write_summary
from .runs import CHECKPOINT_NAME, RECORD_NAME, Record, given_settings, run_folder
from .settings import FinetuneCfg

_logger = logging.getLogger(__name__)


class Diverged(ValueError):
    """A run's numbers are not finite any more."""


def create_finetune_model(cfg: FinetuneCfg, num_classes: int) -> nn.Module:
    """Create the model of a run, its position table made for the run's image size where it has one.

    Raises:
        ValueError, TypeError, RuntimeError: for a model, or arguments of it, that timm does not know.
    """
    kwargs = dict(cfg.model_kwargs or {})
    for name in ('num_classes', 'pretrained', 'features_only'):
        if name in kwargs:
            raise ValueError(f'model_kwargs: {name} is not for a run to choose so; leave it out.')
    for name, value in (('in_chans', cfg.in_chans), ('drop_rate', cfg.drop), ('drop_path_rate', cfg.drop_path)):
        if value is not None:
            kwargs[name] = value
    try:
        model = timm.create_model(cfg.model, pretrained=cfg.pretrained, num_classes=num_classes, **kwargs)
    except (TypeError, AttributeError, LookupError, AssertionError, ArithmeticError) as error:
        # constructors raise these for arguments that they do not know, or can't work with
        reason = f' ({error})' if str(error) else ''
        raise TypeError(f'model_kwargs: {cfg.model} can not be made with {kwargs}{reason}.') from error
    if cfg.img_size is not None and hasattr(model, 'set_input_size'):
        model.set_input_size(img_size=_image_size(cfg.img_size))
    _set_head_loss_(model, cfg)
    return model


def _set_head_loss_(model: nn.Module, cfg: FinetuneCfg) -> None:
    """Let a model with two heads return what `head_loss` is computed of."""
    if cfg.head_loss == 'sum':
        return
    heads = model.get_classifier()
    if not isinstance(heads, tuple):
        raise ValueError(f'head_loss: got {cfg.head_loss!r}, but {cfg.model} has one head; leave head_loss out.')
    if cfg.head_loss == 'both':
        model.set_distilled_training(True)
        return
    head = f'head_{cfg.head_loss}'
    if not isinstance(model, Hybrid) or head not in model.heads:
        raise ValueError(f"head_loss: got {cfg.head_loss!r}, but {cfg.model} has no head of that name; use 'both'.")
    model.train_one_head(head)


class MeanOverHeads(nn.Module):
    """A loss of logits, or the mean of the losses of each head where a model returns the logits of several."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, output: Union[torch.Tensor, Tuple[torch.Tensor, ...]], target: torch.Tensor) -> torch.Tensor:
        """Take logits (B, classes), or a tuple of them, and class indices (B,) or soft targets -> a number."""
        if isinstance(output, tuple):
            return torch.stack([self.criterion(logits, target) for logits in output]).mean()
        return self.criterion(output, target)


def _image_size(img_size: Union[int, Tuple[int, ...]]) -> Tuple[int, int]:
    size = img_size if isinstance(img_size, tuple) else (img_size,)
    return size[0], size[-1]


def finetune(cfg: FinetuneCfg, given: Optional[Collection[str]] = None) -> Path:
    """Fine-tune a model and return the folder of its best epoch, which `timm.create_model('local-dir:...')` loads.

    The folder records what the run was started with before its first step. With `cfg.resume` the run that is recorded
    goes on to its last epoch (`cfg.epochs`, if more than recorded: the schedule is then that of the longer run).

    Args:
        given: Names of the settings that must agree with the record of a run that goes on; all others are taken from
            it. By default those that are not at their default: the settings that started a run also resume it, and a
            default that contradicts the record gives way to it.

    Raises:
        ValueError, TypeError, FileNotFoundError: for impossible settings or data, an output folder with anything in
            it, or a record that says otherwise; the message says which.
        ValueError: where the loss or the weights are not finite any more; the last good epoch and model are kept.
        OSError: where a file can't be written, or another process writes to the folder; the last whole epoch stays
            readable.
    """
    if not draws_curves():
        _logger.warning('%s is left out: it needs matplotlib, pip install "timm-vitres[plot]".', CURVES_NAME)
    given = given_settings(cfg) if given is None else given
    with run_folder(cfg, given) as folder:
        if not cfg.resume:
            return _set_up(cfg, folder).train()
        record = Record.read(folder).resumed(cfg, given)
        state = _read_state(folder, record)
        if state is not None and len(state['history']) >= record.cfg.epochs and _is_whole(folder, state['history']):
            _logger.info('The run in %s is finished: all of its %d epochs are trained.', folder, record.cfg.epochs)
            return folder
        return _set_up(record.cfg, folder, record, state).train()


def _set_up(
    cfg: FinetuneCfg, folder: Path, record: Optional[Record] = None, state: Optional[Dict[str, Any]] = None
) -> '_Run':
    """Return a run that is ready for its next step, and recorded; what can be wrong with the settings is found here."""
    device = _check_device(cfg.device)
    _check_optimizer(cfg.opt)
    try:
        kwargs = resolve_model_input_args(cfg.model, **{'in_chans': cfg.in_chans, **(cfg.model_kwargs or {})})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'model: {cfg.model} can not be made with in_chans and model_kwargs as given ({error}).'
        ) from error
    in_chans = kwargs.get('in_chans') or kwargs['pretrained_cfg']['input_size'][0]
    mode = image_mode(in_chans)
    check_policy(cfg.aa, mode)
    for name, values in (('mean', cfg.mean), ('std', cfg.std)):
        if values is not None and len(values) not in (1, in_chans):
            raise ValueError(f'{name}: got {values}, expected one number, or one for each of {in_chans} channels.')

    data = load_data(cfg, mode, recorded=None if record is None else record.data)
    for text in data.skipped:
        _logger.warning('left out: %s', text)
    random_seed(cfg.seed)
    # a checkpoint has all weights, wherever those that the run started from may be by now
    start = dataclasses.replace(cfg, pretrained=cfg.pretrained and state is None)
    model = create_finetune_model(start, num_classes=len(data.label_names)).to(device)
    if record is None:
        size = _image_size(cfg.img_size) if cfg.img_size is not None else None
        asked = dict(img_size=size, mean=cfg.mean, std=cfg.std, interpolation=cfg.interpolation, crop_pct=cfg.crop_pct)
        config = plain('data_config', data_config(model, **asked))
        # the model's own data config must keep to the limits of settings, or validation would fail after an epoch
        dataclasses.replace(cfg, **{name: config[name] for name in ('mean', 'std', 'interpolation', 'crop_pct')})
        autotuned = _autotune(cfg, model, len(data.label_names), config['input_size']) if cfg.autotune else None
        record = Record(cfg, data.record(), config, autotuned)
    run = _Run(record, folder, model, data, device)
    if state is not None:
        run.restore(state)
    record.write(folder)
    return run


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.zeros(1, device=device).item()  # 'meta' can't do this, nor can a device that is missing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = on_one_line(error).partition('. ')[0].rstrip('.')
        raise ValueError(f'device: got {name!r}, which can not be used here ({reason}).') from error
    return device


def _check_optimizer(opt: str) -> None:
    try:
        info = get_optimizer_info(opt.rpartition('_')[2])
    except ValueError:
        raise ValueError(f'opt: timm has no optimizer {opt!r}; timm.optim.list_optimizers() names them.') from None
    if info.second_order:
        raise ValueError(f'opt: {opt!r} needs second derivatives, which a run does not compute; use another.')


def _autotune(cfg: FinetuneCfg, model: nn.Module, num_classes: int, input_size: Tuple[int, ...]) -> Dict[str, bool]:
    """Return the fastest amp and channels_last."""
    with torch.random.fork_rng():  # a run that is given these settings by name draws the same numbers
        settings, times = fastest_training(model, num_classes, (cfg.batch_size, *input_size), cfg.amp_dtype)
    _logger.info('autotune: %s; training with %s.', times, settings)
    return settings


def _read_state(folder: Path, record: Record) -> Optional[Dict[str, Any]]:
    """Return the checkpoint of a run; None where it was killed before it had one."""
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        if (folder / WEIGHTS_NAME).exists():
            raise FileNotFoundError(f'resume: {folder} holds a model, but no {CHECKPOINT_NAME} to go on from.')
        return None
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a truncated file fails in the unpickler, in zip, or in torch, each its own way
        raise ValueError(f'resume: {path} is not a checkpoint of a fine-tuning run ({error}).') from error
    if not isinstance(state, dict) or not {'id', 'history', 'state_dict', 'optimizer'} <= state.keys():
        raise ValueError(f'resume: {path} is not a checkpoint of a fine-tuning run (it lacks what one holds).')
    if state['id'] != record.id:
        raise ValueError(f'resume: {path} is of another run than {RECORD_NAME} beside it.')
    return state


def _is_whole(folder: Path, history: List[Dict[str, float]]) -> bool:
    """Return whether all that follows the last checkpoint was written; the table of epochs is written last."""
    files = (folder / WEIGHTS_NAME, folder / CONFIG_NAME)
    return count_epochs(folder) == len(history) and all(path.is_file() for path in files)


def _are_finite(tensors: List[torch.Tensor]) -> bool:
    numbers = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return bool(torch.isfinite(get_total_norm(numbers, math.inf)))


class _Run:
    """One fine-tuning run: what changes from epoch to epoch, and how it is written down."""

    def __init__(self, record: Record, folder: Path, model: nn.Module, data: Data, device: torch.device):
        self.record = record
        self.cfg = cfg = record.trained_cfg
        self.folder = folder
        self.model = model
        self.device = device
        self.history: List[Dict[str, float]] = []
        if cfg.channels_last:
            model.to(memory_format=torch.channels_last)
        self.train_batches, self.val_batches = create_loaders(cfg, data, record.data_config, record.data)
        self.mixup = None
        if cfg.mixup > 0 or cfg.cutmix > 0:
            num_classes = len(record.label_names)
            self.mixup = Mixup(cfg.mixup, cfg.cutmix, label_smoothing=cfg.smoothing, num_classes=num_classes)
        self.task = ClassificationTask(model, device=device, verbose=False, **self._loss(data.counts))
        self.task.criterion = MeanOverHeads(self.task.criterion)
        self.optimizer, self.scheduler = self._create_optimizer()
        dtype = torch.bfloat16 if cfg.amp_dtype == 'bfloat16' else torch.float16
        self.autocast = (lambda: torch.autocast(device.type, dtype)) if cfg.amp else nullcontext
        self.scaler = NativeScaler(device.type) if cfg.amp and cfg.amp_dtype == 'float16' else None

    def _create_optimizer(self) -> Tuple[torch.optim.Optimizer, Any]:
        cfg = self.cfg
        options = dict(lr=cfg.lr, weight_decay=cfg.weight_decay, layer_decay=cfg.layer_decay)
        try:
            optimizer = create_optimizer_v2(self.model, opt=cfg.opt, **options)
        except Exception as error:  # optimizers may need a package, a GPU, or another kind of parameters
            raise ValueError(f'opt: {cfg.opt!r} can not be used here ({error}).') from error
        try:
            scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=cfg.sched,
                num_epochs=cfg.epochs,
                warmup_epochs=min(cfg.warmup_epochs, cfg.epochs / 2),
                warmup_lr=cfg.warmup_lr,
                min_lr=cfg.min_lr,
                step_on_epochs=False,
                updates_per_epoch=len(self.train_batches),
            )
        except (ValueError, AssertionError) as error:
            reason = str(error).rstrip('.')
            raise ValueError(f'sched: {cfg.sched!r} can not be used for {cfg.epochs} epochs ({reason}).') from error
        return optimizer, scheduler

    def _loss(self, counts: Optional[List[int]]) -> Dict[str, Any]:
        if not self.cfg.balance_classes:
            return dict(criterion_kwargs=dict(smoothing=self.cfg.smoothing, soft_targets=self.mixup is not None))
        if counts is None or self.mixup is not None:
            raise ValueError('balance_classes: needs a dataset that knows its labels, and no mixup or cutmix.')
        weight = torch.tensor([sum(counts) / (len(counts) * max(count, 1)) for count in counts])
        return dict(criterion=nn.CrossEntropyLoss(weight=weight, label_smoothing=self.cfg.smoothing))

    def train(self) -> Path:
        """Train the epochs that are left, and return the folder of the finished model."""
        if self.history and not _is_whole(self.folder, self.history):
            self._write_results()  # a kill came between the checkpoint and this
        for epoch in range(len(self.history), self.cfg.epochs):
            start = time.perf_counter()
            # each epoch draws from its own seed, so that a resumed run is the run that was not interrupted
            random_seed(self.cfg.seed + epoch)
            try:
                train_loss = self._train_epoch(epoch)
                metrics = self._validate(epoch)
            except Diverged:
                if not self.history:  # a record alone would be nothing to go on with
                    (self.folder / RECORD_NAME).unlink()
                raise
            row = dict(epoch=epoch, train_loss=train_loss, **{f'eval_{name}': metrics[name] for name in metrics})
            row.update(lr=self.optimizer.param_groups[0]['lr'], seconds=round(time.perf_counter() - start, 1))
            self.history.append(row)
            self._write_checkpoint()
            self._write_results()
            _logger.info(
                'epoch %d: train loss %.3f, validation loss %.3f, top1 %.2f, balanced %.2f, %.0f s',
                *(epoch, train_loss, row['eval_loss'], row['eval_top1'], row['eval_balanced'], row['seconds']),
            )
        return self.folder

    def _train_epoch(self, epoch: int) -> float:
        self.model.train()
        self.train_batches.set_epoch(epoch)
        losses = AverageMeter()
        num_updates = epoch * len(self.train_batches)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        with tqdm(self.train_batches, desc=f'epoch {epoch + 1}/{self.cfg.epochs}', leave=False) as bar:
            for x, target in bar:
                x, target = x.to(self.device), target.to(self.device)
                if self.mixup is not None:
                    x, target = self.mixup(x, target)
                if self.cfg.channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                with self.autocast():
                    loss = self.task(x, target)['loss']
                self.optimizer.zero_grad()
                if not torch.isfinite(loss):
                    raise self._diverged(f'the loss became {loss.item()}', epoch)
                self._step(loss)
                if not _are_finite(tensors):
                    raise self._diverged('the weights became infinite, or no numbers,', epoch)
                losses.update(loss.item(), len(x))
                num_updates += 1
                if self.scheduler is not None:
                    self.scheduler.step_update(num_updates=num_updates)
                bar.set_postfix(loss=f'{losses.avg:.3f}')
        return losses.avg

    def _validate(self, epoch: int) -> Dict[str, float]:
        metrics = evaluate(self.model, self.val_batches, self.device, self.autocast)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise self._diverged(f'the {name} on the validation images became {value}', epoch)
        return metrics

    def _diverged(self, what: str, epoch: int) -> Diverged:
        kept = ''
        if self.history:
            kept = f' {self.folder} keeps the model of epoch {int(self.best["epoch"])}, the best one.'
        return Diverged(f'lr: {what} in epoch {epoch}; lower lr, which is {self.cfg.lr:g}, or set clip_grad.{kept}')

    def _step(self, loss: torch.Tensor) -> None:
        clip_grad = self.cfg.clip_grad
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip_grad=clip_grad, parameters=self.model.parameters())
            return
        loss.backward()
        if clip_grad is not None:
            dispatch_clip_grad(self.model.parameters(), value=clip_grad)
        self.optimizer.step()

    @property
    def best(self) -> Dict[str, float]:
        """The row of the best epoch so far."""
        return best_epoch(self.history, self.cfg.eval_metric)

    def _write_checkpoint(self) -> None:
        state = dict(
            id=self.record.id,
            history=self.history,
            epoch=len(self.history) - 1,
            state_dict=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        if self.scaler is not None:
            state['scaler'] = self.scaler.state_dict()
        with replacing(self.folder / CHECKPOINT_NAME) as path:
            torch.save(state, path)

    def _write_results(self) -> None:
        """Write the model, if the last epoch is the best one, and then the table of epochs, the last thing."""
        if self.best is self.history[-1]:
            card = run_card(self.record, self.best, self.model, self.folder.resolve().name)
            save(self.model, self.folder, self.record.label_names, self.record.data_config, card)
        write_summary(self.history, self.folder)

    def restore(self, state: Dict[str, Any]) -> None:
        """Go on from the content of a checkpoint; ValueError where it does not fit the recorded run."""
        try:
            self.model.load_state_dict(state['state_dict'])
            self.optimizer.load_state_dict(state['optimizer'])
            if self.scaler is not None:
                self.scaler.load_state_dict(state['scaler'])
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f'resume: {CHECKPOINT_NAME} does not fit the model of the run ({on_one_line(error)}).'
            ) from error
        self.history = state['history']
        if self.scheduler is not None:  # it is not restored, since more epochs make another schedule
            self.scheduler.step_update(num_updates=len(self.history) * len(self.train_batches))
