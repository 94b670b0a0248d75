"""Classification of images.

paths -> `predict_each` -> for each image, its likeliest classes, or a sentence that says why there are none, as they
come; `predict` collects them.
"""

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Collection,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    Union,
    cast,
)

import torch
from timm.data import create_transform
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .checks import MAX_BATCH, between, check_choice, conform
from .data import as_model_takes, data_config, image_mode, open_image
from .labels import check_logits, label_names
from .plugins import taught, teach
from .views import TTA, averaged
from .walking import shown

MAX_CLASSES = 2**31 - 1  # torch's
MAX_WORKERS = 1024


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


class _Images(Dataset):
    """Image files as a model takes them, (C, H, W); of one that can't be read, a sentence that says why."""

    def __init__(self, paths: List[Union[str, Path]], config: Dict[str, Any]):
        self.paths, self.mode = paths, image_mode(config['input_size'][0])
        self.transform = create_transform(**config, is_training=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Union[torch.Tensor, str]:
        try:
            return cast(torch.Tensor, self.transform(open_image(self.paths[index], self.mode)))
        except (OSError, ValueError) as error:
            return str(error)


_Batch = Tuple[Optional[torch.Tensor], List[Optional[str]]]


def _collate(images: List[Union[torch.Tensor, str]]) -> _Batch:
    """Return what is readable as one tensor (a worker sends each with a file descriptor), and, of all, what failed."""
    readable = [image for image in images if not isinstance(image, str)]
    failures = [image if isinstance(image, str) else None for image in images]
    return torch.stack(readable) if readable else None, failures


def predict(
    model: nn.Module,
    images: Collection[Union[str, Path]],
    topk: int = 5,
    tta: str = '',
    batch_size: int = 32,
    workers: int = 0,
) -> Tuple[List[Prediction], List[str]]:
    """Classify image files.

    Args: those of `predict_each`.

    Returns:
        Predictions, and a sentence for each image that could not be read, or whose outputs are not finite.

    Raises: what `predict_each` raises.
    """
    predictions: List[Prediction] = []
    failed: List[str] = []
    for result in predict_each(model, images, topk, tta, batch_size, workers):
        if isinstance(result, str):
            failed.append(result)
        else:
            predictions.append(result)
    return predictions, failed


def predict_each(
    model: nn.Module,
    images: Collection[Union[str, Path]],
    topk: int = 5,
    tta: str = '',
    batch_size: int = 32,
    workers: int = 0,
    bar: bool = True,
) -> Iterator[Union[Prediction, str]]:
    """Classify image files one after the other, however many.

    Args:
        model: A timm model with a head; it predicts as in evaluation mode, and its mode stays what it is.
        images: Paths.
        topk: Number of classes to return; all of them where there are fewer.
        tta: Test-time augmentation: '', 'flip' or 'shift' (`views.averaged`).
        batch_size: Images that the model sees at once.
        workers: Processes that read images; with 0 it is this one.
        bar: Whether ten images or more have a progress bar.

    Returns:
        An iterator: for each image, in their order, its prediction, or a sentence where it could not be read, or the
        outputs are not finite.

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
    batch_size = conform('batch_size', batch_size, Annotated[int, between(1, MAX_BATCH)])
    workers = conform('workers', workers, Annotated[int, between(0, MAX_WORKERS)])
    check_choice('tta', tta, TTA)
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: got {type(model).__name__}, expected a torch.nn.Module; timm.create_model makes one.')
    plain = unwrap_model(model)
    if not getattr(plain, 'num_classes', 0) or getattr(plain, 'global_pool', None) == '':
        raise ValueError('model: it has no classes, or does not pool, so it predicts none; load one with a head.')
    pictures = _Images(list(images), data_config(model))
    options = dict(collate_fn=_collate, worker_init_fn=partial(teach, taught()))
    # starting workers would draw from torch's own; it is where torch's default device is
    options['generator'] = torch.Generator(torch.empty(0).device)
    loader = DataLoader(pictures, batch_size, num_workers=workers, **options) if len(pictures) else ()
    return _results(model, pictures.paths, loader, topk, tta, bar and len(pictures) >= 10)


def _results(
    model: nn.Module, paths: List[Union[str, Path]], loader: Iterable[_Batch], topk: int, tta: str, has_bar: bool
) -> Iterator[Union[Prediction, str]]:
    names = label_names(unwrap_model(model))
    remaining = iter(paths)
    with tqdm(total=len(paths), desc='predicting', leave=False, disable=not has_bar) as bar:
        for x, failures in loader:
            rows = iter(() if x is None else _probabilities(model, x, tta, names))
            for failure, path in zip(failures, remaining):
                yield _best(path, next(rows), topk, names) if failure is None else failure
            bar.update(len(failures))


def _probabilities(model: nn.Module, x: torch.Tensor, tta: str, names: List[str]) -> torch.Tensor:
    """Return the probabilities of classes (B, classes), on the CPU, of images (B, C, H, W) there."""
    with torch.inference_mode(), _evaluating(model):
        logits = averaged(model, as_model_takes(x, model), tta)
        check_logits(logits, names)
        return logits.softmax(-1).cpu()


def _best(path: Union[str, Path], probabilities: torch.Tensor, topk: int, names: List[str]) -> Union[Prediction, str]:
    if not torch.isfinite(probabilities).all():
        return f'image: for {shown(path)} the model gives no finite numbers, so there is no prediction.'
    best = probabilities.topk(min(topk, len(names)))
    return Prediction(str(path), [names[index] for index in best.indices.tolist()], best.values.tolist())
