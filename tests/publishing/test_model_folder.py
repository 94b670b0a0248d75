"""A model's folder is replaced whole, or not at all: killed at every write, written by two, full of lies."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from conftest import two

from timm_vitres import writing
from timm_vitres.models import loading
from timm_vitres.publishing import model_folder
from timm_vitres.publishing.conversion import convert
from timm_vitres.publishing.saving import save

# every call of the file layer that changes what a folder holds
WRITES = ('mkdir', 'open', 'replace', 'rename', 'unlink', 'rmdir', 'fsync', 'remove')


class Killed(BaseException):
    pass


@pytest.fixture
def die(monkeypatch):
    """Return `run(function, count, after)`, which dies before or after the count-th write: returns of what, or None."""

    def run(function, count, after=False, error=Killed):
        calls = 0
        with monkeypatch.context() as patch:
            for name in WRITES:
                original = getattr(os, name)

                def dying(*args, original=original, name=name, **kwargs):
                    nonlocal calls
                    if name == 'open' and not args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                        return original(*args, **kwargs)
                    calls += 1
                    if calls == count and not after:
                        raise error('killed')
                    result = original(*args, **kwargs)
                    if calls >= count:  # nothing that a `finally` would still do happens to a killed process
                        raise error('killed')
                    return result

                patch.setattr(os, name, dying)
            try:
                function()
            except error as caught:
                return caught
            except OSError as caught:
                if not isinstance(caught.__cause__, error):
                    raise
                return caught
        return None

    return run


def fingerprint(folder: Path):
    """Return what a user gets of a folder: logits, names, preprocessing."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    cfg = model.pretrained_cfg
    with torch.inference_mode():
        logits = model(torch.ones(1, 3, 64, 64))
    return [round(value, 5) for value in logits[0].tolist()], cfg['label_names'], list(cfg['mean'])


@pytest.mark.parametrize('after', [False, True])
def test_killed_at_every_write_a_folder_is_the_old_or_the_new_model(after, die, tmp_path):
    (first, of_first), (second, of_second) = two()
    old = fingerprint(save(first, tmp_path / 'old', **of_first))
    new = fingerprint(save(second, tmp_path / 'new', **of_second))
    assert old[0] != new[0] and old[1:] != new[1:]
    seen, count = set(), 0
    while True:
        count += 1
        folder = save(first, tmp_path / str(count), **of_first)
        (folder / 'mine.txt').write_text('mine')
        if not die(lambda folder=folder: save(second, folder, **of_second), count, after):
            break
        found = fingerprint(folder)
        assert found in (old, new), f'write {count}: the folder holds another model'
        seen.add(found == new)
        # whoever comes next finishes it, or clears it away
        with model_folder.locked(folder):
            assert fingerprint(folder) == found
        left = {path.name for path in folder.iterdir()}
        assert left == {'model.safetensors', 'config.json', 'README.md', 'mine.txt'}
        assert (folder / 'mine.txt').read_text() == 'mine'
        assert ('Second.' in (folder / 'README.md').read_text()) == (found == new)
        assert fingerprint(save(second, folder, **of_second)) == new
    assert count > 10 and seen == {False, True}


@pytest.mark.parametrize('after', [False, True])
def test_a_model_of_timm_is_never_mixed(after, die, tmp_path):
    """timm's loader can't look for weights: where the config changes, a folder may be refused until it is complete."""
    (first, of_first), (second, of_second) = two('test_resnet')
    old = fingerprint(save(first, tmp_path / 'old', **of_first))
    new = fingerprint(save(second, tmp_path / 'new', **of_second))
    count, refused = 0, 0
    while True:
        count += 1
        folder = save(first, tmp_path / str(count), **of_first)
        if not die(lambda folder=folder: save(second, folder, **of_second), count, after):
            break
        try:
            assert fingerprint(folder) in (old, new), f'write {count}: the folder holds another model'
        except FileNotFoundError:
            refused += 1
        with model_folder.locked(folder):
            assert fingerprint(folder) in (old, new)
    assert count > 10 and 1 <= refused <= 3
    # as a run saves one epoch after another, with the same config, every moment loads
    count = 0
    same = {**of_second, 'label_names': of_first['label_names'], 'data_config': of_first['data_config']}
    new = fingerprint(save(second, tmp_path / 'same', **same))
    while True:
        count += 1
        folder = save(first, tmp_path / f'same{count}', **of_first)
        if not die(lambda folder=folder: save(second, folder, **same), count, after):
            break
        assert fingerprint(folder) in (old, new)


@pytest.mark.parametrize('name', ['test_vitresnet', 'test_resnet'])
def test_what_clears_up_may_be_killed_too(name, die, tmp_path):
    """Each state that a killed save leaves, then a kill at each write of the one who comes next, then another."""
    (first, of_first), (second, of_second) = two(name)
    models = [
        fingerprint(save(first, tmp_path / 'old', **of_first)),
        fingerprint(save(second, tmp_path / 'new', **of_second)),
    ]
    count, deaths = 0, 0
    while True:
        count += 1
        folder = save(first, tmp_path / str(count), **of_first)
        if not die(lambda folder=folder: save(second, folder, **of_second), count):
            break
        if not any(path.is_dir() for path in folder.iterdir()):
            continue  # nothing to clear up

        def enter(folder):
            with model_folder.locked(folder):
                pass

        for write in range(1, 20):
            copy = shutil.copytree(folder, tmp_path / f'{count}-{write}')
            if not die(lambda copy=copy: enter(copy), write):
                break
            deaths += 1
            with suppress(FileNotFoundError):  # timm's may be refused until it is complete
                assert fingerprint(copy) in models, f'write {count}, then {write}'
            enter(copy)
            assert fingerprint(copy) in models
            assert {path.name for path in copy.iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    assert deaths > 10


def test_a_first_save_that_is_killed_leaves_no_model_or_the_model(die, tmp_path):
    model, facts = next(two())
    whole = fingerprint(save(model, tmp_path / 'whole', **facts))
    count = 0
    while True:
        count += 1
        folder = tmp_path / str(count)
        if not die(lambda folder=folder: save(model, folder, **facts), count):
            break
        if folder.is_dir():
            with model_folder.locked(folder):
                names = {path.name for path in folder.iterdir()}
            assert names in (set(), {'model.safetensors', 'config.json', 'README.md'})
            assert not names or fingerprint(folder) == whole
    assert count > 5


@pytest.mark.parametrize('error', [OSError, RuntimeError])
def test_an_error_at_every_write_is_one_sentence(error, die, tmp_path):
    (first, of_first), (second, of_second) = two()
    old = fingerprint(save(first, tmp_path / 'old', **of_first))
    new = fingerprint(save(second, tmp_path / 'new', **of_second))
    count = worded = 0
    while True:
        count += 1
        folder = save(first, tmp_path / str(count), **of_first)
        caught = die(lambda folder=folder: save(second, folder, **of_second), count, error=error)
        if caught is None:
            break
        sentence = str(caught)
        is_worded = '\n' not in sentence and str(tmp_path / str(count)) in sentence
        # what is rendered in the system's own place for such files comes before all that touches the folder; torch's
        # RuntimeError comes while tensors are written, and not while files are put in place
        assert is_worded or (sentence == 'killed' and (not worded or error is RuntimeError)), sentence
        worded += is_worded
        assert fingerprint(folder) in (old, new)
    assert worded > (5 if error is OSError else 0)  # a RuntimeError meets the removal of what was written, too


def test_convert_is_killed_at_every_write(die, tmp_path):
    model, facts = next(two())
    source = save(model, tmp_path / 'source', **facts)
    whole = fingerprint(convert(source, tmp_path / 'whole'))
    count, seen = 0, set()
    while True:
        count += 1
        folder = tmp_path / str(count)
        if not die(lambda folder=folder: convert(source, folder), count):
            break
        is_there = (folder / 'config.json').exists()
        seen.add(is_there)
        assert not is_there or fingerprint(folder) == whole
    assert count > 5 and seen == {False, True}


def test_weights_in_shards_that_a_killed_writer_replaces_are_not_read(die, tmp_path):
    """The new model's config.json has its place, its weights have not: the shards beside it are the old model's."""
    (first, of_first), (second, of_second) = two()
    new = fingerprint(save(second, tmp_path / 'new', **of_second))
    folder = save(first, tmp_path / 'model', **of_first)
    (folder / 'model.safetensors').rename(folder / 'model-00001-of-00001.safetensors')
    names = dict.fromkeys(first.state_dict(), 'model-00001-of-00001.safetensors')
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': names}))
    old, count = fingerprint(folder), 0
    seen = set()
    while True:
        count += 1
        copied = shutil.copytree(folder, tmp_path / str(count))
        if not die(lambda copied=copied: save(second, copied, **of_second), count):
            break
        found = fingerprint(copied)
        assert found in (old, new)
        seen.add(found == new)
    assert seen == {False, True}


@pytest.mark.parametrize('moved', ['config.json', 'model.safetensors'])
def test_what_was_put_there_after_a_kill_stays(moved, tmp_path):
    """A remainder is completed only where the folder still holds its other half."""
    folder, other = (save(model, tmp_path / name, **told) for name, (model, told) in zip(('folder', 'other'), two()))
    digest = json.loads((folder / 'config.json').read_text())['model_sha256']
    ready = folder / f'{writing.TEMPORARY}{digest}'
    ready.mkdir()
    for name in {'config.json', 'model.safetensors', 'README.md'} - {moved}:
        shutil.copy(folder / name, ready / name)
    for name in ('config.json', 'model.safetensors'):  # a backup of the user's
        shutil.copy(other / name, folder / name)
    with model_folder.locked(folder):
        pass
    assert not ready.exists()
    for name in ('config.json', 'model.safetensors'):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_planted_links_are_not_followed(tmp_path):
    target = tmp_path / 'target'
    target.write_text('mine')
    folder = tmp_path / 'model'
    folder.mkdir()
    for name in ('model.safetensors', 'config.json', 'README.md'):
        (folder / f'.{name}.tmp').symlink_to(target)
        (folder / f'{writing.TEMPORARY}0-{name}').symlink_to(target)
        (folder / name).symlink_to(target)
    (folder / f'{writing.TEMPORARY}{"0" * 64}').symlink_to(tmp_path)
    model, facts = next(two())
    save(model, folder, **facts)
    assert target.read_text() == 'mine' and fingerprint(folder)[1] == facts['label_names']
    with writing.replacing(folder / 'README.md') as beside:
        assert not beside.is_symlink()
        beside.write_text('new')
    assert target.read_text() == 'mine'


def test_what_an_export_is_writing_beside_a_model_stays(tmp_path):
    model, facts = next(two())
    save(model, tmp_path, **facts)
    written = tmp_path / f'{writing.TEMPORARY}model.onnx-ab12' / 'model.onnx'
    left = tmp_path / f'{writing.TEMPORARY}{"0" * 16}' / 'model.safetensors'
    for path in (written, left):
        path.parent.mkdir()
        path.write_text('part')
    save(model, tmp_path, **facts)
    assert written.read_text() == 'part' and not left.parent.exists()


def test_weights_with_another_config_are_noticed(tmp_path):
    (first, of_first), (second, of_second) = two()
    save(first, tmp_path / 'first', **of_first)
    save(second, tmp_path / 'second', **of_second)
    os.replace(tmp_path / 'second' / 'model.safetensors', tmp_path / 'first' / 'model.safetensors')
    with pytest.raises(OSError, match=r'its sha256 is .*, not .*take model_sha256 out of config\.json'):
        timm.create_model(f'local-dir:{tmp_path}/first', pretrained=True)


def _save_again_and_again(folder, seed, results):
    torch.set_num_threads(1)
    model, facts = list(two())[seed]
    refused = 0
    for _ in range(15):
        try:
            save(model, folder, **facts)
        except OSError as error:
            assert 'is being written by another process' in str(error)
            refused += 1
    results.put(15 - refused)


def test_two_savers_of_one_folder(tmp_path):
    (first, of_first), (second, of_second) = two()
    models = [
        fingerprint(save(first, tmp_path / 'a', **of_first)),
        fingerprint(save(second, tmp_path / 'b', **of_second)),
    ]
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    savers = [context.Process(target=_save_again_and_again, args=(tmp_path / 'both', seed, results)) for seed in (0, 1)]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join(120)
        assert saver.exitcode == 0
    assert sum(results.get(timeout=10) for _ in savers) > 0
    assert fingerprint(tmp_path / 'both') in models
    assert {path.name for path in (tmp_path / 'both').iterdir()} == {'model.safetensors', 'config.json', 'README.md'}


def test_a_reader_beside_savers_gets_a_whole_model_or_a_sentence(tmp_path):
    (first, of_first), (second, of_second) = two()
    models = [
        fingerprint(save(first, tmp_path / 'a', **of_first)),
        fingerprint(save(second, tmp_path / 'b', **of_second)),
    ]
    context = multiprocessing.get_context('fork')
    saver = context.Process(target=_save_both, args=(tmp_path / 'both',))
    save(first, tmp_path / 'both', **of_first)
    saver.start()
    found, deadline = [], time.monotonic() + 300
    while saver.is_alive() and time.monotonic() < deadline:
        try:
            found.append(fingerprint(tmp_path / 'both'))
        except OSError as error:
            assert re.search('was replaced while it was being read|was changed after', str(error)), error
    assert saver.exitcode == 0 and found and all(one in models for one in found)


def _save_both(folder):
    torch.set_num_threads(1)
    for _ in range(6):
        for model, facts in two():
            save(model, folder, **facts)


def test_weights_that_changed_after_the_config_was_read_are_noticed(tmp_path, monkeypatch):
    """timm reads config.json, builds, and then the weights are read: a save in between must not mix them."""
    (first, of_first), (second, of_second) = two()
    save(first, tmp_path, **of_first)
    find = loading.find_weights

    def late(*args):
        save(second, tmp_path, **of_second)
        return find(*args)

    monkeypatch.setattr(loading, 'find_weights', late)
    with pytest.raises(OSError, match='its model was replaced while it was being read; load it again'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


def test_a_lock_is_refused_to_others_and_ends_with_its_process(tmp_path):
    folder = tmp_path / 'run'
    sentence = f'{folder}: is being written by another process'
    with model_folder.locked(folder), model_folder.locked(folder):  # the same thread may
        errors = []

        def other():
            try:
                with model_folder.locked(folder):
                    errors.append(None)
            except OSError as error:
                errors.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert errors and errors[0].startswith(sentence)
        code = 'import pathlib, sys\nfrom timm_vitres.publishing.model_folder import locked\n'
        code += 'with locked(pathlib.Path(sys.argv[1])): pass'
        result = subprocess.run([sys.executable, '-c', code, folder], capture_output=True, text=True)
        assert result.returncode == 1 and sentence in result.stderr
        # a loader process that outlives its run, as after kill -9, does not keep the folder
        child = multiprocessing.get_context('fork').Process(target=threading.Event().wait, daemon=True)
        child.start()
    try:
        result = subprocess.run([sys.executable, '-c', code, folder], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    finally:
        child.kill()
    with pytest.raises(OSError, match='is no folder'), model_folder.locked(Path(__file__)):
        pass


def test_a_folder_where_a_file_belongs_is_named(tmp_path):
    (tmp_path / 'config.json').mkdir()
    model, facts = next(two())
    with pytest.raises(OSError, match=r'config\.json is a folder'):
        save(model, tmp_path, **facts)
    assert {path.name for path in tmp_path.iterdir()} == {'config.json'}
