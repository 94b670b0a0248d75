"""The README's picture: where a hybrid looks in a photograph, after it has learned to tell six photographs apart.

    python benchmarks/gallery.py --output gallery [--record]

Data: photographs that scikit-image brings along (astronaut: NASA, public domain; cat, coffee, rocket: CC0; retina,
Hubble deep field: public domain). A class is a photograph, its images are crops of it, 200 to train on and 40 to
choose the epoch by; the crops overlap, so the accuracy says nothing but that the model has learned them. --record
writes benchmarks/results/explain.png and a row in benchmarks/results/gallery.csv.
"""

import argparse
from pathlib import Path

import numpy as np
import timm
from common import append_row, train
from PIL import Image
from skimage import data

from timm_vitres.explanation import explain
from timm_vitres.pictures import plot_explanation
from timm_vitres.training.report import read_summary
from timm_vitres.training.settings import FinetuneCfg

RESULTS = Path(__file__).parent / 'results'
PHOTOGRAPHS = ('astronaut', 'cat', 'coffee', 'hubble_deep_field', 'retina', 'rocket')
RECIPE = dict(model='vitresnet_nano', img_size=96, epochs=12, batch_size=32, lr=1e-3, warmup_epochs=1.0)
RECIPE.update(weight_decay=0.05, scale=(0.5, 1.0), crop_pct=1.0, no_check=True)


def write_crops(root: Path) -> Path:
    """Write square crops, a sixth to a half of the shorter side, as root/{train,val}/<photograph>/*.png."""
    rng = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        photograph = Image.fromarray(getattr(data, name)()[..., :3])
        for split, count in (('train', 200), ('val', 40)):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                side = int(min(photograph.size) * rng.uniform(1 / 6, 1 / 2))
                left = rng.integers(0, photograph.width - side)
                top = rng.integers(0, photograph.height - side)
                crop = photograph.crop((left, top, left + side, top + side)).resize(
                    (128, 128), Image.Resampling.BICUBIC
                )
                crop.save(folder / f'{index}.png')
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('gallery'), help='folder for crops and model')
    parser.add_argument('--photograph', choices=PHOTOGRAPHS, default='cat', help='what to explain')
    parser.add_argument('--record', action='store_true', help='write the picture and a row to benchmarks/results')
    args = parser.parse_args()
    crops = write_crops(args.output / 'crops')
    folder = train(FinetuneCfg(data_dir=str(crops), output=str(args.output / 'model'), **RECIPE))
    best = max(row['eval_top1'] for row in read_summary(folder))
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    explanation = explain(model, getattr(data, args.photograph)(), size=256)
    picture = RESULTS / 'explain.png' if args.record else args.output / 'explain.png'
    plot_explanation(explanation, picture)
    print(f'{picture}: {explanation.label}, {100 * explanation.probability:.1f}%')
    if args.record:
        row = dict(photograph=args.photograph, label=explanation.label, probability=round(explanation.probability, 4))
        append_row(RESULTS / 'gallery.csv', dict(row, crops_top1=best))


if __name__ == '__main__':
    main()
