import json
import subprocess
import sys

import numpy as np
import pytest
import timm
from conftest import randomise_, stripes
from PIL import Image

from timm_vitres import cli, hub


@pytest.fixture
def model_folder(tmp_path):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3, img_size=32))
    return hub.save(model, tmp_path / 'model', label_names=['cat', 'dog', 'owl'])


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / 'picture.png'
    stripes(40, True, np.random.default_rng(0)).save(path)
    return path


def test_predict_prints_a_table(model_folder, picture, capsys):
    assert cli.main(['predict', str(picture), '--model', f'local-dir:{model_folder}', '--topk', '2']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith(str(picture)) and '%' in lines[0]
    assert {line.split()[-1] for line in lines} < {'cat', 'dog', 'owl'}


def test_predict_prints_json_and_draws(model_folder, picture, tmp_path, capsys):
    drawing = tmp_path / 'drawing.png'
    arguments = ['--model', f'local-dir:{model_folder}', '--json', '--plot', str(drawing)]
    assert cli.main(['predict', str(picture), str(picture), *arguments]) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert len(predictions) == 2 and predictions[0]['image'] == str(picture)
    assert sum(predictions[0]['probabilities']) == pytest.approx(1, abs=1e-5)
    assert predictions[0]['probabilities'] == sorted(predictions[0]['probabilities'], reverse=True)
    model = timm.create_model(f'local-dir:{model_folder}', pretrained=True).eval()
    from timm_vitres import preprocess

    expected = model(preprocess(picture, model))[0].softmax(-1)
    names = ['cat', 'dog', 'owl']
    assert predictions[0]['labels'][0] == names[expected.argmax()]
    with Image.open(drawing) as image:
        assert image.size[0] > 300


def test_predict_names_what_it_cannot_read_and_goes_on(model_folder, picture, tmp_path, capsys):
    (tmp_path / 'bad.png').write_text('no picture')
    files = [str(tmp_path / name) for name in ('bad.png', 'none.png', 'picture.png')]
    assert cli.main(['predict', *files, '--model', f'local-dir:{model_folder}']) == 1
    printed = capsys.readouterr()
    assert 'picture.png' in printed.out and 'bad.png' in printed.err and 'none.png' in printed.err


def test_imagenet_classes_have_names():
    from timm_vitres.predict import label_names

    names = label_names(timm.create_model('vitresnet_small', device='meta'))
    assert len(names) == 1000 and 'tench' in names[0]
    assert label_names(timm.create_model('test_vitresnet', num_classes=2)) == ['class 0', 'class 1']


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['predict', 'x.png', '--model', 'vitresnet_giant'], 'Unknown model'),
        (['predict', 'x.png', '--model', 'test_vitresnet'], 'No pretrained weights exist for test_vitresnet'),
        (['predict', 'x.png', '--model', 'local-dir:nowhere'], 'not found'),
        (['predict', 'x.png', '--model', 'test_vitresnet', '--topk', '0'], 'topk: got 0'),
        (['finetune', 'nowhere', '--model', 'test_vitresnet'], 'nowhere is not a folder'),
        (['finetune'], 'data_dir: no folder given'),
        (['finetune', '.', '--epochs', '-3'], 'epochs: got -3'),
        (['finetune', '.', '--output', '../run', '--model-kwargs', 'stages=3'], 'stages'),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys, image_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(image_folder)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error
    assert error.splitlines()[-1].startswith('timm-vitres: ')


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
