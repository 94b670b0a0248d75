"""Fashion-MNIST: hybrids and their parents, trained by one recipe (`timm-vitres recipes fmnist`) from random weights.

    python benchmarks/fmnist.py --output fmnist --arms wide resnet --seeds 0 [--record] [--threads 1]

The recipe, and each run's epoch, are chosen on 5% of the training images; the 10,000 test images are looked at once,
when a run is over, by a model that was loaded from its folder: as it is, and with six views of each image (`--tta
shift`). A run that was killed goes on. --record appends a row per run to benchmarks/results/fmnist.csv. Any setting of
the recipe may be given anew, as --set name=value; the row has it. `wide` is ResNet-20 of twice its width, all of its
stages at 28, 14 and 7 pixels, and a block of attention behind them; `large` has two blocks more. --grow begins with
the weights of a run of fewer blocks, and with further blocks that are the identity (Net2Net, arXiv:1511.05641), as did
the arm `deeper` of an old row, with those of the shipped weights. --teachers gives folders of runs of the same seed,
and so of the same validation images, from whose mean logits the arms learn. --mean trains nothing: of runs that went on
from the same weights, it saves the mean of their weights as a model of its own (model soups, arXiv:2203.05482), and
looks at the test images with that. Data: the Debian package dataset-fashion-mnist, or --data-dir with its four .gz
files.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

import timm
import torch
from common import is_recorded, parse_changes, run_name, told, train, write_row
from image_sets import FASHION, unpack
from ship import images_of
from timm.models import register_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import timm_vitres
from timm_vitres.data import data_config
from timm_vitres.training.report import best_epoch, read_summary
from timm_vitres.training.settings import FinetuneCfg
from timm_vitres.training.splits import stratified_split
from timm_vitres.views import averaged
from timm_vitres.writing import replacing

DATA = dict(dataset='torch/fashion_mnist', val_split='')
MEAN_NAME = 'mean.json'  # beside a mean of weights: whose, and the settings of the first
WIDE = dict(stem_chs=32, channels=(32, 64, 128), strides=(1, 2, 2))
# What an arm is, beside the recipe. All but the large and the interleaved one have as many parameters as the wide one,
# to 5%: the same ResNet without the block that attends, six blocks of ViT on patches of 4 pixels, the serial hybrid
ARMS: Dict[str, Dict[str, Any]] = {
    'wide': dict(model='vitresnet_mix_nano', model_kwargs=dict(WIDE, layers=(3, 3, 4), attn_blocks=(0, 0, 1))),
    'resnet': dict(model='vitresnet_mix_nano', model_kwargs=dict(WIDE, layers=(3, 3, 3), attn_blocks=(0, 0, 0))),
    'vit': dict(
        model='vitresnet',
        model_kwargs=dict(backbone='', patch_size=4, embed_dim=124, depth=6, num_heads=4, class_token=False),
    ),
    'serial': dict(model='vitresnet_nano'),
    'large': dict(model='vitresnet_mix_nano', model_kwargs=dict(WIDE, layers=(3, 4, 5), attn_blocks=(0, 0, 1))),
    'interleaved': dict(model='vitresnet_mix_nano'),
}


class Average(nn.Module):
    """Models of the same classes as one, whose logits (B, classes) are the mean of theirs."""

    def __init__(self, models: List[nn.Module]) -> None:
        super().__init__()
        for model in models:
            if data_config(model) != data_config(models[0]):
                raise SystemExit(
                    'teachers: they take images of other sizes or normalisations; their mean says nothing.'
                )
        self.models = nn.ModuleList(models)
        self.num_classes = models[0].num_classes
        self.pretrained_cfg = models[0].pretrained_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([model(x) for model in self.models]).mean(0)


def settings_of(folder: Path) -> Dict[str, Any]:
    """Return the settings of a run, or of a mean of runs, by its folder; SystemExit for what is neither."""
    for path in (folder / 'run.json', folder / MEAN_NAME):
        if path.is_file():
            return json.loads(path.read_text(encoding='utf-8'))['settings']
    raise SystemExit(f'{folder}: is no run of this script.')


def check_images(folder: Path, seed: int, val_frac: float) -> None:
    """Raise SystemExit where a run held other images out than one of this seed: it may have learnt from these."""
    settings = settings_of(folder)
    if (settings['seed'], settings['val_frac']) != (seed, val_frac):
        own = f'of seed {settings["seed"]}, a part of {settings["val_frac"]:g}'
        raise SystemExit(f'{folder}: held other validation images out ({own}) than of seed {seed}, {val_frac:g}.')


def digest(folders: List[Path]) -> str:
    """Return a name for the weights in some folders: other weights have another, wherever they lie."""
    sums = [json.loads((folder / 'config.json').read_text(encoding='utf-8'))['model_sha256'] for folder in folders]
    return hashlib.sha256(' '.join(sums).encode()).hexdigest()[:8]


def register_teachers(folders: List[Path]) -> str:
    """Register the runs in some folders with timm as one model, and return its name, which others do not have."""

    def average(pretrained: bool = False, **kwargs: Any) -> Average:
        return Average(
            [timm.create_model(f'local-dir:{folder}', pretrained=pretrained, **kwargs) for folder in folders]
        )

    average.__name__ = f'average_{digest(folders)}'
    return register_model(average).__name__


def grow(arm: str, source: Path, folder: Path) -> nn.Module:
    """Save an arm's model that computes what a run's does, the same whenever it is called, and return it.

    A stage's blocks are those of the run's; between the last two, which may attend, are blocks that change nothing.

    Raises:
        SystemExit: where an arm with further blocks can't compute the same.
    """
    old = timm.create_model(f'local-dir:{source}', pretrained=True).eval()
    size = old.pretrained_cfg['input_size']
    args = dict(num_classes=old.num_classes, in_chans=size[0], img_size=size[-2:])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        new = timm.create_model(ARMS[arm]['model'], **args, **ARMS[arm].get('model_kwargs', {})).eval()
    if not (hasattr(new, 'stages') and hasattr(old, 'stages')):
        raise SystemExit(f'{source}: only interleaved models have blocks that may be added, and the arm is {arm}.')
    for name in ('stem', 'final_conv', 'head'):
        getattr(new, name).load_state_dict(getattr(old, name).state_dict())
    for blocks, trained in zip(new.stages, old.stages):
        if len(blocks) < len(trained):
            raise SystemExit(f'{source}: has stages of more blocks than the arm {arm}.')
        for index, block in enumerate(blocks):
            if index < len(trained) - 1 or block is blocks[-1]:
                block.load_state_dict(trained[min(index, len(trained) - 1)].state_dict())
            else:
                nn.init.zeros_(block.conv2_kxk.bn.weight)
                nn.init.zeros_(block.conv2_kxk.bn.bias)
    x = torch.randn(8, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if not torch.allclose(new(x), old(x), atol=1e-4):
            raise SystemExit(f'{source}: the arm {arm} does not compute the same with its weights.')
    timm_vitres.save(new, folder, data_config=data_config(old))
    return new


def average_weights(arm: str, folders: List[Path], folder: Path) -> nn.Module:
    """Save the mean of the weights of runs of an arm as a folder of its own, and return the model.

    The statistics of BatchNorm are averaged like weights, and not measured anew.

    Raises:
        SystemExit: for a run of another arm.
    """
    own = json.loads(json.dumps({'model': ARMS[arm]['model'], 'model_kwargs': ARMS[arm].get('model_kwargs', {})}))
    for each in folders:
        settings = settings_of(each)
        found = {'model': settings['model'].partition('.')[0], 'model_kwargs': settings['model_kwargs'] or {}}
        if found != own:
            raise SystemExit(f'{each}: is no run of the arm {arm}, but of {told(found)}.')
    models = [timm.create_model(f'local-dir:{each}', pretrained=True).eval() for each in folders]
    states = [each.state_dict() for each in models]
    mean = {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(value.dtype)
        for key, value in states[0].items()
    }
    models[0].load_state_dict(mean)
    timm_vitres.save(models[0], folder)
    with replacing(folder / MEAN_NAME) as part:
        part.write_text(json.dumps({'settings': settings_of(folders[0]), 'of': list(map(str, folders))}))
    return models[0]


def top1(model: nn.Module, images: Dataset, tta: Sequence[str] = ('',)) -> List[float]:
    """Return a model's top-1 accuracy on images, in percent, by each kind of test-time augmentation."""
    right = dict.fromkeys(tta, 0)
    with torch.inference_mode():
        for x, target in tqdm(DataLoader(images, batch_size=250), desc='test', leave=False):
            for views in tta:
                right[views] += int((averaged(model, x, views).argmax(1) == target).sum())
    return [round(100 * count / len(images), 2) for count in right.values()]


def test(folder: Path, root: Path) -> Dict[str, float]:
    """Return the top-1 accuracy of a finished run's model on the test images, in percent, with and without views."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = images_of(model, DATA['dataset'], str(root), 'validation')
    plain, views = top1(model, images, ('', 'shift'))
    params = sum(parameter.numel() for parameter in model.parameters())
    return dict(test_top1=plain, test_top1_tta=views, test_images=len(images), params=params)


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
        val_top1=round(best_epoch(rows, cfg.eval_metric).metric('top1'), 2),
        **test(folder, root),
        train_seconds=round(sum(row['seconds'] for row in rows)),
        threads=torch.get_num_threads(),
    )


def run_mean(arm: str, seed: int, root: Path, output: Path, folders: List[Path]) -> Dict[str, Any]:
    """Return the row of the mean of some runs' weights; their validation images are held out by this seed."""
    folder = output / f'{arm}-mean-{digest(folders)}'
    model = average_weights(arm, folders, folder)
    images = images_of(model, DATA['dataset'], str(root), 'train')
    val_frac = settings_of(folders[0])['val_frac']
    held = stratified_split([int(target) for target in images.targets], val_frac, seed)[1]
    return dict(
        arm=arm,
        model=ARMS[arm]['model'],
        seed=seed,
        changes=told_mean(folders),
        model_kwargs=told(ARMS[arm].get('model_kwargs', {})),
        autotuned='',
        epochs=0,
        val_top1=top1(model, Subset(images, held))[0],
        **test(folder, root),
        train_seconds=0,
        threads=torch.get_num_threads(),
    )


def told_mean(folders: List[Path]) -> str:
    return told({'mean': '+'.join(sorted(map(str, folders)))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, help='folder for data and runs')
    parser.add_argument('--data-dir', type=Path, default=FASHION)
    parser.add_argument('--arms', nargs='+', choices=ARMS, default=list(ARMS))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--set', nargs='*', default=[], metavar='NAME=VALUE', help="settings in place of the recipe's")
    parser.add_argument('--teachers', type=Path, nargs='+', metavar='FOLDER', help='runs to learn from, as their mean')
    parser.add_argument('--grow', type=Path, metavar='FOLDER', help='a run of fewer blocks, to begin with its weights')
    parser.add_argument('--mean', type=Path, nargs='+', metavar='FOLDER', help='runs whose mean weights to test')
    parser.add_argument('--note', default='', help='what the rows shall tell beside')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--record', action='store_true', help='append a row per run to benchmarks/results/fmnist.csv')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    changes = parse_changes(args.set)
    if args.mean and (changes or args.grow or args.teachers):
        parser.error('mean: trains nothing; give neither set, grow nor teachers with it.')
    if (args.mean or args.grow) and len(args.arms) > 1:
        parser.error(f'arms: got {" ".join(args.arms)}, expected the one whose weights --mean or --grow make.')
    val_frac = changes.get('val_frac', timm_vitres.recipe('fmnist')['val_frac'])
    for folder in (*(args.teachers or ()), *(args.mean or ()), *([args.grow] if args.grow else ())):
        for seed in args.seeds:
            check_images(folder, seed, val_frac)
    if args.teachers:
        changes = {'kd_model_name': register_teachers(args.teachers), **changes}
    if args.grow:
        folder = args.output / f'{args.arms[0]}-from-{digest([args.grow])}'
        grow(args.arms[0], args.grow, folder)
        changes = {'initial_checkpoint': f'{folder}/model.safetensors', **changes}
    root = unpack(args.data_dir, args.output / 'data')
    if changes.get('pretrained') and args.seeds != [0]:
        parser.error('seeds: got another than 0, with which weights of ours learnt; they know its validation images.')
    for seed in args.seeds:
        for arm in args.arms:
            row = dict(arm=arm, seed=seed, changes=told_mean(args.mean) if args.mean else told(changes))
            if args.record and is_recorded('fmnist', row):
                print(f'fmnist.csv has its row, and the test images are looked at once: {told(row)}')
                continue
            if args.mean:
                found = run_mean(arm, seed, root, args.output, args.mean)
            else:
                found = run(arm, seed, root, args.output, changes)
            write_row('fmnist', {**found, 'note': args.note}, args.record)


if __name__ == '__main__':
    main()
