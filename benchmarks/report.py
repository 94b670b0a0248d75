"""Write the README's tables from the recorded rows; --check only compares.

    python benchmarks/report.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import argparse
import csv
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'


def read(name: str) -> list:
    """Return the rows of benchmarks/results/NAME.csv."""
    with (RESULTS / f'{name}.csv').open() as file:
        return list(csv.DictReader(file))


def spread(values: list, digits: int = 1) -> str:
    """Return mean and standard deviation, the latter where there is more than one value."""
    mean = f'{statistics.mean(values):.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f} ({len(values)} seeds)' if len(values) > 1 else f'{mean} (1)'


def table(header: list, rows: list) -> str:
    """Return a Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines)


def elpv() -> str:
    """The demo's figures."""
    rows = read('elpv')
    columns = ('balanced', 'top1', 'recall_functional', 'recall_defective')
    cells = [spread([float(row[column]) for row in rows]) for column in columns]
    return table(
        ['held-out cells', 'balanced accuracy (%)', 'accuracy (%)', 'functional found (%)', 'defective found (%)'],
        [[rows[0]['images'], *cells]],
    )


def nano_search() -> str:
    """Accuracy for training time of the candidates for vitresnet_nano, the best first."""
    accuracies = defaultdict(list)
    for row in read('nano_search_train'):
        accuracies[row['candidate']].append(float(row['val_top1']))
    rows = []
    for row in read('nano_search_time'):
        if row['candidate'] in accuracies:
            values = accuracies[row['candidate']]
            rows.append((-statistics.mean(values), row, values))
    return table(
        ['candidate', 'parameters', 'time of a training step', 'validation top-1 (%)'],
        [
            [f'`{row["candidate"]}`', f'{int(row["params"]) / 1e6:.2f}M', row['step_ratio'], spread(values, 2)]
            for _, row, values in sorted(rows, key=lambda item: item[0])
        ],
    )


def load() -> str:
    """Loading against timm's class: ratios of medians."""
    names = ('create_time_ratio', 'logits_time_ratio', 'create_memory_ratio', 'logits_memory_ratio')
    newest = {(row['model'], row['side']): row for row in read('load')}
    return table(
        ['model', '', 'time to a model', 'time to first logits', 'extra peak memory, model', '..., first logits'],
        [[f'`{model}`', side, *(row[name] for name in names)] for (model, side), row in newest.items()],
    )


def dual() -> str:
    """The parallel family against the code of its authors: ratios."""
    newest = {(row['model'], row['side'], row['batch']): row for row in read('dual')}
    rows = []
    for model, side in dict.fromkeys((model, side) for model, side, _ in newest):
        one, many = newest[model, side, '1'], newest[model, side, '16']
        cells = [one['time_ratio'], many['time_ratio'], one['memory_ratio'], many['memory_ratio']]
        rows.append([f'`{model}`', 'as it is' if side == 'ours' else side, *cells])
    return table(['model', '', 'time, batch 1', 'time, batch 16', 'memory, batch 1', 'memory, batch 16'], rows)


def dual_elpv() -> str:
    """One epoch with the losses of two heads."""
    names = {'sum': 'the sum of both heads', 'both': 'both heads, mean of two losses'}
    names.update(resnet="the ResNet's head alone", vit="the ViT's head alone")
    runs = defaultdict(list)
    for row in read('dual_elpv'):
        runs[row['head_loss']].append(row)
    return table(
        ['loss on', 'balanced accuracy (%)', 'accuracy (%)'],
        [
            [name, *(spread([float(row[column]) for row in runs[loss]]) for column in ('balanced', 'top1'))]
            for loss, name in names.items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    check = parser.parse_args().check
    for path in (ROOT / 'README.md', ROOT / 'benchmarks' / 'README.md'):
        text = path.read_text()
        new = re.sub(
            r'(<!-- table: (\w+) -->\n).*?(<!-- end -->)',
            lambda match: f'{match[1]}{globals()[match[2]]()}\n{match[3]}',
            text,
            flags=re.DOTALL,
        )
        if check and new != text:
            sys.exit(f'{path} is not what the rows say: run python benchmarks/report.py')
        path.write_text(new)


if __name__ == '__main__':
    main()
