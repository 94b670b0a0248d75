"""Optimizer, schedule and steps of a run, on timm.optim and timm.scheduler."""

import logging
import math
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, muon
from timm.scheduler import create_scheduler_v2
from timm.task.task import TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad, unwrap_model
from torch import nn
from torch.nn.utils import get_total_norm

from ..inference.lowering import each
from .creation import BATCH_NORMS, head_parameters
from .settings import SCHEDULES, FinetuneCfg

_logger = logging.getLogger(__name__)
OF_SCHEDULES: Dict[str, Sequence[str]] = dict(  # which of timm's schedules take a setting
    decay_epochs=('step', 'wsd', 'rsqrt'),
    decay_milestones=('multistep',),
    decay_rate=('step', 'multistep', 'poly'),
    min_lr=('cosine', 'tanh', 'poly', 'wsd', 'rsqrt'),
    **dict.fromkeys(('warmup_epochs', 'warmup_lr'), tuple(name for name in SCHEDULES if name != 'none')),
)
STEP_EPOCHS = 90.0  # after so many the rate falls by timm's schedule 'step', unless told otherwise


def check_optimizer(cfg: FinetuneCfg) -> None:
    """Raise ValueError for an optimizer that timm does not know, that a run can't serve, or that lacks what is set."""
    opt = cfg.opt
    try:
        info = get_optimizer_info(opt.rpartition('_')[2])
    except ValueError:
        raise ValueError(f'opt: timm has no optimizer {opt!r}; timm.optim.list_optimizers() names them.') from None
    if info.second_order:
        raise ValueError(f'opt: {opt!r} needs second derivatives, which a run does not compute; use another.')
    for name, is_there in (('opt_betas', info.has_betas), ('opt_eps', info.has_eps)):
        if getattr(cfg, name) is not None and not is_there:
            raise ValueError(f'{name}: got {getattr(cfg, name)}, but {opt} has none; leave it out.')
    if cfg.opt_betas is not None and len(cfg.opt_betas) != info.num_betas:
        raise ValueError(f'opt_betas: got {cfg.opt_betas}, but {opt} has {info.num_betas}.')


def check_new_optimizer(cfg: FinetuneCfg) -> None:
    """Check the optimizer of a run that begins: raise ValueError for what `check_optimizer` does, and for a setting in
    `opt_kwargs` that has a name of its own, which older runs have.
    """
    check_optimizer(cfg)
    for name in ('lr', 'weight_decay', 'layer_decay', 'momentum', 'eps', 'betas'):
        if name in (cfg.opt_kwargs or {}):
            own = f'opt_{name}' if name in ('eps', 'betas') else name
            raise ValueError(f'opt_kwargs: {name} has a setting of its own, {own}; leave it out.')


def learning_rate(cfg: FinetuneCfg, num_images: int) -> float:
    """Return the learning rate of a run whose steps are of so many images, as timm's train.py scales it."""
    if cfg.lr_base is None:
        return cfg.lr
    ratio = num_images / cfg.lr_base_size
    scale = cfg.lr_base_scale or ('sqrt' if any(name in cfg.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    return cfg.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def check_min_lr(cfg: FinetuneCfg, lr: float) -> None:
    """Raise ValueError where a run's schedule would end above the learning rate that it begins with."""
    if cfg.min_lr > lr:
        raise ValueError(f'min_lr: got {cfg.min_lr:g}, expected at most the learning rate, which is {lr:g}.')


def create_optimizer(cfg: FinetuneCfg, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer of a run's trainable module; ValueError for what it does not take."""
    options = dict(
        lr=lr,
        weight_decay=cfg.weight_decay,
        layer_decay=cfg.layer_decay,
        momentum=cfg.momentum,
        eps=cfg.opt_eps,
        betas=cfg.opt_betas,
    )
    options = {name: value for name, value in options.items() if value is not None}
    if 'kron' in cfg.opt.lower():  # it draws numbers, which all processes must have in common
        options['deterministic'] = True
    try:
        return create_optimizer_v2(module, opt=cfg.opt, **{**options, **(cfg.opt_kwargs or {})})
    except Exception as error:  # optimizers may need a package, a GPU, or other arguments
        given = [name for name in ('opt_kwargs', 'opt_betas', 'opt_eps') if getattr(cfg, name)]
        also = f' with {", ".join(f"{name} {getattr(cfg, name)}" for name in given)}' if given else ''
        raise ValueError(f'opt: {cfg.opt!r} can not be used here{also} ({error}).') from error


def create_scheduler(cfg: FinetuneCfg, optimizer: torch.optim.Optimizer, num_updates: int) -> Any:
    """Return the schedule of a run of so many updates an epoch; None for no schedule."""
    if cfg.sched == 'none':
        for group in optimizer.param_groups:  # schedules of timm's apply what layer_decay has noted
            group['lr'] *= group.get('lr_scale', 1.0)
    decays = dict(step=cfg.decay_epochs or STEP_EPOCHS, multistep=min(cfg.decay_milestones, default=None))
    first = decays.get(cfg.sched)
    if first is not None and first >= cfg.epochs:
        _logger.warning('sched: %r changes nothing before epoch %g, and the run has %d.', cfg.sched, first, cfg.epochs)
    if cfg.sched == 'rsqrt' and not cfg.warmup_epochs:
        raise ValueError("sched: 'rsqrt' falls from the length of the warm-up on; set warmup_epochs above 0.")
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=cfg.sched,
            num_epochs=cfg.epochs,
            warmup_epochs=min(cfg.warmup_epochs, cfg.epochs / 2),
            # factors of layer_decay are in no rate yet
            warmup_lr=min(cfg.warmup_lr, *(group['lr'] for group in optimizer.param_groups)),
            min_lr=cfg.min_lr,
            decay_epochs=cfg.decay_epochs,
            decay_milestones=list(cfg.decay_milestones),
            decay_rate=cfg.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=num_updates,
        )
    except (ValueError, AssertionError) as error:
        reason = str(error).rstrip('.')
        raise ValueError(f'sched: {cfg.sched!r} can not be used for {cfg.epochs} epochs ({reason}).') from error
    return scheduler


def unscaled_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of now, without the factors that layer_decay gives to groups of parameters."""
    return max(group['lr'] / (group.get('lr_scale') or 1.0) for group in optimizer.param_groups)


def lacks_bfloat16(device: torch.device) -> bool:
    """Return whether a CPU or GPU has no instructions for bfloat16, and so computes in it many times slower."""
    if device.type == 'cuda':
        with torch.cuda.device(device):
            return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2'


def needs_muon_in_float32(cfg: FinetuneCfg, device: torch.device) -> bool:
    """Return whether a run that begins on a device shall orthogonalise in float32 what timm does in bfloat16."""
    return 'muon' in cfg.opt.lower() and lacks_bfloat16(device)


@contextmanager
def _muon_in_float32() -> Iterator[None]:
    """Let timm's Muon orthogonalise in float32; it has no argument for it, and takes bfloat16."""
    orthogonalise = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(orthogonalise, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = orthogonalise


@contextmanager
def fast_kernels() -> Iterator[None]:
    """Let GPUs multiply in TensorFloat32 for float32, and choose convolutions by measurement, as train.py does."""
    matmul, cudnn, changed = torch.backends.cuda.matmul, torch.backends.cudnn, []
    for backend, name in ((matmul, 'allow_tf32'), (cudnn, 'benchmark')):
        with suppress(RuntimeError):  # a program has chosen by torch's newer setting
            changed.append((backend, name, getattr(backend, name)))
            setattr(backend, name, True)
    try:
        yield
    finally:
        for backend, name, before in changed:
            with suppress(RuntimeError):
                setattr(backend, name, before)


def _in_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return what a model returns, a tensor or a tuple of them, in float32."""
    return each(torch.Tensor.float, output)


class Stepper:
    """Gradients of batches, added up, clipped, and taken as steps."""

    def __init__(
        self,
        cfg: FinetuneCfg,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        is_muon_in_float32: bool,
    ):
        self.cfg = cfg
        self.task = task
        self.optimizer = optimizer
        dtype = torch.bfloat16 if cfg.amp_dtype == 'bfloat16' else torch.float16
        self.autocast = (lambda: torch.autocast(device.type, dtype)) if cfg.amp else nullcontext
        self.scaler = NativeScaler(device.type) if cfg.amp and cfg.amp_dtype == 'float16' else None
        self.stepping = _muon_in_float32 if is_muon_in_float32 else nullcontext
        module = unwrap_model(task.get_trainable_module())
        if cfg.amp:  # autocast on CPUs leaves log_softmax in the lower precision, where that on GPUs does not
            module.register_forward_hook(_in_float32)
        module = getattr(module, 'student', module)  # of a task that has a projection beside it
        layers = module.modules() if cfg.grad_checkpointing else ()
        self.checkpointed = [layer for layer in layers if isinstance(layer, BATCH_NORMS)]
        # timm knows of one head, the last two parameters of a model
        self.heads = {id(value) for value in head_parameters(module)} if hasattr(module, 'get_classifier') else set()

    def updates(self, num_batches: int) -> int:
        """Return how many steps so many batches make; the last one may be of fewer."""
        return -(-num_batches // self.cfg.grad_accum_steps)

    def plan(self, num_batches: int) -> List[Tuple[int, bool]]:
        """Return, for every batch of an epoch, how many share its step, and whether it is the last of them."""
        size = self.cfg.grad_accum_steps
        rest = num_batches % size
        plan = [(size, index % size == size - 1) for index in range(num_batches - rest)]
        return plan + [(rest, index == rest - 1) for index in range(rest)]

    def loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch: images (B, C, H, W) and class indices (B,), or soft targets (B, classes)."""
        with self.autocast():
            return self.task(x, target)['loss']

    def backward(self, loss: torch.Tensor, share: int, is_last: bool) -> None:
        """Add the gradients of a batch's loss to those of the others of its step; take the step after the last."""
        loss = loss / share if share > 1 else loss
        clip = self.cfg.clip_grad
        parameters: Any = None
        if clip is not None:
            spared = self.heads if self.cfg.clip_mode == 'agc' else set()
            parameters = list(self.task.get_clip_parameters(exclude_head=self.cfg.clip_mode == 'agc'))
            parameters = [value for value in parameters if value.requires_grad and id(value) not in spared]
        if self.scaler is not None:
            with self.stepping(), _still_statistics(self.checkpointed):
                self.scaler(
                    loss,
                    self.optimizer,
                    clip_grad=clip,
                    clip_mode=self.cfg.clip_mode,
                    parameters=parameters,
                    need_update=is_last,
                )
        else:
            with _still_statistics(self.checkpointed):
                loss.backward()
            if is_last:
                if clip is not None:
                    dispatch_clip_grad(parameters, value=clip, mode=self.cfg.clip_mode)
                with self.stepping():
                    self.optimizer.step()
        if is_last:
            self.optimizer.zero_grad()


@contextmanager
def _still_statistics(norms: List[nn.Module]) -> Iterator[None]:
    """Let BatchNorms keep their statistics: in a backward pass with checkpoints they see a batch once more."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum  # pyright: ignore[reportAttributeAccessIssue]


def are_finite(tensors: List[torch.Tensor]) -> bool:
    """Return whether all numbers of some tensors are finite; of a sharded one, those of this process."""
    detached = [tensor.detach() for tensor in tensors]
    local = [tensor.to_local() if hasattr(tensor, 'to_local') else tensor for tensor in detached]
    numbers = [tensor for tensor in local if tensor.is_floating_point() and tensor.numel()]
    return not numbers or bool(torch.isfinite(get_total_norm(numbers, math.inf)))
