"""The model of a run: where its weights come from, what is frozen, adapters and their merging."""

import dataclasses
import importlib

import pytest
import timm
import torch
from conformer_reference import heads
from conftest import DUAL, randomise_
from test_loop import rows, settings, weights
from timm.layers import DropPath
from timm.models import load_checkpoint
from timm.models.vision_transformer import Block

import timm_vitres
from timm_vitres.models.attention import AttnBlock
from timm_vitres.training import creation
from timm_vitres.training.creation import (
    Frozen,
    add_adapters_,
    create_finetune_model,
    head_parameters,
    input_args,
    merged,
    part_parameters,
)
from timm_vitres.training.loop import finetune
from timm_vitres.training.settings import FinetuneCfg

# what lies in folders and repositories that are not timm's: transformers' config, half a file, a field without a value
NOT_TIMMS = [
    '{"model_type": "vit-hybrid"}',
    '{"architecture": "resn',
    '{"architecture": "resnet18", "pretrained_cfg": null}',
]
FAMILIES = ('test_vitresnet', 'test_vitresnet_dual', 'test_vitresnet_mix')


def create(name='test_vitresnet', num_classes=3, **kwargs):
    kwargs = {**(dict(img_size=32) if name in ('test_vitresnet', 'test_vit') else {}), **kwargs}
    if name == 'test_vitresnet_mix':
        kwargs['zero_init_last'] = False  # so that a block's branch counts
    torch.manual_seed(0)
    return randomise_(timm.create_model(name, num_classes=num_classes, **kwargs))


def stepped_(model, seed=0):
    """Take one step that moves whatever is trained, by gradient and by decay."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3, 32, 32, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def run_cfg(name, **kwargs):
    return FinetuneCfg(data_dir='images', model=name, img_size=64, **kwargs)


@pytest.mark.parametrize('name', FAMILIES)
def test_rates_of_a_run_reach_its_model(name):
    model = create_finetune_model(run_cfg(name, drop=0.3, drop_path=0.2), 3)
    rates = {module.drop_prob for module in model.modules() if isinstance(module, DropPath)}
    assert max(rates) == pytest.approx(0.2)
    assert 0.3 in {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}


@pytest.mark.parametrize('head_loss', ['sum', 'both', 'resnet', 'vit'])
def test_what_a_model_in_training_returns_is_what_its_loss_is_of(head_loss):
    model = create_finetune_model(run_cfg(DUAL, head_loss=head_loss), 3)
    untaught = [value for value in model.parameters() if not value.requires_grad]
    assert len(untaught) == (2 if head_loss in ('resnet', 'vit') else 0) and not any(map(torch.any, untaught))
    randomise_(model).train()
    for value in untaught:
        torch.nn.init.zeros_(value)
    for module in model.modules():  # its statistics are not to move between the calls
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    x = torch.randn(2, 3, 64, 64)
    resnet, vit = heads(model, x)
    assert not torch.allclose(resnet, vit, atol=1e-2)
    expected = dict(sum=resnet + vit, both=(resnet, vit), resnet=resnet, vit=vit)[head_loss]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('enable', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_gradient_checkpointing_of_a_run_reaches_its_model(name, enable):
    model = create_finetune_model(run_cfg(name, grad_checkpointing=enable), 3).train()
    convs = {module: 0 for module in model.modules() if isinstance(module, torch.nn.Conv2d)}
    blocks = {module: 0 for module in model.modules() if isinstance(module, (Block, AttnBlock))}

    def count(module, args):
        calls = convs if module in convs else blocks
        calls[module] += 1

    for module in [*convs, *blocks]:
        module.register_forward_pre_hook(count)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    # what is checkpointed runs once more for its gradients
    assert max(convs.values()) == max(blocks.values()) == 1 + enable


def test_the_rank_of_adapters():
    model = create_finetune_model(run_cfg('test_vitresnet', lora=3), 3)
    assert {len(value) for name, value in model.named_parameters() if 'lora_A' in name} == {3}
    assert {module.scaling['default'] for module in model.modules() if hasattr(module, 'scaling')} == {2.0}


@pytest.mark.parametrize('name', ['cache_dir', 'pretrained', 'pretrained_cfg', 'checkpoint_path'])
def test_arguments_of_a_model_do_not_say_where_weights_come_from(name, tmp_path):
    """A recipe of somebody could otherwise let a download write any file."""
    with pytest.raises(ValueError, match=f'model_kwargs: {name} is not for a run to choose so'):
        create_finetune_model(run_cfg('test_vitresnet', model_kwargs={name: str(tmp_path)}), 3)


@pytest.mark.parametrize('name', FAMILIES)
def test_every_parameter_is_of_one_part(name):
    """By the modules that the parts are, rather than by names."""
    model = create(name)
    resnet, vit, body = ({*part_parameters(model, part)} for part in ('resnet', 'vit', 'body'))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    heads = {names[id(parameter)] for parameter in head_parameters(model)}
    assert not resnet & vit and not (resnet | vit) & heads and body == {*names.values()} - heads

    def of(*modules):
        return {names[id(parameter)] for module in modules for parameter in module.parameters()}

    if name == 'test_vitresnet':
        assert resnet == of(model.patch_embed.backbone) and resnet | vit == body
        assert {'cls_token', 'pos_embed', 'patch_embed.proj.weight', 'norm.weight'} | of(model.blocks) <= vit
        assert len(heads) == 2
    elif name == 'test_vitresnet_mix':
        attending = [block for stage in model.stages for block in stage if hasattr(block, 'self_attn')]
        assert vit == of(*(block.self_attn for block in attending), *(block.post_attn for block in attending))
        assert resnet | vit == body and of(model.stem, model.stages[0], model.final_conv) <= resnet and len(heads) == 2
    else:
        units = list(model.units)
        fusions = [unit.fusion_block for unit in units[1:]]
        assert resnet == of(model.stem, *(unit.conv_block for unit in units), *fusions)
        assert vit == {'cls_token'} | of(model.norm, units[0].patch_embed, *(unit.block for unit in units))
        assert body - resnet - vit == of(*(part for unit in units[1:] for part in (unit.down, unit.up)))
        assert len(heads) == 4


@pytest.mark.parametrize('part', ['resnet', 'vit', 'body'])
@pytest.mark.parametrize('name', FAMILIES)
def test_a_frozen_part_stays_and_all_else_moves(name, part):
    model = create(name)
    parameters = {*part_parameters(model, part)}
    frozen = Frozen(model, part)
    modules = {name.rpartition('.')[0] for name in parameters}
    before = copied(model)
    model.train()
    frozen.set_(True)
    stepped_(model)
    for key, value in model.state_dict().items():
        stays = key in parameters or (key not in dict(model.named_parameters()) and key.rpartition('.')[0] in modules)
        assert torch.equal(value, before[key]) == stays, key
    model.train()
    frozen.set_(False)
    stepped_(model, seed=1)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == before.keys()


def test_the_body_of_other_models_can_be_frozen():
    model = create('test_resnet')
    before = copied(model)
    frozen = Frozen(model, 'body')
    model.train()
    frozen.set_(True)
    stepped_(model)
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == {
        'fc.weight',
        'fc.bias',
    }
    with pytest.raises(ValueError, match="freeze: got 'vit', but ResNet is no hybrid of ours; use 'body'"):
        Frozen(model, 'vit')
    with pytest.raises(ValueError, match="freeze: got 'resnet', but this model has none"):
        Frozen(
            create('vitresnet', backbone='', embed_dim=32, depth=1, num_heads=2, patch_size=16, img_size=32), 'resnet'
        )
    with pytest.raises(ValueError, match="freeze: got 'body', which leaves nothing to train"):
        Frozen(create(num_classes=0), 'body')


def saved(tmp_path, name='test_vitresnet', **kwargs):
    model = create(name, **kwargs)
    torch.save(model.state_dict(), tmp_path / 'start.pth')
    return str(tmp_path / 'start.pth'), model.state_dict()


def test_a_run_freezes_for_as_many_epochs_as_it_is_told(image_folder, tmp_path, no_pictures):
    path, start = saved(tmp_path, num_classes=2)
    options = dict(initial_checkpoint=path, freeze='resnet', freeze_epochs=1, no_check=True, weight_decay=0.1)
    cfg = settings(image_folder, tmp_path / 'run', epochs=1, **options)
    after = weights(finetune(cfg))
    backbone = [key for key in start if key.startswith('patch_embed.backbone.')]
    assert all(torch.equal(after[key], start[key]) for key in backbone)
    assert all(not torch.equal(after[key], start[key]) for key in start if key not in backbone)
    after = weights(finetune(dataclasses.replace(cfg, epochs=2, resume=True)))
    assert all(not torch.equal(after[key], start[key]) for key in start)


@pytest.mark.parametrize('name', ['test_vitresnet', 'test_vit'])
def test_weights_of_a_file_arrive(name, tmp_path):
    path, start = saved(tmp_path, name, num_classes=3)
    cfg = FinetuneCfg(data_dir='x', model=name, img_size=32, initial_checkpoint=path)
    found = create_finetune_model(cfg, 3).state_dict()
    assert found.keys() == start.keys() and all(torch.equal(found[key], start[key]) for key in start)
    with pytest.raises(ValueError, match=rf'initial_checkpoint: .*start\.pth does not fit {name}'):
        create_finetune_model(cfg, 4)
    cfg = FinetuneCfg(data_dir='x', model=name, img_size=32, pretrained_path=path)
    for num_classes in (3, 4):
        found = create_finetune_model(cfg, num_classes).state_dict()
        body = [key for key in start if not key.startswith('head.')]
        assert all(torch.equal(found[key], start[key]) for key in body)
        assert found['head.weight'].shape[0] == num_classes
        assert not torch.equal(found['head.weight'][:3], start['head.weight'])


def test_a_file_is_taken_in_place_of_the_weights_of_a_folder(tmp_path):
    path, start = saved(tmp_path, 'test_vitresnet', num_classes=3)
    other = timm_vitres.save(timm.create_model('test_vitresnet', num_classes=3), tmp_path / 'other')
    cfg = FinetuneCfg(data_dir='x', model=f'local-dir:{other}', img_size=32, pretrained_path=path)
    found = create_finetune_model(cfg, 3).state_dict()
    assert all(torch.equal(found[key], start[key]) for key in start if not key.startswith('head.'))


def test_a_file_that_gives_only_a_part_is_told(tmp_path, caplog):
    path, start = saved(tmp_path, 'test_vit')
    cfg = FinetuneCfg(data_dir='x', model='test_vit', img_size=32, pretrained_path=path)
    part = {key: value for key, value in start.items() if not key.startswith('blocks.0.attn')}
    torch.save(part, path)
    with caplog.at_level('WARNING'):
        create_finetune_model(cfg, 3)
    assert 'pretrained_path: 4 tensors are not as in' in caplog.text and 'blocks.0.attn' in caplog.text
    torch.save({f'backbone.{key}': value + 1 for key, value in start.items()}, path)
    with pytest.raises(
        ValueError, match=r'pretrained_path: .*start\.pth does not fit VisionTransformer: it gives only 0'
    ):
        create_finetune_model(cfg, 3)


def adapted(name):
    """Return a model whose adapters do something."""
    model = create(name)
    add_adapters_(model, 2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if 'lora_B' in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.parametrize('name', [*FAMILIES, 'test_vit'])
def test_merged_adapters_compute_the_same(name):
    plain, model = create(name), adapted(name)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        result = merged(model)
        torch.testing.assert_close(result(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x), expected)  # which is as it was
        assert (plain(x) - expected).abs().max() > 1e-3
    assert result.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in result.parameters())
    assert merged(plain) is plain


@pytest.mark.parametrize('name', FAMILIES)
def test_adapters_and_heads_alone_are_trained(name):
    model = create(name)
    add_adapters_(model, 2)
    before = copied(model)
    model.train()
    for seed in (0, 1):  # the first step leaves lora_A as it is, since lora_B is 0
        stepped_(model, seed)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if 'lora_' in key or key.startswith('head')}
    blocks = len([key for key in before if key.endswith('attn.qkv.base_layer.weight')])
    layers = 1 if name == 'test_vitresnet_mix' else 4  # its blocks have no projection and MLP of their own
    assert blocks and len([key for key in moved if 'lora_A' in key]) == layers * blocks


def test_a_head_that_is_not_trained_stays_so():
    model = create('test_vitresnet_dual')
    model.train_one_head('head_vit')
    add_adapters_(model, 2)
    assert {parameter.requires_grad for parameter in model.head_vit.parameters()} == {True}
    assert {parameter.requires_grad for parameter in model.head_resnet.parameters()} == {False}


@pytest.mark.parametrize('name', ['beit_base_patch16_224', 'swinv2_tiny_window8_256'])
def test_layers_that_attention_computes_past_have_no_adapters(name, caplog):
    kwargs = dict(depth=1, embed_dim=48, num_heads=2) if 'beit' in name else dict(depths=(1, 1, 1, 1), embed_dim=24)
    model = timm.create_model(name, num_classes=2, **kwargs)
    add_adapters_(model, 2)
    assert 'has no adapters beside' in caplog.text and 'attn.qkv' in caplog.text
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    adapters = {name: value for name, value in model.named_parameters() if 'lora_' in name}
    assert adapters and all(value.grad is not None for value in adapters.values())
    assert any('.attn.proj.' in name for name in adapters)  # which is called


def test_adapters_need_peft_and_attention(monkeypatch):
    with pytest.raises(ValueError, match='lora: ResNet has no attention or MLP'):
        add_adapters_(create('test_resnet'), 2)
    with monkeypatch.context() as patch:
        patch.setattr('peft.inject_adapter_in_model', lambda *args: importlib.import_module('no_such_package'))
        with pytest.raises(ValueError, match=r'lora: peft does not go with .* \(No module named'):
            add_adapters_(create(), 2)
    monkeypatch.setattr(creation, 'is_installed', lambda package: False)
    with pytest.raises(ValueError, match=r'lora: needs peft, pip install "timm-vitres\[lora\]"'):
        add_adapters_(create(), 2)


@pytest.mark.parametrize('ema', [False, True])
def test_a_run_with_adapters_saves_a_model_without(ema, image_folder, tmp_path, no_pictures):
    path, start = saved(tmp_path, num_classes=2)
    options = dict(initial_checkpoint=path, lora=2, epochs=1, no_check=True, lr=0.01)
    options.update(dict(model_ema=True, model_ema_decay=0.5) if ema else {})
    cfg = settings(image_folder, tmp_path / 'run', eval_metric='loss', **options)
    folder = finetune(cfg)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    found = model.state_dict()
    adapted = [key for key in start if key.endswith('weight') and any(part in key for part in ('attn', 'mlp'))]
    moved = {key for key in start if not torch.equal(found[key], start[key])}
    assert found.keys() == start.keys() and moved == {*adapted, 'head.weight', 'head.bias'}
    # the adapted model that the run went on with computes the same
    again = create_finetune_model(cfg, 2)
    state = torch.load(folder / 'last.pth.tar', weights_only=True)
    row = state['history'][0]
    key = 'state_dict_ema' if ema and row['ema_loss'] < row['eval_loss'] else 'state_dict'
    torch.nn.Module.load_state_dict(again, state[key])
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), again.eval()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize('ema', [False, True])
def test_a_run_with_adapters_leaves_statistics_alone_and_checkpoints_that_load(
    ema, image_folder, tmp_path, no_pictures
):
    path, start = saved(tmp_path, 'test_vitresnet_mix', num_classes=2)
    options = dict(initial_checkpoint=path, lora=2, epochs=2, no_check=True, lr=0.01, model_ema=ema, checkpoint_hist=2)
    folder = finetune(settings(image_folder, tmp_path / 'run', model='test_vitresnet_mix', **options))
    found = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
    still = [key for key in start if 'running_' in key]
    assert still and all(torch.equal(found[key], start[key]) for key in still)
    best = max(rows(folder), key=lambda row: max(float(row['eval_top1']), float(row.get('ema_top1', 0))))
    checkpoint = folder / f'checkpoint-{best["epoch"]}.pth.tar'
    of_average = float(best.get('ema_top1', 0)) > float(best['eval_top1'])
    loaded = timm.create_model('test_vitresnet_mix', num_classes=2, img_size=32).eval()
    load_checkpoint(loaded, str(checkpoint), use_ema=of_average)
    expected = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), expected(x))


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('levit_128s', dict(embed_dim=(16, 32, 48), num_heads=(1, 2, 3), depth=(1, 1, 1))),
        ('coatnet_nano_rw_224', dict(embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1))),
    ],
)
def test_models_that_are_made_for_one_size(name, kwargs, image_folder, tmp_path):
    """They are made for that of the run, and keep it in its folder."""
    cfg = settings(image_folder, tmp_path / 'run', model=name, model_kwargs=kwargs, img_size=64, epochs=1)
    model = timm.create_model(f'local-dir:{finetune(cfg)}', pretrained=True).eval()
    assert model.pretrained_cfg['input_size'] == (3, 64, 64) and model(torch.randn(1, 3, 64, 64)).isfinite().all()
    with pytest.raises(ValueError, match=rf'img_size: {name} takes no images of 60 x 60 pixels \(.* size '):
        finetune(dataclasses.replace(cfg, output=str(tmp_path / 'other'), img_size=60))
    assert not (tmp_path / 'other').exists()


def test_a_head_that_knows_the_classes_is_brought_into_their_order(tmp_path, caplog):
    for name in ('test_vitresnet', 'test_vitresnet_dual', 'resnet10t'):
        model = randomise_(timm.create_model(name, num_classes=3))
        timm_vitres.save(model, tmp_path / name, label_names=['a', 'b', 'c'])
        cfg = FinetuneCfg(model=f'local-dir:{tmp_path / name}', data_dir='x', pretrained=True)
        x = torch.randn(2, 3, 64, 64)
        with torch.inference_mode():
            expected = model.eval()(x)
            for names in (['a', 'b', 'c'], ['c', 'a', 'b'], ['a', 'b', 'd']):
                found = create_finetune_model(cfg, 3, names).eval()(x)
                order = ['abc'.index(label) for label in names if label != 'd'] + [2] * ('d' in names)
                torch.testing.assert_close(found, expected[:, order])
    assert caplog.text.count("begins with as many other classes, such as 'c'") == 3


def test_a_hybrid_whose_projection_has_an_adapter_is_no_resnet_alone():
    from peft import LoraConfig, inject_adapter_in_model

    model = create()
    inject_adapter_in_model(LoraConfig(target_modules=['qkv', 'proj']), model)
    assert not isinstance(model.patch_embed.proj, torch.nn.Conv2d)
    with pytest.raises(ValueError, match='is smaller than one token'):
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match='patch_size: got 2, but proj has an adapter; merge it first'):
        model.set_input_size(64, patch_size=2)


@pytest.mark.parametrize('text', NOT_TIMMS)
@pytest.mark.parametrize('where', ['folder', 'hub'])
def test_a_model_whose_config_is_not_timms_is_a_sentence(where, text, tmp_path, monkeypatch):
    """Of `finetune` and of `compare`, which look at the name of a model before they make it."""
    (tmp_path / 'config.json').write_text(text)
    name = f'local-dir:{tmp_path}'
    if where == 'hub':
        name = 'hf-hub:google/vit-hybrid-base-bit-384'
        monkeypatch.setattr('timm.models._hub.download_from_hf', lambda *args, **kwargs: str(tmp_path / 'config.json'))
    for call in (
        lambda: input_args(name),
        lambda: create_finetune_model(FinetuneCfg(data_dir='x', output='y', model=name, img_size=64), 2),
    ):
        with pytest.raises(ValueError, match=r'config\.json|timm-vitres convert') as caught:
            call()
        assert 'in_chans' not in str(caught.value)
