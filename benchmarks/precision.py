"""What low precision costs: in inference, on a model that is fine-tuned here, and in training, against the seeds.

    python benchmarks/precision.py --output precision --record

`timm-vitres finetune` trains a model from random weights on Fashion-MNIST (60,000 photographs of clothes, Xiao et al.
2017; a tenth is held out to choose the epoch by), for every seed in fp32 and in bf16. The 10,000 test images are then
looked at once by each: a row for every run in benchmarks/results/precision_train.csv. The first run's model is
prepared in every precision, for OpenVINO too, and exported as int8 for onnxruntime; int8 of both takes its ranges from
64 training images. What each gets right of the test images, on CPU, is a row in benchmarks/results/precision.csv.
Data: the Debian package dataset-fashion-mnist, or --data-dir with its four .gz files.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Callable

import timm
import torch
from common import train, write_row
from image_sets import FASHION, unpack
from timm.data import create_loader
from tqdm import tqdm

import timm_vitres
from timm_vitres.data import data_config
from timm_vitres.inference.exports import export, load
from timm_vitres.training.datasets import load_data
from timm_vitres.training.optimisation import lacks_bfloat16
from timm_vitres.training.report import read_summary
from timm_vitres.training.settings import FinetuneCfg

SETTINGS = {'fp32': {}, 'bf16': dict(amp=True)}
PATHS = ('fp32', 'bf16', 'int8', 'onnxruntime int8', 'openvino', 'openvino bf16', 'openvino int8')


def classify(function: Callable, loader, device: str, title: str) -> torch.Tensor:
    """Return the likeliest class of every image, and the true one: (N, 2)."""
    found = []
    with torch.no_grad():
        for x, target in tqdm(loader, desc=title, leave=False, disable=None):
            found.append(torch.stack([function(x.to(device)).argmax(-1).cpu(), target], dim=1))
    return torch.cat(found)


def top1(found: torch.Tensor) -> float:
    return round(100 * (found[:, 0] == found[:, 1]).double().mean().item(), 2)


def main() -> None:
    """Train, prepare, classify, and record with --record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('precision'), help='folder for data and models')
    parser.add_argument('--data-dir', type=Path, default=FASHION)
    parser.add_argument('--model', default='vitresnet_small')
    parser.add_argument('--img-size', type=int, default=64)
    parser.add_argument('--epochs', type=int, default=2)
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--settings', nargs='+', default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument('--device', default='cpu', help='for training')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--record', action='store_true')
    args = parser.parse_args()
    root = unpack(args.data_dir, args.output)
    cfg = FinetuneCfg(
        dataset='torch/fashion_mnist',
        data_dir=str(root),
        val_split='',
        val_frac=0.1,
        model=args.model,
        img_size=args.img_size,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=5e-4,
        warmup_epochs=0.5,
        scale=(0.8, 1.0),
        color_jitter=0.0,
        workers=args.workers,
        device=args.device,
    )
    data = load_data(replace(cfg, val_split='validation'), 'RGB')  # whose validation split is the test set
    for seed in args.seeds:
        for setting in args.settings:
            folder = args.output / f'{args.model}-{setting}-epochs{args.epochs}-seed{seed}'
            train(replace(cfg, output=str(folder), seed=seed, **SETTINGS[setting]))
            model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval().to(args.device)
            config = data_config(model)
            loader = create_loader(
                data.val,
                input_size=config['input_size'],
                batch_size=100,
                use_prefetcher=False,
                num_workers=args.workers,
                **{name: config[name] for name in ('interpolation', 'mean', 'std', 'crop_pct')},
            )
            seconds = sum(row['seconds'] for row in read_summary(folder))
            row = dict(model=args.model, setting=setting, seed=seed, epochs=args.epochs, img_size=args.img_size)
            row.update(top1=top1(classify(model, loader, args.device, f'{setting}, seed {seed}')), images=len(data.val))
            row.update(train_seconds=round(seconds), device=args.device)
            write_row('precision_train', row, args.record)

    first = f'{args.model}-{args.settings[0]}-epochs{args.epochs}-seed{args.seeds[0]}'
    model = timm.create_model(f'local-dir:{args.output / first}', pretrained=True).eval()
    example = next(iter(loader))[0]
    data.train.transform = loader.dataset.transform
    calibration = torch.stack([data.train[i][0] for i in range(64)])
    expected = None
    for path in PATHS:
        if path == 'openvino bf16' and lacks_bfloat16(torch.device('cpu')):
            print(f'{path}: left out, since it computes in fp32 on this CPU')
            continue
        if path.startswith('onnxruntime'):
            exported = export(model, args.output / 'model.onnx', 'onnx', 'int8', dynamic=False, example=calibration)
            function, report = load(exported.path, 'onnx'), exported.report
        elif path.startswith('openvino'):
            precision = path.partition(' ')[2] or 'fp32'
            images = calibration if precision == 'int8' else example
            function = timm_vitres.prepare(model, precision, example=images, engine='openvino')
            report = function.report
        else:
            function = timm_vitres.prepare(model, path, compile=True, example=example)
            report = function.report
        found = classify(function, loader, 'cpu', path)
        expected = found if expected is None else expected
        agreement = round(100 * (found[:, 0] == expected[:, 0]).double().mean().item(), 2)
        row = dict(model=args.model, path=path, top1=top1(found), drop=round(top1(expected) - top1(found), 2))
        row.update(same_class=agreement, images=len(found), img_size=args.img_size, report=report)
        write_row('precision', row, args.record)


if __name__ == '__main__':
    main()
