"""What the code of Conformer's authors computes: compared with ours, and kept as golden figures for the tests.

    git clone https://github.com/pengzhiliang/Conformer
    python tests/conformer_reference.py Conformer            # compare
    python tests/conformer_reference.py Conformer --write    # and write tests/conformer_golden.json

Weights are `fill_`ed from a seed, BatchNorm statistics too, so that nothing but the seed and the figures is kept.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import timm
import torch
from conftest import relative_difference
from layouts import conformer_layout, mmpretrain_layout

GOLDEN = Path(__file__).with_name('conformer_golden.json')
VARIANTS = {
    'vitresnet_dual_tiny': dict(patch_size=16, channel_ratio=1, embed_dim=384, num_heads=6),
    'vitresnet_dual_small': dict(patch_size=16, channel_ratio=4, embed_dim=384, num_heads=6),
    'vitresnet_dual_small_p32': dict(patch_size=32, channel_ratio=4, embed_dim=384, num_heads=6),
    'vitresnet_dual_base': dict(patch_size=16, channel_ratio=6, embed_dim=576, num_heads=9),
}
SIZES = {16: ((224, 224), (208, 208), (240, 320), (96, 64)), 32: ((224, 224), (256, 256), (160, 320), (96, 64))}


def fill_(model: torch.nn.Module) -> torch.nn.Module:
    """Give every tensor values of a seed, of a size that lets both heads count."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator)
        if key.endswith('running_var'):
            values = values.square() + 0.5
        elif tensor.ndim > 1:
            values = values / math.sqrt(tensor[0].numel())
        elif key.endswith('weight'):
            values = (1 + 0.2 * values) * (0.3 if '.bn3.' in key else 1.0)
        else:
            values = 0.2 * values
        tensor.copy_(values)
    return model.eval()


def images(size, batch=2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


def heads(model, x):
    """Return the logits of the ResNet's head and of the ViT's."""
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    resnet, vit = features.split([model.head_resnet.in_features, model.head_vit.in_features], dim=1)
    return model.head_resnet(resnet), model.head_vit(vit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('original', type=Path, help='a checkout of github:pengzhiliang/Conformer')
    parser.add_argument('--write', action='store_true')
    args = parser.parse_args()
    sys.path.insert(0, str(args.original))
    from conformer import Conformer

    import timm_vitres  # noqa: F401

    golden, worst = {}, 0.0
    for name, measures in VARIANTS.items():
        ours = fill_(timm.create_model(name))
        original = Conformer(depth=12, mlp_ratio=4, qkv_bias=True, **measures).eval()
        original.load_state_dict(conformer_layout(ours.state_dict()))
        parameters = sum(parameter.numel() for parameter in original.parameters())
        assert parameters == sum(parameter.numel() for parameter in ours.parameters())
        golden[name] = dict(parameters=parameters, entries=len(original.state_dict()), logits={})
        layouts = dict(
            flat=original.state_dict(),
            nested=dict(model=original.state_dict(), epoch=300),
            mmpretrain=dict(state_dict=mmpretrain_layout(ours.state_dict()), meta=dict(CLASSES=('tench',))),
        )
        del ours
        for layout, checkpoint in layouts.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / 'checkpoint.pth'
                torch.save(checkpoint, path)
                loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
            for size in SIZES[measures['patch_size']]:
                with torch.inference_mode():
                    x = images(size)
                    resnet, vit = original(x)
                    differences = [relative_difference(loaded(x), resnet + vit)]
                    differences += [relative_difference(*pair) for pair in zip(heads(loaded, x), (resnet, vit))]
                worst = max(worst, *differences)
                print(f'{name}, {layout}, {size}: sum {differences[0]:.1e}, ResNet {differences[1]:.1e}, ', end='')
                print(f'ViT {differences[2]:.1e} (norms {resnet.norm():.1f}, {vit.norm():.1f})', flush=True)
                logits = dict(resnet=resnet[:, :8].tolist(), vit=vit[:, :8].tolist())
                golden[name]['logits']['x'.join(map(str, size))] = logits
    print(f'the largest relative difference: {worst:.1e}')
    if args.write:
        GOLDEN.write_text(json.dumps(golden, indent=1) + '\n')


if __name__ == '__main__':
    main()
