"""Arguments of the command line, checked before anything long is done: models, devices, sizes, files, repositories.

text -> what it means, or one sentence (ValueError, OSError) that names the argument.
"""

import argparse
import os
import re
from pathlib import Path
from typing import Any, List, Optional, Sequence, Union

import timm
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image
from timm.utils import ParseKwargs
from torch import nn

from .checks import read_text, usable_device
from .labels import label_names, printable
from .pictures import DRAWN, new_figure
from .publishing.config_file import check_config_of
from .weights.downloads import is_transient
from .writing import TEMPORARY, check_output

# these errors are the user's or the world's: torch and timm raise RuntimeError for unknown or weightless models,
# TypeError for unknown arguments; any other error is a mistake of ours, and shows its stack trace
MISTAKES = (ValueError, TypeError, OSError, RuntimeError, MemoryError)


class NamedValues(ParseKwargs):
    """timm's action for name=value; anything else is the user's mistake, not a stack trace."""

    def __call__(self, parser, namespace, values, option_string=None):
        wrong = [value for value in values if not value.partition('=')[0].isidentifier() or '=' not in value]
        if wrong:
            raise argparse.ArgumentError(self, f'got {wrong[0]!r}, expected name=value')
        before = getattr(namespace, self.dest, None) or {}
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, {**before, **getattr(namespace, self.dest)})  # the flag may come twice


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that tells the defaults, where they tell a reader anything."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        return super()._get_help_string(action) if action.default not in (None, False, '') else action.help


def load_model(name: str, device: str = 'cpu', **kwargs: Any) -> nn.Module:
    """Return a pretrained model in evaluation mode, on a device.

    Raises:
        ValueError: where the device can't be used, or the model can't be loaded, because of its name, its config.json
            or its weights.
    """
    usable = usable_device(device)
    try:
        check_config_of(name)
        model = timm.create_model(name, pretrained=True, **kwargs)
    except Exception as error:
        if is_transient(error):
            raise
        raise ValueError(f'model: {name!r} can not be loaded: {one_line(error)}') from error
    return model.to(usable).eval()


def check_count(name: str, value: Optional[int]) -> None:
    """Raise ValueError for a number below 1; None is allowed."""
    if value is not None and value < 1:
        raise ValueError(f'{name}: got {value}, expected a number from 1 up.')


def check_picture(name: str, path: Path, images: Sequence[Path]) -> None:
    """Raise ValueError or OSError, before anything long is done, where a picture can't be drawn to a path."""
    check_output(name, path)
    if path.suffix.lower() != '.png':
        raise ValueError(f'{name}: got {path}, expected the name of a PNG (.png).')
    if os.path.realpath(path) in map(os.path.realpath, images):  # links in a circle, too, have one
        raise ValueError(f'{name}: {path} is an image to be read, and is not written over.')
    if path.exists() and not _is_drawn(path):  # `--plot *.png` takes the first of somebody's photographs
        raise FileExistsError(
            f'{name}: {path} is there, is no picture that predict or explain of this version has drawn, and is not '
            'written over.'
        )
    new_figure(name, 1, 1)


def _is_drawn(path: Path) -> bool:
    """Return whether a file is empty, or a picture of predictions or of an explanation that this package drew."""
    if path.stat().st_size == 0:
        return True
    try:
        with Image.open(path, formats=['PNG']) as picture:
            return DRAWN.items() <= picture.info.items()
    except Exception:  # Pillow raises errors of any kind for what is no picture
        return False


def check_new_folder(name: str, folder: Path) -> None:
    """Raise OSError unless a folder is new or empty, and can be written to."""
    if folder.is_dir():
        if any(not path.name.startswith(TEMPORARY) for path in folder.iterdir()):  # those a killed writer may leave
            raise FileExistsError(f'{name}: {folder} is not empty, and is not written over; give a new folder.')
        folder = folder / 'model'
    elif os.path.lexists(folder):
        raise FileExistsError(f'{name}: {folder} is no folder, and is not written over; give a new folder.')
    check_output(name, folder)


def check_branch(name: str, branch: Optional[str]) -> None:
    """Raise ValueError for a name that git does not take for a branch."""
    if branch is None:
        return
    broken = any(not part or part.startswith('.') or part.endswith(('.', '.lock')) for part in branch.split('/'))
    if (
        broken
        or branch == 'HEAD'
        or branch.startswith('-')
        or re.search(r'[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|@\{', branch)
    ):
        raise ValueError(f'{name}: got {branch!r}, expected the name of a branch.')


def check_repo_id(name: str, repo_id: str) -> None:
    """Raise ValueError unless a repository's id is 'owner/name'."""
    try:
        validate_repo_id(repo_id)
        owned = repo_id.count('/') == 1
    except HFValidationError:
        owned = False
    if not owned:
        raise ValueError(f"{name}: got {repo_id!r}, expected 'owner/name', of letters, digits, '-', '_' and '.'.")


def class_of(text: Optional[str], model: nn.Module) -> Union[None, int, str]:
    """Return the class that `--target` means: its name, or its index where no class has that name."""
    if text is None or not re.fullmatch(r'-?\d+', text) or not getattr(model, 'num_classes', 0):
        return text
    return text if text in label_names(model) else int(text)


def read_names(path: Path) -> List[str]:
    """Return the names of classes that a text file holds, one a line; raise ValueError for an empty line."""
    text = read_text('label_names', path)
    if '\0' in text:
        raise ValueError(f'label_names: {path} is no text (it has a byte that is 0).')
    names = [line.strip() for line in text.rstrip().split('\n')]
    if '' in names:
        raise ValueError(f'label_names: line {names.index("") + 1} of {path} is empty, expected the name of a class.')
    return names


def size_of(values: Optional[List[int]]) -> Any:
    """Return a height and width, in pixels, as timm takes them: one number, or a pair."""
    if values is None:
        return None
    if len(values) > 2 or min(values) < 1:
        shown = ' '.join(map(str, values))
        raise ValueError(f'img_size: got {shown}, expected one or two numbers of pixels from 1 up.')
    return values[0] if len(values) == 1 else (values[0], values[1])


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; those of torch and the Hub may have many."""
    told = printable(' '.join(str(error).split())) or (
        'there is not enough memory' if isinstance(error, MemoryError) else ''
    )
    if told and isinstance(error, MISTAKES):
        return told
    return f'{type(error).__name__} {told}'.strip()
