import dataclasses
import json

import pytest
import timm
import torch
from conftest import write_folder
from timm.task import ClassificationTask

import timm_vitres
from timm_vitres.models.arms import ARMS
from timm_vitres.training import plans, runs
from timm_vitres.training.datasets import load_data
from timm_vitres.training.plans import (
    ArmPlan,
    asked_for,
    in_proportion,
    make_plan,
    measure_arms_,
    note_versions,
    parse_arm,
    seen_alike,
    single,
)
from timm_vitres.training.settings import FinetuneCfg

TINY = ('test_vitresnet:depth=1', 'test_vitresnet_mix')


def asked(cfg, models=TINY, seeds=(0,), lrs=(1e-3,), minutes=None):
    return asked_for(cfg, models, seeds, lrs, minutes, 'test', 0.25)


@pytest.fixture
def cfg(image_folder):
    return FinetuneCfg(data_dir=str(image_folder), img_size=32, batch_size=4, workers=0, device='cpu', epochs=5)


@pytest.fixture
def times(monkeypatch):
    """Let the arms have times that no machine has a say in."""

    def measure_(cfg, arms, num_classes):
        for index, arm in enumerate(arms.values()):
            arm.parameters, arm.step_seconds, arm.latency_seconds = 1000, 1.0 + index, 0.01

    monkeypatch.setattr(plans, 'measure_arms_', measure_)


def test_a_comparison_that_is_older_than_a_setting_goes_on(cfg, times, tmp_path):
    make_plan(cfg, asked(cfg), tmp_path)
    path = tmp_path / plans.PLAN_NAME
    content = json.loads(path.read_text())
    del content['asked']['recipe']['no_fused_attn']
    del content['asked']['recipe']['smoothing']
    content['asked']['seeds'] = [0, 1, 2]
    path.write_text(json.dumps(content))
    (tmp_path / plans.REPORT_NAME).write_text('read')
    assert make_plan(cfg, asked(cfg, seeds=(0, 1, 2)), tmp_path).looks == 0
    assert (tmp_path / plans.REPORT_NAME).read_text() == 'read'  # it is of the same seeds
    changed = dataclasses.replace(cfg, no_fused_attn=True)
    with pytest.raises(ValueError, match='no_fused_attn: got True, not False'):
        make_plan(changed, asked(changed, seeds=(0, 1, 2)), tmp_path)


def test_arms_that_begin_with_weights_may_not_know_test_images(cfg, times, tmp_path):
    known = tmp_path / 'known'
    known.mkdir()
    runs.Record(cfg, load_data(cfg, 'RGB').record(), {}).write(known)
    arms = ('resnet18', f'local-dir:{known}')
    begun = dataclasses.replace(cfg, pretrained=True)
    with pytest.raises(ValueError, match='known learnt from 6 of the 6 test images'):
        make_plan(begun, asked(begun, arms), tmp_path)
    assert list(make_plan(cfg, asked(cfg, arms), tmp_path).arms) == list(arms)  # from random weights nothing is known


@pytest.mark.parametrize(
    'text, model, kwargs',
    [
        ('resnet18', 'resnet18', {}),
        ('resnet18.a1_in1k', 'resnet18.a1_in1k', {}),
        ('serial', 'vitresnet_nano', ARMS['serial'].model_kwargs(32)),
        ('resnet', 'vitresnet_mix_nano', ARMS['resnet'].model_kwargs(32)),
        ('vitresnet_nano:depth=3,embed_dim=96', 'vitresnet_nano', dict(depth=3, embed_dim=96)),
        ("vitresnet:layers=(1, 2),backbone='resnet18'", 'vitresnet', dict(layers=(1, 2), backbone='resnet18')),
        (
            'test_vitresnet:global_pool=avg,class_token=False',
            'test_vitresnet',
            dict(global_pool='avg', class_token=False),
        ),
        ('local-dir:a/b', 'local-dir:a/b', {}),  # which is not there
        ('hf-hub:a/b', 'hf-hub:a/b', {}),
    ],
)
def test_arms_and_models(text, model, kwargs):
    assert parse_arm(text, 32) == ArmPlan(model, kwargs)


@pytest.mark.parametrize(
    'text',
    [
        'resnett',
        '',
        'resnet18:3',
        'resnet18:a',
        'resnet18:a=',
        'resnet18:a=f(1)',
        'resnet18:**a',
        'test_vitresnet:a=1)(',
        'resnet18:a=1,a=2',
    ],
)
def test_what_is_no_model_is_named(text):
    with pytest.raises(ValueError, match=r'^models: got .*, expected '):
        parse_arm(text, 32)


def test_names_of_files():
    assert single('a:b=(1, 2)/c') == 'a_b=_1_2_c' and single('resnet18.a1_in1k') == 'resnet18.a1_in1k'


@pytest.mark.parametrize(
    'changes, own, message',
    [
        ({}, dict(models=('vit',)), "models: got 'vit' alone, expected two or more"),
        ({}, dict(models=('vit', 'vit')), 'models: got vit twice'),
        ({}, dict(models=('a:b=1', 'a/b=1')), 'models: got a_b=1 twice'),
        ({}, dict(seeds=(1, 2, 1)), 'seeds: got 1 twice'),
        ({}, dict(lrs=(1e-3, 0.001)), 'lrs: got 0.001 twice'),
        ({}, dict(lrs=(0.001, 0.00100000001)), 'lrs: got 0.001 twice'),
        (dict(min_lr=4e-4), dict(lrs=(1e-3, 3e-4)), 'min_lr: got 0.0004, expected at most the least of lrs'),
        (dict(model='resnet18'), {}, "model: got 'resnet18', but in a comparison"),
        (dict(lr=0.1), {}, 'lr: got 0.1, but in a comparison'),
        (dict(resume=True), {}, 'resume: got True, but in a comparison'),
    ],
)
def test_what_makes_no_comparison_is_named(changes, own, message, cfg):
    with pytest.raises(ValueError, match=f'^{message}'):
        asked(dataclasses.replace(cfg, **changes), **own)


def test_named_arms_see_the_same_images(tmp_path, monkeypatch):
    """Their models differ in size, crop and normalisation."""
    cfg = FinetuneCfg(data_dir='photos')
    assert seen_alike(cfg, ('resnet18', 'levit_128s')) == cfg  # models of timm's keep their own
    found = seen_alike(dataclasses.replace(cfg, mean=(0.4,)), ('resnet18', 'vit'))
    assert (found.img_size, found.crop_pct, found.interpolation) == (64, 1.0, 'bicubic')
    assert found.mean == (0.4,) and found.std == (0.25,)
    assert seen_alike(found, ('vit',)) == found
    loaded = dataclasses.replace(cfg, pretrained=True)
    assert seen_alike(loaded, ('resnet18', 'vit')) == loaded
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'compare').write_text('img_size: 32')  # a file of the user's
    assert seen_alike(cfg, ('resnet18', 'vit')).img_size == 64


def test_a_short_schedule_is_checked_with_the_updates_that_it_has(cfg, times, tmp_path):
    """Of three epochs, by one update each, nothing would be left to decay in."""
    short = dataclasses.replace(cfg, sched='wsd', epochs=10)
    plan = make_plan(short, asked(short), tmp_path)
    assert all(arm.epochs == 10 for arm in plan.arms.values())


def test_schedules_have_the_same_shape_for_fewer_epochs():
    settings = dict(warmup_epochs=2, mixup=0.2, mixup_off_epoch=15, decay_milestones=(5, 10), sched='multistep')
    cfg = FinetuneCfg(data_dir='photos', epochs=20, **settings)
    assert in_proportion(cfg, 20, 20) == cfg
    half = in_proportion(cfg, 10, 20)
    assert (half.warmup_epochs, half.mixup_off_epoch, half.decay_milestones) == (1.0, 8, (2, 5))
    assert in_proportion(dataclasses.replace(cfg, mixup_off_epoch=0), 10, 20).mixup_off_epoch == 0  # that is: never
    assert in_proportion(cfg, 1, 200).decay_milestones == (1,)  # they still rise
    for sched, epochs, expected in (
        *(('step', 3, 1.5), ('step', 1, 0.5), ('step', 0.5, 0.25), ('step', None, 45.0)),
        *(('wsd', 1, 0.05), ('wsd', 4, 2.0), ('wsd', 0.2, 0.2), ('wsd', None, None)),
    ):
        asked_cfg = dataclasses.replace(cfg, sched=sched, decay_epochs=epochs)
        assert in_proportion(asked_cfg, 10, 20).decay_epochs == expected


def test_epochs_are_equal_or_those_that_fit(cfg, times, tmp_path):
    for name, minutes, epochs, short in (('equal', None, [5, 5], 2), ('timed', 0.7, [14, 7], 5)):
        (tmp_path / name).mkdir()
        plan = make_plan(cfg, asked(cfg, minutes=minutes), tmp_path / name)  # 14 images are 3 steps of 1 and 2 seconds
        assert [arm.epochs for arm in plan.arms.values()] == epochs
        assert plan.arms[TINY[0]].search_epochs == short
        assert make_plan(cfg, asked(cfg, minutes=minutes), tmp_path / name) == plan  # as it is read back
    with pytest.raises(ValueError, match=r'^minutes: got 0.07, but an epoch of test_vitresnet_mix takes 0.1 here'):
        make_plan(cfg, asked(cfg, minutes=0.07), tmp_path)


def test_what_says_nothing_in_an_older_plan_is_passed_over(cfg, times, tmp_path):
    make_plan(cfg, asked(cfg), tmp_path)
    path = tmp_path / 'compare.json'
    path.write_text(path.read_text().replace('"mixup_off_epoch": 0', '"mixup_off_epoch": 10'))
    assert make_plan(cfg, asked(cfg), tmp_path).asked['recipe']['mixup_off_epoch'] == 0


def test_a_size_is_the_same_however_it_was_given(cfg, times, tmp_path):
    make_plan(cfg, asked(cfg), tmp_path)
    flag = dataclasses.replace(cfg, img_size=[32])
    assert flag == cfg and make_plan(flag, asked(flag), tmp_path).asked['recipe']['img_size'] == 32
    path = tmp_path / 'compare.json'
    path.write_text(path.read_text().replace('"img_size": 32', '"img_size": [32]'))  # as it was noted once
    assert make_plan(cfg, asked(cfg), tmp_path).asked['recipe']['img_size'] == 32


def test_a_plan_is_kept_but_for_seeds_that_are_added(cfg, times, tmp_path):
    plan = make_plan(cfg, asked(cfg), tmp_path)
    other = dataclasses.replace(cfg, workers=2, output='elsewhere')
    assert make_plan(other, asked(other), tmp_path) == plan
    assert make_plan(cfg, asked(cfg, seeds=(0, 3)), tmp_path).seeds == [0, 3]
    for changes, own, message in (
        ({}, dict(seeds=(0,)), r'seeds: got \[0\], not \[0, 3\]'),
        ({}, dict(seeds=(3, 0, 1)), 'seeds: got'),
        ({}, dict(seeds=(0, 3), lrs=(1e-2,)), r'lrs: got \[0.01\], not \[0.001\]'),
        ({}, dict(seeds=(0, 3), models=TINY[::-1]), 'models: got'),
        ({}, dict(seeds=(0, 3), minutes=2.0), 'minutes: got 2.0, not None; epochs: got None, not 5'),
        (dict(hflip=0.0), dict(seeds=(0, 3)), 'hflip: got 0.0, not 0.5'),
    ):
        changed = dataclasses.replace(cfg, **changes)
        with pytest.raises(ValueError, match=f'^{message}.*The comparison in .* was begun otherwise'):
            make_plan(changed, asked(changed, **own), tmp_path)
    assert make_plan(cfg, asked(cfg, seeds=(0, 3)), tmp_path).images == plan.images


def test_the_least_learning_rate_is_compared_with_the_rates_of_the_comparison(cfg):
    assert asked(dataclasses.replace(cfg, opt='sgd', min_lr=0.005), lrs=(0.03, 0.1))['recipe']['min_lr'] == 0.005


def test_seeds_that_are_added_after_a_verdict_are_noted(cfg, times, tmp_path):
    make_plan(cfg, asked(cfg, seeds=(0,)), tmp_path)
    assert make_plan(cfg, asked(cfg, seeds=(0, 3)), tmp_path).looks == 0
    (tmp_path / 'README.md').write_text('of two seeds, which calls nothing better')
    assert make_plan(cfg, asked(cfg, seeds=(0, 3, 4)), tmp_path).looks == 0
    assert make_plan(cfg, asked(cfg, seeds=(0, 3, 4)), tmp_path).looks == 0
    assert make_plan(cfg, asked(cfg, seeds=(0, 3, 4, 5)), tmp_path).looks == 0  # nothing was said of three
    (tmp_path / 'README.md').write_text('of four seeds')
    assert make_plan(cfg, asked(cfg, seeds=(0, 3, 4, 5, 6)), tmp_path).looks == 1
    assert make_plan(cfg, asked(cfg, seeds=(0, 3, 4, 5, 6, 7)), tmp_path).looks == 1  # killed before its own verdict


def test_other_versions_are_noted_where_they_train(cfg, times, tmp_path, monkeypatch, caplog):
    plan = make_plan(cfg, asked(cfg), tmp_path)
    before = runs.__version__
    monkeypatch.setattr(runs, '__version__', '9.9.9')
    assert make_plan(cfg, asked(cfg), tmp_path) == plan and 'begun with' not in caplog.text
    for _ in range(2):
        plan = make_plan(cfg, asked(cfg), tmp_path)
        note_versions(plan, tmp_path)
        assert plan.versions['timm-vitres'] == f'{before} and 9.9.9'
    assert caplog.text.count(f'The comparison was begun with timm-vitres {before}, and goes on with 9.9.9.') == 1


def test_arms_and_classes_are_those_of_the_folder_where_a_comparison_began(cfg, times, tmp_path, monkeypatch):
    for place in ('here', 'there'):
        timm_vitres.save(timm.create_model('test_vitresnet_mix', num_classes=2), tmp_path / place / 'model')
        (tmp_path / place / 'classes.txt').write_text('across\ndown\n')
    models, mapped = ('local-dir:model', TINY[0]), dataclasses.replace(cfg, class_map='classes.txt')
    monkeypatch.chdir(tmp_path / 'here')
    plan = make_plan(cfg, asked(cfg, models), tmp_path)
    assert plan.arms['local-dir:model'].model == f'local-dir:{tmp_path / "here" / "model"}'
    here = asked(mapped)
    monkeypatch.chdir(tmp_path / 'there')
    assert make_plan(cfg, asked(cfg, models, seeds=(0, 1)), tmp_path).arms == plan.arms
    assert here['recipe']['class_map'] == str(tmp_path / 'here' / 'classes.txt') != asked(mapped)['recipe']['class_map']


def test_an_arm_begins_every_run_with_the_same_weights(cfg, times, tmp_path):
    pretrained = dataclasses.replace(cfg, pretrained=True)
    model = timm_vitres.save(timm.create_model('test_vitresnet_mix', num_classes=2), tmp_path / 'model')
    models = (f'local-dir:{model}', TINY[0])
    arm = make_plan(cfg, asked(cfg, models), tmp_path).arms[models[0]]
    assert arm.sha256 == ''  # of random weights
    arm.note_weights_('arm')
    first = arm.sha256
    arm.note_weights_('arm')
    timm_vitres.save(timm.create_model('test_vitresnet_mix', num_classes=2), model)
    with pytest.raises(ValueError, match='models: arm has other weights than when the comparison began'):
        arm.note_weights_('arm')
    assert arm.sha256 == first
    (tmp_path / 'other').mkdir()
    plan = make_plan(pretrained, asked(pretrained, models), tmp_path / 'other')
    told = json.loads((model / 'config.json').read_text())['model_sha256']
    assert plan.arms[models[0]].sha256 == told and plan.arms[TINY[0]].sha256 == ''


def test_a_loss_that_the_numbers_of_images_forbid_is_refused_before_all_else(tmp_path, times):
    write_folder(tmp_path / 'images', per_class=120, size=8)
    for path in sorted((tmp_path / 'images' / 'down').iterdir())[4:]:
        path.unlink()
    cfg = FinetuneCfg(data_dir=str(tmp_path / 'images'), img_size=32, balance_classes=True, smoothing=0.1, device='cpu')
    for changes, message in ((dict(), 'smoothing: got 0.1'), (dict(mixup=0.2), 'balance_classes: needs')):
        with pytest.raises(ValueError, match=f'^{message}'):
            make_plan(dataclasses.replace(cfg, **changes), asked(cfg), tmp_path)
    assert not (tmp_path / 'compare.json').exists()


def test_times_that_whole_epochs_make_unequal_are_told_of(cfg, times, tmp_path, caplog):
    (tmp_path / 'even').mkdir()
    assert make_plan(cfg, asked(cfg, minutes=0.2), tmp_path / 'even').batches == 3  # epochs of 3 and 6 seconds: 4 and 2
    assert 'minutes: ' not in caplog.text
    make_plan(cfg, asked(cfg, minutes=0.14), tmp_path)  # 3 and 1
    told = [record.getMessage() for record in caplog.records if 'minutes: ' in record.getMessage()]
    assert told == [f'minutes: {TINY[1]} gets 0.1, since epochs are whole; give more for equal times.']


@pytest.mark.parametrize('text', ['', '[]', '{"arms": {}}', '{"arms": 3}'])
def test_what_is_no_plan_is_named(text, cfg, tmp_path):
    (tmp_path / 'compare.json').write_text(text)
    with pytest.raises(ValueError, match=r'^output: .*compare\.json is not the plan of a comparison'):
        make_plan(cfg, asked(cfg), tmp_path)


def test_arms_are_measured_by_steps_of_training(cfg, monkeypatch):
    monkeypatch.setattr(plans, 'SECONDS', 0.01)
    seen = {}

    def measure(functions, x, rounds, seconds):
        for function in functions.values():
            function(x)
        seen[len(seen)] = rounds
        return dict.fromkeys(functions, 1.0 + len(seen))

    monkeypatch.setattr(plans, 'measure', measure)
    arms = {name: parse_arm(name, 32) for name in (*TINY, 'vit')}
    cfg = dataclasses.replace(cfg, balance_classes=True, clip_grad=1.0, channels_last=True)
    measure_arms_(cfg, arms, 2)
    for arm in arms.values():
        model = timm.create_model(arm.model, num_classes=2, img_size=32, device='meta', **arm.model_kwargs)
        assert arm.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert (arm.step_seconds, arm.latency_seconds) == (2.0, 3.0)
    facts = dict(parameters=str(arms['vit'].parameters), step_ms='2000', latency_ms='3000')
    assert arms['vit'].facts() == facts


def test_a_measured_step_is_that_of_a_run(cfg, monkeypatch):
    """Of a step of many batches each costs its part, and averaging the weights costs what it does."""
    done = []
    backward, update = plans.Stepper.backward, ClassificationTask.update_ema

    def measure(functions, x, rounds, seconds):
        done.clear()
        next(iter(functions.values()))(x)
        expected.append(list(done))
        return dict.fromkeys(functions, 1.0)

    expected = []
    monkeypatch.setattr(plans, 'measure', measure)
    monkeypatch.setattr(plans.Stepper, 'backward', lambda *args: done.append(args[2:]) or backward(*args))
    monkeypatch.setattr(ClassificationTask, 'update_ema', lambda *args, **kw: done.append(kw) or update(*args, **kw))
    arms = {'vit': parse_arm('vit', 32)}
    measure_arms_(dataclasses.replace(cfg, grad_accum_steps=2, model_ema=True), arms, 2)
    assert arms['vit'].step_seconds == 0.5 and arms['vit'].latency_seconds == 1.0
    assert expected == [[(2, False), (2, True), dict(step=1)], []]


@pytest.mark.parametrize('fused', [True, False])
def test_arms_are_measured_by_the_attention_that_they_train_with(cfg, fused, monkeypatch):
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def kernel(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', kernel)
    monkeypatch.setattr(plans, 'SECONDS', 0.01)
    measure_arms_(dataclasses.replace(cfg, no_fused_attn=not fused), {'vit': parse_arm('vit', 32)}, 2)
    assert set(calls) == ({True, False} if fused else set())


def test_an_arm_that_can_not_be_trained_is_named(cfg):
    with pytest.raises(ValueError, match=r'^models: vitresnet_nano:depth=0 can not be trained here: .'):
        measure_arms_(cfg, {'vitresnet_nano:depth=0': parse_arm('vitresnet_nano:depth=-1', 32)}, 2)
