"""Layers that attend to maps; their outputs are compared pixel by pixel in tests/models/test_vitresnet_mix.py."""

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import relative_difference

from timm_vitres.models.attention import RelPosAttn, resample_rel_pos


def test_a_table_keeps_its_middle_and_its_order():
    """A linear table stays linear inside, and the distance 0 stays in the middle."""
    table = torch.arange(-7.0, 8.0)[:, None] * torch.tensor([[1.0, -2.0]])
    for size in (4, 8, 12, 33):
        resampled = resample_rel_pos(table, size)
        assert resampled.shape == (2 * size - 1, 2)
        assert resampled[size - 1].abs().max() < 1e-5
        assert (resampled[1:, 0] > resampled[:-1, 0] - 1e-5).all()
        torch.testing.assert_close(resampled, -resampled.flip(0), atol=1e-5, rtol=0)
    assert torch.equal(resample_rel_pos(table, 8), table)


def test_a_new_size_of_the_tables():
    layer = RelPosAttn(16, feat_size=(4, 6), num_heads=2)
    x = torch.randn(1, 16, 8, 3)
    before = layer(x)
    layer.pos_embed.width_rel.requires_grad_(False)
    layer.set_feat_size((8, 3))
    assert layer.pos_embed.height_rel.shape == (15, 8) and layer.pos_embed.width_rel.shape == (5, 8)
    assert layer.pos_embed.height_rel.requires_grad and not layer.pos_embed.width_rel.requires_grad
    assert relative_difference(layer(x), before) < 1e-6


def test_position_logits_may_be_scaled():
    """timm's `scale_pos_embed` is taken, too."""
    x = torch.randn(2, 16, 5, 7)
    plain, scaled = (RelPosAttn(16, feat_size=(5, 7), num_heads=2, scale_pos_embed=flag) for flag in (False, True))
    scaled.load_state_dict(plain.state_dict())
    assert relative_difference(scaled(x), plain(x)) > 1e-3
    with torch.no_grad():
        for table in (scaled.pos_embed.height_rel, scaled.pos_embed.width_rel):
            table /= scaled.scale
    assert relative_difference(scaled(x), plain(x)) < 1e-6


@pytest.mark.parametrize('precision', [torch.bfloat16, torch.float64])
def test_fused_or_not_in_every_precision(precision):
    layer = RelPosAttn(16, feat_size=(5, 7), num_heads=2).to(precision)
    x = torch.randn(2, 16, 32, 16, dtype=precision)
    fused = layer(x)  # of that many pixels it is
    assert layer.fused_attn and layer.fused_from == 32 * 16
    layer.fused_attn = False
    assert fused.dtype == precision
    assert relative_difference(layer(x).float(), fused.float()) < (0.02 if precision == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize('size', [(25, 25), (23, 31), (32, 16)])
def test_what_fused_attention_gets_is_what_kernels_of_gpus_take(size, monkeypatch):
    """Widths that are multiples of 8, numbers of a row side by side; else they hold the matrix of all pairs."""
    seen = []
    kernel = F.scaled_dot_product_attention

    def watched(queries, keys, values, **kwargs):
        seen.extend([queries, keys, values])
        return kernel(queries, keys, values, **kwargs)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', watched)
    layer = RelPosAttn(64, feat_size=(5, 7), num_heads=2)
    x = torch.randn(1, 64, *size)
    fused = layer(x)
    assert len({value.shape[-1] for value in seen}) == 1 and seen[0].shape[-1] % 8 == 0
    assert len(seen) == 3 and all(value.stride(-1) == 1 for value in seen)
    layer.fused_attn = False
    assert relative_difference(layer(x), fused) < 1e-6


def test_no_image_has_no_answer():
    for name in ('test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'):
        assert timm.create_model(name, num_classes=3).eval()(torch.randn(0, 3, 64, 64)).shape == (0, 3)


def test_whoever_looks_sees_attention_whatever_the_size():
    """timm's `AttentionExtract`: the kernel, which holds no matrix, gives way to hooks, and to nothing else."""
    model = timm.create_model('vitresnet_mix_bot26t').eval()
    x = torch.randn(1, 3, 384, 384)
    with torch.inference_mode():
        expected = model(x)
        maps = timm.utils.AttentionExtract(model, method='hook')(x)
    sizes = {'stages.2.1': 24**2, 'stages.3.0': 24**2, 'stages.3.1': 12**2}
    assert {name: y.shape[-1] for name, y in maps.items()} == {
        f'{name}.self_attn.attn_drop': size for name, size in sizes.items()
    }
    for y in maps.values():
        assert relative_difference(y.sum(-1), torch.ones_like(y[..., 0])) < 1e-5
    with torch.inference_mode():
        assert relative_difference(model(x), expected) < 1e-5
