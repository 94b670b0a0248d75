"""What becomes a part of the package: benchmarks/ship.py on runs' folders made here."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from conftest import randomise_, write_folder
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

import timm_vitres
from timm_vitres.models.base import Hybrid
from timm_vitres.weights import checksums, shipped

ROOT = Path(__file__).parent.parent
NAME = 'test_vitresnet_mix.stripes'
DATA = dict(input_size=(1, 48, 48), mean=(0.5,), std=(0.25,), interpolation='bilinear', crop_pct=1.0)
ENTRIES = {
    name: cfg
    for family in Hybrid.families
    for architecture in family.variants
    for name, cfg in get_arch_pretrained_cfgs(architecture).items()
    if cfg.file
}


@pytest.fixture
def ship(script, monkeypatch, tmp_path):
    """Return the script, which writes into a package elsewhere."""
    ship = script('ship')
    monkeypatch.setattr(shipped, 'FOLDER', tmp_path / 'shipped')
    monkeypatch.setattr(checksums.constants, 'HF_HOME', str(tmp_path / 'home'))
    return ship


def write_run(folder, seed=0, **kwargs):
    args = {**dict(in_chans=1, num_classes=2, img_size=48), **kwargs}
    model = randomise_(timm.create_model('test_vitresnet_mix', **args), seed)
    return timm_vitres.save(model, folder, label_names=['across', 'down'], data_config=DATA)


@pytest.fixture
def call(ship, tmp_path, monkeypatch):
    """Return a function that ships a run's folder."""
    images = write_folder(tmp_path / 'images', per_class=5)

    def call(folder, name=NAME):
        command = ['ship.py', str(folder), name, '--dataset', '', '--data-dir', str(images)]
        monkeypatch.setattr('sys.argv', command)
        ship.main()
        return Path(shipped.shipped(name))

    return call


def test_a_run_is_shipped(ship, call, tmp_path, capsys):
    """As float16 but for vectors; the entry that is printed is the one that the script then finds."""
    folder = write_run(tmp_path / 'run', drop_path_rate=0.1)  # a setting of training alone makes no other model
    path = call(folder)
    out = capsys.readouterr().out
    stored, own = safetensors.torch.load_file(path), safetensors.torch.load_file(folder / 'model.safetensors')
    assert stored.keys() == own.keys() and path.stat().st_size < 0.7 * (folder / 'model.safetensors').stat().st_size
    for key, value in own.items():
        expected = value.half() if value.ndim > 1 else value
        assert torch.equal(stored[key], expected) and stored[key].dtype == expected.dtype, key
    assert shipped.read_sums() == {path.name: checksums.sha256(path)}
    assert 'stored=float16' in out and 'images=10' in out and f'sha256={checksums.sha256(path)}' in out
    printed = out.partition('needs this entry (leave out what the family shares):\n')[2]
    entries = eval(f'{{{printed}}}', {'_cfg': dict, 'shipped': shipped.shipped})
    cfg = dataclasses.replace(timm.get_pretrained_cfg('test_vitresnet_mix'), **entries[NAME])
    with safetensors.safe_open(path, 'pt') as file:
        told = file.metadata()
    assert told['name'] == NAME and json.loads(told['pretrained_cfg']) == ship.entered_facts(cfg)
    assert cfg.file == str(path) and cfg.label_names == ('across', 'down') and cfg.input_size == (1, 48, 48)
    assert cfg.mean == (0.5,) and cfg.interpolation == 'bilinear'
    assert not ship.is_entered(NAME, entries[NAME])


def test_a_run_takes_the_place_of_another(call, tmp_path):
    one, other = (call(write_run(tmp_path / f'{tag}', seed), f'{NAME}{tag}') for seed, tag in enumerate('ab'))
    before = checksums.sha256(one)
    path = call(write_run(tmp_path / 'new', seed=3), f'{NAME}a')
    assert path == one and checksums.sha256(path) != before
    assert shipped.read_sums() == {file.name: checksums.sha256(file) for file in (one, other)}
    other.unlink()  # as `git rm` does
    call(tmp_path / 'a', f'{NAME}a')
    assert shipped.read_sums() == {one.name: before}


@pytest.mark.parametrize(
    'kwargs, name, message',
    [
        (dict(layers=(1, 2, 2, 3)), NAME, r'has layers=\(1, 2, 2, 3\) for \(1, 2, 2, 2\), which .* would not be built'),
        (dict(act_layer='relu'), NAME, "has act_layer='relu' for 'silu', which"),
        (dict(img_size=96), NAME, 'its tables are not those of the 48x48 pixels of its data config'),
        (dict(), 'vitresnet_mix_nano.stripes', 'holds a test_vitresnet_mix, expected a vitresnet_mix_nano'),
    ],
)
def test_what_the_name_would_not_build_is_not_shipped(kwargs, name, message, call, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(write_run(tmp_path / 'run', **kwargs), name)
    assert not shipped.FOLDER.exists()


def test_where_float16_loses_images_it_is_not_taken(ship, call, tmp_path, monkeypatch, capsys):
    """An image that becomes wrong is enough; others that become right make up for it."""
    found = iter([ship.Comparison(10, 7, 6, 1), ship.Comparison(10, 7, 7, 0), ship.Comparison(10, 7, 7, 2)])
    monkeypatch.setattr(ship, 'compare', lambda *args: next(found))
    folder = write_run(tmp_path / 'run')
    stored, own = safetensors.torch.load_file(call(folder)), safetensors.torch.load_file(folder / 'model.safetensors')
    assert all(torch.equal(stored[key], value) and stored[key].dtype == value.dtype for key, value in own.items())
    out = capsys.readouterr().out
    assert 'float16: 6 of 10 images are right, 7 by the run; 1 answers change' in out and 'stored=float32' in out
    call(folder)
    out = capsys.readouterr().out
    assert 'stored=float16' in out and 'changed=2' in out and 'run_top1=70.0, top1=70.0' in out


def test_large_numbers_stay_as_they_are(ship):
    large, small = torch.full((2, 2), 1e5), torch.full((2, 2), 1e4)
    halved = ship.halved({'large': large, 'small': small, 'count': torch.ones(2, 2, dtype=torch.long)})
    assert torch.equal(halved['large'], large) and halved['small'].dtype == torch.float16
    assert halved['count'].dtype == torch.long


def test_answers_are_counted(ship):
    """300 numbers, in more than one batch, whose sign and whose size are asked for."""
    numbers = torch.randn(300, generator=torch.Generator().manual_seed(0))
    images = list(zip(numbers, (numbers > 0.5).long()))

    def model(threshold):
        return lambda x: torch.stack([torch.zeros(len(x)), x - threshold], 1)

    found = ship.compare(model(0.0), model(0.5), images)
    between = int(((numbers > 0) & (numbers <= 0.5)).sum())
    assert found == (300, 300 - between, 300, between) and between > 10


def test_there_is_a_limit(ship, call, tmp_path, monkeypatch):
    folder = write_run(tmp_path / 'run')
    one = call(folder)
    monkeypatch.setattr(ship, 'LIMIT', 2 * one.stat().st_size - 1)
    call(folder)  # in its own place
    with pytest.raises(ValueError, match=r'stripes2: with its \d+ bytes, all weights have more than \d+'):
        call(folder, f'{NAME}2')
    assert shipped.read_sums() == {one.name: checksums.sha256(one)}


def test_what_is_shipped(script):
    """Entries say what their files say of themselves, and rows what was measured of these very files; all are small."""
    ship = script('ship')
    assert sum(path.stat().st_size for path in shipped.FOLDER.glob('*')) <= ship.LIMIT == 6_000_000
    results = ROOT / 'benchmarks' / 'results' / 'shipped.csv'
    rows = list(csv.DictReader(results.open())) if ENTRIES else []
    for name, cfg in ENTRIES.items():
        with safetensors.safe_open(cfg.file, 'pt') as file:
            told = file.metadata()
        assert told['name'] == name and json.loads(told['pretrained_cfg']) == ship.entered_facts(cfg), name
        assert any(row['name'] == name and row['sha256'] == shipped.read_sums()[Path(cfg.file).name] for row in rows)
        model = timm.create_model(split_model_name_tag(name)[0] + '.' + cfg.tag, pretrained=True)
        assert model.num_classes == cfg.num_classes
