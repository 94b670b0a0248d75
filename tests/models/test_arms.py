import re

import pytest
import timm
import torch

from timm_vitres.models.arms import ARMS


def build(name, device='meta', **kwargs):
    return timm.create_model(ARMS[name].model, num_classes=10, device=device, **ARMS[name].model_kwargs, **kwargs)


def test_all_have_as_many_parameters_as_the_interleaved_arm_to_5_percent():
    counts = {name: sum(tensor.numel() for tensor in build(name, img_size=64).parameters()) for name in ARMS}
    assert list(counts) == ['resnet', 'vit', 'serial', 'parallel', 'interleaved']
    assert all(abs(count / counts['interleaved'] - 1) < 0.05 for count in counts.values()), counts


def test_the_resnet_is_the_interleaved_arm_without_what_attends():
    parent, hybrid = build('resnet').state_dict(), build('interleaved').state_dict()
    assert all(parent[name].shape == hybrid[name].shape for name in parent)
    gone = {re.match(r'stages\.\d+\.\d+\.', name)[0] for name in hybrid.keys() - parent.keys()}
    assert gone == {re.match(r'stages\.\d+\.\d+\.', name)[0] for name in hybrid if 'self_attn' in name} and gone


def test_the_vit_has_no_convolution_but_its_patches():
    layers = [layer for layer in build('vit').modules() if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.kernel_size for layer in layers] == [(4, 4)]


@pytest.mark.parametrize('name', ARMS)
def test_each_learns_from_small_grey_images(name):
    torch.manual_seed(0)
    model = build(name, 'cpu', img_size=32, in_chans=1).train()
    loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 1, 32, 32)), torch.arange(4))
    loss.backward()
    assert torch.isfinite(loss) and all(tensor.grad is not None for tensor in model.parameters())
