"""What a fine-tuning run says of itself: metrics, a table and curves by epoch, the card of its model."""

import csv
import datetime
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from huggingface_hub import EvalResult
from timm.task import ClassificationEvaluator
from torch import nn

from ..pictures import can_draw, plot_curves
from ..publishing.cards import DATASET_TYPE, MEASURED, render_card
from ..views import averaged
from ..walking import public_name, shown
from ..weights.files import CURVES_NAME, SUMMARY_NAME
from ..weights.sources import LOCAL
from ..writing import replacing
from .held_out import Answers, report
from .loaders import Batches
from .processes import Processes
from .runs import Record, given_settings

ALWAYS_TOLD = ('epochs', 'batch_size', 'opt', 'lr', 'weight_decay', 'sched', 'layer_decay', 'smoothing', 'seed')
# settings that a card's recipe leaves out: others of its sentences have them, or they say where, and not how
TOLD_ELSEWHERE = (
    *('data_dir', 'dataset', 'dataset_download', 'train_split', 'val_split', 'val_frac', 'class_map', 'input_key'),
    *('target_key', 'train_num_samples', 'val_num_samples', 'skip_bad', 'no_check', 'model', 'pretrained'),
    *('pretrained_path', 'initial_checkpoint', 'model_kwargs', 'img_size', 'in_chans', 'mean', 'std', 'interpolation'),
    *('crop_pct', 'output', 'resume', 'eval_metric', 'tta', 'checkpoint_hist', 'log_wandb', 'log_tensorboard'),
    *('device', 'workers', 'validation_batch_size', 'autotune'),
)
WEIGHTS = {'eval': 'the weights', 'ema': 'the averaged weights'}  # whose metrics a row has, by the names' beginning


class Best(NamedTuple):
    """The best epoch of a run."""

    row: Dict[str, float]
    weights: str  # 'eval' for the plain weights, 'ema' for the averaged ones

    def metric(self, name: str) -> float:
        """Return a metric of the best weights of that epoch."""
        return self.row[f'{self.weights}_{name}']


def evaluate(
    model: nn.Module,
    batches: Batches,
    label_names: Sequence[str],
    device: Union[str, torch.device] = 'cpu',
    autocast: Any = nullcontext,
    tta: str = '',
    processes: Optional[Processes] = None,
) -> Tuple[Dict[str, float], Answers]:
    """Evaluate a model on batches, of which each process has its share.

    Returns:
        Metrics over all images: loss (cross-entropy), and in percent top1, top5, balanced (mean recall of the classes)
        and macro_f1 (mean F1 of the classes); and the answers to all images.
    """
    processes = processes or Processes()
    model.eval()
    evaluator = ClassificationEvaluator(device=device, max_samples=batches.num_valid)
    indices = batches.indices()
    parts: List[Answers] = []
    with torch.no_grad():  # not inference_mode, whose tensors a sharded model could not use in training again
        for x, target in processes.bar(batches, 'validation'):
            with autocast():
                output = averaged(model, x.to(device), tta)
            evaluator.update(output, target.to(device))
            parts.append(Answers.of(output, target, islice(indices, len(target))))
    metrics = dict(evaluator.compute(distributed=processes.count > 1))
    answers = Answers.joined(part for parts in processes.gathered(parts) for part in parts)
    held_out = report(answers, label_names)
    metrics.update(balanced=held_out.balanced, macro_f1=held_out.macro_f1)
    return metrics, answers


def best_epoch(history: List[Dict[str, float]], eval_metric: str) -> Best:
    """Return the best epoch, the first one where several are, and which of its weights are the best."""
    sign = -1 if eval_metric == 'loss' else 1
    candidates = [Best(row, name) for row in history for name in WEIGHTS if f'{name}_{eval_metric}' in row]
    return max(candidates, key=lambda best: sign * best.metric(eval_metric))


def write_summary(history: List[Dict[str, float]], folder: Path) -> None:
    """Write the curves of a run, and then the table of its epochs, so that a whole table means that all is written."""
    if can_draw():
        with replacing(folder / CURVES_NAME) as path:
            plot_curves(history, path)
    names = list(dict.fromkeys(name for row in history for name in row))  # an older version wrote fewer
    with replacing(folder / SUMMARY_NAME) as path, path.open('w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=names, lineterminator='\n', restval='')
        writer.writeheader()
        writer.writerows(history)


def read_summary(folder: Path) -> List[Dict[str, float]]:
    """Return the epochs in the table of a folder; none where it can't be read."""
    try:
        with (folder / SUMMARY_NAME).open(newline='') as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error):
        return []


def run_card(record: Record, best: Best, model: nn.Module, name: str, steps: Dict[str, Any]) -> str:
    """Return the card of a run's model.

    Args:
        best: The epoch, and the weights, that the model is of.
        name: The card's title.
        steps: The learning rate, the images of each process in a batch, which may be fewer than were asked for, and the
            number of processes, of the epochs that this process has trained.
    """
    cfg = record.trained_cfg
    data_name = public_name(cfg.dataset) if cfg.dataset else shown(Path(str(cfg.data_dir)).resolve().name)
    # huggingface_hub tells results apart by type and config of the data, not by its name
    task: Dict[str, Any] = dict(
        task_type='image-classification',
        dataset_type=DATASET_TYPE,
        dataset_name=data_name,
        dataset_config=data_name,
    )
    kinds = dict(
        top1=('accuracy', 'top-1 (%)'),
        balanced=('balanced_accuracy', 'balanced accuracy (%)'),
        macro_f1=('f1', 'macro F1 (%)'),
    )
    results = [
        EvalResult(**task, metric_type=kind, metric_name=title, metric_value=round(best.metric(metric), 2))
        for metric, (kind, title) in kinds.items()
    ]
    files = [Path(path).name for path in (cfg.pretrained_path, cfg.initial_checkpoint) if path]
    start = 'pretrained weights' if cfg.pretrained else 'random weights'
    tag = model.pretrained_cfg.get('tag')
    if cfg.pretrained and ':' in cfg.model:  # a folder or a repository, which may have the tag of what it began with
        start = 'its weights'
    elif cfg.pretrained and tag:
        start = f'the weights `{tag}`'
    start = f'the weights in `{files[0]}`' if files else start
    measured = WEIGHTS[best.weights] + (f', averaged over views of each image ({cfg.tta})' if cfg.tta else '')
    return render_card(
        model,
        model_name=name,
        description=f'`{_without_place(cfg.model)}` fine-tuned with timm-vitres from {start}.',
        recipe=f'{record.data["description"]}. {_recipe(record, **steps)}.',
        source='local-dir:.',
        label_names=record.label_names,
        data_config=record.data_config,
        results=results,
        result_note=(
            f'{MEASURED} {int(best.row["epoch"])} on {datetime.date.today().isoformat()}, on the validation '
            f'images, by which this epoch was chosen ({cfg.eval_metric}), with {measured}.'
        ),
        license=model.pretrained_cfg.get('license') if cfg.pretrained else None,
        picture=CURVES_NAME if can_draw() else None,
    )


def _recipe(record: Record, lr: float, batch_size: int, processes: int) -> str:
    """Return what a run was trained with, as name=value: what every run has, and what this one was given beside."""
    cfg = record.trained_cfg
    names = dict.fromkeys([*ALWAYS_TOLD, *(name for name in given_settings(cfg) if name not in TOLD_ELSEWHERE)])
    values = {name: getattr(cfg, name) for name in names}
    values.update(batch_size=batch_size, lr=f'{lr:g}')
    if cfg.kd_model_name:
        values['kd_model_name'] = _without_place(cfg.kd_model_name).removeprefix(LOCAL)
    values.update(dict(processes=processes) if processes > 1 else {})
    return ', '.join(f'{name}={value}' for name, value in values.items())


def _without_place(name: str) -> str:
    """Return a model's name, without the place of its folder, which is nobody's business."""
    return LOCAL + Path(name.removeprefix(LOCAL)).name if name.startswith(LOCAL) else name
