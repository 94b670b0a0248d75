"""The pictures show the images, maps and curves that they are drawn from."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import rename_, stripes
from matplotlib.figure import Figure
from PIL import Image

from timm_vitres.explanation import Explanation
from timm_vitres.pictures import (
    RESNET_TITLE,
    VIT_TITLE,
    draws_curves,
    new_figure,
    plot_curves,
    plot_explanation,
    plot_predictions,
)
from timm_vitres.prediction import Prediction, predict
from timm_vitres.writing import TEMPORARY


def test_a_name_with_dollars_can_be_drawn(model, tmp_path):
    stripes(40, True, np.random.default_rng(0)).save(tmp_path / 'good.png')
    names = ['$\\bad$', '$\\worse$', '$\\worst$']
    predictions, _ = predict(rename_(model, names), [tmp_path / 'good.png'])
    plot_predictions(predictions, tmp_path / 'drawing.png')
    with Image.open(tmp_path / 'drawing.png') as drawing:
        assert drawing.size[0] > 200


def panel(drawn: np.ndarray, row: int, rows: int, column: int, columns: int) -> np.ndarray:
    """Return the pixels of one panel of a drawing (H, W, 3)."""
    height, width = drawn.shape[0] // rows, drawn.shape[1] // columns
    return drawn[row * height : (row + 1) * height, column * width : (column + 1) * width]


def drawing(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == 'PNG'
        return np.asarray(image.convert('RGB')).astype(int)


def share(pixels: np.ndarray, colour) -> float:
    """Return the share of the pixels that have a colour."""
    return (np.abs(pixels - np.asarray(colour)).max(-1) < 20).mean()


COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]


def test_every_image_is_drawn_in_its_place(tmp_path):
    """Four images stand in a row, and the fifth stands below."""
    predictions = []
    for index, colour in enumerate(COLOURS):
        Image.new('RGB', (40, 40), colour).save(tmp_path / f'{index}.png')
        predictions.append(Prediction(str(tmp_path / f'{index}.png'), ['cat', 'dog'], [0.75, 0.25]))
    plot_predictions(predictions, tmp_path / 'drawn.png')
    drawn = drawing(tmp_path / 'drawn.png')
    for index, colour in enumerate(COLOURS):
        row, column = divmod(index, 4)
        assert share(panel(drawn, row, 2, column, 4), colour) > 0.5, index
        assert share(drawn, colour) == pytest.approx(share(panel(drawn, row, 2, column, 4), colour) / 8, rel=0.01)
    assert share(panel(drawn, 1, 2, 1, 4), (255, 255, 255)) == 1


def figure_of(call, monkeypatch):
    """Return the figure that a call saves, and the path that it saves it to."""
    saved = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **kwargs: saved.append((figure, Path(path))))
    call()
    monkeypatch.undo()
    (one,) = saved
    return one


def test_titles_stand_above_the_likeliest_class(tmp_path, monkeypatch):
    Image.new('RGB', (40, 40)).save(tmp_path / 'a.png')
    predictions = [Prediction(str(tmp_path / 'a.png'), [name, 'x'], [0.754, 0.2]) for name in ('cat', '$d\\og$')]
    call = partial(plot_predictions, predictions, tmp_path / 'drawn.png', titles=['first'])
    figure, _ = figure_of(call, monkeypatch)
    assert [axes.get_title() for axes in figure.axes] == ['first\ncat  75%', '$d\\og$  75%']
    assert len(figure.axes) == 2


HISTORY = [
    dict(epoch=0, train_loss=2.0, eval_loss=2.5, eval_top1=25.0, eval_balanced=20.0),
    dict(epoch=1, train_loss=1.0, eval_loss=1.5, eval_top1=75.0, eval_balanced=70.0),
]


def test_curves_are_those_of_the_epochs(tmp_path, monkeypatch):
    figure, path = figure_of(partial(plot_curves, HISTORY, tmp_path / 'curves.png'), monkeypatch)
    assert path == tmp_path / 'curves.png'
    found = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
        for axes in figure.axes
    ]
    loss, accuracy = (
        {name: ([1, 2], values) for name, values in one.items()}
        for one in (dict(training=[2.0, 1.0], validation=[2.5, 1.5]), {'top-1': [25.0, 75.0], 'balanced': [20.0, 70.0]})
    )
    assert found == [loss, accuracy]
    assert [axes.get_ylabel() for axes in figure.axes] == ['loss', 'validation accuracy (%)']
    plot_curves(HISTORY, tmp_path / 'curves')  # the name does not say the format
    assert share(drawing(tmp_path / 'curves'), (31, 119, 180)) > 0  # matplotlib draws the first curve in this blue


BLUE = (60, 120, 220)


def explanation(height, width, resnet=True, vit=True) -> Explanation:
    """Return an explanation: the ResNet looks at the upper left quarter, the ViT at the lower right one."""
    upper, lower = np.zeros((height, width)), np.zeros((height, width))
    upper[: height // 2, : width // 2] = 1
    lower[height // 2 :, width // 2 :] = 1
    image = Image.new('RGB', (width, height), BLUE)
    return Explanation(image, 'cat', 0.756, upper if resnet else None, lower if vit else None)


def bright(pixels: np.ndarray) -> np.ndarray:
    """Return the mean row and column, from 0 to 1, of the pixels that a map makes yellow."""
    found = np.argwhere(pixels[..., 1] - pixels[..., 2] > 40)
    assert len(found) > 100
    return found.mean(0) / pixels.shape[:2]


@pytest.mark.parametrize('height, width', [(100, 100), (40, 120)])
def test_maps_lie_over_the_image_where_they_look(height, width, tmp_path):
    """The panels stand beside each other, or, if the image is wide, one below the other."""
    plot_explanation(explanation(height, width), tmp_path / 'drawn.png')
    drawn = drawing(tmp_path / 'drawn.png')
    panels = [panel(drawn, i, 3, 0, 1) if width > height else panel(drawn, 0, 1, i, 3) for i in range(3)]
    assert share(panels[0], BLUE) > 0.3  # only the first panel is in colour
    assert all(share(one, BLUE) == 0 for one in panels[1:])
    upper, lower = bright(panels[1]), bright(panels[2])
    assert (upper < 0.5).all() and (lower > 0.5).all()


@pytest.mark.parametrize(
    'parts, titles',
    [
        (dict(), [RESNET_TITLE, VIT_TITLE]),
        (dict(resnet=False), [VIT_TITLE]),
        (dict(vit=False), [RESNET_TITLE]),
    ],
)
def test_a_part_that_is_not_there_has_no_panel(parts, titles, tmp_path, monkeypatch):
    figure, path = figure_of(
        partial(plot_explanation, explanation(60, 60, **parts), tmp_path / 'drawn.png'), monkeypatch
    )
    assert [axes.get_title() for axes in figure.axes] == ['cat  76%', *titles]
    assert path.name.startswith(TEMPORARY)  # the file beside, which is renamed later


def test_a_single_bright_patch_darkens_nothing(tmp_path):
    drawn = []
    for brightest in (0.5, 1.0):
        one = explanation(60, 60)
        one.vit[:] = np.linspace(0, 0.5, 60)
        one.vit[-3:, -3:] = brightest
        plot_explanation(one, tmp_path / 'drawn.png')
        drawn.append(panel(drawing(tmp_path / 'drawn.png'), 0, 1, 2, 3))
    assert np.abs(drawn[0] - drawn[1]).max() < 10


def test_an_even_map_can_be_drawn(tmp_path):
    one = explanation(60, 60)
    one.vit[:] = 0
    plot_explanation(one, tmp_path / 'drawn.png')
    assert share(panel(drawing(tmp_path / 'drawn.png'), 0, 1, 2, 3), (255, 255, 255)) < 0.5


@pytest.mark.parametrize('kind', ['predictions', 'explanation'])
def test_a_drawing_that_fails_leaves_the_old_one(kind, tmp_path, monkeypatch):
    Image.new('RGB', (40, 40)).save(tmp_path / 'a.png')
    (tmp_path / 'drawn.png').write_text('old')

    def fail(figure, path, **kwargs):
        Path(path).write_text('half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Figure, 'savefig', fail)
    with pytest.raises(OSError, match=r'drawn\.png could not be written \(.*No space left on device\)'):
        if kind == 'predictions':
            plot_predictions([Prediction(str(tmp_path / 'a.png'), ['cat'], [1.0])], tmp_path / 'drawn.png')
        else:
            plot_explanation(explanation(60, 60), tmp_path / 'drawn.png')
    assert (tmp_path / 'drawn.png').read_text() == 'old'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.png', 'drawn.png']


def test_without_matplotlib_it_is_said_for_what_it_is_needed(monkeypatch):
    assert draws_curves()
    figure = new_figure('plot', 3, 2)
    assert tuple(figure.get_size_inches()) == (3, 2) and not figure.axes
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ValueError, match=r'^plot: needs matplotlib, pip install "timm-vitres\[plot\]"\.$'):
        new_figure('plot', 3, 2)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert not draws_curves()
