"""The report of a run tells what the answers come to: compared with figures by hand, and with loops over the images."""

import csv
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from timm_vitres.training import held_out
from timm_vitres.training.held_out import Answers, report, write_report

NAMES = ['cat', 'dog', 'owl', 'yak']  # no image is of a yak


def answers(labels, predicted, truth=None) -> Answers:
    """Return answers whose probabilities are of no matter, unless they are given."""
    number = len(labels)
    truth = np.full(number, 0.25, dtype=np.float32) if truth is None else np.asarray(truth, dtype=np.float32)
    confidence = np.full(number, 0.75, dtype=np.float32)
    return Answers(np.arange(number), np.asarray(labels), np.asarray(predicted), confidence, truth)


def test_answers_are_those_of_the_logits():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, -4.0], [math.nan, 9.0, 0.0]], dtype=torch.bfloat16)
    found = Answers.of(logits, torch.tensor([2, 1, 0]), range(5, 8))
    total = math.exp(2) + 1 + math.exp(1)
    even = 1 / (2 + math.exp(-4))
    assert found.indices.tolist() == [5, 6, 7] and found.labels.tolist() == [2, 1, 0]
    assert found.predicted.tolist() == [0, 0, 0]
    assert found.confidence.tolist() == pytest.approx([math.exp(2) / total, even, 0])
    assert found.truth.tolist() == pytest.approx([math.exp(1) / total, even, 0])


def test_answers_keep_nothing_of_a_batch():
    """A batch that came from a loader's process is an open file until nothing shares its memory."""
    labels = torch.tensor([0, 1])
    assert not np.shares_memory(Answers.of(torch.eye(2), labels, range(2)).labels, labels.numpy())


def test_answers_of_batches_and_processes_are_joined():
    """Images are in their order, and those that several processes were given count once."""
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    whole = Answers.of(logits, labels, range(7))
    parts = [Answers.of(logits[each], labels[each], each) for each in ([1, 3, 5], [0, 2], [4, 6, 0])]
    for found, expected in zip(Answers.joined(parts), whole):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    with pytest.raises(ValueError, match='answers: got none'):
        Answers.joined([])


def test_figures_by_hand():
    found = report(answers([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 1]), NAMES)
    assert found.confusion.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert found.support.tolist() == [4, 2, 1, 0]
    assert found.recall.tolist() == pytest.approx([75, 50, 0, 0])
    assert found.precision.tolist() == pytest.approx([75, 100 / 3, 0, 0])
    assert found.f1.tolist() == pytest.approx([75, 40, 0, 0])
    assert found.top1 == pytest.approx(400 / 7)
    assert found.balanced == pytest.approx(125 / 3) and found.macro_f1 == pytest.approx(115 / 3)
    assert found.worst_classes == [2, 1, 0]
    assert report(answers([0, 1, 1], [2, 2, 2]), NAMES).worst_classes == [1, 0]
    assert found.confusions == [(1, 2, 1), (1, 1, 0), (1, 0, 1)]  # of equals, that of the largest share comes first


def test_figures_are_those_of_a_loop_over_the_images():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 4, 5, 6], 200)  # none is of class 3, which is predicted
    predicted = np.where(rng.random(200) < 0.6, labels, rng.choice([0, 1, 2, 3, 4, 5], 200))
    predicted[predicted == 6] = 0  # nothing is taken for class 6
    found = report(answers(labels, predicted), [f'class {index}' for index in range(7)])
    pairs = list(zip(labels.tolist(), predicted.tolist()))
    recalls, scores = [], []
    for index in range(7):
        hits = sum(true == guess == index for true, guess in pairs)
        support, taken = sum(true == index for true, _ in pairs), sum(guess == index for _, guess in pairs)
        recall, precision = hits / max(support, 1), hits / max(taken, 1)
        f1 = 2 * recall * precision / (recall + precision) if hits else 0
        assert (found.support[index], found.taken[index], found.hits[index]) == (support, taken, hits)
        figures = found.recall[index], found.precision[index], found.f1[index]
        assert figures == pytest.approx((100 * recall, 100 * precision, 100 * f1))
        if support:
            recalls.append(100 * recall)
            scores.append(100 * f1)
        for other in range(7):
            assert found.confusion[index, other] == pairs.count((index, other))
    assert len(recalls) == 6
    assert found.balanced == pytest.approx(sum(recalls) / 6) and found.macro_f1 == pytest.approx(sum(scores) / 6)
    assert found.top1 == pytest.approx(100 * sum(true == guess for true, guess in pairs) / 200)
    counts = [count for count, _, _ in found.confusions]
    assert counts == sorted(counts, reverse=True) and sum(counts) == sum(true != guess for true, guess in pairs)


def test_one_class_that_is_always_predicted():
    with np.errstate(all='raise'):
        found = report(answers([0, 1, 1, 2], [1, 1, 1, 1]), NAMES)
        figures = [found.top1, found.balanced, found.macro_f1, *found.recall, *found.precision, *found.f1]
    assert found.top1 == 50 and found.balanced == pytest.approx(100 / 3)
    assert found.macro_f1 == pytest.approx(200 / 9)  # 2 * 2 / (4 + 2) for one of three classes
    assert np.isfinite(figures).all() and found.precision[1] == 50


@pytest.mark.parametrize('labels, says', [([], 'answers: got none'), ([0, 4], 'got classes 0 to 4, but 4 names')])
def test_answers_that_nothing_can_be_said_of(labels, says):
    with pytest.raises(ValueError, match=says):
        report(answers(labels, labels), NAMES)


LABELS, PREDICTED = [0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 1]
TRUTH = [0.9, 0.9, 0.9, 0.3, 0.9, 0.1, 0.2]
FILES = [f'{NAMES[label]}/{index}.png' for index, label in enumerate(LABELS)]


def picture(index: int) -> Image.Image:
    return Image.new('RGB', (8, 8), (10 * index, 0, 0))


def test_the_files_of_a_report(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(held_out, 'plot_images', lambda images, *rest: drawn.append((list(images), *rest)))
    given = answers(LABELS, PREDICTED, TRUTH)._replace(indices=np.arange(10, 17))  # the first ten are not asked for
    lines = write_report(tmp_path, given, NAMES, picture, [*10 * ['none'], *FILES], 'By flips.')
    assert lines == [
        '7 validation images of 3 classes: accuracy 57.14%, balanced accuracy 41.67%, macro F1 38.33%.',
        'Left out of the means, since they have no validation image: yak.',
        'Least recall: owl 0.00% (of 1), dog 50.00% (of 2), cat 75.00% (of 4).',
        'Most frequent confusion: 1 of 1 images of owl are taken for dog.',
        'By flips.',
    ]
    assert (tmp_path / 'held_out.txt').read_text() == '\n'.join(lines) + '\n'
    assert (tmp_path / 'held_out.csv').read_text().splitlines() == [
        'class,images,recall,precision,f1',
        'cat,4,75.00,75.00,75.00',
        'dog,2,50.00,33.33,40.00',
        'owl,1,0.00,0.00,0.00',
        'yak,0,,,',
    ]
    with Image.open(tmp_path / 'confusion.png') as confusion:
        assert confusion.format == 'PNG'
    ((images, titles, path, heading),) = drawn
    assert [image.getpixel((0, 0))[0] for image in images] == [150, 160, 130]  # the least probable truth comes first
    assert titles == [
        'dog/5.png\ntrue: dog 10.0%\npredicted: cat 75.0%',
        'owl/6.png\ntrue: owl 20.0%\npredicted: dog 75.0%',
        'cat/3.png\ntrue: cat 30.0%\npredicted: dog 75.0%',
    ]
    assert path == tmp_path / 'mistakes.png' and heading == '3 of 7 images are mistaken; the worst:'


def test_twelve_mistakes_are_drawn_at_most(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(held_out, 'plot_images', lambda images, *rest: drawn.append((len(list(images)), rest[-1])))
    write_report(tmp_path, answers([0] * 20, [1] * 20), ['a', 'b'], picture, [f'{index}.png' for index in range(20)])
    assert drawn == [(12, '20 of 20 images are mistaken; the worst:')]


def test_pictures_are_never_of_other_answers(tmp_path, monkeypatch):
    mistaken, right = answers(LABELS, PREDICTED, TRUTH), answers(LABELS, LABELS)
    pictures = [tmp_path / 'confusion.png', tmp_path / 'mistakes.png']

    def there():
        return [path.exists() for path in pictures]

    write_report(tmp_path, mistaken, NAMES, picture, FILES)
    assert there() == [True, True]
    lines = write_report(tmp_path, right, NAMES, picture, FILES)
    assert there() == [True, False] and lines[-1] == 'There are no mistakes.' and 'accuracy 100.00%' in lines[0]
    write_report(tmp_path, mistaken, NAMES, picture, FILES)
    write_report(tmp_path, mistaken, NAMES, None, [])
    assert there() == [True, False]
    write_report(tmp_path, mistaken, NAMES, picture, FILES)
    monkeypatch.setattr(held_out, 'can_draw', lambda: False)
    write_report(tmp_path, mistaken, NAMES, picture, FILES)
    assert there() == [False, False]


def test_an_image_that_is_gone_since_is_no_reason_to_lose_the_report(tmp_path):
    def gone(index):
        raise FileNotFoundError(f'image: there is no file {index}.')

    write_report(tmp_path, answers(LABELS, PREDICTED, TRUTH), NAMES, gone, FILES)
    assert (tmp_path / 'mistakes.png').exists() and (tmp_path / 'held_out.csv').exists()


def test_names_of_any_kind(tmp_path):
    names = ['$\\bad$', 'two\nlines', 'no \udce9 text', 'a,"b"']
    lines = write_report(tmp_path, answers([0, 1, 2], [1, 1, 1]), names, picture, names)
    with (tmp_path / 'held_out.csv').open(newline='', encoding='utf-8') as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == ['$\\bad$', 'two\\nlines', 'no \\udce9 text', 'a,"b"']
    assert all('\n' not in line for line in lines)


def test_the_table_is_written_last(tmp_path, monkeypatch):
    def fail(figure, path, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Figure, 'savefig', fail)
    with pytest.raises(OSError, match=r'confusion\.png could not be written'):
        write_report(tmp_path, answers(LABELS, PREDICTED), NAMES, picture, FILES)
    assert list(tmp_path.iterdir()) == []


def test_many_classes_have_lists_beside_their_matrix(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(held_out, 'plot_confusion', lambda *arguments: seen.append(arguments))
    names = [f'class {index}' for index in range(50)]
    labels = np.repeat(np.arange(50), 2)
    predicted = labels.copy()
    predicted[[0, 1, 2]] = [7, 7, 8]
    write_report(tmp_path, answers(labels, predicted), names, None, [], 'A note.')
    ((cells, given, path, title, beside),) = seen
    assert given == names and path == tmp_path / 'confusion.png'
    assert title == 'balanced accuracy 97.00%, macro F1 96.27%\nA note.'
    assert {(0, 7, 2), (1, 8, 1), (1, 1, 1)} <= set(map(tuple, cells.tolist())) and cells[:, 2].sum() == 100
    assert beside == [
        *('Most frequent confusions', '2 of 2  class 0 → class 7', '1 of 2  class 1 → class 8', ''),
        *('Least recall', '0.0% of 2  class 0', '50.0% of 2  class 1'),
    ]
