"""Settings of a fine-tuning run: what the command line offers, what each may be, and what a run remembers of them."""

import dataclasses
import math
import numbers
import os
import typing
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np

from ..checks import MAX_BATCH, plain
from ..views import TTA

SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'none')
INTERPOLATIONS = ('bilinear', 'bicubic', 'nearest', 'box', 'hamming', 'lanczos')
ARGPARSE = ('help', 'nargs', 'choices', 'const', 'metavar', 'action')  # what a setting says of its flag
PAIRS = 'name=value'  # the command registers an action of this name with argparse
# what timm leaves out without augmentation; of hflip, scale and the like, recipes have values that nobody asked for
NOT_OF_NO_AUG = (
    'aa',
    'reprob',
    'vflip',
    'grayscale_prob',
    'gaussian_blur_prob',
    'color_jitter_prob',
    'train_crop_mode',
)
# a dataset of one of these names is an image folder; timm would open it by its own reader or by torchvision's
FOLDER_NAMES = ('', 'folder', 'image_folder', 'imagefolder', 'torch/folder', 'torch/image_folder')
MAX_COUNT = 2**31 - 1  # the sum of two such is a seed that numpy takes
MIXES = ('mixup', 'cutmix', 'cutmix_minmax')  # any of these mixes images
OF_MIXES = ('mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch')  # and these say how
# settings that say nothing where all of others are left out
NEEDED = {
    'torchcompile_mode': ('torchcompile',),
    'freeze_epochs': ('freeze',),
    **dict.fromkeys(('kd_distill_type', 'kd_token_distill_type', 'kd_temperature'), ('kd_model_name',)),
    **dict.fromkeys(('distill_loss_weight', 'task_loss_weight'), ('kd_model_name',)),
    **dict.fromkeys(('lr_base_scale', 'lr_base_size'), ('lr_base',)),
    **dict.fromkeys(('model_ema_warmup', 'model_ema_decay'), ('model_ema',)),
    'clip_mode': ('clip_grad',),
    **dict.fromkeys(('remode', 'recount'), ('reprob',)),
    **dict.fromkeys(('bce_sum', 'bce_target_thresh', 'bce_pos_weight'), ('bce_loss',)),
    **dict.fromkeys(OF_MIXES, MIXES),
}


def idle(settings: typing.Mapping[str, Any]) -> List[str]:
    """Return those of some settings that say nothing, since what they need is not among them."""
    return [name for name, others in NEEDED.items() if name in settings and not any(map(settings.get, others))]


def _option(default: Any, help: str, **kwargs: Any) -> Any:
    """A field that the command line shows as a flag with this help.

    Args:
        kwargs: What argparse takes (`ARGPARSE`; `type` where it is not the field's own), `short` (a second flag) and
            `positional` (the name of an argument that says the same without a flag); and what every number must keep
            to: low, high (these are allowed), above, below (these are not); `lengths` are how many there may be.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, **kwargs))


@dataclass(frozen=True)
class FinetuneCfg:
    """Settings of a fine-tuning run; the names are those of timm's train.py where it has them.

    `timm-vitres finetune --help` says what each one means; there they have hyphens.

    Raises:
        ValueError, TypeError: for a setting that no run can have; the message names it and says what is allowed.
    """

    # Data
    data_dir: Optional[str] = _option(
        None, 'image folder: one sub-folder per class, or train/ and val/ with those', positional='DIR'
    )
    dataset: str = _option('', "any name that timm's create_dataset takes, e.g. torch/cifar10; '' is an image folder")
    dataset_download: bool = _option(False, 'let the dataset download itself')
    train_split: str = _option('train', 'name of the training split')
    val_split: str = _option('validation', "name of the validation split; '' takes val_frac of the training split")
    val_frac: float = _option(
        0.2, 'part of each class held out for validation where no validation split is given', above=0, below=1
    )
    class_map: str = _option('', 'text file with the class names, one a line, in the order of their indices')
    input_key: Optional[str] = _option(None, 'name of the images in the samples of an hfds/, tfds/ or wds/ dataset')
    target_key: Optional[str] = _option(None, 'name of the labels in the samples of an hfds/, tfds/ or wds/ dataset')
    train_num_samples: Optional[int] = _option(
        None, 'images in the training split of a stream that does not say it', low=1, high=MAX_COUNT
    )
    val_num_samples: Optional[int] = _option(
        None, 'images in the validation split of a stream that does not say it', low=1, high=MAX_COUNT
    )
    skip_bad: bool = _option(False, 'leave unreadable images out instead of failing')
    no_check: bool = _option(False, 'do not open every image before training (a bad one then ends the run)')
    # Model
    model: str = _option('vitresnet_small', "a timm model's name, or local-dir:<folder>, or hf-hub:<id>")
    pretrained: bool = _option(False, 'start from pretrained weights')
    pretrained_path: Optional[str] = _option(
        None, 'start from the weights in this file, but for their head, which is a new one'
    )
    initial_checkpoint: str = _option('', 'start from the weights in this file, head and all; every key must fit')
    model_kwargs: Optional[Dict[str, Any]] = _option(
        None, 'further arguments of the model: name=value', nargs='*', action=PAIRS
    )
    img_size: Union[None, int, Tuple[int, ...]] = _option(
        None, 'image size, one number or height and width', nargs='+', low=1, high=2**14, lengths=(1, 2)
    )
    in_chans: Optional[int] = _option(None, 'image channels: 1, 3 or 4 (RGBA)', low=1)
    drop: Optional[float] = _option(None, 'dropout rate of the classifier', low=0, below=1)
    drop_path: Optional[float] = _option(None, 'stochastic depth rate', low=0, below=1)
    mean: Optional[Tuple[float, ...]] = _option(
        None, "mean of normalisation; the model's", nargs='+', low=0, high=1, lengths=(1, 3, 4)
    )
    std: Optional[Tuple[float, ...]] = _option(
        None, "deviation of normalisation; the model's", nargs='+', low=1e-3, high=1e3, lengths=(1, 3, 4)
    )
    interpolation: Optional[str] = _option(None, "resize interpolation; the model's", choices=INTERPOLATIONS)
    crop_pct: Optional[float] = _option(None, "centre crop in validation; the model's", low=0.1, high=2)
    head_loss: str = _option(
        'sum',
        'loss of a model with two heads: on the sum of their logits, on both (the mean of two losses), or on one head, '
        'the other being set to zero',
        choices=('sum', 'both', 'resnet', 'vit'),
    )
    grad_checkpointing: bool = _option(False, 'compute activations again in the backward pass; saves memory')
    torchcompile: Optional[str] = _option(
        None, 'compile the model by torch.compile, with this backend', nargs='?', const='inductor'
    )
    torchcompile_mode: Optional[str] = _option(None, 'mode of torch.compile')
    freeze: str = _option(
        '',
        'leave a part as it is: the resnet, the vit, or the body (all but the head)',
        choices=('', 'resnet', 'vit', 'body'),
    )
    freeze_epochs: Optional[int] = _option(
        None, 'for so many epochs, after which everything is trained; else for all', low=1, high=MAX_COUNT
    )
    lora: Optional[int] = _option(
        None,
        'train low-rank adapters of this rank (LoRA, by peft) and the head alone; merged on saving',
        low=1,
        high=4096,
    )
    # Distillation
    kd_model_name: Optional[str] = _option(
        None, 'teacher: a timm model of the same classes; local-dir:<folder> is one of ours'
    )
    kd_distill_type: str = _option(
        'logit',
        "what is learnt from the teacher: its logits, its pooled features, or, by a student's second head, its answers",
        choices=('logit', 'feature', 'token'),
    )
    kd_token_distill_type: str = _option(
        'soft', 'answers of the teacher: its probabilities, or its best class', choices=('soft', 'hard')
    )
    kd_temperature: float = _option(4.0, 'softmax temperature of the distillation', above=0, high=1e3)
    distill_loss_weight: Optional[float] = _option(
        None, 'weight of the distillation loss; 1, or 1 - task_loss_weight where that is given alone', low=0, high=1e4
    )
    task_loss_weight: Optional[float] = _option(None, 'weight of the loss on the labels; 1', low=0, high=1e4)
    # Optimisation
    epochs: int = _option(10, 'epochs to train', low=1, high=MAX_COUNT)
    batch_size: int = _option(32, 'images a step', short='-b', low=1, high=MAX_BATCH)
    validation_batch_size: Optional[int] = _option(
        None, 'images a step in validation; batch_size', low=1, high=MAX_BATCH
    )
    opt: str = _option('adamw', 'optimizer')
    opt_eps: Optional[float] = _option(None, "epsilon of the optimizer; the optimizer's", above=0, high=1)
    opt_betas: Optional[Tuple[float, ...]] = _option(
        None, "betas of the optimizer; the optimizer's", nargs='+', low=0, below=1, lengths=(1, 2, 3)
    )
    momentum: float = _option(0.9, 'momentum, of optimizers that have one', low=0, below=1)
    opt_kwargs: Optional[Dict[str, Any]] = _option(
        None, 'further arguments of the optimizer: name=value', nargs='*', action=PAIRS
    )
    lr: float = _option(5e-4, 'learning rate', above=0)
    lr_base: Optional[float] = _option(
        None, 'learning rate of lr_base_size images a step, in place of lr; scaled to those of the run', above=0
    )
    lr_base_size: int = _option(256, 'images a step that lr_base is for', low=1, high=MAX_COUNT)
    lr_base_scale: str = _option(
        '',
        "how lr_base grows with the images a step: '' is sqrt for Adam's kin and lamb, else linear",
        choices=('', 'linear', 'sqrt'),
    )
    grad_accum_steps: int = _option(1, 'batches whose gradients are added before a step', low=1, high=MAX_BATCH)
    weight_decay: float = _option(0.05, 'weight decay', low=0)
    layer_decay: Optional[float] = _option(None, 'layer-wise learning rate decay', above=0, high=1)
    clip_grad: Optional[float] = _option(None, 'gradient norm to clip at', above=0)
    clip_mode: str = _option(
        'norm', 'clip the norm, every value, or adaptively (agc)', choices=('norm', 'value', 'agc')
    )
    sched: str = _option('cosine', 'learning rate schedule', choices=SCHEDULES)
    warmup_epochs: float = _option(1.0, 'epochs of warm-up, at most half of all', low=0, high=MAX_COUNT)
    warmup_lr: float = _option(1e-5, 'learning rate that warm-up begins with, at most lr', low=0)
    min_lr: float = _option(1e-6, 'learning rate that the schedule ends with', low=0)
    decay_epochs: Optional[float] = _option(
        None,
        'epochs between steps of the step schedule; 90. Of wsd and rsqrt, the last part; 0.2',
        above=0,
        high=MAX_COUNT,
    )
    decay_milestones: Tuple[int, ...] = _option(
        (90, 180, 270), 'epochs at which the multistep schedule steps', nargs='+', low=1, high=MAX_COUNT
    )
    decay_rate: float = _option(0.1, 'factor of a step of the schedule; of poly, its power', above=0, high=10)
    model_ema: bool = _option(False, 'average the weights; both are evaluated, and the best epoch is of either')
    model_ema_decay: float = _option(0.9998, 'decay of the average', low=0, below=1)
    model_ema_warmup: bool = _option(False, 'let the decay of the average grow from 0')
    bce_loss: bool = _option(False, 'binary cross-entropy of each class in place of softmax')
    bce_sum: bool = _option(False, 'sum of the classes, not mean, in bce_loss')
    bce_target_thresh: Optional[float] = _option(None, 'soft targets above this are 1 in bce_loss', low=0, below=1)
    bce_pos_weight: Optional[float] = _option(None, 'weight of the positive part of bce_loss', above=0, high=1e6)
    balance_classes: bool = _option(
        False, 'weight the loss by inverse class frequency (normalised in each batch, as torch does)'
    )
    # Augmentation
    no_aug: bool = _option(False, 'no augmentation')
    scale: Tuple[float, ...] = _option(
        (0.35, 1.0), 'random resized crop: range of area', nargs=2, above=0, high=1, lengths=(2,)
    )
    ratio: Tuple[float, ...] = _option(
        (0.75, 4 / 3), 'random resized crop: range of aspect ratio', nargs=2, above=0, lengths=(2,)
    )
    hflip: float = _option(0.5, 'probability of a horizontal flip', low=0, high=1)
    vflip: float = _option(0.0, 'probability of a vertical flip', low=0, high=1)
    color_jitter: float = _option(0.4, 'colour jitter', low=0, high=10)
    color_jitter_prob: Optional[float] = _option(None, 'probability of any colour jitter; always', low=0, high=1)
    grayscale_prob: float = _option(0.0, 'probability of a grey image', low=0, high=1)
    gaussian_blur_prob: float = _option(0.0, 'probability of blur', low=0, high=1)
    train_interpolation: str = _option(
        '', 'resize interpolation in training; that of validation', choices=('', 'random', *INTERPOLATIONS)
    )
    train_crop_mode: Optional[str] = _option(
        None,
        'crop in training: rrc (random resized crop), rkrc or rkrr (random crop of a resized image)',
        choices=('rrc', 'rkrc', 'rkrr'),
    )
    crop_padding: Optional[int] = _option(
        None,
        'crop in training: a random one of the resized image, padded by so many black pixels at each side, in place of '
        "timm's random resized crop; on small images it is a shift",
        low=0,
        high=2**14,
    )
    aug_repeats: int = _option(0, 'augmentations of each image that is drawn, in one epoch', low=0, high=64)
    aa: Optional[str] = _option(None, 'AutoAugment policy, e.g. rand-m9-mstd0.5-inc1')
    reprob: float = _option(0.0, 'random erasing probability', low=0, high=1)
    remode: str = _option(
        'pixel', 'random erasing by noise of pixels, one colour, or zeros', choices=('pixel', 'rand', 'const')
    )
    recount: int = _option(1, 'random erasing: most rectangles an image', low=1, high=64)
    mixup: float = _option(0.0, 'mixup alpha', low=0, high=100)
    cutmix: float = _option(0.0, 'cutmix alpha', low=0, high=100)
    cutmix_minmax: Optional[Tuple[float, ...]] = _option(
        None, 'range of the side that cutmix pastes, in place of its alpha', nargs=2, above=0, below=1, lengths=(2,)
    )
    mixup_prob: float = _option(1.0, 'probability of mixup or cutmix', low=0, high=1)
    mixup_switch_prob: float = _option(0.5, 'probability of cutmix where both are on', low=0, high=1)
    mixup_mode: str = _option('batch', 'what has a mixing ratio of its own', choices=('batch', 'pair', 'elem'))
    mixup_off_epoch: int = _option(0, 'first epoch without mixup and cutmix; 0 is never', low=0, high=MAX_COUNT)
    smoothing: float = _option(0.1, 'label smoothing', low=0, below=1)
    # The run
    output: str = _option(
        'output', 'folder of the run and its model: a new or an empty one (or, of a comparison, its own)'
    )
    resume: Union[None, bool, str] = _option(
        None,
        'go on with the run in output, or in PATH, by its own settings; only epochs and early-stopping (upward), '
        'workers, device, validation-batch-size and data-dir (the same images in another place) may be given anew',
        nargs='?',
        const=True,
        metavar='PATH',
        type=str,
    )
    eval_metric: str = _option(
        'top1', 'what the best epoch is chosen by', choices=('top1', 'balanced', 'macro_f1', 'loss')
    )
    early_stopping: Optional[int] = _option(
        None, 'end after so many epochs that were no better than the best', low=1, high=MAX_COUNT
    )
    tta: str = _option(
        '', 'test-time augmentation in validation: mean of the logits of flips, or of flips and shifts', choices=TTA
    )
    checkpoint_hist: int = _option(
        0, 'keep the best N epochs as checkpoint-<epoch>.pth.tar, e.g. for avg_checkpoints.py', low=0, high=1000
    )
    log_wandb: bool = _option(False, 'log every epoch to Weights & Biases (pip install wandb); its variables say where')
    log_tensorboard: bool = _option(
        False, 'log every epoch for TensorBoard (pip install tensorboard) into output/tensorboard'
    )
    fsdp: bool = _option(False, 'shard weights and optimizer over the processes (torch fully_shard), not only images')
    sync_bn: bool = _option(False, 'compute BatchNorm over the images of all processes')
    device: str = _option('', 'torch device; cuda if there is a GPU, else cpu')
    amp: bool = _option(False, 'mixed precision')
    amp_dtype: str = _option('bfloat16', 'mixed precision dtype', choices=('bfloat16', 'float16'))
    channels_last: bool = _option(False, 'channels-last memory format')
    no_fused_attn: bool = _option(
        False, "attention step by step, not in torch's fused kernel, which is slower for few tokens on a CPU"
    )
    autotune: bool = _option(
        False,
        'time training steps with and without amp and channels_last (and, of few tokens on a CPU, with '
        'no_fused_attn), and train with what is fastest here',
    )
    workers: int = _option(2, 'loader processes', short='-j', low=0, high=1024)
    seed: int = _option(42, 'random seed', low=0, high=MAX_COUNT)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _checked(field.name, getattr(self, field.name), KINDS[field.name], field.metadata)
            object.__setattr__(self, field.name, value)
        if self.resume == '':
            raise ValueError("resume: got '', expected the folder of a run.")
        if not self.resume:  # a run that goes on is checked when its record has said the rest
            self._check_together()

    @property
    def is_folder(self) -> bool:
        """Whether the images are a folder, and no dataset by name."""
        return (self.dataset or '').lower() in FOLDER_NAMES

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def _check_together(self) -> None:
        for name in idle(vars(self)):
            if getattr(self, name) != getattr(type(self), name):
                told, others = getattr(self, name), ' or '.join(NEEDED[name])
                raise ValueError(f'{name}: got {told!r}, which says nothing without {others}; give both.')
        for name in ('scale', 'ratio'):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f'{name}: got {(low, high)}, expected the smaller number first.')
        for name in ('no_aug', 'train_crop_mode', 'scale', 'ratio') if self.crop_padding is not None else ():
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f'{name}: got {getattr(self, name)!r}, which crop_padding replaces; give one.')
        for name in NOT_OF_NO_AUG if self.no_aug else ():
            if getattr(self, name):
                raise ValueError(f'{name}: got {getattr(self, name)!r}, which no_aug leaves out; give one.')
        if self.distill_loss_weight is None and (self.task_loss_weight or 0) > 1:
            raise ValueError(
                f'task_loss_weight: got {self.task_loss_weight:g} alone, expected at most 1, since distill_loss_weight '
                'is then what is left of 1; give both.'
            )
        if list(self.decay_milestones) != sorted(set(self.decay_milestones)):
            raise ValueError(f'decay_milestones: got {self.decay_milestones}, expected epochs that rise.')
        if self.cutmix_minmax is not None and self.cutmix_minmax[0] > self.cutmix_minmax[1]:
            raise ValueError(f'cutmix_minmax: got {self.cutmix_minmax}, expected the smaller number first.')
        if self.decay_rate > 1 and self.sched != 'poly':
            raise ValueError(f'decay_rate: got {self.decay_rate:g}, expected at most 1, but of sched poly.')
        if self.mixes and self.batch_size % 2:
            raise ValueError(f'batch_size: got {self.batch_size}, but mixup and cutmix want an even number.')
        if not self.output:
            raise ValueError("output: got '', expected the name of a folder.")
        if not self.data_dir and not self.dataset:
            raise ValueError('data_dir: no folder given; give an image folder, or the name of a dataset.')


# The types that each setting may have
KINDS: Dict[str, Tuple[Any, ...]] = {
    name: typing.get_args(hint) if typing.get_origin(hint) is Union else (hint,)
    for name, hint in typing.get_type_hints(FinetuneCfg).items()
}


def kind_of(name: str) -> type:
    """Return the type that one value of a setting has: bool, int, float, str or dict."""
    kinds = [kind for kind in KINDS[name] if kind is not type(None)]
    return next((kind for kind in kinds if kind in (bool, int, float, str)), None) or (
        typing.get_args(kinds[0])[0] if typing.get_origin(kinds[0]) is tuple else dict
    )


def _checked(name: str, value: Any, kinds: Tuple[Any, ...], limits: typing.Mapping[str, Any]) -> Any:
    """Return a value as the plain Python value that it stands for; ValueError or TypeError where it can't be one."""
    if value is None and type(None) in kinds:
        return None
    origins = [typing.get_origin(kind) or kind for kind in kinds]
    if bool in origins and isinstance(value, (bool, np.bool_)):
        return bool(value)
    if str in origins and isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str):
        value = os.fspath(value)
        if '\0' in value:
            raise ValueError(f'{name}: got {value!r}, which holds a zero byte.')
        if 'choices' in limits and value not in limits['choices']:
            raise ValueError(f'{name}: got {value!r}, expected one of {", ".join(limits["choices"])}.')
        return value
    if dict in origins and isinstance(value, dict):
        return plain(name, value)
    if tuple in origins and isinstance(value, (list, tuple, np.ndarray)):
        if len(value) == 0 or ('lengths' in limits and len(value) not in limits['lengths']):
            if 'lengths' not in limits:
                raise ValueError(f'{name}: got {tuple(value)}, expected one number or more.')
            *others, last = map(str, limits['lengths'])
            lengths = f'{", ".join(others)} or {last}' if others else last
            raise ValueError(f'{name}: got {tuple(value)}, expected {lengths} numbers.')
        found = tuple(_number(name, one, kind_of(name), limits, value) for one in value)
        return found[0] if len(found) == 1 and int in origins else found  # --img-size 64 is what a recipe calls 64
    if int in origins or float in origins:
        return _number(name, value, kind_of(name), limits, value)
    expected = dict(bool='True or False', str='text', dict='a dict of arguments', tuple='numbers')
    what = ' or '.join(expected[kind.__name__] for kind in origins if kind.__name__ in expected)
    raise TypeError(f'{name}: got {value!r}, expected {what}.')


def _number(name: str, value: Any, kind: type, limits: typing.Mapping[str, Any], given: Any) -> Union[int, float]:
    shown = repr(tuple(given) if isinstance(given, (list, np.ndarray)) else given)
    shown = shown if len(shown) < 80 else f'{shown[:60]}...'
    expected = f'a {"whole " if kind is int else "finite "}number{_range(limits)}'
    wanted = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, wanted):
        raise TypeError(f'{name}: got {shown}, expected {expected}.')
    try:
        number = kind(value)
    except OverflowError:
        number = math.inf
    inside = (
        math.isfinite(number)
        and number >= limits.get('low', -math.inf)
        and number <= limits.get('high', math.inf)
        and number > limits.get('above', -math.inf)
        and number < limits.get('below', math.inf)
    )
    if not inside:
        raise ValueError(f'{name}: got {shown}, expected {expected}.')
    return number


def _range(limits: typing.Mapping[str, Any]) -> str:
    """Return the limits in words: ' from 0 up', ' above 0, below 1', ' from 0 to 1'."""
    words = dict(low='from {} up', above='above {}', high='to {}', below='below {}')
    found = [text.format(limits[key]) for key, text in words.items() if key in limits]
    return f' {", ".join(found)}'.replace(' up, to ', ' to ') if found else ''
