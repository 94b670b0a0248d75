"""One epoch of a parallel hybrid on ELPV with its losses: on the sum of both heads, on both, on one head.

    python benchmarks/dual_elpv.py --output dual_elpv --record

Data, split and classes are those of elpv.py; the held-out cells are looked at once a run, after its only epoch. The
model starts from random weights (the published ones can't be downloaded where this was run), so the figures compare
the losses; they are no measure of what fine-tuning reaches. --record appends a row per run to
benchmarks/results/dual_elpv.csv.
"""

import argparse
from pathlib import Path

from common import train, write_row
from elpv import RECIPE, evaluate
from image_sets import write

from timm_vitres.training.report import read_summary
from timm_vitres.training.settings import FinetuneCfg

LOSSES = ('sum', 'both', 'resnet', 'vit')
OWN = dict(model='vitresnet_dual_tiny', epochs=1, warmup_epochs=0.5, lr=5e-4, drop_path=0.1)


def main() -> None:
    """Train, evaluate, and record with --record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('dual_elpv'), help='folder for data and models')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--losses', nargs='+', default=list(LOSSES), choices=LOSSES)
    parser.add_argument('--record', action='store_true')
    args = parser.parse_args()
    root = write('elpv', args.output)
    settings = {**RECIPE, **OWN}
    for seed in args.seeds:
        for loss in args.losses:
            output = args.output / f'{loss}-seed{seed}'
            cfg = FinetuneCfg(data_dir=str(root / 'train'), output=str(output), seed=seed, head_loss=loss, **settings)
            train(cfg)
            (epoch,) = read_summary(output)
            figures = evaluate(output, root / 'test', output / 'predictions.png')
            row = dict(model=cfg.model, head_loss=loss, seed=seed, train_loss=round(epoch['train_loss'], 4))
            row.update(figures, train_seconds=round(epoch['seconds']))
            row['recipe'] = ' '.join(f'{key}={value}' for key, value in settings.items() if key != 'model')
            write_row('dual_elpv', row, args.record)


if __name__ == '__main__':
    main()
