"""A model made fast for inference: folded, lowered, laid out as this machine likes it best, compiled.

model in evaluation mode -> `fold` -> an engine: torch (precision, memory format by measurement, torch.compile), or the
runtime of an export format -> `Prepared`, which takes and returns float32 and says what was done to it.
"""

import copy
import importlib
import logging
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import torch
from timm.models import get_model_traits
from torch import nn
from tqdm import tqdm

from ..checks import check_choice
from ..measure import HOPELESS, MEMORY_FORMATS, as_ms, measure
from ..models.base import Hybrid
from .exports import capture, taken_sizes, write_compared
from .folding import copy_model, fold
from .formats import ENGINES
from .lowering import (
    INT8_SETTINGS,
    PRECISIONS,
    Lowered,
    check_example,
    check_outputs,
    difference,
    each,
    forward_only,
    quantise_,
)

_NAMES = {torch.float32: 'fp32', torch.bfloat16: 'bf16'}
_WIDE = (torch.float32, torch.float64)
_TOLERANCE = 1e-3  # merging rounds anew, and compilers add up in another order
# older versions of torch keep the compiler's settings for all threads: of two calls one waits
_OF_THREADS = 'ContextVar' in vars(importlib.import_module('torch.utils._config_module'))
_TURNS = nullcontext() if _OF_THREADS else threading.RLock()
_logger = logging.getLogger(__name__)


@dataclass
class Preparation:
    """What was done to a model, and measured of it."""

    model: str  # the name of its class
    shape: Tuple[int, ...]  # of the example: (B, C, H, W)
    is_noise: bool  # whether the example is none of the caller's
    where: str  # device and threads
    merged: str  # which layers folding took out
    candidates: Dict[str, float] = field(default_factory=dict)  # seconds of what was tried
    chosen: str = ''
    compile_seconds: Optional[float] = None
    seconds_before: float = 0.0
    seconds_after: float = 0.0
    difference: float = 0.0  # norm of the difference of the outputs on the example, relative to their norm
    same_class: Optional[Tuple[int, int]] = None  # for how many images of how many the likeliest class is the same

    def render(self) -> str:
        """Return all of it as one sentence."""
        parts = [f'folded ({self.merged})']
        if self.candidates:
            parts.append('measured ' + ', '.join(f'{name} {as_ms(value)}' for name, value in self.candidates.items()))
        parts.append(self.chosen)
        if self.compile_seconds is not None:
            parts.append(f'compiled by torch.compile in {self.compile_seconds:.0f} s')
        ratio = self.seconds_after / self.seconds_before
        parts.append(f'{as_ms(self.seconds_before)} before, {as_ms(self.seconds_after)} now, ratio {ratio:.3f}')
        parts.append(f'outputs differ by {self.difference:.1e} of their norm')
        if self.same_class is not None:
            parts[-1] += ', the likeliest class is the same for {} of {} images'.format(*self.same_class)
        noise = ' of noise' if self.is_noise else ''
        return f'{self.model} at {self.shape}{noise} on {self.where}: {"; ".join(parts)}.'


def prepare(
    model: nn.Module,
    precision: str = 'fp32',
    compile: bool = False,
    example: Optional[torch.Tensor] = None,
    engine: str = 'torch',
) -> 'Prepared':
    """Return a copy of a model that is made fast for inference on the model's device, and says in `report` how.

    With torch it is folded, lowered to a precision, and compiled if wanted. Whether maps are channels-last is decided
    by measuring both, and so is, for int8, what is not int8: torchao quantises the linear layers but the heads (weights
    once, activations as they come), and the convolutions and everything else are bf16 or fp32, whichever is faster
    here. Other engines run the folded model as `export` writes it, on CPU; one that is not of this package then takes
    images of the example's height and width alone.

    Args:
        model: A timm model (also with features_only) in evaluation mode. It stays as it is.
        precision: 'fp32'; 'bf16' (not with onnxruntime); 'int8', which with torch needs
            `pip install 'timm-vitres[int8]'`, and is fast only when compiled.
        compile: Whether torch.compile shall compile it (seconds to half a minute; once more when a
            second size comes).
        example: Images (B, C, H, W) like those to come, for measurements of time and of what the precision costs. By
            default one image of noise, of the model's own size. OpenVINO's int8 takes its ranges from them, and
            onnxruntime's makes convolutions int8 with them.
        engine: 'torch'; 'openvino' (`pip install 'timm-vitres[openvino]'`); 'onnxruntime' (timm-vitres[export]).

    Returns:
        Takes images (B, C, H, W) of any floating dtype, without gradients; returns what the model returns, in float32.

    Raises:
        ValueError: for an unknown precision or engine, an example of another shape, a model in training mode, one that
            `fold` refuses or whose outputs are not finite, or where a package is missing.
        TypeError: for what is no module, is prepared already, or wraps a model (compiled, DistributedDataParallel).
        RuntimeError: where torch.compile can't compile here, the engine can't hold the model, or what was made of a
            float32 model on the CPU, in fp32, computes something else.
    """
    check_choice('engine', engine, ('torch', *ENGINES))
    check_choice('precision', precision, PRECISIONS)
    check_choice('compile', compile, (False, True))
    if engine != 'torch':
        _check_engine(engine, precision, compile, example is not None)
    images = check_example(model, example)
    dtype = next(model.parameters()).dtype  # merged weights are rounded once; timm merges some layers on the CPU
    folded = fold(model if dtype in _WIDE else copy_model(model).float()).to(images.device)
    before = forward_only(Lowered(model, dtype))
    expected = before(images)
    check_outputs(expected)
    threads = f', {torch.get_num_threads()} threads' if images.device.type == 'cpu' else ''
    done = Preparation(
        type(model).__name__,
        tuple(images.shape),
        example is None,
        f'{images.device}{threads}',
        _merged(model, folded),
    )
    steps = tqdm(total=3 if compile else 2, desc=f'preparing for {engine}', leave=False, disable=None)
    if engine == 'torch':
        lowered = _lower(folded, precision, images, done)
    else:
        del folded
        lowered = _run_by_engine(model, engine, precision, images, example is not None)
        note = getattr(lowered.run, 'note', '')
        done.chosen = f'{precision}, run by {ENGINES[engine].runtime}' + (f', {note}' if note else '')
        done.chosen += f', for {lowered.taken}'
    prepared = Prepared(lowered, model, precision, engine)
    if compile:
        steps.update()
        steps.set_description('compiling')
        start = time.perf_counter()
        prepared.compile_(images)
        done.compile_seconds = time.perf_counter() - start
    steps.update()
    steps.set_description('measuring')
    seconds = measure({'before': before, 'after': prepared}, images)
    done.seconds_before, done.seconds_after = seconds['before'], seconds['after']
    outputs = prepared(images)
    done.difference = difference(outputs, expected)
    done.same_class = _agreement(outputs, expected) if getattr(model, 'num_classes', True) else None
    steps.close()
    if precision == 'fp32' and dtype in _WIDE and images.device.type == 'cpu':
        _check_same(done.difference)
    prepared.done = done
    _logger.info(prepared.report)
    return prepared


def _check_same(difference: float) -> None:
    """Raise RuntimeError where outputs differ by more than rounding; not so on GPUs, which may compute in TF32."""
    if not difference < _TOLERANCE:
        raise RuntimeError(f"model: what was made of it differs from it, by {difference:.1e} of the outputs' norm.")


def _check_engine(engine: str, precision: str, compile: bool, has_images: bool) -> None:
    """Raise ValueError for what an engine can't do, or not here."""
    row = ENGINES[engine]
    if compile:
        raise ValueError(f"compile: got True, but {engine!r} compiles by itself; it is for the engine 'torch'.")
    row.check_precision(precision, has_images)
    row.check_installed(precision, argument='engine')


def _lower(folded: nn.Module, precision: str, images: torch.Tensor, done: Preparation) -> Lowered:
    """Return a folded model in the dtype and memory format that are fastest for a precision, measured on images."""
    dtypes = dict(fp32=[torch.float32], bf16=[torch.bfloat16], int8=[torch.bfloat16, torch.float32])[precision]
    candidates = {
        (dtype, name): Lowered(copy.deepcopy(folded).to(dtype=dtype, memory_format=memory_format), dtype, memory_format)
        for dtype in dtypes
        for name, memory_format in MEMORY_FORMATS.items()
    }
    quantised = [quantise_(each.model) for each in candidates.values()] if precision == 'int8' else []
    # a CPU without instructions for bfloat16 takes twenty times as long for it
    seconds = measure({key: forward_only(each) for key, each in candidates.items()}, images, hopeless=HOPELESS)
    done.candidates = {f'{_NAMES[dtype]} {name}': value for (dtype, name), value in seconds.items()}
    dtype, memory_format = min(candidates, key=lambda key: seconds[key])
    lowered = candidates[dtype, memory_format]
    done.chosen = f'{_NAMES[dtype]}, {memory_format}'
    if quantised:
        done.chosen += f', but {quantised[0]} linear layers int8 (torchao: weights per channel, activations per token)'
    return lowered


def _run_by_engine(
    model: nn.Module, engine: str, precision: str, images: torch.Tensor, calibrate: bool
) -> '_EngineModule':
    """Return what runs a model as its engine's file."""
    row = ENGINES[engine]
    net = getattr(model, 'model', model)  # timm wraps a model that returns features
    dynamic = isinstance(net, Hybrid)  # others may take the example's size alone
    source = capture(model, precision, images, calibrate, dynamic)
    own = [None if axis in source.sizes else side for axis, side in enumerate(images.shape)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f'model{row.suffixes[0]}'
        write_compared(source, file, row, what=f'engine: {engine!r}')
        # it is loaded anew, since the comparison's sizes took the graphs of their own
        check_input = _without_weights(net).check_input if dynamic else None
        return _EngineModule(row.load(file), own, check_input, taken_sizes(source))


def _without_weights(model: nn.Module) -> Any:
    """Return a copy of a model whose parameters and buffers have shapes alone."""
    values = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(value): value.detach().to('meta') for value in values})


class _EngineModule(nn.Module):
    """What an engine runs, as a module.

    Args:
        run: What a file computes.
        own: The lengths of the axes of images that the file has alone; None where it takes any.
        check_input: What the model refuses; engines answer images that it would not.
        taken: In words, which images the file takes.
    """

    def __init__(
        self,
        run: Callable[[torch.Tensor], Any],
        own: Sequence[Optional[int]],
        check_input: Optional[Callable[[torch.Tensor], None]],
        taken: str,
    ):
        super().__init__()
        self.run, self.own, self.check_input, self.taken = run, own, check_input, taken

    def forward(self, x: torch.Tensor) -> Any:
        """x: (B, C, H, W) -> what the model returns, in float32."""
        if self.check_input is not None:
            self.check_input(x)
        if any(one not in (None, side) for one, side in zip(self.own, x.shape)):
            taken = ', '.join('any' if one is None else str(one) for one in self.own)
            raise ValueError(
                f'input: got shape {tuple(x.shape)}, expected ({taken}), which the engine has a graph for.'
            )
        return self.run(x.detach().float())


class Prepared(nn.Module):
    """What `prepare` makes: images (B, C, H, W) in, the model's outputs in float32 out, never a gradient.

    It is made for the machine and the process that it is in, so it is neither saved nor copied: TypeError says so.

    Attributes:
        done: What was done, and what was measured of it.
        precision: 'fp32', 'bf16' or 'int8'.
        engine: 'torch', or whose runtime it is.
    """

    done: Preparation

    folded = True  # `save` and `push` refuse it
    is_prepared = True

    def __init__(self, lowered: nn.Module, model: nn.Module, precision: str, engine: str = 'torch'):
        super().__init__()
        self.lowered = lowered.requires_grad_(False)
        self.precision, self.engine = precision, engine
        self.compiled = self.graphed = False
        # what timm's functions, and ours, ask a model for: its data config, classes, and maps
        data = ('pretrained_cfg', 'default_cfg', 'pretrained_model_args', 'model_args', 'in_chans')
        for name in (*data, 'num_classes', 'num_features', 'feature_info'):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        net = getattr(model, 'model', model)  # timm wraps a model that returns features
        # compiled code answers images that the model refuses; what an engine runs asks by itself
        asks = engine == 'torch' and isinstance(net, Hybrid)
        self.check_input = _without_weights(net).check_input if asks else None
        self._traits = get_model_traits(model)  # where timm looks for the size and channels of images
        self.eval()

    @property
    def report(self) -> str:
        """What was done, and what was measured of it, in a sentence."""
        return self.done.render()

    @property
    def difference(self) -> float:
        """Norm of the difference of its outputs to the model's on the example, relative to their norm."""
        return self.done.difference

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

    def _apply(self, fn: Callable, recurse: bool = True):
        """Refuse `half`, `bfloat16` and other casts (TypeError): images are still given to it in the dtype it has."""
        own = next(self.parameters(), None)
        if own is not None and fn(own.new_empty(0)).dtype != own.dtype:
            raise TypeError('a prepared model is not cast; prepare the original, which takes a precision.')
        return super()._apply(fn, recurse)

    def compile_(self, images: torch.Tensor) -> None:
        """Let torch.compile compile it for images (B, C, H, W), and run it on them."""
        if torch._dynamo.config.disable:
            raise RuntimeError('compile: torch.compile is switched off in this process (TORCH_COMPILE_DISABLE).')
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
        if self.compiled and self.check_input is not None:
            self.check_input(x)
        settings = _compile_settings(x.device, self.precision) if self.compiled else nullcontext()
        with torch.no_grad(), settings:
            y = self.lowered(x)
        if self.graphed:  # the next call writes to the same memory
            y = each(torch.clone, y)
        return y


@contextmanager
def _compile_settings(device: torch.device, precision: str) -> Iterator[None]:
    """Settings that TorchDynamo and Inductor read when they trace, which is at the first call of each new size."""
    # all that is prepared in a process counts as recompilations of one function: past the default limit it would run
    # uncompiled, without a word (the names are those of torch 2.6, aliases since)
    limits = torch._dynamo.config.patch(
        cache_size_limit=1000, accumulated_cache_size_limit=10000, suppress_errors=False
    )
    # on CPU, weights that are constants are packed for the kernels
    options = {'freezing': device.type == 'cpu', **dict.fromkeys(INT8_SETTINGS if precision == 'int8' else (), True)}
    with _TURNS, limits, torch._inductor.config.patch(options):
        yield


def _agreement(y: Any, expected: Any) -> Optional[Tuple[int, int]]:
    """Return for how many of how many images the likeliest class is the same; None for one image, and for maps."""
    if not torch.is_tensor(y) or y.ndim != 2 or len(y) < 2:
        return None
    return int((y.argmax(-1) == expected.argmax(-1)).sum()), len(y)


def _merged(model: nn.Module, folded: nn.Module) -> str:
    """Say which layers of a model are gone."""
    before, after = (Counter(type(module).__name__ for module in each.modules()) for each in (model, folded))
    gone = sorted((before - after).items())
    return ', '.join(f'{count} {name}' for name, count in gone) + ' less' if gone else 'there was nothing to fold'
