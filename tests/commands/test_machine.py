import pytest

from timm_vitres import cli, doctor
from timm_vitres.commands import machine


@pytest.mark.parametrize('state, status', [('ok', 0), (doctor.BROKEN, 1)])
def test_what_is_broken_is_the_exit_status(state, status, monkeypatch, capsys):
    findings = [doctor.Finding('torch', 'ok', 'is there'), doctor.Finding('disk', state, 'is full', 'empty it')]
    monkeypatch.setattr(doctor, 'examine', lambda: findings)
    assert cli.main(['doctor']) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['ok', 'torch', 'is', 'there'] and lines[1].endswith('is full; empty it')


def test_a_script_gets_its_own_arguments(monkeypatch):
    calls = []
    monkeypatch.setattr(machine, 'become', lambda *told: calls.append(told) or 7)
    assert cli.main(['run', 'script.py', '--lr', '3']) == 7
    assert calls == [('script.py', None, ['--lr', '3'])]
