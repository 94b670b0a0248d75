"""Datasets by timm's names for them: which split is which, and that nothing is validated on what it was trained on."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from timm_vitres.training.datasets import load_data
from timm_vitres.training.loaders import create_loaders
from timm_vitres.training.named_datasets import OpenedReader
from timm_vitres.training.settings import FinetuneCfg


def load(root, recorded=None, **kwargs):
    return load_data(FinetuneCfg(data_dir=root and str(root), **kwargs), 'RGB', recorded)


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
    from timm_vitres.training.named_datasets import _overlap

    for first, second, same in (
        ('train', 'train[:10%]', True),
        ('train[:80%]', 'train[80%:]', False),
        ('train[:80%]', 'train[70%:]', True),
        ('train[100:]', 'train[:100]', False),
        ('train[:100]', 'train[90%:]', True),
        ('train[:100]', 'test[:100]', False),
        ('train[:-20%]', 'train[-20%:]', False),
        ('train[:-20%]', 'train[-30%:]', True),
        ('train[:-20]', 'train[-20:]', True),
        ('train', 'train[3]', True),
        ('train+test', 'train+test', True),
        ('train+test', 'test', True),
        ('train+test[:50%]', 'test[50%:]', False),
        ('all', 'test', True),
        ('all[:50%]', 'train', True),
        ('all', '', False),
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
    errors = [ImportError('no datasets'), KeyError('split'), TypeError('a\nb'), AssertionError()]

    def fails(*args, **kwargs):
        raise errors.pop()

    monkeypatch.setattr('timm_vitres.training.named_datasets.create_dataset', fails)
    while errors:
        with pytest.raises(ValueError, match=r"'hfds/beans', split 'train', cannot be opened \(.+\)") as caught:
            load(tmp_path, dataset='hfds/beans')
        assert len(str(caught.value).splitlines()) == 1


# Hugging Face datasets in local files


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Datasets are unpacked into a folder of the test."""
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', str(tmp_path_factory.mktemp('cache')))


def encoded(number: int) -> dict:
    """Return an image of one grey, by which it is known again, as a dataset stores it."""
    file = io.BytesIO()
    Image.new('RGB', (16, 16), (number, number, number)).save(file, 'PNG')
    return {'bytes': file.getvalue(), 'path': f'{number}.png'}


def write_hfds(root, label=None, label_key: str = 'label', image_key: str = 'image', labels=(0, 1, 1)) -> str:
    """Write a training and a validation split as parquet files, and return timm's name of the dataset."""
    features = datasets.Features({image_key: datasets.Image(), label_key: label or datasets.Value('int64')})
    for split, numbers in (('train', range(12)), ('validation', range(12, 18))):
        rows = {image_key: [encoded(i) for i in numbers], label_key: [labels[i % len(labels)] for i in numbers]}
        (root / 'data').mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(root / 'data' / f'{split}-00000-of-00001.parquet'))
    return f'hfds/{root}'


def seen(part) -> list:
    """Return (grey, class index) of every image."""
    return [(image.getpixel((0, 0))[0], target) for image, target in part]


def test_names_and_labels_of_a_local_hfds_dataset(tmp_path):
    name = write_hfds(tmp_path / 'named', datasets.ClassLabel(names=['cat', 'dog']))
    data = load(None, dataset=name)
    assert data.label_names == ['cat', 'dog'] and data.counts == [4, 8]
    assert seen(data.train) == [(i, (0, 1, 1)[i % 3]) for i in range(12)]
    assert seen(data.val) == [(i, (0, 1, 1)[i % 3]) for i in range(12, 18)]
    # numbers without names are their own names, and a part of the training images validates
    data = load(None, dataset=write_hfds(tmp_path / 'bare'), val_split='', val_frac=0.25)
    assert data.label_names == ['0', '1'] and sorted(seen(data.train) + seen(data.val)) == [
        (i, (0, 1, 1)[i % 3]) for i in range(12)
    ]
    assert load(None, dataset=name, train_split='train[:50%]', val_split='train[50%:]').counts == [2, 4]


def test_a_class_map_of_an_hfds_dataset(tmp_path):
    path = tmp_path / 'map.txt'
    path.write_text('dog\nbird\ncat\n')
    expected = [(i, (2, 0, 0)[i % 3]) for i in range(12)]
    for folder, label, labels in (
        ('named', datasets.ClassLabel(names=['cat', 'dog']), (0, 1, 1)),
        ('text', datasets.Value('string'), ('cat', 'dog', 'dog')),
    ):
        name = write_hfds(tmp_path / folder, label, labels=labels)
        data = load(None, dataset=name, class_map=str(path))
        assert data.label_names == ['dog', 'bird', 'cat'] and data.counts == [8, 0, 4]
        assert seen(data.train) == expected
        recorded = json.loads(json.dumps(data.record()))
        path.rename(tmp_path / 'gone.txt')
        again = load(None, recorded, dataset=name, class_map=str(path))
        (tmp_path / 'gone.txt').rename(path)
        assert again.record() == data.record() and seen(again.train) == expected and again.counts == data.counts
    path.write_text('dog\nbird\n')
    with pytest.raises(ValueError, match='class_map: the map lacks classes of the dataset: cat'):
        load(
            None, dataset=write_hfds(tmp_path / 'named', datasets.ClassLabel(names=['cat', 'dog'])), class_map=str(path)
        )
    with pytest.raises(ValueError, match="class_map: a label is 'cat'; the map lacks it"):
        load(None, dataset=f'hfds/{tmp_path}/text', class_map=str(path))
    # numbers without names are named
    path.write_text('cat\ndog\n')
    data = load(None, dataset=write_hfds(tmp_path / 'bare'), class_map=str(path))
    assert data.label_names == ['cat', 'dog'] and seen(data.val) == [(i, (0, 1, 1)[i % 3]) for i in range(12, 18)]


def test_a_class_map_of_one_of_torchvision(fashion, tmp_path):
    plain = load(fashion, dataset='torch/fashion_mnist')
    (tmp_path / 'map.txt').write_text('\n'.join(reversed(plain.label_names)))
    data = load(fashion, dataset='torch/fashion_mnist', class_map=str(tmp_path / 'map.txt'))
    assert data.label_names == plain.label_names[::-1] and data.counts == plain.counts[::-1]
    assert [target for _, target in data.train] == [9 - target for _, target in plain.train]


def test_keys_of_an_hfds_dataset(tmp_path):
    name = write_hfds(tmp_path / 'a', label_key='kind', image_key='photo')
    data = load(None, dataset=name, input_key='photo', target_key='kind')
    assert seen(data.val) == [(i, (0, 1, 1)[i % 3]) for i in range(12, 18)]
    for kwargs, message in (
        (dict(input_key='photo'), "target_key: it has no 'label', but kind"),
        (dict(target_key='kind'), "input_key: it has no image under 'image'; other columns are photo, kind"),
        (dict(input_key='photo', target_key='photo'), 'are no class numbers'),
        (dict(input_key='photo', target_key='kind', val_split='test'), r'Unknown split "test"'),
        (dict(input_key='photo', target_key='kind', train_num_samples=3), 'train_num_samples: .* takes none'),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load(None, dataset=name, **kwargs)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="input_key: 'torch/cifar10' takes none; hfds/, hfids/"):
        load(tmp_path, dataset='torch/cifar10', input_key='x')
    with pytest.raises(ValueError, match='target_key: an image folder takes none'):
        load(tmp_path, target_key='x')


@pytest.mark.parametrize(
    'label, labels, message',
    [
        (datasets.Value('string'), ('cat', 'dog'), "class_map: a label is 'cat'; name the classes, in their order"),
        (datasets.ClassLabel(names=['cat', 'dog']), (0, 1, -1), 'a label is -1, expected 0 to 1'),
        (datasets.Value('float32'), (0.5, 1.0), 'target_key: a label is 0.5, expected a class number'),
        (datasets.Value('int64'), (0, None), 'target_key: a label is None'),
    ],
)
def test_labels_of_an_hfds_dataset_that_are_no_classes(label, labels, message, tmp_path):
    name = write_hfds(tmp_path / 'a', label, labels=labels)
    with pytest.raises(ValueError, match=message):
        load(None, dataset=name)


def test_bad_images_of_an_hfds_dataset_are_named(tmp_path):
    """timm takes the next image for one that can't be read."""
    name = write_hfds(tmp_path / 'a')
    rows = {'image': [encoded(0), {'bytes': b'no image', 'path': 'x.png'}, None, encoded(3)], 'label': [0, 1, 0, 1]}
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
    path = tmp_path / 'a' / 'data' / 'train-00000-of-00001.parquet'
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    with pytest.raises(ValueError, match='image: 2 of the split cannot be read'):
        load(None, dataset=name)
    rows['image'][2] = encoded(2)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    data = load(None, dataset=name)
    assert data.train[0][1] == 0
    with pytest.raises(ValueError, match='image: 1 of the split cannot be read as an image'):
        data.train[1]


def test_an_hfds_dataset_with_other_images_is_not_gone_on_with(tmp_path):
    name = write_hfds(tmp_path / 'a', datasets.ClassLabel(names=['cat', 'dog']))
    recorded = json.loads(json.dumps(load(None, dataset=name).record()))
    assert load(None, recorded, dataset=name).record() == recorded
    write_hfds(tmp_path / 'a', datasets.ClassLabel(names=['cat', 'fox']))
    with pytest.raises(ValueError, match='has other classes than when the run began'):
        load(None, recorded, dataset=name)
    path = tmp_path / 'a' / 'data' / 'train-00000-of-00001.parquet'
    table = datasets.Dataset.from_dict(
        {'image': [encoded(100 + i) for i in range(12)], 'label': [(0, 1, 1)[i % 3] for i in range(12)]},
        features=datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=['cat', 'dog'])}),
    )
    table.to_parquet(str(path))
    with pytest.raises(ValueError, match='is not what the run began with: its images_sha256'):
        load(None, recorded, dataset=name)


def test_workers_see_the_same_images(tmp_path):
    name = write_hfds(tmp_path / 'a', datasets.ClassLabel(names=['cat', 'dog']))
    config = dict(input_size=(3, 16, 16), interpolation='bilinear', mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0)
    found = []
    for workers in (0, 2):
        cfg = FinetuneCfg(dataset=name, workers=workers, batch_size=4)
        data = load_data(cfg, 'RGB')
        loaders = create_loaders(cfg, data, {**config, 'crop_mode': 'center'}, data.record())
        found.append([torch.cat([x.flatten() for x, _ in loader]) for loader in loaders])
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert not torch.equal(*(part[: 4 * 768] for part in found[0]))


def test_a_stream_gives_images_as_every_other_door_does():
    deep = Image.fromarray(np.full((4, 6), 100 * 257, np.uint16))
    turned = Image.new('RGB', (6, 4), 'red')
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees
    found = list(OpenedReader([(deep, 0), (turned, 1)], 'RGB'))
    assert [target for _, target in found] == [0, 1] and [image.size for image, _ in found] == [(6, 4), (4, 6)]
    assert found[0][0].getextrema() == ((100, 100),) * 3


def test_a_streamed_dataset(tmp_path):
    name = 'hfids' + write_hfds(tmp_path / 'a', datasets.ClassLabel(names=['cat', 'dog']))[len('hfds') :]
    (tmp_path / 'map.txt').write_text('dog\ncat\n')
    options = dict(dataset=name, train_num_samples=12, val_num_samples=6, batch_size=4, dataset_download=True)
    with pytest.raises(ValueError, match=r"class_map: 'hfids/.*' is a stream that does not name its classes"):
        load(None, **{**options, 'dataset_download': False})
    data = load(None, **options)
    assert data.label_names == ['cat', 'dog'] and seen(data.val) == [(i, (0, 1, 1)[i % 3]) for i in range(12, 18)]
    mapped = load(None, **options, class_map=str(tmp_path / 'map.txt'))
    assert mapped.label_names == ['dog', 'cat'] and seen(mapped.val) == [(i, 1 - t) for i, t in seen(data.val)]
    assert load(None, json.loads(json.dumps(data.record())), **options).record() == data.record()
