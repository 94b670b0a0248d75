"""No image of the verdict is trained on or chosen by."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import write_folder
from PIL import Image
from test_named_datasets import fashion  # noqa: F401  (a fixture)

from timm_vitres.training import datasets, named_datasets
from timm_vitres.training.datasets import load_data
from timm_vitres.training.reserved import (
    check_unseen,
    for_verdict,
    images_of,
    num_training,
    reserve,
    training_counts,
)
from timm_vitres.training.runs import Record
from timm_vitres.training.settings import FinetuneCfg


def cfg(root, **kwargs):
    return FinetuneCfg(data_dir=str(root), **kwargs)


def names(rows):
    return {row[0] for row in rows}


def by_class(rows):
    return {label: sum(row[1] == label for row in rows) for label in ('across', 'down')}


def test_a_part_of_each_class_is_held_out_for_all_seeds_alike(image_folder):
    images = reserve(cfg(image_folder), 'RGB')
    assert json.loads(json.dumps(images)) == images and images['validation'] is None
    assert by_class(images['test']) == dict(across=3, down=3) and by_class(images['train']) == dict(across=9, down=9)
    assert images == reserve(cfg(image_folder, seed=7, val_frac=0.5), 'RGB')
    assert by_class(reserve(cfg(image_folder), 'RGB', test_frac=0.5)['test']) == dict(across=6, down=6)
    runs = [images_of(images, 0.2, seed) for seed in (0, 1)]
    for run in runs:
        assert by_class(run['validation']) == dict(across=2, down=2)
        assert len(names(run['train']) | names(run['validation']) | names(images['test'])) == 24
        assert len(run['train']) + 4 + 6 == 24 and num_training(images, 0.2, 0) == 14
    assert names(runs[0]['validation']) != names(runs[1]['validation'])
    assert names(for_verdict(images)['validation']) == names(images['test'])


def test_a_run_opens_what_was_reserved(image_folder):
    images = reserve(cfg(image_folder), 'RGB')
    data = load_data(cfg(image_folder), 'RGB', images_of(images, 0.2, 0))
    assert len(data.train) == 14 and len(data.val) == 4 and data.label_names == ['across', 'down']
    seen = load_data(cfg(image_folder), 'RGB', for_verdict(images)).lists['validation']
    assert names(seen) == names(images['test'])


@pytest.mark.parametrize('folder', ['test', 'Test', 'holdout'])
def test_a_folder_of_test_images_is_taken(folder, tmp_path):
    write_folder(tmp_path / 'train', per_class=6)
    write_folder(tmp_path / folder, per_class=2, seed=1)
    images = reserve(cfg(tmp_path), 'RGB')
    assert names(images['test']) == {f'{folder}/{name}/{index}.png' for name in ('across', 'down') for index in (0, 1)}
    assert all(name.startswith('train/') for name in names(images['train'])) and len(images['train']) == 12
    held = reserve(cfg(tmp_path), 'RGB', '')
    assert all(name.startswith('train/') for name in names(held['test'])) and len(held['test']) == 4


def test_a_folder_of_validation_images_stays_that(tmp_path):
    for name, count in (('train', 8), ('val', 3)):
        write_folder(tmp_path / name, per_class=count, seed=count)
    images = reserve(cfg(tmp_path), 'RGB')
    assert len(images['test']) == 4 and all(name.startswith('train/') for name in names(images['test']))
    first, second = (images_of(images, 0.2, seed) for seed in (0, 1))
    assert first == second and {name.split('/')[0] for name in names(first['validation'])} == {'val'}
    assert not names(first['train']) & names(images['test']) and len(first['train']) == 12


def test_test_images_that_are_trained_on_are_refused(tmp_path):
    write_folder(tmp_path / 'train', per_class=4)
    write_folder(tmp_path / 'test', per_class=2, seed=1)
    os.remove(tmp_path / 'test/down/0.png')
    os.link(tmp_path / 'train/down/3.png', tmp_path / 'test/down/0.png')
    with pytest.raises(ValueError, match=r'^test_split: 1 of 4 test images are training images, such as '):
        reserve(cfg(tmp_path), 'RGB')


def test_validation_images_that_are_tested_on_are_called_that(tmp_path):
    write_folder(tmp_path / 'train', per_class=4)
    write_folder(tmp_path / 'val', per_class=2, seed=1)
    with pytest.raises(ValueError, match=r'^test_split: 4 of 4 test images are validation images, such as '):
        reserve(cfg(tmp_path), 'RGB', 'val')


def test_copies_are_told_of_by_the_split_of_the_comparison_alone(tmp_path, caplog):
    write_folder(tmp_path / 'images', per_class=10)
    for index in range(10):
        shutil.copy(tmp_path / f'images/down/{index}.png', tmp_path / f'images/down/{index}copy.png')
    with caplog.at_level('WARNING'):
        images = reserve(cfg(tmp_path / 'images'), 'RGB')
    assert len(images['train']) + len(images['test']) == 20
    assert [record.getMessage().partition(', such as')[0] for record in caplog.records] == [
        'left out: 10 images are copies of others'
    ]
    assert images['description'].endswith('; 10 files or folders left out')


@pytest.mark.parametrize('fraction', [0.5, 0.999])
def test_test_images_leave_two_of_each_class_to_train_and_to_validate_on(fraction, tmp_path):
    write_folder(tmp_path / 'images', per_class=3)
    images = reserve(cfg(tmp_path / 'images'), 'RGB', test_frac=fraction)
    assert len(images['test']) == 2 and len(images['train']) == 4
    assert len(images_of(images, 0.2, 0)['validation']) == 2


@pytest.mark.parametrize('count, least', [(1, 2), (2, 3)])
def test_classes_of_too_few_images_are_named(count, least, tmp_path):
    write_folder(tmp_path / 'images', per_class=count)
    with pytest.raises(ValueError, match=f"class .*'across' has {count} image"):
        reserve(cfg(tmp_path / 'images'), 'RGB')


def test_a_test_image_that_can_not_be_read_is_named(tmp_path):
    write_folder(tmp_path / 'train', per_class=4)
    write_folder(tmp_path / 'test', per_class=2, seed=1)
    (tmp_path / 'test/down/1.png').write_text('no picture')
    with pytest.raises(ValueError, match=r'test/down/1\.png'):
        reserve(cfg(tmp_path), 'RGB')
    assert len(reserve(cfg(tmp_path, skip_bad=True), 'RGB')['test']) == 3


def test_of_a_dataset_by_name_the_test_split_is_taken(fashion):  # noqa: F811
    named = cfg(fashion, dataset='torch/fashion_mnist')
    images = reserve(named, 'L')
    assert images['test']['split'] == 'validation' and images['train']['split'] == 'train'
    assert images_of(images, 0.2, 0) is None and num_training(images, 0.2, 0) == 24
    assert len(load_data(named, 'L', for_verdict(images)).val) == 30
    assert images['description'] == "torch/fashion_mnist, 30 images to train on; test on split 'test' (30 images)"
    with pytest.raises(ValueError, match=r"^val_split: got 'test', but a comparison splits"):
        reserve(cfg(fashion, dataset='torch/fashion_mnist', val_split='test'), 'L')
    for split, message in (('train', "^test_split: 'train' has images of"), ('', "^test_split: got ''")):
        with pytest.raises(ValueError, match=message):
            reserve(named, 'L', split)


def test_test_images_that_carry_no_verdict_are_told_of_at_once(tmp_path):
    write_folder(tmp_path / 'train', per_class=6)
    write_folder(tmp_path / 'test', per_class=2, seed=1)
    for path in (tmp_path / 'test' / 'down').iterdir():
        path.unlink()
    (tmp_path / 'test' / 'down').rmdir()
    assert reserve(cfg(tmp_path), 'RGB')['description'].endswith('test images are the 2 of test/, with none of down')
    (tmp_path / 'test' / 'across' / '1.png').unlink()
    with pytest.raises(ValueError, match=r'^test_split: .* has 1 test image, expected two or more\.'):
        reserve(cfg(tmp_path), 'RGB')


def test_of_many_classes_without_test_images_three_are_named(tmp_path):
    for index in range(6):
        for split, count in (('train', 4), ('test', 2 * (index == 0))):
            for number in range(count):
                place = tmp_path / split / f'class {index}' / f'{number}.png'
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8, 3), 40 * index + number + 20 * (split == 'test'), np.uint8)).save(place)
    description = reserve(cfg(tmp_path), 'RGB')['description']
    assert description.endswith('with none of class 1, class 2, class 3 and 2 more')


def test_what_a_dataset_by_name_has_no_test_images_of_is_told_of(fashion, monkeypatch):  # noqa: F811
    original = named_datasets._known
    monkeypatch.setattr(named_datasets, '_known', lambda *args: [min(label, 8) for label in original(*args)])
    named = cfg(fashion, dataset='torch/fashion_mnist')
    images = reserve(named, 'L')
    assert images['description'].endswith(f'with none of {images["label_names"][9]}')
    assert training_counts(images, 0.2, 0) == images['counts'] and sum(images['counts']) == 30


def test_no_copy_of_a_test_image_is_trained_on(tmp_path, caplog):
    write_folder(tmp_path / 'train', per_class=8)
    write_folder(tmp_path / 'test', per_class=2, seed=1)
    shutil.copy(tmp_path / 'test/down/0.png', tmp_path / 'train/down/a.png')
    shutil.copy(tmp_path / 'train/down/0.png', tmp_path / 'train/down/b.png')
    images = reserve(cfg(tmp_path), 'RGB')
    assert len(images['train']) == 16 and not {'train/down/a.png', 'train/down/b.png'} & names(images['train'])
    assert 'left out: 2 images are copies of others' in caplog.text
    held = reserve(cfg(tmp_path), 'RGB', '')  # without a folder of test images
    pictures = [{(tmp_path / name).read_bytes() for name in names(held[part])} for part in ('train', 'test')]
    assert not pictures[0] & pictures[1] and len(pictures[0]) + len(pictures[1]) == 17
    shutil.copytree(tmp_path / 'test/across', tmp_path / 'train/across', dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r'^test_split: 3 of 4 test images are copies of training images'):
        reserve(cfg(tmp_path), 'RGB')


def test_test_images_count_once(tmp_path, caplog):
    """A verdict rests on images that are independent of each other."""
    write_folder(tmp_path / 'train', per_class=8)
    write_folder(tmp_path / 'test', per_class=3, seed=1)
    for number in range(4):
        shutil.copy(tmp_path / 'test/down/0.png', tmp_path / f'test/down/0 ({number}).png')
    images = reserve(cfg(tmp_path), 'RGB')
    assert len(images['test']) == 6 and 'left out: 4 images are copies of others' in caplog.text
    assert 'test images are the 6 of test/' in images['description']


def test_what_is_left_out_is_named_and_counted(tmp_path, caplog):
    for split, per_class in (('train', 8), ('val', 4), ('test', 4)):
        write_folder(tmp_path / split, per_class=per_class, seed=len(split))
        (tmp_path / split / 'down' / 'phone.heic').write_bytes(b'no image here')
    (tmp_path / 'test' / 'down' / '0.png').write_bytes(b'no image')
    (tmp_path / 'train' / 'down' / '0.png').write_bytes(b'no image')
    description = reserve(cfg(tmp_path, skip_bad=True), 'RGB')['description']
    assert description.endswith('test images are the 7 of test/; 5 files or folders left out')
    told = [text for text in caplog.messages if text.startswith('left out: ')]
    assert len(told) == 5 and sum('phone.heic' in text for text in told) == 3


def test_validation_images_that_are_all_copies_of_test_images_are_refused(tmp_path):
    for split, per_class, seed in (('train', 8, 0), ('test', 6, 1)):
        write_folder(tmp_path / split, per_class=per_class, seed=seed)
    for name in ('across', 'down'):
        (tmp_path / 'val' / name).mkdir(parents=True)
        for index in range(2):
            shutil.copy(tmp_path / 'test' / name / f'{index}.png', tmp_path / 'val' / name)
    with pytest.raises(ValueError, match=r'^val_split: all 4 validation images are copies of test images, such as'):
        reserve(cfg(tmp_path), 'RGB')


def test_of_many_images_those_of_the_verdict_are_opened_first(tmp_path, monkeypatch):
    write_folder(tmp_path, per_class=12)
    for path in (tmp_path / 'down').iterdir():
        path.write_bytes(path.read_bytes()[:60])
    monkeypatch.setattr(datasets, 'MANY', 10)
    with pytest.raises(ValueError, match=r'^image: .* cannot be read as an image'):
        reserve(cfg(tmp_path), 'RGB')


def write_run(folder, settings, **kwargs):
    """Write the record of a run on images, which is all that is left of it."""
    folder.mkdir()
    Record(settings, load_data(settings, 'RGB').record(), {}, **kwargs).write(folder)
    return f'local-dir:{folder}'


def test_a_model_that_knows_test_images_is_refused(tmp_path):
    photos = write_folder(tmp_path / 'photos', per_class=12)
    images = reserve(cfg(photos), 'RGB')
    known = write_run(tmp_path / 'known', cfg(photos))  # trained and chosen by all of the same photographs
    with pytest.raises(
        ValueError, match=r'^models: local-dir:.*known learnt from 6 of the 6 test images, or was chosen'
    ):
        check_unseen(cfg(photos), known, images)
    later = write_run(tmp_path / 'later', cfg(write_folder(tmp_path / 'others', seed=5), model=known))
    with pytest.raises(ValueError, match='later learnt from 6 of the 6'):
        check_unseen(cfg(photos), later, images)
    by_file = cfg(tmp_path / 'others', pretrained_path=str(tmp_path / 'known' / 'model.safetensors'))
    with pytest.raises(ValueError, match='learnt from 6 of the 6'):
        check_unseen(cfg(photos), write_run(tmp_path / 'by_file', by_file), images)


def test_copies_of_test_images_under_other_names_are_known_too(tmp_path):
    photos = write_folder(tmp_path / 'photos', per_class=12)
    images = reserve(cfg(photos), 'RGB')
    others = write_folder(tmp_path / 'others', seed=5)
    shutil.copy(photos / images['test'][0][0], others / 'down' / 'copy.png')
    known = write_run(tmp_path / 'known', cfg(others))
    with pytest.raises(ValueError, match=f'learnt from 1 of the 6 test images.*{images["test"][0][0]}'):
        check_unseen(cfg(photos), known, images)


def test_a_model_that_moved_with_its_photographs_is_known(tmp_path):
    photos = write_folder(tmp_path / 'photos', per_class=12)
    known = write_run(tmp_path / 'known', cfg(photos))
    photos.rename(tmp_path / 'moved')
    with pytest.raises(ValueError, match='learnt from 6 of the 6'):
        check_unseen(cfg(tmp_path / 'moved'), known, reserve(cfg(tmp_path / 'moved'), 'RGB'))


def test_a_model_that_has_not_seen_test_images_goes_in(tmp_path):
    photos = write_folder(tmp_path / 'photos', per_class=12)
    images = reserve(cfg(photos), 'RGB')
    check_unseen(cfg(photos), write_run(tmp_path / 'others', cfg(write_folder(tmp_path / 'data', seed=5))), images)
    check_unseen(cfg(photos), str(tmp_path / 'others'), images)  # no local-dir: stands before it
    same_names = write_folder(tmp_path / 'same_names', per_class=12, seed=9, size=40)
    moved = write_run(tmp_path / 'of_other_photos', cfg(same_names))
    shutil.rmtree(same_names)
    check_unseen(cfg(photos), moved, images)
    check_unseen(cfg(photos), f'local-dir:{tmp_path}', images)  # no run
    settings = cfg(photos)
    folder = tmp_path / 'compared'
    folder.mkdir()
    Record(settings, images_of(images, 0.2, 0), {}).write(folder)  # a run of this comparison
    check_unseen(settings, f'local-dir:{folder}', images)


def test_test_images_that_are_copies_of_each_other_are_not_known_by_that(tmp_path):
    write_folder(tmp_path / 'photos' / 'train', per_class=8)
    test = write_folder(tmp_path / 'photos' / 'test', per_class=3, seed=2)
    shutil.copy(test / 'down' / '0.png', test / 'down' / 'again.png')
    images = reserve(cfg(tmp_path / 'photos'), 'RGB')
    others = write_run(tmp_path / 'others', cfg(write_folder(tmp_path / 'data', seed=5)))
    check_unseen(cfg(tmp_path / 'photos'), others, images)


def test_of_a_dataset_by_name_indices_tell(fashion, tmp_path):  # noqa: F811
    settings = FinetuneCfg(data_dir=str(fashion), dataset='torch/fashion_mnist')
    images = reserve(settings, 'L')
    ours = FinetuneCfg(data_dir=str(fashion), dataset='torch/fashion_mnist', val_split='')
    check_unseen(settings, write_run(tmp_path / 'train', ours), images)
    theirs = FinetuneCfg(data_dir=str(fashion), dataset='torch/fashion_mnist', val_split='validation')
    count = images['test']['count']
    with pytest.raises(ValueError, match=f'learnt from {count} of the {count} test images, or was chosen by them; '):
        check_unseen(settings, write_run(tmp_path / 'both', theirs), images)
