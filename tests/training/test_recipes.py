import dataclasses
import re
import shlex

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

import timm_vitres
from timm_vitres import cli
from timm_vitres.cli import create_parser
from timm_vitres.training import loop
from timm_vitres.training.recipes import FOLDER, recipe, recipe_names, recipe_text
from timm_vitres.training.settings import FinetuneCfg

FIELDS = {field.name for field in dataclasses.fields(FinetuneCfg)}
README = (FOLDER / 'README.md').read_text()


def test_names():
    assert set(recipe_names()) >= {'small_from_scratch', 'finetune_224', 'finetune_384', 'distill', 'lora'}
    with pytest.raises(ValueError, match=r"^name: got 'lore', expected one of the recipes: compare, distill, "):
        recipe_text('lore')


@pytest.mark.parametrize('name', recipe_names())
def test_a_recipe_says_what_it_is_for_and_what_was_measured(name):
    head = re.match(r'(#.*\n)+', recipe_text(name))[0]
    assert re.match(r'# [A-Z].*[:.]', head) and re.search(r'^# Time and result: \w', head, re.MULTILINE), name
    commands = re.findall(r'^#     timm-vitres (.*)', head, re.MULTILINE)
    parsed = [create_parser().parse_args(shlex.split(command)) for command in commands]
    assert [args.config for args in parsed if args.config] == [name]
    FinetuneCfg(**recipe(name), data_dir='images')


@pytest.mark.parametrize('name', recipe_names())
def test_a_recipe_is_what_trainpy_reads(name):
    plain = yaml.safe_load(recipe_text(name))
    told = {key: list(value) if isinstance(value, tuple) else value for key, value in recipe(name).items()}
    assert told == plain


def test_a_file_is_read_as_flags_are(tmp_path):
    path = tmp_path / 'mine.yaml'
    path.write_text(
        '\ufeff# a comment\nlr: 1e-3\nwarmup_epochs: 2\nimg_size: [32, 48]\namp: true\nlayer_decay: null\n'
        'model_kwargs: {depth: 2, channels: [64, 128]}\nopt_betas:\n- 9E-1\n- .5\nresume: here\n',
        encoding='utf-8',
    )
    found = recipe(str(path))
    assert found == dict(
        lr=0.001,
        warmup_epochs=2.0,
        img_size=(32, 48),
        amp=True,
        layer_decay=None,
        model_kwargs=dict(depth=2, channels=(64, 128)),
        opt_betas=(0.9, 0.5),
        resume='here',
    )
    assert type(found['warmup_epochs']) is float


def test_what_powershell_writes_is_read(tmp_path):
    (tmp_path / 'mine.yaml').write_bytes('lr: 1e-3\r\nepochs: 3\r\n'.encode('utf-16'))
    assert recipe(str(tmp_path / 'mine.yaml')) == dict(lr=0.001, epochs=3)


def test_a_file_goes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'distill').mkdir()
    (tmp_path / 'lora').write_text('epochs: 3')
    assert recipe('lora') == dict(epochs=3) and recipe('distill')['model'] == 'vitresnet_nano'


def test_a_recipe_that_was_edited_here_is_asked_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'lora.yaml').write_text('epochs: 3')
    with pytest.raises(ValueError, match=r'^config: lora is a recipe of the package, and lora\.yaml is here'):
        recipe('lora')
    assert recipe('lora.yaml') == dict(epochs=3)
    monkeypatch.chdir(FOLDER)
    assert recipe('lora')['lora'] > 0


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'mine.yaml is empty'),
        ('# nothing\n', 'mine.yaml is empty'),
        ('- lr\n', r"mine.yaml holds \['lr'\], expected settings"),
        ('lr', "mine.yaml holds 'lr', expected settings"),
        ('lrr: 1', 'mine.yaml: lrr: is no argument of a run; did you mean lr'),
        ('data: images', 'mine.yaml: data: is no argument of a run; did you mean .*data_dir'),
        ('config: lora', 'mine.yaml: config: is no argument of a run'),
        ('1: 2', 'mine.yaml: got 1 as a name'),
        ('on: 2', 'mine.yaml: got True as a name'),
        ('[1, 2]: 2', 'mine.yaml is no plain YAML .line 1, .* found unhashable key'),
        ('lr: fast', "mine.yaml: lr: got 'fast', expected a finite number above 0"),
        ('lr: -1', 'mine.yaml: lr: got -1, expected a finite number above 0'),
        ('lr: .nan', 'mine.yaml: lr: got nan'),
        ('lr: [1e-3, 1e-4]', r'mine.yaml: lr: got \(0.001, 0.0001\), expected a finite number'),
        ('lr: {a: 1}', "mine.yaml: lr: got {'a': 1}, expected a finite number"),
        ('model: [a, b]', r"mine.yaml: model: got \['a', 'b'\], expected text"),
        ('output: 2024-01-01', r'mine.yaml: output: got datetime.date\(2024, 1, 1\), expected text'),
        ('mean: 0.5', 'mine.yaml: mean: got 0.5, expected'),
        ('scale: [0.5]', 'mine.yaml: scale: got .* expected 2 numbers'),
        ('amp: 1', 'mine.yaml: amp: got 1, expected True or False'),
        ('sched: cosin', "mine.yaml: sched: got 'cosin', expected one of"),
        ("resume: ''", "mine.yaml: resume: got ''"),
        ('model_kwargs: {depth: 1, depth: 2}', "mine.yaml is no plain YAML .line 1, .* 'depth' comes twice"),
        ('lr: 1\nepochs: 2\n"lr": 2', """mine.yaml is no plain YAML .line 3, '"lr": 2': 'lr' comes twice"""),
        ('lr: 1\nepochs: !!python/object/apply:os.getcwd []', "mine.yaml is no plain YAML .line 2, 'epochs: .*tag"),
        ('epochs: !!int ""', 'mine.yaml is no plain YAML'),
        ('epochs: !!bool maybe', 'mine.yaml is no plain YAML'),
        ('output: 2024-99-99', 'mine.yaml is no plain YAML .month'),
        ('epochs: 1\n---\nepochs: 2', 'mine.yaml is no plain YAML .line 2, .* another document'),
        ('model_kwargs: &a [*a]', 'mine.yaml is no plain YAML .line 1, .*an alias is not taken'),
        ('lr: "1', 'mine.yaml is no plain YAML'),
        ('lr: \t- @', 'mine.yaml is no plain YAML .line 1'),
        (f'model_kwargs: {"[" * 5000}', 'mine.yaml is no plain YAML'),
        (b'model: caf\xe9', 'mine.yaml is no text in UTF-8'),
        (b'\xff\xfem', 'mine.yaml is no text in UTF-8'),
        (b'\x00\x01', 'mine.yaml is no plain YAML'),
    ],
)
def test_what_no_run_can_have_is_named(text, message, tmp_path, capsys):
    path = tmp_path / 'mine.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, TypeError), match=f'^config: {tmp_path}/({message})') as caught:
        recipe(str(path))
    assert len(str(caught.value).splitlines()) == 1
    assert cli.main(['finetune', 'images', '-c', str(path)]) == 1
    assert capsys.readouterr().err == f'timm-vitres: {caught.value}\n'


@pytest.mark.parametrize(
    'name, message',
    [('nowhere.yaml', 'got .* which is no file, and none of the recipes: compare'), ('', "got ''"), ('.', '. can not')],
)
def test_what_is_no_file_is_named(name, message):
    with pytest.raises(OSError, match=f'^config: {message}'):
        recipe(name)


def test_flags_win_and_both_are_given(tmp_path, monkeypatch):
    path = tmp_path / 'mine.yaml'
    path.write_text('lr: 0.5\nepochs: 3\ndata_dir: there\nmodel_kwargs: {depth: 2}\namp: true')
    calls = []
    monkeypatch.setattr(loop, 'finetune', lambda cfg, given: calls.append((cfg, set(given))) or 'folder')
    flags = ['here', '--config', str(path), '--lr', '0.25', '--model-kwargs', 'stage=1', '-j', '0']
    assert cli.main(['finetune', *flags]) == 0
    expected = FinetuneCfg('here', lr=0.25, epochs=3, model_kwargs=dict(stage=1), amp=True, workers=0)
    assert calls == [(expected, {'data_dir', 'lr', 'epochs', 'model_kwargs', 'amp', 'workers'})]
    assert cli.main(['finetune', '-c', str(path)]) == 0
    assert calls[1][0] == FinetuneCfg('there', lr=0.5, epochs=3, model_kwargs=dict(depth=2), amp=True)


def test_a_run_goes_on_as_the_file_says_or_not_at_all(image_folder, tmp_path, capsys):
    path = tmp_path / 'mine.yaml'
    text = f'model: test_vitresnet\nimg_size: 32\nbatch_size: 8\nworkers: 0\nepochs: 1\noutput: {tmp_path}/run\n'
    path.write_text(text + 'lr: 0.003\n')
    assert cli.main(['finetune', str(image_folder), '--config', str(path)]) == 0
    assert cli.main(['finetune', '--config', str(path), '--resume']) == 0
    assert 'is finished: all of its 1 epochs' in capsys.readouterr().out
    path.write_text(text + 'lr: 0.004\n')
    assert cli.main(['finetune', '--config', str(path), '--resume']) == 1
    assert 'lr: got 0.004, but the run in' in capsys.readouterr().err
    assert cli.main(['finetune', '--config', str(path), '--resume', '--lr', '0.003']) == 0


@pytest.mark.slow
@pytest.mark.parametrize('name', recipe_names())
def test_a_recipe_trains(name, image_folder, tmp_path, monkeypatch):
    """One short epoch of a small model, otherwise as the recipe says."""
    monkeypatch.chdir(tmp_path)
    start = timm.create_model('test_vitresnet', num_classes=2)
    timm_vitres.save(start, 'teacher', label_names=['across', 'down'])
    save_file(start.state_dict(), 'start.safetensors')
    flags = ['--model', 'test_vitresnet', '--img-size', '96', '--epochs', '1', '-b', '8', '-j', '0', '--output', 'run']
    flags += ['--pretrained-path', 'start.safetensors', '--device', 'cpu']
    assert cli.main(['finetune', str(image_folder), '--config', name, *flags]) == 0
    model = timm.create_model('local-dir:run', pretrained=True)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[key])]
    heads = {'head.weight', 'head.bias'}
    assert heads < set(changed)
    if name == 'lora':
        assert all(key in heads or re.search('qkv|attn.proj|fc1|fc2', key) for key in changed), changed


def test_the_table_of_flags_is_that_of_the_settings():
    """Every setting of ours is either one of train.py's, or beyond it; nothing else is said to be there."""
    flags, beyond = README.split('## Beyond train.py')
    rows = re.findall(r'^\| `(?:--)?([\w-]+)` \| (there|another door|left out) \| (.*) \|$', flags, re.MULTILINE)
    assert len(rows) == flags.count('\n| `') > 150
    told = {name.replace('-', '_'): kind for name, kind, _ in rows}
    assert len(told) == len(rows) and all(text.strip() for _, kind, text in rows if kind != 'there')
    there = {name for name, kind in told.items() if kind == 'there'}
    ours = re.findall(r'`(\w+)`', ''.join(re.findall(r'^\| (`.*?) \|', beyond, re.MULTILINE)))
    assert len(ours) == len(set(ours)) and not there & set(ours) and not FIELDS & (told.keys() - there)
    assert there | set(ours) == FIELDS


def test_the_other_doors_are_flags_of_ours():
    doors = re.findall(r'^\| .* \| another door \| (.*) \|$', README, re.MULTILINE)
    named = {flag.replace('-', '_') for text in doors for flag in re.findall(r'`--([\w-]+)', text)}
    assert len(named) > 6 and named <= FIELDS
