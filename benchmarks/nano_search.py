"""Choose vitresnet_nano: accuracy for CPU training time on a fixed budget of 2 epochs of Fashion-MNIST.

    python benchmarks/nano_search.py time
    python benchmarks/nano_search.py train --seeds 0 [--only NAME ...]

`time` measures the training step of all candidates in one process, in interleaved rounds, and writes the median of
the ratios to the first candidate. `train` trains on 54,000 images and reports the accuracy on the other 6,000 of the
training set; the test set is not touched. Rows are appended to benchmarks/results/nano_search_{time,train}.csv.
Data: the Debian package dataset-fashion-mnist, or --data-dir with its four .gz files.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import append_row
from image_sets import FASHION, photographs
from timm.optim import create_optimizer_v2
from tqdm import tqdm

import timm_vitres  # noqa: F401

RESULTS = Path(__file__).parent / 'results'

# What the candidates share: thin BatchNorm stages of basic blocks after a deep 3x3 stem, mean-pooled blocks.
SHARED = dict(backbone='resnet18', stem_type='deep', stem_width=16, class_token=False, global_pool='avg')
# name: (ResNet blocks, widths, stem stride), (width, depth, heads, LayerScale)
CANDIDATES = {
    'r22_w64-128_v1_d128': dict(layers=(2, 2), channels=(64, 128), stem_stride=2, embed_dim=128, depth=1, num_heads=4),
    'r22_w64-128_v1_d128_ls': dict(
        layers=(2, 2), channels=(64, 128), stem_stride=2, embed_dim=128, depth=1, num_heads=4, init_values=0.1
    ),
    'r22_w48-96_v3_d128_ls': dict(
        layers=(2, 2), channels=(48, 96), stem_stride=2, embed_dim=128, depth=3, num_heads=4, init_values=0.1
    ),
    'r11_w64-128_v2_d128_ls': dict(
        layers=(1, 1), channels=(64, 128), stem_stride=2, embed_dim=128, depth=2, num_heads=4, init_values=0.1
    ),
    'r11_w32-64_v4_d128_ls': dict(
        layers=(1, 1), channels=(32, 64), stem_stride=2, embed_dim=128, depth=4, num_heads=4, init_values=0.1
    ),
    'r221_w32-64-128_v2_d128_ls': dict(
        layers=(2, 2, 1), channels=(32, 64, 128), stem_stride=2, embed_dim=128, depth=2, num_heads=4, init_values=0.1
    ),
    'r111_w48-96-160_v2_d160_ls': dict(
        layers=(1, 1, 1), channels=(48, 96, 160), stem_stride=2, embed_dim=160, depth=2, num_heads=4, init_values=0.1
    ),
    'r111_w64-96-128_v4_d128': dict(
        layers=(1, 1, 1), channels=(64, 96, 128), stem_stride=2, embed_dim=128, depth=4, num_heads=4
    ),
    'r22_w64-128_v2_d128_ls_s4': dict(
        layers=(2, 2), channels=(64, 128), stem_stride=4, embed_dim=128, depth=2, num_heads=4, init_values=0.1
    ),
    'r32_w48-128_v1_d128_ls': dict(
        layers=(3, 2), channels=(48, 128), stem_stride=2, embed_dim=128, depth=1, num_heads=4, init_values=0.1
    ),
    # the two ends, for comparison
    'resnet_r222_w48-96-128': dict(layers=(2, 2, 2), channels=(48, 96, 128), stem_stride=2, depth=0),
    'vit_d128_6': dict(backbone='', stem_type=None, stem_width=None, patch_size=4, embed_dim=128, depth=6, num_heads=4),
}
BATCH_SIZE, EPOCHS, LR, WEIGHT_DECAY = 128, 2, 2e-3, 0.05


def create(name: str) -> torch.nn.Module:
    """Return a candidate for grey images of 28 x 28 and 10 classes."""
    args = {key: value for key, value in {**SHARED, **CANDIDATES[name]}.items() if value is not None}
    return timm.create_model('vitresnet', num_classes=10, in_chans=1, img_size=28, **args)


def load_data(folder: Path) -> tuple:
    """Return the 60,000 training images (N, 1, 28, 28), standardised, and their labels."""
    images, labels = photographs(folder, 'train')
    images = torch.from_numpy(images[:, None].copy()).float().div(255)
    return (images - images.mean()) / images.std(), torch.from_numpy(labels.astype(np.int64))


def augment(x: torch.Tensor) -> torch.Tensor:
    """Shift a batch by up to 2 pixels, and mirror half of it."""
    top, left = torch.randint(0, 5, (2,)).tolist()
    x = F.pad(x, (2, 2, 2, 2), value=x.min().item())[:, :, top : top + 28, left : left + 28]
    mirror = torch.rand(len(x)) < 0.5
    return torch.where(mirror[:, None, None, None], x.flip(-1), x)


def train(name: str, seed: int, images: torch.Tensor, labels: torch.Tensor) -> dict:
    """Train a candidate on 54,000 of the images and return its accuracy on the others."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train_idx, val_idx = order[:54_000], order[54_000:]
    torch.manual_seed(seed)
    model = create(name)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=LR, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(train_idx) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.2)
    start = time.process_time()
    with tqdm(total=steps, desc=f'{name} seed {seed}', mininterval=10) as bar:
        for _ in range(EPOCHS):
            model.train()
            shuffled = train_idx[torch.randperm(len(train_idx))]
            for batch in shuffled[: len(shuffled) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
                loss = F.cross_entropy(model(augment(images[batch])), labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    cpu_seconds = time.process_time() - start
    model.eval()
    with torch.inference_mode():
        correct = sum((model(images[b]).argmax(1) == labels[b]).sum().item() for b in val_idx.split(500))
    return dict(
        candidate=name,
        seed=seed,
        params=sum(p.numel() for p in model.parameters()),
        val_top1=round(100 * correct / len(val_idx), 2),
        cpu_seconds=round(cpu_seconds, 1),
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        lr=LR,
    )


def time_steps(rounds: int, images: torch.Tensor, labels: torch.Tensor) -> list:
    """Return, for every candidate, the median over rounds of its training step's time / the first candidate's."""
    models = {name: create(name).train() for name in CANDIDATES}
    x, y = images[:BATCH_SIZE], labels[:BATCH_SIZE]
    seconds = {name: [] for name in models}
    for round_ in tqdm(range(rounds + 2), desc='rounds'):
        for name, model in models.items():
            start = time.perf_counter()
            F.cross_entropy(model(x), y).backward()
            if round_ >= 2:  # two to warm up
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(models))
    rows = []
    for name, model in models.items():
        ratios = [own / base for own, base in zip(seconds[name], seconds[first])]
        rows.append(
            dict(
                candidate=name,
                params=sum(p.numel() for p in model.parameters()),
                images_per_second=round(BATCH_SIZE / statistics.median(seconds[name]), 1),
                step_ratio=round(statistics.median(ratios), 3),
                step_ratio_min=round(min(ratios), 3),
                step_ratio_max=round(max(ratios), 3),
                rounds=rounds,
                threads=torch.get_num_threads(),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('time', 'train'))
    parser.add_argument('--data-dir', type=Path, default=FASHION)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--only', nargs='+', choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images, labels = load_data(args.data_dir)
    if args.what == 'time':
        for row in time_steps(args.rounds, images, labels):
            append_row(RESULTS / 'nano_search_time.csv', row)
        return
    for name in args.only:
        for seed in args.seeds:
            append_row(RESULTS / 'nano_search_train.csv', train(name, seed, images, labels))


if __name__ == '__main__':
    main()
