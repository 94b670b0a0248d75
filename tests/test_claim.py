"""The claim's scripts: rows of comparisons are recorded once (ablation.py), runs are made once (scratch.py), and tables
are of the rows (claim.py)."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import write_noise

from timm_vitres.training.creation import create_finetune_model
from timm_vitres.training.plans import parse_arm
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.verdict import Difference

VERDICT = SimpleNamespace(best='b', behind={'a': Difference(2.5, 0.25, 4.75), 'c': Difference(1.0, -1.0, 3.0)})
ACCURACY = {'a': (80.0, 81.0), 'b': (83.0, 83.0), 'c': (82.0, 82.0)}


@pytest.fixture
def results(script, tmp_path, monkeypatch):
    """A folder that rows are written to and read from in place of benchmarks/results."""
    monkeypatch.setattr(script('common'), 'RESULTS', tmp_path / 'results')
    monkeypatch.setattr(script('rows'), 'RESULTS', tmp_path / 'results')
    return tmp_path / 'results'


def rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_a_comparison_is_recorded_once_and_told_in_a_table(script, results, tmp_path, monkeypatch, capsys):
    ablation, claim = script('ablation'), script('claim')
    asked = []

    def compare(cfg, models, seeds, lrs, minutes):
        asked.append((cfg, models, seeds, minutes))
        shared = dict.fromkeys(ablation.COLUMNS, '1') | dict(part='run', parameters='1290000', epochs='7', seconds='90')
        runs = [
            dict(
                shared, arm=arm, seed=str(seed), accuracy=str(ACCURACY[arm][seed]), step_ms='10' if arm == 'a' else '25'
            )
            for arm in models
            for seed in seeds
        ]
        # it was trained with another number of threads than that of this process, which records it
        (tmp_path / 'compare.json').write_text(json.dumps({'machine': '7 threads of the CPU'}))
        search = dict(shared, part='search', arm='a')
        return SimpleNamespace(folder=tmp_path, rows=[search, *runs], verdict=VERDICT, sentence='It is so.')

    monkeypatch.setattr(ablation, 'compare', compare)
    monkeypatch.setattr(ablation, 'write', lambda name, root, source: tmp_path / name)
    command = ['ablation.py', 'pairs', '--minutes', '2', '--models', 'a', 'b', 'c', '--seeds', '0', '1', '--record']
    monkeypatch.setattr(sys, 'argv', command)
    ablation.main()
    ablation.main()  # of a comparison that is over
    [(cfg, models, seeds, minutes), _] = asked
    assert (models, seeds, minutes) == (['a', 'b', 'c'], [0, 1], 2.0)
    assert (cfg.img_size, cfg.in_chans, cfg.data_dir) == (64, 1, str(tmp_path / 'pairs'))
    assert {row['threads'] for row in rows(results / 'ablation.csv')} == {'7'}
    assert [(row['set'], row['arm'], row['seed']) for row in rows(results / 'ablation.csv')] == [
        ('pairs', arm, seed) for arm in 'abc' for seed in '01'
    ]
    assert 'It is so.' in capsys.readouterr().out
    assert claim.ablation().splitlines()[2:] == [
        '| `pairs`, 2 min, accuracy | b | 83.00 ± 0.00 (2 seeds) | best |  | 1.29M | 7 | 1.5 | 2.50 | 1.00 |',
        '|  | c | 82.00 ± 0.00 (2 seeds) | 1.00 (-1.00 to 3.00) | no | 1.29M | 7 | 1.5 | 2.50 | 1.00 |',
        '|  | a | 80.50 ± 0.71 (2 seeds) | 2.50 (0.25 to 4.75) | yes | 1.29M | 7 | 1.5 | 1.00 | 1.00 |',
    ]
    header, _, line = claim.arms().splitlines()
    assert header == '| set | a | b | c |'
    assert line == '| `pairs`, 2 min, accuracy, 2 seeds | 80.5 ± 0.7 | **83.0 ± 0.0** | **82.0 ± 0.0** |'
    figures = dict(a=[70.0, 80.0, 90.0], b=[93.0, 94.0, 93.0], c=[92.0, 93.0, 92.5])
    assert [claim._is_alone(figures, 'b', arm) for arm in 'ac'] == [True, False]  # of three seeds
    assert not claim._is_alone({arm: own[:2] for arm, own in figures.items()}, 'b', 'a')
    with (results / 'ablation.csv').open('a', newline='') as file:  # a run of one arm diverges
        lost = {**rows(results / 'ablation.csv')[0], 'seed': '2', 'accuracy': '', 'balanced': '', 'state': 'diverged'}
        csv.DictWriter(file, lost).writerow(lost)
    assert claim.ablation().splitlines()[4] == '|  | a | diverged | left out |  | 1.29M | 7 | 1.5 | 1.00 | 1.00 |'
    assert '| `pairs`, 2 min, accuracy, 2 seeds | diverged | **83.0 ± 0.0** |' in claim.arms()
    for epochs in ('7', '9'):  # comparisons of one set that cost other than that one
        monkeypatch.setattr(sys, 'argv', [*command[:2], '--epochs', epochs, *command[4:]])
        ablation.main()
    starts = [line.split(' | ')[0] for line in claim.ablation().splitlines()[2:]]
    assert starts == [
        *('| `pairs`, 2 min, accuracy', '| ', '| '),
        *('| `pairs`, 7 epochs, accuracy', '| ', '| '),
        *('| `pairs`, 9 epochs, accuracy', '| ', '| '),
    ]


@pytest.mark.parametrize('img_size, count', [(28, 3), (64, 5)])
def test_peers_are_of_the_size_of_the_arms(img_size, count, script):
    peers = script('ablation').peers(img_size)
    assert len(peers) == count
    for name in ('interleaved', *peers):
        arm = parse_arm(name, img_size)
        model = create_finetune_model(arm.cfg(FinetuneCfg('x', in_chans=1, img_size=img_size)), 10).eval()
        assert model(torch.randn(2, 1, img_size, img_size)).shape == (2, 10)
        assert 1.1e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.35e6, name


def test_a_model_from_random_weights_is_trained_once(script, results, tmp_path, monkeypatch):
    scratch, claim = script('scratch'), script('claim')
    write_noise(tmp_path / 'sets/openclipart', train=8, test=2)
    begun, train = [], scratch.train
    monkeypatch.setattr(scratch, 'train', lambda cfg: (begun.append(cfg.seed), train(cfg))[1])
    command = ['scratch.py', 'openclipart', '--output', str(tmp_path / 'runs'), '--root', str(tmp_path / 'sets')]
    command += ['--seeds', '0', '3', '--record', '--threads', str(torch.get_num_threads())]
    command += ['--set', 'epochs=1', 'img_size=32', 'batch_size=4', 'workers=0']
    monkeypatch.setattr(sys, 'argv', command)
    scratch.main()
    scratch.main()
    found = rows(results / 'scratch.csv')
    assert begun == [0, 3] and [row['seed'] for row in found] == ['0', '3']
    assert all(float(row['test_top1']) in (0, 25, 50, 75, 100) and row['test_images'] == '4' for row in found)
    [line] = claim.scratch().splitlines()[2:]
    assert line.startswith('| `openclipart` | `vitresnet_nano`, epochs=1 img_size=32 batch_size=4 workers=0 | 1 | ')
    assert line.count('(2 seeds)') == 4


def test_what_fractals_gain_is_told_beside_their_rows(script, results):
    common, claim = script('common'), script('claim')
    shared = dict(set='elpv', model='vitresnet_nano', changes='epochs=4', epochs='4', test_top1='90')
    for arm, figures in (('random', (70, 75, 72)), ('fractal', (71, 77, 75))):
        told = '400 classes, 4 epochs, weights 0123abcd' if arm == 'fractal' else ''
        for seed, balanced in enumerate(figures):
            row = dict(shared, arm=arm, seed=str(seed), pretraining=told, test_balanced=str(balanced))
            common.write_row('fractals', row, True)
    common.write_row('fractals', dict(row, test_balanced='74'), True)  # seed 2 again: the newer one counts
    same, start = '90.00 ± 0.00 (3 seeds)', '| `elpv` | `vitresnet_nano` | epochs=4 |'
    lines = [
        f'{start} random | {same} | 72.33 ± 2.52 (3 seeds) |  |',
        f'{start} fractal: {told} | {same} | 74.00 ± 3.00 (3 seeds) |  |',
    ]
    assert claim.fractals().splitlines()[2:] == lines
    found = dict(set='elpv', model='vitresnet_nano', changes='epochs=4', arm='fractal', pretraining=told)
    found.update(against='random', against_pretraining='', seeds='0 1 2')
    common.write_row('fractals_verdict', dict(found, gain='2.00', low='-0.50', high='4.50', is_told=False), True)
    gain = '2.00 (-0.50 to 4.50) over random'
    assert claim.fractals().splitlines()[2:] == [lines[0], lines[1].replace('|  |', f'| {gain} |')]
    found.update(against='shipped', against_pretraining='vitresnet_nano.openclipart, weights 4567cdef')
    common.write_row('fractals_verdict', dict(found, gain='-1.00', low='-2.00', high='0.00', is_told=False), True)
    both = f'{gain}; -1.00 (-2.00 to 0.00) over shipped'
    assert claim.fractals().splitlines()[2:] == [lines[0], lines[1].replace('|  |', f'| {both} |')]
    common.write_row('fractals', dict(row, seed='3'), True)  # of which the gain says nothing
    assert claim.fractals().splitlines()[3].endswith('(4 seeds) |  |')


def test_finer_classes_are_merged_before_they_are_compared(script):
    common = script('common')
    finer = common.Prediction('a.png', ['67 poly', '0 mono', '33 poly', '100 mono'], [0.35, 0.3, 0.25, 0.1])
    wider = common.merged(finer, script('image_sets').class_of_grade)
    assert wider.image == 'a.png' and wider.labels == ['functional', 'defective']
    assert wider.probabilities == pytest.approx([0.55, 0.45])
    assert common.merged(finer, str) == finer


def test_the_last_verdict_alone_is_told(script, results, monkeypatch):
    """With more seeds another arm may be the best; of too few there is no interval."""
    common, claim = script('common'), script('claim')
    asked = dict(set='pairs', models='a b', cost='2 min', device='default', threads='1')
    shared = dict(parameters='1290000', epochs='7', seconds='90', step_ms='10', latency_ms='1', balanced='1')
    for arm, accuracy in (('a', '80'), ('b', '83')):
        common.write_row('ablation', {**asked, **shared, 'arm': arm, 'seed': '0', 'accuracy': accuracy}, True)
    verdict = dict(points='3.00', low='-inf', high='inf', is_told='False', measured='accuracy')
    for best, arm in (('a', 'b'), ('b', 'a')):
        common.write_row('ablation_verdict', {**asked, **verdict, 'best': best, 'arm': arm}, True)
    assert claim.ablation().splitlines()[2:] == [
        '| `pairs`, 2 min, accuracy | b | 83.00 (1) | best |  | 1.29M | 7 | 1.5 | 1.00 | 1.00 |',
        '|  | a | 80.00 (1) | 3.00 | no | 1.29M | 7 | 1.5 | 1.00 | 1.00 |',
    ]


def test_the_time_of_a_small_comparison_is_recorded(script, results, tmp_path, monkeypatch):
    small, asked = script('small_compare'), []
    write_noise(tmp_path / 'noise', train=5, test=2)
    entries = [
        script('image_sets').Entry(part, path.parent.name, path.name, path)
        for part in ('test', 'train')
        for path in sorted((tmp_path / 'noise' / part).rglob('*.png'))
    ]
    monkeypatch.setattr(small, 'SETS', {'elpv': lambda source, left_out: iter(entries)})
    monkeypatch.setattr(small, 'compare', lambda cfg, seeds: asked.append(cfg) or SimpleNamespace(sentence='So.'))
    monkeypatch.setattr(sys, 'argv', ['x.py', '--output', str(tmp_path / 'out'), '--each', '3', '--record'])
    small.main()
    [cfg], [row] = asked, rows(results / 'small_compare.csv')
    photos = sorted((tmp_path / 'out' / 'photos').rglob('*.png'))
    assert len(photos) == 3 * len({path.parent for path in photos}) and cfg.in_chans == 1
    assert all(
        path.read_bytes() == (tmp_path / 'noise/train' / path.parent.name / path.name).read_bytes() for path in photos
    )
    assert (row['images'], row['seeds'], row['sentence']) == (str(len(photos)), '3', 'So.')
    with pytest.raises(FileExistsError):
        small.main()
    monkeypatch.setattr(small, 'compare', lambda cfg, seeds: SimpleNamespace(sentence='So it is.'))
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--again'])
    with pytest.raises(SystemExit):
        small.main()  # it is not over
    (tmp_path / 'out' / 'answer').mkdir()
    (tmp_path / 'out' / 'answer' / 'README.md').write_text('over')
    path = results / 'small_compare.csv'
    path.write_text(path.read_text().replace(',3,' + row['threads'] + ',0,', ',3,7,4711,'))
    small.main()
    again = rows(path)[-1]
    assert (again['sentence'], again['seconds'], again['threads']) == ('So it is.', '4711', '7')
