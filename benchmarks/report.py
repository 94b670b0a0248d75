"""Write the tables of the README, and of its like in other folders, from the recorded rows; --check only compares.

    python benchmarks/report.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import argparse
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import claim
from rows import newest, read, runs, spread, table

ROOT = Path(__file__).parent.parent


def elpv() -> str:
    """The demo's figures, and those of longer runs on its images."""
    longer = defaultdict(list)
    for row in runs('scratch', 'set', 'model', 'changes', 'epochs', 'seed'):
        if row['set'] == 'elpv_grades':
            row.update(top1=row['test_top1_tta'], balanced=row['test_balanced_tta'])
            longer[f'`{row["model"]}`, {row["epochs"]} epochs', row['changes']].append(row)
    return _cells([('the demo', demos()[0]), *((name, rows) for (name, _), rows in longer.items())])


def elpv_before() -> str:
    """What the demo came to by earlier recipes, the newest first."""
    return _cells([(rows[-1]['date'], rows) for rows in demos()[1:]])


def demos() -> list:
    """The rows of the demo, by recipe, that of today first."""
    groups = defaultdict(list)
    for row in runs('elpv', 'recipe', 'seed'):
        groups[row['recipe']].append(row)
    return list(reversed(groups.values()))


def _cells(found: list) -> str:
    lines = []
    for name, rows in found:
        minutes = statistics.mean(float(row['train_seconds']) for row in rows) / 60
        columns = ('top1', 'balanced', 'recall_functional', 'recall_defective')  # longer runs have no recalls
        figures = [spread([float(row[column]) for row in rows]) if column in rows[0] else '' for column in columns]
        lines.append([name, *figures, f'{minutes:.0f} min'])
    names = ['accuracy (%)', 'balanced accuracy (%)', 'functional found (%)', 'defective found (%)']
    return table(['training', *names, 'took (the demo: 2 cores, others: 1)'], lines)


def neighbours() -> str:
    """What the training cells beside them say of the demo's test cells."""
    lines = [[row['guess'], *(f'{float(row[key]):.1f}' for key in ('top1', 'balanced'))] for row in read('neighbours')]
    return table(['the class of the training cell of the', 'accuracy (%)', 'balanced accuracy (%)'], lines)


def dense() -> str:
    """IoU on held-out images of the size of training and of one that is new, of each decoder and encoder."""
    groups = defaultdict(list)
    for row in runs('dense', 'decoder', 'encoder', 'parameters', 'seed'):
        groups[row['decoder'], row['encoder'], f'{int(row["parameters"]) / 1e6:.0f}M'].append(row)
    sizes = ('same', 'larger')
    rows = [
        [decoder, f'`{encoder}`', size, *(spread([float(row[f'iou_{name}']) for row in found]) for name in sizes)]
        for (decoder, encoder, size), found in groups.items()
    ]
    rows.append(
        ["Otsu's threshold, which does not learn", '', '', *(read('dense')[0][f'otsu_{name}'] for name in sizes)]
    )
    return table(['decoder', 'encoder', 'parameters', 'IoU (%), 96 x 96', 'IoU (%), 128 x 160'], rows)


def nano_search() -> str:
    """Accuracy for training time of the candidates for vitresnet_nano, the best first."""
    accuracies = defaultdict(list)
    for row in runs('nano_search_train', 'candidate', 'seed'):
        accuracies[row['candidate']].append(float(row['val_top1']))
    rows = []
    for row in read('nano_search_time'):
        if row['candidate'] in accuracies:
            values = accuracies[row['candidate']]
            rows.append((-statistics.mean(values), row, values))
    return table(
        ['candidate', 'parameters', 'time of a training step', 'validation top-1 (%)'],
        [
            [f'`{row["candidate"]}`', f'{int(row["params"]) / 1e6:.2f}M', row['step_ratio'], spread(values, 2)]
            for _, row, values in sorted(rows, key=lambda item: item[0])
        ],
    )


def load() -> str:
    """Loading against timm's class: ratios of medians."""
    names = ('create_time_ratio', 'logits_time_ratio', 'create_memory_ratio', 'logits_memory_ratio')
    rows = newest('load', 'model', 'side')
    return table(
        ['model', '', 'time to a model', 'time to first logits', 'extra peak memory, model', '..., first logits'],
        [[f'`{model}`', side, *(row[name] for name in names)] for (model, side), row in rows.items()],
    )


def dual() -> str:
    """The parallel family against the code of its authors: ratios."""
    recorded = newest('dual', 'model', 'side', 'batch')
    rows = []
    for model, side in dict.fromkeys((model, side) for model, side, _ in recorded):
        one, many = recorded[model, side, '1'], recorded[model, side, '16']
        cells = [one['time_ratio'], many['time_ratio'], one['memory_ratio'], many['memory_ratio']]
        rows.append([f'`{model}`', 'as it is' if side == 'ours' else side, *cells])
    return table(['model', '', 'time, batch 1', 'time, batch 16', 'memory, batch 1', 'memory, batch 16'], rows)


def dual_elpv() -> str:
    """One epoch with the losses of two heads."""
    names = {'sum': 'the sum of both heads', 'both': 'both heads, mean of two losses'}
    names.update(resnet="the ResNet's head alone", vit="the ViT's head alone")
    groups = defaultdict(list)
    for row in runs('dual_elpv', 'head_loss', 'seed'):
        groups[row['head_loss']].append(row)
    return table(
        ['loss on', 'balanced accuracy (%)', 'accuracy (%)'],
        [
            [name, *(spread([float(row[column]) for row in groups[loss]]) for column in ('balanced', 'top1'))]
            for loss, name in names.items()
        ],
    )


def timings(on_cpu: bool) -> dict:
    """Return rows of throughput.py inference by device, machine, model, image size, path and batch size."""
    rows = newest('throughput', 'device', 'machine', 'model', 'size', 'path', 'batch')
    return {key: row for key, row in rows.items() if (key[0] == 'cpu') == on_cpu}


def of_one_machine(rows: dict, model: str) -> dict:
    """Return the rows of `timings` of the machine that came to a model last, without the machine in their keys."""
    machine = [key[1] for key in rows if key[2] == model][-1]
    return {(key[0], *key[2:]): row for key, row in rows.items() if key[1] == machine}


def short(machine: str) -> str:
    """Return the name of a machine's processor without what all of them have."""
    return re.sub(r'\(R\)|Processor|, \d+ cores', '', machine).strip()


def published() -> dict:
    """Return rows of the published accuracies by model."""
    return {row['model']: row for row in read('published')}


def fastest(rows: dict, device: str, model: str, batch: str, size: str = '224') -> dict:
    """Return the row of a model's fastest path; int8 is left out: published accuracy is not of it."""
    paths = [row for key, row in rows.items() if key[:3] == (device, model, size) and key[4] == batch]
    return min((row for row in paths if 'int8' not in row['path']), key=lambda row: float(row['ms']))


def at_size(model: str, size: str) -> str:
    """Return a model's name, with the size of its images where it is not the usual one."""
    return f'`{model}`' + (f' at {size} x {size}' if size != '224' else '')


def ratios_to_timm(rows: dict) -> str:
    """Return a table of the hybrids, ours and timm's, each against timm's class in eager mode."""
    timms = {row['reference'] for row in rows.values() if row['model'].startswith('vitresnet')}
    lines = []
    for device, machine, model, size in dict.fromkeys(key[:4] for key in rows):
        if not model.startswith('vitresnet') and model not in timms:
            continue
        for path in dict.fromkeys(key[4] for key in rows if key[:4] == (device, machine, model, size)):
            pair = (rows.get((device, machine, model, size, path, batch)) for batch in ('1', '16'))
            lines.append([at_size(model, size), short(machine), path, *(row['ratio'] if row else '' for row in pair)])
    return table(['model', 'processor', '', 'time, batch 1', 'time, batch 16'], lines)


def throughput() -> str:
    """Inference of the hybrids on CPU against timm's classes: ratios."""
    return ratios_to_timm(timings(on_cpu=True))


def throughput_ours() -> str:
    """Our paths alone, a hybrid on a machine a line: ratios at batch 1 and 16."""
    rows = {key: row for key, row in timings(on_cpu=True).items() if 'vitresnet' in key[2]}
    models = dict.fromkeys(key[1:4] for key in rows)
    # OpenVINO's graph for all sizes serves the third and further ones; benchmarks/README.md has it
    paths = [path for path in dict.fromkeys(key[4] for key in rows) if not path.endswith('all sizes')]

    def cell(machine: str, model: str, size: str, path: str) -> str:
        found = [rows.get(('cpu', machine, model, size, path, batch)) for batch in ('1', '16')]
        return ' / '.join(row['ratio'] for row in found if row)

    return table(
        ['batch 1 / 16', 'processor', *paths],
        [
            [at_size(model, size), short(machine), *(cell(machine, model, size, path) for path in paths)]
            for machine, model, size in models
        ],
    )


def throughput_short() -> str:
    """A hybrid of each family on the machine that measured it last: ratios at batch 1 and 16."""
    paths = ('folded', 'compiled', 'bf16', 'bf16 compiled', 'onnxruntime')
    found, lines = timings(on_cpu=True), []
    for model in ('vitresnet_small', 'vitresnet_base', 'vitresnet_dual_small', 'vitresnet_mix_bot26t'):
        size = '256' if model == 'vitresnet_mix_bot26t' else '224'
        rows = of_one_machine(found, model)
        pairs = [[rows.get(('cpu', model, size, path, batch)) for batch in ('1', '16')] for path in paths]
        machine = short(next(iter(rows.values()))['machine'])
        lines.append([f'`{model}`', machine, *(' / '.join(row['ratio'] for row in pair if row) for pair in pairs)])
    return table(['batch 1 / 16', 'processor', *paths], lines)


def precision() -> str:
    """What a fine-tuned model gets right in every precision."""
    newest_rows = newest('precision', 'model', 'path')
    return table(
        ['model', 'precision', 'top-1 (%)', 'less than fp32', 'the same class (%)'],
        [
            [f'`{row["model"]}`', row['path'], row['top1'], row['drop'], row['same_class']]
            for row in sorted(newest_rows.values(), key=lambda row: row['model'])
        ],
    )


def precision_train() -> str:
    """Top-1 after training in fp32 and in bf16."""
    groups = defaultdict(list)
    for row in newest('precision_train', 'model', 'setting', 'seed', 'device', 'machine', 'epochs').values():
        place = short(row['machine']) if row['device'] == 'cpu' else row['device']
        groups[row['model'], row['epochs'], place, row['setting']].append(float(row['top1']))
    return table(
        ['model', 'epochs', 'on', 'trained in', 'top-1 (%)'],
        [[f'`{key[0]}`', *key[1:], spread(values, 2)] for key, values in groups.items()],
    )


def throughput_cuda() -> str:
    """The same on every CUDA device that was measured."""
    rows = timings(on_cpu=False)
    if not rows:
        return 'Not measured on a CUDA device yet.'
    return '\n\n'.join(
        f'{device}:\n\n' + ratios_to_timm({key: row for key, row in rows.items() if key[0] == device})
        for device in dict.fromkeys(key[0] for key in rows)
    )


def throughput_others() -> str:
    """Accuracy as published, and time on CPU against one hybrid of timm's in eager mode: ratios; the fastest first."""
    rows = {
        key: row
        for key, row in of_one_machine(timings(on_cpu=True), 'resnet50').items()
        if row['size'] == '224' and row['common'] == 'vit_small_r26_s32_224'
    }
    accuracy, lines = published(), []
    for model in dict.fromkeys(key[1] for key in rows):
        source = accuracy.get(model)
        top1 = f'{float(source["top1"]):.1f}' if source else ''
        if source and source['img_size'] != '224':
            top1 += f' (at {source["img_size"]})'
        cells = []
        for batch in ('1', '16'):
            eager = rows.get(('cpu', model, '224', 'eager', batch))
            best = fastest(rows, 'cpu', model, batch) if eager else None
            cells += [eager['common_ratio'], f'{best["common_ratio"]} ({best["path"]})'] if eager else ['', '']
        lines.append([f'`{model}`', top1, *cells])
    return table(
        ['model', 'top-1 (%)', 'eager, batch 1', 'fastest, batch 1', 'eager, batch 16', 'fastest, batch 16'],
        sorted(lines, key=lambda line: float(line[3].split(' ')[0] or 'inf')),
    )


def throughput_train() -> str:
    """Training steps against timm's class with the settings of timm's train.py: ratios."""
    rows = newest('throughput_train', 'device', 'machine', 'model', 'setting', 'compiled', 'batch', 'size')
    return table(
        ['model', 'setting', 'on', 'batch', 'time of a step', 'memory of a step'],
        [
            [
                f'`{row["model"]}`',
                row['setting'] + (', compiled' if row['compiled'] == 'True' else ''),
                short(row['machine']) if row['device'] == 'cpu' else row['device'],
                *(row[column] for column in ('batch', 'ratio', 'memory_ratio')),
            ]
            for row in rows.values()
        ],
    )


def attention() -> str:
    """Training steps on a CPU with attention step by step against torch's fused kernel."""
    rows = newest('attention', 'model', 'img_size', 'precision').values()
    columns = ('img_size', 'tokens', 'batch', 'precision', 'ratio')
    return table(
        ['model', 'image size', 'tokens', 'batch', 'precision', 'time of a step, unfused / fused'],
        [[f'`{row["model"]}`', *(row[column] for column in columns)] for row in rows],
    )


def scale() -> str:
    """What fine-tuning costs with more processes, checkpointing, averaged and sharded weights."""
    rows = newest('scale', 'model', 'variant').values()
    columns = ('images_per_second', 'ratio', 'peak_mib', 'peak_ratio')
    return table(
        ['model', 'variant', 'images a second', 'ratio', 'memory of a process (MiB)', 'ratio'],
        [[f'`{row["model"]}`', row['variant'], *(row[column] for column in columns)] for row in rows],
    )


def distillation() -> str:
    """vitresnet_nano with and without a teacher, which had as many images as its student, or more."""
    groups = defaultdict(list)
    for row in runs('distillation', 'arm', 'train_images', 'teacher_images', 'epochs', 'seed'):
        groups[row['arm'], row['arm'] != 'labels alone' and row['teacher_images']].append(row)
    names = {'teacher': 'a thin ResNet, the teacher', 'labels alone': '`vitresnet_nano`, from the labels alone'}
    names['from logits'] = "`vitresnet_nano`, from labels and the teacher's logits"

    def images(arm: str, of_teacher: str, row: dict) -> str:
        own = f'{int(row["train_images"]):,}'
        return f"{own}; the teacher's {int(of_teacher):,}" if arm == 'from logits' else own

    return table(
        ['model', 'training images', 'validation top-1 (%)', 'test top-1 (%)'],
        [
            [names[arm], images(arm, of_teacher, found[0]), *columns_of(found)]
            for (arm, of_teacher), found in sorted(groups.items(), key=lambda item: list(names).index(item[0][0]))
        ],
    )


def columns_of(found: list) -> list:
    return [spread([float(row[column]) for row in found], 2) for column in ('val_top1', 'test_top1')]


def downstream() -> str:
    """Programs that build on timm, on a model of each family and on timm's nearest classes."""
    rows = newest('downstream', 'program', 'model')
    models = dict.fromkeys(model for _, model in rows)

    def cell(program: str, model: str) -> str:
        row = rows[program, model]
        if row['result'] != 'works':
            return row['first_error']
        told = 'works' + (f' ({row["needs"]})' if row['needs'] else '')
        return told + (f': {row["strides"].replace(" ", ", ")}' if row['strides'] else '')

    return table(
        ['', *(f'`{model}`' for model in models)],
        [
            [f'{program}, {rows[program, next(iter(models))]["size"]}', *(cell(program, model) for model in models)]
            for program in dict.fromkeys(program for program, _ in rows)
        ],
    )


def written(name: str) -> str:
    """Return a table by its name; those about the claim that hybrids are better have a module of their own."""
    return (globals().get(name) or getattr(claim, name))()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    check = parser.parse_args().check
    guides = sorted((ROOT / 'timm_vitres').glob('*/README.md'))
    for path in (ROOT / 'README.md', ROOT / 'benchmarks' / 'README.md', *guides):
        text = path.read_text()
        new = re.sub(
            r'(<!-- table: (\w+) -->\n).*?(<!-- end -->)',
            lambda match: f'{match[1]}{written(match[2])}\n{match[3]}',
            text,
            flags=re.DOTALL,
        )
        if check and new != text:
            sys.exit(f'{path} is not what the rows say: run python benchmarks/report.py')
        path.write_text(new)


if __name__ == '__main__':
    main()
