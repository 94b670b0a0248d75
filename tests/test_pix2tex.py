"""pix2tex's encoder: what its authors' own code computed (see pix2tex_reference.py), and files in its layout."""

import json

import pytest
import timm
import torch
from conftest import randomise_, relative_difference
from layouts import pix2tex_layout
from pix2tex_reference import GOLDEN, SIZES, fill_, images

from timm_vitres.cli import main


def golden(model, size):
    """Return how far the class token and the last token of two images are from what the authors' code computed."""
    expected = torch.tensor(json.loads(GOLDEN.read_text())[f'{size[0]}x{size[1]}'])
    with torch.inference_mode():
        return relative_difference(model.forward_features(images(size))[:, (0, -1), :8], expected)


def test_it_computes_what_its_authors_code_does():
    model = fill_(timm.create_model('vitresnet_ocr'))
    for size in SIZES:
        assert golden(model, size) < 1e-5, size
    # every part of the architecture counts: the eps, and what is done with the positions
    weights = model.state_dict()
    for changes, size, least in (
        (dict(std_conv_eps=1e-8), (32, 32), 1e-2),
        (dict(pos_embed_fit='resample'), (32, 672), 0.1),
    ):
        other = timm.create_model('vitresnet_ocr', **changes).eval()
        other.load_state_dict(weights)
        assert golden(other, size) > least


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Return a model, and a file of it as pix2tex writes one."""
    model = randomise_(timm.create_model('vitresnet_ocr'))
    path = tmp_path_factory.mktemp('pix2tex') / 'weights.pth'
    torch.save(pix2tex_layout(model), path)
    return model, path


def test_a_file_is_loaded_in_one_call(written, caplog):
    own, path = written
    overlay = dict(file=str(path))
    loaded = timm.create_model('vitresnet_ocr', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert caplog.messages == ['pix2tex: 2 tensors of other parts are left out: decoder (2).']
    smaller = timm.create_model('vitresnet_ocr', pretrained=True, pretrained_cfg_overlay=overlay, img_size=(64, 256))
    generic = timm.create_model(
        'vitresnet',
        pretrained=True,
        pretrained_cfg_overlay=dict(overlay, num_classes=0, input_size=(1, 192, 672)),
        **dict(backbone='resnetv2', layers=(2, 3, 7), std_conv_eps=1e-6, embed_dim=256, depth=4, num_heads=8),
        pos_embed_fit='crop',
    )
    x = torch.randn(1, 1, 64, 224)
    with torch.inference_mode():
        expected = own.forward_features(x)
        for model in (loaded, smaller.eval(), generic.eval()):
            assert torch.equal(model.forward_features(x), expected)
    assert smaller.patch_embed.grid_size == (4, 16)
    config = timm.data.resolve_model_data_config(loaded)
    assert tuple(config['input_size']) == (1, 192, 672) and tuple(config['mean']) == (0.7931,)


def test_a_file_is_converted_without_a_word(written, tmp_path):
    own, path = written
    assert main(['convert', str(path), '--output', str(tmp_path / 'out')]) == 0
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert loaded.cfg == own.cfg and loaded.pretrained_cfg['architecture'] == 'vitresnet_ocr'
    assert loaded.cfg.std_conv_eps == 1e-6 and loaded.cfg.pos_embed_fit == 'crop'
    assert loaded.pretrained_cfg['license'] == 'mit' and loaded.patch_embed.img_size == (192, 672)
    x = torch.randn(1, 1, 96, 160)
    with torch.inference_mode():
        assert torch.equal(loaded.forward_features(x), own.forward_features(x))
    config = timm.data.resolve_model_data_config(loaded)
    assert tuple(config['input_size']) == (1, 192, 672) and tuple(config['std']) == (0.1738,)
