"""Every argument of the command line means what the user wrote, or is refused in one sentence that names it."""

import argparse
import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import rename_
from PIL import Image

import timm_vitres
from timm_vitres import arguments
from timm_vitres.pictures import plot_images, plot_predictions
from timm_vitres.prediction import Prediction


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The present folder, which has one of each kind of file and folder."""
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    Path('full').mkdir()
    Path('full', 'mine.txt').write_text('mine')
    Path('file.txt').write_text('mine')
    Path('picture.png').write_text('mine')
    Path('dangling').symlink_to('nowhere')
    return tmp_path


def test_a_model_is_loaded_for_evaluation(model, tmp_path):
    folder = timm_vitres.save(model, tmp_path)
    loaded = arguments.load_model(f'local-dir:{folder}')
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        assert not loaded.training and torch.equal(loaded(x), model(x))
    other = arguments.load_model(f'local-dir:{folder}', 'cpu', img_size=(64, 96))
    assert other.patch_embed.img_size == (64, 96)


@pytest.mark.parametrize(
    'name, device, message',
    [
        ('test_vitresnet', 'gpu', "device: got 'gpu', which can not be used here"),
        ('test_vitresnet', 'cuda:99', "device: got 'cuda:99', which can not be used here"),
        ('test_vitresnet', 'meta', "device: got 'meta', which can not be used here"),
        ('vitresnet_giant', 'cpu', r"model: 'vitresnet_giant' can not be loaded: Unknown model"),
        ('test_vitresnet', 'cpu', "model: 'test_vitresnet' can not be loaded: No pretrained weights exist"),
        ('local-dir:empty', 'cpu', "model: 'local-dir:empty' can not be loaded"),
        ('local-dir:broken', 'cpu', r"model: 'local-dir:broken' can not be loaded: broken/config\.json: is no JSON"),
    ],
)
def test_what_can_not_be_loaded_is_named(name, device, message, here):
    Path('broken').mkdir()
    Path('broken', 'config.json').write_text('{')
    with pytest.raises(ValueError, match=f'^{message}') as caught:
        arguments.load_model(name, device)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize('error, raised', [(ConnectionError('gone'), ConnectionError), (KeyError('a'), ValueError)])
def test_a_connection_that_broke_is_no_mistake_in_the_name(error, raised, monkeypatch):
    def fail(name, **kwargs):
        raise error

    monkeypatch.setattr(timm, 'create_model', fail)
    with pytest.raises(raised, match=r"^gone$|^model: 'x' can not be loaded: KeyError 'a'$"):
        arguments.load_model('x')


def test_counts_begin_at_one():
    arguments.check_count('topk', 1)
    arguments.check_count('topk', None)
    for number in (0, -1):
        with pytest.raises(ValueError, match=f'^topk: got {number}, expected a number from 1 up'):
            arguments.check_count('topk', number)


def test_a_picture_can_be_drawn_to_a_png_that_is_not_read(here):
    for name in ('new.png', 'NEW.PNG', 'new/folder/a.png'):
        arguments.check_picture('plot', Path(name), [Path('picture.png')])
    assert not list(here.rglob('*new*'))
    for path, message in (
        ('new.jpg', r'plot: got new\.jpg, expected the name of a PNG'),
        ('new', 'plot: got new, expected the name of a PNG'),
        ('full/../picture.png', r'plot: full/\.\./picture\.png is an image to be read'),
        ('empty', 'plot: empty is a folder'),
        ('file.txt/a.png', r'plot: file\.txt/a\.png can not be written'),
    ):
        with pytest.raises((ValueError, OSError), match=f'^{message}'):
            arguments.check_picture('plot', Path(path), [Path('other.png'), Path('picture.png')])


def test_a_picture_of_somebodys_is_not_drawn_over(here):
    """As by `--plot *.png`, of which the shell makes the first photograph the plot."""
    Image.new('RGB', (8, 8)).save('photo.png')
    Path('text.png').write_text('mine')
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    plot_images([Image.new('RGB', (8, 8))], ['mine'], Path('figure.png'))  # matplotlib's, and a run's
    for name in ('photo.png', 'text.png', 'figure.png'):
        with pytest.raises(FileExistsError, match=rf'^plot: {name} is there, is no picture that predict or explain'):
            arguments.check_picture('plot', Path(name), [])
    assert before.items() <= {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}.items()
    Path('none.png').write_text('')
    plot_predictions([Prediction('photo.png', ['caf\udce9'], [0.5])], Path('drawn.png'))  # a name that is no text
    for name in ('none.png', 'drawn.png'):
        arguments.check_picture('plot', Path(name), [])


def test_values_may_be_given_in_two_goes():
    parser = argparse.ArgumentParser()
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=arguments.NamedValues)
    given = ['--model-kwargs', 'depth=2', 'act=1', '--model-kwargs', 'act=2', 'size=3']
    assert parser.parse_args(given).model_kwargs == dict(depth=2, act=2, size=3)
    assert parser.parse_args([]).model_kwargs == {}


def test_a_picture_needs_matplotlib(here, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r'^output: needs matplotlib, pip install "timm-vitres\[plot\]"'):
        arguments.check_picture('output', Path('new.png'), [])


def test_a_new_folder_is_new_or_empty(here):
    before = sorted(here.rglob('*'))
    for name in ('new', 'new/folder', 'empty'):
        arguments.check_new_folder('output', Path(name))
    for name, message in (
        ('full', 'full is not empty, and is not written over; give a new folder'),
        ('empty/../full', 'empty/../full is not empty'),
        ('file.txt', r'file\.txt is no folder, and is not written over'),
        ('dangling', 'dangling is no folder, and is not written over'),
        ('file.txt/new', r'file\.txt/new can not be written'),
    ):
        with pytest.raises(OSError, match=f'^output: {message}'):
            arguments.check_new_folder('output', Path(name))
    assert sorted(here.rglob('*')) == before


def test_an_empty_folder_must_take_files(here, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('timm_vitres.writing.tempfile.TemporaryFile', refuse)
    with pytest.raises(
        OSError, match=rf'^output: empty/model can not be written \(Permission denied in {here}/empty\)'
    ):
        arguments.check_new_folder('output', Path('empty'))


@pytest.mark.parametrize('branch', [None, 'main', 'better', 'me/better', 'v1.0', 'a-b_c', 'höher', 'a@b'])
def test_names_of_branches_are_taken(branch):
    arguments.check_branch('revision', branch)


BRANCHES = ['', 'a b', 'a..b', '-a', '.a', 'a/.b', 'a.', 'a.lock', 'a.lock/b', '/a', 'a/', 'a//b', 'a~1', 'a^', 'a:b']
BRANCHES += ['a?', 'a*', 'a[b', 'a\\b', 'a@{1', 'a\tb', 'a\x7f']


@pytest.mark.parametrize('branch', BRANCHES)
def test_what_git_takes_as_no_branch_is_refused(branch):
    with pytest.raises(ValueError, match=rf'^revision: got {re.escape(repr(branch))}, expected the name of a branch'):
        arguments.check_branch('revision', branch)


def test_repositories_are_called_by_owner_and_name():
    for repo_id in ('me/name', 'me-too/na_me-1.0'):
        arguments.check_repo_id('repo_id', repo_id)
    for repo_id in ('', 'name', 'a/b/c', '../name', 'me/my name', 'me/', '/name', 'me/name.git', 'me/a--b'):
        with pytest.raises(ValueError, match=f"^repo_id: got '{repo_id}', expected 'owner/name'"):
            arguments.check_repo_id('repo_id', repo_id)


def test_a_target_is_a_name_first_and_then_an_index(model):
    rename_(model, ['1', '-2', 'cat'])
    cases = [(None, None), ('1', '1'), ('-2', '-2'), ('cat', 'cat'), ('0', 0), ('2', 2), ('-1', -1), ('7', 7)]
    for text, meant in [*cases, ('dog', 'dog'), ('1.0', '1.0'), ('', ''), ('+1', '+1')]:
        found = arguments.class_of(text, model)
        assert found == meant and type(found) is type(meant), text
    assert arguments.class_of('1', timm.create_model('test_vitresnet', num_classes=0)) == '1'


def test_names_are_read_line_by_line(here):
    for data, names in (
        (b'cat\ndog', ['cat', 'dog']),
        (b'cat\r\nblue dog \r\n\r\n', ['cat', 'blue dog']),
        ('\ufeffKäfer\n'.encode(), ['Käfer']),
        ('a\u2028b\x85\nc\n'.encode(), ['a\u2028b', 'c']),
    ):
        Path('names').write_bytes(data)
        assert arguments.read_names(Path('names')) == names


@pytest.mark.parametrize(
    'data, error, message',
    [
        (b'one\n\nthree\n', ValueError, 'line 2 of names is empty, expected the name of a class'),
        (b'', ValueError, 'line 1 of names is empty'),
        (b'a\0b\n', ValueError, r'names is no text \(it has a byte that is 0\)'),
        (b'caf\xe9\n', ValueError, r'names is no text in UTF-8 \('),
        (None, OSError, r'names can not be read \(No such file or directory\)'),
    ],
)
def test_a_file_without_names_is_named(data, error, message, here):
    if data is not None:
        Path('names').write_bytes(data)
    with pytest.raises(error, match=f'^label_names: {message}'):
        arguments.read_names(Path('names'))


def test_sizes_are_one_number_or_two():
    for values, size in ((None, None), ([64], 64), ([64, 96], (64, 96))):
        assert arguments.size_of(values) == size
    for values, shown in (([0], '0'), ([64, -1], '64 -1'), ([1, 2, 3], '1 2 3')):
        with pytest.raises(ValueError, match=f'^img_size: got {shown}, expected one or two numbers of pixels'):
            arguments.size_of(values)


@pytest.mark.parametrize(
    'error, line',
    [
        (ValueError('lr: got 0.'), 'lr: got 0.'),
        (RuntimeError('two\n   lines'), 'two lines'),
        (OSError(2, 'No such file', 'a.png'), "[Errno 2] No such file: 'a.png'"),
        (MemoryError(), 'there is not enough memory'),
        (ValueError(), 'ValueError'),
        (KeyError('key'), "KeyError 'key'"),  # a KeyError is our mistake, not the user's
        (ZeroDivisionError(), 'ZeroDivisionError'),
    ],
)
def test_an_error_is_told_in_one_line(error, line):
    assert arguments.one_line(error) == line
