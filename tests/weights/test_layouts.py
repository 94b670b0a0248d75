import numpy as np
import pytest
import torch

from timm_vitres.weights.layouts import convert_layout, find_layout


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
