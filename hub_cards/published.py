"""What timm publishes of a weight and of its parents: the table of its card, from the rows of the README's.

What this project measured of their cost, if it did, is a paragraph of its own.
"""

from typing import Dict, List

import measured

COLUMNS = dict(top1='ImageNet', real='ReaL', v2='V2', r='R', a='A', sketch='Sketch')
RECIPES = {
    'same': '{kind}s of the same recipe',
    'AugReg': (
        '{kind}s of AugReg, too (the same data and schedule; augmentation and regularisation were chosen for each '
        'model)'
    ),
    'other': 'the nearest {kind}, of another recipe',
}


def rows_of(name: str, table: str = 'evidence_published') -> List[Dict[str, str]]:
    """Return the rows of a hybrid, its own first, then those of its parents; none where nothing is compared."""
    return measured.rows_of(table, 'hybrid', name)


def cost(name: str) -> str:
    """Return a paragraph with the measured time of a hybrid by each parent's, or '' where nothing was measured."""
    newest = {(row['parent'], row['path']): row for row in rows_of(name, 'evidence_cost')}
    if not newest:
        return ''
    told = ', '.join(
        f'{float(row["ratio"]):.2f} (folded {float(newest[parent, "folded"]["ratio"]):.2f}) of the time of '
        f'`{parent.partition(".")[0]}`'
        for (parent, path), row in newest.items()
        if path == 'eager'
    )
    row = list(newest.values())[-1]
    return (
        f'Measured by this project, one image of {row["img_size"]} pixels on a CPU, random weights: {told} '
        f'({row["machine"]}, threads: {row["threads"]}; torch {row["torch"]}, {row["date"]}).'
    )


def beside_parents(name: str) -> str:
    """Return a paragraph and a table of top-1 accuracy, or '' for a weight that is compared with nothing."""
    rows = rows_of(name)
    if not rows:
        return ''
    kind, first = rows[1]['role'], rows[0]
    repository, commit = first['source'].partition(':')[0].split('@')
    told = RECIPES[first['recipe']].format(kind=kind)
    files = f'https://github.com/{repository}/tree/{commit}/results'
    lines = [
        f'Beside {told}, at {first["img_size"]} pixels: top-1 (%) on ImageNet and its variants, by the files in '
        f'[timm/results]({files}) at the commit of {first["source_date"]}.',
        '',
        '| | parameters | GMACs | ' + ' | '.join(COLUMNS.values()) + ' |',
        '|' + '---|' * (len(COLUMNS) + 3),
    ]
    for row in rows:
        model = f'`{row["model"].partition(".")[0]}`'
        model = f'**this hybrid** ({model})' if row is first else model
        figures = [f'{float(row[column]):.1f}' if row[column] else '-' for column in COLUMNS]
        lines.append('| ' + ' | '.join([model, f'{float(row["params"]):.1f}M', row['gmacs'] or '-', *figures]) + ' |')
    return '\n'.join(lines) + (f'\n\n{told}' if (told := cost(name)) else '')
