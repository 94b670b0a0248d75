"""The cards of published weights: as their facts render them, valid, and honest about figures."""

import csv
import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import yaml
from conftest import FACTS, randomise_
from huggingface_hub import EvalResult, ModelCard
from timm.models import _registry as registry

from timm_vitres.publishing import cards
from timm_vitres.weights import shipped

FOLDER = Path(__file__).parents[2] / 'hub_cards'
sys.path.insert(0, str(FOLDER))  # render.py imports its neighbour
spec = importlib.util.spec_from_file_location('render', FOLDER / 'render.py')
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)
measured, published = sys.modules['measured'], sys.modules['published']
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
    assert left_over == {'render.py', 'measured.py', 'published.py', 'template.md', 'family_template.md'}


def test_published_figures_are_those_of_the_rows():
    """A card's own figure, and those beside its parents, are one publication's."""
    names = {name for name in NAMES if published.rows_of(name)}
    assert len(names) == 10
    for name in names:
        facts = json.loads((FOLDER / f'{name}.json').read_text(encoding='utf-8'))
        own, *parents = published.rows_of(name)
        assert own['model'] == facts['their_name'] and f'{float(own["top1"]):.2f}' == f'{facts["top1"]:.2f}'
        text = (FOLDER / f'{name}.md').read_text(encoding='utf-8')
        for row in (own, *parents):
            (line,) = [
                line
                for line in text.splitlines()
                if line.startswith('| ') and f'`{row["model"].partition(".")[0]}`' in line
            ]
            figures = [row['gmacs'], *(f'{float(row[column]):.1f}' for column in published.COLUMNS)]
            assert line.endswith(f' | {" | ".join(figures)} |')


def test_what_was_measured_of_the_cost_is_told_apart(monkeypatch, tmp_path):
    name, file = 'vitresnet_tiny.augreg_in21k_ft_in1k', 'evidence_published.csv'
    shutil.copy(measured.RESULTS / file, tmp_path / file)
    monkeypatch.setattr(measured, 'RESULTS', tmp_path)
    without = published.beside_parents(name)
    place = dict(img_size='224', threads='2', machine='A machine', torch='2.14.1', date='2026-11-26')
    ratios = [('p.t', 'eager', '3'), ('p.t', 'eager', '0.577'), ('p.t', 'folded', '0.561')]
    ratios += [('q.t', 'eager', '2'), ('q.t', 'folded', '1.5')]
    rows = [dict(hybrid=name, parent=parent, path=path, ratio=ratio, **place) for parent, path, ratio in ratios]
    write_rows(tmp_path / 'evidence_cost.csv', *rows)
    assert published.beside_parents(name) == (
        without + '\n\nMeasured by this project, one image of 224 pixels on a CPU, random weights: 0.58 (folded 0.56) '
        'of the time of `p`, 2.00 (folded 1.50) of the time of `q` (A machine, threads: 2; torch 2.14.1, 2026-11-26).'
    )
    assert published.beside_parents('vitresnet_small.augreg_in21k_ft_in1k').count('Measured') == 0


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
    if timm.get_pretrained_cfg(name).file:  # `test_the_card_of_a_shipped_weight` says more
        [result] = card.data.eval_results
        assert result.metric_value == float(measured.shipped_row(name)['top1'])
        assert facts.keys() == {'kind', 'rows', 'row'}, 'its figures stand in the rows alone'
    elif facts['top1'] is None:
        assert card.data.eval_results is None and '## Result\n\nNot measured' in text
    else:
        [result] = card.data.eval_results
        assert result.metric_value == facts['top1'] and result.source_url == render.read(name)['source_url']
        assert 'Published, not measured by this project' in text and result.source_url in card.text


SHIPPED = 'test_vitresnet_mix.made_here'
RUN = dict(
    **dict(arm='interleaved', seed='0', epochs='45', test_top1='95.31', test_top1_tta='95.72', train_seconds='27000'),
    **dict(threads='1', date='2026-11-26', machine='A machine', torch='2.14.1', timm='1.0.31', timm_vitres='0.1.0'),
    command='python benchmarks/fmnist.py --arms interleaved --record',
)


def write_rows(path, *rows):
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Rows and facts of a weight that is entered for this test, its file, and the cfg of its entry."""
    for module, name in ((render, 'FOLDER'), (measured, 'RESULTS'), (shipped, 'FOLDER')):
        monkeypatch.setattr(module, name, tmp_path)
    for name in ('template.md', 'kinds.json'):
        shutil.copy(FOLDER / name, tmp_path)
    kinds = json.loads((tmp_path / 'kinds.json').read_text())
    kinds['architectures']['test_vitresnet_mix'] = dict(architecture_line='a test')
    (tmp_path / 'kinds.json').write_text(json.dumps(kinds))
    facts = dict(kind='fmnist', rows='fmnist', row=dict(arm='interleaved', seed=0))
    (tmp_path / f'{SHIPPED}.json').write_text(json.dumps(facts))
    path = tmp_path / f'{SHIPPED}.safetensors'
    path.write_bytes(b'weights')
    (tmp_path / 'SHA256SUMS').write_text(f'{"a" * 64}  {path.name}\n')
    told = dict(tag='made_here', file=str(path), input_size=(1, 28, 28), num_classes=10)
    cfg = dataclasses.replace(timm.get_pretrained_cfg('test_vitresnet_mix'), **told)
    tags = [*registry._model_with_tags['test_vitresnet_mix'], SHIPPED]
    monkeypatch.setitem(registry._model_with_tags, 'test_vitresnet_mix', tags)
    monkeypatch.setitem(registry._model_pretrained_cfgs, SHIPPED, cfg)
    file = dict(name=SHIPPED, stored='float16', bytes='2623224', images='10000', changed='3')
    file = dict(**file, run_top1='95.31', top1='95.32', sha256='a' * 64)
    write_rows(tmp_path / 'fmnist.csv', RUN, {**RUN, 'seed': '1', 'test_top1': '95.11'}, {**RUN, 'arm': 'serial'})
    write_rows(tmp_path / 'shipped.csv', {**file, 'top1': '90.00', 'sha256': 'b' * 64}, file)
    return tmp_path, file, cfg


def test_the_card_of_a_shipped_weight(rows):
    """Each of its figures is one of the two rows."""
    _, _, cfg = rows
    text = render.render(SHIPPED, cfg)
    card = ModelCard(text)
    [result] = card.data.eval_results
    assert result.metric_value == 95.32 and result.dataset_name == 'Fashion-MNIST' and result.dataset_split == 'test'
    assert card.data.base_model is None and card.data.datasets == ['fashion_mnist']
    for part in (
        'Measured by this project: 95.32% top-1 on the 10,000 test images of Fashion-MNIST, one view of each; 95.72%',
        'of its answers 3 differ from those of the run, which has 95.31%.',
        '45 epochs took 7.5 hours with 1 thread on A machine (torch 2.14.1, timm 1.0.31, timm-vitres 0.1.0; 2026-11-',
        '\n\n    python benchmarks/fmnist.py --arms interleaved\n\n',  # with --record a row that is there is not made
        'Data: [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist), licence MIT.',
        f'| part of the package: `timm_vitres/shipped/{SHIPPED}.safetensors`, 2.6 MB, float16 |',
        '28 x 28 pixels, grey,',
        'trained by this project',
    ):
        assert part in text.replace('\n', ' ') or part in text, part
    assert 'None' not in text and 'Published' not in text


def test_the_card_tells_balanced_accuracy_where_it_was_measured(rows):
    folder, _, cfg = rows
    write_rows(folder / 'fmnist.csv', {**RUN, 'test_balanced': '61.5'})
    assert '(`--tta shift`); balanced accuracy, the mean over the classes, 61.50%. The file' in render.render(
        SHIPPED, cfg
    )


@pytest.mark.parametrize(
    'run, file, message',
    [
        (dict(seed='2'), {}, r"0 rows of fmnist\.csv are as its facts say \(.*'seed': 0.*\), expected one"),
        ({}, dict(sha256='c' * 64), r'no row of shipped\.csv is of its file \(a+\); run benchmarks/ship\.py'),
        ({}, dict(name='other'), r'no row of shipped\.csv is of its file'),
        (
            {},
            dict(run_top1='95.30'),
            r'95\.31% in fmnist\.csv, but 95\.30% in shipped\.csv: the file is of another run',
        ),
    ],
)
def test_rows_that_do_not_belong_together(run, file, message, rows):
    folder, own, cfg = rows
    write_rows(folder / 'fmnist.csv', {**RUN, **run})
    write_rows(folder / 'shipped.csv', {**own, **file})
    with pytest.raises(SystemExit, match=message):
        render.render(SHIPPED, cfg)


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


def test_results_of_a_model_that_is_replaced_go_with_its_text():
    """What the Hub shows beside the new one is its own, and what the user wrote."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    facts = dict(model_name='x', description='A.', recipe='B.', source='local-dir:.')
    task = dict(task_type='image-classification', dataset_type='imagefolder', metric_type='accuracy')

    def of(name, value):
        return EvalResult(**task, dataset_name=name, dataset_config=name, metric_name='top-1 (%)', metric_value=value)

    old = cards.render_card(model, results=[of('cats', 95.5)], **facts)
    card = ModelCard(old)
    card.data.eval_results.append(of('mine', 80.0))
    for results in ([], [of('dogs', 70.0)]):
        merged = ModelCard(cards.merge_cards(str(card), cards.render_card(model, results=results, **facts)))
        kept = {result.dataset_name: result.metric_value for result in merged.data.eval_results}
        assert kept == {'mine': 80.0, **{result.dataset_name: result.metric_value for result in results}}
        assert '95.5' not in merged.text


def test_results_of_the_same_weights_stay():
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    facts = dict(model_name='x', description='A.', recipe='B.', source='local-dir:.')
    task = dict(task_type='image-classification', dataset_type='imagefolder', dataset_name='cats')
    result = EvalResult(**task, metric_type='accuracy', metric_value=95.5)
    old = cards.set_field(cards.render_card(model, results=[result], **facts), 'model_sha256', 'ab' * 32)
    for sha256, count in (('ab', 1), ('cd', 0)):
        new = cards.set_field(cards.render_card(model, **facts), 'model_sha256', sha256 * 32)
        merged = ModelCard(cards.merge_cards(old, new))
        assert len(merged.data.eval_results or ()) == merged.text.count('- accuracy: 95.5') == count


def test_what_was_known_of_the_same_weights_stays():
    """A model that is pushed from Python knows its classes and its preprocessing, but not its recipe."""
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    facts = dict(
        model_name='stripes',
        description='Of a run.',
        recipe='Two epochs.\n- Architecture: big',
        source='hf-hub:me/stripes',
    )
    old = cards.set_field(cards.render_card(model, **facts, label_names=['cat', 'dog']), 'model_sha256', 'ab' * 32)
    config = dict(input_size=(3, 48, 48), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    for sha256, is_same in (('ab', True), ('cd', False)):
        new = cards.plain_card(model, 'x', 'hf-hub:me/x', ['Katze', 'Hund'], config)
        merged = cards.merge_cards(old, cards.set_field(new, 'model_sha256', sha256 * 32))
        assert 'Classes (2): Katze, Hund' in merged and 'cat, dog' not in merged and 'mean (0.5, 0.5, 0.5)' in merged
        assert 'hf-hub:me/x' in merged and 'hf-hub:me/stripes' not in merged
        for text in ('# stripes', 'Of a run.', 'Two epochs.\n- Architecture: big'):
            assert (text in merged) == is_same
        assert ('The recipe is not known.' in merged) != is_same


def test_a_licence_that_is_another_than_the_weights_is_told(caplog):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    facts = dict(model_name='x', description='A.', recipe='B.', source='local-dir:.')
    ours = cards.render_card(model, license='cc-by-nc-4.0', **facts)
    assert ModelCard(cards.merge_cards('---\nlicense: mit\n---\n', ours)).data.license == 'mit'
    assert 'its licence stays mit, but that of the weights is cc-by-nc-4.0' in caplog.text
    caplog.clear()
    for old in ('Mine.\n', '---\nlicense: cc-by-nc-4.0\n---\n'):
        assert ModelCard(cards.merge_cards(old, ours)).data.license == 'cc-by-nc-4.0'
        assert 'its licence stays' not in caplog.text


def test_other_fields_that_the_hub_has_otherwise_are_told_of(caplog):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    ours = cards.render_card(model, model_name='x', description='A.', recipe='B.', source='local-dir:.')
    new = cards.set_field(ours, 'datasets', ['right'])
    merged = cards.merge_cards('---\ndatasets: [wrong]\nlanguage: en\npipeline_tag: image-to-image\n---\n', new)
    assert ModelCard(merged).data.datasets == ['wrong'] and ModelCard(merged).data.language == 'en'
    assert [text for text in caplog.messages if 'stays' in text] == [
        "README.md: its datasets stays ['wrong'], not ['right']; change it there."
    ]


def test_a_card_of_ones_own_takes_away_what_was_said_of_older_weights():
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    task = dict(task_type='image-classification', dataset_type='imagefolder', dataset_name='x', metric_type='accuracy')
    facts = dict(model_name='x', description='A.', recipe='B.', source='local-dir:.')
    old = cards.render_card(model, results=[EvalResult(**task, metric_value=93.5)], **facts)
    old = cards.set_field(old, 'model_sha256', 'ab' * 32) + '\nWritten on the Hub.\n'
    for digest, is_there in (('cd', False), ('ab', True)):
        merged = cards.merge_cards(old, f'---\nmodel_sha256: {digest * 32}\n---\n# My own\n')
        assert ('93.5' in merged.split('---')[2]) == is_there
        assert 'Written on the Hub.' in merged and '# My own' in merged
    head, ours = old.split('<!-- timm-vitres:')[0], old[old.index('<!-- timm-vitres:') :]
    old = f'{head}Before.\n{ours}'  # what nobody has changed since it was pushed gives way to what is pushed now
    pushed = cards.set_field(old, cards.TEXT_FIELD, cards.text_sha256(old))
    assert 'Before.' not in cards.merge_cards(pushed, f'---\nmodel_sha256: {"cd" * 32}\n---\n# My own\n')


def test_what_the_user_set_in_the_head_stays():
    model = randomise_(timm.create_model('test_vitresnet', num_classes=0))
    task = dict(task_type='image-classification', dataset_type='imagefolder', dataset_name='x', metric_type='accuracy')
    facts = dict(model_name='x', description='A.', recipe='B.', source='local-dir:.')
    ours = cards.render_card(model, results=[EvalResult(**task, metric_value=3.0)], **facts)
    assert ModelCard(ours).data.pipeline_tag == 'image-feature-extraction'
    own = 'pipeline_tag: depth-estimation\nlibrary_name: mylib\nmodel_name: Solar\n'
    data = ModelCard(cards.merge_cards(f'---\n{own}---\n', ours)).data
    assert (data.pipeline_tag, data.library_name, data.model_name) == ('depth-estimation', 'mylib', 'Solar')
    assert [result.metric_value for result in data.eval_results] == [3.0]
    metrics = [dict(task=dict(type='a'), dataset=dict(type='b', name='b'), metrics=[dict(type='c', value=1)])]
    index = yaml.safe_dump({'model-index': [dict(name=name, results=metrics) for name in ('one', 'two')]})
    merged = cards.merge_cards(f'---\n{index}---\nMine.\n', ours)
    assert f'---\n{index}' in merged and 'Mine.' in merged and cards.merge_cards(merged, ours) == merged


FIELD_CAMPAIGN = """---
# figures of the field campaign, do not edit
license: mit
base_model:
model-index:
- name: solar
  results:
  - {task: {type: image-classification}, dataset: {type: custom, name: roofs},  metrics: [{type: f1, value: 91.0}]}
  - task: {type: image-classification}
    dataset: {type: custom, name: fields}
    metrics: [{type: accuracy, value: 62.0, verified: false, note: of 3 days}, {type: f1, value: 60.0}]
    source: {name: our report, url: https://example.org}
---
Text of mine.
"""


def test_results_of_data_of_one_type_stay_apart_however_often_they_are_merged():
    model = randomise_(timm.create_model('test_vitresnet', num_classes=2))
    facts = dict(model_name='stripes', description='A run.', recipe='One epoch.', source='local-dir:.')
    own = EvalResult('image-classification', 'imagefolder', 'roofs', 'accuracy', 75.0, dataset_config='roofs')
    new = cards.render_card(model, results=[own], **facts)
    once = cards.merge_cards(FIELD_CAMPAIGN, new)
    before, after = (yaml.safe_load(text.split('---')[1]) for text in (FIELD_CAMPAIGN, once))
    [index], [old] = after['model-index'], before['model-index']
    assert index['name'] == 'solar' and index['results'][:2] == old['results'] and len(index['results']) == 3
    assert index['results'][2]['metrics'][0]['value'] == 75.0
    assert '# figures of the field campaign, do not edit' in once and 'base_model:\n' in once
    assert cards.merge_cards(once, new) == once
    better = cards.merge_cards(once, new.replace('75.0', '80.0'))
    results = yaml.safe_load(better.split('---')[1])['model-index'][0]['results']
    assert [entry['metrics'][0]['value'] for entry in results] == [91.0, 62.0, 80.0]
    unmeasured = cards.merge_cards(FIELD_CAMPAIGN, cards.render_card(model, **facts))
    assert FIELD_CAMPAIGN.split('---')[1].strip() in unmeasured  # letter by letter


def test_what_this_package_wrote_in_the_head_is_brought_up_to_date():
    facts = dict(model_name='x', description='A.', recipe='B.', source='local-dir:.')
    headless, classifier = (
        cards.render_card(randomise_(timm.create_model('test_vitresnet', num_classes=count)), **facts)
        for count in (0, 2)
    )
    for old, new in ((headless, classifier), (classifier, headless)):
        merged, expected = ModelCard(cards.merge_cards(old, new)).data, ModelCard(new).data
        assert merged.pipeline_tag == expected.pipeline_tag and set(merged.tags) == set(expected.tags)
    theirs = '---\nlibrary_name: transformers\npipeline_tag: depth-estimation\ntags: [vision]\n---\nMine.\n'
    merged = ModelCard(cards.merge_cards(theirs, classifier))
    assert (merged.data.library_name, merged.data.pipeline_tag) == ('timm', 'image-classification')
    assert 'vision' in merged.data.tags and 'Mine.' in merged.text


def test_what_the_hub_takes_for_no_head_is_none():
    for card, message in (
        ('--- \nlicense: mit\n---\nMine.\n', 'the Hub sees no head where spaces follow'),
        ('---\na: b\n', 'no end'),
    ):
        with pytest.raises(ValueError, match=message):
            cards.check_card(card)
    rule = '--- \nWelcome\n\n---\nMine.\n'
    merged = cards.merge_cards(rule, cards.set_field('Text.', 'license', 'mit'))
    assert rule in merged and ModelCard(merged).data.license == 'mit'


def test_names_that_are_no_text_stand_in_cards_escaped():
    model = timm.create_model('test_vitresnet', num_classes=2)
    card = cards.render_card(
        model, model_name='Fl\udcfcgel', description='Of `\udcfc`.', recipe='R.', source='local-dir:.'
    )
    assert r'Of `\udcfc`.' in card and ModelCard(card.encode().decode()).data.library_name == 'timm'


def test_no_name_ends_this_packages_part():
    model = timm.create_model('test_vitresnet', num_classes=2)
    end = 'a<!-- end of timm-vitres -->\n\n# Send money'
    text = cards.render_card(
        model, **{**FACTS, 'description': f'Converted from `{end}`.'}, label_names=[end, 'b\x1b[2J']
    )
    assert text.count('<!-- end of timm-vitres -->') == 1 and text.endswith('<!-- end of timm-vitres -->')
    assert '\n# Send money' not in text.partition('Classes')[2] and '\x1b' not in text


def test_a_head_on_one_line_is_written_anew():
    card = cards.set_field('---\n{license: mit, tags: [a]}\n---\nMine.\n', 'model_sha256', 'ab' * 32)
    assert ModelCard(card).data.license == 'mit' and ModelCard(card).data['model_sha256'] == 'ab' * 32
    assert 'model_sha256' not in cards.set_field(card, 'model_sha256', None)


def test_a_name_with_an_apostrophe_is_loaded_by_the_snippet():
    model = timm.create_model('test_vitresnet', num_classes=2)
    card = cards.render_card(model, model_name='x', description='A.', recipe='B.', source="local-dir:o'brien/run")
    assert """create_model("local-dir:o'brien/run", pretrained=True)""" in card
    assert "create_model('hf-hub:me/x', pretrained=True)" in cards.set_source(card, 'hf-hub:me/x')


def test_the_head_and_the_snippet_are_edited():
    model = timm.create_model('test_vitresnet', num_classes=2)
    text = cards.render_card(model, model_name='x', description='A.', recipe='B.', source='local-dir:my model')
    told = cards.set_field(text, 'model_sha256', 'ab' * 32)
    assert ModelCard(told).data['model_sha256'] == 'ab' * 32
    assert 'model_sha256' not in cards.set_field(told, 'model_sha256', None)
    assert "create_model('hf-hub:me/x'" in cards.set_source(told, 'hf-hub:me/x')


def test_a_mark_that_lost_its_fellow_takes_no_text_with_it():
    model = timm.create_model('test_vitresnet', num_classes=2)
    facts = dict(model_name='x', recipe='One epoch.', source='local-dir:.')
    card = cards.render_card(model, description='First.', **facts)
    edited = card.replace('<!-- end of timm-vitres -->', '') + '\n## Limitations\n\nBy hand.\n'
    for description in ('Second.', 'Third.'):
        edited = cards.merge_cards(edited, cards.render_card(model, description=description, **facts))
        assert 'By hand.' in edited and description in edited


def test_the_users_text_of_a_folder_reaches_the_card():
    """It is replaced where nobody changed it since it was pushed, and appended where somebody did."""

    def pushed(text):
        return cards.set_field(text, cards.TEXT_FIELD, cards.text_sha256(text))

    model = timm.create_model('test_vitresnet', num_classes=2)
    ours = cards.render_card(model, description='A.', model_name='x', recipe='B.', source='local-dir:.')
    there = pushed(ours)
    there = cards.merge_cards(there, pushed(f'{ours}\n## Limits\n\nAccuracy 90%.\n'))
    assert 'Accuracy 90%.' in there
    there = cards.merge_cards(there, pushed(f'{ours}\n## Limits\n\nAccuracy 95%.\n'))
    assert 'Accuracy 95%.' in there and 'Accuracy 90%.' not in there
    there = cards.merge_cards(there, pushed(ours))  # of a program that has no text of the user's
    there = cards.merge_cards(there, pushed(f'{ours}\n## Limits\n\nAccuracy 95.5%.\n'))
    assert 'Accuracy 95.5%.' in there and 'Accuracy 95%.' not in there
    there = cards.merge_cards(f'{there}\nOn the Hub.\n', pushed(f'{ours}\n## Limits\n\nAccuracy 96%.\n'))
    assert 'On the Hub.' in there and 'Accuracy 95.5%.' in there and 'Accuracy 96%.' in there
    there = cards.merge_cards(there, pushed(ours))
    assert 'On the Hub.' in there and there.count('## Use') == 1
    # what was changed or taken away on the Hub alone stays so
    folder = pushed(f'{ours}\n## Limits\n\nOf teh lab.\n')
    for own in ('## Limits\n\nOf the lab.\n', ''):
        there = cards.merge_cards(folder.replace('## Limits\n\nOf teh lab.\n', own), folder)
        assert 'teh' not in there and there.count('## Limits') == own.count('## Limits')
    assert 'Mine.' in cards.merge_cards('---\nlicense: mit\n---\n', f'{ours}\nMine.\n')


def test_lines_before_the_head_are_no_text():
    card = '\n---\nlicense: mit\n---\n# Mine\n'
    told = cards.set_field(card, 'model_sha256', 'ab' * 32)
    assert ModelCard(told).data.license == 'mit' and told.count('---') == 2
    model = timm.create_model('test_vitresnet', num_classes=2)
    ours = cards.render_card(model, description='A.', model_name='x', recipe='B.', source='local-dir:.')
    assert ModelCard(cards.merge_cards(card, ours)).data.license == 'mit'
