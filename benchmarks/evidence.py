"""What is published of the hybrids that we load and of their parents, and what either costs on a CPU.

    python benchmarks/evidence.py published --timm FOLDER    # a checkout of timm's repository, or its git directory
    python benchmarks/evidence.py cost [--only NAME ...] [--record]

`published` copies figures out of timm's results/*.csv, which one program measured for all models, into
benchmarks/results/evidence_published.csv; each row names the commit. Nothing of it is measured here. A parent is the
ViT of the same recipe and image size; for the BoTNets it is the ResNet without attention that is nearest in size, whose
recipe is another. `cost` times each hybrid beside its first parent in one process, in interleaved rounds, batch 1, with
random weights: medians of the ratio within a round. Its rows are appended to benchmarks/results/evidence_cost.csv.
"""

import argparse
import csv
import statistics
import subprocess
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import timm
import torch
from common import seconds, write_row
from tqdm import tqdm

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


class Comparison(NamedTuple):
    """A hybrid that we load, by our name and timm's, and its parents by timm's names, the nearest in cost first."""

    ours: str
    theirs: str
    size: int
    parents: Tuple[str, ...]
    kind: str = 'ViT'
    same_recipe: bool = True


def _augreg(ours: str, theirs: str, size: int, *parents: str) -> Comparison:
    tag, suffix = 'augreg_in21k_ft_in1k', '' if size == 224 else f'_{size}'
    return Comparison(
        f'vitresnet_{ours}.{tag}{suffix}',
        f'vit_{theirs}_{size}.{tag}',
        size,
        tuple(f'vit_{parent}_{size}.{tag}' for parent in parents),
    )


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
    _augreg('large', 'large_r50_s32', 224, 'large_patch16', 'base_patch16'),
    _augreg('large', 'large_r50_s32', 384, 'large_patch16', 'base_patch16'),
    Comparison('vitresnet_mix_bot26t.c1_in1k', 'botnet26t_256.c1_in1k', 256, ('resnet26t.ra2_in1k',), 'ResNet', False),
    Comparison(
        'vitresnet_mix_eca_bot26ts.c1_in1k',
        'eca_botnext26ts_256.c1_in1k',
        256,
        ('eca_resnext26ts.ch_in1k',),
        'ResNet',
        False,
    ),
    Comparison(
        'vitresnet_mix_se_bot33ts.a1h_in1k',
        'sebotnet33ts_256.a1h_in1k',
        256,
        ('seresnet33ts.ra2_in1k',),
        'ResNet',
        False,
    ),
)


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
    rows = {(row['model'], int(row['img_size'])): row for row in csv.DictReader(text.splitlines())}
    digest, date = commit.split()
    return rows, (digest, date)


def published(folder: Path) -> List[dict]:
    """Return a row for each hybrid and each parent; a figure that timm does not publish is empty."""
    found = {column: read_results(folder, name) for column, name in FILES.items()}
    ((commit, date),) = {source for _, source in found.values()}
    rows = []
    for comparison in COMPARISONS:
        for model in (comparison.theirs, *comparison.parents):
            key = model, comparison.size
            of_model = {column: of_file.get(key) for column, (of_file, _) in found.items()}
            if of_model['top1'] is None:
                raise SystemExit(f'timm publishes nothing of {model} at {comparison.size} pixels.')
            rows.append(
                dict(
                    hybrid=comparison.ours,
                    role='hybrid' if model == comparison.theirs else comparison.kind,
                    same_recipe=comparison.same_recipe,
                    model=model,
                    img_size=comparison.size,
                    params=of_model['top1']['param_count'],
                    **{column: row['top1'] if row else '' for column, row in of_model.items()},
                    source=f'huggingface/pytorch-image-models@{commit}:results',
                    source_date=date,
                )
            )
    return rows


@torch.inference_mode()
def cost(comparison: Comparison, rounds: int) -> List[dict]:
    """Return the hybrid's time by its first parent's, as it is and folded."""
    x = torch.randn(1, 3, comparison.size, comparison.size)
    parent = comparison.parents[0]
    options = dict(img_size=comparison.size) if comparison.kind == 'ViT' else {}
    models = {
        'parent': timm.create_model(parent.partition('.')[0], **options).eval(),
        'eager': timm.create_model(comparison.ours.partition('.')[0], img_size=comparison.size).eval(),
    }
    models['folded'] = timm_vitres.fold(models['eager'])
    times: Dict[str, List[float]] = {name: [] for name in models}
    for round_ in tqdm(range(rounds + 1), desc=comparison.ours, leave=False):
        order = list(models)[round_ % len(models) :] + list(models)[: round_ % len(models)]
        for name in order:
            taken = seconds(models[name], x, 1)
            if round_:  # one to warm up
                times[name].append(taken)
    rows = []
    for path in ('eager', 'folded'):
        ratios = [own / other for own, other in zip(times[path], times['parent'])]
        lower, middle, upper = statistics.quantiles(ratios, n=4)
        rows.append(
            dict(
                hybrid=comparison.ours,
                parent=parent,
                img_size=comparison.size,
                path=path,
                ratio=round(middle, 3),
                lower=round(lower, 3),
                upper=round(upper, 3),
                rounds=rounds,
                threads=torch.get_num_threads(),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('published', 'cost'))
    parser.add_argument('--timm', type=Path, help="published: timm's repository")
    parser.add_argument('--only', nargs='+', choices=[comparison.ours for comparison in COMPARISONS])
    parser.add_argument('--rounds', type=int, default=15)
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
    torch.set_num_threads(args.threads)
    for comparison in COMPARISONS:
        if args.only is None or comparison.ours in args.only:
            for row in cost(comparison, args.rounds):
                write_row('evidence_cost', row, args.record)


if __name__ == '__main__':
    main()
