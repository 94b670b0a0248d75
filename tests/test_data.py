import numpy as np
import pytest
import timm
import torch
from conftest import stripes, write_folder
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_vitres
from timm_vitres.data import data_config, open_image
from timm_vitres.datasets import ImageFolder, stratified_split


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
    with torch.inference_mode():
        assert model.eval()(x).shape == (1, 1000)


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
    assert np.array_equal(np.asarray(opened), np.asarray(picture.quantize(16).convert('RGB')))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / 'deep.png')
    pixels = np.asarray(open_image(tmp_path / 'deep.png', 'L')).astype(float)
    assert np.abs(pixels - values / 257).max() <= 1
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / 'float.tiff')
    pixels = np.asarray(open_image(tmp_path / 'float.tiff', 'L')).astype(float)
    assert np.abs(pixels - values / 257).max() <= 1
    Image.fromarray(values.astype(np.float32) * 1000).save(tmp_path / 'wide.tiff')
    with pytest.raises(ValueError, match=r'wide\.tiff'):
        open_image(tmp_path / 'wide.tiff')


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


def test_image_folder(image_folder):
    folder = ImageFolder(image_folder)
    assert folder.classes == ['across', 'down'] and len(folder) == 24 and folder.targets.count(0) == 12
    image, target = folder[0]
    assert image.mode == 'RGB' and target == 0


def test_image_folder_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match='not a folder'):
        ImageFolder(tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='Found 0 images'):
        ImageFolder(tmp_path / 'empty')
    root = write_folder(tmp_path / 'images', per_class=2)
    (root / 'hollow').mkdir()
    with pytest.raises(ValueError, match=r'hollow.* has no image'):
        ImageFolder(root)
    (root / 'hollow').rmdir()
    with pytest.raises(ValueError, match='lacks: down'):
        ImageFolder(root, class_map={'across': 0})
    (root / 'across' / '0.png').rename(root / 'loose.png')
    with pytest.raises(ValueError, match='outside class folders'):
        ImageFolder(root)


def test_bad_images_are_named_or_skipped(image_folder):
    bad = image_folder / 'down' / '3.png'
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(ValueError, match=r'3\.png.*--skip-bad'):
        ImageFolder(image_folder)
    folder = ImageFolder(image_folder, skip_bad=True)
    assert len(folder) == 23 and folder.skipped == [str(bad)]
    for path in (image_folder / 'down').iterdir():
        path.write_text('')
    with pytest.raises(ValueError, match="class 'down'"):
        ImageFolder(image_folder, skip_bad=True)


def test_stratified_split():
    targets = [0] * 10 + [1] * 5 + [2] * 2
    first, second = stratified_split(targets, 0.2)
    assert sorted(first + second) == list(range(17))
    assert [[targets[i] for i in second].count(c) for c in (0, 1, 2)] == [2, 1, 1]
    assert stratified_split(targets, 0.2) == (first, second) != stratified_split(targets, 0.2, seed=1)
    with pytest.raises(ValueError, match='class 1 has 1 image'):
        stratified_split([0, 0, 1], 0.5)
    with pytest.raises(ValueError, match='val_frac'):
        stratified_split(targets, 1.0)
