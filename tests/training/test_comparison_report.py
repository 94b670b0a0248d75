import numpy as np
import pytest

from timm_vitres.training.comparison_report import (
    COLUMNS,
    arm_figures,
    read_answers,
    read_rows,
    table_lines,
    write_answers,
    write_comparison,
    write_rows,
)
from timm_vitres.training.held_out import Answers
from timm_vitres.training.plans import ArmPlan, Plan
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.verdict import judge


def plan(minutes=None):
    arms = {name: ArmPlan('resnet18', {}, 1_234_567, 0.0123, 0.004, 7, 2) for name in ('a', 'b', 'c')}
    asked = dict(seeds=[0, 1], lrs=[0.001, 0.01], minutes=minutes)
    images = {'description': '9 images', 'copies_are_out': True, 'validation': []}
    return Plan(asked, images, arms, {'timm': '1.0'}, '2 threads of the CPU')


def row(accuracy, state=''):
    return dict(state=state, lr='0.01', accuracy=accuracy, balanced=accuracy, seconds='12')


ROWS = {'a': [row('80.00'), row('60.00')], 'b': [row('50.00'), row('50.00')], 'c': [row('', 'diverged'), None]}


def test_rows_are_read_as_they_were_written(tmp_path):
    assert read_rows(tmp_path) == []
    rows = [dict.fromkeys(COLUMNS, ''), {**dict.fromkeys(COLUMNS, '1'), 'arm': 'a:b="x, y"'}]
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows
    (tmp_path / 'results.csv').write_text('arm,accuracy\nvit,100\n')
    with pytest.raises(ValueError, match=r'^output: .*results\.csv has other columns'):
        read_rows(tmp_path)


@pytest.mark.parametrize('names', [['x\udce9.png', 'y.png', 'z.png'], []])  # a name in Latin-1, and none
def test_answers_are_read_as_they_were_written(names, tmp_path):
    answers = Answers(np.arange(3), np.array([0, 1, 1]), np.array([0, 0, 1]), np.ones(3), np.ones(3))
    write_answers(tmp_path, answers, ['cat', 'dog'], names)
    right, labels = read_answers(tmp_path)
    assert right.tolist() == [1, 0, 1] and labels.tolist() == ['cat', 'dog', 'dog']
    assert (tmp_path / 'test.csv').read_text().splitlines()[2] == f'{"y.png" if names else 1},dog,cat,0'


def test_the_table_has_means_and_spreads():
    verdict = judge({'a': np.array([[1, 1, 0], [1, 0, 1]]), 'b': np.array([[0, 1, 0], [1, 0, 0]])})  # c diverged
    first, second, third = arm_figures(plan(), ROWS, verdict)
    assert first['accuracy (%)'] == '70.00 ± 14.14' and first['parameters'] == '1,234,567' and first['lr'] == '0.01'
    assert first['behind the best'] == 'best' and second['behind the best'] == str(verdict.behind['b'])
    assert (first['training'], first['a step'], first['an image']) == ('12 s', '12.3 ms', '4 ms')
    assert third['accuracy (%)'] == 'diverged' and third['training'] == third['lr'] == ''
    assert third['behind the best'] == 'left out'
    some = arm_figures(plan(), {**ROWS, 'c': [row('70.00'), row('', 'diverged')]}, verdict)[2]
    assert some['accuracy (%)'] == '70.00; 1 of 2 seeds diverged' and some['behind the best'] == 'left out'
    lines = table_lines([first, second, third])
    assert len({len(line) for line in lines}) == 1 and lines[1].strip('|-') == '' and lines[2].startswith('| a ')


@pytest.mark.parametrize('minutes, says', [(None, 'for as many epochs'), (2.5, 'for about 2.5 minutes of steps')])
def test_the_report_says_how_the_figures_came_about(minutes, says, tmp_path):
    cfg = FinetuneCfg(data_dir='images', img_size=48, seed=42)
    told = plan(minutes)
    told.batches = 1500
    write_comparison(tmp_path, cfg, told, ROWS, arm_figures(told, ROWS, None), 'A sentence.')
    text = (tmp_path / 'README.md').read_text()
    assert says in text and 'A sentence.' in text and 'img_size=48' in text and 'a third of the epochs' in text
    assert ('in whole epochs (a 2.2, b 2.2 and c 2.2).' in text) == (minutes is not None)
    assert ('others have as large a part' in text) == (minutes is not None)
    assert 'A better one may lie beyond that of a, b and c, which is the least or the largest of them.' in text
    assert 'No run was trained on test images, and nothing' in text
    told.asked['lrs'] = [lr * 1.00000001 for lr in told.lrs]  # rows have six digits of it
    write_comparison(tmp_path, cfg, told, ROWS, arm_figures(told, ROWS, None), 'A sentence.')
    assert 'may lie beyond that of a, b and c' in (tmp_path / 'README.md').read_text()
    told.images['copies_are_out'] = False
    told.asked['lrs'] = [0.001, 0.01, 0.1]
    write_comparison(tmp_path, cfg, told, ROWS, arm_figures(told, ROWS, None), 'A sentence.')
    text = (tmp_path / 'README.md').read_text()
    assert 'on test images, unless as copies, for which nobody looked, and' in text and 'may lie beyond' not in text
    assert (tmp_path / 'comparison.png').read_bytes()[:4] == b'\x89PNG'


def test_without_matplotlib_there_is_no_picture_of_an_older_comparison(tmp_path, monkeypatch):
    from timm_vitres.training import comparison_report

    monkeypatch.setattr(comparison_report, 'can_draw', lambda: False)
    (tmp_path / 'comparison.png').write_text('old')
    write_comparison(tmp_path, FinetuneCfg(data_dir='x'), plan(), ROWS, arm_figures(plan(), ROWS, None), 'So.')
    assert [path.name for path in tmp_path.iterdir()] == ['README.md'] and 'png' not in (
        tmp_path / 'README.md'
    ).read_text()


def test_the_report_says_what_was_judged_and_of_which_size_images_are(tmp_path):
    told, rows = plan(), {'a': [{**row('80.00'), 'best_epoch': '2'}, {**row('60.00'), 'best_epoch': '0'}]}
    rows['b'] = [{**row('50.00'), 'best_epoch': '6'}] * 2

    def text(cfg):
        write_comparison(tmp_path, cfg, told, rows, arm_figures(told, rows, None), 'So.')
        return (tmp_path / 'README.md').read_text()

    cfg = FinetuneCfg(data_dir='x', eval_metric='balanced')
    assert 'by balanced on validation images (a 1 to 3 of 7 and b 7 of 7).' in text(cfg)
    assert 'All runs learn from the same images, whose chance' in text(cfg)
    told.images['validation'] = None
    assert 'All runs learn from the same images, of which each seed holds others out for validation, whose' in text(cfg)
    assert ' pixels' not in text(cfg) and 'weights that arms began with' not in text(cfg)
    for arm in told.arms.values():
        arm.input_size = [3, 64, 96]
    assert ' Images are of 64 x 96 pixels. ' in text(cfg)
    told.arms['b'].input_size = [3, 128, 128]
    assert '(a 64 x 96, b 128 x 128 and c 64 x 96 pixels)' in text(cfg)
    begun = FinetuneCfg(data_dir='x', pretrained=True)
    assert 'nothing was chosen by them, but what the weights that arms began with had seen before is' in text(begun)
