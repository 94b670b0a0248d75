"""Bad files as data: image folders, images, checkpoints, config.json, cards, each with calls that must refuse it."""

import json
import os
import pickle
import random
import re
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch
from bad_input import FLAGS, POSITIONAL, SERIAL, Case
from PIL import Image
from safetensors.torch import load_file, save_file

DRAW = Image.linear_gradient('L').resize((32, 32)).convert('RGB')


def folders(rng: random.Random) -> Iterator[Case]:
    """Image folders that `finetune` can't train on, or would misread."""
    for name, says, spoil in FOLDERS:
        yield Case('image folders', name, ['finetune', 'images', *FLAGS['finetune']], says, spoil)
    for name, says, spoil in SPLITS:
        argv = ['finetune', 'split', *FLAGS['finetune']]
        yield Case('image folders', name, argv, says, spoil)
    for name, says, spoil in LEFT_OUT:
        yield Case('image folders', name, ['finetune', 'images', *FLAGS['finetune']], says, spoil, is_said=True)
    for name, make in IMAGES:  # one bad image in a good folder
        file = f'images/{rng.choice(["across", "down"])}/bad.png'
        yield Case(
            'image folders', f'holds-{name}', ['finetune', 'images', *FLAGS['finetune']], 'bad', _one(file, make)
        )


def images(rng: random.Random) -> Iterator[Case]:
    """Files that are no image, or a broken one, for the commands that take images."""
    for name, make in (*IMAGES, *NO_FILES):
        argv = ['predict', 'bad.png', *FLAGS['predict']]
        yield Case('images', f'predict-{name}', argv, r'bad\.png', _one('bad.png', make))
        argv = ['predict', 'picture.png', 'bad.png', *FLAGS['predict'], *rng.choice(([], ['--json']))]
        yield Case('images', f'predict-two-{name}', argv, r'bad\.png', _one('bad.png', make))
        argv = ['explain', 'bad.png', *FLAGS['explain']]
        yield Case('images', f'explain-{name}', argv, r'bad\.png', _one('bad.png', make))
    for name, make in IMAGES[::3]:
        argv = ['export', 'local-dir:model', *FLAGS['export'], '--images', 'picture.png', 'bad.png']
        yield Case('images', f'export-{name}', argv, r'bad\.png', _one('bad.png', make))


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
        yield Case('checkpoints', f'convert-{name}', ['convert', file, *flags], f'{file}|{says}', beside)
        says = f'{re.escape(_weights_name(file))}|{says}'
        door = rng.choice(['predict', 'explain', 'export', 'push'])  # verify compares checksums alone
        yield Case('checkpoints', f'{door}-{name}', [door, *POSITIONAL[door], *FLAGS[door]], says, inside)
        yield Case('checkpoints', f'create_model-{name}', ('local-dir:model', dict(pretrained=True)), says, inside)
        if name in _OURS:
            call = ('test_vitresnet', {**SERIAL, 'checkpoint_path': file})
            yield Case('checkpoints', f'checkpoint_path-{name}', call, says, beside)


def _weights_name(file: str) -> str:
    """Return what weights of a container are called in a folder."""
    return {'.safetensors': 'model.safetensors', '.npz': 'bad.npz'}.get(Path(file).suffix, 'pytorch_model.bin')


def configs(rng: random.Random) -> Iterator[Case]:
    """A config.json that is broken, or does not go with the weights beside it."""
    for name, says, change in CONFIGS:
        for door in ('predict', 'verify' if 'sha256' in name else rng.choice(['convert', 'push', 'export'])):
            argv = [door, *POSITIONAL[door], *FLAGS[door]]
            yield Case('config.json', f'{door}-{name}', argv, rf'config\.json|{says}', _config(change))


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


def _one(file: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda root: make(root / file)


def _text(path: Path) -> None:
    path.write_text('This is no picture.')


def _bytes(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def _truncated(format: str) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
        noise.save(path, format=format)
        path.write_bytes(path.read_bytes()[:900])

    return make


def _png(width: int, height: int, pixels: bytes = b'') -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', zlib.compress(pixels)) + chunk(b'IEND', b'')


def _exif(path: Path) -> None:
    orientation = struct.pack('<HHI4s', 0x0112, 2, 4, b'abc')  # text, where a number belongs
    DRAW.save(path, format='PNG', exif=b'Exif\0\0II*\0' + struct.pack('<IH', 8, 1) + orientation + bytes(4))


def _flipped_png(path: Path) -> None:
    DRAW.save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


IMAGES: list[tuple[str, Callable[[Path], Any]]] = [
    ('text', _text),
    ('zero-bytes', _bytes(b'')),
    ('truncated-png', _truncated('PNG')),
    ('truncated-jpeg', _truncated('JPEG')),
    ('truncated-webp', _truncated('WEBP')),
    ('truncated-tiff', _truncated('TIFF')),
    ('flipped-bit', _flipped_png),
    ('signature-alone', _bytes(b'\x89PNG\r\n\x1a\n')),
    ('bomb', _bytes(_png(60000, 60000))),
    ('no-pixels', _bytes(_png(64, 64))),
    ('no-width', _bytes(_png(0, 64))),
    ('html', _bytes(b'<!DOCTYPE html><title>404</title>')),
    ('lfs-pointer', _bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n')),
    ('mistyped-exif', _exif),
    ('line', _bytes(_png(10000, 1, bytes(30001)))),
]

# what a folder's reader leaves out, and names; given by name, it is an error
NO_FILES: list[tuple[str, Callable[[Path], Any]]] = [
    ('directory', lambda path: path.mkdir()),
    ('dangling-link', lambda path: path.symlink_to('gone.png')),
    ('circular-link', lambda path: path.symlink_to(path.name)),
    ('fifo', os.mkfifo),
]


def _link_back(root: Path) -> None:
    (root / 'images/across/again').symlink_to('../..', target_is_directory=True)


def _emptied(root: Path) -> None:
    shutil.rmtree(root / 'images')
    (root / 'images').mkdir()


def _copied(source: str, *targets: str) -> Callable[[Path], Any]:
    def make(root: Path) -> None:
        for target in targets:
            shutil.copytree(root / source, root / target)

    return make


def _moved(*pairs: tuple[str, str]) -> Callable[[Path], Any]:
    return lambda root: [(root / old).rename(root / new) for old, new in pairs]


def _each(folder: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda root: [make(file) for file in (root / folder).glob('*.png')]


FOLDERS: list[tuple[str, str, Callable[[Path], Any]]] = [
    ('missing', 'images', lambda root: shutil.rmtree(root / 'images')),
    ('empty', 'images', _emptied),
    ('a-file', 'images', lambda root: (shutil.rmtree(root / 'images'), (root / 'images').write_text('no folder'))),
    ('loose-files', 'images', lambda root: [f.rename(root / 'images' / f'{i}.png') for i, f in _files(root)]),
    ('loose-file-beside', 'loose', lambda root: DRAW.save(root / 'images/loose.png')),
    ('one-class', 'across', lambda root: shutil.rmtree(root / 'images/down')),
    ('class-without-image', 'third', lambda root: (root / 'images/third').mkdir()),
    ('class-of-text', 'third', lambda root: ((root / 'images/third').mkdir(), _text(root / 'images/third/a.txt'))),
    ('class-of-one', 'third', lambda root: ((root / 'images/third').mkdir(), DRAW.save(root / 'images/third/a.png'))),
    ('class-all-broken', 'across', _each('images/across', _text)),
    ('all-broken', 'images', lambda root: [_text(file) for _, file in _files(root)]),
    ('case-twins', 'Across|across', _copied('images/across', 'images/Across')),
    ('val-beside-classes', 'val', _copied('images', 'images/val')),
    ('train-beside-classes', 'train', _copied('images', 'images/train')),
    ('hidden-class', 'across|hidden', _moved(('images/down', 'images/.hidden'))),
]

LEFT_OUT: list[tuple[str, str, Callable[[Path], Any]]] = [
    ('link-back', 'again', _link_back),
    ('dangling-class', 'third', lambda root: (root / 'images/third').symlink_to('gone')),
    ('hidden-beside', 'hidden', _copied('images/down', 'images/.hidden')),
    ('text-beside', r'notes\.txt', lambda root: _text(root / 'images/down/notes.txt')),
    *((name, 'bad', _one('images/down/bad.png', make)) for name, make in NO_FILES[1:]),
]


def _files(root: Path) -> list[tuple[int, Path]]:
    return list(enumerate(sorted((root / 'images').rglob('*.png'))))


SPLITS: list[tuple[str, str, Callable[[Path], Any]]] = [
    ('training', 'training', _moved(('split/train', 'split/training'))),
    ('Train', 'Train', _moved(('split/train', 'split/Train'))),
    ('train-alone', 'train', lambda root: shutil.rmtree(root / 'split/train')),
    ('empty-train', 'train', lambda root: (shutil.rmtree(root / 'split/train'), (root / 'split/train').mkdir())),
    ('empty-val', 'val', lambda root: (shutil.rmtree(root / 'split/val'), (root / 'split/val').mkdir())),
    ('val-has-more', 'third', _copied('split/val/across', 'split/val/third')),
    ('Val', 'Val', _moved(('split/val', 'split/Val'))),
    ('two-vals', 'valid', _copied('split/val', 'split/valid')),
    ('classes-beside', 'third', _copied('split/val/across', 'split/third')),
    ('broken-val', 'across', _each('split/val/across', _text)),
]


class _Code:
    """What a pickle may run when it is opened."""

    def __reduce__(self):
        return os.system, ('touch executed',)


def _checkpoints(rng: random.Random) -> Iterator[tuple[str, str, str, Callable[[Path, Path], Any]]]:
    """Return (name, file, what else may be named, what writes it)."""
    size = 170_000
    yield 'empty', 'bad.safetensors', 'empty', lambda root, path: path.write_bytes(b'')
    yield 'text', 'bad.pth', '', lambda root, path: _text(path)
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
    yield 'other-keys', 'bad.pth', _KEYS, _tensors(lambda t: {f'encoder.{key}': value for key, value in t.items()})
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
_OURS = ('torch.int8', 'torch.int64', 'torch.bool', 'complex', 'numbered', 'table', 'flat-table', 'short', 'objects')
_NAMES = ('cls_token', 'pos_embed', 'norm.weight', 'head.weight', 'blocks.0.attn.qkv.weight')
# a sentence may name the tensor in place of the file
_KEYS = 'model.safetensors|position embeddings|missing keys|unexpected keys|wrong shapes|' + '|'.join(
    map(re.escape, _NAMES)
)


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
