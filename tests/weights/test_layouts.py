"""Layouts are rows, and each one is read back from what others write."""

import numpy as np
import pytest
import timm
import torch
from conftest import randomise_
from layouts import EXAMPLES

from timm_vitres.weights.layouts import LAYOUTS, TIMM, convert_layout, find_layout


@pytest.mark.parametrize('name', [layout.name for layout in LAYOUTS])
def test_every_layout_is_read_back(name):
    assert name in EXAMPLES, f'the layout {name!r} has no checkpoint: write one in tests/layouts.py, and name it there.'
    architecture, write = EXAMPLES[name]
    model = randomise_(timm.create_model(architecture, num_classes=5))
    written, own = write(model), model.state_dict()
    assert find_layout(written).name == name
    converted = convert_layout(written)
    assert converted.keys() == own.keys()
    for key, value in own.items():
        assert torch.equal(converted[key], value), key


def test_our_own_layout_is_left_as_it_is():
    own = randomise_(timm.create_model('test_vitresnet_dual')).state_dict()
    assert find_layout(own) is TIMM
    assert all(convert_layout(own)[key] is value for key, value in own.items())
    assert len({layout.name for layout in (TIMM, *LAYOUTS)}) == len(LAYOUTS) + 1


@pytest.mark.parametrize(
    'weights, layout',
    [
        ({'conv_root/kernel': torch.ones(()), 'a/MultiHead_1/out/kernel': torch.ones(())}, 'Google JAX'),
        ({'trans_patch_conv.weight': torch.ones(2), 'down.conv_project.weight': torch.ones(())}, 'Conformer'),
    ],
)
def test_names_of_a_layout_with_other_shapes(weights, layout):
    assert find_layout(weights).name == layout
    with pytest.raises(RuntimeError, match=f'has the names of the {layout} layout, but not its shapes'):
        convert_layout(weights)


@pytest.mark.parametrize('weights', [{'a': 1}, {1: torch.ones(1)}, {'a': np.ones(1)}, {'model': {'a': None}}])
def test_what_is_no_state_dict(weights):
    with pytest.raises(ValueError, match=r'state_dict: .* has \w+, expected names with tensors'):
        convert_layout(weights)
