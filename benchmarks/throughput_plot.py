"""Pictures of what throughput.py recorded: accuracy against latency, and cost against image size.

    python benchmarks/throughput_plot.py        # after `inference` and `scaling` were recorded

Latency is measured, at batch 1 and 224 x 224; accuracy is not: it is what timm publishes of the weights
(results/published.csv). Writes results/throughput.png for the CPU and, if there are rows of several models
on a CUDA device, results/throughput_cuda.png for the last one.
"""

from typing import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from report import fastest, of_one_machine, published, timings
from rows import RESULTS, newest

OURS, TIMM = '#c8102e', '#707070'
REACH = 0.32  # smallest distance of two labels, in % of accuracy


def accuracy_panel(axes: Axes, rows: dict, device: str) -> None:
    """Draw published accuracy against measured latency: eager, and a line to the fastest path."""
    points = []
    for model, source in published().items():
        eager = rows.get((device, model, '224', 'eager', '1'))
        if eager:
            best = fastest(rows, device, model, '1')
            label = model + (f' (top-1 at {source["img_size"]})' if source['img_size'] != '224' else '')
            points.append((float(source['top1']), float(eager['ms']), float(best['ms']), best['path'], label))
    points.sort(key=lambda point: (point[0], point[4].startswith('vitresnet')))
    height = 0.0  # of the label before
    for top1, eager, best, path, label in points:
        ours = label.startswith('vitresnet')
        colour = OURS if ours else TIMM
        # timm's class is as accurate as ours: its marks are wider, and below
        axes.plot([best, eager], [top1, top1], color=colour, lw=2 if ours else 3.5, zorder=3 if ours else 2)
        axes.scatter(eager, top1, s=36 if ours else 64, color=colour, zorder=3 if ours else 2)
        axes.scatter(best, top1, s=36 if ours else 64, fc='white', ec=colour, zorder=3 if ours else 2)
        height = max(top1, height + REACH)
        text = f'{label}: {path}' if path != 'eager' else label
        style = dict(color=colour, fontsize=8, fontweight='bold' if ours else 'normal')
        axes.annotate(text, (1.02, height), xycoords=('axes fraction', 'data'), va='center', **style)
        axes.annotate(
            '',
            (eager, top1),
            xytext=(1.015, height),
            textcoords=('axes fraction', 'data'),
            arrowprops=dict(arrowstyle='-', color=colour, lw=0.5, ls=':', shrinkA=0, shrinkB=4),
        )
    logarithmic(axes, 'x')
    axes.set(xlabel='ms per image, batch 1, 224 x 224, measured here (log scale)')
    axes.set(ylabel="ImageNet-1k top-1 (%), as published\n(timm's results-imagenet.csv)")
    axes.set_title('filled: eager; open: fastest of fp32 and bf16 (named)', fontsize=9)


def resolution_panel(axes: Axes, rows: dict) -> None:
    """Draw the cost of an image against its size, relative to 224."""
    names = {'timm': "timm's class, built for each size", 'ours': 'ours, one model', 'folded': 'ours, folded'}
    looks = {'timm': dict(color=TIMM, lw=3.5), 'ours': dict(color=OURS, ls='--'), 'folded': dict(color=OURS)}
    for side, name in names.items():
        line = sorted((int(row['value']), float(row['relative'])) for row in rows.values() if row['side'] == side)
        axes.plot(*zip(*line), marker='o', ms=4, label=name, **looks[side])
    sizes = [size for size, _ in line]
    axes.plot(sizes, [(size / 224) ** 2 for size in sizes], color='black', lw=0.8, ls=':', label='pixels')
    logarithmic(axes, 'x', sizes)
    logarithmic(axes, 'y')
    axes.tick_params(axis='x', labelsize=8)
    axes.set(xlabel='pixels a side (log scale)', ylabel='ms per image, relative to 224 x 224 (log scale)')
    axes.set_title('vitresnet_small, batch 1, measured here', fontsize=9)
    axes.legend(fontsize=8, frameon=False)


def logarithmic(axes: Axes, name: str, ticks: Sequence[float] = ()) -> None:
    """Make the axis 'x' or 'y' logarithmic, with plain numbers at the ticks: 1, 2, 5, 10, ... by default."""
    axes.set(**{f'{name}scale': 'log'})
    axis = axes.xaxis if name == 'x' else axes.yaxis
    axis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_locator(NullLocator())


def draw(rows: dict, device: str, file: str) -> None:
    """Write the picture of a device."""
    columns = ('device', 'model', 'side', 'axis', 'value')
    scaling = newest('throughput_scaling', *columns)
    scaling = {key: row for key, row in scaling.items() if key[:2] == (device, 'vitresnet_small')}
    scaling = {key: row for key, row in scaling.items() if row['axis'] == 'resolution' and row['base'] == '224'}
    figure = Figure(figsize=(13, 4.8) if scaling else (8.5, 4.8), layout='constrained')
    panels = figure.subplots(1, 2 if scaling else 1, squeeze=False)[0]
    accuracy_panel(panels[0], rows, device)
    if scaling:
        resolution_panel(panels[1], scaling)
    figure.suptitle('CPU' if device == 'cpu' else device)
    figure.savefig(RESULTS / file, dpi=110)


def main() -> None:
    """Draw a picture of the CPU and, if there is one, of the CUDA device measured last."""
    draw(of_one_machine(timings(on_cpu=True), 'resnet50'), 'cpu', 'throughput.png')
    cuda = timings(on_cpu=False)
    if len({key[2] for key in cuda}) > 2:  # a pair alone makes no picture
        draw(of_one_machine(cuda, list(cuda)[-1][2]), list(cuda)[-1][0], 'throughput_cuda.png')


if __name__ == '__main__':
    main()
