"""What tests share: small pictures that can be told apart, weights that nothing is hidden by, models to save."""

import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterator, Sequence

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_vitres  # noqa: F401
from timm_vitres.inference.openvino_ir import CAPABILITIES
from timm_vitres.publishing.cards import render_card
from timm_vitres.publishing.saving import save


@pytest.fixture(autouse=True)
def usual_log_level():
    """Let warnings be seen as in a fresh process: some package raises the level of the root and of all its handlers."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in root.handlers:  # pytest's caplog among them
        handler.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def usual_seed():
    """Let a test draw the same, whichever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def usual_threads():
    """Give a process its number of threads back: scripts of benchmarks/ set it, and it changes the last bits."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def script(monkeypatch) -> Callable[[str], ModuleType]:
    """What imports a script of benchmarks/ by its name; they import each other as when they are run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / 'benchmarks'))
    return importlib.import_module


def differs(runtime: str, precision: str) -> bool:
    """Return whether a precision is another than fp32: OpenVINO computes in fp32 where the CPU has no bfloat16."""
    if runtime == 'openvino' and precision == 'bf16':
        import openvino

        return 'BF16' in openvino.Core().get_property(*CAPABILITIES)
    return precision != 'fp32'


def write_noise(folder: Path, classes: Sequence[str] = ('a', 'b'), **counts: int) -> None:
    """Write folder/<part>/<class>/*.png, images of noise, so many of each class of a part."""
    generator = np.random.default_rng(0)
    for part, count in counts.items():
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f'{index}.png')


FACTS = dict(model_name='x', description='A.', recipe='B.', source='local-dir:.')  # of a card
DUAL = 'test_vitresnet_dual'  # it has BatchNorm, and so counts of batches


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


def dual() -> torch.nn.Module:
    return randomise_(timm.create_model(DUAL, num_classes=3))


def two(name: str = 'test_vitresnet') -> Iterator:
    """Return two models with the same tensors' shapes, and with other names and preprocessing."""
    cards = ('First.', 'Second.')
    for seed, (label, mean, text) in enumerate(zip('ab', (0.25, 0.75), cards)):
        torch.manual_seed(seed)
        model = randomise_(timm.create_model(name, num_classes=2), seed)
        facts = {**FACTS, 'description': text}
        yield (
            model,
            dict(label_names=[label, label * 2], data_config=dict(mean=(mean,) * 3), card=render_card(model, **facts)),
        )


def rename_(model: torch.nn.Module, label_names) -> torch.nn.Module:
    """Give a model's classes names, whatever they are."""
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': label_names}
    return model


def flip(path: Path, offset: int = -1000) -> None:
    """Flip one bit inside the tensors."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


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


def write_folder(root: Path, per_class: int = 12, size: int = 40, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name in ('across', 'down'):
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(per_class):
            stripes(size, name == 'down', rng).save(folder / f'{index}.png')
    return root


@pytest.fixture
def image_folder(tmp_path) -> Path:
    return write_folder(tmp_path / 'images')


@pytest.fixture
def model() -> torch.nn.Module:
    """A small model of three classes."""
    return randomise_(timm.create_model('test_vitresnet', num_classes=3, img_size=32))


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """The folder of a small model of three classes."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3, img_size=32))
    return save(model, tmp_path / 'model', label_names=['cat', 'dog', 'owl'])


@pytest.fixture
def picture(tmp_path) -> Path:
    """A small picture."""
    path = tmp_path / 'picture.png'
    stripes(40, True, np.random.default_rng(0)).save(path)
    return path


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Leave the pictures of runs out: drawing takes longer than the training here."""
    from timm_vitres.training import held_out, loop, report

    monkeypatch.setattr(loop, 'can_draw', lambda: True)  # what warns of it
    for module in (report, held_out):
        monkeypatch.setattr(module, 'can_draw', lambda: False)
