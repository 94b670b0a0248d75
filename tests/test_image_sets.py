"""The image sets that hybrids are compared on, benchmarks/image_sets.py and drawings.py: what is in them, and where."""

import csv
import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'


@pytest.fixture
def image_sets(script):
    return script('image_sets')


@pytest.fixture
def drawings(image_sets):
    import drawings

    return drawings


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def write_fashion(folder, train, test):
    """Write (images, labels) of both parts as Fashion-MNIST is."""
    folder.mkdir(exist_ok=True)
    for part, (images, labels) in (('train', train), ('t10k', test)):
        for kind, values, header in (('images-idx3', images, 16), ('labels-idx1', labels, 8)):
            with gzip.open(folder / f'{part}-{kind}-ubyte.gz', 'wb') as file:
                file.write(bytes(header) + np.asarray(values, np.uint8).tobytes())
    return folder


def plain(values):
    """Return images of one grey value each, by which they are known on a canvas."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None], (len(values), 28, 28))


def test_a_tenth_is_of_every_class(image_sets, tmp_path):
    train = np.random.default_rng(0).integers(0, 256, (200, 28, 28)), np.arange(200) % 10
    source = write_fashion(tmp_path / 'source', train, (train[0][:20], train[1][:20]))
    folder = image_sets.write('fmnist10', tmp_path, source)
    assert folder == tmp_path / 'fmnist10'
    found = sorted((folder / 'train').rglob('*.png'))
    assert Counter(path.parent.name for path in found) == dict.fromkeys(image_sets.CLASSES_OF_FASHION, 2)
    for path in found:
        assert (np.asarray(Image.open(path)) == train[0][int(path.stem)]).all()
        assert path.parent.name == image_sets.CLASSES_OF_FASHION[train[1][int(path.stem)]]
    assert len(list((folder / 'test').rglob('*.png'))) == 20
    whole = image_sets.write('fmnist', tmp_path, source)
    assert len(list((whole / 'train').rglob('*.png'))) == 200


@pytest.mark.parametrize('name', ['fmnist10', 'pairs'])
def test_a_set_is_written_once_and_always_the_same(image_sets, tmp_path, monkeypatch, name):
    monkeypatch.setattr(image_sets, 'CANVASES', {'train': 20, 'test': 20})
    labels = np.arange(60) % 10
    images = np.random.default_rng(0).integers(0, 256, (120, 28, 28))
    source = write_fashion(tmp_path / 'source', (images[:60], labels), (images[60:], labels))
    first = contents(image_sets.write(name, tmp_path / 'a', source))
    assert first == contents(image_sets.write(name, tmp_path / 'b', source)) and first
    (tmp_path / 'a' / name / 'mine').write_text('of the user')
    image_sets.write(name, tmp_path / 'a', source)
    assert (tmp_path / 'a' / name / 'mine').exists()


def test_an_interrupted_set_is_not_there(image_sets, tmp_path, monkeypatch):
    def broken(source, left_out):
        yield image_sets.Entry('train', 'a', '0.png', np.zeros((4, 4), np.uint8))
        raise KeyboardInterrupt

    monkeypatch.setitem(image_sets.SETS, 'elpv', broken)
    with pytest.raises(KeyboardInterrupt):
        image_sets.write('elpv', tmp_path)
    assert not (tmp_path / 'elpv').exists()


def test_no_image_overwrites_another(image_sets, tmp_path, monkeypatch):
    entry = image_sets.Entry('train', 'a', '0.png', np.zeros((4, 4), np.uint8))
    monkeypatch.setitem(image_sets.SETS, 'elpv', lambda source, left_out: [entry, entry])
    with pytest.raises(RuntimeError, match='two images have the name'):
        image_sets.write('elpv', tmp_path)


@pytest.mark.parametrize(
    ('name', 'advice'),
    [
        ('fmnist', 'apt-get install dataset-fashion-mnist'),
        ('pairs', 'apt-get install dataset-fashion-mnist'),
        ('openclipart', 'apt-get install openclipart-png'),
    ],
)
def test_missing_data_are_a_sentence(image_sets, tmp_path, name, advice):
    with pytest.raises(SystemExit, match=f'is missing: {advice}'):
        image_sets.write(name, tmp_path, tmp_path / 'nowhere')
    assert not (tmp_path / name).exists()


def test_a_missing_package_is_a_sentence(image_sets, tmp_path, monkeypatch):
    def missing(package):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(image_sets, 'files', missing)
    with pytest.raises(SystemExit, match='pip install elpv-dataset'):
        image_sets.write('elpv', tmp_path)


def test_canvases_show_what_their_class_says(image_sets, tmp_path):
    """Grey values tell which photographs a canvas shows, and that none is on two canvases."""
    labels = np.arange(70) % 10
    train, test = np.arange(1, 71), np.arange(101, 171)
    train[:10], test[:10] = 200, train[10:20]  # photographs that are there twice, within and across the parts
    source = write_fashion(tmp_path / 'source', (plain(train), labels), (plain(test), labels))
    classes = dict(zip([*train[10:], *test[10:]], [*labels[10:], *labels[10:]]))
    shown, answers = [], Counter()
    for entry in image_sets.pairs(source, {'train': 20, 'test': 20}):
        values, counts = np.unique(entry.image[entry.image > 0], return_counts=True)
        assert entry.image.shape == (64, 64)
        if entry.label == 'same':
            assert counts.tolist() == [2 * 28 * 28]
        else:
            assert counts.tolist() == [28 * 28, 28 * 28]
            assert classes.get(values[0], 0) == classes.get(values[1], 0)
        assert set(values) <= (set(train) if entry.part == 'train' else set(test))
        shown += values.tolist()
        answers[entry.part, entry.label] += 1
    assert set(answers.values()) == {10} and len(answers) == 4
    assert len(shown) == len(set(shown)) == 60


def test_too_few_photographs_are_a_sentence(image_sets, tmp_path):
    source = write_fashion(tmp_path / 'source', *[(plain(range(1, 11)), range(10))] * 2)
    with pytest.raises(SystemExit, match='1 photographs of class 0 are too few for 2 canvases'):
        list(image_sets.pairs(source, {'train': 20}))


def test_places_are_all_over_the_canvas(image_sets):
    generator = np.random.default_rng(0)
    image = np.full((28, 28), 255, np.uint8)
    mean = np.mean([image_sets.canvas(image, image, generator) > 0 for _ in range(300)], axis=0)
    assert mean[:4].max() > 0 and mean[-4:].max() > 0 and mean[:, :4].max() > 0 and mean[:, -4:].max() > 0
    np.testing.assert_allclose(mean, mean[::-1], atol=0.12)
    np.testing.assert_allclose(mean, mean[:, ::-1], atol=0.12)


def test_solar_cells_are_split_as_published(image_sets, tmp_path):
    """Three quarters train, and each probability and cell type is held out in proportion."""
    folder = image_sets.write('elpv', tmp_path)
    found = {path.name: path.relative_to(folder).parts[:2] for path in folder.rglob('*.png')}
    table = [line.split() for line in (Path(image_sets.files('elpv_dataset')) / 'data/labels.csv').open()]
    assert len(found) == len(table) == 2624
    groups = {}
    for path, probability, kind in table:
        part, label = found[Path(path).name]
        assert label == ('defective' if float(probability) > 0.5 else 'functional')
        groups.setdefault((probability, kind), []).append(part)
    assert len(groups) == 8
    assert all(abs(parts.count('test') - len(parts) / 4) <= 0.5 for parts in groups.values())
    assert Counter(part for parts in groups.values() for part in parts) == {'train': 1970, 'test': 654}
    graded = image_sets.write('elpv_grades', tmp_path)
    grades = {path.name: path.relative_to(graded).parts[:2] for path in graded.rglob('*.png')}
    assert sum(part == 'val' for part, _ in grades.values()) == 197
    merged = {
        name: (part.replace('val', 'train'), image_sets.class_of_grade(grade)) for name, (part, grade) in grades.items()
    }
    assert merged == found
    for path, probability, kind in table:
        percent, cell = grades[Path(path).name][1].split()
        assert abs(int(percent) - 100 * float(probability)) < 1 and cell == kind


def drawing(seed):
    """Return a random drawing (60, 90, 4) whose left third and right margin are transparent."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 200, (6, 9, 4)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
    image[..., 3] = 255
    image[:, :30, 3] = image[:, 80:, 3] = 0
    return image


@pytest.fixture
def clipart(drawings, tmp_path, monkeypatch):
    """A small Openclipart: two subjects of 20 drawings, a family by name, one by sight, and all that is left out."""
    monkeypatch.setattr(drawings, 'MINIMUM', 6)
    monkeypatch.setattr(drawings, 'MOST', 4)
    root = tmp_path / 'png'

    def save(name, pixels):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)

    letters = 'abcdefghijklmnopqrst'
    for number, letter in enumerate(letters):
        save(f'animals/of_{letter}_01.png', drawing(number))
        save(f'tools/deep/of_{letter}.png', drawing(100 + number))
    for number in range(6):
        save(f'animals/dino_{number:02d}.png', drawing(200 + number))
    for number, letter in enumerate('xyz'):  # copies in other colours, under names that share nothing
        lighter = drawing(300)
        lighter[..., :3] += np.uint8(15 * number)
        save(f'tools/{letter * 3}.png', lighter)
    save('plants/rare.png', drawing(400))
    save('unsorted/any.png', drawing(401))
    save('animals/blank.png', np.zeros((20, 20, 4), np.uint8))
    save('animals/shared.png', drawing(402))
    (root / 'animals/bad.png').write_bytes(b'no image')
    (root / 'animals/more').mkdir()
    (root / 'animals/more/again.png').symlink_to('../of_a_01.png')
    (root / 'tools/shared.png').symlink_to('../animals/shared.png')
    monkeypatch.setattr(drawings, 'LARGEST', 10_000)
    save('animals/huge.png', np.zeros((101, 100, 4), np.uint8))
    return root


def test_drawings_are_kept_or_counted(image_sets, clipart, tmp_path):
    folder = image_sets.write('openclipart', tmp_path, clipart)
    with (folder / 'left_out.csv').open() as file:
        left_out = {row['path']: row['reason'] for row in csv.DictReader(file)}
    assert left_out == {
        'animals/bad.png': 'unreadable',
        'animals/blank.png': 'blank',
        'animals/dino_04.png': 'beyond the first 4 of a family',
        'animals/dino_05.png': 'beyond the first 4 of a family',
        'animals/huge.png': 'larger than 20 megapixels',
        'animals/more/again.png': 'a link to another drawing of its subject',
        'animals/shared.png': 'in the folders of two subjects',
        'tools/shared.png': 'in the folders of two subjects',
        'plants/rare.png': 'of a subject with fewer than 6',
        'unsorted/any.png': 'in a folder that is no subject',
    }
    kept = {path.parent.name + '/' + path.name: path.parent.parent.name for path in folder.rglob('*.png')}
    assert len(kept) + len(left_out) == sum(1 for _ in clipart.rglob('*.png'))
    assert Counter((name.split('/')[0], part) for name, part in kept.items()) == {
        ('animals', 'train'): 20, ('animals', 'test'): 4, ('tools', 'train'): 19, ('tools', 'test'): 4,
    }  # fmt: skip
    assert 'left out: 2 in the folders of two subjects' in image_sets.summary(folder)


def test_families_are_on_one_side(drawings, clipart):
    """Whatever the seed of the split, variants by name and by sight stay together."""
    names = sorted(path.relative_to(clipart).as_posix() for path in clipart.rglob('*_*.png') if not path.is_symlink())
    names += [f'tools/{letter * 3}.png' for letter in 'xyz']
    groups = drawings.families(names, np.stack([drawings.squared(clipart / name) for name in names]))
    together = sorted(sorted(names[index] for index in group) for group in groups if len(group) > 1)
    assert together == [[f'animals/dino_{n:02d}.png' for n in range(6)], [f'tools/{x * 3}.png' for x in 'xyz']]
    subjects = [name.partition('/')[0] for name in names]
    test = drawings.held_out(groups, subjects)
    assert test and all(len(test & set(group)) in (0, len(group)) for group in groups)


def test_names_of_variants(drawings):
    def same(first, second):
        return drawings.stem(first) == drawings.stem(second)

    assert same('a/hummer_01.png', 'a/vehicles/hummer_07.png')
    assert same('a/people_krug_01a.png', 'a/people_krug_05b.png')
    assert not same('a/hummer_01.png', 'b/hummer_01.png') and not same('a/cat_01.png', 'a/dog_01.png')
    assert not same('a/01.png', 'a/02.png')  # a name that is a number says nothing


def test_a_drawing_is_trimmed_and_squared(drawings, tmp_path):
    pixels = np.zeros((60, 90, 4), np.uint8)
    pixels[10:20, 30:70] = (200, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / 'bar.png')
    image = drawings.squared(tmp_path / 'bar.png')
    assert image.shape == (96, 96, 3)
    assert (abs(image[45:51, 8:-8].astype(int) - (200, 0, 0)) < 12).all()
    assert (image[:30] == 255).all() and (image[-30:] == 255).all()


@pytest.mark.slow
def test_sets_are_as_large_as_the_table_says(image_sets, tmp_path):
    """This needs the Debian packages dataset-fashion-mnist and openclipart-png."""
    rows = [line.split('|')[1:-1] for line in image_sets.__doc__.splitlines() if line.startswith('| ')][1:]
    assert [row[0].strip() for row in rows] == list(image_sets.SETS)
    for name, _, images, classes, share in rows:
        folder = image_sets.write(name.strip(), tmp_path)
        for part, count in zip(('train', 'test'), images.split('+')):
            found = Counter(path.parent.name for path in (folder / part).rglob('*.png'))
            assert sum(found.values()) == int(count.replace(',', '')) and len(found) == int(classes), (name, part)
        assert f'{100 * max(found.values()) / sum(found.values()):.1f}' == f'{float(share.split("%")[0]):.1f}', name
