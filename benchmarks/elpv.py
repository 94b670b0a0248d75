"""The demo: a hybrid that knows clothes learns to tell functional from defective solar cells, from 2,624 photographs.

    python benchmarks/elpv.py --output demo [--seeds 0 1 2] [--record]

Data: ELPV (Deitsch et al. 2019, Solar Energy 185; Buerhop-Lutz et al. 2018), electroluminescence images of 300 x 300
pixels, from the package elpv-dataset (images CC-BY-NC-SA-4.0). The model begins with the weights that the package ships
for Fashion-MNIST, and learns the eight grades of elpv_grades (image_sets.py): how likely a defect is, in which kind of
cell. A cell is defective where its probability of a defect is above 0.5, and is called so where the grades above that
are likelier, together, than the others. Split: a quarter of the cells, drawn evenly from every probability and type of
cell with seed 0, is held out and looked at once, at the end; a tenth of the others chooses the epoch. --record appends
a row per seed to benchmarks/results/elpv.csv.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import timm
from common import append_row, tested, train
from image_sets import class_of_grade, write
from scratch import SETTINGS, SHARED

import timm_vitres
from timm_vitres.pictures import plot_predictions
from timm_vitres.training.datasets import ImageFolder
from timm_vitres.training.report import read_summary
from timm_vitres.training.settings import FinetuneCfg

# What `scratch.py elpv_grades` trains with, for fewer epochs
RECIPE = {**SHARED, **SETTINGS['elpv_grades'], 'epochs': 12, 'tta': 'flip'}


def evaluate(model_folder: Path, test: Path, picture: Path) -> dict:
    """Load a model with timm, predict on the held-out cells, draw a few of them, and return the figures."""
    model = timm.create_model(f'local-dir:{model_folder}', pretrained=True).eval()
    found = tested(model, test, RECIPE['tta'], class_of_grade)
    shown = np.random.default_rng(0).permutation(len(found.paths))[:8]
    titles = [f'in truth {found.truth[i]}' for i in shown]
    plot_predictions([found.predictions[i] for i in shown], picture, titles=titles)
    return found.figures


def evaluate_in_new_process(*arguments: Path) -> dict:
    """Run `evaluate` in a fresh interpreter."""
    command = [sys.executable, __file__, '--evaluate', *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('demo'), help='folder for data, models and pictures')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--record', action='store_true', help='append the figures to benchmarks/results/elpv.csv')
    parser.add_argument('--evaluate', type=Path, nargs=3, metavar='PATH', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.evaluate:
        print(json.dumps(evaluate(*args.evaluate)))
        return
    start = time.perf_counter()
    root = write('elpv_grades', args.output)
    test = root / 'test'
    print(f'{len(ImageFolder(test))} cells are held out in {test}.')
    for seed in args.seeds:
        output = args.output / f'model-seed{seed}'
        train(FinetuneCfg(data_dir=str(root), output=str(output), seed=seed, **RECIPE))
        seconds = sum(row['seconds'] for row in read_summary(output))
        picture = args.output / f'predictions-seed{seed}.png'
        figures = evaluate_in_new_process(output, test, picture)
        again = evaluate(output, test, picture)
        if again != figures:
            raise SystemExit(f'The model changed by loading: {figures} in a new process, {again} in this one.')
        print(
            f'seed {seed}: accuracy {figures["top1"]}% on {figures["images"]} held-out cells, in a new process and in '
            f'this one (always functional: 68.8%); balanced accuracy {figures["balanced"]}% (chance: 50%).'
        )
        print(f'The model is in {output}, its curves in {output / "curves.png"}, its predictions in {picture}.')
        if args.record:
            row = dict(model=RECIPE['model'], seed=seed, **figures, train_seconds=round(seconds))
            settings = ' '.join(f'{key}={value}' for key, value in RECIPE.items() if key != 'model')
            append_row(Path(__file__).parent / 'results' / 'elpv.csv', dict(row, recipe=settings))
    print(f'Done in {time.perf_counter() - start:.0f} s (timm-vitres {timm_vitres.__version__}).')


if __name__ == '__main__':
    main()
