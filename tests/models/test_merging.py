"""Merged layers compute the same with one layer less, or a sentence says why they can not."""

import copy
import re

import pytest
import torch
from conftest import randomise_, relative_difference
from timm.layers import BatchNormAct2d, Conv2dSame, LayerScale
from timm.models.vision_transformer import Block
from torch import nn

from timm_vitres.models.merging import (
    CannotFold,
    batch_norms_of_convolutions,
    check_eval,
    check_plain,
    merge_batch_norm_,
    merge_layer_scale_,
)


class Backwards(nn.Module):
    """A convolution and a BatchNorm under two names each, of which the second ones are used."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv, self.norm = self.first, self.second
        self.plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.plain(self.norm(self.conv(x)))


def test_a_layer_of_two_names_is_left():
    assert batch_norms_of_convolutions(Backwards().eval()) == [('plain.0', 'plain.1')]


class Pair(nn.Module):
    """A layer and its BatchNorm. (B, 4, H, W) -> (B, 6, H', W')"""

    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x):
        is_linear = isinstance(self.layer, nn.Linear)
        x = self.layer(x.movedim(1, -1)).movedim(-1, 1) if is_linear else self.layer(x)
        return self.norm(x)


def pair(layer=None, norm=None):
    layer = nn.Conv2d(4, 6, 3) if layer is None else layer
    return randomise_(Pair(layer, nn.BatchNorm2d(6) if norm is None else norm))


@pytest.mark.parametrize(
    'norm',
    [
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, eps=0.5),
        nn.BatchNorm2d(6, affine=False),
        nn.SyncBatchNorm(6),
        BatchNormAct2d(6),
        BatchNormAct2d(6, act_layer=nn.SiLU),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2),
        Conv2dSame(4, 6, 3, stride=2),
        nn.Linear(4, 6),
        nn.Linear(4, 6, bias=False),
    ],
    ids=str,
)
def test_a_merged_layer_computes_what_both_did(layer, norm):
    """Only the activation of the BatchNorm is left; the old layer, which others may share, stays as it is."""
    both = pair(copy.deepcopy(layer), copy.deepcopy(norm))
    merged, before = copy.copy(both), copy.deepcopy(both.layer.state_dict())
    merged._modules = dict(both._modules)
    merge_batch_norm_(merged, 'layer', 'norm')
    x = torch.randn(2, 4, 9, 7)
    assert relative_difference(merged(x), both(x)) < 1e-5
    assert type(merged.norm) is type(getattr(norm, 'act', nn.Identity())) and not merged.norm.training
    assert type(merged.layer) is type(layer) and merged.layer is not both.layer
    assert both.layer.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in both.layer.state_dict().items())
    if not isinstance(layer, nn.Linear):
        assert merged.layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_is_merged_is_rounded_once():
    both = pair().bfloat16()
    wide = copy.deepcopy(both).float()
    for module in (both, wide):
        merge_batch_norm_(module, 'layer', 'norm')
    assert both.layer.weight.dtype == torch.bfloat16
    for key, value in wide.layer.state_dict().items():
        assert torch.equal(both.layer.state_dict()[key], value.bfloat16())


def test_what_is_frozen_stays_frozen():
    for frozen in (True, False):
        both = pair()
        both.layer.weight.requires_grad_(not frozen)
        merge_batch_norm_(both, 'layer', 'norm')
        assert {parameter.requires_grad for parameter in both.layer.parameters()} == {not frozen}


@pytest.mark.parametrize('norm', [nn.GroupNorm(2, 6), nn.BatchNorm2d(6, track_running_stats=False), nn.Identity()])
def test_what_is_no_constant_is_left(norm):
    """Some norms use the statistics of each image or batch, and some are merged already."""
    both = pair(norm=norm)
    layer, before = both.layer, copy.deepcopy(both.state_dict())
    merge_batch_norm_(both, 'layer', 'norm')
    assert both.layer is layer and both.norm is norm
    assert all(torch.equal(value, before[key]) for key, value in both.state_dict().items())


def test_a_layer_is_merged_once():
    both = pair()
    merge_batch_norm_(both, 'layer', 'norm')
    once = both.layer
    merge_batch_norm_(both, 'layer', 'norm')
    assert both.layer is once


def test_a_batch_norm_is_merged_in_training_mode_as_in_evaluation():
    both = pair()
    other = copy.deepcopy(both)
    both.train()
    merge_batch_norm_(both, 'layer', 'norm')
    merge_batch_norm_(other, 'layer', 'norm')
    assert torch.equal(both.layer.weight, other.layer.weight)
    assert torch.equal(both.layer.bias, other.layer.bias)


class Quantised(nn.Parameter):
    """A weight of another kind."""


def hook(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)


def hook_before(module):
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def set_forward(module):
    module.forward = lambda x: x


def parametrise(module):
    torch.nn.utils.parametrizations.weight_norm(module)


def quantise(module):
    module.weight = Quantised(module.weight.detach(), requires_grad=False)


def adapt(module):
    module.base_layer = nn.Identity()


CHANGES = [
    (hook, r'has forward hooks \(hook\.<locals>\.<lambda>\), .*; remove them first'),
    (hook_before, r'has forward hooks \(hook_before\.<locals>\.<lambda>\)'),
    (set_forward, 'has a forward method set from outside, which folding would bypass; remove it first'),
    (parametrise, r'has parametrizations, which folding would lose; call .*remove_parametrizations on it'),
    (quantise, 'holds weights of type Quantised, as quantised layers do; fold the model before that'),
    (adapt, r'is an adapter \(\w+\); merge it first \(of peft: model\.merge_and_unload\(\)\)'),
]


@pytest.mark.parametrize('part', ['layer', 'norm'])
@pytest.mark.parametrize('change, message', CHANGES)
def test_what_would_be_lost_is_refused_and_left(change, message, part):
    both = pair()
    check_plain('conv2', both.get_submodule(part))
    change(both.get_submodule(part))
    changed = both.eval().get_submodule(part)
    parts = dict(both.named_children())
    with pytest.raises(CannotFold, match=f'^model: conv2 {message}') as caught:
        check_plain('conv2', changed)
    assert caught.value.module is changed and re.match(message, caught.value.reason)
    with pytest.raises(CannotFold, match=f'^model: {part} {message}'):
        merge_batch_norm_(both, 'layer', 'norm')
    assert dict(both.named_children()) == parts


def test_a_layer_that_may_compute_something_else_is_refused():
    class Doubling(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    message = r'^model: layer is a Doubling, and only a Conv2d or Conv2dSame or Linear can be folded'
    with pytest.raises(CannotFold, match=message):
        merge_batch_norm_(pair(Doubling(4, 6, 3)), 'layer', 'norm')


def block(**kwargs):
    return randomise_(Block(16, 2, **{'init_values': 0.5, 'qkv_bias': True, **kwargs}))


@pytest.mark.parametrize('kwargs', [{}, dict(proj_bias=False), dict(proj_drop=0.5, drop_path=0.5)])
def test_layer_scales_are_merged(kwargs):
    model = block(**kwargs)
    merged = copy.deepcopy(model)
    merge_layer_scale_(merged)
    assert not [module for module in merged.modules() if isinstance(module, LayerScale)]
    x = torch.randn(2, 5, 16)
    assert relative_difference(merged(x) - x, model(x) - x) < 1e-5
    weights = copy.deepcopy(merged.state_dict())
    merge_layer_scale_(merged)  # a second call finds nothing to merge
    assert all(torch.equal(value, weights[key]) for key, value in merged.state_dict().items())


def test_a_block_that_shares_its_parts_changes_alone():
    model, other = block(), block()
    for name in ('attn', 'mlp', 'ls1', 'ls2'):
        setattr(other, name, getattr(model, name))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x), other(x)
        merge_layer_scale_(model)
        assert torch.equal(other(x), expected[1]) and relative_difference(model(x), expected[0]) < 1e-6
        merge_layer_scale_(other)
        assert relative_difference(other(x), expected[1]) < 1e-6


@pytest.mark.parametrize('part', ['attn', 'attn.proj', 'attn.proj_drop', 'ls1', 'mlp', 'mlp.fc2', 'mlp.drop2', 'ls2'])
def test_what_a_hook_would_see_is_not_changed(part):
    model = block()
    hook(model.get_submodule(part))
    with pytest.raises(CannotFold, match=rf'^model: {re.escape(part)} has forward hooks'):
        merge_layer_scale_(model)


def test_a_block_without_layer_scales_stays_as_it_is():
    model = block(init_values=None)
    hook(model.attn.proj)  # nothing is merged, so nothing is lost
    parts = dict(model.named_modules())
    merge_layer_scale_(model)
    assert dict(model.named_modules()) == parts


class Branches(nn.Module):
    """Convolutions and BatchNorms; only some of them can be merged."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.same = nn.Sequential(Conv2dSame(4, 4, 3), BatchNormAct2d(4))
        self.late = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
        self.forked, self.fork = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.batch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
        self.group = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))

    def forward(self, x):
        x = self.group(self.batch(self.late(self.same(self.stem(x)))))
        y = self.forked(x)
        x = self.fork(y) + y
        return self.norm(self.twice(self.twice(x)))


def test_a_convolution_and_its_batch_norm_are_found_where_nothing_is_between():
    assert batch_norms_of_convolutions(Branches().eval()) == [('stem.0', 'stem.1'), ('same.0', 'same.1')]


def test_tracing_calls_no_hooks_and_keeps_them():
    model = Branches().eval()
    calls = []
    model.stem.register_forward_hook(lambda *args: calls.append('stem'))
    model.stem[0].register_forward_pre_hook(lambda *args: calls.append('conv'))
    assert ('stem.0', 'stem.1') in batch_norms_of_convolutions(model) and calls == []
    model(torch.randn(1, 3, 8, 8))
    assert calls == ['conv', 'stem']


def test_what_is_merged_where_it_was_found_computes_the_same():
    model = randomise_(Branches())
    merged = copy.deepcopy(model)
    for layer, norm in batch_norms_of_convolutions(model):
        merge_batch_norm_(merged, layer, norm)
    assert isinstance(merged.stem[1], nn.Identity) and isinstance(merged.late[2], nn.BatchNorm2d)
    x = torch.randn(2, 3, 8, 8)
    assert relative_difference(merged(x), model(x)) < 1e-5


def test_only_a_module_in_evaluation_mode_is_taken():
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Dropout())).eval()
    check_eval(model)
    model[1][0].train()
    with pytest.raises(ValueError, match=r'^model: it is in training mode \(its 1\.0 is\); call model\.eval\(\)'):
        check_eval(model)
    with pytest.raises(ValueError, match=r'^model: it is in training mode; call model\.eval\(\)'):
        check_eval(model.train())
    with pytest.raises(TypeError, match=r'^model: got str, expected a torch\.nn\.Module'):
        check_eval('model')
    with pytest.raises(TypeError, match=r'^model: got a TorchScript module.*; fold the model, then script it'):
        check_eval(torch.jit.script(model.eval()))
