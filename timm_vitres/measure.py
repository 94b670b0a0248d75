"""Times on this machine: functions that take turns, and the training settings that are fastest."""

import copy
import statistics
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from itertools import product
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import nn

from .models.layers import fused_attentions, unfused

HOPELESS = 5  # times the fastest one's first call: bfloat16 on a CPU that has no instructions for it takes twenty
# tokens, up to which the matrices of attention take no more memory than what else a block keeps for the way back
FEW_TOKENS = 256
MEMORY_FORMATS = {'channels-last': torch.channels_last, 'contiguous': torch.contiguous_format}


def fastest_training(
    model: nn.Module, num_classes: int, shape: Tuple[int, ...], amp_dtype: str = 'bfloat16'
) -> Tuple[Dict[str, bool], str]:
    """Time training steps (forward, backward) on the model's device, in full and mixed precision, contiguous and
    channels-last, and return the settings of the fastest, and what was measured.

    On a CPU also with attention step by step, where its layers see few tokens: there torch's fused kernel is the slower
    one, above all in bfloat16, and on the way back.

    Args:
        model: Returns logits (B, num_classes), or, with two heads, a pair of them. It stays as it is.
        shape: A batch's: (B, C, H, W).
        amp_dtype: The lower one of mixed precision: 'bfloat16' or 'float16'.
    """
    device = next(model.parameters()).device
    images = torch.randn(shape, device=device)
    target = torch.randint(num_classes, (shape[0],), device=device)

    def step(copied: nn.Module, amp: bool, memory_format: torch.memory_format, fused: bool, x: torch.Tensor) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(device.type, getattr(torch, amp_dtype), enabled=amp))
            if not fused:
                stack.enter_context(unfused(fused_attentions(copied)))
            y = copied(x.contiguous(memory_format=memory_format))
            loss = sum(nn.functional.cross_entropy(one, target) for one in ([y] if torch.is_tensor(y) else y))
        try:
            loss.backward()
        finally:  # memory may have run out
            copied.zero_grad()

    kernels = (True, False) if device.type == 'cpu' and 0 < most_tokens(model, images[:2]) <= FEW_TOKENS else (True,)
    steps = {}
    for name, memory_format in MEMORY_FORMATS.items():
        copied = copy.deepcopy(model).to(memory_format=memory_format).train()
        for amp, fused in product((False, True), kernels):
            steps[amp, name, fused] = partial(step, copied, amp, memory_format, fused)
    times = measure(steps, images, hopeless=HOPELESS)
    amp, name, fused = min(times, key=lambda key: times[key])
    text = ', '.join(
        f'{amp_dtype if amp else "float32"} {name} {"" if fused else "unfused "}{as_ms(value)}'
        for (amp, name, fused), value in times.items()
    )
    return dict(amp=amp, channels_last=name == 'channels-last', no_fused_attn=not fused), text


def most_tokens(model: nn.Module, images: torch.Tensor) -> int:
    """Return the most tokens that a fused kernel of attention sees in a model; 0 where it has none.

    Args:
        model: It stays as it is.
        images: (B, C, H, W).
    """
    if not fused_attentions(model):
        return 0
    counts: List[int] = []

    def count(_: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
        shape = args[0].shape if args else images.shape  # (B, N, C) of tokens, (B, C, h, w) of maps
        counts.append(shape[1] if len(shape) == 3 else shape[-2:].numel())

    copied = copy.deepcopy(model).eval()  # a call in training mode would move statistics
    for attention in fused_attentions(copied):
        attention.register_forward_pre_hook(count)
    with torch.no_grad():
        copied(images)
    return max(counts, default=0)


def measure(
    functions: Dict[Any, Callable],
    x: torch.Tensor,
    rounds: int = 3,
    seconds: float = 0.2,
    hopeless: float = float('inf'),
) -> Dict[Any, float]:
    """Return the median time of each function of x, in seconds; they take turns, `rounds` times.

    One whose first call takes more than `hopeless` times as long as the fastest one's, or more memory than there is, is
    not called again.

    Args:
        x: On the device whose time is taken.
    """
    from torch.utils.benchmark import Timer  # which looks for compilers, and may warn of what it finds

    timers = {
        name: Timer('function(x)', globals=dict(function=function, x=x), num_threads=torch.get_num_threads())
        for name, function in functions.items()
    }
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # a timer waits for the current GPU alone
        once = {name: _first(timer, hopeless) for name, timer in timers.items()}  # this also warms up
        limit = hopeless * min(once.values())
        repeats = {name: max(1, round(seconds / value)) for name, value in once.items() if value <= limit}
        times: Dict[Any, List[float]] = {name: [] if name in repeats else [value] for name, value in once.items()}
        for _ in range(rounds):
            for name, count in repeats.items():
                times[name].append(timers[name].timeit(count).mean)
    return {name: statistics.median(values) for name, values in times.items()}


def _first(timer: Any, hopeless: float) -> float:
    """Return the seconds of a function's first call; infinitely many where memory does not suffice for it."""
    with suppress(*([torch.OutOfMemoryError] if hopeless < float('inf') else ())):
        return timer.timeit(1).mean
    torch.cuda.empty_cache()  # not before, since the error holds what was computed
    return float('inf')


def as_ms(seconds: float) -> str:
    """Return a time in milliseconds, in three digits or all that stand before the point."""
    milliseconds = 1000 * seconds
    return f'{milliseconds:.0f} ms' if milliseconds >= 100 else f'{milliseconds:.3g} ms'


def as_minutes(seconds: float) -> str:
    """Return a time in minutes, in two digits or all that stand before the point, without the unit."""
    minutes = seconds / 60
    return f'{minutes:.0f}' if minutes >= 10 else f'{minutes:.2g}'
