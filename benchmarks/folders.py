"""Time how a run opens a folder of many images: what it waits for, and the check that goes on beside it.

python benchmarks/folders.py [--images 100000] [--classes 100] [--side 64] [--record]

The images are written into a temporary folder first, so that the file system's cache knows them: a folder on a network
takes longer.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from typing import List

import numpy as np
from common import write_row
from PIL import Image

from timm_vitres.training.datasets import load_data
from timm_vitres.training.settings import FinetuneCfg


def pictures(side: int, count: int = 50) -> List[bytes]:
    """Return JPEG files of smooth noise, as large as photographs of this size are."""
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        noise = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        noise.resize((side, side), Image.Resampling.BICUBIC).save(file, 'JPEG', quality=90)
        encoded.append(file.getvalue())
    return encoded


def write_images(root: Path, images: int, classes: int, side: int) -> None:
    encoded = pictures(side)
    for index in range(classes):
        (root / f'n{index:05d}').mkdir()
    for index in range(images):
        folder = f'n{index % classes:05d}'
        (root / folder / f'{folder}_{index // classes}.jpg').write_bytes(encoded[index % len(encoded)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=100_000)
    parser.add_argument('--classes', type=int, default=100)
    parser.add_argument('--side', type=int, default=64, help='height and width in pixels')
    parser.add_argument('--record', action='store_true', help='append the row to benchmarks/results/folders.csv')
    args = parser.parse_args()
    seconds = {}

    def timed(name, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        seconds[name] = round(time.perf_counter() - start, 2)
        return result

    with tempfile.TemporaryDirectory() as root:
        write_images(Path(root), args.images, args.classes, args.side)
        cfg = FinetuneCfg(data_dir=root)
        data = timed('open_s', load_data, cfg, 'RGB')
        text = timed('record_s', lambda: json.dumps(data.record()))
        again = timed('resume_s', load_data, cfg, 'RGB', json.loads(text))
        assert again.record() == data.record() and len(data.train) + len(data.val) == args.images
        if data.check is None:
            raise SystemExit(f'{args.images} images are all opened before a run; give more of them.')
        with data.check as check:
            timed('background_check_s', check.wait)
            check.raise_if_bad()
        timed('check_before_s', data.train.dataset.unreadable)
    row = dict(images=args.images, classes=args.classes, side=args.side, **seconds)
    write_row('folders', {**row, 'record_mb': round(len(text) / 1e6, 1)}, args.record)


if __name__ == '__main__':
    main()
