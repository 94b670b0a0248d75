"""A state dict is compared with the model before it is loaded: its keys, its shapes, its kinds of numbers."""

import re

import pytest
import safetensors.torch
import timm
import torch
from conftest import DUAL, dual

from timm_vitres.publishing.conversion import convert
from timm_vitres.weights.comparison import add_batch_counts, check_dtypes, check_keys


def wrong(change):
    weights = timm.create_model('test_vitresnet', num_classes=3).state_dict()
    change(weights)
    return weights


@pytest.mark.parametrize('num_classes', [3, 5])
@pytest.mark.parametrize(
    'change, message',
    [
        (lambda weights: weights.pop('blocks.1.attn.qkv.weight'), 'missing keys: blocks.1.attn.qkv.weight'),
        (lambda weights: weights.update(extra=torch.ones(1)), 'unexpected keys: extra'),
        (lambda weights: weights.pop('patch_embed.backbone.stem.conv.weight'), 'missing keys: patch_embed.backbone.st'),
        (
            lambda weights: weights.update({'norm.weight': torch.ones(3)}),
            r'wrong shapes: norm\.weight \(3,\) for \(64,\)',
        ),
        (lambda weights: weights.update(pos_embed=torch.ones(1, 8, 64)), 'no square grid'),
    ],
)
def test_wrong_keys_are_errors(change, message, num_classes):
    # with other classes than the checkpoint's, timm alone would load what it finds and say nothing
    overlay = dict(state_dict=wrong(change), num_classes=3)
    with pytest.raises(RuntimeError, match=message):
        timm.create_model('test_vitresnet', pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)


def load(weights, way):
    """Load a state dict by a pretrained cfg, or by torch's method."""
    if way == 'pretrained':
        overlay = dict(state_dict=weights, num_classes=3)
        return timm.create_model(DUAL, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay).eval()
    model = timm.create_model(DUAL, num_classes=3).eval()
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize('way', ['pretrained', 'load_state_dict'])
@pytest.mark.parametrize('dtype', [torch.int8, torch.uint8, torch.int64, torch.bool, torch.cfloat, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype, way):
    for key in ('head_vit.weight', 'stem.conv1.weight', 'units.1.block.norm1.bias'):
        weights = dual().state_dict()
        weights[key] = weights[key].to(dtype)
        with pytest.raises(RuntimeError, match=rf'{key} is {dtype} for torch\.float32'):
            load(weights, way)


@pytest.mark.parametrize('way', ['pretrained', 'load_state_dict'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_state_dicts_that_were_cast_load(dtype, way):
    """Also their counts, which become floating-point numbers where everything is cast."""
    weights = {key: value.to(dtype) for key, value in dual().state_dict().items()}
    for key, value in load(weights, way).state_dict().items():
        assert torch.equal(value, weights[key].to(value.dtype)), key
    weights['stem.bn1.num_batches_tracked'] = torch.tensor(True)
    with pytest.raises(RuntimeError, match=r'stem\.bn1\.num_batches_tracked is torch\.bool for torch\.int64'):
        load(weights, way)


def test_an_integer_file_is_no_candidate_for_conversion(tmp_path):
    weights = {key: value.to(torch.int8) for key, value in dual().state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / 'model.safetensors')
    with pytest.raises(RuntimeError, match='holds other numbers than weights'):
        convert(tmp_path, tmp_path / 'out', DUAL)
    assert not (tmp_path / 'out').exists()


def test_counts_of_batches_are_filled_in(tmp_path):
    """Old torch, and programs that leave them out: torch takes them as 0."""
    model = dual()
    weights = {key: value for key, value in model.state_dict().items() if 'num_batches_tracked' not in key}
    assert len(weights) < len(model.state_dict())
    torch.save(weights, tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=3)
    loaded = [
        load(weights, 'load_state_dict'),
        timm.create_model(DUAL, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay),
        timm.create_model(f'local-dir:{convert(tmp_path / "weights.pth", tmp_path / "out", DUAL)}', pretrained=True),
    ]
    x = torch.randn(2, 3, 64, 64)
    for one in loaded:
        count = one.stem.bn1.num_batches_tracked
        assert count.dtype == torch.int64 and count.device.type == 'cpu' and count == 0
        with torch.inference_mode():
            assert torch.equal(one.eval()(x), model(x))
    weights.pop('stem.bn1.running_var')
    with pytest.raises(RuntimeError, match=r'missing keys: .*stem\.bn1\.running_var'):
        load(weights, 'pretrained')


def layers():
    """Return a model of a linear layer and a BatchNorm."""
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def test_counts_are_added_where_the_statistics_are():
    model = layers()
    whole = model.state_dict()
    weights = {key: value for key, value in whole.items() if not key.endswith('num_batches_tracked')}
    found = add_batch_counts(weights, model)
    assert found.keys() == whole.keys() and found['1.num_batches_tracked'] == 0
    assert '1.num_batches_tracked' not in weights  # the caller's dict stays as it is
    whole['1.num_batches_tracked'] = torch.tensor(7)
    assert add_batch_counts(whole, model)['1.num_batches_tracked'] == 7
    del weights['1.running_var']
    assert add_batch_counts(weights, model) == weights


def test_what_would_become_other_numbers_is_listed():
    model = layers()
    weights = model.state_dict()
    check_dtypes({key: value.half() for key, value in weights.items()}, model)
    check_dtypes({'more': torch.ones(1, dtype=torch.bool)}, model)  # only `check_keys` compares the keys
    weights['0.weight'] = weights['0.weight'].to(torch.int8)
    weights['1.bias'] = weights['1.bias'].to(torch.cfloat)
    weights['1.num_batches_tracked'] = torch.tensor(True)
    message = (
        '(0.weight is torch.int8 for torch.float32, 1.bias is torch.complex64 for torch.float32, '
        '1.num_batches_tracked is torch.bool for torch.int64)'
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        check_dtypes(weights, model)


def test_keys_and_shapes_that_differ_are_listed():
    model = layers()
    weights = model.state_dict()
    check_keys(weights, model)
    weights['0.weight'] = torch.ones(3, 4)
    weights['extra'] = torch.ones(1)
    del weights['1.bias'], weights['0.bias']
    message = 'missing keys: 0.bias, 1.bias; unexpected keys: extra; wrong shapes: 0.weight (3, 4) for (3, 2).'
    with pytest.raises(RuntimeError, match=f'not one of Sequential as it was asked for: {re.escape(message)}$'):
        check_keys(weights, model)
    # keys that can be adapted are not compared, whether they are there or not
    check_keys(weights, model, ('0.weight', '0.bias', '1.bias', 'extra'))
    with pytest.raises(RuntimeError, match=r'missing keys: 1\.bias; unexpected keys: none; wrong shapes: none\.$'):
        check_keys(weights, model, ('0.weight', '0.bias', 'extra'))


def test_long_lists_are_counted():
    weights = {f'{number:02}': torch.ones(1) for number in range(23)}
    with pytest.raises(RuntimeError, match=r'unexpected keys: 00, 01, .*, 19 and 3 more; wrong shapes: none'):
        check_keys(weights, torch.nn.Identity())
