"""`timm-vitres finetune`, `compare` and `recipes`."""

import argparse
import dataclasses
from typing import Any, Dict, List, Tuple

from ..arguments import HelpFormatter, NamedValues
from ..models.arms import ARMS
from ..training.plans import OWN, RECIPE, REPORT_NAME, SEEN
from ..training.recipes import recipe, recipe_names, recipe_text
from ..training.settings import ARGPARSE, NEEDED, PAIRS, FinetuneCfg, idle, kind_of
from .printing import own_rank

FLAGS_OF_COMPARE = ('models', 'seeds', 'lrs', 'minutes', 'test_split', 'test_frac')


def add_finetune(subparsers) -> None:
    """`timm-vitres finetune`: every field of `FinetuneCfg` is a flag; what is not given is not in the namespace."""
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
        _add_setting(parser, field, field.default)
    parser.set_defaults(run=run_finetune)


def flag_of(field: dataclasses.Field, default: Any) -> Tuple[List[str], Dict[str, Any]]:
    """Return the flags of a setting on the command line, and what argparse needs to know of them."""
    known = field.metadata
    flags = [*([known['short']] if 'short' in known else []), '--' + field.name.replace('_', '-')]
    options = {name: known[name] for name in ARGPARSE if name in known}
    if 'action' not in options:
        kind = known.get('type', kind_of(field.name))
        # what a recipe switches on, --no-NAME switches off
        switch = 'store_true' if field.name.startswith('no_') else argparse.BooleanOptionalAction
        options.update(dict(action=switch) if kind is bool else dict(type=kind))
    if default not in (None, False, ''):
        options['help'] += f' (default: {default})'
    return flags, options


def _add_setting(parser: argparse.ArgumentParser, field: dataclasses.Field, default: Any) -> None:
    flags, options = flag_of(field, default)
    if 'positional' in field.metadata:
        told = f'the same as {flags[-1]}'
        parser.add_argument(_without_flag(field), nargs='?', metavar=field.metadata['positional'], help=told)
    parser.add_argument(*flags, default=argparse.SUPPRESS, dest=field.name, **options)


def _without_flag(field: dataclasses.Field) -> str:
    return f'{field.name} without a flag'


def run_finetune(args: argparse.Namespace) -> int:
    """Fine-tune, and say where the model is and how it is loaded."""
    from ..training.loop import finetune

    given = _given(args, {} if args.config is None else recipe(args.config))
    folder = finetune(FinetuneCfg(**given), given)
    if own_rank() == 0:  # of many processes, the first speaks
        print(f"The best epoch is in {folder}; timm.create_model('local-dir:{folder}', pretrained=True) loads it.")
    return 0


def _given(args: argparse.Namespace, settings: Dict[str, Any]) -> Dict[str, Any]:
    """Return the settings of a recipe, updated by those that the command line gives."""
    given = dict(settings)
    if 'lr' in vars(args) and 'lr_base' in vars(args):
        raise ValueError(f'lr: got {args.lr:g}, and lr_base {args.lr_base:g}, which tells another rate; give one.')
    # a flag wins over the recipe, which may say the same by the other
    for name, others in (('lr', ('lr_base', 'lr_base_size', 'lr_base_scale')), ('lr_base', ('lr',))):
        for other in others if name in vars(args) else ():
            given.pop(other, None)
    for field in dataclasses.fields(FinetuneCfg):
        told = (vars(args).get(name) for name in (field.name, _without_flag(field)))
        values = [value for value in told if value is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise ValueError(f'{field.name}: got {values[1]} and {values[0]}; give one.')
        if values:
            given[field.name] = values[0]
    for name in idle(given):  # what is switched off takes along what the recipe says of it alone
        if name not in vars(args) and any(other in vars(args) for other in NEEDED[name]):
            del given[name]
    measured = given.get('autotune') and not given.get('resume')  # of what goes on the record decides
    for name in ('amp', 'channels_last', 'no_fused_attn') if measured else ():
        if name in vars(args):
            raise ValueError(f'autotune: chooses {name} by measurement, and it was given, too; add --no-autotune.')
    return given


def add_compare(subparsers) -> None:
    """`timm-vitres compare`: its own flags, and those of `finetune` that make one recipe for all arms."""
    parser = subparsers.add_parser(
        'compare',
        help='train hybrids and their parents on your images, and say which differ by more than chance',
        formatter_class=HelpFormatter,
    )
    parser.register('action', PAIRS, NamedValues)
    parser.add_argument(
        '-c', '--config', metavar='FILE', help='as of finetune, by default the recipe compare; other flags win'
    )
    arms = '; '.join(f'{name}, {arm.text}' for name, arm in ARMS.items())
    told = dict(default=argparse.SUPPRESS)
    parser.add_argument(
        '--models',
        nargs='+',
        metavar='NAME',
        help=f'arms to compare ({arms}), all of these by default; or timm models, also as NAME:key=value,key=value',
        **told,
    )
    parser.add_argument('--seeds', nargs='+', type=int, help='each trains every arm once; 0 1 2', **told)
    parser.add_argument('--lrs', nargs='+', type=float, help='learning rates to choose from; 3e-4 1e-3 3e-3', **told)
    parser.add_argument(
        '--minutes',
        type=float,
        help='train each arm for the epochs whose steps take so long here, in place of equal epochs',
        **told,
    )
    parser.add_argument(
        '--test-split',
        help="split for the verdict, of which nothing is learnt or chosen; test. Of an image folder, with '' or where "
        'it has none, a part is held out',
        **told,
    )
    parser.add_argument('--test-frac', type=float, help='part of each class that is held out for testing; 0.25', **told)
    settings = recipe(RECIPE)
    for field in dataclasses.fields(FinetuneCfg):
        if field.name not in OWN:
            _add_setting(parser, field, settings.get(field.name, field.default))
    parser.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> int:
    """Compare, and print the table and the sentence."""
    from ..training.comparing import compare
    from ..training.comparison_report import PICTURE_NAME, RESULTS_NAME, table_lines

    config = RECIPE if args.config is None else args.config
    settings = recipe(config)
    if args.config is None and getattr(args, 'pretrained', False):  # weights have a size and colours of their own
        settings = {name: value for name, value in settings.items() if name not in SEEN}
    left_out = [name for name in OWN if name in settings]
    given = _given(args, {name: value for name, value in settings.items() if name not in OWN})
    if left_out:
        print(f'config: {config}: {", ".join(left_out)} left out, since every arm or run has its own.')
    own = {name: vars(args)[name] for name in FLAGS_OF_COMPARE if name in args}
    if 'minutes' in own and 'epochs' in args:
        raise ValueError('minutes: got minutes and epochs; give one.')
    cfg = FinetuneCfg(**given)
    comparison = compare(cfg, **own)
    print('', *table_lines(comparison.figures), '', comparison.sentence, sep='\n')
    picture = f'{PICTURE_NAME}, ' if (comparison.folder / PICTURE_NAME).is_file() else ''
    print(f'{comparison.folder} holds {REPORT_NAME}, {picture}{RESULTS_NAME} with a row for every run, and the runs.')
    return 0 if comparison.verdict is not None else 1  # fewer than two arms could be trained


def add_recipes(subparsers) -> None:
    """`timm-vitres recipes`."""
    parser = subparsers.add_parser('recipes', help='list what --config of finetune knows by name, or print one')
    parser.add_argument('name', nargs='?', metavar='NAME', help='print this one, to change it, or for train.py')
    parser.set_defaults(run=run_recipes)


def run_recipes(args: argparse.Namespace) -> int:
    """Print the names of the recipes, each with its first line; or the whole of one."""
    if args.name is not None:
        print(recipe_text(args.name), end='')
        return 0
    for name in recipe_names():
        print(f'{name:20}{recipe_text(name).splitlines()[0].lstrip("# ")}')
    return 0


def add_commands(subparsers) -> None:
    """Add the commands of this module to a parser."""
    add_finetune(subparsers)
    add_compare(subparsers)
    add_recipes(subparsers)
