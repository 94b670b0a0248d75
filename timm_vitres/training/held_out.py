"""What a run's model says of its validation images: figures, a table by class, confusions, the worst mistakes.

logits -> `Answers` -> `report` -> `HeldOut`; `write_report` -> folder/{held_out.csv, held_out.txt, confusion.png,
mistakes.png}.
"""

import csv
from pathlib import Path
from typing import Callable, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from ..checks import some
from ..pictures import can_draw, plot_confusion, plot_images, shortened
from ..walking import shown
from ..writing import replacing

TABLE_NAME = 'held_out.csv'
TEXT_NAME = 'held_out.txt'
CONFUSION_NAME = 'confusion.png'
MISTAKES_NAME = 'mistakes.png'
MISTAKES = 12  # so many are drawn
LISTED = 20  # so many confusions, and classes, stand beside a matrix that has no numbers


class Answers(NamedTuple):
    """A model's answers to N images, an array (N,) each."""

    indices: np.ndarray  # of the images in the validation set
    labels: np.ndarray  # index of the true class
    predicted: np.ndarray  # index of the likeliest class
    confidence: np.ndarray  # probability of the likeliest class, from 0 to 1
    truth: np.ndarray  # probability of the true class

    @classmethod
    def of(cls, logits: torch.Tensor, labels: torch.Tensor, indices: Iterable[int]) -> 'Answers':
        """Return the answers of a batch: logits (B, classes), labels (B,), B indices. What is not finite becomes 0."""
        probabilities = logits.detach().float().softmax(-1).nan_to_num(0.0)
        confidence, predicted = probabilities.max(-1)
        truth = probabilities.gather(-1, labels[:, None].to(logits.device))[:, 0]
        # copies: a batch's labels from a loader's process hold an open file as long as anything shares their memory
        arrays = [values.cpu().numpy().copy() for values in (labels, predicted, confidence, truth)]
        return cls(np.asarray(list(indices), dtype=np.int64), *arrays)

    @classmethod
    def joined(cls, parts: Iterable['Answers']) -> 'Answers':
        """Return the answers of all batches, of all processes, in the order of the images; repeated ones count once."""
        arrays = [np.concatenate(arrays) for arrays in zip(*parts)]
        if not arrays:
            raise ValueError('answers: got none, expected those to one image or more.')
        _, first = np.unique(arrays[0], return_index=True)
        return cls(*(array[first] for array in arrays))

    @property
    def worst(self) -> np.ndarray:
        """Positions of the mistakes, those first whose true class got the least probability."""
        mistakes = np.flatnonzero(self.labels != self.predicted)
        return mistakes[np.argsort(self.truth[mistakes], kind='stable')]


class HeldOut(NamedTuple):
    """What the answers come to. Figures are percentages; means are over the classes that have an image."""

    label_names: List[str]
    cells: np.ndarray  # what the confusion matrix has beside zeros: (n, 3) of true class, predicted class, images

    @property
    def confusion(self) -> np.ndarray:
        """Numbers of images: (classes, classes), a row for each true class, a column for each predicted one."""
        matrix = np.zeros((len(self.label_names), len(self.label_names)), dtype=np.int64)
        matrix[self.cells[:, 0], self.cells[:, 1]] = self.cells[:, 2]
        return matrix

    @property
    def support(self) -> np.ndarray:
        """Number of images of each class."""
        return self._sums(self.cells, 0)

    @property
    def taken(self) -> np.ndarray:
        """Number of images that were taken for each class."""
        return self._sums(self.cells, 1)

    @property
    def hits(self) -> np.ndarray:
        """Number of images of each class that were found."""
        return self._sums(self.cells[self.cells[:, 0] == self.cells[:, 1]], 0)

    def _sums(self, cells: np.ndarray, column: int) -> np.ndarray:
        sums = np.zeros(len(self.label_names), dtype=np.int64)
        np.add.at(sums, cells[:, column], cells[:, 2])
        return sums

    @property
    def recall(self) -> np.ndarray:
        """Share of each class's images that were found; 0 for a class without images."""
        return _percent(self.hits, self.support)

    @property
    def precision(self) -> np.ndarray:
        """Share of the images taken for each class that are of it; 0 for a class that was never predicted."""
        return _percent(self.hits, self.taken)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of recall and precision; 0 where both are 0."""
        return _percent(2 * self.hits, self.taken + self.support)

    @property
    def top1(self) -> float:
        """Accuracy."""
        return float(100 * self.hits.sum() / self.support.sum())

    @property
    def balanced(self) -> float:
        """Balanced accuracy: the mean of the recalls."""
        return float(self.recall[self.support > 0].mean())

    @property
    def macro_f1(self) -> float:
        """Mean of the F1 of the classes."""
        return float(self.f1[self.support > 0].mean())

    @property
    def worst_classes(self) -> List[int]:
        """Indices of the classes whose recall is below 100%, the least first, of equals that with more images."""
        recall, support = self.recall, self.support
        order = np.lexsort((-support, recall))
        return [int(index) for index in order if support[index] and recall[index] < 100]

    @property
    def confusions(self) -> List[Tuple[int, int, int]]:
        """(number of images, true class, predicted class) of all mistakes, the most frequent first, then by share."""
        true, predicted, counts = self.cells[self.cells[:, 0] != self.cells[:, 1]].T
        order = np.lexsort((-counts / self.support[true], -counts))
        return [(int(counts[i]), int(true[i]), int(predicted[i])) for i in order]


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return 100 * part / np.maximum(whole, 1)


def report(answers: Answers, label_names: Sequence[str]) -> HeldOut:
    """Return what a model's answers come to; ValueError where there are none, or a label is of no class."""
    number = len(label_names)
    if not len(answers.labels):
        raise ValueError('answers: got none, expected those to one image or more.')
    for classes in (answers.labels, answers.predicted):
        if classes.min() < 0 or classes.max() >= number:
            raise ValueError(f'answers: got classes {classes.min()} to {classes.max()}, but {number} names of classes.')
    pairs, counts = np.unique(np.stack([answers.labels, answers.predicted], 1), axis=0, return_counts=True)
    return HeldOut(list(label_names), np.column_stack([pairs, counts]).astype(np.int64))


def write_report(
    folder: Path,
    answers: Answers,
    label_names: Sequence[str],
    images: Optional[Callable[[int], Image.Image]],
    names: Sequence[str],
    note: str = '',
) -> List[str]:
    """Write the report of a finished run, its table last, and return the lines of its text.

    Pictures are drawn where matplotlib is installed; mistakes, where there are some. What is not drawn is removed, so
    that no picture is of other answers.

    Args:
        images: Returns the validation image of an index; None where images can't be asked for, and are not drawn.
        names: A name for each validation image, such as its path.
        note: A sentence on how the answers were got.

    Raises:
        ValueError: where `report` raises it.
        OSError: where a file can't be written.
    """
    held_out = report(answers, label_names)
    lines = [*_lines(held_out), *([note] if note else [])]
    draws = can_draw()
    title = f'balanced accuracy {held_out.balanced:.2f}%, macro F1 {held_out.macro_f1:.2f}%'
    if draws:
        title = f'{title}\n{note}' if note else title
        plot_confusion(held_out.cells, label_names, folder / CONFUSION_NAME, title, _lists(held_out))
    else:
        (folder / CONFUSION_NAME).unlink(missing_ok=True)
    worst = answers.worst[:MISTAKES]
    if draws and images is not None and len(worst):
        titles = [_told(answers, position, label_names, names) for position in worst]
        heading = f'{len(answers.worst)} of {len(answers.labels)} images are mistaken; the worst:'
        opened = (_image(images, int(answers.indices[position])) for position in worst)
        plot_images(opened, titles, folder / MISTAKES_NAME, heading)
    else:
        (folder / MISTAKES_NAME).unlink(missing_ok=True)
    with replacing(folder / TEXT_NAME) as path:
        path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
    with replacing(folder / TABLE_NAME) as path, path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['class', 'images', 'recall', 'precision', 'f1'])
        writer.writerows(_rows(held_out))
    return lines


def remove_report(folder: Path) -> None:
    """Remove what `write_report` wrote, if anything."""
    for name in (TABLE_NAME, TEXT_NAME, CONFUSION_NAME, MISTAKES_NAME):
        (folder / name).unlink(missing_ok=True)


def _rows(held_out: HeldOut) -> Iterator[List[str]]:
    """Yield a row of the table for each class; one without images has no figures."""
    figures = zip(held_out.recall, held_out.precision, held_out.f1)
    for name, total, values in zip(held_out.label_names, held_out.support, figures):
        yield [shown(name), str(total), *(f'{value:.2f}' if total else '' for value in values)]


def _lines(held_out: HeldOut) -> List[str]:
    """Return the report as text, a sentence a line."""
    names, support, recall = [shown(name) for name in held_out.label_names], held_out.support, held_out.recall
    lines = [
        f'{support.sum()} validation images of {np.count_nonzero(support)} classes: accuracy {held_out.top1:.2f}%, '
        f'balanced accuracy {held_out.balanced:.2f}%, macro F1 {held_out.macro_f1:.2f}%.'
    ]
    absent = np.flatnonzero(support == 0)
    if len(absent):
        named = some(names[index] for index in absent)
        lines.append(f'Left out of the means, since they have no validation image: {named}.')
    if not held_out.confusions:
        return [*lines, 'There are no mistakes.']
    least = ', '.join(f'{names[i]} {recall[i]:.2f}% (of {support[i]})' for i in held_out.worst_classes[:3])
    count, true, predicted = held_out.confusions[0]
    lines.append(f'Least recall: {least}.')
    taken = f'{count} of {support[true]} images of {names[true]} are taken for {names[predicted]}'
    return [*lines, f'Most frequent confusion: {taken}.']


def _lists(held_out: HeldOut) -> List[str]:
    """Return the most frequent confusions and the worst classes as short lines."""
    names, support = [shortened(name, 20) for name in held_out.label_names], held_out.support
    confusions = [
        f'{count} of {support[true]}  {names[true]} → {names[predicted]}'
        for count, true, predicted in held_out.confusions[:LISTED]
    ]
    worst = [f'{held_out.recall[i]:.1f}% of {support[i]}  {names[i]}' for i in held_out.worst_classes[:LISTED]]
    return ['Most frequent confusions', *confusions, '', 'Least recall', *worst] if worst else ['No mistakes']


def _told(answers: Answers, position: int, label_names: Sequence[str], names: Sequence[str]) -> str:
    """Return what stands above a mistake: the image's name, its class and the predicted one, with probabilities."""
    true, predicted = (shortened(label_names[one[position]], 18) for one in (answers.labels, answers.predicted))
    return (
        f'{shortened(names[answers.indices[position]], 32)}\ntrue: {true} {100 * answers.truth[position]:.1f}%\n'
        f'predicted: {predicted} {100 * answers.confidence[position]:.1f}%'
    )


def _image(images: Callable[[int], Image.Image], index: int) -> Image.Image:
    try:
        return images(index)
    except (OSError, ValueError):  # it was read in validation, and its loss since then is no reason to lose a report
        return Image.new('L', (1, 1), 255)
