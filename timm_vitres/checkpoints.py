"""Checkpoints of any container and layout -> a state dict of ours (the serial family's is timm's), ready for a model.

file -> `read_checkpoint` (safetensors, torch, npz; known by its first bytes) -> `convert_layout` (timm's, Google's,
Hugging Face's ViTHybrid, Conformer's; known by its keys) -> `checkpoint_filter_fn` (compared with the model, tables
resampled).
Nothing in a checkpoint is run, and nothing in it is left out silently.
"""

import argparse
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, to_2tuple
from timm.models import clean_state_dict

from .files import ALIGNMENT

StateDict = Dict[str, torch.Tensor]

# what holds the weights in a training checkpoint, averaged ones first; then whatever is about them
WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')


def read_checkpoint(path: Path, use_ema: bool = True) -> Tuple[StateDict, Dict[str, Any]]:
    """Return the state dict in a file, in the file's own layout, and what else a training checkpoint says.

    Tensors of a safetensors file are mapped into memory: they are read when they are used, and never written back.

    Args:
        use_ema: Take the averaged weights of a training checkpoint, where it has them.

    Raises:
        OSError: for a damaged file.
        ValueError: for a file that is no checkpoint, or one that holds more than weights and plain values, which
            could run code.
    """
    with path.open('rb') as file:
        start = file.read(9)
    try:
        if start[8:] == b'{':
            return _read_safetensors(path), {}
        if start.startswith(b'PK'):
            with zipfile.ZipFile(path) as archive:
                is_npz = any(name.endswith('.npy') for name in archive.namelist())
            if is_npz:
                with np.load(path, allow_pickle=False) as arrays:
                    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}, {}
        if start.startswith((b'PK', b'\x80')):
            return _unwrap(_read_torch(path), use_ema, path)
    except (safetensors.SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise OSError(f'{path} is damaged or incomplete ({error}).') from error
    hint = ': it is a pointer of Git LFS, run `git lfs pull`' if start.startswith(b'version h') else ''
    raise ValueError(f'{path} is no safetensors, torch or npz file{hint}. It begins with {start!r}.')


def _read_safetensors(path: Path) -> StateDict:
    if os.name == 'nt':  # where a file that is mapped can't be replaced
        return safetensors.torch.load(path.read_bytes())
    tensors = safetensors.torch.load_file(path)
    # see `write_safetensors`
    return {key: value.clone() if value.nbytes % ALIGNMENT else value for key, value in tensors.items()}


def _read_torch(path: Path) -> Any:
    # not mapped: torch.save writes into the file itself, under a live model's feet
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the settings in timm's training checkpoints
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'{path} was not opened: it holds Python objects besides weights and plain values, which could run code '
            f'({_first_line(error)}). Save its state dict alone, with safetensors.'
        ) from error


def _first_line(error: Exception) -> str:
    found = re.search(r'(GLOBAL [\w.]+|Unsupported \w+ [\w.]+|Unsupported operand \d+)', str(error))
    return found.group(1) if found else str(error).partition('\n')[0][:200]


def _unwrap(checkpoint: Any, use_ema: bool, path: Path) -> Tuple[StateDict, Dict[str, Any]]:
    about: Dict[str, Any] = {}
    while isinstance(checkpoint, dict):
        wrappers = [key for key in WRAPPERS if isinstance(checkpoint.get(key), dict)]
        wrappers = [key for key in wrappers if use_ema or not key.endswith('_ema')]
        if not wrappers:
            break
        about = {**checkpoint, **about}
        checkpoint = checkpoint[wrappers[0]]
    if not isinstance(checkpoint, dict) or not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError(f'{path} holds no state dict (names with tensors), alone or as {" or ".join(WRAPPERS)}.')
    return checkpoint, {key: value for key, value in about.items() if key not in WRAPPERS}


class Layout(NamedTuple):
    """Who writes state dicts like this, and how they become timm's."""

    name: str
    key: str  # a regular expression for a key that no other layout has
    convert: Callable[[StateDict], StateDict]


def convert_layout(state_dict: Dict[str, Any]) -> StateDict:
    """Return a state dict, unwrapped and in our layout, whichever of `LAYOUTS` it has."""
    for wrapper in WRAPPERS:
        if isinstance(state_dict.get(wrapper), dict):
            return convert_layout(state_dict[wrapper])
    state_dict = clean_state_dict(state_dict)
    return find_layout(state_dict).convert(state_dict)


def find_layout(state_dict: StateDict) -> Layout:
    """Return the layout whose mark the keys bear; timm's where they bear none."""
    for layout in LAYOUTS:
        if any(re.search(layout.key, key) for key in state_dict):
            return layout
    return TIMM


def from_timm(state_dict: StateDict) -> StateDict:
    """Leave out the representation layer before the head, which old files of timm's may still hold."""
    return {key: value for key, value in state_dict.items() if not key.startswith('pre_logits.')}


def from_google(arrays: StateDict) -> StateDict:
    """Convert the arrays of a JAX R+ViT checkpoint (github:google-research/vision_transformer).

    Kernels are (height, width, in, out) or (in, out); attention is (width, heads, width / heads).
    """
    for prefix in ('opt/target/', 'params/'):
        if any(key.startswith(prefix) for key in arrays):  # beside the optimizer's
            arrays = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    backbone = 'patch_embed.backbone.'
    stem = backbone + ('stem.' if any(key.startswith('block') for key in arrays) else '')
    encoder = r'Transformer/encoderblock_(\d+)/'
    attention, mlp = r'MultiHeadDotProductAttention_\d/', r'MlpBlock_\d/'
    result: StateDict = {}
    for key, value in arrays.items():
        if key.startswith('pre_logits/'):
            continue
        new = _renamed(
            key.replace('/kernel', '.weight').replace('/scale', '.weight').replace('/bias', '.bias'),
            (r'^conv_root', stem + 'conv'),
            (r'^gn_root', stem + 'norm'),
            (r'^block(\d+)/unit(\d+)/', lambda m: f'{backbone}stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 1}.'),
            (r'\bgn(\d)', r'norm\1'),
            (r'\bconv_proj', 'downsample.conv'),
            (r'\bgn_proj', 'downsample.norm'),
            (r'^embedding', 'patch_embed.proj'),
            (r'^cls$', 'cls_token'),
            (r'^Transformer/posembed_input/pos_embedding$', 'pos_embed'),
            (r'^Transformer/encoder_norm', 'norm'),
            (encoder, r'blocks.\1.'),
            (r'LayerNorm_0', 'norm1'),
            (r'LayerNorm_[12]', 'norm2'),
            (mlp + r'Dense_(\d)', lambda m: f'mlp.fc{int(m[1]) + 1}'),
            (attention + 'out', 'attn.proj'),
            (attention, 'attn.'),
        )
        if key.endswith('/kernel'):
            if '/out/' in key:
                value = value.flatten(0, 1)
            elif 'MultiHead' in key:
                value = value.flatten(1)
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        elif re.search(r'/(bias|scale)$', key):
            value = value.flatten()
        result[new] = value.contiguous()
    return _join_qkv(result)


def from_vit_hybrid(state_dict: StateDict) -> StateDict:
    """Convert transformers' ViTHybridForImageClassification, or its ViTHybridModel (gone since transformers 5)."""
    result: StateDict = {}
    for key, value in state_dict.items():
        new = _renamed(
            key.removeprefix('vit.'),
            (r'^embeddings\.cls_token', 'cls_token'),
            (r'^embeddings\.position_embeddings', 'pos_embed'),
            (r'^embeddings\.patch_embeddings\.projection', 'patch_embed.proj'),
            (r'^embeddings\.patch_embeddings\.backbone\.bit\.', 'patch_embed.backbone.'),
            (r'\bembedder\.convolution', 'stem.conv'),
            (r'\bembedder\.norm', 'stem.norm'),
            (r'\bencoder\.stages\.(\d+)\.layers\.', r'stages.\1.blocks.'),
            (r'^encoder\.layer\.', 'blocks.'),
            (r'attention\.attention\.', 'attn.'),
            (r'attention\.output\.dense', 'attn.proj'),
            (r'intermediate\.dense', 'mlp.fc1'),
            (r'(?<=\d\.)output\.dense', 'mlp.fc2'),
            (r'layernorm_before', 'norm1'),
            (r'layernorm_after', 'norm2'),
            (r'^layernorm', 'norm'),
            (r'^classifier', 'head'),
        )
        if not new.startswith('pooler.'):  # of ViTHybridModel, unused by its classifier
            result[new] = value
    return _join_qkv(result)


def from_conformer(state_dict: StateDict) -> StateDict:
    """Convert a Conformer of its authors (github:pengzhiliang/Conformer), or, keys below `backbone.`, of mmpretrain.

    The projections between ResNet and ViT, 1x1 convolutions there, are linear layers here.
    """
    return {
        _renamed(
            key,
            (r'^backbone\.', ''),
            (r'^head\.', ''),
            (r'^conv_cls_head\.', 'head_resnet.'),
            (r'^trans_cls_head\.', 'head_vit.'),
            (r'^trans_norm\.', 'norm.'),
            (r'^(conv1|bn1)\.', r'stem.\1.'),
            (r'^conv_1\.', 'units.0.conv_block.'),
            (r'^trans_patch_conv\.', 'units.0.patch_embed.'),
            (r'^trans_1\.', 'units.0.block.'),
            (r'^conv_trans_(\d+)\.', lambda m: f'units.{int(m[1]) - 1}.'),
            (r'\bcnn_block\.', 'conv_block.'),
            (r'\btrans_block\.', 'block.'),
            (r'\bsqueeze_block\.conv_project\.', 'down.proj.'),
            (r'\bsqueeze_block\.ln\.', 'down.norm.'),
            (r'\bexpand_block\.conv_project\.', 'up.proj.'),
            (r'\bexpand_block\.bn\.', 'up.norm.'),
            (r'\bresidual_conv\.', 'downsample.0.'),
            (r'\bresidual_bn\.', 'downsample.1.'),
            (r'\bln([12])\.', r'norm\1.'),
            (r'\bffn\.layers\.0\.0\.', 'mlp.fc1.'),
            (r'\bffn\.layers\.1\.', 'mlp.fc2.'),
        ): value.flatten(1) if key.endswith('.conv_project.weight') else value
        for key, value in state_dict.items()
    }


def _renamed(key: str, *rules: Tuple[str, Any]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _join_qkv(state_dict: StateDict) -> StateDict:
    """Join query, key and value; where one is missing, the others keep their names, and the comparison lists them."""
    result: StateDict = {}
    for key, value in state_dict.items():
        part = re.fullmatch(r'(.*\.attn\.)(query|key|value)(\..*)', key)
        names = [f'{part[1]}{name}{part[3]}' for name in ('query', 'key', 'value')] if part else []
        if not part or not all(name in state_dict for name in names):
            result[key] = value
        elif part[2] == 'query':
            result[f'{part[1]}qkv{part[3]}'] = torch.cat([state_dict[name] for name in names])
    return result


TIMM = Layout('timm', r'^$', from_timm)
LAYOUTS: List[Layout] = [
    Layout('Google JAX', r'(^|/)(conv_root|embedding)/kernel$', from_google),
    Layout('transformers ViTHybrid', r'^(vit\.)?embeddings\.patch_embeddings\.', from_vit_hybrid),
    Layout('Conformer', r'^trans_patch_conv\.', from_conformer),
    Layout('mmpretrain Conformer', r'^backbone\.trans_patch_conv\.', from_conformer),
]


def checkpoint_filter_fn(
    state_dict: Dict[str, Any], model: torch.nn.Module, img_size: Optional[Sequence[int]] = None
) -> StateDict:
    """Return a state dict of any layout in timm's, resampled and compared: ready for `model`.

    Position embeddings are resampled from the checkpoint's grid to the model's, and the patch projection to its
    patch size, both as timm does.

    Args:
        img_size: Height and width that the checkpoint was made for, where they are known and not square.

    Raises:
        RuntimeError: for missing or unexpected keys and wrong shapes, all of which it lists; the head and the first
            convolution excepted, which are the caller's to compare.
    """
    state_dict = resample(convert_layout(state_dict), model, img_size)
    adaptable = {*classifier_keys(model), f'{model._traits["first_conv"]}.weight'}
    check_keys(state_dict, model, adaptable)
    return state_dict


def resample(state_dict: StateDict, model: torch.nn.Module, img_size: Optional[Sequence[int]] = None) -> StateDict:
    """Return a state dict of timm's layout with the model's position table and patch size."""
    state_dict = dict(state_dict)
    if not hasattr(model, 'patch_embed'):  # the parallel family has neither
        return state_dict
    table = state_dict.get('pos_embed')
    if table is not None and getattr(model, 'pos_embed', None) is not None:
        if table.ndim != 3:
            raise RuntimeError(
                f'pos_embed: the checkpoint has shape {tuple(table.shape)}, expected (1, tokens, width).'
            )
        state_dict['pos_embed'] = _resample_pos_embed(table, model, img_size)
    weight = state_dict.get('patch_embed.proj.weight')
    patch_size = tuple(model.patch_embed.patch_size)
    if weight is not None and weight.ndim == 4 and tuple(weight.shape[-2:]) != patch_size:
        state_dict['patch_embed.proj.weight'] = resample_patch_embed(weight, list(patch_size))
    return state_dict


def classifier_keys(model: torch.nn.Module) -> List[str]:
    """Return the names of the tensors of a model's head, or of its heads."""
    return [f'{head}.{tensor}' for head in model._traits['classifier'] for tensor in ('weight', 'bias')]


def check_keys(state_dict: StateDict, model: torch.nn.Module, adaptable=()) -> None:
    """Raise RuntimeError that lists missing keys, unexpected keys and wrong shapes, those in `adaptable` excepted."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = sorted(expected.keys() - state_dict.keys() - set(adaptable))
    unexpected = sorted(state_dict.keys() - expected.keys() - set(adaptable))
    wrong = [
        f'{key} {tuple(state_dict[key].shape)} for {shape}'
        for key, shape in expected.items()
        if key in state_dict and key not in adaptable and tuple(state_dict[key].shape) != shape
    ]
    if missing or unexpected or wrong:
        architecture = getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)
        raise RuntimeError(
            f'The checkpoint is not one of {architecture} as it was asked for: '
            f'missing keys: {_listed(missing)}; unexpected keys: {_listed(unexpected)}; '
            f'wrong shapes: {_listed(wrong)}.'
        )


def _listed(keys: Sequence[str], limit: int = 20) -> str:
    more = f' and {len(keys) - limit} more' if len(keys) > limit else ''
    return (', '.join(keys[:limit]) or 'none') + more


def _resample_pos_embed(
    pos_embed: torch.Tensor, model: torch.nn.Module, img_size: Optional[Sequence[int]]
) -> torch.Tensor:
    num_prefix_tokens = 0 if model.no_embed_class else model.num_prefix_tokens
    num_tokens = pos_embed.shape[1] - num_prefix_tokens
    grid = tuple(model.patch_embed.grid_size)
    old_grid = model.patch_embed.dynamic_feat_size(to_2tuple(img_size)) if img_size is not None else grid
    if old_grid[0] * old_grid[1] != num_tokens:
        side = int(num_tokens**0.5)
        if side * side != num_tokens:
            raise RuntimeError(
                f'pos_embed: the checkpoint has {num_tokens} position embeddings, which are no square grid, and its '
                f'metadata names no image size that gives that many; say its input_size in the pretrained_cfg.'
            )
        old_grid = (side, side)
    if tuple(old_grid) == grid:
        return pos_embed
    return resample_abs_pos_embed(
        pos_embed, new_size=list(grid), old_size=list(old_grid), num_prefix_tokens=num_prefix_tokens
    )
