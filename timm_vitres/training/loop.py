"""Fine-tuning on timm.task, timm.data, timm.optim and timm.scheduler; the flags keep the names of timm's train.py.

images -> `load_data` -> `finetune` -> folder/{run.json, model.safetensors, config.json, README.md, summary.csv,
curves.png, last.pth.tar, held_out.csv, ...}. A run that was killed goes on with `resume` as if it had not been, from
its last whole epoch. Under torchrun the same is done by many processes, of which the first writes and speaks.
"""

import logging
import math
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Tuple

import torch
from timm.data import Mixup
from timm.utils import AverageMeter, distribute_bn, random_seed, unwrap_model
from torch import nn

from ..checks import first_sentence, on_one_line
from ..models.layers import fused_attentions, unfuse_
from ..pictures import can_draw, why_not
from ..publishing.config_file import told_of_weights
from ..publishing.saving import save
from ..walking import shown
from ..weights.files import CURVES_NAME
from .creation import Frozen, create_finetune_model, merged, state_of, still_norms, without_weights
from .held_out import Answers, remove_report, write_report
from .loaders import check_cutmix, create_loaders, derived, names_of
from .optimisation import (
    Stepper,
    are_finite,
    check_min_lr,
    create_optimizer,
    create_scheduler,
    fast_kernels,
    learning_rate,
    unscaled_lr,
)
from .processes import Processes, check_main, joined
from .report import Best, best_epoch, evaluate, run_card, write_summary
from .runs import CHECKPOINT_NAME, RECORD_NAME, Record, given_settings
from .settings import FinetuneCfg
from .sharding import shard_, share_images_
from .starting import Setup, is_over, is_whole
from .states import keep_best, read_shards, write_shards, write_state
from .tasks import create_task
from .trackers import Trackers

_logger = logging.getLogger(__name__)


class Diverged(ValueError):
    """A run's numbers are not finite any more."""

    is_told = False  # whether another process says it


def finetune(
    cfg: FinetuneCfg, given: Optional[Collection[str]] = None, images: Optional[Dict[str, Any]] = None
) -> Path:
    """Fine-tune a model and return the folder of its best epoch, which `timm.create_model('local-dir:...')` loads.

    The folder records what the run was started with before its first step. With `cfg.resume` the run that is recorded
    goes on to its last epoch (`cfg.epochs`, if more than recorded: the schedule is then that of the longer run).

    Under torchrun every process calls this, and trains on its share of the images: `cfg.batch_size` a step, each. Where
    torchrun starts the processes again, since one of them ended, the run goes on.

    Args:
        cfg: What is trained on which images, and how.
        given: Names of the settings that must agree with the record of a run that goes on; all others are taken from
            it. By default those that are not at their default: the settings that started a run also resume it, and a
            default that contradicts the record gives way to it.
        images: Those of a new run, as the record of another says them (`Data.record`); by default the settings choose.

    Raises:
        ValueError, TypeError, FileNotFoundError: for impossible settings or data, an output folder with anything in
            it, or a record that says otherwise; the message says which.
        ValueError: where the loss or the weights are not finite any more; the last good epoch and model are kept.
        OSError: where a file can't be written, or another process writes to the folder; the last whole epoch stays
            readable.
    """
    check_main('finetune')
    given = given_settings(cfg) if given is None else given
    with joined() as processes, fast_kernels(), ExitStack() as stack:
        if not can_draw():
            _logger.warning('%s is left out: %s.', CURVES_NAME, why_not())
        setup = Setup(processes)
        start = processes.of_first(lambda: setup.begin(cfg, given, stack, images), is_long=True)
        if start.is_finished:
            return start.folder
        if not processes.is_first:
            setup.build(start.record.cfg, start.record, start.state)
        run = _Run(start.record, start.folder, setup, processes)
        if start.state is not None:
            run.restore(start.state)
            start.state = None  # it is as large as model, optimizer and averages together
        stack.push(lambda kind, *_: run.close(failed=kind is not None))
        processes.of_first(run.begin)
        return run.train()


class _Run:
    """One fine-tuning run: what changes from epoch to epoch, and how it is written down."""

    def __init__(self, record: Record, folder: Path, setup: Setup, processes: Processes):
        self.record = record
        self.cfg = cfg = setup.cfg
        self.folder = folder
        self.model, self.data, self.device = setup.model, setup.data, setup.device
        self.processes = processes
        self.history: List[Dict[str, float]] = []
        self.answers: Optional[Answers] = None  # of the best epoch
        if cfg.channels_last and not cfg.fsdp:  # what is sharded must be contiguous; the images decide of the kernels
            self.model.to(memory_format=torch.channels_last)
        if cfg.no_fused_attn:
            unfuse_(fused_attentions(self.model))
        lists = record.data
        self.train_batches, self.val_batches = create_loaders(cfg, self.data, record.data_config, lists, processes)
        self.mixup = None
        if cfg.mixes:
            check_cutmix(cfg.cutmix_minmax, record.data_config['input_size'])
            self.mixup = Mixup(
                cfg.mixup,
                cfg.cutmix,
                cfg.cutmix_minmax,
                prob=cfg.mixup_prob,
                switch_prob=cfg.mixup_switch_prob,
                mode=cfg.mixup_mode,
                label_smoothing=cfg.smoothing,
                num_classes=len(record.label_names),
            )
        counts = self.data.counts
        self.task = create_task(cfg, self.model, record.label_names, counts, record.data_config, self.device)
        if cfg.kd_model_name:
            self.record = record.with_teacher(self.task.teacher.sha256)  # pyright: ignore
        if cfg.fsdp:
            shard_(self.model, self.device, processes)
        batches = max(min(cfg.grad_accum_steps, len(self.train_batches)), 1)  # of a step; an epoch may have no more
        self.lr = learning_rate(cfg, self.train_batches.batch_size * batches * processes.count)
        check_min_lr(cfg, self.lr)
        self.optimizer = create_optimizer(cfg, self.task.get_trainable_module(), self.lr)
        self.stepper = Stepper(cfg, self.task, self.optimizer, self.device, record.is_muon_in_float32)
        self.num_updates = self.stepper.updates(len(self.train_batches))
        self.scheduler = create_scheduler(cfg, self.optimizer, self.num_updates)
        self.frozen = Frozen(self.model, cfg.freeze) if cfg.freeze else None
        self.still = still_norms(self.model) if cfg.lora else []
        if cfg.model_ema:
            self.task.setup_ema(decay=cfg.model_ema_decay, use_warmup=cfg.model_ema_warmup)
        if cfg.torchcompile:
            self._compile(cfg.torchcompile)
        # some models have infinite buffers on purpose, as limits
        buffers = [buffer for buffer in self.model.buffers() if are_finite([buffer])]
        self.watched = [*self.model.parameters(), *buffers]
        self.trackers: Optional[Trackers] = None
        self.is_new = False  # whether this call, in this process, began the run

    def begin(self) -> None:
        """Write the record, the first thing, and open the trackers; the first process does this."""
        self.is_new = is_new = not (self.folder / RECORD_NAME).is_file()
        self.processes.begin(self.record.id)
        self.record.write(self.folder)
        try:
            self.trackers = Trackers(self.record, self.folder, is_new)
        except ValueError:
            if is_new:
                (self.folder / RECORD_NAME).unlink(missing_ok=True)
            raise

    def _compile(self, backend: str) -> None:
        try:
            self.task.compile(backend=backend, mode=self.cfg.torchcompile_mode)
            if self.task.has_ema():
                self.task.compile_ema(backend=backend, mode=self.cfg.torchcompile_mode)
        except Exception as error:  # torch raises errors of many kinds for a backend or a mode that it does not know
            mode = f' and mode {self.cfg.torchcompile_mode!r}' if self.cfg.torchcompile_mode else ''
            raise ValueError(
                f'torchcompile: backend {backend!r}{mode} can not be used ({first_sentence(error)}).'
            ) from error

    def train(self) -> Path:
        """Train the epochs that are left, and return the folder of the finished model."""
        cfg, first = self.cfg, self.processes.of_first
        if first(lambda: bool(self.history) and not is_whole(self.folder, self.history)):
            self._tell(self.history[-1])  # a kill came between the checkpoint and this
            self._write_results()
        check = self.data.check if self.processes.is_first else None
        with check if check is not None else nullcontext():
            while not is_over(cfg, self.history):
                epoch = len(self.history)
                start = time.perf_counter()
                # each epoch draws from its own seed, so that a resumed run is the run that was not interrupted; without
                # the 1 it would be that of an image (`_Seeded`)
                random_seed(derived(cfg.seed, epoch, self.processes.rank, 1) % 2**32)
                try:
                    row: Dict[str, Any] = dict(epoch=epoch, train_loss=self._train_epoch(epoch))
                    metrics, answers = self._validate(epoch)
                    first(lambda: check.raise_if_bad() if check is not None else None)
                except Exception:
                    if not self.history and self.is_new:  # a record alone would be nothing to go on with
                        if self.trackers is not None:
                            self.trackers.remove()
                        (self.folder / RECORD_NAME).unlink(missing_ok=True)
                    raise
                row.update(metrics, lr=unscaled_lr(self.optimizer))
                row['seconds'] = round(time.perf_counter() - start, 1)
                self._finish_epoch(row, answers)
        first(self._write_report)
        return self.folder

    def close(self, failed: bool = False) -> None:
        """Let go of what is beside the run."""
        if self.trackers is not None:
            self.trackers.close(failed)

    def _train_epoch(self, epoch: int) -> float:
        self.task.train()
        self._freeze(epoch)
        self.train_batches.set_epoch(epoch)
        if self.mixup is not None:
            self.mixup.mixup_enabled = not self.cfg.mixup_off_epoch or epoch < self.cfg.mixup_off_epoch
        losses = AverageMeter()
        num_updates = epoch * self.num_updates
        plan = self.stepper.plan(len(self.train_batches))
        name = f'epoch {epoch + 1}/{self.cfg.epochs}'
        self.optimizer.zero_grad()
        with self.processes.bar(self.train_batches, name) as bar:
            for (x, target), (share, is_last) in zip(bar, plan):
                x, target = x.to(self.device), target.to(self.device)
                if self.mixup is not None:
                    x, target = self.mixup(x, target)
                if self.cfg.channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                losses.update(self._step(x, target, share, is_last, epoch), len(x))
                bar.set_postfix(loss=f'{losses.avg:.3f}', refresh=False)
                if not is_last:
                    continue
                if self.processes.any(not are_finite(self.watched)):
                    raise self._diverged('the weights became infinite, or no numbers,', epoch)
                num_updates += 1
                self.task.update_ema(step=num_updates)
                if self.scheduler is not None:
                    self.scheduler.step_update(num_updates=num_updates)
        if not losses.count:
            raise ValueError(f'dataset: no batch of {self.cfg.batch_size} images came in epoch {epoch}.')
        if self.processes.count > 1:
            for module in (self.model, self.task.get_trainable_module(ema=True)):
                if module is not None:
                    distribute_bn(module, self.processes.count, reduce=True)
        return self.processes.mean(losses.avg)

    def _step(self, x: torch.Tensor, target: torch.Tensor, share: int, is_last: bool, epoch: int) -> float:
        """Take a batch, and return its loss; gradients of many processes are averaged with the last of a step."""
        with nullcontext() if is_last or self.cfg.fsdp else self.task.no_sync():
            try:
                loss = self.stepper.loss(x, target)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise ValueError(
                    f'torchcompile: {self.cfg.model} can not be compiled here ({first_sentence(error)}).'
                ) from error
            if self.processes.any(not torch.isfinite(loss)):
                own = loss.item()
                whose = '' if not math.isfinite(own) else ' of another process'
                told = own if not whose else 'infinite, or no number,'
                raise self._diverged(f'the loss{whose} became {told}', epoch)
            self.stepper.backward(loss, share, is_last)
        return loss.item()

    def _freeze(self, epoch: int) -> None:
        """Freeze a part, or let it be trained again; and average the gradients of what is trained."""
        is_frozen = self.frozen is not None and epoch < (self.cfg.freeze_epochs or self.cfg.epochs)
        if self.frozen is not None:
            self.frozen.set_(is_frozen)
        for norm in self.still:
            norm.eval()
        module = self.task.get_trainable_module()
        is_shared = isinstance(module, nn.parallel.DistributedDataParallel)
        if self.processes.count > 1 and not self.cfg.fsdp and (not is_shared or epoch == self.cfg.freeze_epochs):
            share_images_(self.task, self.device, self.cfg)

    def _validate(self, epoch: int) -> Tuple[Dict[str, float], Dict[str, Answers]]:
        """Return metrics, those of the averaged weights too ('eval_top1', 'ema_top1'), and answers."""
        models = dict(eval=self.model if self.cfg.fsdp else self.task.get_eval_model())
        if self.task.has_ema():
            models['ema'] = self.task.get_eval_model(ema=True)
        found, answers = {}, {}
        others = (self.record.label_names, self.device, self.stepper.autocast, self.cfg.tta, self.processes)
        for name, model in models.items():
            model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
            metrics, answers[name] = evaluate(model, self.val_batches, *others)
            for metric, value in metrics.items():
                if not math.isfinite(value):
                    raise self._diverged(f'the {metric} on the validation images became {value}', epoch)
                found[f'{name}_{metric}'] = value
        return found, answers

    def _diverged(self, what: str, epoch: int) -> Diverged:
        kept = ''
        if self.history:
            kept = f' {self.folder} keeps the model of epoch {int(self.best.row["epoch"])}, the best one.'
        error = Diverged(f'lr: {what} in epoch {epoch}; lower lr, which is {self.lr:g}, or set clip_grad.{kept}')
        error.is_told = not self.processes.is_first
        return error

    @property
    def best(self) -> Best:
        """The best epoch so far."""
        return best_epoch(self.history, self.cfg.eval_metric)

    def _finish_epoch(self, row: Dict[str, Any], answers: Dict[str, Answers]) -> None:
        """Write an epoch down, and say what came of it."""
        self.history.append(row)
        if self.best.row is row:
            self.answers = answers[self.best.weights]
        state = self._state()
        if self.processes.is_first:
            write_state(self.folder, state)
        self._tell(row)
        self._write_results()
        averaged = f' (averaged weights {row["ema_top1"]:.2f})' if 'ema_top1' in row else ''
        _logger.info(
            'epoch %d: train loss %.3f, validation loss %.3f, top1 %.2f%s, balanced %.2f, %.0f s',
            *(row['epoch'], row['train_loss'], row['eval_loss'], row['eval_top1'], averaged, row['eval_balanced']),
            row['seconds'],
        )

    def _tell(self, row: Dict[str, Any]) -> None:
        if self.trackers is not None:
            self.trackers.log(row)

    def _state(self) -> Dict[str, Any]:
        """Return what the next epoch needs; every process must ask for it."""
        epoch = len(self.history) - 1
        state: Dict[str, Any] = dict(id=self.record.id, history=self.history, epoch=epoch)
        if self.answers is not None:
            state['answers'] = [torch.from_numpy(array) for array in self.answers]
        if self.cfg.fsdp:
            return dict(state, sharded=write_shards(self.folder, epoch, self.model, self.optimizer, self.processes))
        state.update(self.task.get_checkpoint_state(), optimizer=self.optimizer.state_dict())
        if self.task.has_ema():
            state.update(self.task.get_checkpoint_state(ema=True))
        if self.stepper.scaler is not None:
            state['scaler'] = self.stepper.scaler.state_dict()
        return state

    def _kept_state(self) -> Dict[str, Any]:
        """Return the state of the last epoch, its adapters merged, since other programs load it."""
        state = self._state()
        for name, is_averaged in (('state_dict', False), ('state_dict_ema', True)) if self.cfg.lora else ():
            if name in state:
                state[name] = merged(unwrap_model(self.task.get_eval_model(ema=is_averaged))).state_dict()
        return state

    def _write_results(self) -> None:
        """Write the model, if the last epoch is the best one, and then the table of epochs, the last thing."""
        best, cfg = self.best, self.cfg
        if best.row is self.history[-1]:
            model = self._whole_model(best.weights)
            if model is not None:
                remove_report(self.folder)  # of a model that this one replaces
                # what the registry says of its weights is not so of random ones, or of a file's
                if not cfg.pretrained or cfg.pretrained_path or cfg.initial_checkpoint:
                    model.pretrained_cfg = told_of_weights(model.pretrained_cfg, {})  # pyright: ignore
                name = shown(self.folder.resolve().name)
                steps = dict(lr=self.lr, batch_size=self.train_batches.batch_size, processes=self.processes.count)
                card = run_card(self.record, best, model, name, steps)
                save(model, self.folder, self.record.label_names, self.record.data_config, card)
        if self.processes.is_first:
            if cfg.checkpoint_hist:
                metrics = [best_epoch([row], cfg.eval_metric).metric(cfg.eval_metric) for row in self.history]
                metrics = [-metric for metric in metrics] if cfg.eval_metric == 'loss' else metrics
                keep_best(self.folder, self._kept_state(), metrics, cfg.checkpoint_hist, self._architecture)
            write_summary(self.history, self.folder)

    @property
    def _architecture(self) -> str:
        """The model's name in the registry; that of the settings may be a folder's."""
        return unwrap_model(self.model).pretrained_cfg.get('architecture') or self.cfg.model

    def _whole_model(self, weights: str) -> Optional[nn.Module]:
        """Return the model as it is saved: whole, adapters merged; None in all processes but the first."""
        state = state_of(self.model) if self.cfg.fsdp else None
        if not self.processes.is_first:
            return None
        if state is None:
            return merged(unwrap_model(self.task.get_eval_model(ema=weights == 'ema')))
        model = create_finetune_model(without_weights(self.record.cfg), num_classes=len(self.record.label_names))
        model.pretrained_cfg = model.default_cfg = self.model.pretrained_cfg
        nn.Module.load_state_dict(model, state)
        return model

    def _write_report(self) -> None:
        """Write what the best epoch says of the validation images."""
        if self.answers is None:
            return
        val = self.data.val
        images = None
        if hasattr(val, 'indices'):
            images = lambda index: val.dataset[val.indices[index]][0]  # noqa: E731
        names = names_of(self.record.data['validation']) or [
            f'image {i}' for i in range(int(self.answers[0].max()) + 1)
        ]
        note = f'These are the images by which epoch {int(self.best.row["epoch"])} was chosen.'
        for line in write_report(self.folder, self.answers, self.record.label_names, images, names, note):
            _logger.info('%s', line)

    def restore(self, state: Dict[str, Any]) -> None:
        """Go on from the content of a checkpoint; ValueError where it does not fit the recorded run."""
        try:
            if self.cfg.fsdp:
                read_shards(self.folder / state['sharded'], self.model, self.optimizer)
            else:
                for ema in (False, True) if self.task.has_ema() else (False,):
                    suffix = '_ema' if ema else ''
                    model = unwrap_model(self.task.get_eval_model(ema=ema))
                    nn.Module.load_state_dict(model, state[f'state_dict{suffix}'])
                    self.task.load_task_state(state.get(f'task_state{suffix}'), ema=ema)
                self.optimizer.load_state_dict(state['optimizer'])
            if self.stepper.scaler is not None:
                self.stepper.scaler.load_state_dict(state['scaler'])
            self.answers = Answers(*(array.numpy() for array in state['answers'])) if 'answers' in state else None
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f'resume: {CHECKPOINT_NAME} does not fit the model of the run ({on_one_line(error)}).'
            ) from error
        self.history = state['history']
        if self.scheduler is not None:  # it is not restored, since more epochs make another schedule
            self.scheduler.step_update(num_updates=len(self.history) * self.num_updates)
