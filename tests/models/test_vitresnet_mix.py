"""The interleaved family: what timm's BoTNets compute, at every size, and what timm's users expect of a model."""

import itertools
import math
import re

import pytest
import timm
import torch
from conftest import randomise_, relative_difference
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import reparameterize_model
from torch import nn

import timm_vitres
from timm_vitres import VitResNetMixCfg
from timm_vitres.models.attention import RelPosAttn
from timm_vitres.models.interleaving import attn_sizes

SMALL = 'test_vitresnet_mix'
BOTNETS = {
    'vitresnet_mix_bot26t': 'botnet26t_256',
    'vitresnet_mix_eca_bot26ts': 'eca_botnext26ts_256',
    'vitresnet_mix_se_bot33ts': 'sebotnet33ts_256',
    'vitresnet_mix_bot50ts': 'botnet50ts_256',
}
PUBLISHED = ['vitresnet_mix_bot26t.c1_in1k', 'vitresnet_mix_eca_bot26ts.c1_in1k', 'vitresnet_mix_se_bot33ts.a1h_in1k']
ANY_SIZE = [(256, 256), (224, 224), (225, 225), (97, 161), (250, 230), (33, 470), (1, 1)]
ODD = (97, 161)


def settle_(model, size=64):
    """Randomise a model, and give its BatchNorms the statistics of images, so that images make a difference."""
    generator = torch.Generator().manual_seed(1)
    randomise_(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches
            module.reset_running_stats()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, model.in_chans, size, size, generator=generator))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
            module.num_batches_tracked.zero_()
    return model.eval()


def create(name=SMALL, **kwargs):
    torch.manual_seed(0)
    return settle_(timm.create_model(name, **{'num_classes': 5, **kwargs}))


@pytest.mark.parametrize(
    'name', [*list(BOTNETS)[:2], *(pytest.param(n, marks=pytest.mark.slow) for n in list(BOTNETS)[2:])]
)
def test_outputs_are_those_of_timms_botnets(name):
    """Logits, maps, and the difference that the image makes, with weights that go either way."""
    theirs = settle_(timm.create_model(BOTNETS[name], img_size=256), 256)
    ours = timm.create_model(name).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert [{**level, 'module': ''} for level in ours.feature_info] == [
        {**level, 'module': ''} for level in theirs.feature_info
    ]
    x = torch.randn(2, 3, 256, 256)
    with torch.inference_mode():
        expected, got = theirs(x), ours(x)
        assert relative_difference(got, expected) < 1e-6
        assert relative_difference(got[0] - got[1], expected[0] - expected[1]) < 2e-6
        assert relative_difference(got[0], got[1]) > 1e-2
        for one, other in zip(
            *(model.forward_intermediates(x, intermediates_only=True) for model in (ours, theirs)), strict=True
        ):
            assert relative_difference(one, other) < 1e-6
        theirs.load_state_dict(randomise_(ours).state_dict())
        assert relative_difference(ours(x), theirs(x)) < 1e-6


def test_the_generic_model_is_botnet26t_by_default():
    models = [timm.create_model(name, device='meta') for name in ('vitresnet_mix', 'vitresnet_mix_bot26t')]
    assert models[0].cfg == models[1].cfg == VitResNetMixCfg()


@pytest.mark.parametrize(
    'name', [SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in ('vitresnet_mix_nano', *BOTNETS))]
)
def test_every_size(name):
    """Logits are finite, maps are those of the strides, rounded up, and an image does not see its neighbour."""
    model = create(name)
    for height, width in [*ANY_SIZE, *([(384, 384)] if name in BOTNETS else [])]:
        x = torch.randn(2, 3, height, width)
        with torch.inference_mode():
            logits = model(x)
            last, maps = model.forward_intermediates(x)
            single = torch.cat([model(image[None]) for image in x])
        assert torch.isfinite(logits).all()
        assert relative_difference(logits, single) < 1e-5, (height, width)
        assert torch.equal(last, maps[-1])
        for level, info in zip(maps, model.feature_info, strict=True):
            stride = info['reduction']
            assert level.shape == (2, info['num_chs'], math.ceil(height / stride), math.ceil(width / stride))
        strides = [info['reduction'] for info in model.feature_info]
        assert all(after == 2 * before for before, after in itertools.pairwise(strides))


def test_a_larger_table_is_the_one_that_is_resampled():
    """A model made for another size, with the same checkpoint, computes there what the first one does."""
    model = create(img_size=96)
    larger = timm.create_model(SMALL, num_classes=5, img_size=(128, 192)).eval()
    assert larger.stages[1][1].self_attn.pos_embed.width_rel.shape == (2 * 192 // 8 - 1, 12)
    larger.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 128, 192)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(larger(x), expected, rtol=1e-5, atol=1e-6)
        model.set_input_size((128, 192))
        assert torch.equal(model(x), larger(x))
    assert model.state_dict().keys() == larger.state_dict().keys()
    assert all(torch.equal(value, larger.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('size', [(7, 11), (8, 8), (1, 5), (16, 3)])
@pytest.mark.parametrize('stride', [1, 2])
def test_attention_is_as_written_in_the_paper(size, stride):
    """Pixel by pixel: q k / sqrt(d) + q r_height + q r_width, at sizes other than the tables', fused or not."""
    layer = randomise_(RelPosAttn(24, feat_size=size, num_heads=3, dim_head=5, stride=stride))
    x = torch.randn(2, 24, *size)
    height, width = size
    q, k, v = layer.qkv(x).split([15, 15, 24], dim=1)
    q, k, v = (part.reshape(2, 3, -1, height * width).transpose(2, 3) for part in (q, k, v))
    logits = torch.empty(2, 3, height * width, height * width)
    for i in range(height * width):
        for j in range(height * width):
            rows = layer.pos_embed.height_rel[j // width - i // width + height - 1]
            columns = layer.pos_embed.width_rel[j % width - i % width + width - 1]
            key = k[:, :, j] * 5**-0.5 + rows + columns
            logits[:, :, i, j] = (q[:, :, i] * key).sum(-1)
    expected = (logits.softmax(-1) @ v).transpose(2, 3).reshape(2, 24, height, width)
    if stride == 2:
        expected = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)(expected)
    assert height * width < layer.fused_from
    layer.fused_from = 0
    for fused in (True, False):
        layer.fused_attn = fused
        assert relative_difference(layer(x), expected) < 1e-6
    layer.fused_attn = True
    layer(x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    layer.fused_attn = False
    layer(x).square().sum().backward()
    for one, other in zip(gradients, [parameter.grad for parameter in layer.parameters()], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # some are 0: one row has no other to differ from


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda d: d.pop('stages.2.0.self_attn.qkv.weight'), 'missing keys: stages.2.0.self_attn.qkv.weight;'),
        (lambda d: d.pop('head.fc.bias'), 'missing keys: head.fc.bias;'),
        (lambda d: d.update({'stages.9.extra': torch.zeros(1)}), 'unexpected keys: stages.9.extra;'),
        (
            lambda d: d.update({'stages.2.0.self_attn.pos_embed.width_rel': torch.zeros(8, 16)}),
            'stages.2.0.self_attn.pos_embed.width_rel: the checkpoint has shape (8, 16), expected (2 * side - 1, 16)',
        ),
        (
            lambda d: d.update({'stages.2.0.self_attn.pos_embed.width_rel': torch.zeros(9, 12)}),
            'wrong shapes: stages.2.0.self_attn.pos_embed.width_rel (23, 12) for (23, 16)',
        ),
    ],
)
def test_wrong_checkpoints_are_errors(change, message, tmp_path):
    state_dict = timm.create_model(SMALL).state_dict()
    change(state_dict)
    torch.save(state_dict, tmp_path / 'checkpoint.pth')
    with pytest.raises(RuntimeError, match=re.escape(message)):
        timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'checkpoint.pth')))


@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vitresnet_dual'])
def test_the_other_families_are_errors(name, tmp_path):
    torch.save(timm.create_model(name).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(RuntimeError, match='not one of test_vitresnet_mix'):
        timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'other.pth')))


@pytest.mark.parametrize('img_size', [96, (64, 160)])
def test_a_botnets_checkpoint_is_converted_by_its_name(img_size, tmp_path):
    """Size and classes are those of its tensors; the result loads anywhere."""
    model = create('vitresnet_mix', img_size=img_size, num_classes=3, channels=(32, 32, 64, 64), stem_chs=16)
    torch.save(dict(state_dict=model.state_dict(), arch='vitresnet_mix', model_kwargs={}), tmp_path / 'a.pth.tar')
    widths = dict(channels=(32, 32, 64, 64), stem_chs=16)
    folder = timm_vitres.convert(
        tmp_path / 'a.pth.tar', tmp_path / 'converted', model='botnet26t_256', model_kwargs=widths
    )
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert type(loaded) is type(model) and loaded.num_classes == 3
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert timm.data.resolve_model_data_config(loaded)['input_size'] == (3, *size)
    x = torch.randn(1, 3, *ODD)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_tables_of_no_one_size_are_named():
    model = timm.create_model(SMALL, img_size=96)
    state_dict = model.state_dict()
    assert model.table_size(state_dict) == 96
    assert model.table_size(state_dict, [None, 64, (94, 95)]) == (94, 95)
    assert timm.create_model(SMALL, img_size=(64, 160)).table_size(state_dict, [224]) == 96
    state_dict['stages.3.1.self_attn.pos_embed.width_rel'] = torch.zeros(31, 24)
    with pytest.raises(ValueError, match=r'img_size: not given, and the relative positions .* 12x12, 12x12, 6x6, 3x16'):
        model.table_size(state_dict, [96])
    del state_dict['stages.3.1.self_attn.pos_embed.width_rel']
    assert model.table_size(state_dict, [96]) is None  # the comparison of keys says what is missing


def test_published_weights_are_named_with_their_checksum():
    ours = ['vitresnet_mix_nano.fmnist']  # part of the package
    assert timm.list_models('*vitresnet_mix*', pretrained=True) == sorted([*PUBLISHED, *ours])
    for name in PUBLISHED:
        theirs = timm.get_pretrained_cfg(BOTNETS[name.split('.')[0]])
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.url == theirs.url and re.search(r'-[0-9a-f]{8}\.pth$', cfg.url)
        assert cfg.hf_hub_id == f'timm/{theirs.architecture}.{theirs.tag}' and cfg.tag == theirs.tag
        for fact in ('crop_pct', 'interpolation', 'mean', 'std', 'input_size', 'first_conv', 'classifier', 'license'):
            assert getattr(cfg, fact) == getattr(theirs, fact), fact
        assert not cfg.fixed_input_size


def test_nano_without_a_tag_is_for_colours():
    assert timm.get_pretrained_cfg('vitresnet_mix_nano').input_size == (3, 64, 64)
    assert timm.create_model('vitresnet_mix_nano', device='meta').stem.conv.in_channels == 3
    with pytest.raises(RuntimeError, match=r'vitresnet_mix_nano\.fmnist'):
        timm.create_model('vitresnet_mix_nano', pretrained=True)


def test_a_new_model_is_initialised_as_timms():
    torch.manual_seed(0)
    ours = timm.create_model('vitresnet_mix_se_bot33ts')
    theirs = timm.create_model('sebotnet33ts_256', img_size=256)
    for (key, value), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if other.unique().numel() == 1:
            assert torch.equal(value, other), key
        else:
            assert value.std().item() == pytest.approx(other.std().item(), rel=max(0.03, 8 / value.numel() ** 0.5)), key


def test_all_ways_to_the_pyramid_agree():
    getter = timm.create_model(SMALL, features_only=True)
    model = settle_(getter.model)
    assert getter.feature_info.reduction() == [2, 4, 8, 16, 32]
    x = torch.randn(2, 3, *ODD)
    hook = timm.create_model(SMALL, features_only=True, feature_cls='hook').eval()
    hook.body.load_state_dict(model.state_dict(), strict=False)
    nets = [timm.create_model(SMALL, features_only=True, feature_cls=feature_cls) for feature_cls in ('list', 'dict')]
    for net in nets:  # their names have _ in place of the first dots
        by_end = {key.replace('.', '_'): value for key, value in model.state_dict().items()}
        net.load_state_dict({key: by_end[key.replace('.', '_')] for key in net.state_dict()})
    reference = timm.create_model(SMALL).eval()
    nn.Module.load_state_dict(reference, model.state_dict(), strict=False)
    with torch.inference_mode():
        maps = getter.eval()(x)
        for others in (
            torch.jit.script(getter)(x),
            hook(x),
            nets[0].eval()(x),
            list(nets[1].eval()(x).values()),
            reference.forward_intermediates(x, intermediates_only=True),
            reference.forward_intermediates(x, indices=[0, 1, 2, 3, 4], stop_early=True)[1],
        ):
            for one, other in zip(others, maps, strict=True):
                assert torch.equal(one, other)
        assert torch.equal(reference.forward_features(x), maps[-1])
        (tokens,) = reference.forward_intermediates(x, indices=[2], output_fmt='NLC', intermediates_only=True)
        assert torch.equal(tokens, maps[2].flatten(2).transpose(1, 2))
        last, first = reference.forward_intermediates(x, indices=[3, 0], intermediates_only=True)
        assert torch.equal(last, maps[3]) and torch.equal(first, maps[0])
        early, _ = reference.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(early, maps[1])
    with pytest.raises(ValueError, match='output_fmt'):
        reference.forward_intermediates(x, output_fmt='NHWC')
    with pytest.raises(ValueError, match='indices: got 99'):
        reference.forward_intermediates(x, 99)


@pytest.mark.parametrize('level, stages', [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)])
@pytest.mark.parametrize('kwargs', [{}, dict(stem_pool='')])
def test_pruning(level, stages, kwargs):
    model = create(**kwargs)
    x = torch.randn(1, 3, *ODD)
    with torch.inference_mode():
        expected = model.forward_intermediates(x, indices=[level], intermediates_only=True)
        assert model.prune_intermediate_layers([level]) == [level]
        assert len(model.stages) == stages and model.num_features == expected[0].shape[1]
        got = model.forward_intermediates(x, indices=[level], intermediates_only=True)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(model(x), expected[0])  # and nothing comes after it
    kept = create(**kwargs)
    kept.prune_intermediate_layers([0], prune_head=False)
    assert torch.equal(kept(x), create(**kwargs)(x))


@pytest.mark.parametrize('level, attentions', [(1, 0), (3, 2), (4, 1)])
def test_a_pruned_model_takes_another_size(level, attentions):
    model, x = create(), torch.randn(1, 3, 160, 128)
    model.prune_intermediate_layers([level])
    whole = create()
    assert len(model.explained_parts().attentions) == attentions
    for one in (model, whole):
        one.set_input_size((160, 128))
    with torch.inference_mode():
        assert torch.equal(model(x), whole.forward_intermediates(x, indices=[level], intermediates_only=True)[0])


def test_a_pyramid_may_be_asked_for_without_pooling():
    model = timm.create_model('test_vitresnet_mix', features_only=True, global_pool='')
    assert [level.shape[-1] for level in model(torch.randn(1, 3, 64, 64))] == [32, 16, 8, 4, 2]


@pytest.mark.parametrize('name', ['test_vitresnet_mix', 'vitresnet_mix_nano'])
def test_the_final_convolution_may_be_left_out(name):
    model = randomise_(timm.create_model(name)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        last, levels = model.forward_intermediates(x, exclude_final_conv=True)
        assert torch.equal(last, model.final_conv(levels[-1])) and torch.equal(last, model.forward_features(x))
        early, _ = model.forward_intermediates(x, indices=[0], stop_early=True, exclude_final_conv=True)
        assert torch.equal(early, model.forward_intermediates(x, indices=[0], stop_early=True)[0])
        assert torch.equal(model.forward_intermediates(x)[0], model.forward_features(x))


def test_timms_pooling_at_larger_images():
    """What validate.py --test-pool does: the head sees parts of the map that are as large as the training images."""
    model = randomise_(timm.create_model('vitresnet_mix_nano', num_classes=5)).eval()
    wrapped, used = timm.layers.apply_test_time_pool(model, dict(input_size=(3, 96, 96)))
    assert used and wrapped(torch.randn(2, 3, 96, 96)).shape == (2, 5)


STEMS = [
    (dict(), [2, 4, 8, 16, 32]),
    (dict(stem_stride=2), [2, 4, 8, 16]),
    (dict(stem_stride=1), [2, 4, 8]),
    (dict(stem_pool='', stem_type='deep', stem_stride=2), [2, 4, 8, 16]),
    (dict(stem_pool='', stem_type='quad'), [2, 4, 8, 16, 32]),
    (dict(stem_pool='avg', stem_type='7x7'), [2, 4, 8, 16, 32]),
    (dict(stem_pool='', stem_type=''), [2, 4, 8, 16]),
    (dict(stem_pool='', stem_type='', stem_stride=1), [2, 4, 8]),
    (dict(strides=(2, 2, 1, 1)), [2, 4, 8, 16]),
    (dict(strides=(1, 1, 1, 1)), [2, 4]),
    (dict(output_stride=16), [2, 4, 8, 16, 16]),
    (dict(output_stride=8, stem_stride=2), [2, 4, 8, 8]),
    (dict(attn_blocks=(0, 0, 0, 0)), [2, 4, 8, 16, 32]),
    (dict(attn_blocks=(1, (0, 1), 2, 1)), [2, 4, 8, 16, 32]),
    (dict(block='basic', downsample='avg', channel_attn='eca', qkv_bias=True, dim_head=8), [2, 4, 8, 16, 32]),
    (dict(layers=(1, 2), channels=(16, 24), strides=(1, 2), attn_blocks=(0, 1), num_heads=2), [2, 4, 8]),
]


@pytest.mark.parametrize('kwargs, reductions', STEMS)
def test_stems_strides_and_places(kwargs, reductions, tmp_path):
    """Maps have the strides that are told, at any size; folded, scripted, saved and loaded they are the same."""
    model = create(**kwargs)
    assert [info['reduction'] for info in model.feature_info] == reductions
    attends = [
        tuple(int(part) for part in name.split('.')[1:3])
        for name, module in model.named_modules()
        if isinstance(module, RelPosAttn)
    ]
    assert attends == list(attn_sizes(model.cfg, (1, 1)))
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, RelPosAttn):
            place = tuple(int(part) for part in name.split('.')[1:3])
            module.register_forward_hook(lambda m, args, y, place=place: seen.update({place: args[0].shape[2:]}))
    x = torch.randn(2, 3, 65, 98)
    with torch.inference_mode():
        logits = model(x)
        for level, info in zip(
            model.forward_intermediates(x, intermediates_only=True), model.feature_info, strict=True
        ):
            stride = info['reduction']
            assert level.shape == (2, info['num_chs'], math.ceil(65 / stride), math.ceil(98 / stride))
        assert {place: tuple(size) for place, size in seen.items()} == attn_sizes(model.cfg, (65, 98))
        loaded = timm.create_model(f'local-dir:{timm_vitres.save(model, tmp_path)}', pretrained=True).eval()
        assert loaded.cfg == model.cfg and torch.equal(loaded(x), logits)
        folded = timm_vitres.fold(loaded)
        assert relative_difference(folded(x), logits) < 1e-5
        assert relative_difference(torch.jit.script(folded)(x), logits) < 1e-5


def test_layer_decay_groups():
    model = timm.create_model(SMALL)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    blocks = [f'stages.{stage}.{block}.' for stage, depth in enumerate(model.cfg.layers) for block in range(depth)]
    assert layers['stem.conv1.conv.weight'] == 0
    for i, block in enumerate(blocks):
        assert {layer for key, layer in layers.items() if key.startswith(block)} == {i + 1}
    assert layers['head.fc.bias'] == len(blocks) + 1
    assert len({group['lr_scale'] for group in param_groups_layer_decay(model, layer_decay=0.8)}) == len(blocks) + 2
    groups = create_optimizer_v2(model, 'adamw', weight_decay=0.05, layer_decay=0.8).param_groups
    spared = {id(value) for group in groups if not group['weight_decay'] for value in group['params']}
    attention = model.stages[3][1].self_attn
    assert id(attention.pos_embed.height_rel) in spared and id(attention.qkv.weight) not in spared


def test_every_parameter_has_a_gradient():
    model = timm.create_model(SMALL, num_classes=3, zero_init_last=False).train()
    model(torch.randn(2, 3, 64, 96)).square().mean().backward()
    assert not [key for key, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    new = timm.create_model(SMALL, num_classes=3).train()  # blocks begin as their shortcuts
    assert not new.stages[3][1].conv3_1x1.bn.weight.any()


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
    """timm's reparameterize_model leaves no BatchNorm, those behind attention included, and the same function."""
    model = timm.create_model(SMALL, features_only=features_only)
    settle_(model.model if features_only else model)
    folded = reparameterize_model(model.eval())
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    for size in ANY_SIZE:
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            expected, got = model(x), folded(x)
        for one, other in zip(*(([y] if torch.is_tensor(y) else y) for y in (got, expected)), strict=True):
            assert relative_difference(one, other) < 1e-5
    net = folded.model if features_only else folded
    net.stages[2][0].self_attn.register_forward_hook(lambda module, args, output: output)
    with torch.inference_mode():
        twice = reparameterize_model(net)(x)
        assert relative_difference(twice, net(x)) < 1e-6
    hooked = create()
    hooked.stages[2][0].self_attn.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match=r'self_attn has forward hooks'):
        timm_vitres.fold(hooked)


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(in_chans=1, num_classes=3, img_size=(64, 96), global_pool='catavgmax'),
        dict(attn_blocks=(1, (0,), 0, 2), num_heads=4, channels=(32, 32, 32, 64), num_features=0),
        dict(num_classes=0),
    ],
)
def test_save_and_load(kwargs, tmp_path):
    model = create(**kwargs)
    folder = timm_vitres.save(model, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, model.in_chans, *ODD)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    assert loaded.cfg == model.cfg and loaded.pretrained_cfg['classifier'] == 'head.fc'
    if 'img_size' in kwargs:
        assert timm.data.resolve_model_data_config(loaded)['input_size'] == (1, 64, 96)
    other = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=11, img_size=160).eval()
    with torch.inference_mode():
        assert other(x).shape == (2, 11)
        assert relative_difference(other.forward_features(x), model.forward_features(x)) < 0.1  # tables are resampled


def test_a_size_set_later_is_saved(tmp_path):
    model = create(img_size=96)
    model.set_input_size(img_size=160)
    loaded = timm.create_model(f'local-dir:{timm_vitres.save(model, tmp_path)}', pretrained=True).eval()
    x = torch.randn(1, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match='img_size: got 0'):
        model.set_input_size(0)


@pytest.mark.parametrize('new', ['', 'avg', 'max', 'catavgmax'])
def test_another_pooling_is_saved(new, tmp_path):
    for old in ('', 'avg', 'catavgmax'):
        model = create(global_pool=old, num_classes=5 if old else 0)
        model.reset_classifier(4 if new else 0, new)
        randomise_(model)
        loaded = timm.create_model(f'local-dir:{timm_vitres.save(model, tmp_path / old)}', pretrained=True).eval()
        assert loaded.cfg == model.cfg
        x = torch.randn(1, 3, 96, 64)
        with torch.inference_mode():
            assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(layers=(2,)), 'layers: got (2,)'),
        (dict(channels=(32, 48)), 'channels: got (32, 48), expected 4 values, one for each stage'),
        (dict(channels=(32, 48, 64, 95)), 'channels: got (32, 48, 64, 95), expected multiples of 8'),
        (dict(strides=(1, 2, 2, 4)), 'strides: got (1, 2, 2, 4)'),
        (dict(attn_blocks=(0, 0, 0, 3)), 'attn_blocks: got (0, 0, 0, 3), but stage 3 (from 0) has 2 blocks'),
        (dict(attn_blocks=(0, 0, 0, (2,))), 'attn_blocks: got (0, 0, 0, (2,)), but stage 3'),
        (dict(attn_blocks=(0, 0, (0, 0), 1)), 'attn_blocks: got (0, 0, (0, 0), 1), but stage 2'),
        (dict(num_heads=5), 'num_heads: got 5, but 5 does not divide 24, the width inside'),
        (dict(num_heads=(1, 2, 2, 5)), 'num_heads: got (1, 2, 2, 5), but 5 does not divide 48'),
        (dict(group_size=7), 'group_size: got 7, which does not divide 16'),
        (dict(stem_pool='', stem_type='', stem_stride=4), "stem_stride: got 4, but a stem of type ''"),
        (dict(strides=(1, 1, 1, 1), stem_stride=1), 'strides: got (1, 1, 1, 1) behind a stem of stride 1'),
        (dict(bottle_ratio=0), 'bottle_ratio: got 0'),
        (dict(bottle_ratio=(0.5, 0.5)), 'bottle_ratio: got (0.5, 0.5), expected 4 values'),
        (dict(channel_attn='bam'), "channel_attn: got 'bam'"),
        (dict(global_pool=''), "global_pool: got '' with num_classes=1000"),
        (dict(global_pool='token'), "global_pool: got 'token'"),
        (dict(num_classes=-1), 'num_classes: got -1'),
        (dict(img_size=0), 'img_size: got 0'),
        (dict(drop_path_rate=1.0), 'drop_path_rate: got 1.0'),
        (dict(output_stride=4), 'output_stride: got 4'),
    ],
)
def test_impossible_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model(SMALL, device='meta', **kwargs)


def test_wrong_images_and_arguments_are_errors():
    with pytest.raises(TypeError, match=r'attn_block: .* did you mean attn_blocks'):
        timm.create_model(SMALL, attn_block=1)
    model = create()
    for x in (torch.randn(1, 1, 64, 64), torch.randn(3, 64, 64)):
        with pytest.raises(ValueError, match=r'input: got shape .*, expected \(B, 3, H, W\)'):
            model(x)
    with pytest.raises(ValueError, match="global_pool: got 'map'"):
        model.reset_classifier(5, 'map')
    with pytest.raises(ValueError, match="global_pool: got '' with num_classes=5"):
        model.reset_classifier(5, '')
    model.reset_classifier(0, '')
    with pytest.raises(ValueError, match="global_pool: got '' with num_classes=5"):
        model.reset_classifier(5)


def test_device_and_dtype():
    model = timm.create_model(SMALL, device='meta', dtype=torch.bfloat16)
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.is_meta and (tensor.dtype == torch.bfloat16 or not tensor.is_floating_point())
    model = create()
    x = torch.randn(1, 3, *ODD)
    with torch.inference_mode():
        expected = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            assert relative_difference(model(x).float(), expected) < 0.1
        assert relative_difference(model.double()(x.double()), expected.double()) < 1e-5
        half = model.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16 and relative_difference(half.float(), expected) < 0.1


def test_attention_is_explained():
    """The rollout is of the blocks that attend to the smallest map, and the layers stay fused."""
    model = create(img_size=128)
    explained = model.explained_parts()
    assert explained.attentions == [model.stages[3][1].self_attn] and explained.token_stride == (32, 32)
    from timm_vitres.explanation import attention_rollout, grad_cam

    x = torch.randn(2, 3, 96, 160)
    maps = (attention_rollout(model, x), grad_cam(model, x, 1))
    assert all(one.shape == (2, 96, 160) and one.max() == 1 and one.std() > 0.01 for one in maps)
    assert all(module.fused_attn for module in model.modules() if isinstance(module, RelPosAttn))
    convolutional = create(attn_blocks=(0, 0, 0, 0))
    assert convolutional.explained_parts().attentions == []


@pytest.mark.parametrize(
    'name, size', [('test_vitresnet', 160), ('test_vitresnet_mix', 192), ('vitresnet_mix_bot26t', 384)]
)
def test_a_trace_may_be_cast(name, size):
    """No device or dtype of the traced model is kept in it as a constant."""
    model = randomise_(timm.create_model(name)).eval()
    x = torch.randn(1, 3, size, size)
    traced = torch.jit.trace(model, x, check_trace=False).double()
    with torch.inference_mode():
        assert relative_difference(traced(x.double()), model.double()(x.double())) < 1e-5


def test_tables_of_positions_are_read_by_their_own_module():
    """Which hooks, as those that load what lies on a disk, are told of."""
    model = timm.create_model('test_vitresnet_mix').eval()
    called = []
    for name, module in model.named_modules():
        if any(key.startswith('height_rel') for key, _ in module.named_parameters(recurse=False)):
            module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    model(torch.randn(1, 3, 64, 64))
    assert called and len(called) == sum(key.endswith('height_rel') for key in model.state_dict())


def test_a_trace_resizes_no_table_in_vain():
    """Converters may not know that resize."""
    model = randomise_(timm.create_model('vitresnet_mix_nano')).eval()
    size = model.pretrained_cfg['input_size'][-1]
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        assert 'bicubic' not in str(traced.inlined_graph) and torch.equal(traced(x), model(x))
        larger = torch.jit.trace(model, torch.randn(1, 3, 2 * size, 2 * size), check_trace=False)
        assert 'bicubic' in str(larger.inlined_graph)


def test_a_plain_trace_of_torch_fx_is_refused_with_what_works():
    for name in ('test_vitresnet', 'test_vitresnet_dual', SMALL):
        with pytest.raises(
            TypeError, match=r'^input: got a torch.fx.Proxy, .*use timm.models.create_feature_extractor'
        ):
            torch.fx.symbolic_trace(timm.create_model(name))
