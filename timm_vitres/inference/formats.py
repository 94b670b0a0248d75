"""Formats of exported models: a row in `FORMATS` is all that the package, and the command line, know of one.

`Source` (a folded model, images, sizes) -> `Format.write` -> a file -> `Format.load` -> float32 images in, outputs out
"""

import json
import mmap
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import nn

from ..checks import is_installed
from . import openvino_ir
from .lowering import LoweredLogits, LoweredMaps, forward_only, linear_layers, quantise_

CONFIG_ENTRY = 'config.json'  # what a file says of its images and classes
Run = Callable[[torch.Tensor], Any]  # images (B, C, H, W), float32 -> a tensor, or a list of them


@dataclass(frozen=True)
class Source:
    """What a writer gets."""

    folded: nn.Module  # in float32
    is_pyramid: bool  # whether it returns a list of maps
    images: torch.Tensor  # two images, to capture the model with: (2, C, H, W)
    sizes: Dict[int, Any]  # the dimensions of images that may vary
    largest: Optional[Tuple[int, int]]  # height and width up to which the model takes images; None for any
    multiple: int  # height and width must be multiples of it
    precision: str
    calibration: Optional[torch.Tensor]  # images of the caller's: (B, C, H, W)
    config: Dict[str, Any]  # data config and class names
    compared: List[Tuple[torch.Tensor, Any]]  # images, and what the model returns for them

    @property
    def config_text(self) -> str:
        """The config as JSON."""
        return json.dumps(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """What torch's own formats compute in."""
        return torch.bfloat16 if self.precision == 'bf16' else torch.float32

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model in a dtype, behind float32 images and outputs."""
        return (LoweredMaps if self.is_pyramid else LoweredLogits)(self.folded.to(dtype), dtype).eval()


@dataclass(frozen=True)
class Format:
    """What is known of a format."""

    name: str
    runtime: str  # the program that runs it
    suffixes: Tuple[str, ...]  # the first is what the runtime's own functions expect
    precisions: Tuple[str, ...]
    write: Callable[[Source, Path], None]
    load: Callable[[Path], Run]
    extra: str = ''  # of pip, with the packages that it needs
    packages: Tuple[str, ...] = ()
    packages_int8: Tuple[str, ...] = ()
    needs_images: Tuple[str, ...] = ()  # precisions that take ranges from images
    beside: Tuple[str, ...] = ()  # suffixes of further files, which belong to the one that is named
    cut_off: str = ''  # what the file that is named says while those beside it are being replaced
    is_export: Callable[[Path], bool] = lambda path: is_export(path)  # of a file that has one of its suffixes
    is_engine: bool = False  # whether `prepare` offers its runtime

    def check_installed(self, precision: str, argument: str = 'format') -> None:
        """Raise ValueError, about an argument, where a package is missing."""
        for package in (*self.packages, *(self.packages_int8 if precision == 'int8' else ())):
            if not is_installed(package):
                name = self.name if argument == 'format' else self.runtime.lower()
                raise ValueError(f'{argument}: {name!r} needs {package}, pip install "timm-vitres[{self.extra}]".')

    def check_precision(self, precision: str, has_images: bool) -> None:
        """Raise ValueError for a precision that the format does not have, or not without images."""
        if precision not in self.precisions:
            raise ValueError(
                f'precision: got {precision!r}, format {self.name!r} can be {" or ".join(self.precisions)}.'
            )
        if precision in self.needs_images and not has_images:
            raise ValueError(
                f'example: not given, but {precision!r} of {self.name!r} takes the ranges of its activations from '
                f'images; give some of yours (on the command line: --images).'
            )


def is_export(path: Path) -> bool:
    """Return whether a file is one that `export` wrote, by the config in it: an archive of torch's, or ONNX."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return any(Path(name).name == CONFIG_ENTRY for name in file.namelist())
    with path.open('rb') as file:
        if file.read(1) != b'\x08':  # the first field of ONNX is its version
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(CONFIG_ENTRY.encode()) >= 0


def _write_torchscript(source: Source, path: Path) -> None:
    script = torch.jit.script(source.module(source.dtype))
    torch.jit.save(script, str(path), _extra_files={CONFIG_ENTRY: source.config_text})


def _load_torchscript(path: Path) -> Run:
    return forward_only(torch.jit.load(str(path)))


def _write_pt2(source: Source, path: Path) -> None:
    out = source.module(source.dtype)
    if source.precision == 'int8':
        quantise_(out.model, anywhere=True)
    if source.precision == 'bf16':
        # torch.export can't prove what it asks of the strides of channels-last maps in bfloat16
        out.to(memory_format=torch.contiguous_format)
    program = torch.export.export(out, (source.images,), dynamic_shapes=(source.sizes,))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop('stack_trace', None)  # where in whose folders the code of each one stands
    torch.export.save(program, path, extra_files={CONFIG_ENTRY: source.config_text})


def _load_pt2(path: Path) -> Run:
    return forward_only(torch.export.load(path).module())


def _write_onnx(source: Source, path: Path) -> None:
    import onnx

    if source.precision == 'int8' and source.calibration is None:
        linear_layers(source.folded)
    program = torch.onnx.export(
        source.module(),
        (source.images,),
        input_names=['image'],
        output_names=None if source.is_pyramid else ['logits'],
        dynamic_shapes=(source.sizes,),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # it is None with dynamo=False only
    program.save(path, external_data=False)
    if source.precision == 'int8':
        _quantise_onnx_(path, source.calibration)
    proto = onnx.load(path)
    for node in proto.graph.node:
        del node.metadata_props[:]  # the exporter notes where in whose folders the code of each one stands
    onnx.helper.set_model_props(proto, {CONFIG_ENTRY: source.config_text})
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
        # weights of 7 bits: with 8, sums saturate on CPUs without VNNI, and a file does not know where it will run
        kwargs: Dict[str, Any] = dict(per_channel=True, reduce_range=True, weight_type=quantization.QuantType.QInt8)
        if calibration is None:
            quantization.quantize_dynamic(ready, path, op_types_to_quantize=['MatMul', 'Gemm'], **kwargs)
        else:
            # unsigned activations: signed ones are half as fast on x86
            kwargs.update(
                activation_type=quantization.QuantType.QUInt8, op_types_to_quantize=['Conv', 'MatMul', 'Gemm']
            )
            quantization.quantize_static(ready, path, Images(calibration), **kwargs)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def run(x: torch.Tensor) -> Any:
        outputs = [torch.from_numpy(y) for y in session.run(None, {'image': x.numpy()})]
        return outputs[0] if session.get_outputs()[0].name == 'logits' else outputs

    return run


def _write_openvino(source: Source, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / 'model.onnx'
        _write_onnx(replace(source, precision='fp32'), onnx_file)
        calibration = source.calibration if source.precision == 'int8' else None
        sides = zip((2, 3), source.largest or ())
        largest = {axis: top for axis, top in sides if axis in source.sizes}  # the others have one size anyway
        openvino_ir.write(onnx_file, path, source.precision, source.config_text, calibration, largest)


ROWS = (
    Format(
        name='onnx',
        runtime='onnxruntime',
        suffixes=('.onnx',),
        precisions=('fp32', 'int8'),  # onnxruntime has no bfloat16 convolutions on CPU
        write=_write_onnx,
        load=_load_onnx,
        extra='export',
        packages=('onnx', 'onnxruntime', 'onnxscript'),
        is_engine=True,
    ),
    Format(
        name='torchscript',
        runtime='torch.jit',
        suffixes=('.pt', '.ts', '.torchscript'),
        precisions=('fp32', 'bf16'),  # TorchScript knows no torchao
        write=_write_torchscript,
        load=_load_torchscript,
    ),
    Format(
        name='pt2',
        runtime='torch.export',
        suffixes=('.pt2',),
        precisions=('fp32', 'bf16', 'int8'),
        write=_write_pt2,
        load=_load_pt2,
        extra='int8',
        packages_int8=('torchao',),
    ),
    Format(
        name='openvino',
        runtime='OpenVINO',
        suffixes=('.xml',),
        precisions=('fp32', 'bf16', 'int8'),
        write=_write_openvino,
        load=openvino_ir.Runner,
        extra='openvino',
        packages=('openvino', 'onnx', 'onnxscript'),
        packages_int8=('nncf',),
        needs_images=('int8',),
        beside=('.bin',),
        cut_off=openvino_ir.CUT_OFF,
        is_export=openvino_ir.is_export,
        is_engine=True,
    ),
)
FORMATS: Dict[str, Format] = {row.name: row for row in ROWS}
ENGINES: Dict[str, Format] = {row.runtime.lower(): row for row in ROWS if row.is_engine}
