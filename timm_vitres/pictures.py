"""Pictures, as PNGs by matplotlib (`pip install timm-vitres[plot]`): curves of a run, explanations, predictions."""

import math
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np

from .checks import is_installed
from .data import open_image
from .explanation import Explanation
from .prediction import Prediction
from .writing import replacing

RESNET_TITLE = 'ResNet: Grad-CAM of its last stage'
VIT_TITLE = 'ViT: attention rollout'


def draws_curves() -> bool:
    """Return whether curves can be drawn: they need matplotlib."""
    return is_installed('matplotlib')


def plot_curves(history: List[Dict[str, float]], path: Path) -> None:
    """Draw loss and accuracy by epoch as a PNG."""
    epochs = [row['epoch'] + 1 for row in history]
    figure = new_figure('curves', 9, 3.5)
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


def plot_explanation(explanation: Explanation, path: Path) -> None:
    """Draw the image and its maps as one PNG, beside each other, or, where they are wide, one below the other."""
    image = explanation.image
    panels = [(f'{explanation.label}  {100 * explanation.probability:.0f}%', None)]
    panels += [
        (title, values)
        for title, values in ((RESNET_TITLE, explanation.resnet), (VIT_TITLE, explanation.vit))
        if values is not None
    ]
    aspect = image.height / image.width
    wide = aspect < 0.6
    rows, columns = (len(panels), 1) if wide else (1, len(panels))
    side = 8.0 if wide else 4.0  # inches
    figure = new_figure('explain', side * columns, (min(max(side * aspect, 0.8), 12.0) + 0.4) * rows)
    for index, (title, values) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
        axes.imshow(image if values is None else image.convert('L'), cmap='gray')
        if values is not None:
            # the brightest hundredth is saturated, or a single patch would darken all others
            axes.imshow(values, cmap='inferno', alpha=0.6, vmin=0, vmax=max(float(np.quantile(values, 0.99)), 1e-6))
    with replacing(path) as beside:
        figure.savefig(beside, dpi=100, format='png')


def new_figure(purpose: str, width: float, height: float):
    """Return an empty matplotlib figure, in inches; ValueError, naming what it is for, where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(f'{purpose}: needs matplotlib, pip install "timm-vitres[plot]".') from None
    return Figure(figsize=(width, height), layout='constrained')


def plot_predictions(predictions: Sequence[Prediction], path: Path, titles: Sequence[str] = ()) -> None:
    """Draw images with their predicted classes as a PNG; `titles` are further lines above each."""
    columns = min(len(predictions), 4)
    rows = math.ceil(len(predictions) / columns)
    figure = new_figure('plot', 3 * columns, 3.4 * rows)
    for index, prediction in enumerate(predictions):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(open_image(prediction.image))
        axes.set_axis_off()
        best = f'{prediction.labels[0]}  {100 * prediction.probabilities[0]:.0f}%'
        axes.set_title('\n'.join([*titles[index : index + 1], best]), fontsize=10, parse_math=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=100, format='png')
