"""Google's published names: what they tell, and files under them."""

import http.server
import threading
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import timm
import torch
from conftest import randomise_, relative_difference
from layouts import google_layout

from timm_vitres.cli import main
from timm_vitres.publishing.conversion import convert
from timm_vitres.weights import augreg
from timm_vitres.weights.augreg import BUCKET, read_name, url_of

SMALL = 'R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0'
TINY = 'R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0'
LARGE = 'R50_L_32-i1k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.1-sd_0.1'
PETS = f'{SMALL}--oxford_iiit_pet-steps_0k-lr_0.003-res_384'
# a name, and the architecture, classes and size that it tells
NAMES = [
    (SMALL, 'R26_S_32', 21843, 224),
    (TINY, 'R_Ti_16', 21843, 224),
    (LARGE, 'R50_L_32', 1000, 224),
    (f'{SMALL}--imagenet2012-steps_20k-lr_0.03-res_384', 'R26_S_32', 1000, 384),
    (PETS, 'R26_S_32', 37, 384),
    (f'{TINY}--cifar100-steps_10k-lr_0.003-res_224', 'R_Ti_16', 100, 224),
    (f'{LARGE}--resisc45-steps_2k-lr_0.01-res_224', 'R50_L_32', 45, 224),
    (f'{LARGE}--kitti-steps_0k-lr_0.01-res_384', 'R50_L_32', 4, 384),
    (f'{LARGE}--flowers-steps_0k-lr_0.01-res_384', 'R50_L_32', None, 384),
    ('imagenet21k/R50+ViT-B_16', 'R50+ViT-B_16', 21843, 224),
    ('imagenet21k+imagenet2012/R50+ViT-B_16', 'R50+ViT-B_16', 1000, 384),
    ('imagenet21k+imagenet2012/R50+ViT-B_16-224', 'R50+ViT-B_16', 1000, 224),
]


@pytest.mark.parametrize('name, architecture, num_classes, size', NAMES)
def test_what_a_name_tells(name, architecture, num_classes, size):
    folder = '' if name.startswith('imagenet21k') else 'augreg/'
    url = f'{BUCKET}vit_models/{folder}{name}.npz'
    for path in (name, f'/data/{name}.npz', url, url.replace('+', '%2B'), f'gs://vit_models/{folder}{name}.npz'):
        found = read_name(path)
        assert (found.architecture, found.num_classes, found.size) == (architecture, num_classes, size)
    for source in (name, f'{name}.npz', f'gs://vit_models/{folder}{name}.npz'):
        assert url_of(source) == url.replace('+', '%2B')
    assert url_of(url) == url


@pytest.mark.parametrize(
    'name',
    ['R26_S_32.npz', 'R50+ViT-B_16.npz', 'mine/R50+ViT-B_16.npz', 'B_16-i21k-300ep-lr_0.001-aug_light1-wd_0.1.npz', ''],
)
def test_other_names_tell_nothing(name):
    assert read_name(name) is None and url_of(name) is None


def write(folder, name, architecture, num_classes=5, size=224, **kwargs):
    """Write a file of random weights in Google's layout; return its path and timm's model of the same weights."""
    model = randomise_(timm.create_model(architecture, num_classes=num_classes, img_size=size, **kwargs))
    path = folder / f'{name}.npz'
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **google_layout(model))
    return path, model


def logits(model, size):
    with torch.inference_mode():
        return model.eval()(torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size))


# name, timm's class for it, its classes, its size, and how its images are preprocessed
FILES = [
    (f'{TINY}--cifar100-steps_10k-lr_0.003-res_224', 'vit_tiny_r_s16_p8_224', 100, 224, ('squash', 1.0, 'bilinear')),
    (f'{TINY}--imagenet2012-steps_20k-lr_0.03-res_384', 'vit_tiny_r_s16_p8_224', 1000, 384, (None, 1.0, 'bicubic')),
]
SLOW = [
    (f'{TINY}', 'vit_tiny_r_s16_p8_224', 21843, 224, (None, 0.9, 'bicubic')),
    (f'{TINY}--kitti-steps_0k-lr_0.01-res_384', 'vit_tiny_r_s16_p8_224', 4, 384, ('squash', 1.0, 'bilinear')),
    (f'{PETS}', 'vit_small_r26_s32_224', 37, 384, ('squash', 1.0, 'bilinear')),
    (f'{LARGE}--resisc45-steps_2k-lr_0.01-res_224', 'vit_large_r50_s32_224', 45, 224, ('squash', 1.0, 'bilinear')),
    ('imagenet21k+imagenet2012/R50+ViT-B_16', 'vit_base_r50_s16_224', 1000, 384, (None, 1.0, 'bicubic')),
]
FILES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize('name, theirs, num_classes, size, preprocessing', FILES)
def test_a_file_is_what_its_name_says(name, theirs, num_classes, size, preprocessing, tmp_path):
    path, reference = write(tmp_path, name, theirs, num_classes, size)
    assert main(['convert', str(path), '--output', str(tmp_path / 'out')]) == 0
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert model.num_classes == num_classes and model.patch_embed.img_size == (size, size)
    assert relative_difference(logits(model, size), logits(reference, size)) < 1e-6
    config = timm.data.resolve_model_data_config(model)
    crop_mode = None if config['crop_mode'] == 'center' else config['crop_mode']
    assert (crop_mode, config['crop_pct'], config['interpolation']) == preprocessing
    assert tuple(config['mean']) == tuple(config['std']) == (0.5,) * 3 and tuple(config['input_size']) == (
        3,
        size,
        size,
    )
    assert read_name(path).recipe in (tmp_path / 'out' / 'README.md').read_text()


def test_a_head_of_zeros_is_left_out(tmp_path, caplog):
    """As in imagenet21k/R50+ViT-B_16.npz, whose head reads a layer that no model uses."""
    path, reference = write(tmp_path, TINY, 'vit_tiny_r_s16_p8_224')
    arrays = dict(np.load(path))
    arrays.update(
        {key: np.zeros((192, 21843)[-array.ndim :]) for key, array in arrays.items() if key.startswith('head/')}
    )
    np.savez(path, **arrays)
    model = timm.create_model(f'local-dir:{convert(path, tmp_path / "out")}', pretrained=True).eval()
    assert 'Google JAX: the head is all zeros, and is left out: head.bias, head.weight.' in caplog.messages
    assert model.num_classes == 0
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert relative_difference(model.forward_features(x), reference.forward_features(x)) < 1e-6


@pytest.mark.parametrize(
    'name, size, num_classes, message',
    [
        (
            f'{SMALL}--cifar100-steps_10k-lr_0.003-res_224',
            224,
            100,
            r'says R26_S_32 \(vitresnet_small\), whose tensors',
        ),
        (
            f'{TINY}--cifar100-steps_10k-lr_0.003-res_384',
            224,
            100,
            'says 384 pixels, but the position table is for 224x224',
        ),
        (
            f'{TINY}--cifar100-steps_10k-lr_0.003-res_224',
            224,
            37,
            'says cifar100, which has 100 classes, but the head has 37',
        ),
        (TINY, 224, 1000, 'says i21k, which has 21843 classes, but the head has 1000'),
    ],
)
def test_a_name_that_contradicts_the_contents(name, size, num_classes, message, tmp_path, capsys):
    path, reference = write(tmp_path, name, 'vit_tiny_r_s16_p8_224', num_classes, size)
    assert main(['convert', str(path), '--output', str(tmp_path / 'out')]) == 1
    error = capsys.readouterr().err
    assert f'source: {path.name}: the name ' in error and 'give the file another name' in error
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    renamed = path.rename(tmp_path / 'renamed.npz')  # today's behaviour: by its contents
    model = timm.create_model(f'local-dir:{convert(renamed, tmp_path / "out")}', pretrained=True)
    assert relative_difference(logits(model, size), logits(reference, size)) < 1e-6


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Serve a folder as Google's bucket on the loopback address; files in `forbidden/` are refused as there."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / 'bucket'))

        def do_GET(self):
            if 'forbidden' in self.path or not Path(self.translate_path(self.path)).is_file():
                self.send_error(403)
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(augreg, 'BUCKET', f'http://127.0.0.1:{server.server_port}/')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    yield tmp_path / 'bucket'
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize('form', ['{name}', '{bucket}vit_models/augreg/{name}.npz'])
def test_a_published_file_is_downloaded(form, bucket, tmp_path, capsys):
    name = f'{TINY}--cifar100-steps_10k-lr_0.003-res_224'
    source = form.format(name=name, bucket=augreg.BUCKET)
    assert main(['convert', source, '--output', str(tmp_path / 'out')]) == 1
    error = capsys.readouterr().err
    assert f'{name}.npz: could not be downloaded (HTTP Error 403' in error and 'Traceback' not in error
    _, reference = write(bucket / 'vit_models' / 'augreg', name, 'vit_tiny_r_s16_p8_224', 100)
    assert main(['convert', source, '--output', str(tmp_path / 'out')]) == 0
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert relative_difference(logits(model, 224), logits(reference, 224)) < 1e-6
    assert len(list((tmp_path / 'hub' / 'checkpoints').rglob(f'{name}.npz'))) == 1


def test_names_in_the_paths_of_windows():
    path = 'imagenet21k+imagenet2012/R50+ViT-B_16.npz'
    assert read_name(PureWindowsPath('C:/models', path)) == read_name(f'/models/{path}') is not None
