"""Class maps fix the order of classes, and labels of any kind become class indices."""

import json
import pickle

import numpy as np
import pytest
from conftest import draw, write_folder

from timm_vitres.training.class_maps import Labels, read_class_map
from timm_vitres.training.datasets import load_data
from timm_vitres.training.settings import FinetuneCfg


def write_map(path, *names):
    path.write_text('\n'.join(names) + '\n', encoding='utf-8')
    return str(path)


def test_names_of_a_class_map(tmp_path):
    assert read_class_map(write_map(tmp_path / 'a.txt', 'down ', 'a cross', 'häßlich', '', '')) == [
        *('down', 'a cross', 'häßlich')
    ]
    (tmp_path / 'windows.txt').write_bytes('\ufeffb\r\na\r\n'.encode())
    assert read_class_map(str(tmp_path / 'windows.txt')) == ['b', 'a']
    names = ['\u0645\u06cc\u200c\u062e', '\u5168\u3000\u89d2']  # a joiner, and a wide space
    assert read_class_map(write_map(tmp_path / 'others.txt', *names)) == names


def test_a_letter_with_an_accent_is_the_same_in_both_spellings(tmp_path):
    composed, decomposed = 'caf\u00e9', 'cafe\u0301'
    with pytest.raises(ValueError, match='twice, in lines 1 and 2'):
        read_class_map(write_map(tmp_path / 'map.txt', composed, decomposed))
    assert Labels([], ['a', composed])(decomposed) == Labels([decomposed], ['a', composed])(0) == 1
    for split, name in (('train', composed), ('val', decomposed)):
        for label in ('apple', name):
            draw(tmp_path / 'images' / split / label / '0.png', len(split + label))
    data = load_data(FinetuneCfg(data_dir=str(tmp_path / 'images')), 'RGB')
    assert data.label_names == ['apple', composed] and data.val.dataset.targets == [0, 1]


def test_numbers_that_a_map_has_as_names_in_another_order_are_refused():
    mapped = Labels([], ['0', '1', '10', '2'])
    assert [mapped(label) for label in ('10', '2')] == [2, 3]
    with pytest.raises(ValueError, match='class_map: a label is 2, but names in the map are numbers of other lines'):
        mapped(2)
    assert Labels([], ['1', '2', '3'])(2) == 2  # they rise, from whatever number on
    assert Labels([], ['0', '1', 'cat'])(1) == 1
    assert Labels([], ['911', '718', '356'])(2) == Labels([], ['Cayenne', '911', 'Panamera'])(2) == 2  # no lines of it
    with pytest.raises(ValueError, match='class_map: a label is 2'):
        Labels([], ['2', '3', 'a', 'b'])(2)
    assert Labels(['0', '1', '10', '2'])(2) == 2  # a dataset's own names are by its labels


@pytest.mark.parametrize(
    'content, message',
    [
        ('a\n\nb\n', "line 2 of .* is ''"),
        ('a\nb\na\n', "names 'a' twice, in lines 1 and 3"),
        ('a\n', 'has 1 class names'),
        ('', 'has 0 class names'),
        ('a\nb\x07\n', 'line 2'),
        (b'\xff\xfe\x00', 'is no text in UTF-8'),
        (b'caf\xe9', 'is no text in UTF-8'),
    ],
)
def test_what_is_no_class_map(content, message, tmp_path):
    path = tmp_path / 'map.txt'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f'^class_map: .*{message}'):
        read_class_map(str(path))


def test_a_class_map_that_is_missing_or_code(tmp_path):
    for path in (tmp_path / 'none.txt', tmp_path):
        with pytest.raises(FileNotFoundError, match='class_map: there is no file'):
            read_class_map(str(path))
    path = tmp_path / 'map.pkl'
    path.write_bytes(pickle.dumps({'a': 0, 'b': 1}))
    with pytest.raises(ValueError, match='is a pickle, expected a text file'):
        read_class_map(str(path))


def test_labels_of_every_kind():
    named = Labels(['a', 'b', 'c'])
    assert named.names == ['a', 'b', 'c'] and [named(label) for label in (2, np.int64(1), 'a')] == [2, 1, 0]
    mapped = Labels(['a', 'b'], ['c', 'b', 'a'])
    assert mapped.names == ['c', 'b', 'a'] and [mapped(label) for label in (0, 1, 'c')] == [2, 1, 0]
    text = Labels([], ['b', 'a'])
    assert [text(label) for label in ('a', 'b', 0, 1)] == [1, 0, 0, 1]
    bare = Labels([])
    assert bare.names == [] and bare(7) == 7


@pytest.mark.parametrize(
    'labels, label, message',
    [
        (Labels(['a', 'b']), 2, 'dataset: a label is 2, expected 0 to 1'),
        (Labels(['a', 'b']), -1, 'dataset: a label is -1'),
        (Labels(['a'], ['b', 'a']), 1, 'dataset: a label is 1, expected 0 to 0'),
        (Labels([]), -1, 'dataset: a label is -1, expected 0 or more'),
        (Labels([]), 'cat', "class_map: a label is 'cat'; name the classes"),
        (Labels([], ['a', 'b']), 'cat', "class_map: a label is 'cat'; the map lacks it"),
        (Labels([]), 1.0, 'target_key: a label is 1.0'),
        (Labels([]), [1], r'target_key: a label is \[1\]'),
        (Labels([]), None, 'target_key: a label is None'),
    ],
)
def test_labels_that_stand_for_no_class(labels, label, message):
    with pytest.raises(ValueError, match=message):
        labels(label)


def test_a_class_of_the_dataset_that_the_map_lacks():
    with pytest.raises(ValueError, match='class_map: the map lacks classes of the dataset: c, d'):
        Labels(['a', 'c', 'd'], ['a', 'b'])


def load(root, class_map, recorded=None, **kwargs):
    cfg = FinetuneCfg(data_dir=str(root), val_frac=0.25, class_map=class_map, **kwargs)
    return load_data(cfg, 'RGB', recorded)


def labels_of(part) -> dict:
    return dict(part.dataset.samples[index] for index in part.indices)


def test_a_class_map_orders_the_classes_of_a_folder(image_folder, tmp_path, caplog):
    path = write_map(tmp_path / 'map.txt', 'down', 'up', 'across')
    data = load(image_folder, path)
    assert data.label_names == ['down', 'up', 'across'] and data.counts == [9, 0, 9]
    for name, target in {**labels_of(data.train), **labels_of(data.val)}.items():
        assert target == (0 if '/down/' in name else 2)
    assert 'class_map: 1 of its 3 classes have no image to train on, such as up' in caplog.text
    # the record is all that resuming needs
    recorded = json.loads(json.dumps(data.record()))
    (tmp_path / 'map.txt').unlink()
    again = load(image_folder, path, recorded)
    assert again.record() == data.record() and again.counts == data.counts
    assert labels_of(again.val) == labels_of(data.val)


def test_a_class_folder_that_the_map_lacks_is_named(image_folder, tmp_path):
    path = write_map(tmp_path / 'map.txt', 'down', 'up')
    with pytest.raises(ValueError, match=r'images has classes that class_map .*map\.txt lacks: across'):
        load(image_folder, path)


def test_the_map_holds_for_both_folders(tmp_path):
    root = tmp_path / 'images'
    write_folder(root / 'train', per_class=2)
    write_folder(root / 'val', per_class=2, size=41)
    draw(root / 'val' / 'up' / '0.png')
    path = write_map(tmp_path / 'map.txt', 'up', 'down', 'across')
    data = load(root, path)
    assert data.counts == [0, 2, 2] and sorted(labels_of(data.val).values()) == [0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match='the training data lacks: up'):
        load(root, '')
