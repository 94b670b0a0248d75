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
    can_draw,
    new_figure,
    plot_comparison,
    plot_confusion,
    plot_curves,
    plot_explanation,
    plot_images,
    plot_predictions,
    shortened,
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


def test_images_have_a_heading_and_titles_of_several_lines(tmp_path, monkeypatch):
    image = Image.new('L', (3000, 1500), 90)
    call = partial(plot_images, iter([image] * 5), ['$a$\nb'] * 5, tmp_path / 'drawn.png', 'The worst:')
    figure, _ = figure_of(call, monkeypatch)
    assert figure.get_suptitle() == 'The worst:' and [axes.get_title() for axes in figure.axes] == ['$a$\nb'] * 5
    for axes in figure.axes:  # a large image is not kept as large as it is, nor is a grey one stretched
        pixels = axes.images[0].get_array()
        assert pixels.shape == (300, 600, 3) and (np.asarray(pixels) == 90).all()
    assert image.size == (3000, 1500) and image.mode == 'L'


# true class, predicted class, images
CELLS = np.array([[0, 0, 6], [0, 1, 2], [2, 0, 1], [2, 2, 19]])


def test_a_confusion_matrix_of_few_classes_has_numbers(tmp_path, monkeypatch):
    names = ['cat', 'a dog of a very long name', '$\\owl$']
    figure, _ = figure_of(partial(plot_confusion, CELLS, names, tmp_path / 'drawn.png', 'title', ['x']), monkeypatch)
    axes, bar = figure.axes
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): '6\n75%', (1, 0): '2\n25%', (0, 2): '1\n5%', (2, 2): '19\n95%'}
    assert [label.get_text() for label in axes.get_xticklabels()] == ['cat', 'a dog of a v…y long name', '$\\owl$']
    rows = ['cat (8)', 'a dog of a v…y long name (0)', '$\\owl$ (20)']
    assert [label.get_text() for label in axes.get_yticklabels()] == rows
    shares = axes.images[-1].get_array()
    assert shares.filled(-1).tolist() == [[75, 25, 0], [-1, -1, -1], [5, 0, 95]]
    assert figure.get_suptitle() == 'title' and bar.get_ylabel() == '% of the images of the true class'


def test_a_confusion_matrix_is_dark_where_the_images_are(tmp_path):
    """The whole picture: rows are true classes from above, and a class without images is grey."""
    cells = np.array([[0, 2, 5], [1, 0, 5]])
    plot_confusion(cells, ['a', 'b', 'c'], tmp_path / 'drawn.png', 'title')
    drawn = drawing(tmp_path / 'drawn.png')
    grey = np.abs(drawn - 217).max(-1) < 4
    bottom = np.flatnonzero(grey.mean(1) > 0.3).max()  # of the last row
    columns = np.flatnonzero(grey.mean(0) > 0.1)
    left, side = columns.min(), np.ptp(columns) + 1
    square = drawn[bottom - side + 1 : bottom + 1, left : left + side]
    dark = [[share(panel(square, row, 3, column, 3), (8, 48, 107)) for column in range(3)] for row in range(3)]
    assert np.greater(dark, 0.8).tolist() == [[False, False, True], [True, False, False], [False, False, False]]


@pytest.mark.parametrize('number', [60, 300])
def test_a_confusion_matrix_of_many_classes_has_lines_beside_it(number, tmp_path, monkeypatch):
    cells = np.array([*([index, index, 9] for index in range(number)), [4, 7, 1]])
    names = [f'class {index}' for index in range(number)]
    call = partial(plot_confusion, cells, names, tmp_path / 'drawn.png', 'title', ['first', '$second$'])
    figure, _ = figure_of(call, monkeypatch)
    axes, text, _ = figure.axes
    assert not axes.texts and text.texts[0].get_text() == 'first\n$second$'
    if number == 60:
        shares = axes.images[-1].get_array()
        assert shares[4, 7] == 10 and shares[4, 4] == 90 and shares.sum() == 6000
        assert [label.get_text() for label in axes.get_xticklabels()] == names
    else:
        (dots,) = axes.collections
        found = {tuple(place): value for place, value in zip(dots.get_offsets().tolist(), dots.get_array())}
        expected = {(float(index), float(index)): 100.0 for index in range(number)}
        assert found == {**expected, (4, 4): 90, (7, 4): 10} and axes.get_ylim() == (299.5, -0.5)
    plot_confusion(cells, names, tmp_path / 'drawn.png', 'title')
    assert share(drawing(tmp_path / 'drawn.png'), (8, 48, 107)) > 0


def test_long_names_are_shortened_in_their_middle():
    assert shortened('x' * 24) == 'x' * 24 and shortened('abcdefgh', 6) == 'abc…gh' and shortened('a\nb') == 'a\\nb'


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
    one = explanation(60, 60)._replace(label='$\\bad$')
    one.vit[:] = 0
    plot_explanation(one, tmp_path / 'drawn.png')
    assert share(panel(drawing(tmp_path / 'drawn.png'), 0, 1, 2, 3), (255, 255, 255)) < 0.5


def test_a_comparison_shows_every_run_and_the_best_arm_on_top(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path, **kwargs: seen.append(figure.axes[0]))
    scores = {'vi$t': [60.0, 64.0], 'resnet': [70.0, 71.5], 'both': [69.0, 66.0]}
    plot_comparison(scores, dict.fromkeys(scores, '1M, 3 ms a step'), 'accuracy (%)', tmp_path / 'drawn.png')
    (axes,) = seen
    order = ['vi$t', 'both', 'resnet']
    assert [label.get_text().splitlines() for label in axes.get_yticklabels()] == [
        [n, '1M, 3 ms a step'] for n in order
    ]
    points = [collection.get_offsets().tolist() for collection in axes.collections]
    assert points == [[[score, place] for score in scores[name]] for place, name in enumerate(order)]
    assert [line.get_xdata()[0] for line in axes.lines] == [62, 67.5, 70.75] and axes.get_xlabel() == 'accuracy (%)'


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
    assert can_draw()
    figure = new_figure('plot', 3, 2)
    assert tuple(figure.get_size_inches()) == (3, 2) and not figure.axes
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    # one that was built for another NumPy raises any error; it is found out before a run, not after its first epoch
    assert not can_draw()
    with pytest.raises(ValueError, match=r'^plot: the matplotlib that is installed can not be imported \(.+\)\.$'):
        new_figure('plot', 3, 2)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert not can_draw()
    with pytest.raises(ValueError, match=r'^plot: needs matplotlib, pip install "timm-vitres\[plot\]"\.$'):
        new_figure('plot', 3, 2)
