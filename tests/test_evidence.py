"""benchmarks/evidence.py: what it copies out of timm's repository, and what it measures."""

import csv
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / 'benchmarks'))
    import evidence

    return evidence


def repository(evidence, folder, names):
    """Make a repository with results of some models: of each file another figure, at two sizes."""
    (folder / 'results').mkdir(parents=True)
    for number, name in enumerate(evidence.FILES.values()):
        lines = ['model,img_size,top1,param_count']
        for index, model in enumerate(names):
            lines += [f'{model},{size},{10 * number + index}.{size},{index}.50' for size in (224, 256, 384)]
        (folder / 'results' / f'{name}.csv').write_text('\n'.join(lines) + '\n')
    for command in (
        ['init', '-q'],
        ['add', '.'],
        ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'rows'],
    ):
        subprocess.run(['git', '-C', str(folder), *command], check=True)
    return folder


def test_published_figures_are_those_of_the_size_and_the_commit(evidence, tmp_path):
    names = [name for row in evidence.COMPARISONS for name in (row.theirs, *row.parents)]
    names = list(dict.fromkeys(names))
    folder = repository(evidence, tmp_path / 'timm', names)
    commit = subprocess.run(
        ['git', '-C', str(folder), 'rev-parse', 'HEAD'], check=True, capture_output=True, text=True
    ).stdout.strip()
    rows = evidence.published(folder)
    assert rows == evidence.published(folder / '.git')
    assert [row['hybrid'] for row in rows if row['role'] == 'hybrid'] == [row.ours for row in evidence.COMPARISONS]
    for row in rows:
        index = names.index(row['model'])
        assert [row[column] for column in evidence.FILES] == [
            f'{10 * number + index}.{row["img_size"]}' for number in range(len(evidence.FILES))
        ]
        assert row['params'] == f'{index}.50' and row['source'].endswith(f'@{commit}:results')


def test_what_is_missing_is_told(evidence, tmp_path):
    with pytest.raises(SystemExit, match=r'^timm publishes nothing of vit_tiny_r_s16_p8_224\.augreg.* at 224 pixels'):
        evidence.published(repository(evidence, tmp_path / 'empty', ['resnet18']))
    with pytest.raises(SystemExit, match=r'nowhere holds no results/results-imagenet\.csv of timm'):
        evidence.published(tmp_path / 'nowhere')


def test_recorded_rows_are_of_what_loads_and_of_the_commit_that_the_readme_links(evidence):
    with (ROOT / 'benchmarks' / 'results' / 'evidence_published.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert {row['hybrid'] for row in rows} == {row.ours for row in evidence.COMPARISONS}
    ((commit, date),) = {(row['source'].partition('@')[2].partition(':')[0], row['source_date']) for row in rows}
    text = (ROOT / 'README.md').read_text()
    assert f'tree/{commit}/results' in text and date in text


def test_cost_is_of_the_hybrid_by_its_parent(evidence, monkeypatch):
    """A model that sleeps not, and one that is called twice: the ratio is that of their times."""
    comparison = evidence.Comparison('test_vitresnet', 'x', 32, ('test_vit',), 'ViT')
    taken = {'VisionTransformer': 2.0, 'VitResNet': 1.0}
    monkeypatch.setattr(evidence, 'seconds', lambda model, x, repeats: taken[type(model).__name__])
    rows = evidence.cost(comparison, rounds=3)
    assert [(row['path'], row['ratio'], row['lower'], row['upper']) for row in rows] == [
        ('eager', 0.5, 0.5, 0.5),
        ('folded', 0.5, 0.5, 0.5),
    ]
    assert torch.is_inference_mode_enabled() is False
