"""A model as a file for a runtime: folded, lowered, one graph for every size, compared with the model before it counts.

model -> `fold` -> precision -> TorchScript, torch.export (.pt2) or ONNX -> the file, loaded again and compared.
"""

import json
import shutil
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from tqdm import tqdm

from ..data import data_config
from ..labels import label_names
from ..models.base import Hybrid, ImageSizes
from ..models.config import check_choice
from ..writing import check_output, replacing
from .folding import copy_model, fold
from .lowering import InOut, check_example, check_outputs, difference, forward_only, quantise_

# what each runtime can compute on CPU: TorchScript knows no torchao, onnxruntime no bfloat16 convolutions
FORMATS = {'onnx': ('fp32', 'int8'), 'torchscript': ('fp32', 'bf16'), 'pt2': ('fp32', 'bf16', 'int8')}
# the first is what the runtime's own functions expect
SUFFIXES = {'onnx': ('.onnx',), 'torchscript': ('.pt', '.ts', '.torchscript'), 'pt2': ('.pt2',)}
CONFIG_ENTRY = 'config.json'  # what the file says of its images and classes
# of the outputs' norm: runtimes add up in other orders; what a low precision costs is reported, but 1 is another model
_TOLERANCE = {'fp32': 1e-4, 'bf16': 1.0, 'int8': 1.0}


class Exported(NamedTuple):
    """A file, and how far its outputs are from the model's."""

    path: Path
    difference: float  # of the outputs' norm
    report: str


class LogitsOut(InOut):
    """`InOut` in types that TorchScript knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W) -> (B, num_classes), float32."""
        return self.model(x.to(self.dtype)).float()


class MapsOut(InOut):
    """`InOut` for features_only, in types that TorchScript knows."""

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """x: (B, C, H, W) -> maps (B, num_chs, H / reduction, W / reduction), float32."""
        maps = self.model(x.to(self.dtype))
        assert torch.jit.isinstance(maps, List[torch.Tensor])  # TorchScript sees all that the method could return
        return [y.float() for y in maps]


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
        model: A timm model of this package (also with features_only), in evaluation mode, on the CPU. One in another
            precision is exported, and compared, as its copy in float32.
        path: The file. An older export there is replaced, a checkpoint or a model's config is not.
        format: 'onnx' for onnxruntime and others (`pip install timm-vitres[export]`); 'torchscript' for
            `torch.jit.load`; 'pt2' for `torch.export.load`. By default what the file's name says: '.onnx', '.pt'
            ('.ts', '.torchscript') or '.pt2'.
        precision: 'fp32'; 'bf16' (not ONNX); 'int8' (not TorchScript), whose linear layers are quantised (weights
            per channel, activations as they come), by torchao or, of ONNX, by onnxruntime. With an example, ONNX's
            convolutions are, too: their activations' ranges are then those of the example's images.
        dynamic: One graph for every height and width from two tokens up; else for the example's alone. The batch may
            always be any.
        example: Images (B, C, H, W) like those to come. By default noise of the model's own size.

    Raises:
        ValueError: for a format that is unknown or not the one of the file's name, a precision that it can't have, a
            missing package, and for models and examples as in `prepare`.
        OSError: where the file can't be written, or would replace what is no export.
        RuntimeError: where the format can't hold the model, or what was written does not compute what it does.
    """
    path, format = check_target(path, format, precision)
    check_choice('dynamic', dynamic, (False, True))
    images = check_example(model, example)
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
    dtype = torch.bfloat16 if precision == 'bf16' else torch.float32
    out = (LogitsOut if torch.is_tensor(expected) else MapsOut)(folded.to(dtype), dtype).eval()
    if format == 'pt2' and precision == 'int8':
        quantise_(out.model)
    if format == 'pt2' and precision == 'bf16':
        # torch.export can't prove what it asks of the strides of channels-last maps in bfloat16
        out.to(memory_format=torch.contiguous_format)
    sizes = _dynamic_shapes(model) if dynamic else {0: Dim('batch')}
    captured = images[[0, -1]]  # of one image, the batch would be taken for a constant

    steps = tqdm(total=2, desc=f'writing {format}', leave=False, disable=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torch to itself
        file = Path(folder) / f'model{SUFFIXES[format][0]}'
        calibration = None if example is None else images
        with _one_sentence(f'{path}: format {format!r} can not hold this model'):
            _WRITERS[format](out, captured, sizes, file, _config(model), precision, calibration)
        steps.update()
        steps.set_description('comparing')
        run = load(file, format)
        error = worst = difference(run(images), expected)
        if dynamic:
            other = F.interpolate(captured, (2 * _stride(model), 3 * _stride(model)))
            worst = max(worst, difference(run(other), own(other)))
        if not worst < _TOLERANCE[precision]:
            raise RuntimeError(f"{path}: what was written differs from the model, by {worst:.1e} of the outputs' norm.")
        with replacing(path) as beside:
            shutil.move(file, beside)
    steps.close()
    shape = 'any height and width' if dynamic else f'{images.shape[2]}x{images.shape[3]} pixels'
    report = f'{path}: {format}, {precision}, for {shape}; its outputs differ by {error:.1e} of their norm.'
    return Exported(path, error, report)


def check_target(path: Union[str, Path], format: Optional[str], precision: str) -> Tuple[Path, str]:
    """Return a file's path and its format, by its name where none is given, before anything is computed.

    Raises:
        ValueError, OSError: as `export`.
    """
    check_choice('format', format, (None, *FORMATS))
    path = check_output('path', path)
    by_name = next((name for name, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), None)
    if format is None and by_name is None:
        known = ', '.join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
        raise ValueError(
            f'format: not given, and the name of {path} does not say it ({known} do); expected one of '
            f'{", ".join(map(repr, FORMATS))}.'
        )
    if format and by_name and format != by_name:
        raise ValueError(f'format: got {format!r}, but {path.name} is the name of {by_name!r}; change one of them.')
    format = format or by_name or ''
    if precision not in FORMATS[format]:
        raise ValueError(f'precision: got {precision!r}, format {format!r} can be {" or ".join(FORMATS[format])}.')
    if path.is_file() and (by_name is None or _is_checkpoint(path)):
        raise FileExistsError(f'{path}: holds no export, by its name or content, and is not written over.')
    if format == 'onnx':
        _import_onnx()
    return path, format


def _is_checkpoint(path: Path) -> bool:
    """Return whether a file is one of torch.save, which are called .pt as scripts are, but hold no code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        names = [name.partition('/')[2] for name in file.namelist()]
    return 'data.pkl' in names and not any(name.startswith('code/') for name in names)


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn what a capturing compiler raises, in its own words and at any length, into one sentence."""
    try:
        yield
    except (OSError, MemoryError):  # the world's
        raise
    except Exception as error:
        reason = next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
        raise RuntimeError(f'{what}: {reason}') from error


def load(path: Path, format: str) -> Callable[[torch.Tensor], Any]:
    """Return what an exported file computes: images (B, C, H, W), float32 -> a tensor, or a list of them."""
    if format == 'torchscript':
        return forward_only(torch.jit.load(str(path)))
    if format == 'pt2':
        return forward_only(torch.export.load(path).module())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def run(x: torch.Tensor) -> Any:
        outputs = [torch.from_numpy(y) for y in session.run(None, {'image': x.numpy()})]
        return outputs[0] if session.get_outputs()[0].name == 'logits' else outputs

    return run


def _write_torchscript(out: nn.Module, images: torch.Tensor, sizes: Any, path: Path, config: str, *_) -> None:
    script = torch.jit.script(out)
    torch.jit.save(script, str(path), _extra_files={CONFIG_ENTRY: config})


def _write_pt2(out: nn.Module, images: torch.Tensor, sizes: Any, path: Path, config: str, *_) -> None:
    program = torch.export.export(out, (images,), dynamic_shapes=(sizes,))
    torch.export.save(program, path, extra_files={CONFIG_ENTRY: config})


def _write_onnx(
    out: nn.Module,
    images: torch.Tensor,
    sizes: Any,
    path: Path,
    config: str,
    precision: str,
    calibration: Optional[torch.Tensor],
) -> None:
    import onnx

    program = torch.onnx.export(
        out,
        (images,),
        input_names=['image'],
        output_names=['logits'] if isinstance(out, LogitsOut) else None,
        dynamic_shapes=(sizes,),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # as with dynamo=False
    program.save(path, external_data=False)
    if precision == 'int8':
        _quantise_onnx_(path, calibration)
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {CONFIG_ENTRY: config})
    onnx.save(proto, path)


def _quantise_onnx_(path: Path, calibration: Optional[torch.Tensor]) -> None:
    """Quantise a file in place: by the ranges that images show, all that multiplies; without, the linear layers."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        def __init__(self, images: torch.Tensor):
            self.batches = iter([{'image': image.numpy()} for image in images.split(1)])

        def get_next(self):
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / 'ready.onnx'
        quant_pre_process(path, ready, skip_symbolic_shape=True)
        kwargs: Dict[str, Any] = dict(per_channel=True, weight_type=quantization.QuantType.QInt8)
        if calibration is None:
            quantization.quantize_dynamic(ready, path, op_types_to_quantize=['MatMul', 'Gemm'], **kwargs)
        else:
            # unsigned activations: signed ones are half as fast on x86
            kwargs.update(
                activation_type=quantization.QuantType.QUInt8, op_types_to_quantize=['Conv', 'MatMul', 'Gemm']
            )
            quantization.quantize_static(ready, path, Images(calibration), **kwargs)


_WRITERS = {'onnx': _write_onnx, 'torchscript': _write_torchscript, 'pt2': _write_pt2}


def _config(model: nn.Module) -> str:
    """Return what a program needs to know to use the file: data config and class names, as JSON."""
    net = getattr(model, 'model', model)  # features_only
    config = data_config(net)
    if getattr(net, 'num_classes', 0):
        config['label_names'] = label_names(net)
    return json.dumps(config)


def _stride(model: nn.Module) -> int:
    return _image_sizes(model).stride


def _image_sizes(model: nn.Module) -> ImageSizes:
    net = getattr(model, 'model', model)  # features_only
    return net.image_sizes() if isinstance(net, Hybrid) else ImageSizes(net.feature_info[-1]['reduction'], 1)


def _dynamic_shapes(model: nn.Module) -> Dict[int, Any]:
    """Every batch, height and width; torch.export takes one token a side for a constant, so from two on."""
    stride, multiple = _image_sizes(model)
    if multiple > 1:
        return {0: Dim('batch'), 2: stride * Dim('rows', min=2, max=128), 3: stride * Dim('columns', min=2, max=128)}
    return {0: Dim('batch'), 2: Dim('height', min=stride + 1, max=4096), 3: Dim('width', min=stride + 1, max=4096)}


def _import_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'format: \'onnx\' needs {error.name}, pip install "timm-vitres[export]".') from None
