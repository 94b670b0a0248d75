"""What stands beside a checkpoint: config.json (timm's or transformers') and preprocessor_config.json.

file, folder, 'hf-hub:owner/name' or URL -> `find_beside` -> the weights' path, and what its neighbours say.
"""

import dataclasses
import json
import logging
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, split_model_name_tag

from ..checks import on_one_line, show
from ..models.base import Hybrid
from ..weights.augreg import url_of
from ..weights.checkpoints import INDEX_NAMES
from ..weights.checksums import SHA256_FIELD
from ..weights.downloads import NotInRepository, at_commit, hub_file, url_file
from ..weights.files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAMES
from ..weights.layouts import LAYOUTS
from ..weights.sources import LOCAL, hub_weights, local_weights
from .cards import fields_of

_logger = logging.getLogger(__name__)
PREPROCESSOR_NAME = 'preprocessor_config.json'  # transformers stores the preprocessing under this name
MODEL_TYPES = [layout.model_type for layout in LAYOUTS if layout.model_type]  # in a config.json of transformers
PRETRAINED_FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)}


def hub_id_of(source: str) -> Optional[str]:
    """Return 'owner/name' of 'hf-hub:owner/name'; None for any other source."""
    return source.removeprefix('hf-hub:') if source.startswith('hf-hub:') else None


def _hub_file_beside(hub_id: str, path: Path, name: str) -> Path:
    """Return a file of the commit that the weights at a path in the Hub's cache are of."""
    return hub_file(at_commit(hub_id, path.parent.name), (name,))


def find_beside(source: str) -> Tuple[Path, Dict[str, Any], Dict[str, Any], Optional[str]]:
    """Return the weights, what config.json and preprocessor_config.json beside them say, and a download's address."""
    found: List[Dict[str, Any]] = []
    hub_id = hub_id_of(source)
    url = None if hub_id or Path(source).exists() else url_of(source)
    if url:
        return url_file(url), {}, {}, url
    path = hub_weights(hub_id) if hub_id else local_weights(source.removeprefix(LOCAL))
    for name in (CONFIG_NAME, PREPROCESSOR_NAME):
        beside = path.with_name(name)
        if found and found[0].get('architecture') and found[0].get('pretrained_cfg'):  # timm's config says all
            found.append({})
            continue
        if hub_id:
            with suppress(NotInRepository):  # not every repository has both
                beside = _hub_file_beside(hub_id, path, name)
        content = _read_json(beside) if beside.is_file() else {}
        found.append(content if found else _nested(content))
    config, preprocessor = found
    if not hub_id and Path(source.removeprefix(LOCAL)).is_file() and path.name not in (*WEIGHTS_NAMES, *INDEX_NAMES):
        # a folder of downloads may hold the config.json of any other model
        names_another = (config.get('architecture') or config.get('model_type')) and not _is_of_layout(config)
        # a config that says of which weights it is is this package's, which writes no .npz
        names_another = names_another or (path.suffix == '.npz' and SHA256_FIELD in config)
        if not config:
            preprocessor = {}  # it names no model, and so may be another's
        elif names_another:
            _logger.warning('%s: is of another model than %s, and left alone.', path.with_name(CONFIG_NAME), path.name)
            config, preprocessor = {}, {}
    return path, config, preprocessor, None


def license_beside(source: str, path: Path) -> Optional[str]:
    """Return the licence that the card beside the weights of `find_beside` tells, '' for none; None without a card."""
    hub_id = hub_id_of(source)
    card = path.with_name(CARD_NAME)
    if hub_id:
        try:
            card = _hub_file_beside(hub_id, path, CARD_NAME)
        except NotInRepository:
            return None
        except OSError as error:  # timm's own downloads leave it out
            _logger.warning('%s: its card was not looked at for a licence (%s).', hub_id, on_one_line(error))
            return None
    elif path.name not in (*WEIGHTS_NAMES, *INDEX_NAMES):  # a folder of downloads may hold the card of any other model
        return None
    if not card.is_file():
        return None
    told = fields_of(card.read_text(encoding='utf-8', errors='replace')).get('license')
    return told if isinstance(told, str) else ''


def our_name(told: Any) -> str:
    """Return the name of an architecture, as it is told anywhere, without its place and tag; ours, where it has one."""
    name = split_model_name_tag(str(told).rpartition(':')[2].rpartition('/')[2])[0]
    for family in Hybrid.families:
        for pattern, ours in family.foreign_names.items():
            if re.fullmatch(pattern, name):
                return ours
    return name


def _is_of_layout(config: Dict[str, Any]) -> bool:
    """Return whether a config.json is one of a model whose weights we read."""
    is_ours = any(our_name(config.get('architecture')) in family.variants for family in Hybrid.families)
    return is_ours or config.get('model_type') in MODEL_TYPES


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding='utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON ({error}); mend it, or take it away.') from error
    if not isinstance(found, dict):
        raise ValueError(
            f'{path} holds {type(found).__name__}, expected an object with names; mend it, or take it away.'
        )
    for name in ('model_args', 'pretrained_cfg'):
        if not isinstance(found.get(name) or {}, dict):
            raise ValueError(f'{path}: {name}: got {show(found[name])}, expected names with values.')
    return found


def _nested(config: Dict[str, Any]) -> Dict[str, Any]:
    """Return a config.json in timm's present form; the older form has the pretrained cfg at the top."""
    if 'architecture' not in config or config.get('pretrained_cfg'):
        return config
    names = config.get('label_names') or config.get('labels')
    return {
        **config,
        'pretrained_cfg': {key: config[key] for key in config.keys() & PRETRAINED_FIELDS},
        'label_names': names,
    }


def began_with(model: str, is_known: bool = False) -> Dict[str, Any]:
    """Return the config.json of the model that a run began with, of a folder or a repository; nothing if gone.

    Args:
        is_known: Whether the architecture is known without it.
    """
    _, _, place = model.partition(':')
    with suppress(OSError, ValueError, RuntimeError):
        path = Path(place) / CONFIG_NAME if model.startswith(LOCAL) else hub_file(place, (CONFIG_NAME,))
        config = _nested(_read_json(path))
        if config.get('architecture'):
            return config
    owner, _, name = place.partition('@')[0].rpartition('/')
    if owner == 'timm' and not model.startswith(LOCAL):  # the names of its repositories are timm's of models
        architecture, tag = split_model_name_tag(name)
        known = get_arch_pretrained_cfgs(architecture).get(name) if tag else None
        return {'architecture': architecture, **({'pretrained_cfg': known.to_dict()} if known else {})}
    instead = 'its arguments and data config are not known' if is_known else 'the model is found by its tensors'
    _logger.warning('%s: the run began with it, and it is not to be had; %s.', model, instead)
    return {}


def crop_of(preprocessor: Dict[str, Any]) -> Dict[str, Any]:
    """Return how transformers crops, in timm's words: resized to a size, of which the middle may be taken."""
    size, crop = preprocessor.get('size'), preprocessor.get('crop_size')
    crops = bool(preprocessor.get('do_center_crop', crop))
    sides = [_side(size), _side(crop) if crops else None]
    if None not in sides and 0 < sides[1] <= sides[0]:
        return dict(crop_pct=sides[1] / sides[0])
    # a number is both sides, but to ViTHybrid, which takes it for the shorter
    kind = str(preprocessor.get('image_processor_type') or preprocessor.get('feature_extractor_type'))
    is_number = isinstance(size, (int, float)) and not kind.startswith('ViTHybrid')
    has_both = is_number or (isinstance(size, dict) and 'height' in size)
    is_exact = has_both and not preprocessor.get('keep_aspect_ratio')
    return dict(crop_pct=1.0, **(dict(crop_mode='squash') if is_exact and not crops else {}))


def normalisation_of(preprocessor: Dict[str, Any]) -> Dict[str, Any]:
    """Return mean and std as timm takes them, of numbers from 0 to 1; transformers scales pixels by a factor before."""
    if preprocessor.get('do_normalize') is False:
        found = dict(mean=(0.0,), std=(1.0,))
    else:
        told = {key: preprocessor.get(f'image_{key}') for key in ('mean', 'std')}
        found = {
            key: tuple(value) if isinstance(value, (list, tuple)) else (value,)
            for key, value in told.items()
            if value is not None
        }
    factor = 1.0 if preprocessor.get('do_rescale') is False else preprocessor.get('rescale_factor')
    for name, values in dict(rescale_factor=(factor,), **found).items():
        for value in values:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (value is not None and not (is_number and math.isfinite(value))) or (name != 'mean' and value == 0):
                raise ValueError(f'{PREPROCESSOR_NAME}: {name}: got {value!r}, expected a number to divide by.')
    scale = 1.0 if factor is None or abs(255 * factor - 1) < 1e-3 else 255 * factor  # what it makes of a white pixel
    return {key: tuple(one / scale for one in value) for key, value in found.items()}


def _side(size: Any) -> Any:
    """Return the shorter side that transformers' names for a size tell; None if they tell none."""
    if isinstance(size, dict):
        size = size.get('shortest_edge') or min(size.get('height') or 0, size.get('width') or 0)
    return size if isinstance(size, (int, float)) and size else None
