"""OpenVINO: its files written from ONNX, and run at every size, the first sizes by graphs of their own.

model.onnx -> `write` -> model.xml, model.bin -> `load` -> images (B, C, H, W) in, float32 outputs out
"""

import logging
import os
import sys
import threading
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import numpy as np
import torch

OWN_GRAPHS = 2  # sizes that get one: those of full batches, and of the last one, which may be smaller
INFO = 'timm_vitres'  # where in a file's rt_info config and precision stand
# OpenVINO computes in bfloat16 wherever the machine can, unless it is told otherwise; what is not int8 stays float32
HINTS = {'fp32': 'f32', 'bf16': 'bf16', 'int8': 'f32'}
CAPABILITIES = ('CPU', 'OPTIMIZATION_CAPABILITIES')

CUT_OFF = '<!-- <net > was being replaced when its writer was killed: export the model again -->'


def write(
    onnx_file: Path,
    path: Path,
    precision: str,
    config: str,
    calibration: Optional[torch.Tensor],
    largest: Optional[Dict[int, int]] = None,
) -> None:
    """Write an ONNX file as OpenVINO's .xml, with a .bin beside it that holds the weights.

    Args:
        config: JSON that the file shall hold.
        calibration: Images (B, C, H, W), by whose activations nncf makes convolutions and linear layers int8.
        largest: Pixels up to which the model takes images, by axis (2, 3); without a limit where none is given.
    """
    import openvino

    model = openvino.Core().read_model(onnx_file)
    _resize_as_pillow_(model)
    if largest:
        shape = model.input(0).partial_shape
        for axis, top in largest.items():
            shape[axis] = openvino.Dimension(1, top)
        model.reshape(shape)
    if calibration is not None:
        model = _quantised(model, calibration)
    model.set_rt_info(precision, [INFO, 'precision'])
    model.set_rt_info(config, [INFO, 'config'])
    openvino.save_model(model, path, compress_to_fp16=False)


def _resize_as_pillow_(model: Any) -> None:
    """Let position tables be resized as torch resizes them.

    OpenVINO's cubic resizing passes over `antialias`, which changes the table even where it becomes larger; its mode
    'bicubic_pillow' is torch's antialiased one.
    """
    from openvino import opset11

    for node in model.get_ops():
        attributes = node.get_attributes() if node.get_type_name() == 'Interpolate' else {}
        if attributes.get('mode') != 'cubic' or not attributes['antialias']:
            continue
        image, sizes = (node.input_value(i) for i in range(2))
        axes = opset11.constant(np.array([2, 3], dtype=np.int64))
        resized = opset11.interpolate(
            image,
            opset11.gather(sizes, axes, opset11.constant(np.int64(0))),
            'bicubic_pillow',
            attributes['shape_calculation_mode'],
            cube_coeff=attributes['cube_coeff'],
            coordinate_transformation_mode=attributes['coordinate_transformation_mode'],
            axes=axes,
        )
        node.output(0).replace(resized.output(0))
    model.validate_nodes_and_infer_types()


def _quantised(model: Any, images: torch.Tensor) -> Any:
    """Return a model whose convolutions and linear layers are int8, by the ranges that images (B, C, H, W) show."""
    import nncf

    logger = logging.getLogger('nncf')
    level = logger.level
    nncf.set_log_level(logging.ERROR)
    dataset = nncf.Dataset([image.numpy() for image in images.split(1)])
    with ExitStack() as stack:
        stack.callback(logger.setLevel, level)
        stack.enter_context(redirect_stdout(sys.stderr))  # where progress belongs
        return nncf.quantize(
            model,
            dataset,
            subset_size=len(images),
            # smooths the activations' outliers before they are rounded
            model_type=nncf.ModelType.TRANSFORMER,
            # weights of 7 bits: the sums of 8-bit ones saturate on CPUs without VNNI
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )


def is_export(path: Path) -> bool:
    """Return whether a file is a model of OpenVINO's that we wrote, so that its .bin holds that model's weights."""
    content = path.read_bytes()
    return content == CUT_OFF.encode() or (b'<net ' in content[:1000] and f'<{INFO}>'.encode() in content)


class Runner:
    """A file that runs at every size.

    A graph for all sizes takes up to 1.5 times as long in int8, and 1.3 in bf16, as one of a single size
    (benchmarks/results/throughput.csv), but each of those holds the weights once more. So the first sizes that come get
    a graph of their own, and all further ones share one.
    """

    def __init__(self, path: Path):
        import openvino

        self.core = openvino.Core()
        self.core.set_property({'ENABLE_MMAP': os.name != 'nt'})  # a file that is mapped can't be removed there
        self.model = self.core.read_model(path)
        told = [INFO, 'precision']
        self.precision = self.model.get_rt_info(told).astype(str) if self.model.has_rt_info(told) else 'fp32'
        hint = HINTS[self.precision]
        self.settings = {
            'INFERENCE_PRECISION_HINT': hint,
            'INFERENCE_NUM_THREADS': torch.get_num_threads(),
            # the plugin's own attention kernels answer wrongly where there are as many tokens as heads, and, once they
            # have seen an image of one token, for all others
            'SNIPPETS_MODE': 'DISABLE',
        }
        tops = [self.model.input(0).partial_shape[axis].get_max_length() for axis in (2, 3)]
        self.largest = [top if top > 0 else sys.maxsize for top in tops]  # -1 of a file without bounds
        self.graphs: Dict[Optional[Tuple[int, ...]], Any] = {}
        self.lock = threading.Lock()  # a graph has one request, which one thread at a time may run

    @property
    def note(self) -> str:
        """What is to be said of how it runs on this machine."""
        asked_in_vain = self.precision == 'bf16' and 'BF16' not in self.core.get_property(*CAPABILITIES)
        return 'in fp32, since this CPU has no bfloat16' if asked_in_vain else ''

    def __call__(self, x: torch.Tensor) -> Any:
        """x: (B, C, H, W), float32 -> a tensor, or a list of them."""
        if len(x) == 0:  # graphs answer it with what they answered before
            outputs = self(x.new_zeros(1, *x.shape[1:]))
            return [output[:0] for output in outputs] if isinstance(outputs, list) else outputs[:0]
        shape: Optional[Tuple[int, ...]] = tuple(x.shape)
        if 0 in shape:
            raise ValueError(f'input: got shape {shape}, which has no pixels.')
        if x.shape[2] > self.largest[0] or x.shape[3] > self.largest[1]:
            raise ValueError(
                f'input: got an image of {x.shape[2]}x{x.shape[3]} pixels, but the file takes at most '
                f'{self.largest[0]}x{self.largest[1]}.'
            )
        with self.lock:
            if shape not in self.graphs:
                shape = shape if len(self.graphs) < OWN_GRAPHS else None
            if shape not in self.graphs:
                self.graphs[shape] = self._compile(shape)
            found = self.graphs[shape]([x.contiguous().numpy()])
            outputs = [torch.from_numpy(np.array(found[i])) for i in range(len(found))]
        return outputs[0] if 'logits' in self.graphs[shape].output(0).get_names() else outputs

    def _compile(self, shape: Optional[Tuple[int, ...]]) -> Any:
        model = self.model
        if shape is not None:
            model = model.clone()
            model.reshape(list(shape))
        return self.core.compile_model(model, 'CPU', self.settings)
