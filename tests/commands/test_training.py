import json
import subprocess
import sys

import pytest

from timm_vitres import cli


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
    flags += ['--epochs', '6', '-b', '8', '-j', '1', '--lr', '3e-3', '--hflip', '0']
    result = subprocess.run([*command, 'finetune', str(image_folder), *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f'local-dir:{tmp_path}/run' in result.stdout and 'epoch 5' in result.stdout
    assert 'epoch 1/6' in result.stderr  # the progress bar
    images = [str(image_folder / name / '0.png') for name in ('across', 'down')]
    flags = ['--model', f'local-dir:{tmp_path}/run', '--json']
    result = subprocess.run([*command, 'predict', *images, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [prediction['labels'][0] for prediction in json.loads(result.stdout)] == ['across', 'down']
    # a second run into the same folder is refused, and with --resume goes on
    again = ['finetune', str(image_folder), '--model', 'test_vitresnet', '--output', str(tmp_path / 'run')]
    assert cli.main(again) == 1
    assert 'holds a run already' in capsys.readouterr().err
    resumed = [*again, '--model-kwargs', 'depth=1', '--img-size', '32', '--epochs', '6', '--resume']
    assert cli.main(resumed) == 0


def test_every_setting_is_a_flag_and_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['finetune', '--help'])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ('--data-dir', '-b', '--layer-decay', '--skip-bad', '--resume', '--balance-classes', '--img-size'):
        assert flag in text
