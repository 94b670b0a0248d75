"""Maps of where a model looks: Grad-CAM shows it for its ResNet, attention rollout for its ViT.

Papers: `Grad-CAM` (Selvaraju et al. 2017, arXiv:1610.02391), `Quantifying Attention Flow in Transformers` (Abnar and
Zuidema 2020, arXiv:2005.00928). image, uncropped -> (1, C, H, W) -> maps (1, H, W) -> `Explanation`.
"""

import threading
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from .checks import ImageSide, conform
from .data import ImageLike, data_config, image_mode, open_image, to_batch
from .labels import check_logits, label_names
from .models.base import Hybrid, ImageSizes
from .models.layers import unfused

# larger images would take gigabytes, since attention has a value for every pair of tokens
MAX_PIXELS = 4096 * 4096
MAX_TOKENS = 4096
_TURNS = threading.Lock()  # hooks, and which kernel attends, are the model's: of two threads one waits


class Explanation(NamedTuple):
    """An image as the model saw it, the class explained, and a map (H, W) from 0 to 1 for ResNet and for ViT.

    A map is None where the model lacks that part.
    """

    image: Image.Image
    label: str
    probability: float
    resnet: Optional[np.ndarray]
    vit: Optional[np.ndarray]


def explain(
    model: nn.Module, image: ImageLike, target: Union[None, int, str] = None, size: Optional[int] = None
) -> Explanation:
    """Explain a prediction: the whole image, uncropped, in its own proportions.

    Args:
        model: A hybrid of this package with a head, in evaluation mode.
        image: A path, a PIL image, or an array (H, W) or (H, W, C) of 8-bit values.
        target: The class to explain, by its index (int) or its name (str); by default the likeliest one.
        size: Pixels of the image's shorter side; by default the model's own input size. A model that takes only some
            sizes sees the image at the nearest one.

    Raises:
        ValueError: for a model that is no hybrid, is in training mode, has no head, or gives outputs that are not
            finite; for an unknown class, or a name that several classes have; for an impossible or too large size.
        FileNotFoundError, TypeError: where `open_image` raises them.
    """
    if not isinstance(model, Hybrid):
        raise ValueError(f'model: got {type(model).__name__}, expected a hybrid of this package.')
    if model.num_classes == 0 or model.global_pool == '':
        raise ValueError('model: it has no head, or does not pool, so there is no prediction to explain.')
    if model.training:
        raise ValueError('model: it is in training mode; call model.eval() before it is explained.')
    size = conform('size', size, Optional[ImageSide])
    names = label_names(model)
    index = None if target is None else class_index(target, names)

    x, seen = _whole(image, model, size)
    with torch.inference_mode():
        logits = model(x)
        check_logits(logits, names)
        probabilities = logits[0].float().softmax(-1)
    if not probabilities.isfinite().all():
        raise ValueError('model: its outputs for the image are not finite (nan, inf); its weights are broken.')
    index = int(probabilities.argmax()) if index is None else index
    parts = model.explained_parts()
    resnet = grad_cam(model, x, index)[0].cpu().numpy() if parts.resnet is not None else None
    vit = attention_rollout(model, x)[0].cpu().numpy() if parts.attentions else None
    return Explanation(seen, names[index], float(probabilities[index]), resnet, vit)


def class_index(target: Union[int, str], names: Sequence[str]) -> int:
    """Return the index of a class that is given by its index (int) or its name (str).

    Raises:
        ValueError: where `target` means no class, or several.
    """
    if isinstance(target, str):
        found = [index for index, name in enumerate(names) if name == target]
        if len(found) > 1:
            raise ValueError(f'target: got {target!r}, the name of several classes; give the index of one: {found}')
        if not found:
            shown = ', '.join(names[:10]) + (', ...' if len(names) > 10 else '')
            raise ValueError(f'target: got {target!r}, expected one of the classes: {shown}')
        return found[0]
    if isinstance(target, bool) or not isinstance(target, (int, np.integer)) or not 0 <= target < len(names):
        raise ValueError(f'target: got {target!r}, expected a class index from 0 to {len(names) - 1}.')
    return int(target)


def _size_of(image: Image.Image, shorter: int, sizes: ImageSizes) -> Tuple[int, int]:
    """Return the width and height at which an image is seen, in its proportions as nearly as the model takes them."""
    scale = shorter / min(image.size)
    tops = sizes.largest[::-1] if sizes.largest else None
    if tops:
        scale = min(scale, *(top / side for top, side in zip(tops, image.size)))
    sides = [max(1, round(side * scale)) for side in image.size]
    if sizes.multiple > 1:
        sides = [max(round(side / sizes.multiple), 1) * sizes.multiple for side in sides]
    return sides[0], sides[1]


def _whole(image: ImageLike, model: Hybrid, size: Optional[int]) -> Tuple[torch.Tensor, Image.Image]:
    """Return a resized image twice: as a normalised batch of one, and as a picture."""
    config = data_config(model)
    channels, *own_size = config['input_size']
    opened = open_image(image, image_mode(channels))
    width, height = _size_of(opened, size or min(own_size), model.image_sizes())
    parts = model.explained_parts()
    rows, columns = -(-height // parts.token_stride[0]), -(-width // parts.token_stride[1])
    if width * height > MAX_PIXELS or (parts.attentions and rows * columns > MAX_TOKENS):
        raise ValueError(
            f'size: the image of {opened.width}x{opened.height} pixels would be seen as {width}x{height}, which is '
            f'{rows * columns} tokens; at most {MAX_TOKENS} tokens and {MAX_PIXELS} pixels are explained: give a '
            f'smaller size, or a part of the image.'
        )
    config.update(input_size=(channels, height, width), crop_pct=1.0, crop_mode='squash')
    return to_batch(opened, model, config), opened.convert('RGB').resize((width, height))


def grad_cam(model: Hybrid, x: torch.Tensor, target: int) -> torch.Tensor:
    """Return what the last stage of the ResNet sees of a class, from 0 to 1. x: (B, C, H, W) -> (B, H, W).

    The map's channels are weighted by the mean gradient of the class's logit and summed; negative values become 0.
    """
    parts = model.explained_parts()
    if parts.resnet is None:
        raise ValueError('model: it has no ResNet to look into.')
    maps: List[torch.Tensor] = []
    own = threading.get_ident()

    def keep(module, args, output):
        if threading.get_ident() != own:  # another thread uses the model meanwhile
            return
        maps.append(output[0] if isinstance(output, tuple) else output)

    with _TURNS:
        hook = parts.resnet.register_forward_hook(keep)
        try:
            with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode
                # the image requires a gradient, so that frozen weights make no difference
                logits = model(x.detach().clone().requires_grad_())
                (gradient,) = torch.autograd.grad(logits[:, target].sum(), maps[0], allow_unused=True)
        finally:
            hook.remove()
    if gradient is None:
        raise ValueError('model: no gradient reaches its ResNet, as through quantised layers; explain the original.')
    cam = (gradient.mean((2, 3), keepdim=True) * maps[0].detach()).sum(1).relu()
    return _to_pixels(cam, x, parts.resnet_stride)


def attention_rollout(model: Hybrid, x: torch.Tensor) -> torch.Tensor:
    """Return how much of each patch reaches the class token, from 0 to 1. x: (B, C, H, W) -> (B, H, W).

    Attention is averaged over the heads, mixed half and half with the identity (for the residual connection), and
    multiplied from the first block to the last. Without a class token, the mean over all patches counts.
    """
    parts = model.explained_parts()
    if not parts.attentions:
        raise ValueError('model: it has no attention to look into.')
    rollout: List[torch.Tensor] = []

    own = threading.get_ident()

    def multiply(module, args, attention):  # (B, heads, N, N), too large to keep for all blocks
        if threading.get_ident() != own:
            return
        attention = attention.float().mean(1)
        attention = 0.5 * attention + 0.5 * torch.eye(attention.shape[-1], device=attention.device)
        rollout[:] = [attention @ rollout[0] if rollout else attention]

    with _TURNS, torch.inference_mode(), unfused(parts.attentions):  # a fused kernel shows no attention
        hooks = [attention.attn_drop.register_forward_hook(multiply) for attention in parts.attentions]
        try:
            model.forward_features(x)
        finally:
            for hook in hooks:
                hook.remove()
    prefix, (stride_h, stride_w) = parts.num_prefix_tokens, parts.token_stride
    row = rollout[0][:, 0] if parts.class_token else rollout[0][:, prefix:].mean(1)
    grid = (-(-x.shape[-2] // stride_h), -(-x.shape[-1] // stride_w))
    return _to_pixels(row[:, prefix:].unflatten(1, grid), x, parts.token_stride)


def _to_pixels(values: torch.Tensor, x: torch.Tensor, stride: Tuple[int, int]) -> torch.Tensor:
    """Enlarge (B, h, w) by the stride, cut off what lies beyond the image, and stretch the values over 0 to 1."""
    size = (values.shape[1] * stride[0], values.shape[2] * stride[1])
    values = F.interpolate(values[:, None].float(), size, mode='bilinear')[:, 0, : x.shape[-2], : x.shape[-1]]
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    even = high - low <= 1e-5 * high.abs()  # stretching an even map would show rounding errors
    return ((values - low) / (high - low).masked_fill(even, 1)).masked_fill(even, 0)
