"""What is published of the hybrids that we load and of their parents, and what either costs on a CPU.

    python benchmarks/evidence.py published --timm FOLDER    # a checkout of timm's repository, or its git directory
    python benchmarks/evidence.py cost [--only NAME ...] [--record]

`published` copies figures out of timm's results/*.csv into benchmarks/results/evidence_published.csv; each row names
the commit. Nothing of it is measured here, the multiply-adds and times of `BENCHMARK` included. Parents are ViTs of the
same recipe and image size, of the hybrid's own width or of its cost; for the BoTNets it is the ResNet without attention
that is nearest in size, whose recipe is another. `cost` times each hybrid, as it is and folded, beside its parents in
one process, in interleaved rounds, batch 1, with random weights: medians of the ratio within a round. Its rows are
appended to benchmarks/results/evidence_cost.csv.
"""

import argparse
import csv
import subprocess
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import torch
from common import write_row
from throughput import compared, create, interleave

import timm_vitres

RESULTS = Path(__file__).parent / 'results'
FILES = {
    'top1': 'results-imagenet',
    'real': 'results-imagenet-real',
    'v2': 'results-imagenetv2-matched-frequency',
    'r': 'results-imagenet-r',
    'a': 'results-imagenet-a',
    'sketch': 'results-sketch',
}
BENCHMARK = 'benchmark-infer-fp32-nchw-pt240-cpu-i9_10940x-dynamo'  # batch 1, compiled
COSTS = {'gmacs': 'infer_gmacs', 'cpu_ms': 'infer_step_time'}


class Comparison(NamedTuple):
    """A hybrid that we load, by our name and timm's, and its parents by timm's names, the nearest in cost first.

    `recipe` is 'same', 'AugReg' (the same data and schedule; augmentation and regularisation were chosen for each
    model) or 'other'.
    """

    ours: str
    theirs: str
    size: int
    parents: Tuple[str, ...]
    kind: str = 'ViT'
    recipe: str = 'same'


def _augreg(ours: str, theirs: str, size: int, *parents: str) -> Comparison:
    tag, suffix = 'augreg_in21k_ft_in1k', '' if size == 224 else f'_{size}'
    return Comparison(
        f'vitresnet_{ours}.{tag}{suffix}',
        f'vit_{theirs}_{size}.{tag}',
        size,
        tuple(f'vit_{parent}_{size}.{tag}' for parent in parents),
        recipe='AugReg',
    )


def _bot(ours: str, theirs: str, parent: str) -> Comparison:
    return Comparison(f'vitresnet_mix_{ours}', theirs, 256, (parent,), 'ResNet', 'other')


COMPARISONS = (
    _augreg('tiny', 'tiny_r_s16_p8', 224, 'tiny_patch16'),
    _augreg('tiny', 'tiny_r_s16_p8', 384, 'tiny_patch16'),
    _augreg('small', 'small_r26_s32', 224, 'small_patch16', 'small_patch32'),
    _augreg('small', 'small_r26_s32', 384, 'small_patch16', 'small_patch32'),
    Comparison(
        'vitresnet_base.orig_in21k_ft_in1k_384',
        'vit_base_r50_s16_384.orig_in21k_ft_in1k',
        384,
        ('vit_base_patch16_384.orig_in21k_ft_in1k',),
    ),
    _augreg('large', 'large_r50_s32', 224, 'base_patch16', 'large_patch16'),
    _augreg('large', 'large_r50_s32', 384, 'base_patch16', 'large_patch16'),
    _bot('bot26t.c1_in1k', 'botnet26t_256.c1_in1k', 'resnet26t.ra2_in1k'),
    _bot('eca_bot26ts.c1_in1k', 'eca_botnext26ts_256.c1_in1k', 'eca_resnext26ts.ch_in1k'),
    _bot('se_bot33ts.a1h_in1k', 'sebotnet33ts_256.a1h_in1k', 'seresnet33ts.ra2_in1k'),
)
LEFT_OUT = {  # hybrids with ImageNet's classes of which timm's results have no row
    'vitresnet_base.hf_in21k_ft_in1k_384': 'published by transformers without figures',
    'vitresnet_dual_tiny.conformer_in1k': "published by Conformer's authors",
    'vitresnet_dual_small.conformer_in1k': "published by Conformer's authors",
    'vitresnet_dual_small_p32.conformer_in1k': "published by Conformer's authors",
    'vitresnet_dual_base.conformer_in1k': "published by Conformer's authors",
}


def read_results(folder: Path, name: str) -> Tuple[Dict[Tuple[str, int], dict], Tuple[str, str]]:
    """Return timm's rows of a results file at its repository's commit, by model and image size; the commit, its date.

    Raises:
        SystemExit: where the folder is no git repository with that file.
    """
    git = ['git', '--git-dir', str(folder / '.git' if (folder / '.git').exists() else folder)]
    try:
        text, commit = (
            subprocess.run([*git, *command], check=True, capture_output=True, text=True).stdout
            for command in (('show', f'HEAD:results/{name}.csv'), ('log', '-1', '--format=%H %cs'))
        )
    except subprocess.CalledProcessError as error:
        raise SystemExit(f'{folder} holds no results/{name}.csv of timm: {error.stderr.strip()}') from None
    size = 'infer_img_size' if name == BENCHMARK else 'img_size'
    rows = {(row['model'], int(row[size])): row for row in csv.DictReader(text.splitlines())}
    digest, date = commit.split()
    return rows, (digest, date)


def published(folder: Path) -> List[dict]:
    """Return a row for each hybrid and each parent; a figure that timm does not publish is empty."""
    found = {column: read_results(folder, name) for column, name in FILES.items()}
    benchmark, (commit, date) = read_results(folder, BENCHMARK)  # its models have no tags
    rows = []
    for comparison in COMPARISONS:
        for model in (comparison.theirs, *comparison.parents):
            of_model = {column: of_file.get((model, comparison.size)) for column, (of_file, _) in found.items()}
            costs = benchmark.get((model.partition('.')[0], comparison.size), {})
            if of_model['top1'] is None:
                raise SystemExit(f'timm publishes nothing of {model} at {comparison.size} pixels.')
            rows.append(
                dict(
                    hybrid=comparison.ours,
                    role='hybrid' if model == comparison.theirs else comparison.kind,
                    recipe=comparison.recipe,
                    model=model,
                    img_size=comparison.size,
                    params=of_model['top1']['param_count'],
                    **{column: row['top1'] if row else '' for column, row in of_model.items()},
                    **{column: costs.get(theirs, '') for column, theirs in COSTS.items()},
                    source=f'huggingface/pytorch-image-models@{commit}:results',
                    source_date=date,
                )
            )
    return rows


@torch.inference_mode()
def cost(comparison: Comparison, rounds: int, slice_s: float) -> List[dict]:
    """Return the hybrid's time by each parent's, as it is and folded: ratios within a round, median and quartiles."""
    x = torch.randn(1, 3, comparison.size, comparison.size)
    ours, *parents = (
        create(name.partition('.')[0], comparison.size) for name in (comparison.ours, *comparison.parents)
    )
    paths = {'eager': ours, 'folded': timm_vitres.fold(ours)}
    models = {**paths, **dict(zip(comparison.parents, parents))}
    times = interleave({name: (model, x) for name, model in models.items()}, rounds, slice_s, comparison.ours)
    place = dict(img_size=comparison.size, batch=1, rounds=rounds, threads=torch.get_num_threads())
    return [
        dict(hybrid=comparison.ours, parent=parent, path=path, **compared('ratio', times[path], times[parent]), **place)
        for parent in comparison.parents
        for path in paths
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('published', 'cost'))
    parser.add_argument('--timm', type=Path, help="published: timm's repository")
    parser.add_argument('--only', nargs='+', choices=[comparison.ours for comparison in COMPARISONS])
    parser.add_argument('--rounds', type=int, default=15, help='cost: two or more')
    parser.add_argument('--slice', type=float, default=0.3, help='cost: seconds of a measurement in a round, at least')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--record', action='store_true', help='cost: append the rows to evidence_cost.csv')
    args = parser.parse_args()
    if args.what == 'published':
        if args.timm is None:
            parser.error('published: --timm FOLDER is missing.')
        rows = published(args.timm)
        with (RESULTS / 'evidence_published.csv').open('w', newline='') as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
        return
    if args.rounds < 2:
        parser.error('--rounds: two at least.')
    torch.set_num_threads(args.threads)
    for comparison in COMPARISONS:
        if args.only is None or comparison.ours in args.only:
            for row in cost(comparison, args.rounds, args.slice):
                write_row('evidence_cost', row, args.record)


if __name__ == '__main__':
    main()
