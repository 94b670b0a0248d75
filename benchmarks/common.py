"""What benchmarks share: rows with when, where, with what and by which command; runs; models on test images; times."""

import csv
import dataclasses
import datetime
import hashlib
import logging
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import timm
import torch
import yaml
from torch import nn

import timm_vitres
from timm_vitres.prediction import Prediction, predict
from timm_vitres.training.datasets import ImageFolder
from timm_vitres.training.settings import FinetuneCfg

RESULTS = Path(__file__).parent / 'results'


def conditions() -> dict:
    """Return date, machine, versions and command, as columns of a row."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        names = [line.split(':', 1)[1].strip() for line in cpuinfo.read_text().splitlines() if 'model name' in line]
        cpu = names[0] if names else cpu
    return dict(
        date=datetime.date.today().isoformat(),
        # processors of one name may have other instructions
        machine=f'{cpu}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores',
        torch=torch.__version__,
        timm=timm.__version__,
        timm_vitres=timm_vitres.__version__,
        command=shlex.join(['python', os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    )


def append_row(path: Path, row: dict) -> None:
    """Append a row and its conditions to a CSV file, which it creates with a header; one that is there is not repeated.

    A command that is started again finds its finished runs, and would count each as another seed.
    """
    if _has(path, row):
        print(f'{path.name} has this row: {told(row)}', flush=True)
        return
    row = {**row, **conditions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline='') as file:
            columns = next(csv.reader(file))
        if columns != list(row):
            raise SystemExit(f'{path}: has the columns {columns}, not {list(row)}; nothing was appended.')
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator='\n')
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(', '.join(f'{key}={value}' for key, value in row.items()), flush=True)


def write_row(name: str, row: dict, record: bool) -> None:
    """Append a row to benchmarks/results/NAME.csv where it shall be recorded, else print it."""
    if record:
        append_row(RESULTS / f'{name}.csv', row)
    else:
        print(', '.join(f'{key}={value}' for key, value in row.items()), flush=True)


def is_recorded(name: str, row: dict) -> bool:
    """Return whether benchmarks/results/NAME.csv has a row with these values, whatever its other columns say."""
    return _has(RESULTS / f'{name}.csv', row)


def _has(path: Path, row: dict) -> bool:
    if not path.is_file():
        return False
    with path.open(newline='') as file:
        return any(all(old.get(key) == str(value) for key, value in row.items()) for old in csv.DictReader(file))


def parse_changes(items: Sequence[str]) -> Dict[str, Any]:
    """Return settings that a command was given as name=value, each value as YAML reads it."""
    return {name: yaml.safe_load(value) for name, _, value in (item.partition('=') for item in items)}


def told(changes: Dict[str, Any]) -> str:
    """Return settings as a column of a row: 'name=value name=value'."""
    return ' '.join(f'{name}={value}' for name, value in changes.items())


def run_name(*parts: str, changes: Dict[str, Any], seed: int) -> str:
    """Return the name of a run's folder; one that file systems refuse as too long ends with its digest instead."""
    name = '-'.join([*parts, *told(changes).replace('/', '_').split(), str(seed)])
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return name if len(name.encode()) < 256 else f'{name[:160]}-{digest}'


class Tested(NamedTuple):
    """What a model says of the images in a folder, which holds a folder for each class."""

    paths: Sequence[str]
    truth: List[str]
    predictions: List[Prediction]
    top1: float  # in percent
    recalls: Dict[str, float]  # of every class, in percent

    @property
    def balanced(self) -> float:
        """The mean of the classes' recalls, in percent."""
        return sum(self.recalls.values()) / len(self.recalls)

    @property
    def figures(self) -> Dict[str, Any]:
        """What a row says of them."""
        recalls = {f'recall_{name}': round(recall, 2) for name, recall in self.recalls.items()}
        return dict(images=len(self.paths), balanced=round(self.balanced, 2), top1=round(self.top1, 2), **recalls)


def merged(prediction: Prediction, merge: Callable[[str], str]) -> Prediction:
    """Return what a prediction says of wider classes: each is as likely as those that `merge` puts there, together."""
    sums: Dict[str, float] = {}
    for label, probability in zip(prediction.labels, prediction.probabilities):
        sums[merge(label)] = sums.get(merge(label), 0.0) + probability
    labels = sorted(sums, key=lambda label: -sums[label])
    return prediction._replace(labels=labels, probabilities=[sums[label] for label in labels])


def tested(model: nn.Module, test: Path, tta: str = '', merge: Callable[[str], str] = str) -> Tested:
    """Classify the images in a folder, by the model's own data config; SystemExit for one that can't be read.

    Args:
        merge: Returns the wider class of a class, where a model learns finer ones than it is asked for.
    """
    images = ImageFolder(test)
    paths, targets = zip(*images.samples)
    predictions, unreadable = predict(model, paths, topk=model.num_classes, tta=tta)
    if unreadable:
        raise SystemExit(unreadable[0])
    predictions = [merged(prediction, merge) for prediction in predictions]
    truth = [merge(images.classes[target]) for target in targets]
    right: Dict[str, list] = {name: [] for name in sorted(set(truth))}
    for prediction, name in zip(predictions, truth):
        right[name].append(prediction.labels[0] == name)
    recalls = {name: 100 * sum(found) / len(found) for name, found in right.items()}
    return Tested(paths, truth, predictions, 100 * sum(map(sum, right.values())) / len(paths), recalls)


def show_logs() -> None:
    """Print what the library says of its course."""
    logging.basicConfig(format='%(message)s')
    logging.getLogger('timm_vitres').setLevel(logging.INFO)


def train(cfg: FinetuneCfg) -> Path:
    """Fine-tune and return the folder; a run that was interrupted there goes on. Its epochs are printed."""
    show_logs()
    from timm_vitres.training.loop import finetune

    return finetune(dataclasses.replace(cfg, resume=(Path(cfg.output) / 'run.json').is_file()))


def seconds(function: Callable[[torch.Tensor], Any], x: torch.Tensor, repeats: int) -> float:
    """Return the mean time of a call, on a CUDA device by the device's own clock."""
    if x.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            function(x)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        function(x)
    return (time.perf_counter() - begin) / repeats


def peak_bytes(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> int:
    """Return the most that a call holds at a time, beyond weights and input."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        function(x)
        return torch.cuda.max_memory_allocated(x.device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # or it prints when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(x)
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    return peak
