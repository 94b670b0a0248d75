"""Settings of a fine-tuning run: what the command line offers, and what a run remembers."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Union


def _option(default: Any, help: str, **kwargs: Any) -> Any:
    """A field that the command line shows as a flag with this help."""
    return dataclasses.field(default=default, metadata=dict(help=help, **kwargs))


@dataclass(frozen=True)
class FinetuneCfg:
    """Settings of a fine-tuning run; the names are those of timm's train.py where it has them."""

    # Data
    data_dir: Optional[str] = _option(None, 'image folder: one sub-folder per class, or train/ and val/ with those')
    dataset: str = _option('', "any name that timm's create_dataset takes, e.g. torch/cifar10; '' is an image folder")
    dataset_download: bool = _option(False, 'let the dataset download itself')
    train_split: str = _option('train', 'name of the training split')
    val_split: str = _option('validation', "name of the validation split; '' takes val_frac of the training split")
    val_frac: float = _option(0.2, 'part of each class held out for validation where no validation split is given')
    skip_bad: bool = _option(False, 'leave unreadable images out instead of failing')
    no_check: bool = _option(False, 'do not open every image before training (a bad one then ends the run)')
    # Model
    model: str = _option('vitresnet_small', "a timm model's name, or local-dir:<folder>, or hf-hub:<id>")
    pretrained: bool = _option(False, 'start from pretrained weights')
    model_kwargs: Optional[Dict[str, Any]] = _option(None, 'further arguments of the model: name=value', nargs='*')
    img_size: Union[None, int, Tuple[int, ...]] = _option(None, 'image size, one number or height and width', nargs='+')
    in_chans: Optional[int] = _option(None, 'image channels: 1 or 3', type=int)
    drop: Optional[float] = _option(None, 'dropout rate of the classifier', type=float)
    drop_path: Optional[float] = _option(None, 'stochastic depth rate', type=float)
    mean: Optional[Tuple[float, ...]] = _option(None, "mean of normalisation; the model's", nargs='+', type=float)
    std: Optional[Tuple[float, ...]] = _option(None, "deviation of normalisation; the model's", nargs='+', type=float)
    interpolation: Optional[str] = _option(None, "resize interpolation; the model's", type=str)
    crop_pct: Optional[float] = _option(None, "centre crop in validation; the model's", type=float)
    head_loss: str = _option(
        'sum',
        'loss of a model with two heads: on the sum of their logits, on both (the mean of two losses), or on one head, '
        'the other being set to zero',
        choices=('sum', 'both', 'resnet', 'vit'),
    )
    # Optimisation
    epochs: int = _option(10, 'epochs to train')
    batch_size: int = _option(32, 'images a step')
    validation_batch_size: Optional[int] = _option(None, 'images a step in validation; batch_size', type=int)
    opt: str = _option('adamw', 'optimizer')
    lr: float = _option(5e-4, 'learning rate')
    weight_decay: float = _option(0.05, 'weight decay')
    layer_decay: Optional[float] = _option(None, 'layer-wise learning rate decay', type=float)
    clip_grad: Optional[float] = _option(None, 'gradient norm to clip at', type=float)
    sched: str = _option('cosine', 'learning rate schedule')
    warmup_epochs: float = _option(1.0, 'epochs of warm-up')
    warmup_lr: float = _option(1e-5, 'learning rate that warm-up begins with')
    min_lr: float = _option(1e-6, 'learning rate that the schedule ends with')
    balance_classes: bool = _option(False, 'weight the loss by inverse class frequency')
    # Augmentation
    no_aug: bool = _option(False, 'no augmentation')
    scale: Tuple[float, ...] = _option((0.35, 1.0), 'random resized crop: range of area', nargs=2, type=float)
    ratio: Tuple[float, ...] = _option((0.75, 4 / 3), 'random resized crop: range of aspect ratio', nargs=2, type=float)
    hflip: float = _option(0.5, 'probability of a horizontal flip')
    vflip: float = _option(0.0, 'probability of a vertical flip')
    color_jitter: float = _option(0.4, 'colour jitter')
    aa: Optional[str] = _option(None, 'AutoAugment policy, e.g. rand-m9-mstd0.5-inc1', type=str)
    reprob: float = _option(0.0, 'random erasing probability')
    mixup: float = _option(0.0, 'mixup alpha')
    cutmix: float = _option(0.0, 'cutmix alpha')
    smoothing: float = _option(0.1, 'label smoothing')
    # The run
    output: str = _option('output', 'folder of the finished model')
    resume: Union[None, bool, str] = _option(None, 'go on from a checkpoint; without a path, from the one in output')
    eval_metric: str = _option('top1', 'what the best epoch is chosen by', choices=('top1', 'balanced', 'loss'))
    device: str = _option('', 'torch device; the accelerator if there is one, else cpu')
    amp: bool = _option(False, 'mixed precision')
    amp_dtype: str = _option('bfloat16', 'mixed precision dtype', choices=('bfloat16', 'float16'))
    channels_last: bool = _option(False, 'channels-last memory format')
    autotune: bool = _option(
        False, 'time training steps with and without amp and channels_last, and train with what is fastest here'
    )
    workers: int = _option(2, 'loader processes')
    seed: int = _option(42, 'random seed')

    def __post_init__(self):
        for name in ('epochs', 'batch_size', 'lr'):
            if not getattr(self, name) > 0:
                raise ValueError(f'{name}: got {getattr(self, name)}, expected a number above 0.')
        for name in ('workers', 'weight_decay', 'warmup_epochs', 'smoothing', 'mixup', 'cutmix'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}: got {getattr(self, name)}, expected 0 or more.')
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f'batch_size: got {self.batch_size}, but mixup and cutmix want an even number.')
        if not self.data_dir and not self.dataset:
            raise ValueError('data_dir: no folder given; give an image folder, or the name of a dataset.')
