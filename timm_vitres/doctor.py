"""What works here, and what to do about what does not: versions, models, extras, the Hub, devices, compilers.

Findings come as they are found. Two of them need a Python of their own, which starts at once and is waited for last:
one imports timm as a script does that `timm-vitres run` runs, the other compiles a function.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

import huggingface_hub
import timm
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.version import Version

from .checks import on_one_line
from .scripts import knowing

OK, NOTE, BROKEN = 'ok', 'note', 'broken'
DISTRIBUTION = 'timm-vitres'
PATTERN = 'vitresnet*'
SECONDS = 180  # after which a child process counts as failed; a first compilation takes 10 to 30
SPACE = 2e9  # bytes that the largest published weights need, and some more
# Extras that only those need who work on this package
INTERNAL = {'dev', 'downstream', 'test'}
# Packages that no extra names, each with what it is for
OTHERS = {
    'peft': 'finetune --lora',
    'wandb': 'finetune --log-wandb',
    'tensorboard': 'finetune --log-tensorboard',
    'datasets': 'finetune --dataset hfds/...',
    'webdataset': 'finetune --dataset wds/...',
}
LIST_MODELS = f'import timm; print(len(timm.list_models({PATTERN!r})))'
COMPILE = """
import torch
x = torch.randn(64, device='cuda' if torch.cuda.is_available() else 'cpu')
function = lambda x: (x.sin() + 1) * x
torch.testing.assert_close(torch.compile(function)(x), function(x))
"""


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    state: str  # 'ok'; 'note': works in part, or is not there and not needed by all; 'broken': needed, does not work
    text: str
    remedy: str = ''  # what to do; empty where nothing is to be done


def examine() -> Iterator[Finding]:
    """Look at this Python, this machine and the Hub's cache, and yield what was found; nothing is downloaded."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        _started(LIST_MODELS, knowing(os.environ)) as lister,
        _started(COMPILE, {**os.environ, 'TORCHINDUCTOR_CACHE_DIR': cache}) as compiler,
    ):
        yield Finding('python', OK, f'{platform.python_version()} ({sys.executable})')
        yield from _survived('packages', packages)
        yield from _survived('models', models)
        yield from _survived('extras', extras)
        yield from _survived('hub cache', hub_cache)
        yield from _survived('hub token', hub_token)
        yield from _survived('devices', devices)
        yield from _survived('distributed', distributed)
        yield from _survived('scripts', lambda: scripts(lister))
        yield from _survived('compilation', lambda: compilation(compiler))


def _survived(name: str, look: Callable[[], Union[Finding, Iterable[Finding]]]) -> Iterator[Finding]:
    """Yield what a look at something found; that it failed is a finding, too."""
    try:
        found = look()
        yield from [found] if isinstance(found, Finding) else found
    except Exception as error:
        yield Finding(name, BROKEN, f'can not be looked at: {on_one_line(error)}')


def packages() -> Iterator[Finding]:
    """Yield the versions of this package, and of those that it can't do without."""
    needed = _requirements()
    if not needed:
        folder = Path(__file__).parent
        told = f'used from {folder}, but not installed, so that nobody says which versions it needs'
        yield Finding(DISTRIBUTION, NOTE, told, f'pip install {DISTRIBUTION}')
        return
    yield Finding(DISTRIBUTION, OK, metadata.version(DISTRIBUTION))
    for requirement in needed['']:
        version, where = _version(requirement.name), ''
        module = sys.modules.get(requirement.name)
        imported = getattr(module, '__version__', version)
        if version is None or Version(imported).public != Version(version).public:
            # what is imported comes first in sys.path, such as the folder timm/ of a checkout
            version, where = imported, f' ({module.__file__})' if module else ''
        if version is None or not _fits(version, requirement):
            told = f'{version}{where}, expected {requirement.specifier}' if version else 'not installed'
            yield Finding(requirement.name, BROKEN, told, f"pip install --upgrade '{requirement}'")
        else:
            yield Finding(requirement.name, OK, version + where)


def models() -> Finding:
    """Return whether timm lists our models, and the smallest computes something finite."""
    count = len(timm.list_models(PATTERN))
    remedy = f'pip install --force-reinstall --no-deps {DISTRIBUTION}, or report it'
    if not count:
        return Finding('models', BROKEN, f'timm lists no {PATTERN}', remedy)
    try:
        model = timm.create_model('test_vitresnet', num_classes=3).eval()
        with torch.inference_mode():
            logits = model(torch.randn(2, 3, 64, 48))
    except Exception as error:
        return Finding('models', BROKEN, f'test_vitresnet fails: {on_one_line(error)}', remedy)
    if logits.shape != (2, 3) or not logits.isfinite().all():
        return Finding('models', BROKEN, f'test_vitresnet computes {logits.flatten().tolist()}', remedy)
    return Finding('models', OK, f'timm lists {count} of {PATTERN}, test_vitresnet computes')


def extras() -> Iterator[Finding]:
    """Yield what of the optional packages is installed, and how the others are."""
    needed = _requirements()
    for extra in sorted(set(needed) - INTERNAL - {''}):
        found = {requirement.name: _version(requirement.name) for requirement in needed[extra]}
        wrong = [
            f'{requirement.name}{requirement.specifier} ({found[requirement.name] or "not installed"})'
            for requirement in needed[extra]
            if not _fits(found[requirement.name], requirement)
        ]
        if wrong:
            yield Finding(extra, NOTE, f'lacks {", ".join(wrong)}', f"pip install '{DISTRIBUTION}[{extra}]'")
        else:
            yield Finding(extra, OK, ', '.join(f'{name} {version}' for name, version in found.items()))
    named = {requirement.name for extra in set(needed) - INTERNAL for requirement in needed[extra]}
    for name, purpose in OTHERS.items():
        version = _version(name)
        if name not in named and version is None:
            yield Finding(name, NOTE, f'not installed; {purpose} needs it', f'pip install {name}')
        elif name not in named:
            yield Finding(name, OK, str(version))


def hub_cache() -> Finding:
    """Return where weights of the Hub are kept, whether that can be written to, and the space that is left."""
    folder, is_offline = Path(constants.HF_HUB_CACHE), constants.HF_HUB_OFFLINE
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # pathlib's raises errors
    told = f'{folder}{"" if there == folder else ", not there yet"}'
    told += ', HF_HUB_OFFLINE is set: nothing is downloaded' if is_offline else ''
    remedy = 'let HF_HOME name another folder'
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        # whoever downloads nothing can read a cache that others filled
        return Finding('hub cache', NOTE if is_offline else BROKEN, f'{told}, can not be written to', remedy)
    free = shutil.disk_usage(there).free
    told += f', {free / 1e9:.1f} GB free'
    return Finding('hub cache', OK, told) if free >= SPACE or is_offline else Finding('hub cache', NOTE, told, remedy)


def hub_token() -> Finding:
    """Return whether there is a token of the Hub; it is not shown."""
    if huggingface_hub.get_token():
        return Finding('hub token', OK, 'there is one; whether the Hub takes it, `hf auth whoami` says')
    return Finding('hub token', NOTE, 'none; push and private repositories need one', 'hf auth login, or set HF_TOKEN')


def devices() -> Iterator[Finding]:
    """Yield what computes here."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    told = f'{processors} processors, torch takes {torch.get_num_threads()} threads, {capability}'
    yield Finding('cpu', OK, told)
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = 'bfloat16' if facts.major >= 8 else 'no bfloat16, --amp-dtype float16'
        yield Finding(f'cuda:{index}', OK, f'{facts.name}, {facts.total_memory / 1e9:.0f} GB, {bf16}')
    if torch.backends.mps.is_available():
        yield Finding('mps', OK, 'usable')
    if not torch.cuda.is_available() and shutil.which('nvidia-smi'):
        built = f'was built for CUDA {torch.version.cuda}' if torch.version.cuda else 'was built without CUDA'
        remedy = 'see whether nvidia-smi lists a GPU, and install the torch of its driver (https://pytorch.org)'
        yield Finding('cuda', NOTE, f'nvidia-smi is here, but torch, which {built}, sees no GPU', remedy)


def distributed() -> Finding:
    """Return which backends `torchrun` can use."""
    if not torch.distributed.is_available():
        return Finding('distributed', NOTE, 'torch was built without it', 'train in one process')
    there = {'gloo': torch.distributed.is_gloo_available(), 'nccl': torch.distributed.is_nccl_available()}
    return Finding('distributed', OK, ', '.join(name for name, is_there in there.items() if is_there) or 'no backend')


def scripts(process: subprocess.Popen) -> Finding:
    """Return whether a script that knows nothing of us sees the models under `timm-vitres run`."""
    count = len(timm.list_models(PATTERN))
    status, printed, reason = _end(process)
    if status == 0 and printed.split()[-1:] == [str(count)]:
        return Finding('scripts', OK, f'under `timm-vitres run` see {count} of {PATTERN}')
    told = f'under `timm-vitres run` do not see the models: {reason or f"it printed {printed!r}"}'
    return Finding(
        'scripts',
        BROKEN,
        told,
        'look at the timm that is named: a folder timm/ beside a script hides the installed one',
    )


def compilation(process: subprocess.Popen) -> Finding:
    """Return whether torch.compile works."""
    named = [os.environ['CXX']] if os.environ.get('CXX') else ['g++', 'clang++', 'c++', 'cl']
    found = next(filter(None, map(shutil.which, named)), None)
    status, _, reason = _end(process)
    if status == 0:
        return Finding('torch.compile', OK, f'works, with {found}' if found else 'works')
    told = f'fails: {reason or f"exit status {status}"}'
    remedy = f"install a C++ compiler and Python's headers (none of {', '.join(named)} is found)"
    if found is not None:
        remedy = f"see whether {found} finds Python's headers (Debian: python3-dev) and OpenMP; CXX names another one"
    return Finding('torch.compile', NOTE, told, remedy)


def _requirements() -> Dict[str, List[Requirement]]:
    """Return what each extra needs, '' being no extra; nothing where this package is not installed."""
    needed = defaultdict(list)
    try:
        lines = metadata.requires(DISTRIBUTION) or []
        names = metadata.metadata(DISTRIBUTION).get_all('Provides-Extra') or []
    except metadata.PackageNotFoundError:
        return {}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({'extra': ''}):
            needed[''].append(requirement)
            continue
        for extra in names:
            if requirement.marker.evaluate({'extra': extra}):
                needed[extra].append(requirement)
    return needed


def _fits(version: Optional[str], requirement: Requirement) -> bool:
    # a vendor's build, such as 2.6.0a0+nv25.1, counts as what it will be
    return version is not None and requirement.specifier.contains(Version(version).base_version)


def _version(name: str) -> Optional[str]:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def _started(code: str, environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """Run code in a Python of its own, which ends with the context at the latest."""
    command = [sys.executable, '-c', code]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _end(process: subprocess.Popen) -> Tuple[Optional[int], str, str]:
    """Return a process's exit status (None where it took too long), what it printed, and a line on what went wrong."""
    try:
        printed, told = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None, '', f'no answer within {SECONDS} s'
    lines = [line.strip() for line in told.splitlines()]
    fatal = [line for line in lines if 'fatal error:' in line]  # a compiler's, in the midst of what Python says
    errors = [line for line in lines if re.search(r'^[\w.]*(Error|Exception)\b|Warning: timm|\w+Error: ', line)]
    return process.returncode, printed, (fatal or errors or lines or [''])[-1]
