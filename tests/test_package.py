"""The wheel works without the source tree."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).parent.parent
CODE = """
import json, pathlib, sys
import timm, torch
import timm_vitres
from timm_vitres import cli
assert pathlib.Path(timm_vitres.__file__).is_relative_to(sys.argv[1]), timm_vitres.__file__
assert timm.list_models('*vitresnet*') == json.loads(sys.argv[2])
assert cli.main(['finetune', 'images', '--model', 'test_vitresnet', '--img-size', '32', '--epochs', '2', '-b', '8',
                 '-j', '0', '--output', 'run']) == 0
model = timm.create_model('local-dir:run', pretrained=True).eval()
assert model(timm_vitres.preprocess('images/down/0.png', model)).shape == (1, 2)
assert cli.main(['predict', 'images/down/0.png', '--model', 'local-dir:run']) == 0
"""


@pytest.fixture
def wheel(tmp_path):
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir', str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (path,) = tmp_path.glob('timm_vitres-*.whl')
    return path


def run(python, site, image_folder):
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    if site:
        environment['PYTHONPATH'] = str(site)
    where = str(site or Path(python).parent.parent)
    result = subprocess.run(
        [str(python), '-c', CODE, where, json.dumps(timm.list_models('*vitresnet*'))],
        env=environment,
        cwd=image_folder.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    files = [path for path in (ROOT / 'timm_vitres').rglob('*') if path.suffix in ('.py', '.md', '.yaml', '.typed')]
    assert len(files) > 30 and {str(path.relative_to(ROOT)) for path in files} <= set(names)
    assert {name.split('/')[0].split('-')[0] for name in names} == {'timm_vitres'}
    assert any(name.endswith('licenses/LICENSE') for name in names)


def test_wheel_works_outside_the_checkout(wheel, image_folder, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    run(sys.executable, tmp_path / 'site', image_folder)


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(wheel, image_folder, tmp_path):
    subprocess.run([sys.executable, '-m', 'venv', str(tmp_path / 'venv')], check=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    subprocess.run([str(python), '-m', 'pip', 'install', '--quiet', str(wheel)], check=True)
    run(python, None, image_folder)


def test_lowest_versions_are_the_floors():
    floors = dict(re.findall(r'"([a-z_]+)>=([0-9.]+)"', (ROOT / 'pyproject.toml').read_text()))
    lowest = dict(re.findall(r'^([a-z_]+)==([0-9.]+)$', (ROOT / 'tests' / 'lowest.txt').read_text(), re.MULTILINE))

    def number(version):
        return [int(part) for part in [*version.split('.'), '0', '0']][:3]

    assert len(lowest) >= 11
    for name in lowest:
        assert number(floors[name]) == number(lowest[name]), name
