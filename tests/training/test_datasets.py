"""Image folders as they are found on bad days, and the record of a run's images."""

import json
import os
import random
import shutil
import threading

import numpy as np
import pytest
from conftest import draw, stripes, write_folder
from PIL import Image, features

from timm_vitres.training.datasets import ImageFolder, load_data
from timm_vitres.training.settings import FinetuneCfg


def cfg(root, **kwargs) -> FinetuneCfg:
    return FinetuneCfg(**{'data_dir': root and str(root), 'val_frac': 0.25, **kwargs})


def load(root, recorded=None, **kwargs):
    return load_data(cfg(root, **kwargs), 'RGB', recorded)


def names_of(folder) -> list:
    return [os.path.relpath(path, folder.root) for path, _ in folder.samples]


# Folders that are as they should be


def test_image_folder(image_folder):
    folder = ImageFolder(image_folder)
    assert folder.classes == ['across', 'down'] and len(folder) == 24 and folder.targets.count(0) == 12
    image, target = folder[0]
    assert image.mode == 'RGB' and target == 0
    assert folder.samples[0] == (str(image_folder / 'across' / '0.png'), 0)


def test_image_folder_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match='not a folder'):
        ImageFolder(tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='Found 0 images'):
        ImageFolder(tmp_path / 'empty')
    root = write_folder(tmp_path / 'images', per_class=2)
    (root / 'hollow').mkdir()
    with pytest.raises(ValueError, match=r'hollow.* has no image'):
        ImageFolder(root)
    (root / 'hollow').rmdir()
    with pytest.raises(ValueError, match='lacks: down'):
        ImageFolder(root, class_map={'across': 0})
    (root / 'across' / '0.png').rename(root / 'loose.png')
    with pytest.raises(ValueError, match='outside class folders'):
        ImageFolder(root)


def test_what_names_tell_is_told_before_images_are_opened(image_folder, monkeypatch):
    def fails(*args):
        raise AssertionError('an image was opened')

    monkeypatch.setattr('timm_vitres.training.checking.open_image', fails)
    with pytest.raises(ValueError, match='val_frac: got nan'):
        load(image_folder, val_frac=float('nan'))
    (image_folder / 'down').rename(image_folder.parent / 'down')
    with pytest.raises(ValueError, match="has the one class 'across'; at least two"):
        load(image_folder)


def test_bad_images_are_named_or_skipped(image_folder):
    bad = image_folder / 'down' / '3.png'
    bad.write_bytes(bad.read_bytes()[:100])
    folder = ImageFolder(image_folder)
    with pytest.raises(ValueError, match=r'3\.png.*--skip-bad'):
        folder.check_images()
    folder.check_images(skip_bad=True)
    assert len(folder) == 23 and list(folder.left_out) == [str(bad)]
    assert folder.left_out[str(bad)].startswith('cannot be read as an image (')
    for path in (image_folder / 'down').iterdir():
        path.write_text('')
    with pytest.raises(ValueError, match="class 'down'"):
        ImageFolder(image_folder).check_images(skip_bad=True)


def test_every_format_that_pillow_opens_is_taken(tmp_path):
    """In training as in predict; webp, bmp, tiff and gif were left out without a word."""
    suffixes = ['png', 'jpg', 'JPEG', 'webp', 'bmp', 'tiff', 'TIF', 'gif', 'ppm', 'tga', 'ico', 'jp2', 'PNG']
    suffixes += ['avif'] if features.check('avif') else []
    for name in ('across', 'down'):
        (tmp_path / name).mkdir()
        for index, suffix in enumerate(suffixes):
            picture = stripes(16, name == 'down', np.random.default_rng(index))
            picture.save(tmp_path / name / f'{index}.{suffix}')
    (tmp_path / 'down' / 'table.h5').write_bytes(b'\x89HDF\r\n\x1a\n')  # PIL knows the name, and decodes none
    (tmp_path / 'down' / 'film.mpg').write_bytes(b'\0\0\1\xb3')
    folder = ImageFolder(tmp_path)
    assert len(folder) == 2 * len(suffixes) and all(folder[index][0].size == (16, 16) for index in range(len(folder)))
    assert folder.left_out == {
        str(tmp_path / 'down' / name): 'no image, by its suffix' for name in ('table.h5', 'film.mpg')
    }


def test_the_order_is_natural_and_only_by_names(tmp_path, monkeypatch):
    """Classes and images come in timm's natural order, whatever order the file system has."""
    names = ['class 10', 'class 9', 'B', 'a', 'class 09', '²', '٣']
    for name in names:
        for file in ('10.png', '9.png', '09.png'):
            draw(tmp_path / name / file)
    expected = ['a', 'B', 'class 09', 'class 9', 'class 10', '²', '٣']
    listdir, scandir = os.listdir, os.scandir
    chance = random.Random(0)

    class Shuffled:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = list(entries)
            chance.shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, 'scandir', Shuffled)
    monkeypatch.setattr(os, 'listdir', lambda path: chance.sample(listdir(path), len(listdir(path))))
    for _ in range(5):
        folder = ImageFolder(tmp_path)
        assert sorted(folder.classes) == sorted(expected)
        assert [name for name in folder.classes if name.isascii()] == expected[:5]
        nines = [name for name in names_of(folder) if 'class 09' in name]
        assert nines == ['class 09/09.png', 'class 09/9.png', 'class 09/10.png']


def test_thousands_of_classes(tmp_path):
    image = draw(tmp_path / 'image.png').read_bytes()
    for index in range(3000):
        (tmp_path / 'images' / f'n{index}').mkdir(parents=True)
        (tmp_path / 'images' / f'n{index}' / 'x.png').write_bytes(image)
    folder = ImageFolder(tmp_path / 'images')
    assert folder.classes == [f'n{index}' for index in range(3000)] and folder.targets == list(range(3000))


def test_paths_relative_to_here_and_odd_names(image_folder, monkeypatch):
    expected = load(image_folder).record()
    monkeypatch.chdir(image_folder)
    for root in ('.', './', '../images', f'../images/../{image_folder.name}', '../images/'):
        assert load(root).record() == expected
    draw(image_folder / 'down' / 'line\nbreak \udcff.png')
    data = load('.')
    assert len(data.train) + len(data.val) == 25
    again = load('.', recorded=json.loads(json.dumps(data.record())))
    assert again.record() == data.record()


def test_an_interrupted_check_ends_at_once(image_folder, monkeypatch):
    """It opened all the images that were left before it ended."""
    opened = []

    def open_slowly(path, mode):
        opened.append(path)
        if len(opened) > 1:
            threading.Event().wait(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_vitres.training.checking.open_image', open_slowly)
    for index in range(200):
        (image_folder / 'down' / f'{index}.png').write_text('')
    with pytest.raises(KeyboardInterrupt):
        ImageFolder(image_folder).check_images()
    assert len(opened) < 100


# The record of a run


def paths_of(data) -> tuple:
    samples = [[part.dataset.samples[index] for index in part.indices] for part in (data.train, data.val)]
    return [(os.path.basename(path), target) for path, target in samples[0]], samples[1]


def test_a_record_makes_the_same_split_whatever_the_settings_say(image_folder):
    data = load(image_folder, seed=1)
    recorded = json.loads(json.dumps(data.record()))
    size = (image_folder / 'across' / '0.png').stat().st_size
    assert ['across/0.png', 'across', size] in recorded['train'] + recorded['validation']
    assert recorded['label_names'] == ['across', 'down']
    draw(image_folder / 'across' / '00.png')
    draw(image_folder / 'aardvark' / '0.png')
    again = load(image_folder, recorded, seed=2, val_frac=0.5, val_split='', train_split='nonsense')
    assert paths_of(again) == paths_of(data)
    assert (again.counts, again.description, again.label_names) == (data.counts, data.description, data.label_names)
    assert again.record() == data.record()
    assert again.left_out == {
        str(image_folder / name): 'not part of this run' for name in ('across/00.png', 'aardvark/0.png')
    }
    # the classes keep their order
    recorded['label_names'].reverse()
    assert [target for _, target in load(image_folder, recorded).val.dataset.samples[:1]] == [1]


def test_a_record_of_two_folders(tmp_path):
    root = tmp_path / 'images'
    write_folder(root / 'train', per_class=3)
    write_folder(root / 'val', per_class=2, size=41)
    data = load(root)
    root.rename(tmp_path / 'moved')
    again = load(tmp_path / 'moved', data.record())
    assert again.record() == data.record() and again.left_out == {}
    assert again.record()['validation'][0][:2] == ['val/across/0.png', 'across']


def test_images_that_went_or_changed_are_named(image_folder):
    recorded = load(image_folder).record()
    (image_folder / 'down' / '3.png').unlink()
    (image_folder / 'down' / '4.png').write_text('')
    with pytest.raises(ValueError, match=r'down/3\.png \(gone\).*') as caught:
        load(image_folder, recorded, skip_bad=True)
    assert 'down/4.png (0 bytes, not' in str(caught.value)
    for path in (image_folder / 'down').iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r'gone or changed .* and 7 more'):
        load(image_folder, recorded)


def test_only_who_looks_walks_through_a_recorded_folder(image_folder, monkeypatch):
    """Many processes of one machine take the images from the record."""
    data = load(image_folder)
    looked = load(image_folder, data.record())
    monkeypatch.setattr('timm_vitres.training.datasets.find_images', lambda *_, **__: pytest.fail('a process looked'))
    taken = load_data(cfg(image_folder), 'RGB', data.record(), looks=False)
    assert paths_of(taken) == paths_of(looked) and taken.record() == looked.record() and taken.left_out == {}


def test_what_a_run_does_not_use_may_be_unreadable(tmp_path, monkeypatch):
    write_folder(tmp_path / 'train', per_class=3)
    write_folder(tmp_path / 'val', per_class=2, size=41)
    write_folder(tmp_path / 'test', per_class=2, size=42)
    data, status, scandir = load(tmp_path), os.stat, os.scandir

    def refuse(function):
        def refusing(path, **kwargs):
            if str(path).endswith(('test/across', 'test/down/0.png')):
                raise PermissionError(13, 'Permission denied', str(path))
            return function(path, **kwargs)

        return refusing

    monkeypatch.setattr(os, 'stat', refuse(status))
    monkeypatch.setattr(os, 'scandir', refuse(scandir))
    again = load(tmp_path, data.record())
    assert again.record() == data.record()
    assert again.left_out[str(tmp_path / 'test' / 'across')] == 'Permission denied'


def test_images_that_became_unreadable_are_named(image_folder):
    recorded = load(image_folder).record()
    bad = image_folder / 'down' / '3.png'
    bad.write_bytes(bytes(bad.stat().st_size))
    with pytest.raises(ValueError, match=r'3\.png cannot be read .*It could be read when the run began'):
        load(image_folder, recorded, skip_bad=True)
    assert len(load(image_folder, recorded, no_check=True).train) == 18


def test_other_images_may_have_the_same_names_and_sizes(tmp_path):
    for number, split in enumerate(('train', 'val')):
        for label in ('across', 'down'):
            for index in range(3):
                path = draw(tmp_path / split / label / f'{index}.png', 100 * number + 10 * index + len(label))
                with Image.open(path) as image:
                    image.save(path.with_suffix('.bmp'))  # all of the same size
                path.unlink()
    assert len(load(tmp_path).val) == 6
    shutil.rmtree(tmp_path / 'val')
    shutil.copytree(tmp_path / 'train', tmp_path / 'val')
    with pytest.raises(ValueError, match='is a copy of'):
        load(tmp_path)


def test_a_class_is_not_left_without_images_to_train_on(tmp_path):
    for split in ('train', 'val'):
        for label in ('a', 'b', 'c'):
            for index in range(3):
                draw(tmp_path / split / label / f'{index}.png', sum(map(ord, split + label)) * 10 + index)
    for index in range(3):
        shutil.copy(tmp_path / 'val' / 'c' / f'{index}.png', tmp_path / 'train' / 'c' / f'{index}.png')
    with pytest.raises(ValueError, match="data_dir: all training images of class 'c' are copies of others"):
        load(tmp_path)
    shutil.rmtree(tmp_path / 'val')
    for index in (1, 2):
        shutil.copy(tmp_path / 'train' / 'c' / '0.png', tmp_path / 'train' / 'c' / f'{index}.png')
    with pytest.raises(
        ValueError, match="data_dir: of the 3 images of class 'c' 1 is no copy, but two or more are needed"
    ):
        load(tmp_path / 'train')
    for index in range(3):
        shutil.copy(tmp_path / 'train' / 'a' / f'{index}.png', tmp_path / 'train' / 'c' / f'{index}.png')
    with pytest.raises(ValueError, match="data_dir: of the 3 images of class 'c' 0 is no copy"):
        load(tmp_path / 'train')


def test_what_is_no_record(image_folder):
    recorded = load(image_folder).record()
    for wrong in (
        {},
        [],
        {**recorded, 'train': {}},
        {**recorded, 'train': [['across/0.png', 'across']]},
        {**recorded, 'train': [['across/0.png', 'sideways', 3]]},
        {**recorded, 'train': [['../across/0.png', 'across', 3]]},
        {**recorded, 'label_names': None},
        {**recorded, 'train': recorded['train'] + recorded['validation'][:1]},
    ):
        with pytest.raises(ValueError, match='recorded: '):
            load(image_folder, wrong)
    with pytest.raises(ValueError, match='recorded: the run was not on a named dataset'):
        load(image_folder, recorded, dataset='torch/mnist')
