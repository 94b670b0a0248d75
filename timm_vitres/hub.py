"""A model as a folder: weights as safetensors, config.json, a card; every file written beside and renamed.

model -> `save` -> folder/{model.safetensors, config.json, README.md} -> timm.create_model('local-dir:folder').
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

from huggingface_hub import EvalResult, ModelCard, ModelCardData

# timm's public `save_for_hf` writes straight into the folder, so that a kill in between leaves half a file; the
# function that makes its config.json is private.
from timm.models._hub import save_config_for_hf
from torch import nn

from .data import data_config as model_data_config
from .files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, replacing, write_safetensors


def save(
    model: nn.Module,
    folder: Union[str, Path],
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Dict[str, Any]] = None,
    card: Optional[str] = None,
) -> Path:
    """Save a timm model as a folder that `timm.create_model('local-dir:<folder>', pretrained=True)` loads.

    Args:
        model: A model made by `timm.create_model`.
        folder: Where; created if missing. Its files of the same names are replaced.
        label_names: Names of the classes, by index; kept from the model's cfg where it has them.
        data_config: Preprocessing that the weights were trained with; by default the model's own.
        card: Text of README.md; by default no card is written.

    Returns:
        The folder.

    Raises:
        ValueError: where label_names are not as many as the model's classes, or the model is no timm model.
        OSError: where writing fails; the folder's last good files stay.
    """
    folder = Path(folder)
    if not hasattr(model, 'pretrained_cfg'):
        raise ValueError(f'model: got {type(model).__name__}, expected a model made by timm.create_model.')
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f'label_names: got {len(label_names)}, but the model has {model.num_classes} classes.')
    with replacing(folder / WEIGHTS_NAME) as path:
        write_safetensors(model.state_dict(), path)
    with replacing(folder / CONFIG_NAME) as path:
        save_config_for_hf(
            model,
            str(path),
            model_config={'label_names': list(label_names)} if label_names is not None else None,
            data_config=data_config or model_data_config(model),
        )
        config = json.loads(path.read_text())
        # config.json says num_classes at its top; transformers passes that one on, too, and would meet it twice
        config.get('model_args', {}).pop('num_classes', None)
        path.write_text(json.dumps(config, indent=2) + '\n')
    if card is not None:
        with replacing(folder / CARD_NAME) as path:
            path.write_text(card)
    return folder


CARD_TEMPLATE = """---
{{ card_data }}
---
# {{ model_name }}

{{ description }}

- Architecture: `{{ architecture }}`, {{ parameters }} parameters
- Input: {{ input_size }} (channels, height, width), mean {{ mean }}, std {{ std }}
- Classes ({{ num_classes }}): {{ classes }}

## Result

{{ result }}

## Training

{{ recipe }}

## Use

```python
import timm_vitres
import timm

model = timm.create_model('{{ source }}', pretrained=True).eval()
probabilities = model(timm_vitres.preprocess('image.jpg', model)).softmax(-1)
```
"""


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
) -> str:
    """Return a model card from facts.

    Args:
        model_name: The card's title.
        source: Name that `timm.create_model` takes ('local-dir:...' or 'hf-hub:...').
        results: What was measured; without any the card says that nothing was.
        result_note: On what, and how, it was measured.
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
        template_str=CARD_TEMPLATE,
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
        recipe=recipe,
        source=source,
    )
    return str(card)
