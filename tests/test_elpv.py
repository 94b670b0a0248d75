"""The demo, benchmarks/elpv.py, in small: a model that learns grades is asked for two classes, in two processes."""

import json
import sys

import pytest
from conftest import write_noise

GRADES = [f'{percent} {cell}' for percent in (0, 33, 67, 100) for cell in ('mono', 'poly')]


def test_the_demo_in_small(script, tmp_path, monkeypatch, capsys):
    elpv = script('elpv')
    write_noise(tmp_path / 'demo/elpv_grades', GRADES, train=3, val=1, test=2)
    for name, value in dict(epochs=1, img_size=32, batch_size=8).items():
        monkeypatch.setitem(elpv.RECIPE, name, value)
    monkeypatch.setattr(sys, 'argv', ['elpv.py', '--output', str(tmp_path / 'demo')])
    elpv.main()
    printed = capsys.readouterr().out
    assert '16 cells are held out' in printed and 'on 16 held-out cells, in a new process and in this one' in printed
    model, picture = tmp_path / 'demo/model-seed0', tmp_path / 'demo/predictions-seed0.png'
    assert picture.is_file() and set(json.loads((model / 'config.json').read_text())['label_names']) == set(GRADES)
    found = elpv.evaluate(model, tmp_path / 'demo/elpv_grades/test', picture)
    recalls = [found['recall_functional'], found['recall_defective']]
    assert found['images'] == 16 and found['balanced'] == pytest.approx(sum(recalls) / 2, abs=0.01)
