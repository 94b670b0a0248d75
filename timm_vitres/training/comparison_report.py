"""The files of a comparison: a row for every run, the answers to the test images, and at the end a table and a picture.

rows, answers, verdict -> folder/{results.csv, runs/*/test.csv, README.md, comparison.png}.
"""

import csv
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..measure import as_minutes, as_ms
from ..pictures import can_draw, plot_comparison
from ..walking import shown
from ..writing import replacing
from .held_out import Answers
from .plans import OWN, REPORT_NAME, Plan
from .runs import given_settings
from .settings import FinetuneCfg
from .verdict import Verdict, listed

RESULTS_NAME, ANSWERS_NAME = 'results.csv', 'test.csv'
PICTURE_NAME = 'comparison.png'
COLUMNS = (
    *('part', 'arm', 'lr', 'seed', 'epochs', 'state', 'best_epoch', 'val_top1', 'val_balanced', 'val_macro_f1'),
    *('val_loss', 'accuracy', 'balanced', 'seconds', 'parameters', 'step_ms', 'latency_ms'),
)
Row = Dict[str, str]


def read_rows(folder: Path) -> List[Row]:
    """Return the rows of the runs that are done; none where there is no file."""
    path = folder / RESULTS_NAME
    if not path.is_file():
        return []
    with path.open(newline='', encoding='utf-8') as file:
        rows = [dict(row) for row in csv.DictReader(file)]
    if any(set(row) != set(COLUMNS) or None in row.values() for row in rows):
        raise ValueError(f'output: {path} has other columns than a comparison writes; put it back as it was.')
    return rows


def write_rows(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the rows of all runs that are done."""
    with replacing(folder / RESULTS_NAME) as path, path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, COLUMNS, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def write_answers(folder: Path, answers: Answers, label_names: Sequence[str], names: Sequence[str]) -> None:
    """Write a run's answers to the test images: image, true class, predicted class, whether they are the same."""
    with replacing(folder / ANSWERS_NAME) as path, path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['image', 'class', 'predicted', 'right'])
        for index, true, found in zip(answers.indices, answers.labels, answers.predicted):
            name = shown(names[index]) if names else str(index)
            writer.writerow([name, label_names[true], label_names[found], int(true == found)])


def read_answers(folder: Path) -> Tuple[np.ndarray, np.ndarray]:
    """Return a run's answers to the test images: whether each is right, 1 or 0, and its true class, (N,) each."""
    with (folder / ANSWERS_NAME).open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    return np.array([int(row['right']) for row in rows]), np.array([row['class'] for row in rows])


def arm_figures(plan: Plan, rows: Mapping[str, Sequence[Any]], verdict: Optional[Verdict]) -> List[Dict[str, str]]:
    """Return the table of the arms: a dict for each, by the names of its columns."""
    figures = []
    for name, arm in plan.arms.items():
        own, lost = _ended_well(rows.get(name, ())), _lost(rows.get(name, ()))
        told = dict(arm=name, parameters=f'{arm.parameters:,}', epochs=str(arm.epochs))
        told['lr'] = own[0]['lr'] if own else ''
        for column, title in (('accuracy', 'accuracy (%)'), ('balanced', 'balanced (%)')):
            spread = _spread([float(row[column]) for row in own]) if own else 'diverged'
            told[title] = f'{spread}; {lost}' if own and lost else spread
        told['behind the best'] = ''
        if verdict is not None:
            told['behind the best'] = str(verdict.behind.get(name, 'best' if name == verdict.best else 'left out'))
        told['training'] = f'{statistics.mean(float(row["seconds"]) for row in own):.0f} s' if own else ''
        told['a step'], told['an image'] = as_ms(arm.step_seconds), as_ms(arm.latency_seconds)
        figures.append(told)
    return figures


def _ended_well(rows: Sequence[Any]) -> List[Any]:
    return [row for row in rows if row and not row['state']]


def _lost(rows: Sequence[Any]) -> str:
    """Return how many of an arm's runs diverged, '' where none did."""
    count = sum(bool(row and row['state']) for row in rows)
    return f'{count} of {len(rows)} seeds diverged' if count else ''


def _spread(values: Sequence[float]) -> str:
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}'


def table_lines(figures: Sequence[Mapping[str, str]]) -> List[str]:
    """Return a table as lines of Markdown, its columns as wide as they need."""
    names = list(figures[0])
    cells = [names, *([row[name] for name in names] for row in figures)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = [f'| {" | ".join(cell.ljust(width) for cell, width in zip(line, widths))} |' for line in cells]
    return [lines[0], f'|{"|".join("-" * (width + 2) for width in widths)}|', *lines[1:]]


def write_comparison(
    folder: Path,
    cfg: FinetuneCfg,
    plan: Plan,
    rows: Mapping[str, Sequence[Any]],
    figures: Sequence[Mapping[str, str]],
    sentence: str,
) -> None:
    """Write the picture, where matplotlib is installed, and the report, the last thing."""
    column = 'balanced' if cfg.eval_metric == 'balanced' else 'accuracy'
    scores = {name: [float(row[column]) for row in _ended_well(own)] for name, own in rows.items()}
    draws = can_draw() and any(scores.values())
    if draws:
        notes = {}
        for name, arm in plan.arms.items():
            facts = [f'{arm.parameters / 1e6:.3g}M', f'{as_ms(arm.step_seconds)} a step', _lost(rows.get(name, ()))]
            notes[name] = ', '.join(fact for fact in facts if fact)
        title = f'{column} on the test images (%)'
        plot_comparison({name: own for name, own in scores.items() if own}, notes, title, folder / PICTURE_NAME)
    else:
        (folder / PICTURE_NAME).unlink(missing_ok=True)
    lines = ['# A comparison', '', sentence, '', *table_lines(figures), '']
    lines += [f'![{column} of every run]({PICTURE_NAME})', ''] if draws else []
    lrs = {name: float(own[0]['lr']) for name, own in rows.items() if own and own[0]}
    lines += [_how(cfg, plan, lrs, rows), '']
    with replacing(folder / REPORT_NAME) as path:
        path.write_text('\n'.join(lines), encoding='utf-8')


def _sizes(plan: Plan) -> str:
    """Return the sentence that says of which size the arms' images are; nothing where it was not noted."""
    sizes = {name: ' x '.join(map(str, arm.input_size[1:])) for name, arm in plan.arms.items() if arm.input_size}
    if len(set(sizes.values())) > 1:
        told = listed([f'{name} {size}' for name, size in sizes.items()])
        return f' Images are not of one size ({told} pixels), nor are times of one image comparable.'
    return f' Images are of {next(iter(sizes.values()))} pixels.' if sizes else ''


def _judged(cfg: FinetuneCfg, plan: Plan, rows: Mapping[str, Sequence[Any]]) -> str:
    """Return the sentence that says which epochs the models are of."""
    told = []
    for name, own in rows.items():
        epochs = sorted(int(row['best_epoch']) + 1 for row in _ended_well(own) if row.get('best_epoch'))
        if epochs:
            first = f'{epochs[0]} to {epochs[-1]}' if epochs[0] < epochs[-1] else f'{epochs[0]}'
            told.append(f'{name} {first} of {plan.arms[name].epochs}')
    how = (
        f'Judged is the epoch of a run that was best, or the first of these, by {cfg.eval_metric} on validation images'
    )
    return f' {how} ({listed(told)}).' if told else ''


def _how(cfg: FinetuneCfg, plan: Plan, chosen: Mapping[str, float], rows: Mapping[str, Sequence[Any]]) -> str:
    """Return how the figures came about, in a few sentences; `chosen` has the learning rate of each arm."""
    minutes = plan.asked['minutes']
    cost = 'Every arm was trained for as many epochs.'
    if minutes is not None:
        cost = f'Every arm was trained for about {minutes:g} minutes of steps, by their measured time, in whole epochs'
        got = {name: as_minutes(arm.epochs * plan.batches * arm.step_seconds) for name, arm in plan.arms.items()}
        cost += f' ({listed([f"{name} {value}" for name, value in got.items()])}).' if plan.batches else '.'
        cost += ' Where the recipe counts epochs, it means those of the arm with the most; others have as large a part.'
    elsewhere = (*OWN, 'data_dir', 'output', 'epochs')
    given = [f'{name}={getattr(cfg, name)}' for name in given_settings(cfg) if name not in elsewhere]
    lrs = ', '.join(f'{lr:g}' for lr in plan.lrs)
    search = f'The learning rate is {lrs} for all.'
    if len(plan.lrs) > 1:
        search = (
            f'The learning rate of each arm is that of {lrs} which was best on validation images, with seed '
            f'{plan.seeds[0]} and a third of the epochs, or one; the chance of '
            'that choice is in no interval.'
        )
        ends = [name for name, lr in chosen.items() if f'{lr:g}' in (f'{min(plan.lrs):g}', f'{max(plan.lrs):g}')]
        if ends:
            search += f' A better one may lie beyond that of {listed(ends)}, which is the least or the largest of them.'
    versions = ', '.join(f'{name} {version}' for name, version in plan.versions.items())
    began = ', but what the weights that arms began with had seen before is not known' if cfg.pretrained else ''
    copies = '' if plan.images.get('copies_are_out', False) else ', unless as copies, for which nobody looked'
    pool = 'All runs learn from the same images'
    if plan.images['validation'] is None:
        pool += ', of which each seed holds others out for validation'
    return (
        f'{plan.images["description"]}. Each counts as independent of the others: where several show one thing, or are '
        'of one series, the intervals are too narrow, unless these are on one side, in folders of their own.'
        f'{_sizes(plan)} {cost}{_judged(cfg, plan, rows)} {search} No run was trained on test images{copies}, and '
        f'nothing was chosen by them{began}. {pool}, whose chance is in no interval. The figures of an arm over seeds '
        'are taken as normally distributed: that one run in many learns nothing, which few seeds may not meet, is in '
        f'no interval either. Seeds: {", ".join(map(str, plan.seeds))}; mean ± sample standard deviation. Times were '
        f'measured on {plan.machine}, in rounds in which the arms took turns: a training step of {cfg.batch_size} '
        f'images, and one image in evaluation. One recipe for all: {", ".join(given) or "the defaults"}. With '
        f'{versions}. Every run is in runs/, and a row of {RESULTS_NAME}.'
    )
