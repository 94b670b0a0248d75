"""What tests share: small pictures that can be told apart, weights that nothing is hidden by."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import timm_vitres  # noqa: F401


def randomise_(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Make every parameter and BatchNorm statistic count, so that no equality holds by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        for name, buffer in model.named_buffers():
            # means about 0: others would leave nothing behind the ReLUs but zeros, which are all equal
            if 'running_mean' in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
            if 'running_var' in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def stripes(size: int, vertical: bool, rng: np.random.Generator) -> Image.Image:
    """Return stripes with noise: a class that a tiny model learns in seconds."""
    wave = np.sin(np.arange(size) * rng.uniform(0.6, 1.0) + rng.uniform(0, 6))
    pattern = np.tile(wave, (size, 1)) if vertical else np.tile(wave[:, None], (1, size))
    pixels = 127 + 90 * pattern[..., None] + rng.normal(0, 20, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw(path: Path, seed: int = 0) -> Path:
    """Write a small picture of stripes, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes(16, True, np.random.default_rng(seed)).save(path)
    return path


def write_folder(root: Path, per_class: int = 12, size: int = 40) -> Path:
    rng = np.random.default_rng(0)
    for name in ('across', 'down'):
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(per_class):
            stripes(size, name == 'down', rng).save(folder / f'{index}.png')
    return root


@pytest.fixture
def image_folder(tmp_path) -> Path:
    return write_folder(tmp_path / 'images')
