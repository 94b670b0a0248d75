"""Fine-tuning on timm.task, timm.data, timm.optim and timm.scheduler; the flags keep the names of timm's train.py.

images -> `load_data` -> `finetune` -> folder/{model.safetensors, config.json, README.md, summary.csv, curves.png,
last.pth.tar}. A run that was killed goes on with `resume`, from its last whole epoch, as if it had not been.
"""

import csv
import dataclasses
import datetime
import importlib.util
import logging
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import timm
import torch
from huggingface_hub import EvalResult
from timm.data import Mixup, create_dataset, create_loader
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationEvaluator, ClassificationTask
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad, random_seed
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from . import hub
from .cards import render_card
from .data import ImageFolder, Subset, class_names, data_config, image_mode, stratified_split
from .files import WEIGHTS_NAME, replacing
from .prepare import fastest_training
from .vitresnet_dual import VitResNetDual

_logger = logging.getLogger(__name__)

CHECKPOINT_NAME = 'last.pth.tar'
SUMMARY_NAME = 'summary.csv'
CURVES_NAME = 'curves.png'
VAL_FOLDERS = ('validation', 'val', 'valid', 'eval', 'evaluation')  # as timm's create_dataset looks for them


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


class Data(NamedTuple):
    """What a run trains on."""

    train: Dataset
    val: Dataset
    label_names: List[str]
    counts: Optional[List[int]]  # training images of each class, where known
    description: str
    skipped: List[str]


def load_data(cfg: FinetuneCfg, mode: str) -> Data:
    """Open the training and the validation set of a run, and split where only one is given.

    Args:
        cfg: The run.
        mode: PIL's mode of the images ('L', 'RGB', 'RGBA').

    Raises:
        FileNotFoundError, ValueError: for missing or impossible data; the message says what, and what is allowed.
    """
    if cfg.dataset:
        return _load_named(cfg, mode)
    root = Path(str(cfg.data_dir))
    folder = dict(input_img_mode=mode, check=not cfg.no_check, skip_bad=cfg.skip_bad)
    val_root = next((root / name for name in (cfg.val_split, *VAL_FOLDERS) if name and (root / name).is_dir()), None)
    train_root = root / cfg.train_split
    if cfg.val_split and val_root and train_root.is_dir():
        train = ImageFolder(train_root, **folder)
        val = ImageFolder(val_root, class_map=train.reader.class_to_idx, **folder)
        train_indices, val_indices = range(len(train)), range(len(val))
        how = f'validation on the {len(val)} images of {val_root.name}/'
        skipped = train.skipped + val.skipped
    else:
        train = val = ImageFolder(train_root if train_root.is_dir() else root, **folder)
        train_indices, val_indices = stratified_split(train.targets, cfg.val_frac, cfg.seed)
        how = f'validation on {len(val_indices)} of them, held out class by class ({cfg.val_frac:g}, seed {cfg.seed})'
        skipped = train.skipped
    if len(train.classes) < 2:
        raise ValueError(f'data_dir: {root} has the one class {train.classes[0]!r}; at least two are needed.')
    targets = train.targets  # a list made anew at every call
    counts = _class_counts([targets[index] for index in train_indices], len(train.classes))
    description = f'{len(train)} images of {len(train.classes)} classes in {root.name}; {how}'
    train_set, val_set = Subset(train, train_indices, mode), Subset(val, val_indices, mode)
    return Data(train_set, val_set, train.classes, counts, description, skipped)


def _load_named(cfg: FinetuneCfg, mode: str) -> Data:
    def create(split: str, is_training: bool) -> Dataset:
        try:
            return create_dataset(
                cfg.dataset,
                root=cfg.data_dir,
                split=split,
                is_training=is_training,
                download=cfg.dataset_download,
                batch_size=cfg.batch_size,
                input_img_mode=mode,
                seed=cfg.seed,
            )
        except (AssertionError, RuntimeError, OSError) as error:
            raise ValueError(f'dataset: {cfg.dataset!r}, split {split!r}, cannot be opened ({error}).') from error

    train = create(cfg.train_split, True)
    names = [str(name) for name in getattr(train, 'classes', None) or class_names(train)]
    if isinstance(train, IterableDataset):
        if not names or not cfg.val_split:
            raise ValueError(f'dataset: {cfg.dataset!r} is a stream; it needs class names and a val_split.')
        return Data(train, create(cfg.val_split, False), names, None, cfg.dataset, [])
    targets = getattr(train, 'targets', None)
    if targets is None:
        targets = [train[index][1] for index in tqdm(range(len(train)), desc='reading labels')]
    targets = [int(target) for target in targets]
    names = names or [str(index) for index in range(max(targets) + 1)]
    if cfg.val_split:
        val = create(cfg.val_split, False)
        train_indices, val_indices = range(len(targets)), range(len(val))
        how = f'validation on split {cfg.val_split!r} ({len(val_indices)} images)'
    else:
        val = train
        train_indices, val_indices = stratified_split(targets, cfg.val_frac, cfg.seed)
        how = f'validation on {len(val_indices)} of its training images, held out class by class (seed {cfg.seed})'
    counts = _class_counts([targets[index] for index in train_indices], len(names))
    return Data(
        Subset(train, train_indices, mode),
        Subset(val, val_indices, mode),
        names,
        counts,
        f'{cfg.dataset}, {len(train_indices)} images to train on; {how}',
        [],
    )


def _class_counts(targets: List[int], num_classes: int) -> List[int]:
    counter = Counter(targets)
    return [counter[index] for index in range(num_classes)]


class BalancedEvaluator(ClassificationEvaluator):
    """timm's evaluator (loss, top1, top5) with balanced accuracy: the mean over classes of the recall, in percent."""

    metric_names = (*ClassificationEvaluator.metric_names, 'balanced')

    def reset(self):
        super().reset()
        self.hits: List[torch.Tensor] = []
        self.labels: List[torch.Tensor] = []

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: logits (B, classes) and class indices (B,)."""
        super().update(output, target)
        self.hits.append((output.argmax(1) == target).cpu())
        self.labels.append(target.cpu())

    def compute(self, distributed: bool = False) -> Dict[str, float]:
        """Return the metrics of all batches so far."""
        metrics = super().compute(distributed)
        hits, labels = torch.cat(self.hits), torch.cat(self.labels)
        recalls = [hits[labels == label].double().mean().item() for label in labels.unique()]
        metrics['balanced'] = 100 * sum(recalls) / len(recalls)
        return metrics


def evaluate(model: nn.Module, loader, device: Union[str, torch.device] = 'cpu', autocast=nullcontext) -> Dict:
    """Return loss, top1, top5 and balanced accuracy (percent) of a model over a loader."""
    model.eval()
    evaluator = BalancedEvaluator(device=device)
    with torch.inference_mode():
        for x, target in tqdm(loader, desc='validation', leave=False):
            with autocast():
                output = model(x.to(device))
            evaluator.update(output, target.to(device))
    return dict(evaluator.compute())


def create_finetune_model(cfg: FinetuneCfg, num_classes: int) -> nn.Module:
    """Create the model of a run, its position table made for the run's image size where it has one."""
    kwargs = dict(cfg.model_kwargs or {})
    for name, value in (('in_chans', cfg.in_chans), ('drop_rate', cfg.drop), ('drop_path_rate', cfg.drop_path)):
        if value is not None:
            kwargs[name] = value
    model = timm.create_model(cfg.model, pretrained=cfg.pretrained, num_classes=num_classes, **kwargs)
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
    if not isinstance(model, VitResNetDual):
        raise ValueError(f"head_loss: got {cfg.head_loss!r}, but {cfg.model} is no vitresnet_dual; use 'both'.")
    other = model.head_vit if cfg.head_loss == 'resnet' else model.head_resnet
    for parameter in other.parameters():
        nn.init.zeros_(parameter).requires_grad_(False)


class EachHead(nn.Module):
    """A loss of logits, or, of a pair of logits, the mean of the loss of either."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, output: Union[torch.Tensor, Tuple[torch.Tensor, ...]], target: torch.Tensor) -> torch.Tensor:
        """Take logits (B, classes), or a tuple of them, and class indices (B,) or soft targets -> a number."""
        if isinstance(output, tuple):
            return torch.stack([self.criterion(logits, target) for logits in output]).mean()
        return self.criterion(output, target)


def _image_size(img_size: Union[int, Tuple[int, ...]]) -> Tuple[int, int]:
    size = tuple(img_size) if isinstance(img_size, (tuple, list)) else (img_size,)
    if len(size) not in (1, 2) or any(number <= 0 for number in size):
        raise ValueError(f'img_size: got {img_size}, expected one or two numbers above 0 (height and width).')
    return size[0], size[-1]


def finetune(cfg: FinetuneCfg) -> Path:
    """Fine-tune a model and return the folder of its best epoch, which `timm.create_model('local-dir:...')` loads.

    Raises:
        ValueError, FileNotFoundError: for impossible settings or data; the message says which.
        OSError: where a file can't be written; the last whole epoch stays readable.
    """
    folder = Path(cfg.output)
    if importlib.util.find_spec('matplotlib') is None:
        _logger.warning('%s is left out: it needs matplotlib, pip install "timm-vitres[plot]".', CURVES_NAME)
    checkpoint = _find_checkpoint(cfg, folder)
    device = torch.device(cfg.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    kwargs = resolve_model_input_args(cfg.model, **{'in_chans': cfg.in_chans, **(cfg.model_kwargs or {})})
    data = load_data(cfg, image_mode(kwargs.get('in_chans') or kwargs['pretrained_cfg']['input_size'][0]))
    for path in data.skipped:
        _logger.warning('left out, unreadable: %s', path)

    random_seed(cfg.seed)
    model = create_finetune_model(cfg, num_classes=len(data.label_names)).to(device)
    size = _image_size(cfg.img_size) if cfg.img_size is not None else None
    given = dict(img_size=size, mean=cfg.mean, std=cfg.std, interpolation=cfg.interpolation, crop_pct=cfg.crop_pct)
    config = data_config(model, **given)
    state = None if checkpoint is None else _read_state(checkpoint)
    if cfg.autotune:
        cfg = _autotuned(cfg, model, len(data.label_names), config['input_size'], checkpoint, state)
    run = _Run(cfg, folder, model, data, config, device)
    if checkpoint is not None and state is not None:
        run.restore(checkpoint, state)
    return run.train()


def _autotuned(
    cfg: FinetuneCfg,
    model: nn.Module,
    num_classes: int,
    input_size: Tuple[int, ...],
    checkpoint: Optional[Path],
    state: Optional[Dict[str, Any]],
) -> FinetuneCfg:
    """Return the settings with the fastest amp and channels_last; of a run that goes on, those that it began with."""
    if state is not None:
        settings = state.get('autotuned')
        if settings is None:
            raise ValueError(f'resume: {checkpoint} is of a run without autotune; leave autotune out.')
        return dataclasses.replace(cfg, **settings)
    with torch.random.fork_rng():  # so that a run with the same settings, named, is the same run
        settings, times = fastest_training(model, num_classes, (cfg.batch_size, *input_size), cfg.amp_dtype)
    print(f'autotune: {times}; training with {settings}.', flush=True)
    return dataclasses.replace(cfg, **settings)


def _find_checkpoint(cfg: FinetuneCfg, folder: Path) -> Optional[Path]:
    own = folder / CHECKPOINT_NAME
    if not cfg.resume:
        if own.exists():
            raise ValueError(f'output: {folder} holds a run already; go on with --resume, or name another folder.')
        return None
    path = own if cfg.resume is True else Path(cfg.resume)
    path = path / CHECKPOINT_NAME if path.is_dir() else path
    if path.exists():
        return path
    if cfg.resume is True and not (folder / WEIGHTS_NAME).exists():
        return None  # killed before its first epoch was whole: begin
    raise FileNotFoundError(f'resume: there is no checkpoint {path}.')


def _read_state(path: Path) -> Dict[str, Any]:
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a truncated file fails in the unpickler, in zip, or in torch, each its own way
        raise ValueError(f'resume: {path} is not a checkpoint of a fine-tuning run ({error}).') from error
    if not isinstance(state, dict):
        raise ValueError(f'resume: {path} is not a checkpoint of a fine-tuning run (it holds no settings).')
    return state


class _Run:
    """One fine-tuning run: what changes from epoch to epoch, and how it is written down."""

    def __init__(self, cfg: FinetuneCfg, folder: Path, model: nn.Module, data: Data, config: Dict, device):
        self.cfg = cfg
        self.folder = folder
        self.model = model
        self.data = data
        self.config = config
        self.device = device
        self.history: List[Dict[str, float]] = []
        if cfg.channels_last:
            model.to(memory_format=torch.channels_last)
        self.loader_train, self.loader_val = self._create_loaders()

        num_classes = len(data.label_names)
        self.mixup = None
        if cfg.mixup > 0 or cfg.cutmix > 0:
            self.mixup = Mixup(cfg.mixup, cfg.cutmix, label_smoothing=cfg.smoothing, num_classes=num_classes)
        self.task = ClassificationTask(model, device=device, verbose=False, **self._loss())
        self.task.criterion = EachHead(self.task.criterion)
        self.optimizer = create_optimizer_v2(
            model, opt=cfg.opt, lr=cfg.lr, weight_decay=cfg.weight_decay, layer_decay=cfg.layer_decay
        )
        self.scheduler, self.num_epochs = create_scheduler_v2(
            self.optimizer,
            sched=cfg.sched,
            num_epochs=cfg.epochs,
            warmup_epochs=min(cfg.warmup_epochs, cfg.epochs / 2),
            warmup_lr=cfg.warmup_lr,
            min_lr=cfg.min_lr,
            step_on_epochs=False,
            updates_per_epoch=len(self.loader_train),
        )
        dtype = torch.bfloat16 if cfg.amp_dtype == 'bfloat16' else torch.float16
        self.autocast = (lambda: torch.autocast(device.type, dtype)) if cfg.amp else nullcontext
        self.scaler = NativeScaler(device.type) if cfg.amp and cfg.amp_dtype == 'float16' else None

    def _create_loaders(self):
        cfg = self.cfg
        shared = dict(
            input_size=self.config['input_size'],
            interpolation=self.config['interpolation'],
            mean=self.config['mean'],
            std=self.config['std'],
            num_workers=cfg.workers,
            use_prefetcher=False,
            device=self.device,
        )
        batch_size = cfg.batch_size
        if 0 < len(self.data.train) < batch_size:
            # timm's training loader drops the last batch where it is not full
            batch_size = max(len(self.data.train) // 2 * 2, 1)
            _logger.warning('batch_size: %d, since there are no more images to train on.', batch_size)
        train = create_loader(
            self.data.train,
            batch_size=batch_size,
            is_training=True,
            no_aug=cfg.no_aug,
            scale=tuple(cfg.scale),
            ratio=tuple(cfg.ratio),
            hflip=cfg.hflip,
            vflip=cfg.vflip,
            # timm's colour jitter wants colours
            color_jitter=cfg.color_jitter if self.config['input_size'][0] == 3 else 0.0,
            auto_augment=cfg.aa,
            re_prob=cfg.reprob,
            re_mode='pixel',
            **shared,
        )
        val = create_loader(
            self.data.val,
            batch_size=cfg.validation_batch_size or cfg.batch_size,
            crop_pct=self.config['crop_pct'],
            crop_mode=self.config['crop_mode'],
            **shared,
        )
        return train, val

    def _loss(self) -> Dict[str, Any]:
        if not self.cfg.balance_classes:
            return dict(criterion_kwargs=dict(smoothing=self.cfg.smoothing, soft_targets=self.mixup is not None))
        counts = self.data.counts
        if counts is None or self.mixup is not None:
            raise ValueError('balance_classes: needs a dataset that knows its labels, and no mixup or cutmix.')
        weight = torch.tensor([sum(counts) / (len(counts) * max(count, 1)) for count in counts])
        return dict(criterion=nn.CrossEntropyLoss(weight=weight, label_smoothing=self.cfg.smoothing))

    @property
    def best(self) -> Dict[str, float]:
        """The row of the best epoch so far."""
        sign = -1 if self.cfg.eval_metric == 'loss' else 1
        return max(self.history, key=lambda row: sign * row[f'eval_{self.cfg.eval_metric}'])

    def train(self) -> Path:
        """Train the epochs that are left, and write the folder of the finished model."""
        if self.history and self.best is self.history[-1]:
            self._save_best()  # a kill may have come between the checkpoint and this
        for epoch in range(len(self.history), self.num_epochs):
            start = time.perf_counter()
            # each epoch draws from its own seed, so that a resumed run is the run that was not interrupted
            random_seed(self.cfg.seed + epoch)
            train_loss = self._train_epoch(epoch)
            metrics = evaluate(self.model, self.loader_val, self.device, self.autocast)
            row = dict(epoch=epoch, train_loss=train_loss, **{f'eval_{name}': metrics[name] for name in metrics})
            row.update(lr=self.optimizer.param_groups[0]['lr'], seconds=round(time.perf_counter() - start, 1))
            self.history.append(row)
            self._write_checkpoint()
            if self.best is row:
                self._save_best()
            self._write_summary()
            print(
                f'epoch {epoch}: train loss {train_loss:.3f}, validation loss {row["eval_loss"]:.3f}, '
                f'top1 {row["eval_top1"]:.2f}, balanced {row["eval_balanced"]:.2f}, {row["seconds"]:.0f} s',
                flush=True,
            )
        return self.folder

    def _train_epoch(self, epoch: int) -> float:
        self.model.train()
        losses = AverageMeter()
        num_updates = epoch * len(self.loader_train)
        with tqdm(self.loader_train, desc=f'epoch {epoch + 1}/{self.num_epochs}', leave=False) as bar:
            for x, target in bar:
                x, target = x.to(self.device), target.to(self.device)
                if self.mixup is not None:
                    x, target = self.mixup(x, target)
                if self.cfg.channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                with self.autocast():
                    loss = self.task(x, target)['loss']
                self.optimizer.zero_grad()
                self._step(loss)
                losses.update(loss.item(), len(x))
                if not torch.isfinite(loss):
                    raise ValueError(f'lr: the loss became {loss.item()} in epoch {epoch}; lower lr or set clip_grad.')
                num_updates += 1
                if self.scheduler is not None:
                    self.scheduler.step_update(num_updates=num_updates)
                bar.set_postfix(loss=f'{losses.avg:.3f}')
        return losses.avg

    def _step(self, loss: torch.Tensor) -> None:
        clip_grad = self.cfg.clip_grad
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip_grad=clip_grad, parameters=self.model.parameters())
            return
        loss.backward()
        if clip_grad is not None:
            dispatch_clip_grad(self.model.parameters(), value=clip_grad)
        self.optimizer.step()

    def _identity(self) -> Dict[str, Any]:
        """What a checkpoint must agree on with the run that goes on from it."""
        cfg = self.model.pretrained_cfg
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        settings = dict(opt=self.cfg.opt, head_loss=self.cfg.head_loss)
        return dict(arch=cfg['architecture'], label_names=self.data.label_names, **settings, shapes=shapes)

    def _save_best(self) -> None:
        hub.save(self.model, self.folder, self.data.label_names, self.config, self._card())

    def _write_checkpoint(self) -> None:
        state = dict(
            **self._identity(),
            epoch=len(self.history) - 1,
            history=self.history,
            state_dict=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        if self.cfg.autotune:
            state['autotuned'] = dict(amp=self.cfg.amp, channels_last=self.cfg.channels_last)
        if self.scaler is not None:
            state['scaler'] = self.scaler.state_dict()
        with replacing(self.folder / CHECKPOINT_NAME) as path:
            torch.save(state, path)

    def restore(self, path: Path, state: Dict[str, Any]) -> None:
        """Go on from a checkpoint, whose content was read.

        Raises:
            ValueError: for a file that is no checkpoint of this run's architecture, classes and optimizer.
        """
        try:
            found = {name: state[name] for name in self._identity()}
        except KeyError as error:
            raise ValueError(f'resume: {path} is not a checkpoint of a fine-tuning run ({error}).') from error
        for name, own in self._identity().items():
            if found[name] != own:
                what = ('other weights', 'these') if name == 'shapes' else (found[name], own)
                raise ValueError(f'resume: {path} is of another run: its {name} is {what[0]}, not {what[1]}.')
        self.model.load_state_dict(state['state_dict'])
        self.optimizer.load_state_dict(state['optimizer'])
        if self.scaler is not None and 'scaler' in state:
            self.scaler.load_state_dict(state['scaler'])
        self.history = state['history']

    def _write_summary(self) -> None:
        with replacing(self.folder / SUMMARY_NAME) as path, path.open('w', newline='') as file:
            writer = csv.DictWriter(file, fieldnames=list(self.history[0]), lineterminator='\n')
            writer.writeheader()
            writer.writerows(self.history)
        if importlib.util.find_spec('matplotlib') is not None:
            with replacing(self.folder / CURVES_NAME) as path:
                plot_curves(self.history, path)

    def _card(self) -> str:
        cfg, best = self.cfg, self.best
        data_name = cfg.dataset or Path(str(cfg.data_dir)).resolve().name
        # huggingface_hub tells results apart by type and config of the data, not by its name
        task = dict(
            task_type='image-classification',
            dataset_type='imagefolder',
            dataset_name=data_name,
            dataset_config=data_name,
        )
        results = [
            EvalResult(
                **task, metric_type='accuracy', metric_name='top-1 (%)', metric_value=round(best['eval_top1'], 2)
            ),
            EvalResult(
                **task,
                metric_type='balanced_accuracy',
                metric_name='balanced accuracy (%)',
                metric_value=round(best['eval_balanced'], 2),
            ),
        ]
        start = f'the weights `{self.model.pretrained_cfg.get("tag")}`' if cfg.pretrained else 'random weights'
        settings = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
        recipe = ', '.join(
            f'{name}={settings[name]}'
            for name in (
                'epochs',
                'batch_size',
                'opt',
                'lr',
                'weight_decay',
                'sched',
                'layer_decay',
                'smoothing',
                *(['head_loss'] if cfg.head_loss != 'sum' else []),
                'seed',
            )
        )
        return render_card(
            self.model,
            model_name=self.folder.resolve().name,
            description=f'`{cfg.model}` fine-tuned with timm-vitres from {start}.',
            recipe=f'{self.data.description}. {recipe}.',
            source='local-dir:.',
            label_names=self.data.label_names,
            data_config=self.config,
            results=results,
            result_note=(
                f'Measured after epoch {int(best["epoch"])} on {datetime.date.today().isoformat()}, on the validation '
                f'images, by which this epoch was chosen ({cfg.eval_metric}).'
            ),
            license=self.model.pretrained_cfg.get('license') if cfg.pretrained else None,
            picture=CURVES_NAME if importlib.util.find_spec('matplotlib') is not None else None,
        )


def plot_curves(history: List[Dict[str, float]], path: Path) -> None:
    """Draw loss and accuracy by epoch as a PNG."""
    from matplotlib.figure import Figure

    epochs = [row['epoch'] + 1 for row in history]
    figure = Figure(figsize=(9, 3.5), layout='constrained')
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row['train_loss'] for row in history], marker='.', label='training')
    loss.plot(epochs, [row['eval_loss'] for row in history], marker='.', label='validation')
    accuracy.plot(epochs, [row['eval_top1'] for row in history], marker='.', label='top-1')
    accuracy.plot(epochs, [row['eval_balanced'] for row in history], marker='.', label='balanced')
    for axes, name in ((loss, 'loss'), (accuracy, 'validation accuracy (%)')):
        axes.set(xlabel='epoch', ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, format='png')
