"""Weights of the package load without a network, by their name; one that is damaged or missing is an error."""

import dataclasses
import math
import pickle
import re
import shutil
import socket
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import draw, flip, randomise_, relative_difference, write_folder
from timm.models import _registry as registry

import timm_vitres
from timm_vitres import cli
from timm_vitres.models.base import Hybrid
from timm_vitres.weights import checksums, shipped, sources
from timm_vitres.weights.files import write_safetensors

ENTRIES = {
    name: cfg
    for family in Hybrid.families
    for architecture in family.variants
    for name, cfg in timm.models.get_arch_pretrained_cfgs(architecture).items()
    if cfg.file
}
MADE = 'test_vitresnet_mix.made_here'  # with one channel and two classes, so that no test is without a weight


def make(folder, monkeypatch):
    """Write a weight into a folder, and return what its entry in `default_cfgs` would be."""
    folder.mkdir(parents=True)
    model = randomise_(timm.create_model('test_vitresnet_mix', in_chans=1, num_classes=2, img_size=48))
    tensors = {name: value.half() if value.ndim > 1 else value for name, value in model.state_dict().items()}
    digest = write_safetensors(tensors, folder / f'{MADE}.safetensors')
    (folder / shipped.SUMS_NAME).write_text(f'{digest}  {MADE}.safetensors\n')
    tags = [*registry._model_with_tags['test_vitresnet_mix'], MADE]
    monkeypatch.setitem(registry._model_with_tags, 'test_vitresnet_mix', tags)
    monkeypatch.setattr(registry, '_model_has_pretrained', {*registry._model_has_pretrained, MADE})
    told = dict(tag='made_here', input_size=(1, 48, 48), num_classes=2, label_names=('across', 'down'), mean=(0.5,))
    return dataclasses.replace(timm.get_pretrained_cfg('test_vitresnet_mix'), **told, std=(0.25,))


@pytest.fixture(params=[*ENTRIES, MADE])
def weight(request, tmp_path, monkeypatch):
    """Return the name and the file of a weight: copies of those of the package, which may be damaged, and one more."""
    folder = tmp_path / 'site' / 'timm_vitres' / 'shipped'
    if request.param == MADE:
        cfg = make(folder, monkeypatch)
    else:
        cfg = ENTRIES[request.param]
        shutil.copytree(shipped.FOLDER, folder)
    monkeypatch.setattr(shipped, 'FOLDER', folder)
    monkeypatch.setattr(checksums.constants, 'HF_HOME', str(tmp_path / 'home'))
    path = Path(shipped.shipped(request.param))
    monkeypatch.setitem(registry._model_pretrained_cfgs, request.param, dataclasses.replace(cfg, file=str(path)))
    return request.param, path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('The network was asked.')

    monkeypatch.setattr(socket, 'socket', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


def images(model, size=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, *model.pretrained_cfg['input_size'], generator=generator)


@torch.inference_mode()
def outputs(model, x):
    return model(x)


def test_what_the_package_holds():
    """Every file has a checksum and an entry in `default_cfgs`, and no entry is without them."""
    files = {path.name for path in shipped.FOLDER.glob('*.safetensors')}
    assert files == set(shipped.read_sums()) == {Path(cfg.file).name for cfg in ENTRIES.values()}
    assert files == {f'{name}.safetensors' for name in ENTRIES}
    for name, cfg in ENTRIES.items():
        path = Path(shipped.shipped(name))
        assert str(path) == cfg.file and checksums.sha256(path) == shipped.shipped_sha256(path), name
        assert not cfg.hf_hub_id and not cfg.url, f'{name}: a weight of the package needs no other source.'


def test_a_model_by_name(weight, no_network):
    name, path = weight
    assert name in timm.list_pretrained() and name in timm.list_models(pretrained=True, include_tags=True)
    cfg, stored = timm.get_pretrained_cfg(name), safetensors.torch.load_file(path)
    for mmap in (None, True, False):
        model = timm.create_model(name, pretrained=True, mmap=mmap)
        assert model.pretrained_cfg['label_names'] == cfg.label_names and model.num_classes == cfg.num_classes
        state = model.state_dict()
        assert state.keys() == stored.keys()
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
        for key, value in stored.items():
            assert torch.equal(state[key], value.to(state[key].dtype)), key
    assert outputs(model.eval(), images(model)).shape == (2, cfg.num_classes)
    half = timm.create_model(name, pretrained=True, dtype=torch.float16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


# what each answered when it was shipped, to images of a sine; a new file is a new weight, and has new numbers here
ANSWERS = {
    'vitresnet_mix_nano.fmnist': [
        [24.7349, 23.0948, 24.278, 23.1241, 23.3051, 23.686, 23.2873, 23.6031, 28.0543, 23.6569],
        [24.3701, 22.7702, 24.0403, 22.8856, 23.0191, 23.3154, 22.9231, 23.2421, 27.7755, 23.2926],
    ],
    'vitresnet_nano.openclipart': [
        [-1.2522, 0.584, -0.572, 1.482, 0.182, -0.8495, -0.5022, 0.1081, 0.912, 0.9426, -0.5173, -1.0612],
        [-1.2946, 0.5063, -0.6166, 1.4429, 0.2415, -0.6856, -0.4164, 0.1948, 0.7275, 1.0181, -0.5266, -1.019],
    ],
}


@pytest.mark.parametrize('name', ENTRIES)
def test_it_answers_as_when_it_was_shipped(name):
    """Weights may fit a variant whose heads, activations or norms have become others."""
    model = timm.create_model(name, pretrained=True).eval()
    size = model.pretrained_cfg['input_size']
    x = torch.sin(torch.arange(2 * math.prod(size), dtype=torch.float64) * 0.37).float().view(2, *size)
    torch.testing.assert_close(outputs(model, x), torch.tensor(ANSWERS[name]), rtol=1e-3, atol=1e-3)


def test_a_name_whose_default_has_no_weights(weight, monkeypatch):
    name, _ = weight
    architecture = name.partition('.')[0]
    cfg = dataclasses.replace(timm.get_pretrained_cfg(architecture), file=None, hf_hub_id=None, url=None)
    monkeypatch.setitem(registry._model_pretrained_cfgs, architecture, cfg)
    with pytest.raises(RuntimeError, match=rf'exist for {architecture}; there are some for .*{re.escape(name)}'):
        timm.create_model(architecture, pretrained=True)


def test_a_model_for_another_task(weight, no_network):
    """Grey images as three equal channels, other classes, other sizes, features."""
    name, _ = weight
    model = timm.create_model(name, pretrained=True).eval()
    x = images(model)
    expected = outputs(model, x)
    other = timm.create_model(name, pretrained=True, num_classes=7).eval()
    assert torch.equal(model.forward_features(x), other.forward_features(x)) and other(x).shape == (2, 7)
    assert 'label_names' not in other.pretrained_cfg
    if x.shape[1] == 1:
        colour = timm.create_model(name, pretrained=True, in_chans=3).eval().double()
        exact = outputs(timm.create_model(name, pretrained=True).eval().double(), x.double())
        assert relative_difference(outputs(colour, x.double().expand(-1, 3, -1, -1)), exact) < 1e-5
    larger = timm.create_model(name, pretrained=True, img_size=64).eval()
    assert relative_difference(outputs(larger, x), expected) < 0.2  # tables are resampled there and back
    pyramid = timm.create_model(name, pretrained=True, features_only=True).eval()
    maps = model.forward_intermediates(x, indices=list(range(model.num_pyramid)), intermediates_only=True)
    assert len(maps) == model.num_pyramid and all(
        torch.equal(one, two) for one, two in zip(pyramid(x), maps, strict=True)
    )


def test_a_saved_model_tells_no_path(weight, tmp_path):
    name, path = weight
    model = timm.create_model(name, pretrained=True).eval()
    x = images(model)
    expected = outputs(model, x)
    folder = timm_vitres.save(model, tmp_path / 'saved')
    assert cli.main(['push', str(folder), 'me/name']) == 0
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(outputs(again, x), expected)
    assert again.pretrained_cfg['label_names'] == list(model.pretrained_cfg['label_names'])
    tells_no_path(folder, path)
    copy = pickle.loads(pickle.dumps(model))
    path.unlink()
    assert torch.equal(outputs(copy, x), expected)


def tells_no_path(folder, path):
    files = [file for file in folder.rglob('*') if file.is_file()]
    assert len(files) > 1
    for file in files:
        assert str(path.parent).encode() not in file.read_bytes(), file.name


def flip_a_bit(path):
    flip(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b'')


def remove(path):
    path.unlink()


def remove_sums(path):
    (path.parent / shipped.SUMS_NAME).unlink()


def forget_sum(path):
    sums = path.parent / shipped.SUMS_NAME
    sums.write_text(''.join(line for line in sums.read_text().splitlines(True) if path.name not in line))


@pytest.mark.parametrize('damage', [flip_a_bit, truncate, empty, remove, remove_sums, forget_sum])
def test_a_broken_installation(damage, weight, capsys):
    """Whether the weight was loaded before or not."""
    name, path = weight
    timm.create_model(name, pretrained=True)
    damage(path)
    what = 'is damaged' if damage in (flip_a_bit, truncate, empty) else 'is missing, and with it a part of timm-vitres'
    sentence = rf'{re.escape(path.name)}.* {what}.*\. Install it again: pip install --force-reinstall .*timm-vitres\.$'
    for call in (lambda: timm.create_model(name, pretrained=True), lambda: timm_vitres.verify(name)):
        with pytest.raises(OSError, match=sentence):
            call()
    assert cli.main(['verify', name]) == 1
    assert what in capsys.readouterr().err
    timm.create_model(name)  # without its weights


def test_a_weight_is_verified(weight, no_network, capsys):
    name, path = weight
    assert timm_vitres.verify(name).file == path
    assert cli.main(['verify', name, str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count(f'sha256 {checksums.sha256(path)}') == 2
    assert out.count('is what was published, says the package that it is shipped in.') == 2


def test_another_source_takes_its_place(weight, tmp_path, monkeypatch):
    """timm would take the file of the entry, and leave out the repository that was asked for."""
    name, path = weight
    asked = []
    monkeypatch.setattr(sources, 'hub_weights', lambda *args: asked.append(args) or path)
    monkeypatch.setattr(sources, 'url_file', lambda *args: asked.append(args) or path)
    for other, expected in (
        (dict(hf_hub_id='me/name'), ('me/name', None, None, None)),
        (dict(url='https://x/y.pth'), ('https://x/y.pth', None)),
    ):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=other)
        assert asked.pop() == expected and not asked
    mine = randomise_(timm.create_model(name), seed=5)
    torch.save(mine.state_dict(), tmp_path / 'mine.pth')
    state_dict, file = dict(state_dict=mine.state_dict()), dict(file=str(tmp_path / 'mine.pth'))
    for other in (state_dict, file):
        loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=other).eval()
        assert torch.equal(outputs(loaded, images(mine)), outputs(mine, images(mine)))


def test_commands_by_name(weight, tmp_path, no_pictures, capsys):
    """A run that starts from the weight, a prediction, pictures and a file of it; none tells a path of the package."""
    name, path = weight
    model = timm.create_model(name, pretrained=True)
    data, picture = write_folder(tmp_path / 'images', per_class=4, size=32), draw(tmp_path / 'a.png')
    run, file = tmp_path / 'run', tmp_path / 'exported' / 'model.pt'
    options = ['--epochs', '1', '-b', '4', '-j', '0', '--lr', '1e-8', '--min-lr', '0', '--warmup-lr', '0']
    assert cli.main(['finetune', str(data), '--model', name, '--pretrained', *options, '--output', str(run)]) == 0
    body = [key for key, _ in model.named_parameters() if not key.startswith(model.heads)]
    trained = timm.create_model(f'local-dir:{run}', pretrained=True)
    for key in body:
        assert relative_difference(trained.get_parameter(key), model.get_parameter(key)) < 1e-4, key
    capsys.readouterr()
    assert cli.main(['predict', str(picture), '--model', name]) == 0
    out = capsys.readouterr().out
    assert any(label in out for label in model.pretrained_cfg['label_names'])
    assert cli.main(['explain', str(picture), '--model', name, '--output', str(tmp_path / 'exported' / 'a.png')]) == 0
    assert cli.main(['export', name, '--output', str(file)]) == 0
    for folder in (run, tmp_path / 'exported'):
        tells_no_path(folder, path)


@pytest.mark.parametrize(
    'path, ours',
    [
        ('a.safetensors', True),
        ('SHA256SUMS', False),
        ('a.pth', False),
        ('deeper/a.safetensors', False),
        ('../a.safetensors', False),
    ],
)
def test_what_lies_in_the_package(path, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, 'FOLDER', tmp_path)
    monkeypatch.chdir(tmp_path)
    assert shipped.is_shipped(tmp_path / path) == shipped.is_shipped(Path(path)) == ours


def test_sums_are_those_of_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, 'FOLDER', tmp_path)
    assert shipped.read_sums() == {}
    lines = [f'{"a" * 64}  one.safetensors', f'{"b" * 63}  short.safetensors', '', f'{"c" * 64}  two.safetensors']
    (tmp_path / 'SHA256SUMS').write_text('\n'.join(lines) + '\n')
    assert shipped.read_sums() == {'one.safetensors': 'a' * 64, 'two.safetensors': 'c' * 64}
