"""`timm-vitres`: one function per subcommand; what a mistake needs is one sentence, not a stack trace."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, List, Optional, Sequence

import timm
from timm.utils import ParseKwargs

from . import __version__
from .files import is_transient


class _Arguments(ParseKwargs):
    """timm's action for name=value; anything else is the user's mistake, not a stack trace."""

    def __call__(self, parser, namespace, values, option_string=None):
        wrong = [value for value in values if not value.partition('=')[0].isidentifier() or '=' not in value]
        if wrong:
            raise argparse.ArgumentError(self, f'got {wrong[0]!r}, expected name=value')
        super().__call__(parser, namespace, values, option_string)


def add_finetune(subparsers) -> None:
    """`timm-vitres finetune`: every field of `FinetuneCfg` is a flag; what is not given is not in the namespace."""
    from .settings import FinetuneCfg, kind_of

    parser = subparsers.add_parser(
        'finetune', help='fine-tune a model on an image folder or dataset', formatter_class=_Formatter
    )
    parser.add_argument('data', nargs='?', metavar='DIR', help='the same as --data-dir')
    short = {'batch_size': ['-b'], 'workers': ['-j']}
    for field in dataclasses.fields(FinetuneCfg):
        options = {name: field.metadata[name] for name in ('help', 'nargs', 'choices') if name in field.metadata}
        flags = [*short.get(field.name, []), '--' + field.name.replace('_', '-')]
        if field.name == 'resume':
            options.update(nargs='?', const=True, metavar='PATH')
        elif field.name == 'model_kwargs':
            options.update(action=_Arguments)
        elif kind_of(field.name) is bool:
            options.update(action='store_true')
        else:
            options.update(type=kind_of(field.name))
        if field.default not in (None, False, ''):
            options['help'] += f' (default: {field.default})'
        parser.add_argument(*flags, default=argparse.SUPPRESS, dest=field.name, **options)
    parser.set_defaults(run=run_finetune)


def run_finetune(args: argparse.Namespace) -> int:
    """Fine-tune, and say where the model is and how it is loaded."""
    from .finetune import FinetuneCfg, finetune

    names = {field.name for field in dataclasses.fields(FinetuneCfg)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if args.data is not None:
        if 'data_dir' in given and given['data_dir'] != args.data:
            raise ValueError(f'data_dir: got {args.data} and {given["data_dir"]}; give one.')
        given['data_dir'] = args.data
    folder = finetune(FinetuneCfg(**given), given)
    print(f"The best epoch is in {folder}; timm.create_model('local-dir:{folder}', pretrained=True) loads it.")
    return 0


def add_predict(subparsers) -> None:
    """`timm-vitres predict`."""
    parser = subparsers.add_parser('predict', help='classify images', formatter_class=_Formatter)
    parser.add_argument('images', nargs='+', type=Path, metavar='IMAGE', help='image files')
    parser.add_argument('--model', required=True, help="a timm model's name.tag, local-dir:<folder>, hf-hub:<id>")
    parser.add_argument('--topk', type=int, default=5, metavar='K', help='how many classes to name')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    parser.add_argument('--plot', type=Path, metavar='PNG', help='draw the images with their predictions')
    parser.add_argument('--device', default='cpu', help='torch device')
    parser.set_defaults(run=run_predict)


def run_predict(args: argparse.Namespace) -> int:
    """Print names and probabilities of the likeliest classes of every image; 1 if an image could not be read."""
    from .predict import plot_predictions, predict

    if args.topk < 1:
        raise ValueError(f'topk: got {args.topk}, expected a number from 1 up.')
    model = timm.create_model(args.model, pretrained=True).to(args.device).eval()
    predictions, unreadable = predict(model, args.images, topk=args.topk)
    if args.json:
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
    parser = subparsers.add_parser('explain', help='draw where a model looks', formatter_class=_Formatter)
    parser.add_argument('image', type=Path, metavar='IMAGE', help='image file, of any size')
    parser.add_argument('--model', required=True, help='a hybrid: name.tag, local-dir:<folder>, hf-hub:<id>')
    parser.add_argument('--target', metavar='CLASS', help='class to explain, by name or index; else the likeliest one')
    parser.add_argument('--size', type=int, metavar='PIXELS', help="shorter side; else the model's own size")
    parser.add_argument('--output', type=Path, default=Path('explain.png'), metavar='PNG', help='where to draw')
    parser.add_argument('--device', default='cpu', help='torch device')
    parser.set_defaults(run=run_explain)


def run_explain(args: argparse.Namespace) -> int:
    """Draw an image, what the ResNet sees of it, and what the ViT sees of it."""
    from .explain import explain, plot_explanation

    model = timm.create_model(args.model, pretrained=True).to(args.device).eval()
    target = int(args.target) if args.target and args.target.isdecimal() else args.target
    explanation = explain(model, args.image, target=target, size=args.size)
    plot_explanation(explanation, args.output)
    print(f'{explanation.label} ({100 * explanation.probability:.1f}%): {args.output} shows where the model looks.')
    return 0


def add_export(subparsers) -> None:
    """`timm-vitres export`."""
    parser = subparsers.add_parser(
        'export', help='write a model for onnxruntime, TorchScript or torch.export', formatter_class=_Formatter
    )
    parser.add_argument('model', metavar='MODEL', help="a timm model's name.tag, local-dir:<folder>, hf-hub:<id>")
    parser.add_argument('--output', required=True, type=Path, metavar='FILE', help='where to')
    parser.add_argument('--format', default='onnx', help='onnx, torchscript, or pt2 (torch.export)')
    parser.add_argument('--precision', default='fp32', help='fp32; bf16 (not onnx); int8 (not torchscript)')
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
    from .export import export

    model = timm.create_model(args.model, pretrained=True, img_size=_size(args.img_size)).eval()
    example = example_images(args.images, model, args.num_images) if args.images else None
    print(export(model, args.output, args.format, args.precision, not args.static, example).report)
    return 0


def add_convert(subparsers) -> None:
    """`timm-vitres convert`."""
    parser = subparsers.add_parser(
        'convert', help='turn a checkpoint into a folder that timm loads', formatter_class=_Formatter
    )
    parser.add_argument('source', metavar='FILE', help='a checkpoint (torch, npz, safetensors), a folder, hf-hub:<id>')
    parser.add_argument('--output', required=True, type=Path, metavar='FOLDER', help='where to')
    parser.add_argument('--model', metavar='NAME', help='architecture; else what the checkpoint says or shows')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='PIXELS', help='height and width it was trained at')
    parser.add_argument('--label-names', type=Path, metavar='TXT', help='names of the classes, one a line')
    parser.add_argument('--no-ema', action='store_true', help='take the plain weights, not the averaged ones')
    parser.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ParseKwargs, help="the model's other arguments, name=value"
    )
    parser.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    """Convert, and say how the model is loaded."""
    from .convert import convert

    names = args.label_names.read_text(encoding='utf-8').splitlines() if args.label_names else None
    size = _size(args.img_size)
    folder = convert(args.source, args.output, args.model, names, size, not args.no_ema, args.model_kwargs)
    print(f"{folder} holds the model; timm.create_model('local-dir:{folder}', pretrained=True) loads it.")
    return 0


def add_push(subparsers) -> None:
    """`timm-vitres push`."""
    parser = subparsers.add_parser('push', help='push a model to the Hugging Face Hub', formatter_class=_Formatter)
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='of finetune, convert or timm_vitres.save')
    parser.add_argument('repo_id', metavar='OWNER/NAME', help='the repository; made if it is missing')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to commit to; made if it is missing')
    parser.add_argument('--private', action='store_true', default=None, help='make a new repository private')
    parser.add_argument('--message', default='Upload model with timm-vitres', help='of the commit')
    parser.add_argument('--yes', action='store_true', help='do it; without, only say what would be done')
    parser.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> int:
    """Say what would be pushed, or push it."""
    from .files import sha256
    from .hub import check_folder, push, push_files

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
        'verify', help="compare a model's weights with what was published", formatter_class=_Formatter
    )
    parser.add_argument('name', nargs='+', help='name.tag, hf-hub:<id>, local-dir:<folder>, or a path')
    parser.add_argument('--repo', metavar='OWNER/NAME', help='repository to compare a local file with')
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Print the sha256 of every model's weights; 1 if one is wrong, or nobody says what it should be."""
    from .hub import verify

    status = 0
    for name in args.name:
        try:
            file, digest, published_by = verify(name, repo_id=args.repo)
        except (ValueError, OSError, RuntimeError) as error:
            print(f'timm-vitres: {error}', file=sys.stderr)
            status = 1
            continue
        print(f'{name}: sha256 {digest} ({file})')
        if published_by is None:
            print(f'timm-vitres: {name}: nobody says what it should be; give --repo to ask the Hub.', file=sys.stderr)
            status = 1
        else:
            print(f'{name}: is what was published, says {published_by}.')
    return status


def _size(values: Optional[List[int]]) -> Any:
    return values[0] if values and len(values) == 1 else values


def _print_table(predictions: Sequence) -> None:
    width = max((len(prediction.image) for prediction in predictions), default=0)
    for prediction in predictions:
        for rank, (label, probability) in enumerate(zip(prediction.labels, prediction.probabilities)):
            print(f'{prediction.image if rank == 0 else "":{width}}  {100 * probability:6.2f}%  {label}')


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        # a default of None or False says nothing
        return super()._get_help_string(action) if action.default not in (None, False, '') else action.help


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = argparse.ArgumentParser(prog='timm-vitres', description='Hybrids of ResNet and ViT for timm.')
    parser.add_argument('--version', action='version', version=f'timm-vitres {__version__}')
    subparsers = parser.add_subparsers(required=True, metavar='COMMAND')
    add_finetune(subparsers)
    add_predict(subparsers)
    add_explain(subparsers)
    add_export(subparsers)
    add_convert(subparsers)
    add_push(subparsers)
    add_verify(subparsers)
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command line and return its exit status."""
    args = create_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # the user's mistakes and the world's: torch and timm raise RuntimeError for unknown or weightless models
        print(f'timm-vitres: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_transient(error):
            raise
        print(f'timm-vitres: the Hub does not answer as it should ({error}); try again.', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
