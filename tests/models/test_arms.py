import re

import pytest
import timm
import torch

from timm_vitres.models.arms import ARMS


def build(name, img_size=64, device='meta', **kwargs):
    arm = ARMS[name]
    own = arm.model_kwargs(img_size)
    return timm.create_model(arm.model, img_size=img_size, num_classes=10, device=device, **own, **kwargs)


@pytest.mark.parametrize('img_size', [28, 64, 112])
def test_all_have_as_many_parameters_as_the_interleaved_arm_to_5_percent(img_size):
    counts = {name: sum(tensor.numel() for tensor in build(name, img_size).parameters()) for name in ARMS}
    assert list(counts) == ['resnet', 'vit', 'serial', 'parallel', 'interleaved']
    assert all(abs(count / counts['interleaved'] - 1) < 0.05 for count in counts.values()), counts


def test_the_resnet_is_the_interleaved_arm_without_what_attends():
    parent, hybrid = build('resnet').state_dict(), build('interleaved').state_dict()
    assert all(parent[name].shape == hybrid[name].shape for name in parent)
    gone = {re.match(r'stages\.\d+\.\d+\.', name)[0] for name in hybrid.keys() - parent.keys()}
    assert gone == {re.match(r'stages\.\d+\.\d+\.', name)[0] for name in hybrid if 'self_attn' in name} and gone


@pytest.mark.parametrize('img_size, side', [(28, 4), (47, 4), (48, 8), (112, 8)])
def test_patches_and_the_strides_before_the_stages_grow_with_the_images(img_size, side):
    layers = [layer for layer in build('vit', img_size).modules() if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.kernel_size for layer in layers] == [(side, side)]  # the ViT has no convolution but its patches
    for name in ('resnet', 'interleaved'):
        maps = timm.create_model(
            ARMS[name].model, features_only=True, device='meta', **ARMS[name].model_kwargs(img_size)
        )
        assert maps.feature_info.reduction()[-3:] == [side // 2, side, 2 * side]
    assert build('serial', img_size).patch_embed.grid_size == (-(-img_size // side),) * 2


@pytest.mark.parametrize('img_size', [28, 64])
@pytest.mark.parametrize('name', ARMS)
def test_each_learns_from_small_grey_images(name, img_size):
    torch.manual_seed(0)
    model = build(name, img_size, 'cpu', in_chans=1).train()
    x, target = torch.randn(4, 1, img_size, img_size), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):  # the last norm of a block begins at zero, and what is before it learns from the second step on
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(tensor.grad.abs().sum() > 0 for tensor in model.parameters())
