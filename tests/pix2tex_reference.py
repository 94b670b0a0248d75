"""What pix2tex's encoder computes, by its authors' own code and the old timm that it needs, compared with ours.

    pip install --no-deps --target original pix2tex==0.1.4 timm==0.5.4 x-transformers==0.15.0 einops entmax
    python tests/pix2tex_reference.py original            # compare
    python tests/pix2tex_reference.py original --write    # and write tests/pix2tex_golden.json

A process of its own, which sees the old timm, writes a checkpoint of random weights as pix2tex names them (encoder and
decoder), and the encoder's tokens of images of several sizes. Ours are made of this file.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

GOLDEN = Path(__file__).with_name('pix2tex_golden.json')
# height and width; pix2tex's position table is for 192x672
SIZES = ((192, 672), (64, 256), (32, 32), (96, 480), (192, 32), (32, 672), (160, 224))
# the settings of pix2tex's model/settings/config.yaml
SETTINGS = dict(
    **dict(encoder_structure='hybrid', backbone_layers=[2, 3, 7], channels=1, max_height=192, max_width=672),
    **dict(patch_size=16, dim=256, encoder_depth=4, heads=8, num_layers=4, num_tokens=8000, max_seq_len=512),
    **dict(bos_token=1, eos_token=2, pad_token=0, device='cpu', wandb=False, temperature=0.2),
)
DECODER = dict(attn_on_attn=True, cross_attend=True, ff_glu=True, rel_pos_bias=False, use_scalenorm=False)
SEED = 0
LIMIT = 2e-6


def fill_(model: torch.nn.Module) -> torch.nn.Module:
    """Give every tensor values of a seed, in the order of their names, of a size that lets every part count."""
    generator = torch.Generator().manual_seed(SEED)
    for key, tensor in sorted(model.state_dict().items()):
        values = torch.randn(tensor.shape, generator=generator)
        if key.endswith('pos_embed') or key.endswith('cls_token'):
            values = 0.5 * values
        elif tensor.ndim > 1:
            values = values / math.sqrt(tensor[0].numel())
            # small weights let the eps of their standardisation count
            values = values * 1e-2 if '.conv' in key else values
        elif key.endswith('weight'):
            values = 1 + 0.2 * values
        else:
            values = 0.2 * values
        tensor.copy_(values)
    return model.eval()


def images(size, batch: int = 2) -> torch.Tensor:
    """Return noise (B, 1, H, W) of a seed that the size gives."""
    return torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(1000 * size[0] + size[1]))


def write(folder: Path) -> None:
    """Write pix2tex's model and what its encoder computes; timm is the old one here."""
    import timm
    from pix2tex.models.utils import get_model

    settings: dict = dict(SETTINGS, decoder_args=DECODER)
    original = get_model(argparse.Namespace(**settings)).eval()
    fill_(original.encoder)
    with torch.inference_mode():
        tokens = {size: original.encoder(images(size)) for size in SIZES}
    torch.save(original.state_dict(), folder / 'weights.pth')
    torch.save(tokens, folder / 'tokens.pt')
    own, others = len(original.encoder.state_dict()), len(original.decoder.state_dict())
    print(
        f'timm {timm.__version__}, {type(original).__module__}: {own} tensors and {others} of the decoder', flush=True
    )


def compare(folder: Path) -> tuple[float, dict]:
    """Return the largest relative difference between ours and what was written, and golden figures."""
    import timm
    from conftest import relative_difference

    from timm_vitres.publishing.conversion import convert

    tokens, file = torch.load(folder / 'tokens.pt', weights_only=True), folder / 'weights.pth'
    converted = f'local-dir:{convert(file, folder / "converted")}'
    overlay: dict = dict(pretrained_cfg_overlay=dict(file=str(file)))
    # a table of another grid is cropped when it is loaded, as far as these images need it
    ways = {
        'vitresnet_ocr': ('vitresnet_ocr', overlay),
        'converted': (converted, {}),
        'for 160x480': ('vitresnet_ocr', dict(overlay, img_size=(160, 480))),
    }
    worst, golden = 0.0, {}
    for way, (name, kwargs) in ways.items():
        model = timm.create_model(name, pretrained=True, **kwargs).eval()
        for size, expected in tokens.items():
            if 'img_size' in kwargs and (size[0] > 160 or size[1] > 480):
                continue
            with torch.inference_mode():
                found = relative_difference(model.forward_features(images(size)), expected)
            worst = max(worst, found)
            print(f'{way}, {size[0]}x{size[1]}: {found:.1e} (norm {expected.norm():.1f})', flush=True)
            golden['x'.join(map(str, size))] = tokens[size][:, (0, -1), :8].tolist()
    return worst, golden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('original', type=Path, help='a folder that holds pix2tex and the old timm')
    parser.add_argument('--write', action='store_true', help=f'write {GOLDEN.name}')
    parser.add_argument('--files', type=Path, help=argparse.SUPPRESS)  # the folder, for the process of its own
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.files:
        write(args.files)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, args.original, '--files', folder]
        subprocess.run(command, check=True, env={**os.environ, 'PYTHONPATH': str(args.original.resolve())})
        worst, golden = compare(Path(folder))
    print(f'the largest relative difference: {worst:.1e}')
    if not worst < LIMIT:
        sys.exit(f'expected less than {LIMIT}')
    if args.write:
        GOLDEN.write_text(json.dumps(golden, indent=1) + '\n')


if __name__ == '__main__':
    main()
