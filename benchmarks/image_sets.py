"""The image sets that hybrids are compared on, written as folders that every command takes.

    python benchmarks/image_sets.py NAME ROOT [--source FOLDER]

ROOT/NAME then holds train/<class>/*.png and test/<class>/*.png, and left_out.csv where something was. Everything random
is drawn with seed 0, so that the same data make the same folder; a folder that is there already is left as it is.

| name | what | images (train + test) | classes | most frequent class of the test images |
|---|---|---|---|---|
| fmnist | Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747), 28 x 28, grey | 60,000 + 10,000 | 10 | 10% |
| fmnist10 | a tenth of each class of its training images, all of its test images | 6,000 + 10,000 | 10 | 10% |
| elpv | ELPV, solar cells, 300 x 300, grey (Deitsch et al. 2019, Solar Energy 185) | 1,970 + 654 | 2 | 68.8% |
| elpv_grades | the same cells, in a class for each probability and cell type | 1,773 + 654 | 8 | 35.2% |
| openclipart | Openclipart 0.18, drawings, 96 x 96, colour | 3,420 + 848 | 12 | 38.7% (a twelfth: 8.3%) |
| pairs | two photographs of Fashion-MNIST on a canvas of 64 x 64, grey | 20,000 + 5,000 | 2 | 50% |

elpv: a cell is defective where its probability of a defect is above 0.5; a quarter of the cells, drawn evenly from
every probability and cell type, is the test set. Cells of one module are in both parts: see `neighbours.py`.
elpv_grades: the classes are '0 mono' to '100 poly', so that a model learns how sure the experts were, and what kind of
cell it is; `class_of_grade` says which class of elpv that is. A tenth of elpv's training images, 197, is in val/, for
every seed, and for a teacher, alike.
openclipart: `drawings.py` says how it is made.
pairs: "same" is one photograph twice, "different" are two of the same class. No photograph is on two canvases, and
those of the test canvases are test photographs. What tells the classes apart is a relation between two places.
"""

import argparse
import csv
import gzip
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

import numpy as np
from drawings import openclipart
from PIL import Image
from tqdm import tqdm

from timm_vitres.training.splits import stratified_split

FASHION = Path('/usr/share/datasets/fashion-mnist')
CLASSES_OF_FASHION = (
    *('T-shirt or top', 'Trouser', 'Pullover', 'Dress', 'Coat'),
    *('Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
)
CLASSES_OF_ELPV = ('functional', 'defective')
CANVAS, CANVASES = 64, {'train': 20_000, 'test': 5_000}
PARTS = {'train': 'train', 'test': 't10k'}
KINDS = {'images-idx3': 16, 'labels-idx1': 8}  # of files, and the bytes of their heads


class Entry(NamedTuple):
    """An image of a set: where it goes, and its pixels (H, W) or (H, W, 3), or the file that is copied."""

    part: str
    label: str
    name: str
    image: Union[np.ndarray, Path]


def photographs(source: Optional[Path], part: str) -> Tuple[np.ndarray, np.ndarray]:
    """Return the images (N, 28, 28) and the class numbers (N) of a part of Fashion-MNIST."""
    found = []
    for kind, offset in KINDS.items():
        path = (source or FASHION) / f'{PARTS[part]}-{kind}-ubyte.gz'
        try:
            with gzip.open(path) as file:
                found.append(np.frombuffer(file.read(), np.uint8, offset=offset))
        except FileNotFoundError:
            raise SystemExit(f'{path} is missing: apt-get install dataset-fashion-mnist, or give --source.') from None
    return found[0].reshape(-1, 28, 28), found[1]


def unpack(source: Path, root: Path) -> Path:
    """Write the four files of Fashion-MNIST where torchvision looks for them, and return root."""
    raw = root / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True, exist_ok=True)
    for name in (f'{part}-{kind}-ubyte' for part in PARTS.values() for kind in KINDS):
        if (raw / name).is_file():
            continue
        packed = source / f'{name}.gz'
        if not packed.is_file():
            raise SystemExit(f'There is no {packed}: apt-get install dataset-fashion-mnist, or give --data-dir.')
        beside = raw / f'{name}.tmp'
        with gzip.open(packed) as read, beside.open('wb') as write:
            shutil.copyfileobj(read, write)
        beside.rename(raw / name)
    return root


def fmnist(source: Optional[Path], fraction: Optional[float] = None) -> Iterator[Entry]:
    """Yield the photographs of clothes, of the training images a fraction of each class."""
    for part in PARTS:
        images, labels = photographs(source, part)
        chosen = range(len(images))
        if fraction and part == 'train':
            _, chosen = stratified_split(labels.tolist(), fraction, seed=0)
        for index in chosen:
            yield Entry(part, CLASSES_OF_FASHION[labels[index]], f'{index:05d}.png', images[index])


def class_of_grade(name: str) -> str:
    """Return the class of elpv that a class of elpv_grades belongs to: of '67 mono' and '100 poly' it is defective."""
    return CLASSES_OF_ELPV[int(name.split()[0]) > 50]


def elpv(source: Optional[Path], grades: bool = False) -> Iterator[Entry]:
    """Yield the photographs of solar cells, with their classes, or with their grades."""
    if source is None:
        try:
            source = Path(str(files('elpv_dataset'))) / 'data'
        except ModuleNotFoundError:
            raise SystemExit('The photographs of solar cells are missing: pip install elpv-dataset') from None
    table = np.genfromtxt(source / 'labels.csv', dtype=['|S19', '<f8', '|S4'], names=['path', 'probability', 'type'])
    labels = [f'{100 * row["probability"]:.0f} {row["type"].decode()}' for row in table]
    ordered = sorted(set(labels), key=lambda label: (int(label.split()[0]), label))
    numbers = [ordered.index(label) for label in labels]
    _, test = stratified_split(numbers, 0.25, seed=0)
    parts = dict.fromkeys(test, 'test')
    if grades:
        others = [index for index in range(len(table)) if index not in parts]
        _, val = stratified_split([numbers[index] for index in others], 0.1, seed=0)
        parts.update((others[index], 'val') for index in val)
    for index, (row, label) in enumerate(zip(table, labels)):
        path = source / row['path'].decode()
        yield Entry(parts.get(index, 'train'), label if grades else class_of_grade(label), path.name, path)


def canvas(first: np.ndarray, second: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return two images (h, w) at random places of a canvas (64, 64), without overlap."""
    size = np.array(first.shape)
    while True:
        places = generator.integers(0, CANVAS - size + 1, (2, 2))
        if (abs(places[0] - places[1]) >= size).any():
            break
    drawn = np.zeros((CANVAS, CANVAS), np.uint8)
    for (top, left), image in zip(places, (first, second)):
        drawn[top : top + size[0], left : left + size[1]] = image
    return drawn


def unseen(images: np.ndarray, seen: Set[bytes]) -> List[int]:
    """Return the indices of images that `seen` lacks, each once, and add them to it.

    Fashion-MNIST holds some photographs twice, a few of them in both of its parts.
    """
    found = []
    for index, image in enumerate(images):
        content = image.tobytes()
        if content not in seen:
            seen.add(content)
            found.append(index)
    return found


def pairs(source: Optional[Path], canvases: Optional[Dict[str, int]] = None) -> Iterator[Entry]:
    """Yield canvases, as many of each answer and each class of clothes; by default 20,000 and 5,000."""
    generator = np.random.default_rng(0)
    seen: Set[bytes] = set()
    for part, count in (canvases or CANVASES).items():
        images, labels = photographs(source, part)
        once = unseen(images, seen)
        number, each = 0, count // 20
        for label in range(10):
            own = generator.permutation([index for index in once if labels[index] == label])
            if len(own) < 3 * each:
                raise SystemExit(f'pairs: {len(own)} photographs of class {label} are too few for {2 * each} canvases.')
            couples = [('same', index, index) for index in own[:each]]
            couples += [('different', *couple) for couple in own[each : 3 * each].reshape(-1, 2)]
            for answer, first, second in couples:
                yield Entry(part, answer, f'{number:05d}.png', canvas(images[first], images[second], generator))
                number += 1


SETS: Dict[str, Callable[[Optional[Path], Dict[str, str]], Iterator[Entry]]] = {
    'fmnist': lambda source, left_out: fmnist(source),
    'fmnist10': lambda source, left_out: fmnist(source, 0.1),
    'elpv': lambda source, left_out: elpv(source),
    'elpv_grades': lambda source, left_out: elpv(source, grades=True),
    'openclipart': lambda source, left_out: (Entry(*entry) for entry in openclipart(source, left_out)),
    'pairs': lambda source, left_out: pairs(source),
}


def write(name: str, root: Path, source: Optional[Path] = None) -> Path:
    """Write a set as root/name/{train,test}/<class>/*.png, unless it is there, and return root/name.

    Args:
        source: The folder of the original data, where it is not the one that its package installs.

    Raises:
        SystemExit: for data that are missing, with a sentence how to get them.
    """
    folder = Path(root) / name
    if folder.is_dir():
        return folder
    beside = folder.with_name(name + '.tmp')
    shutil.rmtree(beside, ignore_errors=True)
    left_out: Dict[str, str] = {}
    for entry in tqdm(SETS[name](source, left_out), desc=name, leave=False, disable=None):
        path = beside / entry.part / entry.label / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise RuntimeError(f'{name}: two images have the name {path}.')
        if isinstance(entry.image, Path):
            shutil.copy(entry.image, path)
        else:
            Image.fromarray(entry.image).save(path)
    if left_out:
        with (beside / 'left_out.csv').open('w', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows([('path', 'reason'), *sorted(left_out.items())])
    beside.rename(folder)
    return folder


def summary(folder: Path) -> List[str]:
    """Return a line for each part of a set, and one for each reason why something was left out."""
    lines = []
    parts = [part for part in ('train', 'val', 'test') if (folder / part).is_dir()]
    for part in parts:
        counts = {path.name: len(list(path.iterdir())) for path in sorted((folder / part).iterdir())}
        total, most = sum(counts.values()), max(counts, key=lambda label: counts[label])
        each = ', '.join(f'{label} {count:,}' for label, count in counts.items())
        share = f'the most frequent {most} ({counts[most] / total:.1%})'
        lines.append(f'{part}: {total:,} images of {len(counts)} classes, {share}: {each}')
    if (folder / 'left_out.csv').is_file():
        with (folder / 'left_out.csv').open(newline='') as file:
            reasons = [row['reason'] for row in csv.DictReader(file)]
        lines += [f'left out: {reasons.count(reason):,} {reason}' for reason in sorted(set(reasons))]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=list(SETS))
    parser.add_argument('root', type=Path, help='folder that the set is written into')
    parser.add_argument('--source', type=Path, help="the original data, where they are not in their package's place")
    args = parser.parse_args()
    folder = write(args.name, args.root, args.source)
    print(folder, *summary(folder), sep='\n')


if __name__ == '__main__':
    main()
