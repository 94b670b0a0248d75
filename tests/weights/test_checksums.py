"""Files are compared with their published sha256: once, and again after every change."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import flip, randomise_

import timm_vitres
from timm_vitres.weights import checksums
from timm_vitres.writing import TEMPORARY


class TestCheckedFiles:
    """Files whose sha256 is known; `home` keeps the memory of what was checked."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checksums.constants, 'HF_HOME', str(tmp_path / 'home'))

    def cached(self, tmp_path):
        """Return the snapshot's path of a model in a cache as the Hub's client leaves it."""
        folder = timm_vitres.save(randomise_(timm.create_model('test_vitresnet', num_classes=3)), tmp_path / 'saved')
        blobs = tmp_path / 'cache' / 'blobs'
        blobs.mkdir(parents=True)
        snapshot = tmp_path / 'cache' / 'snapshots' / '0'
        snapshot.mkdir(parents=True)
        blob = blobs / checksums.sha256(folder / 'model.safetensors')
        (folder / 'model.safetensors').rename(blob)
        (folder / 'config.json').rename(snapshot / 'config.json')
        (snapshot / 'model.safetensors').symlink_to(blob)
        return snapshot / 'model.safetensors'

    def test_a_file_is_checked_once(self, tmp_path, monkeypatch):
        path = self.cached(tmp_path)
        hashed = []
        original = checksums.sha256
        monkeypatch.setattr(checksums, 'sha256', lambda file: hashed.append(file) or original(file))
        for _ in range(3):
            timm.create_model(f'local-dir:{path.parent}', pretrained=True)
        assert len(hashed) == 1
        os.utime(path, ns=(1, 1))
        timm.create_model(f'local-dir:{path.parent}', pretrained=True)
        assert len(hashed) == 2
        (tmp_path / 'home' / 'timm-vitres' / 'checked.json').write_text('no JSON')
        timm.create_model(f'local-dir:{path.parent}', pretrained=True)
        assert len(hashed) == 3

    @pytest.mark.parametrize('first', [True, False])
    def test_a_flipped_bit_is_refused(self, first, tmp_path):
        path = self.cached(tmp_path)
        if not first:
            timm.create_model(f'local-dir:{path.parent}', pretrained=True)
        flip(path.resolve())
        with pytest.raises(OSError, match='is damaged, or was changed after it was published'):
            timm.create_model(f'local-dir:{path.parent}', pretrained=True)

    def test_the_memory_survives_processes(self, tmp_path):
        path = self.cached(tmp_path)
        code = 'import sys, timm, timm_vitres\ntimm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True)'
        environment = {**os.environ, 'HF_HOME': str(tmp_path / 'home')}
        subprocess.run([sys.executable, '-c', code, str(path.parent)], env=environment, check=True, cwd=tmp_path)
        memory = json.loads((tmp_path / 'home' / 'timm-vitres' / 'checked.json').read_text())
        assert list(memory) == [str(path.resolve())]
        checksums.check_once(path)  # remembered: what follows is not looked at
        stat = path.stat()
        flip(path.resolve())
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        checksums.check_once(path)
        with pytest.raises(OSError, match='is damaged'):
            checksums.check(path)


def test_names_are_no_hashes(tmp_path):
    """timm's train.py writes checkpoint-12.pth.tar, users write dates and commits into names."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3))
    for name in ('checkpoint-12.pth.tar', 'model-20261124.pth', 'model-3f2a9b1c.pth'):
        torch.save(dict(state_dict=model.state_dict()), tmp_path / name)
        overlay = dict(file=str(tmp_path / name), num_classes=3)
        loaded = timm.create_model('test_vitresnet', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
        assert torch.equal(loaded.head.weight, model.head.weight)
    overlay = dict(url=f'file://{tmp_path}/model-20261124.pth', num_classes=3)
    options = dict(pretrained=True, num_classes=3, cache_dir=tmp_path / 'cache', pretrained_cfg_overlay=overlay)
    timm.create_model('test_vitresnet', **options)


ONE, OTHER = '1' * 64, 'ab' * 32


# `git hash-object` gave these names to the files
GIT_NAMES = {
    0: 'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391',
    5: '40b450dd9d8187f90cf9f13a80c3ded26f8ecfd7',
    1 << 20: 'ea8e482b990b87c0f69d29fd1dd6a41d0f1a514b',
    (3 << 20) + 1: 'f4f39eed7f71f4c4c9c3a5acc01c47db66a5d351',
}


@pytest.mark.parametrize('size', GIT_NAMES)
def test_digests_are_those_of_hashlib_and_git(size, tmp_path):
    """Some sizes are multiples of the chunk that is read at once, and some are not."""
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    path = tmp_path / 'file'
    path.write_bytes(data)
    assert checksums.sha256(path) == hashlib.sha256(data).hexdigest()
    assert checksums.git_sha1(path) == GIT_NAMES[size]


@pytest.mark.parametrize(
    'name, digest',
    [
        ('resnet18-5c106cde.pth', '5c106cde'),
        (f'weights-{OTHER}.safetensors', OTHER),
        ('a-5c106cde-0a1b2c3d.pth', '0a1b2c3d'),
        ('conformer_20211206-f6860372.pth', 'f6860372'),
        ('model-2024-5c106cde.pth', '5c106cde'),
        ('ckpt-1b4e28ba-2fa1-11d2-883f-0016d3cca427.pth', None),  # a UUID
        ('model-20261124.pth', None),  # these digits are a date
        ('checkpoint-12.pth.tar', None),
        ('model-abcdef1.pth', None),  # seven digits are too few
        (f'model-{OTHER}a.pth', None),  # 65 digits are too many
        ('model-5C106CDE.pth', None),
        ('model-5c106cde', None),
        ('5c106cde.pth', None),
    ],
)
def test_a_hash_in_a_name_is_told_from_a_date(name, digest):
    assert checksums.hash_in_name(name) == digest


def tell(folder, config=None, card=None):
    """Write a folder's config.json and card."""
    for name, text in (('config.json', config), ('README.md', card)):
        if text is not None:
            (folder / name).write_text(text)


HEAD = f'---\nlicense: mit\nmodel_sha256: {OTHER}\n---\n# Mine\n'


@pytest.mark.parametrize(
    'config, card, told',
    [
        (f'{{"model_sha256": "{ONE}"}}', None, ONE),
        (f'{{"model_sha256": "{ONE}"}}', HEAD, ONE),
        ('{"architecture": "x"}', HEAD, None),  # another program replaced the model, and left the card
        ('{', HEAD, OTHER),
        ('[1]', HEAD, OTHER),
        (None, HEAD, OTHER),
        (None, HEAD.replace(OTHER, f'"{OTHER}"'), OTHER),
        (None, HEAD.replace(OTHER, f"'{OTHER}'  # theirs"), OTHER),
        (None, f'---\nlicense: mit\n---\nmodel_sha256: {OTHER}\n', None),  # the line is not in the head
        (None, f'---\nother_model_sha256: {OTHER}\n---\n', None),
        (None, f'---\nmodel_sha256: {OTHER[:-1]}\n---\n', None),
        (None, f'---\nmodel_sha256: {OTHER}a\n---\n', None),
        ('{}', None, None),
        (None, None, None),
    ],
)
def test_config_json_tells_the_sha256_and_else_the_card(config, card, told, tmp_path):
    tell(tmp_path, config, card)
    assert checksums.told_sha256(tmp_path) == told


@pytest.mark.parametrize('told', ['5', '"ab"', 'null', f'"{"A" * 64}"', f'"{ONE}\\n"', '["' + ONE + '"]'])
def test_a_sha256_that_is_none_is_damage(told, tmp_path):
    tell(tmp_path, f'{{"model_sha256": {told}}}', HEAD)
    with pytest.raises(OSError, match=r'config\.json is damaged: its model_sha256 is .*, no sha256'):
        checksums.told_sha256(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'config.json')
    assert checksums.told_sha256(tmp_path) is None


def test_what_was_read_before_must_still_be_told(tmp_path):
    tell(tmp_path, f'{{"model_sha256": "{ONE}"}}')
    note = f'model_sha256: {OTHER}'
    for notes in (None, [], ['by hand'], [f'model_sha256: {ONE}'], [note, f'model_sha256: {ONE}']):
        checksums.check_noted(notes, tmp_path)
    for notes in ([note], ['by hand', note], [f'model_sha256: {ONE}', note]):
        with pytest.raises(OSError, match='its model was replaced while it was being read; load it again'):
            checksums.check_noted(notes, tmp_path)
    tell(tmp_path, '{}')
    checksums.check_noted([note], tmp_path)


def test_what_stands_beside_a_file_says_what_it_must_be(tmp_path):
    """The sha256 is told by the name of a blob in the Hub's cache, by that of a writer's folder, or by config.json."""
    tell(tmp_path, f'{{"model_sha256": "{ONE}"}}')
    assert checksums.published_sha256(tmp_path / 'model.safetensors') == ONE
    assert checksums.published_sha256(tmp_path / 'other.safetensors') is None
    ready = tmp_path / f'{TEMPORARY}{OTHER}'
    ready.mkdir()
    assert checksums.published_sha256(ready / 'model.safetensors') == OTHER
    (tmp_path / 'blobs').mkdir()
    (tmp_path / 'blobs' / OTHER).touch()
    (tmp_path / 'blobs' / ('2' * 40)).touch()  # git gives small files such names
    for name, blob, published in (('a.bin', OTHER, OTHER), ('b.bin', '2' * 40, None)):
        (tmp_path / name).symlink_to(tmp_path / 'blobs' / blob)
        assert checksums.published_sha256(tmp_path / name) == published
    # where repositories share a store, a blob is a link into it
    (tmp_path / 'blobs' / OTHER).unlink()
    (tmp_path / 'blobs' / 'ab').mkdir()
    (tmp_path / 'blobs' / 'ab' / ONE).touch()
    (tmp_path / 'blobs' / OTHER).symlink_to(Path('ab') / ONE)
    assert checksums.published_sha256(tmp_path / 'a.bin') == OTHER
    with pytest.raises(OSError, match=rf'ab/{ONE} is damaged, .*not {OTHER}. Remove it and load again'):
        checksums.check(tmp_path / 'a.bin')
    # from a folder that is a link, '..' leads out of what it is a link to
    (tmp_path / 'store' / 'links').mkdir(parents=True)
    (tmp_path / 'store' / 'links' / 'c.bin').symlink_to(Path('..') / '..' / 'blobs' / OTHER)
    (tmp_path / 'elsewhere' / 'deep').mkdir(parents=True)
    (tmp_path / 'elsewhere' / 'deep' / 'my').symlink_to(tmp_path / 'store' / 'links')
    assert checksums.published_sha256(tmp_path / 'elsewhere' / 'deep' / 'my' / 'c.bin') == OTHER


@pytest.mark.parametrize(
    'name, config, remedy',
    [
        ('weights.pth', None, r'Remove it and load again\.$'),
        ('model.safetensors', '{}', r'Restore it, or, .* take model_sha256 out of config\.json beside it\.$'),
        ('model.safetensors', None, r'Restore it, or, .* take model_sha256 out of README\.md beside it\.$'),
    ],
)
def test_a_file_that_is_another_is_named_with_a_remedy(name, config, remedy, tmp_path):
    path = tmp_path / name
    path.write_bytes(b'weights')
    digest = hashlib.sha256(b'weights').hexdigest()
    tell(tmp_path, config=config, card='# Mine\n')
    assert checksums.check(path) == checksums.check(path, digest) == checksums.check(path, digest[:8]) == digest
    with pytest.raises(OSError, match=rf'{name} is damaged, .*: its sha256 is {digest}, not {ONE}\. {remedy}'):
        checksums.check(path, ONE)


def test_a_repository_of_which_weights_alone_were_replaced_is_named(tmp_path):
    """Its config.json tells of other weights, and of the order of other classes."""
    content = b'weights'
    digest = hashlib.sha256(content).hexdigest()
    snapshot = tmp_path / 'models--me--x' / 'snapshots' / ('a' * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / 'models--me--x' / 'blobs').mkdir()
    (tmp_path / 'models--me--x' / 'blobs' / digest).write_bytes(content)
    (snapshot / 'model.safetensors').symlink_to(f'../../blobs/{digest}')
    for told, is_good in (({}, True), ({'model_sha256': digest}, True), ({'model_sha256': '0' * 64}, False)):
        (snapshot / 'config.json').write_text(json.dumps(told))
        if is_good:
            assert checksums.published_sha256(snapshot / 'model.safetensors') == digest
            continue
        with pytest.raises(OSError, match=r'is not what config\.json beside it tells of'):
            checksums.published_sha256(snapshot / 'model.safetensors')


def test_a_damaged_blob_is_named_rather_than_the_link_to_it(tmp_path):
    (tmp_path / 'blobs').mkdir()
    (tmp_path / 'blobs' / ONE).write_bytes(b'weights')
    (tmp_path / 'model.safetensors').symlink_to(tmp_path / 'blobs' / ONE)
    with pytest.raises(OSError, match=rf'blobs/{ONE} is damaged, .*Remove it and load again'):
        checksums.check(tmp_path / 'model.safetensors')


class TestMemory:
    """Checked files are remembered in a file in the home of the Hub's client."""

    @pytest.fixture
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checksums.constants, 'HF_HOME', str(tmp_path / 'home'))
        return tmp_path / 'home'

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / 'weights.pth').write_bytes(b'weights')
        return tmp_path / 'weights.pth'

    def test_a_file_that_nothing_is_said_of_is_not_read(self, home, path, monkeypatch):
        monkeypatch.setattr(checksums, 'sha256', lambda path: pytest.fail('it was read'))
        checksums.check_once(path)
        assert not home.exists()

    def test_what_must_be_another_is_checked_again(self, home, path):
        digest = checksums.sha256(path)
        checksums.check_once(path, digest)
        checksums.check_once(path, digest)
        with pytest.raises(OSError, match='is damaged'):
            checksums.check_once(path, ONE)

    def test_files_that_went_are_forgotten(self, home, path, tmp_path):
        memory = home / 'timm-vitres' / 'checked.json'
        checksums.remember(path, ONE)
        assert json.loads(memory.read_text())[str(path)][:2] == [ONE, 7]
        path.unlink()
        (tmp_path / 'other.pth').touch()
        checksums.remember(tmp_path / 'other.pth', OTHER)
        assert list(json.loads(memory.read_text())) == [str(tmp_path / 'other.pth')]

    def test_a_home_that_can_not_be_written_to_is_no_error(self, home, path, monkeypatch):
        home.write_text('no folder')
        digest, read = checksums.sha256(path), []
        original = checksums.sha256
        monkeypatch.setattr(checksums, 'sha256', lambda path: read.append(path) or original(path))
        for _ in range(2):
            checksums.check_once(path, digest)
        assert read == [path, path] and home.read_text() == 'no folder'


def test_the_checksum_that_transformers_copied_is_that_of_other_weights(tmp_path):
    config = {checksums.SHA256_FIELD: 'ab' * 32}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert checksums.told_sha256(tmp_path) == 'ab' * 32
    assert checksums.is_of_this_package((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(dict(config, transformers_version='5.24.0')))
    (tmp_path / 'README.md').write_text(f'---\nmodel_sha256: {"ab" * 32}\n---\n')  # of the model that it began with
    assert checksums.told_sha256(tmp_path) is None
    assert not checksums.is_of_this_package((tmp_path / 'config.json').read_text())
