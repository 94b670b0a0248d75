"""The hook in processes of its own, with a small timm and a package of ours that stand in for the real ones.

`tests/test_scripts.py` has the real ones.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from timm_vitres.scripts import HOOK

OURS = "import timm\nfrom timm.registry import names\n\nnames.append('ours')\n"
TELL = '; from timm.registry import names; print(*names)'
THREADS = """
import importlib, threading
barrier = threading.Barrier(8)
def work(name):
    barrier.wait()
    importlib.import_module(name)
    importlib.import_module('timm')
threads = [threading.Thread(target=work, args=(name,)) for name in 2 * ['timm', 'timm.models', 'timm.registry', 'timm']]
[thread.start() for thread in threads], [thread.join() for thread in threads]
from timm.registry import names
print(*names)
"""


@pytest.fixture
def world(tmp_path) -> Path:
    """A folder of modules, its name with a space, that holds a timm; our package lies beside it."""
    folder = tmp_path / 'some modules'
    (folder / 'timm').mkdir(parents=True)
    (folder / 'timm/__init__.py').write_text('from . import models\n')
    (folder / 'timm/models.py').write_text('from .registry import names\n')
    (folder / 'timm/registry.py').write_text('names = []\n')
    package = tmp_path / 'not in the path/ours'
    shutil.copytree(HOOK, package / 'hook', ignore=shutil.ignore_patterns('__pycache__'))
    (package / '__init__.py').write_text(OURS)
    return folder


def python(code: str, *path: Path, cwd: Path = Path('/')) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, path))}
    environment.pop('PYTHONWARNINGS', None)
    return subprocess.run([sys.executable, '-c', code], env=environment, cwd=cwd, capture_output=True, text=True)


def hook_of(world: Path) -> Path:
    return world.parent / 'not in the path/ours/hook'


@pytest.mark.parametrize(
    'code',
    [
        'import timm' + TELL,
        'import timm.models' + TELL,
        'from timm.models import names; print(*names)',
        'import ours' + TELL,
        'import ours, timm' + TELL,
        'import timm, importlib; importlib.reload(timm); importlib.reload(timm.models)' + TELL,
        'import importlib.util; importlib.util.find_spec("timm"); import timm' + TELL,
        THREADS,
    ],
)
def test_our_package_is_imported_once_with_timm(code, world):
    assert python('import timm' + TELL, world).stdout == '\n', 'timm knows the models without us'
    for _ in range(4 if code == THREADS else 1):
        result = python(code, hook_of(world), world)
        assert (result.stdout, result.stderr) == ('ours\n', '')


def test_a_process_that_does_without_timm_is_as_it_was(world):
    code = 'import sys; print(sorted({*sys.modules} - {"sitecustomize"})); print(sys.path); print(len(sys.meta_path))'
    before, after = (python(code, *path).stdout.splitlines() for path in ([world], [hook_of(world), world]))
    assert before[:2] == after[:2] and int(after[2]) == int(before[2]) + 1


def test_the_module_timm_is_as_it_was(world):
    code = (
        'import inspect, timm; print(vars(timm.__spec__.loader), timm.__loader__ is timm.__spec__.loader, '
        'type(timm.__loader__), timm.__file__, timm.__cached__, inspect.getsource(timm))'
    )
    assert python(code, hook_of(world), world).stdout == python(code, world).stdout != ''


def test_the_hidden_sitecustomize_runs(world, tmp_path):
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/sitecustomize.py').write_text('import sys\nsys.path.append("/of/the/other")\nmark = 1\n')
    code = 'import sys, sitecustomize; print(sitecustomize.mark, sys.path[-1])'
    assert python(code + '; import timm' + TELL, hook_of(world), tmp_path / 'other', world).stdout.split() == [
        *('1', '/of/the/other', 'ours')
    ]
    (tmp_path / 'other/sitecustomize.py').write_text('raise ImportError("no such thing")\n')
    result = python('import timm' + TELL, hook_of(world), tmp_path / 'other', world)
    alone = python('import timm', tmp_path / 'other', world)
    assert result.stdout == 'ours\n' and 'no such thing' in result.stderr and result.stderr == alone.stderr


def test_a_package_that_fails_is_a_warning(world):
    """Another environment's timm may be too old: a script that does not need our models goes on."""
    package = hook_of(world).parent / '__init__.py'
    package.write_text('from timm.models import what_comes_later\n')
    (world / 'timm/__init__.py').write_text('__version__ = "0.6"\n')
    result = python('import timm; print("goes on")', hook_of(world), world)
    assert result.stdout == 'goes on\n'
    for told in ('UserWarning', '0.6', str(world / 'timm/__init__.py'), 'models of ours', 'what_comes_later'):
        assert told in result.stderr


def test_a_timm_that_fails_is_told_as_without_us_and_may_be_imported_again(world):
    (world / 'timm/__init__.py').write_text('import os\nif os.environ.pop("FAIL", ""):\n    raise KeyError("x")\n')
    code = (
        'import os\nos.environ["FAIL"] = "1"\ntry:\n    import timm\nexcept KeyError: print("failed")\nimport timm'
        + TELL
    )
    result = python(code, hook_of(world), world)
    assert (result.stdout, result.stderr) == ('failed\nours\n', '')
    gone = python('import sys; sys.modules["timm"] = None; import timm', hook_of(world))
    assert gone.stderr.endswith('halted; None in sys.modules\n')


def test_out_of_an_archive(world, tmp_path):
    archive = tmp_path / 'modules.zip'
    with zipfile.ZipFile(archive, 'w') as file:
        for root in (world, hook_of(world).parent.parent):
            for path in root.rglob('*.py'):
                file.write(path, path.relative_to(root))
    result = python('import timm; print(timm.__file__)' + TELL, archive / 'ours/hook', archive)
    assert result.stdout.splitlines() == [f'{archive}/timm/__init__.py', 'ours'], result.stderr
