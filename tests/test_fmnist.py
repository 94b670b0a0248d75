"""benchmarks/fmnist.py: a run by the recipe, its row, and going on, on a few stand-in photographs."""

import gzip

import numpy as np
import pytest
import timm


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


def test_missing_data_are_told(fmnist, tmp_path):
    with pytest.raises(SystemExit, match='apt-get install dataset-fashion-mnist'):
        fmnist.unpack(tmp_path, tmp_path / 'data')
