"""One set of images becomes two, and a record brings both back."""

import json

import numpy as np
import pytest
from PIL import Image

from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.splits import (
    Data,
    Subset,
    class_counts,
    read_record,
    stratified_split,
)


def test_stratified_split():
    targets = [0] * 10 + [1] * 5 + [2] * 2
    first, second = stratified_split(targets, 0.2)
    assert sorted(first + second) == list(range(17))
    assert [[targets[i] for i in second].count(c) for c in (0, 1, 2)] == [2, 1, 1]
    assert stratified_split(targets, 0.2) == (first, second) != stratified_split(targets, 0.2, seed=1)
    with pytest.raises(ValueError, match='class 1 has 1 image'):
        stratified_split([0, 0, 1], 0.5)


def test_an_image_that_cannot_be_used_is_named_by_its_number():
    line = Image.new('L', (1000, 1))
    images = Subset([(line.resize((8, 8)), 0), (line, 1)], [1], 'RGB')
    with pytest.raises(ValueError, match=r'dataset: image 1: .*it has 1000 x 1 pixels'):
        images[0]


@pytest.mark.parametrize('fraction', [0.01, 0.3, 0.5, 0.99])
def test_every_class_is_in_both_parts(fraction):
    """Each image is in one part; each class is split by the fraction, but leaves one image on either side."""
    rng = np.random.default_rng(0)
    targets = rng.permutation(np.repeat([0, 1, 2, 5], [2, 3, 40, 100]))
    first, second = stratified_split(targets, fraction, seed=3)
    assert first == sorted(first) and second == sorted(second) and sorted(first + second) == list(range(145))
    for label, count in ((0, 2), (1, 3), (2, 40), (5, 100)):
        expected = min(max(round(count * fraction), 1), count - 1)
        assert [(targets[part] == label).sum() for part in (first, second)] == [count - expected, expected]


def test_a_split_is_drawn_anew_for_each_class():
    _, second = stratified_split([0] * 50 + [1] * 50, 0.3)
    chosen = [[index % 50 for index in second if index // 50 == label] for label in (0, 1)]
    assert chosen[0] != chosen[1] and chosen[0] != list(range(15))


def test_a_class_with_one_image_is_called_by_its_name():
    with pytest.raises(ValueError, match=r"^val_frac: class 'dog' has 1 image, which cannot be split in two; add some"):
        stratified_split([0, 0, 1], 0.5, names=['cat', 'dog'])


@pytest.mark.parametrize('fraction', [1.0, 0.0, -0.1, float('nan'), float('inf'), '0.2', None])
def test_fractions_and_seeds_are_checked(fraction):
    with pytest.raises((ValueError, TypeError), match=r'^val_frac: got .*, expected'):
        FinetuneCfg(data_dir='x', val_frac=fraction)
    with pytest.raises(ValueError, match=r'^seed: got -1, expected'):
        FinetuneCfg(data_dir='x', seed=-1)


def test_of_paths_left_out_for_one_reason_ten_are_named():
    left_out = {**{f'{index}.txt': 'no image, by its suffix' for index in range(25)}, 'copy.png': 'a copy of first.png'}
    sentences = Data(None, None, [], None, '', left_out, {}).skipped
    assert sentences[0] == '0.txt: no image, by its suffix' and sentences[10] == '15 more: no image, by its suffix'
    assert sentences[11:] == ['copy.png: a copy of first.png']


def test_classes_are_counted_by_index():
    assert class_counts([2, 0, 2, 2], 4) == [1, 0, 3, 0]


def test_a_subset_has_its_own_images_in_its_own_mode():
    images = [(Image.new('RGB', (2, 2), (value, 0, 0)), value) for value in (0, 100, 200)]
    subset = Subset(images, (2, 0), 'L')
    assert len(subset) == 2 and [target for _, target in subset] == [200, 0]
    image, _ = subset[0]
    assert image.mode == 'L' and image.getpixel((0, 0)) == round(200 * 0.299)
    subset.transform = lambda image: image.getpixel((1, 1))
    assert subset[1] == (0, 0) and subset[0] == (round(200 * 0.299), 200)
    assert Subset(images, [1])[0][0].getpixel((0, 0)) == (100, 0, 0)


def data(**kwargs) -> Data:
    options = dict(label_names=['cat', 'dog'], counts=None, description='2 images', left_out={}, lists={})
    return Data(None, None, **{**options, **kwargs})


def test_what_is_left_out_is_said_up_to_ten_times_for_a_reason():
    left_out = {f'notes{index}.txt': 'no image, by its suffix' for index in range(12)}
    left_out = {'a\nb.png': 'hidden', **left_out, 'c.png': 'hidden'}
    sentences = data(left_out=left_out).skipped
    assert sentences[:2] == [r'a\nb.png: hidden', 'c.png: hidden']
    assert sentences[2:12] == [f'notes{index}.txt: no image, by its suffix' for index in range(10)]
    assert sentences[12:] == ['2 more: no image, by its suffix']
    assert data().skipped == []


FILES = dict(train=[['cat/1.png', 'cat', 5], ['dog/1.png', 'dog', 5]], validation=[['cat/2.png', 'cat', 6]])
NAMED = dict(train=dict(split='train', count=3), validation=dict(split='test', count=2))


@pytest.mark.parametrize('lists, kind', [(FILES, list), (NAMED, dict)])
def test_a_record_is_read_as_it_was_written(lists, kind):
    recorded = json.loads(json.dumps(data(lists=lists).record()))
    assert recorded == dict(label_names=['cat', 'dog'], description='2 images', **lists)
    assert read_record(recorded, kind) == lists


def changed(**kwargs):
    return {**data(lists=FILES).record(), **kwargs}


@pytest.mark.parametrize(
    'recorded, message',
    [
        (None, 'the record of the images lacks'),
        ([], 'the record of the images lacks'),
        ({}, "the record of the images lacks 'train'"),
        (dict(FILES), "the record of the images lacks 'label_names'"),
        (changed(train={}), 'the run was not on an image folder, or its record of the images is damaged'),
        (changed(label_names='catdog'), 'the run was not on an image folder'),
        (changed(description=None), 'the run was not on an image folder'),
        (changed(train=[['cat/1.png', 'cat']]), 'the run was not on an image folder'),
        (changed(train=['abc']), 'the run was not on an image folder'),
        (changed(train=[[1, 'cat', 5]]), 'the run was not on an image folder'),
        (changed(train=[['owl/1.png', 'owl', 5]]), 'the run was not on an image folder'),
        (changed(validation=[['/cat/1.png', 'cat', 5]]), 'the run was not on an image folder'),
        (changed(validation=[['cat/../../1.png', 'cat', 5]]), 'the run was not on an image folder'),
    ],
)
def test_a_record_that_is_damaged_is_refused(recorded, message):
    with pytest.raises(ValueError, match=f'^recorded: {message}'):
        read_record(recorded, list)


def test_a_record_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r'^recorded: the run was not on a named dataset, or its record'):
        read_record(changed(), dict)
    with pytest.raises(ValueError, match=r'^recorded: the run was not on an image folder, or its record'):
        read_record(changed(**NAMED), list)
