"""`timm-vitres predict`, `explain` and `export`."""

import argparse
import json
import sys
import textwrap
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, Iterator, List

from tqdm import tqdm

from ..arguments import HelpFormatter, check_count, check_picture, class_of, load_model, size_of
from ..data import example_images, find_files
from ..explanation import explain
from ..inference.formats import FORMATS
from ..inference.lowering import PRECISIONS
from ..labels import printable
from ..pictures import check_drawn, plot_explanation, plot_predictions
from ..prediction import predict_each
from ..views import TTA
from ..walking import shown
from ..writing import check_output


def add_predict(subparsers) -> None:
    """`timm-vitres predict`."""
    parser = subparsers.add_parser('predict', help='classify images', formatter_class=HelpFormatter)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files, or folders of them')
    parser.add_argument('--model', required=True, help="a timm model's name.tag, local-dir:<folder>, hf-hub:<id>")
    parser.add_argument('--topk', type=int, default=5, metavar='K', help='how many classes to name')
    parser.add_argument(
        '--tta',
        default='',
        choices=TTA,
        help='average over the image and its mirror image, or also over shifts of both',
    )
    parser.add_argument('-b', '--batch-size', type=int, default=32, metavar='N', help='images the model sees at once')
    parser.add_argument('-j', '--workers', type=int, default=0, metavar='N', help='processes that read images')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    parser.add_argument('--plot', type=Path, metavar='PNG', help='draw the images with their predictions')
    parser.add_argument('--device', default='cpu', help='torch device')
    parser.set_defaults(run=run_predict)


def run_predict(args: argparse.Namespace) -> int:
    """Print names and probabilities of the likeliest classes of every image; 1 if an image could not be read."""
    for name in ('topk', 'batch_size'):
        check_count(name, getattr(args, name))
    files = find_files(args.images)
    if args.plot is not None:
        check_picture('plot', args.plot, [Path(file) for file in files])
        check_drawn(len(files))
    model = load_model(args.model, args.device)
    width = max(len(shown(file)) for file in files)
    drawn: List[Any] = []
    failed = 0
    with _json_list() if args.json else nullcontext(lambda result: _table_rows(result, width)) as line:
        # on a terminal the rows tell how far it is; a bar would be cleared and drawn again for each
        has_bar = not getattr(sys.stdout, 'isatty', bool)()
        for result in predict_each(model, files, args.topk, args.tta, args.batch_size, args.workers, has_bar):
            if isinstance(result, str):
                tqdm.write(f'timm-vitres: {printable(result)}', file=sys.stderr)
                failed += 1
                continue
            print(line(result), end='')
            if args.plot is not None:
                drawn.append(result)
    print(end='', flush=True)  # whatever becomes of the picture
    if drawn:
        plot_predictions(drawn, args.plot)
        print(f'{args.plot} shows them.', file=sys.stderr)
    return 1 if failed else 0


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
    check_count('size', args.size)
    check_picture('output', args.output, [args.image])
    if not args.image.exists():
        raise FileNotFoundError(f'image: there is no file {args.image}.')
    model = load_model(args.model, args.device)
    explanation = explain(model, args.image, target=class_of(args.target, model), size=args.size)
    plot_explanation(explanation, args.output)
    label = printable(explanation.label)
    print(f'{label} ({100 * explanation.probability:.1f}%): {args.output} shows where the model looks.')
    return 0


def add_export(subparsers) -> None:
    """`timm-vitres export`."""
    runtimes = [f'{row.runtime} ({", ".join(row.suffixes)})' for row in FORMATS.values()]
    parser = subparsers.add_parser(
        'export', help='write a model for another runtime, such as onnxruntime', formatter_class=HelpFormatter
    )
    parser.add_argument('model', metavar='MODEL', help="a timm model's name.tag, local-dir:<folder>, hf-hub:<id>")
    parser.add_argument('--output', required=True, type=Path, metavar='FILE', help='the file to write')
    parser.add_argument(
        '--format',
        choices=list(FORMATS),
        help=f'format, by what runs it ({", ".join(runtimes)}); by default the suffix of FILE says',
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
    parser.add_argument('--num-images', type=int, metavar='N', help='how many of them to take (default: 32)')
    parser.add_argument('--static', action='store_true', help='for one height and width only')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='PIXELS', help='that height and width; else its own')
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Export, and say what was written."""
    from ..inference.exports import check_target, export

    check_count('num_images', args.num_images)
    if args.num_images is not None and not args.images:
        raise ValueError('num_images: got no images to take them from; give images, too.')
    size = size_of(args.img_size)
    check_output('output', args.output)
    path, format = check_target(args.output, args.format, args.precision, has_images=bool(args.images))
    model = load_model(args.model, img_size=size)
    example = example_images(args.images, model, args.num_images or 32) if args.images else None
    print(export(model, path, format, args.precision, not args.static, example).report)
    return 0


@contextmanager
def _json_list() -> Iterator[Callable[[Any], str]]:
    """Print a list in JSON, whole even where the block ends early, but none of nothing; yield a function that returns
    the next lines.
    """
    held: List[str] = []

    def line(result: Any) -> str:
        held.append(textwrap.indent(json.dumps(result._asdict(), indent=2), '  '))
        return f'{held.pop(0)},\n' if len(held) > 1 else '[\n'

    try:
        yield line
    finally:
        if held:
            print(*held, ']', sep='\n')


def _table_rows(prediction: Any, width: int) -> str:
    """Return the lines of a prediction in the table, with the image's path, of so many characters, in the first."""
    names = [shown(prediction.image)] + [''] * (len(prediction.labels) - 1)
    rows = zip(names, prediction.probabilities, prediction.labels)
    return ''.join(f'{name:{width}}  {100 * part:6.2f}%  {printable(label)}\n' for name, part, label in rows)


def add_commands(subparsers) -> None:
    """Add the commands of this module to a parser."""
    add_predict(subparsers)
    add_explain(subparsers)
    add_export(subparsers)
