"""What MiDaS's DPT-Hybrid computes, by its authors' own code and the old timm that it needs, compared with ours.

    git clone https://github.com/isl-org/MiDaS
    pip install --no-deps --target old-timm timm==0.6.13
    python tests/midas_reference.py MiDaS old-timm

timm 0.6.13 is the 0.6.12 that MiDaS asks for, mended for Python 3.11. github:isl-org/DPT is taken, too; it asks for
timm 0.4.5, and runs on torch 2 with 0.4.12.

A process of its own, which sees the old timm, writes files of random weights as MiDaS names them, and what DPT's
decoder takes from the backbone: two maps of the ResNet, tokens of two blocks. Ours are made of these files.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

# MiDaS resamples its position table for other sizes than 384, bilinearly; ours does so by timm's means
SIZE = 384
STAGES, BLOCKS = (0, 1), (8, 11)
LIMIT = 2e-6


def write(folder: Path) -> None:
    """Write MiDaS's model and what it computes; timm is the old one here."""
    import timm

    try:
        from midas.dpt_depth import DPTDepthModel
    except ImportError:
        from dpt.models import DPTDepthModel  # github:isl-org/DPT

    torch.manual_seed(0)
    original = DPTDepthModel(path=None, backbone='vitb_rn50_384', non_negative=True).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.02)
    backbone, kept = original.pretrained.model, {}

    def keep(name):
        return lambda module, args, output: kept.update({name: output.clone()})

    for i in STAGES:
        backbone.patch_embed.backbone.stages[i].register_forward_hook(keep(f'stage {i}'))
    for i in BLOCKS:
        backbone.blocks[i].register_forward_hook(keep(f'block {i}'))
    backbone.norm.register_forward_hook(keep('norm'))
    kept['images'] = torch.randn(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        depth = original(kept['images'])
    torch.save(kept, folder / 'kept.pt')
    torch.save(original.state_dict(), folder / 'dpt_hybrid-midas.pt')
    optimizer = torch.optim.SGD(original.parameters(), lr=0.1).state_dict()
    torch.save(dict(model=original.state_dict(), optimizer=optimizer), folder / 'in-training.pt')
    print(f'timm {timm.__version__}, {type(original).__module__}: {len(original.state_dict())} tensors, ', end='')
    print(f'depth {depth.mean():.2f} with deviation {depth.std():.2f}', flush=True)


def compare(folder: Path) -> float:
    """Return the largest relative difference between ours and what was written."""
    import timm
    from conftest import relative_difference

    from timm_vitres.publishing.conversion import convert

    kept = torch.load(folder / 'kept.pt', weights_only=True)
    worst = 0.0
    for file in ('dpt_hybrid-midas.pt', 'in-training.pt', 'converted'):
        if file == 'converted':
            name, overlay = f'local-dir:{convert(folder / "dpt_hybrid-midas.pt", folder / file)}', {}
        else:
            name = 'vitresnet_base.dpt_hybrid_midas'
            overlay = dict(pretrained_cfg_overlay=dict(file=str(folder / file)))
        model = timm.create_model(name, pretrained=True, **overlay).eval()
        strides = [info['reduction'] for info in model.feature_info]
        with torch.inference_mode():
            levels = [strides.index(4), strides.index(8)]
            own = dict(zip(STAGES, model.forward_intermediates(kept['images'], levels, intermediates_only=True)))
            own = {f'stage {i}': value for i, value in own.items()}
            tokens = model.get_intermediate_layers(kept['images'], BLOCKS, return_prefix_tokens=True)
            own.update({f'block {i}': torch.cat([prefix, x], 1) for i, (x, prefix) in zip(BLOCKS, tokens)})
            own['norm'] = model.forward_features(kept['images'])
        assert model.num_classes == 0 and own.keys() == kept.keys() - {'images'}
        differences = {part: relative_difference(value, kept[part]) for part, value in own.items()}
        equal = [part for part, value in own.items() if torch.equal(value, kept[part])]
        print(f'{file}: ' + ', '.join(f'{part} {difference:.1e}' for part, difference in differences.items()), end='')
        print(f'; equal to the bit: {", ".join(equal) or "none"}', flush=True)
        worst = max(worst, *differences.values())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('original', type=Path, help='a checkout of github:isl-org/MiDaS, or of github:isl-org/DPT')
    parser.add_argument('timm', type=Path, help='a folder that holds the old timm')
    parser.add_argument('--write', type=Path, help=argparse.SUPPRESS)  # the folder, for the process of its own
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.write:
        write(args.write)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(str(part.resolve()) for part in (args.timm, args.original))
        command = [sys.executable, __file__, args.original, args.timm, '--write', folder]
        subprocess.run(command, check=True, env={**os.environ, 'PYTHONPATH': path})
        worst = compare(Path(folder))
    print(f'the largest relative difference: {worst:.1e}')
    if not worst < LIMIT:
        sys.exit(f'expected less than {LIMIT}')


if __name__ == '__main__':
    main()
