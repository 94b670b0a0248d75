"""Image folders as they are found on bad days: what is ambiguous, and what is left out."""

import logging
import os
import shutil

import numpy as np
import pytest
from conftest import draw, stripes, write_folder
from PIL import Image

from timm_vitres.folders import find_classes, find_splits, split_folder
from timm_vitres.training.datasets import ImageFolder, load_data
from timm_vitres.training.settings import FinetuneCfg


def load(root, **kwargs):
    return load_data(FinetuneCfg(**{'data_dir': root and str(root), 'val_frac': 0.25, **kwargs}), 'RGB')


def names_of(folder) -> list:
    return [os.path.relpath(path, folder.root) for path, _ in folder.samples]


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
        draw(image_folder / name / f'{number}.png', seed=number)
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
    with pytest.raises(ValueError, match=r'^val_split: 5 of 6 validation images are copies of training images'):
        load(tmp_path)
    shutil.rmtree(tmp_path / 'val')
    write_folder(tmp_path / 'val', per_class=3, seed=1)
    shutil.copy(tmp_path / 'train' / 'down' / '1.png', tmp_path / 'val' / 'down' / '0.png')
    data = load(tmp_path)  # a single one is left out of training
    assert len(data.val) == 6 and len(data.train) == 5 and sum(data.counts) == 5
    left_out = {str(tmp_path / 'train/down/1.png'): f'a copy of {tmp_path / "val/down/0.png"}, which is validated on'}
    assert data.left_out == left_out and '5 images of 2 classes' in data.description
    for link in ('symlink_to', 'hardlink_to'):
        path = tmp_path / 'val' / 'down' / 'other.png'
        getattr(path, link)(tmp_path / 'train' / 'down' / '1.png')
        with pytest.raises(ValueError, match=r'1 of 7 validation images are training images, such as .*other\.png'):
            load(tmp_path)
        path.unlink()


def test_a_copy_is_on_one_side_of_a_split(image_folder, caplog):
    """Copies of what is trained on are trained on, as somebody may have wished; a wrong label is told of."""
    for index in range(12):
        for number in range(3):
            shutil.copy(image_folder / 'down' / f'{index}.png', image_folder / 'down' / f'{index} ({number}).png')
    data = load(image_folder, val_frac=0.25)
    paths = [[row[0] for row in data.lists[name]] for name in ('train', 'validation')]
    pictures = [{(image_folder / path).read_bytes() for path in part} for part in paths]
    assert not pictures[0] & pictures[1] and len(paths[1]) == 6 and len(paths[0]) == 9 + 4 * 9
    assert sorted(data.counts) == [9, 36] and len(data.left_out) == 3 * 3
    assert all('a copy of ' in reason and ', which is held out' in reason for reason in data.left_out.values())
    assert f'{6 + 9 + 4 * 9} images of 2 classes' in data.description and 'another class' not in caplog.text
    shutil.copy(image_folder / 'down' / '0.png', image_folder / 'across' / 'wrong.png')
    load(image_folder)
    assert 'data_dir: 4 images are copies of one of another class' in caplog.text or (
        'data_dir: 1 images are copies of one of another class' in caplog.text
    )


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


def test_a_split_is_called_as_it_is_spelt(tmp_path):
    """Where case does not count, 'train' opens a folder that is listed as 'Train'."""
    (tmp_path / 'train').mkdir()
    assert split_folder(tmp_path, ['Train', 'Val'], 'train', 'train_split', 'train') == 'Train'
    assert split_folder(tmp_path, ['TRAIN', 'train'], 'train', 'train_split', 'train') == 'train'
    (tmp_path / 'train' / 'a').mkdir()
    assert split_folder(tmp_path, ['train'], 'train/a', 'train_split', 'train') == 'train/a'


def test_one_file_in_two_classes_is_refused(image_folder):
    (image_folder / 'down' / 'x.png').hardlink_to(image_folder / 'across' / '0.png')
    with pytest.raises(ValueError, match=r'down/x\.png and .*across/0\.png are one file in two classes'):
        ImageFolder(image_folder)


@pytest.mark.parametrize('name', ['images.tar', 'images.zip', 'image.png'])
def test_a_file_is_no_folder(name, tmp_path):
    (tmp_path / name).write_text('')
    hint = '' if name.endswith('png') else '; unpack it'
    with pytest.raises(NotADirectoryError, match=f'{name} is not a folder{hint}'):
        load(tmp_path / name)


@pytest.mark.parametrize('names', [('seg_train', 'seg_test'), ('train_aug', 'valid_aug')])
def test_folders_named_like_splits_in_part_are_no_classes(names, tmp_path):
    """Such as Kaggle's Intel images, unpacked as they come."""
    for name in names:
        write_folder(tmp_path / name / name, per_class=2)
    message = r'^data_dir: .*_(aug|test)/, .*/ in .* are named like splits; name the folders that hold the classes'
    with pytest.raises(ValueError, match=message):
        find_classes(tmp_path)
    assert len(find_classes(tmp_path, any_name=True).names) == 2
    splits = find_splits(tmp_path, f'{names[0]}/{names[0]}', f'{names[1]}/{names[1]}')
    assert splits.train == tmp_path / names[0] / names[0] and splits.validation == tmp_path / names[1] / names[1]


def test_folders_of_classes_named_like_splits_in_part_are_what_the_sentence_says(tmp_path):
    for name in ('my_train', 'my_val'):
        write_folder(tmp_path / name, per_class=2)
    (tmp_path / 'my_val' / 'down').rename(tmp_path / 'my_val' / 'left')
    with pytest.raises(ValueError, match=r'by train_split and val_split, such as my_train;'):
        find_classes(tmp_path)


def test_classes_whose_names_have_such_words_are_classes(tmp_path):
    for name in ('train_station', 'test_tube'):
        (tmp_path / name).mkdir()
        Image.new('RGB', (4, 4)).save(tmp_path / name / '0.png')
    assert find_classes(tmp_path).names == ['test_tube', 'train_station']


def test_a_class_without_images_is_told_why(tmp_path):
    write_folder(tmp_path, per_class=2)
    (tmp_path / 'cat').mkdir()
    for index in range(3):
        (tmp_path / 'cat' / f'IMG_{index}.HEIC').write_bytes(b'no image')
    message = r'class folder .*cat has no image \(3 files or folders in it are left out, such as IMG_0.HEIC: no image'
    with pytest.raises(ValueError, match=message):
        find_classes(tmp_path)


def test_a_models_folder_is_no_class(image_folder):
    draw(image_folder / 'output' / 'curves.png')
    (image_folder / 'output' / 'model.safetensors').write_text('')
    with pytest.raises(ValueError, match='output holds a model and is no class'):
        ImageFolder(image_folder)
