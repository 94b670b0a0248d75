"""Tables about the claim that hybrids are better than their parents: published, and measured by this project."""

import math
import re
import statistics
from collections import defaultdict

import numpy as np
from rows import deviation, is_there, newest, read, runs, spread, table

from timm_vitres.training.verdict import LEAST_SEEDS, LEVEL, seeds_error

# what the table of Fashion-MNIST says of a run's settings; the rows have all of them
BEGINNINGS = {
    'pretrained=True': 'from the shipped weights',
    'deeper': 'from the shipped weights, with three blocks more',
    'pretrained_path=fmnist/wide-epochs=40': 'from the weights of `wide`',
    'kd_model_name=local-dir:fmnist/resnet': 'distilled from `resnet`',
    'pretrained_path=fmnist/distilled': 'from the weights of the row above',
    'mean=fmnist/distilled+fmnist/distilled2': 'the mean weights of the two rows above',
    'initial_checkpoint=': 'from the weights of a smaller run, with further blocks',
    'pretrained_path=fmnist/large-from-wide-mean': 'from the weights of the row above, with two blocks more',
    'kd_model_name=average ': 'distilled from it and `resnet`',
    'kd_model_name=average_': 'distilled from the mean of several runs',
}
ROBUSTNESS = dict(top1='ImageNet', real='ReaL', v2='V2', r='R', a='A', sketch='Sketch')  # timm's results files


def with_parents() -> list:
    """Return the published rows of each hybrid, its own first, and the cost that was measured, if it was, by parent."""
    groups: dict = defaultdict(list)
    for row in read('evidence_published'):
        groups[row['hybrid']].append(row)
    costs = newest('evidence_cost', 'hybrid', 'parent', 'path') if is_there('evidence_cost') else {}

    def times(hybrid: str, parent: str) -> str:
        eager, folded = (costs.get((hybrid, parent, path)) for path in ('eager', 'folded'))
        return f'{float(eager["ratio"]):.2f} ({float(folded["ratio"]):.2f})' if eager and folded else '-'

    return [
        (rows[0], rows[1:], {row['model']: times(hybrid, row['model']) for row in rows[1:]})
        for hybrid, rows in groups.items()
    ]


def figure(row: dict, column: str) -> str:
    return f'{float(row[column]):.1f}' if row[column] else '-'


def against(own: dict, parent: dict, column: str, form: str) -> str:
    """Return how much more a hybrid has than a parent, or (without a sign in the form) how many times as much."""
    if not (own[column] and parent[column]):
        return '-'
    one, other = float(own[column]), float(parent[column])
    return format(one - other if '+' in form else one / other, form)


def evidence() -> str:
    """What timm publishes of hybrids and their parents, and the hybrids' time on a CPU by their parents'."""
    lines = []
    for own, parents, times in with_parents():
        for row in (own, *parents):
            figures = {name: figure(row, name) for name in ROBUSTNESS}
            name, time = f'{row["role"]} `{row["model"]}`', times.get(row['model'], '')
            if row is own:
                name = f'**`{own["hybrid"]}`**'
                for key in figures:
                    if all(own[key] and other[key] and float(own[key]) > float(other[key]) for other in parents):
                        figures[key] = f'**{figures[key]}**'
            costs = (row['gmacs'] or '-', figure(row, 'cpu_ms'))
            lines.append([name, f'{float(row["params"]):.1f}M', row['img_size'], *figures.values(), *costs, time])
    costs = ('GMACs', 'ms, published', "the hybrid's time by it (folded), ours")
    return table(['', 'parameters', 'pixels', *ROBUSTNESS.values(), *costs], lines)


def differences() -> str:
    """How much better the published hybrids are than their parents, in points of top-1, and at which cost."""
    names = {key: title for key, title in ROBUSTNESS.items() if key != 'real'}
    lines = [
        [
            f'`{own["hybrid"]}`' if parent is parents[0] else '',
            f'`{parent["model"].partition(".")[0]}`' + (' *' if own['recipe'] == 'other' else ''),
            *(against(own, parent, name, '+.1f') for name in names),
            *(against(own, parent, name, '.2f') for name in ('params', 'gmacs', 'cpu_ms')),
            times[parent['model']],
        ]
        for own, parents, times in with_parents()
        for parent in parents
    ]
    costs = ('parameters', 'multiply-adds', 'time, published', 'time, ours (folded)')
    return table(['hybrid', 'against', *names.values(), *costs], lines)


def fmnist() -> str:
    """Fashion-MNIST by one recipe: hybrids and their parents, on the test images."""
    groups = defaultdict(list)
    for row in runs('fmnist', 'arm', 'changes', 'epochs', 'seed'):
        groups[row['arm'], row['changes'], row['epochs']].append(row)
    lines = []
    for (arm, changes, epochs), rows in groups.items():
        others = ', '.join(words for key, words in BEGINNINGS.items() if key in changes or key == arm)
        columns = (spread([float(row[column]) for row in rows], 2) for column in ('test_top1', 'test_top1_tta'))
        hours = statistics.mean(float(row['train_seconds']) for row in rows) / 3600
        threads = '1, then 2' if re.search('one thread(, then two|; then)', rows[0]['note']) else rows[0]['threads']
        lines.append(
            [
                f'{arm}, `{rows[0]["model"]}`' + (f', {others}' if others else ''),
                f'{int(rows[0]["params"]) / 1e6:.2f}M',
                epochs,
                *columns,
                f'{hours:.1f} h, {threads} thread{"s" * (threads != "1")}' if hours else 'none',
            ]
        )
    return table(['arm', 'parameters', 'epochs', 'test top-1 (%)', 'with six views of an image', 'training'], lines)


def comparisons() -> list:
    """Return of each comparison: its name; by arm the rows and their figures; and by arm how far it is behind."""
    groups: dict = defaultdict(lambda: defaultdict(list))
    asked = ('set', 'models', 'cost', 'device', 'threads')
    for row in read('ablation'):
        groups[tuple(row[column] for column in asked)][row['arm']].append(row)
    for arms in groups.values():
        for arm, rows in arms.items():  # a seed that was trained again is no further seed
            arms[arm] = list({row['seed']: row for row in rows}.values())
    verdicts: dict = defaultdict(list)
    for row in read('ablation_verdict'):
        verdicts[tuple(row[column] for column in asked)].append(row)
    found = []
    for key, arms in groups.items():
        last = verdicts[key][-1]  # with more seeds, another arm may have become the best
        behind = {row['arm']: row for row in verdicts[key] if row['best'] == last['best']}
        measured = last['measured']
        column, title = ('balanced', 'balanced accuracy') if measured == 'balanced' else ('accuracy', 'accuracy')
        # a run that diverged has no accuracy, and an arm of such a run no verdict
        whole = {arm: rows for arm, rows in arms.items() if all(row[column] for row in rows)}
        figures = {arm: [float(row[column]) for row in rows] for arm, rows in whole.items()}
        found.append((f'`{key[0]}`, {key[2]}, {title}', arms, figures, behind))
    return found


def _interval(found: dict) -> str:
    known = f' ({found["low"]} to {found["high"]})' if found['high'] != 'inf' else ''
    return found['points'] + known


def _is_alone(figures: dict, best: str, arm: str) -> bool:
    """Return whether the interval of an arm is one for its pair alone; see `seeds_error`."""
    scores = {name: np.array(values) for name, values in figures.items()}
    if len(scores[best]) < LEAST_SEEDS:
        return False
    return seeds_error(list(scores.values()), scores[best] - scores[arm], LEVEL)[1]


def _place(figures: dict, arm: str) -> float:
    return -statistics.mean(figures[arm]) if arm in figures else math.inf


def ablation() -> str:
    """Hybrids and their parents on the image sets, of equal parameters and equal time or epochs, the best first."""
    lines = []
    for name, arms, figures, behind in comparisons():
        fastest, soonest = (
            min(float(rows[0][column]) for rows in arms.values()) for column in ('step_ms', 'latency_ms')
        )
        for place, arm in enumerate(sorted(arms, key=lambda arm: _place(figures, arm))):
            rows, found = arms[arm], behind.get(arm) if arm in figures else None
            told, interval = '', 'left out' if arm not in figures else 'best'
            if found is not None:
                told, interval = 'yes' if found['is_told'] == 'True' else 'no', _interval(found)
                told += ' †' if _is_alone(figures, found['best'], arm) else ''
            lines.append(
                [
                    '' if place else name,
                    arm,
                    spread(figures[arm], 2) if arm in figures else 'diverged',
                    interval,
                    told,
                    f'{int(rows[0]["parameters"]) / 1e6:.2f}M',
                    rows[0]['epochs'],
                    f'{statistics.mean(float(row["seconds"]) for row in rows) / 60:.1f}',
                    f'{float(rows[0]["step_ms"]) / fastest:.2f}',
                    f'{float(rows[0]["latency_ms"]) / soonest:.2f}',
                ]
            )
    costs = ('parameters', 'epochs', 'minutes of a run', 'time of a step, by the fastest', 'of one image')
    return table(['set', 'arm', 'test images (%)', 'behind the best (interval)', 'told apart', *costs], lines)


def arms() -> str:
    """Each comparison in a line: the best arm, and those that can not be told apart from it, in bold."""
    found = comparisons()
    names = list(dict.fromkeys(arm for _, rows, _, _ in found for arm in rows))
    lines = []
    for name, rows, figures, behind in found:
        told = {arm for arm, row in behind.items() if row['is_told'] == 'True'}
        cells = dict.fromkeys(rows, 'diverged')
        for arm, values in figures.items():
            alone = ' †' if arm in behind and _is_alone(figures, behind[arm]['best'], arm) else ''
            cells[arm] = f'{deviation(values)}{alone}' if arm in told else f'**{deviation(values)}**{alone}'
        seeds = max(map(len, figures.values()))
        lines.append([f'{name}, {seeds} seeds', *(cells.get(arm, '-') for arm in names)])
    return table(['set', *names], lines)


def small_compare() -> str:
    """What `compare` says of 200 photographs, and how long that takes: the newest row."""
    row = read('small_compare')[-1]
    cells = [row['images'], row['seeds'], f'{float(row["seconds"]) / 60:.1f}', row['threads'], row['sentence']]
    return table(['photographs', 'seeds', 'minutes', 'threads', 'what it says'], [cells])


def fractals() -> str:
    """Fine-tuning from weights that learnt fractals, from others, and what the former gain, for each pair alone."""
    groups: dict = defaultdict(list)
    for row in runs('fractals', 'set', 'model', 'changes', 'arm', 'pretraining', 'seed'):
        groups[row['set'], row['model'], row['changes'], row['arm'], row['pretraining']].append(row)
    key = ('set', 'model', 'changes')
    verdicts: dict = defaultdict(list)
    if is_there('fractals_verdict'):
        for row in newest('fractals_verdict', *key, 'pretraining', 'against', 'against_pretraining').values():
            verdicts[tuple(row[column] for column in (*key, 'arm', 'pretraining'))].append(row)
    lines = []
    for (name, model, changes, arm, pretraining), found in groups.items():
        columns = (spread([float(row[column]) for row in found], 2) for column in ('test_top1', 'test_balanced'))
        gains = [
            f'{row["gain"]} ({row["low"]} to {row["high"]}) over {row["against"]}'
            for row in verdicts[name, model, changes, arm, pretraining]
            if sorted(row['seeds'].split()) == sorted(one['seed'] for one in found)  # else it is of other runs
        ]
        start = f'{arm}: {pretraining}' if pretraining else arm
        lines.append([f'`{name}`', f'`{model}`', changes, start, *columns, '; '.join(gains)])
    columns = ('accuracy (%)', 'balanced (%)', 'gain, balanced (95% interval)')
    return table(['set', 'model', 'settings', 'start', *columns], lines)


def scratch() -> str:
    """Our small models on the folder sets."""
    groups = defaultdict(list)
    for row in runs('scratch', 'set', 'model', 'changes', 'epochs', 'seed'):
        groups[row['set'], row['model'], row['changes'], row['epochs']].append(row)
    columns = ('test_top1', 'test_balanced', 'test_top1_tta', 'test_balanced_tta')
    lines = []
    for (name, model, changes, epochs), rows in groups.items():
        figures = (spread([float(row[column]) for row in rows], 1) for column in columns)
        hours = statistics.mean(float(row['train_seconds']) for row in rows) / 3600
        lines.append(
            [f'`{name}`', f'`{model}`' + (f', {changes}' if changes else ''), epochs, *figures, f'{hours:.1f} h']
        )
    views = ('accuracy (%)', 'balanced (%)', 'mirrored too: accuracy', 'balanced')
    return table(['set', 'model', 'epochs', *views, 'training'], lines)
