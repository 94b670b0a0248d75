"""`timm-vitres finetune` and `recipes`."""

import argparse
import dataclasses
import os

from ..arguments import HelpFormatter, NamedValues


def add_finetune(subparsers) -> None:
    """`timm-vitres finetune`: every field of `FinetuneCfg` is a flag; what is not given is not in the namespace."""
    from ..training.settings import PAIRS, FinetuneCfg, flag_of

    parser = subparsers.add_parser(
        'finetune', help='fine-tune a model on an image folder or dataset', formatter_class=HelpFormatter
    )
    parser.register('action', PAIRS, NamedValues)
    parser.add_argument(
        '-c',
        '--config',
        metavar='FILE',
        help='YAML of settings, or the name of a recipe (timm-vitres recipes); the other flags win over it',
    )
    for field in dataclasses.fields(FinetuneCfg):
        flags, options = flag_of(field)
        if 'positional' in field.metadata:
            told = f'the same as {flags[-1]}'
            parser.add_argument(_without_flag(field), nargs='?', metavar=field.metadata['positional'], help=told)
        parser.add_argument(*flags, default=argparse.SUPPRESS, dest=field.name, **options)
    parser.set_defaults(run=run_finetune)


def _without_flag(field: dataclasses.Field) -> str:
    return f'{field.name} without a flag'


def run_finetune(args: argparse.Namespace) -> int:
    """Fine-tune, and say where the model is and how it is loaded."""
    from ..training.loop import finetune
    from ..training.recipes import recipe
    from ..training.settings import FinetuneCfg

    given = {} if args.config is None else recipe(args.config)
    for field in dataclasses.fields(FinetuneCfg):
        told = (vars(args).get(name) for name in (field.name, _without_flag(field)))
        values = [value for value in told if value is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise ValueError(f'{field.name}: got {values[1]} and {values[0]}; give one.')
        if values:
            given[field.name] = values[0]
    folder = finetune(FinetuneCfg(**given), given)
    if int(os.environ.get('RANK') or 0) == 0:  # of many processes, the first speaks
        print(f"The best epoch is in {folder}; timm.create_model('local-dir:{folder}', pretrained=True) loads it.")
    return 0


def add_recipes(subparsers) -> None:
    """`timm-vitres recipes`."""
    parser = subparsers.add_parser('recipes', help='list what --config of finetune knows by name, or print one')
    parser.add_argument('name', nargs='?', metavar='NAME', help='print this one, to change it, or for train.py')
    parser.set_defaults(run=run_recipes)


def run_recipes(args: argparse.Namespace) -> int:
    """Print the names of the recipes, each with its first line; or the whole of one."""
    from ..training.recipes import recipe_names, recipe_text

    if args.name is not None:
        print(recipe_text(args.name), end='')
        return 0
    for name in recipe_names():
        print(f'{name:20}{recipe_text(name).splitlines()[0].lstrip("# ")}')
    return 0


def add_commands(subparsers) -> None:
    """Add the commands of this module to a parser."""
    add_finetune(subparsers)
    add_recipes(subparsers)
