"""Datasets by timm's names for them: which split is which, and that nothing is validated on what it was trained on."""

import json

import numpy as np
import pytest
import torch

from timm_vitres.training.datasets import load_data
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
