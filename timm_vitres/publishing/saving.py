"""A model is saved as a folder that timm loads: it is rendered and checked first, then put in place whole.

model -> `save` -> folder/{model.safetensors, config.json, README.md} -> timm.create_model('local-dir:folder')
"""

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import timm
import torch
from timm.layers import FrozenBatchNormAct2d
from timm.models import PretrainedCfg, get_model_args, get_model_input_config
from timm.utils import unwrap_model
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ..checks import check_known
from ..data import DATA_FIELDS, check_data_config
from ..data import data_config as model_data_config
from ..labels import normalise_label_names, own_names
from ..models.base import Hybrid
from ..timm_private import save_config_for_hf
from ..weights.checksums import SHA256_FIELD
from ..weights.files import CARD_NAME, CONFIG_NAME
from ..writing import check_home
from .cards import (
    OURS,
    are_of_same_weights,
    check_card,
    merge_cards,
    plain_card,
    read_card,
    set_field,
    with_facts,
)
from .model_folder import locked, replace_model, with_sha256

TESTED = ('input_size', 'crop_pct')  # a pretrained cfg may name other ones for tests


def save(
    model: nn.Module,
    folder: Union[str, Path],
    label_names: Union[None, Sequence[str], Dict[Any, str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    card: Optional[str] = None,
) -> Path:
    """Save a timm model as a folder that `timm.create_model('local-dir:<folder>', pretrained=True)` loads.

    Everything is rendered and checked before a file of the folder is touched; a kill at any moment leaves the old model
    or the new one. The model may be mapped from the very file that is replaced.

    Args:
        model: A model made by `timm.create_model`; wrappers (torch.compile, DDP, timm's ModelEma) are taken off.
        folder: The folder, made if it is missing. Its files of the same names are replaced.
        label_names: Names of the classes, by index; by default those in the model's cfg, if it has any.
        data_config: Preprocessing that the weights were trained with; by default the model's own.
        card: Text of README.md; by default none is written where there is none. If the old card is this package's, its
            text outside of the marks stays, its classes and input follow, and where the weights are others, its results
            go; another's card stays as it is. The card's head, like config.json, tells the sha256 of the weights.

    Returns:
        The folder.

    Raises:
        ValueError: where label_names are not as many as the model's classes, data_config or card are impossible, the
            model is no timm model, or it was changed (folded, quantised, pruned) so that `timm.create_model` would not
            build it.
        TypeError: for a card that is no text, and a data_config that is no dict, or has names that none has.
        OSError: where writing fails, or another process writes to the folder; its last good model stays.
    """
    if not os.fspath(folder):
        raise ValueError("folder: got '', expected the name of a folder.")
    folder, model = Path(folder), unwrap_model(model)
    check_home('folder', folder)
    if not hasattr(model, 'pretrained_cfg') or not hasattr(model, 'num_classes'):
        raise ValueError(
            f'model: got {type(model).__name__}, expected a model made by timm.create_model without features_only.'
        )
    if getattr(model, 'folded', False):
        raise ValueError('model: it is folded for inference; save the model that it was folded from.')
    config = render_config(model, label_names, data_config)
    check_unchanged(model, config)
    if card is not None:
        if not isinstance(card, str):
            raise TypeError(f'card: got {card!r:.200}, expected the text of a card.')
        check_card(card, 'card')
    with locked(folder):
        text = _card(folder, card, model, config)
        replace_model(folder, _state_dict(model), config, text, finds_pending=isinstance(model, Hybrid))
    return folder


def _card(
    folder: Path, card: Optional[str], model: nn.Module, config: Dict[str, Any]
) -> Callable[[str], Optional[bytes]]:
    """Return a function from the sha256 of the weights to the new README.md, or to None if the old one stays as it is.

    Raises:
        ValueError: for an old card that can't be read where there is a new one.
    """
    path = folder / CARD_NAME
    there = path.read_bytes() if path.is_file() else b''
    try:
        old = read_card(path) if path.is_file() else None
    except ValueError:
        if card is not None:
            raise
        old = None
    plain = ''
    if card is None and old and OURS.search(old):
        told = config.get('label_names') or (), config['pretrained_cfg']
        plain = plain_card(model, folder.resolve().name, 'local-dir:.', *told)

    def written(digest: str) -> Optional[bytes]:
        if card is not None:  # a rendered card says nothing of the user's; one of his own says all
            new = set_field(card, SHA256_FIELD, digest)
            return (merge_cards(old, new) if old is not None and OURS.search(card) else new).encode()
        if old is not None and plain:
            new = set_field(plain, SHA256_FIELD, digest)
            if not are_of_same_weights(old, new):  # its results are of others
                return merge_cards(old, new).encode()
            return with_facts(there.decode(), plain).encode()
        return there if with_sha256(there, '') != there else None

    return written


def render_config(
    model: nn.Module,
    label_names: Union[None, Sequence[str], Dict[Any, str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Return the content of a model's config.json, in plain values that JSON holds.

    Raises:
        ValueError: for a value that it can't hold; the message names the argument.
        TypeError: for a data_config that is no dict, or has names that none has.
    """
    own = own_names(model)
    names = own if label_names is None else normalise_label_names(label_names, model.num_classes)
    tested: Dict[str, Any] = {}
    if data_config is not None and not isinstance(data_config, Mapping):
        raise TypeError(
            f'data_config: got {data_config!r:.200}, expected a dict, as timm.data.resolve_data_config gives.'
        )
    if data_config:
        check_known(data_config, {*DATA_FIELDS, *vars(PretrainedCfg())}, 'data_config')  # others are idle
        data_config = check_data_config('data_config', data_config, get_model_input_config(model)['input_size'][0])
    else:
        data_config = model_data_config(model)
        cfg = model.pretrained_cfg
        # timm leaves these out wherever a data config is given
        if all(_item(data_config[name]) == _item(cfg.get(name)) for name in TESTED):  # lists and tuples are one
            tested = {f'test_{name}': cfg.get(f'test_{name}') for name in TESTED}
    model_config = {'label_names': names} if names else None
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / CONFIG_NAME
        # numbers of NumPy become plain; a class, which JSON can't hold, is left for timm to refuse by name
        args = {name: _item(value) for name, value in get_model_args(model).items()}
        save_config_for_hf(model, str(path), model_config, model_args=args, data_config=data_config)
        config = json.loads(path.read_text(encoding='utf-8'))
    # config.json has both fields at its top already; transformers would pass num_classes on twice
    config.get('model_args', {}).pop('num_classes', None)
    config['pretrained_cfg'].pop('label_names', None)
    config['pretrained_cfg'].update({name: value for name, value in tested.items() if value is not None})
    if names and names != own:
        config['pretrained_cfg'].pop('label_descriptions', None)  # those are of classes with other names
    return config


def _item(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_item(one) for one in value)
    return value.item() if isinstance(value, np.generic) else value


def _state_dict(model: nn.Module) -> Dict[str, torch.Tensor]:
    """Return a model's tensors; those of a BatchNorm that timm has frozen lack its count, which the model has again."""
    state_dict = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, (FrozenBatchNormAct2d, FrozenBatchNorm2d)):
            state_dict.setdefault(f'{name}.num_batches_tracked', torch.tensor(0))
    return state_dict


def check_unchanged(model: nn.Module, config: Dict[str, Any]) -> None:
    """Raise ValueError unless `timm.create_model`, given this config.json, builds the same tensors and layers."""
    own = _state_dict(model)
    built, kinds, cfg = _built(config)
    if isinstance(model, Hybrid) and model.cfg != cfg:
        fields = [f'{name}={value!r}' for name, value in vars(model.cfg).items() if value != getattr(cfg, name, None)]
        raise ValueError(
            f'model: its cfg has {", ".join(fields)}, which it does not remember as an argument, so it could not be '
            'loaded again; make it by timm.create_model.'
        )
    changed = sorted(own.keys() ^ built.keys())
    for key in own.keys() & built.keys():
        same = type(own[key]) is torch.Tensor and own[key].shape == built[key].shape
        if not same or own[key].is_floating_point() != built[key].is_floating_point():
            changed.append(key)
    modules = dict(model.named_modules())
    # a folded layer may keep its names and shapes
    changed += [name for name, kind in kinds.items() if type(modules.get(name)) is not kind]
    if changed:
        raise ValueError(
            f"model: is not what timm.create_model('{config['architecture']}', ...) builds, so it could not be loaded "
            f'again: it was changed for inference (folded, quantised, pruned), or by hand, in '
            f'{", ".join(changed[:5])}{" and more" if len(changed) > 5 else ""}. Save the model that was trained.'
        )


def _built(config: Dict[str, Any]) -> Tuple[Dict[str, torch.Tensor], Dict[str, type], Any]:
    """Return the tensors, the layers' classes, and the cfg, of the model that timm builds from a config.json."""
    with tempfile.TemporaryDirectory() as temporary:
        text = json.dumps(config, allow_nan=False)
        (Path(temporary) / CONFIG_NAME).write_text(text, encoding='utf-8')
        try:
            with torch.device('meta'), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                twin = timm.create_model(f'local-dir:{temporary}')
        except (RuntimeError, NotImplementedError, ValueError):  # some of timm's models can't be built on 'meta'
            twin = timm.create_model(f'local-dir:{temporary}')
    layers = {name: type(module) for name, module in twin.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    return twin.state_dict(), layers, getattr(twin, 'cfg', None)
