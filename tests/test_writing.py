"""A file is replaced whole or not at all, and a path that can't be written to is refused beforehand."""

import mmap
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors

from timm_vitres import writing
from timm_vitres.writing import TEMPORARY, check_output, replacing, sync


@pytest.fixture
def old(tmp_path):
    """A file that exists before each test writes."""
    path = tmp_path / 'file.txt'
    path.write_text('old')
    return path


def test_a_file_is_replaced_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / 'a' / 'new' / 'folder' / 'file.txt'
    with replacing(path) as beside:
        beside.write_text('first')
        assert not path.exists() and beside.parent == path.parent and beside.name.startswith(TEMPORARY)
    assert path.read_text() == 'first'
    with replacing(path) as beside:
        beside.write_text('second')
        assert path.read_text() == 'first'
    assert path.read_text() == 'second'
    assert os.listdir(path.parent) == ['file.txt']


def test_what_another_program_looks_at_is_tried_again(old, monkeypatch):
    """Windows refuses to rename what is open, as in a virus scanner's hands for a moment."""
    rename, refused = os.replace, []

    def refuse(source, target):
        if len(refused) < 2:
            refused.append(target)
            raise PermissionError(13, 'Access is denied')
        rename(source, target)

    monkeypatch.setattr(os, 'replace', refuse)
    monkeypatch.setattr(writing, 'PAUSES', (0.0, 0.0))
    with replacing(old) as beside:
        beside.write_text('new')
    assert old.read_text() == 'new' and len(refused) == 2
    refused.clear()
    monkeypatch.setattr(writing, 'PAUSES', (0.0,))
    with pytest.raises(OSError, match='could not be written'), replacing(old) as beside:
        beside.write_text('newer')
    assert old.read_text() == 'new' and os.listdir(old.parent) == ['file.txt']


def test_a_drive_that_is_not_there(monkeypatch):
    monkeypatch.setattr(os.path, 'lexists', lambda path: False)
    with pytest.raises(OSError, match=r'output: /nowhere/m\.onnx can not be written, since there is no /\.'):
        check_output('output', '/nowhere/m.onnx')


def test_two_writers_do_not_share_what_they_write(old):
    with replacing(old) as first, replacing(old) as second:
        first.write_text('first')
        second.write_text('second')
    assert old.read_text() == 'first'  # the outer block ends last
    assert os.listdir(old.parent) == ['file.txt']


def test_a_kill_leaves_the_old_file(old):
    code = (
        'import os, pathlib, signal, sys\n'
        'from timm_vitres.writing import replacing\n'
        'with replacing(pathlib.Path(sys.argv[1])) as beside:\n'
        "    beside.write_text('new')\n"
        '    os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    result = subprocess.run([sys.executable, '-c', code, old], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert old.read_text() == 'old'
    (left,) = set(old.parent.iterdir()) - {old}
    assert left.name.startswith(TEMPORARY) and left.read_text() == 'new'


@pytest.mark.parametrize(
    'error, raised',
    [
        (OSError(28, 'No space left on device'), OSError),
        (RuntimeError('PytorchStreamWriter failed'), OSError),
        (safetensors.SafetensorError('Error while serializing'), OSError),
        (ValueError('a mistake'), ValueError),
        (KeyboardInterrupt('a key'), KeyboardInterrupt),
    ],
)
def test_an_error_while_writing_leaves_the_old_file(error, raised, old):
    """Errors of the disk become one sentence that names the file; all others are passed on."""
    with pytest.raises(raised) as caught, replacing(old) as beside:
        beside.write_text('half')
        raise error
    if raised is OSError:
        sentence = f'{old} could not be written ({error}); its last version, if any, is untouched.'
        assert str(caught.value) == sentence and caught.value.__cause__ is error
    else:
        assert caught.value is error
    assert old.read_text() == 'old' and os.listdir(old.parent) == ['file.txt']


@pytest.mark.parametrize('name', ['fsync', 'replace'])
def test_a_call_of_the_system_that_fails_leaves_the_old_file(name, old, monkeypatch):
    def fail(*args):
        raise OSError(5, 'Input/output error')

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match=r'file\.txt could not be written \(.*Input/output error\)'), replacing(old) as p:
        p.write_text('new')
    monkeypatch.undo()
    assert old.read_text() == 'old' and os.listdir(old.parent) == ['file.txt']


def test_a_folder_that_can_not_be_made_is_one_sentence(old):
    path = old / 'below' / 'a.txt'
    with pytest.raises(OSError, match=rf'{re.escape(str(path))} could not be written'), replacing(path):
        pytest.fail('there is nothing to write to')
    assert old.read_text() == 'old'


def test_what_is_renamed_is_on_the_disk_before(old, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda file: calls.append(('fsync', os.fstat(file).st_ino)) or fsync(file))
    monkeypatch.setattr(os, 'replace', lambda a, b: calls.append(('replace', os.stat(a).st_ino)) or replace(a, b))
    with replacing(old) as beside:
        beside.write_text('new')
    assert calls == [('fsync', old.stat().st_ino), ('replace', old.stat().st_ino)]
    calls.clear()
    sync(old)
    assert calls == [('fsync', old.stat().st_ino)] and old.read_text() == 'new'


def test_whoever_has_mapped_the_old_file_keeps_it(old):
    with old.open('rb') as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        with replacing(old) as beside:
            beside.write_text('new')
        assert mapped[:] == b'old'
    assert old.read_text() == 'new'


@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read(umask, mode, tmp_path):
    """Some writers, such as safetensors, make a new file that nobody else may read."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / 'a.txt') as beside:
            beside.unlink()
            beside.touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / 'a.txt').stat().st_mode) == mode


def test_a_planted_link_is_not_written_through(tmp_path, monkeypatch):
    """An attacker may even know the name of the file beside."""
    monkeypatch.setattr(writing.secrets, 'token_hex', lambda size: 'known')
    (tmp_path / 'target').write_text('mine')
    (tmp_path / f'{TEMPORARY}known-new.txt').symlink_to(tmp_path / 'target')
    with pytest.raises(OSError, match=r'a\.txt could not be written .*File exists'), replacing(tmp_path / 'a.txt'):
        pytest.fail('it was opened')
    assert (tmp_path / 'target').read_text() == 'mine' and not (tmp_path / 'a.txt').exists()


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    path = tmp_path / f'{"a" * 251}.txt'
    with replacing(path) as beside:
        beside.write_text('new')
    assert path.read_text() == 'new' and beside.suffix == '.txt'


def test_a_link_is_replaced_and_what_it_leads_to_is_not(old):
    link = old.with_name('link.txt')
    link.symlink_to(old)
    with replacing(link) as beside:
        beside.write_text('new')
    assert not link.is_symlink() and link.read_text() == 'new' and old.read_text() == 'old'


def test_where_a_file_can_be_written_nothing_is_left_of_the_check(old):
    for path in (old, old.with_name('other.txt'), old.parent / 'a' / 'b' / 'c.txt'):
        assert check_output('output', str(path)) == check_output('output', path) == path
    assert os.listdir(old.parent) == ['file.txt'] and old.read_text() == 'old'


@pytest.mark.parametrize(
    'path, error, message',
    [
        ('', ValueError, "output: got '', expected the path of a file"),
        ('/', ValueError, "output: got '/', expected the path of a file"),
        ('a\0b', ValueError, r"output: got 'a\\x00b', expected the path of a file"),
        (5, ValueError, "output: got '5', expected the path of a file"),
        ('folder', IsADirectoryError, 'output: folder is a folder, expected the path of a file'),
        ('pipe', OSError, 'output: pipe is no ordinary file, and is not written over'),
        ('file.txt/a/b', OSError, r'output: file\.txt/a/b can not be written, since .*file\.txt is no folder'),
        ('dangling/b', OSError, r'output: dangling/b can not be written, since .*dangling is no folder'),
    ],
)
def test_where_no_file_can_be_written_is_named(path, error, message, old, monkeypatch):
    monkeypatch.chdir(old.parent)
    Path('folder').mkdir()
    os.mkfifo('pipe')
    Path('dangling').symlink_to('nowhere')
    before = sorted(os.listdir())
    with pytest.raises(error, match=f'^{message}'):
        check_output('output', path)
    assert sorted(os.listdir()) == before


def test_a_folder_without_the_right_to_write_is_named(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(writing.tempfile, 'TemporaryFile', refuse)
    with pytest.raises(OSError, match=rf'plot: .*a\.png can not be written \(Permission denied in {tmp_path}\)'):
        check_output('plot', tmp_path / 'new' / 'a.png')
