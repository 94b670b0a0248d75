"""Every hybrid says what its parts are, and takes weights of any layout in."""

import copy
import math
import re

import pytest
import timm
import torch
from conftest import DUAL, dual, randomise_, relative_difference

import timm_vitres
from timm_vitres.labels import label_names
from timm_vitres.models.base import Hybrid


def test_load_state_dict_takes_a_dict():
    with pytest.raises(TypeError, match='state_dict: got list, expected a dict of names with tensors'):
        timm.create_model('test_vitresnet').load_state_dict([1])


@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'])
def test_a_new_head_has_no_old_names(name, tmp_path):
    """Neither in the model, nor in what is saved of it; the cfg that it was made from is another's."""
    model = timm.create_model(name, num_classes=2)
    assert label_names(model) == ['class 0', 'class 1']
    folder = timm_vitres.save(model, tmp_path, label_names=['cat', 'dog'])
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert label_names(loaded) == ['cat', 'dog']
    cfg = loaded.pretrained_cfg
    loaded.reset_classifier(2)
    assert label_names(loaded) == ['class 0', 'class 1'] and cfg['label_names'] == ['cat', 'dog']
    assert loaded.default_cfg is loaded.pretrained_cfg and 'label_names' not in loaded.pretrained_cfg
    assert loaded.pretrained_cfg == {key: value for key, value in cfg.items() if key != 'label_names'}
    saved = timm_vitres.save(loaded, tmp_path / 'again')
    assert 'cat' not in (saved / 'config.json').read_text()


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('example', [(128, 96), (96, 96)])
@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'])
def test_a_trace_is_right_or_fails_at_other_sizes(name, example):
    """torch.jit.trace keeps one size's branches of every condition; 64 x 192 has as many tokens as 96 x 128."""
    model = randomise_(timm.create_model(name, num_classes=5, **(dict(img_size=example) if 'mix' not in name else {})))
    model.eval()
    x = torch.randn(2, 3, *example)
    traced = torch.jit.trace(model, x, check_trace=False)
    assert relative_difference(traced(x), model(x)) < 1e-5
    for size in ((112, 160), (97, 161), (64, 192), (64, 144), (160, 128)):
        x = torch.randn(2, 3, *size)
        try:
            found = traced(x)
        except RuntimeError:
            assert name == 'test_vitresnet_mix', size  # its tables of positions are bound to a size
            continue
        assert relative_difference(found, model(x)) < 1e-5, size


@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual'])
def test_a_quantised_model_loads_its_own_state(name):
    """It holds tuples and dtypes beside tensors."""
    quantised = [
        torch.ao.quantization.quantize_dynamic(randomise_(timm.create_model(name), seed).eval(), {torch.nn.Linear})
        for seed in (0, 1)
    ]
    x = torch.randn(1, 3, 64, 64)
    assert relative_difference(quantised[1](x), quantised[0](x)) > 1e-2
    quantised[1].load_state_dict(quantised[0].state_dict())
    assert torch.equal(quantised[1](x), quantised[0](x))
    with pytest.raises(ValueError, match="'other' has tuple, expected names with tensors"):
        quantised[1].load_state_dict({**quantised[0].state_dict(), 'other': ()})


RATES = {
    'test_vitresnet': ('drop_rate', 'pos_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate'),
    'test_vitresnet_dual': ('drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate'),
    'test_vitresnet_mix': ('drop_rate', 'drop_path_rate', 'drop_block_rate'),
}


@pytest.mark.parametrize('name, rate', [(name, rate) for name, rates in RATES.items() for rate in rates])
def test_a_rate_drops_in_training_alone(name, rate):
    x = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    for value in (0.0, 0.5):
        model = randomise_(timm.create_model(name, num_classes=5, **{rate: value}))
        assert torch.equal(model.eval()(x), model(x))
        assert torch.equal(model.train()(x), model(x)) == (value == 0.0)


@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'])
def test_how_weights_were_read_is_not_saved(name, tmp_path):
    folder = timm_vitres.save(timm.create_model(name, num_classes=3, mmap=True), tmp_path / 'first')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, mmap=False, drop_path_rate=0.1)
    assert model._model_args['drop_path_rate'] == 0.1 and 'mmap' not in timm.models.get_model_args(model)
    again = timm_vitres.save(model, tmp_path / 'again')
    assert (again / 'config.json').read_bytes() == (folder / 'config.json').read_bytes()
    assert 'mmap' not in (again / 'config.json').read_text()
    assert copy.deepcopy(model)._model_args == model._model_args


def test_buffers_that_are_not_saved_come_back():
    """Built on meta, given memory, then `init_non_persistent_buffers`."""
    options = dict(backbone='resnetblur18', depth=1, embed_dim=48)
    reference = randomise_(timm.create_model('vitresnet', **options))
    model = timm.create_model('vitresnet', device='meta', **options).to_empty(device='cpu').eval()
    model.load_state_dict(reference.state_dict())
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                buffer.fill_(torch.nan)
    model.init_non_persistent_buffers()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), reference(x))


FAMILIES = [family for family in Hybrid.families if family.__module__.startswith('timm_vitres.')]
ALONE = dict(backbone='resnet18', depth=0)
VIT = dict(backbone='', patch_size=16, embed_dim=48, num_heads=3, depth=3)
MODELS = [
    ('test_vitresnet', {}),
    ('vitresnet_tiny', {}),
    ('vitresnet_nano', {}),
    ('vitresnet', ALONE),
    ('vitresnet', VIT),
    (DUAL, {}),
    (DUAL, dict(patch_size=32)),
    ('test_vitresnet_mix', {}),
    ('vitresnet_mix_nano', {}),
]


def test_every_variant_belongs_to_one_family():
    names = [name for family in FAMILIES for name in family.variants]
    assert FAMILIES and sorted(names) == sorted(timm.list_models('*vitresnet*'))
    for family in FAMILIES:
        assert all(type(timm.create_model(name, device='meta')) is family for name in family.variants)
        assert set(family.foreign_names.values()) <= set(family.variants)
        for pattern, name in family.foreign_names.items():
            assert not any(re.fullmatch(pattern, other) for other in family.variants if other != name)


@pytest.mark.parametrize('name, kwargs', MODELS)
def test_the_first_convolution_and_the_heads_are_those_that_are_called(name, kwargs):
    model = timm.create_model(name, num_classes=7, in_chans=5, **kwargs).eval()
    called = {}
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(lambda module, args, y, path=path: called.update({path: (args[0], y)}))
    x = torch.randn(2, 5, 64, 96)
    logits = model(x)
    assert [path for path, (given, _) in called.items() if given is x] == [model.first_conv]
    assert torch.equal(sum(called[head][1] for head in model.heads), logits)
    assert set(model.head_keys()) == {key for key in model.state_dict() if key.startswith('head')}


@pytest.mark.parametrize('head', ['head_resnet', 'head_vit'])
def test_one_head_alone_makes_the_logits(head):
    model = dual()
    before = copy.deepcopy(model.state_dict())
    model.train_one_head(head)
    (other,) = set(model.heads) - {head}
    outputs = []
    model.get_submodule(head).register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(torch.randn(2, 3, 64, 64))
    assert torch.equal(logits, outputs[0]) and logits.abs().min() > 0
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        frozen = key.startswith(f'{other}.')
        assert parameter.requires_grad is not frozen and (parameter.grad is None) is frozen
        assert torch.equal(parameter, torch.zeros_like(parameter) if frozen else before[key]), key
    with pytest.raises(ValueError, match="head: got 'head', expected one of 'head_resnet', 'head_vit'"):
        model.train_one_head('head')


@pytest.mark.parametrize('name, kwargs', [*MODELS, ('vitresnet', dict(backbone='resnetaa34d', depth=1))])
def test_the_sizes_that_a_model_takes(name, kwargs):
    """The deepest map has a pixel for each stride, and sizes between the multiples are refused."""
    model = timm.create_model(name, num_classes=3, img_size=64, **kwargs).eval()
    stride, multiple, largest = model.image_sizes()
    assert largest is None  # it takes any
    with torch.inference_mode():
        maps = model.forward_intermediates(torch.randn(1, 3, 2 * stride, 3 * stride), intermediates_only=True)
        assert min(tuple(one.shape[2:]) for one in maps) == (2, 3)
        between = torch.randn(1, 3, 2 * stride + 1, 3 * stride)
        if multiple == 1:
            assert torch.isfinite(model(between)).all()
        else:
            assert torch.isfinite(model(torch.randn(1, 3, 2 * stride + multiple, 3 * stride))).all()
            with pytest.raises(ValueError, match=f'multiples of {multiple}'):
                model(between)
    assert (multiple > 1) == ('resnetaa34d' in kwargs.values())


@pytest.mark.parametrize('name, kwargs', MODELS)
def test_explained_parts_are_called_in_their_order(name, kwargs):
    """The map and the tokens that they see have the strides that the model says."""
    model = timm.create_model(name, num_classes=3, img_size=64, **kwargs).eval()
    parts = model.explained_parts()
    maps, blocks = [], []
    if parts.resnet is not None:
        parts.resnet.register_forward_hook(lambda module, args, y: maps.append(y if torch.is_tensor(y) else y[0]))
    for attention in parts.attentions:  # of tokens (B, N, D), or of a map
        attention.register_forward_hook(
            lambda module, args, y: blocks.append(
                (module, args[0].shape[1] if args[0].ndim == 3 else args[0][0, 0].numel())
            )
        )
    height, width = 70, 130
    model(torch.randn(1, 3, height, width))

    def grid(stride):
        return math.ceil(height / stride[0]), math.ceil(width / stride[1])

    assert [tuple(one.shape[2:]) for one in maps] == ([grid(parts.resnet_stride)] if kwargs is not VIT else [])
    tokens = parts.num_prefix_tokens + math.prod(grid(parts.token_stride))
    assert len(blocks) == len(parts.attentions) > 0 or kwargs is ALONE
    for (module, seen), block in zip(blocks, parts.attentions, strict=True):
        assert module is block and seen == tokens


@pytest.mark.parametrize(
    'name, kwargs, sees_it',
    [
        ('test_vitresnet', {}, True),
        ('test_vitresnet', dict(class_token=False, global_pool='avg'), False),
        (DUAL, {}, True),
        (DUAL, dict(global_pool='avg'), False),
    ],
)
def test_whether_the_head_sees_a_class_token(name, kwargs, sees_it):
    model = randomise_(timm.create_model(name, num_classes=3, **kwargs))
    assert model.explained_parts().class_token is sees_it
    model.eval()
    with torch.inference_mode():
        features = model.forward_features(torch.randn(1, 3, 64, 64))
        before = model.forward_head(features)
        if kwargs.get('class_token', True):
            tokens = features[1] if isinstance(features, tuple) else features
            tokens[:, 0] += torch.randn(tokens.shape[-1])
            assert torch.equal(model.forward_head(features), before) is not sees_it


def test_a_checkpoint_below_a_prefix_is_loaded(model, tmp_path):
    weights = {f'student.{key}': value for key, value in model.state_dict().items()}
    weights['optimizer.lr'] = torch.ones(1)
    torch.save(weights, tmp_path / 'a.pth')
    other = timm.create_model('test_vitresnet', num_classes=3, img_size=64)  # its table is of another size
    other.load_pretrained(tmp_path / 'a.pth', prefix='student.')
    for key, value in model.state_dict().items():
        assert key == 'pos_embed' or torch.equal(other.state_dict()[key], value), key
    assert other.pos_embed.shape[1] == 1 + 4
    with pytest.raises(
        RuntimeError,
        match=r'not one of test_vitresnet .*missing keys: blocks\.0.*unexpected keys: .*student\.blocks\.0',
    ):
        other.load_pretrained(str(tmp_path / 'a.pth'))
    with pytest.raises(RuntimeError, match=r'wrong shapes: head\.weight \(3, 64\) for \(5, 64\), head\.bias'):
        timm.create_model('test_vitresnet', num_classes=5).load_pretrained(tmp_path / 'a.pth', prefix='student.')


def test_a_state_dict_is_compared_but_for_what_the_caller_adapts(model):
    """Other classes and channels pass as they are; every other shape is an error."""
    other = timm.create_model('test_vitresnet', num_classes=5, in_chans=1, img_size=32)
    weights = model.state_dict()
    found = other.filter_state_dict(weights)
    assert found.keys() == weights.keys() and all(torch.equal(found[key], value) for key, value in weights.items())
    del weights['head.bias']
    assert other.filter_state_dict(weights).keys() == weights.keys()
    weights['norm.bias'] = torch.ones(2)
    with pytest.raises(RuntimeError, match=r'unexpected keys: none; wrong shapes: norm\.bias \(2,\) for \(64,\)\.$'):
        other.filter_state_dict(weights)


@pytest.mark.parametrize('name', ['test_vitresnet', DUAL])
def test_torchs_way_to_load_is_torchs(name):
    """It returns the keys that differ if that is allowed, raises if it is not, and assigns if it is asked to."""
    source, model = (randomise_(timm.create_model(name, num_classes=3), seed=seed) for seed in (0, 1))
    weights = source.state_dict()
    missing = model.load_state_dict({**weights, 'extra': torch.ones(1)}, strict=False)
    assert missing.unexpected_keys == ['extra'] and missing.missing_keys == []
    x = torch.randn(1, 3, 64, 64)
    assert relative_difference(model(x), source(x)) < 1e-6
    assert model.norm.weight.data_ptr() != weights['norm.weight'].data_ptr()
    model.load_state_dict(weights, assign=True)
    assert model.norm.weight.data_ptr() == weights['norm.weight'].data_ptr()
    del weights['norm.bias']
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "norm\.bias"'):
        model.load_state_dict(weights)


def test_a_family_without_tables_leaves_them():
    model = dual()
    weights = dict(model.state_dict(), pos_embed=torch.ones(1, 7, 48))
    found = model.fit_tables(weights)
    assert found == weights and found is not weights


@pytest.mark.parametrize('family', Hybrid.families, ids=lambda family: family.__name__)
def test_the_registry_names_the_first_convolution_or_leaves_it_open(family):
    for name in family.variants:
        model = timm.create_model(name, device='meta')
        for cfg in timm.models.get_arch_pretrained_cfgs(name).values():
            assert cfg.first_conv in (None, model.first_conv), name
        facts = timm.models.get_model_input_config(model)
        assert facts['fixed_input_size'] is False and facts['first_conv'] == model.first_conv


@pytest.mark.parametrize('name, timms', [('vitresnet_mix_bot26t', 'botnet26t_256.c1_in1k'), ('vitresnet_small', None)])
def test_a_cfg_of_timms_does_not_fix_the_size(name, timms):
    cfg = timm.get_pretrained_cfg(timms or name).to_dict()
    model = timm.create_model(name, pretrained_cfg={**cfg, 'fixed_input_size': True}, device='meta')
    assert timm.data.resolve_model_data_config(model, dict(img_size=384))['input_size'] == (3, 384, 384)
