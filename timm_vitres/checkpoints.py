"""Foreign checkpoint layouts -> ours.

A state dict passes `checkpoint_filter_fn` on its way into a model: unwrapped, position embeddings resampled to the
model's grid, and its keys compared, so that weights are never silently left out.
"""

from typing import Any, Dict, Optional, Tuple

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, to_2tuple

StateDict = Dict[str, torch.Tensor]


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: torch.nn.Module) -> StateDict:
    """Return a state dict in timm's R+ViT layout, ready for `model`.

    Position embeddings are resampled from the checkpoint's grid to the model's, and the patch projection to its
    patch size.

    Raises:
        RuntimeError: for missing or unexpected keys, the head and the first convolution excepted where the model
            has another number of classes or channels (timm adapts them).
    """
    state_dict = state_dict.get('state_dict', state_dict)
    state_dict = state_dict.get('model', state_dict)
    # the representation layer before the head, which timm's converted in21k files may still hold
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith('pre_logits.')}
    _check_keys(state_dict, model)

    if 'pos_embed' in state_dict:
        state_dict['pos_embed'] = _resample_pos_embed(state_dict['pos_embed'], model)
    weight = state_dict.get('patch_embed.proj.weight')
    patch_size = model.patch_embed.patch_size
    if weight is not None and tuple(weight.shape[-2:]) != tuple(patch_size):
        state_dict['patch_embed.proj.weight'] = resample_patch_embed(weight, list(patch_size))
    return state_dict


def _check_keys(state_dict: StateDict, model: torch.nn.Module) -> None:
    classifier = ('head.weight', 'head.bias')
    expected = model.state_dict().keys() - classifier
    missing = sorted(expected - state_dict.keys())
    unexpected = sorted(state_dict.keys() - expected - set(classifier))
    if missing or unexpected:
        architecture = model.pretrained_cfg.get('architecture', type(model).__name__)
        raise RuntimeError(
            f'The checkpoint is not one of {architecture}: missing keys: {_listed(missing)}; '
            f'unexpected keys: {_listed(unexpected)}.'
        )


def _listed(keys, limit: int = 20) -> str:
    more = f' and {len(keys) - limit} more' if len(keys) > limit else ''
    return (', '.join(keys[:limit]) or 'none') + more


def _source_grid(model: torch.nn.Module, num_tokens: int) -> Optional[Tuple[int, int]]:
    """Return the token grid that the checkpoint's metadata says it was made for, if it has `num_tokens`."""
    size = model.pretrained_model_args.get('img_size') or model.pretrained_cfg['input_size'][-2:]
    grid = model.patch_embed.dynamic_feat_size(to_2tuple(size))
    return grid if grid[0] * grid[1] == num_tokens else None


def _resample_pos_embed(pos_embed: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    num_prefix_tokens = 0 if model.no_embed_class else model.num_prefix_tokens
    num_tokens = pos_embed.shape[1] - num_prefix_tokens
    old_size = _source_grid(model, num_tokens)
    if old_size is None:
        side = int(num_tokens**0.5)
        if side * side != num_tokens:
            raise RuntimeError(
                f'pos_embed: the checkpoint has {num_tokens} position embeddings, which are no square grid, and its '
                f'metadata names no image size that gives that many; say its input_size in the pretrained_cfg.'
            )
        old_size = (side, side)
    return resample_abs_pos_embed(
        pos_embed,
        new_size=list(model.patch_embed.grid_size),
        old_size=list(old_size),
        num_prefix_tokens=num_prefix_tokens,
    )
