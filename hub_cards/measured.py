"""What this project measured of a weight that it trained and ships: the text of its card, from rows.

hub_cards/<arch>.<tag>.json names the row of the run (`rows`: the table in benchmarks/results/; `row`: values that only
that row has); the row of benchmarks/results/shipped.csv with the file's sha256 says what was measured of the file.
"""

import csv
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple

from huggingface_hub import EvalResult

from timm_vitres.weights import shipped

RESULTS = Path(__file__).parents[1] / 'benchmarks' / 'results'


class Measured(NamedTuple):
    """Parts of a card."""

    evaluation: EvalResult
    result: str
    recipe: str
    layout: str  # how the weights are stored


def rows_of(name: str, column: str, value: str) -> List[Dict[str, str]]:
    """Return the rows of a table with this value in a column."""
    path = RESULTS / f'{name}.csv'
    if not path.is_file():
        return []
    with path.open(encoding='utf-8', newline='') as file:
        return [row for row in csv.DictReader(file) if row.get(column) == value]


def training_row(name: str, facts: Mapping[str, Any]) -> Dict[str, str]:
    """Return the row of the run that a weight comes from."""
    (first, value), *others = facts['row'].items()
    found = rows_of(facts['rows'], first, str(value))
    found = [row for row in found if all(row.get(column) == str(value) for column, value in others)]
    if len(found) != 1:
        sys.exit(
            f'{name}: {len(found)} rows of {facts["rows"]}.csv are as its facts say ({facts["row"]}), expected one.'
        )
    return found[0]


def shipped_row(name: str) -> Dict[str, str]:
    """Return the newest row of a weight's file, as it is now."""
    digest = shipped.shipped_sha256(Path(shipped.shipped(name)))
    found = [row for row in rows_of('shipped', 'sha256', digest) if row['name'] == name]
    if not found:
        sys.exit(f'{name}: no row of shipped.csv is of its file ({digest}); run benchmarks/ship.py with --record.')
    return found[-1]


def measured(name: str, facts: Mapping[str, Any]) -> Measured:
    """Return what a weight's card says of how it was trained, and how well it answers."""
    run, file = training_row(name, facts), shipped_row(name)
    if float(run['test_top1']) != float(file['run_top1']):
        sys.exit(
            f'{name}: its run has {run["test_top1"]}% in {facts["rows"]}.csv, but {file["run_top1"]}% in shipped.csv: '
            f'the file is of another run.'
        )
    images = f'{int(file["images"]):,} test images of {facts["dataset_name"]}'
    result = f'Measured by this project: {float(file["top1"]):.2f}% top-1 on the {images}, one view of each'
    if run.get('test_top1_tta'):
        result += f'; {float(run["test_top1_tta"]):.2f}% by the run, averaged over views (`--tta {facts["tta"]}`)'
    if run.get('test_balanced'):
        result += f'; balanced accuracy, the mean over the classes, {float(run["test_balanced"]):.2f}%'
    result += (
        f'. The file is what was measured; of its answers {file["changed"]} differ from those of the run, which has '
        f'{float(run["test_top1"]):.2f}%.'
    )
    versions = ', '.join(f'{package.replace("_", "-")} {run[package]}' for package in ('torch', 'timm', 'timm_vitres'))
    threads = f'{run["threads"]} thread{"s" * (run["threads"] != "1")}'
    note = f': {run["note"]}' if run.get('note') else ''
    command = run['command'].replace(' --record', '')  # with it, a row that is there is not made again
    recipe = (
        f'{facts["recipe"]}\n\n{run["epochs"]} epochs took {float(run["train_seconds"]) / 3600:.1f} hours with '
        f'{threads} on {run["machine"]}{note} ({versions}; {run["date"]}):\n\n    {command}\n\n'
        f'Data: [{facts["dataset_name"]}]({facts["dataset_url"]}), licence {facts["dataset_license"]}.'
    )
    evaluation = EvalResult(
        task_type='image-classification',
        dataset_type=facts['datasets'][0],
        dataset_name=facts['dataset_name'],
        dataset_split='test',
        metric_type='accuracy',
        metric_name='top-1 (%)',
        metric_value=float(file['top1']),
    )
    return Measured(evaluation, result, recipe, f', {int(file["bytes"]) / 1e6:.1f} MB, {file["stored"]}')
