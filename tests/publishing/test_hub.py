"""Pushing and pulling with the unmodified client, in fresh processes, against a Hub on the loopback address."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomise_
from hub_server import HubServer
from huggingface_hub import EvalResult, ModelCard

import timm_vitres
from timm_vitres.cli import main
from timm_vitres.publishing import cards, neighbours
from timm_vitres.publishing import hub as hub_module
from timm_vitres.weights import checksums

# older clients say that a file is not in the cache, or give up, where recent ones tell what broke, or try again
RECENT = pytest.mark.recent
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
CALL_PUSH = 'import sys, timm_vitres\ntimm_vitres.push(sys.argv[1], sys.argv[2])'
# runs one call after the other; our waits between tries are left out, the client's are not
WORKER = """
import contextlib, json, sys, time, types, timm, timm_vitres, torch
from timm_vitres.weights import downloads
downloads.time = types.SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic)
for line in sys.stdin:
    code, sys.argv, error = *json.loads(line), None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            exec(code, {})
        except BaseException as raised:
            error = f'{type(raised).__name__}: {raised}'
    print(json.dumps(error), flush=True)
"""


@pytest.fixture
def server(tmp_path):
    with HubServer(tmp_path / 'hub') as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """Run a client in a fresh process with an empty cache; `fails`: a part of what it then says."""
    homes = iter(range(100))

    def run(code, *args, token=None, home=None, fails=None, **environment):
        environment = {**server.environment(home or tmp_path / f'home{next(homes)}', token), **environment}
        command = [sys.executable, *(['-c', code] if isinstance(code, str) else code), *map(str, args)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        if fails is None:
            assert result.returncode == 0, result.stderr
            return result.stdout
        assert result.returncode == 1 and fails in result.stderr, result.stderr
        if not isinstance(code, str):  # the command line
            assert 'Traceback' not in result.stderr
            assert result.stderr.strip().splitlines()[-1].startswith('timm-vitres: ')  # after the client's own warnings
        return result.stderr

    return run


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """A server, and a process of the user 'me' that talks to it."""
    root = tmp_path_factory.mktemp('hub')
    with HubServer(root / 'hub') as server:
        environment = server.environment(root / 'home', 'token-me')
        with subprocess.Popen(
            [sys.executable, '-c', WORKER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            yield server, process
            process.stdin.close()


@pytest.fixture
def faulty(hub, request):
    """A server for faults, the repository of this test, and a function that calls the process, returning its error."""
    server, process = hub
    server.faults.clear()

    def call(code, *args):
        process.stdin.write(json.dumps([code, ['', *map(str, args)]]) + '\n')
        process.stdin.flush()
        timer = threading.Timer(300, process.kill)
        timer.start()
        answer = process.stdout.readline()
        timer.cancel()
        assert answer, 'the client died, or did not answer'
        return json.loads(answer)

    digest = hashlib.sha1(request.node.name.encode()).hexdigest()[:8]  # names that are cut may be alike
    name = 'me/' + re.sub('[^a-z0-9]+', '-', request.node.name)[:60].strip('-') + f'-{digest}'
    return server, name, call


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A saved model of 3 classes and its folder."""
    return saved(tmp_path_factory.mktemp('saved'))


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
        pytest.param('vitresnet_tiny', dict(img_size=96), marks=pytest.mark.slow),
        pytest.param('vitresnet_small', dict(img_size=(64, 96), num_classes=5), marks=pytest.mark.slow),
        ('vitresnet_nano', dict(in_chans=1, img_size=32)),
        ('vitresnet', GENERIC),
    ],
)
def test_what_is_pushed_is_pulled(name, options, server, run, tmp_path):
    server.redirect_lfs = name != 'vitresnet_tiny'  # as the real Hub does
    model, folder = saved(tmp_path, name, **options)
    run(PUSH, folder, '{}', token='token-me')
    run(LOAD, 'hf-hub:me/name', 'out.pt')
    check_equal(model, tmp_path / 'out.pt')
    # one commit, no pickle
    assert len(server.history('me/name')) == 2
    assert server.files('me/name').keys() == {'.gitattributes', 'model.safetensors', 'config.json', 'README.md'}
    card = ModelCard(server.files('me/name')['README.md'].read_text())
    assert card.data.library_name == 'timm' and 'Not measured.' in card.text
    assert card.data['model_sha256'] == checksums.sha256(folder / 'model.safetensors')
    assert "import timm_vitres\nimport timm\n\nmodel = timm.create_model('hf-hub:me/name'" in card.text


def test_a_model_is_pushed_as_it_is(faulty):
    """From Python, with its classes; the same again changes nothing."""
    server, name, call = faulty
    code = (
        'import sys, timm, timm_vitres, torch\n'
        'torch.manual_seed(0)\n'
        "model = timm.create_model('test_vitresnet', num_classes=2)\n"
        "timm_vitres.push(model, sys.argv[1], label_names=['cat', 'dog'], private=True)\n"
    )
    assert call(code, name) is None
    assert call(code, name) is None
    assert len(server.history(name)) == 2
    assert json.loads(server.files(name)['config.json'].read_text())['label_names'] == ['cat', 'dog']
    assert 'cat, dog' in server.files(name)['README.md'].read_text()


def test_private_repositories(server, run, tmp_path):
    model, folder = saved(tmp_path)
    run(PUSH, folder, '{"private": true}', token='token-me')
    for token in (None, 'token-other'):
        run(LOAD, 'hf-hub:me/name', 'out.pt', token=token, fails='RepositoryNotFoundError')
    code = 'import sys, timm_vitres\nprint(timm_vitres.verify(sys.argv[1], token=sys.argv[2] or None).sha256)'
    assert checksums.sha256(folder / 'model.safetensors') in run(code, 'hf-hub:me/name', 'token-me')
    run(code, 'hf-hub:me/name', '', fails='RepositoryNotFoundError')
    run(LOAD, 'hf-hub:me/name', 'out.pt', token='token-me')
    check_equal(model, tmp_path / 'out.pt')


def test_what_shall_be_private_is_not_sent_to_a_public_repository(server, run, tmp_path):
    _, folder = saved(tmp_path)
    run(PUSH, folder, '{"private": false}', token='token-me')
    before = server.history('me/name')
    run(PUSH, saved(tmp_path, seed=1)[1], '{"private": true}', token='token-me', fails='is there, and public')
    assert server.history('me/name') == before


def test_a_revision(faulty, folder, tmp_path):
    server, name, call = faulty
    model, folder = folder
    assert call(CALL_PUSH, folder, name) is None
    first = server.history(name)[0]
    other, folder = saved(tmp_path, seed=1)
    assert call(CALL_PUSH.replace(')', ", revision='better')"), folder, name) is None
    for revision, expected in (('', model), (f'@{first}', model), ('@better', other)):
        assert call(LOAD, f'hf-hub:{name}{revision}', tmp_path / 'out.pt') is None
        check_equal(expected, tmp_path / 'out.pt')
    assert f'hf-hub:{name}@better' in server.files(name, 'better')['README.md'].read_text()


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
        'models = model, mine, maps.model, other\n'
        'torch.save([one.state_dict() for one in models], sys.argv[1])\n'
    )
    for environment in ({}, {'HF_HUB_OFFLINE': '1'}):
        run(code, 'out.pt', home=tmp_path / 'home', **environment)
        for state_dict in torch.load(tmp_path / 'out.pt'):
            assert torch.equal(state_dict['blocks.3.mlp.fc1.weight'], model.blocks[3].mlp.fc1.weight)
    run(code, 'out.pt', HF_HUB_OFFLINE='1', fails='is not in the cache, and the Hub can not be reached')


@pytest.mark.slow  # the client asks for 23 seconds
def test_a_server_that_is_gone(server, run, tmp_path):
    """What is in the cache loads, also where it is not of the first name that is looked for."""
    model = randomise_(timm.create_model('vit_tiny_r_s16_p8_224'))
    torch.save(model.state_dict(), tmp_path / 'weights.bin')
    server.put('timm/vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k', {'pytorch_model.bin': tmp_path / 'weights.bin'})
    code = LOAD.replace('sys.argv[1]', "'vitresnet_tiny'").replace('2]', '1]')
    run(code, 'out.pt', home=tmp_path / 'home')
    expected = torch.load(tmp_path / 'out.pt')[0]
    (tmp_path / 'out.pt').unlink()
    run(code, 'out.pt', home=tmp_path / 'home', HF_ENDPOINT='http://127.0.0.1:9')
    assert torch.equal(torch.load(tmp_path / 'out.pt')[0], expected)


RECOVERED = [  # what our code, or the client, makes good by itself
    ('status', 'create', {}),
    ('drop', 'create', {}),
    ('drop-after', 'create', {}),
    ('status', 'validate-yaml', {}),
    ('status', 'info', {}),
    ('drop', 'info', {}),
    ('status', 'head', dict(match='README.md')),
    ('drop', 'head', dict(match='README.md')),
    ('status', 'preupload', {}),
    ('status', 'lfs-batch', {}),
    ('status', 'lfs-put', {}),
    ('cut', 'lfs-put', {}),
    pytest.param('drop', 'lfs-verify', {}, marks=RECENT),
    ('status', 'commit', {}),
    ('status', 'commit', dict(status=429)),
    ('drop', 'commit', {}),
    ('drop-after', 'commit', {}),
    ('status', 'paths-info', {}),
    ('drop', 'paths-info', {}),
]


@pytest.mark.parametrize('kind, step, options', RECOVERED)
def test_one_fault_while_pushing(kind, step, options, faulty, folder):
    server, name, call = faulty
    _, folder = folder
    server.fail(kind, step, **options)
    assert call(CALL_PUSH, folder, name) is None
    assert not server.faults and len(server.history(name)) == 2
    assert server.files(name)['model.safetensors'].read_bytes() == (folder / 'model.safetensors').read_bytes()


@pytest.mark.parametrize(
    'kind, step, what',
    [
        ('status', 'create', 'create the repository'),
        ('drop', 'info', 'look at the repository'),
        ('status', 'commit', 'commit'),
        ('drop', 'commit', 'commit'),
        ('status', 'paths-info', 'compare checksums'),
    ],
)
def test_a_lasting_fault_and_the_run_after_it(kind, step, what, faulty, folder, tmp_path):
    """One clear sentence, no half of a model on the Hub, and the same call again completes it."""
    server, name, call = faulty
    model, folder = folder
    server.fail(kind, step, times=1000)
    error = call(CALL_PUSH, folder, name)
    assert error.startswith(f'RuntimeError: {name}: could not {what}: the Hub does not answer as it should ('), error
    assert error.endswith('and nobody sees half of it.')
    server.faults.clear()
    if step not in ('create', 'paths-info'):
        assert server.files(name).keys() == {'.gitattributes'}
        assert call(LOAD, f'hf-hub:{name}', tmp_path / 'out.pt') is not None
    assert call(CALL_PUSH, folder, name) is None
    assert len(server.history(name)) == 2
    assert call(LOAD, f'hf-hub:{name}', tmp_path / 'out.pt') is None
    check_equal(model, tmp_path / 'out.pt')


@pytest.mark.slow  # the client itself tries for half a minute
def test_an_upload_that_is_cut(server, run, tmp_path):
    """From the command line, which says one sentence."""
    model, folder = saved(tmp_path)
    server.fail('cut', 'lfs-put', times=1000)
    command = ['-m', 'timm_vitres.cli', 'push', folder, 'me/name', '--yes']
    said = run(command, token='token-me', fails='me/name: could not commit: the Hub does not answer as it should')
    assert said.strip().splitlines()[-1].startswith('timm-vitres: me/name: could not commit')
    server.faults.clear()
    assert server.files('me/name').keys() == {'.gitattributes'}
    assert "timm.create_model('hf-hub:me/name', pretrained=True)" in run(command, token='token-me')
    run(LOAD, 'hf-hub:me/name', 'out.pt')
    check_equal(model, tmp_path / 'out.pt')


@pytest.mark.parametrize(
    'token, sentence',
    [
        ('token-read', 'the token has no right to do so'),
        ('token-other', 'the token has no right to do so'),
        ('token-unknown', 'the Hub does not know the token'),
    ],
)
def test_who_may_not_push(token, sentence, faulty, folder):
    server, name, call = faulty
    server.put(name, {'README.md': b'# mine\n'})
    error = call(CALL_PUSH.replace(')', f', token={token!r})'), folder[1], name)
    assert error.startswith(f'RuntimeError: {name}: could not ') and sentence in error
    assert server.files(name).keys() == {'.gitattributes', 'README.md'}


def test_who_has_no_token(server, run, tmp_path):
    command = ['-m', 'timm_vitres.cli', 'push', saved(tmp_path)[1], 'me/name', '--yes']
    run(command, fails='me/name: could not create the repository: ')
    assert not (tmp_path / 'hub' / 'me').exists() or not server.repo('me/name').exists()


@pytest.mark.parametrize('status', [403, pytest.param(503, marks=pytest.mark.slow)])  # 503: the client asks for long
def test_a_card_that_can_not_be_read_is_not_written_over(status, faulty, folder):
    """Its licence and its text would be lost; the client says the same of a file that is not there."""
    server, name, call = faulty
    server.put(name, {'README.md': b'---\nlicense: mit\n---\nMy own text.\n'})
    server.fail('status', 'head', status=status, match='README.md', times=1000)
    error = call(CALL_PUSH, folder[1], name)
    server.faults.clear()
    assert error.startswith(f'RuntimeError: {name}: could not read its card: '), error
    assert server.files(name).keys() == {'.gitattributes', 'README.md'}
    assert call(CALL_PUSH, folder[1], name) is None
    card = server.files(name)['README.md'].read_text()
    assert 'My own text.' in card and 'license: mit' in card


def test_weights_of_an_earlier_model_do_not_stay_beside(faulty, folder):
    server, name, call = faulty
    shard = 'model-00001-of-00002.safetensors'
    server.put(name, dict.fromkeys(('pytorch_model.bin', shard, 'mine.bin', 'onnx/model.onnx'), b'old'))
    assert call(CALL_PUSH, folder[1], name) is None
    assert server.files(name).keys() == {
        *('.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'mine.bin', 'onnx/model.onnx')
    }


def test_the_same_weights_in_another_form_stay_beside(server, folder, run):
    """As timm pushes them; and weights of another model do not."""
    files = {name: folder[1] / name for name in ('config.json', 'model.safetensors')}
    server.put('me/name', {**files, 'pytorch_model.bin': b'old'})
    run(PUSH, folder[1], '{}', token='token-me')
    assert 'pytorch_model.bin' in server.files('me/name')
    server.put('me/name', {'model.safetensors': b'others'})
    run(PUSH, folder[1], '{}', token='token-me')
    assert 'pytorch_model.bin' not in server.files('me/name')


def test_a_run_begins_with_the_file_that_it_is_given(server, folder, run, tmp_path):
    server.put('me/x', {name: folder[1] / name for name in ('config.json', 'model.safetensors')})
    start = randomise_(timm.create_model('test_vitresnet', num_classes=3), 5)
    torch.save(start.state_dict(), tmp_path / 'start.pth')
    code = """
import sys, torch
from timm_vitres.training.creation import create_finetune_model
from timm_vitres.training.settings import FinetuneCfg
cfg = FinetuneCfg(data_dir='x', model='hf-hub:me/x', pretrained_path=sys.argv[1])
torch.save(create_finetune_model(cfg, 3).state_dict(), sys.argv[2])
"""
    run(code, tmp_path / 'start.pth', tmp_path / 'out.pt')
    found = torch.load(tmp_path / 'out.pt', weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in start.state_dict().items() if 'head' not in key)


def test_the_size_of_a_table_is_told_by_its_repository(server, run, tmp_path):
    """Weights are named without their config.json, and 64 tokens could be of a square."""
    strips = randomise_(timm.create_model('vitresnet_nano', num_classes=3, img_size=(32, 128)))
    timm_vitres.save(strips, tmp_path / 'strips')
    code = (
        'import timm, timm_vitres, torch\n'
        'from timm_vitres.publishing.hub import push\n'
        'push("strips", "me/strips")\n'
        'overlay = dict(hf_hub_id="me/strips")\n'
        'kwargs = dict(pretrained=True, num_classes=3, img_size=(32, 128), pretrained_cfg_overlay=overlay)\n'
        'model = timm.create_model("vitresnet_nano", **kwargs).eval()\n'
        'own = timm.create_model("local-dir:strips", pretrained=True).eval()\n'
        'x = torch.ones(1, 3, 32, 128)\n'
        'print((model(x) - own(x)).abs().max().item())\n'
    )
    assert float(run(code, token='token-me').splitlines()[-1]) == 0


def test_config_and_weights_are_of_one_commit(server, run, tmp_path):
    """Where the Hub does not answer for one of them, the cache's is taken, and the other must be of its commit."""
    first, folder = saved(tmp_path / 'first')
    files = ('config.json', 'model.safetensors')
    server.put('me/x', {file: folder / file for file in files})
    home = tmp_path / 'home'
    run(LOAD, 'hf-hub:me/x', tmp_path / 'out.pt', home=home)
    second, folder = saved(tmp_path / 'second', seed=1)
    server.put('me/x', {file: folder / file for file in files})
    server.fail('status', 'head', match='config.json', times=100)
    run(LOAD, 'hf-hub:me/x', tmp_path / 'out.pt', home=home)
    check_equal(first, tmp_path / 'out.pt')
    server.faults.clear()
    run(LOAD, 'hf-hub:me/x', tmp_path / 'out.pt', home=home)
    check_equal(second, tmp_path / 'out.pt')


def test_conversion_does_not_do_without_a_config_that_is_there(server, run, tmp_path):
    _, folder = saved(tmp_path)
    server.put('me/x', {file: folder / file for file in ('config.json', 'model.safetensors')})
    code = "import sys, timm_vitres\ntimm_vitres.convert('hf-hub:me/x', sys.argv[1], 'test_vitresnet')"
    server.fail('status', 'head', status=403, match='/config.json', times=100)
    run(code, tmp_path / 'out', fails='config.json')
    assert not (tmp_path / 'out').exists()
    server.faults.clear()
    run(code, tmp_path / 'out')


def test_what_was_of_an_earlier_model_goes_with_it(faulty, folder, tmp_path):
    """Curves of its run, and the preprocessing that transformers would read before ours; files of others stay."""
    server, name, call = faulty
    model, plain = folder
    other = tmp_path / 'run'
    shutil.copytree(plain, other)
    result = EvalResult('image-classification', 'imagefolder', 'x', 'accuracy', 90.0)
    note = 'Measured after epoch 3.'
    card = cards.render_card(model, 'x', 'A.', 'B.', 'local-dir:.', results=[result], result_note=note)
    (other / 'README.md').write_text(card)
    for file in ('curves.png', 'summary.csv'):
        (other / file).write_bytes(b'of a run')
    assert call(CALL_PUSH, other, name) is None
    assert {'curves.png', 'summary.csv'} <= server.files(name).keys()
    assert call(CALL_PUSH, plain, name) is None  # the same weights
    assert {'curves.png', 'summary.csv'} <= server.files(name).keys()
    assert call(CALL_PUSH, saved(tmp_path, seed=1)[1], name) is None
    assert not {'curves.png', 'summary.csv'} & server.files(name).keys()
    theirs = b'---\nlibrary_name: transformers\n---\n# Theirs\n'
    server.put(f'{name}-2', {'README.md': theirs, 'preprocessor_config.json': b'{}', 'curves.png': b'mine'})
    assert call(CALL_PUSH, plain, f'{name}-2') is None
    files = server.files(f'{name}-2').keys()
    assert 'curves.png' in files and 'preprocessor_config.json' not in files


def test_a_card_without_one_has_the_licence_that_came_with_the_weights(faulty, tmp_path):
    """And not the registry's, which every model of the architecture has."""
    server, name, call = faulty
    model, folder = saved(tmp_path)
    assert call(CALL_PUSH, folder, f'{name}-2') is None
    assert ModelCard(server.files(f'{name}-2')['README.md'].read_text()).data.license is None
    model.pretrained_cfg = {**model.pretrained_cfg, 'license': 'cc-by-nc-4.0'}
    timm_vitres.save(model, folder)
    assert call(CALL_PUSH, folder, name) is None
    assert ModelCard(server.files(name)['README.md'].read_text()).data.license == 'cc-by-nc-4.0'


def test_a_card_that_can_not_be_had_tells_no_licence(monkeypatch, tmp_path, caplog):
    def fails(*args, **kwargs):
        raise FileNotFoundError('README.md is not in the cache')

    monkeypatch.setattr(neighbours, 'hub_file', fails)
    assert neighbours.license_beside('hf-hub:me/name', tmp_path / 'model.safetensors') is None
    assert 'me/name: its card was not looked at for a licence' in caplog.text


def test_a_folder_has_names_and_a_card_of_its_own(folder):
    with pytest.raises(ValueError, match=r'^label_names, data_config, card: go with a model; a folder has its own'):
        timm_vitres.push(folder[1], 'me/name', label_names=['a', 'b', 'c'])


def test_nothing_is_asked_offline(folder, monkeypatch):
    monkeypatch.setattr(hub_module.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match='me/name: is not asked for its checksums, since HF_HUB_OFFLINE is set'):
        timm_vitres.verify(f'local-dir:{folder[1]}', repo_id='me/name')


def test_what_arrived_wrong_is_noticed(faulty, folder, tmp_path):
    """The Hub's checksums of the commit are compared with what was sent."""
    _, name, call = faulty
    code = (
        'import sys, timm_vitres\n'
        'from huggingface_hub import HfApi\n'
        'original = HfApi.create_commit\n'
        'def lie(self, repo_id, operations, **kwargs):\n'
        "    operations = [op for op in operations if op.path_in_repo != 'config.json']\n"
        '    return original(self, repo_id, operations, **kwargs)\n'
        'HfApi.create_commit = lie\n'
        'try:\n'
        '    timm_vitres.push(sys.argv[1], sys.argv[2])\n'
        'finally:\n'
        '    HfApi.create_commit = original\n'
    )
    assert f'{name}: config.json on the Hub has the checksum None, not ' in call(code, folder[1], name)


def test_someone_else_commits_meanwhile(faulty, folder, tmp_path):
    """The stale parent is refused by the Hub; what the other wrote into the card is in ours."""
    server, name, call = faulty
    server.put(name, {'README.md': b'---\nlicense: mit\n---\n# mine\n'})
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
        'try:\n'
        '    timm_vitres.push(sys.argv[1], sys.argv[2])\n'
        'finally:\n'
        '    HfApi.create_commit = original\n'
    )
    assert call(code, folder[1], name) is None
    card = ModelCard(server.files(name)['README.md'].read_text())
    assert '# ours' in card.text and '# mine' not in card.text and card.data.license == 'mit'


def test_a_card_that_is_there_is_brought_up_to_date(faulty, folder, tmp_path):
    server, name, call = faulty
    model, _ = folder
    task = dict(task_type='image-classification', dataset_type='imagefolder')
    cells = dict(dataset_name='cells', dataset_config='cells')
    old = ModelCard(
        '---\nlicense: mit\ntags: [solar]\nlanguage: en\nmodel_name: x\n---\n# Solar cells\n\nWritten by hand.\n'
    )
    old.data.model_name = 'x'
    old.data.eval_results = [
        EvalResult(**task, **cells, metric_type='accuracy', metric_value=1.0),
        EvalResult(**task, dataset_name='roofs', dataset_config='roofs', metric_type='accuracy', metric_value=2.0),
    ]
    server.put(name, {'README.md': str(old).encode()})
    facts = dict(model_name='cells', description='A test.', recipe='One epoch.', source='local-dir:.')
    results = [EvalResult(**task, **cells, metric_type='accuracy', metric_value=3.0)]
    card = cards.render_card(model, results=results, **facts)
    folder = timm_vitres.save(model, tmp_path / 'saved', card=card)
    assert call(CALL_PUSH, folder, name) is None
    assert call(CALL_PUSH, folder, name) is None
    new = ModelCard(server.files(name)['README.md'].read_text())
    assert new.data.license == 'mit' and new.data.language == 'en' and new.data.library_name == 'timm'
    assert new.data.tags == ['solar', 'timm', 'timm-vitres', 'image-classification']
    values = {result.dataset_name: result.metric_value for result in new.data.eval_results}
    assert values == {'cells': 3.0, 'roofs': 2.0}
    assert 'Written by hand.' in new.text and new.text.count('One epoch.') == 1 and new.text.count('# cells') == 1


OWN_CARD = (
    "---\r\n# my licence\r\nlicense:   mit  # as always\r\ntags: [solar,  'cells']\r\n\r\nlanguage: en\r\n---\r\n"
    "\r\n\r\n# Mine  \r\n\r\n    model = timm.create_model('local-dir:mine')\r\n\r\n"
    'model_sha256: is told above\r\n\r\n\r\n'
)


def test_the_users_own_text_survives_letter_by_letter(faulty, folder, tmp_path):
    """Head and text, line ends and comments, whether it is the repository's or the folder's; pushed twice and more."""
    server, name, call = faulty
    model, _ = folder
    head, text = OWN_CARD.split('---\r\n', 2)[1:]
    facts = dict(model_name='x', description='A test.', recipe='One epoch.', source='local-dir:.')
    carded = timm_vitres.save(model, tmp_path / 'carded', card=cards.render_card(model, **facts))
    server.put(name, {'README.md': OWN_CARD.encode()})
    for _ in range(2):
        assert call(CALL_PUSH, carded, name) is None
        sent = server.files(name)['README.md'].read_bytes().decode()
        assert text.rstrip() in sent and '# my licence\r\nlicense:   mit  # as always\r\n' in sent
        assert 'language: en\r\n' in sent and sent.count('One epoch.') == 1 and sent.count('# Mine') == 1
        assert ModelCard(sent).data.tags == ['solar', 'cells', 'timm', 'timm-vitres', 'image-classification']
        assert f"create_model('hf-hub:{name}'" in sent
    # a folder's README that is all his own is sent as it is, but for the sha256 in its head, and not twice
    own = timm_vitres.save(model, tmp_path / 'own')
    (own / 'README.md').write_bytes(OWN_CARD.encode())
    for _ in range(2):
        assert call(CALL_PUSH, own, f'{name}-own') is None
        sent = server.files(f'{name}-own')['README.md'].read_bytes().decode()
        assert sent.endswith(f'---\n{text}') and sent.startswith(f'---\n{head}')
    assert (own / 'README.md').read_bytes() == OWN_CARD.encode()


@pytest.mark.parametrize(
    'card, message',
    [
        (b'---\nno: [yaml\n---\n# Mine\n', 'README.md: the head of the card is no valid YAML'),
        (b'---\n- a\n- list\n---\n# Mine\n', 'README.md: the head of the card is not one of a model'),
        (b'---\nlicense: mit\n# Mine, without an end\n', 'README.md: the head of the card has no end'),
        (b'---\nlicense: mit\nmodel-index: 3\n---\n', 'README.md: the head of the card is not one of a model'),
        ('---\nlicense: mit\n---\ncaf\xe9\n'.encode('latin-1'), r'README.md: is no UTF-8 text \(byte 24 is not\)'),
    ],
)
def test_a_broken_card_is_found_before_anything_is_created(card, message, faulty, folder, tmp_path):
    server, name, call = faulty
    broken = timm_vitres.save(folder[0], tmp_path / 'broken')
    (broken / 'README.md').write_bytes(card)
    assert re.search(message, call(CALL_PUSH, broken, f'{name}-new'))
    assert not server.repo(f'{name}-new').exists()
    # one that lies in the repository is named, too, and stays
    server.put(name, {'README.md': card})
    assert re.search('README.md', call(CALL_PUSH, folder[1], name))
    assert server.files(name)['README.md'].read_bytes() == card


def test_a_card_with_a_byte_order_mark_is_pushed(faulty, folder, tmp_path):
    server, name, call = faulty
    marked = timm_vitres.save(folder[0], tmp_path / 'marked')
    (marked / 'README.md').write_bytes(b'\xef\xbb\xbf---\nlicense: mit\n---\n# Mine\n')
    assert call(CALL_PUSH, marked, name) is None
    sent = server.files(name)['README.md'].read_text()
    assert ModelCard(sent).data.license == 'mit' and sent.endswith('# Mine\n')


def test_a_dry_run_sends_nothing(folder, capsys, monkeypatch):
    _, folder = folder
    monkeypatch.setattr(hub_module.HfApi, '__init__', None)
    assert main(['push', str(folder), 'me/name']) == 0
    out = capsys.readouterr().out
    assert 'Nothing was sent; repeat with --yes' in out and checksums.sha256(folder / 'model.safetensors') in out


@pytest.mark.parametrize('name', ['curves.png', 'README.md', 'summary.csv'])
def test_no_link_leads_out_of_a_pushed_folder(name, tmp_path):
    """A folder that came from somebody could name any file of this machine."""
    _, folder = saved(tmp_path)
    (tmp_path / 'secret').write_text('# secret')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / 'secret')
    with pytest.raises(ValueError, match=rf'{re.escape(name)}: is a link to .*secret, outside of the folder'):
        hub_module.push_files(folder)
    (folder / name).unlink()
    blob = folder / 'blobs' / ('0' * 64)  # called as in the Hub's cache
    blob.parent.mkdir()
    blob.symlink_to(tmp_path / 'secret')
    (folder / name).symlink_to(f'blobs/{blob.name}')
    with pytest.raises(ValueError, match='outside of the folder'):
        hub_module.push_files(folder)
    (folder / name).unlink()
    (folder / 'own').write_text('# own')
    (folder / name).symlink_to('own')
    (tmp_path / 'link').symlink_to(folder)
    assert tmp_path / 'link' / name in hub_module.push_files(tmp_path / 'link')


def test_what_lies_in_the_hubs_cache_is_pushed(tmp_path):
    _, folder = saved(tmp_path)
    snapshot, blobs = tmp_path / 'models--me--name' / 'snapshots' / '1', tmp_path / 'models--me--name' / 'blobs'
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, name in enumerate(('model.safetensors', 'config.json')):
        shutil.copy(folder / name, blobs / str(index))
        (snapshot / name).symlink_to(f'../../blobs/{index}')
    assert len(hub_module.push_files(snapshot)) == 2


def test_what_does_not_load_is_not_pushed(tmp_path, monkeypatch):
    _, folder = saved(tmp_path)
    monkeypatch.setattr(hub_module.HfApi, '__init__', None)  # nobody is asked
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r'is not pushed, since it does not load: .* is damaged or incomplete'):
        timm_vitres.push(folder, 'me/name')
    (folder / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match=r'has no model\.safetensors'):
        timm_vitres.push(folder, 'me/name')


@RECENT
def test_the_command_line_when_connections_break(faulty, folder):
    """Also where timm asks, for config.json."""
    server, name, call = faulty
    server.put(name, {file: folder[1] / file for file in ('config.json', 'model.safetensors')})
    code = (
        'import contextlib, io, sys\n'
        'from timm_vitres.cli import main\n'
        'with contextlib.redirect_stderr(io.StringIO()) as said:\n'
        "    status = main([*sys.argv[1:3], *(['--model', sys.argv[2]] if sys.argv[1] == 'predict' else [])])\n"
        'raise SystemExit(f"{status} {said.getvalue()}")\n'
    )
    for command in ('verify', 'predict'):
        server.fail('drop', 'head', times=100)
        error = call(code, command, f'hf-hub:{name}')
        server.faults.clear()
        assert error.startswith('SystemExit: 1 timm-vitres: ') and 'the Hub does not answer as it should (' in error


PULLED = [
    # a fault of HUB.md, and whether it is made good
    ('status', 'get', dict(match='model.safetensors'), True),
    ('drop', 'get', dict(match='model.safetensors'), True),
    ('cut', 'get', dict(match='model.safetensors'), True),
    pytest.param('status', 'head', dict(match='model.safetensors'), True, marks=RECENT),
    pytest.param('drop', 'head', dict(match='model.safetensors'), True, marks=RECENT),
    ('flip', 'get', dict(match='model.safetensors'), 'is damaged, or was changed after it was published'),
    ('short', 'get', dict(match='model.safetensors', times=9), 'Consistency check failed'),
    ('status', 'get', dict(match='model.safetensors', times=99), '503'),
    ('drop', 'head', dict(match='model.safetensors', times=99), 'disconnected'),
]


@pytest.mark.parametrize('kind, step, options, outcome', PULLED)
def test_faults_while_pulling(kind, step, options, outcome, faulty, folder, tmp_path):
    """After each, either the model is right, or there is none; and the next run gets it."""
    server, name, call = faulty
    model, folder = folder
    server.put(name, {file: folder / file for file in ('config.json', 'model.safetensors')})
    server.fail(kind, step, **options)
    arguments = LOAD, f'hf-hub:{name}', tmp_path / 'out.pt'
    error = call(*arguments)
    if outcome is not True:
        assert outcome in error
        assert not (tmp_path / 'out.pt').exists()
        if kind == 'flip':  # which the client cached, so it has to be removed, as the message says
            assert 'Remove it and load again' in call(*arguments)
            blob = Path(re.search(r'OSError: (\S*) is damaged', error)[1])
            assert blob.name == checksums.sha256(folder / 'model.safetensors')
            blob.unlink()
        server.faults.clear()
        error = call(*arguments)
    assert error is None and not server.faults
    check_equal(model, tmp_path / 'out.pt')


VERIFY = """
import sys, timm_vitres
print(found := timm_vitres.verify(sys.argv[1], sys.argv[2] or None))
assert found.published_by == (sys.argv[3] or None), found
"""


def test_verify(faulty, folder, tmp_path):
    server, name, call = faulty
    model, folder = folder
    names = ('config.json', 'model.safetensors')
    server.put(name, {file: folder / file for file in names})
    assert call(VERIFY, f'hf-hub:{name}', '', 'the Hub') is None
    server.fail('status', 'paths-info', times=4)
    assert call(VERIFY, f'hf-hub:{name}', '', 'the cache') is None
    # a folder says it of itself, and one of another program is compared with a repository
    assert call(VERIFY, f'local-dir:{folder}', '', 'its folder') is None
    assert call(VERIFY, f'local-dir:{untold(folder, tmp_path)}', '', '') is None
    assert call(VERIFY, f'local-dir:{folder}', name, 'the Hub') is None
    _, other = saved(tmp_path, seed=1)
    assert 'it is damaged, or another version' in call(VERIFY, other, name, '')
    assert 'there is no such repository' in call(VERIFY, other, 'me/none', '')
    assert 'Invalid pretrained tag' in call(VERIFY, 'vitresnet_small.nonsense', '', '')
    # every shard is compared, too
    sharded = shards_of(model, tmp_path / 'sharded')
    server.put(f'{name}-sharded', {path.name: path for path in sharded.iterdir()})
    assert call(VERIFY, f'local-dir:{sharded}', f'{name}-sharded', 'the Hub') is None
    (shard,) = sharded.glob('*-of-*')
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    error = call(VERIFY, f'local-dir:{sharded}', f'{name}-sharded', '')
    assert f'{shard}: its checksum is' in error and 'it is damaged, or another version' in error
    # a newer commit does not make the cached version wrong
    server.put(name, {file: other / file for file in names})
    cached = f'hf-hub:{name}@{server.history(name)[1]}'
    assert call(VERIFY, cached, '', 'the Hub') is None
    blob = find_blob(call, cached, tmp_path)
    data = bytearray(blob.read_bytes())
    data[-100] ^= 1
    blob.write_bytes(data)
    assert 'is damaged' in call(VERIFY, cached, '', '')


def shards_of(model, folder):
    """Save a model as transformers does, in a shard (of one) and an index of it."""
    timm_vitres.save(model, folder)
    shard = 'model-00001-of-00001.safetensors'
    (folder / 'model.safetensors').rename(folder / shard)
    index = dict(metadata={}, weight_map=dict.fromkeys(model.state_dict(), shard))
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    config = json.loads((folder / 'config.json').read_text())
    del config['model_sha256']
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def untold(folder, tmp_path):
    """Return a copy of a folder as other programs write it: its config.json tells no sha256."""
    copied = shutil.copytree(folder, tmp_path / 'untold')
    config = json.loads((copied / 'config.json').read_text())
    del config['model_sha256']
    (copied / 'config.json').write_text(json.dumps(config))
    return copied


def find_blob(call, name, tmp_path):
    code = 'import sys, timm_vitres\nopen(sys.argv[2], "w").write(str(timm_vitres.verify(sys.argv[1]).file.resolve()))'
    assert call(code, name, tmp_path / 'file') is None
    return Path((tmp_path / 'file').read_text())


def test_verify_on_the_command_line(server, run, tmp_path):
    """One name after the other; a folder's own sha256 counts, too."""
    model, folder = saved(tmp_path)
    server.put('me/name', {file: folder / file for file in ('config.json', 'model.safetensors')})
    facts = dict(model_name='x', description='A test.', recipe='None.', source='local-dir:.')
    carded = timm_vitres.save(model, tmp_path / 'carded', card=cards.render_card(model, **facts))
    command = ['-m', 'timm_vitres.cli', 'verify']
    out = run(command, 'hf-hub:me/name', f'local-dir:{carded}')
    assert out.count(f'sha256 {checksums.sha256(folder / "model.safetensors")}') == 2
    assert 'says the Hub.' in out and 'says its folder.' in out
    other = f'local-dir:{untold(folder, tmp_path)}'
    run(command, 'hf-hub:me/name', other, fails='nobody says what it should be')
    weights = tmp_path / 'other-name.safetensors'
    shutil.copy(folder / 'model.safetensors', weights)
    run(command, '--repo', 'me/name', weights, fails='me/name has no other-name.safetensors to compare it with')
