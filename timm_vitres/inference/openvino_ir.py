"""OpenVINO: its files written from ONNX, and run at every size.

model.onnx -> `write` -> model.xml, model.bin -> `load` -> images (B, C, H, W) in, float32 outputs out
"""

import logging
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch

INFO = 'timm_vitres'  # where in a file's rt_info config and precision stand
# OpenVINO computes in bfloat16 wherever the machine can, unless it is told otherwise; what is not int8 stays float32
HINTS = {'fp32': 'f32', 'bf16': 'bf16', 'int8': 'f32'}

CUT_OFF = '<!-- <net > was being replaced when its writer was killed: export the model again -->'


def write(onnx_file: Path, path: Path, precision: str, config: str, calibration: Optional[torch.Tensor]) -> None:
    """Write an ONNX file as OpenVINO's .xml, with a .bin beside it that holds the weights.

    Args:
        config: JSON that the file shall hold.
        calibration: Images (B, C, H, W), by whose activations nncf makes convolutions and linear layers int8.
    """
    import openvino

    model = openvino.Core().read_model(onnx_file)
    _resize_as_pillow_(model)
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

    nncf.set_log_level(logging.ERROR)
    dataset = nncf.Dataset([image.numpy() for image in images.split(1)])
    with redirect_stdout(sys.stderr):  # where progress belongs
        # the type of model smooths the activations' outliers before they are rounded
        return nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))


def is_export(path: Path) -> bool:
    """Return whether a file is a model of OpenVINO's, so that its .bin holds that model's weights."""
    with path.open('rb') as file:
        return b'<net ' in file.read(1000)


def load(path: Path) -> Callable[[torch.Tensor], Any]:
    """Return what a file computes: images (B, C, H, W), float32 -> a tensor, or a list of them."""
    import openvino

    core = openvino.Core()
    core.set_property({'ENABLE_MMAP': os.name != 'nt'})  # Windows can't remove a file that is mapped
    model = core.read_model(path)
    told = [INFO, 'precision']
    precision = model.get_rt_info(told).astype(str) if model.has_rt_info(told) else 'fp32'
    settings = {'INFERENCE_PRECISION_HINT': HINTS[precision], 'INFERENCE_NUM_THREADS': torch.get_num_threads()}
    compiled = core.compile_model(model, 'CPU', settings)
    is_pyramid = 'logits' not in compiled.output(0).get_names()

    def run(x: torch.Tensor) -> Any:
        found = compiled([x.contiguous().numpy()])
        outputs = [torch.from_numpy(np.array(found[i])) for i in range(len(found))]  # OpenVINO's memory is its own
        return outputs if is_pyramid else outputs[0]

    return run
