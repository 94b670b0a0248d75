"""config.json of a model's folder: what it may say of the model and of its images.

folder -> `read_config` -> what timm will build; data config -> `check_data_config` -> plain values that JSON holds.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Dict, List, Literal, Mapping, Optional, Tuple, Union

import numpy as np
import timm
import torch
from timm.models import split_model_name_tag

from .checks import ImageSide, NumClasses, between, conform, show
from .files import CONFIG_NAME, SHA256_FIELD
from .labels import normalise_label_names

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


def check_data_config(where: str, config: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a data config in plain Python; tensors, and what is NumPy's, become numbers and lists.

    Args:
        where: Whose config it is, as a sentence about it begins.

    Raises:
        ValueError: for a value that no image can be prepared with, or that JSON can't hold; the message names it.
    """
    plain = {name: _plain(f'{where}: {name}', value) for name, value in config.items() if value is not None}
    for name, value in plain.items():
        if name in DATA_FIELDS:
            plain[name] = conform(f'{where}: {name}', value, DATA_FIELDS[name])
    channels = plain.get('input_size', (3,))[0]
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


def read_config(folder: Path) -> Dict[str, Any]:
    """Return what the config.json of a folder says, as far as timm needs it, checked.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is damaged, or says what no model is; the message names the file and the field.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f'{folder}: has no {CONFIG_NAME}.')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f'{path}: is no JSON that can be read ({error}).') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path}: holds {show(config)}, expected an object with the architecture of a model.')
    cfg = config.get('pretrained_cfg', config)  # older ones of timm's have all at the top
    for name, value in (('pretrained_cfg', cfg), ('model_args', config.get('model_args') or {})):
        if not isinstance(value, dict):
            raise ValueError(f'{path}: {name}: got {show(value)}, expected names with values.')
    _check_architecture(path, config.get('architecture'))
    num_classes = config.get('num_classes', cfg.get('num_classes'))
    if num_classes is not None:
        num_classes = conform(f'{path}: num_classes', num_classes, NumClasses)
    _check_labels(path, config.get('label_names', cfg.get('label_names', cfg.get('labels'))), num_classes)
    check_data_config(str(path), {name: cfg[name] for name in DATA_FIELDS if name in cfg})
    told = config.get(SHA256_FIELD)
    if told is not None and not (isinstance(told, str) and len(told) == 64 and set(told) <= set('0123456789abcdef')):
        raise ValueError(f'{path}: {SHA256_FIELD}: got {show(told)}, expected the 64 digits of a sha256.')
    return config


def _check_architecture(path: Path, name: Any) -> None:
    if not isinstance(name, str) or not timm.is_model(split_model_name_tag(name)[0]):
        raise ValueError(f'{path}: architecture: got {show(name)}, expected one of timm.list_models().')


def _check_labels(path: Path, names: Any, num_classes: Optional[int]) -> None:
    if names is None or num_classes is None or isinstance(names, Mapping):  # a dict may leave classes without a name
        return
    labels: List[str] = list(names) if isinstance(names, (list, tuple)) else names
    try:
        normalise_label_names(labels, num_classes)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
