"""Formats that a program has taught Pillow reach every process of its runs."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from timm_vitres.plugins import taught, teach

PLUGIN = """
from PIL import Image

def accept(prefix):
    return prefix.startswith(b'DOTS')

def opened(file, name):
    return Image.frombytes('L', (8, 8), file.read()[4:68])

def register():
    Image.register_open('DOTS', opened, accept)
    Image.register_extension('DOTS', '.dots')
"""
SCRIPT = """
import multiprocessing, os, timm, dots
from timm_vitres import FinetuneCfg, finetune, predict
from timm_vitres.training import checking

if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    dots.register()
    for name in 'ab':
        os.makedirs(f'images/{name}')
        for index in range(12):
            with open(f'images/{name}/{index}.dots', 'wb') as file:
                file.write(b'DOTS' + bytes([index + (ord(name) - 97) * 99] * 64))
    paths = [f'images/a/{index}.dots' for index in range(12)]
    checking.FEW = 0
    assert checking.unreadable(paths, 'L') == {}
    with checking.BackgroundCheck(paths, 'L', 'Advice.') as check:
        check.process.join(300)
        check.raise_if_bad()
        assert check.is_done
    cfg = dict(data_dir='images', model='test_vitresnet', in_chans=1, img_size=32, epochs=1, batch_size=8, workers=1)
    finetune(FinetuneCfg(**cfg, output='run'))
    model = timm.create_model('local-dir:run', pretrained=True)
    assert len(predict(model, paths, workers=1)[0]) == 12
"""


@pytest.fixture
def formats(monkeypatch):
    """Pillow's formats, which are what they were after the test."""
    Image.init()
    monkeypatch.setattr(Image, 'OPEN', dict(Image.OPEN))
    monkeypatch.setattr(Image, 'ID', list(Image.ID))


def opened(file, name):
    return Image.new('L', (4, 4))


def test_what_a_program_registers_is_found_and_told(formats):
    assert taught() == {}  # nothing of Pillow's own
    Image.register_open('DOTS', opened)
    Image.register_open('HERE', lambda file, name: None)  # which no other process can be told of
    found = taught()
    assert list(found) == ['DOTS'] and found['DOTS'].factory is opened
    del Image.OPEN['DOTS']
    Image.ID.remove('DOTS')
    teach(found, 3)
    teach(found)
    assert Image.OPEN['DOTS'][0] is opened and Image.ID.count('DOTS') == 1


@pytest.mark.slow
def test_processes_that_are_started_anew_know_them(tmp_path):
    (tmp_path / 'dots.py').write_text(PLUGIN)
    (tmp_path / 'script.py').write_text(SCRIPT)
    env = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run' / 'model.safetensors').is_file()
