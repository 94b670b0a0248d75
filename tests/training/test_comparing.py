"""Comparisons of tiny models on a few stripes: what they look at, and that a kill costs nothing."""

import csv
import json
import shutil

import numpy as np
import pytest
import timm
from conftest import write_folder

from timm_vitres import FinetuneCfg, compare
from timm_vitres.prediction import predict
from timm_vitres.training import comparing, held_out, loop, plans, report
from timm_vitres.training.verdict import judge

MODELS = ('test_vitresnet:layers=(1,),channels=(128,),depth=1,embed_dim=32', 'test_vitresnet_mix')
FLAGS = dict(models=MODELS, seeds=(0, 1), lrs=(1e-3, 1e-2))
FIGURES = ('part', 'arm', 'lr', 'seed', 'epochs', 'state', 'val_top1', 'val_loss', 'accuracy', 'balanced')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('data') / 'images', per_class=16, size=32)


def recipe(images, output, **kwargs):
    settings = dict(img_size=32, epochs=3, batch_size=8, workers=0, device='cpu', hflip=0.0, no_aug=True)
    return FinetuneCfg(data_dir=str(images), output=str(output), **{**settings, **kwargs})


@pytest.fixture(autouse=True)
def quick(monkeypatch, no_pictures):
    """Leave out what takes longer than the training here: the runs' pictures, and most of the measuring."""
    monkeypatch.setattr(plans, 'SECONDS', 0.001)


@pytest.fixture(scope='module')
def unbroken(images, tmp_path_factory):
    """A comparison that nothing disturbed."""
    output = tmp_path_factory.mktemp('unbroken') / 'out'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, 'SECONDS', 0.001)
        for module in (report, held_out):
            patch.setattr(module, 'can_draw', lambda: False)
        return compare(recipe(images, output), **FLAGS)


def figures(rows):
    return [[row[name] for name in FIGURES] for row in rows]


def test_every_run_is_a_row_and_the_search_chooses_by_validation_images(unbroken):
    with (unbroken.folder / 'results.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert rows == unbroken.rows and len(rows) == 2 * 2 + 2 * 2
    for name in MODELS:
        search = [row for row in rows if row['arm'] == name and row['part'] == 'search']
        runs = [row for row in rows if row['arm'] == name and row['part'] == 'run']
        assert [row['epochs'] for row in search + runs] == ['1', '1', '3', '3']
        assert all(row['seed'] == '0' and row['accuracy'] == '' for row in search)  # no test image was looked at
        best = max(search, key=lambda row: (float(row['val_top1']), -float(row['val_loss'])))
        assert {row['lr'] for row in runs} == {best['lr']} and [row['seed'] for row in runs] == ['0', '1']


def test_runs_leave_the_test_images_alone(unbroken):
    plan = json.loads((unbroken.folder / 'compare.json').read_text())
    test = {row[0] for row in plan['images']['test']}
    assert len(test) == 8
    records = sorted((unbroken.folder / 'runs').glob('*/run.json'))
    assert len(records) == 8
    for path in records:
        record = json.loads(path.read_text())
        seen = {row[0] for name in ('train', 'validation') for row in record['data'][name]}
        assert len(seen) == 24 and not seen & test
        has_model = (path.parent / 'model.safetensors').exists()
        assert has_model != path.parent.name.startswith('search-')  # models of the search are thrown away


def test_the_accuracy_is_that_of_the_saved_model_on_the_test_images(unbroken, images):
    plan = json.loads((unbroken.folder / 'compare.json').read_text())
    test = plan['images']['test']
    for row in unbroken.rows:
        if row['part'] == 'run' and row['arm'] == MODELS[0]:
            folder = unbroken.folder / 'runs' / f'{plans.single(row["arm"])}-lr{row["lr"]}-seed{row["seed"]}'
            model = timm.create_model(f'local-dir:{folder}', pretrained=True)
            predictions, _ = predict(model, [images / name for name, _, _ in test])
            right = [one.labels[0] == label for one, (_, label, _) in zip(predictions, test)]
            assert float(row['accuracy']) == pytest.approx(100 * np.mean(right), abs=0.01)
            with (folder / 'test.csv').open(newline='') as file:
                assert [line['right'] == '1' for line in csv.DictReader(file)] == right


def test_the_verdict_is_of_the_answers(unbroken):
    correct = {}
    for name in MODELS:
        lr = next(row['lr'] for row in unbroken.rows if row['part'] == 'run' and row['arm'] == name)
        files = [unbroken.folder / 'runs' / f'{plans.single(name)}-lr{lr}-seed{seed}' / 'test.csv' for seed in (0, 1)]
        tables = [list(csv.DictReader(path.open(newline=''))) for path in files]
        correct[name] = np.array([[int(line['right']) for line in table] for table in tables])
    assert unbroken.verdict == judge(correct) and unbroken.sentence == unbroken.verdict.sentence
    text = (unbroken.folder / 'README.md').read_text()
    assert unbroken.sentence in text and 'comparison.png' in text and f'| {MODELS[0]} ' in text


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    'calls, epochs', [(1, 0), pytest.param(3, 0, marks=SLOW), pytest.param(5, 1, marks=SLOW), (8, 1)]
)
def test_a_comparison_that_was_killed_goes_on(calls, epochs, unbroken, images, tmp_path, monkeypatch):
    """In the search, or in the middle of a run; no finished run is made again."""
    made = []
    begin, finish = comparing.finetune, loop._Run._finish_epoch

    def count(cfg, *others):
        made.append(cfg.output)
        return begin(cfg, *others)

    def kill(run, *others):
        finish(run, *others)
        if len(made) == calls and len(run.history) > epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(comparing, 'finetune', count)
    monkeypatch.setattr(loop._Run, '_finish_epoch', kill)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe(images, tmp_path / 'out'), **FLAGS)
    monkeypatch.setattr(loop._Run, '_finish_epoch', finish)
    again = compare(recipe(images, tmp_path / 'out'), **FLAGS)
    assert figures(again.rows) == figures(unbroken.rows) and again.sentence == unbroken.sentence
    assert len(made) == 8 + 1 and made[calls - 1] == made[calls]


def test_a_finished_comparison_is_not_made_again_and_seeds_can_be_added(unbroken, images, tmp_path, monkeypatch):
    shutil.copytree(unbroken.folder, tmp_path / 'out')
    begin, made = comparing.finetune, []
    monkeypatch.setattr(comparing, 'finetune', lambda cfg, *others: made.append(cfg.seed) or begin(cfg, *others))
    again = compare(recipe(images, tmp_path / 'out'), **FLAGS)
    assert again.rows == unbroken.rows and not made
    more = compare(recipe(images, tmp_path / 'out'), **{**FLAGS, 'seeds': (0, 1, 5)})
    assert made == [5, 5] and more.rows[:8] == unbroken.rows and 'of 3 seeds' in more.sentence
    assert 'Seeds were added' not in more.sentence  # two said nothing at which one might have stopped
    again = compare(recipe(images, tmp_path / 'out'), **{**FLAGS, 'seeds': (0, 1, 5, 6)})
    assert made == [5, 5, 6, 6] and 'Seeds were added once when such a sentence had been read' in again.sentence
    assert compare(recipe(images, tmp_path / 'out'), **{**FLAGS, 'seeds': (0, 1, 5, 6)}).sentence == again.sentence


def test_runs_that_are_gone_are_made_again(unbroken, images, tmp_path, monkeypatch, caplog):
    shutil.copytree(unbroken.folder, tmp_path / 'out')
    begin, made = comparing.finetune, []
    monkeypatch.setattr(comparing, 'finetune', lambda cfg, *others: made.append(cfg) or begin(cfg, *others))
    lr = next(row['lr'] for row in unbroken.rows if row['part'] == 'run' and row['arm'] == MODELS[1])
    gone, answers = (tmp_path / 'out' / 'runs' / f'{MODELS[1]}-lr{lr}-seed{seed}' for seed in (0, 1))
    shutil.rmtree(gone)
    (answers / 'test.csv').unlink()
    again = compare(recipe(images, tmp_path / 'out', workers=1), **FLAGS)  # which changes nothing, and may be changed
    assert [cfg.seed for cfg in made] == [0, 1] and [cfg.resume for cfg in made] == [None, True]
    assert sorted(figures(again.rows)) == sorted(figures(unbroken.rows)) and again.sentence == unbroken.sentence
    assert caplog.text.count('test.csv is gone; that run is made again.') == 2


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(aa='rand-m9-mstd0.5-inc'), "aa: got 'rand-m9-mstd0.5-inc'"),
        (dict(cutmix_minmax=(0.5, 0.51)), 'cutmix_minmax: got 0.5 and 0.51'),
        (dict(device='cuda:77'), "device: got 'cuda:77', which can not be used here"),
        (dict(sched='wsd', decay_epochs=50.0), "sched: 'wsd' can not be used"),
        (dict(opt='no-such'), 'opt: '),
    ],
)
def test_what_no_run_can_have_leaves_no_folder(changes, message, images, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # before any image is opened, or any arm measured
        patch.setattr(plans, 'reserve', lambda *args: pytest.fail('images were opened'))
        with pytest.raises(ValueError, match=f'^{message}'):
            compare(recipe(images, tmp_path / 'out', **changes), **FLAGS)
    with pytest.raises(ValueError, match=f'^{message}'):
        compare(recipe(images, tmp_path / 'out', **changes), **FLAGS)
    assert not (tmp_path / 'out' / 'compare.json').exists()
    assert compare(recipe(images, tmp_path / 'out', epochs=1), MODELS, (0,), (1e-3,)).rows


def test_a_learning_rate_that_diverges_is_a_row_and_an_arm_that_always_does_is_named(images, tmp_path, monkeypatch):
    begin = comparing.finetune

    def diverge(cfg, *others):
        if cfg.lr == 0.01 or (cfg.model == 'resnet10t' and cfg.lr == 0.02):
            raise loop.Diverged('lr: the loss became nan')
        return begin(cfg, *others)

    monkeypatch.setattr(comparing, 'finetune', diverge)
    cfg = recipe(images, tmp_path / 'out', epochs=1, eval_metric='balanced')
    told = compare(cfg, models=(*MODELS, 'resnet10t'), seeds=(0,), lrs=(0.01, 0.02))
    states = [(row['arm'], row['lr'], row['state']) for row in told.rows if row['part'] == 'search']
    assert states == [
        *((name, lr, state) for name in MODELS for lr, state in (('0.01', 'diverged'), ('0.02', ''))),
        *(('resnet10t', lr, 'diverged') for lr in ('0.01', '0.02')),
    ]
    assert set(told.verdict.means) == set(MODELS) and told.figures[2]['accuracy (%)'] == 'diverged'
    assert told.sentence.startswith('By balanced accuracy on these 8 test images ')
    assert told.sentence.endswith('give more seeds. Left out, since training diverged: resnet10t.')
    balanced = {row['arm']: float(row['balanced']) for row in told.rows if row['part'] == 'run'}
    assert told.verdict.means == pytest.approx(balanced, abs=0.01)


def test_where_all_diverges_nothing_is_compared(images, tmp_path, monkeypatch):
    def diverge(cfg, *others):
        raise loop.Diverged('lr: the loss became nan')

    monkeypatch.setattr(comparing, 'finetune', diverge)
    told = compare(recipe(images, tmp_path / 'out'), models=MODELS, seeds=(0,), lrs=(0.01,))
    assert told.verdict is None and told.sentence.startswith('Fewer than two arms could be trained')


def test_a_warning_of_the_runs_is_given_once(images, tmp_path, caplog):
    compare(recipe(images, tmp_path / 'out', epochs=1, batch_size=64), models=MODELS, seeds=(0,), lrs=(0.01,))
    texts = [record.getMessage() for record in caplog.records]
    assert sum(text.startswith('batch_size: ') for text in texts) == 1
    assert not any(text.startswith('left out: ') for text in texts)


def test_only_a_new_folder_an_empty_one_or_its_own_is_written_to(images, tmp_path, monkeypatch):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'notes.txt').write_text('mine')
    for output, message in (
        (tmp_path / 'mine', r'output: .*mine holds no comparison, but notes\.txt; name a new folder'),
        (tmp_path / 'mine' / 'notes.txt', r'output: .*notes\.txt is no folder'),
        (images / 'new', 'output: .* lies in the data folder'),
    ):
        with pytest.raises(ValueError, match=message):
            compare(recipe(images, output), **FLAGS)
    with pytest.raises(ValueError, match="models: got 'resnet17'"):
        compare(recipe(images, tmp_path / 'new'), models=('resnet17', 'resnet18'))
    assert not (tmp_path / 'new').exists() and sorted(path.name for path in (tmp_path / 'mine').iterdir()) == [
        'notes.txt'
    ]
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='compare: runs in one process'):
        compare(recipe(images, tmp_path / 'new'), **FLAGS)


@pytest.mark.parametrize(
    'own',
    [
        *(dict(seeds=(-1,)), dict(seeds=(0.5,)), dict(lrs=(0.0,)), dict(lrs=(float('nan'),)), dict(minutes=0.0)),
        *(dict(minutes=float('nan')), dict(test_frac=1.0), dict(models='vit'), dict(seeds=())),
    ],
    ids=str,
)
def test_what_an_argument_can_not_be_is_named(own, images, tmp_path):
    with pytest.raises(ValueError, match=f'^{next(iter(own))}: got '):
        compare(recipe(images, tmp_path / 'out'), **own)
