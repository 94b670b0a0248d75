"""What the README and the guides of single rooms print works, and their figures are those of the recorded rows."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import stripes, write_folder
from layouts import google_layout, pix2tex_layout

import timm_vitres

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
GUIDES = sorted((ROOT / 'timm_vitres').glob('*/README.md'))
TEXTS = [README, *(path.read_text() for path in GUIDES)]
# names of weights and repositories that need the network: what stands in for them here
OFFLINE = [
    (r"'vitresnet_small\.augreg_in21k_ft_in1k', pretrained=True", "'vitresnet_small'"),
    (r"'vitresnet_dual_small\.conformer_in1k', pretrained=True", "'vitresnet_dual_small'"),
    (r"'vitresnet_mix_bot26t\.c1_in1k', pretrained=True", "'vitresnet_mix_bot26t'"),
]


def snippets(language: str, *texts: str):
    return [code for text in texts or TEXTS for code in re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)]


def anchors(text: str):
    """What GitHub calls the headings of a text."""
    headings = re.findall(r'^#+ (.+)$', re.sub(r'```.*?```', '', text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize(
    'path',
    [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'benchmarks' / 'README.md', *GUIDES],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_somewhere(path):
    """To files and folders of this repository, and to headings that are there."""
    links = [link for link in re.findall(r'\]\(([^)\s]+)\)', path.read_text()) if '://' not in link]
    for link in links:
        place, _, heading = link.partition('#')
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), f'{path.name}: {link} is not there'
        assert not heading or heading in anchors(target.read_text()), f'{path.name}: {link} is no heading there'


@pytest.mark.recent
def test_python_snippets_run(tmp_path):
    """All of them, from top to bottom, in one process: a reader does that, too."""
    assert len(snippets('python', README)) >= 4
    write_folder(tmp_path / 'images', per_class=8)
    stripes(64, True, np.random.default_rng(0)).save(tmp_path / 'cat.jpg')
    np.savez(tmp_path / 'R26_S_32.npz', **google_layout(timm.create_model('vit_small_r26_s32_224')))
    code = '\n'.join(snippets('python', README))
    for pattern, stand_in in OFFLINE:
        code, count = re.subn(pattern, stand_in, code)
        assert count, f'the README has no {pattern} any more'
    code = with_outputs_compared(code)
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.recent
@pytest.mark.parametrize(
    'path', [path for path in GUIDES if '```python' in path.read_text()], ids=lambda p: p.parent.name
)
def test_python_snippets_of_a_guide_run_without_the_readme(path, tmp_path):
    code = with_outputs_compared('\n'.join(snippets('python', path.read_text())))
    if 'R50+ViT-B_16.npz' in code:
        np.savez(tmp_path / 'R50+ViT-B_16.npz', **google_layout(timm.create_model('vit_base_r50_s16_224')))
    if 'weights.pth' in code:
        torch.save(pix2tex_layout(timm.create_model('vitresnet_ocr')), tmp_path / 'weights.pth')
        timm_vitres.save(timm.create_model('test_vitresnet'), tmp_path / 'my-hybrid')
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def with_outputs_compared(code: str) -> str:
    """Let lines that print what their comment ends with, a tuple or a list, fail where it is something else."""
    told = re.compile(r'^( *)print\((.*)\)  # (?:.*: )?([\[(][\d, ]+[\])])$', re.MULTILINE)
    return told.sub(r'\1assert list(\2) == list(\3), \2', code)


def test_what_is_printed_is_compared():
    code = with_outputs_compared('\n'.join(snippets('python')))
    assert code.count('assert list(') >= 5
    code = 'x = [1, 2]\nprint(x)  # the first two: (1, 2)\nprint(x)  # [1, 3]\nprint(x)  # what it is'
    *right, wrong, _ = with_outputs_compared(code).splitlines()
    exec('\n'.join(right))
    with pytest.raises(AssertionError):
        exec('\n'.join([*right, wrong]))


def test_commands_are_known(tmp_path):
    """Every `timm-vitres` line parses, without abbreviations."""
    from timm_vitres.cli import create_parser

    commands = [line for block in snippets('sh') for line in block.replace('\\\n', ' ').splitlines()]
    commands = [re.sub(r'^torchrun .*-m timm_vitres finetune', 'timm-vitres finetune', line) for line in commands]
    ours = [re.split('[#>]', line)[0].split()[1:] for line in commands if line.startswith('timm-vitres ')]
    assert len(ours) >= 25
    for arguments in ours:
        parser = create_parser()
        parser.parse_args(arguments)
        (commands,) = [action.choices for action in parser._actions if action.choices and 'finetune' in action.choices]
        known = commands[arguments[0]]._option_string_actions
        assert not [word for word in arguments if word.startswith('-') and word.partition('=')[0] not in known], (
            arguments
        )
    makefile = (ROOT / 'Makefile').read_text()
    targets = re.findall(r'\bmake ([a-z-]+)', README)
    assert targets and all(f'\n{target}:' in makefile for target in targets)


def test_every_variant_stands_in_a_table():
    listed = re.findall(r'^\| `(vitresnet\w*)` \|', README, re.MULTILINE)
    missing = set(timm.list_models('vitresnet*')) - set(listed)
    assert not missing, f'README.md: its tables of models lack {", ".join(sorted(missing))}; add a line for each.'


def test_tables_are_those_of_the_recorded_rows():
    command = [sys.executable, str(ROOT / 'benchmarks' / 'report.py'), '--check']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
