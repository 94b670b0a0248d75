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
    fmnist.grow('large', tmp_path / 'wide', tmp_path / 'again')
    assert fmnist.digest([tmp_path / 'again']) == fmnist.digest([tmp_path / 'large'])  # the new blocks too
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(large(x), wide(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(SystemExit, match='more blocks than the arm wide'):
        fmnist.grow('wide', tmp_path / 'large', tmp_path / 'other')
    with pytest.raises(SystemExit, match=r'only interleaved models .* the arm is serial'):
        fmnist.grow('serial', tmp_path / 'large', tmp_path / 'other')


def test_mean_of_runs(fmnist, packed, tmp_path, monkeypatch):
    root = fmnist.unpack(packed, tmp_path / 'data')
    monkeypatch.setitem(fmnist.ARMS, 'wide', dict(model='test_vitresnet_mix'))
    models = [
        randomise_(timm.create_model('test_vitresnet_mix', num_classes=2, in_chans=1, img_size=28), seed)
        for seed in range(3)
    ]
    folders = [tmp_path / name for name in 'abc']
    for model, folder, kwargs in zip(models, folders, (None, None, {'depth': 1})):
        timm_vitres.save(model, folder)
        settings = dict(seed=1, val_frac=0.2, model='test_vitresnet_mix', model_kwargs=kwargs)
        (folder / 'run.json').write_text(json.dumps({'settings': settings}))
    asked = []  # for the accuracy on the validation images
    monkeypatch.setattr(fmnist, 'stratified_split', lambda *args: (asked.append(args), ([], [0, 3]))[1])
    row = fmnist.run_mean('wide', 1, root, tmp_path, folders[1::-1])
    told = (row['changes'], row['seed'], row['epochs'], row['test_images'])
    assert told == (f'mean={folders[0]}+{folders[1]}', 1, 0, 40)
    assert [args[1:] for args in asked] == [(0.2, 1)]
    (made,) = tmp_path.glob('wide-mean-*')
    assert fmnist.settings_of(made)['seed'] == 1  # what learns from it holds the same images out
    model = timm.create_model(f'local-dir:{made}', pretrained=True).eval()
    images = [fmnist.images_of(model, 'torch/fashion_mnist', str(root), 'train')[index] for index in (0, 3)]
    answers = model(torch.stack([image for image, _ in images])).argmax(1).tolist()
    assert row['val_top1'] == 50 * sum(answer == target for answer, (_, target) in zip(answers, images))
    mean = model.state_dict()
    one, other = (model.state_dict() for model in models[:2])
    for key, value in mean.items():
        torch.testing.assert_close(value, (one[key] + other[key]) / 2 if value.is_floating_point() else value)
    assert not torch.equal(mean['head.fc.weight'], one['head.fc.weight'])
    with pytest.raises(SystemExit, match=r"c: is no run of the arm wide, but of .*'depth': 1"):
        fmnist.average_weights('wide', folders, tmp_path / 'never')
    assert not (tmp_path / 'never').exists()
    for seed, val_frac in ((0, 0.2), (1, 0.1)):
        with pytest.raises(SystemExit, match=r'a: held other validation images out \(of seed 1, a part of 0.2\)'):
            fmnist.check_images(folders[0], seed, val_frac)
    fmnist.check_images(made, 1, 0.2)
    with pytest.raises(SystemExit, match='is no run'):
        fmnist.check_images(tmp_path, 0, 0.05)


def test_teachers_are_known_by_their_weights(fmnist, tmp_path):
    folders = [tmp_path / name for name in 'ab']
    size = dict(num_classes=2, in_chans=1, img_size=28)
    models = [randomise_(timm.create_model('test_vitresnet_mix', **size), seed).eval() for seed in range(2)]
    for model, folder in zip(models, folders):
        timm_vitres.save(model, folder)
    names = [fmnist.register_teachers(some) for some in (folders, folders[:1], folders[1:])]
    assert len(set(names)) == 3  # so a run of other teachers has another folder, and another row
    x = torch.randn(2, 1, 28, 28)
    means = [sum(model(x) for model in some) / len(some) for some in (models, models[:1], models[1:])]
    for name, expected in zip(names, means):
        torch.testing.assert_close(timm.create_model(name, pretrained=True).eval()(x), expected)
    timm_vitres.save(models[0], folders[0], data_config=dict(data_config(models[0]), mean=(0.1,)))
    with pytest.raises(SystemExit, match='other sizes or normalisations'):
        timm.create_model(names[0], pretrained=True)


@pytest.mark.parametrize(
    'options, sentence',
    [
        (['--arms', 'wide', '--mean', 'a', '--set', 'lr=1'], 'trains nothing'),
        (['--mean', 'a'], 'arms: got wide resnet'),
        (['--grow', 'a', '--arms', 'wide', 'large'], 'expected the one'),
    ],
)
def test_options_that_contradict_each_other(options, sentence, fmnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, 'set_num_threads', lambda number: None)
    monkeypatch.setattr('sys.argv', ['fmnist.py', '--output', str(tmp_path), '--threads', '1', *options])
    with pytest.raises(SystemExit):
        fmnist.main()
    assert sentence in capsys.readouterr().err


def test_a_run_begins_with_what_was_grown_head_and_all(fmnist, packed, tmp_path, monkeypatch):
    """Through the command, with a learning rate that changes nothing: the first epoch has the parent's accuracy."""
    monkeypatch.setitem(fmnist.ARMS, 'large', dict(model='test_vitresnet_mix'))
    recipe = dict(timm_vitres.recipe('fmnist'), batch_size=8, warmup_epochs=0, crop_padding=0, reprob=0.0, workers=0)
    recipe.update(autotune=False, epochs=8, lr=0.01, val_frac=0.2)
    monkeypatch.setattr(fmnist.timm_vitres, 'recipe', lambda name: recipe)
    root = fmnist.unpack(packed, tmp_path / 'data')
    first = fmnist.run('large', 0, root, tmp_path, {})
    assert first['val_top1'] >= 95
    (parent,) = tmp_path.glob('large-*')
    rows = []
    monkeypatch.setattr(torch, 'set_num_threads', lambda number: None)
    monkeypatch.setattr(fmnist, 'write_row', lambda name, row, record: rows.append(row))
    options = ['--data-dir', str(packed), '--arms', 'large', '--grow', str(parent), '--threads', '1']
    settings = ['--set', 'epochs=1', 'lr=0.000000000001', 'min_lr=0', 'warmup_lr=0']
    monkeypatch.setattr('sys.argv', ['fmnist.py', '--output', str(tmp_path), *options, *settings])
    fmnist.main()
    assert [row['val_top1'] for row in rows] == [first['val_top1']]
    assert rows[0]['changes'].startswith('initial_checkpoint=')


def test_missing_data_are_told(fmnist, tmp_path):
    with pytest.raises(SystemExit, match='apt-get install dataset-fashion-mnist'):
        fmnist.unpack(tmp_path, tmp_path / 'data')
