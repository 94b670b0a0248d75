#!/usr/bin/env python
"""Recorded verdicts by today's formula of the seeds' part of an interval, from the rows alone.

    python benchmarks/rejudge.py --record

The answers on single images are not recorded, so that the images' part is what a recorded interval has beside the
seeds' part of the formula that it was made with: one quantile for all, whatever an arm varies of its own.
"""

import argparse
import math

import numpy as np
from claim import comparisons
from common import write_row

from timm_vitres.training.verdict import LEVEL, seeds_error, student

ASKED = ('set', 'models', 'cost', 'device', 'threads', 'seeds', 'measured', 'best', 'arm', 'points')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--record', action='store_true', help='append rows to benchmarks/results')
    record = parser.parse_args().record
    for name, arms, figures, behind in comparisons():
        level = 1 - (1 - LEVEL) / math.comb(len(arms), 2)
        scores = {arm: np.array(values) for arm, values in figures.items()}
        for arm, row in behind.items():
            differences = scores[row['best']] - scores[arm]
            new, is_alone = seeds_error([*scores.values()], differences, level)
            if not is_alone or row['date'] > '2026-11-29':
                continue
            freedom = len(differences) - 1  # of the pair; the quantile was that of all arms
            old = new * student((1 + level) / 2, (len(arms) - 1) * freedom) / student((1 + LEVEL) / 2, freedom)
            points, half = float(row['points']), float(row['high']) - float(row['points'])
            half = math.sqrt(max(half**2 - old**2, 0.0) + new**2)
            told = dict(low=f'{points - half:.2f}', high=f'{points + half:.2f}', is_told=points > half)
            print(f'{name}, {arm}: {row["low"]} to {row["high"]}, now {told["low"]} to {told["high"]}')
            write_row('ablation_verdict', {**{column: row[column] for column in ASKED}, **told}, record)


if __name__ == '__main__':
    main()
