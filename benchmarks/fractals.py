"""Pretraining without photographs: a model learns to tell fractals apart, and is then fine-tuned on real images.

    python benchmarks/fractals.py images --output fractals [--classes 1000] [--images 100]
    python benchmarks/fractals.py pretrain --output fractals --model vitresnet_nano
    python benchmarks/fractals.py transfer --output fractals [--arms fractal random shipped] --seeds 0 1 2 --record
    python benchmarks/fractals.py judge --output fractals [--arms fractal random shipped] --seeds 0 1 2 --record

`images` writes labelled fractals (formulas.py) as an image folder, output/images/{train,val}/<class>/*.png. `pretrain`
writes them if they are not there, and trains a model of three channels on them, in output/<model>; it goes on where it
was interrupted. `transfer` fine-tunes from those weights, from random ones, and from the model's weights in the package
(the arm `shipped`), by the same recipe, on sets of image_sets.py; 15% of the training images choose the epoch, and the
test images are looked at once. Runs that are in benchmarks/results/fractals.csv are not made again, interrupted ones go
on; --record appends a row for each, which names the weights that it began with. `judge` compares the models of the
first of --arms with those of each other, seed by seed, on the test images, as `timm-vitres compare` does its arms; its
rows are in fractals_verdict.csv. Any setting of the recipe may be given anew, as --set name=value; the rows of
`transfer` and `judge` have it.
"""

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

import numpy as np
import timm
import torch
from common import is_recorded, parse_changes, run_name, tested, told, train, write_row
from formulas import images_of
from image_sets import write
from PIL import Image
from tqdm import tqdm

from timm_vitres.training.report import best_epoch, read_summary
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.verdict import judge
from timm_vitres.weights import shipped
from timm_vitres.weights.checksums import sha256

ARMS = ('fractal', 'random', 'shipped')
SHARED: Dict[str, Any] = dict(in_chans=3, lr=1e-3, warmup_epochs=1.0, weight_decay=0.05, workers=1, no_check=True)
SHARED.update(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)
# A fractal has no up and no left; colours say nothing of its class
PRETRAIN = dict(SHARED, img_size=64, epochs=20, batch_size=128, lr=2e-3, scale=(0.5, 1.0), vflip=0.5, smoothing=0.1)
TRANSFER = dict(SHARED, batch_size=32, val_frac=0.15, scale=(0.8, 1.0), ratio=(0.9, 1.1), eval_metric='balanced')
TRANSFER.update(model_ema=True, model_ema_decay=0.99, model_ema_warmup=True)
# What a set needs beside that
SETS: Dict[str, Dict[str, Any]] = {
    'elpv': dict(img_size=112, epochs=16, vflip=0.5, balance_classes=True),
    'openclipart': dict(img_size=64, epochs=30, balance_classes=True, scale=(0.5, 1.0)),
    'fmnist10': dict(img_size=64, epochs=15),
}
WHOLE = {'fmnist10': 'fmnist'}  # the set that another one is a part of
Start = Tuple[Dict[str, Any], str]


def write_images(folder: Path, classes: int, images: int, val_images: int, seed: int = 0) -> Path:
    """Write folder/{train,val}/<class>/*.png, unless they are there, and return the folder.

    Raises:
        SystemExit: if there are others in the folder than those that are asked for.
    """
    wanted = f'{classes} classes, {images} + {val_images} images of each, seed {seed}\n'
    told = folder / 'README.txt'
    if folder.is_dir():
        if not told.is_file() or told.read_text() != wanted:
            found = told.read_text().strip() if told.is_file() else 'something else'
            raise SystemExit(f'{folder} holds {found}, not {wanted.strip()}; give another --output.')
        return folder
    beside = folder.with_name(folder.name + '.tmp')
    shutil.rmtree(beside, ignore_errors=True)
    for number in tqdm(range(classes), desc='classes of fractals', disable=None):
        for index, image in enumerate(images_of(number, images + val_images, seed)):
            path = beside / ('train' if index < images else 'val') / f'{number:05d}' / f'{index:05d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    (beside / told.name).write_text(wanted)
    beside.rename(folder)
    return folder


def figures(folder: Path, test: Path) -> Dict[str, Any]:
    """Return what a finished run's model gets right of a folder of test images: of all, and the mean of the classes."""
    found = tested(timm.create_model(f'local-dir:{folder}', pretrained=True).eval(), test)
    return dict(test_images=len(found.paths), test_top1=round(found.top1, 2), test_balanced=round(found.balanced, 2))


def pretrain(args: argparse.Namespace, changes: Dict[str, Any]) -> None:
    """Train a model on fractals, and print what it has learnt."""
    images = write_images(args.output / 'images', args.classes, args.images, args.val_images)
    folder = args.output / args.model
    train(FinetuneCfg(**{**PRETRAIN, **changes}, model=args.model, data_dir=str(images), output=str(folder)))
    rows = read_summary(folder)
    best = best_epoch(rows, 'top1').metric('top1')
    hours = sum(row['seconds'] for row in rows) / 3600
    print(f'{folder}: {best:.2f}% of the validation fractals after {len(rows)} epochs, {hours:.2f} h.')


def started_with(args: argparse.Namespace) -> Tuple[Path, str]:
    """Return the weights that learnt fractals, and what they are; SystemExit where they are not there, or not done."""
    weights = args.output / args.model / 'model.safetensors'
    if not weights.is_file():
        raise SystemExit(f'{weights} is missing: run `pretrain` with this --output and --model first.')
    done = len(read_summary(weights.parent))
    asked = json.loads((weights.parent / 'run.json').read_text(encoding='utf-8'))['settings']['epochs']
    if done < asked:
        raise SystemExit(f'{weights.parent}: is not over, after {done} of {asked} epochs; run `pretrain` to its end.')
    images = (args.output / 'images' / 'README.txt').read_text().strip()
    return weights, f'{images}, {done} epochs, weights {sha256(weights)[:8]}'


def shipped_start(name: str, sets: Sequence[str]) -> Start:
    """Return the settings that begin with a model's weights in the package, and what these are.

    Raises:
        SystemExit: where it has none, or they learnt one of the sets.
    """
    cfg = timm.get_pretrained_cfg(name)
    path = Path(cfg.file) if cfg is not None and cfg.file else None
    if path is None or not shipped.is_shipped(path):
        raise SystemExit(f'model: {name} has no weights in the package; leave the arm `shipped` out.')
    for one in sets:
        if cfg.tag == WHOLE.get(one, one):
            raise SystemExit(f'sets: the weights of the arm shipped learnt {one}, and may know its test images.')
    return dict(pretrained=True), f'{path.stem}, weights {sha256(path)[:8]}'


def starts(args: argparse.Namespace) -> Dict[str, Start]:
    """Return the settings that each arm begins with, and what its weights are."""
    found: Dict[str, Start] = {}
    for arm in args.arms:
        if arm == 'fractal':
            weights, learnt = started_with(args)
            found[arm] = dict(pretrained_path=str(weights)), learnt
        else:
            found[arm] = shipped_start(args.model, args.sets) if arm == 'shipped' else ({}, '')
    return found


def folder_of(args: argparse.Namespace, name: str, arm: str, pretraining: str, changes: Dict[str, Any], seed: int):
    """Return a run's folder; runs that began with other weights are others."""
    start = f'{arm}-{pretraining.rpartition(" ")[2]}' if pretraining else arm
    return args.output / 'transfer' / run_name(args.model, name, start, changes=changes, seed=seed)


def transfer(args: argparse.Namespace, changes: Dict[str, Any]) -> None:
    """Fine-tune from each start, and write a row for each run."""
    begun = starts(args)
    for seed, name, arm in itertools.product(args.seeds, args.sets, args.arms):
        start, learnt = begun[arm]
        row = dict(set=name, arm=arm, seed=seed, model=args.model, changes=told(changes), pretraining=learnt)
        if args.record and is_recorded('fractals', row):
            print(f'fractals.csv has its row; without --record it is trained again: {told(row)}')
            continue
        data = write(name, args.output / 'data', args.source)
        folder = folder_of(args, name, arm, learnt, changes, seed)
        settings = {**TRANSFER, **SETS[name], **start, **changes, 'model': args.model, 'seed': seed}
        train(FinetuneCfg(**settings, data_dir=str(data / 'train'), output=str(folder)))
        rows = read_summary(folder)
        row.update(figures(folder, data / 'test'), epochs=len(rows), threads=torch.get_num_threads())
        row['train_seconds'] = round(sum(one['seconds'] for one in rows))
        write_row('fractals', row, args.record)


def compare(args: argparse.Namespace, changes: Dict[str, Any]) -> None:
    """Compare the first start with each other on the test images of each set, and write a row for each."""
    begun = starts(args)
    for name in args.sets:
        test = write(name, args.output / 'data', args.source) / 'test'
        answers: Dict[str, list] = {}
        for arm, seed in itertools.product(begun, args.seeds):
            folder = folder_of(args, name, arm, begun[arm][1], changes, seed)
            if not (folder / 'model.safetensors').is_file():
                raise SystemExit(f'{folder} is missing: run `transfer` with these arguments first.')
            found = tested(timm.create_model(f'local-dir:{folder}', pretrained=True).eval(), test)
            guessed = [prediction.labels[0] for prediction in found.predictions]
            answers.setdefault(arm, []).append([one == true for one, true in zip(guessed, found.truth)])
        first, *others = begun
        for other in others:
            pair = {arm: np.array(answers[arm]) for arm in (first, other)}
            verdict = judge(pair, np.array(found.truth), 'balanced accuracy')
            [(worse, gain)] = verdict.behind.items()
            if worse == first:
                gain = gain._replace(points=-gain.points, low=-gain.high, high=-gain.low)
            row = dict(set=name, model=args.model, changes=told(changes), arm=first, pretraining=begun[first][1])
            row.update(against=other, against_pretraining=begun[other][1], seeds=' '.join(map(str, args.seeds)))
            row.update(gain=f'{gain.points:.2f}', low=f'{gain.low:.2f}', high=f'{gain.high:.2f}', is_told=gain.is_told)
            write_row('fractals_verdict', row, args.record)
            print(verdict.sentence)


def main() -> None:
    """Write images, pretrain, fine-tune, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('images', 'pretrain', 'transfer', 'judge'))
    parser.add_argument('--output', type=Path, default=Path('fractals'), help='folder for images, data and runs')
    parser.add_argument('--model', default='vitresnet_nano')
    parser.add_argument('--classes', type=int, default=1000, help='classes of fractals')
    parser.add_argument('--images', type=int, default=100, help='training images of each class of fractals')
    parser.add_argument('--val-images', type=int, default=5, help='validation images of each class of fractals')
    parser.add_argument('--sets', nargs='+', choices=SETS, default=list(SETS))
    parser.add_argument('--arms', nargs='+', choices=ARMS, default=['fractal', 'random'])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='of the transfer')
    parser.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help="settings in place of the recipe's")
    parser.add_argument(
        '--source', type=Path, help='where the data that the sets are made of lies, by default as installed'
    )
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--record', action='store_true', help='append a row per run to benchmarks/results/fractals.csv')
    args = parser.parse_args()
    if args.what == 'judge' and len(set(args.arms)) < 2:
        parser.error(f'arms: got {" ".join(args.arms)}, expected two or more to compare.')
    torch.set_num_threads(args.threads)
    changes = parse_changes(args.set)
    if args.what == 'images':
        print(write_images(args.output / 'images', args.classes, args.images, args.val_images))
    elif args.what == 'pretrain':
        pretrain(args, changes)
    elif args.what == 'transfer':
        transfer(args, changes)
    else:
        compare(args, changes)


if __name__ == '__main__':
    main()
