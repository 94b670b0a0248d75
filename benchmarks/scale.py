"""What fine-tuning costs with more processes, gradient checkpointing, averaged weights, sharded weights.

    python benchmarks/scale.py --record

`timm-vitres finetune` trains a model on generated images of noise, on CPU, each variant in fresh processes (torchrun
where there are two, which share the cores), in interleaved rounds. Images a second are those of the epochs after the
first, validation left out of the count but not of the time; memory is the most that a process held (ru_maxrss), of two
processes that of the larger one. A row for each variant in benchmarks/results/scale.csv, with ratios to one process.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import write_row
from PIL import Image

from timm_vitres.training.report import read_summary
from timm_vitres.training.settings import FinetuneCfg

VARIANTS = {
    '1 process': (1, {}),
    '1 process, averaged weights': (1, dict(model_ema=True)),
    '1 process, gradient checkpointing': (1, dict(grad_checkpointing=True)),
    '1 process, steps of 2 batches': (1, dict(grad_accum_steps=2)),
    '2 processes': (2, {}),
    '2 processes, averaged weights': (2, dict(model_ema=True)),
    '2 processes, gradient checkpointing': (2, dict(grad_checkpointing=True)),
    '2 processes, sharded weights': (2, dict(fsdp=True)),
}


def write_images(root: Path, count: int, size: int) -> Path:
    """Write two classes of `count` images of noise, a twentieth of them for validation."""
    generator = np.random.default_rng(0)
    for split, number in (('train', count), ('val', max(count // 20, 2))):
        for name in ('a', 'b'):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{index}.png')
    return root


def child(settings: dict, memory: Path) -> None:
    """Fine-tune, and write how much memory this process has held."""
    import torch

    from timm_vitres.training.loop import finetune

    torch.set_num_threads(settings.pop('threads'))
    finetune(FinetuneCfg(**settings))
    rank = os.environ.get('RANK', '0')
    (memory / f'{rank}.txt').write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def measure(args: argparse.Namespace, images: Path, processes: int, settings: dict) -> tuple:
    """Return images a second and MiB of one run in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        output, memory = Path(folder) / 'run', Path(folder) / 'memory'
        memory.mkdir()
        steps = settings.get('grad_accum_steps', 1)
        cfg = dict(
            data_dir=str(images),
            model=args.model,
            img_size=args.img_size,
            epochs=args.epochs,
            batch_size=args.batch_size // processes // steps,
            workers=0,
            device='cpu',
            output=str(output),
            threads=os.cpu_count() // processes,
            **settings,
        )
        launch = ['-m', 'torch.distributed.run', '--nproc-per-node', str(processes)] if processes > 1 else []
        command = [sys.executable, *launch, __file__, '--child', json.dumps(cfg), str(memory)]
        env = dict(os.environ, OMP_NUM_THREADS=str(os.cpu_count() // processes))
        subprocess.run(command, check=True, env=env, stderr=subprocess.DEVNULL)
        seconds = [row['seconds'] for row in read_summary(output)][1:]
        trained = len(seconds) * (2 * args.images // args.batch_size * args.batch_size)
        return trained / sum(seconds), max(float(path.read_text()) for path in memory.iterdir())


def main() -> None:
    """Measure, and record with --record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='vitresnet_tiny')
    parser.add_argument('--img-size', type=int, default=96)
    parser.add_argument('--batch-size', type=int, default=64, help='images a step, of all processes')
    parser.add_argument('--images', type=int, default=128, help='of each of two classes')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--record', action='store_true')
    parser.add_argument('--child', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child[0]), Path(args.child[1]))
    found = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / 'images', args.images, args.img_size)
        for _ in range(args.rounds):
            for name, (processes, settings) in VARIANTS.items():
                found[name].append(measure(args, images, processes, settings))
    rates = {name: statistics.median(rate for rate, _ in values) for name, values in found.items()}
    memory = {name: statistics.median(held for _, held in values) for name, values in found.items()}
    first = next(iter(VARIANTS))
    for name in VARIANTS:
        row = dict(model=args.model, img_size=args.img_size, batch_size=args.batch_size, variant=name)
        row.update(images_per_second=round(rates[name], 1), ratio=round(rates[name] / rates[first], 3))
        row.update(peak_mib=round(memory[name]), peak_ratio=round(memory[name] / memory[first], 3), rounds=args.rounds)
        write_row('scale', row, args.record)
    return None


if __name__ == '__main__':
    main()
