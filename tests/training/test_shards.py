"""Tar files of webdataset: every image once in an epoch, whatever the number of processes, and nothing left out."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import stripes
from PIL import Image

from timm_vitres.training.datasets import load_data
from timm_vitres.training.loaders import create_loaders
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.shards import ShardReader, is_local, open_bytes

CONFIG = dict(input_size=(3, 16, 16), interpolation='bilinear', mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0)
SIZES = {'train': (7, 3, 11), 'val': (4, 5)}


def picture(number: int) -> bytes:
    """Return an image of one grey, by which it is known again."""
    file = io.BytesIO()
    Image.new('RGB', (16, 16), (number * 5,) * 3).save(file, 'PNG')
    return file.getvalue()


def write_shard(path, samples) -> None:
    """Write a tar file of {file name: bytes}."""
    with tarfile.open(path, 'w') as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def sample(number: int, **more: bytes) -> dict:
    files = {'png': picture(number), 'cls': str(number % 3).encode(), **more}
    return {f'{number:04d}.{suffix}': data for suffix, data in files.items()}


@pytest.fixture
def root(tmp_path):
    """Shards of 21 and 9 images of three classes, and their info file."""
    number, splits = 0, {}
    for split, sizes in SIZES.items():
        names = [f'x-{split}-{index:02d}.tar' for index in range(len(sizes))]
        for name, size in zip(names, sizes):
            write_shard(tmp_path / name, {k: v for i in range(size) for k, v in sample(number + i).items()})
            number += size
        splits[split] = dict(name=split, num_samples=sum(sizes), filenames=names, shard_lengths=list(sizes))
    (tmp_path / '_info.json').write_text(json.dumps({'splits': splits, 'class_names': ['a', 'b', 'c']}))
    return tmp_path


def load(root, recorded=None, **kwargs):
    cfg = FinetuneCfg(**{'data_dir': str(root), 'dataset': 'wds/x', 'val_split': 'val', **kwargs})
    return load_data(cfg, 'RGB', recorded)


def batches(root, epoch: int = 0, recorded=None, **kwargs):
    """Return the numbers of the images of each training and validation batch."""
    kwargs = dict(batch_size=4, no_aug=True, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, **kwargs)
    data = load(root, recorded, **kwargs)
    cfg = FinetuneCfg(data_dir=str(root), dataset='wds/x', **kwargs)
    both = []
    for loader in create_loaders(cfg, data, {**CONFIG, 'crop_mode': 'center'}, data.record()):
        loader.set_epoch(epoch)
        found = []
        for x, target in loader:
            numbers = (x[:, 0, 0, 0] * 255 / 5).round().int()
            assert torch.equal(numbers % 3, target.int())
            found.append(numbers.tolist())
        assert len(found) == len(loader)
        both.append(found)
    return both


@pytest.mark.parametrize('workers', [0, 2, pytest.param(5, marks=pytest.mark.slow)])
def test_an_epoch_has_every_image_once(workers, root):
    """By timm's own reader, workers repeat their shards, and more workers than shards leave some without any."""
    left_out = set()
    for epoch in range(2):
        train, val = batches(root, epoch, workers=workers)
        assert [len(batch) for batch in train] == [4] * 5 and sorted(map(len, val)) == [1, 4, 4]
        trained = Counter(number for batch in train for number in batch)
        assert len(trained) == 20 and set(trained) <= set(range(21)) and max(trained.values()) == 1
        assert sorted(number for batch in val for number in batch) == list(range(21, 30))
        left_out |= set(range(21)) - set(trained)
    assert len(left_out) == 2  # another one in each epoch


def test_epochs_and_seeds_have_orders_of_their_own(root):
    first = batches(root, 0, workers=0)
    assert batches(root, 0, workers=0) == first
    others = [batches(root, 1, workers=0), batches(root, 0, workers=0, seed=1)]
    assert all(train != first[0] and val == first[1] for train, val in others)
    trained, validated = ([number for batch in part for number in batch] for part in first)
    assert validated == list(range(21, 30)) and trained != sorted(trained)


def test_an_epoch_does_not_depend_on_the_epochs_before(root):
    """A resumed run begins with a later one."""
    cfg = FinetuneCfg(data_dir=str(root), dataset='wds/x', batch_size=4, no_aug=True, workers=2)
    data = load(root, batch_size=4)
    loader, _ = create_loaders(cfg, data, {**CONFIG, 'crop_mode': 'center'}, data.record())
    epochs = []
    for epoch in (0, 1, 1):
        loader.set_epoch(epoch)
        epochs.append(torch.cat([target for _, target in loader]))
    assert torch.equal(epochs[1], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    data = load(root, json.loads(json.dumps(data.record())), batch_size=4)
    loader, _ = create_loaders(cfg, data, {**CONFIG, 'crop_mode': 'center'}, data.record())
    loader.set_epoch(1)
    assert torch.equal(torch.cat([target for _, target in loader]), epochs[1])


@pytest.mark.parametrize('ranks', [2, 3, 8])
def test_several_processes_share_an_epoch(ranks, root):
    for split, is_training in (('train', True), ('val', False)):
        seen, lengths = [], []
        for rank in range(ranks):
            reader = ShardReader(str(root), split=split, mode='RGB', is_training=is_training, batch_size=4)
            reader.dist_rank, reader.dist_num_replicas = rank, ranks
            images = [image.getpixel((0, 0))[0] // 5 for image, _ in reader]
            lengths.append(len(images))
            assert len(reader) == len(images)
            seen += images
        assert max(Counter(seen).values()) == 1
        if is_training:
            assert len(set(lengths)) == 1 and lengths[0] > 0
        else:
            assert sorted(seen) == list(range(21, 30))


def test_fewer_images_than_a_batch(root):
    data = load(root, batch_size=32)
    cfg = FinetuneCfg(data_dir=str(root), dataset='wds/x', batch_size=32, no_aug=True, workers=2)
    loader, _ = create_loaders(cfg, data, {**CONFIG, 'crop_mode': 'center'}, data.record())
    assert [len(target) for _, target in loader] == [20] and len(loader) == 1


def test_names_and_counts_without_an_info_file(root, tmp_path):
    expected = load(root)
    (root / '_info.json').unlink()
    splits = dict(train_split='x-train-{00..02}.tar', val_split='x-val-{00..01}.tar')
    with pytest.raises(ValueError, match="class_map: 'wds/x' is a stream that does not name its classes"):
        load(root, **splits)
    (tmp_path / 'map.txt').write_text('a\nb\nc\n')
    splits['class_map'] = str(tmp_path / 'map.txt')
    data = load(root, **splits)
    assert data.label_names == expected.label_names == ['a', 'b', 'c']
    assert data.train.reader.shards == expected.train.reader.shards
    assert load(root, **splits, train_num_samples=21).description == data.description
    with pytest.raises(ValueError, match=r'train_num_samples is 20, but the split .* has 21 images'):
        load(root, **splits, train_num_samples=20)
    recorded = json.loads(json.dumps(data.record()))
    (tmp_path / 'map.txt').unlink()
    assert load(root, recorded, **splits).record() == data.record()


def test_a_class_map_orders_the_classes_of_an_info_file(root, tmp_path):
    (tmp_path / 'map.txt').write_text('c\nb\na\n')
    data = load(root, class_map=str(tmp_path / 'map.txt'))
    assert data.label_names == ['c', 'b', 'a']
    assert [target for _, target in data.val] == [2 - number % 3 for number in range(21, 30)]


def test_labels_in_json_and_images_by_key(tmp_path):
    (tmp_path / 'map.txt').write_text('cat\ndog\n')
    for split in ('train', 'val'):
        names = ['dog', 'cat', 'dog']
        files = {}
        for number, name in enumerate(names):
            files[f'{split}{number}.photo.png'] = picture(number)
            files[f'{split}{number}.json'] = json.dumps({'what': {'kind': name}}).encode()
        write_shard(tmp_path / f'{split}.tar', files)
    keys = dict(train_split='train.tar', val_split='val.tar', class_map=str(tmp_path / 'map.txt'))
    with pytest.raises(ValueError, match='same images'):
        load(tmp_path, **keys, input_key='photo.png', target_key='what/kind')
    write_shard(tmp_path / 'val.tar', {**files, 'v.photo.png': picture(9), 'v.json': b'{"what": {"kind": "cat"}}'})
    data = load(tmp_path, **keys, input_key='photo.png', target_key='what/kind')
    assert [target for _, target in data.val] == [1, 0, 1, 0]
    for wrong, message in (
        (dict(input_key='jpg', target_key='what/kind'), r"input_key: .*val\.tar/val0 has no 'jpg'; it has json, photo"),
        (dict(input_key='photo.png', target_key='who'), r"target_key: the json of .*val0 has no 'who'; it has what"),
        (dict(input_key='photo.png'), r'target_key: .*val0 has no label \(cls\)'),
        (dict(input_key='photo.png', target_key='what'), "target_key: a label is {'kind': 'dog'}"),
    ):
        with pytest.raises(ValueError, match=message):
            list(load(tmp_path, **keys, **wrong).val)


def test_what_cannot_be_read_is_named(root):
    path = root / 'x-val-00.tar'
    good = {k: v for i in range(21, 25) for k, v in sample(i).items()}
    write_shard(path, {**good, '0023.png': good['0023.png'][:60]})
    with pytest.raises(ValueError, match=r'x-val-00\.tar/0023\.png cannot be read as an image \('):
        batches(root, workers=2)
    write_shard(path, {**good, '0023.png': b'no image'})
    with pytest.raises(ValueError, match=r'0023\.png cannot be read as an image \(its bytes are of no known format\)'):
        batches(root, workers=0)
    write_shard(path, {**good, '0023.cls': b'3'})
    with pytest.raises(ValueError, match='a label is 3, expected 0 to 2'):
        batches(root, workers=0)
    for extra in (1, -1):
        kept = dict(list({**good, **sample(25)}.items())[: 2 * (4 + extra)])
        write_shard(path, kept)
        with pytest.raises(ValueError, match=rf'x-val-00\.tar has {4 + extra} images, expected 4'):
            batches(root, workers=0)
    write_shard(path, good)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r'x-val-00\.tar'):
        batches(root, workers=0)
    path.write_bytes(b'no tar file')
    with pytest.raises(ValueError, match=r'the shard .*x-val-00\.tar cannot be read \('):
        batches(root, workers=0)
    (root / '_info.json').unlink()
    with pytest.raises(ValueError, match=r'cannot be opened \(the shard .*x-val-00\.tar cannot be read \('):
        load_pattern(root, 'x-val-{00..01}.tar')
    path.unlink()
    with pytest.raises(ValueError, match=r'there is no shard .*x-val-00\.tar'):
        load_pattern(root, 'x-val-{00..01}.tar')


def load_pattern(root, split):
    (root / 'map.txt').write_text('a\nb\nc\n')
    load(root, train_split=split, val_split='x-train-00.tar', class_map=str(root / 'map.txt'))


def test_mistakes_of_splits(root):
    for kwargs, message in (
        (dict(train_split='trian'), r"split 'trian', cannot be opened \(split trian not found in info"),
        (dict(val_split=''), "val_split: 'wds/x' is a stream, of which no part can be held out"),
        (dict(val_split='train'), 'has images of the train_split'),
        (dict(val_split='x-train-02.tar'), r"val_split: 'x-train-02\.tar' has the shard .*x-train-02\.tar"),
        (dict(fsdp=True), "fsdp: 'wds/x' is a stream"),
        (dict(data_dir=None), 'data_dir: no folder given'),
        (dict(data_dir='pipe:touch ran; #'), "data_dir: got 'pipe:touch ran; #', a command"),
        (dict(data_dir="https://x/';touch ran;'"), 'an address with blanks or quotes'),
        (dict(data_dir='PIPE:touch ran; #'), 'a command, expected the folder or address of shards'),
        (dict(dataset='wds/x', val_split='https://x.invalid/{0..1}.tar'), 'no _info.json says how many images .*https'),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load(root, **kwargs)
        assert len(str(caught.value).splitlines()) == 1


def test_shards_that_changed_are_named(root):
    recorded = json.loads(json.dumps(load(root).record()))
    write_shard(root / 'x-train-01.tar', {k: v for i in range(40, 43) for k, v in sample(i, txt=bytes(9999)).items()})
    with pytest.raises(ValueError, match=r'what the run began with: x-train-01\.tar \(3 images, \d+ bytes\) became'):
        load(root, recorded)


def test_what_webdataset_leaves_out_is_not_counted(tmp_path):
    path = tmp_path / 'a.tar'
    write_shard(
        path, {'__meta__/a.json': b'{}', 'noext': b'', **sample(1), **{f'dir/a.b/{k}': v for k, v in sample(2).items()}}
    )
    reader = ShardReader(str(tmp_path), split='a.tar', mode='L', is_training=False)
    assert reader.shards == [(str(path), 2)]
    assert [image.getpixel((0, 0)) for image, _ in reader] == [5, 10]
    assert not is_local('pipe:cat a.tar') and not is_local('s3://a.tar') and is_local(str(path))


def test_images_are_upright_and_in_their_mode():
    image = stripes(16, True, np.random.default_rng(0))
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, 'PNG', exif=exif)
    opened = open_bytes(file.getvalue(), 'L', 'x')
    assert opened.tobytes() == image.transpose(Image.Transpose.ROTATE_270).convert('L').tobytes()
    with pytest.raises(ValueError, match=r'^image: x cannot be read as an image \(it has 1000 x 1 pixels'):
        file = io.BytesIO()
        Image.new('L', (1000, 1)).save(file, 'PNG')
        open_bytes(file.getvalue(), 'L', 'x')
