"""Images in: opening, preprocessing by a model's own timm data config, folders of them.

path -> `open_image` -> PIL image in the model's mode -> timm's evaluation transform -> (1, C, H, W).
"""

from pathlib import Path
from typing import Any, Dict, List, Sequence, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, get_img_extensions, resolve_input_data_config
from timm.layers import to_2tuple
from timm.models import get_model_input_config
from torch import nn
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
