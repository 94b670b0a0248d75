"""What preparing and exporting share: models in a lower precision behind float32, int8 layers, examples, differences.

folded model -> `Lowered` -> float32 images in, float32 outputs out; `check_example` says what it is compared on.
"""

import inspect
from typing import Any, Callable, List, Optional, Sequence, Set

import torch
import torch._inductor.config
from timm.models import get_model_traits
from timm.utils import unwrap_model
from torch import nn

from ..data import data_config

PRECISIONS = ('fp32', 'bf16', 'int8')
# what torchao asks of the compiler for int8 layers
INT8_SETTINGS = ('coordinate_descent_tuning', 'coordinate_descent_check_all_directions', 'force_fuse_int_mm_with_mul')


class Lowered(nn.Module):
    """A model that computes in a dtype, with images of any floating dtype before it and float32 outputs behind it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, memory_format=torch.contiguous_format):
        super().__init__()
        self.model, self.dtype, self.memory_format = model, dtype, memory_format

    def forward(self, x: torch.Tensor) -> Any:
        """x: (B, C, H, W) -> (B, num_classes), or whatever the model returns, in float32."""
        y = self.model(x.to(self.dtype).contiguous(memory_format=self.memory_format))
        return each(torch.Tensor.float, y)


def each(function: Callable[[torch.Tensor], torch.Tensor], outputs: Any) -> Any:
    """Return what a function makes of a tensor, or of each one in a list, tuple or dict of them."""
    if torch.is_tensor(outputs):
        return function(outputs)
    if isinstance(outputs, dict):
        return {name: function(one) for name, one in outputs.items()}
    return type(outputs)(function(one) for one in outputs)


def _parts(outputs: Any) -> List[torch.Tensor]:
    if torch.is_tensor(outputs):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


class LoweredLogits(Lowered):
    """`Lowered` for a model with one output, in types that TorchScript knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W) -> (B, num_classes), float32."""
        return self.model(x.to(self.dtype)).float()


class LoweredMaps(Lowered):
    """`Lowered` for a pyramid (features_only), in types that TorchScript knows."""

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """x: (B, C, H, W) -> maps (B, num_chs, H / reduction, W / reduction), float32."""
        maps = self.model(x.to(self.dtype))
        assert torch.jit.isinstance(maps, List[torch.Tensor])  # TorchScript sees every type that the method can return
        return [y.float() for y in maps]


def linear_layers(model: nn.Module) -> Set[str]:
    """Return the names of a model's linear layers, but for its heads; ValueError where int8 has none to quantise."""
    classifier = (
        get_model_traits(model).get('classifier') or getattr(model, 'pretrained_cfg', {}).get('classifier') or ()
    )
    heads = (classifier,) if isinstance(classifier, str) else classifier
    found = {name for name, module in model.named_modules() if type(module) is nn.Linear and name not in heads}
    if not found:
        raise ValueError(
            f"precision: got 'int8', but {type(model).__name__} has no linear layers beside its head, which stays as "
            "it is; use 'bf16', or what makes convolutions int8: OpenVINO (engine='openvino', format='openvino'), or "
            "format='onnx' with images of yours."
        )
    return found


def quantise_(model: nn.Module, anywhere: bool = False) -> int:
    """Make the weights of a model's linear layers int8 by torchao, but for its heads; return how many.

    Args:
        anywhere: Whether it may run on other machines: sums of 8 bits saturate on CPUs without VNNI.

    Raises:
        ValueError: without torchao, and for a model that has no such layer.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise ValueError('precision: \'int8\' needs torchao, pip install "timm-vitres[int8]".') from None
    layers = linear_layers(model)
    options = {}
    if 'reduce_range' in inspect.signature(Int8DynamicActivationInt8WeightConfig).parameters:  # not so in older torchao
        from torchao.utils import should_reduce_range

        device = next(model.parameters()).device
        options['reduce_range'] = anywhere or should_reduce_range(device)
    # torchao sets these for the whole process, and older ones the precision of every product of matrices in float32
    precision = torch.get_float32_matmul_precision()
    try:
        with torch._inductor.config.patch(dict.fromkeys(INT8_SETTINGS, True)):
            config = Int8DynamicActivationInt8WeightConfig(**options)
            quantize_(model, config, filter_fn=lambda _, name: name in layers)
    finally:
        torch.set_float32_matmul_precision(precision)
    return len(layers)


def check_example(model: nn.Module, example: Optional[torch.Tensor]) -> torch.Tensor:
    """Return images (B, C, H, W) on the model's device: the example, or one image of noise of the model's own size.

    Raises:
        TypeError: for a model that is no module, or is prepared.
        ValueError: for a model without weights, and an example that is no such images.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: got {type(model).__name__}, expected a torch.nn.Module.')
    if getattr(model, 'is_prepared', False):
        raise TypeError('model: it is prepared already; give the original.')
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is None or device.type == 'meta':
        raise ValueError(f'model: it has no weights{"" if device is None else " (it is on the device meta)"}.')
    if unwrap_model(model) is not model:  # compiled, or averaged weights, or one of many processes'
        raise TypeError(f'model: got {type(model).__name__}, which wraps one; give timm.utils.unwrap_model(model).')
    shape = data_config(model)['input_size']
    if example is None:
        return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), device='cpu').to(device)
    expected = f'images (B, {shape[0]}, H, W), a tensor of a floating dtype'
    if not torch.is_tensor(example):
        raise ValueError(f'example: got {type(example).__name__}, expected {expected}.')
    if example.ndim != 4 or example.shape[1] != shape[0] or not example.is_floating_point() or not len(example):
        raise ValueError(f'example: got {tuple(example.shape)} of {example.dtype}, expected {expected}.')
    if example.layout != torch.strided or example.is_meta:
        raise ValueError(
            f'example: got a tensor that is {"meta" if example.is_meta else "sparse"}, expected {expected}.'
        )
    if not example.isfinite().all():
        raise ValueError('example: it has values that are not finite (nan, inf), expected normalised pixels.')
    return example.detach().to(device)


def check_outputs(outputs: Any) -> None:
    """Raise ValueError where a model's outputs for its example are not finite, since nothing can be compared then."""
    if not all(one.isfinite().all() for one in _parts(outputs)):
        raise ValueError('model: its outputs for the example are not finite (nan, inf); its weights are broken.')


def forward_only(model: nn.Module) -> Callable[[torch.Tensor], Any]:
    """Return a model's forward pass, with its hooks, without gradients."""
    return torch.no_grad()(model.__call__)


def difference(y: Any, expected: Any) -> float:
    """Return the norm of the difference of outputs, relative to the norm of those expected; the worst of several."""
    pairs = zip(_parts(y), _parts(expected), strict=True)
    norms = [((one - other).norm() / other.norm().clamp_min(1e-30)).item() for one, other in pairs]
    return worst(norms)


def worst(numbers: Sequence[float]) -> float:
    """Return the largest of some numbers, and NaN where one is, which Python's `max` passes over."""
    return torch.tensor(numbers).max().item()
