import subprocess
import sys

import timm_vitres


def test_the_module_is_the_command():
    command = [sys.executable, '-m', 'timm_vitres', '--version']
    assert subprocess.run(command, capture_output=True, text=True).stdout == f'timm-vitres {timm_vitres.__version__}\n'
