"""What models are loaded from, as data: checkpoints, config.json, folders and cards that are damaged or hostile."""

import argparse
import json
import os
import pickle
import random
import re
import shutil
import struct
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import timm
import torch
from bad_images import NO_FILES, write_text
from bad_input import FLAGS, POSITIONAL, SERIAL, Case
from safetensors.torch import load_file, save_file

from timm_vitres.publishing import hub


def checkpoints(rng: random.Random) -> Iterator[Case]:
    """Checkpoints that are damaged, hostile, or of something else, at every door that weights come in by."""
    for name, file, says, make in _checkpoints(rng):

        def beside(root: Path, file=file, make=make) -> None:
            make(root, root / file)

        def inside(root: Path, file=file, make=make) -> None:
            _config(_unbind)(root)
            make(root, root / file)
            (root / 'model/model.safetensors').unlink()
            os.replace(root / file, root / 'model' / _weights_name(file))

        flags = ['--model', 'test_vitresnet', *FLAGS['convert'], *FLAGS['finetune'][-5:]]
        yield Case('checkpoints', f'convert-{name}', ['convert', file, *flags], _either(file, says), beside)
        says = _either(_weights_name(file), says)
        door = rng.choice(['predict', 'explain', 'export', 'push'])  # verify compares checksums alone
        yield Case('checkpoints', f'{door}-{name}', [door, *POSITIONAL[door], *FLAGS[door]], says, inside)
        yield Case('checkpoints', f'create_model-{name}', ('local-dir:model', dict(pretrained=True)), says, inside)
        if name in _OURS:
            call = ('test_vitresnet', {**SERIAL, 'checkpoint_path': file})
            yield Case('checkpoints', f'checkpoint_path-{name}', call, says, beside)


def trainings(rng: random.Random) -> Iterator[Case]:
    """Checkpoints of timm's train.py whose settings are none."""
    for name, says, about in TRAININGS:

        def spoil(root: Path, about=about) -> None:
            torch.save({'state_dict': load_file(root / 'model/model.safetensors'), **about}, root / 'bad.pth')

        argv = ['convert', 'bad.pth', *FLAGS['convert']]
        yield Case('checkpoints', f'convert-training-{name}', argv, rf'bad\.pth|{says}', spoil)


def _either(name: str, says: str) -> str:
    """Return what finds a file's name, or else what is told; the name alone where nothing else is."""
    return '|'.join(filter(None, (re.escape(name), says)))


def _weights_name(file: str) -> str:
    """Return what weights of a container are called in a folder."""
    names = {'.safetensors': 'model.safetensors', '.npz': 'bad.npz', '.json': 'model.safetensors.index.json'}
    return names.get(Path(file).suffix, 'pytorch_model.bin')


def configs(rng: random.Random) -> Iterator[Case]:
    """A config.json that is broken, or does not go with the weights beside it."""
    for name, says, change in CONFIGS:
        for door in ('predict', 'verify' if 'sha256' in name else rng.choice(['convert', 'push', 'export'])):
            argv = [door, *POSITIONAL[door], *FLAGS[door]]
            yield Case('config.json', f'{door}-{name}', argv, rf'config\.json|{says}', _config(change))


def models(rng: random.Random) -> Iterator[Case]:
    """Folders of models in which a file is missing or is no file, and models that can't do what is asked."""
    for file in ('model.safetensors', 'config.json'):
        for name, make in (('missing', lambda path: None), *NO_FILES):
            for door in ('predict', rng.choice(['explain', 'export']), 'push'):

                def spoil(root: Path, path=f'model/{file}', make=make) -> None:
                    (root / path).unlink()
                    make(root / path)

                argv = [door, *POSITIONAL[door], *FLAGS[door]]
                yield Case('models', f'{door}-{file}-{name}', argv, rf'{re.escape(file)}|no weights', spoil)
    for name, says, doors, options in MODELS:
        for door in doors:
            argv = [door, *POSITIONAL[door], *FLAGS[door]]
            yield Case('models', f'{door}-{name}', argv, says, _saved(**options))


def cards(rng: random.Random) -> Iterator[Case]:
    """A README.md whose head the Hub, or we, can't read, for `push`: the repository must not be there afterwards."""
    for index, (name, text) in enumerate(CARDS):
        data = text if isinstance(text, bytes) else text.encode()

        def spoil(root: Path, data=data) -> None:
            (root / 'model/README.md').write_bytes(data)

        argv = ['push', 'model', f'me/card{index}', '--yes']
        yield Case('cards', f'push-{name}', argv, r'README\.md', spoil)
    for index, (name, says, spoil) in enumerate(FOLDERS_TO_PUSH):
        yield Case('cards', f'push-{name}', ['push', 'model', f'me/folder{index}', '--yes'], says, spoil)


class _Code:
    """What a pickle may run when it is opened."""

    def __reduce__(self):
        return os.system, ('touch executed',)


def _checkpoints(rng: random.Random) -> Iterator[tuple[str, str, str, Callable[[Path, Path], Any]]]:
    """Return (name, file, what else may be named, what writes it)."""
    size = 170_000
    yield 'empty', 'bad.safetensors', 'empty', lambda root, path: path.write_bytes(b'')
    yield 'text', 'bad.pth', '', lambda root, path: write_text(path)
    pointer = b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n'
    yield 'lfs-pointer', 'bad.safetensors', 'Git LFS', lambda root, path: path.write_bytes(pointer)
    for end in sorted(rng.sample(range(8, size), 4)):
        yield f'cut-{end}', 'bad.safetensors', '', _changed('model/model.safetensors', lambda d, end=end: d[:end])
        yield f'cut-{end}-pth', 'bad.pth', '', _changed('weights.pth', lambda d, end=end: d[:end])
    for _ in range(6):  # in the header: a name, a shape, a type, an offset, or the header's own length
        place, bit = rng.choice([*range(8), *range(43, 2000)]), rng.randrange(7)
        yield f'bit-{place}-{bit}', 'bad.safetensors', _KEYS, _flipped('model/model.safetensors', place, bit)
    for claimed in (2**20, 2**40, 2**63, 2**64 - 1):
        head = struct.pack('<Q', claimed) + b'{"a":{}}'
        yield f'claims-{claimed}', 'bad.safetensors', '', lambda root, path, head=head: path.write_bytes(head)
    for dtype in ('F99', 'F8_E4M3'):
        head = json.dumps({'cls_token': {'dtype': dtype, 'shape': [1, 1, 32], 'data_offsets': [0, 32]}}).encode()
        data = struct.pack('<Q', len(head)) + head + bytes(32)
        yield f'dtype-{dtype}', 'bad.safetensors', _KEYS, lambda root, path, data=data: path.write_bytes(data)
    head = json.dumps({'cls_token': {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 2**42]}}).encode()
    data = struct.pack('<Q', len(head)) + head
    yield 'giant-tensor', 'bad.safetensors', '', lambda root, path, data=data: path.write_bytes(data)
    for dtype in (torch.int8, torch.int64, torch.bool):
        yield f'{dtype}', 'bad.safetensors', _KEYS, _tensors(lambda t, dtype=dtype: _as(t, dtype))
    yield 'complex', 'bad.pth', _KEYS, _tensors(lambda t: _as(t, torch.complex64))
    yield 'nothing', 'bad.safetensors', _KEYS, _tensors(lambda t: {})
    yield 'nothing-pth', 'bad.pth', _KEYS, _tensors(lambda t: {})
    yield 'other-keys', 'bad.pth', _KEYS, _tensors(lambda t: {f'trunk.{key}': value for key, value in t.items()})
    key = rng.choice(_NAMES)
    yield f'without-{key}', 'bad.safetensors', _KEYS, _tensors(lambda t: {k: v for k, v in t.items() if k != key})
    yield 'one-more', 'bad.safetensors', _KEYS, _tensors(lambda t: {**t, 'more.weight': torch.zeros(3)})
    yield 'wider', 'bad.safetensors', _KEYS, _tensors(lambda t: {**t, key: torch.zeros(7, 5)})
    yield 'table', 'bad.pth', _KEYS, _tensors(lambda t: {**t, 'pos_embed': torch.zeros(1, 8, 32)})
    yield 'flat-table', 'bad.pth', _KEYS, _tensors(lambda t: {**t, 'pos_embed': torch.zeros(32)})
    yield 'code', 'bad.pth', '', lambda root, path: torch.save({'state_dict': _Code()}, path)
    yield 'pickle-code', 'bad.pth', '', lambda root, path: path.write_bytes(pickle.dumps(_Code()))
    for name, value in (('list', [1, 2]), ('text-values', {'a': 'b'}), ('number', 3), ('wrapped', {'state_dict': 3})):
        yield name, 'bad.pth', '', lambda root, path, value=value: torch.save(value, path)
    yield 'numbered', 'bad.pth', '', lambda root, path: torch.save({1: torch.zeros(3)}, path)
    for name, index in INDICES:
        yield f'index-{name}', 'bad-model.safetensors.index.json', r'shard|gone|model\.safetensors', _written(index)
    objects = np.array([{'a': 1}], dtype=object)
    yield 'objects', 'bad.npz', '', lambda root, path: np.savez(path, **{'embedding/kernel': objects})
    yield 'strings', 'bad.npz', '', lambda root, path: np.savez(path, **{'embedding/kernel': np.array(['a', 'b'])})
    yield 'short', 'bad.npz', _KEYS, lambda root, path: np.savez(path, **{'embedding/kernel': np.zeros((4, 4))})
    yield (
        'zip',
        'bad.pth',
        '',
        lambda root, path: shutil.make_archive(str(path), 'zip', root / 'images') and (os.replace(f'{path}.zip', path)),
    )


# timm opens what `checkpoint_path` names, and says what is damaged; these are left to the model
_OURS = ('torch.int8', 'torch.int64', 'torch.bool', 'complex', 'table', 'flat-table', 'short', 'objects')
_NAMES = ('cls_token', 'pos_embed', 'norm.weight', 'head.weight', 'blocks.0.attn.qkv.weight')
# a sentence may name the tensor in place of the file
_KEYS = 'model.safetensors|position embeddings|missing keys|unexpected keys|wrong shapes|' + '|'.join(
    map(re.escape, _NAMES)
)


def _told(**settings: Any) -> dict[str, Any]:
    return {'args': argparse.Namespace(**{'model': 'test_vitresnet', 'model_kwargs': _KWARGS, **settings})}


_KWARGS = dict(layers=(1,), channels=(128,), depth=1, embed_dim=32)
INDICES: list[tuple[str, str]] = [
    ('text', 'no JSON'),
    ('list', '[]'),
    ('no-map', '{}'),
    ('empty-map', '{"weight_map": {}}'),
    ('numbers', '{"weight_map": {"cls_token": 3}}'),
    ('gone', '{"weight_map": {"cls_token": "gone.safetensors"}}'),
    ('outside', '{"weight_map": {"cls_token": "../notes.txt"}}'),
    ('absolute', '{"weight_map": {"cls_token": "/etc/hostname"}}'),
]
TRAININGS: list[tuple[str, str, dict[str, Any]]] = [
    ('nothing-told', 'model', {}),
    ('args-number', 'args|model', {'args': 3}),
    ('arch-list', 'arch|model', {'arch': ['test_vitresnet']}),
    ('arch-unknown', 'vitresnet_giant', {'arch': 'vitresnet_giant'}),
    ('kwargs-text', 'model_kwargs', _told(model_kwargs='depth=1')),
    ('size-text', 'img_size', _told(img_size='large')),
    ('size-0', 'img_size', _told(img_size=-32)),
    ('input-size', 'input_size', _told(input_size=(3,))),
    ('mean-text', 'mean', _told(mean='grey')),
    ('std-0', 'std', _told(std=(0.0, 0.0, 0.0))),
    ('crop-pct', 'crop_pct', _told(crop_pct=-1.0)),
    ('interpolation', 'interpolation', _told(interpolation='bycubic')),
]


def _written(text: str) -> Callable[[Path, Path], Any]:
    return lambda root, path: path.write_text(text)


def _changed(source: str, change: Callable[[bytes], bytes]) -> Callable[[Path, Path], Any]:
    return lambda root, path: path.write_bytes(change((root / source).read_bytes()))


def _flipped(source: str, place: int, bit: int) -> Callable[[Path, Path], Any]:
    return _changed(source, lambda d: d[:place] + bytes([d[place] ^ 1 << bit]) + d[place + 1 :])


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path, Path], Any]:
    def make(root: Path, path: Path) -> None:
        tensors = change(load_file(root / 'model/model.safetensors'))
        save_file(tensors, path) if path.suffix == '.safetensors' else torch.save(tensors, path)

    return make


def _as(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: (100 * value).to(dtype) for key, value in tensors.items()}


def _config(change: Any) -> Callable[[Path], Any]:
    def spoil(root: Path) -> None:
        path = root / 'model/config.json'
        if callable(change):
            config = json.loads(path.read_text())
            change(config)
            path.write_text(json.dumps(config))
        else:
            path.write_bytes(change)

    return spoil


def _unbind(config: dict[str, Any]) -> None:
    """Take the sha256 of the weights out, which would say at once that they are others."""
    config.pop('model_sha256', None)
    config['pretrained_cfg'].pop('notes', None)


def _set(*keys_and_value: Any) -> Callable[[dict[str, Any]], Any]:
    *keys, last, value = keys_and_value

    def change(config: dict[str, Any]) -> None:
        for key in keys:
            config = config[key]
        config[last] = value

    return change


NAN = float('nan')
CONFIGS: list[tuple[str, str, Any]] = [
    ('empty', 'JSON', b''),
    ('text', 'JSON', b'architecture: test_vitresnet'),
    ('cut', 'JSON', b'{"architecture": "test_vitres'),
    ('list', 'JSON', b'["test_vitresnet"]'),
    ('null', 'JSON', b'null'),
    ('latin', 'JSON', '{"architecture": "é"}'.encode('latin-1')),
    ('binary', 'JSON', bytes(range(256))),
    ('no-architecture', 'architecture', lambda config: config.pop('architecture')),
    ('other-architecture', 'vitresnet_giant', _set('architecture', 'vitresnet_giant')),
    ('architecture-list', 'architecture', _set('architecture', ['test_vitresnet'])),
    ('model-args-list', 'model_args', _set('model_args', [1])),
    ('model-args-text', 'model_args', _set('model_args', 'depth=1')),
    ('depth-text', 'depth', _set('model_args', 'depth', 'one')),
    ('depth-2', 'missing keys|depth', _set('model_args', 'depth', 2)),
    ('unknown-arg', 'depht', _set('model_args', 'depht', 1)),
    ('channels-text', 'channels', _set('model_args', 'channels', 'wide')),
    ('img-size-0', 'img_size', _set('model_args', 'img_size', 0)),
    ('num-classes-5', 'num_classes|head', _set('num_classes', 5)),
    ('num-classes-text', 'num_classes', _set('num_classes', 'three')),
    ('num-classes-below', 'num_classes', _set('num_classes', -3)),
    ('labels-2', 'label_names', _set('label_names', ['cat', 'dog'])),
    ('labels-number', 'label_names', _set('label_names', 3)),
    ('mean-nan', 'mean', _set('pretrained_cfg', 'mean', [NAN, NAN, NAN])),
    ('mean-2', 'mean', _set('pretrained_cfg', 'mean', [0.5, 0.5])),
    ('mean-text', 'mean', _set('pretrained_cfg', 'mean', 'grey')),
    ('std-0', 'std', _set('pretrained_cfg', 'std', [0, 0, 0])),
    ('std-below', 'std', _set('pretrained_cfg', 'std', [-1, 1, 1])),
    ('input-size-text', 'input_size', _set('pretrained_cfg', 'input_size', '3x32x32')),
    ('input-size-2', 'input_size', _set('pretrained_cfg', 'input_size', [32, 32])),
    ('input-size-0', 'input_size', _set('pretrained_cfg', 'input_size', [3, 0, 32])),
    ('input-size-below', 'input_size', _set('pretrained_cfg', 'input_size', [3, -32, 32])),
    ('input-size-giant', 'input_size', _set('pretrained_cfg', 'input_size', [3, 10**9, 10**9])),
    ('crop-pct-0', 'crop_pct', _set('pretrained_cfg', 'crop_pct', 0)),
    ('crop-pct-text', 'crop_pct', _set('pretrained_cfg', 'crop_pct', 'all')),
    ('interpolation', 'interpolation', _set('pretrained_cfg', 'interpolation', 'bycubic')),
    ('pretrained-cfg-list', 'pretrained_cfg', _set('pretrained_cfg', [1])),
    ('sha256', 'sha256', _set('model_sha256', 64 * '0')),
    ('sha256-short', 'sha256', _set('model_sha256', 'abc')),
]


def _saved(architecture: str = 'test_vitresnet', scale: float = 1.0, **kwargs: Any) -> Callable[[Path], Any]:
    def spoil(root: Path) -> None:
        shutil.rmtree(root / 'model')
        base = SERIAL if architecture == 'test_vitresnet' else {}
        model = timm.create_model(architecture, **{**base, **kwargs})
        for parameter in model.parameters():
            parameter.data *= scale
        hub.save(model, root / 'model')

    return spoil


MODELS: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = [
    ('headless', 'num_classes|head', ('predict', 'explain'), dict(num_classes=0)),
    ('five-channels', 'in_chans', ('predict', 'explain'), dict(in_chans=5)),
    ('not-finite', 'finite', ('predict', 'explain', 'export'), dict(scale=NAN)),
    ('no-hybrid', 'hybrid|timm-vitres', ('explain', 'convert'), dict(architecture='test_resnet', num_classes=3)),
    ('unpooled', 'pool', ('explain',), dict(global_pool='')),
]

BODY = '\n# A model\n\nMy own words.\n'
CARDS: list[tuple[str, Any]] = [
    ('broken-yaml', f'---\nlicense: [mit\n---\n{BODY}'),
    ('tabs', f'---\nlicense:\n\t- mit\n---\n{BODY}'),
    ('duplicate-colon', f'---\nlicense: mit: again\n---\n{BODY}'),
    ('list', f'---\n- license\n- mit\n---\n{BODY}'),
    ('number', f'---\n3\n---\n{BODY}'),
    ('text', f'---\njust words\n---\n{BODY}'),
    ('unclosed', f'---\nlicense: mit\n{BODY}'),
    ('latin-1', f'---\nlicense: mit\n---\n{BODY}Die Größe'.encode('latin-1')),
    ('utf-16', f'---\nlicense: mit\n---\n{BODY}'.encode('utf-16')),
    ('binary', bytes(range(256))),
    ('object', f'---\nlicense: !!python/object/apply:os.system ["touch executed"]\n---\n{BODY}'),
    ('anchor', f'---\nlicense: *nowhere\n---\n{BODY}'),
    ('tags-number', f'---\ntags: 3\n---\n{BODY}'),
    ('index-text', f'---\nmodel-index: none\n---\n{BODY}'),
]
FOLDERS_TO_PUSH: list[tuple[str, str, Callable[[Path], Any]]] = [
    ('no-weights', r'model\.safetensors', lambda root: (root / 'model/model.safetensors').unlink()),
    ('no-config', r'config\.json', lambda root: (root / 'model/config.json').unlink()),
    ('no-json', r'config\.json', _config(b'{')),
    (
        'card-is-folder',
        r'README\.md',
        lambda root: ((root / 'model/README.md').unlink(), (root / 'model/README.md').mkdir()),
    ),
]
