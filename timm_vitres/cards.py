"""Model cards: facts -> `render_card` -> README.md; an older card and a new one -> `merge_cards`.

The head of a card is YAML that the Hub reads (task, licence, results); its text keeps to what was measured.
"""

import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .data import data_config as model_data_config
from .files import CARD_NAME

TEMPLATE = Path(__file__).with_name('card.md')
# what this package writes into a card, and replaces when it writes again
_OURS = re.compile(r'<!-- timm-vitres:.*?<!-- end of timm-vitres -->', re.DOTALL)


def render_card(
    model: nn.Module,
    model_name: str,
    description: str,
    recipe: str,
    source: str,
    label_names: Sequence[str] = (),
    data_config: Optional[Dict[str, Any]] = None,
    results: Sequence[EvalResult] = (),
    result_note: str = '',
    license: Optional[str] = None,
    picture: Optional[str] = None,
) -> str:
    """Return a model card from facts.

    Args:
        model_name: The card's title.
        source: Name that `timm.create_model` takes ('local-dir:...' or 'hf-hub:...').
        results: What was measured; without any the card says that nothing was.
        result_note: On what, and how, it was measured.
        picture: File beside the card that shows the training.
    """
    config = data_config or model_data_config(model)
    card_data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'timm-vitres', 'image-classification'],
        license=license,
        model_name=model_name,
        eval_results=list(results) or None,
    )
    lines: List[str] = [f'- {result.metric_name or result.metric_type}: {result.metric_value}' for result in results]
    shown = [str(name) for name in label_names[:20]]
    card = ModelCard.from_template(
        card_data,
        template_str=TEMPLATE.read_text(encoding='utf-8'),
        model_name=model_name,
        description=description,
        architecture=model.pretrained_cfg['architecture'],
        parameters=f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}M',
        input_size=tuple(config['input_size']),
        mean=tuple(config['mean']),
        std=tuple(config['std']),
        num_classes=model.num_classes,
        classes=(', '.join(shown) + (', ...' if len(label_names) > len(shown) else '')) or 'not named',
        result='\n'.join([*lines, '', result_note]) if lines else 'Not measured.',
        recipe=recipe + (f'\n\n![Loss and accuracy by epoch]({picture})' if picture else ''),
        source=source,
    )
    return str(card)


def merge_cards(old: str, new: str) -> str:
    """Return an older card, brought up to date by a new one.

    The old head's own fields, its licence, tags, and its results on other data or metrics stay; so does its text,
    but for what this package wrote into it.

    Raises:
        ValueError: where the old card's head is not valid YAML.
    """
    if not old.startswith('---'):
        old = f'---\nlibrary_name: timm\n---\n{old}'
    try:
        theirs = ModelCard(old)
    except yaml.YAMLError as error:
        raise ValueError(
            f'{CARD_NAME}: the head of the card that is there is no valid YAML; mend it ({error}).'
        ) from error
    ours = ModelCard(new)
    data = ours.data
    for key, value in theirs.data.to_dict().items():
        if key in ('license', 'license_name', 'license_link') or (data.get(key) is None and key != 'model-index'):
            data[key] = value
    data.tags = list(dict.fromkeys([*(theirs.data.tags or []), *(ours.data.tags or [])]))
    replaced = {_about(result) for result in ours.data.eval_results or []}
    results = [result for result in theirs.data.eval_results or [] if _about(result) not in replaced]
    data.eval_results = [*results, *(ours.data.eval_results or [])] or None
    data.model_name = ours.data.model_name or theirs.data.model_name
    block = _OURS.search(ours.text)
    part = block.group(0) if block else ours.text.strip()
    if _OURS.search(theirs.text):
        text = _OURS.sub(lambda _: part, theirs.text, count=1)
    else:
        text = f'{theirs.text.rstrip()}\n\n{part}\n'
    return f'---\n{data}\n---\n{text.lstrip()}'


def _about(result: EvalResult) -> tuple:
    return (*result.unique_identifier, result.dataset_name, result.metric_type)


def set_field(card: str, name: str, value: Optional[str]) -> str:
    """Return a card with a field of its head set, or removed (None)."""
    parsed = ModelCard(card)
    parsed.data[name] = value
    return f'---\n{parsed.data}\n---\n{parsed.text.lstrip()}'


def set_source(card: str, source: str) -> str:
    """Return a card whose snippet loads the model by another name."""
    return re.sub(r"create_model\('(local-dir|hf-hub):[^']*'", lambda _: f"create_model('{source}'", card)
