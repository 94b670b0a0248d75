"""Pictures, as PNGs by matplotlib (`pip install 'timm-vitres[plot]'`).

Curves, confusions and mistakes of a run; the runs of a comparison; explanations and predictions of images.
"""

import importlib
import math
import textwrap
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

import numpy as np
from PIL import Image

from .checks import is_installed, on_one_line
from .data import open_image
from .explanation import Explanation
from .labels import printable
from .prediction import Prediction
from .walking import shown
from .writing import replacing

RESNET_TITLE = 'ResNet: Grad-CAM of its last stage'
VIT_TITLE = 'ViT: attention rollout'
NUMBERED = 30  # a confusion matrix of up to so many classes has numbers in its cells
NAMED = 100  # and names at its sides
DRAWN = {'Source': 'timm-vitres'}  # what a picture holds that its command may draw anew
MOST_DRAWN = 400  # images on one picture, four in a row
MATRIX = 11.0  # inches of the side of a larger one


def why_not() -> str:
    """Return why no picture can be drawn, '' where they can: they need a matplotlib that can be imported."""
    if not is_installed('matplotlib'):
        return 'needs matplotlib, pip install "timm-vitres[plot]"'
    try:
        importlib.import_module('matplotlib.figure')
    except Exception as error:  # one that was built for another NumPy raises any, a wrong MPLBACKEND a ValueError
        return f'the matplotlib that is installed can not be imported ({on_one_line(error)})'
    return ''


def can_draw() -> bool:
    """Return whether pictures can be drawn."""
    return not why_not()


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
    panels = [(f'{printable(explanation.label)}  {100 * explanation.probability:.0f}%', None)]
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
        axes.set_title(title, fontsize=11, parse_math=False)
        axes.set_axis_off()
        axes.imshow(image if values is None else image.convert('L'), cmap='gray')
        if values is not None:
            # the brightest hundredth is saturated, or a single patch would darken all others
            axes.imshow(values, cmap='inferno', alpha=0.6, vmin=0, vmax=max(float(np.quantile(values, 0.99)), 1e-6))
    with replacing(path) as beside:
        figure.savefig(beside, dpi=100, format='png', metadata=DRAWN)


def new_figure(purpose: str, width: float, height: float):
    """Return an empty matplotlib figure, in inches; ValueError, naming what it is for, where none can be made."""
    reason = why_not()
    if reason:
        raise ValueError(f'{purpose}: {reason}.')
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def plot_predictions(predictions: Sequence[Prediction], path: Path, titles: Sequence[str] = ()) -> None:
    """Draw images with their predicted classes as a PNG; `titles` are further lines above each.

    Raises:
        ValueError: for more images than a picture can hold.
    """
    check_drawn(len(predictions))
    best = [
        f'{printable(prediction.labels[0])}  {100 * prediction.probabilities[0]:.0f}%' for prediction in predictions
    ]
    lines = ['\n'.join([*titles[index : index + 1], line]) for index, line in enumerate(best)]
    plot_images((open_image(prediction.image) for prediction in predictions), lines, path, metadata=DRAWN)


def check_drawn(count: int) -> None:
    """Raise ValueError for more images than one picture shall show."""
    if count > MOST_DRAWN:
        raise ValueError(f'plot: got {count} images, expected at most {MOST_DRAWN} on one picture.')


def plot_images(
    images: Iterable[Image.Image],
    titles: Sequence[str],
    path: Path,
    heading: str = '',
    metadata: Optional[Dict[str, str]] = None,
) -> None:
    """Draw images as a PNG, four in a row, each with its title above it, and a heading above all.

    Args:
        metadata: Texts that the file holds, by their names.
    """
    columns = min(len(titles), 4)
    rows = math.ceil(len(titles) / columns)
    lines = max(title.count('\n') for title in titles) + 1
    figure = new_figure('plot', 3 * columns, (3 + 0.2 * lines) * rows + 0.3 * bool(heading))
    if heading:
        figure.suptitle(heading, fontsize=11, parse_math=False)
    for index, (image, title) in enumerate(zip(images, titles)):
        small = image.convert('RGB')  # a copy
        small.thumbnail((600, 600))  # twice as large as it is drawn
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(small)
        axes.set_anchor('N')  # titles stand in a line
        axes.set_axis_off()
        axes.set_title(title, fontsize=10, parse_math=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=100, format='png', metadata=metadata)


def plot_confusion(
    cells: np.ndarray, label_names: Sequence[str], path: Path, title: str, beside: Sequence[str] = ()
) -> None:
    """Draw a confusion matrix as a PNG: colours are shares of the images of the true class.

    Args:
        cells: What the matrix has beside zeros: (n, 3) whole numbers, of true class, predicted class, images.
        beside: Lines that stand beside a matrix of so many classes that its cells have no numbers.
    """
    number = len(label_names)
    is_numbered, is_named = number <= NUMBERED, number <= NAMED
    side = min(max(3.6, (0.8 if number <= 10 else 0.45) * number), 14.0) if is_named else MATRIX  # inches
    size = min(10.0, 0.75 * 72 * side / number) if is_named else 10.0  # points
    names = [shortened(name) for name in label_names]
    margin = max(map(len, names)) * 0.6 * size / 72 if is_named else 0.4
    width = side + margin + (1.6 if is_numbered else 5.6)
    figure = new_figure('confusion', width, side + margin + 1.0)
    figure.set_layout_engine('compressed')  # the matrix is square, whatever stands beside it
    lines = [textwrap.fill(line, int(12 * width)) for line in title.splitlines()]
    figure.suptitle('\n'.join(lines), fontsize=11, parse_math=False)
    if is_numbered:
        axes = figure.subplots()
    else:
        axes, text = figure.subplots(1, 2, width_ratios=[side, 3.6])
        text.set_axis_off()
        text.text(0, 1, '\n'.join(beside), va='top', fontsize=10, linespacing=1.5, parse_math=False)
    true, predicted, counts = cells.T
    support = np.bincount(true, counts, number).astype(int)
    shares = 100 * counts / support[true]
    drawn = _draw_shares(axes, true, predicted, shares, support)
    figure.colorbar(drawn, ax=axes, label='% of the images of the true class', aspect=40, pad=0.02)
    axes.set(xlabel='predicted class', ylabel='true class (images)')
    if is_named:
        axes.set_xticks(range(number), names, fontsize=size, rotation=90 if number > 3 else 0, parse_math=False)
        rows = [f'{name} ({total})' for name, total in zip(names, support)]
        axes.set_yticks(range(number), rows, fontsize=size, parse_math=False)
    else:
        axes.set(xlabel='predicted class, by index', ylabel='true class, by index')
    for row, column, count, share in zip(true, predicted, counts, shares) if is_numbered else ():
        told = f'{count}\n{share:.0f}%' if number <= 10 else str(count)
        colour = 'white' if share > 55 else 'black'
        axes.text(column, row, told, ha='center', va='center', color=colour, fontsize=size)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format='png')


def _draw_shares(axes: Any, true: np.ndarray, predicted: np.ndarray, shares: np.ndarray, support: np.ndarray) -> Any:
    """Draw the cells of a confusion matrix, grey for classes without images; return what a colour bar is made of."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm

    number, blues = len(support), colormaps['Blues']
    rows = np.where(support > 0, 1.0, 0.85)[:, None]
    axes.imshow(rows, cmap='gray', vmin=0, vmax=1, extent=(-0.5, number - 0.5, number - 0.5, -0.5))
    # a rare confusion among many classes would be too pale to be seen
    norm = PowerNorm(1 if number <= NUMBERED else 0.5, 0, 100)
    if number <= NAMED:
        matrix = np.ma.zeros((number, number))
        matrix[true, predicted] = shares
        matrix[support == 0] = np.ma.masked
        return axes.imshow(matrix, cmap=blues, norm=norm, interpolation='nearest')
    # cells would be smaller than what can be seen, so all that are not empty become dots that can be
    dark = ListedColormap(blues(np.linspace(0.35, 1, 256)))
    order = np.argsort(shares)  # the greatest shares lie on top
    size = max(72 * MATRIX / number, 2.5) ** 2
    options = dict(marker='s', linewidths=0, cmap=dark, norm=norm)
    return axes.scatter(predicted[order], true[order], size, shares[order], **options)


def plot_comparison(scores: Mapping[str, Sequence[float]], notes: Mapping[str, str], title: str, path: Path) -> None:
    """Draw the runs of a comparison as a PNG: a line for each arm, a point for each seed, a bar for their mean.

    Args:
        scores: Of every arm, one for each seed.
        notes: What stands below an arm's name.
        title: What the scores are.
    """
    order = sorted(scores, key=lambda name: np.mean(scores[name]))
    figure = new_figure('comparison', 8, 0.6 * len(order) + 1.2)
    axes = figure.subplots()
    for place, name in enumerate(order):
        mean = float(np.mean(scores[name]))
        axes.plot([mean, mean], [place - 0.3, place + 0.3], color='C0', linewidth=2.5)
        axes.scatter(scores[name], [place] * len(scores[name]), color='C1', s=36, alpha=0.8, zorder=3)
        axes.annotate(f'{mean:.1f}', (mean, place + 0.3), (0, 2), textcoords='offset points', ha='center', fontsize=9)
    names = [f'{shortened(name, 40)}\n{notes[name]}' for name in order]
    axes.set_yticks(range(len(order)), names, fontsize=9, parse_math=False)
    axes.set(xlabel=title, ylim=(-0.6, len(order) - 0.3))
    axes.grid(axis='x', alpha=0.3)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, format='png')


def shortened(text: str, length: int = 24) -> str:
    """Return a text on one line that is no longer than `length`: what is left out in its middle becomes an ellipsis."""
    text = shown(text)
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f'{text[: length - 1 - end]}…{text[len(text) - end :]}'
