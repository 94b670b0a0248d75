"""Classes of images: names, probabilities, and a picture of both."""

import math
from contextlib import suppress
from pathlib import Path
from typing import List, NamedTuple, Sequence, Tuple, Union

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from tqdm import tqdm

from .data import data_config, image_mode, open_image, to_batch
from .files import replacing
from .folders import shown
from .labels import normalise_label_names


class Prediction(NamedTuple):
    """The likeliest classes of an image, best first."""

    image: str
    labels: List[str]
    probabilities: List[float]


def label_names(model: nn.Module) -> List[str]:
    """Return the names of a model's classes: those of its config, ImageNet's where it has ImageNet's number of
    classes, else 'class 0' and so on."""
    cfg = getattr(model, 'pretrained_cfg', {})
    num_classes = int(model.num_classes)
    with suppress(ValueError):  # names that are missing, or those of other classes
        return normalise_label_names(cfg.get('label_names'), num_classes)
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(num_classes)]
    return [f'class {index}' for index in range(num_classes)]


def predict(model: nn.Module, images: Sequence[Union[str, Path]], topk: int = 5) -> Tuple[List[Prediction], List[str]]:
    """Classify image files.

    Args:
        model: A timm model with a head, in evaluation mode.
        images: Paths.
        topk: How many classes to return; all of them where there are fewer.

    Returns:
        Predictions, and a sentence for each image that could not be read, or for which the model says nothing finite.

    Raises:
        ValueError: for a model without classes, or one that takes no images, and an impossible `topk`.
        TypeError: for one path in place of several, and for what is no path.
    """
    if isinstance(images, (str, Path)):
        raise TypeError(f'images: got the one path {shown(images)}, expected a list of paths.')
    if topk < 1:
        raise ValueError(f'topk: got {topk}, expected a number from 1 up.')
    if not model.num_classes:
        raise ValueError('model: it has no classes (num_classes=0), so it predicts none; load one with a head.')
    names = label_names(model)
    config = data_config(model)
    mode = image_mode(config['input_size'][0])
    predictions: List[Prediction] = []
    failed: List[str] = []
    for path in tqdm(images, desc='predicting', leave=False, disable=len(images) < 10):
        try:
            x = to_batch(open_image(path, mode), model, config)
        except (OSError, ValueError) as error:
            failed.append(str(error))
            continue
        with torch.inference_mode():
            probabilities = model(x)[0].float().softmax(-1)
        if not torch.isfinite(probabilities).all():
            failed.append(f'image: for {shown(path)} the model gives no finite numbers, so there is no prediction.')
            continue
        best = probabilities.topk(min(topk, len(names)))
        labels = [names[index] for index in best.indices.tolist()]
        predictions.append(Prediction(str(path), labels, best.values.tolist()))
    return predictions, failed


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
