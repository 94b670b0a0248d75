"""Bad calls as data: flags of the command, and arguments of `timm.create_model`. Bad files are in others.

Every case must end in one sentence that names what was wrong. Which values are legal is told here, by ranges and names;
the flags and fields themselves are asked for, so that a new one is covered, or missed by a test, from its first day.
"""

import argparse
import dataclasses
import inspect
import math
import random
import re
from pathlib import Path
from typing import Any, Callable, Iterator, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from timm_vitres import (
    FinetuneCfg,
    VitResNet,
    VitResNetCfg,
    VitResNetDual,
    VitResNetDualCfg,
    VitResNetMix,
    VitResNetMixCfg,
)
from timm_vitres.cli import create_parser


class Case(NamedTuple):
    """One bad call, made in a folder that holds what `test_bad_input.write_world` wrote."""

    kind: str
    name: str
    call: list[str] | tuple[str, dict[str, Any]]  # a command line, or what timm.create_model is called with
    says: str  # a regular expression for what the sentence must name
    spoil: Callable[[Path], Any] | None = None  # makes files of that folder bad, before the call
    is_said: bool = False  # the call goes well, and a warning names what was left out


# a call of each command that is right: positional arguments, flags
POSITIONAL = {
    'finetune': ['images'],
    'compare': ['images'],
    'recipes': ['lora'],
    'predict': ['picture.png'],
    'explain': ['picture.png'],
    'export': ['local-dir:model'],
    'convert': ['model'],
    'push': ['model', 'me/name'],
    'verify': ['local-dir:model'],
    'run': ['script.py'],
}
MODEL_KWARGS = ['layers=(1,)', 'channels=(128,)', 'depth=1', 'embed_dim=32']
FLAGS = {
    'finetune': [
        *('--model', 'test_vitresnet', '--img-size', '32', '--epochs', '1', '-b', '4', '-j', '0', '--device', 'cpu'),
        *('--output', 'new', '--model-kwargs', *MODEL_KWARGS),
    ],
    'compare': [
        *(
            '--models',
            'test_vitresnet:layers=(1,),channels=(128,),depth=1,embed_dim=32',
            'resnet10t',
            '--output',
            'new',
        ),
        *('--img-size', '32', '--epochs', '1', '-b', '4', '-j', '0', '--device', 'cpu', '--seeds', '0'),
        *('--lrs', '1e-3'),
    ],
    'recipes': [],
    'predict': ['--model', 'local-dir:model'],
    'explain': ['--model', 'local-dir:model', '--output', 'new/explained.png'],
    'export': ['--output', 'new/model.pt', '--format', 'torchscript', '--static'],
    'convert': ['--output', 'new'],
    'push': [],
    'verify': [],
    'run': [],
}

# what a numeric flag takes, as an interval
INTERVALS = {
    'finetune': {
        'val_frac': '(0, 1)',
        'img_size': '[1, 10000]',
        'in_chans': '[1, 1]',  # 1, 3 and 4 are taken
        'drop': '[0, 1)',
        'drop_path': '[0, 1)',
        'mean': '(-inf, inf)',
        'std': '(0, inf)',
        'crop_pct': '(0, 2]',
        'epochs': '[1, inf)',
        'batch_size': '[1, inf)',
        'validation_batch_size': '[1, inf)',
        'lr': '(0, inf)',
        'weight_decay': '[0, inf)',
        'layer_decay': '(0, 1]',
        'clip_grad': '(0, inf)',
        'warmup_epochs': '[0, inf)',
        'warmup_lr': '[0, inf)',
        'min_lr': '[0, 5e-4]',  # the default lr
        'train_num_samples': '[1, inf)',
        'val_num_samples': '[1, inf)',
        'freeze_epochs': '[1, inf)',
        'lora': '[1, 4096]',
        'kd_temperature': '(0, 1000]',
        'distill_loss_weight': '[0, 10000]',
        'task_loss_weight': '[0, 10000]',
        'opt_eps': '(0, 1]',
        'opt_betas': '[0, 1)',
        'momentum': '[0, 1)',
        'lr_base': '(0, inf)',
        'lr_base_size': '[1, inf)',
        'grad_accum_steps': '[1, inf)',
        'decay_epochs': '(0, inf)',
        'decay_milestones': '[1, inf)',
        'decay_rate': '(0, 1]',  # of poly, to 10
        'model_ema_decay': '[0, 1)',
        'bce_target_thresh': '[0, 1)',
        'bce_pos_weight': '(0, 1000000]',
        'color_jitter_prob': '[0, 1]',
        'grayscale_prob': '[0, 1]',
        'gaussian_blur_prob': '[0, 1]',
        'aug_repeats': '[0, 64]',
        'crop_padding': '[0, 16384]',
        'recount': '[1, 64]',
        'cutmix_minmax': '(0, 1)',
        'mixup_prob': '[0, 1]',
        'mixup_switch_prob': '[0, 1]',
        'mixup_off_epoch': '[0, inf)',
        'early_stopping': '[1, inf)',
        'checkpoint_hist': '[0, 1000]',
        'scale': '(0, 1]',
        'ratio': '(0, inf)',
        'hflip': '[0, 1]',
        'vflip': '[0, 1]',
        'color_jitter': '[0, inf)',
        'reprob': '[0, 1]',
        'mixup': '[0, inf)',
        'cutmix': '[0, inf)',
        'smoothing': '[0, 1)',
        'workers': '[0, inf)',
        'seed': '[0, 4294967295]',
    },
    'compare': {'seeds': '[0, 2147483647]', 'lrs': '[1e-6, 1000]', 'minutes': '(1e9, inf)', 'test_frac': '(0, 1)'},
    'predict': {'topk': '[1, inf)', 'batch_size': '[1, 1048576]', 'workers': '[0, 1024]'},
    'explain': {'size': '[1, 10000]'},
    'export': {'num_images': '[1, inf)', 'img_size': '[1, 10000]'},
    'convert': {'img_size': '[1, 10000]'},
}
NUMBERS = ('nan', 'inf', '-1', '0', '1.5', '2', '1e30', str(10**30), 'abc', '')
# what flags of words and paths do not take
NO_FILE = ('nowhere/at/all', '')
NO_MODEL = ('vitresnet_giant', 'test_vitresnet', 'local-dir:nowhere', 'local-dir:notes.txt', 'local-dir:images', '')
NO_DRAWING = ('images', 'notes.txt/below.png', '', 'picture.png')  # the last one is what shall be drawn
NO_FOLDER = ('notes.txt', 'notes.txt/below', 'images', 'images/across', '', '.')
NO_DEVICE = ('cuda:99', 'gpu', 'cpu:x')
NO_KWARGS = ('foo', 'depht=2', 'depth=-1', 'depth=2.5', 'num_heads=5', 'layers=x', 'global_pool=mean', '=1')
WORDS = {
    'finetune': {
        'data_dir': ('nowhere/at/all', 'notes.txt', 'picture.png'),
        'dataset': ('torch/cifar11', 'nope/images', 'torch/', 'cifar10'),
        'model': ('vitresnet_giant', 'test_vitresnet.nope', 'local-dir:nowhere', 'local-dir:images', ''),
        'model_kwargs': (*NO_KWARGS, 'num_classes=7', 'pretrained=True', 'in_chans=0'),
        'interpolation': ('bycubic', 'random'),
        'opt': ('adamz', ''),
        'sched': ('cosin', 'plateau', ''),
        'aa': ('rand-x9', 'foo', 'rand-mx', 'rand-m9-mstd0.5-inc'),
        'output': (*NO_FOLDER, 'images/new', 'model'),
        'config': ('nowhere/at/all', 'images', 'picture.png', 'notes.txt', 'finetune_225', ''),
        'class_map': ('nowhere/at/all', 'images', 'picture.png', 'notes.txt'),
        'input_key': ('image',),  # of a folder
        'target_key': ('label',),
        'pretrained_path': ('nowhere/at/all', 'images', 'picture.png', 'notes.txt'),
        'initial_checkpoint': ('nowhere/at/all', 'images', 'picture.png', 'notes.txt', 'weights.pth'),  # 3 classes
        'torchcompile': ('nonsense',),
        'torchcompile_mode': ('nonsense',),
        'kd_model_name': ('vitresnet_giant', 'test_vitresnet', 'local-dir:nowhere', 'local-dir:model'),
        'opt_kwargs': ('foo', 'foo=1', '=1', 'betas=3', 'lr=x'),
        'resume': ('nowhere', 'picture.png', 'model', 'weights.pth', 'images'),
        'device': NO_DEVICE,
    },
    'compare': {
        'data_dir': ('nowhere/at/all', 'notes.txt', 'picture.png'),
        'models': ('vitresnet_giant', 'resnet18', 'resnet18:', 'resnet18:3', 'local-dir:model', ''),
        'output': (*NO_FOLDER, 'images/new', 'model'),
        'config': ('nowhere/at/all', 'images', 'picture.png', 'notes.txt', 'finetune_225', ''),
    },
    'recipes': {'name': ('nowhere/at/all', 'images', 'lora.yaml', 'LORA', 'finetune_225', 'README', '')},
    'predict': {
        'images': (*NO_FILE, 'notes.txt'),
        'model': NO_MODEL,
        'plot': NO_DRAWING,
        'device': NO_DEVICE,
    },
    'explain': {
        'image': (*NO_FILE, 'images', 'notes.txt'),
        'model': NO_MODEL,
        'target': ('lion', '3', '-1', '', '1.0'),
        'output': NO_DRAWING,
        'device': NO_DEVICE,
    },
    'export': {
        'model': NO_MODEL,
        'output': ('images', 'notes.txt/below.pt', '', 'picture.png', 'model/model.safetensors', 'new/model.pt2'),
        'format': ('onx', 'torchscrpt', 'TorchScript', ''),
        'precision': ('fp23', 'int8', ''),  # a script has no int8
        'images': ('nowhere/at/all', 'notes.txt', 'model'),
    },
    'convert': {
        'source': ('nowhere/at/all', 'images', 'picture.png', 'notes.txt'),
        'output': NO_FOLDER,
        'model': ('vitresnet_giant', 'vitresnet_small', 'resnet18'),
        'label_names': (*NO_FILE, 'images', 'picture.png', 'notes.txt'),
        'model_kwargs': NO_KWARGS,
    },
    'push': {
        'folder': (*NO_FILE, 'images', 'notes.txt'),
        'repo_id': ('me/name/more', 'me/na me', 'me/..', '/', 'me/' + 100 * 'x', ''),
        'revision': ('a branch', '..'),
    },
    'verify': {
        'name': ('nowhere', 'vitresnet_giant', 'local-dir:nowhere', 'images', 'picture.png', ''),
        'repo': ('me/name/more', 'me/na me'),
    },
    'run': {
        'script': (*NO_FILE, 'images', 'images/across', 'nowhere.py', 'script', 'notes.txt/below.py'),
        'module': ('nowhere', 'nowhere.at.all', 'no/where', 'no where', ''),
    },
}
FREE = {
    ('compare', 'data'),
    ('compare', 'test_split'),
    ('finetune', 'data'),
    ('finetune', 'train_split'),
    ('finetune', 'val_split'),
    ('push', 'message'),
}
# what does not go together: command, flags, what the sentence names
TOGETHER = (
    ('finetune', '--img-size 32 32 32', 'img[-_]size'),
    ('finetune', '--mean 0.5 0.5', 'mean'),
    ('finetune', '--std 0.5 0.5', 'std'),
    ('finetune', '--std 0.2 0.2 -1', 'std'),
    ('finetune', '--mean 0.5 0.5 nan', 'mean'),
    ('finetune', '--scale 0.9 0.2', 'scale'),
    ('finetune', '--scale 0.9', 'scale'),
    ('finetune', '--ratio 1.3 0.7', 'ratio'),
    ('finetune', '--mixup 0.2 -b 3', 'batch[-_]size'),
    ('finetune', '--mixup 0.2 --balance-classes', 'balance[-_]classes'),
    ('finetune', '--head-loss both', 'head[-_]loss'),
    ('finetune', '--head-loss vit', 'head[-_]loss'),
    ('finetune', '--pretrained', 'pretrained'),
    ('finetune', '--min-lr 0.1 --lr 0.01', 'min[-_]lr'),
    ('finetune', '--data-dir split --train-split trian', 'train[-_]split|trian'),
    ('finetune', '--data-dir split --val-split vall', 'val[-_]split|vall'),
    ('finetune', '--resume', 'resume'),
    ('finetune', '--model resnet18 --model-kwargs --lora 4', 'lora'),
    ('finetune', '--model resnet18 --model-kwargs --freeze vit', 'freeze'),
    ('finetune', '--freeze vit --freeze-epochs 0', 'freeze[-_]epochs'),
    ('finetune', '--freeze-epochs 1', 'freeze[-_]epochs'),
    ('finetune', '--model resnet18 --model-kwargs --pretrained-path weights.pth', 'pretrained[-_]path'),
    ('finetune', '--model resnet18 --model-kwargs --initial-checkpoint weights.pth', 'initial[-_]checkpoint'),
    ('finetune', '--pretrained-path weights.pth --initial-checkpoint weights.pth', 'initial[-_]checkpoint'),
    ('finetune', '--pretrained --initial-checkpoint weights.pth', 'initial[-_]checkpoint'),
    ('finetune', '--torchcompile inductor --torchcompile-mode nonsense', 'torchcompile'),
    ('finetune', '--kd-model-name local-dir:model --kd-distill-type token', 'kd[-_]distill[-_]type'),
    ('finetune', '--kd-model-name local-dir:model --kd-distill-type features', 'kd[-_]distill[-_]type'),
    ('finetune', '--kd-model-name local-dir:model --head-loss both', 'head[-_]loss'),
    ('finetune', '--kd-temperature 2', 'kd[-_]temperature'),
    ('finetune', '--fsdp', 'fsdp'),
    ('finetune', '--bce-loss --balance-classes', 'balance[-_]classes'),
    ('finetune', '--bce-sum', 'bce[-_]sum'),
    ('finetune', '--lr-base 1e-7', 'min[-_]lr'),
    ('finetune', '--lr-base-scale sqrt', 'lr[-_]base[-_]scale'),
    ('finetune', '--opt-betas 0.9', 'opt[-_]betas'),
    ('finetune', '--opt sgd --opt-betas 0.9 0.99', 'opt[-_]betas'),
    ('finetune', '--opt sgd --opt-eps 1e-6', 'opt[-_]eps'),
    ('finetune', '--cutmix-minmax 0.9 0.1', 'cutmix[-_]minmax'),
    ('finetune', '--cutmix-minmax 0.2 0.5 -b 3', 'batch[-_]size'),
    ('finetune', '--cutmix-minmax 0.2 0.5 --balance-classes', 'balance[-_]classes'),
    ('finetune', '--sched multistep --decay-milestones 3 2', 'decay[-_]milestones'),
    ('finetune', '--train-num-samples 3', 'train[-_]num[-_]samples'),
    ('finetune', '--val-num-samples 3', 'val[-_]num[-_]samples'),
    ('finetune', '--model local-dir:model --output model', 'output'),
    ('finetune', '--nonsense', 'nonsense'),
    ('compare', '--models vit vit', 'models'),
    ('compare', '--models vit resnet18:depth=3', 'models'),
    ('compare', '--models vit local-dir:nowhere', 'models'),
    ('compare', '--seeds 1 2 1', 'seeds'),
    ('compare', '--lrs 1e-3 0.001', 'lrs'),
    ('compare', '--min-lr 0.1', 'min[-_]lr'),
    ('compare', '--minutes 1', 'minutes'),
    ('compare', '--data-dir split --test-split none', 'test[-_]split|none'),
    ('compare', '--opt adamz', 'opt'),
    ('compare', '--device gpu', 'device'),
    ('compare', '--resume', 'resume'),
    ('export', '--format pt2 --output new/model.onnx', 'format|output'),
    ('export', '--img-size 32 32 32', 'img[-_]size'),
    ('export', '--images images notes.txt', r'notes\.txt'),
    ('convert', '--img-size 32 32 32', 'img[-_]size'),
    ('convert', '--model-kwargs num_classes=7', 'num_classes|head'),
    ('predict', '--plot new/../picture.png', 'plot|picture'),
)


def flags(rng: random.Random) -> Iterator[Case]:
    """Every flag of every command with what it does not take."""
    for command, dest, action in actions():
        bad = [*WORDS.get(command, {}).get(dest, ())]
        if action.type in (int, float) and dest in INTERVALS[command]:
            bad += [number for number in NUMBERS if not is_legal(number, action.type, INTERVALS[command][dest])]
        if action.choices:
            wrong = typo(rng.choice([*filter(None, action.choices)]), rng)
            bad += [value for value in (wrong, '') if value not in action.choices]  # '' may stand for none
        for value in dict.fromkeys(bad):
            if action.option_strings:
                values = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
                positional = [] if dest in ('data_dir', 'module') else POSITIONAL[command]
                argv = [*positional, *FLAGS[command], action.option_strings[-1], *values]
            else:
                positional = list(POSITIONAL[command])
                positional[position(command, dest)] = value
                argv = [*positional, *FLAGS[command]]
            yield Case(f'{command}: flags', f'{command}-{dest}-{value[:20]}', [command, *argv], names(dest, value))
    for command, text, says in TOGETHER:
        positional = [] if text.startswith('--data-dir') else POSITIONAL[command]
        argv = [command, *positional, *FLAGS[command], *text.split()]
        yield Case(f'{command}: flags', f'{command}{text.replace(" ", "_")}', argv, says)


def names(dest: str, value: str) -> str:
    """Return a regular expression for what a sentence about a flag must name: the flag, or what it was given."""
    told = [rf'\b{dest.replace("_", "[-_]").removesuffix("s")}s?\b']
    told += ['[Uu]nknown model', 'pretrained', 'architecture'] if dest == 'model' else []
    value = value.removeprefix('local-dir:')
    told += [re.escape(part) for part in (value, Path(value).name, *value.split('=')[:1]) if len(part) > 3]
    return '|'.join(told)


def actions() -> Iterator[tuple[str, str, argparse.Action]]:
    """Return (command, dest, action) of all that a value can be given for; settings of a run are those of finetune."""
    settings = {field.name for field in dataclasses.fields(FinetuneCfg)} - {'data_dir', 'output'}
    groups = create_parser()._subparsers._group_actions  # pyright: ignore[reportOptionalMemberAccess]
    for command, parser in groups[0].choices.items():  # pyright: ignore[reportOptionalMemberAccess]
        for action in parser._actions:
            if action.nargs != 0 and not (command == 'compare' and action.dest in settings):
                yield command, action.dest, action


def position(command: str, dest: str) -> int:
    return [name for other, name, action in actions() if other == command and not action.option_strings].index(dest)


def is_legal(text: str, kind: type, interval: str) -> bool:
    """Return whether a flag of an interval takes a text."""
    try:
        value = kind(text)
    except ValueError:
        return False
    low, high = map(float, interval[1:-1].split(','))
    above = value >= low if interval[0] == '[' else value > low
    return above and (value <= high if interval[-1] == ']' else value < high)


def typo(name: str, rng: random.Random) -> str:
    """Return a name with two letters swapped, one doubled, or one left out."""
    at = rng.randrange(max(len(name) - 1, 1))
    swapped = name[:at] + name[at + 1 : at + 2] + name[at : at + 1] + name[at + 2 :]
    other = rng.choice([swapped, name[: at + 1] + name[at:], name[:at] + name[at + 1 :]])
    return other if other != name else name + name[-1]


SERIAL = dict(layers=(1,), channels=(128,), depth=1, embed_dim=32, num_heads=2, img_size=32, num_classes=3)
RESNET = dict(backbone='resnet18', stage=1, depth=1, embed_dim=32, num_heads=2, img_size=32, num_classes=3)
DUAL = dict(num_classes=3)
BASES = {'test_vitresnet': SERIAL, 'vitresnet': RESNET, 'test_vitresnet_dual': DUAL, 'test_vitresnet_mix': DUAL}
# by type: what no field of it takes
WRONG: dict[type, tuple[Any, ...]] = {
    bool: ('yes', 2, 0.5, [True]),
    int: (-1, 2.5, math.nan, math.inf, 'abc', [3], True),
    float: (math.nan, math.inf, 'abc', [1.0], True),
    str: (3, 1.5, ['x'], b'x'),
    tuple: ('abc', (0, 1), (1.5, 2), [[1]], (), (math.nan,), (True,), {'a': 1}, 2.5),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    'block': ('basic', 'bottleneck'),
    'stem_type': ('deep', 'deep_tiered'),
    'global_pool': ('avg', 'token'),
    'pos_embed_fit': ('resample', 'crop'),
    'norm_layer': ('layernorm', 'rmsnorm'),
    'act_layer': ('gelu', 'relu', 'silu'),
    'backbone_norm_layer': ('batchnorm2d', 'groupnorm'),
    'backbone_act_layer': ('relu', 'silu'),
    'mlp_layer': ('swiglu', 'swiglupacked'),
    'backbone': ('resnet18', 'resnet26d', 'resnetv2'),
}
NUMBERS_OF: dict[str, tuple[Any, ...]] = {
    'num_heads': (0, 5),
    'embed_dim': (0, 37),
    'mlp_ratio': (0, -1.0),
    'stage': (9,),
    'patch_size': (0, (1,), (1, 2, 3)),
    'stem_stride': (3, 8),
    'std_conv_eps': (0, -1e-6, 1.5),
    'pos_embed_fit': ('cropped', 'crops'),
    'output_stride': (0, 2, 64, 12),
    'channels': ((128, 256), (-128,), (100,)),
    'layers': ((1, 1, 1, 1, 1), (0,)),
    'depth': (4,),  # of the parallel family, a multiple of 3
    'strides': ((1, 2, 2, 4), (0, 1, 2, 2)),
    'attn_blocks': ((0, 0, 0, 9), (0, 0, 1), ((0, 0), 0, 0, 0)),
    'group_size': (7,),
    'bottle_ratio': (0, -0.5),
    'stem_width': (0,),
    'stem_chs': (0,),
    'cardinality': (0, 7),
    'base_width': (0,),
    'block_reduce_first': (0,),
    'down_kernel_size': (0,),
    'width_factor': (0,),
    'img_size': (0, -32, (32,), (32, 32, 32), (0, 32), 'abc', math.nan, 32.5, True),
    'in_chans': (0, -1, 2.5, 'abc', math.nan, True),
    'num_classes': (-1, 2.5, 'abc', math.nan, True, [3]),
    'weight_init': ('jaxx', 3),
    'device': ('nowhere', 3.5),
    'dtype': ('float99', 'float32', 3),
}
RATES = (-0.1, 1.0, 1.5, math.nan, 'abc', [0.1])
# fields of one kind of ResNet, given to the other, would be left out silently
OF_RESNET = dict(stem_width=32, replace_stem_pool=True, cardinality=2, base_width=64, block_reduce_first=1)
OF_RESNET.update(down_kernel_size=3, block='basic')
OF_RESNETV2 = dict(stem_chs=32, width_factor=1, bottle_ratio=0.25, preact=True)


def calls(rng: random.Random) -> Iterator[Case]:
    """Arguments of `timm.create_model` that our models do not take."""
    for name, cfg, model in (
        ('test_vitresnet', VitResNetCfg, VitResNet),
        ('vitresnet', VitResNetCfg, VitResNet),
        ('test_vitresnet_dual', VitResNetDualCfg, VitResNetDual),
        ('test_vitresnet_mix', VitResNetMixCfg, VitResNetMix),
    ):
        hints = get_type_hints(cfg)
        for field in dataclasses.fields(cfg):
            bad = [*wrong_values(field.name, hints[field.name], name)]
            # both serial models have the same fields: of each, a half of the values
            yield from (_call(name, field.name, value) for value in _half(bad, name, rng))
        for argument in inspect.signature(model.__init__).parameters:
            bad = [*(RATES if argument.endswith('_rate') else NUMBERS_OF.get(argument, ()))]
            if argument not in hints:
                yield from (_call(name, argument, value) for value in _half(bad, name, rng))
        for field in rng.sample(dataclasses.fields(cfg), 4):
            yield _call(name, typo(field.name, rng), 1)
    yield from (_call('test_vitresnet', field, value) for field, value in OF_RESNET.items())
    yield from (_call('vitresnet', field, value) for field, value in OF_RESNETV2.items())
    yield _call('test_vitresnet', 'img_size', 10**9)
    yield _call('vitresnet', 'backbone', 'vit_base_patch16_224')
    yield _call('vitresnet', 'backbone', 'efficientnet_b0')
    for name in BASES:
        wrong_name = typo(name, rng)
        yield Case('create_model', wrong_name, (wrong_name, {}), wrong_name)
        yield _call(name, 'pretrained', True)
        yield _call(name, 'pretrained_cfg', 'nope')
        for indices in ((99,), (-9,), 'abc', (0.5,), ()):
            yield _call(name, 'out_indices', indices, features_only=True)


def wrong_values(field: str, hint: Any, model: str) -> Iterator[Any]:
    """Return what a field of a config does not take, by its type and by its own range."""
    types = [kind for kind in kinds(hint) if kind in WRONG]
    yield from (value for value in WRONG[types[0]] if not any(_fits(value, kind) for kind in types[1:]))
    if field in CHOICES:
        yield typo(random.Random(field).choice(CHOICES[field]), random.Random(field))
        yield from (['Deep'] if field == 'stem_type' else [])
    if field != 'depth' or model == 'test_vitresnet_dual':
        yield from NUMBERS_OF.get(field, ())


def kinds(hint: Any) -> list[Any]:
    """Return the types that an annotation takes, None left out."""
    if get_origin(hint) is Literal:
        return list(dict.fromkeys(type(value) for value in get_args(hint)))
    if get_origin(hint) is Union:
        return [kind for part in get_args(hint) for kind in kinds(part) if kind is not type(None)]
    return [get_origin(hint) or hint]


def _fits(value: Any, kind: type) -> bool:
    return kind is tuple and isinstance(value, (list, tuple))


def _half(values: list[Any], model: str, rng: random.Random) -> list[Any]:
    if model in ('test_vitresnet_dual', 'test_vitresnet_mix') or len(values) < 4:
        return values
    return values[::2] if model == 'vitresnet' else values[1::2]


def _call(name: str, argument: str, value: Any, **kwargs: Any) -> Case:
    says = rf'\b{argument}\b'
    if argument in ('pretrained', 'pretrained_cfg'):
        says = '[Pp]retrained'
    return Case(
        'create_model', f'{name}-{argument}-{value!r}'[:70], (name, {**BASES[name], **kwargs, argument: value}), says
    )
