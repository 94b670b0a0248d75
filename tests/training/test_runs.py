"""A run's folder on bad days: what it records, how it goes on, what it never overwrites."""

import dataclasses
import json
import os
import shutil
import threading

import pytest
import timm
import torch
from conftest import write_folder
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from test_loop import rows, settings

import timm_vitres
from timm_vitres import cli
from timm_vitres.publishing import hub
from timm_vitres.publishing.model_folder import locked
from timm_vitres.training import held_out, optimisation, starting
from timm_vitres.training import loop as module
from timm_vitres.training.loop import finetune
from timm_vitres.training.runs import Record
from timm_vitres.training.settings import FinetuneCfg


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.fixture
def images(tmp_path):
    return write_folder(tmp_path / 'images', per_class=6)


def small(data_dir, output, **kwargs) -> FinetuneCfg:
    return settings(data_dir, output, **{'batch_size': 4, 'epochs': 3, 'no_check': True, **kwargs})


def kill_at(monkeypatch, name: str, call: int, owner=module, error=Killed):
    """Let the `call`-th call (from 1) of a function raise an error instead, and all others do what they do."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def interrupted(cfg, monkeypatch, epoch: int) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, '_validate', epoch, owner=module._Run)
        finetune(cfg)


def assert_same_run(one, other) -> None:
    states = [torch.load(folder / 'last.pth.tar', weights_only=True) for folder in (one, other)]
    for ours, theirs in zip(*(state['optimizer']['state'].values() for state in states)):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if torch.is_tensor(ours[key]))
    for name in ('state_dict', 'state_dict_ema'):
        ours, theirs = (state.get(name, {}) for state in states)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name in ('held_out.csv', 'held_out.txt'):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert [{**row, 'seconds': 0} for row in rows(one)] == [{**row, 'seconds': 0} for row in rows(other)]
    assert (one / 'model.safetensors').read_bytes() == (other / 'model.safetensors').read_bytes()


EVERYTHING = dict(aa='rand-m9-mstd0.5-inc1', reprob=0.5, mixup=0.4, cutmix=0.4, drop=0.2, drop_path=0.2, vflip=0.5)


AVERAGED = dict(model_ema=True, model_ema_decay=0.9, model_ema_warmup=True, grad_accum_steps=2, tta='flip', mixup=0.4)
AVERAGED.update(mixup_off_epoch=2, checkpoint_hist=2, bce_loss=True)


@pytest.mark.parametrize(
    'options, workers, then',
    [
        ({}, 0, 0),
        ({}, 2, 2),
        (EVERYTHING, 2, 0),
        (dict(amp=True, amp_dtype='float16', opt='sgd'), 0, 2),
        (AVERAGED, 0, 0),
        (dict(freeze='vit', freeze_epochs=1, early_stopping=3, model='test_vitresnet_dual'), 0, 0),
        (dict(lora=2, model_ema=True, model_ema_decay=0.5, aug_repeats=2, sched='none'), 0, 0),
    ],
    ids=['default-0', 'default-2', 'everything-2-0', 'float16-0-2', 'averaged', 'frozen', 'adapters'],
)
def test_a_resumed_run_is_the_unbroken_one_with_any_number_of_workers(
    options, workers, then, images, tmp_path, monkeypatch, no_pictures
):
    whole = finetune(small(images, tmp_path / 'whole', workers=workers, **options))
    cfg = small(images, tmp_path / 'parts', workers=workers, **options)
    interrupted(cfg, monkeypatch, epoch=2)  # the epoch is trained again from its beginning
    assert len(rows(tmp_path / 'parts')) == 1
    parts = finetune(dataclasses.replace(cfg, workers=then, resume=True), given=['workers'])
    assert_same_run(parts, whole)


def test_the_record_is_there_before_the_first_step(images, tmp_path, monkeypatch, no_pictures):
    cfg = small(images, tmp_path / 'run', pretrained=False, model_kwargs=dict(depth=2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 'random_seed', 1, error=KeyboardInterrupt)
        finetune(cfg)
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['run.json']
    record = json.loads((tmp_path / 'run' / 'run.json').read_text())
    names = {field.name for field in dataclasses.fields(FinetuneCfg)} - {'output', 'resume'}
    assert record['settings'].keys() == names
    assert record['settings']['model_kwargs'] == {'depth': 2} and record['settings']['lr'] == 3e-3
    assert record['versions']['torch'] == torch.__version__
    listed = {tuple(row) for part in ('train', 'validation') for row in record['data'][part]}
    there = {
        (f'{folder}/{path.name}', folder, path.stat().st_size)
        for folder in ('across', 'down')
        for path in (images / folder).iterdir()
    }
    assert listed == there and len(record['data']['validation']) == 4
    # and goes on from nothing but this, which another failure leaves there
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='busy'):
        kill_at(patch, '_validate', 1, owner=module._Run, error=RuntimeError('the GPU is busy'))
        finetune(FinetuneCfg(resume=str(tmp_path / 'run')))
    assert json.loads((tmp_path / 'run' / 'run.json').read_text())['id'] == record['id']
    folder = finetune(FinetuneCfg(resume=str(tmp_path / 'run')))
    assert_same_run(folder, finetune(dataclasses.replace(cfg, output=str(tmp_path / 'whole'))))


@pytest.mark.parametrize(
    'error',
    [
        pytest.param(Killed, id='killed'),
        pytest.param(OSError('No space left on device'), id='full', marks=pytest.mark.slow),
    ],
)
def test_a_failure_at_any_write_loses_nothing(error, images, tmp_path, monkeypatch, no_pictures):
    """Whatever rename fails, the folder loads as one of the models that it had, and the run ends as if unbroken."""
    cfg = small(images, tmp_path / 'whole', no_aug=True, epochs=2)
    good = []
    with monkeypatch.context() as patch:
        calls = kill_at(patch, 'replace', 0, owner=os)
        save = module.save

        def saved(model, *args):
            good.append({key: value.clone() for key, value in model.state_dict().items()})
            return save(model, *args)

        patch.setattr(module, 'save', saved)
        whole = finetune(cfg)
    assert len(calls) >= 5 and good
    failures = 0
    for call in range(1, len(calls) + 1):
        folder = tmp_path / f'run{call}'
        broken = dataclasses.replace(cfg, output=str(folder))
        with monkeypatch.context() as patch:
            kill_at(patch, 'replace', call, owner=os, error=error)
            try:
                finetune(broken)
            except (Killed, OSError):
                failures += 1
        if (folder / 'config.json').exists() and (folder / 'model.safetensors').exists():
            found = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
            assert any(all(torch.equal(found[key], one[key]) for key in found) for one in good)
        finetune(dataclasses.replace(broken, resume=(folder / 'run.json').exists()))
        assert_same_run(folder, whole)
        shutil.rmtree(folder)
    assert failures >= 5  # what is only remembered, to be faster next time, may fail without a word


@pytest.fixture
def finished(images, tmp_path, no_pictures):
    return finetune(small(images, tmp_path / 'run', epochs=1, workers=0))


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize(
    'change, message',
    [
        (
            dict(seed=1),
            r'seed: got 1, but the run in .*run was started with 42.* only epochs and early_stopping \(upward\)',
        ),
        (dict(val_frac=0.4), r'val_frac: got 0.4, .* with 0.25'),
        (dict(lr=1e-3, weight_decay=0.0), r'lr: got 0.001, .* with 0.003; weight_decay: got 0.0, .* with 0.05'),
        (dict(img_size=(32, 48)), r'img_size: got \(32, 48\), .* with 32'),
        (dict(hflip=0.0), 'hflip'),
        (dict(batch_size=2), 'batch_size: got 2'),
    ],
)
def test_what_contradicts_the_record_is_refused_by_name(change, message, images, finished):
    before = contents(finished)
    with pytest.raises(ValueError, match=message):
        finetune(small(images, finished, **{'epochs': 2, 'resume': True, **change}))
    assert contents(finished) == before


def test_flags_that_contradict_are_refused_even_if_they_are_the_default(images, finished, capsys):
    assert cli.main(['finetune', '--resume', str(finished), '--lr', '5e-4', '--epochs', '1']) == 1
    assert 'lr: got 0.0005, but the run in' in capsys.readouterr().err
    assert cli.main(['finetune', '--resume', str(finished), '--epochs', '3']) == 0
    assert len(rows(finished)) == 3
    assert cli.main(['finetune', '--resume', str(finished), '--epochs', '2']) == 1
    assert 'epochs: got 2, but the run in' in capsys.readouterr().err


def test_a_few_settings_can_be_changed_knowingly_and_are_recorded(images, finished):
    moved = images.rename(images.with_name('moved'))
    changes = dict(epochs=2, workers=1, device='cpu', validation_batch_size=3)
    finetune(small(moved, finished, resume=True, **changes))
    record = json.loads((finished / 'run.json').read_text())
    assert {name: record['settings'][name] for name in changes} == changes
    assert record['settings']['data_dir'] == str(moved)
    assert len(rows(finished)) == 2


def test_validation_images_are_those_of_the_beginning(images, tmp_path, monkeypatch, no_pictures, caplog):
    cfg = small(images, tmp_path / 'run')
    interrupted(cfg, monkeypatch, epoch=2)
    before = Record.read(tmp_path / 'run').data
    shutil.copy(images / 'down' / '0.png', images / 'down' / '00.png')  # which would shift the split
    seen = []
    with monkeypatch.context() as patch, caplog.at_level('WARNING'):
        create = module.create_loaders
        patch.setattr(module, 'create_loaders', lambda *args: seen.append(args[1]) or create(*args))
        finetune(dataclasses.replace(cfg, resume=True))
    assert seen[0].record() == before and '00.png' in caplog.text
    for change in ('changed', 'gone'):
        name = before['validation'][0][0]
        (images / name).write_bytes(b'x') if change == 'changed' else (images / name).unlink()
        with pytest.raises(ValueError, match=name):
            finetune(dataclasses.replace(cfg, epochs=4, resume=True))


def test_a_finished_run_says_so_and_stays_as_it_is(finished, capsys):
    before = contents(finished)
    assert cli.main(['finetune', '--resume', str(finished)]) == 0
    assert 'is finished' in capsys.readouterr().out
    assert contents(finished) == before


def test_there_must_be_a_run_to_resume(images, tmp_path, finished):
    with pytest.raises(
        FileNotFoundError, match=r'resume: .*mistyped has no run.json, so there is no run to go on with'
    ):
        finetune(small(images, tmp_path / 'mistyped', resume=True))
    assert not (tmp_path / 'mistyped').exists()
    with pytest.raises(ValueError, match=r'output: got .*other, but the run in .*run goes on there'):
        finetune(small(images, tmp_path / 'other', epochs=1, resume=str(finished)))
    (finished / 'last.pth.tar').unlink()
    before = contents(finished)
    with pytest.raises(FileNotFoundError, match=r'holds a model, but no last.pth.tar'):
        finetune(FinetuneCfg(resume=str(finished)))
    assert contents(finished) == before


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda text: text[: len(text) // 2], 'is not the record of a run'),
        (lambda text: '', 'is not the record of a run'),
        (lambda text: '[1]', 'is not the record of a run'),
        (lambda text: text.replace('"lr": 0.003', '"lr": 0.001'), 'was changed after the run wrote it'),
    ],
)
def test_a_record_that_is_cut_or_edited_is_refused(spoil, message, finished):
    path = finished / 'run.json'
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match=rf'resume: .*run.json {message}'):
        finetune(FinetuneCfg(resume=str(finished)))


def test_the_card_is_rendered_from_the_record(images, tmp_path, monkeypatch, no_pictures):
    cfg = small(images, tmp_path / 'run', epochs=2, weight_decay=0.25)
    interrupted(cfg, monkeypatch, epoch=1)
    folder = finetune(FinetuneCfg(resume=str(tmp_path / 'run')))
    card = (folder / 'README.md').read_text()
    assert 'epochs=2, batch_size=4, opt=adamw, lr=0.003, weight_decay=0.25' in card and 'images of 2 classes' in card


def test_nothing_of_the_users_is_overwritten(images, tmp_path, no_pictures):
    model = hub.save(timm.create_model('test_vitresnet', num_classes=2), tmp_path / 'model')
    notes = tmp_path / 'notes'
    notes.mkdir()
    (notes / 'README.md').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'link').symlink_to(images)
    before = {folder: contents(folder) for folder in (model, notes)}
    for output, options, message in [
        (notes, {}, r'notes is not empty \(it holds README.md\)'),
        (model, {}, 'model is not empty'),
        (model, dict(model=f'local-dir:{tmp_path}/./model', pretrained=True), 'holds the model that the run starts'),
        (tmp_path, {}, 'is not empty'),
        (images, {}, 'lies in the data folder'),
        (images / 'run', {}, 'lies in the data folder'),
        (tmp_path / 'link' / 'run', {}, 'lies in the data folder'),
        (tmp_path / 'file', {}, 'is no folder'),
        (tmp_path / 'file' / 'run', {}, 'is no folder'),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            finetune(small(images, output, **options))
    assert {folder: contents(folder) for folder in (model, notes)} == before
    assert (tmp_path / 'file').read_text() == 'mine'
    assert sorted(path.name for path in images.iterdir()) == ['across', 'down']


def test_a_folder_that_can_not_be_written_to_is_found_before_training(images, tmp_path, monkeypatch):
    from timm_vitres.training import runs

    def refuse(**kwargs):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(runs.tempfile, 'TemporaryFile', refuse)
    monkeypatch.setattr(starting, 'load_data', lambda *args, **kwargs: pytest.fail('the images were read first'))
    with pytest.raises(OSError, match=r'output: .*run can not be written to \(Read-only file system\)'):
        finetune(small(images, tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_mistake_leaves_no_folder_behind(images, tmp_path):
    with pytest.raises(TypeError, match=r"model_kwargs: test_vitresnet can not be made with {'depths': 3}"):
        finetune(small(images, tmp_path / 'run', model_kwargs=dict(depths=3)))
    assert not (tmp_path / 'run').exists()


def test_a_run_has_its_folder_alone(images, finished, tmp_path):
    for folder, resume in ((finished, True), (tmp_path / 'new', None)):
        held, done = threading.Event(), threading.Event()

        def hold(folder=folder, held=held, done=done):
            with locked(folder):
                held.set()
                done.wait(60)

        other = threading.Thread(target=hold)
        other.start()
        try:
            assert held.wait(60)
            with pytest.raises(OSError, match='is being written by another process'):
                finetune(small(images, folder, epochs=2, resume=resume))
        finally:
            done.set()
            other.join()
    assert len(rows(finetune(small(images, finished, epochs=2, resume=True)))) == 2


def test_a_run_that_goes_on_needs_its_first_weights_no_more(images, tmp_path, monkeypatch, no_pictures):
    source = hub.save(timm.create_model('test_vitresnet', num_classes=5), tmp_path / 'source')
    cfg = small(images, tmp_path / 'whole', model=f'local-dir:{source}', pretrained=True)
    whole = finetune(cfg)
    cfg = dataclasses.replace(cfg, output=str(tmp_path / 'parts'))
    interrupted(cfg, monkeypatch, epoch=2)
    (source / 'model.safetensors').unlink()
    assert_same_run(finetune(dataclasses.replace(cfg, resume=True)), whole)


@pytest.mark.parametrize('name, value', [('crop_pct', 0.0001), ('std', [0.0, 0.0, 0.0]), ('mean', [2, 0, 0])])
def test_what_a_model_says_of_its_images_is_checked_as_a_setting_is(name, value, images, tmp_path):
    source = hub.save(timm.create_model('test_vitresnet', num_classes=5), tmp_path / 'source')
    config = json.loads((source / 'config.json').read_text())
    config['pretrained_cfg'][name] = value
    (source / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f'{name}: got'):
        finetune(small(images, tmp_path / 'run', model=f'local-dir:{source}'))


@pytest.mark.parametrize('spoilt', ['weights', 'statistics', 'metrics'])
def test_a_run_that_diverges_keeps_its_last_good_epoch(spoilt, images, tmp_path, monkeypatch, no_pictures):
    """What is not finite in the second epoch ends the run; the first epoch's model and checkpoint stay."""
    cfg = small(images, tmp_path / 'run', model='vitresnet_nano')
    interrupted(cfg, monkeypatch, epoch=2)
    before = {name: value for name, value in contents(tmp_path / 'run').items() if name != 'run.json'}
    if spoilt == 'metrics':
        monkeypatch.setattr(module, 'evaluate', lambda *args: (dict(loss=0.1, top1=float('nan')), None))
    else:
        step = module._Run._step

        def spoil(run, *args):
            loss = step(run, *args)
            tensors = run.model.parameters() if spoilt == 'weights' else run.model.buffers()
            next(tensor for tensor in tensors if tensor.is_floating_point()).data.view(-1)[-1] = float('nan')
            return loss

        monkeypatch.setattr(module._Run, '_step', spoil)
    what = 'the top1 on the validation images became nan' if spoilt == 'metrics' else 'the weights became infinite'
    with pytest.raises(ValueError, match=rf'lr: {what}.* in epoch 1; .* keeps the model of epoch 0'):
        finetune(dataclasses.replace(cfg, resume=True))
    after = {name: value for name, value in contents(tmp_path / 'run').items() if name != 'run.json'}
    assert after == before
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_a_learning_rate_out_of_this_world_is_no_success(images, tmp_path, capsys):
    flags = ['--model', 'test_vitresnet', '--img-size', '32', '-b', '4', '-j', '0', '--epochs', '2', '--lr', '1e30']
    assert cli.main(['finetune', str(images), *flags, '--output', str(tmp_path / 'run')]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('timm-vitres: lr: the ') and 'Traceback' not in error
    assert not (tmp_path / 'run').exists()  # so that the same command with a lower lr begins


def test_steps_that_float16_skips_are_no_divergence(images, tmp_path, monkeypatch, no_pictures):
    class Huge(optimisation.NativeScaler):
        def __init__(self, device):
            self._scaler = torch.amp.GradScaler(device, init_scale=2.0**40)

    monkeypatch.setattr(optimisation, 'NativeScaler', Huge)
    folder = finetune(small(images, tmp_path / 'run', amp=True, amp_dtype='float16', epochs=2))
    scale = torch.load(folder / 'last.pth.tar', weights_only=True)['scaler']['scale']
    assert scale < 2.0**40  # some steps were skipped


@pytest.mark.parametrize('picture', ['plot_confusion', 'plot_images'])
def test_a_report_that_could_not_be_drawn_is_drawn_later(picture, images, tmp_path, monkeypatch):
    cfg = small(images, tmp_path / 'run', epochs=1, lr=1e-6)
    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left'):
        kill_at(patch, picture, 1, owner=held_out, error=OSError('No space left on device'))
        finetune(cfg)
    before = contents(tmp_path / 'run')
    assert 'held_out.csv' not in before and 'model.safetensors' in before
    folder = finetune(dataclasses.replace(cfg, resume=True))
    after = contents(folder)
    assert {'held_out.csv', 'held_out.txt', 'confusion.png', 'mistakes.png'} <= after.keys()
    assert all(after[name] == before[name] for name in before if name not in ('run.json', 'confusion.png'))


@pytest.mark.slow
def test_a_compiled_run_is_the_run_and_goes_on(images, tmp_path, monkeypatch, no_pictures):
    cfg = small(images, tmp_path / 'plain', no_aug=True, model_ema=True, model_ema_decay=0.5)
    plain = finetune(cfg)
    cfg = dataclasses.replace(cfg, output=str(tmp_path / 'whole'), torchcompile='aot_eager')
    whole = finetune(cfg)
    for name in ('state_dict', 'state_dict_ema'):
        ours, theirs = (torch.load(run / 'last.pth.tar', weights_only=True)[name] for run in (whole, plain))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)
    cfg = dataclasses.replace(cfg, output=str(tmp_path / 'parts'))
    interrupted(cfg, monkeypatch, epoch=2)
    assert_same_run(finetune(dataclasses.replace(cfg, resume=True)), whole)


def test_the_report_is_of_the_model_beside_it(images, tmp_path, monkeypatch, no_pictures):
    """A finished run gets more epochs, and is killed before it reports on its new best model."""
    cfg = small(images, tmp_path / 'run', epochs=1, eval_metric='loss')
    folder = finetune(cfg)
    longer = dataclasses.replace(cfg, epochs=4, resume=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 'write_report', 1)
        finetune(longer)
    losses = [float(row['eval_loss']) for row in rows(folder)]
    assert len(losses) == 4 and min(losses) < losses[0] and not (folder / 'held_out.csv').exists()
    finetune(longer)
    best = losses.index(min(losses))
    assert f'epoch {best}' in (folder / 'held_out.txt').read_text()


def test_what_a_run_began_with_is_found_from_any_folder(images, tmp_path, monkeypatch, no_pictures):
    """Another folder has another teacher of that name."""
    for place, seed in (('here', 0), ('there', 1)):
        torch.manual_seed(seed)
        model = timm.create_model('resnet10t', num_classes=2)
        timm_vitres.save(model, tmp_path / place / 'teacher', label_names=['across', 'down'])
    monkeypatch.chdir(tmp_path / 'here')
    folder = finetune(small(images, 'run', epochs=1, kd_model_name='local-dir:teacher')).resolve()
    monkeypatch.chdir(tmp_path / 'there')
    assert Record.read(folder).cfg.kd_model_name == f'local-dir:{tmp_path / "here" / "teacher"}'
    finetune(FinetuneCfg(output=str(folder), data_dir=str(images), epochs=2, resume=True), {'epochs'})
    assert len(rows(folder)) == 2


def test_a_teacher_that_has_learnt_more_is_another(images, tmp_path, no_pictures):
    """The rest of the run would learn from other weights, and nobody could say what the student is."""
    model = timm.create_model('resnet10t', num_classes=2)
    name = f'local-dir:{timm_vitres.save(model, tmp_path / "teacher", label_names=["across", "down"])}'
    cfg = small(images, tmp_path / 'run', epochs=1, kd_model_name=name)
    finetune(cfg)
    finetune(dataclasses.replace(cfg, epochs=2, resume=True))
    with torch.no_grad():
        model.fc.bias += 1
    timm_vitres.save(model, tmp_path / 'teacher', label_names=['across', 'down'])
    with pytest.raises(ValueError, match=r'kd_model_name: .*teacher. has other weights than when the run in .* began'):
        finetune(dataclasses.replace(cfg, epochs=3, resume=True))


def test_a_run_of_an_older_version_may_have_settings_that_say_nothing(images, tmp_path, no_pictures):
    cfg = small(images, tmp_path / 'run', epochs=1)
    folder = finetune(cfg)
    record = Record.read(folder)
    object.__setattr__(record.cfg, 'model_ema_decay', 0.5)
    record.write(folder)
    assert len(rows(finetune(dataclasses.replace(cfg, epochs=2, resume=True)))) == 2


def test_weights_of_the_registry_are_not_claimed_where_none_were_taken(images, tmp_path, no_pictures):
    """A run from random weights has no licence but its owner's; one from a run says so."""
    model = dict(model='vitresnet_tiny.augreg_in21k_ft_in1k', model_kwargs=None)
    first = finetune(small(images, tmp_path / 'first', epochs=1, **model))
    cfg = json.loads((first / 'config.json').read_text())['pretrained_cfg']
    assert not cfg.get('license') and not cfg.get('tag')
    again = dict(model=f'local-dir:{first}', pretrained=True, model_kwargs=None)
    card = ModelCard.load(finetune(small(images, tmp_path / 'second', epochs=1, **again)) / 'README.md')
    assert '`local-dir:first` fine-tuned with timm-vitres from its weights.' in card.text and not card.data.license


def test_a_run_goes_on_without_the_files_that_it_began_with(images, tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    cfg = small(images, 'run', epochs=1, pretrained_path='old.safetensors', class_map='classes.txt')
    save_file(timm.create_model(cfg.model, num_classes=2).state_dict(), cfg.pretrained_path)
    (tmp_path / 'classes.txt').write_text('across\ndown\n')
    finetune(cfg)
    for name in ('old.safetensors', 'classes.txt'):
        os.remove(name)
    again = dataclasses.replace(cfg, epochs=2, resume=True)
    assert len(rows(finetune(again, {'pretrained_path', 'class_map', 'epochs', 'data_dir', 'model'}))) == 2
    (tmp_path / 'other').mkdir()
    monkeypatch.chdir(tmp_path / 'other')
    with pytest.raises(ValueError, match=r"class_map: got '.*/other/classes.txt', but the run in .* was started with"):
        finetune(dataclasses.replace(again, output=str(tmp_path / 'run')), {'class_map'})


def test_a_card_does_not_tell_where_the_model_lay(images, tmp_path, monkeypatch, no_pictures):
    timm_vitres.save(timm.create_model('resnet10t', num_classes=2), tmp_path / 'base', label_names=['across', 'down'])
    monkeypatch.chdir(tmp_path)
    own = dict(model='local-dir:base', kd_model_name='local-dir:base', model_kwargs=None)
    cfg = small(images, 'run', epochs=1, **own)
    cards = [
        (finetune(each) / 'README.md').read_text() for each in (cfg, dataclasses.replace(cfg, epochs=2, resume=True))
    ]
    for card in cards:
        assert '`local-dir:base` fine-tuned' in card and 'kd_model_name=base' in card
        assert str(tmp_path) not in card


def test_a_run_keeps_the_precision_of_muon_that_it_began_with(images, tmp_path, monkeypatch, no_pictures):
    seen = []
    monkeypatch.setattr(module, 'Stepper', lambda *args: seen.append(args[-1]) or optimisation.Stepper(*args))
    for name, first in (('float32', 'AVX2'), ('bfloat16', 'AVX512')):
        for capability, epochs in ((first, 1), ('AVX512' if first == 'AVX2' else 'AVX2', 2)):
            monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda told=capability: told)
            finetune(small(images, tmp_path / name, opt='nmuon', epochs=epochs, resume=epochs == 2))
    assert seen == [True, True, False, False]


def test_limits_that_are_infinite_are_no_divergence(images, tmp_path, monkeypatch, no_pictures):
    create = starting.create_finetune_model

    def limited(*args, **kwargs):
        model = create(*args, **kwargs)
        model.register_buffer('limit', torch.tensor(float('inf')), persistent=False)
        return model

    monkeypatch.setattr(starting, 'create_finetune_model', limited)
    assert len(rows(finetune(small(images, tmp_path / 'run', epochs=1)))) == 1
