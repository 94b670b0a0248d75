"""What a hybrid learns from a ResNet: vitresnet_nano on Fashion-MNIST, with and without a teacher.

    python benchmarks/distillation.py --output distillation --record

A thin ResNet (the generic `vitresnet` without ViT blocks) is fine-tuned from random weights on a part of the training
images, by default the same as its student's, with --teacher-per-class more; a tenth of them chooses the epoch. Then
`vitresnet_nano` is trained on its images by the labels alone, and from the teacher's logits, for every seed. The
teacher sees the images at its own size and normalisation. The 10,000 test images are looked at once by each: a row in
benchmarks/results/distillation.csv.
Data: the Debian package dataset-fashion-mnist, or --data-dir with its four .gz files.
"""

import argparse
from pathlib import Path

import timm
import torch
from common import train, write_row
from image_sets import FASHION, unpack
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

import timm_vitres
from timm_vitres.training.report import read_summary
from timm_vitres.training.settings import FinetuneCfg

TEACHER = dict(
    model='vitresnet',
    img_size=32,
    mean=(0.5,),
    std=(0.5,),
    model_kwargs=dict(
        backbone='resnet18',
        stem_type='deep',
        stem_width=16,
        stem_stride=2,
        layers=(2, 2, 2),
        channels=(48, 96, 128),
        depth=0,
    ),
)
BATCH = 250
STUDENTS = {
    'labels alone': {},
    'from logits': dict(kd_distill_type='logit', kd_temperature=4.0, task_loss_weight=0.5),
}


def write_folder(root: Path, source: Path, per_class: int) -> Path:
    """Write the first images of each class as root/train/<class>/*.png, and the whole test set as root/test."""
    if root.is_dir():
        return root
    beside = root.with_name(root.name + '.tmp')
    for split in ('train', 'test'):
        data = FashionMNIST(str(source), train=split == 'train')
        counts = [0] * 10
        for index, (image, label) in enumerate(tqdm(data, desc=split, leave=False)):
            if split == 'train' and counts[label] == per_class:
                continue
            counts[label] += 1
            folder = beside / split / data.classes[label].replace('/', ' or ')
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f'{index}.png')
    beside.rename(root)
    return root


def test_top1(folder: Path, test: Path) -> float:
    """Return the accuracy of a saved model on a folder of images, in percent."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    names = list(model.pretrained_cfg['label_names'])
    paths = sorted(test.rglob('*.png'))
    hits = 0
    for start in tqdm(range(0, len(paths), BATCH), desc='test', leave=False):
        batch = paths[start : start + BATCH]
        x = torch.cat([timm_vitres.preprocess(path, model) for path in batch])
        with torch.inference_mode():
            found = model(x).argmax(-1).tolist()
        hits += sum(names[index] == path.parent.name for index, path in zip(found, batch))
    return round(100 * hits / len(paths), 2)


def main() -> None:
    """Train teacher and students, and record with --record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('distillation'), help='folder for data and models')
    parser.add_argument('--data-dir', type=Path, default=FASHION)
    parser.add_argument('--per-class', type=int, default=300, help='training images of each class')
    parser.add_argument('--teacher-per-class', type=int, help="the teacher's; else the same")
    parser.add_argument('--teacher-epochs', type=int, help="the teacher's; else the same")
    parser.add_argument('--students', nargs='+', default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--record', action='store_true')
    args = parser.parse_args()
    source = unpack(args.data_dir, args.output)
    root = write_folder(args.output / f'images-{args.per_class}', source, args.per_class)
    shared = dict(
        data_dir=str(root / 'train'),
        val_frac=0.1,
        in_chans=1,
        color_jitter=0.0,
        epochs=args.epochs,
        batch_size=64,
        lr=2e-3,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        workers=1,
        no_check=True,
    )

    of_teacher = args.teacher_per_class or args.per_class

    def run(name: str, seed: int, per_class: int = args.per_class, **settings) -> Path:
        cfg = {**shared, **settings}
        place = f'{name} {per_class} {of_teacher} {cfg["epochs"]} {seed}'  # whatever makes it another run
        folder = train(FinetuneCfg(**cfg, seed=seed, output=str(args.output / place)))
        rows = read_summary(folder)
        row = dict(arm=name, seed=seed, train_images=10 * per_class, teacher_images=10 * of_teacher, epochs=len(rows))
        row.update(val_top1=round(max(one['eval_top1'] for one in rows), 2), test_top1=test_top1(folder, root / 'test'))
        row.update(train_seconds=round(sum(one['seconds'] for one in rows)))
        write_row('distillation', row, args.record)
        return folder

    more = root
    if of_teacher != args.per_class:
        more = write_folder(args.output / f'images-{of_teacher}', source, of_teacher)
    own = dict(data_dir=str(more / 'train'), epochs=args.teacher_epochs or args.epochs)
    teacher = run('teacher', 0, of_teacher, **{**TEACHER, **own})
    for seed in args.seeds:
        for name in args.students:
            settings = STUDENTS[name]
            told = dict(settings, kd_model_name=f'local-dir:{teacher}') if settings else {}
            run(name, seed, model='vitresnet_nano', img_size=32, **told)


if __name__ == '__main__':
    main()
