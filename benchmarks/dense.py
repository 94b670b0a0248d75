"""The demo of dense prediction: a U-Net and a DPT on a hybrid find handwriting on photographs, pixel by pixel.

    python benchmarks/dense.py --output demo-dense [--model vitresnet_base] [--seeds 0 1 2] [--record]

Data, from packages, nothing else is downloaded: handwriting from scikit-learn (1,797 scanned digits; Alpaydin and
Kaynak 1998, UCI, CC BY 4.0) is written over photographs from scikit-image, in random places, sizes and colours, so that
of every pixel it is known whether it is ink. The last quarter of the digits, in the order of their file, and four of
the photographs are held out: no test image shares either with training. The U-Net of a ResNet is trained beside the
two, on the same images. What is trained is kept in the output folder, and not trained again. --record appends a row per
arm and seed to benchmarks/results/dense.csv, and draws benchmarks/results/dense.png.
"""

import argparse
import shutil
import time
from importlib.resources import files
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Tuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import append_row
from PIL import Image
from torch import nn
from tqdm import tqdm

import timm_vitres

try:
    import segmentation_models_pytorch as smp
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f'The demo needs {error.name}: pip install timm-vitres[dense]') from None

PHOTOGRAPHS = ('astronaut.png', 'brick.png', 'camera.png', 'clock_motion.png', 'coins.png', 'grass.png', 'ihc.png')
PHOTOGRAPHS += ('hubble_deep_field.jpg', 'moon.png', 'motorcycle_left.png', 'motorcycle_right.png', 'retina.jpg')
HELD_OUT = ('chelsea.png', 'coffee.png', 'gravel.png', 'rocket.jpg')
TRAIN_SIZE = (96, 96)
# The models have seen neither size nor shape of the second kind of test image
TEST_SIZES = {'same': (96, 96), 'larger': (128, 160)}
RECIPE = dict(steps=200, batch_size=8, warmup=50, weight_decay=0.05, clip_grad=1.0)
# A ViT wants smaller steps than a ResNet does
LR = {'hybrid': 3e-4, 'resnet': 1e-3}


class Parts(NamedTuple):
    """What images are put together from: digits (n, 8, 8) of 0 to 16, photographs (h, w, 3) of uint8."""

    digits: np.ndarray
    photographs: List[np.ndarray]


def load_parts(held_out: bool) -> Parts:
    """Return the digits and photographs of training, or those held out."""
    try:
        folder = files('skimage.data')
    except ModuleNotFoundError:
        raise SystemExit('The demo needs its photographs: pip install timm-vitres[dense]') from None
    photographs = []
    for name in HELD_OUT if held_out else PHOTOGRAPHS:
        photograph = Image.open(str(folder / name)).convert('RGB')
        photograph.thumbnail((320, 320), Image.Resampling.LANCZOS)
        photographs.append(np.asarray(photograph))
    digits = load_digits().images
    cut = len(digits) * 3 // 4
    return Parts(digits[cut:] if held_out else digits[:cut], photographs)


def ink(digit: np.ndarray, height: int, angle: float) -> np.ndarray:
    """Return how much of each pixel a digit's strokes cover, from 0 to 1: (height, about 0.85 height)."""
    strokes = Image.fromarray((digit * 15).astype(np.uint8))
    strokes = strokes.resize((round(0.85 * height), height), Image.Resampling.BICUBIC)
    strokes = strokes.rotate(angle, Image.Resampling.BICUBIC)
    return np.clip((np.asarray(strokes) / 240 - 0.35) / 0.2, 0, 1)


def compose(parts: Parts, size: Tuple[int, int], generator: np.random.Generator) -> Tuple[np.ndarray, np.ndarray]:
    """Return an image, (h, w, 3) of uint8, with digits on a photograph, and where their ink is, (h, w) of bool."""
    photograph = parts.photographs[generator.integers(len(parts.photographs))]
    top, left = (generator.integers(whole - part + 1) for whole, part in zip(photograph.shape, size))
    image = photograph[top : top + size[0], left : left + size[1]].astype(np.float64)
    mask = np.zeros(size, bool)
    taken = np.zeros(size, bool)
    count = round(generator.integers(4, 8) * mask.size / 96**2)  # as many to an area in images of every size
    for index in generator.integers(len(parts.digits), size=count):
        alpha = ink(parts.digits[index], int(generator.integers(20, 41)), generator.uniform(-12, 12))
        for _ in range(8):  # tries to find a place that is free
            top, left = (generator.integers(whole - part + 1) for whole, part in zip(size, alpha.shape))
            box = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
            if not taken[box].any():
                taken[box] = True
                image[box] += alpha[..., None] * (contrasting(image[box], generator) - image[box])
                mask[box] = alpha > 0.5
                break
    return image.round().astype(np.uint8), mask


def contrasting(patch: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a random colour that is visible on a patch of an image."""
    while True:
        colour = generator.uniform(0, 255, 3)
        if abs(colour.mean() - patch.mean()) > 50:
            return colour


def batch(parts: Parts, size: Tuple[int, int], count: int, generator: np.random.Generator):
    """Return count images, (count, 3, h, w) of -1 to 1, and their masks, (count, 1, h, w) of 0 and 1."""
    images, masks = zip(*(compose(parts, size, generator) for _ in range(count)))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, torch.from_numpy(np.stack(masks))[:, None].float()


def arms(model: str, resnet: str) -> Dict[Tuple[str, str], Callable[[], nn.Module]]:
    """Return the models by decoder and encoder, each as a function that builds it from random weights."""
    with torch.device('meta'):
        levels = len(timm.create_model(model, features_only=True).feature_info.reduction())

    def unet(name: str, depth: int) -> nn.Module:
        channels = (256, 128, 64, 32, 16)[:depth]
        options = dict(encoder_weights=None, encoder_depth=depth, decoder_channels=channels, classes=1)
        return smp.Unet(f'tu-{name}', **options)

    def dpt() -> nn.Module:
        # DPT-Hybrid reads two stages of the ResNet, a block, and the last; smp's decoder has 256 channels by default
        indices, options = [1, 2, -4, -1], dict(encoder_weights=None, decoder_fusion_channels=128, classes=1)
        return smp.DPT(f'tu-{model}', encoder_output_indices=indices, **options)

    return {
        ('U-Net', model): lambda: unet(model, levels),
        ('DPT', model): dpt,
        ('U-Net', resnet): lambda: unet(resnet, 5),
    }


def train(model: nn.Module, parts: Parts, lr: float, seed: int, steps: int, amp: bool) -> None:
    """Train a model in place, on images that the seed determines: cross-entropy and Dice loss, AdamW, a cosine."""
    generator = np.random.default_rng(seed)
    dice = smp.losses.DiceLoss('binary')
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=RECIPE['weight_decay'], fused=True)
    warmup = min(RECIPE['warmup'], max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
        ],
        milestones=[warmup],
    )
    model.train()
    with tqdm(total=steps, desc=f'seed {seed}', unit='step') as bar:
        for _ in range(steps):
            x, y = batch(parts, TRAIN_SIZE, RECIPE['batch_size'], generator)
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                logits = model(x)
            loss = F.binary_cross_entropy_with_logits(logits.float(), y) + dice(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), RECIPE['clip_grad'])
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f'{loss.item():.3f}', refresh=False)
            bar.update()
    if not np.isfinite(loss.item()):
        raise SystemExit(f'The loss is {loss.item()} after {steps} steps.')


def bfloat16_is_faster(model: nn.Module) -> bool:
    """Time a step of training in both precisions, on this machine; the model stays as it is."""
    model.eval()
    x = torch.randn(RECIPE['batch_size'], 3, *TRAIN_SIZE)
    times = {}
    for amp in (False, True, False, True):  # the first of each warms up
        start = time.perf_counter()
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            model(x).float().square().mean().backward()
        times[amp] = time.perf_counter() - start
    model.zero_grad()
    return times[True] < times[False]


@torch.inference_mode()
def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return where a model sees ink, (n, 1, h, w) of 0 and 1."""
    return torch.cat([(model.eval()(some) > 0).float() for some in x.split(16)])


def intersection_over_union(predicted: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the IoU (%) of two sets of masks of 0 and 1, over all their pixels."""
    return round(100 * ((predicted * truth).sum() / torch.maximum(predicted, truth).sum()).item(), 2)


def otsu(x: torch.Tensor) -> torch.Tensor:
    """Return masks made without learning: the smaller side of Otsu's threshold is the ink."""
    from skimage.filters import threshold_otsu

    masks = []
    for grey in x.mean(1).numpy():
        mask = grey > threshold_otsu(grey)
        masks.append(torch.from_numpy(mask if mask.mean() < 0.5 else ~mask))
    return torch.stack(masks)[:, None].float()


def draw(x: torch.Tensor, masks: Dict[str, torch.Tensor], path: Path) -> None:
    """Draw images, and below them masks by name."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1 + len(masks), len(x), figsize=(1.25 * len(x), 1.02 * (1 + len(masks))))
    rows = {'image': (x + 1) / 2, **masks}
    for row, (name, images) in enumerate(rows.items()):
        for axis, image in zip(axes[row], images):
            axis.imshow(image.permute(1, 2, 0).numpy(), cmap='gray', vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name.replace(', ', ',\n'), fontsize=7)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def trained(build: Callable[[], nn.Module], path: Path, parts: Parts, settings: dict) -> Tuple[nn.Module, dict]:
    """Return a trained model, and how its training went: from the file, if it is there, else by training."""
    torch.manual_seed(settings['seed'])
    model = build()
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept['settings'] != settings:
            raise SystemExit(f'{path} was trained with {kept["settings"]}, not {settings}; give another --output.')
        model.load_state_dict(kept['weights'])
        return model, kept['course']
    amp = bfloat16_is_faster(model)
    print(f'{path.stem}: {settings["steps"]} steps in {"bfloat16" if amp else "float32"}, which is faster here')
    start = time.perf_counter()
    train(model, parts, amp=amp, **settings)
    course = dict(precision='bfloat16' if amp else 'float32', train_seconds=round(time.perf_counter() - start))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix('.tmp')
    torch.save(dict(weights=model.state_dict(), settings=settings, course=course), beside)
    beside.replace(path)
    return model, course


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('demo-dense'), help='folder for models and the picture')
    parser.add_argument('--model', default='vitresnet_base', help='the hybrid')
    parser.add_argument('--resnet', default='resnext101_32x8d', help='the ResNet beside it')
    parser.add_argument('--steps', type=int, default=RECIPE['steps'])
    parser.add_argument('--images', type=int, default=200, help='held-out images of each size')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--record', action='store_true', help='append the figures to benchmarks/results/dense.csv')
    args = parser.parse_args()
    start = time.perf_counter()
    parts, held_out = load_parts(held_out=False), load_parts(held_out=True)
    tests = {name: batch(held_out, size, args.images, np.random.default_rng(0)) for name, size in TEST_SIZES.items()}
    without = {name: intersection_over_union(otsu(x), y) for name, (x, y) in tests.items()}
    results = Path(__file__).parent / 'results'
    for seed in args.seeds:
        x, y = (some[:8] for some in tests['larger'])
        shown = {'truth': y}
        for (decoder, encoder), build in arms(args.model, args.resnet).items():
            lr = LR['hybrid' if encoder == args.model else 'resnet']
            path = args.output / f'{decoder}-{encoder}-seed{seed}.pt'
            model, course = trained(build, path, parts, dict(lr=lr, seed=seed, steps=args.steps))
            shown[f'{decoder}, {encoder}'] = predict(model, x)
            row = dict(
                decoder=decoder, encoder=encoder, seed=seed, parameters=sum(p.numel() for p in model.parameters())
            )
            for name, (images, truth) in tests.items():
                row[f'iou_{name}'] = intersection_over_union(predict(model, images), truth)
                row[f'otsu_{name}'] = without[name]
            print(
                f'{decoder} on {encoder}, seed {seed}: IoU {row["iou_same"]}% on {args.images} held-out images; of a '
                f'size that it has not seen, {row["iou_larger"]}% (Otsu, which does not learn: {without["same"]}%, '
                f'{without["larger"]}%).'
            )
            if args.record:
                append_row(results / 'dense.csv', dict(row, images=args.images, steps=args.steps, lr=lr, **course))
        picture = args.output / f'dense-seed{seed}.png'
        draw(x, shown, picture)
        if args.record and seed == args.seeds[0]:
            shutil.copy(picture, results / 'dense.png')
        print(f'The models are in {args.output}, what they see of eight held-out images in {picture}.')
    print(f'Done in {time.perf_counter() - start:.0f} s (timm-vitres {timm_vitres.__version__}).')


if __name__ == '__main__':
    main()
