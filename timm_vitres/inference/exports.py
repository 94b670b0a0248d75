"""A model as a file for a runtime: folded, lowered, one graph for every size, compared with the model before it counts.

model -> `fold` -> a row of `FORMATS` writes it -> the file, loaded again and compared -> renamed into its place
"""

import shutil
import tempfile
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from tqdm import tqdm

from ..checks import check_choice
from ..data import data_config
from ..labels import check_logits, label_names
from ..models.base import Hybrid, ImageSizes
from ..writing import TEMPORARY, check_output, replacing
from .folding import copy_model, fold
from .formats import FORMATS, Format, Run, Source
from .lowering import check_example, check_outputs, difference, forward_only, worst

DAY = 24 * 60 * 60.0  # seconds
LARGEST = 2**15  # pixels a side that a graph for all sizes is captured for
# Outputs may be off by this part of their norm: runtimes add up in another order, and what a low precision costs is
# reported, not judged. Outputs that are off by their whole norm are those of another model
_TOLERANCE = {'fp32': 1e-4, 'bf16': 1.0, 'int8': 1.0}


class Exported(NamedTuple):
    """A file, and how far its outputs are from the model's."""

    path: Path
    difference: float  # norm of the outputs' difference, relative to the outputs' norm
    report: str


def export(
    model: nn.Module,
    path: Union[str, Path],
    format: Optional[str] = None,
    precision: str = 'fp32',
    dynamic: bool = True,
    example: Optional[torch.Tensor] = None,
) -> Exported:
    """Write a model as a file that takes float32 images and returns float32 outputs, without this package.

    The model is folded first. What was written is loaded again and compared with the model, on the example and, if
    `dynamic`, on another size.

    Args:
        model: A timm model (also with features_only), in evaluation mode, on the CPU. One in another
            precision is exported, and compared, as its copy in float32.
        path: The file. An older export there is replaced, if its name ends as one does; anything else is not.
        format: 'onnx' for onnxruntime and others (`pip install 'timm-vitres[export]'`); 'torchscript' for
            `torch.jit.load`; 'pt2' for `torch.export.load`; 'openvino' (`pip install 'timm-vitres[openvino]'`), which
            has a second file beside the first. By default what the file's name says: '.onnx', '.pt' ('.ts',
            '.torchscript'), '.pt2' or '.xml'.
        precision: 'fp32'; 'bf16' (not ONNX); 'int8' (not TorchScript), whose linear layers are quantised (weights
            per channel, activations as they come), by torchao or, of ONNX, by onnxruntime. With an example, ONNX's
            convolutions are, too: their activations' ranges are then those of the example's images. OpenVINO's are
            always, by nncf, and so need an example.
        dynamic: One graph for every height and width that has two tokens or more. If it is False, or the example has
            but one token on a side, or the model is none of this package and takes one size alone, the size is that of
            the example. The batch may always be any.
        example: Images (B, C, H, W) like those to come. By default noise of the model's own size.

    Raises:
        ValueError: for a format that is unknown or not the one of the file's name, a precision that it can't have, a
            missing package, and for models and examples as in `prepare`.
        TypeError: for models as in `prepare`.
        OSError: where the file can't be written, or would replace what is no export.
        RuntimeError: where the format can't hold the model, or what was written does not compute what it does.
    """
    path, format = check_target(path, format, precision, example is not None)
    check_choice('dynamic', dynamic, (False, True))
    images = check_example(model, example)
    source = capture(model, precision, images, example is not None, dynamic)
    row = FORMATS[format]
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f'{TEMPORARY}{path.name[:50]}-'  # of a name that is as long as names can be, too
    _sweep(path.parent, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
        file = Path(folder) / f'model{row.suffixes[0]}'
        error = write_compared(source, file, row, what=str(path))
        _put_in_place(file, path, row)
    report = (
        f'{path}: {format}, {precision}, for {taken_sizes(source)}; its outputs differ by {error:.1e} of their norm.'
    )
    return Exported(path, error, report)


def _sweep(folder: Path, prefix: str) -> None:
    """Remove what an export to the same path left when it was killed, a day ago or longer."""
    for path in folder.iterdir():
        with suppress(OSError):
            if path.name.startswith(prefix) and time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path)


def capture(
    model: nn.Module, precision: str, images: torch.Tensor, calibrate: bool = False, dynamic: bool = True
) -> Source:
    """Return what a format's writer needs of a model, and what its file will be compared on: images, outputs.

    Args:
        images: (B, C, H, W).
        calibrate: Whether the images are the caller's, from which int8 may take its ranges.

    Raises:
        ValueError: as `export`.
    """
    if images.device.type != 'cpu':
        raise ValueError(f'model: it is on {images.device}, and is exported from the CPU; model.cpu() moves it.')
    if next(model.parameters()).dtype != torch.float32:
        model = copy_model(model).float()
    images = images.float()
    folded = fold(model)
    own = forward_only(model)
    expected = own(images)
    if not isinstance(expected, (torch.Tensor, list)):
        raise ValueError(f'model: it returns a {type(expected).__name__}, expected logits, or the list of a pyramid.')
    check_outputs(expected)
    net = getattr(model, 'model', model)  # timm wraps a model that returns features
    sizes = net.image_sizes() if isinstance(net, Hybrid) else _guessed_sizes(net)
    captured = images[[0, -1]]  # a batch of one image would be taken for a constant
    compared = [(images, expected)]
    shapes = _dynamic_batch()
    tried = [sizes] if dynamic and sizes is not None else []
    multiple = 1
    if tried and not isinstance(net, Hybrid):  # timm's models may take but multiples, or the example's size alone
        tried.append(tried[0]._replace(multiple=tried[0].stride))
    for one in tried:
        axes = _dynamic_shapes(one, images.shape)
        if len(axes) == 1:
            break
        other = F.interpolate(captured, _other_size(one, axes, images.shape[2:]))
        try:
            outputs = own(other)
            check_outputs(outputs)
        except (AssertionError, RuntimeError, ValueError):
            if isinstance(net, Hybrid):
                raise
            continue
        shapes, multiple = axes, one.multiple
        compared.append((other, outputs))
        break
    return Source(
        folded,
        is_pyramid=isinstance(expected, list),
        images=captured,
        sizes=shapes,
        largest=sizes.largest if sizes is not None else None,
        multiple=multiple,
        precision=precision,
        calibration=images if calibrate else None,
        config=_config(model, [None if axis in shapes else images.shape[axis] for axis in (2, 3)], expected),
        compared=compared,
    )


def write_compared(source: Source, file: Path, row: Format, what: str) -> float:
    """Write a new file, load it again, and return the difference of its outputs on the images of `capture`.

    Args:
        what: How sentences about the file begin.

    Raises:
        RuntimeError: where the format can't hold the model, or what was written does not compute what it does.
    """
    with tqdm(total=2, desc=f'writing {row.name}', leave=False, disable=None) as steps, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch warns itself
        with _one_sentence(f'{what}: format {row.name!r} can not hold this model'):
            row.write(source, file)
        steps.update()
        steps.set_description('comparing')
        run = load(file, row.name)
        differences = [difference(run(images), expected) for images, expected in source.compared]
    largest = worst(differences)
    if not largest < _TOLERANCE[source.precision]:
        raise RuntimeError(f"{what}: what was written differs from the model, by {largest:.1e} of the outputs' norm.")
    return largest


def _files(path: Path, row: Format) -> Tuple[Path, ...]:
    """Return the files that an export consists of: the one that is named, and those that belong to it."""
    return path, *(path.with_suffix(suffix) for suffix in row.beside)


def _put_in_place(file: Path, path: Path, row: Format) -> None:
    """Move an export to where the older one is.

    Of several files the one that is named gives way to a note first, and comes last: a kill in between leaves no model
    that loads, and never one with the weights of another.
    """
    if row.beside:
        with replacing(path) as beside:
            beside.write_text(row.cut_off)
    for source, place in reversed(list(zip(_files(file, row), _files(path, row)))):
        with replacing(place) as beside:
            shutil.move(source, beside)


def check_target(
    path: Union[str, Path], format: Optional[str], precision: str, has_images: bool = False
) -> Tuple[Path, str]:
    """Return a file's path and its format, by its name where none is given, before anything is computed.

    Raises:
        ValueError, OSError: as `export`.
    """
    check_choice('format', format, (None, *FORMATS))
    path = check_output('path', path)
    by_name = next((name for name, row in FORMATS.items() if path.suffix.lower() in row.suffixes), None)
    if format is None and by_name is None:
        known = ', '.join(suffix for row in FORMATS.values() for suffix in row.suffixes)
        raise ValueError(
            f'format: not given, and the name of {path} does not say it ({known} do); expected one of '
            f'{", ".join(map(repr, FORMATS))}.'
        )
    if format and by_name and format != by_name:
        raise ValueError(f'format: got {format!r}, but {path.name} is the name of {by_name!r}; change one of them.')
    format = format or by_name or ''
    row = FORMATS[format]
    if row.beside and by_name is None:
        raise ValueError(
            f'path: got {path}, expected a name that ends in {row.suffixes[0]}: its weights are in a file of the same '
            f'name that ends in {row.beside[0]}.'
        )
    row.check_precision(precision, has_images)
    _check_replaceable(path, row, by_name is not None)
    row.check_installed(precision)
    return path, format


def _check_replaceable(path: Path, row: Format, is_named_so: bool) -> None:
    """Raise FileExistsError where a file that is no export would be written over."""
    is_export = path.is_file() and is_named_so and row.is_export(path)
    for file in _files(path, row):
        is_empty = is_named_so and file.is_file() and not file.stat().st_size  # as tempfile makes them
        if file.exists() and not is_empty and not (is_export and file.is_file()):
            raise FileExistsError(f'{file}: holds no export, by its name or content, and is not written over.')


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn what a capturing compiler raises, in its own words and at any length, into one sentence."""
    try:
        yield
    except (OSError, MemoryError):  # these are the machine's, not the model's
        raise
    except Exception as error:
        reason = next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
        if reason.startswith('Constraints violated'):
            reason += (
                f' (torch {torch.__version__} can not leave it open: update torch, or give dynamic=False, --static)'
            )
        raise RuntimeError(f'{what}: {reason}') from error


def load(path: Path, format: str) -> Run:
    """Return what an exported file computes: images (B, C, H, W), float32 -> a tensor, or a list of them."""
    check_choice('format', format, tuple(FORMATS))
    return FORMATS[format].load(Path(path))


def taken_sizes(source: Source) -> str:
    """Return in words which images a file takes."""
    height, width = source.images.shape[-2:]
    if 2 not in source.sizes and 3 not in source.sizes:
        return f'{height}x{width} pixels'
    which = f' that is a multiple of {source.multiple}' if source.multiple > 1 else ''
    if source.largest and 2 in source.sizes and 3 in source.sizes:
        return f'any height and width{which} up to {source.largest[0]}x{source.largest[1]}'
    rest = 'width' if 3 in source.sizes else f'width {width}'
    return f'any height and {rest}{which}' if 2 in source.sizes else f'any width{which} and height {height}'


def _config(model: nn.Module, sides: Sequence[Optional[int]], outputs: Any) -> Dict[str, Any]:
    """Return what a program needs to know to use the file: data config and class names.

    Args:
        sides: Height and width that the file takes alone; None where it takes any.
        outputs: What the model returns.
    """
    net = getattr(model, 'model', model)  # timm wraps a model that returns features
    config = data_config(net)
    channels, *size = config['input_size']
    config['input_size'] = (channels, *(own or side for own, side in zip(sides, size)))
    if getattr(net, 'num_classes', 0):
        config['label_names'] = label_names(net)
        if torch.is_tensor(outputs) and outputs.ndim == 2:
            check_logits(outputs, config['label_names'])
    return config


def _guessed_sizes(net: nn.Module) -> Optional[ImageSizes]:
    """Return the sizes that a model of timm's may take, by its deepest map; None where it tells of no maps."""
    info = getattr(net, 'feature_info', None)
    return ImageSizes(info[-1]['reduction'], 1) if info else None


def _other_size(sizes: ImageSizes, shapes: Dict[int, Any], own: Sequence[int]) -> List[int]:
    """Return a height and width unlike those of the example, and, where a model takes such, no multiples of its stride.

    Args:
        shapes: The axes on which the graph takes any size.
        own: Height and width of the example.
    """
    stride, multiple, largest = sizes
    wanted = (2 * stride + 1, 3 * stride - 1) if multiple == 1 else (2 * stride, 3 * stride)
    size = [min(side, top) for side, top in zip(wanted, largest or wanted)]
    size = [side if axis in shapes else given for axis, side, given in zip((2, 3), size, own)]
    if size == list(own):
        step = 1 if multiple == 1 else stride
        least = stride + 1 if multiple == 1 else 2 * stride
        size = [max(side - step, least) if axis in shapes else side for axis, side in zip((2, 3), size)]
    return size


def _dynamic_batch() -> Dict[int, Any]:
    # torch 2.6 refuses a batch without a limit, for the number that it takes then
    return {0: Dim('batch', max=2**31 - 1)}


def _dynamic_shapes(sizes: ImageSizes, shape: Sequence[int]) -> Dict[int, Any]:
    """Every batch, height and width; torch.export takes one token a side for a constant, so from two on.

    An example, whose shape this is, that has one token on a side is taken for all images, but for the batch, unless
    the model takes no more there.
    """
    stride, multiple, largest = sizes
    shapes = _dynamic_batch()
    tops = largest or (LARGEST, LARGEST)
    if any(side <= stride < top for side, top in zip(shape[2:], tops)):
        return shapes
    for axis, names, top in zip((2, 3), (('rows', 'height'), ('columns', 'width')), tops):
        if multiple > 1 and top >= 2 * stride:
            shapes[axis] = stride * Dim(names[0], min=2, max=top // stride)
        elif multiple == 1 and top > stride:
            shapes[axis] = Dim(names[1], min=stride + 1, max=top)
    return shapes
