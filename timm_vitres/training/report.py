"""What a fine-tuning run says of itself: metrics, a table and curves by epoch, the card of its model."""

import csv
import datetime
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, Union

import torch
from huggingface_hub import EvalResult
from timm.task import ClassificationEvaluator
from torch import nn
from tqdm import tqdm

from ..pictures import draws_curves, plot_curves
from ..publishing.cards import render_card
from ..writing import replacing
from .runs import Record

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


def best_epoch(history: List[Dict[str, float]], eval_metric: str) -> Dict[str, float]:
    """Return the row of the best epoch, the first one where several are."""
    sign = -1 if eval_metric == 'loss' else 1
    return max(history, key=lambda row: sign * row[f'eval_{eval_metric}'])


def write_summary(history: List[Dict[str, float]], folder: Path) -> None:
    """Write the curves of a run, and then the table of its epochs, so that a whole table means that all is written."""
    if draws_curves():
        with replacing(folder / CURVES_NAME) as path:
            plot_curves(history, path)
    with replacing(folder / SUMMARY_NAME) as path, path.open('w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(history)


def count_epochs(folder: Path) -> int:
    """Return how many epochs the table in a folder has; 0 where none is."""
    try:
        with (folder / SUMMARY_NAME).open(newline='') as file:
            return sum(1 for _ in csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return 0


def run_card(record: Record, best: Dict[str, float], model: nn.Module, name: str) -> str:
    """Return the card of a run's model.

    Args:
        best: Row of the epoch that the model is of.
        name: The card's title.
    """
    cfg = record.trained_cfg
    data_name = cfg.dataset or Path(str(cfg.data_dir)).resolve().name
    # huggingface_hub tells results apart by type and config of the data, not by its name
    task: Dict[str, Any] = dict(
        task_type='image-classification',
        dataset_type='imagefolder',
        dataset_name=data_name,
        dataset_config=data_name,
    )
    top1, balanced = round(best['eval_top1'], 2), round(best['eval_balanced'], 2)
    results = [
        EvalResult(**task, metric_type='accuracy', metric_name='top-1 (%)', metric_value=top1),
        EvalResult(**task, metric_type='balanced_accuracy', metric_name='balanced accuracy (%)', metric_value=balanced),
    ]
    start = f'the weights `{model.pretrained_cfg.get("tag")}`' if cfg.pretrained else 'random weights'
    names = ['epochs', 'batch_size', 'opt', 'lr', 'weight_decay', 'sched', 'layer_decay', 'smoothing', 'seed']
    if cfg.head_loss != 'sum':
        names.insert(-1, 'head_loss')
    recipe = ', '.join(f'{name}={getattr(cfg, name)}' for name in names)
    return render_card(
        model,
        model_name=name,
        description=f'`{cfg.model}` fine-tuned with timm-vitres from {start}.',
        recipe=f'{record.data["description"]}. {recipe}.',
        source='local-dir:.',
        label_names=record.label_names,
        data_config=record.data_config,
        results=results,
        result_note=(
            f'Measured after epoch {int(best["epoch"])} on {datetime.date.today().isoformat()}, on the validation '
            f'images, by which this epoch was chosen ({cfg.eval_metric}).'
        ),
        license=model.pretrained_cfg.get('license') if cfg.pretrained else None,
        picture=CURVES_NAME if draws_curves() else None,
    )
