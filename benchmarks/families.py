"""The README's picture of the three families, drawn from the models themselves: what flows where, at which stride.

python benchmarks/families.py        # writes benchmarks/results/families.png
"""

from pathlib import Path

import timm
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import timm_vitres  # noqa: F401  (registers the models)

RESNET, VIT, PLAIN = '#f4b183', '#9dc3e6', '#e7e6e6'
HEIGHT = 0.62  # of a box; boxes are one unit apart


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 2.4, height: float = HEIGHT) -> None:
    """Draw a box with its centre at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, 'round,pad=0,rounding_size=0.12', fc=colour, ec='#404040'))
    axes.text(x, y, text, ha='center', va='center', fontsize=9)


def arrow(axes: Axes, start: tuple, end: tuple, text: str = '') -> None:
    """Draw an arrow, with a word on it."""
    axes.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', color='#404040', shrinkA=0, shrinkB=0))
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12)
        axes.text(*middle, text, ha='center', va='bottom', fontsize=8, style='italic')


def serial(axes: Axes, name: str) -> None:
    """Image -> ResNet -> tokens -> ViT -> logits, one below the other."""
    model = timm.create_model(name, device='meta')
    levels = model.feature_info[: model.num_pyramid]
    rows = [('image', PLAIN), (f'stem, {levels[0]["num_chs"]} channels', RESNET)]
    stages = [stage['num_chs'] for stage in model.patch_embed.backbone.feature_info[1:]]
    rows += [(f'stage {i + 1}, {width} channels', RESNET) for i, width in enumerate(stages)]
    rows += [(f'tokens of width {model.embed_dim}', VIT), (f'{len(model.blocks)} ViT blocks', VIT)]
    rows += [('class token, head', VIT), ('logits', PLAIN)]
    strides = ['', *(f'stride {2 * 2**i}' for i in range(len(stages) + 1)), f'stride {model.patch_embed.feat_ratio()}']
    for i, (text, colour) in enumerate(rows):
        y = len(rows) - i
        box(axes, 0, y, text, colour)
        if i < len(strides) and strides[i]:
            axes.text(1.35, y, strides[i], va='center', fontsize=8)
        if i:
            arrow(axes, (0, y + 1 - HEIGHT / 2), (0, y + HEIGHT / 2))
    axes.set(xlim=(-1.6, 2.4), ylim=(0.4, len(rows) + 0.6), title=f'serial: {name}')


def parallel(axes: Axes, name: str) -> None:
    """ResNet and ViT side by side, and what goes across in every unit."""
    model = timm.create_model(name, device='meta')
    cfg, third = model.cfg, model.cfg.depth // 3
    left, right, top = -1.9, 1.9, 8
    box(axes, 0, top, 'image', PLAIN)
    box(axes, 0, top - 1, f'stem, {cfg.stem_width} channels', RESNET)
    axes.text(1.35, top - 1, 'stride 4', va='center', fontsize=8)
    arrow(axes, (0, top - HEIGHT / 2), (0, top - 1 + HEIGHT / 2))
    y = top - 2
    box(axes, left, y, f'block, {cfg.channels[0]} channels', RESNET, width=2.8)
    box(axes, right, y, 'patches, class token, block', VIT, width=2.9)
    axes.text(left - 1.6, y, 'unit 1', va='center', ha='right', fontsize=8)
    for x in (left, right):
        arrow(axes, (0, top - 1 - HEIGHT / 2), (x, y + HEIGHT / 2))
    first = 2
    for stage, width in enumerate(cfg.channels):
        last = third * (stage + 1)
        y -= 1.25
        box(axes, left, y, f'two blocks, {width} channels', RESNET, width=2.8, height=0.95)
        box(axes, right, y, 'block', VIT, width=2.9, height=0.95)
        arrow(axes, (left + 1.4, y + 0.22), (right - 1.45, y + 0.22), 'down')
        arrow(axes, (right - 1.45, y - 0.3), (left + 1.4, y - 0.3), 'up')
        strides = f'stride {4 * 2**stage}' + (', at the end 32' if last == cfg.depth else '')
        axes.text(left - 1.6, y, f'units {first} to {last}\n{strides}', va='center', ha='right', fontsize=8)
        for x in (left, right):
            above = y + (1.25 - HEIGHT / 2 if stage == 0 else 1.25 - 0.475)
            arrow(axes, (x, above), (x, y + 0.475))
        first = last + 1
    axes.text(right + 1.6, y + 1.25, f'{cfg.embed_dim} wide,\nstride {cfg.patch_size}', va='center', fontsize=8)
    box(axes, left, y - 1.1, 'average, head', RESNET, width=2.8)
    box(axes, right, y - 1.1, 'class token, head', VIT, width=2.9)
    box(axes, 0, y - 2.1, 'sum: logits', PLAIN)
    for x in (left, right):
        arrow(axes, (x, y - 0.475), (x, y - 1.1 + HEIGHT / 2))
        arrow(axes, (x, y - 1.1 - HEIGHT / 2), (0, y - 2.1 + HEIGHT / 2))
    axes.set(xlim=(-5.6, 4.9), ylim=(y - 2.6, top + 0.6), title=f'parallel: {name}')


def interleaved(axes: Axes, name: str) -> None:
    """Every stage of the ResNet with its blocks, those that convolve and those that attend."""
    model = timm.create_model(name, device='meta')
    cfg = model.cfg
    rows = [('image', PLAIN, ''), (f'stem, {cfg.stem_chs} channels', RESNET, 'stride 2')]
    for stage, width in enumerate(cfg.channels):
        kinds = ['attention' if block in cfg.attending(stage) else 'convolution' for block in range(cfg.layers[stage])]
        for block, kind in enumerate(kinds):
            stride = f'{width} channels,\nstride {4 * 2**stage}' if block == 0 else ''
            rows.append((f'stage {stage + 1}: {kind}', VIT if kind == 'attention' else RESNET, stride))
    rows += [('average, head', RESNET, ''), ('logits', PLAIN, '')]
    for i, (text, colour, note) in enumerate(rows):
        y = len(rows) - i
        box(axes, 0, y, text, colour, width=2.6)
        axes.text(1.45, y, note, va='center', fontsize=8)
        if i:
            arrow(axes, (0, y + 1 - HEIGHT / 2), (0, y + HEIGHT / 2))
    axes.set(xlim=(-1.7, 3.0), ylim=(0.4, len(rows) + 0.6), title=f'interleaved: {name}')


def main() -> None:
    """Draw all three and write the picture."""
    figure = Figure(figsize=(14.5, 6.2), layout='constrained')
    panels = figure.subplots(1, 3, width_ratios=(1, 2, 1.1))
    families = {'vitresnet_small': serial, 'vitresnet_dual_small': parallel, 'vitresnet_mix_bot26t': interleaved}
    for axes, (name, draw) in zip(panels, families.items()):
        axes.set_axis_off()
        draw(axes, name)
    figure.savefig(Path(__file__).parent / 'results' / 'families.png', dpi=110)


if __name__ == '__main__':
    main()
