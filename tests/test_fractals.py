"""Pretraining without photographs, benchmarks/fractals.py and formulas.py: what a fractal is, and how runs go on."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_noise
from PIL import Image
from safetensors.torch import load_file

from timm_vitres.weights.checksums import sha256

WEIGHTS = 'test_vitresnet/model.safetensors'
BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'
SHIPPED = BENCHMARKS.parent / 'timm_vitres/shipped/vitresnet_nano.openclipart.safetensors'


@pytest.fixture
def fractals(script):
    return script('fractals')


@pytest.fixture
def formulas(script):
    return script('formulas')


def system(formulas, *maps):
    """Return a system of maps without rotation: (scale, shift) of each; others are not there."""
    scales = np.zeros((1, formulas.MAPS[1], 2))
    shifts = np.zeros((1, formulas.MAPS[1], 2))
    for index, (scale, shift) in enumerate(maps):
        scales[0, index], shifts[0, index] = scale, shift
    return formulas.System(np.zeros_like(scales), scales, shifts)


def test_attractor_of_known_maps(formulas):
    """Three maps to half the size make Sierpinski's triangle, where no binary place is 1 in both coordinates."""
    triangle = system(formulas, (0.5, (0, 0)), (0.5, (0.5, 0)), (0.5, (0, 0.5)))
    points = formulas.attractors(triangle, np.random.default_rng(0))[0]
    assert points.shape == (formulas.WALKERS * (formulas.STEPS - formulas.SKIP), 2)
    bits = (points * 64).astype(int)
    assert points.min() >= 0 and points.max() <= 1 and not (bits[:, 0] & bits[:, 1]).any()
    assert len({tuple(pair) for pair in (points * 8).astype(int)}) == 27


def test_maps_are_applied_in_order(formulas):
    """A point stays where its only map leaves it: x = A x + b."""
    angles, scales = np.array([0.7, -1.9]), np.array([0.8, -0.3])
    matrix = formulas.rotations(angles[0]) @ np.diag(scales) @ formulas.rotations(angles[1])
    one = system(formulas, (scales, (0.3, -0.6)))
    one.angles[0, 0] = angles
    points = formulas.attractors(one, np.random.default_rng(0), steps=120)[0]
    np.testing.assert_allclose(
        points, np.broadcast_to(np.linalg.solve(np.eye(2) - matrix, [0.3, -0.6]), points.shape), atol=1e-4
    )


def test_maps_are_chosen_as_their_pictures_are_large(formulas):
    halves = system(formulas, ((0.5, 0.9), (0, 0)), ((0.5, 0.3), (0.5, 0)))
    points = formulas.attractors(halves, np.random.default_rng(0))[0]
    assert abs((points[:, 0] < 0.5).mean() - 0.75) < 0.02


def test_jitter_changes_one_part_of_one_map(formulas):
    base = formulas.fractal(0)
    variants = formulas.jitter(base, 200, np.random.default_rng(0))
    maps = int((base.scales[0, :, 0] > 0).sum())
    changed = np.stack([part != whole for part, whole in zip(variants, base)], 1)  # (200, 3, N, 2)
    assert (changed.sum((1, 2, 3)) <= 1).all() and changed.sum() > 190
    assert changed[:, :, :maps].sum() == changed.sum() and changed.any(0)[:, :maps].all()
    for part, whole in zip(variants, base):
        ratio = part[:, :maps] / whole[:, :maps]
        assert (ratio > 0.8 - 1e-9).all() and (ratio < 1.2 + 1e-9).all()
    assert abs(variants.scales).max() <= 0.95


def test_classes_fill_their_pictures(formulas):
    generator = np.random.default_rng(1)
    for number in range(8):
        filled = (formulas.counts(formulas.attractors(formulas.fractal(number), generator)) > 0).mean()
        assert formulas.FILLED[0] * 0.9 < filled < formulas.FILLED[1] * 1.1


def test_images_are_of_their_class_and_seed(formulas):
    first = formulas.images_of(3, 4)
    assert first.shape == (4, 64, 64, 3) and first.dtype == np.uint8
    assert (first == formulas.images_of(3, 4)).all()
    assert (first != formulas.images_of(3, 4, seed=1)).any() and (first != formulas.images_of(4, 4)).any()
    assert len({image.tobytes() for image in first}) == 4


def test_turning_keeps_shapes(formulas):
    points = np.random.default_rng(0).normal(size=(6, 50, 2)).astype(np.float32)
    turned = formulas.turn(points, np.random.default_rng(0))
    for before, after in zip(points, turned):
        np.testing.assert_allclose(np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1), rtol=1e-4)
        np.testing.assert_allclose(before @ before.T, after @ after.T, atol=1e-4)
    assert len(np.unique(np.round(turned[:, 0] - points[:, 0], 3))) > 10


def test_every_point_is_counted_inside(formulas):
    points = np.random.default_rng(0).normal(size=(5, 1000, 2)) * [[[30, 1]]] + 7
    drawn = formulas.counts(points, side=32, room=np.array([1, 1, 0.5, 0.5, 0.5]))
    assert drawn.shape == (5, 32, 32) and (drawn.sum((1, 2)) == 1000).all()
    columns = drawn.sum(1) > 0
    assert columns[0, 0] and columns[0, -1] and not columns[3, :7].any() and not columns[3, -7:].any()


def test_colours_differ_from_what_is_behind(formulas):
    drawn = np.zeros((50, 8, 8), int)
    drawn[:, 2:4] = 5
    drawn[:, 4] = 1
    images = formulas.colour(drawn, np.random.default_rng(0)).astype(float)
    behind = images[:, 0, 0].mean(-1)
    assert (abs(images[:, 2:5].mean(-1) - behind[:, None, None]) > 0).all()
    assert abs(images[:, 2:5].mean((1, 2, 3)) - behind).mean() > 80


def test_folder_is_written_once_and_whole(fractals, formulas, tmp_path):
    folder = fractals.write_images(tmp_path / 'images', classes=3, images=2, val_images=1)
    assert fractals.write_images(folder, classes=3, images=2, val_images=1) == folder
    for number in range(3):
        expected = formulas.images_of(number, 3)
        for index, part in enumerate(('train', 'train', 'val')):
            image = Image.open(folder / part / f'{number:05d}' / f'{index:05d}.png')
            assert (np.asarray(image) == expected[index]).all()
    assert len(list(folder.rglob('*.png'))) == 9
    with pytest.raises(SystemExit, match=r'holds 3 classes, 2 \+ 1 images of each, seed 0, not 4 classes'):
        fractals.write_images(folder, classes=4, images=2, val_images=1)


def test_transfer_needs_pretraining(fractals, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['fractals.py', 'transfer', '--output', str(tmp_path)])
    with pytest.raises(SystemExit, match=r'model\.safetensors is missing: run `pretrain` with this --output'):
        fractals.main()


def test_transfer_waits_for_the_end_of_pretraining(fractals, tmp_path, monkeypatch):
    """Else its runs would be taken for those of the finished one."""
    folder = tmp_path / 'vitresnet_nano'
    folder.mkdir()
    (folder / 'model.safetensors').write_bytes(b'')
    (folder / 'run.json').write_text(json.dumps({'settings': {'epochs': 20}}))
    (folder / 'summary.csv').write_text('epoch,eval_top1\n0,1.0\n')
    monkeypatch.setattr(sys, 'argv', ['fractals.py', 'transfer', '--output', str(tmp_path)])
    with pytest.raises(SystemExit, match='is not over, after 1 of 20 epochs'):
        fractals.main()


def test_pretraining_and_transfer(fractals, script, tmp_path, monkeypatch):
    """The fractal arm begins with the pretrained weights; rows say so, and runs that have one are not repeated."""
    write_noise(tmp_path / 'data/elpv', train=8, test=2)
    results = tmp_path / 'fractals.csv'
    monkeypatch.setattr(script('common'), 'RESULTS', tmp_path)
    rows, begun = [], []

    def keep(name, row, record):
        rows.append(row)
        new = not results.exists()
        with results.open('a', newline='') as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    whole = fractals.train
    monkeypatch.setattr(fractals, 'write_row', keep)
    monkeypatch.setattr(fractals, 'train', lambda cfg: (begun.append(cfg), whole(cfg))[1])
    options = ['--output', str(tmp_path), '--model', 'test_vitresnet']
    options += ['--threads', f'{torch.get_num_threads()}', '--record', '--classes', '2']
    options += ['--images', '4', '--val-images', '1', '--sets', 'elpv', '--seeds', '0']
    options += ['--set', 'epochs=1', 'img_size=32', 'batch_size=4', 'workers=0']
    options += ['model_ema=true', 'model_ema_decay=0.9']
    for what in ('pretrain', 'transfer', 'transfer'):
        monkeypatch.setattr(sys, 'argv', ['fractals.py', what, *options])
        fractals.main()
    assert [cfg.pretrained_path for cfg in begun] == [None, str(tmp_path / 'test_vitresnet/model.safetensors'), None]
    assert [(row['set'], row['arm'], row['seed'], row['epochs']) for row in rows] == [
        ('elpv', 'fractal', 0, 1), ('elpv', 'random', 0, 1),
    ]  # fmt: skip
    told = '2 classes, 4 + 1 images of each, seed 0, 1 epochs, weights ' + sha256(tmp_path / WEIGHTS)[:8]
    assert rows[0]['pretraining'] == told and not rows[1]['pretraining']
    assert all(row['test_images'] == 4 and 0 <= row['test_balanced'] <= 100 for row in rows)
    monkeypatch.setattr(sys, 'argv', ['fractals.py', 'judge', *options])
    fractals.main()
    gain = float(rows[0]['test_balanced']) - float(rows[1]['test_balanced'])
    assert [rows[2][key] for key in ('arm', 'against', 'against_pretraining')] == ['fractal', 'random', '']
    assert (rows[2]['pretraining'], rows[2]['seeds'], float(rows[2]['gain'])) == (told, '0', pytest.approx(gain))
    assert (rows[2]['low'], rows[2]['is_told']) == ('-inf', False)  # of one seed nothing is concluded
    shutil.rmtree(tmp_path / 'transfer')
    with pytest.raises(SystemExit, match='is missing: run `transfer` with these arguments first'):
        fractals.main()


def test_shipped_weights_are_a_start(fractals, script, tmp_path, monkeypatch):
    """They begin with what the package holds, and are refused for the images that they learnt."""
    write_noise(tmp_path / 'data/elpv', train=8, test=2)
    monkeypatch.setattr(script('common'), 'RESULTS', tmp_path)
    begun, whole = [], fractals.train
    monkeypatch.setattr(fractals, 'train', lambda cfg: (begun.append(cfg), whole(cfg))[1])
    options = ['--output', str(tmp_path), '--arms', 'shipped', 'random', '--sets', 'elpv', '--seeds', '0', '1']
    options += ['--threads', f'{torch.get_num_threads()}', '--record']
    options += ['--set', 'epochs=1', 'img_size=32', 'batch_size=4', 'workers=0', 'lr=1.0e-6']
    for what in ('transfer', 'judge'):
        monkeypatch.setattr(sys, 'argv', ['fractals.py', what, *options])
        fractals.main()
    assert [(cfg.pretrained, cfg.pretrained_path, cfg.seed) for cfg in begun] == [
        (True, None, 0), (False, None, 0), (True, None, 1), (False, None, 1),
    ]  # fmt: skip
    with open(tmp_path / 'fractals_verdict.csv', newline='') as file:
        [row] = csv.DictReader(file)
    learnt = f'vitresnet_nano.openclipart, weights {sha256(SHIPPED)[:8]}'
    assert [row[key] for key in ('arm', 'pretraining', 'against', 'seeds')] == ['shipped', learnt, 'random', '0 1']
    kernel = 'blocks.0.attn.proj.weight'
    trained = [load_file(path / 'model.safetensors') for path in sorted((tmp_path / 'transfer').glob('*-0'))]
    own = load_file(SHIPPED)
    assert [torch.allclose(each[kernel], own[kernel].float(), atol=1e-4) for each in trained] == [False, True]
    for model, name in (
        ('vitresnet_nano', 'openclipart'),
        ('vitresnet_nano.openclipart', 'openclipart'),
        ('vitresnet_mix_nano.fmnist', 'fmnist10'),  # a part of what was learnt
    ):
        options[options.index('--sets') + 1] = name
        monkeypatch.setattr(sys, 'argv', ['fractals.py', 'transfer', *options, '--model', model])
        with pytest.raises(SystemExit, match=f'sets: the weights of the arm shipped learnt {name}'):
            fractals.main()
    monkeypatch.setattr(sys, 'argv', ['fractals.py', 'transfer', *options, '--model', 'test_vitresnet'])
    with pytest.raises(SystemExit, match='model: test_vitresnet has no weights in the package'):
        fractals.main()


def test_figures_weigh_classes_alike(fractals, script, tmp_path, monkeypatch):
    for name, count in (('a', 3), ('b', 1)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name / f'{index}.png')
    always_a = script('common').Prediction('0.png', ['a', 'b'], [0.9, 0.1])
    monkeypatch.setattr(script('common'), 'predict', lambda model, paths, topk, tta: ([always_a] * len(paths), []))
    model = fractals.torch.nn.Identity()
    model.num_classes = 2
    monkeypatch.setattr(fractals.timm, 'create_model', lambda *args, **kwargs: model)
    assert fractals.figures(tmp_path, tmp_path) == dict(test_images=4, test_top1=75.0, test_balanced=50.0)
