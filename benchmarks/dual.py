"""The parallel family against the code of Conformer's authors: time and memory of a forward pass, one process.

    git clone https://github.com/pengzhiliang/Conformer
    python benchmarks/dual.py Conformer --record

Both sides have the same random weights (BatchNorm statistics too) and return the sum of their heads' logits. `folded`
is ours after timm's `reparameterize_model`. fp32, eager, 224 x 224. Rounds are interleaved; the ratios are medians over
the rounds of the ratio within a round. Memory is the peak of what torch's allocator holds during a pass, weights left
out (torch.profiler).
"""

import argparse
import statistics
import sys
from pathlib import Path

import timm
import torch
from common import peak_bytes, seconds, write_row
from timm.utils import reparameterize_model
from torch import nn

import timm_vitres  # noqa: F401  (registers the models)

sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))
from conformer_reference import VARIANTS, fill_
from layouts import conformer_layout


class Summed(nn.Module):
    """The original, with one logits tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        resnet, vit = self.model(x)
        return resnet + vit


def main() -> None:
    """Measure, print, and record with --record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('original', type=Path, help='a checkout of github:pengzhiliang/Conformer')
    parser.add_argument('--models', nargs='+', default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument('--batches', type=int, nargs='+', default=[1, 16])
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--record', action='store_true', help='append the rows to benchmarks/results/dual.csv')
    args = parser.parse_args()
    sys.path.insert(0, str(args.original))
    from conformer import Conformer

    for name in args.models:
        ours = fill_(timm.create_model(name))
        original = Conformer(depth=12, mlp_ratio=4, qkv_bias=True, **VARIANTS[name])
        original.load_state_dict(conformer_layout(ours.state_dict()))
        sides = {'original': Summed(original).eval(), 'ours': ours, 'folded': reparameterize_model(ours)}
        for batch in args.batches:
            x = torch.randn(batch, 3, 224, 224)
            times = {side: [] for side in sides}
            with torch.inference_mode():
                logits = {side: model(x) for side, model in sides.items()}  # and warm
                worst = max((logits[side] - logits['original']).norm() / logits['original'].norm() for side in sides)
                memory = {side: peak_bytes(model, x) for side, model in sides.items()}
                repeats = max(1, round(0.5 / seconds(ours, x, 2)))
                for round_number in range(args.rounds):
                    order = list(sides)[round_number % 3 :] + list(sides)[: round_number % 3]
                    for side in order:
                        times[side].append(seconds(sides[side], x, repeats))
            for side in ('ours', 'folded'):
                ratios = [own / theirs for own, theirs in zip(times[side], times['original'])]
                quartiles = statistics.quantiles(ratios, n=4)
                row = dict(
                    model=name,
                    side=side,
                    batch=batch,
                    rounds=args.rounds,
                    time_ratio=round(statistics.median(ratios), 3),
                    time_ratio_quartiles=f'{quartiles[0]:.3f}-{quartiles[2]:.3f}',
                    memory_ratio=round(memory[side] / memory['original'], 3),
                    original_ms=round(1000 * statistics.median(times['original']), 1),
                    own_ms=round(1000 * statistics.median(times[side]), 1),
                    original_mb=round(memory['original'] / 2**20, 1),
                    own_mb=round(memory[side] / 2**20, 1),
                    difference=f'{worst:.1e}',
                    threads=torch.get_num_threads(),
                )
                write_row('dual', row, args.record)


if __name__ == '__main__':
    main()
