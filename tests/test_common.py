"""benchmarks/common.py: rows are appended once, under their own columns."""

import csv

import pytest


@pytest.fixture
def common(script):
    return script('common')


def rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def test_a_row_that_is_there_is_not_repeated(common, tmp_path, capsys):
    """As a command that is started again would, whose runs are over."""
    path = tmp_path / 'rows.csv'
    for row in (dict(seed=0, top1=95.5), dict(seed=1, top1=95.5), dict(seed=0, top1=95.5), dict(seed=0, top1=95.4)):
        common.append_row(path, row)
    assert [(row['seed'], row['top1']) for row in rows(path)] == [('0', '95.5'), ('1', '95.5'), ('0', '95.4')]
    assert 'rows.csv has this row: seed=0 top1=95.5' in capsys.readouterr().out
    assert rows(path)[0]['command'] and rows(path)[0]['torch']


def test_other_columns_are_refused(common, tmp_path):
    path = tmp_path / 'rows.csv'
    common.append_row(path, dict(seed=0, top1=95.5))
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"has the columns \['seed', 'top1', .*nothing was appended"):
        common.append_row(path, dict(top1=95.5, seed=1))
    assert path.read_bytes() == before


def test_what_is_recorded_is_known_by_some_of_its_columns(common, tmp_path, monkeypatch):
    monkeypatch.setattr(common, 'RESULTS', tmp_path)
    assert not common.is_recorded('rows', dict(seed=0))
    common.write_row('rows', dict(seed=0, changes='', top1=95.5), record=True)
    assert common.is_recorded('rows', dict(seed=0, changes='')) and not common.is_recorded('rows', dict(seed=1))


def test_names_of_runs_are_names_of_folders(common, tmp_path):
    assert common.run_name('wide', changes=dict(lr=0.1, path='a/b'), seed=1) == 'wide-lr=0.1-path=a_b-1'
    names = {common.run_name('wide', changes=dict(path='a' * 300), seed=seed) for seed in range(2)}
    assert len(names) == 2
    for name in names:
        (tmp_path / name).mkdir()
        assert name.startswith('wide-path=aaa')
