"""Times are compared in turns, and the fastest way to train is found."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import DUAL, randomise_

from timm_vitres import measure as module
from timm_vitres.measure import fastest_training, measure
from timm_vitres.models.layers import fused_attentions


def test_what_is_faster_is_found():
    def slow(x):
        for _ in range(50):
            x = x @ x
        return x

    times = measure({'slow': slow, 'fast': lambda x: x @ x}, torch.eye(128), rounds=3, seconds=0.01)
    assert times['fast'] < times['slow']


def test_functions_take_turns():
    """A machine that is slow for a while then slows all of them down."""
    order = []
    functions = {name: lambda x, name=name: order.append((name, x)) for name in ('a', 'b', 'c')}
    x = torch.ones(1)
    assert measure(functions, x, rounds=2, seconds=0).keys() == functions.keys()
    turns = [name for index, (name, _) in enumerate(order) if index == 0 or order[index - 1][0] != name]
    assert turns == ['a', 'b', 'c'] * 3  # the first turn warms up
    assert all(given is x for _, given in order)


def test_the_median_of_the_rounds_counts(monkeypatch):
    class Timer:
        """The warm-up takes one second; the rounds take 2, 900 and 3."""

        def __init__(self, *args, **kwargs):
            self.means = iter((1.0, 2.0, 900.0, 3.0))

        def timeit(self, number):
            return SimpleNamespace(mean=next(self.means))

    monkeypatch.setattr('torch.utils.benchmark.Timer', Timer)
    assert measure({'a': None}, torch.ones(1)) == {'a': 3.0}


def test_a_hopeless_function_is_called_once(monkeypatch):
    calls = []

    class Timer:
        def __init__(self, statement, globals, **kwargs):
            self.function = globals['function']

        def timeit(self, number):
            calls.append(self.function)
            return SimpleNamespace(mean={'slow': 5.5, 'fair': 4.5, 'fast': 1.0}[self.function])

    monkeypatch.setattr('torch.utils.benchmark.Timer', Timer)
    names = {name: name for name in ('slow', 'fair', 'fast')}
    assert measure(names, torch.ones(1), hopeless=5) == {'slow': 5.5, 'fair': 4.5, 'fast': 1.0}
    assert calls == ['slow', 'fair', 'fast'] + 3 * ['fair', 'fast']


def test_what_needs_too_much_memory_is_not_taken():
    def large(x):
        raise torch.OutOfMemoryError('CUDA out of memory')

    times = measure({'large': large, 'small': lambda x: x}, torch.ones(1), rounds=1, seconds=0, hopeless=5)
    assert times['large'] == float('inf') and times['small'] < 1
    with pytest.raises(torch.OutOfMemoryError):
        measure({'large': large}, torch.ones(1))


STEPS = [(amp, layout, True) for layout in ('channels-last', 'contiguous') for amp in (False, True)]


@pytest.mark.parametrize('fastest', STEPS)
def test_the_fastest_settings_are_returned(fastest, monkeypatch):
    times = {step: 0.25 if step == fastest else 0.5 for step in STEPS}
    monkeypatch.setattr(module, 'measure', lambda steps, images, hopeless: {step: times[step] for step in steps})
    found, text = fastest_training(torch.nn.Linear(1, 1), 1, (2, 3, 8, 8), 'float16')
    assert found == dict(amp=fastest[0], channels_last=fastest[1] == 'channels-last', no_fused_attn=False)
    name = f'{"float16" if fastest[0] else "float32"} {fastest[1]}'
    assert f'{name} 250 ms' in text and text.count('500 ms') == 3


@pytest.mark.parametrize('unfused', [False, True])
@pytest.mark.parametrize('name', ['test_vitresnet', DUAL, 'vit_tiny_patch16_224'])
def test_few_tokens_are_tried_with_attention_step_by_step(name, unfused, monkeypatch):
    model = timm.create_model(name, num_classes=4, **({'depth': 2} if name.startswith('vit_') else {}))
    layers = fused_attentions(model)
    told, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, 'scaled_dot_product_attention', lambda *args, **kwargs: told.append(1) or kernel(*args, **kwargs)
    )

    def run(steps, images, hopeless):
        for (_, _, fused), step in steps.items():
            told.clear()
            step(images)
            assert len(told) == (len(layers) if fused else 0)
        return {key: 0.5 if key[2] == unfused else 0.25 for key in steps}

    monkeypatch.setattr(module, 'measure', run)
    size = model.pretrained_cfg['input_size'][-1]
    found, text = fastest_training(model, 4, (1, 3, size, size))
    assert found['no_fused_attn'] is unfused and text.count('unfused 500 ms' if not unfused else 'unfused 250 ms') == 4
    assert layers and all(layer.fused_attn for layer in layers)


def test_many_tokens_are_not_tried_so(monkeypatch):
    """What attention would then keep for the way back could take more memory than there is."""
    model = timm.create_model('vit_tiny_patch16_224', depth=1, img_size=256, class_token=False, global_pool='avg')
    monkeypatch.setattr(module, 'measure', lambda steps, images, hopeless: dict.fromkeys(steps, 1.0))
    assert fastest_training(model, 1000, (1, 3, 256, 256))[1].count('unfused') == 4
    with_class = timm.create_model('vit_tiny_patch16_224', depth=1, img_size=256)
    assert 'unfused' not in fastest_training(with_class, 1000, (1, 3, 256, 256))[1]


class Witness(torch.nn.Module):
    """A model that notes how it was called, in one list for all of its copies."""

    told = []

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)

    def forward(self, x):
        layouts = [
            torch.channels_last if tensor.is_contiguous(memory_format=torch.channels_last) else None
            for tensor in (x, self.conv.weight)
        ]
        y = self.conv(x)
        self.told.append((y.dtype, *layouts, self.training, self.conv.weight.grad))
        return y.mean((2, 3))


def test_each_step_is_what_its_name_says(monkeypatch):
    monkeypatch.setattr(Witness, 'told', [])

    def run_twice(steps, images, hopeless):
        for step in (*steps.values(), *steps.values()):
            step(images)
        return dict.fromkeys(steps, 1.0)

    monkeypatch.setattr(module, 'measure', run_twice)
    fastest_training(Witness().eval(), 5, (2, 3, 8, 8))
    expected = []
    for layout in (torch.channels_last, None):
        expected += [(dtype, layout, layout, True, None) for dtype in (torch.float32, torch.bfloat16)]
    assert Witness.told == expected * 2


@pytest.mark.parametrize('name', ['test_vitresnet', DUAL])
def test_the_model_stays_as_it_is(name):
    """A model has one head or two; its weights, statistics, gradients and memory layout are left alone."""
    model = randomise_(timm.create_model(name, num_classes=4))
    if name == DUAL:
        model.set_distilled_training(True)
    before = copy.deepcopy(model.state_dict())
    found, text = fastest_training(model, 4, (2, 3, 32, 32))
    assert found.keys() == {'amp', 'channels_last', 'no_fused_attn'} and text.count(' ms') == 8
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) and value.stride() == before[key].stride(), key
