"""config.json is read before timm reads it, so that what is wrong with it is one sentence that names the field."""

import json

import numpy as np
import pytest
import timm
import torch

import timm_vitres
from timm_vitres.arguments import load_model
from timm_vitres.data import check_data_config
from timm_vitres.publishing.config_file import read_config
from timm_vitres.publishing.hub import check_folder


@pytest.fixture
def folder(tmp_path):
    return timm_vitres.save(timm.create_model('test_vitresnet', num_classes=2), tmp_path, label_names=['a', 'b'])


@pytest.mark.parametrize(
    'text',
    [
        b'',
        b'no json',
        b'{"architecture": ',
        b'[]',
        b'null',
        b'"text"',
        '{"name": "caf\xe9"}'.encode('latin-1'),
        b'\x80\x02',
    ],
)
def test_what_is_no_config_is_named(text, folder):
    (folder / 'config.json').write_bytes(text)
    with pytest.raises(ValueError, match=r'config\.json: (is no JSON that can be read|holds)') as error:
        read_config(folder)
    assert '\n' not in str(error.value)
    for load in (lambda: load_model(f'local-dir:{folder}'), lambda: check_folder(folder)):
        with pytest.raises(ValueError, match=r'config\.json: '):
            load()


@pytest.mark.parametrize(
    'top, cfg, message',
    [
        (dict(architecture=None), {}, 'architecture: got None'),
        (dict(architecture=['x']), {}, r"architecture: got \['x'\]"),
        (dict(architecture='resnet_of_mine'), {}, "architecture: got 'resnet_of_mine'"),
        (dict(model_args='x'), {}, "model_args: got 'x'"),
        (dict(pretrained_cfg=[1]), {}, r'pretrained_cfg: got \[1\]'),
        (dict(num_classes='2'), {}, "num_classes: got '2'"),
        (dict(num_classes=-1), {}, 'num_classes: got -1'),
        (dict(label_names=['a']), {}, 'label_names: got 1, but the model has 2 classes'),
        (dict(label_names=3), {}, 'label_names: got 3'),
        (dict(model_sha256='ab'), {}, "model_sha256: got 'ab'"),
        ({}, dict(mean=[float('nan')] * 3), r'mean: got \(nan'),
        ({}, dict(mean='0.5'), "mean: got '0.5'"),
        ({}, dict(mean=[0.5, 0.5]), 'mean: got .*one for each channel'),
        ({}, dict(std=0), 'std: got 0, expected a number above 0'),
        ({}, dict(std=[1, 1, -1]), r'std: got \(1, 1, -1\)'),
        ({}, dict(input_size=[3, 0, 32]), r'input_size: got \(3, 0, 32\)'),
        ({}, dict(input_size='32'), "input_size: got '32'"),
        ({}, dict(input_size=[3, 10**9, 32]), 'input_size: got'),
        ({}, dict(crop_pct=0), 'crop_pct: got 0'),
        ({}, dict(interpolation='bycubic'), "interpolation: got 'bycubic'"),
        ({}, dict(crop_mode='centre'), "crop_mode: got 'centre'"),
    ],
)
def test_what_no_model_is_is_named(top, cfg, message, folder):
    config = json.loads((folder / 'config.json').read_text())
    config.update(top)
    if cfg:
        config['pretrained_cfg'].update(cfg)
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf'config\.json: {message}'):
        read_config(folder)


def test_what_timm_writes_is_read(folder, tmp_path):
    """Its present form, its older one with all at the top, names as a dict, one mean for all channels."""
    assert read_config(folder)['architecture'] == 'test_vitresnet'
    flat = dict(architecture='resnet18', num_classes=2, input_size=[3, 64, 64], mean=[0.5], labels=['a', 'b'])
    (folder / 'config.json').write_text(json.dumps(flat))
    assert read_config(folder) == flat
    other = timm.create_model('resnet18', num_classes=3)
    timm.models.save_for_hf(other, str(tmp_path / 'timm'), model_config=dict(label_names={'0': 'a'}))
    assert read_config(tmp_path / 'timm')['num_classes'] == 3
    with pytest.raises(FileNotFoundError, match=r'has no config\.json'):
        read_config(tmp_path / 'nowhere')


def test_a_model_that_can_prepare_no_image_says_so():
    model = timm.create_model('test_vitresnet', num_classes=2, pretrained_cfg_overlay=dict(std=(0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match="the model's data config: std: got"):
        timm_vitres.preprocess(np.zeros((40, 40, 3), np.uint8), model)


def test_plain_values():
    config = dict(mean=torch.tensor([0.5, 0.25]), std=np.float32(0.5), input_size=np.array([2, 8, 8]), crop_pct=None)
    assert check_data_config('x', config) == dict(mean=(0.5, 0.25), std=0.5, input_size=(2, 8, 8))
