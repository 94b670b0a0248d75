"""A Hugging Face Hub on the loopback address, so that pushing and pulling are tested with the unmodified client.

client -> HubServer (repos on disk, users, faults on demand) -> client; see `HubServer` for how a test uses it.
"""

import base64
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

READ_TOKEN = 'token-read'  # of the user 'me': may read what 'me' may, writes nothing
LFS_SUFFIXES = ('.safetensors', '.bin', '.png')
LFS_BYTES = 1_000_000  # a file above this is LFS whatever its name
GIT_ATTRIBUTES = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES).encode()
CHUNK = 1 << 20
KINDS = ('status', 'drop', 'drop-after', 'cut', 'stall', 'flip', 'short')

REPO, REV = r'(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*?)', r'(?P<rev>[^/]+)'
# what the client asks for: method, path, the step's name, which is that of the method of `Handler` that answers it
ROUTES = [
    (method, re.compile(path), step)
    for method, path, step in (
        ('GET', '/api/agent-harnesses', 'agents'),
        ('GET', '/api/whoami-v2', 'whoami'),
        ('POST', '/api/repos/create', 'create'),
        ('POST', '/api/validate-yaml', 'validate-yaml'),
        ('GET', f'/api/models/{REPO}(/revision/{REV})?', 'info'),
        ('GET', f'/api/models/{REPO}/tree/{REV}(/(?P<path>.+))?', 'tree'),
        ('POST', f'/api/models/{REPO}/paths-info/{REV}', 'paths-info'),
        ('GET', f'/api/models/{REPO}/refs', 'refs'),
        ('GET', f'/api/models/{REPO}/commits/{REV}', 'commits'),
        ('POST', f'/api/models/{REPO}/branch/{REV}', 'branch'),
        ('POST', f'/api/models/{REPO}/preupload/{REV}', 'preupload'),
        ('POST', f'/api/models/{REPO}/commit/{REV}', 'commit'),
        ('POST', rf'/{REPO}\.git/info/lfs/objects/batch', 'lfs-batch'),
        ('POST', rf'/{REPO}\.git/info/lfs/verify', 'lfs-verify'),
        ('PUT', f'/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})', 'lfs-put'),
        ('GET', f'/storage/{REPO}/(?P<oid>[0-9a-f]{{64}})', 'get'),
        ('GET', f'/{REPO}/resolve/{REV}/(?P<path>.+)', 'get'),
        ('HEAD', f'/{REPO}/resolve/{REV}/(?P<path>.+)', 'head'),
    )
]
STEPS = tuple(dict.fromkeys(step for _, _, step in ROUTES))


class HubError(Exception):
    """An answer that is an error; `code` is the X-Error-Code that the client makes its exception of."""

    def __init__(self, status: int, message: str, code: str = '', headers: dict[str, str] | None = None, **body: Any):
        self.body = {'error': message, **body}
        self.status, self.headers = status, {'X-Error-Message': ascii(message)[1:-1], **(headers or {})}
        if code:
            self.headers['X-Error-Code'] = code


class Answer(NamedTuple):
    """What a step answers; a body that is a path is a file, which may be asked for in part."""

    body: Any
    headers: dict[str, str] = {}
    status: int = 200


@dataclass
class Fault:
    """What `HubServer.fail` ordered; `times` counts down to 0."""

    kind: str
    step: str
    times: int = 1
    match: str = ''
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    at: int | None = None


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES


def git_id(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


class Repo:
    """A repo on disk: repo.json (private, branches), commits/<id>.json, blobs/<git id>, lfs/<sha256>."""

    def __init__(self, folder: Path):
        self.folder = folder

    def exists(self) -> bool:
        return (self.folder / 'repo.json').is_file()

    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / 'repo.json').read_text())

    def save_state(self, **changes: Any) -> None:
        """Replace repo.json at once: a reader, or a server killed here, sees all of the change or nothing."""
        state = {**(self.state() if self.exists() else {}), **changes}
        (self.folder / 'new.json').write_text(json.dumps(state))
        os.replace(self.folder / 'new.json', self.folder / 'repo.json')

    def create(self, private: bool, author: str) -> None:
        for name in ('commits', 'blobs', 'lfs'):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.save_state(private=private, branches={'main': None})
        self.commit('main', {'.gitattributes': self.store(GIT_ATTRIBUTES)}, 'initial commit', '', author)

    def resolve(self, revision: str) -> str:
        """Return the id of the commit that a branch's name, or a commit's id, stands for."""
        commit_id = self.state()['branches'].get(revision) or revision
        if not re.fullmatch('[0-9a-f]{40}', commit_id) or not (self.folder / f'commits/{commit_id}.json').is_file():
            raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit_id

    def read_commit(self, commit_id: str) -> dict[str, Any]:
        return json.loads((self.folder / f'commits/{commit_id}.json').read_text())

    def tree(self, revision: str) -> dict[str, dict[str, Any]]:
        return self.read_commit(self.resolve(revision))['files']

    def history(self, revision: str) -> list[dict[str, Any]]:
        """Return the commits that led to a revision, the newest first."""
        commits, commit_id = [], self.resolve(revision)
        while commit_id:
            commits.append({'id': commit_id, **self.read_commit(commit_id)})
            commit_id = commits[-1]['parent']
        return commits

    def content(self, entry: dict[str, Any]) -> Path:
        return self.folder / (f'lfs/{entry["sha256"]}' if 'sha256' in entry else f'blobs/{entry["oid"]}')

    def store(self, data: bytes) -> dict[str, Any]:
        """Store a regular file and return its entry in a commit."""
        entry = {'oid': git_id(data), 'size': len(data)}
        if not self.content(entry).exists():  # it may be being read just now
            self.content(entry).write_bytes(data)
        return entry

    def lfs_entry(self, sha256: str) -> dict[str, Any] | None:
        """Return the entry in a commit of an LFS file, None where it was never uploaded."""
        path = self.folder / 'lfs' / sha256
        if not path.is_file():
            return None
        size = path.stat().st_size
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n'.encode()
        return {'oid': git_id(pointer), 'size': size, 'sha256': sha256, 'pointerSize': len(pointer)}

    def store_lfs(self, file: BinaryIO, length: int, expected: str | None = None) -> dict[str, Any] | None:
        """Store `length` bytes as an LFS file, only if all of them came and are what their sha256 says."""
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as new:
            while length and (chunk := file.read(min(length, CHUNK))):
                digest.update(chunk)
                new.write(chunk)
                length -= len(chunk)
        if length or expected not in (None, digest.hexdigest()):
            os.unlink(new.name)
            return None
        os.replace(new.name, self.folder / 'lfs' / digest.hexdigest())
        return self.lfs_entry(digest.hexdigest())

    def commit(self, branch: str, changes: dict[str, Any], title: str, message: str, author: str) -> str:
        """Move a branch on by a commit; an entry that is None removes its file. The branch moves last, at once."""
        branches = self.state()['branches']
        parent = branches[branch]
        files = {**(self.tree(parent) if parent else {}), **changes}
        date = datetime.now(timezone.utc).strftime('%Y-%m-%dT%H:%M:%S.%fZ')
        commit = dict(parent=parent, title=title, message=message, authors=[{'user': author}], date=date)
        text = json.dumps({**commit, 'files': {path: files[path] for path in sorted(files) if files[path]}})
        commit_id = hashlib.sha1(text.encode()).hexdigest()
        (self.folder / f'commits/{commit_id}.json').write_text(text)
        self.save_state(branches={**branches, branch: commit_id})
        return commit_id


def path_infos(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what the API says of each file and folder of a commit, by path."""
    folders = {str(parent) for path in files for parent in Path(path).parents} - {'.'}
    infos = {path: {'type': 'directory', 'path': path, 'oid': git_id(path.encode()), 'size': 0} for path in folders}
    for path, entry in files.items():
        infos[path] = {'type': 'file', 'path': path, 'oid': entry['oid'], 'size': entry['size']}
        if 'sha256' in entry:
            infos[path]['lfs'] = {'oid': entry['sha256'], 'size': entry['size'], 'pointerSize': entry['pointerSize']}
    return dict(sorted(infos.items()))


class Handler(BaseHTTPRequestHandler):
    """One connection. `handle_one` finds the step and its fault; a step's method returns an Answer or raises."""

    hub: 'HubServer'
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's ACK of its headers

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        if self.hub.closed.is_set():  # a connection kept alive must not outlive its server
            self.close_connection = True
            return
        matches = ((pattern.fullmatch(url.path), step) for method, pattern, step in ROUTES if method == self.command)
        match, self.step = next(((match, step) for match, step in matches if match), (None, ''))
        if self.step != 'agents':
            self.hub.requests.append((self.command, url.path))
        self.fault = self.hub.take(self.step, unquote(self.path))
        self.kind = self.fault.kind if self.fault else ''
        self.query = parse_qs(url.query)
        self.length = int(self.headers.get('Content-Length', 0))
        if self.step == 'lfs-put' and self.kind in ('cut', 'stall'):
            self.rfile.read(self.length // 2)
            if self.kind == 'stall':
                self.hub.closed.wait()
            self.close_connection = True
            return
        # all that was sent is read before anything is answered: else the client meets a reset, not the answer
        carried_out = self.kind not in ('status', 'drop')
        self.body = b'' if self.step == 'lfs-put' and carried_out else self.rfile.read(self.length)
        if self.kind == 'drop':
            self.close_connection = True
            return
        try:
            if self.fault and self.kind == 'status':
                raise HubError(self.fault.status, 'a fault on demand', headers=self.fault.headers)
            if not match:
                raise HubError(404, f'tests/hub_server.py does not know {self.command} {self.path}')
            arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            answer = getattr(self, self.step.replace('-', '_'))(**arguments)
        except HubError as error:
            answer = Answer(error.body, error.headers, error.status)
        if self.kind == 'drop-after':
            self.close_connection = True
            return
        self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the client's log, and `HubServer.requests`, tell what a test needs."""

    def send(self, answer: Answer) -> None:
        body, headers, status = answer
        if isinstance(body, Path):
            size, start, end = body.stat().st_size, 0, body.stat().st_size
            headers = {'Content-Type': 'application/octet-stream', 'Accept-Ranges': 'bytes', **headers}
            if asked := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
                start, end = int(asked[1]), min(size, int(asked[2]) + 1) if asked[2] else size
                status = 206 if start < end else 416
                headers['Content-Range'] = f'bytes {start}-{end - 1}/{size}' if status == 206 else f'bytes */{size}'
                end = max(start, end)
            file: BinaryIO = body.open('rb')
        else:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {'Content-Type': 'application/json', **headers}
            file, start, end = io.BytesIO(data), 0, len(data)
        if self.kind == 'short':
            end = start + (end - start) // 2
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': str(end - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.kind in ('cut', 'stall'):
            self.close_connection = True
            end = start + (end - start) // 2
        middle = (start + end) // 2
        flip = (self.fault.at if self.fault.at is not None else middle) if self.fault and self.kind == 'flip' else -1
        with file:
            file.seek(start)
            while self.command != 'HEAD' and (chunk := file.read(min(CHUNK, end - start))):
                if start <= flip < start + len(chunk):
                    chunk = bytearray(chunk)
                    chunk[flip - start] ^= 1
                self.wfile.write(chunk)
                start += len(chunk)
        if self.kind == 'stall':
            self.hub.closed.wait()

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def user(self) -> tuple[str | None, bool]:
        """Return who asks, None if anybody, and whether the token may write."""
        header = self.headers.get('Authorization')
        if header is None:
            return None, False
        token = header.removeprefix('Bearer ')
        if token not in self.hub.tokens:
            raise HubError(401, 'Invalid credentials in Authorization header')
        return self.hub.tokens[token], token != READ_TOKEN

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        """Return a repo that the user may read, or write; a private one does not exist for others."""
        (user, may_write), repo, owner = self.user(), self.hub.repo(repo_id), repo_id.split('/')[0]
        if not repo.exists() or (repo.state()['private'] and user != owner):
            raise HubError(404 if user else 401, 'Repository not found', 'RepoNotFound')
        if write and user is None:
            raise HubError(401, 'Invalid username or password.', 'RepoNotFound')
        if write and (user != owner or not may_write):
            raise HubError(403, f'You are not allowed to write to {repo_id}')
        return repo

    def agents(self) -> Answer:
        return Answer({'standardEnvVars': [], 'harnesses': {}})

    def whoami(self) -> Answer:
        user, may_write = self.user()
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        role = {'accessToken': {'displayName': 'test', 'role': 'write' if may_write else 'read'}}
        return Answer({'type': 'user', 'name': user, 'fullname': user, 'orgs': [], 'auth': role})

    def create(self) -> Answer:
        asked, (user, may_write) = self.json(), self.user()
        if user is None:
            raise HubError(401, 'Invalid username or password.')
        owner, name = asked.get('organization') or user, asked['name']
        if owner != user or not may_write:
            raise HubError(403, f'You do not have the rights to create a model under the namespace {owner}')
        if asked.get('type', 'model') != 'model':
            raise HubError(501, 'tests/hub_server.py stores models only')
        url = {'url': f'{self.hub.url}/{owner}/{name}'}
        with self.hub.lock:
            if self.hub.repo(f'{owner}/{name}').exists():
                raise HubError(409, 'You already created this model repo', **url)
            private = asked.get('visibility') == 'private' or bool(asked.get('private'))
            self.hub.repo(f'{owner}/{name}').create(private, user)
        return Answer(url)

    def validate_yaml(self) -> Answer:
        return Answer({'errors': [], 'warnings': []})

    def info(self, repo: str, rev: str = 'main') -> Answer:
        stored = self.repo(repo)
        commit_id = stored.resolve(rev)
        siblings: list[dict[str, Any]] = []
        for path, entry in stored.tree(commit_id).items():
            siblings.append({'rfilename': path})
            if 'blobs' in self.query:
                siblings[-1].update(size=entry['size'], blobId=entry['oid'])
                if 'sha256' in entry:
                    siblings[-1]['lfs'] = {name: entry[name] for name in ('sha256', 'size', 'pointerSize')}
        info = {'sha': commit_id, 'private': stored.state()['private'], 'author': repo.split('/')[0]}
        info.update(siblings=siblings, lastModified=stored.read_commit(commit_id)['date'], tags=[], gated=False)
        if 'expand' in self.query:
            info = {name: value for name, value in info.items() if name in self.query['expand']}
        return Answer({'_id': repo, 'id': repo, 'modelId': repo, **info})

    def tree(self, repo: str, rev: str, path: str = '') -> Answer:
        prefix = f'{path}/' if path else ''
        listed = [info for name, info in path_infos(self.repo(repo).tree(rev)).items() if name.startswith(prefix)]
        if path and not listed:
            raise HubError(404, f'{path} does not exist on "{rev}"', 'EntryNotFound')
        if self.query.get('recursive', ['false'])[0].lower() != 'true':
            listed = [info for info in listed if '/' not in info['path'][len(prefix) :]]
        return Answer(listed)

    def paths_info(self, repo: str, rev: str) -> Answer:
        infos = path_infos(self.repo(repo).tree(rev))
        paths = parse_qs(self.body.decode()).get('paths', [])  # a form, not JSON
        return Answer([infos[path] for path in paths if path in infos])

    def refs(self, repo: str) -> Answer:
        branches = self.repo(repo).state()['branches'].items()
        listed = [{'name': name, 'ref': f'refs/heads/{name}', 'targetCommit': commit} for name, commit in branches]
        return Answer({'branches': listed, 'converts': [], 'tags': [], 'pullRequests': []})

    def commits(self, repo: str, rev: str) -> Answer:
        names = ('id', 'title', 'message', 'authors', 'date')
        return Answer([{name: commit[name] for name in names} for commit in self.repo(repo).history(rev)])

    def branch(self, repo: str, rev: str) -> Answer:
        stored = self.repo(repo, write=True)
        with self.hub.lock:
            branches = stored.state()['branches']
            if rev in branches:
                raise HubError(409, 'Reference already exists')
            start = stored.resolve(self.json().get('startingPoint') or 'main')
            stored.save_state(branches={**branches, rev: start})
        return Answer({})

    def preupload(self, repo: str, rev: str) -> Answer:
        current = self.repo(repo, write=True).tree(rev)
        files = []
        for file in self.json()['files']:
            entry = current.get(file['path'], {})
            mode = 'lfs' if is_lfs(file['path'], file['size']) else 'regular'
            oid = entry.get('sha256') or entry.get('oid')
            files.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        return Answer({'files': files})

    def lfs_batch(self, repo: str) -> Answer:
        stored = self.repo(repo, write=True)
        objects = []
        for wanted in self.json()['objects']:
            objects.append({'oid': wanted['oid'], 'size': wanted['size']})
            if not stored.lfs_entry(wanted['oid']):
                upload = {'href': f'{self.hub.storage_url}/storage/{repo}/{wanted["oid"]}'}
                verify = {'href': f'{self.hub.url}/{repo}.git/info/lfs/verify'}
                objects[-1]['actions'] = {'upload': upload, 'verify': verify}
        return Answer({'transfer': 'basic', 'objects': objects})

    def lfs_put(self, repo: str, oid: str) -> Answer:
        if not self.hub.repo(repo).store_lfs(self.rfile, self.length, oid):
            raise HubError(400, 'What was sent does not have the sha256 that it was announced with')
        return Answer(b'')

    def lfs_verify(self, repo: str) -> Answer:
        entry = self.repo(repo, write=True).lfs_entry(self.json()['oid'])
        if not entry or entry['size'] != self.json()['size']:
            raise HubError(404, 'The object was not uploaded')
        return Answer({})

    def commit(self, repo: str, rev: str) -> Answer:
        stored, changes, header = self.repo(repo, write=True), {}, {}
        if 'create_pr' in self.query:
            raise HubError(501, 'tests/hub_server.py has no pull requests')
        with self.hub.lock:
            files = stored.tree(rev)
            if rev not in stored.state()['branches']:
                raise HubError(400, f'{rev} is no branch')
            for line in self.body.splitlines():
                operation = json.loads(line)
                key, value = operation['key'], operation['value']
                path = value.get('path', '').rstrip('/')
                if key == 'header':
                    header = value
                elif key == 'file':
                    changes[path] = stored.store(base64.b64decode(value['content']))
                elif key == 'lfsFile':
                    changes[path] = stored.lfs_entry(value['oid'])
                    if not changes[path] or changes[path]['size'] != value.get('size', changes[path]['size']):
                        raise HubError(400, f'{path} is an LFS pointer to a file that was not uploaded')
                elif key in ('deletedFile', 'deletedFolder'):
                    inside = f'{path}/' if key == 'deletedFolder' else ''
                    gone = [name for name in files if (name.startswith(inside) if inside else name == path)]
                    if not gone:
                        raise HubError(404, "A file with this name doesn't exist", 'EntryNotFound')
                    changes.update(dict.fromkeys(gone))
                else:
                    raise HubError(400, f'unknown operation {key}')
            if header.get('parentCommit') not in (None, stored.resolve(rev)):
                raise HubError(412, 'A commit has happened since. Please refresh and try again.')
            author = self.user()[0] or ''
            commit_id = stored.commit(rev, changes, header['summary'], header.get('description', ''), author)
        return Answer(
            {'success': True, 'commitOid': commit_id, 'commitUrl': f'{self.hub.url}/{repo}/commit/{commit_id}'}
        )

    def get(self, repo: str, rev: str = '', path: str = '', oid: str = '') -> Answer:
        if oid:  # the second origin, whose address is proof enough that one may read
            content = self.hub.repo(repo).folder / 'lfs' / oid
            if 'Authorization' in self.headers:
                raise HubError(400, 'A token was sent to the storage, which must never see one')
            if not content.is_file():
                raise HubError(404, 'No such object')
            return Answer(content, {'ETag': f'"{oid}"'})
        stored = self.repo(repo)
        commit_id = stored.resolve(rev)
        headers = {'X-Repo-Commit': commit_id}
        entry = stored.tree(commit_id).get(path)
        if not entry:
            raise HubError(404, 'Entry not found', 'EntryNotFound', headers)
        headers['ETag'] = f'"{entry.get("sha256") or entry["oid"]}"'
        if self.hub.redirect_lfs and 'sha256' in entry:
            location = f'{self.hub.storage_url}/storage/{repo}/{entry["sha256"]}?filename={quote(path, safe="")}'
            headers.update({'X-Linked-ETag': headers['ETag'], 'X-Linked-Size': str(entry['size'])})
            return Answer(b'', {**headers, 'Location': location}, 302)
        return Answer(stored.content(entry), headers)

    head = get


class Origin(ThreadingHTTPServer):
    """A port, with a thread per connection; a client that goes away is what many tests are about, no error."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """A Hub in a thread of the test's process; the client belongs in a process of its own, as it reads its settings
    when imported.

        with HubServer(tmp_path / 'hub') as server:
            server.put('me/model', {'config.json': b'{}'})
            server.fail('status', 'head', status=503)
            subprocess.run([sys.executable, ...], env=server.environment(tmp_path / 'home', token='token-me'))
            assert not server.faults  # all were met

    Steps, as `fail` names them, in the client's order: whoami, create, head (HEAD of a file), validate-yaml, preupload,
    lfs-batch, lfs-put (upload of an LFS file's bytes), lfs-verify, commit; head, get (GET of a file, from the Hub or
    from the storage that it redirects to), info (model_info), tree (list_repo_tree), paths-info, refs, commits, branch.

    Kinds of faults:
        status: the step is not carried out, and answered by `status` and `headers` (such as {'Retry-After': '1'}).
        drop: the step is not carried out; the connection is closed without an answer.
        drop-after: the step is carried out, and the connection closed without an answer.
        cut: half of the body is sent, then the connection closed; for lfs-put half of it is read, and nothing stored.
        stall: as cut, but the connection stays open, silent, until the server closes: time to kill the client.
        flip: one bit of the body is wrong, at byte `at` of the file, by default in the middle of what is sent.
        short: half of the body is sent, and Content-Length says so, too.

    Attributes:
        url, storage_url: The Hub's origin, and the second one, which LFS files are uploaded to.
        requests: (method, path without query) of each request at either origin, in order; but for the client's question
            after AI agents, which it asks once in each new home.
        faults: Those ordered and not yet used up.
        tokens: User by token; 'token-read' is one of 'me' that may not write.
        redirect_lfs: Whether LFS files are answered by a redirect to `storage_url`, as the real Hub does.
    """

    def __init__(self, root: Path, redirect_lfs: bool = False, tokens: dict[str, str] | None = None):
        self.root, self.redirect_lfs = Path(root), redirect_lfs
        self.tokens = {**(tokens or {'token-me': 'me', 'token-other': 'other'}), READ_TOKEN: 'me'}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.closed = threading.Event()
        handler = type('HubHandler', (Handler,), {'hub': self})
        self.origins = [Origin(('127.0.0.1', 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f'http://127.0.0.1:{origin.server_port}' for origin in self.origins)

    def __enter__(self) -> 'HubServer':
        for origin in self.origins:
            threading.Thread(target=origin.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closed.set()
        for origin in self.origins:
            origin.shutdown()
            origin.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a client's process: this server, an empty `home`, nothing of the developer's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'HUGGING'))}
        kept.update(HF_ENDPOINT=self.url, HF_HOME=str(home), NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
        # xet is a protocol of its own, that this server does not speak
        kept.update(HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_DISABLE_TELEMETRY='1')
        return {**kept, 'HF_TOKEN': token} if token else kept

    def fail(
        self,
        kind: str,
        step: str,
        times: int = 1,
        match: str = '',
        status: int = 503,
        headers: dict[str, str] | None = None,
        at: int | None = None,
    ) -> Fault:
        """Order a fault for the next `times` requests of a step whose decoded path and query contain `match`."""
        if kind not in KINDS or step not in STEPS:
            raise ValueError(f'got {kind!r} at {step!r}, expected one of {KINDS} at one of {STEPS}.')
        fault = Fault(kind, step, times, match, status, headers or {}, at)
        with self.lock:
            self.faults.append(fault)
        return fault

    def take(self, step: str, path: str) -> Fault | None:
        """Use up one of the first fault ordered for this request."""
        with self.lock:
            fault = next((fault for fault in self.faults if fault.step == step and fault.match in path), None)
            if fault:
                fault.times -= 1
                self.faults = [fault for fault in self.faults if fault.times > 0]
            return fault

    def repo(self, repo_id: str) -> Repo:
        return Repo(self.root / repo_id)

    def put(self, repo_id: str, files: dict[str, bytes | Path], private: bool = False, branch: str = 'main') -> str:
        """Store files as one commit without a client and return its id; repo (`private` or not) and branch are made if
        need be."""
        repo, owner = self.repo(repo_id), repo_id.split('/')[0]
        with self.lock:
            if not repo.exists():
                repo.create(private, owner)
            branches = repo.state()['branches']
            repo.save_state(branches={branch: branches['main'], **branches})
            changes = {}
            for path, data in files.items():
                size = data.stat().st_size if isinstance(data, Path) else len(data)
                with data.open('rb') if isinstance(data, Path) else io.BytesIO(data) as file:
                    changes[path] = repo.store_lfs(file, size) if is_lfs(path, size) else repo.store(file.read())
            return repo.commit(branch, changes, 'put', '', owner)

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, Path]:
        """Return where the content of each file of a revision is stored, for a test to look at."""
        repo = self.repo(repo_id)
        return {path: repo.content(entry) for path, entry in repo.tree(revision).items()}

    def history(self, repo_id: str, revision: str = 'main') -> list[str]:
        """Return the commits' ids, the newest first; the last one is the 'initial commit' that the Hub makes."""
        return [commit['id'] for commit in self.repo(repo_id).history(revision)]
