"""Image folders as they are found on bad days, named datasets, and the record of a run's images."""

import json
import logging
import os
import random
import threading

import numpy as np
import pytest
import torch
from conftest import stripes, write_folder
from PIL import features

from timm_vitres.datasets import ImageFolder, load_data, stratified_split
from timm_vitres.settings import FinetuneCfg


def cfg(root, **kwargs) -> FinetuneCfg:
    return FinetuneCfg(**{'data_dir': root and str(root), 'val_frac': 0.25, **kwargs})


def load(root, recorded=None, **kwargs):
    return load_data(cfg(root, **kwargs), 'RGB', recorded)


def draw(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes(16, True, np.random.default_rng(seed)).save(path)
    return path


def names_of(folder) -> list:
    return [os.path.relpath(path, folder.reader.root) for path, _ in folder.reader.samples]


# Folders that are as they should be


def test_image_folder(image_folder):
    folder = ImageFolder(image_folder)
    assert folder.classes == ['across', 'down'] and len(folder) == 24 and folder.targets.count(0) == 12
    image, target = folder[0]
    assert image.mode == 'RGB' and target == 0
    assert folder.filename(0) == 'across/0.png' and folder.filename(0, basename=True) == '0.png'
    assert folder.filename(0, absolute=True) == str(image_folder / 'across' / '0.png')


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


def test_bad_images_are_named_or_skipped(image_folder):
    bad = image_folder / 'down' / '3.png'
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(ValueError, match=r'3\.png.*--skip-bad'):
        ImageFolder(image_folder)
    folder = ImageFolder(image_folder, skip_bad=True)
    assert len(folder) == 23 and folder.skipped == [str(bad)]
    assert folder.left_out[str(bad)].startswith('cannot be read as an image (')
    for path in (image_folder / 'down').iterdir():
        path.write_text('')
    with pytest.raises(ValueError, match="class 'down'"):
        ImageFolder(image_folder, skip_bad=True)


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
        folder = ImageFolder(tmp_path, check=False)
        assert sorted(folder.classes) == sorted(expected)
        assert [name for name in folder.classes if name.isascii()] == expected[:5]
        assert [name for name in names_of(folder) if 'class 09' in name] == [
            'class 09/09.png',
            'class 09/9.png',
            'class 09/10.png',
        ]


def test_thousands_of_classes(tmp_path):
    image = draw(tmp_path / 'image.png').read_bytes()
    for index in range(3000):
        (tmp_path / 'images' / f'n{index}').mkdir(parents=True)
        (tmp_path / 'images' / f'n{index}' / 'x.png').write_bytes(image)
    folder = ImageFolder(tmp_path / 'images', check=False)
    assert folder.classes == [f'n{index}' for index in range(3000)] and folder.targets == list(range(3000))


# What is ambiguous is refused or said


def test_nested_folders_are_of_their_class_and_said(image_folder, caplog):
    """They were classes of their own, by the name of the innermost folder."""
    draw(image_folder / 'down' / 'monday' / 'early' / 'a.png')
    with caplog.at_level(logging.WARNING):
        folder = ImageFolder(image_folder)
    assert folder.classes == ['across', 'down'] and len(folder) == 25
    assert folder.targets[names_of(folder).index('down/monday/early/a.png')] == 1
    assert '1 of 25 images' in caplog.text and 'down/monday/early/a.png' in caplog.text


def test_one_folder_in_each_class_folder(tmp_path):
    """Tiny ImageNet has n.../images/*; by their innermost folders they would be one class."""
    for name in ('n1', 'n2'):
        draw(tmp_path / name / 'images' / 'a.png')
        (tmp_path / name / 'boxes.txt').write_text('')
    folder = ImageFolder(tmp_path)
    assert folder.classes == ['n1', 'n2'] and len(folder.left_out) == 2


@pytest.mark.parametrize(
    'paths, message',
    [
        (['cat/dog/1.png', 'cat/2.png', 'dog/1.png'], r"cat holds the folder 'dog', named like a class"),
        (['cat/a/Dog/1.png', 'dog/1.png'], r"cat holds the folder 'Dog', named like a class"),
        (['cat/train/1.png', 'dog/train/1.png'], r"cat holds the folder 'train', named like a split"),
        (['a/cat/1.png', 'a/dog/1.png', 'b/cat/2.png', 'b/dog/2.png'], 'either could be the classes'),
        (['images/cat/1.png', 'images/dog/2.png'], 'either could be the classes'),
        (['cat/1.png', 'Cat/2.png', 'dog/1.png'], r"folders 'Cat' and 'cat', which are one folder"),
        (['caf\u00e9/1.png', 'cafe\u0301/2.png'], 'which are one folder'),
        (['a\nb/1.png', 'c/1.png'], r'a\\nb has a name that is no text'),
        (['a\udcff/1.png', 'c/1.png'], r'a\\udcff has a name that is no text'),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(paths, message, tmp_path):
    for path in paths:
        draw(tmp_path / 'data' / path)
    for read in (ImageFolder, load):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / 'data')
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize('name', ['val', 'Val', 'VALID', 'val2017', 'test', 'Test-Set', 'eval', 'validation_images'])
def test_split_folders_beside_class_folders_are_refused(name, image_folder):
    draw(image_folder / name / 'a.png')
    for read in (ImageFolder, load):
        with pytest.raises(ValueError, match=f'{name}/ beside across/, down/, named like a split'):
            read(image_folder)


@pytest.mark.parametrize('name', ['train', 'Train', 'training', 'train2017'])
def test_a_training_folder_beside_class_folders_is_refused(name, image_folder):
    for number in range(2):
        draw(image_folder / name / f'{number}.png')
    with pytest.raises(ValueError, match=f"split folder {name}/ beside across/.*train_split ''"):
        load(image_folder)
    # a vehicle is said to be one
    data = load(image_folder, train_split='')
    assert data.label_names == ['across', 'down', name] and len(data.train) + len(data.val) == 26


@pytest.mark.parametrize(
    'train, val', [('train', 'val'), ('Train', 'Val'), ('training', 'validation'), ('TRAIN', 'eval'), ('train', 'dev')]
)
def test_split_folders_by_other_names(train, val, tmp_path):
    write_folder(tmp_path / train, per_class=5)
    write_folder(tmp_path / val, per_class=3, size=41)
    write_folder(tmp_path / 'test', per_class=2)
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes.txt').write_text('')
    data = load(tmp_path)
    assert (len(data.train), len(data.val), data.label_names) == (10, 6, ['across', 'down'])
    assert f'validation on the 6 images of {val}/; 3 files or folders left out' in data.description
    assert data.left_out == {
        str(tmp_path / 'notes'): 'a folder without images',
        str(tmp_path / 'notes.txt'): 'outside the folders of the splits',
        str(tmp_path / 'test'): 'a folder that this run does not use, with 4 files',
    }
    # a class may have the name of a split where the splits are folders
    draw(tmp_path / train / 'train' / '0.png')
    assert load(tmp_path).label_names == ['across', 'down', 'train']


def test_splits_that_are_no_splits(tmp_path):
    write_folder(tmp_path / 'val', per_class=2)
    with pytest.raises(ValueError, match='holds val/, named like a split, but no folder train/'):
        load(tmp_path)
    write_folder(tmp_path / 'train', per_class=2, size=41)
    for kwargs, message in (
        (dict(val_split='train'), "val_split: got 'train', the same as train_split"),
        (dict(val_split='training'), 'train/ and train/ in .* are the same folder'),
        (dict(val_split='fold2'), "val_split: .* has no folder 'fold2'"),
        (dict(train_split='fold1'), "train_split: .* has no folder 'fold1'"),
        (dict(train_split='../data'), "train_split: got '../data', expected the name of a folder"),
        (dict(val_split='/tmp'), "val_split: got '/tmp', expected the name of a folder"),
        (dict(train_split='', val_split='val'), "val_split: 'val' is a folder, but train_split ''"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load(tmp_path, **kwargs)
    # folders of any name, where they are named
    (tmp_path / 'train').rename(tmp_path / 'fold1')
    (tmp_path / 'val').rename(tmp_path / 'fold2')
    write_folder(tmp_path / 'fold3', per_class=2)
    data = load(tmp_path, train_split='fold1', val_split='fold2')
    assert len(data.train) == len(data.val) == 4 and list(data.left_out) == [str(tmp_path / 'fold3')]


def test_a_copy_or_a_link_of_the_training_images_validates_nothing(tmp_path):
    write_folder(tmp_path / 'train', per_class=3)
    (tmp_path / 'val').symlink_to('train')
    with pytest.raises(ValueError, match='are the same folder'):
        load(tmp_path)
    (tmp_path / 'val').unlink()
    write_folder(tmp_path / 'val', per_class=3)
    with pytest.raises(ValueError, match='is a copy of'):
        load(tmp_path)
    stripes(33, True, np.random.default_rng(7)).save(tmp_path / 'val' / 'down' / '0.png')
    assert len(load(tmp_path).val) == 6
    for link in ('symlink_to', 'hardlink_to'):
        path = tmp_path / 'val' / 'down' / 'other.png'
        getattr(path, link)(tmp_path / 'train' / 'down' / '1.png')
        with pytest.raises(ValueError, match=r'1 of 7 validation images are training images, such as .*other\.png'):
            load(tmp_path)
        path.unlink()


def test_a_validation_folder_that_lacks_a_class(tmp_path):
    """By torchvision's folder reader 'down' would get the number of 'across'."""
    write_folder(tmp_path / 'train', per_class=3)
    draw(tmp_path / 'val' / 'down' / 'a.png')
    for dataset in ('', 'folder', 'image_folder', 'ImageFolder', 'torch/folder', 'torch/image_folder'):
        data = load(tmp_path, dataset=dataset)
        assert data.label_names == ['across', 'down'] and data.val[0][1] == 1
        assert data.record() == load(tmp_path).record()
    with pytest.raises(ValueError, match='data_dir: no folder given'):
        load(None, dataset='folder')


# What is left out is counted and named


def test_everything_that_is_left_out_is_named(image_folder, tmp_path):
    down = image_folder / 'down'
    (down / 'notes.txt').write_text('')
    (down / 'no_suffix').write_bytes((down / '0.png').read_bytes())
    (down / '.hidden.png').write_bytes((down / '0.png').read_bytes())
    (down / 'dangling.png').symlink_to('gone.png')
    (down / 'twin.png').hardlink_to(down / '1.png')
    (down / 'link.png').symlink_to('2.png')
    os.mkfifo(down / 'pipe.png')
    draw(image_folder / '.thumbs' / 'a.png')
    draw(image_folder / '__MACOSX' / 'down' / 'a.png')
    (image_folder / 'README.md').write_text('')
    (down / 'bad.png').write_text('')
    data = load(image_folder, skip_bad=True)
    assert len(data.train) + len(data.val) == 24
    reasons = {os.path.relpath(path, image_folder): reason for path, reason in data.left_out.items()}
    assert reasons.pop('down/bad.png').startswith('cannot be read as an image')
    assert reasons == {
        '.thumbs': 'hidden, with 1 file',
        '__MACOSX': 'hidden, with 1 file',
        'README.md': 'no image, by its suffix',
        'down/.hidden.png': 'hidden',
        'down/dangling.png': 'a link to nothing (gone.png)',
        'down/link.png': f'the same file as {down}/2.png',
        'down/no_suffix': 'no image, by its suffix',
        'down/notes.txt': 'no image, by its suffix',
        'down/pipe.png': 'no regular file',
        'down/twin.png': f'the same file as {down}/1.png',
    }
    assert data.description.endswith('; 11 files or folders left out')
    assert f'{down}/notes.txt: no image, by its suffix' in data.skipped and len(data.skipped) == 11
    for index in range(1000):
        (down / f'{index}.xml').write_text('')
    data = load(image_folder, skip_bad=True)
    assert len(data.left_out) == 1011 and '993 more: no image, by its suffix' in data.skipped
    assert len(data.skipped) == 11 - 3 + 10 + 1


def test_links_in_circles_and_to_other_folders(image_folder, tmp_path):
    outside = write_folder(tmp_path / 'outside', per_class=2)
    (image_folder / 'down' / 'up').symlink_to(image_folder)
    (image_folder / 'down' / 'top').symlink_to('/')
    (image_folder / 'down' / 'self').symlink_to('self')
    (image_folder / 'across' / 'other').symlink_to(image_folder / 'down')
    (image_folder / 'linked').symlink_to(outside / 'down')  # a class may be elsewhere
    (outside / 'down' / 'back').symlink_to(image_folder / 'across')
    folder = ImageFolder(image_folder)
    assert folder.classes == ['across', 'down', 'linked'] and np.bincount(folder.targets).tolist() == [12, 12, 2]
    reasons = {os.path.relpath(path, image_folder): reason for path, reason in folder.left_out.items()}
    assert reasons == {
        'across/other': f'a link to {image_folder}/down, which is read already',
        'down/self': 'a link to nothing (self)',
        'down/top': 'a link that leads in a circle',
        'down/up': 'a link that leads in a circle',
        'linked/back': f'a link to {image_folder}/across, which is read already',
    }
    (image_folder / 'again').symlink_to('down')
    with pytest.raises(ValueError, match=r'again has no image, since it is a link to .*down, which is read already'):
        ImageFolder(image_folder)


def test_one_file_in_two_classes_is_refused(image_folder):
    (image_folder / 'down' / 'x.png').hardlink_to(image_folder / 'across' / '0.png')
    with pytest.raises(ValueError, match=r'down/x\.png and .*across/0\.png are one file in two classes'):
        ImageFolder(image_folder)


def test_a_folder_that_cannot_be_read_is_named(image_folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('down'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(PermissionError, match=r'the folder .*down cannot be read \(Permission denied\)'):
        ImageFolder(image_folder)


@pytest.mark.parametrize('name', ['images.tar', 'images.zip', 'image.png'])
def test_a_file_is_no_folder(name, tmp_path):
    (tmp_path / name).write_text('')
    hint = '' if name.endswith('png') else '; unpack it'
    with pytest.raises(NotADirectoryError, match=f'{name} is not a folder{hint}'):
        load(tmp_path / name)


def test_a_models_folder_is_no_class(image_folder):
    draw(image_folder / 'output' / 'curves.png')
    (image_folder / 'output' / 'model.safetensors').write_text('')
    with pytest.raises(ValueError, match='output holds a model and is no class'):
        ImageFolder(image_folder)


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

    monkeypatch.setattr('timm_vitres.datasets.open_image', open_slowly)
    for index in range(200):
        (image_folder / 'down' / f'{index}.png').write_text('')
    with pytest.raises(KeyboardInterrupt):
        ImageFolder(image_folder)
    assert len(opened) < 100


# Splitting


def test_stratified_split():
    targets = [0] * 10 + [1] * 5 + [2] * 2
    first, second = stratified_split(targets, 0.2)
    assert sorted(first + second) == list(range(17))
    assert [[targets[i] for i in second].count(c) for c in (0, 1, 2)] == [2, 1, 1]
    assert stratified_split(targets, 0.2) == (first, second) != stratified_split(targets, 0.2, seed=1)
    with pytest.raises(ValueError, match='class 1 has 1 image'):
        stratified_split([0, 0, 1], 0.5)
    for fraction in (1.0, 0.0, -0.1, float('nan'), float('inf'), '0.2', None):
        with pytest.raises(ValueError, match='val_frac: got'):
            stratified_split(targets, fraction)
    with pytest.raises(ValueError, match='seed: got -1'):
        stratified_split(targets, 0.2, seed=-1)


# The record of a run


def paths_of(data) -> tuple:
    samples = [[part.dataset.reader.samples[index] for index in part.indices] for part in (data.train, data.val)]
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
    assert [target for _, target in load(image_folder, recorded).val.dataset.reader.samples[:1]] == [1]


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


def test_images_that_became_unreadable_are_named(image_folder):
    recorded = load(image_folder).record()
    bad = image_folder / 'down' / '3.png'
    bad.write_bytes(bytes(bad.stat().st_size))
    with pytest.raises(ValueError, match=r'3\.png cannot be read .*It could be read when the run began'):
        load(image_folder, recorded, skip_bad=True)
    assert len(load(image_folder, recorded, no_check=True).train) == 18


def test_what_is_no_record(image_folder):
    recorded = load(image_folder).record()
    for wrong in (
        {},
        [],
        {**recorded, 'train': {}},
        {**recorded, 'train': [['across/0.png', 'across']]},
        {**recorded, 'train': [['across/0.png', 'sideways', 3]]},
        {**recorded, 'label_names': None},
        {**recorded, 'train': recorded['train'] + recorded['validation'][:1]},
    ):
        with pytest.raises(ValueError, match='recorded: '):
            load(image_folder, wrong)
    with pytest.raises(ValueError, match='recorded: the run was not on a named dataset'):
        load(image_folder, recorded, dataset='torch/mnist')


# Named datasets


@pytest.fixture
def fashion(tmp_path):
    """FashionMNIST's files, with 30 and 30 images."""
    idx = tmp_path / 'FashionMNIST' / 'raw'
    idx.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 30), ('t10k', 30)):
        pixels = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator).numpy().tobytes()
        sizes = b''.join(number.to_bytes(4, 'big') for number in (count, 28, 28))
        (idx / f'{split}-images-idx3-ubyte').write_bytes(b'\x00\x00\x08\x03' + sizes + pixels)
        labels = bytes(index % 10 for index in range(count))
        (idx / f'{split}-labels-idx1-ubyte').write_bytes(b'\x00\x00\x08\x01' + count.to_bytes(4, 'big') + labels)
    return tmp_path


def test_names_without_a_prefix_are_refused(image_folder):
    """timm opened the image folder by them, once for training and once more for validation."""
    for name, hint in (
        ('cifar10', "did you mean 'torch/cifar10'"),
        ('CIFAR100', "did you mean 'torch/cifar100'"),
        ('FashionMNIST', "did you mean 'torch/fashion_mnist'"),
        ('tv/mnist', "did you mean 'torch/mnist'"),
        ('beans', 'a name begins with torch/, hfds/'),
        ('torch/', 'a name begins with torch/'),
    ):
        with pytest.raises(ValueError, match=f'dataset: got {name!r}; {hint}'):
            load(image_folder, dataset=name)
    with pytest.raises(ValueError, match='data_dir: no folder given'):
        load(None, dataset='torch/cifar10')


@pytest.mark.parametrize(
    'train, val, message',
    [
        ('train', 'train', "val_split: 'train' has images of the train_split 'train'"),
        ('train', 'training', "val_split: 'training' has images of the train_split 'train'"),
        ('test', 'validation', "val_split: 'validation' has images of the train_split 'test'"),
        ('trian', 'validation', "train_split: got 'trian', but 'torch/fashion_mnist' has"),
        ('train[:50%]', 'validation', r"train_split: got 'train\[:50%\]'"),
        ('', 'validation', "train_split: got ''"),
    ],
)
def test_a_named_dataset_is_never_validated_on_what_it_trains_on(train, val, message, fashion):
    with pytest.raises(ValueError, match=message):
        load(fashion, dataset='torch/fashion_mnist', train_split=train, val_split=val)


def test_two_splits_with_the_same_images(fashion):
    raw = fashion / 'FashionMNIST' / 'raw'
    for kind in ('images-idx3', 'labels-idx1'):
        (raw / f't10k-{kind}-ubyte').write_bytes((raw / f'train-{kind}-ubyte').read_bytes())
    with pytest.raises(ValueError, match="'validation' of 'torch/fashion_mnist' has the same images as 'train'"):
        load(fashion, dataset='torch/fashion_mnist')


def test_splits_by_slices_are_compared():
    from timm_vitres.named_datasets import _overlap

    for first, second, same in (
        ('train', 'train[:10%]', True),
        ('train[:80%]', 'train[80%:]', False),
        ('train[:80%]', 'train[70%:]', True),
        ('train[100:]', 'train[:100]', False),
        ('train[:100]', 'train[90%:]', True),
        ('train[:100]', 'test[:100]', False),
        ('train+test', 'train+test', True),
        ('train', 'validation', False),
    ):
        assert _overlap(first, second) == _overlap(second, first) == same


def test_any_spelling_of_a_split_is_the_one_that_is_meant(fashion):
    """timm reads the test images for 'Train'."""
    expected = load(fashion, dataset='torch/fashion_mnist')
    data = load(fashion, dataset='torch/fashion_mnist', train_split='Train', val_split='TEST')
    assert data.record()['train'] == expected.record()['train']
    assert data.train.dataset.train and not data.val.dataset.train


def test_a_record_of_a_named_dataset(fashion):
    for kwargs in (dict(val_split=''), {}):
        data = load(fashion, dataset='torch/fashion_mnist', seed=1, **kwargs)
        recorded = json.loads(json.dumps(data.record()))
        again = load(fashion, recorded, dataset='torch/fashion_mnist', seed=2, val_frac=0.5, val_split='')
        assert again.record() == data.record() and again.counts == data.counts
        for part, other in ((again.train, data.train), (again.val, data.val)):
            assert part.indices == other.indices
            for index in (0, len(part) - 1):
                assert np.array_equal(np.asarray(part[index][0]), np.asarray(other[index][0]))
    labels = fashion / 'FashionMNIST' / 'raw' / 'train-labels-idx1-ubyte'
    labels.write_bytes(labels.read_bytes()[:-1] + b'\0')
    with pytest.raises(ValueError, match=r"split 'train', is not what the run began with: its labels_sha256"):
        load(fashion, recorded, dataset='torch/fashion_mnist')


def test_what_timm_raises_is_one_sentence(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr('timm_vitres.named_datasets.create_dataset', fails)
    for error in (ImportError('no datasets'), KeyError('split'), TypeError('a\nb'), AssertionError()):
        with pytest.raises(
            ValueError, match=r"dataset: 'hfds/beans', split 'train', cannot be opened \(.+\)"
        ) as caught:
            load(tmp_path, dataset='hfds/beans')
        assert len(str(caught.value).splitlines()) == 1
