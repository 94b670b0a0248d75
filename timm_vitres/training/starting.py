"""The start of a run: its folder, device, images, model and record; what can be wrong with settings is found here."""

import dataclasses
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Tuple

import torch
from timm.utils import random_seed
from torch import nn

from ..checks import on_one_line, plain, some, usable_device
from ..data import data_config, image_mode
from ..measure import fastest_training
from ..weights.files import CONFIG_NAME, WEIGHTS_NAME
from .creation import create_finetune_model, image_size, input_args, tell_of_random_weights, without_weights
from .datasets import Data, load_data
from .held_out import TABLE_NAME
from .loaders import check_policy
from .optimisation import (
    OF_SCHEDULES,
    check_min_lr,
    check_new_optimizer,
    check_optimizer,
    lacks_bfloat16,
    needs_muon_in_float32,
)
from .processes import Processes
from .report import best_epoch, read_summary
from .runs import RECORD_NAME, Record, run_folder
from .settings import FinetuneCfg
from .sharding import check_processes, synchronised
from .states import read_state
from .trackers import check_trackers

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Start:
    """What the first process tells the others."""

    folder: Path
    record: Any = None
    state: Optional[Dict[str, Any]] = None
    is_finished: bool = False


class Setup:
    """The model, the images and the device of a run; what can be wrong with the settings is found here."""

    cfg: FinetuneCfg  # those of the run, as its processes share them out
    model: nn.Module
    data: Data
    device: torch.device

    def __init__(self, processes: Processes):
        self.processes = processes

    def begin(
        self, cfg: FinetuneCfg, given: Collection[str], stack: ExitStack, images: Optional[Dict[str, Any]] = None
    ) -> Start:
        """Hold the run's folder until the stack ends, and return what the run is; the first process does this.

        Args:
            images: Those of a new run, as `Data.record` says them, where the settings shall not choose.
        """
        if not cfg.resume and self.processes.began(Path(cfg.output) / RECORD_NAME):
            cfg = dataclasses.replace(cfg, resume=True)
        folder = stack.enter_context(run_folder(cfg, given))
        if not cfg.resume:
            return Start(folder, self.build(cfg, images=images))
        began = Record.read(folder)
        record = began.resumed(cfg, given)
        state = read_state(folder, record, has_model=(folder / WEIGHTS_NAME).exists())
        if state is not None and is_over(record.cfg, state['history']) and is_whole(folder, state['history'], True):
            epochs = len(state['history'])
            how = f'all of its {epochs} epochs are trained'
            if epochs < record.cfg.epochs:
                how = f'it ended early, after {epochs} epochs'
                if record.cfg.epochs > began.cfg.epochs:
                    patience = record.cfg.early_stopping
                    raise ValueError(f'epochs: {how}, by early_stopping={patience}; give a larger one, too.')
            _logger.info('The run in %s is finished: %s.', folder, how)
            return Start(folder, is_finished=True)
        return Start(folder, self.build(record.cfg, record, state), state)

    def build(
        self,
        cfg: FinetuneCfg,
        record: Optional[Record] = None,
        state: Optional[Dict[str, Any]] = None,
        images: Optional[Dict[str, Any]] = None,
    ) -> Record:
        """Make what the run needs, and return its record, which is new unless one is given."""
        self.device = usable_device(self.processes.device(cfg.device))
        check_processes(cfg, self.device, self.processes)
        (check_new_optimizer if record is None else check_optimizer)(cfg)
        if cfg.lr_base is None:  # otherwise the number of images in a step decides, which is not known yet
            check_min_lr(cfg, cfg.lr)
        _tell_of_bfloat16(cfg, self.device)
        check_trackers(cfg)
        if self.processes.is_first:
            _tell_of_idle(cfg)
        mode = _check_images(cfg)
        if mode != 'RGB' and cfg.grayscale_prob and self.processes.is_first:
            _logger.warning('grayscale_prob: got %g, but only images of 3 channels are made grey.', cfg.grayscale_prob)
        if record is not None:
            self.cfg = cfg = _shared_out(record, self.processes)
        self.data = _load(cfg, mode, images if record is None else record.data, self.processes)
        random_seed(cfg.seed)
        if state is not None:
            cfg = without_weights(cfg)
        self.model = create_finetune_model(cfg, len(self.data.label_names), self.data.label_names).to(self.device)
        if record is None:
            if self.processes.is_first:
                tell_of_random_weights(cfg)
            record = self._record(cfg)
            self.cfg = record.trained_cfg
            check_processes(self.cfg, self.device, self.processes)  # autotune may have switched something on
        # not before, since the first process measures alone, and such BatchNorms wait for the others
        self.model = synchronised(self.model, cfg, self.processes)
        return record

    def _record(self, cfg: FinetuneCfg) -> Record:
        size = image_size(cfg.img_size) if cfg.img_size is not None else None
        asked = dict(img_size=size, mean=cfg.mean, std=cfg.std, interpolation=cfg.interpolation, crop_pct=cfg.crop_pct)
        config = plain('data_config', data_config(self.model, **asked))
        # the model's own data config must keep to the limits of settings, or validation would fail after an epoch
        dataclasses.replace(cfg, **{name: config[name] for name in ('mean', 'std', 'interpolation', 'crop_pct')})
        _check_forward(self.model, cfg.model, config['input_size'], self.device)
        autotuned = None
        if cfg.autotune:
            shape = (cfg.batch_size, *config['input_size'])
            with torch.random.fork_rng():  # a run that is given these settings by name draws the same numbers
                autotuned, times = fastest_training(self.model, len(self.data.label_names), shape, cfg.amp_dtype)
            _logger.info('autotune: %s; training with %s.', times, autotuned)
        in_float32 = needs_muon_in_float32(cfg, self.device)
        return Record(cfg, self.data.record(), config, autotuned, self.processes.count, in_float32)


def _load(cfg: FinetuneCfg, mode: str, recorded: Optional[Dict[str, Any]], processes: Processes) -> Data:
    if not processes.is_first:  # the first process has looked at the images
        cfg = dataclasses.replace(cfg, no_check=True)
    # one process of a machine looks whether it has all of them
    data = load_data(cfg, mode, recorded, looks=processes.is_first or processes.local_rank == 0)
    for text in data.skipped:
        _logger.warning('left out: %s', text)
    if recorded is None and processes.is_first:
        _logger.info('%s.', data.description)
    return data


def _check_images(cfg: FinetuneCfg) -> str:
    """Return PIL's mode of the images that the model takes; ValueError for settings that do not fit it."""
    given = {} if cfg.in_chans is None else {'in_chans': cfg.in_chans}
    kwargs = input_args(cfg.model, **{**given, **(cfg.model_kwargs or {})})
    in_chans = kwargs.get('in_chans') or kwargs['pretrained_cfg']['input_size'][0]
    mode = image_mode(in_chans)
    check_policy(cfg.aa, mode)
    for name, values in (('mean', cfg.mean), ('std', cfg.std)):
        if values is not None and len(values) not in (1, in_chans):
            raise ValueError(f'{name}: got {values}, expected one number, or one for each of {in_chans} channels.')
    return mode


def _check_forward(model: nn.Module, name: str, input_size: Tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError for a model that takes no images of the run's size: timm has some, which find it in an image;
    and for one that computes past its adapters.
    """
    was_training = model.training
    idle = {layer: path for path, layer in model.named_modules() if hasattr(layer, 'lora_A')}

    def called(layer: nn.Module, _: Any) -> None:
        idle.pop(layer, None)

    hooks = [layer.register_forward_pre_hook(called) for layer in idle]
    try:
        with torch.no_grad():  # not inference_mode: what a model keeps of it may be used in training
            model.eval()(torch.zeros(1, *input_size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        height, width = input_size[-2:]
        raise ValueError(
            f'img_size: {name} takes no images of {height} x {width} pixels ({on_one_line(error)}).'
        ) from error
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if idle:  # as attention does that takes a weight, and not its layer
        raise ValueError(
            f'lora: {name} computes past {some(idle.values())}, whose adapters would learn nothing; leave lora out, or '
            'take another model.'
        )


def _tell_of_bfloat16(cfg: FinetuneCfg, device: torch.device) -> None:
    """Warn of mixed precision in bfloat16 on a CPU or GPU that has no instructions for it."""
    if cfg.amp and cfg.amp_dtype == 'bfloat16' and lacks_bfloat16(device):
        _logger.warning(
            'amp: mixed precision computes in bfloat16, which this %s has no instructions for; that is several times '
            'slower here than float32%s.',
            *(('GPU', ', and so than --amp-dtype float16') if device.type == 'cuda' else ('CPU', '')),
        )


def _tell_of_idle(cfg: FinetuneCfg) -> None:
    """Warn of settings that change nothing beside others. timm takes them, and its recipes have them."""
    beside = {name: f'sched {cfg.sched}' for name, scheds in OF_SCHEDULES.items() if cfg.sched not in scheds}
    if cfg.aa and '3a' not in cfg.aa:  # timm leaves colours to a policy
        beside.update(dict.fromkeys(('color_jitter', 'color_jitter_prob'), f'aa {cfg.aa}'))
    if not (cfg.amp or cfg.autotune):
        beside['amp_dtype'] = 'float32, without amp'
    for name, other in beside.items():
        if getattr(cfg, name) != getattr(FinetuneCfg, name):
            _logger.warning('%s: got %s, which changes nothing beside %s.', name, getattr(cfg, name), other)


def is_over(cfg: FinetuneCfg, history: List[Dict[str, float]]) -> bool:
    """Return whether all epochs are trained, or, with early stopping, enough of them were no better than the best."""
    if len(history) >= cfg.epochs:
        return True
    if not history or cfg.early_stopping is None:
        return False
    return len(history) - 1 - best_epoch(history, cfg.eval_metric).row['epoch'] >= cfg.early_stopping


def is_whole(folder: Path, history: List[Dict[str, float]], is_over: bool = False) -> bool:
    """Return whether all that follows the last checkpoint was written; the table of epochs is written last."""
    files = [folder / WEIGHTS_NAME, folder / CONFIG_NAME, *([folder / TABLE_NAME] if is_over else [])]
    return len(read_summary(folder)) == len(history) and all(path.is_file() for path in files)


def _shared_out(record: Record, processes: Processes) -> FinetuneCfg:
    """Return a run's settings, with steps of as many images as it began with, if its processes can share them."""
    cfg, images = record.trained_cfg, record.trained_cfg.batch_size * record.processes
    if processes.count == record.processes:
        return cfg
    told = f'resume: the run was started with {record.processes} processes, and goes on with {processes.count}'
    if images % processes.count or (cfg.mixes and images // processes.count % 2):
        _logger.warning('%s; its steps are of %d images now.', told, cfg.batch_size * processes.count)
        return cfg
    _logger.warning('%s, each with %d images a step.', told, images // processes.count)
    return dataclasses.replace(cfg, batch_size=images // processes.count)
