"""Classification of images.

paths -> `predict` -> the likeliest classes of each image, and a sentence for each image that failed.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Collection, Iterator, List, Mapping, NamedTuple, Tuple, Union

import torch
from timm.utils import unwrap_model
from torch import nn
from tqdm import tqdm

from .checks import between, conform
from .data import data_config, image_mode, open_image, to_batch
from .folders import shown
from .labels import check_logits, label_names
from .views import averaged, check_tta

MAX_CLASSES = 2**31 - 1  # torch's


class Prediction(NamedTuple):
    """The likeliest classes of an image, best first."""

    image: str
    labels: List[str]
    probabilities: List[float]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode, and back: in training mode its BatchNorms would learn of the images."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()  # some of timm's models drop what they keep for evaluation when their mode changes
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _is_list(images: Any) -> bool:
    is_many = isinstance(images, Collection) and not isinstance(images, (str, bytes, Mapping))
    return is_many or hasattr(images, '__array__')


def predict(
    model: nn.Module, images: Collection[Union[str, Path]], topk: int = 5, tta: str = ''
) -> Tuple[List[Prediction], List[str]]:
    """Classify image files.

    Args:
        model: A timm model with a head; it predicts as in evaluation mode, and its mode stays what it is.
        images: Paths.
        topk: Number of classes to return; all of them where there are fewer.
        tta: Test-time augmentation: '', 'flip' or 'shift' (`views.averaged`).

    Returns:
        Predictions, and a sentence for each image that could not be read, or whose outputs are not finite.

    Raises:
        ValueError: for a model without classes, or one that takes no images, and an impossible `topk` or `tta`.
        TypeError: for one path instead of a list, for anything that is no path, and for a model that is no module.
    """
    if isinstance(images, (str, Path)):
        raise TypeError(f'images: got the one path {shown(images)}, expected a list of paths.')
    wrong = [image for image in images if not isinstance(image, (str, Path))] if _is_list(images) else [images]
    if wrong:
        raise TypeError(f'images: got {type(wrong[0]).__name__}, expected a list of paths.')
    topk = conform('topk', topk, Annotated[int, between(1, MAX_CLASSES)])
    check_tta(tta)
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: got {type(model).__name__}, expected a torch.nn.Module; timm.create_model makes one.')
    plain = unwrap_model(model)
    if not getattr(plain, 'num_classes', 0) or getattr(plain, 'global_pool', None) == '':
        raise ValueError('model: it has no classes, or does not pool, so it predicts none; load one with a head.')
    names = label_names(plain)
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
        with torch.inference_mode(), _evaluating(model):
            logits = averaged(model, x, tta)
            check_logits(logits, names)
            probabilities = logits[0].softmax(-1)
        if not torch.isfinite(probabilities).all():
            failed.append(f'image: for {shown(path)} the model gives no finite numbers, so there is no prediction.')
            continue
        best = probabilities.topk(min(topk, len(names)))
        labels = [names[index] for index in best.indices.tolist()]
        predictions.append(Prediction(str(path), labels, best.values.tolist()))
    return predictions, failed
