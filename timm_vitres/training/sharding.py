"""A model over many processes: images shared (DDP), or its weights, too (FSDP, torch's `fully_shard`)."""

import torch
from timm.layers import convert_sync_batchnorm
from timm.task.task import TrainingTask
from torch import nn

from .processes import Processes
from .settings import FinetuneCfg

# the lists of equal parts that timm's models are made of; each part is gathered when it computes
PARTS = ('blocks', 'stages', 'units', 'layers', 'layer1', 'layer2', 'layer3', 'layer4')


def check_processes(cfg: FinetuneCfg, device: torch.device, processes: Processes) -> None:
    """Raise ValueError for settings that do not go with the processes of a run, or with each other in many."""
    if cfg.sync_bn and processes.count > 1 and device.type != 'cuda':
        raise ValueError(f"sync_bn: torch synchronises BatchNorm on GPUs only, but the run's device is {device.type}.")
    if not cfg.fsdp:
        return
    if processes.count == 1:
        raise ValueError('fsdp: there is one process, and nothing to shard over; start the run by torchrun.')
    for name in ('model_ema', 'torchcompile', 'kd_model_name', 'lora', 'freeze', 'checkpoint_hist'):
        if getattr(cfg, name):
            raise ValueError(f'fsdp: does not go with {name}; leave one of them out.')
    if cfg.amp and cfg.amp_dtype == 'float16':
        raise ValueError("fsdp: does not go with amp_dtype 'float16'; use 'bfloat16'.")
    if cfg.opt.lower().startswith('lookahead'):
        raise ValueError(f'fsdp: does not go with opt {cfg.opt!r}, which saving it would step; leave out lookahead.')
    if cfg.clip_grad is not None and cfg.clip_mode == 'agc':
        raise ValueError("fsdp: does not go with clip_mode 'agc'; use 'norm' or 'value'.")


def synchronised(model: nn.Module, cfg: FinetuneCfg, processes: Processes) -> nn.Module:
    """Return the model with BatchNorms that see the images of all processes, where the settings say so."""
    return convert_sync_batchnorm(model) if cfg.sync_bn and processes.count > 1 else model


def shard_(model: nn.Module, device: torch.device, processes: Processes) -> None:
    """Shard a model's weights over all processes, its blocks and stages each on its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.count,))
    sharded = ''
    for name, part in list(model.named_modules()):
        if name.rpartition('.')[2] not in PARTS or not isinstance(part, (nn.ModuleList, nn.Sequential)):
            continue
        if sharded and name.startswith(sharded):  # the blocks of a stage that is gathered as a whole
            continue
        sharded = f'{name}.'
        for child in part.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)


def share_images_(task: TrainingTask, device: torch.device, cfg: FinetuneCfg) -> None:
    """Let a task average its gradients over all processes (DDP); again, after other parameters are to be trained."""
    module = task.get_trainable_module()
    if isinstance(module, nn.parallel.DistributedDataParallel):
        task.trainable_module = module.module
    task.prepare_distributed(
        device_ids=[device.index] if device.type == 'cuda' else None,
        find_unused_parameters=cfg.head_loss in ('resnet', 'vit'),  # what leads to the other head alone has no gradient
    )
