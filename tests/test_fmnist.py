"""benchmarks/fmnist.py: a run by the recipe, its row, and going on, on a few stand-in photographs."""

import gzip
import json

import numpy as np
import pytest
import timm
import torch
from conftest import randomise_

import timm_vitres
from timm_vitres.data import data_config


@pytest.fixture
def fmnist(script):
    return script('fmnist')


@pytest.fixture
def packed(tmp_path):
    """Write four files as Fashion-MNIST's: bright images are of class 1, dark ones of class 0."""
    folder = tmp_path / 'packed'
    folder.mkdir()
    for part, count in (('train', 80), ('t10k', 40)):
        labels = np.arange(count) % 2
        images = np.random.default_rng(0).integers(0, 64, (count, 28, 28)) + 190 * labels[:, None, None]
        for kind, values, shape in (('images-idx3', images, (count, 28, 28)), ('labels-idx1', labels, (count,))):
            head = (2048 + len(shape)).to_bytes(4, 'big') + b''.join(side.to_bytes(4, 'big') for side in shape)
            with gzip.open(folder / f'{part}-{kind}-ubyte.gz', 'wb') as file:
                file.write(head + values.astype(np.uint8).tobytes())
    return folder


def test_a_run_and_its_row(fmnist, packed, tmp_path):
    root = fmnist.unpack(packed, tmp_path / 'data')
    changes = dict(
        epochs=8, workers=0, model='test_vitresnet_mix', batch_size=8, val_frac=0.2, warmup_epochs=0, lr=0.01
    )
    changes.update(crop_padding=0, reprob=0.0, autotune=False)
    row = fmnist.run('interleaved', 0, root, tmp_path / 'runs', changes)
    assert (row['model'], row['epochs'], row['test_images']) == ('test_vitresnet_mix', 8, 40)
    assert min(row['test_top1'], row['test_top1_tta'], row['val_top1']) >= 95
    assert row['changes'].startswith('epochs=8 workers=0 model=test_vitresnet_mix')
    again = fmnist.run('interleaved', 0, root, tmp_path / 'runs', changes)
    assert again == row  # it is over, and is not trained again


def test_every_arm_is_as_large_as_the_first(fmnist):
    recipe = fmnist.timm_vitres.recipe('fmnist')
    sizes = {}
    for arm, own in fmnist.ARMS.items():
        settings = {**recipe, **own}
        model = timm.create_model(
            settings['model'], num_classes=10, in_chans=1, img_size=28, **settings.get('model_kwargs', {})
        )
        sizes[arm] = sum(parameter.numel() for parameter in model.parameters())
    assert all(abs(sizes[arm] / sizes['wide'] - 1) < 0.05 for arm in ('resnet', 'vit', 'serial')), sizes
    assert max(sizes.values()) < 1.5e6


def test_an_arm_begins_with_a_smaller_one(fmnist, tmp_path):
    size = dict(num_classes=10, in_chans=1, img_size=28)
    wide = randomise_(timm.create_model('vitresnet_mix_nano', **size, **fmnist.ARMS['wide']['model_kwargs'])).eval()
    config = dict(data_config(wide), mean=(0.286,), std=(0.353,))
    timm_vitres.save(wide, tmp_path / 'wide', data_config=config)
    fmnist.grow('large', tmp_path / 'wide', tmp_path / 'large')
    large = timm.create_model(f'local-dir:{tmp_path}/large', pretrained=True).eval()
    assert data_config(large) == config and len(large.stages[2]) == 5
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(large(x), wide(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(SystemExit, match='more blocks than the arm wide'):
        fmnist.grow('wide', tmp_path / 'large', tmp_path / 'other')


def test_mean_of_runs(fmnist, packed, tmp_path, monkeypatch):
    root = fmnist.unpack(packed, tmp_path / 'data')
    small = dict(model='test_vitresnet_mix', model_kwargs={})
    monkeypatch.setitem(fmnist.ARMS, 'wide', small)
    models = [
        randomise_(timm.create_model('test_vitresnet_mix', num_classes=2, in_chans=1, img_size=28), seed)
        for seed in range(3)
    ]
    folders = [tmp_path / name for name in 'abc']
    for model, folder, held in zip(models, folders, (1, 1, 2)):
        timm_vitres.save(model, folder)
        (folder / 'run.json').write_text(json.dumps({'data': held}))
    row = fmnist.run_mean('wide', 0, root, tmp_path, folders[:2])
    told = (row['changes'], row['epochs'], row['test_images'])
    assert told == (f'mean={folders[0]}+{folders[1]}', 0, 40)
    mean = timm.create_model(f'local-dir:{tmp_path}/wide-mean-a-b-0', pretrained=True).state_dict()
    one, other = (model.state_dict() for model in models[:2])
    for key, value in mean.items():
        torch.testing.assert_close(value, (one[key] + other[key]) / 2 if value.is_floating_point() else value)
    assert not torch.equal(mean['head.fc.weight'], one['head.fc.weight'])
    with pytest.raises(SystemExit, match='held out other validation images'):
        fmnist.average_weights(folders, tmp_path / 'never')
    assert not (tmp_path / 'never').exists()


def test_missing_data_are_told(fmnist, tmp_path):
    with pytest.raises(SystemExit, match='apt-get install dataset-fashion-mnist'):
        fmnist.unpack(tmp_path, tmp_path / 'data')
