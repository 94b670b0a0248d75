"""Training steps with torch's fused kernel of attention, and with attention step by step (`--no-fused-attn`).

    python benchmarks/attention.py [--record]

Both sides are one model, in turns, in float32 and in bfloat16 (autocast), channels-last; forward, loss and backward.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from itertools import product

import timm
import torch
from common import write_row
from torch import nn

import timm_vitres  # noqa: F401 (it registers the models)
from timm_vitres.measure import measure, most_tokens
from timm_vitres.models.arms import ARMS
from timm_vitres.models.layers import fused_attentions, unfused

MODELS = (('vit', 28, 128), ('serial', 28, 128))  # arms of `timm-vitres compare`, image size, batch size


def step(model: nn.Module, target: torch.Tensor, bf16: bool, fused: bool, x: torch.Tensor) -> None:
    """Train on a batch, but for the optimizer."""
    attention = nullcontext() if fused else unfused(fused_attentions(model))
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16), attention:
        loss = nn.functional.cross_entropy(model(x), target)
    loss.backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--record', action='store_true', help='append rows to benchmarks/results/attention.csv')
    args = parser.parse_args()
    for name, size, batch in MODELS:
        model = timm.create_model(ARMS[name].model, img_size=size, **ARMS[name].model_kwargs(size))
        x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        model.train().to(memory_format=torch.channels_last)
        target = torch.randint(10, (batch,))

        sides = {key: partial(step, model, target, *key) for key in product((False, True), (True, False))}
        times = measure(sides, x, rounds=7, seconds=1.0)
        for bf16 in (False, True):
            write_row(
                'attention',
                dict(
                    model=name,
                    img_size=size,
                    batch=batch,
                    tokens=most_tokens(model, x[:1]),
                    precision='bf16' if bf16 else 'fp32',
                    fused_ms=round(1000 * times[bf16, True], 1),
                    unfused_ms=round(1000 * times[bf16, False], 1),
                    ratio=round(times[bf16, False] / times[bf16, True], 3),
                    threads=torch.get_num_threads(),
                ),
                args.record,
            )


if __name__ == '__main__':
    main()
