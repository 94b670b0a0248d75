"""What of ELPV's test cells is known from the training cells beside them, without learning anything.

    python benchmarks/neighbours.py [--source FOLDER] [--record]

Its cells were cut from photographs of whole modules, and no file says which cells were of one. Numbers of files seem to
run through the modules: cells of near numbers are alike, and are defective together. So a split by cells (that of
image_sets.py, and those that others publish) has neighbours of the test cells among the training cells. Four guesses,
each the class of one training cell: the one of the nearest number; the one whose 32 x 32 pixels are nearest; the same
among cells that are more than 10, and more than 40 numbers away. --record appends a row for each to
benchmarks/results/neighbours.csv.
"""

import argparse
from pathlib import Path
from typing import Optional, Tuple

import numpy as np
from common import write_row
from image_sets import CLASSES_OF_ELPV, elpv
from PIL import Image

SIDE = 32
APART = 10, 40


def cells(source: Optional[Path]) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return of every cell its number, its pixels (N, 1024), its class and whether it is a test cell."""
    entries = list(elpv(source))
    pixels = [Image.open(entry.image).convert('L').resize((SIDE, SIDE), Image.Resampling.BOX) for entry in entries]
    numbers = np.array([int(''.join(filter(str.isdigit, entry.name))) for entry in entries])
    labels = np.array([CLASSES_OF_ELPV.index(entry.label) for entry in entries])
    is_test = np.array([entry.part == 'test' for entry in entries])
    return numbers, np.stack(pixels).reshape(len(entries), -1).astype(np.float32) / 255, labels, is_test


def score(distances: np.ndarray, train: np.ndarray, test: np.ndarray) -> Tuple[float, float]:
    """Return accuracy and balanced accuracy, in percent, of taking the class of the nearest training cell.

    Args:
        distances: Of every test cell to every training cell, (T, N); infinite to those that do not count.
        train: Classes of the training cells, (N,).
        test: Those of the test cells, (T,).
    """
    right = train[distances.argmin(1)] == test
    return 100 * right.mean(), 100 * float(np.mean([right[test == label].mean() for label in np.unique(test)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--source', type=Path, help="folder of the data; by default the package elpv-dataset's")
    parser.add_argument('--record', action='store_true', help='append rows to benchmarks/results/neighbours.csv')
    args = parser.parse_args()
    numbers, pixels, labels, is_test = cells(args.source)
    apart = abs(numbers[is_test][:, None] - numbers[~is_test])
    squares = (pixels**2).sum(1)
    unlike = squares[is_test][:, None] + squares[~is_test] - 2 * pixels[is_test] @ pixels[~is_test].T
    guesses = {'nearest number': apart, 'nearest pixels': unlike}
    guesses |= {
        f'nearest pixels, over {least} numbers away': np.where(apart > least, unlike, np.inf) for least in APART
    }
    for guess, distances in guesses.items():
        top1, balanced = score(distances, labels[~is_test], labels[is_test])
        row = dict(set='elpv', guess=guess, top1=f'{top1:.2f}', balanced=f'{balanced:.2f}', images=int(is_test.sum()))
        write_row('neighbours', row, args.record)


if __name__ == '__main__':
    main()
