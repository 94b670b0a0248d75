import dataclasses
import math
from pathlib import Path
from typing import Tuple

import numpy as np
import pytest

from timm_vitres import cli
from timm_vitres.training.settings import KINDS, FinetuneCfg, kind_of

FIELDS = dataclasses.fields(FinetuneCfg)
NUMBERS = [field for field in FIELDS if kind_of(field.name) in (int, float)]


def test_every_number_has_limits():
    assert len(NUMBERS) > 25
    for field in NUMBERS:
        assert {'low', 'above'} & field.metadata.keys(), field.name
        assert kind_of(field.name) is float or 'high' in field.metadata or field.name == 'in_chans', field.name


@pytest.mark.parametrize('field', NUMBERS, ids=lambda field: field.name)
def test_no_number_is_out_of_its_limits_or_no_number(field, capsys):
    """From Python, and as a flag, which ends in one sentence that names the setting."""
    limits, kind = field.metadata, kind_of(field.name)
    bad = [limits['low'] - 1 if 'low' in limits else limits['above']]
    bad += [limits[key] + step for key, step in (('high', 1), ('below', 0)) if key in limits]
    count = max(limits['lengths']) if 'lengths' in limits else 1 if KINDS[field.name] == (Tuple[int, ...],) else None
    for value in [*bad, *([math.nan, math.inf, -math.inf] if kind is float else [])]:
        given = (value,) * count if count else value
        with pytest.raises(ValueError, match=f'^{field.name}: got .*, expected a (finite|whole) number'):
            FinetuneCfg('images', **{field.name: given})
        flag, numbers = '--' + field.name.replace('_', '-'), [str(value)] * (count or 1)
        if not numbers[0].startswith('-i'):  # which argparse takes for a flag
            assert cli.main(['finetune', 'images', flag, *numbers]) == 1
            error = capsys.readouterr().err
            assert error.startswith(f'timm-vitres: {field.name}: got') and error.count('\n') == 1
    for value in ('1', True, 1j, object()):
        with pytest.raises(TypeError, match=f'^{field.name}: got '):
            FinetuneCfg('images', **{field.name: value})
    if kind is int:
        with pytest.raises(TypeError, match='expected a whole number'):
            FinetuneCfg('images', **{field.name: (1.5,) * count if count else 1.5})


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(decay_rate=2.0), 'decay_rate: got 2, expected at most 1, but of sched poly'),
        (dict(freeze_epochs=2), 'freeze_epochs: got 2, which says nothing without freeze; give both'),
        (dict(kd_temperature=2.0), 'kd_temperature: got 2.0, which says nothing without kd_model_name'),
        (
            dict(mixup_off_epoch=2),
            'mixup_off_epoch: got 2, which says nothing without mixup or cutmix or cutmix_minmax',
        ),
        (dict(decay_milestones=(2, 1)), r'decay_milestones: got \(2, 1\), expected epochs that rise'),
        (dict(cutmix_minmax=(0.9, 0.1)), 'cutmix_minmax: got .* the smaller number first'),
        (dict(cutmix_minmax=(0.1, 0.9), batch_size=3), 'batch_size: got 3'),
        (dict(scale=(1.0, 0.5)), 'scale: got .* the smaller number first'),
        (dict(ratio=(1.0, 0.5)), 'ratio: got .* the smaller number first'),
        (dict(scale=(0.1, 0.5, 1.0)), r'scale: got \(0.1, 0.5, 1.0\), expected 2 numbers'),
        (dict(img_size=(32, 32, 32)), r'img_size: got \(32, 32, 32\), expected 1 or 2 numbers'),
        (dict(mean=(0.5, 0.5)), 'mean: got .* expected 1, 3 or 4 numbers'),
        (dict(sched='plateau'), "sched: got 'plateau', expected one of cosine, tanh"),
        (dict(interpolation='random'), "interpolation: got 'random', expected one of bilinear"),
        (dict(amp_dtype='float64'), "amp_dtype: got 'float64', expected one of bfloat16, float16"),
        (dict(eval_metric='f1'), 'eval_metric'),
        (dict(head_loss='all'), 'head_loss'),
        (dict(model=None), 'model: got None, expected text'),
        (dict(output=''), 'output: got'),
        (dict(output='a\0b'), 'output: got .* a zero byte'),
        (dict(resume=''), 'resume: got'),
        (dict(amp='yes'), "amp: got 'yes', expected True or False"),
        (dict(pretrained=1), 'pretrained: got 1, expected True or False'),
        (dict(model_kwargs=[1]), 'model_kwargs: got .* expected a dict'),
        (dict(model_kwargs={'norm_layer': print}), 'model_kwargs: norm_layer: got .* a run can not record'),
        (dict(model_kwargs={'drop': math.nan}), 'model_kwargs: drop: got nan'),
        (dict(model_kwargs={1: 2}), 'model_kwargs'),
        (dict(data_dir=b'images'), 'data_dir: got'),
        (dict(no_aug=True, aa='rand-m9'), "aa: got 'rand-m9', which no_aug leaves out"),
        (dict(no_aug=True, reprob=0.5), 'reprob: got 0.5, which no_aug leaves out'),
        (dict(kd_model_name='resnet18', task_loss_weight=5.0), 'task_loss_weight: got 5 alone, expected at most 1'),
    ],
)
def test_what_no_run_can_have_is_named(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        FinetuneCfg(**{'data_dir': 'images', **kwargs})


def test_numpys_numbers_paths_and_lists_become_plain_values():
    cfg = FinetuneCfg(
        Path('images'),
        lr=np.float64(0.25),
        epochs=np.int32(3),
        amp=np.bool_(True),
        mean=np.array([0.5, 0.25, 0.5]),
        img_size=[32, 48],
        drop=0,
        model_kwargs=dict(channels=[1, np.int64(2)]),
    )
    assert cfg == FinetuneCfg(
        'images',
        lr=0.25,
        epochs=3,
        amp=True,
        mean=(0.5, 0.25, 0.5),
        img_size=(32, 48),
        drop=0.0,
        model_kwargs=dict(channels=(1, 2)),
    )
    plain = (str, float, int, bool, float, int, float, int)
    values = (cfg.data_dir, cfg.lr, cfg.epochs, cfg.amp, cfg.mean[0], cfg.img_size[0], cfg.drop)
    assert all(type(value) is kind for value, kind in zip(values, plain))


@pytest.mark.parametrize(
    'flags, status, message',
    [
        (['--model-kwargs', 'foo'], 2, "argument --model-kwargs: got 'foo', expected name=value"),
        (['--model-kwargs', '=1'], 2, "argument --model-kwargs: got '=1', expected name=value"),
        (['--sched', 'plateau'], 2, 'argument --sched: invalid choice'),
        (['--opt', 'foo'], 1, "opt: timm has no optimizer 'foo'"),
        (['--opt', 'adahessian'], 1, "opt: 'adahessian' needs second derivatives"),
        (['--device', 'foo'], 1, "device: got 'foo', which can not be used here"),
        (['--device', 'meta'], 1, "device: got 'meta', which can not be used here"),
        (['--device', 'cuda:99'], 1, "device: got 'cuda:99', which can not be used here"),
        (['--aa', 'foo'], 1, "aa: got 'foo', expected a policy of timm"),
        (
            ['--mean', '0.5', '0.5', '0.5', '0.5'],
            1,
            'mean: got (0.5, 0.5, 0.5, 0.5), expected one number, or one for each',
        ),
        (['--model-kwargs', 'num_classes=3'], 1, 'model_kwargs: num_classes is not for a run to choose'),
        (['--model-kwargs', 'foo=3'], 1, "model_kwargs: test_vitresnet can not be made with {'foo': 3}"),
        (['--sched', 'wsd', '--epochs', '1'], 1, "sched: 'wsd' can not be used for 1 epochs"),
        (['--data-dir', 'other'], 1, 'data_dir: got'),
    ],
)
def test_flags_that_only_timm_and_torch_can_judge(flags, status, message, image_folder, tmp_path, capsys):
    arguments = [str(image_folder), '--model', 'test_vitresnet', '--img-size', '32', '--output', str(tmp_path / 'run')]
    try:
        found = cli.main(['finetune', *arguments, '-j', '0', *flags])
    except SystemExit as stop:  # argparse's own
        found = stop.code
    error = capsys.readouterr().err.splitlines()[-1]
    assert found == status and error.startswith('timm-vitres') and message in error
    assert not (tmp_path / 'run').exists()


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(['finetune', '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert 'learning rate (default: 0.0005)' in text and 'range of area (default: (0.35, 1.0))' in text
    assert 'SUPPRESS' not in text and 'images a step in validation; batch_size' in text
