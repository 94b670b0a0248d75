"""Time `import timm_vitres` against `import timm`, fresh processes in turn.

python benchmarks/import_time.py [--rounds 15]
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from common import append_row

CODE = 'import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15)
    args = parser.parse_args()
    seconds = {'timm': [], 'timm_vitres': []}
    for _ in range(args.rounds + 1):
        for name, values in seconds.items():
            command = [sys.executable, '-c', CODE.format(name)]
            values.append(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    timm, ours = (values[1:] for values in seconds.values())  # the first round fills the file cache
    append_row(
        Path(__file__).parent / 'results' / 'import_time.csv',
        dict(
            rounds=args.rounds,
            timm_ms=round(1000 * statistics.median(timm), 1),
            timm_vitres_ms=round(1000 * statistics.median(ours), 1),
            difference_ms=round(1000 * statistics.median(b - a for a, b in zip(timm, ours)), 1),
            ratio=round(statistics.median(b / a for a, b in zip(timm, ours)), 3),
        ),
    )


if __name__ == '__main__':
    main()
