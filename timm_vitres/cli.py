"""`timm-vitres`: the parser of all commands, and how one ends; what a mistake needs is one sentence, no stack trace."""

import argparse
import io
import os
import select
import sys
from typing import List, Optional

from . import __version__
from .arguments import MISTAKES, one_line
from .commands import inference, machine, publishing, training
from .commands.printing import printed_logs, say
from .scripts import split
from .weights.downloads import is_transient

READER_GONE = 141  # 128 + SIGPIPE, as 130 is 128 + SIGINT


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = argparse.ArgumentParser(prog='timm-vitres', description='Hybrids of ResNet and ViT for timm.')
    parser.add_argument('--version', action='version', version=f'timm-vitres {__version__}')
    subparsers = parser.add_subparsers(required=True, metavar='COMMAND')
    for module in (training, inference, publishing, machine):
        module.add_commands(subparsers)
    return parser


def _reader_is_gone() -> bool:
    """Return whether a reader, such as `head`, of stdout or stderr wants no more; it gets no more, even at exit."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            descriptor = stream.fileno()
            stream.flush()  # what could not be written may be there still
            broken = _is_broken(descriptor)
        except BrokenPipeError:
            broken = True
        except (OSError, ValueError):  # a stream of its own, as those of tests and notebooks
            continue
        if broken:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            gone = True
    return gone


def _is_broken(descriptor: int) -> bool:
    """Return whether nobody reads a pipe's other end."""
    if not hasattr(select, 'poll'):  # Windows
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are told always
    return any(event & select.POLLERR for _, event in poll.poll(0))


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command line and return its exit status."""
    if sys.stderr is None:  # closed; bars and warnings would end the command, or go to stdout
        sys.stderr = open(os.devnull, 'w')  # noqa: SIM115  (for the rest of the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # names of files and classes may be in any alphabet
    try:
        with printed_logs():
            try:
                own, others = split(sys.argv[1:] if argv is None else argv)
                args = create_parser().parse_args(own, argparse.Namespace(others=others))
                return args.run(args)
            finally:
                if sys.stdout is not None:  # it may be closed
                    sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError as error:
        if not _reader_is_gone():  # it was the pipe to a worker, or to a server
            say(error)
            return 1
        return READER_GONE
    except MISTAKES as error:
        if not getattr(error, 'is_told', False):  # of many processes, the one where it happened says it
            say(error)
        return 1
    except Exception as error:
        if not is_transient(error):
            raise
        print(f'timm-vitres: the Hub does not answer as it should ({one_line(error)}); try again.', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
