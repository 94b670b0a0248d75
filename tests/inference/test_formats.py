"""Formats are rows: each one has what the command, the checks and the sentences about it are made of."""

import re
from pathlib import Path

import pytest
import torch

from timm_vitres.cli import create_parser
from timm_vitres.inference.formats import ENGINES, FORMATS, is_checkpoint, is_installed
from timm_vitres.inference.lowering import PRECISIONS

PROJECT = (Path(__file__).parents[2] / 'pyproject.toml').read_text(encoding='utf-8')


@pytest.mark.parametrize('row', FORMATS.values(), ids=list(FORMATS))
def test_a_row_is_complete(row):
    assert row.suffixes and all(re.fullmatch(r'\.\w+', suffix) for suffix in (*row.suffixes, *row.beside))
    assert 'fp32' in row.precisions and set(row.needs_images) <= set(row.precisions) <= set(PRECISIONS)
    if row.packages:
        line = re.search(rf'^{row.extra} = \[(.*)\]$', PROJECT, re.MULTILINE)
        assert line, f'the row {row.name!r} needs packages: give pyproject.toml an extra {row.extra!r} with them.'
        for package in (*row.packages, *row.packages_int8):
            assert f'"{package}>=' in line[1], f'{package} is missing in the extra {row.extra!r} of pyproject.toml.'
    assert bool(row.cut_off) == bool(row.beside), 'files beside the one that is named need a note for a kill.'


def test_rows_do_not_share_names():
    suffixes = [suffix for row in FORMATS.values() for suffix in (*row.suffixes, *row.beside)]
    assert len(set(suffixes)) == len(suffixes) and [row.name for row in FORMATS.values()] == list(FORMATS)
    assert set(ENGINES) == {'onnxruntime', 'openvino'}


def test_the_command_offers_what_the_rows_say(capsys):
    with pytest.raises(SystemExit):
        create_parser().parse_args(['export', '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    for row in FORMATS.values():
        assert row.name in text and row.runtime in text
        for precision in set(PRECISIONS) - set(row.precisions):
            assert re.search(rf'{precision} not of [^;)]*\b{row.name}\b', text)


@pytest.mark.parametrize('row', [row for row in FORMATS.values() if row.packages], ids=lambda row: row.name)
def test_missing_packages_are_named(row, monkeypatch):
    for package in row.packages:
        monkeypatch.setattr('timm_vitres.inference.formats.is_installed', lambda name, gone=package: name != gone)
        with pytest.raises(ValueError, match=rf"^format: '{row.name}' needs {package}, pip install \"timm-vitres\["):
            row.check_installed('fp32')
    monkeypatch.setattr('timm_vitres.inference.formats.is_installed', lambda name: name not in row.packages_int8)
    row.check_installed('fp32')
    if row.packages_int8:
        with pytest.raises(ValueError, match=f'needs {row.packages_int8[0]}, pip install'):
            row.check_installed('int8')


def test_packages_are_found_without_importing_them(monkeypatch):
    assert is_installed('torch') and not is_installed('no_such_package')
    monkeypatch.setitem(__import__('sys').modules, 'torch', None)
    assert not is_installed('torch')


def test_a_checkpoint_is_told_from_a_script(tmp_path):
    torch.save({'a': torch.ones(1)}, tmp_path / 'checkpoint.pt')
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / 'script.pt'))
    (tmp_path / 'text.pt').write_text('text')
    found = {path.name: is_checkpoint(path) for path in tmp_path.iterdir()}
    assert found == {'checkpoint.pt': True, 'script.pt': False, 'text.pt': False}
