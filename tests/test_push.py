"""Pushing and pulling with the unmodified client, in fresh processes, against a Hub on the loopback address."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from conftest import randomise_
from hub_server import HubServer
from huggingface_hub import EvalResult, ModelCard

import timm_vitres
from timm_vitres import cards, files

PUSH = """
import json, sys, timm_vitres
print(timm_vitres.push(sys.argv[1], 'me/name', **json.loads(sys.argv[2])))
"""
LOAD = """
import sys, timm, timm_vitres, torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
x = torch.linspace(-1, 1, 2 * model.in_chans * 64 * 96).view(2, model.in_chans, 64, 96)
with torch.inference_mode():
    torch.save([model(x), model.state_dict()], sys.argv[2])
"""


@pytest.fixture
def server(tmp_path):
    with HubServer(tmp_path / 'hub') as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """Run a client in a fresh process with an empty cache; `fails`: a part of its last line, no stack trace checked."""
    homes = iter(range(100))

    def run(code, *args, token=None, home=None, fails=None, **environment):
        environment = {**server.environment(home or tmp_path / f'home{next(homes)}', token), **environment}
        command = [sys.executable, *(['-c', code] if isinstance(code, str) else code), *map(str, args)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        if fails is None:
            assert result.returncode == 0, result.stderr
            return result.stdout
        assert result.returncode == 1
        last = result.stderr.strip().splitlines()[-1]
        assert fails in last, result.stderr
        return last

    return run


def saved(tmp_path, name='test_vitresnet', seed=0, **options):
    model = randomise_(timm.create_model(name, **{'num_classes': 3, **options}), seed=seed)
    return model, timm_vitres.save(model, tmp_path / 'saved')


def check_equal(model, file):
    logits, state_dict = torch.load(file)
    x = torch.linspace(-1, 1, 2 * model.in_chans * 64 * 96).view(2, model.in_chans, 64, 96)
    with torch.inference_mode():
        assert torch.equal(logits, model(x))
    assert all(torch.equal(state_dict[key], value) for key, value in model.state_dict().items())


GENERIC = dict(backbone='resnet18', stage=2, embed_dim=48, num_heads=3, depth=2, reg_tokens=1, img_size=(64, 96))


@pytest.mark.parametrize(
    'name, options',
    [
        ('vitresnet_tiny', dict(img_size=96)),
        ('vitresnet_small', dict(img_size=(64, 96), num_classes=5)),
        ('vitresnet_nano', dict(in_chans=1, img_size=32)),
        ('vitresnet', GENERIC),
    ],
)
@pytest.mark.parametrize('redirect', [True, False])
def test_what_is_pushed_is_pulled(name, options, redirect, server, run, tmp_path):
    server.redirect_lfs = redirect  # as the real Hub does
    model, folder = saved(tmp_path, name, **options)
    run(PUSH, folder, '{}', token='token-me')
    run(LOAD, 'hf-hub:me/name', 'out.pt')
    check_equal(model, tmp_path / 'out.pt')
    # one commit, no pickle
    assert len(server.history('me/name')) == 2
    assert server.files('me/name').keys() == {'.gitattributes', 'model.safetensors', 'config.json', 'README.md'}
    card = ModelCard(server.files('me/name')['README.md'].read_text())
    assert card.data.library_name == 'timm' and 'Not measured.' in card.text
    assert card.data['model_sha256'] == files.sha256(folder / 'model.safetensors')
    assert "import timm_vitres\nimport timm\n\nmodel = timm.create_model('hf-hub:me/name'" in card.text


def test_a_model_is_pushed_as_it_is(server, run, tmp_path):
    """From Python, with its classes; the same again changes nothing."""
    code = (
        'import timm, timm_vitres, torch\n'
        'torch.manual_seed(0)\n'
        "model = timm.create_model('test_vitresnet', num_classes=2)\n"
        "timm_vitres.push(model, 'me/name', label_names=['cat', 'dog'], private=True)\n"
    )
    run(code, token='token-me')
    run(code, token='token-me')
    assert len(server.history('me/name')) == 2
    assert json.loads(server.files('me/name')['config.json'].read_text())['label_names'] == ['cat', 'dog']
    assert 'cat, dog' in server.files('me/name')['README.md'].read_text()


def test_private_repositories(server, run, tmp_path):
    model, folder = saved(tmp_path)
    run(PUSH, folder, '{"private": true}', token='token-me')
    for token in (None, 'token-other'):
        run(LOAD, 'hf-hub:me/name', 'out.pt', token=token, fails='epositor')
    run(LOAD, 'hf-hub:me/name', 'out.pt', token='token-me')
    check_equal(model, tmp_path / 'out.pt')


def test_a_revision(server, run, tmp_path):
    model, folder = saved(tmp_path)
    run(PUSH, folder, '{}', token='token-me')
    first = server.history('me/name')[0]
    other, folder = saved(tmp_path, seed=1)
    run(PUSH, folder, '{"revision": "better"}', token='token-me')
    for name, expected in (('', model), (f'@{first}', model), ('@better', other)):
        run(LOAD, f'hf-hub:me/name{name}', 'out.pt')
        check_equal(expected, tmp_path / 'out.pt')
    assert 'hf-hub:me/name@better' in server.files('me/name', 'better')['README.md'].read_text()


def test_published_names_from_the_hub_and_offline(server, run, tmp_path):
    """A tag's repository, users' own R+ViT weights, files of other kinds; then the same with no server to ask."""
    model = randomise_(timm.create_model('vit_tiny_r_s16_p8_224'))
    torch.save(model.state_dict(), tmp_path / 'weights.bin')
    for repo in ('timm/vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k', 'me/mine'):
        server.put(repo, {'pytorch_model.bin': tmp_path / 'weights.bin'})
    code = (
        'import timm, timm_vitres, torch, sys\n'
        "name = 'vitresnet_tiny.augreg_in21k_ft_in1k'\n"
        'model = timm.create_model(name, pretrained=True)\n'
        "mine = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='me/mine'))\n"
        'maps = timm.create_model(name, pretrained=True, features_only=True, in_chans=1, img_size=96)\n'
        'other = timm.create_model(name, pretrained=True, num_classes=5, img_size=96)\n'
        'torch.save([model.state_dict(), mine.state_dict(), maps.model.state_dict(), other.state_dict()], sys.argv[1])\n'
    )
    for environment in ({}, {'HF_HUB_OFFLINE': '1'}):
        run(code, 'out.pt', home=tmp_path / 'home', **environment)
        for state_dict in torch.load(tmp_path / 'out.pt'):
            assert torch.equal(state_dict['blocks.3.mlp.fc1.weight'], model.blocks[3].mlp.fc1.weight)
    run(code, 'out.pt', HF_HUB_OFFLINE='1', fails='is not in the cache, and the Hub can not be reached')


RECOVERED = [  # what our code, or the client, makes good by itself
    ('status', 'create', {}),
    ('drop', 'create', {}),
    ('drop-after', 'create', {}),
    ('status', 'validate-yaml', {}),
    ('status', 'info', {}),
    ('drop', 'info', {}),
    ('status', 'preupload', {}),
    ('status', 'lfs-batch', {}),
    ('status', 'lfs-put', {}),
    ('cut', 'lfs-put', {}),
    ('drop', 'lfs-verify', {}),
    ('status', 'commit', {}),
    ('status', 'commit', dict(status=429)),
    ('drop', 'commit', {}),
    ('drop-after', 'commit', {}),
    ('status', 'paths-info', {}),
    ('drop', 'paths-info', {}),
]


@pytest.mark.parametrize('kind, step, options', RECOVERED)
def test_one_fault_while_pushing(kind, step, options, server, run, tmp_path):
    model, folder = saved(tmp_path)
    server.fail(kind, step, **options)
    run(PUSH, folder, '{}', token='token-me')
    assert not server.faults and len(server.history('me/name')) == 2
    assert server.files('me/name')['model.safetensors'].read_bytes() == (folder / 'model.safetensors').read_bytes()


@pytest.mark.parametrize(
    'kind, step, sentence',
    [
        ('status', 'commit', 'me/name: could not commit: the Hub does not answer as it should'),
        ('drop', 'commit', 'me/name: could not commit: the Hub does not answer as it should'),
        ('status', 'create', 'could not create the repository: the Hub does not answer'),
        ('cut', 'lfs-put', 'could not commit'),
        ('status', 'lfs-put', 'could not commit'),
    ],
)
def test_a_lasting_fault_and_the_run_after_it(kind, step, sentence, server, run, tmp_path):
    """One clear sentence, nothing of a model on the Hub, and the same command again completes it."""
    model, folder = saved(tmp_path)
    server.fail(kind, step, times=100)
    command = ['-m', 'timm_vitres.cli', 'push', folder, 'me/name', '--yes']
    last = run(command, token='token-me', fails=sentence)
    assert last.startswith('timm-vitres: me/name: could not ')
    server.faults.clear()
    if step != 'create':
        assert server.files('me/name').keys() == {'.gitattributes'}
        run(LOAD, 'hf-hub:me/name', 'out.pt', fails='')
    run(command, token='token-me')
    run(LOAD, 'hf-hub:me/name', 'out.pt')
    check_equal(model, tmp_path / 'out.pt')


@pytest.mark.parametrize(
    'token, sentence',
    [
        ('token-read', 'the token has no right to do so'),
        ('token-other', 'the token has no right to do so'),
        ('token-unknown', 'the Hub does not know the token'),
        (None, 'token'),
    ],
)
def test_who_may_not_push(token, sentence, server, run, tmp_path):
    _, folder = saved(tmp_path)
    server.put('me/name', {'README.md': b'# mine\n'})
    command = ['-m', 'timm_vitres.cli', 'push', folder, 'me/name', '--yes']
    last = run(command, token=token, fails=sentence)
    assert last.startswith('timm-vitres: me/name: could not ')
    assert server.files('me/name').keys() == {'.gitattributes', 'README.md'}


def test_what_arrived_wrong_is_noticed(server, run, tmp_path):
    """The Hub's checksums of the commit are compared with what was sent."""
    _, folder = saved(tmp_path)
    code = (
        'import sys, timm_vitres\n'
        'from huggingface_hub import HfApi\n'
        'original = HfApi.create_commit\n'
        'def lie(self, repo_id, operations, **kwargs):\n'
        "    operations = [op for op in operations if op.path_in_repo != 'config.json']\n"
        '    return original(self, repo_id, operations, **kwargs)\n'
        'HfApi.create_commit = lie\n'
        "timm_vitres.push(sys.argv[1], 'me/name')\n"
    )
    run(code, folder, token='token-me', fails='me/name: config.json on the Hub has the checksum None, not ')


def test_someone_else_commits_meanwhile(server, run, tmp_path):
    """The stale parent is refused by the Hub; what the other wrote into the card is in ours."""
    _, folder = saved(tmp_path)
    server.put('me/name', {'README.md': b'---\nlicense: mit\n---\n# mine\n'})
    code = (
        'import os, sys, timm_vitres\n'
        'from huggingface_hub import CommitOperationAdd, HfApi\n'
        'original, calls = HfApi.create_commit, []\n'
        'def slow(self, repo_id, operations, **kwargs):\n'
        '    if not calls:\n'
        '        calls.append(1)\n'
        "        card = CommitOperationAdd('README.md', b'---\\nlicense: mit\\n---\\n# ours\\n')\n"
        "        original(HfApi(), repo_id, [card], commit_message='meanwhile')\n"
        '    return original(self, repo_id, operations, **kwargs)\n'
        'HfApi.create_commit = slow\n'
        "timm_vitres.push(sys.argv[1], 'me/name')\n"
    )
    run(code, folder, token='token-me')
    card = ModelCard(server.files('me/name')['README.md'].read_text())
    assert '# ours' in card.text and '# mine' not in card.text and card.data.license == 'mit'


def test_a_card_that_is_there_is_brought_up_to_date(server, run, tmp_path):
    model, _ = saved(tmp_path)
    task = dict(task_type='image-classification', dataset_type='imagefolder')
    old = ModelCard(
        '---\nlicense: mit\ntags: [solar]\nlanguage: en\nmodel_name: x\n---\n# Solar cells\n\nWritten by hand.\n'
    )
    old.data.model_name = 'x'
    old.data.eval_results = [
        EvalResult(**task, dataset_name='cells', metric_type='accuracy', metric_value=1.0),
        EvalResult(**task, dataset_name='roofs', metric_type='accuracy', metric_value=2.0),
    ]
    server.put('me/name', {'README.md': str(old).encode()})
    facts = dict(model_name='cells', description='A test.', recipe='One epoch.', source='local-dir:.')
    results = [EvalResult(**task, dataset_name='cells', metric_type='accuracy', metric_value=3.0)]
    card = cards.render_card(model, results=results, **facts)
    folder = timm_vitres.save(model, tmp_path / 'saved', card=card)
    run(PUSH, folder, '{}', token='token-me')
    run(PUSH, folder, '{}', token='token-me')
    new = ModelCard(server.files('me/name')['README.md'].read_text())
    assert new.data.license == 'mit' and new.data.language == 'en' and new.data.library_name == 'timm'
    assert new.data.tags == ['solar', 'timm', 'timm-vitres', 'image-classification']
    values = {result.dataset_name: result.metric_value for result in new.data.eval_results}
    assert values == {'cells': 3.0, 'roofs': 2.0}
    assert 'Written by hand.' in new.text and new.text.count('One epoch.') == 1 and new.text.count('# cells') == 1


def test_a_dry_run_sends_nothing(server, run, tmp_path):
    _, folder = saved(tmp_path)
    out = run(['-m', 'timm_vitres.cli', 'push', folder, 'me/name'], token='token-me')
    assert 'Nothing was sent; repeat with --yes' in out and files.sha256(folder / 'model.safetensors') in out
    assert server.requests == []


def test_what_does_not_load_is_not_pushed(server, run, tmp_path):
    model, folder = saved(tmp_path)
    command = ['-m', 'timm_vitres.cli', 'push', folder, 'me/name', '--yes']
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:-5])
    run(command, token='token-me', fails='is not pushed, since it does not load')
    (folder / 'model.safetensors').unlink()
    run(command, token='token-me', fails='has no model.safetensors')
    assert server.requests == []


PULLED = [
    # a fault of HUB.md, and whether it is made good
    ('status', 'get', dict(match='model.safetensors'), True),
    ('drop', 'get', dict(match='model.safetensors'), True),
    ('cut', 'get', dict(match='model.safetensors'), True),
    ('status', 'head', dict(match='model.safetensors'), True),
    ('drop', 'head', dict(match='model.safetensors'), True),
    ('flip', 'get', dict(match='model.safetensors'), 'is damaged, or was changed after it was published'),
    ('short', 'get', dict(match='model.safetensors', times=9), 'Consistency check failed'),
    ('status', 'get', dict(match='model.safetensors', times=99), '503'),
    ('drop', 'head', dict(match='model.safetensors', times=99), ''),
]


@pytest.mark.parametrize('kind, step, options, outcome', PULLED)
def test_faults_while_pulling(kind, step, options, outcome, server, run, tmp_path):
    """After each, either the model is right, or there is none; and the next run gets it."""
    model, folder = saved(tmp_path)
    server.put('me/name', {name: folder / name for name in ('config.json', 'model.safetensors')})
    server.fail(kind, step, **options)
    home = tmp_path / 'home'
    if outcome is not True:
        run(LOAD, 'hf-hub:me/name', 'out.pt', home=home, fails=outcome)
        assert not (tmp_path / 'out.pt').exists()
        if kind == 'flip':  # which the client cached, so it has to be removed, as the message says
            run(LOAD, 'hf-hub:me/name', 'out.pt', home=home, HF_HUB_OFFLINE='1', fails='Remove it and load again')
            [blob] = (home / 'hub').glob(f'models--me--name/blobs/{files.sha256(folder / "model.safetensors")}')
            blob.unlink()
        server.faults.clear()
    run(LOAD, 'hf-hub:me/name', 'out.pt', home=home)
    assert not server.faults
    check_equal(model, tmp_path / 'out.pt')


def test_verify(server, run, tmp_path):
    model, folder = saved(tmp_path)
    names = ('config.json', 'model.safetensors')
    server.put('me/name', {name: folder / name for name in names})
    home, command = tmp_path / 'home', ['-m', 'timm_vitres.cli', 'verify']
    digest = files.sha256(folder / 'model.safetensors')
    assert f'sha256 {digest}' in (out := run(command, 'hf-hub:me/name', home=home)) and 'says the Hub.' in out
    assert 'says the cache.' in run(command, 'hf-hub:me/name', home=home, HF_HUB_OFFLINE='1')
    # a folder: nobody says what it should be, but for a repository, or its card
    run(command, f'local-dir:{folder}', fails='nobody says what it should be')
    assert 'says the Hub.' in run(command, f'local-dir:{folder}', '--repo', 'me/name')
    _, other = saved(tmp_path, seed=1)
    run(command, other, '--repo', 'me/name', fails='it is damaged, or another version')
    run(command, other, '--repo', 'me/none', fails='there is no such repository')
    run(command, 'vitresnet_small.nonsense', fails='Invalid pretrained tag')
    # a newer commit does not make the cached version wrong
    server.put('me/name', {name: other / name for name in names})
    assert 'says the Hub.' in run(command, f'hf-hub:me/name@{server.history("me/name")[1]}', home=home)
    [blob] = (home / 'hub').glob(f'models--me--name/blobs/{digest}')
    data = bytearray(blob.read_bytes())
    data[-100] ^= 1
    blob.write_bytes(data)
    revision = server.history('me/name')[1]
    run(command, f'hf-hub:me/name@{revision}', home=home, fails='is damaged')
