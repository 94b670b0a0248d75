import logging
import os
import struct

import numpy as np
import pytest
import timm
import torch
from conftest import stripes, write_folder
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config

import timm_vitres
from timm_vitres.data import data_config, example_images, open_image
from timm_vitres.training.shards import open_bytes
from timm_vitres.walking import image_suffixes


@pytest.fixture
def picture():
    return stripes(50, True, np.random.default_rng(0)).resize((60, 40))


def test_preprocess_is_timms_transform(picture):
    model = timm.create_model('vitresnet_tiny', device='meta')
    expected = create_transform(**resolve_model_data_config(model), is_training=False)(picture)
    x = timm_vitres.preprocess(picture, model)
    assert x.shape == (1, 3, 224, 224)
    assert torch.equal(x[0], expected)
    # R+ViT weights want mean and deviation 0.5
    assert x.min() >= -1 and x.max() <= 1


def test_preprocess_takes_paths_and_arrays(picture, tmp_path):
    model = timm.create_model('test_vitresnet')
    expected = timm_vitres.preprocess(picture, model)
    picture.save(tmp_path / 'picture.png')
    for source in (tmp_path / 'picture.png', str(tmp_path / 'picture.png'), np.asarray(picture)):
        assert torch.equal(timm_vitres.preprocess(source, model), expected)


def test_preprocess_follows_the_model(picture):
    model = timm.create_model('test_vitresnet', in_chans=1, img_size=(64, 96)).bfloat16()
    x = timm_vitres.preprocess(picture, model)
    assert x.shape == (1, 1, 64, 96) and x.dtype == torch.bfloat16
    grey = create_transform(**data_config(model), is_training=False)(picture.convert('L'))
    assert torch.equal(x[0], grey.bfloat16())


def test_data_config_size():
    assert data_config(timm.create_model('vitresnet_small', device='meta'))['input_size'] == (3, 224, 224)
    asked = timm.create_model('vitresnet_small', img_size=288, device='meta')
    assert data_config(asked)['input_size'] == (3, 288, 288)
    assert data_config(asked, img_size=(64, 96))['input_size'] == (3, 64, 96)
    assert data_config(timm.create_model('vitresnet_base', device='meta'))['crop_pct'] == 1.0


def test_exif_orientation(picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / 'turned.png', exif=exif)
    assert open_image(tmp_path / 'turned.png').size == (40, 60)
    assert np.array_equal(np.asarray(open_image(tmp_path / 'turned.png')), np.rot90(np.asarray(picture), -1))


def test_palette_with_transparency(picture, tmp_path):
    picture.quantize(16).save(tmp_path / 'palette.png', transparency=bytes(range(16)))
    opened = open_image(tmp_path / 'palette.png')
    assert opened.mode == 'RGB'
    opaque = np.asarray(picture.quantize(16).convert('RGB')).astype(float)
    alpha = np.asarray(picture.quantize(16))[..., None] / 255
    assert np.abs(np.asarray(opened) - (alpha * opaque + (1 - alpha) * 255)).max() <= 1


@pytest.mark.parametrize('kind', ['RGBA', 'LA', 'P', 'L', 'RGB'])
def test_what_is_transparent_lies_on_white(kind, tmp_path):
    """As every viewer shows a black drawing without a ground, and not black on black."""
    drawing = Image.new('LA', (40, 60), (0, 0))
    drawing.paste((0, 255), (10, 10, 20, 20))
    expected = np.full((60, 40), 255)
    expected[10:20, 10:20] = 0
    if kind in ('RGBA', 'LA'):
        drawing.convert(kind).save(tmp_path / 'drawing.png')
    elif kind == 'P':
        drawing.convert('RGBA').quantize(4).save(tmp_path / 'drawing.png')
    else:  # one of its colours is no colour
        colours = Image.fromarray(np.where(expected == 255, 128, 0).astype(np.uint8))
        ground = {'L': 128, 'RGB': (128, 128, 128)}[kind]
        colours.convert(kind).save(tmp_path / 'drawing.png', transparency=ground)
    for mode in ('L', 'RGB'):
        opened = np.asarray(open_image(tmp_path / 'drawing.png', mode))
        assert np.array_equal(opened, expected if mode == 'L' else np.stack([expected] * 3, -1)), mode
    if kind == 'RGBA':
        assert np.asarray(open_image(tmp_path / 'drawing.png', 'RGBA'))[0, 0].tolist() == [0, 0, 0, 0]


def test_a_negative_of_16_bits_is_read_as_those_of_8(tmp_path):
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / '16.tif', tiffinfo={262: 0})
    Image.fromarray((values / 257).astype(np.uint8)).save(tmp_path / 'plain.png')
    assert Image.open(tmp_path / '16.tif').tag_v2[262] == 0
    plain = np.asarray(open_image(tmp_path / 'plain.png', 'L')).astype(int)
    for mode, channel in (('L', ...), ('RGB', (..., 0)), ('RGBA', (..., 0))):
        opened = np.asarray(open_image(tmp_path / '16.tif', mode)).astype(int)
        assert np.abs(opened[channel] + plain - 255).max() <= 1
    assert opened[..., 3].min() == 255


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / 'deep.png')
    pixels = np.asarray(open_image(tmp_path / 'deep.png', 'L')).astype(float)
    assert np.abs(pixels - values / 257).max() <= 1
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / 'float.tiff')
    pixels = np.asarray(open_image(tmp_path / 'float.tiff', 'L')).astype(float)
    assert np.abs(pixels - values / 257).max() <= 1
    Image.fromarray(values.astype(np.float32) * 1000).save(tmp_path / 'wide.tiff')
    with pytest.raises(ValueError, match=r'wide\.tiff .* range from 0 to 6\.5535e\+07, expected 0 to 1'):
        open_image(tmp_path / 'wide.tiff')


def twelve_bits(values) -> bytes:
    """Return a TIFF of 12 bits, as microscopes write them and Pillow does not: two pixels in three bytes."""
    height, width = values.shape
    first, second = values.reshape(-1, 2).astype(int).T
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b''.join(struct.pack('<HHII', tag, 4 if tag in (273, 279) else 3, 1, tags[tag]) for tag in sorted(tags))
    return struct.pack('<2sHI', b'II', 42, 8 + len(data)) + data + struct.pack('<H', len(tags)) + entries + bytes(4)


def test_twelve_bits_are_no_sixteen(tmp_path):
    values = np.linspace(0, 4095, 40 * 60).reshape(40, 60)
    (tmp_path / 'deep.tiff').write_bytes(twelve_bits(values))
    pixels = np.asarray(open_image(tmp_path / 'deep.tiff', 'L')).astype(float)
    assert np.abs(pixels - values * 255 / 4095).max() <= 1


@pytest.mark.parametrize('brightest', [200, 60000])
def test_an_image_is_not_scaled_by_its_own_brightest_pixel(brightest, tmp_path):
    values = np.linspace(0, brightest, 40 * 60).reshape(40, 60)
    for name in ('deep.png', 'deep.tiff'):
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / name)
    # Pillow 10.1 reads such files, but writes none
    (tmp_path / 'deep.pgm').write_bytes(b'P5 60 40 65535\n' + values.astype('>u2').tobytes())
    for name in ('deep.png', 'deep.pgm', 'deep.tiff'):
        pixels = np.asarray(open_image(tmp_path / name, 'L')).astype(float)
        assert np.abs(pixels - values / 257).max() <= 1
    # resampling overshoots
    Image.fromarray((values / 60000 * 1.1 - 0.02).astype(np.float32)).save(tmp_path / 'float.tiff')
    pixels = np.asarray(open_image(tmp_path / 'float.tiff', 'L')).astype(float)
    assert np.abs(pixels - 255 * (values / 60000 * 1.1 - 0.02).clip(0, 1)).max() <= 1
    Image.fromarray(values.astype(np.int32)).save(tmp_path / 'integers.tiff')
    with pytest.raises(
        ValueError, match=r'integers\.tiff .*mode I, of which no range is known; convert it to 8 or 16 bits'
    ):
        open_image(tmp_path / 'integers.tiff')
    with pytest.raises(ValueError, match='range from nan to nan'):
        open_image(Image.fromarray(np.full((4, 4), np.nan, np.float32)))


def test_grey_in_colour_and_colour_in_grey(picture):
    grey = picture.convert('L')
    assert np.array_equal(np.asarray(open_image(grey))[..., 1], np.asarray(grey))
    assert open_image(picture, 'L').mode == 'L'
    with pytest.raises(ValueError, match='in_chans: the model takes 2'):
        timm_vitres.preprocess(picture, timm.create_model('test_vitresnet', in_chans=2))


def test_unreadable_files_are_named(tmp_path, picture):
    model = timm.create_model('test_vitresnet')
    (tmp_path / 'text.png').write_text('no picture')
    picture.save(tmp_path / 'whole.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:400])
    for name in ('text.png', 'cut.jpg'):
        with pytest.raises(ValueError, match=name):
            timm_vitres.preprocess(tmp_path / name, model)
    with pytest.raises(FileNotFoundError, match=r'none\.png'):
        timm_vitres.preprocess(tmp_path / 'none.png', model)
    with pytest.raises(TypeError, match='image: got int'):
        timm_vitres.preprocess(3, model)


def exif_with(*tags) -> bytes:
    """Return EXIF bytes with (number, type, count, four bytes of value) each, which no writer of PIL would write."""
    entries = b''.join(struct.pack('<HHI', number, kind, count) + value for number, kind, count, value in tags)
    return b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<H', len(tags)) + entries + bytes(4)


TURN = (0x0112, 3, 1, struct.pack('<HH', 6, 0))  # orientation 6, a short as it should be


@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_orientation_is_turned_as_pil_turns_it_and_once(orientation, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ('picture.jpg', 'picture.png', 'picture.webp', 'picture.tiff'):
        path = tmp_path / name
        picture.save(path, exif=exif)
        with Image.open(path) as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened).convert('RGB'))
            from_pil = open_image(opened)
        upright = open_image(path)
        assert np.array_equal(np.asarray(upright), expected) and np.array_equal(np.asarray(from_pil), expected)
        assert np.array_equal(np.asarray(open_image(upright)), expected)


def test_mistyped_exif_tags(picture, tmp_path):
    """A wrong tag beside the orientation makes no difference; by a wrong one, or damaged tags, nothing is turned."""
    path = tmp_path / 'tags.jpg'
    # ImageWidth as a text, the camera's maker as a number, XResolution as bytes: PIL cannot write them again
    for wrong in ((0x0100, 2, 4, b'wide'), (0x010F, 11, 1, b'abcd'), (0x011A, 7, 4, b'abcd')):
        picture.save(path, exif=exif_with(wrong, TURN))
        with pytest.raises((struct.error, AttributeError, TypeError)), Image.open(path) as opened:
            ImageOps.exif_transpose(opened)
        assert open_image(path).size == (40, 60)
    picture.save(path)
    plain = np.asarray(open_image(path))
    wrong = ((0x0112, 2, 4, b'six\0'), (0x0112, 11, 1, b'abcd'), (0x0112, 3, 1, struct.pack('<HH', 9, 0)))
    damaged = (b'Exif\0\0', b'Exif\0\0no tags', exif_with(TURN)[:20], b'Exif\0\0II*\0\xff\xff\xff\xff')
    for exif in (*(exif_with(tag) for tag in wrong), *damaged):
        picture.save(path, exif=exif)
        assert np.array_equal(np.asarray(open_image(path)), plain), exif


ERRORS = [struct.error('unpack'), KeyError('tag'), ZeroDivisionError(), TypeError('a\nb'), IndexError(), MemoryError()]


@pytest.mark.parametrize('error', [*ERRORS, AssertionError(), RecursionError(), OverflowError()], ids=repr)
def test_whatever_decoding_raises_is_the_images_error(error, picture, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    path = tmp_path / 'picture.png'
    picture.save(path)
    for name in ('load', 'convert'):
        with monkeypatch.context() as patch:
            patch.setattr(f'PIL.PngImagePlugin.PngImageFile.{name}', fails, raising=False)
            with pytest.raises(ValueError, match=r'picture\.png cannot be read as an image \(.+\)\.') as caught:
                open_image(path)
            assert '\n' not in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr('PIL.PngImagePlugin.PngImageFile.getexif', fails)
        assert np.array_equal(np.asarray(open_image(path)), np.asarray(picture))
    monkeypatch.setattr(Image, 'open', lambda path, formats: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_image(path)


def test_what_is_no_file_to_read_from(picture, tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')  # opening it would wait for a writer
    (tmp_path / 'dangling.png').symlink_to('gone.png')
    (tmp_path / 'circle.png').symlink_to('circle.png')
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'empty.png').write_text('')
    picture.save(tmp_path / 'two\nlines.png')
    for name, kind, message in (
        ('pipe.png', ValueError, r'pipe\.png is no regular file'),
        ('dangling.png', FileNotFoundError, r'dangling\.png is a link to nothing \(gone\.png\)'),
        ('circle.png', FileNotFoundError, r'circle\.png is a link to nothing'),
        ('folder.png', ValueError, r'folder\.png is a folder'),
        ('empty.png', ValueError, r'empty\.png cannot be read'),
        ('empty.png/x', FileNotFoundError, r'there is no file .*empty\.png/x'),
        ('a\0b.png', ValueError, r'a\\x00b\.png cannot be opened'),
        ('long' * 100, ValueError, 'cannot be opened'),
        ('none\n.png', FileNotFoundError, r'there is no file .*none\\n\.png'),
    ):
        with pytest.raises(kind, match=message) as caught:
            open_image(str(tmp_path / name))
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match='/dev/zero is no regular file'):
        open_image('/dev/zero')
    assert open_image(tmp_path / 'two\nlines.png').size == (60, 40)


def test_images_that_are_next_to_lines(tmp_path):
    """Resized as timm does it, 10000 x 1 pixels would be 2240000 x 224: 1.5 GB."""
    Image.new('RGB', (10000, 1)).save(tmp_path / 'line.png')
    assert (tmp_path / 'line.png').stat().st_size < 200
    model = timm.create_model('test_vitresnet')
    for image in (tmp_path / 'line.png', Image.new('L', (1, 10000)), np.zeros((10000, 99), np.uint8)):
        with pytest.raises(ValueError, match=r'pixels; its longer side may be up to 100 times the shorter'):
            timm_vitres.preprocess(image, model)
    assert open_image(Image.new('L', (1000, 10))).size == (1000, 10)


def test_arrays_that_are_no_images():
    for array in (np.zeros((4, 4), complex), np.zeros((4, 4, 7), np.uint8), np.zeros((2, 2), object)):
        with pytest.raises(TypeError, match='image: got'):
            open_image(array)
    with pytest.raises(ValueError, match='it has 5 x 0 pixels'):
        open_image(np.zeros((0, 5), np.uint8))


EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n'


def test_a_program_is_no_image(tmp_path, monkeypatch):
    """Pillow would run it by Ghostscript, whatever the suffix."""
    path = tmp_path / 'cat.jpg'
    path.write_bytes(EPS)
    with Image.open(path) as image:
        assert image.format == 'EPS'
    with pytest.raises(ValueError, match=r'cat\.jpg cannot be read as an image \(cannot identify'):
        open_image(path)
    with pytest.raises(ValueError, match='its bytes are of no known format'):
        open_bytes(EPS, 'RGB', 'cat')
    assert not {'.eps', '.ps'} & image_suffixes() and '.png' in image_suffixes()


def test_example_images_are_taken_evenly(tmp_path, model):
    root = write_folder(tmp_path / 'images', per_class=4)
    for limit, names in (
        (2, ['across/0.png', 'down/0.png']),
        (4, ['across/0.png', 'across/2.png', 'down/0.png', 'down/2.png']),
    ):
        expected = torch.cat([timm_vitres.preprocess(root / name, model) for name in names])
        assert torch.equal(example_images([root], model, limit=limit), expected)


def test_example_images_are_found_as_a_folder_is_read(tmp_path, caplog):
    root = write_folder(tmp_path / 'images', per_class=2)
    with Image.open(root / 'down' / '1.png') as image:
        image.save(root / 'down' / '10.WEBP', lossless=True)
    (root / 'down' / '1.png').unlink()
    (root / 'down' / 'again').symlink_to(root)
    (root / '.hidden').mkdir()
    (root / '.hidden' / 'thumb.png').write_text('')
    model = timm.create_model('test_vitresnet', img_size=32)
    with caplog.at_level(logging.WARNING):
        x = example_images([root], model)
    names = ['across/0.png', 'across/1.png', 'down/0.png', 'down/10.WEBP']
    assert torch.equal(x, torch.cat([timm_vitres.preprocess(root / name, model) for name in names]))
    assert '2 files or folders are left out' in caplog.text
    with pytest.raises(FileNotFoundError, match=r'there is no file .*nowhere'):
        example_images([tmp_path / 'nowhere'], model)


def test_a_grey_array_may_have_an_axis_of_one_channel():
    model = timm.create_model('test_vitresnet', in_chans=1)
    grey = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    assert torch.equal(timm_vitres.preprocess(grey[..., None], model), timm_vitres.preprocess(grey, model))
