"""How a run begins: what is wrong is said first, what is finished stays so, what torchrun restarts goes on."""

import dataclasses
import shutil
from contextlib import ExitStack, nullcontext

import pytest
import torch
from test_loop import rows, settings
from test_runs import assert_same_run, contents, interrupted
from torch.distributed import HashStore

from timm_vitres.training import loop as module
from timm_vitres.training import starting
from timm_vitres.training.creation import add_adapters_
from timm_vitres.training.datasets import load_data
from timm_vitres.training.loop import finetune
from timm_vitres.training.processes import Processes
from timm_vitres.training.report import write_summary
from timm_vitres.training.runs import Record
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.starting import Setup, _check_forward, is_over, is_whole


def history(*top1, **ema):
    found = [dict(epoch=epoch, eval_top1=value, eval_loss=-value) for epoch, value in enumerate(top1)]
    for epoch, value in enumerate(ema.get('ema', ())):
        found[epoch]['ema_top1'] = value
    return found


@pytest.mark.parametrize(
    'options, top1, over',
    [
        (dict(), [], False),
        (dict(), [50.0] * 9, False),
        (dict(), [50.0] * 10, True),
        (dict(early_stopping=2), [], False),
        (dict(early_stopping=2), [50.0, 60.0, 60.0], False),
        (dict(early_stopping=2), [50.0, 60.0, 60.0, 60.0], True),  # as good is no better
        (dict(early_stopping=2), [50.0, 60.0, 55.0, 61.0], False),
        (dict(early_stopping=2, eval_metric='loss'), [50.0, 60.0, 55.0, 59.0], True),
        (dict(early_stopping=1), [50.0, 50.0], True),
    ],
)
def test_when_a_run_is_over(options, top1, over):
    assert is_over(FinetuneCfg(data_dir='x', epochs=10, **options), history(*top1)) == over


def test_averaged_weights_that_are_better_keep_a_run_going():
    cfg = FinetuneCfg(data_dir='x', epochs=10, early_stopping=2)
    assert not is_over(cfg, history(60.0, 50.0, 50.0, ema=[50.0, 50.0, 61.0]))


def test_a_run_is_whole_when_all_that_follows_the_checkpoint_is_there(tmp_path, no_pictures):
    rows = history(50.0, 60.0)
    names = ['model.safetensors', 'config.json', 'held_out.csv']
    for name in names[:2]:
        (tmp_path / name).touch()
    assert not is_whole(tmp_path, rows)
    write_summary(rows[:1], tmp_path)
    assert not is_whole(tmp_path, rows)
    write_summary(rows, tmp_path)
    assert is_whole(tmp_path, rows) and not is_whole(tmp_path, rows, is_over=True)
    (tmp_path / names[2]).touch()
    assert is_whole(tmp_path, rows, is_over=True)
    (tmp_path / names[0]).unlink()
    assert not is_whole(tmp_path, rows)


def test_a_run_stops_early_and_stays_as_it_is(image_folder, tmp_path, monkeypatch, no_pictures):
    """By metrics that are told; with a kill between the last epoch and the report, it is the same."""
    told = [50.0, 60.0, 60.0, 55.0, 90.0]

    def evaluate(*args):
        metrics, answers = original(*args)
        return {**metrics, 'top1': told[min(len(seen), len(told)) - 1]}, answers

    def validate(run, epoch):
        seen.append(epoch)
        return validated(run, epoch)

    original, validated = module.evaluate, module._Run._validate
    monkeypatch.setattr(module, 'evaluate', evaluate)
    monkeypatch.setattr(module._Run, '_validate', validate)
    cfg = settings(image_folder, tmp_path / 'run', epochs=10, early_stopping=2, no_check=True)
    seen = []
    folder = finetune(cfg)
    assert seen == [0, 1, 2, 3] and [row['eval_top1'] for row in rows(folder)] == ['50.0', '60.0', '60.0', '55.0']
    before = contents(folder)
    finetune(dataclasses.replace(cfg, resume=True))
    with pytest.raises(ValueError, match=r'epochs: it ended early, after 4 epochs, by early_stopping=2; give a larger'):
        finetune(dataclasses.replace(cfg, epochs=12, resume=True))
    assert seen == [0, 1, 2, 3] and contents(folder) == before
    with pytest.raises(ValueError, match='early_stopping: got 1, but the run'):
        finetune(dataclasses.replace(cfg, early_stopping=1, resume=True))
    longer = shutil.copytree(folder, tmp_path / 'longer')
    finetune(dataclasses.replace(cfg, output=str(longer), early_stopping=3, resume=True))
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7]

    seen = []
    other = dataclasses.replace(cfg, output=str(tmp_path / 'killed'))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Run, '_write_report', lambda run: exec('raise KeyboardInterrupt'))
        finetune(other)
    assert not (tmp_path / 'killed/held_out.csv').exists()
    killed = finetune(dataclasses.replace(other, resume=True))
    assert seen == [0, 1, 2, 3] and (killed / 'held_out.csv').read_bytes() == (folder / 'held_out.csv').read_bytes()


def test_what_torchrun_starts_again_goes_on(image_folder, tmp_path, monkeypatch, no_pictures):
    cfg = settings(image_folder, tmp_path / 'whole', epochs=2, no_check=True)
    whole = finetune(cfg)
    cfg = dataclasses.replace(cfg, output=str(tmp_path / 'parts'))
    torchruns = Processes(store=HashStore())  # as processes have it that torchrun has started, again or not
    monkeypatch.setattr(module, 'joined', lambda: nullcontext(torchruns))
    interrupted(cfg, monkeypatch, epoch=2)
    with monkeypatch.context() as patch:  # torchrun anew has a store of its own, and the run is another one's
        patch.setattr(module, 'joined', lambda: nullcontext(Processes(store=HashStore())))
        with pytest.raises(ValueError, match='holds a run already'):
            finetune(cfg)
    assert_same_run(finetune(cfg), whole)


def test_a_run_is_recorded_with_what_it_is_made_of(image_folder, tmp_path):
    cfg = settings(image_folder, tmp_path / 'run', img_size=(32, 48), mean=(0.4,), crop_pct=0.9, in_chans=1)
    setup = Setup(Processes())
    with ExitStack() as stack:
        start = setup.begin(cfg, [], stack)
    assert start.state is None and not start.is_finished and start.record.cfg == cfg
    config = start.record.data_config
    assert config['input_size'] == (1, 32, 48) and config['mean'] == (0.4,) and config['crop_pct'] == 0.9
    assert start.record.label_names == ['across', 'down'] and start.record.processes == 1
    assert setup.device == torch.device(Processes().device('')) and setup.model.num_classes == 2
    assert setup.data.val[0][0].mode == 'L'


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(decay_epochs=3.0), 'decay_epochs: got 3.0, which changes nothing beside sched cosine.'),
        (dict(decay_rate=0.5, sched='wsd'), 'decay_rate: got 0.5, which changes nothing beside sched wsd.'),
        (
            dict(color_jitter=0.8, aa='rand-m9-inc1'),
            'color_jitter: got 0.8, which changes nothing beside aa rand-m9-inc1.',
        ),
        (dict(color_jitter=0.8, aa='3a'), None),
        (dict(color_jitter=0.8, aa='rand-m9-t3a'), None),  # timm looks for it anywhere
        (dict(sched='none', warmup_epochs=2.0), 'warmup_epochs: got 2.0, which changes nothing beside sched none.'),
        (dict(sched='constant', min_lr=1e-5), 'min_lr: got 1e-05, which changes nothing beside sched constant.'),
        (dict(in_chans=1, grayscale_prob=0.5), 'grayscale_prob: got 0.5, but only images of 3 channels are made grey.'),
        (dict(grayscale_prob=0.5), None),
        (dict(amp_dtype='float16'), 'amp_dtype: got float16, which changes nothing beside float32, without amp.'),
        (dict(decay_rate=0.5, sched='poly'), None),
        (dict(model='test_vit.r160_in1k'), 'model: of test_vit.r160_in1k only the architecture is taken; --pretrained'),
        (dict(model='vitresnet_mix_nano.untrained'), None),
    ],
)
def test_what_changes_nothing_is_told_of(options, message, image_folder, tmp_path, caplog):
    with ExitStack() as stack:
        Setup(Processes()).begin(settings(image_folder, tmp_path / 'run', **options), [], stack)
    told = [record.message for record in caplog.records if record.levelname == 'WARNING']
    assert any(text.startswith(message) for text in told) if message else not told


class _Past(torch.nn.Module):
    """Attention that takes the weight of its layer, and not the layer."""

    def __init__(self):
        super().__init__()
        self.attn = torch.nn.Module()
        self.attn.qkv = torch.nn.Linear(3, 6)
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.nn.functional.linear(x.mean((2, 3)), self.attn.qkv.weight))

    def get_classifier(self):
        return self.head


def test_adapters_that_would_learn_nothing_are_refused():
    model = _Past()
    add_adapters_(model, 2)
    with pytest.raises(ValueError, match=r'^lora: past computes past attn\.qkv, whose adapters would learn nothing'):
        _check_forward(model, 'past', (3, 8, 8), torch.device('cpu'))
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_a_folder_of_which_no_weights_are_asked_for_is_told_of(image_folder, tmp_path, caplog, no_pictures):
    finetune(settings(image_folder, tmp_path / 'run', epochs=1))
    assert 'only the architecture' not in caplog.text
    cfg = settings(image_folder, tmp_path / 'next', epochs=1, model=f'local-dir:{tmp_path / "run"}')
    for given, count in ((dict(pretrained=True), 0), ({}, 1)):
        with ExitStack() as stack:
            Setup(Processes()).begin(dataclasses.replace(cfg, **given), [], stack)
        assert caplog.text.count('run only the architecture is taken; --pretrained begins with its weights.') == count


def test_a_run_takes_the_images_that_it_is_given(image_folder, tmp_path, no_pictures):
    """Where another run's record says them, whatever the settings say; and it goes on with these."""
    cfg = settings(image_folder, tmp_path / 'run', epochs=1, seed=3, val_frac=0.5)
    images = load_data(dataclasses.replace(cfg, seed=0, val_frac=0.25), 'RGB').record()
    images['train'] = images['train'][2:]
    finetune(cfg, None, images)
    for epochs in (1, 2):
        finetune(dataclasses.replace(cfg, epochs=epochs, resume=True))
        assert Record.read(tmp_path / 'run').data == images and len(rows(tmp_path / 'run')) == epochs


def test_the_images_are_dealt_out_by_the_batches_that_a_run_goes_on_with(image_folder, tmp_path, monkeypatch):
    """A run of two processes goes on in one, which takes twice as many images a step."""
    cfg = settings(image_folder, tmp_path / 'run', batch_size=4)
    record = dataclasses.replace(Setup(Processes()).build(cfg), processes=2)
    seen, load = [], starting.load_data

    def load_data(cfg, *args, **kwargs):
        seen.append(cfg.batch_size)
        return load(cfg, *args, **kwargs)

    monkeypatch.setattr(starting, 'load_data', load_data)
    setup = Setup(Processes())
    setup.build(record.cfg, record)
    assert seen == [8] and setup.cfg.batch_size == 8
