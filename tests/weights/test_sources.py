"""Weights are found in a file, a folder, a repository of the Hub, or at an address."""

import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from conftest import flip, randomise_, relative_difference
from layouts import write_shards

import timm_vitres
from timm_vitres.weights import checksums, sources
from timm_vitres.writing import TEMPORARY


@pytest.mark.parametrize(
    'overlay, error, message',
    [
        (dict(file='none.pth'), FileNotFoundError, 'none.pth: there is no such file or folder'),
        (dict(file=5), ValueError, 'file: got 5 in the pretrained_cfg, expected a path'),
        (dict(source='local-dir'), ValueError, 'file: got None in the pretrained_cfg, expected a path'),
        (dict(hf_hub_id='a/b/c'), ValueError, "hf_hub_id: got 'a/b/c', expected 'owner/name'"),
        (dict(hf_hub_id='a b'), ValueError, "hf_hub_id: got 'a b', expected 'owner/name'"),
        (dict(hf_hub_id=['a']), ValueError, r"hf_hub_id: got \['a'\], expected 'owner/name'"),
        (dict(url='weights.pth'), ValueError, "url: got 'weights.pth' in the pretrained_cfg, expected one like http"),
        (dict(url=3), ValueError, 'url: got 3 in the pretrained_cfg'),
        (dict(state_dict={'a': 1}), ValueError, "state_dict: 'a' has int, expected names with tensors"),
    ],
)
def test_a_source_that_is_none(overlay, error, message):
    with pytest.raises(error, match=message):
        timm.create_model('test_vitresnet', pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / 'model.safetensors').mkdir()
    with pytest.raises((OSError, ValueError), match=r'model\.safetensors is a folder|holds no weights'):
        timm.create_model('test_vitresnet', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path)))


def test_which_weights_a_folder_has(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no such file or folder'):
        sources.weights_file(tmp_path / 'none')
    with pytest.raises(FileNotFoundError, match='holds no weights'):
        sources.weights_file(tmp_path)
    (tmp_path / 'one.pth').touch()
    assert sources.weights_file(tmp_path) == tmp_path / 'one.pth'
    (tmp_path / 'two.pth').touch()
    with pytest.raises(ValueError, match=r'holds one\.pth, two\.pth; name the one'):
        sources.weights_file(tmp_path)
    (tmp_path / 'pytorch_model.bin').touch()
    assert sources.weights_file(tmp_path).name == 'pytorch_model.bin'


def test_no_weights_is_an_error():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for test_vitresnet'):
        timm.create_model('test_vitresnet', pretrained=True)


def test_shards_of_the_hub(tmp_path, monkeypatch):
    """In the Hub's cache, as a download leaves it, with no network; each shard is checked against its checksum."""
    monkeypatch.setattr(checksums.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(checksums.constants, 'HF_HOME', str(tmp_path / 'home'))
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3))
    revision = '0123456789abcdef0123456789abcdef01234567'
    repo = tmp_path / 'models--me--large'
    snapshot = repo / 'snapshots' / revision
    for folder in (repo / 'refs', repo / 'blobs', snapshot):
        folder.mkdir(parents=True)
    (repo / 'refs' / 'main').write_text(revision)
    index = write_shards(model, snapshot)
    for shard in sorted(snapshot.glob('*.safetensors')):
        blob = shard.rename(repo / 'blobs' / checksums.sha256(shard))
        shard.symlink_to(blob)
    options = dict(pretrained=True, num_classes=3, cache_dir=tmp_path)
    overlay = dict(hf_hub_id='me/large', num_classes=3)
    loaded = timm.create_model('test_vitresnet', pretrained_cfg_overlay=overlay, **options)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert sources.hub_weights('me/large@main', cache_dir=tmp_path) == index
    flip(blob)
    with pytest.raises(OSError, match='is damaged, or was changed'):
        timm.create_model('test_vitresnet', pretrained_cfg_overlay=overlay, **options)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r'me/large@.*model-00003-of-00003\.safetensors is not in the cache'):
        timm.create_model('test_vitresnet', pretrained_cfg_overlay=overlay, **options)


def test_timms_checkpoints_load_from_the_hubs_id(tmp_path):
    """The Hub's cache as a download leaves it, and a fresh process that may not ask the network."""
    reference = randomise_(timm.create_model('vit_tiny_r_s16_p8_224'))
    revision = '0123456789abcdef0123456789abcdef01234567'
    repo = tmp_path / 'models--timm--vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k'
    (repo / 'refs').mkdir(parents=True)
    (repo / 'refs' / 'main').write_text(revision)
    (repo / 'snapshots' / revision).mkdir(parents=True)
    safetensors.torch.save_file(reference.state_dict(), repo / 'snapshots' / revision / 'model.safetensors')
    code = (
        'import sys, timm, torch, timm_vitres\n'
        "model = timm.create_model('vitresnet_tiny.augreg_in21k_ft_in1k', pretrained=True, cache_dir=sys.argv[1])\n"
        'torch.save(model.eval()(torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)).detach(), sys.argv[2])\n'
    )
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1'}
    command = [sys.executable, '-c', code, str(tmp_path), str(tmp_path / 'logits.pt')]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with torch.inference_mode():
        expected = reference(torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224))
    assert relative_difference(torch.load(tmp_path / 'logits.pt'), expected) < 1e-6


def find(**cfg):
    return sources.find_weights(timm.models.PretrainedCfg(architecture='x', **cfg))


def test_the_order_of_sources_is_timms(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, 'hub_weights', lambda *args: asked.append(args) or tmp_path / 'hub')
    monkeypatch.setattr(sources, 'url_file', lambda *args: asked.append(args) or tmp_path / 'url')
    file = tmp_path / 'file.pth'
    file.touch()
    everything = dict(file=str(file), hf_hub_id='me/name', url='https://x/y.pth')
    assert find(**everything) == file and not asked
    assert find(**everything, source='hf-hub') == tmp_path / 'hub'
    assert find(hf_hub_id='me/name', hf_hub_filename='b.bin', url='https://x/y.pth') == tmp_path / 'hub'
    assert find(url='https://x/y.pth') == tmp_path / 'url'
    assert asked == [('me/name', None, None, None), ('me/name', ['b.bin'], None, None), ('https://x/y.pth', None)]
    with pytest.raises(RuntimeError, match=r'^No pretrained weights exist for x'):
        find()


def test_safetensors_go_before_pickles_and_usual_names_before_others(tmp_path):
    index = write_shards(timm.create_model('test_vitresnet', num_classes=2), tmp_path)
    assert sources.local_weights(tmp_path) == index
    for name in ('mine.pth', 'model.pth', 'pytorch_model.pth', 'pytorch_model.bin'):  # may be left of an older model
        (tmp_path / name).touch()
        assert sources.local_weights(tmp_path) == index
    (tmp_path / 'model.safetensors').touch()
    assert sources.local_weights(tmp_path) == sources.weights_file(tmp_path) == tmp_path / 'model.safetensors'
    (tmp_path / 'model.safetensors').unlink()
    index.rename(tmp_path / 'pytorch_model.bin.index.json')
    for name in ('pytorch_model.bin', 'pytorch_model.pth', 'model.pth'):
        assert sources.local_weights(tmp_path) == sources.weights_file(tmp_path) == tmp_path / name
        (tmp_path / name).unlink()
    assert sources.local_weights(tmp_path) == tmp_path / 'pytorch_model.bin.index.json'
    assert sources.local_weights(tmp_path / 'mine.pth') == tmp_path / 'mine.pth'


def test_hidden_files_are_no_weights(tmp_path):
    (tmp_path / '.hidden.pth').touch()
    (tmp_path / 'notes.txt').touch()
    (tmp_path / 'folder.pt').mkdir()
    with pytest.raises(FileNotFoundError, match=r'holds no weights \(model\.safetensors, pytorch_model\.bin'):
        sources.weights_file(tmp_path)


def test_weights_that_a_killed_writer_left_are_found_where_they_are(model, tmp_path):
    """The new config.json is in place and tells their sha256; weights with another sha256 are left alone."""
    folder = timm_vitres.save(model, tmp_path / 'model')
    assert sources.pending_weights(folder) is None
    digest = checksums.sha256(folder / 'model.safetensors')
    for name in (digest, '0' * 64):
        (folder / f'{TEMPORARY}{name}').mkdir()
    pending = folder / f'{TEMPORARY}{digest}' / 'model.safetensors'
    (folder / 'model.safetensors').rename(pending)
    (folder / f'{TEMPORARY}{"0" * 64}' / 'model.safetensors').write_text('other')
    (folder / 'model.safetensors').write_text('old')
    (folder / 'model.safetensors.index.json').write_text('old')
    assert sources.pending_weights(folder) == pending
    assert sources.weights_file(folder) == sources.local_weights(folder) == pending
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize('model_id', ['', 'a/b/c', 'a b', 'me/name.git', 5, None])
def test_what_is_no_repository_is_named(model_id):
    with pytest.raises(ValueError, match=rf"^hf_hub_id: got {model_id!r}, expected 'owner/name' or 'owner/name@rev"):
        sources.hub_weights(model_id)
