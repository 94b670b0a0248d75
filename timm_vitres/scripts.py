"""Scripts of others, such as timm's validate.py, that know our models, and so does every Python that they start.

The script runs as `python SCRIPT` runs it, in a process whose PYTHONPATH begins with the folder `hook`: Python runs the
`sitecustomize` in it at its start, in workers that are spawned or served by a fork server and in other programs, too.
Out of reach are processes that drop PYTHONPATH: `python -E`, `-I`, `-S`, and those that are given an environment of
their own.
"""

import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

HOOK = Path(__file__).resolve().parent / 'hook'
# One word of options on Python's command line: flags, and at its end one that takes a value or names the program
FLAGS = re.compile(r'(-[^-mcWX]*)([mcWX]?)(.*)')


def knowing(environment: Mapping[str, str]) -> Dict[str, str]:
    """Return environment variables with which Python registers our models as soon as timm is imported.

    Raises:
        ValueError: where the folder of this package can't stand in PYTHONPATH.
    """
    if os.pathsep in str(HOOK):
        raise ValueError(f'run: {HOOK} can not stand in PYTHONPATH, for {os.pathsep!r} ends a folder there.')
    before = environment.get('PYTHONPATH', '')  # an empty entry would mean the present folder
    others = [entry for entry in before.split(os.pathsep) if entry != str(HOOK)] if before else []
    return {**environment, 'PYTHONPATH': os.pathsep.join([str(HOOK), *others])}


def split(words: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Return what of a command line is ours, and the arguments of the script that `run` runs, whatever they are."""
    end = (3 if words[1:2] == ['-m'] else 2) if words[:1] == ['run'] else len(words)
    return list(words[:end]), list(words[end:])


def options_of(words: Sequence[str]) -> List[str]:
    """Return the options that Python itself was given, such as -u or -X dev, out of its command line."""
    options: List[str] = []
    rest = iter(words[1:])
    for word in rest:
        match = FLAGS.fullmatch(word)
        if match is None or word in ('-', '--'):
            break
        flags, last, value = match.groups()
        if last in ('m', 'c'):  # the program begins here; -um NAME is -u -m NAME
            return [*options, flags] if len(flags) > 1 else options
        options.append(word)
        if word == '--check-hash-based-pycs' or (last and not value):
            options.append(next(rest, ''))
    return options


def command_of(script: Optional[str], module: Optional[str], arguments: Sequence[str]) -> List[str]:
    """Return the command line that runs a script, or a module, as Python runs it.

    Raises:
        ValueError: where there is no such script or module, or this Python ignores PYTHONPATH.
    """
    if module is not None:
        if not _is_found(module.partition('.')[0]):
            raise ValueError(f'module: got {module!r}, and Python finds none of that name.')
        program = ['-m', module]
    else:
        path = Path(script or '')
        if not script or not (path.is_file() or (path / '__main__.py').is_file()):
            raise ValueError(f'script: got {script!r}, expected a file of Python code.')
        program = [script]
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise ValueError('run: Python was started with -E, -I or -S, and so would not make the models known.')
    return [sys.executable, *options_of(sys.orig_argv), *program, *arguments]


def _is_found(name: str) -> bool:
    # `python -m` looks into the present folder, which is not in the path of the command timm-vitres
    return bool(name) and (find_spec(name) or PathFinder.find_spec(name, [os.getcwd()])) is not None


def become(script: Optional[str], module: Optional[str], arguments: Sequence[str]) -> int:
    """Become the process of a script, or of a module, with its arguments; its exit status is ours.

    Raises:
        ValueError: where there is no such script or module, or the models can't be made known.
    """
    command, environment = command_of(script, module, arguments), knowing(os.environ)
    if os.name == 'nt':  # Windows can not replace a process: whoever waits for this one would think that it had ended
        return subprocess.run(command, env=environment).returncode
    os.execve(command[0], command, environment)
