"""Images are opened, and preprocessed by a model's own timm data config.

path -> `open_image` -> PIL image in the model's mode -> timm's evaluation transform -> (1, C, H, W).
"""

import logging
import os
import stat
from pathlib import Path
from typing import Annotated, Any, Dict, List, Literal, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops
from timm.data import create_transform, resolve_input_data_config
from timm.layers import to_2tuple
from timm.models import get_model_input_config
from timm.utils import unwrap_model
from torch import nn
from tqdm import tqdm

from .checks import ImageSide, between, conform, on_one_line, show
from .walking import find_images, image_formats, natural_order, shown
from .weights.files import CONFIG_NAME

_logger = logging.getLogger(__name__)
ImageLike = Union[str, Path, Image.Image, np.ndarray]
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
MAX_ASPECT = 100  # an image's longer side may be this many times its shorter one
WIDE_FORMATS = ('PPM', 'PNG')  # 16 bits of these may be PIL's 32; that of graphics with a header scales them to 65535
PHOTOMETRIC_TAG = 262  # of a TIFF: 0 is white where it is 0
BITS_TAG = 258  # of a TIFF; Pillow opens 12 bits as 16
OVERSHOOT = 0.25  # resampling makes numbers that were from 0 to 1 leave that range by so much
TURNS = {  # EXIF orientation -> the turn that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNING_INFO = ('exif', 'Raw profile type exif', 'XML:com.adobe.xmp', 'xmp')  # PIL finds an orientation in these


def image_mode(in_chans: int) -> str:
    """Return PIL's mode of an image with `in_chans` channels; raise ValueError where there is none."""
    if in_chans not in MODES:
        raise ValueError(f'in_chans: the model takes {in_chans} channels, but images have 1, 3 or 4.')
    return MODES[in_chans]


def open_image(image: ImageLike, mode: str = 'RGB') -> Image.Image:
    """Open an image upright and in a mode: EXIF orientation applied, palettes resolved, 16 bits scaled to 8, and what
    is transparent on white, unless the mode is RGBA.

    Of images of numbers with a point, 0 is black and 1 is white; 32-bit integers have no such range, and are refused.

    Args:
        image: A path, a PIL image, or an array (H, W) or (H, W, C) of 8-bit values.
        mode: 'L', 'RGB' or 'RGBA'.

    Raises:
        FileNotFoundError: for a path where nothing is, and a link to nothing.
        ValueError: for a file that can't be read as an image, whatever its decoder raises, and for an image that is
            more than `MAX_ASPECT` times as long as wide; the message names the file.
        TypeError: for anything else that is no image.
    """
    if isinstance(image, Image.Image):
        return _upright_in_mode(image, mode, 'the image that was given')
    if isinstance(image, np.ndarray):
        try:
            plane = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
            return _upright_in_mode(Image.fromarray(plane), mode, 'the array that was given')
        except TypeError:
            expected = 'an array (H, W) or (H, W, C) of 8-bit values, C being 1, 3 or 4'
            raise TypeError(f'image: got {image.shape} of {image.dtype}, expected {expected}.') from None
    if not isinstance(image, (str, Path)):
        raise TypeError(f'image: got {type(image).__name__}, expected a path, a PIL image or a numpy array.')
    name = shown(image)
    _check_file(image)
    try:
        with Image.open(image, formats=image_formats()) as opened:
            return _upright_in_mode(opened, mode, name)
    except _ImageError:
        raise
    except Exception as error:  # Pillow's plug-ins raise errors of any kind for a damaged file
        raise _ImageError(name, error) from error


class _ImageError(ValueError):
    """An image can't be used; the message names it and the reason."""

    def __init__(self, name: str, error: Exception):
        super().__init__(f'image: {name} cannot be read as an image ({on_one_line(error)}).')


def _check_file(path: Union[str, Path]) -> None:
    """Raise an error unless a path is a regular file: opening a named pipe would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # a null byte raises ValueError
        if os.path.islink(path):
            raise FileNotFoundError(
                f'image: {shown(path)} is a link to nothing ({shown(os.readlink(path))}).'
            ) from None
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise FileNotFoundError(f'image: there is no file {shown(path)}.') from None
        raise ValueError(f'image: {shown(path)} cannot be opened ({getattr(error, "strerror", error)}).') from error
    if not stat.S_ISREG(mode):
        kind = 'a folder' if stat.S_ISDIR(mode) else 'no regular file'
        raise ValueError(f'image: {shown(path)} is {kind}, expected an image file.')


def _upright_in_mode(image: Image.Image, mode: str, name: str) -> Image.Image:
    try:
        short, long = sorted(image.size)
        if short == 0 or long > MAX_ASPECT * short:
            # timm resizes the shorter side: 10000 x 1 pixels would become 2240000 x 224
            limit = f'its longer side may be up to {MAX_ASPECT} times the shorter'
            raise ValueError(f'it has {image.width} x {image.height} pixels; {limit}')
        kind, tags = image.format, getattr(image, 'tag_v2', {})
        white = 4095.0 if tags.get(BITS_TAG) == (12,) else 65535.0
        is_negative = tags.get(PHOTOMETRIC_TAG) == 0
        image = _to_mode(_upright(image), mode, kind, white, is_negative)
    except Exception as error:  # Pillow decodes here, and a damaged file raises errors of any kind
        raise _ImageError(name, error) from error
    for key in TURNING_INFO:
        image.info.pop(key, None)  # else whoever opens the result would turn it once more
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image by its EXIF orientation, where it has one that can be read; else it stays as it lies.

    PIL's `exif_transpose` also rewrites the tags, and fails at wrong ones.
    """
    image.load()  # some formats read their tags with their pixels
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # PIL raises errors of any kind for damaged tags; the pixels may be good
        return image
    return image if turn is None else image.transpose(turn)


def _to_mode(image: Image.Image, mode: str, kind: Optional[str], white: float, is_negative: bool) -> Image.Image:
    if image.mode[0] in 'IF':  # 'I', 'I;16', 'I;16B', 'F': PIL would clip these at 255
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode, kind, white))
        image = ImageChops.invert(image) if is_negative else image  # PIL does so with 8 bits
    elif mode != 'RGBA' and ('a' in image.mode.lower() or 'transparency' in image.info):
        white_ground = Image.new('RGBA', image.size, 'white')
        white_ground.alpha_composite(image.convert('RGBA'))
        image = white_ground
    return image.convert(mode)


def _to_8_bits(values: np.ndarray, mode: str, kind: Optional[str], white: float) -> np.ndarray:
    """Scale values by what their kind of image says, never by their own range, which differs between images of a set.

    Args:
        mode: PIL's: 'I;16' and its like for 16 bits, 'I' for 32, 'F' for numbers with a point.
        kind: PIL's name of the file format.
        white: The largest whole number that it may hold.
    """
    if mode == 'F':
        low, high = float(values.min()), float(values.max())
        if not -OVERSHOOT <= low <= high <= 1 + OVERSHOOT:  # not so for NaN either
            raise ValueError(f'its numbers range from {low:g} to {high:g}, expected 0 to 1; convert it to 8 or 16 bits')
        values = values.clip(0, 1) * 255.0
    elif mode == 'I' and kind not in WIDE_FORMATS:
        raise ValueError('it is of mode I, of which no range is known; convert it to 8 or 16 bits (uint8, uint16)')
    else:
        values = values * (255.0 / white)
    return np.round(values).astype(np.uint8)


def data_config(model: nn.Module, **overrides: Any) -> Dict[str, Any]:
    """Return a model's timm data config: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.

    `img_size` in `overrides` decides the size, else the `img_size` that the model was created with, if it is not the
    weights' own size, else the weights' own size.
    """
    model = unwrap_model(model)  # torch.compile's wrapper is asked for its length
    overrides = {key: value for key, value in overrides.items() if value is not None}
    cfg = getattr(model, 'pretrained_cfg', {})
    channels, *size = get_model_input_config(model)['input_size']
    own_size = getattr(model, 'pretrained_model_args', {}).get('img_size') or cfg.get('input_size', (3, 224, 224))[-2:]
    if 'img_size' in overrides:
        overrides['input_size'] = (channels, *to_2tuple(overrides.pop('img_size')))
    elif tuple(size) != tuple(to_2tuple(own_size)):
        overrides['input_size'] = (channels, *size)
    return check_data_config("the model's data config", resolve_input_data_config(model, args=overrides))


def preprocess(image: ImageLike, model: nn.Module) -> torch.Tensor:
    """Turn an image into a batch of one for a model, by the model's own timm data config.

    Args:
        image: A path, a PIL image, or an array (H, W) or (H, W, C) of 8-bit values; grey, colour, palette, 16 bits.
        model: Any timm model; its channels, sizes, crop and normalisation are used.

    Returns:
        Pixels resized, cropped and normalised: (1, C, H, W), on the model's device and in its dtype.

    Raises:
        FileNotFoundError, ValueError, TypeError: where `open_image` raises them.
    """
    config = data_config(model)
    return to_batch(open_image(image, image_mode(config['input_size'][0])), model, config)


def to_batch(image: Image.Image, model: nn.Module, config: Dict[str, Any]) -> torch.Tensor:
    """Turn an opened image into a batch of one, by a data config: (1, C, H, W), on the model's device, in its dtype."""
    return as_model_takes(create_transform(**config, is_training=False)(image).unsqueeze(0), model)


def as_model_takes(x: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Return images (B, C, H, W) on a model's device, and in its dtype."""
    parameter = next(model.parameters(), None)
    return x if parameter is None or parameter.is_meta else x.to(parameter.device, parameter.dtype)


def find_files(paths: Sequence[Union[str, Path]]) -> List[Union[str, Path]]:
    """Return files as they are given, and in place of each folder the images in it, however deep; warn of what is none.

    Raises:
        FileNotFoundError: for a folder without an image.
        OSError: for a folder, or an image in one, that can't be read.
    """
    files: List[Union[str, Path]] = []
    left_out: List[str] = []
    for path in paths:
        if not os.path.isdir(path):  # pathlib raises for a path that is too long, or not to be looked at
            files.append(path)
            continue
        found = find_images(path)
        if not found.images:
            raise FileNotFoundError(f'images: there is none in {shown(path)}.')
        files += sorted([*found.images, *found.same], key=natural_order)  # a name each, also of one file
        left_out += [f'{shown(name)} ({reason})' for name, reason in found.left_out.items() if name not in found.same]
    if left_out:
        _logger.warning('images: %d files or folders are left out, such as %s.', len(left_out), left_out[0])
    return files


def example_images(paths: Sequence[Union[str, Path]], model: nn.Module, limit: int = 32) -> torch.Tensor:
    """Return images for a model: (B, C, H, W), evenly taken from files and folders (with their sub-folders).

    Raises:
        FileNotFoundError: where there is no image.
    """
    if limit < 1:
        raise ValueError(f'num_images: got {limit}, expected a number from 1 up.')
    files = find_files(paths)
    step = max(1, len(files) / limit)
    chosen = [files[int(i * step)] for i in range(min(limit, len(files)))]
    return torch.cat([preprocess(file, model) for file in tqdm(chosen, desc='reading images', leave=False)])


_Channels = Annotated[int, between(1, 1024)]
_Pixels = Tuple[_Channels, ImageSide, ImageSide]
_Positive = Annotated[float, between(0, 1000.0, above=True)]
DATA_FIELDS: Dict[str, Any] = {
    'input_size': _Pixels,
    'test_input_size': _Pixels,
    'img_size': Union[ImageSide, Tuple[ImageSide, ImageSide]],
    'mean': Union[float, Tuple[float, ...]],
    'std': Union[_Positive, Tuple[_Positive, ...]],
    'interpolation': Literal['bicubic', 'bilinear', 'nearest', 'box', 'hamming', 'lanczos', 'random'],
    'crop_pct': _Positive,
    'test_crop_pct': _Positive,
    'crop_mode': Literal['center', 'squash', 'border'],
}


def check_data_config(where: str, config: Mapping[str, Any], in_chans: int = 3) -> Dict[str, Any]:
    """Return a data config in plain Python; tensors and NumPy's values become numbers and tuples.

    Args:
        where: The beginning of an error message, which says whose config it is.
        in_chans: Channels of an image, unless the config itself says them.

    Raises:
        ValueError: for a value that no image can be prepared with, or that JSON can't hold; the message names it.
    """
    plain = {name: _plain(f'{where}: {name}', value) for name, value in config.items() if value is not None}
    for name, value in plain.items():
        if name in DATA_FIELDS:
            plain[name] = conform(f'{where}: {name}', value, DATA_FIELDS[name])
    channels = plain.get('input_size', (in_chans,))[0]
    for name in ('mean', 'std'):
        value = plain.get(name)
        # timm takes the mean of three numbers where there is another number of channels
        if isinstance(value, tuple) and len(value) not in (1, 3, channels):
            raise ValueError(f'{where}: {name}: got {show(value)}, expected one number, or one for each channel.')
    return plain


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(_plain(name, one) for one in value)
    if isinstance(value, dict):
        return {str(key): _plain(name, one) for key, one in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f'{name}: got {show(value)}, expected numbers or text, which {CONFIG_NAME} can hold.')
