"""Maps and tokens: the pyramid, forward_intermediates, and all ways to them, which agree."""

import copy
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise_, relative_difference
from timm.models._features import FeatureGetterNet

from timm_vitres.models.embedding import ResNetEmbed

REDUCTIONS = {
    'vitresnet_tiny': [2, 4, 8, 16, 32],
    'vitresnet_small': [2, 4, 8, 16, 32],
    'vitresnet_base': [2, 4, 8, 16],
    'vitresnet_large': [2, 4, 8, 16, 32],
    'vitresnet_nano': [2, 4, 8],
    'vitresnet': [2, 4, 8, 16, 32],
    'test_vitresnet': [2, 4, 8, 16, 32],
}
SMALL = ['vitresnet_tiny', 'vitresnet_small', 'vitresnet_nano', 'vitresnet', 'test_vitresnet']
SIZES = [(224, 224), (384, 384), (224, 320), (240, 240), (225, 225), (250, 230), (97, 161), (64, 64), (33, 470)]
ODD = (97, 161)


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one.shape == other.shape
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize('name, reductions', REDUCTIONS.items())
def test_the_pyramid_doubles(name, reductions):
    model = timm.create_model(name, features_only=True, device='meta')
    assert model.feature_info.reduction() == reductions
    maps = model(torch.empty(1, 3, 224, 224, device='meta'))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, 224 // r, 224 // r) for channels, r in zip(model.feature_info.channels(), reductions)
    ]


@pytest.mark.parametrize(
    'name', ['vitresnet_tiny', 'vitresnet_small', pytest.param('vitresnet_base', marks=pytest.mark.slow)]
)
def test_every_size(name):
    """Logits are finite, maps are within a pixel of size / stride, and an image does not see its neighbour."""
    model = randomise_(timm.create_model(name, num_classes=10))
    levels = list(range(len(REDUCTIONS[name])))
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width)
        with torch.inference_mode():
            logits = model(x)
            maps = model.forward_intermediates(x, indices=levels, intermediates_only=True)
            single = torch.cat([model(image[None]) for image in x])
        assert torch.isfinite(logits).all()
        assert relative_difference(logits, single) < 1e-4, (height, width)
        for level, reduction in zip(maps, REDUCTIONS[name]):
            assert torch.isfinite(level).all()
            assert abs(level.shape[2] - height / reduction) < 1 and abs(level.shape[3] - width / reduction) < 1


@pytest.mark.parametrize('name', SMALL)
def test_feature_info_lists_what_forward_intermediates_gives(name):
    model = randomise_(timm.create_model(name))
    x = torch.randn(1, 3, *ODD)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        assert torch.equal(features, model.forward_features(x))
    info = model.feature_info
    assert len(maps) == len(info) == len(REDUCTIONS[name]) + len(model.blocks) - 1
    assert len({level['module'] for level in info}) == len(info)
    for level, entry in zip(maps, info):
        assert model.get_submodule(entry['module']) is not None
        assert level.shape[1] == entry['num_chs']
        assert level.shape[-2:] == tuple(math.ceil(side / entry['reduction']) for side in ODD)


@pytest.mark.parametrize('name', SMALL)
def test_all_ways_to_the_pyramid_agree(name):
    getter = timm.create_model(name, features_only=True)
    model = randomise_(getter.model)
    getter.eval()
    x = torch.randn(2, 3, *ODD)
    hook = timm.create_model(name, features_only=True, feature_cls='hook').eval()
    hook.body.load_state_dict(model.state_dict(), strict=False)
    with torch.inference_mode():
        maps = getter(x)
        same(torch.jit.script(getter)(x), maps)
        reference = timm.create_model(name).eval()
        reference.load_state_dict(model.state_dict(), strict=False)
        levels = list(range(len(maps)))
        same(reference.forward_intermediates(x, indices=levels, intermediates_only=True), maps)
        for hooked, level, reduction in zip(hook(x), maps, REDUCTIONS[name], strict=True):
            if hooked.ndim == 3:  # tokens
                grid = reference.patch_embed.dynamic_feat_size(ODD)
                hooked = hooked[:, reference.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
                factor = round(REDUCTIONS[name][-1] / reduction)
                hooked = F.interpolate(hooked, scale_factor=factor, mode='bilinear') if factor > 1 else hooked
            assert relative_difference(hooked[..., : level.shape[2], : level.shape[3]], level) < 1e-6


class _Mean(torch.nn.Module):
    """A program that loops over what its backbone returns."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(len(x))
        for level in self.backbone(x):
            y = y + level.mean((1, 2, 3))
        return y


@pytest.mark.parametrize('name', SMALL)
def test_a_program_around_a_pyramid_can_be_scripted(name):
    net = _Mean(timm.create_model(name, features_only=True)).eval()
    randomise_(net.backbone.model)
    with torch.inference_mode():
        for size in (ODD, (64, 96)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(torch.jit.script(net)(x), net(x))


@pytest.mark.parametrize('name', SMALL)
def test_a_model_in_evaluation_stays_so_when_it_is_pruned(name):
    for indices in ([0], [1], 1):
        model = timm.create_model(name).eval()
        model.prune_intermediate_layers(indices)
        assert not any(module.training for module in model.modules())
        model = timm.create_model(name)
        model.prune_intermediate_layers(indices)
        assert all(module.training for module in model.modules())


def test_indices_that_run_past_the_pyramid_are_told_of(caplog):
    """Programs that count levels as a ResNet has them would take an early block for the deepest map."""
    with caplog.at_level('WARNING'):
        for indices in (None, 4, [0, 1, 2, 3], [-4, -1], [4, 5]):
            timm.create_model('vitresnet_base', features_only=True, out_indices=indices, device='meta')
        assert caplog.text == ''
        timm.create_model('vitresnet_base', features_only=True, out_indices=[1, 3, 4], device='meta')
    assert 'out_indices: got [1, 3, 4], but the pyramid ends with 3' in caplog.text
    assert '3 blocks.11, 4 blocks.1, ' in caplog.text
    message = r'out_indices: got \[.*\], but the pyramid has 4 levels, 0 to 3; .*encoder_depth=4'
    vit = timm.create_model('vitresnet', backbone='', depth=12, features_only=True, out_indices=[1, 4], device='meta')
    assert vit.feature_info.out_indices == (1, 4)
    every = range(len(timm.create_model('vitresnet_base', device='meta').feature_info))
    timm.create_model('vitresnet_base', features_only=True, out_indices=every, device='meta')
    timm.create_model('vitresnet_base', features_only=True, out_indices=[4], device='meta')
    assert 'out_indices: got [4], but the pyramid ends with 3' in caplog.text
    for indices in ((0, 1, 2, 3, 4), [1, 2, 3, 4], (2, 3, 4), range(6)):
        with pytest.raises(ValueError, match=message):
            timm.create_model('vitresnet_base', features_only=True, out_indices=indices, device='meta')


@pytest.mark.parametrize('name', SMALL)
def test_maps_of_tokens_are_the_callers_own(name):
    """As timm's: a caller may write into them before the backward, and view them as vectors."""
    model = timm.create_model(name).train()
    x = torch.randn(2, 3, *ODD)
    logits = model(x)
    maps = model.forward_intermediates(x, indices=len(model.blocks), intermediates_only=True)
    for y in maps:
        y.view(2, -1)
        y.mul_(0)
    (sum(y.sum() for y in maps) + logits.sum()).backward()
    for y in model.get_intermediate_layers(x, n=range(1), reshape=True):
        y.view(2, -1)


@pytest.mark.parametrize('name', ['vitresnet_small', 'vitresnet', 'vitresnet_nano', 'test_vitresnet'])
def test_the_pyramid_is_the_resnets_own(name):
    """Up to the tokens the levels are what timm's ResNet itself gives."""
    model = randomise_(timm.create_model(name))
    x = torch.randn(1, 3, *ODD)
    with torch.inference_mode():
        own = model.patch_embed.backbone.forward_intermediates(x, intermediates_only=True)
        levels = len(REDUCTIONS[name]) - 1
        same(model.forward_intermediates(x, indices=list(range(levels)), intermediates_only=True), own[:levels])


@pytest.mark.parametrize(
    'backbone, stage', [('resnet18', 0), ('resnet26t', 2), ('resnetv2_18', 4), ('resnetblur18', 1)]
)
@pytest.mark.parametrize('patch_size', [1, 4])
def test_levels_of_any_backbone(backbone, stage, patch_size):
    """The last level is the map that the tokens are made of, at a patch of 4 with one level between from a block."""
    options = dict(backbone=backbone, stage=stage, patch_size=patch_size)
    model = timm.create_model('vitresnet', **options, depth=4, embed_dim=48)
    embed = randomise_(model).patch_embed
    x = torch.randn(1, 3, 144, 176)
    with torch.inference_mode():
        levels = embed.forward_levels(x, embed.num_levels)
        assert torch.equal(levels[-1], embed.backbone(x))
        assert [level.shape[1:] for level in levels] == [
            (info['num_chs'], math.ceil(144 / info['reduction']), math.ceil(176 / info['reduction']))
            for info in embed.backbone.feature_info
        ]
        maps = model.forward_intermediates(x, intermediates_only=True)
    reductions = [info['reduction'] for info in model.feature_info[: model.num_pyramid]]
    assert reductions == [2 ** (i + 1) for i in range(len(reductions))]
    assert len(reductions) == embed.num_levels + (2 if patch_size == 4 else 0)
    same(maps[: len(model.level_indices)], levels[: len(model.level_indices)])


def test_tiny_fills_levels_from_blocks():
    """Strides 8 and 16 are the tokens after blocks 4 and 8, enlarged by 4 and by 2."""
    model = randomise_(timm.create_model('vitresnet_tiny'))
    x = torch.randn(1, 3, 128, 192)
    with torch.inference_mode():
        _, maps = model.forward_intermediates(x)
        tokens = model.get_intermediate_layers(x, n=[3, 7, 11], reshape=True)
    for level, source, factor in zip(maps[2:5], tokens, (4, 2, 1), strict=True):
        assert relative_difference(level, F.interpolate(source, scale_factor=factor, mode='bilinear')) < 1e-6
    assert relative_difference(F.interpolate(maps[3], (4, 6)), maps[4]) > 1e-2


@pytest.mark.parametrize('name', ['vitresnet_tiny', 'vitresnet_small', 'test_vitresnet'])
@pytest.mark.parametrize('norm', [False, True])
def test_tokens_of_every_block(name, norm):
    model = randomise_(timm.create_model(name, reg_tokens=2))
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    x = torch.randn(2, 3, *ODD)
    first = model.num_pyramid
    with torch.inference_mode():
        model(x)
        expected = [model.norm(output) if norm else output for output in outputs]
        options = dict(norm=norm, output_fmt='NLC', return_prefix_tokens=True, intermediates_only=True)
        # the last block ends the pyramid; after it come the second block and all further ones, so that -1 is the last
        blocks = [*range(first, len(model.feature_info)), first - 1, -1]
        got = model.forward_intermediates(x, indices=blocks, **options)
        got = [torch.cat([prefix, tokens], dim=1) for tokens, prefix in got]
        same(got, [*expected[1:], expected[-1], expected[-1]])
        (last,) = model.forward_intermediates(x, indices=1, **options)
        same(last, [expected[-1][:, 3:], expected[-1][:, :3]])
        # DINO's interface counts blocks
        every = list(range(len(expected)))
        same(model.get_intermediate_layers(x, n=every, norm=norm), [output[:, 3:] for output in expected])
        same(model.get_intermediate_layers(x, norm=norm), [expected[-1][:, 3:]])
        same(model.get_intermediate_layers(x, n=(1, 0, 1), norm=norm), [output[:, 3:] for output in expected[:2]])
        ((layer, prefix),) = model.get_intermediate_layers(x, reshape=True, return_prefix_tokens=True, norm=norm)
        same([layer.flatten(2).transpose(1, 2), prefix], last)


@pytest.mark.parametrize('name', ['vitresnet_tiny', 'test_vitresnet'])
# torch 2.6 does not trace what timm's attention gives the fused one
@pytest.mark.parametrize('feature_cls', ['hook', pytest.param('fx', marks=pytest.mark.recent)])
def test_modules_of_feature_info_return_the_tokens(name, feature_cls):
    """Each entry alone, as timm's feature classes take it from the module that the entry names."""
    model = randomise_(timm.create_model(name))
    x = torch.randn(1, 3, *ODD)
    with torch.inference_mode():
        tokens = model.forward_intermediates(x, output_fmt='NLC', return_prefix_tokens=True, intermediates_only=True)
        for i in range(model.num_pyramid - 1, len(tokens)):
            entry = model.feature_info[i]
            if feature_cls == 'fx' and 'hook_type' in entry:
                continue  # a graph has no input of a module, only its output
            net = timm.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=(i,)).eval()
            inside = net.body if feature_cls == 'hook' else net.graph_module
            inside.load_state_dict({key: model.state_dict()[key] for key in inside.state_dict()})
            same(net(x), [torch.cat([tokens[i][1], tokens[i][0]], dim=1)])


def features_before_norm(model, x):
    """Return what the blocks return, by a hook."""
    outputs = []
    handle = model.norm.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    model.forward_features(x)
    handle.remove()
    return outputs[0]


def test_forms_of_forward_intermediates():
    model = randomise_(timm.create_model('vitresnet_small'))
    x = torch.randn(1, 3, *ODD)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        flat = model.forward_intermediates(x, output_fmt='NLC', intermediates_only=True)
        same(flat, [level.flatten(2).transpose(1, 2) for level in maps])
        same(model.forward_intermediates(x, indices=3, intermediates_only=True), maps[-3:])
        # in the order asked for
        same(model.forward_intermediates(x, indices=[7, 0, 4], intermediates_only=True), [maps[7], maps[0], maps[4]])
        pairs = model.forward_intermediates(x, indices=[1, 4], return_prefix_tokens=True, intermediates_only=True)
        # the ResNet's maps have none: their means stand in
        same([prefix for _, prefix in pairs], [maps[1].mean((2, 3))[:, None], features_before_norm(model, x)[:, :1]])
        result = model.forward_intermediates(x, indices=[1, 4], return_prefix_tokens=True, output_dict=True)
        same(result['image_intermediates'], [maps[1], maps[4]])
        same(result['image_intermediates_prefix'], [prefix for _, prefix in pairs])
        assert torch.equal(result['image_features'], features)
    with pytest.raises(ValueError, match='indices: got'):
        model.forward_intermediates(x, indices=[16])
    with pytest.raises(ValueError, match='output_fmt'):
        model.forward_intermediates(x, output_fmt='NHWC')


@pytest.mark.parametrize('name', ['vitresnet_tiny', 'vitresnet_small', 'vitresnet_nano'])
def test_stopping_early_runs_no_more_than_it_must(name):
    model = randomise_(timm.create_model(name))
    x = torch.randn(1, 3, 64, 96)
    ran = []
    for key, module in model.named_modules():
        if (key.startswith('blocks.') and key.count('.') == 1) or key == 'patch_embed.proj':
            module.register_forward_hook(lambda *args, key=key: ran.append(key))
    with torch.inference_mode():
        _, maps = model.forward_intermediates(x)
        for i, level in enumerate(maps):
            ran.clear()
            features, selected = model.forward_intermediates(x, indices=[i], stop_early=True)
            same(selected, [level])
            assert features.ndim == 3
            resnet = i < len(model.level_indices)
            last = -1 if resnet else model.block_indices[i - len(model.level_indices)]
            assert [key for key in ran if key.startswith('blocks')] == [f'blocks.{block}' for block in range(last + 1)]
            assert ('patch_embed.proj' in ran) != resnet


@pytest.mark.parametrize(
    'name',
    ['vitresnet_tiny', pytest.param('vitresnet_small', marks=pytest.mark.slow), 'vitresnet_nano', 'test_vitresnet'],
)
def test_pruning_keeps_what_the_maps_need(name):
    """Every map alone: equal to the whole model's, by a model in which every weight has a gradient."""
    model = randomise_(timm.create_model(name))
    x = torch.randn(1, 3, *ODD)
    with torch.inference_mode():
        maps = model.forward_intermediates(x, intermediates_only=True)
    for i, level in enumerate(maps):
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([i - len(maps)], prune_norm=True) == [i]
        (selected,) = pruned.forward_intermediates(x, indices=[i], intermediates_only=True)
        same([selected], [level])
        left = pruned.forward_intermediates(x, intermediates_only=True)
        assert left and torch.equal(left[-1], pruned.forward_intermediates(x, indices=1, intermediates_only=True)[0])
        (selected.sum() + pruned(x).sum()).backward()
        assert not [key for key, parameter in pruned.named_parameters() if parameter.grad is None]
    # a shallow level needs no more than the ResNet up to it
    assert sum(p.numel() for p in timm.create_model(name, features_only=True, out_indices=(0,)).parameters()) < 3e4


def test_features_of_a_pruned_model_end_at_the_map():
    model = randomise_(timm.create_model('vitresnet_small'))
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        level = model.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
        model.prune_intermediate_layers([2])
        assert torch.equal(model.forward_features(x), level.flatten(2).transpose(1, 2))
        model.reset_classifier(5, 'avg')
        assert model(x).shape == (1, 5)


def test_in_chans_and_depth_zero_have_a_pyramid():
    model = timm.create_model('vitresnet', backbone='resnet18', depth=0, features_only=True, in_chans=4).eval()
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    resnet = timm.create_model('resnet18', in_chans=4, features_only=True).eval()
    randomise_(resnet)
    model.model.patch_embed.backbone.load_state_dict(resnet.state_dict())
    x = torch.randn(1, 4, *ODD)
    with torch.inference_mode():
        same(model(x), resnet(x))


def test_a_vit_alone_offers_its_tokens():
    model = timm.create_model('vitresnet', backbone='', depth=3, features_only=True)
    assert model.feature_info.reduction() == [16] and model.feature_info.module_name() == ['blocks.2']
    assert model(torch.randn(1, 3, 64, 80))[0].shape == (1, 384, 4, 5)


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.parametrize('name', ['vitresnet_small', 'vitresnet', 'test_vitresnet'])
def test_output_stride_keeps_the_maps_large(name, output_stride):
    """The ResNet is timm's own with dilation; the weights are the same."""
    plain = randomise_(timm.create_model(name))
    model = timm.create_model(name, output_stride=output_stride).eval()
    backbone = model.patch_embed.backbone
    backbone.load_state_dict(plain.patch_embed.backbone.state_dict())
    if name == 'vitresnet':
        timms = timm.create_model('resnet26d', output_stride=output_stride, features_only=True).eval()
        timms.load_state_dict(backbone.state_dict(), strict=False)
    else:
        measures = dict(layers=(2, 2, 2, 2)) if name == 'vitresnet_small' else dict(layers=(1, 1, 1, 1))
        measures.update({} if name == 'vitresnet_small' else dict(channels=(128, 128, 128, 256), stem_chs=32))
        timms = timm.models.ResNetV2(
            **measures,
            num_classes=0,
            preact=False,
            stem_type='same',
            conv_layer=partial(timm.layers.StdConv2dSame, eps=1e-8),
            output_stride=output_stride,
        ).eval()
        timms.load_state_dict(backbone.state_dict())
        timms = FeatureGetterNet(timms, out_indices=(0, 1, 2, 3, 4), prune=False)
    x = torch.randn(1, 3, 64, 96)
    reductions = [2, *(min(stride, output_stride) for stride in (4, 8, 16, 32))]
    assert [info['reduction'] for info in model.feature_info[:5]] == reductions
    with torch.inference_mode():
        maps = model.forward_intermediates(x, indices=[0, 1, 2, 3, 4], intermediates_only=True)
        assert [tuple(m.shape[-2:]) for m in maps] == [(64 // r, 96 // r) for r in reductions]
        same(maps[:4], timms(x)[:4])
        assert relative_difference(model.patch_embed.backbone(x), timms(x)[4]) < 1e-6


@pytest.mark.parametrize(
    'name, kwargs, output_stride',
    [
        ('vitresnet_tiny', {}, 16),
        ('vitresnet_tiny', {}, 8),
        ('vitresnet', dict(stage=3, patch_size=8), 16),
        ('vitresnet', dict(backbone=''), 8),
    ],
)
def test_impossible_output_strides_are_named(name, kwargs, output_stride):
    with pytest.raises(ValueError, match=f'output_stride: got {output_stride}, but the tokens'):
        timm.create_model(name, output_stride=output_stride, device='meta', **kwargs)


@pytest.mark.parametrize('name, output_stride', [('vitresnet_tiny', 32), ('vitresnet_base', 16), ('vitresnet_nano', 8)])
def test_an_output_stride_that_is_kept_anyway_changes_nothing(name, output_stride):
    plain = timm.create_model(name, device='meta')
    model = timm.create_model(name, device='meta', output_stride=output_stride)
    assert model.feature_info == plain.feature_info


def test_gradient_checkpointing_of_features():
    """As in detection: gradients through the pyramid are the same with and without it."""
    x = torch.randn(2, 3, 64, 96)
    for name in ('test_vitresnet', 'vitresnet_nano', 'test_vitresnet_dual', 'test_vitresnet_mix'):
        gradients = []
        for enable in (False, True):
            torch.manual_seed(0)
            model = timm.create_model(name, features_only=True).train()
            model.model.set_grad_checkpointing(enable)
            calls = []
            convs = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
            convs[len(convs) // 2].register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
            sum(level.square().mean() for level in model(x)).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
            assert len(calls) == 1 + enable, name
        same(*gradients)


def test_masks_reach_every_block():
    model = randomise_(timm.create_model('test_vitresnet', global_pool='avg', num_classes=2)).eval()
    x = torch.randn(2, 3, 64, 96)
    plain = model.forward_intermediates(x, intermediates_only=True)[-1]
    count = model.num_prefix_tokens + plain.shape[-2] * plain.shape[-1]
    causal = model.forward_intermediates(x, intermediates_only=True, is_causal=True)[-1]
    masked = model.forward_intermediates(
        x, intermediates_only=True, attn_mask=torch.ones(count, count, dtype=torch.bool).tril()
    )[-1]
    torch.testing.assert_close(causal, masked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(causal, plain, atol=1e-3)


def test_patch_drop_leaves_no_map():
    model = timm.create_model('test_vitresnet', patch_drop_rate=0.5).train()
    x = torch.randn(1, 3, 128, 128)
    with pytest.raises(ValueError, match='patch_drop_rate'):
        model.forward_intermediates(x)
    assert model.forward_intermediates(x, output_fmt='NLC', intermediates_only=True)[-1].shape[1] == 8


def test_an_embedding_of_no_token_is_named():
    model = timm.create_model('test_vitresnet', features_only=True)
    assert isinstance(model.model.patch_embed, ResNetEmbed)
    with pytest.raises(ValueError, match='smaller than one token'):
        model(torch.randn(1, 3, 31, 64))


def test_a_pruned_model_takes_another_size():
    model = timm.create_model('vitresnet_tiny', features_only=True, out_indices=(1, 3)).eval()
    randomise_(model.model)
    x = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        expected = model(x)
        model.model.set_input_size(img_size=(96, 128))
        for one, other in zip(model(x), expected, strict=True):
            assert relative_difference(one, other) < 1e-5


def test_of_a_pruned_model_all_maps_are_those_that_are_left():
    model = randomise_(timm.create_model('vitresnet', backbone='resnet10t', layers=(1, 1), channels=(32, 32), depth=4))
    x = torch.randn(1, 3, 64, 64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    model.prune_intermediate_layers([3])  # the tokens of the second block; the last one's are the third map
    same(model.forward_intermediates(x, intermediates_only=True), [maps[i] for i in (0, 1, 3)])
    with pytest.raises(ValueError, match=r'^indices: got 2, but the model was pruned, and has \[0, 1, 3\] left'):
        model.forward_intermediates(x, indices=[1, 2])
