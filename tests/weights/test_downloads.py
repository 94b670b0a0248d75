"""A file is downloaded once, asked for again where that may help, and never left incomplete."""

import hashlib
import http.server
import threading
from types import SimpleNamespace
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import flip, randomise_
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from timm_vitres.weights import checksums, downloads
from timm_vitres.weights.files import is_whole


def test_a_url_is_downloaded_once(tmp_path):
    model = randomise_(timm.create_model('test_vitresnet', num_classes=3))
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    digest = checksums.sha256(tmp_path / 'weights.pth')
    (tmp_path / 'weights.pth').rename(tmp_path / f'weights-{digest}.pth')
    overlay = dict(url=f'file://{tmp_path}/weights-{digest}.pth', num_classes=3)
    options = dict(pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
    loaded = timm.create_model('test_vitresnet', **options)
    assert torch.equal(loaded.head.weight, model.head.weight)
    (tmp_path / f'weights-{digest}.pth').unlink()
    timm.create_model('test_vitresnet', **options)
    flip(tmp_path / 'cache' / f'weights-{digest}.pth', offset=5000)
    with pytest.raises(OSError, match='its sha256 is'):
        timm.create_model('test_vitresnet', **options)


def test_secrets_of_an_address_are_not_told(tmp_path):
    url = f'file://user:pass@/{tmp_path}/none.pth?signature=SECRET#part'
    with pytest.raises(OSError, match=r'^file://.*/none\.pth: could not be downloaded') as error:
        downloads.url_file(url, tmp_path)
    url = 'https://user:pass@host.org:8080/a.pth?signature=SECRET'
    assert downloads.without_secrets(url) == 'https://host.org:8080/a.pth'
    assert not any(secret in str(error.value) for secret in ('pass@', 'SECRET'))


def test_a_download_that_fails_is_one_sentence_and_leaves_nothing(tmp_path):
    cache = tmp_path / 'cache'
    (tmp_path / 'weights-0a1b2c3d.pth').write_bytes(b'half of it')
    for name, message in (
        ('weights-0a1b2c3d.pth', 'is not what the name says'),
        ('none.pth', 'could not be downloaded'),
    ):
        with pytest.raises(OSError, match=message):
            downloads.url_file(f'file://{tmp_path}/{name}', cache)
    assert not list(cache.iterdir())


@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors', 'a.npz'])
def test_what_ended_too_early_is_not_kept(name, tmp_path, monkeypatch):
    """A connection may end without an error, and the half of a file would stay in the cache for ever."""
    path, cache = tmp_path / name, tmp_path / 'cache'
    tensors = dict(a=torch.arange(300), b=torch.arange(300.0))
    torch.save(tensors, tmp_path / 'a.pth')
    safetensors.torch.save_file(tensors, tmp_path / 'a.safetensors')
    np.savez(tmp_path / 'a.npz', **{key: value.numpy() for key, value in tensors.items()})
    whole = path.read_bytes()
    waits = []
    monkeypatch.setattr(downloads.time, 'sleep', waits.append)
    for length in (len(whole) - 1, len(whole) // 2, 100):
        path.write_bytes(whole[:length])
        with pytest.raises(OSError, match=r'could not be downloaded \(it ended too early\)'):
            downloads.url_file(f'file://{path}', cache)
        assert not list(cache.iterdir()) and len(waits) == 3  # it may pass
        waits.clear()
    path.write_bytes(whole)
    assert downloads.url_file(f'file://{path}', cache).read_bytes() == whole


@pytest.mark.parametrize('faults', [2, 9])
def test_a_server_that_fails_is_asked_again(faults, tmp_path, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self):
            Handler.asked += 1
            self.send_response(503 if Handler.asked <= faults else 200)
            self.end_headers()
            self.wfile.write(b'weights')

        def log_message(self, *args):
            pass

    monkeypatch.setattr(downloads.time, 'sleep', lambda seconds: None)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/weights.pth'
        if faults == 2:
            assert downloads.url_file(url, tmp_path).read_bytes() == b'weights'
        else:
            with pytest.raises(OSError, match=r'could not be downloaded .*503'):
                downloads.url_file(url, tmp_path)
        server.shutdown()
    assert Handler.asked == min(faults + 1, 4)


def hub_error(status, kind=HfHubHTTPError):
    """Return an error of the Hub's client for a status of the server; None means that there was no answer."""
    error = kind.__new__(kind)
    Exception.__init__(error, f'status {status}')
    error.response = None if status is None else SimpleNamespace(status_code=status)
    return error


class ReadTimeout(Exception):
    """An error like those of the HTTP library that huggingface_hub uses."""

    __module__ = 'httpx'


@pytest.mark.parametrize(
    'error, helps',
    [
        (hub_error(503), True),
        (hub_error(500), True),
        (hub_error(429), True),
        (hub_error(None), True),
        (hub_error(404), False),
        (hub_error(401), False),
        (hub_error(503, LocalEntryNotFoundError), False),  # the client has tried long enough itself
        (HTTPError('http://x', 502, 'Bad Gateway', {}, None), True),
        (HTTPError('http://x', 429, 'Too Many Requests', {}, None), True),
        (HTTPError('http://x', 404, 'Not Found', {}, None), False),
        (URLError(ConnectionResetError()), True),
        (URLError(TimeoutError()), True),
        (URLError('unknown url type'), False),
        (ConnectionError(), True),
        (TimeoutError(), True),
        (ReadTimeout(), True),
        (OSError(28, 'No space left on device'), False),
        (ValueError(), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_that_may_pass(error, helps):
    assert downloads.is_transient(error) is helps


@pytest.fixture
def clock(monkeypatch):
    """A list of the seconds that were slept; time passes only by them, and nobody really sleeps."""
    waited = []
    monkeypatch.setattr(downloads.time, 'sleep', waited.append)
    monkeypatch.setattr(downloads.time, 'monotonic', lambda: sum(waited))
    return waited


def failing(*errors):
    """Return a function that raises one error after the other, and then returns 'done'."""
    left = list(errors)

    def function():
        if left:
            raise left.pop(0)
        return 'done'

    return function


def test_it_is_tried_again_after_longer_and_longer_waits(clock):
    assert downloads.retrying(failing()) == 'done' and clock == []
    assert downloads.retrying(failing(*[ConnectionError()] * 3)) == 'done' and clock == [1, 2, 4]
    clock.clear()
    with pytest.raises(ConnectionError, match='fourth'):
        downloads.retrying(failing(*[ConnectionError('first')] * 3, ConnectionError('fourth')))
    assert clock == [1, 2, 4]
    clock.clear()
    with pytest.raises(ConnectionError, match='second'):
        downloads.retrying(failing(ConnectionError('first'), ConnectionError('second')), tries=2, wait=0.5)
    assert clock == [0.5]


def test_what_can_not_pass_is_not_tried_again(clock):
    with pytest.raises(ValueError, match='mistake'):
        downloads.retrying(failing(ValueError('mistake'), ConnectionError()))
    assert clock == []


def test_what_the_client_tried_for_long_is_not_tried_again(clock):
    def slow():
        clock.append(11)
        raise ConnectionError('gone')

    with pytest.raises(ConnectionError, match='gone'):
        downloads.retrying(slow)
    assert clock == [11]


@pytest.fixture
def hub(monkeypatch, tmp_path, clock):
    """A dict of answers by file name, and a list of the questions that a repository was asked."""
    answers, asked = {}, []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options['revision'], options.get('local_files_only', False)))
        answer = answers.get(filename, hub_error(404, EntryNotFoundError))
        if isinstance(answer, Exception):
            raise answer
        return str(tmp_path / answer)

    monkeypatch.setattr(downloads, 'hf_hub_download', download)
    return answers, asked


def test_the_first_file_that_a_repository_has(hub, tmp_path):
    answers, asked = hub
    answers.update({'b.bin': 'second', 'c.bin': 'third'})
    assert downloads.hub_file('me/name@better', ('a.bin', 'b.bin', 'c.bin')) == tmp_path / 'second'
    assert asked == [('me/name', 'a.bin', 'better', False), ('me/name', 'b.bin', 'better', False)]
    asked.clear()
    with pytest.raises(FileNotFoundError, match=r'^me/name: the repository has no a\.bin or d\.bin\.$'):
        downloads.hub_file('me/name', ('a.bin', 'd.bin'))
    assert asked == [('me/name', 'a.bin', None, False), ('me/name', 'd.bin', None, False)]


def test_what_a_commit_is_known_to_lack_is_not_there_offline_either(hub, monkeypatch):
    answers, _ = hub
    answers.update(dict.fromkeys(('a.json', 'b.json'), hub_error('none', LocalEntryNotFoundError)))
    known = {'a.json': downloads._CACHED_NO_EXIST}
    monkeypatch.setattr(downloads, 'try_to_load_from_cache', lambda repo, name, **options: known.get(name))
    with pytest.raises(downloads.NotInRepository):
        downloads.hub_file('me/name', ('a.json',))
    with pytest.raises(FileNotFoundError, match=r'the Hub can not be reached') as caught:
        downloads.hub_file('me/name', ('b.json',))
    assert not isinstance(caught.value, downloads.NotInRepository)


def test_what_is_no_safetensors_is_whole(tmp_path):
    for content in (b'12345678{', b'\xff' * 8 + b'{', b'\x02' + bytes(7) + b'{}', b'\x04' + bytes(7) + b'{"a"', b''):
        (tmp_path / 'file').write_bytes(content)
        assert is_whole(tmp_path / 'file')


def test_a_hub_that_can_not_be_reached_is_waited_for_once(hub, tmp_path):
    answers, asked = hub
    answers['a.bin'] = hub_error('none', LocalEntryNotFoundError)
    message = r'^me/name: a\.bin or b\.bin is not in the cache, and the Hub can not be reached \(status none\)'
    with pytest.raises(FileNotFoundError, match=message):
        downloads.hub_file('me/name', ('a.bin', 'b.bin'))
    assert [local for *_, local in asked] == [False, True]
    answers['b.bin'] = 'cached'
    assert downloads.hub_file('me/name', ('a.bin', 'b.bin')) == tmp_path / 'cached'


def test_what_the_hub_refuses_is_passed_on_and_what_breaks_is_named(hub, clock):
    answers, asked = hub
    answers['a.bin'] = hub_error(401)
    with pytest.raises(HfHubHTTPError, match='status 401'):
        downloads.hub_file('me/name', ('a.bin', 'b.bin'))
    assert len(asked) == 1 and clock == []
    answers['a.bin'] = ReadTimeout('gone')
    with pytest.raises(ConnectionError, match=r'^me/name: the Hub does not answer as it should \(gone\); try again'):
        downloads.hub_file('me/name', ('a.bin', 'b.bin'))
    assert len(asked) == 1 + 4 and clock == [1, 2, 4]


def test_addresses_that_differ_anywhere_are_other_files(tmp_path):
    """Files of one name in two folders, and one whose name holds its hash, which may lie anywhere."""
    for place in 'ab':
        (tmp_path / place).mkdir()
        (tmp_path / place / 'model.pth').write_bytes(place.encode())
    found = [downloads.url_file(f'file://{tmp_path}/{place}/model.pth', tmp_path / 'cache') for place in 'aba']
    assert [path.read_bytes() for path in found] == [b'a', b'b', b'a'] and found[0] == found[2]
    name = f'model-{hashlib.sha256(b"a").hexdigest()[:8]}.pth'
    (tmp_path / 'a' / name).write_bytes(b'a')
    assert downloads.url_file(f'file://{tmp_path}/a/{name}', tmp_path / 'cache') == tmp_path / 'cache' / name
