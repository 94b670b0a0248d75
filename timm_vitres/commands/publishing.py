"""`timm-vitres convert`, `push` and `verify`."""

import argparse
import sys
from pathlib import Path

from huggingface_hub import constants

from ..arguments import (
    MISTAKES,
    HelpFormatter,
    NamedValues,
    check_branch,
    check_new_folder,
    check_repo_id,
    read_names,
    size_of,
)
from ..weights.checksums import sha256
from ..weights.files import CARD_NAME
from .printing import say


def add_convert(subparsers) -> None:
    """`timm-vitres convert`."""
    parser = subparsers.add_parser(
        'convert', help='turn a checkpoint into a folder that timm loads', formatter_class=HelpFormatter
    )
    parser.add_argument('source', metavar='FILE', help='checkpoint (torch, npz, safetensors), folder, hf-hub:<id>, URL')
    parser.add_argument('--output', required=True, type=Path, metavar='FOLDER', help='the folder to write')
    parser.add_argument('--model', metavar='NAME', help='architecture; else what the checkpoint says or shows')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='PIXELS', help='height and width it was trained at')
    parser.add_argument('--label-names', type=Path, metavar='TXT', help='names of the classes, one a line')
    parser.add_argument('--no-ema', action='store_true', help='take the plain weights, not the averaged ones')
    parser.add_argument(
        '--model-kwargs', nargs='*', default={}, action=NamedValues, help="the model's other arguments, name=value"
    )
    parser.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    """Convert, and say how the model is loaded."""
    from ..publishing.conversion import convert

    if args.source in ('', 'local-dir:', 'hf-hub:'):
        raise ValueError(f'source: got {args.source!r}, expected a file, a folder, or hf-hub:<id>.')
    names = read_names(args.label_names) if args.label_names else None
    size = size_of(args.img_size)
    check_new_folder('output', args.output)
    folder = convert(args.source, args.output, args.model, names, size, not args.no_ema, args.model_kwargs)
    print(f"{folder} holds the model; timm.create_model('local-dir:{folder}', pretrained=True) loads it.")
    return 0


def add_push(subparsers) -> None:
    """`timm-vitres push`."""
    parser = subparsers.add_parser('push', help='push a model to the Hugging Face Hub', formatter_class=HelpFormatter)
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='of finetune, convert or timm_vitres.save')
    parser.add_argument('repo_id', metavar='OWNER/NAME', help='the repository; made if it is missing')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to commit to; made if it is missing')
    parser.add_argument(
        '--private',
        action='store_true',
        default=None,
        help='make a new repository private, and send nothing to a public one',
    )
    parser.add_argument('--message', default='Upload model with timm-vitres', help='of the commit')
    parser.add_argument('--yes', action='store_true', help='do it; without, only say what would be done')
    parser.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> int:
    """Say what would be pushed, or push it."""
    from ..publishing.cards import read_card
    from ..publishing.hub import check_folder, held, model_name, push, push_files

    check_repo_id('repo_id', args.repo_id)
    check_branch('revision', args.revision)
    if not args.message.strip():
        raise ValueError(f'message: got {args.message!r}, expected some words.')
    if args.yes:
        address = push(args.folder, args.repo_id, args.revision, args.private, commit_message=args.message)
        name = model_name(args.repo_id, args.revision)
        print(f"{address}\ntimm.create_model('{name}', pretrained=True) loads it, anywhere.")
        return 0
    with held(args.folder):
        check_folder(args.folder)
        card = read_card(args.folder / CARD_NAME)
        print(f'Would push to {args.repo_id} (branch {args.revision or "main"}), in one commit:')
        for path in push_files(args.folder):
            if path.name == CARD_NAME:
                print(f'  {CARD_NAME:20} the card, merged with the one that is there')
            else:
                print(f'  {path.name:20} {path.stat().st_size:>14,} bytes  sha256 {sha256(path)}')
    if card is None:
        print(f'  {CARD_NAME:20} a card that says nothing was measured, merged with the one that is there')
    print('What is there of another model would be deleted: weights under other names (pytorch_model.bin, shards), a')
    print("run's curves and table, transformers' preprocessor_config.json.")
    print('Nothing was sent; repeat with --yes to do it.')
    return 0


def add_verify(subparsers) -> None:
    """`timm-vitres verify`."""
    parser = subparsers.add_parser(
        'verify', help="compare a model's weights with what was published", formatter_class=HelpFormatter
    )
    parser.add_argument('name', nargs='+', help='name.tag, hf-hub:<id>, local-dir:<folder>, or a path')
    parser.add_argument('--repo', metavar='OWNER/NAME', help='repository to compare a local file with')
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Print the sha256 of every model's weights; 1 if one is wrong, or nobody says what it should be."""
    from ..publishing.hub import verify

    if args.repo is not None:
        check_repo_id('repo', args.repo.partition('@')[0])
    status = 0
    for name in args.name:
        try:
            if not name:
                raise ValueError("name: got '', expected name.tag, hf-hub:<id>, local-dir:<folder>, or a path.")
            file, digest, published_by = verify(name, repo_id=args.repo)
        except MISTAKES as error:
            say(error)
            status = 1
            continue
        print(f'{name}: sha256 {digest} ({file})')
        if published_by is None:
            asks = 'unset HF_HUB_OFFLINE, and ' if constants.HF_HUB_OFFLINE else ''
            remedy = f'{asks}give --repo to ask the Hub'
            print(f'timm-vitres: {name}: nobody says what it should be; {remedy}.', file=sys.stderr)
            status = 1
        else:
            print(f'{name}: is what was published, says {published_by}.')
    return status


def add_commands(subparsers) -> None:
    """Add the commands of this module to a parser."""
    add_convert(subparsers)
    add_push(subparsers)
    add_verify(subparsers)
