"""The wheel works without the source tree."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomise_

from timm_vitres.weights.files import write_safetensors

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
# every weight that the package holds, and one more, of which no entry tells
SHIPPED_CODE = """
import pathlib, sys
import timm, torch
import timm_vitres
from timm_vitres.weights import checksums, shipped
assert pathlib.Path(timm_vitres.__file__).is_relative_to(sys.argv[1]), timm_vitres.__file__
names = [name for name in timm.list_pretrained('*vitresnet*') if timm.get_pretrained_cfg(name).file]
for name in names:
    timm.create_model(name, pretrained=True)
    assert timm_vitres.verify(name).published_by
overlay = dict(file=shipped.shipped(sys.argv[2]), num_classes=2)
model = timm.create_model('test_vitresnet_mix', pretrained=True, num_classes=2, pretrained_cfg_overlay=overlay)
torch.save(model.state_dict(), sys.argv[3])
files = {path.name for path in shipped.FOLDER.glob('*.safetensors')}
assert files == set(shipped.read_sums()) >= {pathlib.Path(timm.get_pretrained_cfg(name).file).name for name in names}
"""


def build_wheel(source, folder):
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir', str(folder), str(source)]
    subprocess.run(command, check=True)
    (path,) = folder.glob('timm_vitres-*.whl')
    return path


@pytest.fixture
def wheel(tmp_path):
    return build_wheel(ROOT, tmp_path)


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
    suffixes = ('.py', '.md', '.yaml', '.typed', '.safetensors')
    files = [path for path in (ROOT / 'timm_vitres').rglob('*') if path.suffix in suffixes]
    files += (ROOT / 'timm_vitres' / 'shipped').glob('SHA256SUMS')
    assert len(files) > 30 and {str(path.relative_to(ROOT)) for path in files} <= set(names)
    assert {name.split('/')[0].split('-')[0] for name in names} == {'timm_vitres'}
    assert any(name.endswith('licenses/LICENSE') for name in names)


def test_wheel_works_outside_the_checkout(wheel, image_folder, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    run(sys.executable, tmp_path / 'site', image_folder)


@pytest.mark.slow
def test_weights_of_the_package_load_from_the_wheel_without_a_network(tmp_path):
    """The wheel of a checkout that has a weight more than ours."""
    source, name = tmp_path / 'source', 'test_vitresnet_mix.made_here'
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / 'timm_vitres', source / 'timm_vitres', ignore=ignored)
    for file in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / file, source)
    model = randomise_(timm.create_model('test_vitresnet_mix', num_classes=2))
    shipped = source / 'timm_vitres' / 'shipped'
    shipped.mkdir(exist_ok=True)
    digest = write_safetensors(model.state_dict(), shipped / f'{name}.safetensors')
    with (shipped / 'SHA256SUMS').open('a') as file:
        file.write(f'{digest}  {name}.safetensors\n')
    wheel = build_wheel(source, tmp_path)
    install = ['install', '--quiet', '--no-deps', '--target', str(tmp_path / 'site'), str(wheel)]
    subprocess.run([sys.executable, '-m', 'pip', *install], check=True)
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path / 'site'), 'HF_HUB_OFFLINE': '1'}
    environment['HF_HOME'] = str(tmp_path / 'home')
    command = [sys.executable, '-c', SHIPPED_CODE, str(tmp_path / 'site'), name, str(tmp_path / 'state.pt')]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = torch.load(tmp_path / 'state.pt')
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(wheel, image_folder, tmp_path):
    subprocess.run([sys.executable, '-m', 'venv', str(tmp_path / 'venv')], check=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    subprocess.run([str(python), '-m', 'pip', 'install', '--quiet', str(wheel)], check=True)
    run(python, None, image_folder)


def test_lowest_versions_are_the_floors():
    floors = dict(re.findall(r'"([a-z0-9_]+)>=([0-9.]+)"', (ROOT / 'pyproject.toml').read_text()))
    lowest = dict(re.findall(r'^([a-z0-9_]+)==([0-9.]+)$', (ROOT / 'tests' / 'lowest.txt').read_text(), re.MULTILINE))

    def number(version):
        return [int(part) for part in [*version.split('.'), '0', '0']][:3]

    assert len(lowest) >= 11
    for name in lowest:
        assert number(floors[name]) == number(lowest[name]), name
