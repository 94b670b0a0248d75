import argparse
import io
import json
import os
import random
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import DUAL, dual, randomise_, relative_difference
from layouts import google_layout, hybrid_layout, write_shards

import timm_vitres
from timm_vitres.models.vitresnet import default_cfgs
from timm_vitres.publishing.conversion import convert
from timm_vitres.weights.checkpoints import checkpoint_files, read_checkpoint

TAGS = [
    # ours, timm's architecture
    ('vitresnet_tiny.augreg_in21k_ft_in1k', 'vit_tiny_r_s16_p8_224'),
    ('vitresnet_tiny.augreg_in21k_ft_in1k_384', 'vit_tiny_r_s16_p8_384'),
    ('vitresnet_tiny.augreg_in21k', 'vit_tiny_r_s16_p8_224'),
    ('vitresnet_small.augreg_in21k_ft_in1k', 'vit_small_r26_s32_224'),
    ('vitresnet_small.augreg_in21k_ft_in1k_384', 'vit_small_r26_s32_384'),
    ('vitresnet_small.augreg_in21k', 'vit_small_r26_s32_224'),
    ('vitresnet_base.orig_in21k', 'vit_base_r50_s16_224'),
    pytest.param('vitresnet_base.orig_in21k_ft_in1k_384', 'vit_base_r50_s16_384', marks=pytest.mark.slow),
    pytest.param('vitresnet_large.augreg_in21k_ft_in1k', 'vit_large_r50_s32_224', marks=pytest.mark.slow),
    pytest.param('vitresnet_large.augreg_in21k_ft_in1k_384', 'vit_large_r50_s32_384', marks=pytest.mark.slow),
    pytest.param('vitresnet_large.augreg_in21k', 'vit_large_r50_s32_224', marks=pytest.mark.slow),
]


@pytest.mark.parametrize('name, theirs', TAGS)
def test_timms_checkpoints_load_from_a_file(name, theirs, tmp_path):
    """Every published weight of timm's layout: as it is, at another size, with other classes and channels, as maps."""
    architecture, tag = name.split('.')
    cfg = default_cfgs[architecture].cfgs[tag]
    reference = randomise_(timm.create_model(theirs, num_classes=cfg.num_classes))
    file = str(tmp_path / 'weights.safetensors')
    safetensors.torch.save_file(reference.state_dict(), file)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=file)).eval()
    x = torch.randn(1, *cfg.input_size)
    with torch.inference_mode():
        assert relative_difference(model(x), reference(x)) < 1e-6
        if cfg.num_classes:
            # a 384 model of the same weights is what timm makes of them at 384
            larger = timm.create_model(
                name, pretrained=True, img_size=256, num_classes=0, pretrained_cfg_overlay=dict(file=file)
            ).eval()
            reference.set_input_size(img_size=(256, 256))
            reference.reset_classifier(0)
            x = torch.randn(1, 3, 256, 256)
            assert relative_difference(larger(x), reference(x)) < 1e-6


@pytest.mark.parametrize('name, theirs', [('vitresnet_tiny.augreg_in21k_ft_in1k', 'vit_tiny_r_s16_p8_224'), *TAGS[3:5]])
def test_changes_in_the_same_call(name, theirs, tmp_path):
    """Other classes, channels and size at once, and maps: against timm's class, loaded from the same file by timm."""
    file = str(tmp_path / 'weights.safetensors')
    safetensors.torch.save_file(randomise_(timm.create_model(theirs)).state_dict(), file)
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=file), in_chans=1)
    reference = timm.create_model(theirs, num_classes=0, **options).eval()
    reference.set_input_size(img_size=(128, 128))
    x = torch.randn(1, 1, 128, 128)
    model = timm.create_model(name, num_classes=9, img_size=128, **options).eval()
    maps = timm.create_model(name, features_only=True, img_size=128, **options).eval()
    with torch.inference_mode():
        expected = reference(x)
        assert model(x).shape == (1, 9) and model.head.weight.std() < 0.03
        assert relative_difference(model.forward_head(model.forward_features(x), pre_logits=True), expected) < 1e-6
        last = reference.forward_intermediates(x, intermediates_only=True)[-1]
        assert relative_difference(maps(x)[-1], last) < 1e-6


@pytest.mark.parametrize(
    'name, theirs, classes, prefix',
    [
        ('vitresnet_tiny.augreg_in21k_ft_in1k', 'vit_tiny_r_s16_p8_224', 1000, ''),
        ('vitresnet_tiny.augreg_in21k_ft_in1k', 'vit_tiny_r_s16_p8_224', 1000, 'opt/target/'),
        ('vitresnet_small.augreg_in21k_ft_in1k', 'vit_small_r26_s32_224', 7, ''),
        pytest.param('vitresnet_base.orig_in21k', 'vit_base_r50_s16_224', 11, '', marks=pytest.mark.slow),
    ],
)
def test_googles_npz(name, theirs, classes, prefix, tmp_path):
    """The same file through timm's own loader of such files, and through ours, by each of its ways."""
    arrays = google_layout(randomise_(timm.create_model(theirs, num_classes=classes)), prefix)
    if prefix:
        arrays['opt/state/step'] = np.asarray(3)
    path = tmp_path / 'R50+ViT-B_16.npz'
    np.savez(path, **arrays)
    reference = timm.create_model(theirs, num_classes=classes).eval()
    reference.load_pretrained(str(path))
    other = tmp_path / 'weights'  # not by its name
    other.write_bytes(path.read_bytes())

    overlay = dict(file=str(other), num_classes=classes)
    loaded = timm.create_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay).eval()
    assert loaded.state_dict().keys() == reference.state_dict().keys()
    for key, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    if not prefix:
        options = dict(num_classes=classes, img_size=224, checkpoint_path=str(path))
        checkpoint = timm.create_model(name.split('.')[0], **options).eval()
        x = torch.randn(1, 3, 224, 224)
        with torch.inference_mode():
            assert relative_difference(checkpoint(x), reference(x)) < 1e-6


def test_transformers_vit_hybrid(tmp_path):
    """The layout by its published keys; against transformers itself in tests/test_vithybrid.py."""
    reference = randomise_(timm.create_model('vit_base_r50_s16_384'))
    weights = hybrid_layout(reference)
    assert len(weights) == len(reference.state_dict()) + 4 * 12  # two more for every qkv, weight and bias
    torch.save(weights, tmp_path / 'pytorch_model.bin')
    overlay = dict(file=str(tmp_path / 'pytorch_model.bin'))
    name = 'vitresnet_base.hf_in21k_ft_in1k_384'
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    for key, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    path = str(tmp_path / 'pytorch_model.bin')
    at_224 = timm.create_model(
        'vitresnet_base', img_size=224, checkpoint_path=path
    ).eval()  # its position table resampled
    reference.set_input_size(img_size=(224, 224))
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert relative_difference(at_224(x), reference.eval()(x)) < 1e-6
    weights.pop('vit.encoder.layer.3.attention.attention.key.bias')
    message = r'missing keys: blocks\.3\.attn\.qkv\.bias; unexpected keys: blocks\.3\.attn\.query\.bias'
    with pytest.raises(RuntimeError, match='not one of vitresnet_base as it was asked for: ' + message):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))


def training_checkpoint(model):
    """Return what timm's train.py saves (`CheckpointSaver._save`)."""
    args = argparse.Namespace(model='test_vitresnet', num_classes=3, mean=None, img_size=None)
    state_dict = model.state_dict()
    return dict(epoch=3, arch='test_vitresnet', state_dict=state_dict, version=2, args=args, metric=71.0)


@pytest.mark.parametrize('wrapper', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_timms_training_checkpoints(wrapper, tmp_path):
    model, averaged = (randomise_(timm.create_model('test_vitresnet', num_classes=3), seed=seed) for seed in (0, 1))
    checkpoint = training_checkpoint(model)
    checkpoint['state_dict'] = {wrapper + key: value for key, value in model.state_dict().items()}
    for name, expected in (('last.pth.tar', model), ('model_best.pth.tar', averaged)):
        if expected is averaged:
            checkpoint['state_dict_ema'] = averaged.state_dict()
        torch.save(checkpoint, tmp_path / name)
        overlay = dict(file=str(tmp_path / name), num_classes=3)
        loaded = [
            timm.create_model('test_vitresnet', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay),
            timm.create_model('test_vitresnet', num_classes=3, checkpoint_path=str(tmp_path / name)),
        ]
        for one in loaded:
            for key, value in expected.state_dict().items():
                assert torch.equal(one.state_dict()[key], value), key
    weights, about = read_checkpoint(tmp_path / 'model_best.pth.tar', use_ema=False)
    assert weights.keys() == checkpoint['state_dict'].keys() and about['epoch'] == 3 and about['args'].num_classes == 3
    assert torch.equal(weights[wrapper + 'norm.weight'], model.norm.weight)


@pytest.mark.parametrize(
    'theirs, ours', [('vit_tiny_r_s16_p8_384', 'vitresnet_tiny'), ('vit_small_r26_s32_384', 'vitresnet_small')]
)
def test_users_checkpoints_at_another_size(theirs, ours, tmp_path):
    """What was trained at 384 by timm's class, through checkpoint_path at 256."""
    reference = randomise_(timm.create_model(theirs, num_classes=5))
    safetensors.torch.save_file(reference.state_dict(), tmp_path / 'model.safetensors')
    path = str(tmp_path / 'model.safetensors')
    loaded = timm.create_model(ours, num_classes=5, img_size=256, checkpoint_path=path).eval()
    reference.set_input_size(img_size=(256, 256))
    x = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        assert relative_difference(loaded(x), reference(x)) < 1e-6
    with pytest.raises(RuntimeError, match=r'size mismatch for head\.weight'):
        timm.create_model(ours, num_classes=6, checkpoint_path=path)


class Evil:
    def __reduce__(self):
        return os.system, ('touch EVIL',)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_with_code_is_never_run(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model('test_vitresnet', num_classes=3)
    checkpoint = dict(state_dict=model.state_dict(), args=Evil())
    torch.save(checkpoint, tmp_path / 'pytorch_model.bin', _use_new_zipfile_serialization=zipped)
    timm_vitres.save(model, tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    for options in (
        dict(model_name=f'local-dir:{tmp_path}', pretrained=True),
        dict(model_name='test_vitresnet', pretrained=True, pretrained_cfg_overlay=dict(file='pytorch_model.bin')),
    ):
        with pytest.raises(
            ValueError, match=r'was not opened: it holds Python objects besides weights .*(posix|system)'
        ):
            timm.create_model(**options)
    with pytest.raises(RuntimeError, match='weights_only'):  # timm's own sentence
        timm.create_model('test_vitresnet', checkpoint_path=str(tmp_path / 'pytorch_model.bin'))
    np.savez(tmp_path / 'evil.npz', evil=np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match='allow_pickle'):
        read_checkpoint(tmp_path / 'evil.npz')
    assert not (tmp_path / 'EVIL').exists()
    torch.load(tmp_path / 'pytorch_model.bin', weights_only=False)  # the file is what it says
    assert (tmp_path / 'EVIL').exists()


def shared(model):
    """Return a state dict whose tensors share memory in every way that torch.save keeps."""
    weights = dict(model.state_dict())
    weights['blocks.0.norm1.weight'] = weights['blocks.0.norm2.weight']  # one storage
    parameter = torch.nn.Parameter(weights['blocks.0.norm1.bias'].clone())
    weights['blocks.0.norm1.bias'] = weights['blocks.0.norm2.bias'] = parameter  # one object
    flat = torch.randn(192)
    weights['blocks.1.norm1.weight'], weights['blocks.1.norm2.weight'] = flat[:64], flat[32:96]  # overlapping views
    weights['norm.weight'] = torch.randn(1).expand(64)
    weights['head.weight'] = weights['head.weight'].T.contiguous().T
    return weights


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('from_file', [True, False])
def test_what_shares_memory_is_not_tied(from_file, zipped, tmp_path):
    weights = shared(timm.create_model('test_vitresnet', num_classes=3))
    torch.save(weights, tmp_path / 'weights.pth', _use_new_zipfile_serialization=zipped)
    source = dict(file=str(tmp_path / 'weights.pth')) if from_file else dict(state_dict=weights)
    overlay = dict(**source, num_classes=3)
    model = timm.create_model('test_vitresnet', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
        assert value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes, key
    pointers = [value.untyped_storage().data_ptr() for value in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    assert len(list(model.parameters())) == len(list(model.named_parameters(remove_duplicate=False)))
    with torch.no_grad():
        model.blocks[0].norm1.bias.add_(1)
    assert torch.equal(model.blocks[0].norm2.bias, weights['blocks.0.norm2.bias'])


@pytest.mark.parametrize('suffix', ['safetensors', 'bin'])
def test_shards(suffix, tmp_path):
    model = dual()
    index = write_shards(model, tmp_path / 'shards', suffix)
    timm_vitres.save(model, tmp_path / 'whole')
    (index.parent / 'config.json').write_bytes((tmp_path / 'whole' / 'config.json').read_bytes())
    overlay = dict(file=str(index), num_classes=3)
    for loaded in (
        timm.create_model(f'local-dir:{index.parent}', pretrained=True),
        timm.create_model(DUAL, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay),
        timm.create_model(f'local-dir:{convert(index.parent, tmp_path / "out")}', pretrained=True),
    ):
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
    assert [path.name[:11] for path in checkpoint_files(index)] == ['model-00001', 'model-00002', 'model-00003']


@pytest.mark.parametrize(
    'change, error, message',
    [
        (lambda index, last: last.unlink(), OSError, r'model-00003-of-00003\.safetensors is missing'),
        (lambda index, last: index['weight_map'].popitem(), OSError, 'in no shard as model.safetensors.index.json'),
        (
            lambda index, last: safetensors.torch.save_file({'stem.conv1.weight': torch.ones(1)}, last),
            OSError,
            r'stem\.conv1\.weight, which is in model-0000\d-of-00003',
        ),
        (lambda index, last: index['weight_map'].update(more=last.name), OSError, 'holds more, but it does not'),
        (lambda index, last: index['weight_map'].update(more='../x.bin'), ValueError, "names '../x.bin' as a shard"),
        (lambda index, last: index.pop('weight_map'), ValueError, 'has no "weight_map"'),
        (lambda index, last: last.write_bytes(last.read_bytes()[:999]), OSError, 'is damaged or incomplete'),
    ],
)
def test_shards_that_do_not_match_their_index(change, error, message, tmp_path):
    path = write_shards(dual(), tmp_path)
    index = json.loads(path.read_text())
    change(index, tmp_path / 'model-00003-of-00003.safetensors')
    path.write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        read_checkpoint(path)


def test_an_index_that_is_no_json(tmp_path):
    path = tmp_path / 'model.safetensors.index.json'
    for text in (b'', b'{"weight_map": {', b'\xff', b'[' * 100_000):
        path.write_bytes(text)
        with pytest.raises(OSError, match=r'index\.json is damaged or incomplete'):
            read_checkpoint(path)


def test_a_flipped_bit_in_torchs_archive_is_noticed(tmp_path):
    """torch writes checksums into it, and does not compare them."""
    path = tmp_path / 'a.pth'
    torch.save(dict(weight=torch.ones(500)), path)
    assert read_checkpoint(path)[0]['weight'].sum() == 500
    data = path.read_bytes()
    path.write_bytes(data.replace(torch.ones(2).numpy().tobytes(), torch.tensor([1, 1.25]).numpy().tobytes(), 1))
    with pytest.raises(OSError, match=r'a\.pth is damaged or incomplete \(a/data/0 in it has another checksum'):
        read_checkpoint(path)


def containers(folder: Path):
    """Return a small checkpoint's bytes in every container."""
    weights = {'a.weight': torch.randn(4, 5), 'b': torch.randn(7), 'c': torch.tensor(3)}
    checkpoint, arrays = dict(state_dict=weights, epoch=3), {key: value.numpy() for key, value in weights.items()}
    safetensors.torch.save_file(weights, folder / 'a.safetensors')
    torch.save(checkpoint, folder / 'zip.pth')
    torch.save(checkpoint, folder / 'old.pth', _use_new_zipfile_serialization=False)
    np.savez(folder / 'a.npz', **arrays)
    np.savez_compressed(folder / 'small.npz', **arrays)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return bytes cut, or with bits flipped, overwritten, removed, added, or with a number made huge."""
    changed, start = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:start]
    if kind == 1:
        for index in rng.sample(range(len(data)), rng.choice((1, 1, 8))):
            changed[index] ^= 1 << rng.randrange(8)
    elif kind == 2:
        changed[start : start + 4] = rng.choice((b'\xff', b'\0', b'\x7f')) * 4
    elif kind == 3:
        del changed[start : start + rng.randrange(1, 40)]
    elif kind == 4:
        changed[start:start] = rng.randbytes(rng.randrange(1, 20))
    else:
        digit = rng.choice([index for index, byte in enumerate(data) if chr(byte).isdigit()] or [start])
        changed[digit : digit + 1] = rng.choice((b'999999999999', b'-1', b'9' * 30))
    return bytes(changed)


def test_damaged_files_end_in_one_sentence(tmp_path):
    """1500 seeded ways to break a file: each is read, or is an OSError or ValueError that names it."""
    rng = random.Random(0)
    (tmp_path / 'whole').mkdir()
    files = containers(tmp_path / 'whole')
    refused = dict.fromkeys(files, 0)
    for _ in range(300):
        for name, data in files.items():
            path = tmp_path / name
            path.write_bytes(damaged(data, rng))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')  # torch's, of a pickle of another version
                    read_checkpoint(path)
            except (OSError, ValueError) as error:
                assert str(error).startswith(str(path)) and '\n' not in str(error), repr(error)
                assert 'alloc' not in str(error), error  # no memory was asked for that a file can't fill
                refused[name] += 1
    assert min(refused.values()) > 200, refused


def huge_header(path):
    path.write_bytes(struct.pack('<Q', 2**60) + b'{"a":{}}')


def huge_safetensors(path):
    header = json.dumps({'a': dict(dtype='F32', shape=[2**40, 2**20], data_offsets=[0, 2**62])}).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + bytes(64))


def huge_npz(path):
    with zipfile.ZipFile(path, 'w') as archive:
        header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1000), }".ljust(117) + '\n'
        archive.writestr('a.npy', b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header.encode())


def huge_old_torch(path):
    few = {f'{index}': torch.zeros(2) for index in range(100)}  # pickle writes their places in its memo as numbers, too
    torch.save({**few, 'a': torch.zeros(300)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b'M,\x01') == 2  # 300 of the storage, and of the tensor
    path.write_bytes(data.replace(b'M,\x01', b'\x8a\x06' + (2**46).to_bytes(6, 'little')))


def huge_torch(path):
    torch.save({'a': torch.zeros(300)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in parts.items():
            archive.writestr(name, data.replace(b'M,\x01', b'J\x00\x00\x00\x40'))


@pytest.mark.parametrize('write', [huge_header, huge_safetensors, huge_npz, huge_old_torch, huge_torch])
def test_a_file_that_promises_more_than_it_has(write, tmp_path):
    path = tmp_path / 'weights'
    write(path)
    with pytest.raises(OSError, match='weights is damaged or incomplete') as caught:
        read_checkpoint(path)
    assert 'alloc' not in str(caught.value)


def script(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


@pytest.mark.parametrize(
    'write, message',
    [
        (lambda path: path.mkdir(), 'is a folder, expected a file'),
        (lambda path: os.mkfifo(path), 'is no regular file'),
        (lambda path: path.touch(), 'is no safetensors, torch or npz file'),
        (script, 'is a TorchScript archive'),
        (lambda path: zipfile.ZipFile(path, 'w').close(), 'is a zip archive without weights'),
        (lambda path: torch.save({1: torch.ones(1)}, path), 'holds no state dict'),
        (lambda path: torch.save({'a': torch.eye(2).to_sparse()}, path), 'a is quantised, sparse or empty'),
        (lambda path: torch.save({'a': torch.empty(2, device='meta')}, path), 'a is quantised, sparse or empty'),
        (lambda path: path.write_bytes(npz(np.array(['text']))), 'has the dtype <U4, expected numbers'),
        (lambda path: path.write_bytes(npz(np.ones(2, np.longdouble))), 'unknown to torch'),
    ],
)
def test_what_is_no_checkpoint(write, message, tmp_path):
    write(tmp_path / 'weights')
    with pytest.raises(ValueError, match=f'weights.*{message}'):
        read_checkpoint(tmp_path / 'weights')


def npz(array):
    file = io.BytesIO()
    np.savez(file, a=array)
    return file.getvalue()


def test_files_that_can_not_be_opened(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='there is no such file'):
        read_checkpoint(tmp_path / 'none')

    def refuse(path, *args):
        raise PermissionError(13, 'Permission denied', str(path))

    (tmp_path / 'mine').touch()
    monkeypatch.setattr(Path, 'open', refuse)
    with pytest.raises(PermissionError, match='mine could not be opened: Permission denied'):
        read_checkpoint(tmp_path / 'mine')


def test_arrays_of_the_other_byte_order(tmp_path):
    array = np.arange(6, dtype='>f4').reshape(2, 3).T
    (tmp_path / 'weights').write_bytes(npz(array))
    weights, _ = read_checkpoint(tmp_path / 'weights')
    assert weights['a'].dtype == torch.float32 and torch.equal(weights['a'], torch.arange(6.0).view(2, 3).T)


def test_a_dict_that_holds_itself(tmp_path):
    checkpoint = dict(epoch=1)
    checkpoint['model'] = checkpoint
    torch.save(checkpoint, tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='holds no state dict'):
        read_checkpoint(tmp_path / 'weights.pth')
