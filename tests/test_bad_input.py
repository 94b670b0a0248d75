"""Bad calls and files, hundreds of them: each ends in one sentence that names what was wrong, and nothing is lost.

The cases are in `bad_input`, `bad_images` and `bad_models`. `python tests/test_bad_input.py [PATTERN]` makes those
whose kind or name matches the pattern, and prints a table of how they ended.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Iterator, NamedTuple
from unittest import mock

import bad_images
import bad_input
import bad_models
import pytest
import timm
import torch
from bad_input import Case
from conftest import write_folder
from hub_server import HubServer

from timm_vitres import VitResNetCfg, VitResNetDualCfg, VitResNetMixCfg, cli
from timm_vitres.publishing import hub

SECONDS = 60  # after which a call counts as endless
# what torch says of its insides, and Python of ours
FOREIGN = re.compile(
    r'size mismatch|mat1 and mat2|INTERNAL ASSERT|Expected (input|all|tensor|\d)|invalid combination of arguments|'
    r'object has no attribute|object is not|unsupported operand|not supported between|list index|out of range|'
    r'must be real number|cannot be interpreted|unexpected type|Traceback|must be str|got multiple values|'
    r'could not convert|invalid literal|not iterable|not subscriptable|indices must be|allocate memory|Errno 40'
)
ERRORS = (ValueError, TypeError, RuntimeError, OSError)


def make_cases() -> list[Case]:
    """Return all cases: the same ones every time."""
    makers = (
        bad_input.calls,
        bad_input.flags,
        bad_images.folders,
        bad_images.images,
        bad_models.checkpoints,
        bad_models.trainings,
        bad_models.configs,
        bad_models.models,
        bad_models.cards,
    )
    return [case for make in makers for case in make(random.Random(0))]


CASES = make_cases()
SAMPLE = CASES[::4]


class Outcome(NamedTuple):
    """How a call ended: 'exit 0', 'exit 1', the name of an exception, 'accepted', 'endless'; and what it said."""

    how: str
    text: str


class Endless(BaseException):
    """Raised by the alarm, past all that catches exceptions."""


def write_world(root: Path) -> None:
    """Write what every case begins with: all of it is right."""
    write_folder(root / 'images', per_class=4, size=32)
    for split in ('train', 'val'):
        write_folder(root / 'split' / split, per_class=4, size=32)
    shutil.copy(root / 'images/down/0.png', root / 'picture.png')
    (root / 'notes.txt').write_text('Nothing that a program reads.\n')
    (root / 'script.py').write_text('print("A script of others.")\n')
    model = timm.create_model('test_vitresnet', **bad_input.SERIAL)
    hub.save(model, root / 'model', label_names=['cat', 'dog', 'owl'])
    (root / 'model/README.md').write_text('---\nlicense: mit\n---\n\n# A model\n\nMy own words.\n')
    torch.save(model.state_dict(), root / 'weights.pth')


def snapshot(root: Path) -> dict[str, Any]:
    """Return all that is in a folder, but for the output folder that a call may make."""
    found = {}
    for path in sorted(root.rglob('*')):
        name, state = str(path.relative_to(root)), path.lstat()
        if name.split('/')[0] == 'new':
            continue
        found[name] = stat.filemode(state.st_mode)
        if stat.S_ISREG(state.st_mode):
            found[name] = (state.st_size, state.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def _ring(signum: int, frame: Any) -> None:
    for path in Path().rglob('*'):
        if stat.S_ISFIFO(path.lstat().st_mode):  # a thread that waits for a writer would keep the process alive
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    raise Endless


def _become(path: str, command: list[str], environment: dict[str, str]) -> None:
    # this process has more to do than to be the script that `run` runs
    raise SystemExit(subprocess.run(command, env=environment, capture_output=True).returncode)


def run(call: Any) -> Outcome:
    """Make a call in the present folder, and return how it ended."""
    printed = io.StringIO()
    warnings = logging.StreamHandler(printed)
    logging.getLogger().addHandler(warnings)
    signal.signal(signal.SIGALRM, _ring)
    signal.alarm(SECONDS)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(printed),
            mock.patch('os.execve', _become),
        ):
            if isinstance(call, list):
                return Outcome(f'exit {cli.main(call)}', printed.getvalue())
            timm.create_model(call[0], **call[1])
            return Outcome('accepted', '')
    except SystemExit as stop:
        return Outcome(f'exit {stop.code}', printed.getvalue())
    except Endless:
        return Outcome('endless', printed.getvalue())
    except Exception as error:
        kind = next((kind for kind in ERRORS if isinstance(error, kind)), type(error))
        where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        package = next((part for part in ('torch', 'numpy', 'PIL', 'safetensors') if part in where.parts), '')
        text = f'{error} [raised in {package}/{where.name}]' if package else str(error)
        return Outcome(kind.__name__, text)
    finally:
        signal.alarm(0)
        logging.getLogger().removeHandler(warnings)


def complaint(case: Case, outcome: Outcome) -> str | None:
    """Return what is wrong with how a case ended, None where all is as it should be."""
    if case.is_said:
        is_right = outcome.how == 'exit 0' and re.search(case.says, outcome.text)
        return None if is_right else f'{case.says} is not named: {outcome.how}: {last_line(outcome.text)}'
    if isinstance(case.call, list):
        if outcome.how not in ('exit 1', 'exit 2'):
            return f'ended as {outcome.how}: {last_line(outcome.text)}'
        sentence = last_line(outcome.text)
        if not sentence.startswith('timm-vitres'):
            return f'the last line is no sentence of ours: {sentence}'
        sentence = sentence.partition(':')[2]
    else:
        if outcome.how not in {error.__name__ for error in ERRORS}:
            return f'ended as {outcome.how}: {last_line(outcome.text)}'
        sentence = outcome.text
        if '[raised in' in sentence:
            return f"another package's error: {outcome.how}: {sentence}"
    in_brackets = r'\((?:[^()]|\([^()]*\))*\)'  # where a sentence may cite its cause
    if FOREIGN.search(re.sub(in_brackets, '', sentence)):
        return f"not a user's words: {outcome.how}: {sentence}"
    if '\n' in sentence or len(sentence) < 10:
        return f'not one sentence: {outcome.how}: {sentence!r}'
    if not re.search(case.says, sentence):
        return f'does not name {case.says}: {outcome.how}: {sentence}'
    return None


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [''])[-1].rpartition('\r')[2]


class World:
    """Makes cases, each in a fresh copy of the same folder; what speaks to a Hub, in a process that knows ours."""

    def __init__(self, root: Path):
        self.root = root
        self.clean = contextlib.ExitStack()
        self.process: subprocess.Popen | None = None
        write_world(root / 'world')

    def try_case(self, case: Case) -> tuple[Outcome, str | None]:
        """Return how a case ended, and what is wrong with that, if anything."""
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            here = os.getcwd()
            shutil.copytree(self.root / 'world', folder, dirs_exist_ok=True)
            os.chdir(folder)
            try:
                if case.spoil is not None:
                    case.spoil(Path(folder))
                before = snapshot(Path(folder))
                outcome = self.run_with_hub(case.call) if '--yes' in case.call else run(case.call)
                wrong = complaint(case, outcome)
                after = snapshot(Path(folder))
                touched = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
            finally:
                os.chdir(here)
        if touched:
            wrong = f'{wrong or outcome.how}; written: {", ".join(touched)}'
        return outcome, wrong

    def run_with_hub(self, call: list[str]) -> Outcome:
        if self.process is None:
            self.server = self.clean.enter_context(HubServer(self.root / 'hub'))
            environment = self.server.environment(self.root / 'home', 'token-me')
            environment['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
            code = 'import test_bad_input; test_bad_input.serve()'
            self.process = self.clean.enter_context(
                subprocess.Popen(
                    [sys.executable, '-c', code],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            self.clean.callback(self.process.stdin.close)
        self.process.stdin.write(json.dumps([os.getcwd(), call]) + '\n')
        self.process.stdin.flush()
        outcome = Outcome(*json.loads(self.process.stdout.readline()))
        if self.server.repo(call[2]).exists():
            return Outcome(f'{outcome.how}, a repository made', outcome.text)
        return outcome


def serve() -> None:
    """Run the command lines that come in, one after the other."""
    for line in sys.stdin:
        folder, call = json.loads(line)
        os.chdir(folder)
        print(json.dumps(run(call)), flush=True)


@contextlib.contextmanager
def open_world() -> Iterator[World]:
    with tempfile.TemporaryDirectory() as root:
        world = World(Path(root))
        with world.clean:
            yield world


@pytest.fixture(scope='module')
def world():
    with open_world() as world:
        yield world


def test_there_are_hundreds_and_none_is_there_twice():
    kinds = Counter(case.kind for case in CASES)
    assert len(CASES) >= 1700 and all(count > 5 for count in kinds.values()), kinds
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES)
    assert {case.kind for case in SAMPLE} == set(kinds)
    assert not [case.name for case in CASES if re.search(case.says, '')], 'what a sentence must name is anything'


def test_every_flag_and_every_field_is_among_them():
    told = {(case.call[0], word) for case in CASES if isinstance(case.call, list) for word in case.call}
    wanted = {
        (command, action.option_strings[-1]) for command, _, action in bad_input.actions() if action.option_strings
    }
    wanted -= {(command, '--' + dest.replace('_', '-')) for command, dest in bad_input.FREE}
    assert not wanted - told
    configs = {
        'vitresnet': VitResNetCfg,
        'test_vitresnet_dual': VitResNetDualCfg,
        'test_vitresnet_mix': VitResNetMixCfg,
    }
    for name, cfg in configs.items():
        tried = {key for case in CASES if case.call[0] == name for key in case.call[1]}
        assert not {field.name for field in dataclasses.fields(cfg)} - tried


@pytest.mark.parametrize('command', bad_input.FLAGS)
def test_what_the_cases_change_is_right_before(command, world):
    call = [command, *bad_input.POSITIONAL[command], *bad_input.FLAGS[command]]
    outcome, wrong = world.try_case(Case('right', command, call, ''))
    assert outcome.how == 'exit 0', outcome.text
    assert wrong.startswith('ended as exit 0') and 'written' not in wrong


def test_what_is_right_is_pushed(world):
    outcome, _ = world.try_case(Case('right', 'push', ['push', 'model', 'me/right', '--yes'], ''))
    assert outcome.how == 'exit 0, a repository made', outcome.text


def test_what_is_written_over_is_noticed(world):
    case = Case('right', 'over', ['predict', 'picture.png', *bad_input.FLAGS['predict'], '--plot', 'drawing.png'], '')
    assert 'written: drawing.png' in world.try_case(case)[1]


@pytest.mark.parametrize('case', SAMPLE, ids=lambda case: case.name)
def test_a_sample_ends_in_a_sentence(case, world):
    wrong = world.try_case(case)[1]
    assert wrong is None, f'{case.call}: {wrong}'


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_every_case_ends_in_a_sentence(case, world):
    wrong = world.try_case(case)[1]
    assert wrong is None, f'{case.call}: {wrong}'


def spell(case: Case) -> str:
    """Return a case's call as a user would write it, without what is right in it."""
    if isinstance(case.call, list):
        text = ' '.join(repr(word) if ' ' in word or not word else word for word in case.call)
        return text.replace(' '.join(bad_input.FLAGS[case.call[0]]), '...') if bad_input.FLAGS[case.call[0]] else text
    name, kwargs = case.call
    base = bad_input.BASES.get(name, {})
    shown = {key: value for key, value in kwargs.items() if key not in base or value is not base[key]}
    return f'create_model({name!r}, **{shown})'


def main(pattern: str = '') -> None:
    """Print how the cases ended, by kind, and those that ended wrong."""
    table: dict[str, Counter] = {}
    with open_world() as world:
        for case in CASES:
            if re.search(pattern, f'{case.kind} {case.name}'):
                outcome, wrong = world.try_case(case)
                table.setdefault(case.kind, Counter())['WRONG' if wrong else outcome.how] += 1
                if wrong:
                    print(' '.join(f'{case.kind} | {case.name} | {spell(case)} | {wrong}'.split())[:600], flush=True)
    for kind, counter in table.items():
        print(
            f'| {kind} | {sum(counter.values())} | {", ".join(f"{how}: {n}" for how, n in sorted(counter.items()))} |'
        )


if __name__ == '__main__':
    main(*sys.argv[1:])
