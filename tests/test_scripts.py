import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_vitres import cli, scripts
from timm_vitres.scripts import HOOK

# what a script of others is told, in a form that can be compared
TELL = """
import json, os, sys
print(json.dumps([sys.argv, sys.path, __name__, sys.flags.dev_mode, sys.stdout.write_through, sys.stdin.read()]))
sys.exit(7)
"""
# timm's models, made in every kind of process that a script may start
WORKERS = """
import multiprocessing, subprocess, sys
import timm, torch

def logits(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    with torch.inference_mode():
        return model(torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)).tolist()

if __name__ == '__main__':
    name = sys.argv[1]
    found = [logits(name)]
    for method in ('spawn', 'forkserver'):
        with multiprocessing.get_context(method).Pool(1) as pool:
            found.append(pool.apply(logits, [name]))
    code = f'from workers import logits; print(logits({name!r}))'
    found.append(eval(subprocess.check_output([sys.executable, '-c', code], text=True)))
    assert all(one == found[0] for one in found), found
    print(len(found), 'agree')
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / 'a script.py'
    path.write_text(TELL)
    return path


@pytest.fixture
def started(monkeypatch) -> list:
    """What this process would have become."""
    calls = []
    monkeypatch.setattr(sys, 'orig_argv', [sys.executable, '-X', 'dev', '-m', 'timm_vitres'])
    monkeypatch.setattr(os, 'execve', lambda path, command, environment: calls.append((path, command, environment)))
    return calls


@pytest.mark.parametrize(
    'arguments', [[], ['--version'], ['-h'], ['-m', 'x', '--', '--model', 'run'], ['--', '-x'], ['', 'a b', '-m=1']]
)
def test_a_script_is_run_as_python_runs_it(arguments, script, started):
    assert cli.main(['run', str(script), *arguments]) is None
    ((path, command, environment),) = started
    assert path == sys.executable and environment['PYTHONPATH'].split(os.pathsep)[0] == str(HOOK)
    plain = [sys.executable, '-X', 'dev', str(script), *arguments]
    ours, theirs = (
        subprocess.run(words, env=env, capture_output=True, input='typed', text=True)
        for words, env in ((command, environment), (plain, os.environ))
    )
    assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, 7)
    told = json.loads(ours.stdout)
    assert told[0] == [str(script), *arguments] and told[1][0] == str(script.parent) and told[-1] == 'typed'


def test_a_module_is_run_as_python_runs_it(script, started, tmp_path, monkeypatch):
    (tmp_path / 'package').mkdir()
    (tmp_path / 'package/tool.py').write_text(TELL)
    (tmp_path / 'package/__main__.py').write_text(TELL)
    monkeypatch.chdir(tmp_path)
    for own, plain in ((['-m', 'package.tool'], ['-m', 'package.tool']), (['package'], ['package'])):
        started.clear()
        cli.main(['run', *own, '-m', '--help'])
        ((_, command, environment),) = started
        theirs = subprocess.run([sys.executable, '-X', 'dev', *plain, '-m', '--help'], capture_output=True, input=b'')
        ours = subprocess.run(command, env=environment, capture_output=True, input=b'')
        assert (ours.stdout, ours.returncode) == (theirs.stdout, 7) and json.loads(ours.stdout)[0][1:] == [
            '-m',
            '--help',
        ]


@pytest.mark.parametrize(
    'words, message',
    [
        (['nowhere.py', '--model', 'x'], "script: got 'nowhere.py', expected a file"),
        ([''], "script: got '', expected a file"),
        (['.'], "script: got '.', expected a file"),
        (['-m', 'nowhere.at.all'], "module: got 'nowhere.at.all'"),
        (['-m', 'no where'], "module: got 'no where'"),
    ],
)
def test_what_is_not_there_is_one_sentence(words, message, started, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['run', *words]) == 1 and not started
    told = capsys.readouterr().err
    assert told.startswith(f'timm-vitres: {message}') and len(told.splitlines()) == 1


@pytest.mark.parametrize('words', [[], ['-x', 'y'], ['-m']])
def test_a_script_must_be_named(words, started, capsys):
    with pytest.raises(SystemExit, match='2'):
        cli.main(['run', *words])
    assert not started and 'timm-vitres run: error' in capsys.readouterr().err


def test_what_pythonpath_can_not_hold_is_refused(started, script, monkeypatch):
    monkeypatch.setattr(scripts, 'HOOK', Path(f'/a{os.pathsep}b/hook'))
    assert cli.main(['run', str(script)]) == 1 and not started


def test_the_hook_comes_first_and_once():
    first = scripts.knowing({'A': 'b'})
    assert first == {'A': 'b', 'PYTHONPATH': str(HOOK)} == scripts.knowing({'A': 'b', 'PYTHONPATH': ''})
    for others in (['/a b', '', '.'], ['']):
        before = os.pathsep.join([*others, '/last'])
        once = scripts.knowing({'PYTHONPATH': before})
        assert once == {'PYTHONPATH': os.pathsep.join([str(HOOK), before])} == scripts.knowing(once)


@pytest.mark.parametrize(
    'line, options',
    [
        ('-m timm_vitres run', ''),
        ('-u -X dev -Werror -m timm_vitres run -B', '-u -X dev -Werror'),
        ('-um timm_vitres', '-u'),
        ('-mtimm_vitres -u', ''),
        ('-uX dev /bin/timm-vitres -u', '-uX dev'),
        ('--check-hash-based-pycs always -OO x -u', '--check-hash-based-pycs always -OO'),
        ('-P -- -u', '-P'),
        ('-c m', ''),
        ('- -u', ''),
        ('/bin/timm-vitres run -m -u', ''),
        ('', ''),
    ],
)
def test_options_of_python(line, options):
    assert scripts.options_of(['python', *line.split()]) == options.split()


@pytest.mark.parametrize('flag', ['-I', '-E', '-S'])
def test_a_python_that_would_not_know_is_refused(flag, script, started, monkeypatch, capsys):
    flags = subprocess.check_output(
        [sys.executable, flag, '-c', 'import sys; print(sys.flags.ignore_environment, sys.flags.no_site)'], text=True
    )
    ignore_environment, no_site = map(int, flags.split())
    monkeypatch.setattr(sys, 'flags', type('Flags', (), dict(ignore_environment=ignore_environment, no_site=no_site)))
    assert cli.main(['run', str(script)]) == 1 and not started
    assert 'run: Python was started with -E, -I or -S' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'])
def test_every_process_knows_the_models(name, tmp_path):
    (tmp_path / 'workers.py').write_text(WORKERS)
    command = [sys.executable, '-m', 'timm_vitres', 'run']
    for words in (['workers.py', name], ['-m', 'workers', name]):
        result = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
        assert result.stdout == '4 agree\n', result.stderr
    plain = subprocess.run([sys.executable, 'workers.py', name], cwd=tmp_path, capture_output=True, text=True)
    assert 'Unknown model' in plain.stderr, 'they are known without us'


@pytest.mark.slow
def test_torchrun_on_either_side(tmp_path):
    (tmp_path / 'ranks.py').write_text(
        'import os, sys, timm\n'
        'timm.create_model(sys.argv[1])\n'
        'open(f"{sys.argv[2]}-{os.environ[\'RANK\']}", "w").write(" ".join(sys.argv))\n'
    )
    torchrun = ['-m', 'torch.distributed.run', '--nproc-per-node', '2']
    ours = ['-m', 'timm_vitres', 'run']
    for name, words in (('in', [*torchrun, *ours, 'ranks.py']), ('out', [*ours, *torchrun, 'ranks.py'])):
        command = [sys.executable, *words, 'test_vitresnet', name, '--nproc-per-node', '-m']
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        told = [(tmp_path / f'{name}-{rank}').read_text().split()[1:] for rank in (0, 1)]
        assert told == 2 * [['test_vitresnet', name, '--nproc-per-node', '-m']]
