"""A model made fast for inference: folded, lowered, laid out as this machine likes it best, compiled.

model in evaluation mode -> `fold` -> precision (bf16; torchao's int8) -> memory format, by measurement ->
torch.compile -> `Prepared`, which takes and returns float32 and says what was done to it.
"""

import copy
import logging
import statistics
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from torch import nn
from tqdm import tqdm

from .config import check_choice
from .data import data_config
from .fold import fold

PRECISIONS = ('fp32', 'bf16', 'int8')
_FORMATS = {'channels-last': torch.channels_last, 'contiguous': torch.contiguous_format}
_NAMES = {torch.float32: 'fp32', torch.bfloat16: 'bf16'}
_logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module, precision: str = 'fp32', compile: bool = False, example: Optional[torch.Tensor] = None
) -> 'Prepared':
    """Return a copy of a model that is made fast for inference on the model's device, and says in `report` how.

    It is folded, lowered to a precision, and compiled if wanted. Whether maps are channels-last is decided by measuring
    both, and so is, for int8, what is not int8: torchao quantises the linear layers but the heads (weights once,
    activations as they come), and the convolutions and everything else are bf16 or fp32, whichever is faster here.

    Args:
        model: A timm model (also with features_only) in evaluation mode. It stays as it is.
        precision: 'fp32'; 'bf16'; 'int8' (`pip install timm-vitres[int8]`), which is fast only when compiled.
        compile: Whether torch.compile shall compile it (a minute; again, once, when another size comes).
        example: Images (B, C, H, W) like those to come, for measurements of time and of what the precision costs. By
            default one image of noise, of the model's own size.

    Returns:
        Takes images (B, C, H, W) of any floating dtype, without gradients; returns what the model returns, in float32.

    Raises:
        ValueError: for an unknown precision, an example of another shape, a model in training mode, one that `fold`
            refuses or whose outputs are not finite, or where torchao is missing.
        TypeError: for what is no module, or is prepared already.
        RuntimeError: where torch.compile can't compile here.
    """
    check_choice('precision', precision, PRECISIONS)
    check_choice('compile', compile, (False, True))
    images = check_example(model, example)
    folded = fold(model)
    before = forward_only(InOut(model, next(model.parameters()).dtype))
    expected = before(images)
    check_outputs(expected)

    steps = tqdm(total=3 if compile else 2, desc='measuring memory formats', leave=False, disable=None)
    dtypes = dict(fp32=[torch.float32], bf16=[torch.bfloat16], int8=[torch.bfloat16, torch.float32])[precision]
    candidates = {
        (dtype, name): InOut(copy.deepcopy(folded).to(dtype=dtype, memory_format=memory_format), dtype, memory_format)
        for dtype in dtypes
        for name, memory_format in _FORMATS.items()
    }
    seconds = measure({key: forward_only(candidate) for key, candidate in candidates.items()}, images)
    dtype, memory_format = min(candidates, key=lambda key: seconds[key])
    lowered = candidates[dtype, memory_format]
    del candidates
    report = [f'folded ({_merged(model, folded)})']
    report += ['measured ' + ', '.join(f'{_NAMES[key[0]]} {key[1]} {_ms(value)}' for key, value in seconds.items())]

    report.append(f'{_NAMES[dtype]}, {memory_format}')
    if precision == 'int8':
        quantised = quantise_(lowered.model)
        report[-1] += f', but {quantised} linear layers int8 (torchao: weights per channel, activations per token)'

    prepared = Prepared(lowered, model, precision)
    if compile:
        steps.update()
        steps.set_description('compiling')
        start = time.perf_counter()
        prepared.compile_(images)
        report.append(f'compiled by torch.compile in {time.perf_counter() - start:.0f} s')

    steps.update()
    steps.set_description('measuring')
    seconds = measure({'before': before, 'after': prepared}, images)
    ratio = seconds['after'] / seconds['before']
    report.append(f'{_ms(seconds["before"])} before, {_ms(seconds["after"])} now, ratio {ratio:.3f}')
    outputs = prepared(images)
    prepared.difference = difference(outputs, expected)
    report.append(f'outputs differ by {prepared.difference:.1e} of their norm' + _agreement(outputs, expected))
    steps.close()
    where = f'{images.device}' + (f', {torch.get_num_threads()} threads' if images.device.type == 'cpu' else '')
    title = f'{type(model).__name__} at {tuple(images.shape)}{"" if example is not None else " of noise"} on {where}: '
    prepared.report = title + '; '.join(report) + '.'
    _logger.info(prepared.report)
    return prepared


class Prepared(nn.Module):
    """What `prepare` makes: images (B, C, H, W) in, the model's outputs in float32 out, never a gradient.

    It is made for the machine and the process that it is in, so it is neither saved nor copied: TypeError says so.

    Attributes:
        report: What was done, and what was measured of it.
        precision: 'fp32', 'bf16' or 'int8'.
        difference: Norm of the difference of its outputs to the model's on the example, relative to their norm.
    """

    folded = True  # `save` and `push` refuse it

    def __init__(self, lowered: 'InOut', model: nn.Module, precision: str):
        super().__init__()
        self.lowered = lowered.requires_grad_(False)
        self.precision = precision
        self.report, self.difference = '', 0.0
        self.compiled = self.graphed = False
        # what timm's functions, and ours, ask a model for: its data config, classes, and maps
        data = ('pretrained_cfg', 'default_cfg', 'pretrained_model_args', 'model_args', '_traits', 'in_chans')
        for name in (*data, 'num_classes', 'num_features', 'feature_info'):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        self.eval()

    def train(self, mode: bool = True):
        """Refuse training mode (ValueError)."""
        if mode:
            raise ValueError('model: it is prepared for inference, and has nothing left to train; train the original.')
        return super().train(mode)

    def __reduce_ex__(self, protocol):
        """Refuse pickle, torch.save and copy (TypeError)."""
        raise TypeError('a prepared model is neither saved nor copied; save the original, and prepare it again.')

    def state_dict(self, *args: Any, **kwargs: Any):
        """Refuse (TypeError): these would be no weights that a model loads."""
        raise TypeError('a prepared model has no state dict; save the original, and prepare it again.')

    def load_state_dict(self, *args: Any, **kwargs: Any):
        """Refuse (TypeError): weights are merged into one another here."""
        raise TypeError('a prepared model loads no weights; load them into the original, and prepare it again.')

    def __prepare_scriptable__(self):
        """Refuse torch.jit.script (TypeError), which asks for this first."""
        raise TypeError('a prepared model is not scripted; timm_vitres.export writes the original as TorchScript.')

    def compile_(self, images: torch.Tensor) -> None:
        """Let torch.compile compile it for images (B, C, H, W), and run it on them."""
        # launching its kernels one by one takes longer than running them, for small batches
        self.graphed = images.device.type == 'cuda'
        self.lowered.compile(mode='reduce-overhead' if self.graphed else 'default')
        self.compiled = True
        try:
            for _ in range(3):
                self(images)
        except Exception as error:
            needed = 'a C++ compiler' if images.device.type == 'cpu' else 'Triton'
            reason = str(error).strip().split('\n')[0]
            raise RuntimeError(f'compile: torch.compile failed; it needs {needed}. It says: {reason}') from error

    def forward(self, x: torch.Tensor) -> Any:
        """x: (B, C, H, W) -> what the model returns, in float32."""
        if not torch.is_tensor(x) or x.ndim != 4 or not x.is_floating_point():
            got = f'shape {tuple(x.shape)} of {x.dtype}' if torch.is_tensor(x) else type(x).__name__
            raise ValueError(f'input: got {got}, expected a tensor (B, C, H, W) of a floating dtype.')
        with torch.no_grad(), _compile_settings(x.device) if self.compiled else nullcontext():
            y = self.lowered(x)
        if self.graphed:  # the next call writes to the same memory
            y = y.clone() if torch.is_tensor(y) else [one.clone() for one in y]
        return y


@contextmanager
def _compile_settings(device: torch.device) -> Iterator[None]:
    """Settings that TorchDynamo and Inductor read when they trace, which is at the first call of each new size."""
    # all that is prepared in a process counts as recompilations of one function: past the default limit it would run
    # uncompiled, without a word (the names are those of torch 2.6, aliases since)
    limits = torch._dynamo.config.patch(cache_size_limit=1000, accumulated_cache_size_limit=10000)
    # on CPU, weights that are constants are packed for the kernels
    with limits, torch._inductor.config.patch(freezing=device.type == 'cpu'):
        yield


class InOut(nn.Module):
    """A model of any precision that takes images of any dtype, and returns logits in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, memory_format=torch.contiguous_format):
        super().__init__()
        self.model, self.dtype, self.memory_format = model, dtype, memory_format

    def forward(self, x: torch.Tensor) -> Any:
        """x: (B, C, H, W) -> (B, num_classes), or whatever the model returns, in float32."""
        y = self.model(x.to(self.dtype).contiguous(memory_format=self.memory_format))
        return y.float() if torch.is_tensor(y) else [one.float() for one in y]


def quantise_(model: nn.Module) -> int:
    """Make the weights of a model's linear layers int8 by torchao, but for its heads; return how many."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise ValueError('precision: \'int8\' needs torchao, pip install "timm-vitres[int8]".') from None
    heads = getattr(model, '_traits', {}).get('classifier', ())

    def wanted(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and name not in heads

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=wanted)
    return sum(wanted(module, name) for name, module in model.named_modules())


def fastest_training(
    model: nn.Module, num_classes: int, shape: Tuple[int, ...], amp_dtype: str = 'bfloat16'
) -> Tuple[Dict[str, bool], str]:
    """Time training steps (forward, backward) on the model's device, in full and mixed precision, contiguous and
    channels-last, and return the settings of the fastest, and what was measured.

    Args:
        model: Returns logits (B, num_classes), or, with two heads, a pair of them. It stays as it is.
        shape: Of a batch: (B, C, H, W).
        amp_dtype: Of mixed precision: 'bfloat16' or 'float16'.
    """
    device = next(model.parameters()).device
    images = torch.randn(shape, device=device)
    target = torch.randint(num_classes, (shape[0],), device=device)

    def step(copied: nn.Module, amp: bool, memory_format: torch.memory_format, x: torch.Tensor) -> None:
        with torch.autocast(device.type, getattr(torch, amp_dtype), enabled=amp):
            y = copied(x.contiguous(memory_format=memory_format))
            loss = sum(nn.functional.cross_entropy(one, target) for one in ([y] if torch.is_tensor(y) else y))
        loss.backward()
        copied.zero_grad()

    steps = {}
    for name, memory_format in _FORMATS.items():
        copied = copy.deepcopy(model).to(memory_format=memory_format).train()
        for amp in (False, True):
            steps[amp, name] = partial(step, copied, amp, memory_format)
    times = measure(steps, images)
    amp, name = min(times, key=lambda key: times[key])
    text = ', '.join(f'{amp_dtype if amp else "float32"} {name} {_ms(value)}' for (amp, name), value in times.items())
    return dict(amp=amp, channels_last=name == 'channels-last'), text


def check_example(model: nn.Module, example: Optional[torch.Tensor]) -> torch.Tensor:
    """Return images (B, C, H, W) on the model's device: the example, or one image of noise of the model's own size.

    Raises:
        TypeError: for a model that is no module, or is prepared.
        ValueError: for a model without weights, and an example that is no such images.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model: got {type(model).__name__}, expected a torch.nn.Module.')
    if isinstance(model, Prepared):
        raise TypeError('model: it is prepared already; give the original.')
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is None or device.type == 'meta':
        raise ValueError(f'model: it has no weights{"" if device is None else " (it is on the device meta)"}.')
    shape = data_config(model)['input_size']
    if example is None:
        return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
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
    if not all(one.isfinite().all() for one in ([outputs] if torch.is_tensor(outputs) else outputs)):
        raise ValueError('model: its outputs for the example are not finite (nan, inf); its weights are broken.')


def forward_only(model: nn.Module) -> Callable[[torch.Tensor], Any]:
    """Return a model's forward pass without gradients."""
    return torch.no_grad()(model.forward)


def measure(functions: Dict[Any, Callable], x: torch.Tensor, rounds: int = 3, seconds: float = 0.2) -> Dict[Any, float]:
    """Return the median time of each function of x, in seconds; they take turns, `rounds` times."""
    from torch.utils.benchmark import Timer  # here, since importing this package does not need it

    timers = {
        name: Timer('function(x)', globals=dict(function=function, x=x), num_threads=torch.get_num_threads())
        for name, function in functions.items()
    }
    once = {name: timer.timeit(1).mean for name, timer in timers.items()}  # and warm
    repeats = {name: max(1, round(seconds / value)) for name, value in once.items()}
    times: Dict[Any, List[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(repeats[name]).mean)
    return {name: statistics.median(values) for name, values in times.items()}


def difference(y: Any, expected: Any) -> float:
    """Return the norm of the difference of outputs, relative to the norm of those expected; the worst of several."""
    pairs = [(y, expected)] if torch.is_tensor(y) else list(zip(y, expected, strict=True))
    norms = [((one - other).norm() / other.norm().clamp_min(1e-30)).item() for one, other in pairs]
    return max(norms)


def _agreement(y: Any, expected: Any) -> str:
    if not torch.is_tensor(y) or y.ndim != 2 or len(y) < 2:
        return ''
    same = int((y.argmax(-1) == expected.argmax(-1)).sum())
    return f', the likeliest class is the same for {same} of {len(y)} images'


def _merged(model: nn.Module, folded: nn.Module) -> str:
    """Say which layers of a model are gone."""
    before, after = (Counter(type(module).__name__ for module in each.modules()) for each in (model, folded))
    gone = sorted((before - after).items())
    return ', '.join(f'{count} {name}' for name, count in gone) + ' less' if gone else 'there was nothing to fold'


def _ms(seconds: float) -> str:
    return f'{1000 * seconds:.3g} ms'
