"""Learning rates, schedules, optimizers and steps, against values computed by hand."""

import math
from contextlib import nullcontext

import pytest
import timm
import torch
from test_loop import settings, weights
from timm.optim import muon
from torch.nn import functional as F

import timm_vitres
from timm_vitres.data import data_config
from timm_vitres.training.creation import BATCH_NORMS, create_finetune_model
from timm_vitres.training.loop import finetune
from timm_vitres.training.optimisation import (
    Stepper,
    are_finite,
    check_new_optimizer,
    check_optimizer,
    create_optimizer,
    create_scheduler,
    lacks_bfloat16,
    learning_rate,
)
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.tasks import create_task

CPU = torch.device('cpu')


def cfg(**kwargs) -> FinetuneCfg:
    return FinetuneCfg(**{**dict(data_dir='images', model='test_vitresnet', opt='sgd', lr=0.1), **kwargs})


@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(), 0.1),
        (dict(lr_base=0.1), 0.025),  # a quarter of the images: a quarter of the rate,
        (dict(lr_base=0.1, opt='adamw'), 0.05),  # but half of it for Adam's kin
        (dict(lr_base=0.1, opt='lamb'), 0.05),
        (dict(lr_base=0.1, opt='adamw', lr_base_scale='linear'), 0.025),
        (dict(lr_base=0.1, lr_base_scale='sqrt'), 0.05),
        (dict(lr_base=0.1, lr_base_size=16), 0.4),
    ],
)
def test_the_learning_rate_grows_with_the_images_of_a_step(options, expected):
    assert learning_rate(cfg(**options), 64) == pytest.approx(expected)


def test_a_run_takes_all_images_of_a_step_into_account(image_folder, tmp_path, no_pictures):
    options = dict(grad_accum_steps=2, lr_base=0.1, sched='constant', warmup_epochs=0, opt='sgd', epochs=1)
    folder = finetune(settings(image_folder, tmp_path / 'run', batch_size=4, **options))
    groups = torch.load(folder / 'last.pth.tar', weights_only=True)['optimizer']['param_groups']
    assert [group['lr'] for group in groups] == pytest.approx([0.1 * 8 / 256] * len(groups))


def test_the_rate_is_that_of_the_images_that_are_there(image_folder, tmp_path, no_pictures):
    """Where there are fewer than a step shall have; the card says the same."""
    options = dict(lr_base=0.1, sched='constant', warmup_epochs=0, opt='sgd', epochs=1, val_frac=0.25)
    folder = finetune(settings(image_folder, tmp_path / 'run', batch_size=256, **options))
    [rate] = {
        group['lr'] for group in torch.load(folder / 'last.pth.tar', weights_only=True)['optimizer']['param_groups']
    }
    assert rate == pytest.approx(0.1 * 18 / 256)
    assert f'batch_size=18, opt=sgd, lr={rate:g}' in ' '.join((folder / 'README.md').read_text().split())


def test_the_rate_is_that_of_the_batches_that_an_epoch_has(image_folder, tmp_path, no_pictures):
    options = dict(lr_base=0.1, sched='constant', warmup_epochs=0, opt='sgd', epochs=1, val_frac=0.25)
    folder = finetune(settings(image_folder, tmp_path / 'run', batch_size=4, grad_accum_steps=16, **options))
    state = torch.load(folder / 'last.pth.tar', weights_only=True)
    assert state['optimizer']['param_groups'][0]['lr'] == pytest.approx(0.1 * 16 / 256)  # 18 images are 4 batches
    assert 'opt=sgd, lr=0.00625' in ' '.join((folder / 'README.md').read_text().split())


def rates(**kwargs):
    """Return the learning rate at the beginning of every epoch of 5 steps."""
    options = cfg(**{**dict(epochs=6, warmup_epochs=0, min_lr=0.0, weight_decay=0.0), **kwargs})
    optimizer = create_optimizer(options, torch.nn.Linear(2, 2), 0.1)
    scheduler = create_scheduler(options, optimizer, 5)
    found = []
    for epoch in range(6):
        scheduler.step_update(num_updates=5 * epoch)
        found.append(optimizer.param_groups[0]['lr'])
    return found


def test_schedules_of_steps():
    found = rates(sched='step', decay_epochs=2, decay_rate=0.5)
    assert found == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])
    found = rates(sched='multistep', decay_milestones=(1, 4), decay_rate=0.1)
    assert found == pytest.approx([0.1, 0.01, 0.01, 0.01, 0.001, 0.001])
    assert rates(sched='constant') == [0.1] * 6


def test_the_cosine_falls_from_its_rate_to_the_least():
    found = rates(sched='cosine', min_lr=0.02)
    assert found == pytest.approx([0.02 + 0.04 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6)])


def test_warm_up_takes_at_most_half_of_a_run():
    found = rates(sched='cosine', warmup_epochs=2, warmup_lr=0.01, min_lr=0.001)
    assert found[:2] == pytest.approx([0.01, 0.055])
    assert found[2:] == pytest.approx([0.001 + 0.0495 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(2, 6)])
    found = rates(sched='constant', warmup_epochs=100, warmup_lr=0.01)
    assert found == pytest.approx([0.01, 0.04, 0.07, 0.1, 0.1, 0.1])


def test_weight_decay_is_that_of_matrices():
    model, optimizer, _ = made(cfg(weight_decay=0.25))
    decay = {id(value): group['weight_decay'] for group in optimizer.param_groups for value in group['params']}
    found = {name: decay[id(value)] for name, value in model.named_parameters()}
    assert found['blocks.0.attn.qkv.weight'] == found['head.weight'] == 0.25
    assert found['blocks.0.attn.qkv.bias'] == found['norm.weight'] == 0.0 and {*found.values()} == {0.0, 0.25}


@pytest.mark.parametrize(
    'amp, name, dtype',
    [
        (False, 'float16', torch.float32),
        (True, 'bfloat16', torch.bfloat16),
        (True, 'float16', torch.float16),
    ],
)
def test_a_step_computes_in_the_dtype_of_its_settings(amp, name, dtype):
    model, _, stepper = made(cfg(amp=amp, amp_dtype=name))
    seen = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    stepper.loss(*batches([2])[0])
    assert seen == [dtype] and (stepper.scaler is not None) == (dtype == torch.float16)


@pytest.mark.parametrize('options', [dict(), dict(cutmix=1.0), dict(kd=True), dict(kd=True, kd_distill_type='feature')])
def test_a_loss_is_of_float32_logits(options, tmp_path):
    """On a CPU autocast computes log_softmax in bfloat16: a loss of 8 bits."""
    options = dict(options)
    if options.pop('kd', False):
        timm_vitres.save(timm.create_model('test_vitresnet', num_classes=3), tmp_path / 'teacher')
        options.update(kd_model_name=f'local-dir:{tmp_path}/teacher')
    options = cfg(amp=True, amp_dtype='bfloat16', **options)
    _, _, stepper = made(options)
    seen = []
    stepper.task.get_trainable_module().register_forward_hook(lambda module, args, output: seen.append(output))
    [(x, target)] = batches([4])
    target = F.one_hot(target, 3).float() if options.mixes else target
    loss = stepper.loss(x, target)
    [output] = seen
    assert all(one.dtype == torch.float32 for one in (output if isinstance(output, tuple) else (output,)))
    if options.kd_model_name is None:
        exact = stepper.task.criterion(output.double(), target.double() if options.mixes else target)
        assert loss.item() == pytest.approx(exact.item(), abs=1e-6)
    elif options.kd_distill_type == 'logit':
        with torch.no_grad(), stepper.autocast():
            expected = stepper.task.teacher(stepper.task.teacher.normalize_input(x))
        assert expected.dtype == torch.float32
        parts = F.log_softmax(output.double() / 4, -1), F.softmax(expected.double() / 4, -1)
        exact = stepper.task.criterion(output.double(), target) + 16 * F.kl_div(*parts, reduction='batchmean')
        assert loss.item() == pytest.approx(exact.item(), abs=1e-5)


@pytest.mark.parametrize('sched', ['cosine', 'step'])
def test_a_warm_up_does_not_begin_above_the_rate(sched):
    assert max(rates(sched=sched, warmup_epochs=2, warmup_lr=5.0)) == pytest.approx(0.1)


def test_nor_with_layers_that_learn_more_slowly():
    options = cfg(model='test_vitresnet', lr=5e-6, layer_decay=0.65, epochs=4, warmup_epochs=2, warmup_lr=1e-5)
    optimizer = create_optimizer(options, timm.create_model('test_vitresnet', num_classes=2), 5e-6)
    assert min(group['lr_scale'] for group in optimizer.param_groups) < 0.5
    scheduler = create_scheduler(options, optimizer, 3)
    found = []
    for update in range(12):
        scheduler.step_update(update)
        found.append(max(group['lr'] for group in optimizer.param_groups))
    assert max(found) == pytest.approx(5e-6) and found[:6] == pytest.approx([5e-6] * 6)


def test_a_schedule_that_needs_a_warm_up_says_so():
    with pytest.raises(ValueError, match=r"^sched: 'rsqrt' falls from .*; set warmup_epochs above 0"):
        rates(sched='rsqrt', warmup_epochs=0)


def test_a_schedule_that_changes_nothing_is_told(caplog):
    for options in (dict(sched='step'), dict(sched='multistep', decay_milestones=(6, 9))):
        caplog.clear()
        rates(**options)
        assert 'changes nothing before epoch' in caplog.text and 'and the run has 6' in caplog.text
    caplog.clear()
    rates(sched='step', decay_epochs=2)
    assert not caplog.text


def test_what_is_set_of_an_optimizer_arrives():
    options = cfg(opt='adamw', opt_betas=(0.8, 0.95), opt_eps=1e-5, opt_kwargs=dict(amsgrad=True))
    optimizer = create_optimizer(options, torch.nn.Linear(2, 2), 0.1)
    group = optimizer.param_groups[0]
    assert tuple(group['betas']) == (0.8, 0.95) and group['eps'] == 1e-5 and group['amsgrad'] and group['lr'] == 0.1
    group = create_optimizer(cfg(momentum=0.7), torch.nn.Linear(2, 2), 0.1).param_groups[0]
    assert group['momentum'] == 0.7


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(opt='adamz'), "opt: timm has no optimizer 'adamz'"),
        (dict(opt='adahessian'), "opt: 'adahessian' needs second derivatives"),
        (dict(opt_betas=(0.9, 0.99)), r'opt_betas: got \(0.9, 0.99\), but sgd has none'),
        (dict(opt_eps=1e-6), 'opt_eps: got 1e-06, but sgd has none'),
        (dict(opt='adamw', opt_betas=(0.9,)), r'opt_betas: got \(0.9,\), but adamw has 2'),
        (dict(opt='lookahead_adan', opt_betas=(0.9, 0.99)), 'opt_betas: .* has 3'),
    ],
)
def test_what_an_optimizer_has_not_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(cfg(**options))
    check_optimizer(cfg(opt='lookahead_adamw', opt_betas=(0.9, 0.99), opt_eps=1e-6))


def batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


def made(options):
    torch.manual_seed(0)
    model = timm.create_model('test_vitresnet', num_classes=3, img_size=32)
    task = create_task(options, model, list('abc'), None, dict(data_config(model)), CPU)
    optimizer = create_optimizer(options, model, options.lr)
    return model, optimizer, Stepper(options, task, optimizer, CPU, False)


def test_what_has_a_setting_of_its_own_is_not_hidden_in_opt_kwargs():
    for name, own in (('lr', 'lr'), ('betas', 'opt_betas')):
        hidden = cfg(opt='adamw', opt_kwargs={name: [0.9, 0.9] if name == 'betas' else 0.1})
        with pytest.raises(ValueError, match=f'^opt_kwargs: {name} has a setting of its own, {own}; leave it out'):
            check_new_optimizer(hidden)
        check_optimizer(hidden)  # of a run that began before this was refused


def test_kron_draws_the_same_numbers_in_all_processes():
    assert create_optimizer(cfg(opt='kron'), torch.nn.Linear(2, 2), 0.01).deterministic is True
    options = cfg(opt='kron', opt_kwargs=dict(deterministic=False))
    assert create_optimizer(options, torch.nn.Linear(2, 2), 0.01).deterministic is False


@pytest.mark.parametrize('name', ['test_vitresnet_mix', 'test_vitresnet_dual', 'resnet18'])
def test_checkpointing_leaves_the_statistics_of_batch_norm_alone(name):
    found = []
    for grad_checkpointing in (False, True):
        options = cfg(model=name, img_size=None, grad_checkpointing=grad_checkpointing)
        torch.manual_seed(0)
        model = create_finetune_model(options, 3)
        task = create_task(options, model, list('abc'), None, dict(data_config(model)), CPU)
        stepper = Stepper(options, task, create_optimizer(options, model, 0.01), CPU, False)
        task.train()
        for x, target in batches([4] * 2):
            stepper.backward(stepper.loss(F.interpolate(x, (64, 64)), target), 1, True)
        found.append({key: value for key, value in model.state_dict().items() if 'running' in key})
    assert found[0].keys() == found[1].keys() and found[0]
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, msg=key)
    assert {layer.momentum for layer in model.modules() if isinstance(layer, BATCH_NORMS)} == {0.1}


@pytest.mark.parametrize('clip', [dict(), dict(clip_grad=0.05)])
def test_gradients_are_added_up_to_those_of_all_batches_of_a_step(clip):
    """Steps of two batches, and a last one of a single batch, are the steps of batches twice as large."""
    options = cfg(grad_accum_steps=2, smoothing=0.1, weight_decay=0.05, **clip)
    model, _, stepper = made(options)
    plan = stepper.plan(5)
    assert plan == [(2, False), (2, True), (2, False), (2, True), (1, True)] and stepper.updates(5) == 3
    parts = batches([4] * 5)
    for (x, target), (share, is_last) in zip(parts, plan):
        stepper.backward(stepper.loss(x, target), share, is_last)

    other, optimizer, _ = made(options)
    start = {key: value.clone() for key, value in other.state_dict().items()}
    for step in (parts[:2], parts[2:4], parts[4:]):
        x, target = (torch.cat(tensors) for tensors in zip(*step))
        F.cross_entropy(other(x), target, label_smoothing=0.1).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    for key, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=1e-6)
    assert not torch.equal(start['head.weight'], model.head.weight)


def test_a_run_of_small_batches_is_the_run_of_large_ones(image_folder, tmp_path, no_pictures):
    options = dict(no_aug=True, opt='sgd', lr=0.05, epochs=2, smoothing=0.1)
    large = finetune(settings(image_folder, tmp_path / 'large', batch_size=8, **options))
    small = finetune(settings(image_folder, tmp_path / 'small', batch_size=4, grad_accum_steps=2, **options))
    expected = weights(large)
    for key, value in weights(small).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
    once = weights(finetune(settings(image_folder, tmp_path / 'once', batch_size=4, **options)))
    assert max((once[key] - value).abs().max() for key, value in expected.items()) > 1e-4


def test_clipping():
    """A step of plain SGD at rate 1 is the clipped gradient."""
    x, target = batches([4])[0]
    for mode in ('norm', 'value', 'agc'):
        options = cfg(opt='momentum', lr=1.0, momentum=0.0, weight_decay=0.0, clip_grad=1e-3, clip_mode=mode)
        model, _, stepper = made(options)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        stepper.backward(stepper.loss(x, target), 1, True)
        change = {name: value.detach() - before[name] for name, value in model.named_parameters()}
        if mode == 'norm':
            assert torch.cat([value.flatten() for value in change.values()]).norm().item() == pytest.approx(1e-3, 1e-3)
        elif mode == 'value':
            largest = max(value.abs().max().item() for value in change.values())
            assert largest == pytest.approx(1e-3, rel=1e-3)
        else:  # of every unit, a part of its weights' norm; the head is left alone
            weight, moved = before['blocks.0.attn.qkv.weight'], change['blocks.0.attn.qkv.weight']
            ratio = moved.norm(dim=1) / weight.norm(dim=1)
            assert ratio.max().item() == pytest.approx(1e-3, rel=1e-2)
            assert change['head.weight'].norm() > 1e-2


def test_clipping_units_spares_every_head():
    options = cfg(model='test_vitresnet_dual', clip_grad=1e-3, clip_mode='agc', opt='momentum', momentum=0.0)
    model = timm.create_model('test_vitresnet_dual', num_classes=3, img_size=32)
    task = create_task(options, model, list('abc'), None, {}, CPU)
    stepper = Stepper(options, task, create_optimizer(options, model, 1.0), CPU, False)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert stepper.heads == {id(value) for head in model.get_classifier() for value in head.parameters()}
    stepper.backward(stepper.loss(*batches([4])[0]), 1, True)
    moved = {name: (value.detach() - before[name]).norm() for name, value in model.named_parameters()}
    assert moved['head_resnet.bias'] > 1e-4 and moved['head_vit.bias'] > 1e-4  # clipped, they would be 1e-6
    assert moved['units.0.block.norm1.bias'] < 1e-4


def test_what_is_not_finite_is_found():
    fine = [torch.ones(3), torch.tensor([2**31]), torch.empty(0), torch.zeros(2, dtype=torch.bfloat16)]
    assert are_finite(fine) and are_finite([])
    for bad in (float('nan'), float('inf'), -float('inf')):
        assert not are_finite([*fine, torch.tensor([0.0, bad])])
        assert not are_finite([torch.tensor(bad, dtype=torch.bfloat16), *fine])


@pytest.mark.parametrize('is_native', [True, False])
def test_a_gpu_without_bfloat16_is_known(is_native, monkeypatch):
    """By its instructions: torch counts what it emulates, too."""
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation or is_native

    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', supported)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: nullcontext(asked.append(str(device))))
    assert lacks_bfloat16(torch.device('cuda:1')) != is_native
    assert asked == ['cuda:1', False]


@pytest.mark.parametrize('capability, dtypes', [('AVX2', {torch.float32}), ('AVX512', {None})])
@pytest.mark.parametrize('opt', ['nmuon', 'NAdaMuon'])
def test_a_cpu_without_bfloat16_runs_muon_in_float32(image_folder, tmp_path, monkeypatch, opt, capability, dtypes):
    seen = set()
    orthogonalise = muon.zeropower_via_newtonschulz

    def watched(*args, **kwargs):
        seen.add(kwargs.get('dtype'))
        return orthogonalise(*args, **kwargs)

    monkeypatch.setattr(muon, 'zeropower_via_newtonschulz', watched)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    finetune(settings(image_folder, tmp_path / 'run', epochs=1, opt=opt))
    assert seen == dtypes
    assert muon.zeropower_via_newtonschulz is watched  # others' Muon is left as it was


def test_gpus_are_set_as_by_train_py_while_a_run_lasts(image_folder, tmp_path, monkeypatch, no_pictures):
    seen = []
    monkeypatch.setattr(Stepper, 'loss', lambda self, x, target: seen.append(told()) or self.task(x, target)['loss'])

    def told():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark

    before = told()
    finetune(settings(image_folder, tmp_path / 'run', epochs=1))
    assert {*seen} == {(True, True)} and told() == before == (False, False)


def test_the_power_of_a_polynomial():
    found = rates(sched='poly', decay_rate=2.0)
    assert found == pytest.approx([0.1 * (1 - epoch / 6) ** 2 for epoch in range(6)])


def test_the_least_rate_is_compared_with_the_one_that_is_used(image_folder, tmp_path, no_pictures):
    options = dict(opt='sgd', lr=5e-4, lr_base=0.1, min_lr=0.001, epochs=1)
    finetune(settings(image_folder, tmp_path / 'run', **options))
    with pytest.raises(ValueError, match=r'^min_lr: got 100, expected at most the learning rate, which is 0\.003'):
        finetune(settings(image_folder, tmp_path / 'one', min_lr=100.0))
    with pytest.raises(ValueError, match=r'min_lr: got 0\.9, expected at most the learning rate, which is 0\.003'):
        finetune(settings(image_folder, tmp_path / 'high', **{**options, 'min_lr': 0.9}))


def test_layer_decay_holds_without_a_schedule():
    options = cfg(sched='none', layer_decay=0.5, lr=0.1)
    optimizer = create_optimizer(options, timm.create_model('test_vitresnet'), 0.1)
    assert create_scheduler(options, optimizer, 5) is None
    found = {group['lr'] for group in optimizer.param_groups}
    assert max(found) == pytest.approx(0.1) and {0.05, 0.025} <= {round(lr, 6) for lr in found}
