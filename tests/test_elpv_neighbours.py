"""benchmarks/neighbours.py: a test cell has the class of the training cell beside it."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image


def test_cells_are_told_by_their_neighbours(script, tmp_path, monkeypatch):
    """Modules of 24 cells are defective, or not, as a whole, and each is of a grey of its own."""
    neighbours, common = script('neighbours'), script('common')
    monkeypatch.setattr(common, 'RESULTS', tmp_path / 'results')
    (tmp_path / 'images').mkdir()
    lines, generator = [], np.random.default_rng(0)
    for number in range(1, 241):
        module = number // 24
        Image.fromarray(generator.integers(20 * module, 20 * module + 9, (40, 40)).astype(np.uint8)).save(
            tmp_path / f'images/cell{number:04d}.png'
        )
        lines.append(f'images/cell{number:04d}.png {module % 2}.0 mono')
    (tmp_path / 'labels.csv').write_text('\n'.join(lines) + '\n')
    monkeypatch.setattr(sys, 'argv', ['neighbours.py', '--source', str(tmp_path), '--record'])
    neighbours.main()
    with (tmp_path / 'results/neighbours.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    number, pixels, ten, forty = (float(row['top1']) for row in rows)
    assert number > 80 and pixels == ten == 100 and forty < 50  # what is more than 40 cells away is of other modules
    assert [row['images'] for row in rows] == ['60'] * 4


def test_classes_count_the_same_in_balanced_accuracy(script):
    distances = np.array([[0, 1], [0, 1], [0, 1], [1, 0]], np.float32)
    top1, balanced = script('neighbours').score(distances, np.array([0, 1]), np.array([0, 0, 1, 1]))
    assert (top1, balanced) == (75, 75)
    top1, balanced = script('neighbours').score(distances, np.array([0, 1]), np.array([0, 0, 0, 1]))
    assert top1 == 100 and balanced == pytest.approx(100)
    top1, balanced = script('neighbours').score(distances, np.array([0, 1]), np.array([0, 0, 1, 0]))
    assert top1 == 50 and balanced == pytest.approx(100 / 3)
