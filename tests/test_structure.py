"""The structure of the package itself: which way imports run, what knows a family, where private names stand."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest

import timm_vitres
from timm_vitres.models.base import Hybrid

PACKAGE = Path(timm_vitres.__file__).parent
TESTS = Path(__file__).parent
MODULES = {'.'.join(path.relative_to(PACKAGE).with_suffix('').parts): path for path in sorted(PACKAGE.rglob('*.py'))}
TREES = {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in MODULES.items()}
ROOT = '__init__'  # it offers everything, and nothing imports it but for the version
# Protected names of torch and Python that have no public counterpart
PROTECTED = {
    *('_forward_hooks', '_forward_pre_hooks', '_parameters', '_buffers', '_metadata', '_dynamo', '_inductor'),
    '_register_load_state_dict_pre_hook',  # the public one keeps its module
    *('_asdict', '_replace', '_fields'),
}
# Modules without behaviour of their own
NOT_TESTED = {'timm_private'}


def room(module: str) -> str:
    """Return the folder that a module is in; a module that is in none is a room of its own."""
    return module.partition('.')[0]


def imports(module: str) -> Set[str]:
    """Return the modules of the package that a module imports, at its top or later."""
    package = [] if '.' not in module else module.split('.')[:-1]
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split('.') if node.module else [])
            names = ['.'.join(base)] + ['.'.join([*base, alias.name]) for alias in node.names]
            found |= {name for name in names if name in MODULES}
    return found - {module}


def cycle(arrows: Dict[str, Set[str]]) -> List[str]:
    """Return a way that leads back to where it began, if there is one."""
    done: Set[str] = set()

    def follow(name: str, way: List[str]) -> List[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (follow(other, [*way, name]) for other in sorted(arrows.get(name, ())))), [])
        done.add(name)
        return found

    return next(filter(None, (follow(name, []) for name in sorted(arrows))), [])


def code(module: str) -> Iterator[ast.AST]:
    """Yield the nodes of a module's code."""
    yield from ast.walk(TREES[module])


def is_own(owner: ast.AST) -> bool:
    """Return whether an attribute is read of `self`, `cls` or `super()`."""
    return (isinstance(owner, ast.Name) and owner.id in ('self', 'cls')) or (
        isinstance(owner, ast.Call) and getattr(owner.func, 'id', '') == 'super'
    )


def test_cycles_are_found():
    assert cycle({'a': {'b'}, 'b': {'c'}, 'c': {'b'}}) == ['b', 'c', 'b'] and not cycle({'a': {'b', 'c'}, 'b': {'c'}})


def test_imports_run_one_way_between_modules():
    arrows = {name: imports(name) for name in MODULES if name != ROOT}
    assert sum(map(len, arrows.values())) > len(MODULES)
    assert cycle(arrows) == []


def test_imports_run_one_way_between_rooms():
    arrows = defaultdict(set)
    for name in MODULES:
        if name != ROOT:
            arrows[room(name)] |= {room(other) for other in imports(name)} - {room(name)}
    assert cycle(arrows) == []


def test_rooms_say_what_they_hold():
    for name, tree in TREES.items():
        assert ast.get_docstring(tree), f'{MODULES[name]}: say in a docstring what it holds.'
        if name.endswith('.__init__'):
            assert len(tree.body) == 1, f'{MODULES[name]}: a room imports nothing, so that importing is cheap.'


def test_no_family_is_named_outside_of_models():
    families = {name for family in Hybrid.families for name in (family.__name__, family.__module__.rpartition('.')[2])}
    families |= {f'{family.__name__}Cfg' for family in Hybrid.families if family.__module__.startswith('timm_vitres.')}
    assert {'VitResNet', 'VitResNetDual', 'VitResNetCfg', 'vitresnet_dual'} <= families
    for name in MODULES:
        if name == ROOT or room(name) == 'models':
            continue
        for node in code(name):
            used = {
                ast.Name: lambda node: {node.id},
                ast.Attribute: lambda node: {node.attr},
                ast.ImportFrom: lambda node: {*(node.module or '').split('.'), *(alias.name for alias in node.names)},
            }.get(type(node), lambda node: set())(node)
            assert not used & families, f'{MODULES[name]}:{node.lineno} names a family; ask the model (models/base.py).'


@pytest.mark.parametrize('name', MODULES)
def test_protected_attributes_are_their_owners_own(name):
    where = MODULES[name]
    for node in code(name):
        if isinstance(node, ast.Attribute) and node.attr.startswith('_') and not node.attr.startswith('__'):
            assert is_own(node.value) or node.attr in PROTECTED, (
                f'{where}:{node.lineno} reads {node.attr}, a protected attribute.'
            )
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('getattr', 'setattr', 'hasattr'):
            read = node.args[1].value if isinstance(node.args[1], ast.Constant) else ''
            protected = str(read).startswith('_') and not str(read).startswith('__') and read not in PROTECTED
            assert is_own(node.args[0]) or not protected, f'{where}:{node.lineno} reads {read}, a protected attribute.'
        if isinstance(node, ast.ImportFrom) and node.level:
            private = [alias.name for alias in node.names if alias.name.startswith('_') and alias.name[:2] != '__']
            assert not private, f'{where}:{node.lineno} imports {private}, which are private to their module.'


def test_private_names_of_timm_stand_in_one_module():
    private = defaultdict(list)
    for name in MODULES:
        for node in code(name):
            if isinstance(node, ast.ImportFrom) and (node.module or '').partition('.')[0] == 'timm' and not node.level:
                parts = [*(node.module or '').split('.'), *(alias.name for alias in node.names)]
                private[name] += [part for part in parts if part.startswith('_')]
    assert {name for name, found in private.items() if found} == {'timm_private'}


@pytest.mark.parametrize('name', MODULES)
def test_length_of_files_and_functions(name):
    assert len(MODULES[name].read_text(encoding='utf-8').splitlines()) <= 450, f'{MODULES[name]}: split it.'
    for node in code(name):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 85, f'{MODULES[name]}:{node.lineno} {node.name} has {length} lines; split it.'


@pytest.mark.parametrize('name', [name for name in MODULES if room(name) not in ('cli', 'commands')])
def test_only_the_command_prints(name):
    calls = [
        node.lineno for node in code(name) if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print'
    ]
    assert not calls, f'{MODULES[name]}:{calls} prints; library code logs.'


@pytest.mark.parametrize('name', [name for name in MODULES if not name.endswith('__init__') and name not in NOT_TESTED])
def test_every_module_has_a_test_file(name):
    *rooms, module = name.split('.')
    assert TESTS.joinpath(*rooms, f'test_{module}.py').is_file(), f'{MODULES[name]} has no test file of its own.'


def test_importing_the_package_imports_no_more_than_the_models():
    script = 'import sys, timm_vitres\nprint(*sorted(name for name in sys.modules if name.startswith("timm_vitres.")))'
    loaded = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.split()
    rooms = {name.split('.')[1] for name in loaded}
    assert 'models' in rooms and not rooms & {
        'training',
        'inference',
        'publishing',
        'cli',
        'commands',
        'data',
        'pictures',
    }


def test_verbs_at_the_root():
    assert set(timm_vitres.__all__) <= set(dir(timm_vitres))
    for name in timm_vitres.__all__:
        assert callable(getattr(timm_vitres, name)), name
        assert name not in MODULES, f'{name} is a verb and a module; modules are named by nouns.'
    with pytest.raises(AttributeError, match="has no attribute 'fnetune'"):
        timm_vitres.fnetune  # noqa: B018
