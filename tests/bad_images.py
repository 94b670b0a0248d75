"""Image folders that can't be trained on, and images that can't be read, as data."""

import os
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
from bad_input import FLAGS, Case
from PIL import Image

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


def _one(file: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda root: make(root / file)


def write_text(path: Path) -> None:
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


def _flipped_png(path: Path) -> None:
    DRAW.save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


IMAGES: list[tuple[str, Callable[[Path], Any]]] = [
    ('text', write_text),
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
    ('class-of-text', 'third', lambda root: ((root / 'images/third').mkdir(), write_text(root / 'images/third/a.txt'))),
    ('class-of-one', 'third', lambda root: ((root / 'images/third').mkdir(), DRAW.save(root / 'images/third/a.png'))),
    ('class-all-broken', 'across', _each('images/across', write_text)),
    ('all-broken', 'images', lambda root: [write_text(file) for _, file in _files(root)]),
    ('case-twins', 'Across|across', _copied('images/across', 'images/Across')),
    ('val-beside-classes', 'val', _copied('images', 'images/val')),
    ('train-beside-classes', 'train', _copied('images', 'images/train')),
    ('hidden-class', 'across|hidden', _moved(('images/down', 'images/.hidden'))),
]

LEFT_OUT: list[tuple[str, str, Callable[[Path], Any]]] = [
    ('link-back', 'again', _link_back),
    ('dangling-class', 'third', lambda root: (root / 'images/third').symlink_to('gone')),
    ('hidden-beside', 'hidden', _copied('images/down', 'images/.hidden')),
    ('text-beside', r'notes\.txt', lambda root: write_text(root / 'images/down/notes.txt')),
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
    ('broken-val', 'across', _each('split/val/across', write_text)),
]
