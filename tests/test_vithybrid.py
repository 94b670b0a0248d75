"""Hugging Face's ViTHybrid against itself: transformers 4.40.2, the last that is pinned here with the class.

It runs in an environment of its own (`make test-vithybrid` makes it), which writes a checkpoint and its logits.
"""

import json
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import relative_difference

from timm_vitres.publishing.conversion import convert

PYTHON = Path(__file__).parents[1] / '.venv-vithybrid' / 'bin' / 'python'
NAME = 'vitresnet_base.hf_in21k_ft_in1k_384'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    assert PYTHON.exists(), f'{PYTHON} is missing: run `make test-vithybrid`, which makes it.'
    folder = tmp_path_factory.mktemp('vithybrid')
    subprocess.run([PYTHON, Path(__file__).with_name('vithybrid_reference.py'), folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
def test_logits_are_those_of_transformers(file, folder):
    reference = safetensors.torch.load_file(folder / 'reference.safetensors')
    overlay = dict(file=str(folder / file))
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        assert relative_difference(model(reference['input']), reference['logits']) < 2e-5
        # all that is left is the eps of the LayerNorms
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-12
        assert relative_difference(model(reference['input']), reference['logits']) < 2e-6


@pytest.mark.slow
def test_the_folder_is_converted(folder, tmp_path):
    for file in ('config.json', 'preprocessor_config.json'):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / 'pytorch_model.bin').symlink_to(folder / 'pytorch_model.bin')
    model = timm.create_model(f'local-dir:{convert(tmp_path, tmp_path / "out")}', pretrained=True).eval()
    reference = safetensors.torch.load_file(folder / 'reference.safetensors')
    with torch.inference_mode():
        assert relative_difference(model(reference['input']), reference['logits']) < 2e-5
    names = json.loads((folder / 'config.json').read_text())['id2label']
    assert model.pretrained_cfg['label_names'] == [names[str(index)] for index in range(1000)]
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config['mean']) == (0.5, 0.5, 0.5) and config['interpolation'] == 'bicubic'
