import dataclasses
import math

import pytest
import safetensors.torch
import timm
import torch
from conftest import randomise_, relative_difference
from timm.layers import DropPath
from timm.models import group_modules, group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay

import timm_vitres
from timm_vitres import VitResNet, VitResNetCfg
from timm_vitres.models.base import Hybrid

NAMES = timm.list_models(module='vitresnet')
SMALL = [name for name in NAMES if name not in ('vitresnet_base', 'vitresnet_large')]
# ours, timm's, image size
PAIRS = [
    ('vitresnet_tiny', 'vit_tiny_r_s16_p8_224', 224),
    ('vitresnet_small', 'vit_small_r26_s32_224', 224),
    ('vitresnet_small', 'vit_small_r26_s32_384', 384),
    ('vitresnet_base', 'vit_base_r50_s16_384', 384),
    ('vitresnet_large', 'vit_large_r50_s32_224', 224),
]
PARAMETERS = dict(vitresnet_tiny=6.3, vitresnet_small=36.4, vitresnet_base=99.0, vitresnet_large=329.0)


def test_family_is_registered():
    variants = [
        'test_vitresnet',
        'vitresnet',
        'vitresnet_base',
        'vitresnet_large',
        'vitresnet_nano',
        'vitresnet_ocr',
        'vitresnet_small',
        'vitresnet_tiny',
    ]
    assert variants == NAMES, 'add the new variant to this list; CONTRIBUTING.md says where else it is to be named.'
    assert 'vitresnet_small.augreg_in21k_ft_in1k_384' in timm.list_models('vitresnet*', pretrained=True)
    modules = {family.__module__.rpartition('.')[2] for family in Hybrid.families if family.variants}
    of_families = {name for module in modules for name in timm.list_models(module=module)}
    assert set(timm.list_models('*vitresnet*')) == of_families > set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_every_parameter_has_a_gradient(name):
    if name == 'vitresnet_large':  # shapes only; its numbers are compared with timm's below
        model = timm.create_model(name, device='meta', img_size=64)
    else:
        model = timm.create_model(name, img_size=64, in_chans=3, num_classes=1000)
    device = next(model.parameters()).device
    # the ResNets begin with zero_init_last, which would hide a convolution that nothing reaches
    if device.type != 'meta':
        randomise_(model)
    model.train()
    logits = model(torch.randn(2, 3, 64, 64, device=device))
    assert logits.shape == (2, 1000)
    logits.square().mean().backward()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    if device.type != 'meta':
        assert torch.isfinite(logits).all()
        assert not [key for key, p in model.named_parameters() if not p.grad.abs().sum() > 0]


@pytest.mark.parametrize('name, millions', PARAMETERS.items())
def test_parameter_counts(name, millions):
    model = timm.create_model(name, device='meta')
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == pytest.approx(
        millions, abs=0.06
    )


def test_sizes_of_the_small_ones():
    def count(name):
        return sum(parameter.numel() for parameter in timm.create_model(name, device='meta').parameters())

    assert 0.5e6 <= count('vitresnet_nano') <= 1.5e6
    assert count('test_vitresnet') < 0.5e6


@pytest.mark.parametrize('ours, theirs, size', PAIRS)
def test_state_dicts_are_exchanged_with_timm(ours, theirs, size):
    reference = randomise_(timm.create_model(theirs))
    with torch.device('meta'):
        model = timm.create_model(ours, img_size=size)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    model.load_state_dict(reference.state_dict(), strict=True, assign=True)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        expected = reference(x)
        assert relative_difference(model.eval()(x), expected) < 1e-6
        # and back: ours, changed, into timm's
        randomise_(model, seed=1)
        reference.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, strict=True)
        actual = reference(x)
    assert relative_difference(actual, expected) > 1e-2
    assert relative_difference(model(x), actual) < 1e-6


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnet26d', 'resnetv2_50', 'seresnet50'])
def test_without_blocks_it_is_the_resnet(name):
    resnet = randomise_(timm.create_model(name))
    model = timm.create_model('vitresnet', backbone=name, depth=0).eval()
    head = 'head.fc.' if name.startswith('resnetv2') else 'fc.'
    weights = {
        key.replace(head, 'head.') if key.startswith(head) else f'patch_embed.backbone.{key}': value
        for key, value in resnet.state_dict().items()
    }
    weights['head.weight'] = weights['head.weight'].flatten(1)  # a 1x1 convolution in ResNetV2
    model.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 97, 161)
    with torch.inference_mode():
        assert relative_difference(model(x), resnet(x)) < 1e-6


def test_without_a_backbone_it_is_the_vit():
    vit = randomise_(timm.create_model('vit_tiny_patch16_224'))
    model = timm.create_model('vitresnet', backbone='', patch_size=16, embed_dim=192, depth=12, num_heads=3).eval()
    model.load_state_dict(vit.state_dict(), strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert relative_difference(model(x), vit(x)) < 1e-6


def test_vit_options_are_timms():
    options = dict(embed_dim=96, depth=2, num_heads=3, reg_tokens=4, init_values=0.1, qk_norm=True, qkv_bias=False)
    options.update(pre_norm=True, no_embed_class=True, class_token=False, global_pool='avg', mlp_ratio=2)
    named = dict(norm_layer='rmsnorm', act_layer='silu', mlp_layer='swiglu')
    vit = timm.models.VisionTransformer(
        img_size=64, **options, norm_layer=timm.layers.RmsNorm, act_layer=torch.nn.SiLU, mlp_layer=timm.layers.SwiGLU
    )
    model = timm.create_model('vitresnet', backbone='', patch_size=16, img_size=64, **options, **named).eval()
    model.load_state_dict(randomise_(vit).state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_difference(model(x), vit(x)) < 1e-6


def test_a_stage_is_the_resnets_own_map():
    resnet = randomise_(timm.create_model('resnet26d', features_only=True, out_indices=(3,)))
    model = timm.create_model('vitresnet', backbone='resnet26d', stage=3, depth=1).eval()
    backbone = model.patch_embed.backbone
    backbone.load_state_dict(resnet.state_dict(), strict=True)
    x = torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        assert relative_difference(backbone(x), resnet(x)[0]) < 1e-6
    assert model.patch_embed.grid_size == (14, 14)


def test_thin_resnets_need_no_new_code():
    thin = dict(layers=(1, 2), channels=(16, 24), block='bottleneck', stem_type='deep', stem_width=8, avg_down=True)
    model = timm.create_model('vitresnet', backbone='resnet18', stem_stride=2, img_size=32, **thin)
    assert [level['reduction'] for level in model.patch_embed.backbone.feature_info] == [2, 2, 4]
    assert model.patch_embed.grid_size == (8, 8)
    assert model.patch_embed.proj.in_channels == 24 * 4
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
    v2 = dict(layers=(1, 1), channels=(32, 64), block='basic', stem_chs=16, backbone_norm_layer='batchnorm2d')
    model = timm.create_model('vitresnet', backbone='resnetv2_50', stem_stride=1, img_size=32, **v2)
    assert model.patch_embed.grid_size == (16, 16)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_set_input_size_changes_nothing_but_the_table():
    model = randomise_(timm.create_model('test_vitresnet'))
    x = torch.randn(1, 3, 128, 64)
    with torch.inference_mode():
        before = model(x)
        model.set_input_size(img_size=(128, 64))
        assert model.patch_embed.grid_size == (4, 2)
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_timms_size_flags_are_taken():
    flags = dict(dynamic_img_size=True, dynamic_img_pad=True, strict_img_size=False)
    assert isinstance(timm.create_model('test_vitresnet', **flags), VitResNet)


@pytest.mark.parametrize('pool', ['', 'avg', 'avgmax', 'max', 'token', 'map', 'prr'])
def test_global_pools(pool):
    model = timm.create_model('test_vitresnet', global_pool=pool, num_classes=5)
    shape = (1, 10, 5) if pool == '' else (1, 5)
    assert model(torch.randn(1, 3, 96, 96)).shape == shape


def test_reset_classifier():
    model = timm.create_model('test_vitresnet')
    model.reset_classifier(7, 'avg')
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, model.num_features)
    with pytest.raises(ValueError, match='global_pool'):
        model.reset_classifier(7, 'mean')


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(backbone='resnet19'), "backbone: got 'resnet19'"),
        (dict(backbone='vit_tiny_patch16_224'), 'backbone: got'),
        (dict(backbone='resnet50.a1_in1k'), r'without a tag'),
        (dict(stage=5), 'stage: got 5'),
        (dict(stage=-1), 'stage: got -1'),
        (dict(embed_dim=100, num_heads=3), 'num_heads: got 3, which does not divide embed_dim'),
        (dict(embed_dim=0), 'embed_dim: got 0'),
        (dict(num_heads=0), 'num_heads: got 0'),
        (dict(depth=-1), 'depth: got -1'),
        (dict(img_size=0), 'img_size: got 0'),
        (dict(img_size=(224, -32)), 'img_size'),
        (dict(img_size=16), 'smaller than one token'),
        (dict(patch_size=0), 'patch_size: got 0'),
        (dict(in_chans=0), 'in_chans: got 0'),
        (dict(num_classes=-2), 'num_classes: got -2'),
        (dict(mlp_ratio=-1.0), 'mlp_ratio'),
        (dict(layers=(1, 1, 1, 1, 1)), 'layers'),
        (dict(layers=(1, 0)), 'layers'),
        (dict(layers=(1, 1), channels=(8, 8, 8)), 'channels'),
        (dict(block='wide'), "block: got 'wide'"),
        (dict(stem_stride=3), 'stem_stride: got 3'),
        (dict(stem_chs=32), 'stem_chs: got 32'),
        (dict(backbone='resnetv2_50', stem_width=32), 'stem_width: got 32'),
        (dict(backbone='resnet18', stem_width=32), 'only a deep stem has one'),
        (dict(norm_layer='norm'), "norm_layer: got 'norm'"),
        (dict(act_layer='bent'), "act_layer: got 'bent'"),
        (dict(mlp_layer='mlpx'), 'mlp_layer'),
        (dict(global_pool='mean'), 'global_pool'),
        (dict(class_token=False, global_pool='token'), 'no class token'),
        (dict(depth=0, embed_dim=64), 'embed_dim: got 64'),
        (dict(depth=0, class_token=True), 'ResNet alone'),
        (dict(depth=0, patch_size=2), 'patch_size'),
        (dict(depth=0, backbone=''), 'depth: got 0'),
        (dict(backbone='', layers=(1, 1)), "backbone: got ''"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('vitresnet', **{'depth': 1, 'device': 'meta', **kwargs})


def test_unknown_arguments_are_type_errors():
    with pytest.raises(TypeError, match='embed_dims'):
        timm.create_model('vitresnet_small', embed_dims=12, device='meta')


@pytest.mark.parametrize('shape', [(1, 1, 96, 96), (3, 96, 96), (1, 3, 31, 96), (1, 3, 96, 16)])
def test_impossible_inputs_are_named(shape):
    with pytest.raises(ValueError, match='input: got'):
        timm.create_model('test_vitresnet')(torch.randn(shape))


def test_config_is_plain_frozen_data():
    cfg = VitResNetCfg(layers=[1, 2], channels=[8, 16])
    assert cfg.layers == (1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.depth = 3
    for field in dataclasses.fields(VitResNetCfg):
        assert isinstance(getattr(cfg, field.name), (int, float, str, tuple, type(None)))


@pytest.mark.parametrize('ours, theirs', [(ours, theirs) for ours, theirs, size in PAIRS if size == 224][:2])
def test_another_size_is_timms_model_created_for_it(ours, theirs, tmp_path):
    """At 384 on the 224 weights: timm's class with img_size=384, loaded from the same checkpoint."""
    checkpoint = tmp_path / 'model.safetensors'
    safetensors.torch.save_model(randomise_(timm.create_model(theirs)), str(checkpoint))
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(checkpoint)))
    reference = timm.create_model(theirs, img_size=384, **options).eval()
    x = torch.randn(1, 3, 384, 384)
    with torch.inference_mode():
        expected = reference(x)
        # on the 224 table, with the table resized afterwards, and on a 384 table
        model = timm.create_model(ours, **options).eval()
        assert model.patch_embed.grid_size == (7, 7)
        assert relative_difference(model(x), expected) < 1e-5
        model.set_input_size(img_size=(384, 384))
        assert relative_difference(model(x), expected) < 1e-5
        model = timm.create_model(ours, img_size=384, **options).eval()
        assert model.patch_embed.grid_size == (12, 12)
        assert relative_difference(model(x), expected) < 1e-5


def test_set_input_size_of_patches_survives_saving(tmp_path):
    model = randomise_(timm.create_model('vitresnet_tiny', num_classes=5))
    model.set_input_size(img_size=(96, 128), patch_size=4)
    assert model.patch_embed.grid_size == (6, 8)
    assert [info['reduction'] for info in model.feature_info[: model.num_pyramid]] == [2, 4, 8, 16]
    reloaded = timm.create_model(f'local-dir:{timm_vitres.save(model, tmp_path)}', pretrained=True).eval()
    x = torch.randn(1, 3, 100, 130)
    with torch.inference_mode():
        assert torch.equal(reloaded(x), model(x))
        assert reloaded.patch_embed.grid_size == (6, 8)
    for kwargs in (dict(img_size=(0, 32)), dict(patch_size=-1)):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            model.set_input_size(**kwargs)


def test_a_resnet_alone_has_no_patches():
    model = timm.create_model('vitresnet', backbone='resnet18', depth=0, device='meta')
    with pytest.raises(ValueError, match=r'^patch_size: got 2, but with depth=0 the model is the ResNet alone'):
        model.set_input_size(patch_size=2)


@pytest.mark.parametrize('backbone', ['resnetv2_18', 'resnet18'])
def test_modules_are_in_the_group_of_their_parameters(backbone):
    """What is frozen by the one, as statistics of norms are, is frozen by the other."""
    model = timm.create_model('vitresnet', backbone=backbone, depth=1, embed_dim=32, num_heads=2)
    modules = group_modules(model, model.group_matcher(), reverse=True)
    for name, layer in group_parameters(model, model.group_matcher(), reverse=True).items():
        owner = name.rpartition('.')[0]
        assert not owner or modules[owner] == layer, name
    assert len({modules[name] for name in modules}) > 5


@pytest.mark.parametrize('name', ['vitresnet_small', 'vitresnet', 'vitresnet_tiny', 'vitresnet_nano'])
def test_layer_decay_reaches_into_the_resnet(name):
    """stem < stages < embedding < blocks < head, each a group of its own."""
    model = timm.create_model(name)
    layers = group_parameters(model, model.group_matcher(), reverse=True)

    def layer(prefix):
        found = {layers[key] for key in layers if key.startswith(prefix)}
        assert len(found) == 1, (prefix, found)
        return found.pop()

    backbone = 'patch_embed.backbone.'
    v2 = name != 'vitresnet' and name != 'vitresnet_nano'
    stem = [backbone + ('stem' if v2 else 'conv1')] if name != 'vitresnet_tiny' else [backbone]
    number = {'vitresnet_tiny': 0, 'vitresnet_nano': 2}.get(name, 4)
    stages = [backbone + (f'stages.{i}.' if v2 else f'layer{i + 1}.') for i in range(number)]
    order = [*stem, *stages, 'patch_embed.proj', *(f'blocks.{i}.' for i in range(len(model.blocks))), 'head']
    groups = [layer(prefix) for prefix in order]
    assert groups == list(range(len(order)))
    assert layers['pos_embed'] == layers['patch_embed.proj.weight']
    scales = {group['lr_scale'] for group in param_groups_layer_decay(model, layer_decay=0.8)}
    assert len(scales) == len(order)


def test_no_weight_decay_of_tables_and_tokens():
    model = timm.create_model('test_vitresnet', reg_tokens=2)
    groups = create_optimizer_v2(model, 'adamw', weight_decay=0.05, layer_decay=0.8).param_groups
    spared = {id(value) for group in groups if not group['weight_decay'] for value in group['params']}
    assert {id(model.pos_embed), id(model.cls_token), id(model.reg_token)} <= spared


def test_drop_path_grows_over_both_parts():
    for name in ('vitresnet_small', 'vitresnet'):
        model = timm.create_model(name, drop_path_rate=0.38)
        rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
        # 8 residual blocks, whose first drops nothing, then 12 blocks of two paths
        expected = [0.02 * i for i in range(1, 8)] + [0.02 * i for i in range(8, 20) for _ in range(2)]
        assert rates == pytest.approx(expected)
        assert not [m for m in timm.create_model(name).modules() if isinstance(m, DropPath)]


def test_drop_path_drops_paths():
    torch.manual_seed(0)
    model = randomise_(timm.create_model('test_vitresnet', drop_path_rate=0.5))
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = model(x)
        model.train()
        assert len({tuple(model(x)[0, :3].tolist()) for _ in range(12)}) > 4
        assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize('name', ['vitresnet_tiny', 'vitresnet_nano', 'test_vitresnet'])
def test_gradient_checkpointing_changes_no_gradient(name):
    model = randomise_(timm.create_model(name, num_classes=3)).train()
    x = torch.randn(2, 3, 64, 96)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_gradient_checkpointing_reaches_both_parts():
    for name in ('vitresnet_nano', 'test_vitresnet'):
        model = timm.create_model(name)
        model.set_grad_checkpointing()
        assert model.grad_checkpointing
        backbone = model.patch_embed.backbone
        stages = [backbone] if name == 'vitresnet_nano' else list(backbone.stages)
        assert all(stage.grad_checkpointing for stage in stages)


def test_frozen_stays_frozen():
    model = timm.create_model('test_vitresnet', global_pool='avg')
    model.requires_grad_(False)
    model.set_input_size(img_size=(128, 64), patch_size=2)
    model.reset_classifier(5)
    assert {key for key, value in model.named_parameters() if value.requires_grad} == {'head.weight', 'head.bias'}


@pytest.mark.parametrize('name', SMALL)
def test_device_and_dtype(name):
    model = timm.create_model(name, device='meta', dtype=torch.bfloat16)
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.device.type == 'meta'
        assert tensor.dtype == torch.bfloat16 or not tensor.is_floating_point()
    model = randomise_(timm.create_model(name, num_classes=4, in_chans=3))
    x = torch.randn(1, 3, 97, 161)
    with torch.inference_mode():
        expected = model(x)
        # after a forward pass at the same size: nothing of it is kept in the old dtype
        assert relative_difference(model.double()(x.double()), expected.double()) < 1e-5
        half = model.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert relative_difference(half.float(), expected) < 0.1


@pytest.mark.parametrize('name', ['drop_rate', 'drop_path_rate', 'attn_drop_rate', 'patch_drop_rate'])
def test_impossible_rates_are_named(name):
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f'{name}: got {rate}'):
            timm.create_model('test_vitresnet', device='meta', **{name: rate})


def test_pooling_with_weights_comes_only_with_the_model():
    model = timm.create_model('test_vitresnet')
    with pytest.raises(ValueError, match="global_pool: got 'map'"):
        model.reset_classifier(5, 'map')
    model = timm.create_model('test_vitresnet', global_pool='map')
    model.reset_classifier(5, 'map')
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 5)


CHANGED = [
    *(('reset_classifier', dict(global_pool=old), (4, new)) for old in ('prr', 'map') for new in ('', 'avg', 'token')),
    *(
        ('reset_classifier', dict(global_pool=old, fc_norm=fc_norm), (4, new))
        for old, new in (('token', 'avg'), ('avg', 'token'), ('max', ''), ('', 'avgmax'))
        for fc_norm in (None, True, False)
    ),
    ('set_input_size', dict(), ((64, 128),)),
    ('set_input_size', dict(no_embed_class=True), ([128, 96], 2)),
    *(('set_input_size', dict(output_stride=16), (None, size)) for size in (1, 2, (1, 2), (2, 2), 3)),
    ('set_input_size', dict(output_stride=16, patch_size=2), (None, 1)),
    ('set_input_size', dict(output_stride=32), (None, 3)),
    ('prune_intermediate_layers', dict(), (1,)),
    ('prune_intermediate_layers', dict(global_pool='avg'), (1, True)),
    ('prune_intermediate_layers', dict(), ([0],)),
    ('prune_intermediate_layers', dict(depth=0, stage=0, embed_dim=32, class_token=False), ([0],)),
    ('set_grad_checkpointing', dict(), ()),
]


@pytest.mark.parametrize('method, kwargs, args', CHANGED)
def test_a_changed_model_is_saved_as_it_is_or_refused(method, kwargs, args, tmp_path):
    """What is loaded is equal to what was saved; what could not be, `save` or the method itself refuses."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    kwargs = {'reg_tokens': 0 if kwargs.get('depth') == 0 else 1, **kwargs}
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3, **kwargs))
    try:
        getattr(model, method)(*args)
        folder = timm_vitres.save(model, tmp_path)
    except ValueError as error:
        assert method in ('set_input_size', 'prune_intermediate_layers'), error
        assert args[-1] == 3 or 'prune' in method
        return
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert loaded.cfg == model.cfg
    assert loaded.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 3, 128, 160)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_output_stride_follows_the_patches():
    model = timm.create_model('test_vitresnet', output_stride=16)
    model.set_input_size(patch_size=2)
    assert model.cfg.output_stride == 32
    assert model.cfg.patch_size == 2
    with pytest.raises(ValueError, match='patch_size: got 3, with which the tokens would be 48 pixels apart'):
        model.set_input_size(patch_size=3)
    model = timm.create_model('test_vitresnet', output_stride=32)  # no stride is replaced, so any patch will do
    model.set_input_size(patch_size=3)
    assert model.cfg.output_stride is None


INITIALISED = [
    *(('test_vitresnet', {'weight_init': mode}) for mode in ('', 'jax', 'jax_nlhb', 'moco', 'reset')),
    *(('test_vitresnet_dual', {'weight_init': mode}) for mode in ('', 'jax', 'jax_nlhb', 'moco', 'reset')),
    ('test_vitresnet', dict(global_pool='map', reg_tokens=2, init_values=0.1, qk_norm=True, fix_init=True)),
    ('vitresnet_nano', {}),
    ('vitresnet_tiny', {}),
    ('vitresnet_dual_tiny', {}),
    *(('test_vitresnet_mix', {'weight_init': mode}) for mode in ('', 'jax', 'jax_nlhb', 'moco', 'reset')),
    ('test_vitresnet_mix', dict(zero_init_last=False, channel_attn='gca')),
    ('vitresnet', dict(backbone='resnetblur18', layers=(1, 1), channels=(16, 24), depth=1, embed_dim=48)),
    ('vitresnet', dict(backbone='ecaresnet26t', stage=2, depth=1, embed_dim=48, norm_layer='rmsnorm')),
]


@pytest.mark.parametrize('name, kwargs', INITIALISED)
def test_init_weights_leaves_nothing_out(name, kwargs):
    """On memory that was full of nan, it makes what building makes: the same constants, the same distributions."""
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=10, **kwargs)
    model = timm.create_model(name, num_classes=10, device='meta', **kwargs).to_empty(device='cpu')
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(math.nan if tensor.is_floating_point() else 77)
    model.init_weights()
    for key, expected in (*reference.named_parameters(), *reference.named_buffers()):
        tensor = tensors.pop(key).detach()
        assert torch.isfinite(tensor).all(), key
        if expected.unique().numel() == 1:
            assert torch.equal(tensor, expected), key
            continue
        # of absolute values: timm's truncated normal has an outlier of 100 sigma once in a million values
        means = [value.detach().double().abs().clamp(max=1).mean().item() for value in (tensor, expected)]
        assert means[0] == pytest.approx(means[1], rel=max(0.02, 6 / expected.numel() ** 0.5)), key
    assert not tensors


@pytest.mark.parametrize(
    'name, heads',
    [
        ('test_vitresnet', ['head']),
        ('test_vitresnet_dual', ['head_resnet', 'head_vit']),
        ('test_vitresnet_mix', ['head.fc']),
    ],
)
def test_jax_nlhb_begins_with_rare_classes(name, heads):
    model = timm.create_model(name, num_classes=20, weight_init='jax_nlhb')
    for head in heads:
        assert torch.equal(model.get_submodule(head).bias, torch.full((20,), -math.log(20)))
        assert not model.get_submodule(head).weight.any()
    assert timm.create_model(name, num_classes=0, weight_init='jax_nlhb').num_classes == 0  # no head, no logarithm
