#!/usr/bin/env python
"""Recorded verdicts by today's formula of the seeds' part of an interval, from the rows alone.

    python benchmarks/rejudge.py --record

The answers on single images are not recorded, so that the images' part is what a recorded interval has beside the
seeds' part of the formula that it was made with: one quantile for all, whatever an arm varies of its own.
"""

import argparse
import math

import numpy as np
from ablation import record_once
from claim import comparisons

from timm_vitres.training.verdict import LEVEL, seeds_error, student

ASKED = ('set', 'models', 'cost', 'device', 'threads', 'seeds', 'measured', 'best', 'arm', 'points')


def before(scores: list, differences: np.ndarray, level: float) -> float:
    """Return half the width that the seeds made of an interval until 2026-11-29."""
    rows = np.stack(scores)
    freedom = (rows.shape[0] - 1) * (rows.shape[1] - 1)
    rest = rows - rows.mean(0) - rows.mean(1, keepdims=True) + rows.mean()
    variance = max(2 * float((rest**2).sum()) / freedom, float(differences.var(ddof=1)))
    return student((1 + level) / 2, freedom) * math.sqrt(variance / rows.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--record', action='store_true', help='append rows to benchmarks/results')
    record = parser.parse_args().record
    for name, arms, figures, behind in comparisons():
        level = 1 - (1 - LEVEL) / math.comb(len(arms), 2)
        scores = {arm: np.array(values) for arm, values in figures.items()}
        for arm, row in behind.items():
            differences = scores[row['best']] - scores[arm]
            old = before([*scores.values()], differences, level)
            new, _ = seeds_error([*scores.values()], differences, level)
            points, half = float(row['points']), float(row['high']) - float(row['points'])
            if new <= old + 1e-9 or row['date'] > '2026-11-29':
                continue
            half = math.sqrt(max(half**2 - old**2, 0.0) + new**2)
            told = dict(low=f'{points - half:.2f}', high=f'{points + half:.2f}', is_told=points > half)
            print(f'{name}, {arm}: {row["low"]} to {row["high"]}, now {told["low"]} to {told["high"]}')
            record_once('ablation_verdict', {**{column: row[column] for column in ASKED}, **told}, record)


if __name__ == '__main__':
    main()
