"""Recipes: settings of a run as YAML, by the names of the flags; timm's train.py takes the same files by `--config`.

a file, or the name of a recipe in `recipes/` -> `recipe` -> {'model': 'vitresnet_nano', ...} -> `FinetuneCfg`.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, Dict, Hashable, List, Optional

import yaml

from ..checks import check_known, on_one_line, read_text, show
from .settings import FinetuneCfg

FOLDER = Path(__file__).resolve().parent.parent / 'recipes'


class _Loader(yaml.SafeLoader):
    """YAML of plain values, in which no name comes twice, and 1e-3 is a number, as argparse takes it in train.py."""

    def compose_node(self, parent: Optional[yaml.Node], index: Any) -> Optional[yaml.Node]:
        if self.check_event(yaml.AliasEvent):  # a few lines of these can mean gigabytes, or have no end
            raise yaml.MarkedYAMLError(problem='an alias is not taken', problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f'{key.value!r} comes twice', problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$'), list('-+0123456789')
)


def recipe(name: str) -> Dict[str, Any]:
    """Return the settings of a recipe: `FinetuneCfg(**recipe('lora'), data_dir='images', output='my-model')`.

    Args:
        name: A YAML file, or the name of a recipe of this package (`timm-vitres recipes` lists them).

    Raises:
        OSError: where there is no such file or recipe, or it can't be read.
        ValueError, TypeError: for a file that is no mapping of settings to what they can be; the message names the
            file, and the setting or the line.
    """
    path = _file_of(name)
    content = _read(path)
    if content is None:
        raise ValueError(f"config: {path} is empty, expected settings, one a line, such as 'epochs: 20'.")
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} holds {show(content)}, expected settings, one a line, such as 'epochs: 20'.")
    for key in content:
        if not isinstance(key, str):
            raise TypeError(f'config: {path}: got {show(key)} as a name, expected that of a setting.')
    # settings that depend on each other are compared when all are there, which those of a resumed run need not be
    alone = content if content.get('resume') not in (None, False) else {**content, 'resume': True}
    try:
        check_known(content, (field.name for field in dataclasses.fields(FinetuneCfg)), 'a run')
        cfg = FinetuneCfg(**alone)
    except (ValueError, TypeError) as error:
        raise type(error)(f'config: {path}: {error}') from None
    return {key: getattr(cfg, key) if key != 'resume' else value for key, value in content.items()}


def recipe_names() -> List[str]:
    """Return the names of this package's recipes."""
    return sorted(path.stem for path in FOLDER.glob('*.yaml'))


def recipe_text(name: str) -> str:
    """Return the YAML of one of this package's recipes, comments and all; raise ValueError for an unknown name."""
    if name not in recipe_names():
        raise ValueError(f'name: got {name!r}, expected one of the recipes: {", ".join(recipe_names())}.')
    return (FOLDER / f'{name}.yaml').read_text(encoding='utf-8')


def _file_of(name: str) -> Path:
    path = Path(name)
    if name in recipe_names() and not path.is_file():
        edited = Path(f'{name}.yaml')
        if edited.is_file() and edited.resolve() != (FOLDER / edited).resolve():
            raise ValueError(
                f'config: {name} is a recipe of the package, and {edited} is here, too; give {edited}, or rename it.'
            )
        return FOLDER / f'{name}.yaml'
    if not name or not path.exists():
        names = ', '.join(recipe_names())
        raise FileNotFoundError(f'config: got {name!r}, which is no file, and none of the recipes: {names}.')
    return path


def _read(path: Path) -> Any:
    """Return the plain values in a YAML file."""
    text = read_text('config', path)
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises errors of many kinds for a value that is not what its tag says
        mark, problem = getattr(error, 'problem_mark', None), getattr(error, 'problem', None)
        if isinstance(error, RecursionError):  # Python words it by where it happened
            problem = 'it is nested too deeply'
        lines = text.splitlines()
        where = f'line {mark.line + 1}, {show(lines[mark.line].strip())}: ' if mark and mark.line < len(lines) else ''
        raise ValueError(f'config: {path} is no plain YAML ({where}{problem or on_one_line(error)}).') from None
