"""What a run minimises: timm.task's classification, or its distillation from a teacher.

settings, model, label names -> `create_task` -> timm's task, which returns a loss of images and targets.
"""

import hashlib
import inspect
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.loss import create_classification_loss
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.task.distillation import DistillationTeacher
from timm.task.task import TrainingTask
from torch import nn
from torch.nn import functional as F

from ..checks import on_one_line
from ..data import data_config
from ..labels import own_names
from ..publishing.config_file import check_config_of
from .class_maps import first_other, order_of
from .settings import FinetuneCfg


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


class Teacher(DistillationTeacher):
    """A teacher that sees the student's images at its own size, normalised its own way, and answers in the student's
    classes.

    Args:
        model: A timm model, with weights.
        student: The student's data config: mean and std of its images.
        config: The teacher's own.
        order: The index, among the teacher's classes, of each of the student's; None where both have the same order.
    """

    def __init__(
        self, model: nn.Module, student: Dict[str, Any], config: Dict[str, Any], order: Optional[Sequence[int]] = None
    ):
        super().__init__(model.requires_grad_(False))
        self.sha256 = state_sha256(model)
        self.size = tuple(config['input_size'][1:])
        self.order = None if order is None else list(order)
        for name, values in (('mean', student['mean']), ('std', student['std'])):
            self.register_buffer(f'{name}_student', torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        for name in ('mean', 'std'):
            setattr(self, f'{name}_kd', torch.tensor(config[name]).view(1, -1, 1, 1))

    def normalize_input(
        self,
        input: torch.Tensor,
        student_mean: Optional[torch.Tensor] = None,
        student_std: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Return the student's images (B, C, H, W) as the teacher takes them; timm's own arguments are not needed."""
        x = input * self.std_student + self.mean_student
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode='bicubic', antialias=True, align_corners=False)
        return (x - self.mean_kd) / self.std_kd

    def forward(self, input: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """Return logits (B, classes), or the pooled features (B, width), in float32."""
        y = super().forward(input, return_features).float()
        return y if return_features or self.order is None else y[:, self.order]


def state_sha256(model: nn.Module) -> str:
    """Return a sha256 of a model's parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def create_teacher(cfg: FinetuneCfg, label_names: List[str], config: Dict[str, Any]) -> Teacher:
    """Create the teacher of a run, with weights, on the CPU.

    Raises:
        ValueError: for a teacher that can't be loaded, or knows other classes than the run's (of whose features a
            student may learn none the less).
    """
    in_chans = config['input_size'][0]
    try:
        check_config_of(str(cfg.kd_model_name))
        model = timm.create_model(cfg.kd_model_name, pretrained=True, in_chans=in_chans)
    except Exception as error:  # timm raises errors of many kinds for a name, a folder or weights that are not there
        raise ValueError(f'kd_model_name: {cfg.kd_model_name!r} can not be loaded: {on_one_line(error)}') from error
    order = None
    if cfg.kd_distill_type != 'feature':
        names = own_names(model)
        if model.num_classes != len(label_names):
            raise ValueError(
                f'kd_model_name: {cfg.kd_model_name!r} has {model.num_classes} classes, but the images have '
                f'{len(label_names)}; fine-tune it on them first, or learn from its features (kd_distill_type).'
            )
        if names:
            order = order_of(label_names, names)
            if order is None:
                other = first_other(label_names, names)
                raise ValueError(f'kd_model_name: {cfg.kd_model_name!r} has no class {other!r}, as the images have.')
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last)
    return Teacher(model, config, data_config(model), order)


def create_task(
    cfg: FinetuneCfg,
    model: nn.Module,
    label_names: List[str],
    counts: Optional[List[int]],
    config: Dict[str, Any],
    device: torch.device,
) -> TrainingTask:
    """Return the task of a run, on a device; ValueError where the settings do not go together.

    Args:
        counts: Training images of each class, where they are known.
        config: The run's data config.
    """
    criterion = MeanOverHeads(create_criterion(cfg, counts)).to(device)
    if not cfg.kd_model_name:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    if cfg.head_loss == 'both' or (cfg.kd_distill_type == 'token' and cfg.head_loss != 'sum'):
        raise ValueError(f'head_loss: got {cfg.head_loss!r}, but kd_model_name has a say in the heads; leave it out.')
    if cfg.kd_distill_type == 'token' and not hasattr(model, 'set_distilled_training'):
        raise ValueError(f"kd_distill_type: got 'token', but {cfg.model} has no second head; use 'logit' or 'feature'.")
    options: Dict[str, Any] = dict(
        criterion=criterion,
        distill_loss_weight=cfg.distill_loss_weight,
        task_loss_weight=cfg.task_loss_weight,
        verbose=False,
    )
    kinds = dict(logit=LogitDistillationTask, feature=FeatureDistillationTask, token=TokenDistillationTask)
    kind = kinds[cfg.kd_distill_type]
    others = dict(temperature=cfg.kd_temperature, distill_type=cfg.kd_token_distill_type)
    options.update({name: value for name, value in others.items() if name in inspect.signature(kind).parameters})
    teacher = create_teacher(cfg, label_names, config)
    with torch.random.fork_rng(devices=[]):  # a projection is drawn
        torch.manual_seed(cfg.seed)
        task = kind(model.cpu(), teacher, **options)
    return task.to(device)


def create_criterion(cfg: FinetuneCfg, counts: Optional[List[int]]) -> nn.Module:
    """Return the loss of a run; ValueError where the settings, or the numbers of images, do not go together.

    Args:
        counts: Training images of each class, where they are known.
    """
    if cfg.balance_classes:
        if counts is None or cfg.mixes or cfg.bce_loss:
            raise ValueError(
                'balance_classes: needs a dataset that knows its labels, and no mixup, cutmix or bce_loss.'
            )
        filled = [count for count in counts if count]
        weight = torch.tensor([sum(counts) / (len(filled) * count) if count else 0.0 for count in counts])
        _check_smoothing(cfg.smoothing, len(counts), float(weight[weight > 0].min()), float(weight.max()))
        return nn.CrossEntropyLoss(weight=weight, label_smoothing=cfg.smoothing)
    options: Dict[str, Any] = dict(smoothing=cfg.smoothing, soft_targets=cfg.mixes)
    if cfg.bce_loss:
        options.update(
            loss_type='bce',
            bce_sum=cfg.bce_sum,
            bce_target_thresh=cfg.bce_target_thresh,
            pos_weight=cfg.bce_pos_weight,
        )
    return create_classification_loss(**options)


def _check_smoothing(smoothing: float, num_classes: int, least: float, most: float) -> None:
    """Raise ValueError where the rarest class, by its part of the smoothing, outweighs the true one of common images.

    Args:
        least, most: The smallest and the largest weight of a class.
    """
    limit = least / (least + (most - least) / num_classes)
    if smoothing >= limit:
        raise ValueError(
            f'smoothing: got {smoothing:g}, but with balance_classes an image of the rarest class counts as '
            f'{most / least:.3g} of the commonest, so that these would be called rare; give less than {limit:.2g}.'
        )
