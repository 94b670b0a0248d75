"""Folded models compute what they did, with less in them."""

import contextlib
import copy
import re
import warnings

import pytest
import timm
import torch
from conftest import randomise_, relative_difference
from timm.layers import LayerScale, convert_sync_batchnorm
from timm.utils import reparameterize_model
from torch import nn
from torch.export import Dim

import timm_vitres
from timm_vitres.inference.folding import fold
from timm_vitres.models.layers import PadSameStdConv2d

SIZES = [(224, 224), (97, 161), (33, 470)]
NAMES = ['vitresnet_tiny', 'vitresnet_small', 'vitresnet_nano', 'vitresnet', 'test_vitresnet', 'test_vitresnet_dual']
NAMES += ['test_vitresnet_mix', 'vitresnet_mix_nano']
# ResNets whose blocks differ: norms before and after, pooled shortcuts, deep stems, anti-aliasing, attention, groups
BACKBONES = ['resnet18', 'resnet26t', 'resnetv2_18', 'resnetblur18', 'seresnet50', 'resnet50_gn']
SLOW_BACKBONES = ['resnetv2_50d_evos', 'resnext50_32x4d', 'resnet14t', 'ecaresnet26t', 'resnetv2_18d', 'resnetrs50']
BACKBONES += [pytest.param(name, marks=pytest.mark.slow) for name in SLOW_BACKBONES]


def create(name, **kwargs):
    model = timm.create_model(name, **{'num_classes': 7, **kwargs})
    randomise_(getattr(model, 'model', model))
    return model.eval()


def outputs(model, x):
    with torch.inference_mode():
        result = model(x)
    return [result] if torch.is_tensor(result) else list(result)


def left_over(model):
    return [name for name, module in model.named_modules() if isinstance(module, (nn.BatchNorm2d, PadSameStdConv2d))]


@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_the_same_at_every_size(name, features_only):
    kwargs = dict(features_only=True) if features_only else {}
    model = create(name, **kwargs)
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert left_over(model) and not left_over(folded)
    assert not [module for module in folded.modules() if isinstance(module, LayerScale)]
    by_timm = reparameterize_model(model)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        expected = outputs(model, x)
        for others in (outputs(folded, x), outputs(by_timm, x)):
            for one, other in zip(others, expected, strict=True):
                assert relative_difference(one, other) < 1e-5, size
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('backbone', BACKBONES)
def test_any_backbone(backbone):
    """What can be merged is, and the rest stays."""
    model = create('vitresnet', backbone=backbone, depth=1, embed_dim=48)
    folded = fold(model)
    merged = len(left_over(model)) - len(left_over(folded))
    assert merged > 0 or not left_over(model)
    # a BatchNorm that comes before a convolution, or after an addition, can't be merged
    assert not left_over(folded) or 'v2' in backbone
    for size in SIZES[1:3]:
        x = torch.randn(2, 3, *size)
        assert relative_difference(outputs(folded, x)[0], outputs(model, x)[0]) < 1e-5


@pytest.mark.parametrize('name', ['test_vitresnet', 'vitresnet_nano', 'test_vitresnet_dual', 'test_vitresnet_mix'])
def test_low_precision_is_not_lower(name):
    """Folded and then in bfloat16 the error against float32 is no larger than the model's own, in the mean."""
    first, other_way = [], []
    for seed in range(6):  # of one model, rounding may be lucky: the ratio is 0.4 to 1.4
        torch.manual_seed(seed)
        model = create(name, num_classes=100)
        x = torch.randn(16, 3, 96, 96)
        expected = outputs(model, x)[0]
        half = copy.deepcopy(model).bfloat16()
        own = relative_difference(outputs(half, x.bfloat16())[0].float(), expected)
        folded = outputs(fold(model).bfloat16(), x.bfloat16())[0]
        first.append(relative_difference(folded.float(), expected) / own)
        # the other way round, weights are rounded twice
        folded = outputs(fold(half), x.bfloat16())[0]
        assert folded.dtype == torch.bfloat16
        other_way.append(relative_difference(folded.float(), expected) / own)
    assert sum(first) / len(first) <= 1.05 and sum(other_way) / len(other_way) <= 1.6


@pytest.mark.recent
@pytest.mark.parametrize('name', [pytest.param('test_vitresnet', marks=pytest.mark.slow), 'vitresnet_nano'])
def test_it_scripts_exports_and_compiles(name):
    folded = fold(create(name))
    sizes = {0: Dim('batch'), 2: Dim('height', min=33, max=4096), 3: Dim('width', min=33, max=4096)}
    torch._dynamo.reset()
    others = [
        torch.jit.script(folded),
        torch.export.export(folded, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sizes,)).module(),
        torch.compile(folded, backend='eager', fullgraph=True, dynamic=True),
    ]
    for size in SIZES[1:3]:
        x = torch.randn(3, 3, *size)
        for other in others:
            assert relative_difference(other(x), folded(x)) < 1e-5


@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual'])
def test_it_is_for_inference(name, tmp_path):
    model = create(name)
    folded = fold(model)
    with pytest.raises(ValueError, match='folded for inference'):
        folded.train()
    assert not folded.eval().training
    for target in (folded, copy.deepcopy(folded), reparameterize_model(model)):  # of one key and shape
        with pytest.raises((ValueError, RuntimeError), match=r'folded for inference|Missing key'):
            target.load_state_dict(model.state_dict())
    for call in (timm_vitres.save, timm_vitres.push):
        with pytest.raises(ValueError, match='folded for inference'):
            call(folded, str(tmp_path / 'model'))
    assert model.train().training
    with pytest.raises(ValueError, match=r'model: it is in training mode; call model\.eval\(\)'):
        fold(model)
    model.eval().head_drop.train()
    with pytest.raises(ValueError, match='its head_drop is'):
        fold(model)
    backbone = fold(create(name, features_only=True))
    with pytest.raises(ValueError, match='folded for inference'):
        backbone.train()


def test_what_a_second_fold_finds_can_be_copied():
    """BatchNorms behind standardised convolutions are merged once these are plain."""
    model = create('test_vitresnet', backbone_norm_layer='batchnorm2d')
    twice, x = fold(fold(model)), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        for folded in (twice, copy.deepcopy(twice)):
            assert relative_difference(folded(x), model(x)) < 1e-5
            with pytest.raises((ValueError, RuntimeError), match=r'folded for inference|Missing key'):
                folded.load_state_dict(model.state_dict())


def test_the_root_is_folded_too():
    """Whatever is given: a layer, an embedding, a model that timm's function would pass over."""
    embed = create('test_vitresnet').patch_embed
    conv = embed.backbone.stem.conv
    x = torch.randn(1, 3, 33, 65)
    for part in (conv, embed):
        assert not left_over(fold(part)) and left_over(part)
        assert relative_difference(fold(part)(x), part(x)) < 1e-5
    block_with_scale = create('vitresnet_nano')
    assert not [module for module in fold(block_with_scale).modules() if isinstance(module, LayerScale)]
    twice = fold(fold(embed))
    assert torch.equal(twice(x), fold(embed)(x))


def test_known_padding_is_static():
    folded = fold(create('test_vitresnet'))
    kinds = {}
    for module in folded.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            kinds.setdefault(module.stride, set()).add((type(module).__name__, module.padding))
    assert kinds == {(1, 1): {('Conv2d', (1, 1))}, (2, 2): {('PadSameConv2d', (0, 0))}}


def check_same(folded, model, tolerance=1e-5):
    for size in ((64, 96), (97, 161)):
        x = torch.randn(2, 3, *size, dtype=next(model.parameters()).dtype)
        for one, other in zip(outputs(folded, x), outputs(model, x), strict=True):
            assert one.dtype == other.dtype and relative_difference(one, other) < tolerance, size


DOORS = pytest.mark.parametrize('door', [fold, reparameterize_model])


@DOORS
@pytest.mark.parametrize('features_only', [False, True])
@pytest.mark.parametrize(
    'name', ['vitresnet_nano', 'vitresnet', 'test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix']
)
def test_twice_is_once(name, features_only, door):
    model = create(name, features_only=True, num_classes=0) if features_only else create(name)
    once = door(model)
    assert not any(module.training for module in once.modules())
    again = door(copy.deepcopy(once))
    x = torch.randn(2, 3, 65, 96)
    assert all(torch.equal(one, other) for one, other in zip(outputs(again, x), outputs(once, x), strict=True))
    assert again.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in again.state_dict().items())
    check_same(fold(once), model)


def share_nano(model, path):
    first, second = model.blocks[0], model.blocks[1]
    parent, _, name = path.rpartition('.')
    setattr(second.get_submodule(parent), name, first.get_submodule(path))


@DOORS
@pytest.mark.parametrize('path', ['attn.proj', 'mlp.fc2', 'attn', 'ls1', 'mlp'])
def test_layers_that_two_blocks_share(path, door):
    """Each of them merges its own LayerScale, one of them has none."""
    model = create('vitresnet_nano', init_values=0.5, depth=3)
    share_nano(model, path)
    check_same(door(model), model)
    model.blocks[2].attn.proj = model.blocks[0].attn.proj
    model.blocks[2].ls1 = nn.Identity().eval()
    folded = door(model)
    assert door is not fold or not [module for module in folded.modules() if isinstance(module, LayerScale)]
    check_same(folded, model)


@DOORS
def test_attention_that_two_blocks_share(door):
    """Each merges its own BatchNorm."""
    model = create('vitresnet_mix_nano', attn_blocks=(0, 0, 0, 2))
    model.stages[3][2].self_attn = model.stages[3][1].self_attn
    folded = door(model)
    assert not left_over(folded)
    check_same(folded, model)


@DOORS
def test_convolutions_that_two_blocks_share(door):
    model = create('test_vitresnet_dual')
    blocks = [model.units[1].conv_block, model.units[1].fusion_block]
    for name in ('conv2', 'bn2'):
        setattr(blocks[1], name, getattr(blocks[0], name))
        folded = door(model)
        assert not left_over(folded)
        check_same(folded, model)
    model.units[1].fusion_block.bn2 = nn.Identity().eval()  # the convolution is followed by a norm in one place only
    check_same(door(model), model)
    # of the serial family's ResNet, whose layers are found by tracing
    for name in ('conv1', 'bn1', None):
        model = create('vitresnet', backbone='resnet18', depth=1, embed_dim=48)
        stage = model.patch_embed.backbone.layer1
        if name is None:
            stage[1] = stage[0]
        else:
            setattr(stage[1], name, getattr(stage[0], name))
        check_same(door(model), model)


class Adapter(nn.Module):
    """What peft makes of a layer for LoRA; with ranks of 0 here."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = base_layer, nn.ModuleDict(), nn.ModuleDict()

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x, *args, **kwargs):
        if x.dtype == torch.float64:  # what tracing can't follow
            raise TypeError
        return self.base_layer(x, *args, **kwargs)


def adapt(parent, name):
    setattr(parent, name, Adapter(getattr(parent, name)).eval())


def hook_forward(parent, name):
    getattr(parent, name).register_forward_hook(lambda module, args, output: 2 * output)


def hook_before(parent, name):
    getattr(parent, name).register_forward_pre_hook(lambda module, args: (2 * args[0],))


def set_forward(parent, name):
    module = getattr(parent, name)
    module.forward = lambda x: 2 * type(module).forward(module, x)


def parametrise(parent, name):
    torch.nn.utils.parametrizations.weight_norm(getattr(parent, name))


def normalise(parent, name):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.nn.utils.weight_norm(getattr(parent, name))


def normalise_frozen(parent, name):
    getattr(parent, name).requires_grad_(False)
    normalise(parent, name)


def normalise_spectrum(parent, name):
    torch.nn.utils.spectral_norm(getattr(parent, name))


class Quantised(nn.Parameter):
    """A weight of another kind."""


def quantise(parent, name):
    module = getattr(parent, name)
    module.weight = Quantised(module.weight.detach(), requires_grad=False)


def subclass(parent, name):
    getattr(parent, name).__class__ = type('Doubling', (type(getattr(parent, name)),), {})


LAYERS = [
    ('vitresnet_nano', 'patch_embed.backbone.layer1.0', 'conv1'),
    ('vitresnet_nano', 'blocks.1.attn', 'proj'),
    ('vitresnet_nano', 'blocks.0.mlp', 'fc2'),
    ('test_vitresnet', 'patch_embed.backbone.stages.0.blocks.0', 'conv2'),
    ('test_vitresnet_dual', 'units.1.up', 'proj'),
    ('test_vitresnet_dual', 'units.1.fusion_block', 'conv3'),
]
CHANGES = [
    (hook_forward, r'has forward hooks \(hook_forward.*remove them first'),
    (hook_before, r'has forward hooks \(hook_before.*remove them first'),
    (normalise, 'torch.nn.utils.remove_weight_norm'),
    (normalise_frozen, r'has forward hooks \(WeightNorm.*torch.nn.utils.remove_weight_norm'),
    (normalise_spectrum, r'has forward hooks \(SpectralNorm'),
    (parametrise, 'has parametrizations, .*remove_parametrizations'),
    (set_forward, 'has a forward method set from outside'),
    (quantise, 'holds weights of type Quantised, .* fold the model before that'),
]


@pytest.mark.parametrize('change, message', CHANGES)
def test_what_would_be_lost_is_refused_by_name(change, message):
    for name, path, layer in LAYERS:
        model = create(name, **(dict(init_values=0.5) if name == 'vitresnet_nano' else {}))
        change(model.get_submodule(path), layer)
        model.eval()
        before = outputs(model, torch.randn(1, 3, 64, 64))[0]
        with pytest.raises(ValueError, match=rf'^model: {re.escape(path)}\.{layer} .*{message}'):
            fold(model)
        assert before.isfinite().all()


@pytest.mark.parametrize('change, message', [*CHANGES[:2], *CHANGES[4:7]])
def test_timms_function_refuses_it_too(change, message):
    for name, path, layer in LAYERS:
        if 'blocks.1' in path or 'blocks.0.mlp' in path:
            continue  # timm does not call the hook of the root, which merges those
        model = create(name)
        change(model.get_submodule(path), layer)
        with pytest.raises(ValueError, match=message):
            reparameterize_model(model.eval())


def test_adapters_are_refused_where_they_matter():
    """As peft's, whose layers hold the original as base_layer."""
    for name, path, layer in LAYERS:
        model = create(name, **(dict(init_values=0.5) if name == 'vitresnet_nano' else {}))
        adapt(model.get_submodule(path), layer)
        if name == 'test_vitresnet':  # the convolution inside is folded, as a part of its own
            check_same(fold(model), model)
            continue
        with pytest.raises(ValueError, match=rf'{path}\.{layer} is an adapter \(Adapter\).*merge_and_unload'):
            fold(model)
    model = create('vitresnet_nano', init_values=0.5)
    adapt(model.blocks[0].attn, 'qkv')
    check_same(fold(model), model)


@pytest.mark.parametrize(
    'path', ['blocks.0.attn', 'blocks.0.mlp.drop2', 'blocks.0.ls1', 'patch_embed.backbone.layer1.0.bn1']
)
def test_hooks_on_what_lies_between_are_refused(path):
    model = create('vitresnet_nano', init_values=0.5)
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match=f'model: {path} has forward hooks'):
        fold(model)
    handle.remove()
    check_same(fold(model), model)


@DOORS
@pytest.mark.parametrize('name', ['vitresnet_nano', 'test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'])
def test_other_hooks_go_on_working(name, door):
    """They are kept, called as often as before, and never by `fold` itself."""
    model, seen = create(name), []
    model.register_forward_hook(lambda module, args, output: seen.append('model'))
    for path in (
        'patch_embed.backbone.layer1.0',
        'blocks.0',
        'units.0.conv_block',
        'patch_embed.backbone.stages.0',
        'stages.1',
    ):
        with contextlib.suppress(AttributeError):
            model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
    folded = door(model)
    assert not seen
    x = torch.randn(1, 3, 64, 64)
    outputs(model, x)
    expected = list(seen)
    outputs(folded, x)
    assert len(seen) == 2 * len(expected) > 2
    outputs(copy.deepcopy(folded), x)
    assert len(seen) == 3 * len(expected)


def test_a_layer_of_another_class_is_refused():
    for name, path, layer in (LAYERS[1], LAYERS[4]):
        model = create(name, **(dict(init_values=0.5) if name == 'vitresnet_nano' else {}))
        subclass(model.get_submodule(path), layer)
        with pytest.raises(ValueError, match=rf'{path}\.{layer} is a Doubling, and only a .*Linear can be folded'):
            fold(model)


def without_statistics(module):
    module.track_running_stats, module.running_mean, module.running_var = False, None, None


def without_weights(module):
    module.affine, module.weight, module.bias = False, None, None


@DOORS
@pytest.mark.parametrize('change', [without_statistics, without_weights])
@pytest.mark.parametrize('name', ['vitresnet_nano', 'test_vitresnet_dual', 'test_vitresnet_mix'])
def test_batch_norms_of_all_kinds(name, change, door):
    model = create(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            change(module)
    folded = door(model)
    assert bool(left_over(folded)) == (change is without_statistics)
    check_same(folded, model)


@pytest.mark.parametrize('name', ['vitresnet_nano', 'test_vitresnet_dual', 'vitresnet', 'test_vitresnet_mix'])
def test_synchronised_batch_norms(name):
    model = create(name)
    expected = copy.deepcopy(model)
    for synchronised in (nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), convert_sync_batchnorm(model)):
        folded = fold(synchronised.eval())
        assert not [module for module in folded.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        check_same(folded, expected)


@pytest.mark.parametrize('name', ['vitresnet_nano', 'test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix'])
def test_precision_device_and_gradients_stay(name):
    model = create(name).double()
    folded = fold(model)
    assert {value.dtype for value in folded.parameters()} == {torch.float64}
    check_same(folded, model, tolerance=1e-12)
    assert all(value.requires_grad for value in folded.parameters())
    frozen = fold(model.requires_grad_(False))
    assert not any(value.requires_grad for value in frozen.parameters())
    meta = fold(model.to('meta'))
    assert all(value.is_meta for value in meta.parameters())
    assert meta.state_dict().keys() == folded.state_dict().keys()


def test_what_is_no_model_is_named():
    with pytest.raises(TypeError, match=r'model: got str, expected a torch\.nn\.Module'):
        fold('vitresnet_nano')
    with pytest.raises(TypeError, match='model: got a TorchScript module'):
        fold(torch.jit.script(create('vitresnet', backbone='resnet18', depth=1, embed_dim=48)))


@pytest.mark.parametrize('branch', ['attn', 'mlp'])
def test_a_forward_from_outside_around_a_layer_scale_is_named(branch):
    """It may be bound to parts that are not merged: the branch would be scaled by 1 in place of gamma."""
    model = create('test_vitresnet', init_values=0.1)
    part = getattr(model.blocks[0], branch)
    part.forward = part.forward
    with pytest.raises(ValueError, match=rf'^model: blocks\.0\.{branch} has a forward method set from outside'):
        fold(model)


def test_what_timms_models_computed_is_no_obstacle():
    model = create('levit_128s', num_classes=3)
    x = torch.randn(1, 3, 224, 224)
    expected = model(x).detach()  # with gradients, of which the biases that it keeps are a part
    assert relative_difference(outputs(fold(model), x)[0], expected) < 1e-4
