"""How long `timm-vitres compare` takes on a folder of 200 photographs of solar cells, and what it says of them.

    python benchmarks/small_compare.py --output small [--record]

The first 100 training images of both classes of elpv are written as a folder, as a user may have one; then the default
arms and seeds are compared, as by `timm-vitres compare small/photos --output small/answer --in-chans 1`.
--record appends a row to benchmarks/results/small_compare.csv. --again judges the comparison in the folder, which is
over, by today's formula; its time is that of the newest row. Data: see `image_sets.py`.
"""

import argparse
import shutil
import time
from collections import Counter
from pathlib import Path

import torch
from common import show_logs, write_row
from image_sets import SETS
from rows import read

from timm_vitres import FinetuneCfg, compare, recipe
from timm_vitres.training.plans import REPORT_NAME

SEEDS = (0, 1, 2)


def write_photos(folder: Path, each: int) -> None:
    """Write the first training images of each class as folder/<class>/*.png."""
    counts: Counter = Counter()
    for entry in SETS['elpv'](None, {}):
        if entry.part == 'train' and counts[entry.label] < each:
            counts[entry.label] += 1
            place = folder / entry.label / entry.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(entry.image, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, help='a new folder')
    parser.add_argument('--each', type=int, default=100, help='photographs of each class')
    parser.add_argument('--record', action='store_true', help='append a row to benchmarks/results')
    parser.add_argument('--again', action='store_true', help='judge the comparison in the folder, which is over, anew')
    args = parser.parse_args()
    show_logs()
    if args.again and not (args.output / 'answer' / REPORT_NAME).is_file():
        parser.error(f'again: {args.output} holds no comparison that is over.')
    if not args.again:
        args.output.mkdir(parents=True)  # a comparison that goes on would tell the time of its rest
        write_photos(args.output / 'photos', args.each)
    cfg = FinetuneCfg(
        **{**recipe('compare'), 'in_chans': 1}, data_dir=str(args.output / 'photos'), output=str(args.output / 'answer')
    )
    began = time.perf_counter()
    told = compare(cfg, seeds=SEEDS)
    row = dict(images=2 * args.each, seeds=len(SEEDS), threads=torch.get_num_threads())
    row['seconds'] = round(time.perf_counter() - began)
    if args.again:
        made = [old for old in read('small_compare') if all(old[key] == str(row[key]) for key in ('images', 'seeds'))]
        row.update({key: made[-1][key] for key in ('threads', 'seconds')})
    write_row('small_compare', {**row, 'sentence': told.sentence}, args.record)


if __name__ == '__main__':
    main()
