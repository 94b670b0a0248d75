"""Fashion-MNIST: hybrids and their parents, trained by one recipe (`timm-vitres recipes fmnist`) from random weights.

    python benchmarks/fmnist.py --output fmnist --arms wide resnet --seeds 0 [--record] [--threads 1]

The recipe, and each run's epoch, are chosen on 5% of the training images; the 10,000 test images are looked at once,
when a run is over, by a model that was loaded from its folder: as it is, and with six views of each image (`--tta
shift`). A run that was killed goes on. --record appends a row per run to benchmarks/results/fmnist.csv. Any setting of
the recipe may be given anew, as --set name=value; the row has it. `wide` is ResNet-20 of twice its width, all of its
stages at 28, 14 and 7 pixels, and a block of attention behind them. The arm `deeper` of another row began with the
weights of the first, and with more blocks, which began as the identity (Net2Net, arXiv:1511.05641). --teachers gives
folders of runs of the same seed, and so of the same validation images, from whose mean logits the arms learn. Data: the
Debian package dataset-fashion-mnist, or --data-dir with its four .gz files.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch
from common import is_recorded, parse_changes, run_name, told, train, write_row
from image_sets import FASHION, unpack
from ship import images_of
from timm.models import register_model
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_vitres
from timm_vitres.training.report import best_epoch, read_summary
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.views import averaged

DATA = dict(dataset='torch/fashion_mnist', val_split='')
WIDE = dict(stem_chs=32, channels=(32, 64, 128), strides=(1, 2, 2))
# What an arm is, beside the recipe. All but the interleaved one are made to have as many parameters as the wide one,
# to 5%: the same ResNet without the block that attends, six blocks of ViT on patches of 4 pixels, the serial hybrid
ARMS: Dict[str, Dict[str, Any]] = {
    'wide': dict(model='vitresnet_mix_nano', model_kwargs=dict(WIDE, layers=(3, 3, 4), attn_blocks=(0, 0, 1))),
    'resnet': dict(model='vitresnet_mix_nano', model_kwargs=dict(WIDE, layers=(3, 3, 3), attn_blocks=(0, 0, 0))),
    'vit': dict(
        model='vitresnet',
        model_kwargs=dict(backbone='', patch_size=4, embed_dim=124, depth=6, num_heads=4, class_token=False),
    ),
    'serial': dict(model='vitresnet_nano'),
    'interleaved': dict(model='vitresnet_mix_nano'),
}


class Average(nn.Module):
    """Models of the same classes as one, whose logits (B, classes) are the mean of theirs."""

    def __init__(self, models: List[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.num_classes = models[0].num_classes
        self.pretrained_cfg = models[0].pretrained_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([model(x) for model in self.models]).mean(0)


def register_teachers(folders: List[Path]) -> str:
    """Register the runs in some folders with timm as one model, and return its name."""

    @register_model
    def average(pretrained: bool = False, **kwargs: Any) -> Average:
        return Average(
            [timm.create_model(f'local-dir:{folder}', pretrained=pretrained, **kwargs) for folder in folders]
        )

    return average.__name__


def test(folder: Path, root: Path) -> Dict[str, float]:
    """Return the top-1 accuracy of a finished run's model on the test images, in percent, with and without views."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = images_of(model, DATA['dataset'], str(root), 'validation')
    right = dict.fromkeys(('', 'shift'), 0)
    with torch.inference_mode():
        for x, target in tqdm(DataLoader(images, batch_size=250), desc='test', leave=False):
            for tta in right:
                right[tta] += int((averaged(model, x, tta).argmax(1) == target).sum())
    figures = {'test_top1': right[''], 'test_top1_tta': right['shift']}
    return {name: round(100 * count / len(images), 2) for name, count in figures.items()} | dict(
        test_images=len(images), params=sum(parameter.numel() for parameter in model.parameters())
    )


def run(arm: str, seed: int, root: Path, output: Path, changes: Dict[str, Any]) -> Dict[str, Any]:
    """Train an arm, or go on, and return its row."""
    settings = {**timm_vitres.recipe('fmnist'), **DATA, **ARMS[arm], **changes}
    folder = output / run_name(arm, changes=changes, seed=seed)
    cfg = FinetuneCfg(**settings, data_dir=str(root), output=str(folder), seed=seed)
    train(cfg)
    rows = read_summary(folder)
    chosen = json.loads((folder / 'run.json').read_text(encoding='utf-8'))['autotuned']
    return dict(
        arm=arm,
        model=cfg.model,
        seed=seed,
        changes=told(changes),
        model_kwargs=told(cfg.model_kwargs or {}),
        autotuned=told(chosen or {}),  # the precision and the memory format that were fastest here
        epochs=len(rows),
        val_top1=round(best_epoch(rows, 'top1').metric('top1'), 2),
        **test(folder, root),
        train_seconds=round(sum(row['seconds'] for row in rows)),
        threads=torch.get_num_threads(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, help='folder for data and runs')
    parser.add_argument('--data-dir', type=Path, default=FASHION)
    parser.add_argument('--arms', nargs='+', choices=ARMS, default=list(ARMS))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help="settings in place of the recipe's")
    parser.add_argument('--teachers', type=Path, nargs='+', metavar='FOLDER', help='runs to learn from, as their mean')
    parser.add_argument('--note', default='', help='what the rows shall tell beside')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--record', action='store_true', help='append a row per run to benchmarks/results/fmnist.csv')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    changes = parse_changes(args.set)
    if args.teachers:
        changes = {'kd_model_name': register_teachers(args.teachers), **changes}
    root = unpack(args.data_dir, args.output / 'data')
    if changes.get('pretrained') and args.seeds != [0]:
        parser.error('seeds: got another than 0, with which weights of ours learnt; they know its validation images.')
    for seed in args.seeds:
        for arm in args.arms:
            row = dict(arm=arm, seed=seed, changes=told(changes))
            if args.record and is_recorded('fmnist', row):
                print(f'fmnist.csv has its row, and the test images are looked at once: {told(row)}')
                continue
            write_row('fmnist', {**run(arm, seed, root, args.output, changes), 'note': args.note}, args.record)


if __name__ == '__main__':
    main()
