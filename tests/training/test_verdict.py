import math

import numpy as np
import pytest

from timm_vitres.training.verdict import Difference, judge, listed, student


def draw(rng, arms=2, seeds=3, images=60, gain=0.0, by_image=1.0, by_seed=0.3):
    """Answers of arms that are equally good, but for the first, which is better by `gain`: {name: (seeds, images)}."""
    easy = rng.normal(1, 2, (1, 1, images)) + rng.normal(0, by_image, (arms, 1, images))
    scores = easy + rng.normal(0, by_seed, (arms, seeds, 1)) + rng.logistic(0, 1, (arms, seeds, images))
    scores[0] += gain
    return {f'arm {index}': (own > 0).astype(int) for index, own in enumerate(scores)}


@pytest.mark.parametrize(
    'probability, freedom, expected',  # of printed tables
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.3027),
        (0.995, 3, 5.8409),
        (0.95, 8, 1.8595),
        (0.975, 30, 2.0423),
        (0.975, 1e9, 1.96),
    ],
)
def test_quantiles_are_those_of_the_tables(probability, freedom, expected):
    assert student(probability, freedom) == pytest.approx(expected, rel=1e-4)


def test_two_arms_alike_on_all_images_have_the_interval_of_the_paired_t_test():
    """Where all images are one, only the seeds make a difference."""
    first, second = (np.repeat(np.array(values)[:, None], 100_000, 1) for values in ([1, 1, 0, 1], [0, 1, 0, 0]))
    found = judge({'a': first, 'b': second}).behind['b']
    differences = np.array([1, 0, 0, 1])
    half = 3.18245 * differences.std(ddof=1) / 2
    assert found.points == 50 and found.high - found.points == pytest.approx(100 * half, rel=1e-3)


def test_what_the_images_make_of_an_interval_is_the_formula_of_agresti_and_min():
    first, second = np.array([[1, 1, 1, 1, 0, 1, 0, 1, 1, 1]]), np.array([[1, 0, 1, 1, 0, 0, 1, 0, 1, 1]])
    found = judge({'a': np.tile(first, (3, 1)), 'b': np.tile(second, (3, 1))}).behind['b']  # seeds make no difference
    only_first, only_second, number = 3 + 0.5, 1 + 0.5, 10 + 2  # half an image is added to each of the four cells
    p, q = only_first / number, only_second / number
    half = student(0.975, number - 1) * math.sqrt((p + q - (p - q) ** 2) / 10)  # of the images that there are
    assert found.points == pytest.approx(20) and found.high - 20 == pytest.approx(100 * half)


def test_figures_are_means_and_spreads_over_the_seeds():
    answers = draw(np.random.default_rng(0))
    verdict = judge(answers)
    for name, array in answers.items():
        assert verdict.means[name] == pytest.approx(100 * array.mean())
        assert verdict.spreads[name] == pytest.approx(np.std([100 * row.mean() for row in array], ddof=1))
    assert verdict.best == max(answers, key=lambda name: answers[name].sum())


def test_where_each_class_counts_the_same_the_mean_is_that_of_the_recalls():
    right = np.array([[1, 1, 0, 1, 0, 1]])
    assert judge({'a': right, 'b': right}, np.array(list('aaaabb')), 'x').means['a'] == pytest.approx(62.5)


@pytest.mark.parametrize('rare', [1, 3, 10])
def test_balanced_accuracy_knows_how_few_images_a_class_has(rare):
    """Both arms get 85% of the classes' images right, 90% of one class and 80% of the other, each another one."""
    rng, runs = np.random.default_rng(5), 200
    classes = np.array(['often'] * 300 + ['rare'] * rare)
    truth = {name: np.where(classes == 'often', p, q) for name, p, q in (('a', 0.9, 0.8), ('b', 0.8, 0.9))}
    wrong = 0
    for _ in range(runs):
        verdict = judge({name: np.tile(rng.random(len(p)) < p, (3, 1)) for name, p in truth.items()}, classes, 'x')
        wrong += any(found.is_told for found in verdict.behind.values())
    assert wrong <= 0.05 * runs + 2 * math.sqrt(0.05 * 0.95 * runs)


@pytest.mark.parametrize('each', [1, 2])
def test_balanced_accuracy_of_many_small_classes(each):
    """Two arms get 70% of a hundred classes' images right, by each seed the same ones."""
    rng, runs, classes = np.random.default_rng(7), 300, np.repeat(np.arange(100), each)
    wrong = 0
    for _ in range(runs):
        answers = {name: np.tile(rng.random(len(classes)) < 0.7, (3, 1)) for name in 'ab'}
        wrong += any(found.is_told for found in judge(answers, classes, 'x').behind.values())
    assert wrong <= 0.1 * runs  # 8% of single images, whose chance is known worst


def test_an_arm_that_varies_more_borrows_no_certainty_of_the_others():
    rng = np.random.default_rng(6)
    steady = {f'arm {index}': rng.random((3, 4000)) < 0.7 for index in range(4)}
    scores = np.array([0.76, 0.9, 0.98])  # their spread is eleven points, that of the others one
    restless = rng.random((3, 4000)) < scores[:, None]
    verdict = judge({**steady, 'restless': restless})
    found = verdict.behind['arm 0']
    assert 'pairs at once (those of ' in verdict.sentence and ', each for one pair alone: ' in verdict.sentence
    own = (restless.mean(1) - steady['arm 0'].mean(1)).var(ddof=1)
    assert found.high - found.points >= 100 * student(0.975, 2) * math.sqrt(own / 3) > 0


@pytest.mark.parametrize('seeds', [3, 4, 5, 8])
def test_pairs_that_vary_more_are_named_with_any_number_of_seeds(seeds):
    """The best arm is the restless one: the steady ones are not said to vary."""
    steady = {name: np.tile(np.arange(1000) < 500 + place, (seeds, 1)) for place, name in enumerate('abc')}
    scores = np.linspace(0.7, 0.9, seeds)
    verdict = judge({**steady, 'restless': np.arange(1000) < 1000 * scores[:, None]})
    assert verdict.best == 'restless'
    assert verdict.sentence.endswith(
        f'In brackets are 95% intervals, for all 6 pairs at once (those of c, b and a, each for one pair alone: these '
        f'differences vary more by the seeds than others do), by the chance of {seeds} seeds and of 1000 images.'
    )
    half = verdict.behind['a'].high - verdict.behind['a'].points
    assert half >= 100 * student(0.975, seeds - 1) * scores.std(ddof=1) / math.sqrt(seeds)


@pytest.mark.parametrize('seeds', [3, 6])
def test_of_two_arms_there_is_no_other_pair(seeds):
    rng = np.random.default_rng(8)
    for _ in range(50):
        verdict = judge({name: rng.random((seeds, 30)) < 0.7 for name in 'ab'})
        assert 'for one pair alone' not in verdict.sentence


def test_an_interval_without_0_is_not_printed_with_it():
    assert str(Difference(0.12, 0.04, 0.2)) == '0.12 points (0.04 to 0.20)'
    assert str(Difference(-0.1, -0.2, -0.004)) == '-0.100 points (-0.200 to -0.004)'
    assert str(Difference(0.12, -0.04, 0.28)) == '0.1 points (-0.0 to 0.3)'


@pytest.mark.parametrize('images', [2, 50, 5000])
@pytest.mark.parametrize('share', [0, 0.5, 1])
def test_identical_arms_are_never_told_apart(images, share):
    right = np.tile(np.arange(images) < share * images, (3, 1)).astype(int)
    verdict = judge({'a': right, 'b': right, 'c': right})
    assert not any(found.is_told for found in verdict.behind.values())
    assert 'a' in verdict.sentence and 'can not be told apart from b' in verdict.sentence
    assert 'better' not in verdict.sentence


def test_a_clear_difference_is_told():
    rng = np.random.default_rng(1)
    verdict = judge(draw(rng, arms=3, images=400, gain=4))
    assert verdict.best == 'arm 0' and all(found.is_told and found.low > 0 for found in verdict.behind.values())
    assert verdict.sentence.startswith('By accuracy on these 400 test images arm 0 (')
    assert 'is better than arm ' in verdict.sentence and 'told apart' not in verdict.sentence
    assert 'are 95% intervals, for all 3 pairs at once' in verdict.sentence
    assert verdict.sentence.endswith(', by the chance of 3 seeds and of 400 images.')


@pytest.mark.parametrize(
    'seeds, images, by_image, by_seed', [(4, 50, 1, 1), (3, 300, 0, 0.3), (3, 300, 2, 0), (5, 40, 1, 0.1)]
)
@pytest.mark.parametrize('arms', [2, 5])
def test_arms_that_are_equally_good_are_seldom_told_apart(arms, seeds, images, by_image, by_seed):
    rng, runs = np.random.default_rng(2), 150
    verdicts = [judge(draw(rng, arms, seeds, images, 0, by_image, by_seed)) for _ in range(runs)]
    wrong = sum(any(found.is_told for found in verdict.behind.values()) for verdict in verdicts)
    assert wrong <= 0.05 * runs + 2 * math.sqrt(0.05 * 0.95 * runs)


def test_the_interval_holds_the_true_difference():
    rng, inside = np.random.default_rng(3), 0
    truth = [array.mean() for array in draw(rng, 2, 2000, 2000, gain=2).values()]
    for _ in range(200):
        verdict = judge(draw(rng, 2, 3, 80, gain=2))
        found = verdict.behind['arm 1' if verdict.best == 'arm 0' else 'arm 0']
        sign = 1 if verdict.best == 'arm 0' else -1
        inside += found.low <= 100 * sign * (truth[0] - truth[1]) <= found.high
    assert inside >= 0.93 * 200


def test_of_one_seed_nothing_is_concluded():
    right, wrong = np.ones((1, 300)), np.zeros((1, 300))
    verdict = judge({'a': wrong, 'b': right, 'c': right})
    assert verdict.behind['a'] == (100, -math.inf, math.inf) and verdict.spreads['a'] is None
    assert str(verdict.behind['a']) == '100.0 points' and not verdict.behind['a'].is_told
    assert verdict.sentence == (
        'By accuracy on these 300 test images b (100.0%) and c (100.0%) are ahead, before a (0.0%); but one seed says '
        'nothing about the chance of training, so that none is called better: give more seeds.'
    )


def test_of_two_seeds_that_agree_by_chance_nothing_is_concluded():
    """Two models that answer one class alone, each the same twice."""
    first = np.repeat([1, 0], [70, 30])
    verdict = judge({'a': np.tile(first, (2, 1)), 'b': np.tile(1 - first, (2, 1))})
    assert not verdict.behind['b'].is_told
    assert verdict.sentence == (
        'By accuracy on these 100 test images a (70.0%) is ahead, before b (30.0%); but 2 seeds say too little about '
        'the chance of training, so that none is called better: give more seeds.'
    )


def test_the_sentence_of_two_arms():
    rng = np.random.default_rng(4)
    verdict = judge(draw(rng, images=50), measured='balanced accuracy')
    found = next(iter(verdict.behind.values()))
    assert found == Difference(*found) and str(found) in verdict.sentence
    assert verdict.sentence.startswith('By balanced accuracy on these 50 test images ')
    assert verdict.sentence.endswith('In brackets is the 95% interval, by the chance of 3 seeds and of 50 images.')


@pytest.mark.parametrize('shapes', [[(2, 5)], [(2, 5), (3, 5)], [(2, 5), (2, 6)], [(2, 1), (2, 1)], []], ids=str)
def test_what_can_not_be_compared_is_named(shapes):
    with pytest.raises(ValueError, match=r'^correct: got .* expected two or more arms'):
        judge({str(index): np.ones(shape) for index, shape in enumerate(shapes)})


def test_words_are_listed():
    assert [listed(list(words)) for words in ('a', 'ab', 'abc')] == ['a', 'a and b', 'a, b and c']
