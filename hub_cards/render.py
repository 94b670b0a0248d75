"""Render the card of every published weight, and that of the family, from facts.

    python hub_cards/render.py            # writes hub_cards/<arch>.<tag>.md and hub_cards/family.md
    python hub_cards/render.py --check    # only says, by its exit status, whether they are up to date

What a weight *is* (size, classes, normalisation, repository) comes from the package's `default_cfgs`; what was
published about it stands in hub_cards/<arch>.<tag>.json; what the weights of one kind share stands in kinds.json. A
weight that the package ships has figures of our own, from rows (`measured`).
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from measured import measured
from published import beside_parents
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from torch import nn

import timm_vitres  # noqa: F401  (registers the models)
from timm_vitres.models.base import Hybrid
from timm_vitres.weights.shipped import FOLDER as SHIPPED

FOLDER = Path(__file__).parent


def published_weights() -> Iterator[Tuple[str, PretrainedCfg]]:
    """Yield the name.tag and the cfg of every weight that lives somewhere."""
    for architecture in (name for family in Hybrid.families for name in family.variants):
        for name, cfg in get_arch_pretrained_cfgs(architecture).items():
            if cfg.has_weights:
                yield name, cfg


def read(name: str) -> Dict[str, Any]:
    """Return a weight's facts, with those of its kind and of its architecture."""
    path, architecture = FOLDER / f'{name}.json', name.partition('.')[0]
    if not path.is_file():
        sys.exit(f'{name} has weights, but no facts: write hub_cards/{path.name}, as its neighbours are, then render.')
    facts = json.loads(path.read_text(encoding='utf-8'))
    kinds = json.loads((FOLDER / 'kinds.json').read_text(encoding='utf-8'))
    if architecture not in kinds['architectures'] or facts.get('kind') not in kinds['weights']:
        sys.exit(f'{name}: hub_cards/kinds.json lacks its architecture or its kind of weights; describe it there.')
    return {**kinds['architectures'][architecture], **kinds['weights'][facts['kind']], **facts}


@cache
def build(name: str) -> nn.Module:
    """Return a weight's model, without memory for its parameters."""
    return timm.create_model(name, device='meta')


def count_parameters(name: str) -> str:
    """Return '36.4M', or what it is."""
    return f'{sum(parameter.numel() for parameter in build(name).parameters()) / 1e6:.1f}M'


def weights_link(cfg: PretrainedCfg) -> str:
    """Return where a weight lives, as Markdown."""
    if cfg.file:
        return f'part of the package: `timm_vitres/{SHIPPED.name}/{Path(cfg.file).name}`'
    if cfg.hf_hub_id:
        return f'[{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id})'
    return f'[{str(cfg.url).rpartition("/")[2]}]({cfg.url})'


def source_link(facts: Dict[str, Any]) -> str:
    """Return who published a weight's accuracy, as Markdown."""
    return f'[{facts["source_name"]}]({facts["source_url"]})'


def channels(values: Tuple[float, ...]) -> str:
    """Return '0.5', or one number for each channel."""
    return ', '.join(map(str, dict.fromkeys(values)))


def render(name: str, cfg: PretrainedCfg) -> str:
    """Return the card of one weight."""
    facts, architecture = read(name), name.partition('.')[0]
    model = build(name)
    levels = [info['reduction'] for info in model.feature_info[: model.num_pyramid]]
    results = []
    result = 'Not measured, and nothing is published.'
    if facts.get('top1') is not None:
        results.append(
            EvalResult(
                task_type='image-classification',
                dataset_type='imagenet-1k',
                dataset_name='ImageNet-1k',
                dataset_split='validation',
                metric_type='accuracy',
                metric_name='top-1 (%)',
                metric_value=facts['top1'],
                source_name=facts['source_name'],
                source_url=facts['source_url'],
            )
        )
        result = (
            f'Published, not measured by this project: {facts["top1"]:.2f}% top-1 on ImageNet-1k (validation), by '
            f'{source_link(facts)}, for `{facts["their_name"]}`.'
        )
    elif cfg.file:
        found = measured(name, facts)
        results.append(found.evaluation)
        result, facts = found.result, {**facts, 'recipe': found.recipe, 'layout': found.layout}
    elif facts.get('no_result'):
        result = facts['no_result']
    if table := beside_parents(name):
        result += f'\n\n{table}'
    card_data = ModelCardData(
        library_name='timm',
        license=cfg.license,
        pipeline_tag='image-classification' if cfg.num_classes else 'image-feature-extraction',
        tags=['timm', 'timm-vitres', 'image-classification' if cfg.num_classes else 'image-feature-extraction'],
        datasets=facts['datasets'],
        base_model=cfg.hf_hub_id,
        model_name=name,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(FOLDER / 'template.md'),
        name=name,
        architecture=architecture,
        parameters=count_parameters(name),
        weights=weights_link(cfg),
        classes=str(cfg.num_classes) if cfg.num_classes else 'none: features only',
        has_classes=bool(cfg.num_classes),
        size=cfg.input_size[-1],
        colour='grey' if cfg.input_size[0] == 1 else 'RGB',
        other='in_chans=3, img_size=64'
        if cfg.input_size[0] == 1
        else f'in_chans=1, img_size={96 if cfg.input_size[-1] <= 64 else 320}',
        mean=channels(cfg.mean),
        std=channels(cfg.std),
        interpolation=cfg.interpolation,
        crop_pct=cfg.crop_pct,
        license=cfg.license,
        strides=', '.join(map(str, levels)),
        result=result,
        **{key: facts.get(key, '') for key in ('description', 'architecture_line', 'layout', 'trained_on')},
        **{key: facts.get(key, '') for key in ('pyramid_note', 'recipe')},
        citation='\n'.join(facts['citation']),
    )
    return str(card)


def render_family() -> str:
    """Return the card of all of them."""
    rows: List[str] = []
    citations: List[str] = []
    sources: List[str] = []
    for name, cfg in published_weights():
        facts = read(name)
        top1 = f'{facts["top1"]:.2f}' if facts.get('top1') is not None else '-'
        cells = [
            f'`{name}`',
            count_parameters(name),
            cfg.input_size[-1],
            cfg.num_classes or '-',
            top1,
            weights_link(cfg),
        ]
        if facts.get('top1') is not None and source_link(facts) not in sources:
            sources.append(source_link(facts))
        rows.append('| ' + ' | '.join(map(str, cells)) + ' |')
        citation = '\n'.join(facts['citation'])
        if citation not in citations:
            citations.append(citation)
    kinds = json.loads((FOLDER / 'kinds.json').read_text(encoding='utf-8'))
    card_data = ModelCardData(
        library_name='timm',
        license='apache-2.0',
        pipeline_tag='image-classification',
        tags=['timm', 'timm-vitres', 'image-classification'],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(FOLDER / 'family_template.md'),
        description='\n\n'.join(kinds['family']),
        rows='\n'.join(rows),
        source=' and '.join(sources),
        citation='\n'.join(citations),
    )
    return str(card)


def render_all() -> Dict[Path, str]:
    """Return the text of every card, by its file."""
    cards = {FOLDER / f'{name}.md': render(name, cfg) for name, cfg in published_weights()}
    cards[FOLDER / 'family.md'] = render_family()
    return {path: text.rstrip() + '\n' for path, text in cards.items()}


def main() -> int:
    """Write the cards, or compare them."""
    parser = argparse.ArgumentParser(description='Render the model cards.')
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 where a card is out of date')
    args = parser.parse_args()
    status = 0
    for path, text in render_all().items():
        if not path.is_file() or path.read_text(encoding='utf-8') != text:
            status = 1
            print(f'{path.name} {"is out of date" if args.check else "written"}')
            if not args.check:
                path.write_text(text, encoding='utf-8')
    return status if args.check else 0


if __name__ == '__main__':
    sys.exit(main())
