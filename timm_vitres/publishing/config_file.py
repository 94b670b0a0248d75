"""config.json of a model's folder is read, and checked before timm builds a model from it.

folder -> `read_config` -> the content of its config.json, with its fields checked.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import timm
from timm.models import split_model_name_tag

from ..checks import NumClasses, conform, show
from ..data import DATA_FIELDS, check_data_config
from ..labels import normalise_label_names
from ..weights.checksums import SHA256_FIELD
from ..weights.files import CONFIG_NAME
from ..weights.sources import LOCAL

ABOUT_WEIGHTS = ('license', 'tag', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')  # fields of a cfg


def read_config(folder: Path) -> Dict[str, Any]:
    """Return the content of a folder's config.json, after a check of the fields that timm needs.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is damaged, or a field has an impossible value; the message names the file and the field.
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
    cfg = config.get('pretrained_cfg', config)  # timm's older files have all fields at the top
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


def check_config_of(name: str) -> None:
    """Raise ValueError for the name of a folder whose config.json is none; timm's own error would not name the file."""
    folder = name.removeprefix(LOCAL)
    if name.startswith(LOCAL) and folder and (Path(folder) / CONFIG_NAME).is_file():
        read_config(Path(folder))


def told_of_weights(cfg: Mapping[str, Any], source: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a pretrained cfg that tells of weights what their source does: the registry's tells of its own."""
    others = {name: value for name, value in cfg.items() if name not in ABOUT_WEIGHTS}
    return {**others, **{name: source[name] for name in ABOUT_WEIGHTS if source.get(name) is not None}}


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
