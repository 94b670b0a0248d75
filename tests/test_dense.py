"""The demo of dense prediction, benchmarks/dense.py: images and masks, what is held out, figures, a tiny run."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'
pytestmark = pytest.mark.recent


@pytest.fixture
def dense(script):
    return script('dense')


def test_a_mask_fits_its_image(dense):
    """What differs from the photograph is the mask but for soft edges."""
    grey = np.full((200, 200, 3), 128, np.uint8)
    parts = dense.load_parts(held_out=False)._replace(photographs=[grey])
    for seed in range(10):
        image, mask = dense.compose(parts, (96, 160), np.random.default_rng(seed))
        assert image.shape == (96, 160, 3) and image.dtype == np.uint8 and mask.shape == (96, 160)
        changed = (image != 128).any(-1)
        assert changed[mask].all() and mask.sum() > 0.6 * changed.sum() > 0


def test_colours_are_visible(dense):
    generator = np.random.default_rng(0)
    for photograph in dense.load_parts(held_out=True).photographs:
        colours = [dense.contrasting(photograph, generator) for _ in range(20)]
        assert all(abs(colour.mean() - photograph.mean()) > 50 for colour in colours)
        assert len({tuple(colour) for colour in colours}) == 20


def test_ink_is_the_digit(dense):
    """Of one height with its scan, ink covers what is dark there and leaves out what is empty."""
    parts = dense.load_parts(held_out=False)
    for digit in parts.digits[:20]:
        alpha = dense.ink(digit, 80, 0.0)
        assert alpha.shape == (80, 68) and alpha.min() == 0 and alpha.max() == 1
        centres = alpha[5::10][:, [4, 13, 21, 30, 38, 47, 55, 64]]
        assert (centres[digit == 16] > 0.5).all() and (centres[digit == 0] < 0.5).all()


def test_nothing_of_training_is_held_out(dense):
    train, test = dense.load_parts(held_out=False), dense.load_parts(held_out=True)
    assert not set(dense.PHOTOGRAPHS) & set(dense.HELD_OUT)
    assert len(train.photographs) == len(dense.PHOTOGRAPHS) and len(test.photographs) == len(dense.HELD_OUT)
    assert len(train.digits) + len(test.digits) == 1797
    scans = [{digit.tobytes() for digit in parts.digits} for parts in (train, test)]
    assert not scans[0] & scans[1], 'a scan is in both parts'
    larger = max(dense.TEST_SIZES.values())
    assert all(np.greater_equal(p.shape[:2], larger).all() for p in train.photographs + test.photographs)


def test_a_seed_determines_its_batch(dense):
    parts = dense.load_parts(held_out=True)
    first, again, other = (dense.batch(parts, (96, 96), 2, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert first[0].min() >= -1 and first[0].max() <= 1


def test_intersection_over_union(dense):
    truth = torch.zeros(1, 1, 4, 4)
    truth[..., :2] = 1
    predicted = truth.roll(1, -1)  # a half of it is right: 4 of 12
    assert dense.intersection_over_union(predicted, truth) == pytest.approx(100 / 3, abs=0.01)
    assert dense.intersection_over_union(truth, truth) == 100
    assert dense.intersection_over_union(torch.zeros_like(truth), truth) == 0


def test_otsu_takes_the_smaller_side(dense):
    x = -torch.ones(2, 3, 20, 20)
    x[0, :, 5:9, 5:9] = 1
    x[1] = -x[0]
    assert torch.equal(dense.otsu(x), (x[:1, :1] > 0).float().repeat(2, 1, 1, 1))


@pytest.mark.parametrize('decoders', [['U-Net'], pytest.param(['U-Net', 'DPT'], marks=pytest.mark.slow)])
def test_the_demo_in_small(dense, decoders, monkeypatch, capsys, tmp_path):
    """Arms of tiny models: figures, picture; a second call trains nothing, another recipe is refused."""
    command = ['dense.py', '--output', str(tmp_path), '--model', 'test_vitresnet', '--resnet', 'test_resnet']
    monkeypatch.setattr(sys, 'argv', [*command, '--steps', '2', '--images', '8'])
    monkeypatch.setitem(dense.RECIPE, 'batch_size', 2)
    monkeypatch.setattr(dense, 'TRAIN_SIZE', (64, 64))
    monkeypatch.setattr(dense, 'TEST_SIZES', {'same': (64, 64), 'larger': (64, 96)})
    every = dense.arms('test_vitresnet', 'test_resnet')
    assert list(every) == [('U-Net', 'test_vitresnet'), ('DPT', 'test_vitresnet'), ('U-Net', 'test_resnet')]
    mine = {arm: build for arm, build in every.items() if arm[0] in decoders}
    monkeypatch.setattr(dense, 'arms', lambda model, resnet: mine)
    dense.main()
    first = capsys.readouterr().out
    assert {path.stem for path in tmp_path.glob('*.pt')} == {f'{arm}-{name}-seed0' for arm, name in mine}
    assert (tmp_path / 'dense-seed0.png').stat().st_size > 10_000
    figures = [line for line in first.splitlines() if 'IoU' in line]
    assert len(figures) == len(mine)
    dense.main()
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if 'IoU' in line] == figures and 'steps in' not in again
    monkeypatch.setattr(sys, 'argv', [*command, '--steps', '3', '--images', '8'])
    with pytest.raises(SystemExit, match=r"was trained with .*'steps': 2.* not .*'steps': 3"):
        dense.main()
