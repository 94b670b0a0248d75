"""Functions that the families share."""

import pytest
import torch

from timm_vitres.models.layers import resample_pos_embed


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_positions_of_compiled_training_whatever_the_default_dtype(dtype, monkeypatch):
    table = torch.randn(1, 1 + 12, 8, requires_grad=True)
    expected = resample_pos_embed(table, (7, 5), (3, 4), 1)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = resample_pos_embed(table, (7, 5), (3, 4), 1)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
