"""Weights that are part of the package: small ones of our own, which load without a network.

name.tag -> `shipped` -> the path that an entry of `default_cfgs` names; its checksum stands in SHA256SUMS beside it.
"""

import re
from pathlib import Path
from typing import Dict

FOLDER = Path(__file__).parents[1] / 'shipped'
SUMS_NAME = 'SHA256SUMS'  # its lines are those of the program sha256sum
REINSTALL = 'Install it again: pip install --force-reinstall --no-deps timm-vitres'


def shipped(name: str) -> str:
    """Return the path of the weights 'arch.tag' that the package holds."""
    return str(FOLDER / f'{name}.safetensors')


def is_shipped(path: Path) -> bool:
    """Return whether a path is one of a weight that the package holds, whether the file is there or not."""
    return path.absolute().parent == FOLDER and path.suffix == '.safetensors'


def shipped_sha256(path: Path) -> str:
    """Return the sha256 that a weight of the package must have.

    Raises:
        OSError: where the file, or its checksum, is missing from this installation.
    """
    digest = read_sums().get(path.name)
    if digest is None or not path.is_file():
        what = f'{path} is' if digest else f'the checksum of {path.name} in {FOLDER / SUMS_NAME} is'
        raise OSError(f'{what} missing, and with it a part of timm-vitres. {REINSTALL}.')
    return digest


def read_sums() -> Dict[str, str]:
    """Return the sha256 of every weight that the package holds, by the file's name."""
    path = FOLDER / SUMS_NAME
    text = path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''
    return {name: digest for digest, name in re.findall(r'^([0-9a-f]{64})  (\S+)$', text, re.MULTILINE)}
