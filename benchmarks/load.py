"""What it takes to load published weights: ours against timm's class, from the same file, in fresh processes.

    python benchmarks/load.py --record

The file is written as the Hub's client leaves it in its cache, with random weights, and both sides load it by name,
offline (Linux). `ours, first load` also hashes it; afterwards it is remembered. Rounds are interleaved; the figures are
medians. Memory is the process's peak resident set less what it had before the call; pages of a mapped file count as
soon as they are used. Every load finds the file in the operating system's cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List

import timm
from common import append_row

import timm_vitres  # noqa: F401  (registers the models)
from timm_vitres.weights.checksums import sha256
from timm_vitres.weights.files import write_safetensors

PAIRS = {
    'vitresnet_tiny.augreg_in21k_ft_in1k': 'vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k',
    'vitresnet_small.augreg_in21k_ft_in1k': 'vit_small_r26_s32_224.augreg_in21k_ft_in1k',
    'vitresnet_base.orig_in21k_ft_in1k_384': 'vit_base_r50_s16_384.orig_in21k_ft_in1k',
    'vitresnet_large.augreg_in21k_ft_in1k': 'vit_large_r50_s32_224.augreg_in21k_ft_in1k',
}
FIGURES = ('create_s', 'logits_s', 'create_mb', 'logits_mb')

PROCESS = """
import json, sys, time
import timm, timm_vitres, torch
x = torch.randn(1, 3, *timm.get_pretrained_cfg(sys.argv[1]).input_size[-2:])
def resident(which):  # in MB; getrusage's peak would be the parent's, where that was larger
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(which))
def peak():
    return resident('VmHWM')
before, start = resident('VmRSS'), time.perf_counter()
model = timm.create_model(sys.argv[1], pretrained=True, cache_dir=sys.argv[2]).eval()
created, memory = time.perf_counter(), peak()
with torch.inference_mode():
    model(x)
print(json.dumps([created - start, time.perf_counter() - start, memory - before, peak() - before]))
"""


def write_cache(cache: Path, theirs: str) -> None:
    """Write a model of random weights into a folder, as the Hub's client would."""
    repo = cache / f'models--timm--{theirs}'
    snapshot = repo / 'snapshots' / ('0' * 40)
    for folder in (repo / 'blobs', repo / 'refs', snapshot):
        folder.mkdir(parents=True)
    written = repo / 'weights'
    write_safetensors(timm.create_model(theirs).state_dict(), written)
    blob = written.rename(repo / 'blobs' / sha256(written))
    (snapshot / 'model.safetensors').symlink_to(blob)
    (repo / 'refs' / 'main').write_text('0' * 40)


def load(name: str, cache: Path, home: Path) -> Dict[str, float]:
    """Load a model in a fresh process and return `FIGURES`."""
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(home)}
    command = [sys.executable, '-c', PROCESS, name, str(cache)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(FIGURES, json.loads(result.stdout.splitlines()[-1])))


def main() -> None:
    """Measure, print, and record with --record."""
    parser = argparse.ArgumentParser(description='Measure loading against timm.')
    parser.add_argument('--models', nargs='+', default=list(PAIRS), choices=list(PAIRS), help='names of ours')
    parser.add_argument('--rounds', type=int, default=5, help='loads of each side')
    parser.add_argument('--record', action='store_true', help='append the rows to benchmarks/results/load.csv')
    args = parser.parse_args()
    for ours in args.models:
        with tempfile.TemporaryDirectory() as temporary:
            root, theirs = Path(temporary), PAIRS[ours]
            write_cache(root, theirs)
            sides: Dict[str, List[Dict[str, float]]] = {'timm': [], 'ours': [], 'ours, first load': []}
            load(ours, root, root / 'home')  # checked once; the file is in the operating system's cache
            for index in range(args.rounds):
                sides['timm'].append(load(theirs, root, root / 'home'))
                sides['ours'].append(load(ours, root, root / 'home'))
                sides['ours, first load'].append(load(ours, root, root / f'home{index}'))
                print(f'{ours}: round {index + 1} of {args.rounds}', file=sys.stderr)
        medians = {
            side: {figure: statistics.median(run[figure] for run in runs) for figure in FIGURES}
            for side, runs in sides.items()
        }
        for side in ('ours', 'ours, first load'):
            row = {'model': ours, 'side': side, 'rounds': args.rounds}
            for figure in FIGURES:
                row[f'{figure.rpartition("_")[0]}_{"memory" if figure.endswith("mb") else "time"}_ratio'] = round(
                    medians[side][figure] / medians['timm'][figure], 3
                )
            row.update({f'timm_{figure}': round(medians['timm'][figure], 3) for figure in FIGURES})
            row.update({f'own_{figure}': round(medians[side][figure], 3) for figure in FIGURES})
            print(json.dumps(row, indent=1))
            if args.record:
                append_row(Path(__file__).parent / 'results' / 'load.csv', row)


if __name__ == '__main__':
    main()
