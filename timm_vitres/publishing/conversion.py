"""A checkpoint file of any layout -> a folder that timm loads and `push` sends.

last.pth.tar, R26_S_32.npz, pytorch_model.bin, hf-hub:me/name -> `convert` -> folder/{model.safetensors, config.json,
README.md}. What the file and its neighbours say (architecture, classes, size, preprocessing) is used, unless the
caller says otherwise.
"""

import argparse
import logging
import os
import re
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union
from urllib.parse import unquote, urlparse

import timm
from PIL import Image
from timm.data import get_img_extensions, resolve_input_data_config
from timm.layers import to_2tuple
from timm.models import (
    get_arch_pretrained_cfgs,
    get_model_input_config,
    get_pretrained_cfg,
)
from timm.utils import natural_key

from ..checks import Size as ImageSize
from ..checks import conform, show
from ..data import DATA_FIELDS, check_data_config
from ..folders import split_role
from ..labels import normalise_label_names
from ..models.base import Hybrid
from ..models.loading import assign_, fill_buffers_
from ..walking import shown
from ..weights.augreg import PublishedName, read_name
from ..weights.checkpoints import checkpoint_files, read_checkpoint
from ..weights.checksums import check_once, is_of_this_package
from ..weights.comparison import add_batch_counts, check_dtypes, check_keys
from ..weights.files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from ..weights.layouts import Layout, StateDict, convert_layout, find_layout, plain_names
from ..weights.sources import SOURCE_ARGUMENTS, STARTS
from ..writing import check_home
from .cards import OURS, read_card, render_card
from .config_file import told_of_weights
from .neighbours import (
    MODEL_TYPES,
    began_with,
    crop_of,
    find_beside,
    hub_id_of,
    license_beside,
    normalisation_of,
    our_name,
)
from .saving import save

_logger = logging.getLogger(__name__)
BEGUN_FIELDS = (*DATA_FIELDS, 'fixed_input_size', 'license')  # what a run takes over from the model that it begins with
# datasets of timm's that are image folders, and how they order the classes: timm by numbers, torchvision by letters
FOLDERS = {'': natural_key, 'folder': natural_key, 'torch/image_folder': str, 'torch/folder': str}
OF_TIMM = ('', 'folder')  # an image's class is the folder that it lies in, however deep; torchvision's is the first
RESAMPLING = {mode.value: mode.name.lower() for mode in Image.Resampling}  # transformers writes PIL's numbers


def convert(
    source: Union[str, Path],
    folder: Union[str, Path],
    model: Optional[str] = None,
    label_names: Optional[Sequence[str]] = None,
    img_size: Union[None, int, Tuple[int, int]] = None,
    use_ema: bool = True,
    model_kwargs: Optional[Dict[str, Any]] = None,
) -> Path:
    """Turn a checkpoint into a folder that `timm.create_model('local-dir:<folder>', pretrained=True)` loads.

    Args:
        source: A file, a folder with one (or with shards and their index), 'hf-hub:owner/name', or a URL. It holds a
            training checkpoint of timm's, or weights of timm, Google (npz), Hugging Face's ViTHybrid or DPT-Hybrid,
            MiDaS, pix2tex, or Conformer (of its authors or of mmpretrain). A file that has the name under which
            Google published it is what that name says (see `weights.augreg`); of one that is not here, that name,
            or its address (gs://vit_models/...), is enough.
        folder: The folder to write; what this package has written there before is replaced, anything else is not.
        model: The architecture; by default the one that the checkpoint names, else the hybrid that has these tensors.
        label_names: Names of the classes, by index, or a dict of them by index; by default those that stand beside
            the checkpoint, if any.
        img_size: Height and width of the training images; by default what the checkpoint or its position table says.
        use_ema: Take averaged weights, where the checkpoint has them.
        model_kwargs: Further arguments of the model, as for `timm.create_model`.

    Returns:
        The folder.

    Raises:
        ValueError: where the architecture is unknown, the file is no checkpoint or not what its published name says,
            or label_names are not as many as its classes.
        RuntimeError: for missing or unexpected keys, wrong shapes and dtypes.
        OSError: for a damaged file, one that can't be downloaded, and a folder that holds another's model or card.
    """
    if img_size is not None:
        img_size = conform('img_size', img_size, ImageSize)
    _check_folder(Path(folder))
    path, config, preprocessor, url = find_beside(str(source))
    address = urlparse(url).path if url else None  # a query may hold a secret
    published = read_name(address or path)  # a cache has names of its own
    if published:
        config, preprocessor = _of_published(path, published, config, preprocessor)
    for file in checkpoint_files(path):
        check_once(file)
    weights, about = read_checkpoint(path, use_ema)
    weights = plain_names(weights)
    layout = find_layout(weights)
    state_dict = convert_layout(weights)
    args, about, config = _with_beginning(_settings(path, about), about, config, model)
    sizes = img_size, img_size or _trained_size(args, config)
    name, kwargs = _architecture(model, args, about, config, state_dict, sizes)
    kwargs.update(model_kwargs or {})
    _add_shapes(name, kwargs, state_dict, *sizes, _own_size(args, config))

    built = _on_meta(name, **kwargs)
    state_dict = add_batch_counts(state_dict, built)
    if published and not model:
        _check_name(path, published, name, kwargs, state_dict, built)
    check_dtypes(state_dict, built)
    check_keys(state_dict, built)
    if label_names is None:
        label_names = _label_names(args, config, built.num_classes)
    else:
        label_names = normalise_label_names(label_names, built.num_classes)
    assign_(built, state_dict)
    fill_buffers_(built)
    source_cfg = config.get('pretrained_cfg') or {}
    file_name = Path(unquote(address) if address else path).name
    is_theirs = bool(published or re.fullmatch(layout.published, file_name))
    license = _license(str(source), path, is_theirs, source_cfg, layout)
    built.pretrained_cfg = told_of_weights(built.pretrained_cfg, {**source_cfg, 'license': license})
    data = _data_config(built, sizes[1], args, config, preprocessor)
    card = render_card(
        built,
        model_name=Path(folder).resolve().name,
        description=f'Converted from `{file_name}` ({layout.name} layout) by `timm-vitres convert`.',
        recipe=published.recipe if published else _recipe(args, about),
        source=f'local-dir:{folder}',
        label_names=label_names or (),
        data_config=data,
        license=built.pretrained_cfg.get('license'),
    )
    return save(built, folder, label_names, data, card)


def _of_published(
    path: Path, published: PublishedName, config: Dict[str, Any], preprocessor: Dict[str, Any]
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Return what stands beside a file that Google published, where it is of that model; else what its name says."""
    named = config.get('architecture') or config.get('model_type')
    if named and our_name(named) != our_name(published.architecture) and named not in MODEL_TYPES:
        _logger.warning('%s: is of another model than %s, and left alone.', path.with_name(CONFIG_NAME), path.name)
        return published.config(), {}
    return (config if named else {**published.config(), **config}), preprocessor


def _license(source: str, path: Path, is_theirs: bool, source_cfg: Dict[str, Any], layout: Layout) -> Optional[str]:
    """Return the licence that the card or the config beside weights tells; else, of a file that has the name under
    which the writers of its layout published it (`is_theirs`), theirs.

    Not so of a repository, or beside a card: whose owner tells none has none.
    """
    told = license_beside(source, path)
    license = told or source_cfg.get('license')
    if not license and is_theirs and told is None and hub_id_of(source) is None:
        return layout.license
    return license


def _check_folder(folder: Path) -> None:
    """Raise FileExistsError for a folder with files in the place of the model's that this package has not written."""
    check_home('folder', folder)
    card, config = read_card(folder / CARD_NAME), folder / CONFIG_NAME
    taken = [CARD_NAME] if card is not None and not OURS.search(card) else []
    if not config.is_file() or not is_of_this_package(config.read_text(encoding='utf-8', errors='replace')):
        taken += [name for name in (CONFIG_NAME, WEIGHTS_NAME) if os.path.lexists(folder / name)]
    if taken:
        raise FileExistsError(
            f'folder: {folder} holds {" and ".join(taken)} already, not of this package; give a new folder.'
        )


def _settings(path: Path, about: Dict[str, Any]) -> Dict[str, Any]:
    """Return the settings in a training checkpoint; raise ValueError, naming the file, if they are malformed."""
    args = about.get('args') or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        raise ValueError(f'{path}: args: got {show(args)}, expected the settings of a training run.')
    if not isinstance(args.get('model_kwargs') or {}, dict):
        raise ValueError(f'{path}: model_kwargs: got {show(args["model_kwargs"])}, expected names with values.')
    args = dict(args)
    size = args.get('input_size')
    if isinstance(size, int) or (isinstance(size, (list, tuple)) and len(size) == 2):  # as DeiT's and Conformer's code
        args['img_size'] = args.pop('input_size')
    # timm's train.py records None or '' for a setting that was not given
    told = {name: args[name] for name in DATA_FIELDS if args.get(name)}
    check_data_config(str(path), told, args.get('in_chans') or 3)
    return args


def _architecture(
    model: Optional[str],
    args: Dict[str, Any],
    about: Dict[str, Any],
    config: Dict[str, Any],
    state_dict: StateDict,
    sizes: Tuple[Any, Any],
) -> Tuple[str, Dict[str, Any]]:
    """Return the architecture's name and the arguments that go with it; `sizes` are those that `_add_shapes` takes."""
    told = model or about.get('arch') or config.get('architecture')
    kwargs = dict(args.get('model_kwargs') or config.get('model_args') or {})
    for key in sorted(kwargs.keys() & {*SOURCE_ARGUMENTS, 'features_only'}):
        raise ValueError(f'model_args: {key} says nothing of the model that the checkpoint is of; take it out.')
    if args.get('gp'):
        kwargs['global_pool'] = args['gp']
    if told:
        name = our_name(told)
        if not timm.is_model(name):
            raise ValueError(f'model: got {told!r}, which timm does not know; give one of timm.list_models().')
        return name, kwargs
    candidates = [name for family in Hybrid.families for name in family.variants if not name.startswith('test_')]
    for name in candidates:
        own = dict(kwargs)
        try:
            _on_meta(name, **own).check_without_tables(state_dict)  # the grid of another model's table says nothing
            _add_shapes(name, own, state_dict, *sizes)
            built = _on_meta(name, **own)
            check_keys(add_batch_counts(state_dict, built), built)
        except (RuntimeError, ValueError, TypeError):
            continue
        _logger.warning(
            'model: %s is found by its tensors; what none of them shows (num_heads, act_layer, strides, the colours of '
            'images) is taken to be its own, unless --model and --model-kwargs say otherwise.',
            name,
        )
        return name, kwargs
    raise ValueError(
        f'model: not given, and the checkpoint has the tensors of none of {", ".join(candidates)}; say which '
        f'architecture it is, and give its further arguments as model_kwargs.'
    )


def _with_beginning(
    args: Dict[str, Any], about: Dict[str, Any], config: Dict[str, Any], model: Optional[str]
) -> Tuple[Dict[str, Any], Dict[str, Any], Dict[str, Any]]:
    """Return settings, what a checkpoint says beside them, and config.json, with what the model that the run began with
    says, if it was a folder or repository; nothing of another architecture than `model`, which the user may have named.

    timm writes its name where an architecture's belongs. Its classes are not the run's.
    """
    source = str(args.get('model') or '')
    if not source.startswith(STARTS):
        return args, {**about, 'arch': about.get('arch') or args.get('model')}, config
    began = began_with(source, bool(model))
    if model and our_name(began.get('architecture')) != our_name(model):
        return args, about, config
    cfg = {name: value for name, value in (began.get('pretrained_cfg') or {}).items() if name in BEGUN_FIELDS}
    kwargs = {name: value for name, value in (began.get('model_args') or {}).items() if name != 'num_classes'}
    args = {**args, 'model_kwargs': {**kwargs, **(args.get('model_kwargs') or {})}}
    config = {**config, 'pretrained_cfg': {**cfg, **(config.get('pretrained_cfg') or {})}}
    return args, {**about, 'arch': began.get('architecture')}, config


def _own_size(args: Dict[str, Any], config: Dict[str, Any]) -> Any:
    """Return the size of the position table of the model that timm's train.py names, where images of any size go in.

    Its --img-size and --input-size change only the images of such a model.
    """
    if str(args.get('model')).startswith(STARTS):  # of which config.json has told
        size = (config.get('pretrained_cfg') or {}).get('input_size')
        return tuple(size[-2:]) if size else None
    with suppress(RuntimeError):  # a tag that timm does not know
        cfg = get_pretrained_cfg(str(args.get('model')))
        return None if cfg is None or cfg.fixed_input_size else cfg.input_size[-2:]
    return None


def _check_name(
    path: Path, published: PublishedName, name: str, kwargs: Dict[str, Any], state_dict: StateDict, built: Hybrid
) -> None:
    """Raise ValueError where a file is not what the name says under which it was published."""
    told: Optional[str] = None
    try:
        check_keys(state_dict, built, built.head_keys())
    except RuntimeError:
        told = f'the name says {published.architecture} ({name}), whose tensors the file does not have'
    size, num_classes = to_2tuple(kwargs.get('img_size')), kwargs['num_classes']
    if not told and published.size and size != to_2tuple(published.size):
        told = f'the name says {published.size} pixels, but the position table is for {size[0]}x{size[1]}'
    expected = published.num_classes
    if not told and num_classes and expected and num_classes != expected:
        data = published.dataset or published.upstream
        told = f'the name says {data}, which has {expected} classes, but the head has {num_classes}'
    if told:
        raise ValueError(f'source: {path.name}: {told}; give the file another name to have it known by its contents.')


def _on_meta(name: str, **kwargs: Any) -> Hybrid:
    try:
        model = timm.create_model(name, **kwargs, device='meta')
    except TypeError as error:
        raise TypeError(f'model: {name!r} does not take these arguments ({error}).') from error
    if not isinstance(model, Hybrid):
        raise ValueError(f"model: got '{name}', which is none of timm-vitres; see timm.list_models('vitresnet*').")
    return model


def _add_shapes(
    name: str,
    kwargs: Dict[str, Any],
    state_dict: StateDict,
    img_size: Any = None,
    trained_size: Any = None,
    own_size: Any = None,
) -> None:
    """Add what the shapes in a checkpoint say to a model's arguments: classes, channels, size of the position table.

    The table's size may differ from that of the training images: --img-size of timm's train.py changes only the images.
    A table is never resampled here. Where several sizes have as many tokens as the table, the caller's `img_size` comes
    first, then the one in the model's arguments, and `own_size`, that of the model which a run of train.py names; the
    architecture's own comes last.
    """
    model = _on_meta(name, **kwargs)
    head = state_dict.get(model.head_keys()[0])
    kwargs.setdefault('num_classes', 0 if head is None else len(head))
    first_conv = state_dict.get(f'{model.first_conv}.weight')
    if first_conv is not None and first_conv.ndim == 4:
        kwargs['in_chans'] = int(first_conv.shape[1])
    height, width = get_model_input_config(model)['input_size'][-2:]
    last = height if height == width else (height, width)
    candidates = img_size, kwargs.get('img_size'), own_size, trained_size, last
    try:
        size = model.table_size(state_dict, candidates)
    except ValueError:  # because of tokens that it lacks, or has besides
        model.check_without_tables(state_dict)
        raise
    if size is not None:
        kwargs['img_size'] = size


def _trained_size(args: Dict[str, Any], config: Dict[str, Any]) -> Any:
    """Return the size of the training images that the settings or config.json (timm's, transformers') name, or None."""
    size = args.get('img_size') or (args['input_size'][-2:] if args.get('input_size') else None)
    cfg, built = config.get('pretrained_cfg') or {}, (config.get('model_args') or {}).get('img_size')
    told = cfg.get('input_size') and cfg['input_size'][-2:]
    size = size or ((built or told) if cfg.get('fixed_input_size') else (told or built)) or config.get('image_size')
    return tuple(size) if isinstance(size, list) else size


def _label_names(args: Dict[str, Any], config: Dict[str, Any], num_classes: int) -> Optional[List[str]]:
    """Return the class names in config.json, or else those of the image folders, if they exist on this machine."""
    names = config.get('label_names') or (config.get('pretrained_cfg') or {}).get('label_names')
    names = names or config.get('id2label')
    folder = args.get('data_dir') or args.get('data')
    kind = args.get('dataset') or ''
    is_text = isinstance(folder, (str, Path)) and isinstance(kind, str)  # settings of other programs hold anything
    if not names and folder and is_text and not args.get('class_map') and kind in FOLDERS:
        names = _class_folders(Path(folder), args.get('train_split') or 'train', num_classes, kind in OF_TIMM)
        names = names and sorted(names, key=FOLDERS[kind])
        if names and len(names) == num_classes:
            some = ', '.join(map(shown, names[:3])) + (', ...' if len(names) > 3 else '')
            _logger.warning(
                'label_names: taken from the folders in %s, where the checkpoint was trained: %s.', folder, some
            )
    return normalise_label_names(names, num_classes) if names and len(names) == num_classes else None


def _class_folders(root: Path, split: str, num_classes: int, is_of_timm: bool) -> List[str]:
    """Return the names of the folders that timm took for classes: those of the split, if it is there, else all."""
    split = split.partition('[')[0]
    alike = [split, *(('train', 'training') if split in ('train', 'training') else ())]
    folder = next((root / name for name in alike if (root / name).is_dir()), root)
    children = [child for child in folder.iterdir() if child.is_dir()] if folder.is_dir() else []
    found = {child: list(islice(_image_folders(child), None if is_of_timm else 1)) for child in children}
    places = {place for below in found.values() for place in below}
    names = {place.name for place in places}
    if is_of_timm and places - set(children) and len(names) == num_classes:
        return list(names)
    filled = [child for child, below in found.items() if below]  # timm takes no others
    names = [child.name for child in (filled if len(filled) == num_classes else children)]  # images may be gone since
    return [] if folder == root and names and all(map(split_role, names)) else names


def _image_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders in which timm finds images: a folder, and those below it, through links, but not in circles."""
    endings = tuple(get_img_extensions())
    for place, below, files in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in map(os.path.realpath, Path(place).parents):
            below.clear()
            continue
        if any(name.lower().endswith(endings) for name in files):
            yield Path(place)


def _data_config(
    model: Hybrid, trained_size: Any, args: Dict[str, Any], config: Dict[str, Any], preprocessor: Dict[str, Any]
) -> Dict[str, Any]:
    """Return the data config: as the checkpoint or its neighbours say, else as the published weights need it."""
    channels, *size = get_model_input_config(model)['input_size']
    input_size = (channels, *(to_2tuple(trained_size) if trained_size else size))
    cfgs = get_arch_pretrained_cfgs(model.pretrained_cfg['architecture']).values()
    published = [cfg.to_dict() for cfg in cfgs if tuple(cfg.input_size[-2:]) == tuple(input_size[-2:])]
    # train.py took the data config of the model that it names
    named = None
    with suppress(RuntimeError):  # a tag that timm does not know
        named = get_pretrained_cfg(str(args.get('model')))
    told: Dict[str, Any] = named.to_dict() if named else dict(published[0] if published else model.pretrained_cfg)
    told.update(check_data_config(CONFIG_NAME, config.get('pretrained_cfg') or {}), input_size=input_size)
    if preprocessor:
        told.update(crop_of(preprocessor))
        told.update(normalisation_of(preprocessor))
        told['interpolation'] = RESAMPLING.get(preprocessor.get('resample', 3), 'bicubic')
    asked = {
        key: value for key, value in args.items() if key not in ('img_size', 'input_size', 'in_chans', 'model_kwargs')
    }
    return resolve_input_data_config(model, args=asked, pretrained_cfg=told)


def _recipe(args: Dict[str, Any], about: Dict[str, Any]) -> str:
    if not args:
        return 'The checkpoint does not say how it was trained.'
    told = ('model', 'epochs', 'batch_size', 'opt', 'lr', 'weight_decay', 'sched', 'layer_decay', 'drop_path', 'seed')
    settings = ', '.join(f'{key}={args[key]}' for key in told if args.get(key) is not None)
    number, epoch = about.get('metric'), about.get('epoch', 'unknown')
    metric = f'{args.get("eval_metric", "metric")} {number:.2f}' if isinstance(number, (int, float)) else 'no metric'
    whose = "A run of timm's train.py" if {'arch', 'version'} <= about.keys() else 'A run'  # others have args, too
    return f'{whose} ({settings}); it recorded epoch {epoch}, {metric}.'
