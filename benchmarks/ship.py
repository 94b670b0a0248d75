"""Make a finished run's model a part of the package: `timm.create_model(NAME, pretrained=True)` without a network.

    python benchmarks/ship.py RUN_FOLDER vitresnet_mix_nano.fmnist [--record]

The model must be what its architecture's name builds with no argument but classes, channels and size. Kernels and
matrices are stored as float16, vectors (norms, biases, statistics) as float32, if no fewer test images are then right;
else all of it as float32. --record appends the row that says so to benchmarks/results/shipped.csv. The file and its
checksum go to timm_vitres/shipped/; then `default_cfgs` needs its entry, which is printed, and hub_cards/ its facts.

The test images are those of --split of the run's dataset, or of --dataset and --data-dir, as `timm.data.create_dataset`
names them; a folder of images has the dataset ''.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple

import timm
import torch
from common import write_row
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, split_model_name_tag
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import timm_vitres  # noqa: F401  (registers the models)
from timm_vitres.data import data_config, image_mode, open_image
from timm_vitres.weights import shipped
from timm_vitres.weights.checksums import check, sha256
from timm_vitres.weights.files import write_safetensors
from timm_vitres.writing import replacing

LIMIT = 6_000_000  # bytes of all weights that are shipped
FACTS = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')  # beside the classes


class Comparison(NamedTuple):
    """How two models answer the same images."""

    images: int
    right: int  # of the first model
    right_shipped: int  # of the second
    changed: int  # images whose answers differ


def load_run(folder: Path, name: str) -> nn.Module:
    """Return a run's model.

    Raises:
        ValueError: unless it computes what the architecture computes by its name alone, with the same weights.
    """
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    architecture, found = split_model_name_tag(name)[0], model.pretrained_cfg['architecture']
    if found != architecture:
        raise ValueError(f'{folder}: holds a {found}, expected a {architecture} for {name}.')
    size = model.pretrained_cfg['input_size']
    args = dict(num_classes=model.num_classes, in_chans=size[0], img_size=size[-2:])
    plain = timm.create_model(architecture, **args).eval()
    own, told = dataclasses.asdict(plain.cfg), dataclasses.asdict(model.cfg)
    other = [f'{field}={value!r} for {own[field]!r}' for field, value in told.items() if value != own[field]]
    if other:
        raise ValueError(f'{folder}: its {architecture} has {", ".join(other)}, which {name} would not be built with.')
    shapes = ({key: value.shape for key, value in each.state_dict().items()} for each in (plain, model))
    if next(shapes) != next(shapes):
        raise ValueError(f'{folder}: its tables are not those of the {size[-2]}x{size[-1]} pixels of its data config.')
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if not torch.equal(plain(x), model(x)):
            raise ValueError(f'{folder}: {name} would compute something else with its weights.')
    return model


def facts_of(model: nn.Module) -> Dict[str, Any]:
    """Return what the weight's entry in `default_cfgs` says, in values that JSON holds."""
    config = data_config(model)
    facts = {'num_classes': model.num_classes, **{name: config[name] for name in FACTS}}
    return {**facts, 'label_names': tuple(model.pretrained_cfg.get('label_names') or ())}


def entry(name: str, facts: Mapping[str, Any]) -> str:
    """Return the weight's entry in `default_cfgs`, as Python."""
    fields = ''.join(f'    {field}={value!r},\n' for field, value in facts.items())
    return f"'{name}': _cfg(\n    file=shipped('{name}'),\n{fields}),"


def is_entered(name: str, facts: Mapping[str, Any]) -> bool:
    """Return whether `default_cfgs` has this entry."""
    cfg = get_arch_pretrained_cfgs(split_model_name_tag(name)[0]).get(name)
    return cfg is not None and cfg.file == shipped.shipped(name) and entered_facts(cfg) == _plain(facts)


def entered_facts(cfg: PretrainedCfg) -> Dict[str, Any]:
    """Return what an entry says of a weight, as `shipped_facts` does."""
    return _plain({name: getattr(cfg, name) for name in ('num_classes', *FACTS, 'label_names')})


def _plain(facts: Mapping[str, Any]) -> Dict[str, Any]:
    return json.loads(json.dumps(facts))


def halved(tensors: Mapping[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return kernels and matrices in float16, the rest as it is; so is a tensor of numbers that are too large."""
    result = dict(tensors)
    for key, value in tensors.items():
        half = value.half()
        if value.is_floating_point() and value.ndim > 1 and half.isfinite().all():
            result[key] = half
    return result


def images_of(model: nn.Module, dataset: str, data_dir: str, split: str) -> Dataset:
    """Return the test images, prepared for a model, with their classes."""
    config = data_config(model)
    evaluate, mode = create_transform(**config, is_training=False), image_mode(config['input_size'][0])
    images = create_dataset(dataset, data_dir, split=split)

    def transform(image: Image.Image) -> torch.Tensor:
        return evaluate(open_image(image, mode))

    images.transform = transform
    return images


@torch.inference_mode()
def compare(model: nn.Module, other: nn.Module, images: Dataset) -> Comparison:
    """Return how two models answer the same images."""
    counts = torch.zeros(4, dtype=torch.long)
    for x, target in tqdm(DataLoader(images, batch_size=250), desc='test', leave=False):
        first, second = model(x).argmax(1), other(x).argmax(1)
        counts += torch.stack(
            [torch.tensor(len(x)), (first == target).sum(), (second == target).sum(), (first != second).sum()]
        )
    return Comparison(*counts.tolist())


def choose(model: nn.Module, name: str, images: Dataset, path: Path) -> Dict[str, Any]:
    """Write the weight to a path, as float16 where that loses nothing, and return its row."""
    facts = facts_of(model)
    metadata = {'name': name, 'pretrained_cfg': json.dumps(_plain(facts))}
    tensors = model.state_dict()
    for stored, kept in (('float16', halved(tensors)), ('float32', tensors)):
        digest = write_safetensors(kept, path, metadata)
        cfg = {**facts, 'file': str(path), 'architecture': split_model_name_tag(name)[0]}
        other = timm.create_model(cfg['architecture'], pretrained=True, pretrained_cfg=cfg, mmap=False).eval()
        found = compare(model, other, images)
        print(
            f'{stored}: {found.right_shipped} of {found.images} images are right, {found.right} by the run; '
            f'{found.changed} answers change.'
        )
        if found.right_shipped >= found.right:
            break
    else:
        raise ValueError(f'{name}: the same numbers from a file answer otherwise; this is a bug of the loader.')
    return dict(
        name=name,
        sha256=digest,
        stored=stored,
        bytes=path.stat().st_size,
        params=sum(parameter.numel() for parameter in model.parameters()),
        images=found.images,
        changed=found.changed,
        run_top1=round(100 * found.right / found.images, 2),
        top1=round(100 * found.right_shipped / found.images, 2),
    )


def place(source: Path, name: str) -> Path:
    """Put a written weight into the package, and then its checksum; a kill in between makes loading an error."""
    path = Path(shipped.shipped(name))
    others = sum(file.stat().st_size for file in shipped.FOLDER.glob('*.safetensors') if file != path)
    if others + source.stat().st_size > LIMIT:
        raise ValueError(f'{name}: with its {source.stat().st_size} bytes, all weights have more than {LIMIT}.')
    with replacing(path) as beside:
        beside.write_bytes(source.read_bytes())
    sums = {**shipped.read_sums(), path.name: sha256(source)}
    sums = {file: digest for file, digest in sums.items() if (shipped.FOLDER / file).is_file()}
    with replacing(shipped.FOLDER / shipped.SUMS_NAME) as beside:
        beside.write_text(''.join(f'{digest}  {file}\n' for file, digest in sorted(sums.items())), encoding='utf-8')
    check(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='of a run of timm-vitres finetune that is over')
    parser.add_argument('name', help='arch.tag')
    parser.add_argument('--dataset', help="default: the run's")
    parser.add_argument('--data-dir', help="default: the run's")
    parser.add_argument('--split', default='validation')
    parser.add_argument('--record', action='store_true', help='append the row to benchmarks/results/shipped.csv')
    args = parser.parse_args()
    if not split_model_name_tag(args.name)[1]:
        parser.error(f"name: got {args.name!r}, expected 'arch.tag'.")
    record = args.folder / 'run.json'
    settings = json.loads(record.read_text(encoding='utf-8'))['settings'] if record.is_file() else {}
    dataset = settings.get('dataset') if args.dataset is None else args.dataset
    model = load_run(args.folder, args.name)
    images = images_of(model, dataset or '', args.data_dir or settings.get('data_dir') or '', args.split)
    with tempfile.TemporaryDirectory() as temporary:
        row = choose(model, args.name, images, Path(temporary) / 'weights.safetensors')
        path = place(Path(temporary) / 'weights.safetensors', args.name)
    write_row('shipped', row, args.record)
    print(f'{path}: {row["bytes"]} bytes.')
    if is_entered(args.name, facts_of(model)):
        print('default_cfgs has its entry.')
    else:
        print(f'default_cfgs needs this entry (leave out what the family shares):\n{entry(args.name, facts_of(model))}')


if __name__ == '__main__':
    main()
