"""Hybrids against their parents, at equal parameters and equal measured training time, on the sets of `image_sets.py`.

    python benchmarks/ablation.py elpv --minutes 10 [--seeds 0 1 2] [--models resnet interleaved] [--record]

This is `timm-vitres compare` on one set, by the recipe `compare` with what a set needs beside it (`SETTINGS`). A
comparison that was killed goes on when it is started again, and seeds can be added. --peers adds timm's models of the
nearest size (`peers`). --record appends a row per run to benchmarks/results/ablation.csv, and one per arm that is
behind the best, with the interval of the difference, to ablation_verdict.csv; what is there is not written again.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Tuple

import torch
from common import show_logs, write_row
from image_sets import write

from timm_vitres import FinetuneCfg, compare, recipe
from timm_vitres.models.arms import ARMS, MANY_PIXELS
from timm_vitres.training.plans import PLAN_NAME

GREY = dict(in_chans=1, color_jitter=0.0)
SETTINGS = {
    'fmnist': dict(**GREY, img_size=28, crop_padding=2, reprob=0.5, batch_size=128, val_frac=0.05),
    'fmnist10': dict(**GREY, img_size=28, crop_padding=2, reprob=0.5, batch_size=64, val_frac=0.1),
    # a cell fills its image, and has no up; two thirds of the cells are of one class
    'elpv': dict(
        **GREY, img_size=64, scale=(0.8, 1.0), ratio=(0.9, 1.1), vflip=0.5, batch_size=32, val_frac=0.15,
        balance_classes=True, eval_metric='balanced',
    ),
    'openclipart': dict(img_size=64, batch_size=64, val_frac=0.15, balance_classes=True, eval_metric='balanced'),
    # what a crop cuts off may be what tells the classes apart; an epoch is long
    'pairs': dict(**GREY, img_size=64, crop_padding=4, batch_size=64, val_frac=0.1, warmup_epochs=0.25),
}  # fmt: skip

COLUMNS = ('arm', 'seed', 'lr', 'epochs', 'state', 'best_epoch', 'val_top1', 'val_balanced', 'accuracy', 'balanced')
COLUMNS += ('parameters', 'step_ms', 'latency_ms', 'seconds')


def peers(img_size: int) -> Tuple[str, ...]:
    """Return models of timm's, of about as many parameters as the arms, for images of so many pixels a side."""
    side = 8 if img_size >= MANY_PIXELS else 4
    any_size = ('resnet18:channels=(32,64,96,152)', f'vit_tiny_patch16_224:patch_size={side},embed_dim=132,depth=6')
    any_size += ('mobilevitv2_050',)
    if img_size % 32:  # the others take no such size
        return any_size
    return (
        *any_size,
        'levit_128s:embed_dim=(80,112,144),num_heads=(2,3,4),depth=(2,3,4)',
        'coatnet_nano_rw_224:embed_dim=(32,64,128,160),depths=(1,2,4,1)',
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('set', choices=list(SETTINGS))
    parser.add_argument('--root', type=Path, default=Path('sets'), help='folder that the sets are written into')
    parser.add_argument('--source', type=Path, help="the original data, where they are not in their package's place")
    parser.add_argument('--output', type=Path, help='folder of the comparison; else ablation/SET')
    parser.add_argument('--models', nargs='+', default=list(ARMS))
    parser.add_argument('--peers', action='store_true', help="compare timm's models of the nearest size, too")
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--lrs', type=float, nargs='+', default=[3e-4, 1e-3, 3e-3])
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument('--minutes', type=float, help='of training steps, for each run')
    budget.add_argument('--epochs', type=int)
    parser.add_argument('-j', '--workers', type=int, default=0)
    parser.add_argument('--device', default='')
    parser.add_argument('--record', action='store_true', help='append rows to benchmarks/results')
    args = parser.parse_args()
    show_logs()
    settings = {**recipe('compare'), **SETTINGS[args.set], 'workers': args.workers, 'device': args.device}
    settings.update(dict(epochs=args.epochs) if args.epochs else {})
    output = args.output or Path('ablation') / args.set
    cfg = FinetuneCfg(**settings, data_dir=str(write(args.set, args.root, args.source)), output=str(output))
    models = [*args.models, *(peers(settings['img_size']) if args.peers else ())]
    told = compare(cfg, models, args.seeds, args.lrs, args.minutes)
    cost = f'{args.minutes:g} min' if args.minutes else f'{args.epochs} epochs'
    asked = dict(set=args.set, models=' '.join(models), cost=cost, device=args.device or 'default')
    # of the comparison, whatever this process, which may only record it, computes with
    machine = json.loads((told.folder / PLAN_NAME).read_text(encoding='utf-8'))['machine']
    threads = re.match(r'(\d+) threads? of the CPU', machine)
    asked['threads'] = int(threads.group(1)) if threads else torch.get_num_threads()
    for row in told.rows:
        if row['part'] == 'run':
            write_row('ablation', {**asked, **{name: row[name] for name in COLUMNS}}, args.record)
    if told.verdict is not None:
        shared = dict(**asked, seeds=' '.join(map(str, args.seeds)), measured=cfg.eval_metric, best=told.verdict.best)
        for name, found in told.verdict.behind.items():
            figures = {key: f'{value:.2f}' for key, value in found._asdict().items()}
            write_row('ablation_verdict', {**shared, 'arm': name, **figures, 'is_told': found.is_told}, args.record)
    print(told.sentence)


if __name__ == '__main__':
    main()
