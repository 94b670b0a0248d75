import pytest
import timm
import torch
from torch import nn

from timm_vitres.training.processes import Processes
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.sharding import check_processes, synchronised

CPU = torch.device('cpu')
TWO = Processes(rank=0, count=2)


def cfg(**kwargs) -> FinetuneCfg:
    return FinetuneCfg(data_dir='images', model='test_vitresnet', **kwargs)


@pytest.mark.parametrize(
    'settings, says',
    [
        (dict(fsdp=True, model_ema=True), 'model_ema'),
        (dict(fsdp=True, torchcompile='inductor'), 'torchcompile'),
        (dict(fsdp=True, kd_model_name='resnet18'), 'kd_model_name'),
        (dict(fsdp=True, lora=4), 'lora'),
        (dict(fsdp=True, freeze='resnet'), 'freeze'),
        (dict(fsdp=True, checkpoint_hist=2), 'checkpoint_hist'),
        (dict(fsdp=True, amp=True, amp_dtype='float16'), 'float16'),
        (dict(fsdp=True, clip_grad=1.0, clip_mode='agc'), 'agc'),
    ],
)
def test_what_does_not_go_with_sharding(settings, says):
    with pytest.raises(ValueError, match=f'^fsdp: .*{says}'):
        check_processes(cfg(**settings), CPU, TWO)


def test_one_process_has_nothing_to_shard_over():
    with pytest.raises(ValueError, match=r'^fsdp: there is one process'):
        check_processes(cfg(fsdp=True), CPU, Processes())
    check_processes(cfg(sync_bn=True), CPU, Processes())
    with pytest.raises(ValueError, match=r'^sync_bn: .*cpu'):
        check_processes(cfg(sync_bn=True), CPU, TWO)


def test_batch_norms_are_synchronised_only_where_that_is_asked_for():
    def norms(settings, processes):
        model = synchronised(timm.create_model('test_vitresnet_dual'), settings, processes)
        kinds = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        return len(kinds), sum(isinstance(layer, nn.SyncBatchNorm) for layer in kinds)

    plain, synced = norms(cfg(), TWO), norms(cfg(sync_bn=True), TWO)
    assert plain[0] == synced[0] > 0
    assert (plain[1], synced[1]) == (0, synced[0])
    assert norms(cfg(sync_bn=True), Processes()) == plain
