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
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
from huggingface_hub import EvalResult
from timm.data import Mixup, create_loader
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationEvaluator, ClassificationTask
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad, random_seed
from torch import nn
from tqdm import tqdm

from . import hub
from .cards import render_card
from .data import data_config, image_mode
from .datasets import Data, load_data
from .files import WEIGHTS_NAME, replacing
from .prepare import fastest_training
from .settings import FinetuneCfg
from .vitresnet_dual import VitResNetDual

_logger = logging.getLogger(__name__)

CHECKPOINT_NAME = 'last.pth.tar'
SUMMARY_NAME = 'summary.csv'
CURVES_NAME = 'curves.png'


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
