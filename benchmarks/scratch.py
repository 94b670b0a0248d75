"""Our small models on the folders of `image_sets.py`: what is shipped, and what few images give.

    python benchmarks/scratch.py openclipart [--seeds 0 1 2] [--record] [--set epochs=40]

One recipe for a set (`SETTINGS`); any setting of it may be given anew, as --set name=value, and the row has it. Another
model begins with random weights, unless it is given some. A part of the training images chooses the epoch; the test
images are looked at once, when a run is over, by a model that was loaded from its folder: as it is, and mirrored, too
(`--tta flip`). A run that was killed goes on, one that has its row is not made again. --record appends a row per run to
benchmarks/results/scratch.csv.
"""

import argparse
from pathlib import Path
from typing import Any, Callable, Dict

import timm
import torch
from common import is_recorded, parse_changes, run_name, tested, told, train, write_row
from image_sets import class_of_grade, write

from timm_vitres.training.report import best_epoch, read_summary
from timm_vitres.training.settings import FinetuneCfg

SHARED: Dict[str, Any] = dict(crop_pct=1.0, lr=2e-3, weight_decay=0.05, warmup_epochs=2.0, smoothing=0.1, val_frac=0.15)
SHARED.update(model_ema=True, model_ema_decay=0.99, model_ema_warmup=True, channels_last=True, no_check=True)
SETTINGS: Dict[str, Dict[str, Any]] = {
    'openclipart': dict(
        model='vitresnet_nano', img_size=64, epochs=40, batch_size=64, scale=(0.5, 1.0), reprob=0.25,
        balance_classes=True, eval_metric='balanced',
    ),
    # from clothes to solar cells; the classes are not weighted, for it is plain accuracy that others report
    'elpv_grades': dict(
        model='vitresnet_mix_nano.fmnist', pretrained=True, model_kwargs=dict(stem_stride=4, stem_pool='max'),
        in_chans=1, img_size=160, epochs=50, batch_size=32, drop_path=0.1, scale=(0.8, 1.0), ratio=(0.9, 1.1),
        vflip=0.5, color_jitter=0.0, eval_metric='loss', workers=0,
    ),
}  # fmt: skip
MERGE: Dict[str, Callable[[str], str]] = {'elpv_grades': class_of_grade}  # what a set's test images are asked for


def run(data: Path, folder: Path, settings: Dict[str, Any]) -> Dict[str, Any]:
    """Train on a set, or go on, and return what the row has beside what it is of."""
    images = data if (data / 'val').is_dir() else data / 'train'
    train(FinetuneCfg(**settings, data_dir=str(images), output=str(folder)))
    rows, measured = read_summary(folder), settings['eval_metric']
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    merge = MERGE.get(data.name, str)
    found, flipped = (tested(model, data / 'test', tta, merge) for tta in ('', 'flip'))
    return dict(
        chosen_by=measured,
        val=round(best_epoch(rows, measured).metric(measured), 4),
        test_top1=round(found.top1, 2),
        test_balanced=round(found.balanced, 2),
        test_top1_tta=round(flipped.top1, 2),
        test_balanced_tta=round(flipped.balanced, 2),
        test_images=len(found.paths),
        params=sum(parameter.numel() for parameter in model.parameters()),
        train_seconds=round(sum(row['seconds'] for row in rows)),
        threads=torch.get_num_threads(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=SETTINGS)
    parser.add_argument('--output', type=Path, default=Path('scratch'), help='folder for runs')
    parser.add_argument('--root', type=Path, default=Path('sets'), help='folder that the sets are written into')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help="settings in place of the recipe's")
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--record', action='store_true', help='append a row per run to benchmarks/results/scratch.csv')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    changes = parse_changes(args.set)
    data = write(args.name, args.root)
    for seed in args.seeds:
        settings = {**SHARED, **SETTINGS[args.name], **changes, 'seed': seed}
        if 'model' in changes:  # which takes no arguments of the recipe's
            settings.update(dict(model_kwargs=None, pretrained=False), **changes)
        row = dict(set=args.name, seed=seed, changes=told(changes), model=settings['model'], epochs=settings['epochs'])
        if args.record and is_recorded('scratch', row):
            print(f'scratch.csv has its row; without --record it is trained again: {told(row)}')
            continue
        folder = args.output / run_name(args.name, changes=changes, seed=seed)
        write_row('scratch', {**row, **run(data, folder, settings)}, args.record)


if __name__ == '__main__':
    main()
