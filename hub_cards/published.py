"""What timm publishes of a weight and of its parents: the table of its card, from the rows of the README's."""

import csv
from typing import Dict, List

from measured import RESULTS

COLUMNS = dict(top1='ImageNet', real='ReaL', v2='V2', r='R', a='A', sketch='Sketch')


def rows_of(name: str) -> List[Dict[str, str]]:
    """Return the rows of a hybrid, its own first, then those of its parents; none where nothing is compared."""
    with (RESULTS / 'evidence_published.csv').open(encoding='utf-8', newline='') as file:
        return [row for row in csv.DictReader(file) if row['hybrid'] == name]


def beside_parents(name: str) -> str:
    """Return a paragraph and a table of top-1 accuracy, or '' for a weight that is compared with nothing."""
    rows = rows_of(name)
    if not rows:
        return ''
    kind, first = rows[1]['role'], rows[0]
    repository, commit = first['source'].partition(':')[0].split('@')
    told = f'{kind}s of the same recipe' if first['same_recipe'] == 'True' else f'the nearest {kind}, of another recipe'
    lines = [
        f'Beside {told}, at {first["img_size"]} pixels: top-1 (%) on ImageNet and its variants, by the files in '
        f'[timm/results](https://github.com/{repository}/tree/{commit}/results) of {first["source_date"]}.',
        '',
        '| | parameters | ' + ' | '.join(COLUMNS.values()) + ' |',
        '|' + '---|' * (len(COLUMNS) + 2),
    ]
    for row in rows:
        model = f'`{row["model"].partition(".")[0]}`'
        model = f'**this hybrid** ({model})' if row is first else model
        figures = [f'{float(row[column]):.1f}' if row[column] else '-' for column in COLUMNS]
        lines.append('| ' + ' | '.join([model, f'{float(row["params"]):.1f}M', *figures]) + ' |')
    return '\n'.join(lines)
