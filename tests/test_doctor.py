import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants

from timm_vitres import cli, doctor
from timm_vitres.doctor import BROKEN, NOTE, OK, Finding


def installed(monkeypatch, **versions: object) -> None:
    """Let packages have other versions, or (None) not be installed."""
    true = metadata.version

    def version(name: str) -> str:
        if versions.get(name, '') is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or true(name)

    monkeypatch.setattr(metadata, 'version', version)


def by_name(findings) -> dict:
    return {finding.name: finding for finding in findings}


def child(code: str, **environment: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    env = {**os.environ, **environment}
    return subprocess.Popen([sys.executable, '-c', code], env=env, stdout=pipe, stderr=pipe, text=True)


def test_versions_are_compared_with_what_the_package_asks_for(monkeypatch):
    found = by_name(doctor.packages())
    assert {'timm-vitres', 'torch', 'torchvision', 'timm', 'numpy', 'pillow', 'safetensors', 'tqdm'} <= set(found)
    assert {finding.state for finding in found.values()} == {OK} and found['timm'].text == timm.__version__
    installed(monkeypatch, pillow='9.0', **{'huggingface-hub': None})
    monkeypatch.setattr(timm, '__version__', '1.0.20')  # another one than is installed
    found = by_name(doctor.packages())
    assert {name for name, finding in found.items() if finding.state != OK} == {'huggingface-hub', 'pillow', 'timm'}
    missing = found['huggingface-hub']
    assert missing[1:3] == (BROKEN, 'not installed') and missing.remedy.startswith("pip install --upgrade 'huggingface")
    assert found['pillow'].state == BROKEN and found['pillow'].text == '9.0, expected >=10.1'
    assert found['timm'].state == BROKEN and found['timm'].text.startswith(f'1.0.20 ({timm.__file__}), expected >=')


def test_a_build_of_a_vendor_counts_as_its_release(monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.6.0a0+ecf3bae40a.nv25.1')
    finding = by_name(doctor.packages())['torch']
    assert finding.state == OK and finding.text == f'2.6.0a0+ecf3bae40a.nv25.1 ({torch.__file__})'


def test_a_folder_that_was_never_installed_says_so(monkeypatch):
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, 'requires', requires)
    (finding,) = doctor.packages()
    assert finding.state == NOTE and 'not installed' in finding.text
    assert 'wandb' in by_name(doctor.extras())


def test_extras_say_how_they_are_installed(monkeypatch):
    installed(monkeypatch, onnxruntime=None, openvino='2024.1', matplotlib='3.10', wandb=None, datasets='3.0')
    found = by_name(doctor.extras())
    assert not set(found) & doctor.INTERNAL
    assert found['export'].state == NOTE and found['export'].remedy == "pip install 'timm-vitres[export]'"
    assert found['export'].text == 'lacks onnxruntime>=1.20 (not installed)'
    assert found['openvino'].state == NOTE and 'openvino>=2025.0 (2024.1)' in found['openvino'].text
    assert found['plot'] == Finding('plot', OK, 'matplotlib 3.10')
    assert found['wandb'].state == NOTE and found['wandb'].remedy == 'pip install wandb'
    assert found['datasets'].state == NOTE and 'datasets>=4.0 (3.0)' in found['datasets'].text


def test_models(monkeypatch):
    finding = doctor.models()
    assert finding.state == OK and f'{len(timm.list_models("vitresnet*"))} of vitresnet*' in finding.text
    true = timm.create_model

    def broken(*args, **kwargs):
        model = true(*args, **kwargs)
        torch.nn.init.constant_(model.head.bias, float('nan'))
        return model

    monkeypatch.setattr(timm, 'create_model', broken)
    assert doctor.models().state == BROKEN and 'nan' in doctor.models().text
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: 1 / 0)
    assert doctor.models().text == 'test_vitresnet fails: division by zero'
    monkeypatch.setattr(timm, 'list_models', lambda *args: [])
    assert doctor.models().state == BROKEN


def test_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'not/yet'))
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=3e9))
    finding = doctor.hub_cache()
    assert finding.state == OK and 'not there yet' in finding.text and '3.0 GB free' in finding.text
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=1e9))
    assert doctor.hub_cache().state == NOTE and 'HF_HOME' in doctor.hub_cache().remedy
    (tmp_path / 'not').write_text('a file')
    assert doctor.hub_cache().state == BROKEN and 'can not be written to' in doctor.hub_cache().text
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert doctor.hub_cache().state == NOTE and 'HF_HUB_OFFLINE' in doctor.hub_cache().text


def test_the_token_is_not_shown(monkeypatch):
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: 'hf_secret')
    assert doctor.hub_token().state == OK and 'secret' not in str(doctor.hub_token())
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
    assert doctor.hub_token().state == NOTE and 'HF_TOKEN' in doctor.hub_token().remedy


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    facts = [SimpleNamespace(name=name, major=major, total_memory=8e10) for name, major in (('new', 9), ('old', 7))]
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda index: facts[index])
    found = by_name(doctor.devices())
    assert f'{torch.get_num_threads()} threads' in found['cpu'].text and 'cuda' not in found
    assert found['cuda:0'].text == 'new, 80 GB, bfloat16' and 'float16' in found['cuda:1'].text.split(', no ')[1]
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr('shutil.which', lambda name: f'/bin/{name}')
    found = by_name(doctor.devices())
    assert found['cuda'].state == NOTE and 'sees no GPU' in found['cuda'].text and 'cuda:0' not in found


def test_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, 'is_gloo_available', lambda: True)
    monkeypatch.setattr(torch.distributed, 'is_nccl_available', lambda: False)
    assert doctor.distributed() == Finding('distributed', OK, 'gloo')
    monkeypatch.setattr(torch.distributed, 'is_available', lambda: False)
    assert doctor.distributed().state == NOTE


def test_scripts_that_do_not_see_the_models_are_named():
    count = len(timm.list_models('vitresnet*'))
    assert doctor.scripts(child(f'print({count})')).state == OK
    finding = doctor.scripts(child('import warnings; warnings.warn("timm 0.6 does not know"); print(0)'))
    assert finding.state == BROKEN and 'UserWarning: timm 0.6 does not know' in finding.text
    assert 'it printed' in doctor.scripts(child('print(0)')).text


def test_what_does_not_compile_is_named_with_its_reason(monkeypatch):
    monkeypatch.setenv('CXX', sys.executable)
    assert doctor.compilation(child('')) == Finding('torch.compile', OK, f'works, with {sys.executable}')
    lines = ['a', 'x.cpp:1: fatal error: Python.h: No such file', 'torch.InductorError: CppCompileError: failed', 'b']
    finding = doctor.compilation(child(f'import sys; sys.exit({chr(10).join(lines)!r})'))
    assert finding.state == NOTE and finding.text == f'fails: {lines[1]}' and 'python3-dev' in finding.remedy
    monkeypatch.setenv('CXX', 'nowhere')
    finding = doctor.compilation(child(f'import sys; sys.exit({chr(10).join(lines[2:])!r})'))
    assert finding.text == f'fails: {lines[2]}' and 'install a C++ compiler' in finding.remedy
    monkeypatch.setattr(doctor, 'SECONDS', 0.2)
    process = child('import time; time.sleep(60)')
    assert 'no answer within 0.2 s' in doctor.compilation(process).text
    process.kill()


@pytest.mark.parametrize('state, status', [(OK, 0), (NOTE, 0), (BROKEN, 1)])
def test_the_command_prints_and_fails_where_something_needed_is_broken(state, status, monkeypatch, capsys):
    findings = [Finding('one', state, 'is so', 'do that'), Finding('two', OK, 'fine')]
    monkeypatch.setattr(doctor, 'examine', lambda: iter(findings))
    assert cli.main(['doctor']) == status
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == [state, 'one', *['is', 'so;', 'do', 'that']] and second.split() == ['ok', 'two', 'fine']


def test_what_can_not_be_looked_at_is_a_finding():
    def fails():
        yield Finding('one', OK, 'fine')
        raise PermissionError(13, 'Permission denied')

    first, second = doctor._survived('devices', fails)
    assert first.state == OK and (second.name, second.state) == ('devices', BROKEN)
    assert 'can not be looked at: [Errno 13] Permission denied' in second.text


@pytest.mark.slow
def test_here_all_that_is_needed_works():
    found = list(doctor.examine())
    assert [finding for finding in found if finding.state == BROKEN] == []
    assert {'python', 'models', 'hub cache', 'cpu', 'scripts', 'torch.compile'} <= {finding.name for finding in found}
    assert by_name(found)['torch.compile'].state == OK, 'this machine has a compiler'
