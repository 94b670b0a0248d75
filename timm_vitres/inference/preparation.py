"""A model made fast for inference: folded, lowered, laid out as this machine likes it best, compiled.

model in evaluation mode -> `fold` -> precision (bf16; torchao's int8) -> memory format, by measurement ->
torch.compile -> `Prepared`, which takes and returns float32 and says what was done to it.
"""

import copy
import logging
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import Any, Iterator, Optional

import torch
from timm.models import get_model_traits
from torch import nn
from tqdm import tqdm

from ..measure import _FORMATS, _ms, measure
from ..models.config import check_choice
from .folding import fold
from .lowering import InOut, check_example, check_outputs, difference, forward_only, quantise_

PRECISIONS = ('fp32', 'bf16', 'int8')
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
    is_prepared = True

    def __init__(self, lowered: 'InOut', model: nn.Module, precision: str):
        super().__init__()
        self.lowered = lowered.requires_grad_(False)
        self.precision = precision
        self.report, self.difference = '', 0.0
        self.compiled = self.graphed = False
        # what timm's functions, and ours, ask a model for: its data config, classes, and maps
        data = ('pretrained_cfg', 'default_cfg', 'pretrained_model_args', 'model_args', 'in_chans')
        for name in (*data, 'num_classes', 'num_features', 'feature_info'):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        self._traits = get_model_traits(model)  # where timm looks for the size and channels of images
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
