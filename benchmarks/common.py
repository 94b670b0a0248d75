"""What every benchmark writes beside its figures: when, where, with what, and by which command."""

import csv
import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

import timm
import torch

import timm_vitres


def conditions() -> dict:
    """Return date, machine, versions and command, as columns of a row."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        names = [line.split(':', 1)[1].strip() for line in cpuinfo.read_text().splitlines() if 'model name' in line]
        cpu = names[0] if names else cpu
    return dict(
        date=datetime.date.today().isoformat(),
        machine=f'{cpu}, {os.cpu_count()} cores',
        torch=torch.__version__,
        timm=timm.__version__,
        timm_vitres=timm_vitres.__version__,
        command=shlex.join(['python', os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    )


def append_row(path: Path, row: dict) -> None:
    """Append a row and its conditions to a CSV file, which it creates with a header."""
    row = {**row, **conditions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator='\n')
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(', '.join(f'{key}={value}' for key, value in row.items()), flush=True)
