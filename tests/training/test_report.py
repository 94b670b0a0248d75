"""A run reports metrics, a table of its epochs, and a card of its model."""

import contextlib

import pytest
import timm
import torch
from huggingface_hub import ModelCard

from timm_vitres.training import report
from timm_vitres.training.loaders import Batches
from timm_vitres.training.optimisation import learning_rate
from timm_vitres.training.report import (
    Best,
    best_epoch,
    evaluate,
    read_summary,
    run_card,
    write_summary,
)
from timm_vitres.training.runs import Record
from timm_vitres.training.settings import FinetuneCfg


class Scores(torch.nn.Module):
    """A model whose images are its logits. (B, classes) -> (B, classes)"""

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        return x


class Set(torch.utils.data.Dataset):
    """Logits as images, with their labels."""

    def __init__(self, logits, target):
        self.logits, self.target = logits, target

    def __len__(self):
        return len(self.target)

    def __getitem__(self, index):
        return self.logits[index], int(self.target[index])


def batches(logits, target, size=4):
    return Batches(Set(logits, target), size, 0, 0, [])


def test_balanced_accuracy():
    metrics, _ = evaluate(Scores(), batches(torch.eye(2)[[0, 0, 0, 0]], [0, 0, 0, 1]), ['a', 'b'])
    assert metrics['top1'] == 75 and metrics['balanced'] == 50
    assert metrics['macro_f1'] == pytest.approx(100 * (2 * 3 / (3 + 4) + 0) / 2)


def test_a_class_that_is_not_there_has_no_recall():
    names = list('abcd')
    metrics, _ = evaluate(Scores(), batches(torch.eye(4)[[0, 1, 1]], [0, 0, 3]), names)
    assert metrics['balanced'] == 25  # half of class 0 and none of class 3 is right
    assert evaluate(Scores(), batches(torch.eye(4)[[2]], [2]), names)[0]['balanced'] == 100


def test_a_model_is_evaluated_image_by_image():
    """The metrics do not depend on how the images are put into batches, and the answers are in the images' order."""
    torch.manual_seed(0)
    logits, target = torch.randn(11, 7), torch.randint(3, (11,))
    logits[torch.arange(4), target[:4]] += 5
    entered = []

    @contextlib.contextmanager
    def autocast():
        entered.append(None)
        yield

    found, answers = evaluate(Scores().train(), batches(logits, target), list('abcdefg'), 'cpu', autocast)
    ranks = logits.argsort(1, descending=True)
    hits = ranks[:, 0] == target
    recalls = [hits[target == label].double().mean().item() for label in target.unique()]
    taken = [(ranks[:, 0] == label).sum() for label in target.unique()]
    sizes = [(target == label).sum() for label in target.unique()]
    f1 = [2 * recall * size / (size + many) for recall, size, many in zip(recalls, sizes, taken)]
    assert len(entered) == 3 and len(recalls) == 3 and 0 < hits.sum() < 11
    assert found == {
        'loss': pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-5),
        'top1': pytest.approx(100 * hits.double().mean().item()),
        'top5': pytest.approx(100 * (ranks[:, :5] == target[:, None]).any(1).double().mean().item()),
        'balanced': pytest.approx(100 * sum(recalls) / 3),
        'macro_f1': pytest.approx(100 * float(sum(f1)) / 3),
    }
    probabilities = logits.softmax(1)
    assert answers.indices.tolist() == list(range(11)) and answers.labels.tolist() == target.tolist()
    assert answers.predicted.tolist() == ranks[:, 0].tolist()
    assert answers.confidence == pytest.approx(probabilities.max(1).values.numpy())
    assert answers.truth == pytest.approx(probabilities[torch.arange(11), target].numpy())


def test_views_of_an_image_are_averaged(model):
    """With flips, each image's logits are the mean of its own and those of its mirror image."""
    x, target = torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    found, answers = evaluate(model, batches(x, target), list('abc'), tta='flip')
    with torch.no_grad():
        logits = (model(x) + model(x.flip(-1))) / 2
    assert found['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-5)
    assert answers.truth == pytest.approx(logits.softmax(1)[torch.arange(6), target].numpy(), rel=1e-4)
    assert abs(found['loss'] - evaluate(model, batches(x, target), list('abc'))[0]['loss']) > 1e-4


def row(epoch, **kwargs):
    return dict(epoch=epoch, **{f'eval_{key}': value for key, value in kwargs.items()})


def test_the_best_epoch_is_the_first_of_the_best():
    history = [row(0, loss=2.0, top1=50.0), row(1, loss=1.0, top1=75.0), row(2, loss=0.5, top1=75.0)]
    history.append(row(3, loss=0.5, top1=60.0))
    assert best_epoch(history, 'top1') == (history[1], 'eval')
    assert best_epoch(history, 'loss') == (history[2], 'eval')


def test_averaged_weights_can_be_the_best():
    history = [row(0, loss=2.0, top1=50.0), row(1, loss=1.0, top1=75.0)]
    history[0].update(ema_loss=2.5, ema_top1=80.0)
    history[1].update(ema_loss=0.5, ema_top1=75.0)
    best = best_epoch(history, 'top1')
    assert best == (history[0], 'ema') and best.metric('top1') == 80 and best.metric('loss') == 2.5
    assert best_epoch(history, 'loss') == (history[1], 'ema')
    del history[0]  # of equal ones the plain weights
    assert best_epoch(history, 'top1') == (history[0], 'eval')


HISTORY = [
    dict(epoch=0, train_loss=2.0, eval_loss=2.5, eval_top1=25.0, eval_balanced=20.0, seconds=1.5),
    dict(epoch=1, train_loss=1.0, eval_loss=1.5, eval_top1=75.0, eval_balanced=70.0, seconds=1.25),
]


@pytest.mark.parametrize('draws', [True, False])
def test_the_table_has_a_row_for_each_epoch(draws, tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'can_draw', lambda: draws)
    assert len(read_summary(tmp_path)) == 0
    for number in (1, 2):
        write_summary(HISTORY[:number], tmp_path)
        assert len(read_summary(tmp_path)) == number
    assert (tmp_path / 'summary.csv').read_bytes() == (
        b'epoch,train_loss,eval_loss,eval_top1,eval_balanced,seconds\n0,2.0,2.5,25.0,20.0,1.5\n1,1.0,1.5,75.0,70.0,1.25\n'
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == ({'summary.csv', 'curves.png'} if draws else {'summary.csv'})


def test_a_whole_table_means_that_the_curves_are_drawn(tmp_path, monkeypatch):
    def fail(history, path):
        path.write_text('half')
        raise OSError(28, 'No space left on device')

    write_summary(HISTORY[:1], tmp_path)
    curves = (tmp_path / 'curves.png').read_bytes()
    monkeypatch.setattr(report, 'plot_curves', fail)
    with pytest.raises(OSError, match=r'curves\.png could not be written'):
        write_summary(HISTORY, tmp_path)
    assert len(read_summary(tmp_path)) == 1 and (tmp_path / 'curves.png').read_bytes() == curves


@pytest.mark.parametrize('data', [b'', b'\xff\xfe\x00', b'epoch,train_loss\n'])
def test_a_table_that_can_not_be_read_has_no_epochs(data, tmp_path):
    (tmp_path / 'summary.csv').write_bytes(data)
    assert len(read_summary(tmp_path)) == 0


ROW = dict(epoch=3, eval_loss=0.5, eval_top1=91.6666, eval_balanced=88.3333, eval_macro_f1=87.6543)
ROW.update(ema_loss=0.4, ema_top1=93.0, ema_balanced=92.0, ema_macro_f1=91.0)


def card_of(model, autotuned=None, weights='eval', **kwargs):
    """Return the text of the card of a run with these settings."""
    settings = dict(data_dir='photos/cells', model='test_vitresnet', lr=3e-3, epochs=5)
    data = dict(label_names=['cat', 'dog', 'owl'], description='24 images of 3 classes', train=[], validation=[])
    record = Record(FinetuneCfg(**{**settings, **kwargs}), data, timm.data.resolve_model_data_config(model), autotuned)
    batch_size = record.trained_cfg.batch_size
    lr = learning_rate(record.trained_cfg, batch_size)
    steps = dict(lr=lr, batch_size=batch_size, processes=record.processes)
    return run_card(record, Best(ROW, weights), model, 'Cells', steps)


def test_a_card_tells_what_the_run_recorded(model):
    card = ModelCard(card_of(model, weight_decay=0.25, seed=7, eval_metric='balanced'))
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results['accuracy'].metric_value == 91.67 and results['balanced_accuracy'].metric_value == 88.33
    assert results['f1'].metric_value == 87.65
    for result in results.values():
        assert (result.task_type, result.dataset_type) == ('image-classification', 'imagefolder')
        assert (result.dataset_name, result.dataset_config) == ('cells', 'cells')
    recipe = 'opt=adamw, lr=0.003, weight_decay=0.25, sched=cosine, '
    assert '24 images of 3 classes. epochs=5, batch_size=32, ' + recipe in ' '.join(card.text.split())
    assert 'seed=7.' in card.text and 'head_loss' not in card.text and 'cat, dog, owl' in card.text
    assert '# Cells' in card.text and "create_model('local-dir:.'" in card.text
    assert 'after epoch 3 on ' in card.text and 'by which this epoch was chosen (balanced)' in card.text


def test_a_card_names_the_weights_that_the_run_began_with(model):
    model.pretrained_cfg = {**model.pretrained_cfg, 'tag': 'augreg_in21k', 'license': 'apache-2.0'}
    card = ModelCard(card_of(model, pretrained=True))
    assert '`test_vitresnet` fine-tuned with timm-vitres from the weights `augreg_in21k`.' in card.text
    assert card.data.license == 'apache-2.0'
    card = ModelCard(card_of(model))
    assert 'fine-tuned with timm-vitres from random weights.' in card.text and card.data.license is None


def test_a_card_tells_of_what_is_not_usual(model, monkeypatch):
    assert '](curves.png)' in card_of(model)
    monkeypatch.setattr(report, 'can_draw', lambda: False)
    text = card_of(model, head_loss='both', dataset='torch/fashion_mnist')
    assert 'curves.png' not in text and 'seed=42, head_loss=both.' in text
    assert {result.dataset_name for result in ModelCard(text).data.eval_results} == {'torch/fashion_mnist'}


def test_a_card_tells_all_that_was_given_and_the_rate_that_was_used(model):
    text = card_of(model, lr_base=0.1, opt='sgd', batch_size=64, mixup=0.8, bce_loss=True, workers=0, val_frac=0.3)
    assert 'opt=sgd, lr=0.025, ' in text and 'mixup=0.8' in text and 'bce_loss=True' in text
    assert 'workers' not in text and 'data_dir' not in text and 'val_frac' not in text


def test_a_card_tells_the_settings_that_autotune_chose(model):
    assert 'batch_size=4,' in card_of(model, autotuned=dict(batch_size=4), batch_size=8)


def test_a_card_tells_whose_weights_it_measures_and_how(model):
    text = ' '.join(card_of(model).split())
    assert 'chosen (top1), with the weights.' in text
    card = ModelCard(card_of(model, weights='ema', tta='flip', model_ema=True))
    assert {result.metric_value for result in card.data.eval_results} == {93.0, 92.0, 91.0}
    text = ' '.join(card.text.split())
    assert 'with the averaged weights, averaged over views of each image (flip).' in text and 'model_ema=True' in text


def test_a_card_names_the_file_and_the_teacher_without_their_places(model):
    text = ' '.join(card_of(model, pretrained_path='/secret/place/weights.pth').split())
    assert 'from the weights in `weights.pth`.' in text and 'secret' not in text
    teacher = dict(kd_model_name='local-dir:/secret/place/teacher', kd_distill_type='feature')
    text = card_of(model, **teacher, lr_base=0.1, grad_accum_steps=2, lora=4)
    text = ' '.join(text.split())
    assert 'kd_model_name=teacher, kd_distill_type=feature' in text and 'secret' not in text
    assert 'lora=4' in text and 'lr_base=0.1, grad_accum_steps=2' in text and 'kd_' not in card_of(model)
