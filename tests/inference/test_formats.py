"""Formats are rows: each one has what the command, the checks and the sentences about it are made of."""

import re
from pathlib import Path

import pytest
import torch

from timm_vitres.cli import create_parser
from timm_vitres.inference.formats import CONFIG_ENTRY, ENGINES, FORMATS, is_export, is_installed
from timm_vitres.inference.lowering import PRECISIONS

PROJECT = (Path(__file__).parents[2] / 'pyproject.toml').read_text(encoding='utf-8')


@pytest.mark.parametrize('row', FORMATS.values(), ids=list(FORMATS))
def test_a_row_is_complete(row):
    assert row.suffixes and all(re.fullmatch(r'\.\w+', suffix) for suffix in (*row.suffixes, *row.beside))
    assert 'fp32' in row.precisions and set(row.needs_images) <= set(row.precisions) <= set(PRECISIONS)
    if row.packages or row.packages_int8:
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


@pytest.mark.parametrize(
    'row', [row for row in FORMATS.values() if row.packages or row.packages_int8], ids=lambda row: row.name
)
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


def test_an_export_is_known_by_the_config_in_it(tmp_path):
    weights = {'a': torch.ones(1)}
    torch.save(weights, tmp_path / 'checkpoint.pt')
    torch.save(weights, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    script = torch.jit.script(torch.nn.Linear(1, 1))
    torch.jit.save(script, str(tmp_path / 'others.pt'))
    torch.jit.save(script, str(tmp_path / 'script.pt'), _extra_files={CONFIG_ENTRY: '{}'})
    program = torch.export.export(torch.nn.Linear(1, 1), (torch.ones(1, 1),))
    torch.export.save(program, tmp_path / 'program.pt2', extra_files={CONFIG_ENTRY: '{}'})
    (tmp_path / 'text.pt').write_text('config.json')
    (tmp_path / 'empty.onnx').write_bytes(b'')
    (tmp_path / 'ours.onnx').write_bytes(b'\x08\x0a config.json')
    (tmp_path / 'others.onnx').write_bytes(b'\x08\x0a')
    found = {path.name for path in tmp_path.iterdir() if is_export(path)}
    assert found == {'script.pt', 'program.pt2', 'ours.onnx'}
