"""`timm-vitres`: one function per subcommand; what a mistake needs is one sentence, not a stack trace."""

import argparse
import dataclasses
import io
import json
import logging
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional, Sequence

from . import __version__
from .arguments import (
    MISTAKES,
    HelpFormatter,
    NamedValues,
    check_branch,
    check_count,
    check_new_folder,
    check_picture,
    check_repo_id,
    class_of,
    load_model,
    one_line,
    read_names,
    size_of,
)
from .scripts import become, split
from .weights.downloads import is_transient
from .writing import check_output

READER_GONE = 141  # 128 + SIGPIPE, as 130 is 128 + SIGINT


def add_finetune(subparsers) -> None:
    """`timm-vitres finetune`: every field of `FinetuneCfg` is a flag; what is not given is not in the namespace."""
    from .training.settings import PAIRS, FinetuneCfg, flag_of

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
    from .training.loop import finetune
    from .training.recipes import recipe
    from .training.settings import FinetuneCfg

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
    from .training.recipes import recipe_names, recipe_text

    if args.name is not None:
        print(recipe_text(args.name), end='')
        return 0
    for name in recipe_names():
        print(f'{name:20}{recipe_text(name).splitlines()[0].lstrip("# ")}')
    return 0


def add_predict(subparsers) -> None:
    """`timm-vitres predict`."""
    from .views import TTA

    parser = subparsers.add_parser('predict', help='classify images', formatter_class=HelpFormatter)
    parser.add_argument('images', nargs='+', type=Path, metavar='IMAGE', help='image files')
    parser.add_argument('--model', required=True, help="a timm model's name.tag, local-dir:<folder>, hf-hub:<id>")
    parser.add_argument('--topk', type=int, default=5, metavar='K', help='how many classes to name')
    parser.add_argument(
        '--tta',
        default='',
        choices=TTA,
        help='average over the image and its mirror image, or also over shifts of both',
    )
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    parser.add_argument('--plot', type=Path, metavar='PNG', help='draw the images with their predictions')
    parser.add_argument('--device', default='cpu', help='torch device')
    parser.set_defaults(run=run_predict)


def run_predict(args: argparse.Namespace) -> int:
    """Print names and probabilities of the likeliest classes of every image; 1 if an image could not be read."""
    from .pictures import plot_predictions
    from .prediction import predict

    check_count('topk', args.topk)
    if args.plot is not None:
        check_picture('plot', args.plot, args.images)
    model = load_model(args.model, args.device)
    predictions, unreadable = predict(model, args.images, topk=args.topk, tta=args.tta)
    if args.json and predictions:
        print(json.dumps([prediction._asdict() for prediction in predictions], indent=2))
    else:
        _print_table(predictions)
    for sentence in unreadable:
        print(f'timm-vitres: {sentence}', file=sys.stderr)
    if args.plot and predictions:
        plot_predictions(predictions, args.plot)
        print(f'{args.plot} shows them.', file=sys.stderr)
    return 1 if unreadable else 0


def add_explain(subparsers) -> None:
    """`timm-vitres explain`."""
    parser = subparsers.add_parser('explain', help='draw where a model looks', formatter_class=HelpFormatter)
    parser.add_argument('image', type=Path, metavar='IMAGE', help='image file, of any size')
    parser.add_argument('--model', required=True, help='a hybrid: name.tag, local-dir:<folder>, hf-hub:<id>')
    parser.add_argument(
        '--target',
        metavar='CLASS',
        help='class to explain: its name, or, where none has that name, its index; else the likeliest one',
    )
    parser.add_argument('--size', type=int, metavar='PIXELS', help="shorter side; else the model's own size")
    parser.add_argument('--output', type=Path, default=Path('explain.png'), metavar='PNG', help='where to draw')
    parser.add_argument('--device', default='cpu', help='torch device')
    parser.set_defaults(run=run_explain)


def run_explain(args: argparse.Namespace) -> int:
    """Draw an image, what the ResNet sees of it, and what the ViT sees of it."""
    from .explanation import explain
    from .pictures import plot_explanation

    check_count('size', args.size)
    check_picture('output', args.output, [args.image])
    if not args.image.exists():
        raise FileNotFoundError(f'image: there is no file {args.image}.')
    model = load_model(args.model, args.device)
    explanation = explain(model, args.image, target=class_of(args.target, model), size=args.size)
    plot_explanation(explanation, args.output)
    print(f'{explanation.label} ({100 * explanation.probability:.1f}%): {args.output} shows where the model looks.')
    return 0


def add_export(subparsers) -> None:
    """`timm-vitres export`."""
    from .inference.formats import FORMATS
    from .inference.lowering import PRECISIONS

    runtimes = [f'{row.runtime} ({", ".join(row.suffixes)})' for row in FORMATS.values()]
    parser = subparsers.add_parser(
        'export', help='write a model for another runtime, such as onnxruntime', formatter_class=HelpFormatter
    )
    parser.add_argument('model', metavar='MODEL', help="a timm model's name.tag, local-dir:<folder>, hf-hub:<id>")
    parser.add_argument('--output', required=True, type=Path, metavar='FILE', help='where to')
    parser.add_argument(
        '--format',
        choices=list(FORMATS),
        help=f'that of {", ".join(runtimes)}, in this order; else what FILE ends in says',
    )
    lacking = {
        precision: [row.name for row in FORMATS.values() if precision not in row.precisions] for precision in PRECISIONS
    }
    parser.add_argument(
        '--precision',
        default='fp32',
        choices=PRECISIONS,
        help='; '.join(f'{precision} not of {", ".join(names)}' for precision, names in lacking.items() if names),
    )
    parser.add_argument(
        '--images', nargs='+', type=Path, metavar='IMAGE', help='files or folders, to compare on, and for int8 ranges'
    )
    parser.add_argument('--num-images', type=int, default=32, metavar='N', help='how many of them to take')
    parser.add_argument('--static', action='store_true', help='for one height and width only')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='PIXELS', help='that height and width; else its own')
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Export, and say what was written."""
    from .data import example_images
    from .inference.exports import check_target, export

    check_count('num_images', args.num_images)
    size = size_of(args.img_size)
    check_output('output', args.output)
    path, format = check_target(args.output, args.format, args.precision, has_images=bool(args.images))
    model = load_model(args.model, img_size=size)
    example = example_images(args.images, model, args.num_images) if args.images else None
    print(export(model, path, format, args.precision, not args.static, example).report)
    return 0


def add_convert(subparsers) -> None:
    """`timm-vitres convert`."""
    parser = subparsers.add_parser(
        'convert', help='turn a checkpoint into a folder that timm loads', formatter_class=HelpFormatter
    )
    parser.add_argument('source', metavar='FILE', help='checkpoint (torch, npz, safetensors), folder, hf-hub:<id>, URL')
    parser.add_argument('--output', required=True, type=Path, metavar='FOLDER', help='where to')
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
    from .publishing.conversion import convert

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
    parser.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    parser.add_argument('--message', default='Upload model with timm-vitres', help='of the commit')
    parser.add_argument('--yes', action='store_true', help='do it; without, only say what would be done')
    parser.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> int:
    """Say what would be pushed, or push it."""
    from .publishing.hub import check_folder, push, push_files
    from .weights.checksums import sha256

    check_repo_id('repo_id', args.repo_id)
    check_branch('revision', args.revision)
    if not args.message.strip():
        raise ValueError(f'message: got {args.message!r}, expected some words.')
    if args.yes:
        address = push(args.folder, args.repo_id, args.revision, args.private, commit_message=args.message)
        print(f"{address}\ntimm.create_model('hf-hub:{args.repo_id}', pretrained=True) loads it, anywhere.")
        return 0
    check_folder(args.folder)
    print(f'Would push to {args.repo_id} (branch {args.revision or "main"}), in one commit:')
    for path in push_files(args.folder):
        print(f'  {path.name:20} {path.stat().st_size:>14,} bytes  sha256 {sha256(path)}')
    if not (args.folder / 'README.md').is_file():
        print('  README.md            a card that says nothing was measured')
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
    from .publishing.hub import verify

    if args.repo is not None:
        check_repo_id('repo', args.repo.partition('@')[0])
    status = 0
    for name in args.name:
        try:
            if not name:
                raise ValueError("name: got '', expected name.tag, hf-hub:<id>, local-dir:<folder>, or a path.")
            file, digest, published_by = verify(name, repo_id=args.repo)
        except MISTAKES as error:
            _say(error)
            status = 1
            continue
        print(f'{name}: sha256 {digest} ({file})')
        if published_by is None:
            remedy = (
                'the Hub can not be asked while HF_HUB_OFFLINE is set' if args.repo else 'give --repo to ask the Hub'
            )
            print(f'timm-vitres: {name}: nobody says what it should be; {remedy}.', file=sys.stderr)
            status = 1
        else:
            print(f'{name}: is what was published, says {published_by}.')
    return status


def add_run(subparsers) -> None:
    """`timm-vitres run`; `scripts.split` keeps the arguments of the script from argparse."""
    parser = subparsers.add_parser(
        'run',
        help='run a script of others that shall know the models, such as validate.py of timm',
        usage='%(prog)s [-h] (SCRIPT | -m MODULE) ...',
    )
    program = parser.add_mutually_exclusive_group(required=True)
    program.add_argument('script', nargs='?', metavar='SCRIPT', help='a file, and then its own arguments')
    program.add_argument('-m', dest='module', metavar='MODULE', help='a module, and then its own arguments')
    parser.set_defaults(run=run_script)


def run_script(args: argparse.Namespace) -> int:
    """Run a script of others; its exit status is ours."""
    return become(args.script, args.module, args.others)


def add_doctor(subparsers) -> None:
    """`timm-vitres doctor`."""
    parser = subparsers.add_parser('doctor', help='say what works here, and what to do about what does not')
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Print what was found, a line each; 1 if something that is needed does not work."""
    from .doctor import BROKEN, examine

    status = 0
    for finding in examine():
        remedy = f'; {finding.remedy}' if finding.remedy else ''
        print(f'{finding.state:8}{finding.name:17}{finding.text}{remedy}', flush=True)
        status = 1 if finding.state == BROKEN else status
    return status


def _print_table(predictions: Sequence) -> None:
    width = max((len(prediction.image) for prediction in predictions), default=0)
    for prediction in predictions:
        for rank, (label, probability) in enumerate(zip(prediction.labels, prediction.probabilities)):
            print(f'{prediction.image if rank == 0 else "":{width}}  {100 * probability:6.2f}%  {label}')


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = argparse.ArgumentParser(prog='timm-vitres', description='Hybrids of ResNet and ViT for timm.')
    parser.add_argument('--version', action='version', version=f'timm-vitres {__version__}')
    subparsers = parser.add_subparsers(required=True, metavar='COMMAND')
    add_finetune(subparsers)
    add_recipes(subparsers)
    add_predict(subparsers)
    add_explain(subparsers)
    add_export(subparsers)
    add_convert(subparsers)
    add_push(subparsers)
    add_verify(subparsers)
    add_run(subparsers)
    add_doctor(subparsers)
    return parser


def _say(error: BaseException) -> None:
    traceback.clear_frames(error.__traceback__)  # this closes the progress bars in them, so that the line is ours
    rank = int(os.environ.get('RANK') or 0)
    name = f'timm-vitres (process {rank})' if rank else 'timm-vitres'
    print(f'{name}: {one_line(error)}', file=sys.stderr)


class _Printer(logging.Handler):
    """Prints what the library logs: its course to stdout, its warnings to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; what goes wrong is for `main`, as with every other print."""
        print(record.getMessage(), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout, flush=True)


@contextmanager
def _printed_logs() -> Iterator[None]:
    logger, printer = logging.getLogger(__package__), _Printer()
    level = logger.level
    logger.addHandler(printer)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(printer)
        logger.setLevel(level)


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command line and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # names of files and classes may be in any alphabet
    try:
        with _printed_logs():
            try:
                own, others = split(sys.argv[1:] if argv is None else argv)
                args = create_parser().parse_args(own, argparse.Namespace(others=others))
                return args.run(args)
            finally:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # a reader such as `head` wants no more, not even what is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except MISTAKES as error:
        if not getattr(error, 'is_told', False):  # of many processes, the one where it happened says it
            _say(error)
        return 1
    except Exception as error:
        if not is_transient(error):
            raise
        print(f'timm-vitres: the Hub does not answer as it should ({one_line(error)}); try again.', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
