"""The cards of published weights: as their facts render them, valid, and honest about figures."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
from conftest import randomise_
from huggingface_hub import EvalResult, ModelCard

from timm_vitres.publishing import cards

FOLDER = Path(__file__).parents[2] / 'hub_cards'
spec = importlib.util.spec_from_file_location('render', FOLDER / 'render.py')
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)
NAMES = [name for name, _ in render.published_weights()]


@pytest.fixture(scope='module')
def rendered():
    return render.render_all()


def test_cards_are_what_their_facts_render(rendered):
    assert {path.name for path in rendered} == {f'{name}.md' for name in (*NAMES, 'family')}
    for path, text in rendered.items():
        assert path.is_file(), f'{path.name} is missing: run `python hub_cards/render.py`'
        assert path.read_text(encoding='utf-8') == text, f'{path.name}: run `python hub_cards/render.py`'
    known = {path.name for path in rendered} | {f'{name}.json' for name in (*NAMES, 'kinds')}
    left_over = {path.name for path in FOLDER.iterdir() if path.is_file()} - known
    assert left_over == {'render.py', 'template.md', 'family_template.md'}


@pytest.mark.parametrize('name', NAMES)
def test_a_card(name):
    for suffix, remedy in (('json', 'write it, as its neighbours are'), ('md', 'run `python hub_cards/render.py`')):
        assert (FOLDER / f'{name}.{suffix}').is_file(), f'hub_cards/{name}.{suffix} is missing: {remedy}.'
    text = (FOLDER / f'{name}.md').read_text(encoding='utf-8')
    card = ModelCard(text)  # raises for a head that is not valid, its results too
    facts = json.loads((FOLDER / f'{name}.json').read_text(encoding='utf-8'))
    assert card.data.library_name == 'timm' and card.data.license == 'apache-2.0'
    assert card.data.base_model == timm.get_pretrained_cfg(name).hf_hub_id
    assert 'import timm_vitres  # registers the models\nimport timm\n' in text and 'None' not in text
    if facts['top1'] is None:
        assert card.data.eval_results is None and '## Result\n\nNot measured' in text
    else:
        [result] = card.data.eval_results
        assert result.metric_value == facts['top1'] and result.source_url == render.read(name)['source_url']
        assert 'Published, not measured by this project' in text and result.source_url in card.text


def test_a_card_of_ones_own():
    model = timm.create_model('test_vitresnet', num_classes=2)
    facts = dict(model_name='stripes', description='A test.', recipe='One epoch.', source='local-dir:.')
    text = cards.render_card(model, label_names=['across', 'down'], **facts)
    card = ModelCard(text)
    assert 'Not measured.' in text and 'import timm_vitres' in text and card.data.library_name == 'timm'
    task = dict(task_type='image-classification', dataset_type='imagefolder', dataset_name='stripes')
    result = EvalResult(**task, metric_type='accuracy', metric_value=93.5)
    text = cards.render_card(model, results=[result], result_note='On 4 images.', picture='curves.png', **facts)
    card = ModelCard(text)
    assert card.data.eval_results[0].metric_value == 93.5
    assert 'accuracy: 93.5' in card.text and 'On 4 images.' in card.text and '(curves.png)' in card.text


def test_cards_are_merged():
    """The user's head and text stay; ours is replaced where it was, and added where it was not."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    facts = dict(model_name='stripes', recipe='One epoch.', source='local-dir:.', license='apache-2.0')
    first = cards.render_card(model, description='First.', **facts)
    second = cards.render_card(model, description='Second.', **facts)
    merged = cards.merge_cards('# Mine\n\nBy hand.\n', first)
    assert merged.count('# Mine') == 1 and 'By hand.' in merged and 'First.' in merged
    edited = merged.replace('license: apache-2.0', 'license: mit').replace('By hand.', 'By my hand.')
    again = cards.merge_cards(edited, second)
    assert 'Second.' in again and 'First.' not in again and 'By my hand.' in again
    assert ModelCard(again).data.license == 'mit'
    assert cards.merge_cards(again, second) == again
    with pytest.raises(ValueError, match='is no valid YAML'):
        cards.merge_cards('---\n- no: [mapping\n---\n', first)


def test_the_head_and_the_snippet_are_edited():
    model = timm.create_model('test_vitresnet', num_classes=2)
    text = cards.render_card(model, model_name='x', description='A.', recipe='B.', source='local-dir:my model')
    told = cards.set_field(text, 'model_sha256', 'ab' * 32)
    assert ModelCard(told).data['model_sha256'] == 'ab' * 32
    assert 'model_sha256' not in cards.set_field(told, 'model_sha256', None)
    assert "create_model('hf-hub:me/x'" in cards.set_source(told, 'hf-hub:me/x')
