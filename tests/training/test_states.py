"""Checkpoints of a run: those that it goes on from, those that it keeps for others, and sharded ones."""

import io
import pickle

import pytest
import timm
import torch
from conftest import randomise_
from test_loop import rows, settings, weights

from timm_vitres.training.loop import finetune
from timm_vitres.training.processes import Processes
from timm_vitres.training.runs import Record
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.states import _Metadata, keep_best, read_shards, read_state, write_shards, write_state

RECORD = Record(FinetuneCfg(data_dir='x'), {}, {}, id='1')


def checkpoint(**kwargs):
    return dict(dict(id='1', history=[], epoch=0), **kwargs)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    state = checkpoint(history=[dict(epoch=0, eval_top1=50.0)], state_dict=dict(weight=torch.arange(3.0)))
    write_state(tmp_path, state)
    found = read_state(tmp_path, RECORD, has_model=True)
    assert torch.equal(found.pop('state_dict')['weight'], state.pop('state_dict')['weight']) and found == state


def test_a_checkpoint_that_a_run_can_not_go_on_from_is_refused(tmp_path):
    assert read_state(tmp_path, RECORD, has_model=False) is None
    with pytest.raises(FileNotFoundError, match=r'resume: .* holds a model, but no last\.pth\.tar'):
        read_state(tmp_path, RECORD, has_model=True)
    for state, message in [
        ([1], 'is not a checkpoint of a fine-tuning run'),
        (dict(id='1', history=[]), 'is not a checkpoint of a fine-tuning run'),
        (checkpoint(id='2'), 'is of another run'),
    ]:
        torch.save(state, tmp_path / 'last.pth.tar')
        with pytest.raises(ValueError, match=message):
            read_state(tmp_path, RECORD, has_model=True)
    write_state(tmp_path, checkpoint(sharded='last-0.sharded'))
    with pytest.raises(FileNotFoundError, match=r'lacks last-0\.sharded'):
        read_state(tmp_path, RECORD, has_model=True)


def test_shards_of_earlier_epochs_are_removed(tmp_path):
    for name in ('last-0.sharded', 'last-1.sharded', 'last-x'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'part').write_text('x')
    write_state(tmp_path, checkpoint(sharded='last-1.sharded'))
    assert {path.name for path in tmp_path.iterdir()} == {'last-1.sharded', 'last-x', 'last.pth.tar'}


def trained(seed):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3, img_size=32), seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_shards_are_read_as_they_were_written(tmp_path):
    model, optimizer = trained(0)
    name = write_shards(tmp_path, 3, model, optimizer, Processes())
    other, steps = trained(1)
    read_shards(tmp_path / name, other, steps)
    assert name == 'last-3.sharded'
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    ours, theirs = optimizer.state_dict()['state'], steps.state_dict()['state']
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        assert all(torch.equal(values[part], theirs[key][part]) for part in ('step', 'exp_avg', 'exp_avg_sq'))
    for path in (tmp_path / name).glob('*.distcp'):
        path.write_bytes(b'')
    with pytest.raises(ValueError, match=r'resume: .*last-3\.sharded does not fit the model of the run'):
        read_shards(tmp_path / name, other, steps)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_a_table_of_shards_runs_no_code(tmp_path):
    name = write_shards(tmp_path, 3, *trained(0), Processes())
    (tmp_path / name / '.metadata').write_bytes(pickle.dumps(Evil(tmp_path / 'ran')))
    with pytest.raises(ValueError, match=r'does not fit .*holds (io|_io)\.open, which could run code'):
        read_shards(tmp_path / name, *trained(1))
    assert not (tmp_path / 'ran').exists()


def test_a_table_of_shards_may_name_members_of_enumerations(tmp_path):
    """As Python 3.11.2 pickles them; of nothing else a pickle takes an attribute."""
    from torch.distributed.checkpoint import metadata

    class ByName:
        def __init__(self, owner, name):
            self.owner, self.name = owner, name

        def __reduce__(self):
            return getattr, (self.owner, self.name)

    member = metadata._MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    found = _Metadata(io.BytesIO(pickle.dumps(ByName(metadata._MEM_FORMAT_ENCODING, member.name)))).load()
    assert found is member
    with pytest.raises(pickle.UnpicklingError, match='could run code'):
        _Metadata(io.BytesIO(pickle.dumps(ByName(torch.Size, 'numel')))).load()


def test_shards_run_no_code(tmp_path, monkeypatch):
    name = write_shards(tmp_path, 3, *trained(0), Processes())
    read, evil = torch.load, io.BytesIO()
    torch.save(Evil(tmp_path / 'ran'), evil)

    def swapped(file, **options):
        """Read tensors as they are, and something evil for all other values."""
        value = read(file, **{**options, 'weights_only': True})
        return value if torch.is_tensor(value) else read(io.BytesIO(evil.getvalue()), **options)

    monkeypatch.setattr(torch, 'load', swapped)
    with pytest.raises(ValueError, match=r'resume: .*last-3\.sharded does not fit the model of the run'):
        read_shards(tmp_path / name, *trained(1))
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('name', ['../other', '/etc', 'last-1.sharded/../..', ''])
def test_shards_lie_in_the_runs_folder(name, tmp_path):
    write_state(tmp_path, checkpoint(sharded=name))
    with pytest.raises(ValueError, match='which is no folder of shards of a run'):
        read_state(tmp_path, RECORD, has_model=True)


def test_the_best_epochs_are_kept(tmp_path):
    metrics = []
    kept = []
    for epoch, metric in enumerate([50.0, 40.0, 60.0, 50.0, 55.0]):
        metrics.append(metric)
        state = checkpoint(epoch=epoch, state_dict=dict(weight=torch.tensor([epoch])), optimizer='left out')
        keep_best(tmp_path, state, metrics, 2, 'test_vit')
        kept.append(sorted(int(path.name[11]) for path in tmp_path.glob('checkpoint-*.pth.tar')))
    assert kept == [[0], [0, 1], [0, 2], [0, 2], [2, 4]]  # of equal ones the first
    state = torch.load(tmp_path / 'checkpoint-4.pth.tar', weights_only=True)
    assert state.pop('state_dict')['weight'].item() == 4
    assert state == dict(epoch=4, arch='test_vit', version=2, metric=55.0)


def test_an_average_of_kept_checkpoints_stays(tmp_path):
    """timm's avg_checkpoints.py writes one of any name."""
    (tmp_path / 'checkpoint-avg.pth.tar').write_bytes(b'')
    keep_best(tmp_path, checkpoint(epoch=0, state_dict={}), [50.0], 1, 'test_vit')
    assert (tmp_path / 'checkpoint-avg.pth.tar').exists() and (tmp_path / 'checkpoint-0.pth.tar').exists()


def test_kept_checkpoints_are_timms(image_folder, tmp_path, no_pictures):
    options = dict(epochs=3, checkpoint_hist=3, model_ema=True, model_ema_decay=0.5, eval_metric='loss')
    folder = finetune(settings(image_folder, tmp_path / 'run', **options))
    losses = [min(float(row['eval_loss']), float(row['ema_loss'])) for row in rows(folder)]
    kept = [torch.load(folder / f'checkpoint-{epoch}.pth.tar', weights_only=True) for epoch in range(3)]
    assert [state['metric'] for state in kept] == pytest.approx([-loss for loss in losses], rel=1e-5)
    model = timm.create_model('test_vitresnet', num_classes=2, img_size=32)
    last = torch.load(folder / 'last.pth.tar', weights_only=True)
    for use_ema, expected in ((False, weights(folder)), (True, last['state_dict_ema'])):
        timm.models.load_checkpoint(model, str(folder / 'checkpoint-2.pth.tar'), use_ema=use_ema)
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
