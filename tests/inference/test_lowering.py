"""What preparing and exporting share: precision behind float32, and how far outputs are from each other."""

import math

import pytest
import torch
from torch import nn

from timm_vitres.inference.lowering import (
    INT8_SETTINGS,
    Lowered,
    LoweredLogits,
    LoweredMaps,
    check_outputs,
    difference,
    forward_only,
    quantise_,
)


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x[:, :, ::2], x[:, :, 1::2]]


def test_a_lower_precision_stays_inside():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = conv.bfloat16()(x.bfloat16()).float()
    for cls in (Lowered, LoweredLogits):
        y = cls(conv, torch.bfloat16)(x)
        assert y.dtype == torch.float32 and torch.equal(y, expected)
    for cls in (Lowered, LoweredMaps):
        first, second = cls(Halves(), torch.bfloat16)(x)
        assert first.dtype == second.dtype == torch.float32
        assert torch.equal(first, x[:, :, ::2].bfloat16().float()) and torch.equal(
            second, x[:, :, 1::2].bfloat16().float()
        )


def test_images_are_laid_out_as_the_model_is():
    seen = []
    model = nn.Identity()
    model.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    Lowered(model, memory_format=torch.channels_last)(torch.randn(2, 3, 4, 4))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_scripts_know_the_types():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(torch.jit.script(LoweredLogits(nn.ReLU()))(x), x.relu())
    assert torch.equal(torch.jit.script(LoweredMaps(Halves()))(x)[1], x[:, :, 1::2])


def test_difference_is_that_of_the_worst_output():
    one = torch.tensor([3.0, 4.0])
    assert difference(one, one) == 0 and difference(2 * one, one) == pytest.approx(1)
    assert difference([one, one + torch.tensor([0.0, 5.0])], [one, one]) == pytest.approx(1)
    assert math.isnan(difference([one, one * float('nan')], [one, one]))
    with pytest.raises(ValueError):
        difference([one], [one, one])


def test_outputs_must_be_finite():
    check_outputs(torch.ones(2))
    for outputs in (torch.tensor([1.0, float('nan')]), [torch.ones(1), torch.tensor([float('inf')])]):
        with pytest.raises(ValueError, match='model: its outputs for the example are not finite'):
            check_outputs(outputs)


def test_forward_only_has_no_gradient():
    assert forward_only(nn.Linear(2, 2))(torch.ones(1, 2)).grad_fn is None


def test_heads_are_not_quantised():
    class Net(nn.Sequential):
        pretrained_cfg = {'classifier': '1'}

    torch.manual_seed(0)
    net = Net(nn.Linear(32, 32), nn.Linear(32, 5)).eval()
    x = torch.randn(4, 32)
    hidden, head = net[0](x), net[1].weight.clone()
    assert quantise_(net) == 1
    assert type(net[1].weight.data) is torch.Tensor and torch.equal(net[1].weight, head)
    assert 1e-5 < difference(net[0](x), hidden) < 0.05


def test_quantising_leaves_the_process_as_it_was():
    """torchao sets what the compiler does with every other model, and older ones how all matrices are multiplied."""
    config = torch._inductor.config

    def settings():
        return [getattr(config, name) for name in INT8_SETTINGS], torch.get_float32_matmul_precision()

    before = settings()
    net = nn.Sequential(nn.Linear(32, 32))
    quantise_(net, anywhere=True)
    assert settings() == before and type(net[0].weight.data) is not torch.Tensor
