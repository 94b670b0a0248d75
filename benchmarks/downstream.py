"""Run programs that take timm models as backbones on a model of each family, and on timm's nearest classes.

python benchmarks/downstream.py [--models ...] [--record]

tests/programs.py has the programs, each with a forward pass and a training step. A program that fails on a model is
tried with what a user would try next: a shallower pyramid, timm's dynamic_img_size, a size of multiples of 32, the
model's own image size. The row says what worked, and how the first trial failed.
"""

import argparse
import sys
import warnings
from pathlib import Path

import timm
import torch
from common import conditions, write_row

sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))
from programs import PROGRAMS

# a model of each family, each with the classes of timm's that are nearest to it
MODELS = ['vitresnet_small', 'vit_small_r26_s32_224', 'vitresnet_base', 'vit_base_r50_s16_224']
MODELS += ['vitresnet_dual_tiny', 'vitresnet_mix_bot26t', 'botnet26t_256']


def trials(program: str, model: str, size: tuple) -> list:
    """Return (what the model needs, size, options of the program) in the order in which a user would try them."""
    found = [('', size, {})]
    shallow = {
        'smp Unet': dict(encoder_depth=4, decoder_channels=(256, 128, 64, 32)),
        'smp FPN': dict(encoder_depth=4, upsampling=2),
        'smp DeepLabV3': dict(encoder_depth=4),
    }
    if program in shallow:
        found.append(('encoder_depth=4', size, shallow[program]))
    dynamic = dict(dynamic_img_size=True)
    multiple = tuple(side // 32 * 32 for side in size)
    found += [('dynamic_img_size', size, dynamic), ('multiples of 32', multiple, {})]
    found += [('dynamic_img_size, multiples of 32', multiple, dynamic)]
    own = timm.get_pretrained_cfg(model).input_size[1:]
    return [*found, (f'{own[0]} x {own[1]}', own, {})]


def run(program: str, model: str) -> dict:
    """Return the row of a program on a model."""
    size, function = PROGRAMS[program]
    first_error = ''
    for needs, tried, options in trials(program, model, size):
        torch.manual_seed(0)
        try:
            strides = function(model, tried, **options)
        except Exception as error:  # whatever a program raises is what its user would see
            lines = str(error).strip().splitlines() or ['']
            first_error = first_error or f'{type(error).__name__}: {lines[0][:160]}'
        else:
            return dict(
                program=program,
                model=model,
                result='works',
                size=f'{tried[0]} x {tried[1]}',
                needs=needs,
                strides=' '.join(map(str, strides)),
                first_error=first_error,
            )
    return dict(program=program, model=model, result='fails', size='', needs='', strides='', first_error=first_error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--programs', nargs='+', default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument('--record', action='store_true', help='append the rows to benchmarks/results/downstream.csv')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    for model in args.models:
        for program in args.programs:
            # with its date: what works again is a row, though it is that of before
            write_row('downstream', {**run(program, model), **conditions()}, args.record)


if __name__ == '__main__':
    main()
