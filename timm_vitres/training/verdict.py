"""What a comparison may say: which arms differ by more than chance, in numbers and in one sentence.

answers of every arm, seed and test image, right or wrong -> `judge` -> `Verdict`.
"""

import math
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np

LEVEL = 0.95


class Difference(NamedTuple):
    """How far an arm lies behind another, in points of a hundred, and the interval that holds it."""

    points: float
    low: float
    high: float

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves out 0: the arms are told apart."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f'{self.points:.1f} points ({self.low:.1f} to {self.high:.1f})'


class Verdict(NamedTuple):
    """The result of a comparison."""

    best: str  # the arm with the highest mean
    means: Dict[str, float]  # of every arm, in percent, over seeds and images
    spreads: Dict[str, Optional[float]]  # sample standard deviation over the seeds; None of a single one
    behind: Dict[str, Difference]  # of every arm but the best
    sentence: str


def judge(
    correct: Mapping[str, np.ndarray], weights: Optional[np.ndarray] = None, measured: str = 'accuracy'
) -> Verdict:
    """Compare the best arm with every other, and say what seeds and test images allow to say.

    Both are drawn by chance. Half the width of an interval is the root of the sum of squares of what the seeds and what
    the images make of it, each by Student's quantile of its own degrees of freedom (Zou and Donner 2008, Stat. Med. 27:
    variance estimates recovered from intervals). What is of a seed and an image together counts in both, so that the
    interval is rather too wide.

    The best arm is chosen by the same figures, so that any pair of arms might have been the one that is told apart:
    the intervals are Bonferroni's for all pairs, and hold all together with a probability of 95%. With one seed they
    know the chance of the images alone, and no arm is called better.

    Args:
        correct: For every arm an array (seeds, images), 1 where the model of a seed was right on an image, else 0;
            all arms have the same seeds and images, in the same order.
        weights: What each image counts, (images,), 1 in the mean; by default all count the same.
        measured: What the mean of the right answers is called, so weighted.

    Raises:
        ValueError: for fewer than two arms or images, or arrays of different shapes.
    """
    shapes = {array.shape for array in correct.values()}
    shape = num_seeds, num_images = next(iter(shapes), (0, 0))
    if len(correct) < 2 or len(shapes) > 1 or num_images < 2:
        raise ValueError(
            f'correct: got {len(correct)} arms of {sorted(shapes)}, expected two or more arms, of as many seeds each, '
            'and of the same two or more images.'
        )
    pairs = math.comb(len(correct), 2)
    weights = np.ones(num_images) if weights is None else weights
    right = {name: array * weights for name, array in correct.items()}
    means = {name: 100 * float(array.mean()) for name, array in right.items()}
    spreads = {name: 100 * float(array.mean(1).std(ddof=1)) if num_seeds > 1 else None for name, array in right.items()}
    best = max(means, key=lambda name: means[name])
    level = 1 - (1 - LEVEL) / pairs
    seeds = _seeds_error(np.stack([array.mean(1) for array in right.values()]), level)
    behind = {}
    for name in right:
        if name != best:
            mean = float((right[best] - right[name]).mean())
            half = math.hypot(seeds, _images_error((right[best] - right[name]).mean(0), level))
            behind[name] = Difference(*(100 * value for value in (mean, mean - half, mean + half)))
    start = f'By {measured} on these {num_images} test images'
    return Verdict(best, means, spreads, behind, _sentence(start, best, means, behind, *shape))


def _seeds_error(scores: np.ndarray, level: float) -> float:
    """Return half the width of the interval of a difference of two arms, as far as the seeds make it.

    What is left of the scores (arms, seeds) without the arms' and the seeds' means has the variance of a run, taken to
    be the same for all arms: the analysis of variance of a design in blocks, which are the seeds.
    """
    arms, seeds = scores.shape
    if seeds == 1:
        return 0.0
    rest = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    freedom = (arms - 1) * (seeds - 1)
    variance = float((rest**2).sum()) / freedom
    return student((1 + level) / 2, freedom) * math.sqrt(2 * variance / seeds)


def _images_error(differences: np.ndarray, level: float) -> float:
    """Return half the width of the interval of a difference of two arms, as far as the test images make it.

    Args:
        differences: (images,), means over the seeds. Two images are added, half of one to each way in which two arms
            can be right or wrong, so that few images on which all agree are not taken for certainty (Agresti and Min
            2005, Stat. Med. 24).
    """
    number = len(differences) + 2
    variance = (float((differences**2).sum()) + 1) / number - (float(differences.sum()) / number) ** 2
    return student((1 + level) / 2, number - 1) * math.sqrt(variance / number)


def student(probability: float, freedom: float) -> float:
    """Return the quantile of Student's distribution for a probability above one half; `freedom` may be a fraction.

    With t = sqrt(freedom) tan(angle), the density is that of cos(angle) ** (freedom - 1) from -pi / 2 to pi / 2.
    """
    freedom = min(freedom, 1e5)  # beyond this it is the normal distribution
    angle = np.linspace(0, 1, 20_001) * np.pi / 2
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(2 * probability - 1, mass / mass[-1], angle))


def _sentence(
    start: str, best: str, means: Dict[str, float], behind: Dict[str, Difference], num_seeds: int, num_images: int
) -> str:
    order = sorted(behind, key=lambda name: -means[name])
    told = {name: f'{name} ({means[name]:.1f}%)' for name in means}
    if num_seeds == 1:
        first = [told[name] for name in [best, *order] if means[name] == means[best]]
        others = [told[name] for name in order if means[name] < means[best]]
        before = f', before {listed(others)}' if others else ''
        verb = 'are' if len(first) > 1 else 'is'
        return (
            f'{start} {listed(first)} {verb} ahead{before}; but one seed says nothing about the chance of training, so '
            'that none is called better: give more seeds.'
        )
    better = [f'{told[name]} by {behind[name]}' for name in order if behind[name].is_told]
    alike = [f'{told[name]}: {behind[name]}' for name in order if not behind[name].is_told]
    parts = [f'is better than {listed(better, "; ")}'] if better else []
    parts += [f'can not be told apart from {listed(alike, "; ")}'] if alike else []
    pairs = math.comb(len(means), 2)
    held = f'are 95% intervals, for all {pairs} pairs at once' if pairs > 1 else 'is the 95% interval'
    return (
        f'{start} {told[best]} {"; it ".join(parts)}. In brackets {held}, by the chance of {num_seeds} seeds and of '
        f'{num_images} images.'
    )


def listed(words: Sequence[str], between: str = ', ') -> str:
    """Return words as a list in a sentence: 'a, b and c'."""
    *others, last = words
    joined: List[str] = [between.join(others), last] if others else [last]
    return ' and '.join(joined)
