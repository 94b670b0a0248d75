"""Recorded rows, and what tables make of them."""

import csv
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / 'results'


def is_there(name: str) -> bool:
    """Return whether there are rows of this name."""
    return (RESULTS / f'{name}.csv').is_file()


def read(name: str) -> list:
    """Return the rows of benchmarks/results/NAME.csv."""
    with (RESULTS / f'{name}.csv').open() as file:
        return list(csv.DictReader(file))


def newest(name: str, *columns: str) -> dict:
    """Return the last row for each combination of values of columns."""
    return {tuple(row[column] for column in columns): row for row in read(name)}


def runs(name: str, *columns: str) -> list:
    """Return the rows of a table of runs, of those that were made again the last one alone."""
    return list(newest(name, *columns).values())


def deviation(values: list, digits: int = 1) -> str:
    """Return mean and standard deviation, the latter where there is more than one value."""
    mean = f'{statistics.mean(values):.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def spread(values: list, digits: int = 1) -> str:
    """Return mean and standard deviation, and of how many values."""
    number = f'{len(values)} seeds' if len(values) > 1 else '1'
    return f'{deviation(values, digits)} ({number})'


def table(header: list, rows: list) -> str:
    """Return a Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines)
