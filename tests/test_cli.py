import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_vitres import cli
from timm_vitres.commands import publishing as publishing_commands
from timm_vitres.publishing import hub


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


@pytest.fixture
def workplace(tmp_path, model_folder, picture, monkeypatch):
    """Where mistakes are made: a model, models with defects, a checkpoint, pictures, files that are none."""
    model = timm.create_model(f'local-dir:{model_folder}', pretrained=True)
    torch.save(dict(arch='test_vitresnet', state_dict=model.state_dict()), tmp_path / 'weights.pth')
    torch.nn.init.constant_(model.head.weight, float('nan'))
    hub.save(model, tmp_path / 'nan')
    hub.save(timm.create_model('test_vitresnet', num_classes=0, img_size=32), tmp_path / 'headless')
    hub.save(timm.create_model('test_vit', num_classes=3), tmp_path / 'other')
    for name, text in (('broken', '{'), ('list', '[1]'), ('null', '{"architecture": null}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(text)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text').write_text('one\ntwo')
    (tmp_path / 'gap').write_text('one\n\nthree\n')
    (tmp_path / 'binary').write_bytes(bytes(range(256)))
    (tmp_path / 'zero').write_bytes(b'a\0b\nc\nd')
    (tmp_path / 'dangling').symlink_to('nowhere')
    Image.new('L', (10000, 1)).save(tmp_path / 'long.png')
    monkeypatch.chdir(tmp_path)
    return tmp_path


PREDICT = ['predict', 'picture.png', '--model']
EXPLAIN = ['explain', 'picture.png', '--model', 'local-dir:model']
EXPORT = ['export', 'local-dir:model', '--output']
CONVERT = ['convert', 'weights.pth', '--output']
# command line, what the sentence says, exit status
SENTENCES = [
    ([], 'the following arguments are required: COMMAND', 2),
    (['train'], "invalid choice: 'train'", 2),
    ([*PREDICT, ''], "model: '' can not be loaded: Unknown model", 1),
    ([*PREDICT, 'local-dir:'], "model: 'local-dir:' can not be loaded: .* has no model id / path", 1),
    ([*PREDICT, 'local-dir:text'], "model: 'local-dir:text' can not be loaded", 1),
    ([*PREDICT, 'local-dir:empty'], "model: 'local-dir:empty' can not be loaded", 1),
    ([*PREDICT, 'local-dir:broken'], "model: 'local-dir:broken' can not be loaded", 1),
    ([*PREDICT, 'local-dir:list'], "model: 'local-dir:list' can not be loaded", 1),
    ([*PREDICT, 'local-dir:null'], "model: 'local-dir:null' can not be loaded", 1),
    ([*PREDICT, 'hf-hub:a/b/c'], "model: 'hf-hub:a/b/c' can not be loaded", 1),
    ([*PREDICT, 'vitresnet_nano.no_such'], 'can not be loaded: Invalid pretrained tag', 1),
    ([*PREDICT, 'local-dir:nan', '--json'], r'image: for .*picture\.png the model gives no finite numbers', 1),
    ([*PREDICT, 'local-dir:headless'], 'model: it has no classes', 1),
    ([*PREDICT, 'local-dir:model', '--topk', '-1'], 'topk: got -1, expected a number from 1 up', 1),
    ([*PREDICT, 'local-dir:model', '--topk', 'all'], "argument --topk: invalid int value: 'all'", 2),
    ([*PREDICT, 'local-dir:model', '--device', 'gpu'], "device: got 'gpu', which can not be used here", 1),
    ([*PREDICT, 'local-dir:model', '--device', 'cuda:99'], "device: got 'cuda:99', which can not be used here", 1),
    ([*PREDICT, 'local-dir:model', '--device', 'meta'], "device: got 'meta'", 1),
    ([*PREDICT, 'local-dir:none', '--plot', 'text/drawn.png'], r'plot: text/drawn\.png can not be written', 1),
    ([*PREDICT, 'local-dir:none', '--plot', '/proc/drawn.png'], r'plot: /proc/drawn\.png can not be written', 1),
    ([*PREDICT, 'local-dir:none', '--plot', 'empty'], 'plot: empty is a folder', 1),
    ([*PREDICT, 'local-dir:none', '--plot', 'drawn.jpg'], r'plot: got drawn\.jpg, expected the name of a PNG', 1),
    ([*PREDICT, 'local-dir:none', '--plot', './picture.png'], r'plot: picture\.png is an image to be read', 1),
    ([*EXPLAIN, '--output', 'picture.png'], r'output: picture\.png is an image to be read', 1),
    ([*EXPLAIN, '--output', 'empty'], 'output: empty is a folder', 1),
    ([*EXPLAIN, '--size', '0'], 'size: got 0, expected a number from 1 up', 1),
    ([*EXPLAIN, '--target', ''], "target: got '', expected one of the classes: cat, dog, owl", 1),
    ([*EXPLAIN, '--target', '3'], 'target: got 3, expected a class index from 0 to 2', 1),
    (['explain', 'picture.png', '--model', 'local-dir:other'], 'model: got VisionTransformer, expected a hybrid', 1),
    (['explain', 'picture.png', '--model', 'local-dir:headless'], 'model: it has no head', 1),
    (['explain', 'none.png', '--model', 'local-dir:none'], r'image: there is no file none\.png', 1),
    (
        ['explain', 'long.png', '--model', 'local-dir:model'],
        r'long\.png .*its longer side may be up to',
        1,
    ),
    ([*EXPORT, 'model.bin'], r'format: not given, and the name of model\.bin does not say it', 1),
    ([*EXPORT, 'model.onnx', '--format', 'pt2'], r"format: got 'pt2', but model\.onnx is the name of 'onnx'", 1),
    ([*EXPORT, 'model.onnx', '--format', 'tflite'], "argument --format: invalid choice: 'tflite'", 2),
    ([*EXPORT, 'model.onnx', '--precision', 'fp16'], "argument --precision: invalid choice: 'fp16'", 2),
    ([*EXPORT, 'model.onnx', '--precision', 'bf16'], "precision: got 'bf16', format 'onnx' can be fp32 or int8", 1),
    ([*EXPORT, 'empty'], 'output: empty is a folder', 1),
    ([*EXPORT, 'text/model.onnx'], 'output: .* can not be written, since .*text is no folder', 1),
    ([*EXPORT, 'model/model.safetensors', '--format', 'onnx'], r'model\.safetensors: holds no export', 1),
    ([*EXPORT, 'model.onnx', '--num-images', '0'], 'num_images: got 0', 1),
    ([*EXPORT, 'model.onnx', '--num-images', '4'], 'num_images: got no images', 1),
    ([*EXPORT, 'model.onnx', '--img-size', '0'], 'img_size: got 0, expected one or two numbers', 1),
    ([*EXPORT, 'model.onnx', '--img-size', '1', '2', '3'], 'img_size: got 1 2 3, expected one or two numbers', 1),
    (
        [*EXPORT, 'model.onnx', '--img-size', '8'],
        "model: 'local-dir:model' can not be loaded: .*smaller than one token",
        1,
    ),
    ([*EXPORT, 'model.onnx', '--images', 'empty'], 'images: ', 1),
    ([*EXPORT, 'model.onnx', '--images', 'text'], 'image: text cannot be read', 1),
    ([*CONVERT, 'new', '--model-kwargs', 'foo'], "argument --model-kwargs: got 'foo', expected name=value", 2),
    ([*CONVERT, 'new', '--model-kwargs', '=3'], "argument --model-kwargs: got '=3', expected name=value", 2),
    ([*CONVERT, 'new', '--model-kwargs', 'foo=3'], 'foo', 1),
    ([*CONVERT, 'new', '--img-size', '-5'], 'img_size: got -5', 1),
    ([*CONVERT, 'new', '--label-names', 'none'], r'label_names: none can not be read \(No such file', 1),
    ([*CONVERT, 'new', '--label-names', 'empty'], 'label_names: empty can not be read', 1),
    ([*CONVERT, 'new', '--label-names', 'binary'], 'label_names: binary is no text in UTF-8', 1),
    ([*CONVERT, 'new', '--label-names', 'zero'], 'label_names: zero is no text', 1),
    ([*CONVERT, 'new', '--label-names', 'gap'], 'label_names: line 2 of gap is empty', 1),
    ([*CONVERT, 'new', '--label-names', 'text'], 'label_names: got 2, but the model has 3 classes', 1),
    ([*CONVERT, 'model'], 'output: model is not empty, and is not written over', 1),
    ([*CONVERT, 'weights.pth'], r'output: weights\.pth is no folder', 1),
    ([*CONVERT, 'text/new'], 'output: text/new can not be written', 1),
    ([*CONVERT, 'dangling'], 'output: dangling is no folder', 1),
    (['convert', 'model', '--output', 'empty/../model'], 'output: .*model is not empty', 1),
    (['convert', 'local-dir:', '--output', 'new'], "source: got 'local-dir:'", 1),
    (['convert', 'binary', '--output', 'new'], 'binary is no safetensors, torch or npz file', 1),
    (['push', 'empty', 'me/name'], r'empty: has no model\.safetensors', 1),
    (['push', 'model', 'name', '--yes'], "repo_id: got 'name', expected 'owner/name'", 1),
    (['push', 'model', 'a/b/c', '--yes'], "repo_id: got 'a/b/c', expected 'owner/name'", 1),
    (['push', 'model', '../name'], "repo_id: got '../name', expected 'owner/name'", 1),
    (['push', 'model', 'me/my name'], "repo_id: got 'me/my name', expected 'owner/name'", 1),
    (['push', 'model', 'me/name', '--yes', '--revision', ''], "revision: got '', expected the name of a branch", 1),
    (['push', 'model', 'me/name', '--revision', 'a..b'], r"revision: got 'a\.\.b', expected the name of a branch", 1),
    (['push', 'model', 'me/name', '--yes', '--message', ' '], "message: got ' ', expected some words", 1),
    (['verify', ''], "name: got ''", 1),
    (['verify', 'no_such'], 'no_such', 1),
    (['verify', 'model', '--repo', 'x'], "repo: got 'x', expected 'owner/name'", 1),
]


def test_every_mistake_is_one_sentence_and_leaves_nothing(workplace, capsys):
    def files():
        return {path: path.stat().st_mtime_ns for path in workplace.rglob('*') if path.is_file()}

    before = files()
    for arguments, message, expected in SENTENCES:
        try:
            status = cli.main(arguments)
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        last = printed.err.splitlines()[-1] if printed.err else ''
        assert re.match(r'timm-vitres( \w+)?: ', last) and re.search(message, last), (arguments, printed.err)
        assert status == expected and not printed.out, (arguments, printed)
        assert 'Traceback' not in printed.err and files() == before, arguments


class ConnectError(Exception):
    """As that of the library which huggingface_hub speaks through: httpx2, httpx or requests, by its version."""

    __module__ = 'httpx2'


@pytest.mark.parametrize(
    'error, status, said',
    [
        (KeyboardInterrupt(), 130, ''),
        (MemoryError(), 1, 'timm-vitres: there is not enough memory\n'),
        (RuntimeError('two\n  lines'), 1, 'timm-vitres: two lines\n'),
        (
            ConnectError('gone'),
            1,
            'timm-vitres: the Hub does not answer as it should (ConnectError gone); try again.\n',
        ),
    ],
)
def test_how_a_command_ends(error, status, said, capsys, monkeypatch):
    def stop(args):
        raise error

    monkeypatch.setattr(publishing_commands, 'run_verify', stop)
    assert cli.main(['verify', 'x']) == status
    assert capsys.readouterr().err == said


def test_a_mistake_of_ours_shows_where_it_is(monkeypatch):
    monkeypatch.setattr(publishing_commands, 'run_verify', lambda args: {}['key'])
    with pytest.raises(KeyError):
        cli.main(['verify', 'x'])


@pytest.mark.parametrize('arguments', [['--help'], ['push', 'model', 'me/name']])
def test_a_reader_that_leaves_early_is_no_error(arguments, workplace):
    """As in `timm-vitres ... | head -1`, once head is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, '-m', 'timm_vitres.cli', *arguments]
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'}
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, '')


def test_a_reader_of_both_streams_that_leaves_is_no_error(workplace):
    """As in `... 2>&1 | head -1`: a progress bar is the first to meet the closed pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    images = ['picture.png'] * 12  # enough for a bar
    command = [sys.executable, '-m', 'timm_vitres.cli', 'predict', '--model', 'local-dir:model', *images]
    result = subprocess.run(command, stdout=writing, stderr=writing)
    os.close(writing)
    assert result.returncode == 141


def test_a_pipe_that_is_not_stdout_is_a_mistake_that_is_told(monkeypatch, capsys):
    """As that to a worker that died while it was started."""

    def fail(args):
        raise BrokenPipeError(32, 'Broken pipe')

    monkeypatch.setattr(publishing_commands, 'run_verify', fail)
    assert cli.main(['verify', 'x']) == 1
    assert 'Broken pipe' in capsys.readouterr().err


def test_without_stderr_commands_work(workplace):
    """Closed, as some daemons have it: bars go nowhere, and warnings not to stdout."""
    Path('broken.png').write_text('no picture')
    code = 'import sys; sys.stderr = None; from timm_vitres import cli; sys.exit(cli.main())'
    images = ['picture.png'] * 12  # enough for a bar
    command = [sys.executable, '-c', code, 'predict', '--model', 'local-dir:model', '--json', *images, 'broken.png']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and len(json.loads(result.stdout)) == 12


@pytest.mark.parametrize(
    'arguments',
    [
        ['finetune', 'images', '--output', '~/run'],
        ['compare', 'images', '--output', '~/run'],
        ['explain', 'picture.png', '--model', 'local-dir:model', '--output', '~/x.png'],
        ['export', 'local-dir:model', '--output', '~/x.onnx'],
        ['convert', 'weights.pth', '--output', '~/new'],
    ],
)
def test_no_folder_is_called_by_a_tilde(arguments, workplace, capsys):
    """A shell leaves it after '=', and YAML everywhere; `rm -r ~` would take more than such a folder."""
    assert cli.main(arguments) == 1
    assert 'output: got ~/' in capsys.readouterr().err and not Path('~').exists()


def test_a_file_of_the_users_named_compare_is_no_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'compare').write_text('no: [recipe')
    assert cli.main(['compare', 'nowhere', '--output', 'out']) == 1
    assert 'nowhere' in capsys.readouterr().err
