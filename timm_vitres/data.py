"""Images in: opening, preprocessing by a model's own timm data config, folders of them.

path -> `open_image` -> PIL image in the model's mode -> timm's evaluation transform -> (1, C, H, W).
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import ImageDataset, create_transform, get_img_extensions, resolve_input_data_config
from timm.layers import to_2tuple
from timm.models import get_model_input_config
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

ImageLike = Union[str, Path, Image.Image, np.ndarray]
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


def image_mode(in_chans: int) -> str:
    """Return PIL's mode of an image with `in_chans` channels; ValueError where there is none."""
    if in_chans not in MODES:
        raise ValueError(f'in_chans: the model takes {in_chans} channels, but images have 1, 3 or 4.')
    return MODES[in_chans]


def open_image(image: ImageLike, mode: str = 'RGB') -> Image.Image:
    """Open an image upright and in a mode: EXIF orientation applied, palettes resolved, 16 bits scaled to 8.

    Args:
        image: A path, a PIL image, or an array (H, W) or (H, W, C) of 8-bit values.
        mode: 'L', 'RGB' or 'RGBA'.

    Raises:
        FileNotFoundError: for a path where nothing is.
        ValueError: for a file that can't be read as an image; the message names it.
        TypeError: for anything else that is no image.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return _to_mode(ImageOps.exif_transpose(image), mode)
    if not isinstance(image, (str, Path)):
        raise TypeError(f'image: got {type(image).__name__}, expected a path, a PIL image or a numpy array.')
    if not Path(image).exists():
        raise FileNotFoundError(f'image: there is no file {image}.')
    try:
        with Image.open(image) as opened:
            return _to_mode(ImageOps.exif_transpose(opened), mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'image: {image} cannot be read as an image ({error}).') from error


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode[0] in 'IF':  # 'I', 'I;16', 'I;16B', 'F': PIL would clip these at 255
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
    elif image.mode in ('P', 'PA'):
        image = image.convert('RGBA')  # keeps what a palette says of transparency from warning
    return image.convert(mode)


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535 or not np.isfinite(high):
        raise ValueError(f'pixels of mode {mode} range from {low:g} to {high:g}, expected 0 to 65535')
    if mode == 'F' and high <= 1:
        values = values * 255.0
    elif mode.startswith('I;16') or high > 255:
        values = values / 257.0
    return np.round(values).astype(np.uint8)


def data_config(model: nn.Module, **overrides: Any) -> Dict[str, Any]:
    """Return a model's timm data config: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.

    The size is what `overrides` say (img_size), else what the model was created for where its creator asked for
    another size than its weights' (img_size=), else the weights' own.
    """
    overrides = {key: value for key, value in overrides.items() if value is not None}
    cfg = getattr(model, 'pretrained_cfg', {})
    channels, *size = get_model_input_config(model)['input_size']
    own_size = getattr(model, 'pretrained_model_args', {}).get('img_size') or cfg.get('input_size', (3, 224, 224))[-2:]
    if 'img_size' in overrides:
        overrides['input_size'] = (channels, *to_2tuple(overrides.pop('img_size')))
    elif tuple(size) != tuple(to_2tuple(own_size)):
        overrides['input_size'] = (channels, *size)
    return resolve_input_data_config(model, args=overrides)


def preprocess(image: ImageLike, model: nn.Module) -> torch.Tensor:
    """Turn an image into a batch of one for a model, by the model's own timm data config.

    Args:
        image: A path, a PIL image, or an array (H, W) or (H, W, C) of 8-bit values; grey, colour, palette, 16 bits.
        model: Any timm model; its channels, sizes, crop and normalisation are used.

    Returns:
        Pixels resized, cropped and normalised: (1, C, H, W), on the model's device and in its dtype.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `open_image`.
    """
    config = data_config(model)
    return to_batch(open_image(image, image_mode(config['input_size'][0])), model, config)


def to_batch(image: Image.Image, model: nn.Module, config: Dict[str, Any]) -> torch.Tensor:
    """Turn an opened image into a batch of one, by a data config: (1, C, H, W), on the model's device, in its dtype."""
    x = create_transform(**config, is_training=False)(image).unsqueeze(0)
    parameter = next(model.parameters(), None)
    return x if parameter is None or parameter.is_meta else x.to(parameter.device, parameter.dtype)


def example_images(paths: Sequence[Union[str, Path]], model: nn.Module, limit: int = 32) -> torch.Tensor:
    """Return images for a model: (B, C, H, W), evenly taken from files and folders (with all that is in them).

    Raises:
        FileNotFoundError: where there is no image.
    """
    if limit < 1:
        raise ValueError(f'num_images: got {limit}, expected a number from 1 up.')
    files: List[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.rglob('*')) if path.is_dir() else [path]
        files += [file for file in inside if not path.is_dir() or file.suffix.lower() in get_img_extensions()]
    if not files:
        raise FileNotFoundError(f'images: there is none in {", ".join(map(str, paths))}.')
    step = max(1, len(files) / limit)
    chosen = [files[int(i * step)] for i in range(min(limit, len(files)))]
    return torch.cat([preprocess(file, model) for file in tqdm(chosen, desc='reading images', leave=False)])


class ImageFolder(ImageDataset):
    """timm's `ImageDataset` of a folder with one sub-folder per class, opened by `open_image`.

    Args:
        root: The folder.
        class_map: Class name -> index; by default the sub-folders' names in natural order.
        check: Open every image now: an unreadable one is an error.
        skip_bad: Leave unreadable images out (they are listed in `skipped`) instead of failing.

    Raises:
        FileNotFoundError: for a missing or empty folder.
        ValueError: for images outside class folders, a class without an image, an unknown class, or an unreadable
            image; the message names it.
    """

    def __init__(
        self,
        root: Union[str, Path],
        class_map: Optional[Dict[str, int]] = None,
        input_img_mode: str = 'RGB',
        check: bool = True,
        skip_bad: bool = False,
    ):
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f'data_dir: {root} is not a folder.')
        try:
            super().__init__(str(root), input_img_mode=input_img_mode)
        except RuntimeError as error:
            raise FileNotFoundError(f'data_dir: {error}') from None
        found = self.reader.class_to_idx
        if '' in found:
            raise ValueError(f'data_dir: {root} holds images outside class folders; put each into its class folder.')
        self._check_folders(root)
        if class_map is not None:
            unknown = sorted(found.keys() - class_map.keys())
            if unknown:
                raise ValueError(f'data_dir: {root} has classes that the training data lacks: {", ".join(unknown)}.')
            names = {index: name for name, index in found.items()}
            self.reader.samples = [(path, class_map[names[target]]) for path, target in self.reader.samples]
            self.reader.class_to_idx = class_map
        self.skipped: List[str] = self._check_images(skip_bad) if check else []

    @property
    def targets(self) -> List[int]:
        """The class index of every image."""
        return [target for _, target in self.reader.samples]

    @property
    def classes(self) -> List[str]:
        """The class names, by index."""
        return class_names(self)

    def __getitem__(self, index: int):
        path, target = self.reader.samples[index]
        image = open_image(path, self.input_img_mode)
        return image if self.transform is None else self.transform(image), target

    def _check_folders(self, root: Path) -> None:
        filled = {Path(path).parent for path, _ in self.reader.samples}
        for folder in sorted(folder for folder in root.rglob('*') if folder.is_dir()):
            is_leaf = not any(child.is_dir() for child in folder.iterdir())
            if is_leaf and folder not in filled and not folder.name.startswith('.'):
                raise ValueError(f'data_dir: the class folder {folder} has no image; add some, or remove it.')

    def _check_images(self, skip_bad: bool) -> List[str]:
        def problem(sample: Tuple[str, int]) -> Optional[str]:
            try:
                open_image(sample[0], self.input_img_mode)
            except ValueError as error:
                return str(error)
            return None

        samples = self.reader.samples
        with ThreadPoolExecutor() as pool:
            bar = tqdm(pool.map(problem, samples), total=len(samples), desc='checking images', leave=False)
            problems = list(bar)
        bad = [text for text in problems if text]
        if bad and not skip_bad:
            more = f' {len(bad) - 1} more cannot be read either.' if len(bad) > 1 else ''
            raise ValueError(f'{bad[0]}{more} Mend or remove it, or leave such images out with --skip-bad.')
        kept = [sample for sample, text in zip(samples, problems) if not text]
        missing = {target for _, target in samples} - {target for _, target in kept}
        if missing:
            raise ValueError(f'data_dir: none of the images of class {self.classes[min(missing)]!r} can be read.')
        self.reader.samples = kept
        return [sample[0] for sample, text in zip(samples, problems) if text]


def class_names(dataset: Dataset) -> List[str]:
    """Return the class names of a dataset with one of timm's readers, by index; none where it names none."""
    class_to_idx = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or {}
    return sorted(class_to_idx, key=class_to_idx.__getitem__)


class Subset(Dataset):
    """Some images of a map-style dataset in a PIL mode, with a transform of their own.

    The dataset returns PIL images; `transform` is set by timm's `create_loader`.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int], mode: str = 'RGB'):
        self.dataset = dataset
        self.indices = list(indices)
        self.mode = mode
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        image, target = self.dataset[self.indices[index]]
        image = open_image(image, self.mode)
        return image if self.transform is None else self.transform(image), target


def stratified_split(targets: Sequence[int], fraction: float, seed: int = 0) -> Tuple[List[int], List[int]]:
    """Split indices into two parts, class by class: the second holds `fraction` of each, and at least one.

    Raises:
        ValueError: for a fraction outside (0, 1), or a class of fewer than two.
    """
    if not 0 < fraction < 1:
        raise ValueError(f'val_frac: got {fraction}, expected a fraction between 0 and 1.')
    generator = np.random.default_rng(seed)
    labels = np.asarray(targets)
    first: List[int] = []
    second: List[int] = []
    for target, count in sorted(Counter(labels.tolist()).items()):
        if count < 2:
            raise ValueError(f'val_frac: class {target} has {count} image, which cannot be split in two; add some.')
        indices = generator.permutation(np.flatnonzero(labels == target)).tolist()
        cut = min(max(round(count * fraction), 1), count - 1)
        second += indices[:cut]
        first += indices[cut:]
    return sorted(first), sorted(second)
