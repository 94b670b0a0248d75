"""What a comparison is: its arms, images, epochs and measured times, recorded before its first run.

what is asked for -> `make_plan` -> folder/compare.json -> `make_plan` of the next start -> the same plan.
"""

import ast
import dataclasses
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import timm
import torch

from ..checks import on_one_line, plain, some, usable_device
from ..data import data_config, image_mode
from ..measure import as_minutes, as_ms, measure
from ..models.arms import ARMS
from ..models.layers import fused_attentions, unfuse_
from ..weights.checkpoints import checkpoint_files
from ..weights.checksums import sha256
from ..weights.sources import LOCAL, STARTS, local_weights
from ..writing import replacing
from .creation import create_finetune_model, image_size
from .loaders import check_cutmix, check_policy
from .optimisation import (
    OF_SCHEDULES,
    STEP_EPOCHS,
    Stepper,
    are_finite,
    check_new_optimizer,
    create_optimizer,
    create_scheduler,
    fast_kernels,
    needs_muon_in_float32,
)
from .processes import Processes
from .recipes import FOLDER, recipe
from .reserved import check_unseen, num_training, reserve, training_counts
from .runs import current_versions, from_anywhere
from .settings import MIXES, OF_MIXES, FinetuneCfg, idle
from .tasks import create_criterion, create_task
from .verdict import LEAST_SEEDS

_logger = logging.getLogger(__name__)
PLAN_NAME, REPORT_NAME = 'compare.json', 'README.md'
# settings that an arm or a run has of its own, or that would let arms differ in cost or in what they learn from
OWN = (
    *('model', 'model_kwargs', 'pretrained_path', 'initial_checkpoint', 'lr', 'lr_base', 'lr_base_size'),
    *('lr_base_scale', 'seed', 'resume', 'freeze', 'freeze_epochs', 'lora', 'head_loss', 'torchcompile'),
    *('torchcompile_mode', 'kd_model_name', 'kd_distill_type', 'kd_token_distill_type', 'kd_temperature'),
    *('distill_loss_weight', 'task_loss_weight', 'early_stopping', 'checkpoint_hist', 'log_wandb', 'log_tensorboard'),
    *('fsdp', 'sync_bn', 'autotune'),
)
SEEN = ('img_size', 'mean', 'std', 'interpolation', 'crop_pct')  # what an image becomes before an arm sees it
# these change no result, and may change when a comparison goes on
ELSEWHERE = ('output', 'workers', 'no_check', 'validation_batch_size')
RECIPE = str(FOLDER / 'compare.yaml')  # by its path: a file of the user's may have its name
SHORT = 3  # the search for a learning rate takes the epochs divided by this, which the report calls a third
UNEQUAL = 0.1  # part by which an arm's training time may miss what was asked for without a word
ROUNDS, SECONDS = 11, 0.1  # of a measurement, for each arm


@dataclasses.dataclass
class ArmPlan:
    """An arm, and what it was measured to cost."""

    model: str
    model_kwargs: Dict[str, Any]
    parameters: int = 0
    step_seconds: float = 0.0  # a training step of a batch
    latency_seconds: float = 0.0  # one image, in evaluation
    epochs: int = 0
    search_epochs: int = 0
    input_size: List[int] = dataclasses.field(default_factory=list)  # (C, H, W); empty where it was not noted yet
    sha256: str = ''  # of the weights in a folder of this machine that it begins with

    def cfg(self, recipe: FinetuneCfg) -> FinetuneCfg:
        """Return the recipe with this arm's model."""
        return dataclasses.replace(recipe, model=self.model, model_kwargs=self.model_kwargs)

    def note_weights_(self, name: str) -> None:
        """Note the weights that a folder gives to every run of this arm; ValueError where they are others now."""
        if not self.model.startswith(LOCAL):
            return
        files = checkpoint_files(local_weights(self.model.removeprefix(LOCAL)))
        found = ' '.join(map(sha256, files))
        if self.sha256 not in ('', found):
            raise ValueError(
                f'models: {name} has other weights than when the comparison began; put these back, or begin another.'
            )
        self.sha256 = found

    def facts(self) -> Dict[str, str]:
        """Return what was measured of the arm, as a row has it."""
        times = dict(step_ms=self.step_seconds, latency_ms=self.latency_seconds)
        return dict(parameters=str(self.parameters), **{name: f'{1000 * value:.4g}' for name, value in times.items()})


@dataclasses.dataclass
class Plan:
    """A comparison before its first run."""

    asked: Dict[str, Any]  # the result of `asked_for`
    images: Dict[str, Any]  # the result of `reserve`
    arms: Dict[str, ArmPlan]
    versions: Dict[str, str]
    machine: str
    batches: int = 0  # steps of an epoch; 0 where it was begun before this was noted
    looks: int = 0  # verdicts that were read before seeds were added

    @property
    def seeds(self) -> List[int]:
        """The seeds of training."""
        return self.asked['seeds']

    @property
    def lrs(self) -> List[float]:
        """The learning rates to choose from."""
        return self.asked['lrs']


def seen_alike(cfg: FinetuneCfg, models: Sequence[str]) -> FinetuneCfg:
    """Return a recipe with sizes and colours of images for all arms, where it leaves them to models that differ."""
    if cfg.pretrained or not any(model in ARMS for model in models):  # weights have a normalisation of their own
        return cfg
    shared = {name: value for name, value in recipe(RECIPE).items() if name in SEEN}
    return dataclasses.replace(cfg, **{name: value for name, value in shared.items() if getattr(cfg, name) is None})


def in_proportion(cfg: FinetuneCfg, epochs: int, most: int) -> FinetuneCfg:
    """Return a recipe for fewer epochs, of which its schedule takes the same parts as of the most of all arms."""
    if epochs == most:
        return cfg
    part = epochs / most
    changed: Dict[str, Any] = dict(warmup_epochs=cfg.warmup_epochs * part)
    if cfg.sched in OF_SCHEDULES['decay_milestones']:
        changed['decay_milestones'] = tuple(sorted({max(round(epoch * part), 1) for epoch in cfg.decay_milestones}))
    decay_epochs = cfg.decay_epochs if cfg.sched in OF_SCHEDULES['decay_epochs'] else None
    if cfg.sched == 'step':
        changed['decay_epochs'] = (decay_epochs or STEP_EPOCHS) * part
    elif decay_epochs is not None and decay_epochs >= 1:  # below, it is a part of all epochs already
        own = decay_epochs * part
        changed['decay_epochs'] = own if own >= 1 else decay_epochs / most
    if cfg.mixup_off_epoch:
        changed['mixup_off_epoch'] = max(round(cfg.mixup_off_epoch * part), 1)
    return dataclasses.replace(cfg, **changed)


def asked_for(
    cfg: FinetuneCfg,
    models: Sequence[str],
    seeds: Sequence[int],
    lrs: Sequence[float],
    minutes: Optional[float],
    test_split: str,
    test_frac: float,
) -> Dict[str, Any]:
    """Return what a comparison is asked for, as plain values; ValueError for what makes none."""
    for name in OWN:
        if getattr(cfg, name) != getattr(type(cfg), name):
            raise ValueError(
                f'{name}: got {getattr(cfg, name)!r}, but in a comparison an arm or a run has its own; leave it out.'
            )
    names = dict(models=[single(model) for model in models], seeds=seeds, lrs=[f'{lr:g}' for lr in lrs])
    for name, values in names.items():  # runs have these in the names of their folders
        twice = [value for value in values if list(values).count(value) > 1]
        if twice:
            raise ValueError(f'{name}: got {twice[0]} twice, expected each once.')
    if len(models) < 2:
        raise ValueError(f'models: got {models[0]!r} alone, expected two or more to compare.')
    for lr in lrs:
        if cfg.min_lr > lr:
            raise ValueError(f'min_lr: got {cfg.min_lr:g}, expected at most the least of lrs, which is {lr:g}.')
    recipe = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in (*OWN, *ELSEWHERE)}
    if minutes is not None:
        del recipe['epochs']
    if cfg.data_dir:
        recipe['data_dir'] = os.path.abspath(cfg.data_dir)
    recipe['class_map'] = from_anywhere('class_map', cfg.class_map)
    asked = dict(models=list(models), seeds=list(seeds), lrs=list(lrs), minutes=minutes)
    asked.update(test_split=test_split, test_frac=test_frac, recipe=plain('recipe', recipe))
    return json.loads(json.dumps(asked))


def single(name: str) -> str:
    """Return an arm's name as a part of a file's name."""
    return re.sub(r'[^\w.=-]+', '_', name)


def parse_arm(text: str, img_size: int) -> ArmPlan:
    """Return the model that the name of an arm, or of a timm model with arguments, means; ValueError for no name.

    Args:
        img_size: Pixels a side of the images, which arms are made for.
    """
    if text in ARMS:
        return ArmPlan(ARMS[text].model, ARMS[text].model_kwargs(img_size))
    if text.startswith(STARTS):
        return ArmPlan(from_anywhere('model', text), {})
    name, _, arguments = text.partition(':')
    if not timm.is_model(name.partition('.')[0]):
        raise ValueError(f'models: got {text!r}, expected an arm ({", ".join(ARMS)}) or the name of a timm model.')
    try:
        call = ast.parse(f'f({arguments})', mode='eval').body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        kwargs = {str(word.arg): _value(word.value) for word in call.keywords}
        if len(kwargs) < len(call.keywords) or not all(map(str.isidentifier, kwargs)) or 'None' in kwargs:
            raise ValueError
        return ArmPlan(name, kwargs)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f'models: got {text!r}, expected arguments as in {name}:name=value,name=value.') from None


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else plain('models', ast.literal_eval(node))


def make_plan(cfg: FinetuneCfg, asked: Dict[str, Any], folder: Path) -> Plan:
    """Return the plan in a folder, or make one, and write it down.

    Raises:
        ValueError: where the folder has the plan of another comparison; seeds alone may be added.
    """
    path = folder / PLAN_NAME
    if path.is_file():
        plan = _read(path)
        _check_same(plan.asked, asked, folder)
        noted = [arm.sha256 for arm in plan.arms.values()]
        for name, arm in plan.arms.items() if cfg.pretrained else ():
            arm.note_weights_(name)
        if noted != [arm.sha256 for arm in plan.arms.values()]:  # it began before weights were noted
            _write(plan, path)
        if plan.asked != asked:
            # a report of fewer seeds calls nothing better, so that nobody stops there because of what it says
            adds_seeds = plan.seeds != asked['seeds']
            was_read = len(plan.seeds) >= LEAST_SEEDS and path.with_name(REPORT_NAME).is_file()
            plan.looks += was_read and adds_seeds
            plan.asked = asked
            _write(plan, path)
            if adds_seeds:
                path.with_name(REPORT_NAME).unlink(missing_ok=True)  # it is of the seeds before, and read once
        _logger.info('The comparison in %s goes on.', folder)
        return plan
    usable_device(Processes().device(cfg.device))
    check_new_optimizer(cfg)
    side = min(image_size(cfg.img_size or recipe(RECIPE)['img_size']))
    arms = {name: parse_arm(name, side) for name in asked['models']}
    mode = image_mode(cfg.in_chans or 3)
    check_policy(cfg.aa, mode)
    if cfg.img_size is not None:
        check_cutmix(cfg.cutmix_minmax, image_size(cfg.img_size))
    if asked['minutes'] is None:  # what no number of updates mends is refused before images are opened
        _check_schedules(cfg, {cfg.epochs, _short(cfg.epochs)}, 1000)
    images = reserve(cfg, mode, asked['test_split'], asked['test_frac'])
    batches = max(num_training(images, cfg.val_frac, asked['seeds'][0]) // cfg.batch_size, 1)
    updates = -(-batches // cfg.grad_accum_steps)
    if asked['minutes'] is None:
        _check_schedules(cfg, {cfg.epochs, _short(cfg.epochs)}, updates)
    for name, arm in arms.items() if cfg.pretrained else ():
        check_unseen(cfg, arm.model, images)
        arm.note_weights_(name)
    _logger.info('%s.', images['description'])
    create_criterion(cfg, training_counts(images, cfg.val_frac, asked['seeds'][0]))  # whose error would come too late
    measure_arms_(cfg, arms, len(images['label_names']))
    for arm in arms.values():
        if arm.input_size:
            check_cutmix(cfg.cutmix_minmax, arm.input_size)
    for name, arm in arms.items():
        arm.epochs = cfg.epochs
        if asked['minutes'] is not None:
            epoch = batches * arm.step_seconds
            if 60 * asked['minutes'] < epoch:
                own = as_minutes(epoch)
                raise ValueError(
                    f'minutes: got {asked["minutes"]:g}, but an epoch of {name} takes {own} here; give more.'
                )
            arm.epochs = round(60 * asked['minutes'] / epoch)  # down alone would be against the slower arms
            seconds = arm.epochs * epoch
            if abs(seconds / 60 / asked['minutes'] - 1) > UNEQUAL:
                told = name, as_minutes(seconds)
                _logger.warning('minutes: %s gets %s, since epochs are whole; give more for equal times.', *told)
        arm.search_epochs = _short(arm.epochs)
    if asked['minutes'] is not None:
        _check_schedules(cfg, {epochs for arm in arms.values() for epochs in (arm.epochs, arm.search_epochs)}, updates)
    device = Processes().device(cfg.device)
    threads = torch.get_num_threads()
    machine = f'{threads} thread{"s" * (threads > 1)} of the CPU' if device == 'cpu' else device
    plan = Plan(asked, images, arms, current_versions(), machine, batches)
    searches = len(plan.lrs) if len(plan.lrs) > 1 else 0
    seconds = sum(
        batches * arm.step_seconds * (len(plan.seeds) * arm.epochs + searches * arm.search_epochs)
        for arm in arms.values()
    )
    _logger.info(
        '%d runs, and %d short ones that choose learning rates: about %s minutes of training steps here.',
        *(len(plan.seeds) * len(arms), searches * len(arms), as_minutes(seconds)),
    )
    _write(plan, path)
    return plan


def _short(epochs: int) -> int:
    """Return how many epochs the search for a learning rate takes."""
    return max(round(epochs / SHORT), 1)


def _check_schedules(cfg: FinetuneCfg, lengths: Set[int], updates: int) -> None:
    """Raise ValueError where runs of some numbers of epochs are too short for the schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.lr)
    for epochs in sorted(lengths):
        own = dataclasses.replace(in_proportion(cfg, epochs, max(lengths)), epochs=epochs)
        create_scheduler(own, optimizer, updates)


def note_versions(plan: Plan, folder: Path) -> None:
    """Write down and tell of versions with which a run is made, where the runs before were made with others."""
    noted = dict(plan.versions)
    for name, version in current_versions().items():
        if noted.get(name, '').split(' and ')[-1] != version:
            _logger.warning('The comparison was begun with %s %s, and goes on with %s.', name, noted.get(name), version)
            plan.versions[name] = f'{noted.get(name)} and {version}'
    if plan.versions != noted:
        _write(plan, folder / PLAN_NAME)


def measure_arms_(cfg: FinetuneCfg, arms: Dict[str, ArmPlan], num_classes: int) -> None:
    """Count the parameters of all arms, and measure their times on this machine; they take turns.

    A training step is that of a run: forward, loss, backward, optimizer, for `cfg.batch_size` images.
    """
    device = torch.device(Processes().device(cfg.device))
    models, steps, views = [], {}, {}
    for name, arm in arms.items():
        own = dataclasses.replace(arm.cfg(cfg), balance_classes=False)
        try:
            model = create_finetune_model(own, num_classes)
            size = image_size(cfg.img_size) if cfg.img_size is not None else None
            shape = data_config(model, img_size=size, mean=cfg.mean, std=cfg.std)['input_size']
            arm.input_size = list(shape)
            arm.parameters = sum(parameter.numel() for parameter in model.parameters())
            steps[name], views[name] = _functions(own, model, shape, num_classes, device)
            steps[name](None)
            models.append(model)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise ValueError(f'models: {name} can not be trained here: {on_one_line(error)}') from error
    nothing = torch.zeros(1, device=device)  # each arm has images of its own size
    with fast_kernels():  # by which runs train
        for name, seconds in measure(steps, nothing, ROUNDS, SECONDS).items():
            arms[name].step_seconds = seconds / cfg.grad_accum_steps
    for model in models:
        model.eval()
    for name, seconds in measure(views, nothing, ROUNDS, SECONDS).items():
        arms[name].latency_seconds = seconds
    for name, arm in arms.items():
        times = as_ms(arm.step_seconds), as_ms(arm.latency_seconds)
        _logger.info('%s: %.3gM parameters, a training step %s, an image %s', name, arm.parameters / 1e6, *times)


def _functions(
    cfg: FinetuneCfg, model: torch.nn.Module, shape: Tuple[int, ...], num_classes: int, device: torch.device
) -> Tuple[Any, Any]:
    """Return functions for a training step, of `cfg.grad_accum_steps` batches, for which the model is ready, and for an
    image, for which it must be set to evaluation; both ignore what they are called with.
    """
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    if cfg.no_fused_attn:
        unfuse_(fused_attentions(model))
    x = torch.randn(cfg.batch_size, *shape, device=device).contiguous(memory_format=layout)
    target = torch.randint(num_classes, (cfg.batch_size,), device=device)
    unmixed = {name: getattr(FinetuneCfg, name) for name in (*MIXES, *OF_MIXES)}
    plain_loss = dataclasses.replace(cfg, model_kwargs=None, **unmixed)
    task = create_task(plain_loss, model, [str(i) for i in range(num_classes)], None, {}, device)
    optimizer = create_optimizer(cfg, task.get_trainable_module(), 1e-6)
    stepper = Stepper(cfg, task, optimizer, device, needs_muon_in_float32(cfg, device))

    if cfg.model_ema:
        task.setup_ema(decay=cfg.model_ema_decay, use_warmup=cfg.model_ema_warmup)
    task.train()
    tensors = [*model.parameters(), *model.buffers()]

    def step(_: Any) -> None:
        for share, is_last in stepper.plan(cfg.grad_accum_steps):
            stepper.backward(stepper.loss(x, target), share, is_last)
        are_finite(tensors)  # as a run asks after every step
        if cfg.model_ema:
            task.update_ema(step=1)

    def view(_: Any) -> None:
        with torch.inference_mode():
            model(x[:1])

    return step, view


def _check_same(before: Dict[str, Any], now: Dict[str, Any], folder: Path) -> None:
    """Raise ValueError, naming what differs, where a comparison was begun with other arguments."""
    old, new = ({**asked, **asked['recipe']} for asked in (before, now))
    for asked in (old, new):
        del asked['recipe']
    if isinstance(old.get('img_size'), list) and len(old['img_size']) == 1:  # as it was noted once
        old['img_size'] = old['img_size'][0]
    old.update({name: new.get(name) for name in (*idle(old), *ELSEWHERE)})  # older versions took, and noted, such
    for field in dataclasses.fields(FinetuneCfg):
        if field.name in new and field.name != 'epochs':  # one that is younger than the comparison was at its default
            old.setdefault(field.name, json.loads(json.dumps(field.default)))
    if old['seeds'] != new['seeds'] and new['seeds'][: len(old['seeds'])] == old['seeds']:
        old['seeds'] = new['seeds']
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        told = some((f'{name}: got {new.get(name)!r}, not {old.get(name)!r}' for name in changed), between='; ')
        raise ValueError(
            f'{told}. The comparison in {folder} was begun otherwise; only seeds may be added at their end. Name '
            'another output for another comparison.'
        )


def _write(plan: Plan, path: Path) -> None:
    with replacing(path) as beside:
        lines = [f'{json.dumps(name)}: {json.dumps(value)}' for name, value in dataclasses.asdict(plan).items()]
        beside.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')


def _read(path: Path) -> Plan:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        arms = {
            name: ArmPlan(**{**arm, 'model_kwargs': plain('arms', arm['model_kwargs'])})
            for name, arm in content.pop('arms').items()
        }
        return Plan(arms=arms, **content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'output: {path} is not the plan of a comparison ({on_one_line(error)}).') from error
