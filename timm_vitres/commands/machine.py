"""`timm-vitres run` and `doctor`: what else is on this machine."""

import argparse

from ..scripts import become


def add_run(subparsers) -> None:
    """`timm-vitres run`; `scripts.split` keeps the arguments of the script from argparse."""
    parser = subparsers.add_parser(
        'run',
        help="run another program's script with the models registered, such as timm's validate.py",
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
    from ..doctor import BROKEN, examine

    status = 0
    for finding in examine():
        remedy = f'; {finding.remedy}' if finding.remedy else ''
        print(f'{finding.state:8}{finding.name:17}{finding.text}{remedy}', flush=True)
        status = 1 if finding.state == BROKEN else status
    return status


def add_commands(subparsers) -> None:
    """Add the commands of this module to a parser."""
    add_run(subparsers)
    add_doctor(subparsers)
