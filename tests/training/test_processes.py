import csv
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import write_folder
from safetensors.torch import load_file

import timm_vitres
from timm_vitres.training import processes as module
from timm_vitres.training.processes import FirstFailed, Processes, joined
from timm_vitres.training.settings import FinetuneCfg

ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
FLAGS = ['--model', 'test_vitresnet', '--img-size', '32', '-j', '0', '--device', 'cpu']
TOGETHER = """
from timm_vitres.training.processes import FirstFailed, joined

with joined() as processes:
    rank = processes.rank
    assert processes.count == 2 and processes.is_first == (rank == 0)
    assert processes.of_first(lambda: f'told by {rank}') == 'told by 0'
    assert processes.any(rank == 1) and not processes.any(False)
    assert processes.mean(1.0 + rank) == 1.5
    assert processes.gathered(dict(rank=rank)) == [dict(rank=0), dict(rank=1)]
    try:
        processes.of_first(lambda: 1 // 0)
    except ZeroDivisionError:
        assert rank == 0
    except FirstFailed as error:
        assert rank == 1 and 'ZeroDivisionError' in str(error)
    else:
        raise AssertionError('no error')
print(f'whole {rank}')
"""


def torchrun(*arguments, **kwargs):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', *map(str, arguments)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240, **kwargs)


def finetune(*arguments, processes=2):
    if processes == 1:
        command = [sys.executable, '-m', 'timm_vitres', 'finetune', *map(str, arguments)]
        return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)
    return torchrun('-m', 'timm_vitres', 'finetune', *arguments)


def rows(folder):
    with (folder / 'summary.csv').open() as file:
        return [{**row, 'seconds': 0} for row in csv.DictReader(file)]


def test_one_process_agrees_with_itself():
    with joined() as processes:
        assert (processes.rank, processes.count, processes.is_first) == (0, 1, True)
        assert processes.of_first(lambda: 7) == 7
        assert processes.any(True) and not processes.any(False)
        assert processes.mean(2.5) == 2.5
        assert processes.gathered('x') == ['x']
        with pytest.raises(KeyError):
            processes.of_first(lambda: {}['x'])


def test_each_process_has_a_device(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert Processes(rank=3, count=4, local_rank=1).device('cuda') == 'cuda:1'
    assert Processes(rank=3, count=4, local_rank=1).device('cpu') == 'cpu'
    assert Processes().device('cuda') == 'cuda' and Processes().device('cuda:1') == 'cuda:1'
    assert not caplog.messages
    assert Processes(rank=3, count=4, local_rank=1).device('cuda:0') == 'cuda:1'
    assert caplog.messages == ['device: cuda:0 is one GPU, but there are 4 processes; each takes its own.']
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)  # as where CUDA_VISIBLE_DEVICES is each one's own
    assert Processes(rank=3, count=4, local_rank=1).device('cuda:0') == 'cuda:0'
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(ValueError, match='device: got cuda, but process 2 finds 2 GPUs'):
        Processes(rank=2, count=4, local_rank=2).device('cuda')


@pytest.mark.parametrize('has_gpu', [False, True])
def test_processes_are_left_together_or_by_the_end_of_one(has_gpu, monkeypatch):
    """NCCL waits for all others when it is left, which one that failed alone would do before its error is told."""
    left = []
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(module, '_init', lambda: None)
    monkeypatch.setattr(module.dist, 'new_group', lambda **kwargs: kwargs['timeout'])
    monkeypatch.setattr(module.dist, 'get_rank', lambda: 0)
    monkeypatch.setattr(module.dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(module.dist, 'destroy_process_group', lambda: left.append(True))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    with joined() as processes:
        assert (processes.group, processes.patient_group) == (None, module.START)  # steps wait no longer than before
    assert left == [True]
    with pytest.raises(KeyError), joined():
        raise KeyError
    assert left == ([True] if has_gpu else [True, True])


def test_a_program_that_joined_by_itself_has_chosen_its_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    monkeypatch.setattr(module.dist, 'new_group', lambda **kwargs: None)
    monkeypatch.setattr(module.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(module.dist, 'get_rank', lambda: 0)
    monkeypatch.setattr(module.dist, 'get_world_size', lambda: 2)
    with joined() as processes:
        assert processes.local_rank == 3


@pytest.mark.slow
def test_a_script_that_its_workers_import_is_told_of(tmp_path):
    """Where processes are started anew (Windows, macOS, Python 3.14), each worker runs the script once more."""
    write_folder(tmp_path / 'images', per_class=20)
    (tmp_path / 'script.py').write_text(
        'import multiprocessing, timm_vitres\n'
        "multiprocessing.set_start_method('spawn', force=True)\n"
        "cfg = dict(data_dir='images', model='test_vitresnet', img_size=32, output='run', workers=1)\n"
        'timm_vitres.finetune(timm_vitres.FinetuneCfg(**cfg))\n'
    )
    done = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode and 'finetune: a worker imports this script' in done.stderr, done.stderr
    assert "below if __name__ == '__main__':" in done.stderr


def test_a_worker_compares_nothing():
    known = dict(timm_vitres=timm_vitres, cfg=FinetuneCfg(data_dir='images', output='answer'), __name__='__mp_main__')
    with pytest.raises(RuntimeError, match='compare: a worker imports this script'):
        exec(compile('timm_vitres.compare(cfg)', 'script.py', 'exec'), known)
    exec(compile('def work():\n    timm_vitres.compare(cfg)', 'script.py', 'exec'), known)
    with pytest.raises((FileNotFoundError, ValueError)):  # what a worker is told to do later is its own matter
        known['work']()


def test_others_that_can_not_be_reached(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')  # without MASTER_ADDR, there is nobody to ask
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    with pytest.raises(ValueError, match=r'^processes: .*torchrun'), joined():
        pass
    assert issubclass(FirstFailed, ValueError)


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    (tmp_path / 'together.py').write_text(TOGETHER)
    done = torchrun(tmp_path / 'together.py')
    assert sorted(re.findall('whole .', done.stdout)) == ['whole 0', 'whole 1'], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    'more',
    [[], ['--fsdp', '--channels-last'], ['--grad-accum-steps', '2'], ['--freeze', 'resnet', '--freeze-epochs', '1']],
)
def test_two_processes_train_and_validate_as_one(tmp_path, more):
    images = write_folder(tmp_path / 'images', per_class=14)
    # 7 validation images: one process has four, the other three; no dropout, which differs between processes
    flags = [images, *FLAGS, '--val-frac', '0.25', '--epochs', '2', '--opt', 'sgd', '--lr', '0.05', *more]
    alone = [flag for flag in flags if flag != '--fsdp']
    steps = 2 if '--grad-accum-steps' in more else 1
    one = finetune(*alone, '-b', 8 // steps, '--output', tmp_path / 'one', processes=1)
    two = finetune(*flags, '-b', 4 // steps, '--output', tmp_path / 'two')
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stdout.count('The best epoch is in') == 1
    for ours, theirs in zip(rows(tmp_path / 'two'), rows(tmp_path / 'one'), strict=True):
        for name in theirs:
            exact = name.endswith(('top1', 'top5', 'balanced', 'macro_f1'))
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=0 if exact else 1e-5), name
    ours, theirs = (load_file(tmp_path / name / 'model.safetensors') for name in ('two', 'one'))
    assert ours.keys() == theirs.keys()
    assert max((ours[key].float() - theirs[key].float()).abs().max().item() for key in theirs) < 1e-5
    assert (tmp_path / 'two' / 'held_out.csv').read_text() == (tmp_path / 'one' / 'held_out.csv').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('more, victim', [(['--model-ema'], 0), (['--model-ema'], 1), (['--fsdp'], 1)])
def test_a_run_whose_process_is_killed_ends_as_the_unbroken_one(tmp_path, more, victim):
    images = write_folder(tmp_path / 'images', per_class=14)
    flags = [images, *FLAGS, '--epochs', '3', '-b', '4', *more]
    whole = finetune(*flags, '--output', tmp_path / 'whole')
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--max-restarts', '2']
    command += ['-m', 'timm_vitres', 'finetune', *map(str, flags), '--output', str(tmp_path / 'killed')]
    with (tmp_path / 'log').open('w') as log:
        running = subprocess.Popen(command, env=ENV, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not (tmp_path / 'killed' / 'last.pth.tar').exists():
            assert time.monotonic() < deadline and running.poll() is None, (tmp_path / 'log').read_text()
            time.sleep(0.01)
        children = subprocess.run(['ps', '-eo', 'pid,ppid'], capture_output=True, text=True).stdout.split('\n')[1:-1]
        workers = [int(pid) for pid, parent in map(str.split, children) if int(parent) == running.pid]
        os.kill(sorted(workers)[victim], signal.SIGKILL)
        assert running.wait(timeout=240) == 0, (tmp_path / 'log').read_text()
    assert 'exitcode: -9' in (tmp_path / 'log').read_text()
    assert rows(tmp_path / 'killed') == rows(tmp_path / 'whole')
    ours, theirs = (load_file(tmp_path / name / 'model.safetensors') for name in ('killed', 'whole'))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    images = write_folder(tmp_path / 'images', per_class=4)
    done = finetune(images, *FLAGS, '--model', 'vitresnet_giant', '--output', tmp_path / 'run')
    assert done.returncode != 0
    assert len(re.findall('^timm-vitres: .*', done.stderr, re.M)) == 1, done.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    images = write_folder(tmp_path / 'images', per_class=14)
    flags = [*FLAGS, '--val-frac', '0.25', '--opt', 'sgd', '--lr', '0.05', '--no-aug']
    whole = finetune(
        images, *flags, '-b', 8, '--epochs', 3, '--sched', 'none', '--output', tmp_path / 'one', processes=1
    )
    part = finetune(images, *flags, '-b', 4, '--epochs', 1, '--sched', 'none', '--output', tmp_path / 'two')
    assert whole.returncode == part.returncode == 0, part.stderr
    rest = finetune('--resume', tmp_path / 'two', '--epochs', 3, processes=1)
    assert rest.returncode == 0 and 'goes on with 1, each with 8 images a step' in rest.stderr, rest.stderr
    ours, theirs = (load_file(tmp_path / name / 'model.safetensors') for name in ('two', 'one'))
    assert max((ours[key].float() - theirs[key].float()).abs().max().item() for key in theirs) < 1e-5


def test_a_bar_needs_no_more_of_stderr_than_writing(monkeypatch):
    """As a script has it that writes to a file, too."""
    written = []

    class Tee:
        def write(self, text):
            written.append(text)

        def flush(self):
            pass

    monkeypatch.setattr(sys, 'stderr', Tee())
    assert list(Processes().bar([1, 2], 'epoch')) == [1, 2] and 'epoch' in ''.join(written)
