import numpy as np
import pytest
import timm.data
import torch
from conftest import stripes, write_folder
from PIL import Image
from test_loop import settings

from timm_vitres import cli
from timm_vitres.training.datasets import Data, load_data
from timm_vitres.training.loaders import (
    check_cutmix,
    check_policy,
    create_loaders,
    derived,
    mend_,
    names_of,
    padded_crop,
    seeded,
)
from timm_vitres.training.processes import Processes

CONFIG = dict(
    input_size=(3, 32, 32), interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, crop_mode='center'
)


def pixels(tmp_path, workers, epoch, **options):
    cfg = settings(tmp_path / 'images', tmp_path, workers=workers, batch_size=6, **options)
    data = load_data(cfg, 'RGB')
    train, val = create_loaders(cfg, data, CONFIG, data.record())
    train.set_epoch(epoch)
    return torch.cat([x for x, _ in train]), torch.cat([x for x, _ in val])


@pytest.mark.parametrize('count', [1, 3])
def test_processes_share_an_epochs_images(count, tmp_path):
    """Each trains on images of its own, and every image of the validation set is counted once."""
    write_folder(tmp_path / 'images', per_class=10)
    cfg = settings(tmp_path / 'images', tmp_path, workers=0, batch_size=2, validation_batch_size=3)
    data = load_data(cfg, 'RGB')
    seen, valid = [], 0
    for rank in range(count):
        train, val = create_loaders(cfg, data, CONFIG, data.record(), Processes(rank=rank, count=count))
        train.set_epoch(1)
        seen += list(train.indices())
        valid += val.num_valid
        assert max(len(x) for x, _ in val) <= 3
    assert len(set(seen)) == len(seen) == len(data.train) // count * count and valid == len(data.val)


def test_pixels_depend_on_seed_and_epoch_alone(tmp_path):
    write_folder(tmp_path / 'images', per_class=8)
    options = dict(aa='rand-m9-mstd0.5-inc1', reprob=0.5, vflip=0.5)
    for index, given in enumerate(({}, options)):
        torch.manual_seed(index)  # whatever was drawn before
        train, val = pixels(tmp_path, 0, 1, **given)
        for workers in (1, 2):
            again, val_again = pixels(tmp_path, workers, 1, **given)
            assert torch.equal(train, again) and torch.equal(val, val_again)
        assert not torch.equal(train, pixels(tmp_path, 0, 2, **given)[0])
        assert not torch.equal(train, pixels(tmp_path, 0, 1, seed=1, **given)[0])


# what every image goes through unless a test asks for more: its centre
PLAIN = dict(hflip=0.0, color_jitter=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))


@pytest.mark.parametrize(
    'name, given, without',
    [
        ('vflip', 1.0, {}),
        ('hflip', 1.0, {}),
        ('aa', 'rand-m9-inc1', {}),
        ('color_jitter_prob', 1.0, dict(color_jitter=0.4, color_jitter_prob=0.0)),
        ('grayscale_prob', 1.0, {}),
        ('gaussian_blur_prob', 1.0, {}),
        ('scale', (0.1, 0.2), {}),
        ('ratio', (2.0, 3.0), dict(scale=(0.5, 0.5))),
        ('train_crop_mode', 'rkrc', dict(scale=(0.5, 0.5))),
        ('train_interpolation', 'nearest', dict(scale=(0.5, 0.5))),
        ('reprob', 1.0, {}),
        ('remode', 'const', dict(reprob=1.0, remode='pixel')),
        ('recount', 4, dict(reprob=1.0)),
    ],
)
def test_a_setting_reaches_the_pixels(name, given, without, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), dtype=np.uint8)
    for index, image in enumerate(noise):  # they would be alike when turned, were they stripes
        (tmp_path / 'images' / 'ab'[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / 'images' / 'ab'[index % 2] / f'{index}.png')
    options = {**PLAIN, **without}
    plain, val = pixels(tmp_path, 0, 1, **options)
    assert torch.equal(plain, pixels(tmp_path, 0, 1, **options)[0])
    changed, same = pixels(tmp_path, 0, 1, **{**options, name: given})
    assert plain.shape == changed.shape and torch.equal(val, same)
    different = [not torch.equal(one, other) for one, other in zip(plain, changed)]
    # what a policy draws may leave noise as it is, and so does a blur of 0.1 pixels
    assert any(different) if name in ('aa', 'gaussian_blur_prob') else all(different)
    if name == 'vflip':
        assert torch.equal(changed, plain.flip(-2))
    if name == 'hflip':
        assert torch.equal(changed, plain.flip(-1))
    if name == 'grayscale_prob':
        assert torch.equal(changed[:, 0], changed[:, 1]) and not torch.equal(plain[:, 0], plain[:, 1])


def test_what_is_not_augmented_is_resized_as_in_validation(tmp_path):
    write_folder(tmp_path / 'images', per_class=8)
    found = [pixels(tmp_path, 0, 1, no_aug=True, train_interpolation=name)[0] for name in ('', 'nearest', 'random')]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_validation_images_are_cut_as_the_model_says(tmp_path):
    write_folder(tmp_path / 'images', per_class=8)
    cfg = settings(tmp_path / 'images', tmp_path, workers=0, batch_size=6)
    data = load_data(cfg, 'RGB')
    record = data.record()
    images = [Image.open(tmp_path / 'images' / name).convert('RGB') for name in names_of(record['validation'])]
    assert len(images) == 4
    for crop_mode in ('center', 'squash', 'border'):
        config = dict(CONFIG, crop_mode=crop_mode, crop_pct=0.8)
        expected = timm.data.create_transform(**config)
        found = torch.cat([x for x, _ in create_loaders(cfg, data, config, record)[1]])
        assert torch.equal(found, torch.stack([expected(image) for image in images]))


def test_workers_that_stay_see_the_next_epoch(tmp_path):
    write_folder(tmp_path / 'images', per_class=8)
    cfg = settings(tmp_path / 'images', tmp_path, workers=2, batch_size=6)
    data = load_data(cfg, 'RGB')
    train, _ = create_loaders(cfg, data, CONFIG, data.record())
    for epoch in (0, 1, 0):
        train.set_epoch(epoch)
        assert torch.equal(torch.cat([x for x, _ in train]), pixels(tmp_path, 0, epoch)[0])


def test_drawing_for_an_image_leaves_the_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(0)
    np.random.seed(0)
    with seeded(1, 2, 3):
        first = torch.rand(1), np.random.rand()
    assert torch.equal(torch.rand(2), expected[0]) and np.array_equal(np.random.rand(2), expected[1])
    with seeded(1, 2, 3):
        assert torch.equal(torch.rand(1), first[0]) and np.random.rand() == first[1]


def test_images_that_are_held_out_of_a_dataset_have_its_numbers():
    assert names_of([['a/x.png', 'a', 3], ['b/y.png', 'b', 4]]) == ['a/x.png', 'b/y.png']
    assert names_of({'split': 'train', 'count': 60, 'indices': [17, 4]}) == ['image 17', 'image 4']
    assert names_of({'split': 'test', 'count': 60, 'indices': None}) == []


def test_an_epoch_and_its_first_image_draw_by_seeds_of_their_own():
    assert len({derived(0), derived(0, 0), derived(0, 0, 0), derived(0, 1), derived(1, 0)}) == 5


def test_posterization_keeps_a_bit():
    """timm's asks for no bit at its strongest, which Pillow 13 refuses."""
    image = stripes(32, True, np.random.default_rng(0))
    transform = mend_(timm.data.create_transform((3, 32, 32), is_training=True, auto_augment='rand-m10-p1-inc1'))
    policy = next(step for step in transform.transforms if isinstance(step, timm.data.RandAugment))
    posterize = next(operation for operation in policy.ops if operation.name == 'PosterizeIncreasing')
    assert np.array_equal(np.asarray(posterize(image)), np.asarray(image) & 128)
    # a weaker one stays as it is
    posterize.magnitude = 5
    assert np.array_equal(np.asarray(posterize(image)), np.asarray(image) & 192)
    for seed in range(300):
        with seeded(seed):
            assert torch.isfinite(transform(image)).all()


@pytest.mark.parametrize('aa', [None, '', 'rand-m9-mstd0.5-inc1', 'rand-m9-n3-p0.5-tweights', 'augmix-m5-w4', 'v0'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_policies_of_timm_are_taken(aa, mode):
    check_policy(aa, mode)


@pytest.mark.parametrize('aa', ['foo', 'rand-mfoo', 'randfoo', 'rand-x9', 'rand-m9-t9', 'rand-n20-tweights', 'v0-m3'])
def test_policies_that_timm_has_not_are_refused(aa):
    with pytest.raises(ValueError, match=f"aa: got '{aa}'"):
        check_policy(aa, 'RGB')
    with pytest.raises(ValueError, match=r'aa: .* fails on images of mode RGBA'):
        check_policy('rand-m9', 'RGBA')


class Stream(torch.utils.data.IterableDataset):
    """Pictures that come one after the other, in an order of their own for each epoch, as timm's streams do."""

    transform, epoch = None, 0

    def __len__(self):
        return 8

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for index in range(worker.id if worker else 0, 8, worker.num_workers if worker else 1):
            image = stripes(40, index % 2 == 0, np.random.default_rng(index + 100 * self.epoch))
            yield self.transform(image), index % 2


@pytest.mark.parametrize('workers', [0, 1])
def test_streams_are_the_same_in_the_same_epoch(workers, tmp_path):
    cfg = settings(None, tmp_path, dataset='wds/x', workers=workers, batch_size=4)
    data = Data(Stream(), Stream(), ['a', 'b'], None, '', {}, {'train': {}, 'validation': {}})
    seen = []
    for epoch in (1, 1, 2):
        train, _ = create_loaders(cfg, data, CONFIG, data.record())
        train.set_epoch(epoch)
        seen.append(torch.cat([x for x, _ in train]))
        assert seen[-1].shape == (8, 3, 32, 32)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('bad', [1, 6])
def test_a_stream_that_fails_is_an_error_wherever_it_does(workers, bad, tmp_path):
    """What ends a stream never fills a batch, and batches that are not full are dropped."""

    class Failing(Stream):
        def __iter__(self):
            for number, sample in enumerate(super().__iter__()):
                if number * max(workers, 1) >= bad:
                    raise OSError('a shard is damaged')
                yield sample

    cfg = settings(None, tmp_path, dataset='wds/x', workers=workers, batch_size=4)
    data = Data(Failing(), Stream(), ['a', 'b'], None, '', {}, {'train': {}, 'validation': {}})
    train, _ = create_loaders(cfg, data, CONFIG, data.record())
    with pytest.raises(ValueError, match=r'image \d of the stream: a shard is damaged'):
        list(train)


@pytest.mark.parametrize('workers', ['0', '1'])
def test_an_image_that_fails_in_training_is_named_in_one_sentence(workers, tmp_path, capsys):
    images = write_folder(tmp_path / 'images', per_class=4)
    (images / 'down' / '1.png').write_bytes(b'no picture')
    flags = [
        '--model',
        'test_vitresnet',
        '--img-size',
        '32',
        '-b',
        '2',
        '--no-check',
        '--output',
        str(tmp_path / 'run'),
    ]
    assert cli.main(['finetune', str(images), *flags, '-j', workers]) == 1
    error = capsys.readouterr().err.replace('\r', '\n')
    (sentence,) = [line for line in error.splitlines() if 'down/1.png' in line]
    assert sentence.startswith('timm-vitres: ') and 'Traceback' not in error and 'worker' not in error


def test_repeats_are_other_augmentations_of_fewer_images(tmp_path):
    """As many images an epoch as ever, each as often as it is told, one after the other."""
    write_folder(tmp_path / 'images', per_class=8)
    for options in (dict(no_aug=True), dict()):
        cfg = settings(tmp_path / 'images', tmp_path, batch_size=6, aug_repeats=3, **options)
        data = load_data(cfg, 'RGB')
        train, _ = create_loaders(cfg, data, CONFIG, data.record())
        plain = pixels(tmp_path, 0, 1, **options)[0]
        epochs = []
        for epoch in (1, 2):
            train.set_epoch(epoch)
            drawn = [index % len(data.train) for index in train.indices()]
            assert len(drawn) == len(data.train) == 12 and len({*drawn}) == 4
            assert drawn == [index for index in drawn[::3] for _ in range(3)]
            epochs.append((drawn, torch.cat([x for x, _ in train])))
            x = epochs[-1][1].view(4, 3, 3, 32, 32)
            assert epochs[-1][1].shape == plain.shape
            for one, two in ((0, 1), (0, 2), (1, 2)):
                same = [torch.equal(images[one], images[two]) for images in x]
                assert all(same) if options else not any(same)
        assert epochs[0][0] != epochs[1][0]


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA'])
def test_images_of_every_mode_are_jittered(mode, tmp_path):
    write_folder(tmp_path / 'images', per_class=8)
    channels = len(mode) if mode != 'L' else 1
    config = {**CONFIG, 'input_size': (channels, 32, 32), 'mean': (0.5,) * channels, 'std': (0.5,) * channels}
    found = []
    for jitter in (0.0, 0.9):
        cfg = settings(
            tmp_path / 'images', tmp_path, color_jitter=jitter, hflip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0)
        )
        data = load_data(cfg, mode)
        found.append(torch.cat([x for x, _ in create_loaders(cfg, data, config, data.record())[0]]))
    changed = (found[0] != found[1]).flatten(2).any(2)  # by channel
    assert changed[:, :3].any(1).all() and not changed[:, 3:].any()


@pytest.mark.parametrize('minmax, fits', [(None, True), ((0.2, 0.8), True), ((0.5, 0.5), False), ((0.3, 0.31), False)])
def test_cutmix_needs_a_whole_pixel(minmax, fits):
    if fits:
        return check_cutmix(minmax, (3, 32, 48))
    with pytest.raises(
        ValueError, match=r'^cutmix_minmax: got 0\.\d and 0\.\d+, .* 32 x 48 pixels have no whole pixel'
    ):
        check_cutmix(minmax, (3, 32, 48))


def test_a_padded_crop_is_a_shift_over_black(tmp_path):
    """Images of 32 x 32 are not resized, so every crop is one of the padded image's, and more than one comes."""
    write_folder(tmp_path / 'images', per_class=8)
    options = dict(hflip=0, color_jitter=0)
    plain = pixels(tmp_path, 0, 1, no_aug=True)[0]
    assert torch.equal(pixels(tmp_path, 0, 1, crop_padding=0, **options)[0], plain)
    crops = pixels(tmp_path, 0, 1, crop_padding=2, **options)[0]
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2), value=-1.0)
    places = {
        (top, left): (crops == padded[..., top : top + 32, left : left + 32]).flatten(1).all(1)
        for top in range(5)
        for left in range(5)
    }
    assert torch.stack(list(places.values())).any(0).all()
    assert sum(bool(found.any()) for found in places.values()) > 3


def test_a_padded_crop_resizes_the_shorter_side_and_fits_any_shape():
    for width, height in ((64, 48), (10, 40), (32, 32)):
        image = Image.new('RGB', (width, height), 'white')
        assert padded_crop((24, 30), 3, 'bilinear')(image).size == (30, 24)
        whole = padded_crop((24, 30), 0, 'bilinear')(image)
        assert whole.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize('name, value', [('no_aug', True), ('scale', (0.5, 1.0)), ('train_crop_mode', 'rkrc')])
def test_another_crop_beside_the_padded_one_is_an_error(name, value, tmp_path):
    with pytest.raises(ValueError, match=f'{name}: got .*crop_padding'):
        settings(tmp_path / 'images', tmp_path, crop_padding=2, **{name: value})
