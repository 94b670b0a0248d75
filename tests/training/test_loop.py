import csv
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from conftest import write_folder
from huggingface_hub import ModelCard
from PIL import Image
from timm.task import ClassificationTask

import timm_vitres
from timm_vitres.training import datasets, starting
from timm_vitres.training import loop as module
from timm_vitres.training.datasets import load_data
from timm_vitres.training.loop import finetune
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.tasks import MeanOverHeads


def settings(data_dir, output, **kwargs) -> FinetuneCfg:
    defaults = dict(model='test_vitresnet', img_size=32, epochs=2, batch_size=8, lr=3e-3, workers=0, val_frac=0.25)
    return FinetuneCfg(**{**defaults, 'data_dir': data_dir and str(data_dir), 'output': str(output), **kwargs})


def rows(folder):
    with (folder / 'summary.csv').open() as file:
        return list(csv.DictReader(file))


def weights(folder):
    return torch.load(folder / 'last.pth.tar', weights_only=True)['state_dict']


def test_it_ends_with_a_complete_model(image_folder, tmp_path):
    cfg = settings(image_folder, tmp_path / 'run', epochs=4, img_size=(32, 48), mean=(0.4, 0.4, 0.4), hflip=0.0)
    folder = finetune(cfg)
    files = {'model.safetensors', 'config.json', 'README.md', 'summary.csv', 'curves.png', 'last.pth.tar', 'run.json'}
    history = rows(folder)
    best = max(float(row['eval_top1']) for row in history)
    files |= {'held_out.csv', 'held_out.txt', 'confusion.png', *(['mistakes.png'] if best < 100 else [])}
    assert {path.name for path in folder.iterdir()} == files
    assert [row['epoch'] for row in history] == ['0', '1', '2', '3']
    assert float(history[-1]['train_loss']) < float(history[0]['train_loss'])
    with Image.open(folder / 'curves.png') as curves:
        assert curves.size[0] > 500

    config = json.loads((folder / 'config.json').read_text())
    assert config['label_names'] == ['across', 'down']
    assert config['pretrained_cfg']['input_size'] == [3, 32, 48]
    card = ModelCard.load(folder / 'README.md')
    assert card.data.eval_results[0].metric_value == pytest.approx(best, abs=0.01)

    # the folder is the model of its best epoch, and preprocesses as it was trained
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert model.patch_embed.img_size == (32, 48)
    data = load_data(cfg, 'RGB')
    correct = 0
    for index in data.val.indices:
        path, target = data.val.dataset.samples[index]
        x = timm_vitres.preprocess(path, model)
        assert x.shape == (1, 3, 32, 48)
        correct += int(model(x).argmax() == target)
    assert 100 * correct / len(data.val) == pytest.approx(best, abs=0.01)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(image_folder, tmp_path, no_pictures):
    whole = finetune(settings(image_folder, tmp_path / 'whole', epochs=3))

    class Killed(BaseException):
        pass

    calls = []

    def kill_in_the_second_epoch(*args):
        calls.append(None)
        if len(calls) == 2:
            raise Killed
        return original(*args)

    original, module.evaluate = module.evaluate, kill_in_the_second_epoch
    try:
        with pytest.raises(Killed):
            finetune(settings(image_folder, tmp_path / 'parts', epochs=3))
    finally:
        module.evaluate = original
    assert len(rows(tmp_path / 'parts')) == 1
    parts = finetune(settings(image_folder, tmp_path / 'parts', epochs=3, resume=True))
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(parts).items())
    for ours, theirs in zip(rows(parts), rows(whole), strict=True):
        assert {**ours, 'seconds': 0} == {**theirs, 'seconds': 0}
    # a finished run that is resumed stays what it is
    before = (parts / 'model.safetensors').read_bytes()
    finetune(settings(image_folder, parts, epochs=3, resume=str(parts)))
    assert (parts / 'model.safetensors').read_bytes() == before


def test_a_run_is_never_overwritten_or_mixed_up(image_folder, tmp_path, no_pictures):
    folder = finetune(settings(image_folder, tmp_path / 'run', epochs=1))
    with pytest.raises(ValueError, match='holds a run already'):
        finetune(settings(image_folder, folder))
    with pytest.raises(ValueError, match=r"model: got 'vitresnet_nano', but the run in .* with 'test_vitresnet'"):
        finetune(settings(image_folder, folder, epochs=1, model='vitresnet_nano', resume=True))
    with pytest.raises(ValueError, match=r"model_kwargs: got {'depth': 1}, but the run in .* with None"):
        finetune(settings(image_folder, folder, epochs=1, model_kwargs=dict(depth=1), resume=True))
    with pytest.raises(FileNotFoundError, match='no run to go on with'):
        finetune(settings(image_folder, tmp_path / 'new', resume=str(tmp_path / 'nothing.pth.tar')))
    other = write_folder(tmp_path / 'other', per_class=4)
    (other / 'down').rename(other / 'up')
    with pytest.raises(ValueError, match=r'^data_dir: '):
        finetune(settings(other, folder, epochs=2, resume=True))
    # a checkpoint of another run, and one that is cut
    own, another = folder / 'last.pth.tar', finetune(settings(image_folder, tmp_path / 'another', epochs=1))
    whole = own.read_bytes()
    own.write_bytes((another / 'last.pth.tar').read_bytes())
    with pytest.raises(ValueError, match=r'last.pth.tar is of another run than run.json'):
        finetune(settings(image_folder, folder, resume=True))
    own.write_bytes(whole[:5000])
    with pytest.raises(ValueError, match='is not a checkpoint'):
        finetune(settings(image_folder, folder, resume=True))


def test_a_pickle_runs_no_code(image_folder, tmp_path, no_pictures):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)

    folder = finetune(settings(image_folder, tmp_path / 'run', epochs=1))
    torch.save({'state_dict': Evil()}, folder / 'last.pth.tar')
    with pytest.raises(ValueError, match='is not a checkpoint'):
        finetune(settings(image_folder, folder, resume=str(folder / 'last.pth.tar')))
    assert not (tmp_path / 'owned').exists()


def test_given_splits(tmp_path):
    root = tmp_path / 'images'
    write_folder(root / 'train', per_class=5)
    write_folder(root / 'val', per_class=3, seed=1)
    data = load_data(settings(root, tmp_path), 'RGB')
    assert (len(data.train), len(data.val), data.counts) == (10, 6, [5, 5])
    assert data.val[0][0].mode == 'RGB'
    data = load_data(settings(root, tmp_path, val_split=''), 'L')
    assert (len(data.train), len(data.val)) == (8, 2)
    assert data.train[0][0].mode == 'L'


def test_timms_models_and_other_settings(image_folder, tmp_path, no_pictures):
    options = dict(epochs=1, in_chans=1, amp=True, channels_last=True, clip_grad=1.0, layer_decay=0.9, reprob=0.2)
    folder = finetune(settings(image_folder, tmp_path / 'vit', model='test_vit', img_size=64, **options))
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert model.in_chans == 1 and model.patch_embed.img_size == (64, 64)
    options = dict(epochs=1, mixup=0.2, cutmix=0.5, opt='sgd', lr=0.01, aa='rand-m5-n1', drop_path=0.1)
    folder = finetune(settings(image_folder, tmp_path / 'resnet', model='test_resnet', img_size=64, **options))
    assert timm.data.resolve_model_data_config(timm.create_model(f'local-dir:{folder}'))['input_size'][1] == 64
    # and a model that came out of a run goes into the next
    options = dict(model=f'local-dir:{tmp_path}/vit', pretrained=True, epochs=1, balance_classes=True, img_size=None)
    finetune(settings(image_folder, tmp_path / 'next', eval_metric='balanced', **options))
    card = (tmp_path / 'next' / 'README.md').read_text()
    assert '(1, 64, 64)' in card


def test_named_datasets(tmp_path, no_pictures):
    idx = tmp_path / 'FashionMNIST' / 'raw'
    idx.mkdir(parents=True)
    for split, count in (('train', 30), ('t10k', 20)):
        pixels = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8).numpy().tobytes()
        sizes = b''.join(number.to_bytes(4, 'big') for number in (count, 28, 28))
        (idx / f'{split}-images-idx3-ubyte').write_bytes(b'\x00\x00\x08\x03' + sizes + pixels)
        labels = bytes(index % 10 for index in range(count))
        (idx / f'{split}-labels-idx1-ubyte').write_bytes(b'\x00\x00\x08\x01' + count.to_bytes(4, 'big') + labels)
    options = dict(dataset='torch/fashion_mnist', model='vitresnet_nano', img_size=28, in_chans=1, epochs=1)
    folder = finetune(settings(tmp_path, tmp_path / 'run', **options))
    config = json.loads((folder / 'config.json').read_text())
    assert config['label_names'][:2] == ['T-shirt/top', 'Trouser']
    data = load_data(settings(tmp_path, tmp_path, val_split='', val_frac=0.4, **options), 'L')
    assert (len(data.train), len(data.val)) == (20, 10)
    with pytest.raises(ValueError, match=r'dataset: .*torch/fashion'):
        load_data(settings(tmp_path, tmp_path, **{**options, 'dataset': 'torch/fashion'}), 'L')
    with pytest.raises(ValueError, match='cannot be opened'):
        load_data(settings(tmp_path / 'no', tmp_path, **options), 'L')


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(epochs=0), 'epochs: got 0'),
        (dict(batch_size=-1), 'batch_size: got -1'),
        (dict(lr=0.0), 'lr: got 0'),
        (dict(batch_size=7, mixup=0.1), 'batch_size: got 7'),
        (dict(data_dir=None), 'data_dir: no folder given'),
        (dict(val_frac=1.5), 'val_frac: got 1.5'),
        (dict(img_size=(32, 0)), 'img_size: got'),
        (dict(img_size=16), 'smaller than one token'),
        (dict(model='vitresnet_giant'), r'^model: vitresnet_giant can not be made \(Unknown model'),
        (dict(pretrained=True), "^model: 'test_vitresnet' can not be made \\(No pretrained weights exist"),
        (dict(model='vitresnet_nano.no_tag'), r'^model: vitresnet_nano.no_tag can not be made \(Invalid'),
        (dict(in_chans=2), 'in_chans: the model takes 2'),
        (dict(lr=1e30), 'lr: the (loss|weights)'),
        (dict(balance_classes=True, mixup=0.1), 'balance_classes'),
    ],
)
def test_mistakes_are_named(kwargs, message, image_folder, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=message):
        finetune(settings(**{'data_dir': image_folder, 'output': tmp_path / 'run', 'opt': 'sgd', **kwargs}))


def test_one_class_is_not_enough(tmp_path, image_folder):
    for path in (image_folder / 'down').iterdir():
        path.unlink()
    (image_folder / 'down').rmdir()
    with pytest.raises(ValueError, match='at least two'):
        finetune(settings(image_folder, tmp_path / 'run'))


def test_skipped_images_are_named(image_folder, tmp_path, caplog, no_pictures):
    (image_folder / 'down' / '3.png').write_text('')
    with caplog.at_level('WARNING'):
        finetune(settings(image_folder, tmp_path / 'run', epochs=1, skip_bad=True))
    assert '3.png' in caplog.text


def test_settings_can_be_replaced():
    assert dataclasses.replace(FinetuneCfg(data_dir='x'), lr=1.0).lr == 1.0


@pytest.mark.parametrize('times', [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_goes_on(times, image_folder, tmp_path):
    """kill -9 at random moments around the saves; what is on disk is whole each time, and the run finishes."""
    folder = tmp_path / 'run'
    code = (
        'import logging, sys, torch; torch.set_num_threads(1)\n'
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "logging.getLogger('timm_vitres').setLevel('INFO')\n"
        'from timm_vitres import FinetuneCfg, finetune\n'
        "finetune(FinetuneCfg(model='test_vitresnet', model_kwargs=dict(depth=1), "
        "img_size=32, batch_size=8, workers=0, no_check=True, resume=sys.argv[2] == 'resume', no_aug=True, "
        f'data_dir={str(image_folder)!r}, output={str(folder)!r}, epochs=int(sys.argv[1])))\n'
    )
    chance = random.Random(0)
    done = epochs = 0
    for _ in range(times):
        how = 'resume' if done else 'begin'
        epochs = done + 12  # more than it can do before it is killed
        command = [sys.executable, '-c', code, str(epochs), how]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            first = next(line for line in process.stdout if line.startswith('epoch '))  # behind what its images are
            assert first.startswith(f'epoch {done}'), 'it did not go on where it was'
            time.sleep(chance.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.stdout.read()
        assert process.wait() == -signal.SIGKILL
        state = torch.load(folder / 'last.pth.tar', weights_only=True)
        assert state['epoch'] + 1 == len(state['history']) > done
        done = len(state['history'])
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    result = subprocess.run([sys.executable, '-c', code, str(epochs), 'resume'], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(rows(folder)) == epochs


@pytest.mark.parametrize('head_loss', ['sum', 'both', 'resnet', 'vit'])
def test_losses_of_two_heads(head_loss, image_folder, tmp_path, no_pictures):
    """What the first step's loss is computed of, and what is left of each head."""
    cfg = settings(image_folder, tmp_path / 'run', model='test_vitresnet_dual', head_loss=head_loss, epochs=1)
    folder = finetune(cfg)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).train()
    x = torch.randn(2, 3, 32, 32)
    assert torch.is_tensor(model(x))  # what comes out is a model like any other
    for name, head in zip(('resnet', 'vit'), model.get_classifier()):
        trained = head_loss in ('sum', 'both', name)
        assert bool(head.weight.any()) == bool(head.bias.any()) == trained
    assert ('head_loss' in (folder / 'README.md').read_text()) == (head_loss != 'sum')
    other = 'both' if head_loss == 'sum' else 'sum'
    with pytest.raises(ValueError, match=f"head_loss: got '{other}', but the run in .* was started with '{head_loss}'"):
        finetune(dataclasses.replace(cfg, head_loss=other, epochs=2, resume=True), given=['head_loss', 'epochs'])


def test_the_loss_on_both_heads_is_the_mean():
    criterion, target = torch.nn.CrossEntropyLoss(), torch.tensor([0, 2])
    one, other = torch.randn(2, 3), torch.randn(2, 3)
    loss = MeanOverHeads(criterion)
    torch.testing.assert_close(loss((one, other), target), (criterion(one, target) + criterion(other, target)) / 2)
    assert torch.equal(loss(one, target), criterion(one, target))


def test_a_loss_on_two_heads_needs_two(image_folder, tmp_path, no_pictures):
    for head_loss in ('both', 'vit'):
        with pytest.raises(ValueError, match=f'head_loss: got {head_loss!r}, but test_vitresnet has one head'):
            finetune(settings(image_folder, tmp_path / 'run', head_loss=head_loss))
    # timm's own models with two heads train on both
    distilled = 'deit_tiny_distilled_patch16_224'
    options = dict(model=distilled, epochs=1, model_kwargs=dict(img_size=32, depth=1))
    assert finetune(settings(image_folder, tmp_path / 'deit', head_loss='both', **options)).is_dir()
    with pytest.raises(ValueError, match="head_loss: got 'vit', but deit_tiny"):
        finetune(settings(image_folder, tmp_path / 'vit', head_loss='vit', **options))


def test_autotune_trains_with_what_is_fastest_and_goes_on_with_it(
    image_folder, tmp_path, monkeypatch, caplog, no_pictures
):
    measure = starting.fastest_training
    calls = []

    def measured(*args):
        found, times = measure(*args)
        assert set(found) == {'amp', 'channels_last', 'no_fused_attn'} and times.count(' ms') == 8
        calls.append(found)
        return dict(amp=True, channels_last=False, no_fused_attn=True), times

    monkeypatch.setattr(starting, 'fastest_training', measured)
    cfg = settings(image_folder, tmp_path / 'run', epochs=1, autotune=True)
    with caplog.at_level('INFO'):
        finetune(cfg)
    assert 'autotune: float32 channels-last' in caplog.text
    # the same run as one with these settings by name
    named = settings(image_folder, tmp_path / 'named', epochs=1, amp=True, no_fused_attn=True)
    finetune(named)
    other = weights(tmp_path / 'named')
    assert all(torch.equal(value, other[key]) for key, value in weights(tmp_path / 'run').items())
    # it goes on with them, without measuring again
    finetune(dataclasses.replace(cfg, epochs=2, resume=True))
    assert len(calls) == 1 and len(rows(tmp_path / 'run')) == 2
    # a flag that repeats the choice is no contradiction; one against it may be of the first command, and is told of
    caplog.clear()
    finetune(dataclasses.replace(cfg, epochs=2, resume=True, amp=True), ['epochs', 'amp', 'channels_last'])
    assert 'autotune chose' not in caplog.text
    finetune(dataclasses.replace(cfg, epochs=2, resume=True), ['epochs', 'amp'])
    assert 'amp: got False, but autotune chose True when the run began, and it goes on so' in caplog.text
    with pytest.raises(ValueError, match=r'channels_last: got True, but the run in .* was started with False'):
        finetune(dataclasses.replace(cfg, epochs=2, resume=True, channels_last=True), ['channels_last'])
    with pytest.raises(ValueError, match=r'autotune: got True, but the run in .* was started with False'):
        finetune(dataclasses.replace(named, epochs=2, resume=True, autotune=True))


def test_attention_step_by_step(image_folder, tmp_path, monkeypatch, no_pictures):
    def kernel(*args, **kwargs):
        assert not torch.is_grad_enabled(), 'trained in the fused kernel'
        return attend(*args, **kwargs)

    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', kernel)
    with pytest.raises(AssertionError, match='fused kernel'):
        finetune(settings(image_folder, tmp_path / 'fused', epochs=1))
    folder = finetune(settings(image_folder, tmp_path / 'run', epochs=1, no_fused_attn=True, model_ema=True))
    assert 'no_fused_attn=True' in (folder / 'README.md').read_text()
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert all(block.attn.fused_attn for block in model.blocks)  # a way to compute, not a model of another kind


def test_a_cpu_without_bfloat16_is_told_of(image_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    finetune(settings(image_folder, tmp_path / 'plain', epochs=1))
    assert 'bfloat16' not in caplog.text
    finetune(settings(image_folder, tmp_path / 'run', epochs=1, amp=True))
    told = [record.getMessage() for record in caplog.records if 'bfloat16' in record.getMessage()]
    assert [text.partition(' computes')[0] for text in told] == ['amp: mixed precision']
    caplog.clear()
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512')
    finetune(settings(image_folder, tmp_path / 'other', epochs=1, amp=True))
    assert 'bfloat16' not in caplog.text


class Averages:
    """The weights of a run at each update, and what their average comes to by hand."""

    def __init__(self, monkeypatch, decay):
        self.average, self.updates, self.decay = {}, 0, decay
        update = ClassificationTask.update_ema

        def watched(task, step=None):
            self.add(task.get_trainable_module().state_dict(), step)
            return update(task, step=step)

        monkeypatch.setattr(ClassificationTask, 'update_ema', watched)

    def add(self, state, step):
        self.updates += 1
        assert step == self.updates
        decay = self.decay(step)
        for key, value in state.items():
            value = value.double() if value.is_floating_point() else value.clone()
            old = self.average.get(key, value)
            self.average[key] = decay * old + (1 - decay) * value if value.is_floating_point() else value


@pytest.mark.parametrize('warmup', [False, True])
def test_averaged_weights_are_the_average(warmup, image_folder, tmp_path, monkeypatch, no_pictures):
    """Of a model with BatchNorm; the first update is the weights themselves."""

    def decay(step):
        if step == 1:
            return 0.0
        return min(0.7, 1 - step ** (-2 / 3)) if warmup else 0.7

    averages = Averages(monkeypatch, decay)
    options = dict(model='test_vitresnet_dual', model_ema=True, model_ema_decay=0.7, model_ema_warmup=warmup)
    folder = finetune(settings(image_folder, tmp_path / 'run', batch_size=4, grad_accum_steps=2, **options))
    state = torch.load(folder / 'last.pth.tar', weights_only=True)
    assert averages.updates == 2 * 2 and state['state_dict_ema'].keys() == averages.average.keys()
    for key, value in state['state_dict_ema'].items():
        expected = averages.average[key].to(value.dtype)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(state['state_dict_ema']['head_vit.weight'], state['state_dict']['head_vit.weight'], 1e-4)


@pytest.mark.parametrize('best', ['eval', 'ema'])
def test_the_better_weights_are_saved(best, image_folder, tmp_path, monkeypatch, no_pictures):
    """The model, its report and its card are of the weights that are better in the best epoch."""
    evaluate, seen = module.evaluate, []

    def told(*args):
        metrics, answers = evaluate(*args)
        seen.append(answers)
        top1 = [60.0, 50.0] if best == 'eval' else [50.0, 60.0]
        return {**metrics, 'top1': top1[(len(seen) - 1) % 2] + len(seen)}, answers

    monkeypatch.setattr(module, 'evaluate', told)
    cfg = settings(image_folder, tmp_path / 'run', model_ema=True, model_ema_decay=0.9, lr=0.01, no_check=True)
    folder = finetune(cfg)
    state = torch.load(folder / 'last.pth.tar', weights_only=True)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    expected, other = state['state_dict'], state['state_dict_ema']
    if best == 'ema':
        expected, other = other, expected
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert any(not torch.equal(value, other[key]) for key, value in model.state_dict().items())
    answers = seen[2 if best == 'eval' else 3]
    assert all(torch.equal(one, torch.from_numpy(two)) for one, two in zip(state['answers'], answers))
    val = load_data(cfg, 'RGB').val
    for index, probability in zip(answers.indices, answers.truth):
        path, label = val.dataset.samples[val.indices[index]]
        with torch.no_grad():
            found = model(timm_vitres.preprocess(path, model)).softmax(-1)[0, label].item()
        assert found == pytest.approx(probability, abs=1e-4)
    card = ' '.join((folder / 'README.md').read_text().split())
    assert ('with the averaged weights.' in card) == (best == 'ema')
    assert ModelCard.load(folder / 'README.md').data.eval_results[0].metric_value == (63.0 if best == 'eval' else 64.0)


def test_what_is_set_of_mixing_arrives(image_folder, tmp_path, monkeypatch, no_pictures):
    seen = []

    class Watched(module.Mixup):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self)

    monkeypatch.setattr(module, 'Mixup', Watched)
    mixing = dict(mixup=0.3, cutmix=0.7, mixup_prob=0.5, mixup_switch_prob=0.25, mixup_mode='elem')
    finetune(settings(image_folder, tmp_path / 'run', epochs=1, smoothing=0.2, **mixing))
    [mixup] = seen
    found = (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob, mixup.mode)
    assert found == (0.3, 0.7, 0.5, 0.25, 'elem') and mixup.label_smoothing == 0.2 and mixup.cutmix_minmax is None
    finetune(settings(image_folder, tmp_path / 'minmax', epochs=1, cutmix=0.7, cutmix_minmax=(0.4, 0.6)))
    assert tuple(seen[1].cutmix_minmax) == (0.4, 0.6)


def test_a_run_is_validated_by_the_views_of_its_settings(image_folder, tmp_path, monkeypatch, no_pictures):
    seen, evaluate = [], module.evaluate

    def watched(model, batches, names, device, autocast, tta, processes):
        seen.append(tta)
        return evaluate(model, batches, names, device, autocast, tta, processes)

    monkeypatch.setattr(module, 'evaluate', watched)
    finetune(settings(image_folder, tmp_path / 'run', epochs=1, tta='flip'))
    assert seen == ['flip']


def test_statistics_of_many_processes_are_averaged_for_every_model(image_folder, tmp_path, monkeypatch, no_pictures):
    """The arithmetic is timm's; that of two real processes is a slow test of test_processes.py."""
    seen = []
    monkeypatch.setattr(module, 'distribute_bn', lambda model, count, reduce: seen.append((model, count, reduce)))
    trained = []

    def train(run):
        run._train_epoch(0)
        assert not seen
        run.processes = dataclasses.replace(run.processes, count=2)
        run._train_epoch(0)
        trained.extend([run.model, run.task.get_trainable_module(ema=True)])
        return run.folder

    monkeypatch.setattr(module._Run, 'train', train)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        finetune(settings(image_folder, tmp_path / 'run', model='test_vitresnet_dual', model_ema=True))
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [(model, 2, True) for model in trained] and trained[0] is not trained[1]


def test_many_images_are_opened_while_a_run_trains(image_folder, tmp_path, monkeypatch):
    """One that can't be read ends the run after the epoch in which it was found, wherever it stands."""
    monkeypatch.setattr(datasets, 'MANY', 4)
    seen = []

    class Watched(datasets.BackgroundCheck):
        def raise_if_bad(self):
            assert self.process is not None
            self.process.join(300)  # it takes what time the rest of the machine leaves
            seen.append(self)
            super().raise_if_bad()

    monkeypatch.setattr(datasets, 'BackgroundCheck', Watched)
    finetune(settings(image_folder, tmp_path / 'fine', epochs=2))
    assert len(seen) == 2 and seen[0].is_done and not seen[0].process.is_alive()
    (image_folder / 'down' / 'bad.png').write_bytes(b'no image')
    monkeypatch.setattr(module._Run, '_train_epoch', lambda run, epoch: 0.0)  # it is not met in training
    monkeypatch.setattr(module._Run, '_validate', lambda run, epoch: ({}, {}))
    with pytest.raises(ValueError, match=r'bad\.png'):
        finetune(settings(image_folder, tmp_path / 'bad', epochs=2))
    assert len(seen) == 3


def test_mixing_ends_with_an_epoch(image_folder, tmp_path, monkeypatch, no_pictures):
    seen = []

    class Watched(module.Mixup):
        def __call__(self, x, target):
            before = x.clone()
            mixed, soft = super().__call__(x, target)
            seen.append((not torch.equal(before, mixed), soft))
            return mixed, soft

    monkeypatch.setattr(module, 'Mixup', Watched)
    options = dict(mixup=1.0, mixup_off_epoch=1, smoothing=0.2, batch_size=18, epochs=3, no_check=True)
    finetune(settings(image_folder, tmp_path / 'run', **options))
    assert [is_mixed for is_mixed, _ in seen] == [True, False, False]
    assert {round(value, 4) for value in seen[1][1].flatten().tolist()} == {0.1, 0.9}  # smoothed as ever
    assert len(seen[0][1].unique()) > 2
