"""Images are checked before a run, or beside it, and the check ends with the run, however that ends."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import draw
from tqdm import tqdm

from timm_vitres.training import checking
from timm_vitres.training.checking import BackgroundCheck, problem, raise_for, unreadable
from timm_vitres.training.datasets import load_data
from timm_vitres.training.settings import FinetuneCfg


@pytest.fixture
def images(tmp_path):
    """Five images, of which the second and the fourth can't be read."""
    paths = [str(draw(tmp_path / f'{number}.png', number)) for number in range(5)]
    for path in (paths[1], paths[3]):
        with open(path, 'w') as file:
            file.write('no image')
    return paths


def test_unreadable_images_and_their_reasons(images):
    assert problem(images[0], 'RGB') is None
    bad = unreadable(images, 'RGB')
    assert list(bad) == [images[1], images[3]] and bad[images[1]] == problem(images[1], 'RGB')
    assert bad[images[1]].startswith('cannot be read as an image (')
    raise_for({}, 'Advice.')
    with pytest.raises(
        ValueError, match=r'^image: .*1\.png cannot be read .*\)\. 1 more cannot be read either\. Advice'
    ):
        raise_for(bad, 'Advice.')


def test_processes_find_the_same(images, monkeypatch):
    many = images * 50
    expected = unreadable(many, 'RGB')
    monkeypatch.setattr(checking, 'FEW', 0)
    assert unreadable(many, 'RGB') == expected and len(expected) == 2
    seen = []
    monkeypatch.setattr(checking, 'DataLoader', lambda *args, num_workers, **kwargs: seen.append(num_workers) or [])
    for workers in (0, 1):
        unreadable(many, 'RGB', workers)
    assert seen[0] == 0 < seen[1]


def test_the_bar_may_be_switched_off(tmp_path, monkeypatch):
    paths = [str(draw(tmp_path / f'{number}.png', number)) for number in range(70)]
    (tmp_path / '66.png').write_text('no image')
    monkeypatch.setattr(checking, 'tqdm', partial(tqdm, disable=True))  # as TQDM_DISABLE=1 does
    assert list(unreadable(paths, 'RGB')) == [paths[66]]


def test_a_background_check_finds_the_same(images):
    with BackgroundCheck(images, 'RGB', 'Advice.') as check:
        process = check.process
        check.start()
        assert check.process is process
        check.wait(300)
        assert process.exitcode == 0
        with pytest.raises(ValueError) as caught:
            check.raise_if_bad()
        assert check.is_done and check.bad == unreadable(images, 'RGB')
    with pytest.raises(ValueError) as expected:
        raise_for(check.bad, 'Advice.')
    assert str(caught.value) == str(expected.value)


def test_a_background_check_of_good_images_says_nothing(images):
    check = BackgroundCheck(images[::2], 'RGB', 'Advice.')
    check.stop()
    check.raise_if_bad()
    with check:
        check.wait(300)
        check.raise_if_bad()
        assert check.is_done and not check.bad


def test_a_background_check_ends_when_it_is_stopped_or_killed(images, caplog):
    for end, warnings in ((lambda check: check.stop(), 0), (lambda check: os.kill(check.process.pid, 9), 1)):
        check = BackgroundCheck(images[:1] * 10**6, 'RGB', 'Advice.')
        check.start()
        assert check.process.is_alive()
        end(check)
        check.wait(300)
        assert check.process.exitcode != 0
        check.raise_if_bad()
        check.raise_if_bad()
        assert caplog.text.count('the check of images ended early') == warnings


@pytest.mark.parametrize('number', [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_background_check_does_not_outlive_its_run(number, images):
    code = (
        'import sys, time\nfrom timm_vitres.training.checking import BackgroundCheck\n'
        'check = BackgroundCheck(sys.argv[1:] * 10**6, "RGB", "")\ncheck.start()\n'
        'print(check.process.pid, flush=True)\ntime.sleep(60)'
    )
    run = subprocess.Popen(
        [sys.executable, '-c', code, images[0]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pid = int(run.stdout.readline())
    os.kill(pid, 0)
    if hasattr(os, 'getpriority'):
        deadline = time.monotonic() + 120
        while os.getpriority(os.PRIO_PROCESS, pid) < 19 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    run.send_signal(number)
    run.wait(120)
    deadline = time.monotonic() + 120
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    """Return whether a process runs; one that ended may wait for its parent as a zombie."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_a_big_folder_is_checked_while_it_trains(image_folder, monkeypatch, caplog):
    monkeypatch.setattr('timm_vitres.training.datasets.MANY', 20)
    cfg = FinetuneCfg(data_dir=str(image_folder), val_frac=0.25)
    caplog.set_level('INFO')
    recorded = load_data(cfg, 'RGB').record()
    bad = image_folder / recorded['validation'][-1][0]
    content = bad.read_bytes()
    bad.write_bytes(content[:100] + bytes(len(content) - 100))
    data = load_data(cfg, 'RGB')
    assert '24 images: they are opened while the run trains' in caplog.text
    # validation images come first: a run opens them last
    names = [os.path.relpath(path, image_folder) for path in data.check.paths]
    assert names == [name for split in ('validation', 'train') for name, _, _ in data.record()[split]]
    for check, advice in ((data.check, 'then begin another run'), (load_data(cfg, 'RGB', recorded).check, 'put the')):
        with check:
            check.wait(300)
            with pytest.raises(ValueError, match=f'{bad.name} cannot be read .*{advice}'):
                check.raise_if_bad()


def test_what_has_no_background_check(image_folder, monkeypatch, caplog):
    def load(**kwargs):
        return load_data(FinetuneCfg(data_dir=str(image_folder), **kwargs), 'RGB')

    assert load().check is None and checking.MANY == 20000
    monkeypatch.setattr('timm_vitres.training.datasets.MANY', 20)
    assert load().check is not None and load(no_check=True).check is None
    bad = image_folder / 'down' / '3.png'
    bad.write_text('')
    caplog.set_level('INFO')
    data = load(skip_bad=True)
    assert data.check is None and str(bad) in data.left_out
    assert 'all 24 images are opened before training' in caplog.text
