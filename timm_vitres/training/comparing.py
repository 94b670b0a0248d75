"""Hybrids against their parents on one's own images: equal epochs or time, one recipe, what several seeds allow to say.

models, seeds, learning rates, one recipe -> `compare` -> folder/{compare.json, before the first run; runs/, each one of
`finetune`; results.csv, a row for every finished run; README.md and comparison.png at the end}.

The learning rate of an arm is chosen by the first seed on validation images, after a third of the epochs. The test
images are looked at by finished runs alone. A comparison that was killed goes on where it was when it is started again.
"""

import dataclasses
import logging
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import timm
import torch

from ..checks import between, checked, some
from ..data import image_mode
from ..models.arms import ARMS
from ..weights.files import WEIGHTS_NAME
from .comparison_report import (
    ANSWERS_NAME,
    COLUMNS,
    Row,
    arm_figures,
    read_answers,
    read_rows,
    write_answers,
    write_comparison,
    write_rows,
)
from .datasets import load_data
from .held_out import report as held_out_report
from .loaders import create_loaders, names_of
from .loop import Diverged, finetune
from .plans import PLAN_NAME, Plan, asked_for, in_proportion, make_plan, note_versions, seen_alike, single
from .processes import Processes, check_main, told_number
from .report import Best, best_epoch, evaluate, read_summary
from .reserved import for_verdict, images_of
from .runs import CHECKPOINT_NAME, RECORD_NAME, Record, check_place, check_writable, held
from .settings import MAX_COUNT, FinetuneCfg
from .verdict import Verdict, judge, listed

_logger = logging.getLogger(__name__)
RUNS = 'runs'
SEARCH, RUN, DIVERGED = 'search', 'run', 'diverged'
Seed = Annotated[int, between(0, MAX_COUNT)]
Rate = Annotated[float, between(0, 1e3, above=True)]
Minutes = Annotated[float, between(0, 1e6, above=True)]
Part = Annotated[float, between(0, 1.0, above=True, below=True)]


class Comparison(NamedTuple):
    """A finished comparison."""

    folder: Path
    rows: List[Row]  # of results.csv
    figures: List[Dict[str, str]]  # of every arm, by the names of the table's columns
    verdict: Optional[Verdict]  # None where fewer than two arms could be trained
    sentence: str


@checked
def compare(
    cfg: FinetuneCfg,
    models: Tuple[str, ...] = tuple(ARMS),
    seeds: Tuple[Seed, ...] = (0, 1, 2),
    lrs: Tuple[Rate, ...] = (3e-4, 1e-3, 3e-3),
    minutes: Optional[Minutes] = None,
    test_split: str = 'test',
    test_frac: Part = 0.25,
) -> Comparison:
    """Train models by one recipe, equal epochs or equal time, and say which are told apart by more than chance.

    Args:
        cfg: The recipe: images, augmentation, optimisation, epochs, and the folder of the comparison. What an arm or a
            run has of its own (model, lr, seed, ...) must be left at its default.
        models: Names of arms (`models.arms.ARMS`), or of timm models, with arguments after a colon:
            'vitresnet_nano:depth=3,embed_dim=96'.
        seeds: Each trains every model once, with a validation split of its own, unless there is a folder of validation
            images. The first also chooses learning rates; others may be added later (how many there shall be is better
            settled before the first verdict is read).
        lrs: The learning rates to choose from.
        minutes: Let every model train for the epochs whose training steps take so long here, by a measurement in which
            the models take turns, in place of equal epochs. Epochs are whole, so that arms may get a third more or
            less; the report says what each got.
        test_split: Name of the split that the verdict is on. Of an image folder, with '' or where it has none of the
            name, `test_frac` of the images of each class is held out.
        test_frac: Part of each class, from 0 to 1, without these two.

    Returns:
        The folder, its rows and figures, the verdict (None of one arm), and the sentence that says it.

    Raises:
        ValueError, TypeError, OSError: for what can not be compared or was begun otherwise; the message says what.
    """
    check_main('compare')
    if told_number('WORLD_SIZE', 1) > 1:
        raise ValueError('compare: runs in one process; start it without torchrun.')
    cfg = seen_alike(cfg, models)
    asked = asked_for(cfg, models, seeds, lrs, minutes, test_split, test_frac)
    folder = Path(cfg.output)
    check_place(cfg, folder)
    _check_own(folder)
    with held(folder):
        check_writable(folder)
        return _Comparing(cfg, make_plan(cfg, asked, folder), folder).run()


def _check_own(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if names and PLAN_NAME not in names:
        raise ValueError(f'output: {folder} holds no comparison, but {some(names)}; name a new folder.')


class _Comparing:
    """The runs of a comparison: those that are done, and the next one."""

    def __init__(self, cfg: FinetuneCfg, plan: Plan, folder: Path):
        self.cfg, self.plan, self.folder = cfg, plan, folder
        self.rows = [row for row in read_rows(folder) if not self._is_lost(row)]
        self.heard: set = set()  # warnings of runs, each of which is said once

    def run(self) -> Comparison:
        """Train what is left, write the report, and return the comparison."""
        plan = self.plan
        chosen = {name: self._search(name) for name in plan.arms}
        total = len(plan.seeds) * sum(lr is not None for lr in chosen.values())
        for seed in plan.seeds:
            for name, lr in chosen.items():
                if lr is None or self._row(RUN, name, lr, seed) is not None:
                    continue
                row = self._train(RUN, name, lr, seed)
                done = sum(row['part'] == RUN for row in self.rows)
                what = f'accuracy {row["accuracy"]}% on the test images' if not row['state'] else 'it diverged'
                _logger.info(
                    '%s, lr %g, seed %d: %s, %s s (%d of %d runs)', *(name, lr, seed, what, row['seconds'], done, total)
                )
        return self._finish(chosen)

    def _is_lost(self, row: Row) -> bool:
        """Return whether a row is of a run whose answers, which a verdict needs, are gone; it is made again."""
        answers = self._place(row['part'], row['arm'], float(row['lr']), int(row['seed'])) / ANSWERS_NAME
        lost = row['part'] == RUN and not row['state'] and not answers.is_file()
        if lost:
            _logger.warning('%s is gone; that run is made again.', answers)
        return lost

    def _row(self, part: str, name: str, lr: float, seed: int) -> Optional[Row]:
        key = (part, name, f'{lr:g}', str(seed))
        return next((row for row in self.rows if tuple(row[k] for k in ('part', 'arm', 'lr', 'seed')) == key), None)

    def _search(self, name: str) -> Optional[float]:
        """Return the learning rate that is best on validation images; None where training diverges with all."""
        lrs, seed = self.plan.lrs, self.plan.seeds[0]
        if len(lrs) == 1:
            return lrs[0]
        found: Dict[float, Tuple[float, float]] = {}
        for lr in lrs:
            row = self._row(SEARCH, name, lr, seed)
            if row is None:
                row = self._train(SEARCH, name, lr, seed)
                what = 'it diverged' if row['state'] else f'accuracy {row["val_top1"]}% on the validation images'
                _logger.info('search: %s, lr %g: %s', name, lr, what)
            for file in (CHECKPOINT_NAME, WEIGHTS_NAME):  # a model that nobody will use
                (self._place(SEARCH, name, lr, seed) / file).unlink(missing_ok=True)
            if not row['state']:
                metric = float(row[f'val_{self.cfg.eval_metric}'])
                # few validation images make ties, which the loss breaks
                found[lr] = (-metric if self.cfg.eval_metric == 'loss' else metric, -float(row['val_loss']))
        if not found:
            return None
        best = max(found, key=lambda lr: found[lr])
        if best in (min(lrs), max(lrs)):
            _logger.info('search: %s: %g is at an end of lrs; a better one may lie beyond.', name, best)
        return best

    def _place(self, part: str, name: str, lr: float, seed: int) -> Path:
        return self.folder / RUNS / f'{"search-" * (part == SEARCH)}{single(name)}-lr{lr:g}-seed{seed}'

    def _train(self, part: str, name: str, lr: float, seed: int) -> Row:
        """Make a run, or go on with it, and write its row."""
        arm, folder = self.plan.arms[name], self._place(part, name, lr, seed)
        epochs = arm.search_epochs if part == SEARCH else arm.epochs
        images = images_of(self.plan.images, self.cfg.val_frac, seed)
        recipe = in_proportion(self.cfg, epochs, max(one.epochs for one in self.plan.arms.values()))
        cfg = dataclasses.replace(
            arm.cfg(recipe), lr=lr, seed=seed, epochs=epochs, output=str(folder), no_check=True, val_split=''
        )
        row = {**dict.fromkeys(COLUMNS, ''), 'part': part}
        row.update(arm=name, lr=f'{lr:g}', seed=str(seed), epochs=str(epochs), state='')
        row.update(arm.facts())
        note_versions(self.plan, self.folder)
        if self.cfg.pretrained:
            arm.note_weights_(name)
        try:
            with self._heard():
                if (folder / RECORD_NAME).is_file():
                    finetune(dataclasses.replace(cfg, resume=True), ('workers',))
                else:
                    shutil.rmtree(folder, ignore_errors=True)  # what a kill before the record has left
                    finetune(cfg, None, images)
        except Diverged:
            row['state'] = DIVERGED
        history = read_summary(folder)
        row['seconds'] = f'{sum(epoch["seconds"] for epoch in history):.0f}'
        if not row['state']:
            best = best_epoch(history, cfg.eval_metric)
            row.update(_validated(best), best_epoch=str(int(best.row['epoch'])))
            if part == RUN:
                row.update(self._test(folder, cfg))
        self.rows.append(row)
        write_rows(self.folder, self.rows)
        return row

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Keep what a run logs to itself, but for warnings that no run before it gave."""
        logger, told = logging.getLogger('.'.join(__name__.split('.')[:-1])), _Collected()
        propagates, logger.propagate = logger.propagate, False
        logger.addHandler(told)
        try:
            yield
        finally:
            logger.removeHandler(told)
            logger.propagate = propagates
        for text in told.texts:
            # of each run all images but its own are left out, and were listed once when the comparison began
            if text not in self.heard and not text.startswith('left out: '):
                self.heard.add(text)
                _logger.warning('%s', text)

    def _test(self, folder: Path, cfg: FinetuneCfg) -> Dict[str, str]:
        """Return a finished run's figures on the test images, and write its answers beside its model."""
        record = Record.read(folder)
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        device = torch.device(Processes().device(cfg.device))
        mode = image_mode(record.data_config['input_size'][0])
        size = cfg.validation_batch_size or cfg.batch_size
        cfg = dataclasses.replace(cfg, batch_size=2, validation_batch_size=size)  # nothing is trained any more
        with self._heard():
            data = load_data(cfg, mode, for_verdict(self.plan.images))
            batches = create_loaders(cfg, data, record.data_config, data.record())[1]
            _, answers = evaluate(model.to(device), batches, data.label_names, device, tta=cfg.tta)
        write_answers(folder, answers, data.label_names, names_of(data.lists['validation']))
        figures = held_out_report(answers, data.label_names)
        return dict(accuracy=f'{figures.top1:.2f}', balanced=f'{figures.balanced:.2f}')

    def _finish(self, chosen: Dict[str, Optional[float]]) -> Comparison:
        """Judge the arms whose runs all ended well, and write the report."""
        rows = {
            name: [self._row(RUN, name, lr, seed) for seed in self.plan.seeds]
            for name, lr in chosen.items()
            if lr is not None
        }
        whole = [name for name, own in rows.items() if all(row is not None and not row['state'] for row in own)]
        lost = [name for name in chosen if name not in whole]
        correct, labels = {}, np.zeros(0)
        for name in whole:
            lr = chosen[name] or 0.0
            answers = [read_answers(self._place(RUN, name, lr, seed)) for seed in self.plan.seeds]
            correct[name], labels = np.stack([right for right, _ in answers]), answers[0][1]
        verdict, is_balanced = None, self.cfg.eval_metric == 'balanced'
        measured = 'balanced accuracy' if is_balanced else 'accuracy'
        sentence = 'Fewer than two arms could be trained, so that nothing is compared.'
        if len(whole) > 1:
            verdict = judge(correct, labels if is_balanced else None, measured)
            sentence = verdict.sentence
        if lost:
            sentence += f' Left out, since training diverged: {listed(lost)}.'
        if self.plan.looks:
            times = 'once' if self.plan.looks == 1 else f'{self.plan.looks} times'
            sentence += (
                f' Seeds were added {times} when such a sentence had been read: whoever stops at a welcome one finds '
                'differences by chance more often than the intervals say.'
            )
        figures = arm_figures(self.plan, rows, verdict)
        write_comparison(self.folder, self.cfg, self.plan, rows, figures, sentence)
        return Comparison(self.folder, self.rows, figures, verdict, sentence)


class _Collected(logging.Handler):
    """Warnings, as they come."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self.texts.append(record.getMessage())


def _validated(best: Best) -> Dict[str, str]:
    return {f'val_{metric}': f'{best.metric(metric):.4g}' for metric in ('top1', 'balanced', 'macro_f1', 'loss')}
