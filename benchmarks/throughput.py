"""Speed of the models: inference and training steps against timm's classes, and cost against image size.

    python benchmarks/throughput.py inference --record
    python benchmarks/throughput.py inference --record --models vitresnet_nano --sizes 32
    python benchmarks/throughput.py inference --record --models vitresnet_mix_bot26t --sizes 256
    python benchmarks/throughput.py train --record
    python benchmarks/throughput.py scaling --record

A hybrid and timm's class of the same architecture have the same random weights, and their logits agree before anything
is timed. What is compared is measured in one process, in interleaved rounds whose order rotates; ratios are medians
over the rounds of the ratio within a round. `inference` goes from model (or pair) to model, since all of them do not
fit in memory at once, and the rounds of each have the common reference, vit_small_r26_s32_224 in eager mode, in them.
CUDA is timed by events. Memory is the peak that torch's allocator holds during a call, without weights, images and
optimizer state (on CPU: torch.profiler).
"""

import argparse
import copy
import gc
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import timm
import torch
from common import peak_bytes, seconds, write_row
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import timm_vitres
from timm_vitres.inference.lowering import difference
from timm_vitres.models.base import Hybrid

# ours: timm's class, and what makes the generic model the same architecture
PAIRS = {
    'vitresnet_small': ('vit_small_r26_s32_224', {}),
    'vitresnet_base': ('vit_base_r50_s16_224', {}),
    'vitresnet (resnet26d)': (
        'vit_small_resnet26d_224',
        dict(backbone='resnet26d', embed_dim=768, depth=8, num_heads=8, mlp_ratio=3.0),
    ),
}
MIXED = {  # the interleaved family, at 256 x 256
    'vitresnet_mix_bot26t': ('botnet26t_256', {}),
    'vitresnet_mix_eca_bot26ts': ('eca_botnext26ts_256', {}),
    'vitresnet_mix_se_bot33ts': ('sebotnet33ts_256', {}),
    'vitresnet_mix_bot50ts': ('botnet50ts_256', {}),
}
DEFAULTS = list(PAIRS)  # at 224 x 224
PAIRS.update(MIXED)
OTHERS = ['resnet50', 'vit_small_patch16_224', 'coatnet_0_rw_224', 'maxvit_tiny_rw_224', 'fastvit_sa12']
OTHERS += ['convnext_tiny', 'levit_256']
REFERENCE = 'vitresnet_small'  # whose counterpart is the common reference
SETTINGS = {'timm': (False, False), 'channels-last': (True, False), 'bf16': (False, True)}  # channels-last, autocast
SETTINGS['bf16 channels-last'] = (True, True)

Sides = Dict[Any, Tuple[Callable[[torch.Tensor], Any], torch.Tensor]]  # by key: a function and its argument


def prepared(model: nn.Module, x: torch.Tensor, **kwargs) -> nn.Module:
    return timm_vitres.prepare(model, example=x, **kwargs)


def onnxruntime(model: nn.Module, x: torch.Tensor, precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a model as a session of onnxruntime, for the shape of x."""
    from timm_vitres.inference.exports import export, load

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        export(model, path, format='onnx', precision=precision, dynamic=False, example=x)
        return load(path, 'onnx')


def openvino_for_all_sizes(model: nn.Module, x: torch.Tensor, precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a model as OpenVINO runs it when other sizes than that of x came first, which have graphs of their own."""
    if not isinstance(model, Hybrid):
        raise ValueError('it takes one size')
    fast = timm_vitres.prepare(model, precision, engine='openvino', example=torch.randn(len(x), 3, 64, 64))
    fast(torch.randn(1, 3, 96, 96))
    return fast


PATHS = {
    'eager': lambda model, x: model,
    'folded': lambda model, x: timm_vitres.fold(model),  # of timm's models it is timm's reparameterize_model
    'compiled': partial(prepared, precision='fp32', compile=True),
    'bf16': partial(prepared, precision='bf16'),
    'bf16 compiled': partial(prepared, precision='bf16', compile=True),
    'int8 compiled': partial(prepared, precision='int8', compile=True),
    'onnxruntime': partial(onnxruntime, precision='fp32'),
    'onnxruntime int8': partial(onnxruntime, precision='int8'),
    'openvino': partial(prepared, precision='fp32', engine='openvino'),
    'openvino bf16': partial(prepared, precision='bf16', engine='openvino'),
    'openvino int8': partial(prepared, precision='int8', engine='openvino'),
    'openvino, all sizes': partial(openvino_for_all_sizes, precision='fp32'),
    'openvino bf16, all sizes': partial(openvino_for_all_sizes, precision='bf16'),
    'openvino int8, all sizes': partial(openvino_for_all_sizes, precision='int8'),
}
ON_CPU = [path for path in PATHS if path.startswith(('onnxruntime', 'openvino'))]


def is_ours(name: str) -> bool:
    return 'vitresnet' in name


def create(name: str, size: int) -> nn.Module:
    """Build a model for images of a size, with random weights of which every one counts."""
    torch.manual_seed(0)
    kwargs = dict(PAIRS[name][1] if name in PAIRS else {}, num_classes=1000)
    name = name.split()[0]
    if is_ours(name) or timm.get_pretrained_cfg(name).fixed_input_size:
        kwargs['img_size'] = size
    model = timm.create_model(name, **kwargs).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith('running_mean'):
            tensor.normal_(0, 0.2)
        elif key.endswith('running_var') or (key.endswith('weight') and tensor.ndim == 1):
            tensor.uniform_(0.5, 1.5)  # ResNets start with zeros in the last norm of a block
    return model


def counterpart(name: str, ours: nn.Module, size: int) -> nn.Module:
    """Build timm's class with our weights (the position table resampled), for images of a size; check the logits."""
    theirs = create(PAIRS[name][0], size)
    weights = ours.state_dict()
    theirs.load_state_dict(weights if name in MIXED else checkpoint_filter_fn(weights, theirs))
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        differs = difference(ours(x), theirs(x))
    if not differs <= 1e-5:
        sys.exit(f"{name}: its logits differ from those of timm's class by {differs:.1e} at {size} x {size}.")
    return theirs


def group(name: str, size: int, device: str) -> Dict[str, nn.Module]:
    """Return a model and, if it has one, timm's class with the same weights, by name."""
    models = {name: create(name, size)}
    models[name](torch.randn(1, 3, size, size))  # or it says that it does not take the size
    if name in PAIRS:
        models[PAIRS[name][0]] = counterpart(name, models[name], size)
    return {label: model.to(device) for label, model in models.items()}


def interleave(sides: Sides, rounds: int, slice_s: float, title: str) -> Dict[Any, List[float]]:
    """Time every side once a round, each as often as fills `slice_s` seconds; the sides take turns at being first."""
    repeats = {key: max(1, round(slice_s / seconds(*side, 1))) for key, side in sides.items()}
    times = {key: [] for key in sides}
    keys = list(sides)
    with tqdm(total=rounds * len(keys), desc=title, leave=False, disable=None) as bar:
        for i in range(rounds):
            start = i % len(keys)
            for key in keys[start:] + keys[:start]:
                times[key].append(seconds(*sides[key], repeats[key]))
                bar.update()
    return times


def spread(values: List[float], digits: int = 3) -> Tuple[float, str]:
    """Return median and quartiles."""
    first, median, third = statistics.quantiles(values, n=4, method='inclusive')
    return round(median, digits), f'{first:.{digits}f}-{third:.{digits}f}'


def compared(name: str, own: List[float], theirs: List[float]) -> dict:
    """Return the columns of a ratio."""
    ratio, quartiles = spread([one / other for one, other in zip(own, theirs)])
    return {name: ratio, f'{name}_quartiles': quartiles}


def milliseconds(times: List[float], images: int = 1) -> dict:
    """Return the columns of a time, per image or per step."""
    median, quartiles = spread([1000 * value / images for value in times], 2)
    return dict(ms=median, ms_quartiles=quartiles)


def megabytes(size: int) -> float:
    return round(size / 2**20, 2)


def gmacs(model: nn.Module, x: torch.Tensor) -> float:
    """Return the multiplications of a forward pass per image, in 10^9."""
    # the fused attention of CPUs is unknown to torch's counter, its parts are not
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2e9 / len(x)


def machine_peaks(device: str) -> Dict[str, float]:
    """Return the GFLOP/s that the machine reaches in its best of several square matrix products, by precision."""
    width = 2048 if device == 'cpu' else 8192
    peaks = {}
    for precision, dtype in dict(fp32=torch.float32, bf16=torch.bfloat16, int8=torch.int8).items():
        product = torch._int_mm if precision == 'int8' else torch.mm
        x = torch.ones(width, width, device=device).to(dtype)
        try:
            best = min(seconds(partial(product, x), x, 1) for _ in range(12))
        except RuntimeError as error:
            complain(f'no {precision} matrix product', error)
            continue
        peaks[precision] = 2 * width**3 / best / 1e9
    return peaks


def complain(what: str, error: Exception) -> None:
    tqdm.write(f'{what}: {type(error).__name__}: {(str(error).strip() or "-").splitlines()[0][:200]}', file=sys.stderr)


def free() -> None:
    gc.collect()
    torch.compiler.reset()  # also so that no model is compiled with the shapes of those before as a hint
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write(name: str, row: dict, args: argparse.Namespace) -> None:
    """Append a row to benchmarks/results/NAME.csv with --record, else print it."""
    device = torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu'
    row.update(rounds=args.rounds, device=device, threads=row.get('threads', torch.get_num_threads()))
    write_row(name, row, args.record)


@torch.inference_mode()
def inference(args: argparse.Namespace) -> bool:
    """Measure every path of every model; return whether all of ours worked."""
    peaks = machine_peaks(args.device)
    worked = True
    for size in args.sizes:
        first = REFERENCE if REFERENCE in args.models else args.models[0]
        common, common_model = list(group(first, size, args.device).items())[-1]
        for name in args.models:
            try:
                models = group(name, size, args.device)
            except Exception as error:  # some of timm's take few sizes
                complain(f'{name}, {size}', error)
                worked = worked and not is_ours(name)
                continue
            for batch in args.batches:
                x = torch.randn(batch, 3, size, size, device=args.device)
                worked = measure_paths(name, models, (common, common_model), x, peaks, args) and worked
                free()
    return worked


def measure_paths(
    name: str,
    models: Dict[str, nn.Module],
    common: Tuple[str, nn.Module],
    x: torch.Tensor,
    peaks: Dict[str, float],
    args: argparse.Namespace,
) -> bool:
    """Measure every path of a model, and of timm's class, on images x (B, 3, S, S); return whether ours worked."""
    batch, size = len(x), x.shape[-1]
    title = f'{name}, {batch} x {size}'
    sides = {(common[0], 'eager'): (common[1], x)}
    logits, worked = {}, True
    labels = [label for label in models if is_ours(label) or not (args.ours and is_ours(name))]
    todo = [(path, label) for path in args.paths for label in models if label in labels or path == 'eager']
    for path, label in tqdm(todo, desc=f'{title}: preparing', leave=False, disable=None):
        try:
            function = PATHS[path](models[label], x)
            logits[label, path] = function(x).float()
            sides[label, path] = (function, x)
        except Exception as error:  # of any exporter or compiler; the others go on
            complain(f'{label}, {path}, {batch} x {size}', error)
            worked = worked and not is_ours(label)

    memory = {key: peak_bytes(*side) for key, side in sides.items()}
    macs = {label: gmacs(model, x[:1]) for label, model in models.items()}
    times = interleave(sides, args.rounds, args.slice, title)
    # a hybrid without a class of timm's is compared with itself, what is no hybrid with the common reference
    reference = (list(models)[-1] if is_ours(name) else common[0], 'eager')
    for key in logits:
        label, path = key
        row = dict(model=label, path=path, batch=batch, size=size, **milliseconds(times[key], batch))
        row.update(reference=reference[0], **compared('ratio', times[key], times[reference]))
        row.update(common=common[0], **compared('common_ratio', times[key], times[common[0], 'eager']))
        row.update(memory_mb='', memory_ratio='')
        graphs = args.device == 'cuda' and 'compiled' in path  # these keep their memory from call to call
        if path not in ON_CPU and not graphs:  # torch does not see the memory of other engines
            row.update(memory_mb=megabytes(memory[key]), memory_ratio=round(memory[key] / memory[reference], 3))
        row.update(
            difference=f'{difference(logits[key], logits[label, "eager"]):.1e}',
            params=sum(parameter.numel() for parameter in models[label].parameters()),
            gmacs=round(macs[label], 4),
            peak_gflops='',
            floor_fraction='',
        )
        precision = next((one for one in ('bf16', 'int8') if one in path), 'fp32')
        if precision in peaks:
            floor_ms = 2000 * macs[label] / peaks[precision]
            row.update(peak_gflops=round(peaks[precision]), floor_fraction=round(floor_ms / row['ms'], 4))
        write('throughput', row, args)
    return worked


def training_step(model: nn.Module, optimizer, target: torch.Tensor, channels_last: bool, bf16: bool) -> Callable:
    """Return a step as timm's train.py makes it, a function of the images."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def step(x: torch.Tensor) -> None:
        x = x.contiguous(memory_format=memory_format)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def train(args: argparse.Namespace) -> bool:
    """Measure training steps of ours and of timm's class, in the settings of timm's train.py."""
    for size in args.sizes:
        for name in args.models:
            models = group(name, size, args.device)
            reference = (list(models)[-1], 'timm')
            for batch in args.batches:
                x = torch.randn(batch, 3, size, size, device=args.device)
                target = torch.randint(1000, (batch,), device=args.device)
                sides = {}
                for label, model in models.items():
                    for channels_last in (False, True):  # a model and its optimizer state serve fp32 and bf16
                        memory_format = torch.channels_last if channels_last else torch.contiguous_format
                        copied = copy.deepcopy(model).train().to(memory_format=memory_format)
                        optimizer = torch.optim.AdamW(copied.parameters(), lr=1e-6, fused=True)
                        run = torch.compile(copied) if args.compile else copied
                        for setting, (wanted, bf16) in SETTINGS.items():
                            if wanted == channels_last:
                                step = training_step(run, optimizer, target, channels_last, bf16)
                                step(x)  # and make the optimizer's state
                                sides[label, setting] = (step, x)
                memory = {key: peak_bytes(*side) for key, side in sides.items()}
                times = interleave(sides, args.rounds, args.slice, f'{name}, {batch} x {size}')
                for label, setting in sides:
                    key = (label, setting)
                    row = dict(model=label, setting=setting, compiled=args.compile, batch=batch, size=size)
                    row.update(milliseconds(times[key]), reference=reference[0])
                    row.update(compared('ratio', times[key], times[reference]))
                    row.update(memory_mb=megabytes(memory[key]))
                    row.update(memory_ratio=round(memory[key] / memory[reference], 3))
                    write('throughput_train', row, args)
                del sides, copied, optimizer, run, step
                free()
    return True


def on_threads(threads: int, model: nn.Module, x: torch.Tensor) -> None:
    torch.set_num_threads(threads)
    model(x)


@torch.inference_mode()
def scaling(args: argparse.Namespace) -> bool:
    """Measure the time of an image against size, batch and threads; ours is one model, timm's one for each size."""
    default = torch.get_num_threads()
    axes = {
        'resolution': [(size, 1, size, default) for size in args.sizes],
        'batch': [(batch, batch, 224, default) for batch in args.batches],
        'threads': [(threads, 1, 224, threads) for threads in args.threads],
    }
    for name in args.models:
        ours = create(name, 224)
        folded = timm_vitres.fold(ours).to(args.device)
        for axis in args.axes:
            sides, theirs = {}, {}
            for value, batch, size, threads in axes[axis]:
                x = torch.randn(batch, 3, size, size, device=args.device)
                models = dict(ours=ours.to(args.device), folded=folded)
                if name in PAIRS:
                    if size not in theirs:
                        theirs[size] = counterpart(name, copy.deepcopy(ours).cpu(), size).to(args.device)
                    models['timm'] = theirs[size]
                for side, model in models.items():
                    sides[side, value] = (partial(on_threads, threads, model) if axis == 'threads' else model, x)
            for function, x in sides.values():
                function(x)  # warm
            times = interleave(sides, args.rounds, args.slice, f'{name}, {axis}')
            torch.set_num_threads(default)
            values = [value for value, *_ in axes[axis]]
            base = 224 if axis == 'resolution' and 224 in values else values[0]
            images = {value: batch for value, batch, *_ in axes[axis]}
            each = {key: [one / images[key[1]] for one in some] for key, some in times.items()}
            for value, batch, size, threads in axes[axis]:
                for side in models:
                    own = each[side, value]
                    row = dict(model=name, side=side, axis=axis, value=value, batch=batch, size=size, threads=threads)
                    row.update(milliseconds(own))
                    row.update(compared('ratio', own, each['timm' if name in PAIRS else 'ours', value]))
                    row.update(base=base, **compared('relative', own, each[side, base]))
                    write('throughput_scaling', row, args)
            del sides, models, theirs
            free()
    return True


def main() -> None:
    """Measure, print, and record with --record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for command in (inference, train, scaling):
        sub = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        sub.set_defaults(function=command)
        models = dict(inference=[*DEFAULTS, *OTHERS], train=DEFAULTS, scaling=['vitresnet_small'])[command.__name__]
        batches = dict(inference=[1, 16], train=[16], scaling=[1, 2, 4, 8, 16])[command.__name__]
        sizes = [128, 160, 192, 224, 256, 320, 384, 448, 512] if command is scaling else [224]
        sub.add_argument('--models', nargs='+', default=models, help=f'timm names; by default: {", ".join(models)}')
        sub.add_argument('--batches', type=int, nargs='+', default=batches)
        sub.add_argument('--sizes', type=int, nargs='+', default=sizes)
        sub.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
        sub.add_argument('--rounds', type=int, default=15, help='2 or more')
        sub.add_argument('--slice', type=float, default=0.3, help='seconds of a measurement in a round, at least')
        sub.add_argument('--record', action='store_true', help='append the rows to benchmarks/results/')
        if command is scaling:
            sub.add_argument('--threads', type=int, nargs='+', default=[1, 2])
            sub.add_argument('--axes', nargs='+', choices=['resolution', 'batch', 'threads'], help='threads: on CPU')
        else:
            sub.add_argument('--threads', type=int)
    commands.choices['inference'].add_argument('--ours', action='store_true', help="timm's class in eager mode alone")
    commands.choices['inference'].add_argument('--paths', nargs='+', choices=list(PATHS), help='eager is always there')
    commands.choices['train'].add_argument('--compile', action='store_true', help='torch.compile the models')
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error('--rounds: two at least.')
    for name in args.models:
        if name not in PAIRS and not timm.is_model(name):
            parser.error(f'--models: {name!r} is none of {", ".join(PAIRS)}, and no model of timm.')
    if args.command == 'inference':
        asked = args.paths or [path for path in PATHS if args.device == 'cpu' or path not in ON_CPU]
        if args.device == 'cuda' and set(asked) & set(ON_CPU):
            parser.error(f'--paths: {", ".join(ON_CPU)} run on CPU only.')
        args.paths = [path for path in PATHS if path in ('eager', *asked)]
    if args.command == 'scaling':
        args.axes = args.axes or ['resolution', 'batch', *(['threads'] if args.device == 'cpu' else [])]
    if isinstance(args.threads, int):
        torch.set_num_threads(args.threads)
    # else a model that is compiled too often would go on in eager mode, and nobody would know
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    sys.exit(0 if args.function(args) else 1)


if __name__ == '__main__':
    main()
