import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from timm_vitres import FinetuneCfg, cli, recipe
from timm_vitres.training import comparing, loop
from timm_vitres.training.recipes import FOLDER
from timm_vitres.training.verdict import Verdict


def test_the_whole_way(image_folder, tmp_path, capsys):
    """Images -> fine-tuning -> a folder -> predictions, by the installed command in processes of their own."""
    command = [sys.executable, '-m', 'timm_vitres.cli']
    flags = [
        '--model',
        'test_vitresnet',
        '--model-kwargs',
        'depth=1',
        '--img-size',
        '32',
        '--output',
        f'{tmp_path}/run',
    ]
    flags += ['--epochs', '12', '-b', '8', '-j', '1', '--lr', '3e-3', '--hflip', '0', '--eval-metric', 'loss']
    result = subprocess.run([*command, 'finetune', str(image_folder), *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f'local-dir:{tmp_path}/run' in result.stdout and 'epoch 11' in result.stdout
    assert 'epoch 1/12' in result.stderr  # the progress bar
    images = [str(image_folder / name / '0.png') for name in ('across', 'down')]
    flags = ['--model', f'local-dir:{tmp_path}/run', '--json']
    result = subprocess.run([*command, 'predict', *images, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [prediction['labels'][0] for prediction in json.loads(result.stdout)] == ['across', 'down']
    # a second run into the same folder is refused, and with --resume goes on
    again = ['finetune', str(image_folder), '--model', 'test_vitresnet', '--output', str(tmp_path / 'run')]
    assert cli.main(again) == 1
    assert 'holds a run already' in capsys.readouterr().err
    flags = ['--model-kwargs', 'depth=1', '--img-size', '32', '--epochs', '12', '--eval-metric', 'loss']
    resumed = [*again, *flags, '--resume']
    assert cli.main(resumed) == 0


@pytest.mark.parametrize(
    'recipe, flags, lr, lr_base',
    [
        ('lr: 0.01', ['--lr-base', '0.1'], 5e-4, 0.1),
        ('lr_base: 0.1', ['--lr', '0.01'], 0.01, None),
        ('lr_base: 0.1\nlr_base_scale: linear\nlr_base_size: 64', ['--lr', '0.01'], 0.01, None),
        ('lr: 0.01\nlr_base: 0.1', [], 0.01, 0.1),
    ],
)
def test_a_rate_of_a_flag_wins_over_either_of_a_recipe(recipe, flags, lr, lr_base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr('timm_vitres.training.loop.finetune', lambda cfg, given: seen.append(cfg) or tmp_path)
    (tmp_path / 'mine.yaml').write_text(recipe)
    assert cli.main(['finetune', 'images', '-c', str(tmp_path / 'mine.yaml'), *flags]) == 0
    assert (seen[0].lr, seen[0].lr_base) == (lr, lr_base)


def test_two_rates_are_one_too_many(capsys):
    assert cli.main(['finetune', 'images', '--lr', '0.01', '--lr-base', '0.1']) == 1
    assert 'lr: got 0.01, and lr_base 0.1, which tells another rate; give one.' in capsys.readouterr().err


def test_every_setting_is_a_flag_and_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['finetune', '--help'])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(FinetuneCfg):
        assert f'--{field.name.replace("_", "-")}' in text and field.metadata['help'], field.name


@pytest.fixture
def compared(monkeypatch):
    """Calls of `compare`, which does nothing."""
    calls = []

    def compare(cfg, **own):
        calls.append((cfg, own))
        verdict = Verdict('vit', {}, {}, {}, 'None is better.') if cfg.output != 'diverged' else None
        return comparing.Comparison(Path('out'), [], [dict(arm='vit'), dict(arm='resnet')], verdict, 'None is better.')

    monkeypatch.setattr(comparing, 'compare', compare)
    return calls


def test_a_comparison_of_nothing_is_a_failure(compared):
    assert cli.main(['compare', 'images', '--output', 'diverged']) == 1  # as `finetune` ends where it diverges


def test_what_a_recipe_switches_on_can_be_switched_off(monkeypatch):
    runs = []
    monkeypatch.setattr(loop, 'finetune', lambda cfg, given: runs.append(cfg) or Path(cfg.output))
    for flags, expected in (((), True), (('--no-pretrained',), False), (('--pretrained',), True)):
        assert cli.main(['finetune', 'images', '--config', 'finetune_224', *flags]) == 0
        assert runs.pop().pretrained is expected
    with pytest.raises(SystemExit):
        cli.main(['finetune', 'images', '--no-no-check'])


@pytest.mark.parametrize('name', [path.stem for path in sorted(FOLDER.glob('*.yaml'))])
def test_whatever_a_recipe_switches_on_can_be_switched_off_alone(name, monkeypatch):
    """And what it says of that alone goes with it."""
    runs = []
    monkeypatch.setattr(loop, 'finetune', lambda cfg, given: runs.append(cfg) or Path(cfg.output))
    extra = ['--kd-model-name', 'resnet18'] if name == 'distill' else []
    on = [key for key, value in recipe(name).items() if value is True and not key.startswith('no_')]
    for key in on:
        flag = f'--no-{key.replace("_", "-")}'
        status = cli.main(['finetune', 'images', '--config', name, '--output', 'x', *extra, flag])
        if key in ('amp', 'channels_last') and recipe(name).get('autotune'):
            assert status == 1  # it is what is measured
            continue
        assert status == 0 and getattr(runs.pop(), key) is False, key


@pytest.mark.parametrize('flag', ['--no-amp', '--amp', '--channels-last', '--no-fused-attn'])
@pytest.mark.parametrize('autotune', [['--autotune'], ['--config', 'fmnist']])
def test_what_is_given_is_not_measured(flag, autotune, capsys, monkeypatch):
    runs = []
    monkeypatch.setattr(loop, 'finetune', lambda cfg, given: runs.append(cfg) or Path(cfg.output))
    assert cli.main(['finetune', 'images', flag, *autotune]) == 1 and not runs
    name = flag.removeprefix('--').replace('-', '_')
    name = name if name == 'no_fused_attn' else name.removeprefix('no_')
    expected = f'autotune: chooses {name} by measurement, and it was given, too; add --no-autotune.'
    assert expected in capsys.readouterr().err
    assert cli.main(['finetune', 'images', flag, *autotune, '--no-autotune']) == 0
    assert getattr(runs.pop(), name) is not flag.startswith('--no-a')


def test_a_comparison_has_no_autotune_whatever_a_recipe_says(compared, capsys):
    assert cli.main(['compare', 'images', '--output', 'out', '--config', 'fmnist', '--amp']) == 0
    assert compared.pop()[0].amp is True and 'autotune left out' in capsys.readouterr().out


def test_an_empty_config_is_no_default(compared, capsys):
    assert cli.main(['compare', 'images', '--output', 'out', '--config', '']) == 1 and not compared
    assert "config: got '', which is no file" in capsys.readouterr().err


def test_compare_prints_the_table_and_the_sentence(compared, capsys):
    flags = ['--models', 'vit', 'resnet', '--minutes', '2', '--seeds', '3', '4', '--hflip', '0', '--test-split', '']
    assert cli.main(['compare', 'images', '--output', 'out', *flags]) == 0
    expected = FinetuneCfg(**{**recipe('compare'), 'hflip': 0.0}, data_dir='images', output='out')
    assert compared == [(expected, dict(models=['vit', 'resnet'], minutes=2.0, seeds=[3, 4], test_split=''))]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:5] == ['| arm    |', '|--------|', '| vit    |', '| resnet |'] and 'None is better.' in lines


def test_compare_of_pretrained_models_leaves_sizes_and_colours_to_their_weights(compared):
    pretrained = ['compare', 'images', '--pretrained', '--models', 'resnet18', 'resnet34']
    assert cli.main(pretrained) == cli.main([*pretrained, '--img-size', '96']) == 0
    assert cli.main([*pretrained, '--config', 'compare']) == 0  # a recipe that was asked for is taken as it is
    first, second, third = [cfg for cfg, _ in compared]
    assert (first.img_size, first.mean, first.std, first.crop_pct) == (None, None, None, None)
    assert first.epochs == recipe('compare')['epochs'] and second.img_size == 96 and second.mean is None
    assert third.mean == (0.5,) and third.img_size is not None


def test_compare_leaves_out_what_a_recipe_says_of_one_model_and_says_so(compared, capsys):
    assert cli.main(['compare', 'images', '--config', 'small_from_scratch']) == 0
    assert 'config: small_from_scratch: model, lr left out' in capsys.readouterr().out
    assert compared[0][0].img_size == 112 and compared[0][0].model == FinetuneCfg.model
    assert cli.main(['compare', 'images', '--epochs', '3', '--minutes', '2']) == 1
    assert 'minutes: got minutes and epochs; give one.' in capsys.readouterr().err and len(compared) == 1
