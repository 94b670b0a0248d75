"""The parallel family: what Conformer's authors' code computes, and what timm's users expect of a model."""

import json
import math
import re

import pytest
import timm
import torch
from conformer_reference import GOLDEN, SIZES, VARIANTS, fill_, heads, images
from conftest import randomise_, relative_difference
from layouts import conformer_layout, mmpretrain_layout
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import reparameterize_model
from torch import nn

import timm_vitres
from timm_vitres import VitResNetDualCfg, cli
from timm_vitres.publishing import hub
from timm_vitres.weights.checksums import sha256

SMALL = 'test_vitresnet_dual'
REDUCTIONS = [2, 4, 8, 16, 32]
ANY_SIZE = [(224, 224), (208, 208), (240, 240), (225, 225), (97, 161), (250, 230), (33, 470), (1, 1)]
ODD = (97, 161)


def create(name=SMALL, **kwargs):
    return fill_(timm.create_model(name, **{'num_classes': 5, **kwargs}))


@pytest.mark.parametrize('name', VARIANTS)
def test_logits_are_those_of_the_authors_code(name):
    """Golden figures: `python tests/conformer_reference.py Conformer --write` computed them with the original."""
    golden = json.loads(GOLDEN.read_text())[name]
    model = fill_(timm.create_model(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == golden['parameters']
    assert len(model.state_dict()) == golden['entries'] == 718
    sizes = SIZES[VARIANTS[name]['patch_size']]
    assert set(golden['logits']) == {f'{height}x{width}' for height, width in sizes}
    for size in sizes:
        x = images(size)
        expected = {head: torch.tensor(rows) for head, rows in golden['logits'][f'{size[0]}x{size[1]}'].items()}
        with torch.inference_mode():
            resnet, vit = (logits[:, :8] for logits in heads(model, x))
            logits = model(x)[:, :8]
        assert relative_difference(resnet, expected['resnet']) < 1e-5
        assert relative_difference(vit, expected['vit']) < 1e-5
        assert relative_difference(logits, expected['resnet'] + expected['vit']) < 1e-5
        for logits in (resnet, vit):  # neither part is blind
            assert relative_difference(logits[0], logits[1]) > 1e-3


def checkpoints(model):
    """Return a model's weights as they are published, by layout."""
    flat = conformer_layout(model.state_dict())
    return dict(
        flat=flat,
        nested=dict(model=flat, epoch=299),
        mmpretrain=dict(state_dict=mmpretrain_layout(model.state_dict()), meta=dict(CLASSES=('tench',))),
        ours=model.state_dict(),
    )


@pytest.mark.parametrize('layout', ['flat', 'nested', 'mmpretrain', 'ours'])
def test_layouts(layout, tmp_path):
    model = create(num_classes=1000)
    path = tmp_path / 'checkpoint.pth'
    torch.save(checkpoints(model)[layout], path)
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    loaded = timm.create_model(SMALL, **options).eval()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    other = timm.create_model(SMALL, checkpoint_path=str(path)).eval()
    changed = timm.create_model(SMALL, num_classes=3, in_chans=1, **options).eval()
    backbone = timm.create_model(SMALL, features_only=True, **options).eval()
    x = torch.randn(2, 3, *ODD)
    with torch.inference_mode():
        assert torch.equal(other(x), model(x))
        for ours, theirs in zip(backbone(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(ours, theirs)
        # a grey image is an RGB image of three equal channels, and the heads are new
        grey = x[:, :1]
        features = changed.forward_head(changed.forward_features(grey), pre_logits=True)
        expected = model.forward_head(model.forward_features(grey.expand(-1, 3, -1, -1)), pre_logits=True)
        assert relative_difference(features, expected) < 1e-5
        assert changed(grey).shape == (2, 3)
    for head in changed.get_classifier():
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.3) and not head.bias.any()


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda d: d.pop('trans_norm.weight'), 'missing keys: norm.weight;'),
        (lambda d: d.pop('trans_cls_head.bias'), 'missing keys: head_vit.bias;'),
        (lambda d: d.update({'conv_trans_2.extra': torch.zeros(1)}), 'unexpected keys: units.1.extra;'),
        (lambda d: d.update({'conv1.weight': torch.zeros(8, 3, 7, 7)}), 'wrong shapes: stem.conv1.weight'),
    ],
)
def test_wrong_checkpoints_are_errors(change, message, tmp_path):
    state_dict = checkpoints(create(num_classes=1000))['flat']
    change(state_dict)
    torch.save(state_dict, tmp_path / 'checkpoint.pth')
    overlay = dict(file=str(tmp_path / 'checkpoint.pth'))
    with pytest.raises(RuntimeError, match=re.escape(message)):
        timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=overlay)


def test_the_other_family_is_an_error(tmp_path):
    torch.save(timm.create_model('test_vitresnet').state_dict(), tmp_path / 'serial.pth')
    with pytest.raises(RuntimeError, match='not one of test_vitresnet_dual'):
        timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'serial.pth')))


def test_published_weights_are_named_with_their_checksum():
    tagged = timm.list_models('vitresnet_dual*', pretrained=True)
    assert tagged == [f'{name}.conformer_in1k' for name in sorted(VARIANTS)]
    for name in tagged:
        cfg = timm.get_pretrained_cfg(name)
        assert re.fullmatch(r'https://download\.openmmlab\.com/.*-[0-9a-f]{8}\.pth', cfg.url)
        assert cfg.classifier == ('head_resnet', 'head_vit') and cfg.crop_pct == 0.875


def test_a_new_model_is_initialised_as_published():
    torch.manual_seed(0)
    model = timm.create_model('vitresnet_dual_tiny')
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        weight = module.weight
        fan_out = len(weight) * weight[0, 0].numel()
        is_conv = weight.ndim == 4 or name.endswith(('down.proj', 'up.proj'))
        std = math.sqrt(2 / fan_out) if is_conv else 0.02
        # six deviations of the median: of millions of weights timm's trunc_normal_ may make one 2, which moves the mean
        estimate = weight.detach().abs().median().item() / 0.6745
        assert abs(estimate - std) < 6 * 1.2 * std / math.sqrt(weight.numel()), name
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize('name', [SMALL, 'vitresnet_dual_tiny', 'vitresnet_dual_small_p32'])
def test_every_size(name):
    """Logits are finite, maps are those of the strides, rounded up, and an image does not see its neighbour."""
    model = create(name)
    for height, width in ANY_SIZE:
        x = torch.randn(2, 3, height, width)
        with torch.inference_mode():
            logits = model(x)
            features, maps = model.forward_intermediates(x)
            single = torch.cat([model(image[None]) for image in x])
        assert torch.isfinite(logits).all()
        assert relative_difference(logits, single) < 1e-4, (height, width)
        side = model.cfg.patch_size
        assert features[1].shape[1] == 1 + math.ceil(height / side) * math.ceil(width / side)
        for level, info in zip(maps, model.feature_info, strict=True):
            stride = info['reduction']
            assert level.shape == (2, info['num_chs'], math.ceil(height / stride), math.ceil(width / stride))


def test_two_heads():
    model = create()
    x = torch.randn(2, 3, 64, 96)
    resnet, vit = heads(model, x)
    assert model.get_classifier() == (model.head_resnet, model.head_vit)
    assert torch.equal(model(x), resnet + vit)
    for training, distilled, pair in [(True, False, 0), (True, True, 1), (False, True, 0)]:
        model.train(training).set_distilled_training(distilled)
        output = model(x)
        assert isinstance(output, tuple) == bool(pair)
        assert (output[0] if pair else output).shape == (2, 5)
    model = create(drop_rate=0.5).train()
    assert not torch.equal(model(x), model(x))


def test_features_and_pooling():
    model = create()
    x = torch.randn(2, 3, 64, 96)
    feature_map, tokens = model.forward_features(x)
    assert feature_map.shape == (2, 64, 2, 3) and tokens.shape == (2, 1 + 4 * 6, 48)
    assert model.num_features == model.head_hidden_size == 64 + 48
    pooled = model.forward_head((feature_map, tokens), pre_logits=True)
    torch.testing.assert_close(pooled, torch.cat([feature_map.mean((2, 3)), tokens[:, 0]], 1))
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled) and model.num_classes == 0
    model.reset_classifier(0, 'avg')
    torch.testing.assert_close(model(x), torch.cat([feature_map.mean((2, 3)), tokens[:, 1:].mean(1)], 1))
    model.reset_classifier(7, '')
    same = model(x)
    assert torch.equal(same[0], feature_map) and torch.equal(same[1], tokens)
    model.reset_classifier(7, 'token')
    assert model(x).shape == (2, 7)
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    for kwargs in (dict(global_pool=''), dict(global_pool='', num_classes=0)):
        assert isinstance(create(**kwargs)(x), tuple)
    assert create(num_classes=0)(x).shape == (2, 112)


def test_all_ways_to_the_pyramid_agree():
    getter = timm.create_model(SMALL, features_only=True)
    model = fill_(getter.model)
    assert getter.feature_info.reduction() == REDUCTIONS
    x = torch.randn(2, 3, *ODD)
    hook = timm.create_model(SMALL, features_only=True, feature_cls='hook').eval()
    hook.body.load_state_dict(model.state_dict(), strict=False)
    reference = timm.create_model(SMALL).eval()
    nn.Module.load_state_dict(reference, model.state_dict(), strict=False)
    with torch.inference_mode():
        maps = getter.eval()(x)
        for others in (
            torch.jit.script(getter)(x),
            hook(x),
            reference.forward_intermediates(x, intermediates_only=True),
            reference.forward_intermediates(x, indices=[0, 1, 2, 3, 4], stop_early=True)[1],
        ):
            for one, other in zip(others, maps, strict=True):
                assert torch.equal(one, other)
        features, _ = reference.forward_intermediates(x)
        for one, other in zip(features, reference.forward_features(x), strict=True):
            assert torch.equal(one, other)
        (tokens,) = reference.forward_intermediates(x, indices=[2], output_fmt='NLC', intermediates_only=True)
        assert torch.equal(tokens, maps[2].flatten(2).transpose(1, 2))
        # only what is asked for, in the order asked for
        last, first = reference.forward_intermediates(x, indices=[3, 0], intermediates_only=True)
        assert torch.equal(last, maps[3]) and torch.equal(first, maps[0])
    with pytest.raises(ValueError, match='output_fmt'):
        reference.forward_intermediates(x, output_fmt='NHWC')


@pytest.mark.parametrize('level, units', [(0, 0), (1, 2), (2, 4), (3, 5), (4, 6)])
def test_pruning(level, units):
    model = create()
    x = torch.randn(1, 3, *ODD)
    with torch.inference_mode():
        expected = model.forward_intermediates(x, indices=[level], intermediates_only=True)
        assert model.prune_intermediate_layers([level], prune_norm=True) == [level]
        assert len(model.units) == units and isinstance(model.norm, nn.Identity)
        got = model.forward_intermediates(x, indices=[level], intermediates_only=True)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(model(x)[0], expected[0])  # and nothing comes after it
    model.forward_intermediates(x, indices=[level], intermediates_only=True)[0].sum().backward()
    if level == 0:  # DistributedDataParallel waits for the gradient of whatever is to be trained
        untouched = [name for name, value in model.named_parameters() if value.grad is None and value.requires_grad]
        assert untouched == []
    for global_pool in ('token', 'avg'):  # without a unit there are no patches to average over
        model.reset_classifier(5, global_pool)
        assert model(x).shape == (1, 5) and model(x).isfinite().all()
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    kept = create()
    kept.prune_intermediate_layers([0], prune_head=False)
    assert torch.equal(kept(x), create()(x))


def test_layer_decay_groups():
    model = timm.create_model(SMALL)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers['stem.conv1.weight'] == layers['cls_token'] == 0
    for i in range(6):
        found = {layer for key, layer in layers.items() if key.startswith(f'units.{i}.')}
        assert found == {i + 1}
    assert layers['norm.weight'] == 6 and layers['head_resnet.bias'] == layers['head_vit.weight'] == 7
    assert len({group['lr_scale'] for group in param_groups_layer_decay(model, layer_decay=0.8)}) == 8
    groups = create_optimizer_v2(model, 'adamw', weight_decay=0.05, layer_decay=0.8).param_groups
    spared = {id(value) for group in groups if not group['weight_decay'] for value in group['params']}
    assert id(model.cls_token) in spared and id(model.head_vit.weight) not in spared


@pytest.mark.parametrize('name', [SMALL, 'vitresnet_dual_tiny'])
def test_every_parameter_has_a_gradient(name):
    model = timm.create_model(name, num_classes=3).train()
    model(torch.randn(2, 3, 64, 96)).square().mean().backward()
    assert not [key for key, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]


def test_drop_path_is_the_vits_alone():
    model = timm.create_model(SMALL, drop_path_rate=0.5)
    names = [name for name, module in model.named_modules() if isinstance(module, DropPath)]
    assert names == [f'units.{i}.block.drop_path{j}' for i in range(1, 6) for j in (1, 2)]
    rates = [model.get_submodule(name).drop_prob for name in names]
    assert rates == pytest.approx([0.1 * i for i in range(1, 6) for _ in (1, 2)])


def test_gradient_checkpointing_changes_no_gradient():
    x = torch.randn(2, 3, 64, 96)
    gradients = []
    for enable in (False, True):
        model = create().train()  # whose BatchNorm statistics change
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('features_only', [False, True])
def test_folding(features_only):
    """timm's reparameterize_model leaves no BatchNorm, and the same function, at every size."""
    model = timm.create_model(SMALL, features_only=features_only)
    fill_(model.model if features_only else model)
    folded = reparameterize_model(model.eval())
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    scripted = torch.jit.script(folded)
    for size in ANY_SIZE:
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected, got, again = model(x), folded(x), scripted(x)
        for one, other, third in zip(
            *(([y] if torch.is_tensor(y) else y) for y in (got, expected, again)), strict=True
        ):
            assert relative_difference(one, other) < 1e-5
            assert relative_difference(third, other) < 1e-5
    with torch.inference_mode():
        twice = reparameterize_model(folded)(x)
    # bit-equal in recent versions of torch; older kernels round by where in memory a tensor begins
    assert all(relative_difference(a, b) < 1e-6 for a, b in zip(twice, got))
    with pytest.raises(ValueError, match='training mode'):
        timm_vitres.fold(model.train())
    with torch.inference_mode():  # timm's validate.py reparameterizes first, and calls eval() then
        late = reparameterize_model(model).eval()(x)
    assert all(relative_difference(a, b) < 1e-6 for a, b in zip(late, got))


def test_a_folded_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match='changed for inference'):
        timm_vitres.save(reparameterize_model(create()), tmp_path)


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(in_chans=1, num_classes=3, img_size=(64, 96), global_pool='avg'),
        dict(patch_size=32, channels=(16, 24, 32), stem_width=16, embed_dim=24, depth=9, num_heads=4, mlp_ratio=2.0),
        dict(qkv_bias=False, num_classes=0),
    ],
)
def test_save_and_load(kwargs, tmp_path):
    model = create(**kwargs)
    folder = timm_vitres.save(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, model.in_chans, *ODD)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    assert loaded.cfg == model.cfg and tuple(loaded.pretrained_cfg['classifier']) == ('head_resnet', 'head_vit')
    if 'img_size' in kwargs:
        assert timm.data.resolve_model_data_config(loaded)['input_size'] == (1, 64, 96)
    # from there with other classes
    other = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=11).eval()
    with torch.inference_mode():
        assert other(x).shape == (2, 11)
        for ours, theirs in zip(other.forward_features(x), model.forward_features(x)):
            assert torch.equal(ours, theirs)


def test_preprocessing_is_the_models_own():
    config = timm.data.resolve_model_data_config(timm.create_model('vitresnet_dual_tiny', device='meta'))
    assert (
        config['crop_pct'] == 0.875 and config['interpolation'] == 'bicubic' and config['input_size'] == (3, 224, 224)
    )
    assert config['mean'] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(patch_size=8), 'patch_size: got 8'),
        (dict(patch_size=16.0), 'patch_size: got 16.0'),
        (dict(channels=(64, 128)), 'channels: got'),
        (dict(channels=(64, 126, 256)), 'channels: got'),
        (dict(depth=3), 'depth: got 3'),
        (dict(depth=10), 'depth: got 10'),
        (dict(num_heads=5), 'num_heads: got 5'),
        (dict(embed_dim=-4), 'embed_dim: got -4'),
        (dict(global_pool='max'), "global_pool: got 'max'"),
        (dict(num_classes=-1), 'num_classes: got -1'),
        (dict(in_chans=0), 'in_chans: got 0'),
        (dict(img_size=0), 'img_size: got 0'),
        (dict(drop_path_rate=1.0), 'drop_path_rate: got 1.0'),
        (dict(attn_drop_rate=-0.1), 'attn_drop_rate: got -0.1'),
    ],
)
def test_impossible_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model(SMALL, device='meta', **kwargs)


def test_unknown_arguments_and_wrong_images_are_errors():
    with pytest.raises(TypeError, match='no_such_thing'):
        timm.create_model(SMALL, no_such_thing=1)
    for kwargs in (dict(img_size=320), dict(dynamic_img_size=True), dict(strict_img_size=False)):
        timm.create_model(SMALL, device='meta', **kwargs)  # of timm's ViTs, taken
    with pytest.raises(ValueError, match=r'expected \(B, 3, H, W\)'):
        create()(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r'expected \(B, 3, H, W\)'):
        create()(torch.randn(3, 64, 64))
    model = create()
    with pytest.raises(ValueError, match="global_pool: got 'map'"):
        model.reset_classifier(5, 'map')
    with pytest.raises(ValueError, match='embed_dim'):
        VitResNetDualCfg(embed_dim=385)


def test_device_and_dtype():
    model = timm.create_model(SMALL, device='meta', dtype=torch.bfloat16)
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.is_meta and (tensor.dtype == torch.bfloat16 or not tensor.is_floating_point())
    model = create()
    x = torch.randn(1, 3, *ODD)
    with torch.inference_mode():
        expected = model(x)
        assert relative_difference(model.double()(x.double()), expected.double()) < 1e-5
        half = model.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16 and relative_difference(half.float(), expected) < 0.1


def test_a_script_that_can_not_pool_says_so():
    scripted = torch.jit.script(create(global_pool=''))
    with pytest.raises(Exception, match="global_pool: got ''"):
        scripted(torch.randn(1, 3, 64, 64))


def test_published_weights_are_verified_by_the_name_of_their_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'checkpoint.pth'
    torch.save(checkpoints(create(num_classes=1000))['mmpretrain'], path)
    published = path.rename(tmp_path / f'conformer_20211206-{sha256(path)}.pth')
    cfg = timm.models.PretrainedCfg(url=f'file://{published}', architecture=SMALL)
    monkeypatch.setattr(hub, '_pretrained_cfg', lambda name: cfg)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    assert cli.main(['verify', SMALL]) == 0
    assert 'is what was published, says the name in its address' in capsys.readouterr().out
    (cached,) = (tmp_path / 'torch').rglob('*.pth')
    with cached.open('r+b') as file:
        file.seek(-1000, 2)
        file.write(b'\xff\x00')
    assert cli.main(['verify', SMALL]) == 1
    assert str(cached) in capsys.readouterr().err
    with pytest.raises(OSError, match='sha256'):
        timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=dict(url=f'file://{published}'))


@pytest.mark.parametrize('new', ['', 'avg', 'token'])
def test_another_pooling_is_saved(new, tmp_path):
    for old in ('', 'avg', 'token'):
        model = randomise_(create(global_pool=old, num_classes=3))
        model.reset_classifier(4, new)
        randomise_(model)
        loaded = timm.create_model(f'local-dir:{timm_vitres.save(model, tmp_path / old)}', pretrained=True).eval()
        assert loaded.cfg == model.cfg
        x = torch.randn(1, 3, 96, 64)
        with torch.inference_mode():
            expected, actual = model(x), loaded(x)
        for one, other in zip(*((expected, actual) if new == '' else ([expected], [actual]))):
            assert torch.equal(one, other)
