"""What a comparison may say: which arms differ by more than chance, in numbers and in one sentence.

answers of every arm, seed and test image, right or wrong -> `judge` -> `Verdict`.
"""

import math
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

LEVEL = 0.95
LEAST_SEEDS = 3  # of fewer, that agree by chance, nothing is concluded


class Difference(NamedTuple):
    """How far an arm lies behind another, in points of a hundred, and its interval, infinite if unknown."""

    points: float
    low: float
    high: float

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves out 0: the arms are told apart."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        nearest = min(abs(self.low), abs(self.high))  # to 0, which would seem inside where it is rounded to that
        digits = next((count for count in (1, 2, 3, 4) if not self.is_told or round(nearest, count)), 5)
        interval = f' ({self.low:.{digits}f} to {self.high:.{digits}f})' if math.isfinite(self.low) else ''
        return f'{self.points:.{digits}f} points{interval}'


class Verdict(NamedTuple):
    """The result of a comparison."""

    best: str  # the arm with the highest mean
    means: Dict[str, float]  # of every arm, in percent, over seeds and images
    spreads: Dict[str, Optional[float]]  # sample standard deviation over the seeds; None of a single one
    behind: Dict[str, Difference]  # of every arm but the best
    sentence: str


def judge(
    correct: Mapping[str, np.ndarray], classes: Optional[np.ndarray] = None, measured: str = 'accuracy'
) -> Verdict:
    """Compare the best arm with every other, and say what seeds and test images allow to say.

    Both are drawn by chance. Half the width of an interval is the root of the sum of squares of what the seeds and what
    the images make of it, each by Student's quantile of its own degrees of freedom (Zou and Donner 2008, Stat. Med. 27:
    variance estimates recovered from intervals). What is of a seed and an image together counts in both, so that the
    interval is rather too wide.

    The best arm is chosen by the same figures, so that any pair of arms might have been the one that is told apart:
    the intervals are Bonferroni's for all pairs, and hold all together with a probability of 95% (but those of pairs
    whose difference varies more from seed to seed than that of the average pair: see `seeds_error`; the sentence names
    them). The chance of what was chosen once for all seeds, as learning rates are, and of which images there were to
    learn from, is in none; nor is a failure of one run in many that these seeds did not meet, since an arm's figures
    over seeds are taken as normally distributed. With fewer than `LEAST_SEEDS` seeds there is no interval, and no arm
    is called better.

    Args:
        correct: For every arm an array (seeds, images), 1 where the model of a seed was right on an image, else 0;
            all arms have the same seeds and images, in the same order.
        classes: The class of every image, (images,), where each class counts the same; by default each image does.
        measured: What the mean of the right answers is then called.

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
    classes = np.zeros(num_images) if classes is None else classes
    _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    groups = np.split(np.argsort(inverse, kind='stable'), np.cumsum(counts)[:-1])  # the images of each class
    weights = num_images / (len(counts) * counts[inverse])  # 1 in the mean
    answers = {name: np.asarray(array, float) for name, array in correct.items()}
    right = {name: array * weights for name, array in answers.items()}
    means = {name: 100 * float(array.mean()) for name, array in right.items()}
    spreads = {name: 100 * float(array.mean(1).std(ddof=1)) if num_seeds > 1 else None for name, array in right.items()}
    best = max(means, key=lambda name: means[name])
    level = 1 - (1 - LEVEL) / pairs
    scores = {name: array.mean(1) for name, array in right.items()}
    behind, alone = {}, []
    for name in right:
        if name != best:
            mean = float((right[best] - right[name]).mean())
            half = math.inf
            if num_seeds >= LEAST_SEEDS:
                differences = (answers[best] - answers[name]).mean(0)
                images = _images_error([differences[group] for group in groups], level)
                seeds, is_alone = seeds_error(list(scores.values()), scores[best] - scores[name], level)
                alone += [name] if is_alone else []
                half = math.hypot(seeds, images)
            behind[name] = Difference(*(100 * value for value in (mean, mean - half, mean + half)))
    start = f'By {measured} on these {num_images} test images'
    return Verdict(best, means, spreads, behind, _sentence(start, best, means, behind, alone, *shape))


def seeds_error(scores: Sequence[np.ndarray], differences: np.ndarray, level: float) -> Tuple[float, bool]:
    """Return half the width of the interval of a difference of two arms, as far as the seeds make it, and whether it
    holds for this pair alone.

    What is left of the scores without the arms' and the seeds' means has the variance of a run: the analysis of
    variance of a design in blocks, which are the seeds. Few seeds know it only where it is pooled over the arms; but a
    pair whose difference varies more must not borrow the others' certainty, so that its own variance is taken where it
    is larger, with the larger one of the pooled quantile and that of its own degrees of freedom for this pair alone.

    Args:
        scores: Of every arm, (seeds,).
        differences: Those of the pair, (seeds,).
    """
    table = np.stack(scores)
    arms, seeds = table.shape
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    freedom = (arms - 1) * (seeds - 1)
    pooled, own = 2 * float((rest**2).sum()) / freedom, float(differences.var(ddof=1))
    quantile, alone = student((1 + level) / 2, freedom), student((1 + LEVEL) / 2, seeds - 1)
    # for all pairs at once, by so few degrees of freedom, hardly any difference of three seeds would ever be told
    is_alone = arms > 2 and own > pooled
    return (max(alone, quantile) if is_alone else quantile) * math.sqrt(max(pooled, own) / seeds), is_alone


def _images_error(groups: Sequence[np.ndarray], level: float) -> float:
    """Return half the width of the interval of a difference of two arms, as far as the test images make it.

    Args:
        groups: Differences, means over the seeds, of the images of every class, (images,), if classes count the same;
            of all, if images do. To the variance of each group two images are added, half of one to each way in which
            two arms can be right or wrong, so that few images on which all agree are not taken for certainty (Agresti
            and Min 2005, Stat. Med. 24); the mean, which is the interval's middle, is that of the group's own images
            alone. Degrees of freedom of a sum over groups are Satterthwaite's.
    """
    variances, freedoms = [], []
    for group in groups:
        number = len(group) + 2
        variance = (float((group**2).sum()) + 1) / number - (float(group.sum()) / number) ** 2
        variances.append(variance / (len(group) * len(groups) ** 2))
        freedoms.append(number - 1)
    total = sum(variances)
    freedom = total**2 / sum(variance**2 / own for variance, own in zip(variances, freedoms))
    return student((1 + level) / 2, freedom) * math.sqrt(total)


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
    start: str,
    best: str,
    means: Dict[str, float],
    behind: Dict[str, Difference],
    alone: Sequence[str],
    num_seeds: int,
    num_images: int,
) -> str:
    order = sorted(behind, key=lambda name: -means[name])
    told = {name: f'{name} ({means[name]:.1f}%)' for name in means}
    if num_seeds < LEAST_SEEDS:
        first = [told[name] for name in [best, *order] if means[name] == means[best]]
        others = [told[name] for name in order if means[name] < means[best]]
        before = f', before {listed(others)}' if others else ''
        verb = 'are' if len(first) > 1 else 'is'
        says = 'one seed says nothing' if num_seeds == 1 else f'{num_seeds} seeds say too little'
        return (
            f'{start} {listed(first)} {verb} ahead{before}; but {says} about the chance of training, so that none is '
            'called better: give more seeds.'
        )
    better = [f'{told[name]} by {behind[name]}' for name in order if behind[name].is_told]
    alike = [f'{told[name]}: {behind[name]}' for name in order if not behind[name].is_told]
    parts = [f'is better than {listed(better, "; ")}'] if better else []
    parts += [f'can not be told apart from {listed(alike, "; ")}'] if alike else []
    pairs = math.comb(len(means), 2)
    held = f'are 95% intervals, for all {pairs} pairs at once' if pairs > 1 else 'is the 95% interval'
    if alone:
        names = listed([name for name in order if name in alone])
        each = f'those of {names}, each for one pair alone: these differences vary more by the seeds than others do'
        one = f'that of {names} for one pair alone: this difference varies more by the seeds than others do'
        held += f' ({each if len(alone) > 1 else one})'
    return (
        f'{start} {told[best]} {"; it ".join(parts)}. In brackets {held}, by the chance of {num_seeds} seeds and of '
        f'{num_images} images.'
    )


def listed(words: Sequence[str], between: str = ', ') -> str:
    """Return words as a list in a sentence: 'a, b and c'."""
    *others, last = words
    joined: List[str] = [between.join(others), last] if others else [last]
    return ' and '.join(joined)
