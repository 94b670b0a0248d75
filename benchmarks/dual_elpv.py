"""One epoch of a parallel hybrid on ELPV with its losses: on the sum of both heads, on both, on one head.

    python benchmarks/dual_elpv.py --output dual_elpv --record

Data and split are those of image_sets.py's elpv, in its two classes; the held-out cells are looked at once a run, after
its only epoch. The model starts from random weights (the published ones can't be downloaded where this was run), so the
figures compare the losses; they are no measure of what fine-tuning reaches. --record appends a row per run to
benchmarks/results/dual_elpv.csv.
"""

import argparse
from pathlib import Path

import timm
from common import tested, train, write_row
from image_sets import write

from timm_vitres.training.report import read_summary
from timm_vitres.training.settings import FinetuneCfg

LOSSES = ('sum', 'both', 'resnet', 'vit')
RECIPE = dict(
    model='vitresnet_dual_tiny',
    in_chans=1,
    color_jitter=0.0,
    img_size=112,
    epochs=1,
    batch_size=32,
    lr=5e-4,
    warmup_epochs=0.5,
    weight_decay=0.05,
    balance_classes=True,
    eval_metric='balanced',
    val_frac=0.15,
    scale=(0.8, 1.0),
    ratio=(0.9, 1.1),
    vflip=0.5,
    mean=(0.5,),
    std=(0.25,),
    crop_pct=1.0,
    no_check=True,
    drop_path=0.1,
)


def main() -> None:
    """Train, evaluate, and record with --record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('dual_elpv'), help='folder for data and models')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--losses', nargs='+', default=list(LOSSES), choices=LOSSES)
    parser.add_argument('--record', action='store_true')
    args = parser.parse_args()
    root = write('elpv', args.output)
    for seed in args.seeds:
        for loss in args.losses:
            output = args.output / f'{loss}-seed{seed}'
            cfg = FinetuneCfg(data_dir=str(root / 'train'), output=str(output), seed=seed, head_loss=loss, **RECIPE)
            train(cfg)
            (epoch,) = read_summary(output)
            found = tested(timm.create_model(f'local-dir:{output}', pretrained=True).eval(), root / 'test')
            row = dict(model=cfg.model, head_loss=loss, seed=seed, train_loss=round(epoch['train_loss'], 4))
            row.update(found.figures, train_seconds=round(epoch['seconds']))
            row['recipe'] = ' '.join(f'{key}={value}' for key, value in RECIPE.items() if key != 'model')
            write_row('dual_elpv', row, args.record)


if __name__ == '__main__':
    main()
