"""Openclipart as an image set: which drawings, of which classes, and which are held out.

The drawings of the Debian package openclipart-png (release 0.18, public domain, 2006) lie in folders by subject; a
top-level folder is a class. Left out are, each with its reason in left_out.csv: folders that are no subject (unsorted,
special, ...) or hold fewer than MINIMUM drawings; links to another drawing of the class, and drawings that lie in two
classes; what Pillow can't open, or is larger than 20 megapixels, or blank; and what a family has beyond its first
MOST of a class (one family has 1,375 stars).

A family are drawings that are variants of each other: by name (dino_01, dino_02; numbers are all that differs) or by
sight (at 16 x 16 pixels their grey values correlate by more than ALIKE, which joins copies in other colours). It is
either trained on or held out as a whole, so that no variant of a test drawing is trained on.

A drawing is put on white, trimmed to what is drawn, padded to a square, and reduced to 96 x 96.
"""

import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
from PIL import Image, ImageChops
from tqdm import tqdm

SOURCE = Path('/usr/share/openclipart/png')
NO_SUBJECT = ('unsorted', 'special')
SIDE, MINIMUM, MOST, ALIKE, TEST = 96, 60, 20, 0.97, 0.2
LARGEST = 20_000_000  # pixels


def squared(path: Path) -> Optional[np.ndarray]:
    """Return a drawing (96, 96, 3) on a white square, or None if it is blank."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        image = Image.open(path)
    if image.width * image.height > LARGEST:
        raise ValueError('larger than 20 megapixels')
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    white.alpha_composite(image)
    flat = white.convert('RGB')
    box = ImageChops.difference(flat, Image.new('RGB', flat.size, 'white')).getbbox()
    if box is None:
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    side = max(width, height)
    square = Image.new('RGB', (side, side), 'white')
    square.paste(flat.crop(box), ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0))


def candidates(source: Path, left_out: Dict[str, str]) -> Dict[str, Path]:
    """Return the files that may be of use, by their path below the source."""
    if not source.is_dir():
        raise SystemExit(f'{source} is missing: apt-get install openclipart-png, or give --source.')
    root = source.resolve()
    classes = defaultdict(set)  # of each file, by all its names
    named: Dict[str, Path] = {}
    for path in sorted(source.rglob('*.png')):
        name = path.relative_to(source).as_posix()
        if name.partition('/')[0] in NO_SUBJECT or '/' not in name:
            left_out[name] = 'in a folder that is no subject'
            continue
        named[name] = path.resolve()
        classes[named[name]].add(name.partition('/')[0])
    kept: Dict[str, Path] = {}
    taken = set()
    for name, file in sorted(named.items(), key=lambda item: (root / item[0] != item[1], item[0])):
        if len(classes[file]) > 1:
            left_out[name] = 'in the folders of two subjects'
        elif file in taken:
            left_out[name] = 'a link to another drawing of its subject'
        else:
            taken.add(file)
            kept[name] = file
    return kept


def stem(name: str) -> str:
    """Return what the variants of a name have in common: its subject, and its letters without numbers."""
    letters = re.sub(r'[^a-z]', '', re.sub(r'\d+[a-z]?(?![a-z])', '', Path(name).stem.lower()))
    return f'{name.partition("/")[0]}/{letters or name}'


def families(names: List[str], images: np.ndarray) -> List[List[int]]:
    """Return groups of indices of drawings (N, H, W, 3) that are variants of each other."""
    cells = images.reshape(len(images), 16, SIDE // 16, 16, SIDE // 16, 3).mean((2, 4, 5)).reshape(len(images), -1)
    cells = (cells - cells.mean(1, keepdims=True)).astype(np.float32)
    cells /= np.linalg.norm(cells, axis=1, keepdims=True) + 1e-6
    parent = list(range(len(names)))

    def head(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: Dict[str, int] = {}
    for index, name in enumerate(names):
        parent[head(index)] = head(first.setdefault(stem(name), index))
        for other in np.flatnonzero(abs(cells[:index] @ cells[index]) > ALIKE):
            parent[head(index)] = head(int(other))
    groups = defaultdict(list)
    for index in range(len(names)):
        groups[head(index)].append(index)
    return list(groups.values())


def held_out(groups: List[List[int]], subjects: List[str]) -> set:
    """Return the indices of the test drawings: whole groups, drawn with seed 0, a fifth of every subject at most."""
    generator = np.random.default_rng(0)
    room = {subject: TEST * count for subject, count in Counter(subjects[i] for group in groups for i in group).items()}
    chosen: set = set()
    for number in generator.permutation(len(groups)):
        needed = Counter(subjects[index] for index in groups[number])
        if all(count <= room[subject] for subject, count in needed.items()):
            chosen.update(groups[number])
            for subject, count in needed.items():
                room[subject] -= count
    return chosen


def openclipart(source: Optional[Path], left_out: Dict[str, str]) -> Iterator[Tuple[str, str, str, np.ndarray]]:
    """Yield part, class, file name and pixels of each drawing; add a reason to `left_out` for every other."""
    pixels: Dict[str, np.ndarray] = {}
    for name, path in tqdm(candidates(source or SOURCE, left_out).items(), desc='drawings', leave=False, disable=None):
        try:
            image = squared(path)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            large = isinstance(error, (ValueError, Image.DecompressionBombError))
            left_out[name] = 'larger than 20 megapixels' if large else 'unreadable'
            continue
        if image is None:
            left_out[name] = 'blank'
        else:
            pixels[name] = image
    names = sorted(pixels)
    subjects = [name.partition('/')[0] for name in names]
    groups = families(names, np.stack([pixels[name] for name in names]))

    def keep(reason: str, is_kept: Callable[[List[int], int], bool]) -> None:
        left_out.update({names[index]: reason for group in groups for index in group if not is_kept(group, index)})
        groups[:] = [[index for index in group if is_kept(group, index)] for group in groups]

    def before(group: List[int], index: int) -> int:
        return sum(other < index and subjects[other] == subjects[index] for other in group)

    keep(f'beyond the first {MOST} of a family', lambda group, index: before(group, index) < MOST)
    counts = Counter(subjects[index] for group in groups for index in group)
    keep(f'of a subject with fewer than {MINIMUM}', lambda group, index: counts[subjects[index]] >= MINIMUM)
    test = held_out(groups, subjects)
    for index in sorted(index for group in groups for index in group):
        name = names[index]
        file = name.partition('/')[2].replace('/', '_')
        yield 'test' if index in test else 'train', subjects[index], file, pixels[name]
