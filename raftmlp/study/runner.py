"""The runs of a study as processes of `raftmlp train`, several at a time, and the folder that they are in."""

import csv
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from ..errors import UserError
from ..files import write_text
from ..train.run_folder import RunFolder, opening
from ..train.signals import StopSignals
from .plan import PREPARATION, Cell, Plan, Run

__all__ = ["StudyFolder", "run_study"]

_logger = logging.getLogger(__name__)
PACKAGE_PARENT = Path(__file__).parents[2]
LINE_SECONDS = 60  # between lines where there is no terminal
HINT = "name another folder with --output"


class StudyFolder:
    """The folder of a study: study.yaml, options/ARM.yaml, runs/ARM/seed-N/, and the results; one process at a time.

    Args:
        path: The folder.
        own_preparation: Returns how the model of a cell prepares images where no option sets it. A study of version
            0.2 left that to the models; without this function such a study is one of other options.
    """

    def __init__(self, path: str | Path, own_preparation: Callable[[Cell], Mapping[str, Any]] | None = None):
        self.path, self.own_preparation = Path(path), own_preparation
        self._lock = FileLock(self.path / ".lock", timeout=0)

    def open(self, plan: Plan) -> None:
        """Make the folder this study's, and keep others out of it until ``close``.

        A study that is there already may get more arms, points and seeds.

        Raises:
            UserError: If the folder holds anything else, cannot be written into, or is in use.
        """
        self.check(plan)
        with opening(self.path, self._lock, "study"):
            content = dict(recipe=plan.recipe, arms=plan.arms, seeds=list(plan.seeds), points=list(plan.points))
            write_text(self.path / "study.yaml", yaml.safe_dump(content, sort_keys=False))
            for cell in plan.cells():
                file = self.options_file(cell)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, yaml.safe_dump(cell.options, sort_keys=False))

    def close(self) -> None:
        """Let other processes into the folder."""
        self._lock.release()

    def check(self, plan: Plan) -> None:
        """Refuse a folder that is not this study's, and not empty.

        Raises:
            UserError: If it is so; the message names the difference.
        """
        file = self.path / "study.yaml"
        if not file.exists():
            if self.path.exists() and any(entry.name != ".lock" for entry in self.path.iterdir()):
                raise UserError(f"{self.path} holds something else than a study: {HINT}")
            return
        with file.open() as stream:
            before = Plan(**yaml.safe_load(stream))
        then, now = ({cell.name: cell for cell in p.cells()} for p in (before, plan))
        common = sorted(then.keys() & now.keys())
        if not common:
            raise UserError(f"{self.path} holds another study, with the arms {', '.join(before.arms)}: {HINT}")
        for name in common:
            self._check_cell(then[name], now[name])

    def _check_cell(self, then: Cell, now: Cell) -> None:
        """Refuse an arm that is in the folder with other options, or whose images were prepared in another way."""
        old, new = then.options, now.options
        unset = [key for key in PREPARATION if old.get(key) is None and new.get(key) is not None]
        if unset and self.own_preparation:
            own = self.own_preparation(now)  # whose model is the same, or another difference is found first
            old = {**old, **{key: own[key] for key in unset}}
        for key in [*sorted({*old, *new} - {*PREPARATION}), *PREPARATION]:
            before, after = old.get(key), new.get(key)
            if _comparable(key, before) != _comparable(key, after):
                difference = f"in it, {key} of {now.name} is {before}, not {after}"
                raise UserError(f"{self.path} holds another study: {difference}; set it in the arm, or {HINT}")

    def options_file(self, cell: Cell) -> Path:
        """Return the file with the options of an arm at a point."""
        return self.path / "options" / f"{cell.name}.yaml"

    def run_folder(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.path / "runs" / run.name

    def summary(self, run: Run) -> dict[str, Any] | None:
        """Return the summary of a finished run, None of others."""
        file = self.run_folder(run) / "summary.json"
        return json.loads(file.read_text()) if file.exists() else None

    def keep_best(self, runs: Sequence[Run]) -> None:
        """Remove what finished runs need no more: all checkpoints but the best weights."""
        for run in runs:
            folder = RunFolder(self.run_folder(run))
            if self.summary(run) and (folder.last.exists() or folder.previous.exists()):
                try:
                    folder.keep_best()
                except (OSError, UserError) as error:
                    _logger.warning(f"{run.name}: all checkpoints are kept: {error}")

    def epochs_done(self, run: Run) -> int:
        """Return how many epochs of a run are done."""
        try:
            with (self.run_folder(run) / "log.csv").open() as file:
                return sum(1 for _ in csv.DictReader(file))
        except FileNotFoundError:
            return 0


def _comparable(key: str, value: Any) -> str:
    """Return a value of an option as a text: the same for 64 and [64, 64], and for a tuple and a list."""
    if key in PREPARATION and isinstance(value, list | tuple) and len({*value}) == 1:
        value = value[0]
    return json.dumps(value, sort_keys=True)


class _Progress:
    """A bar over all runs, or a line a minute where there is no terminal; a line for every run that ends.

    Args:
        epochs: How many epochs each run has, by its name.
        done: How many of them are done.
        ended: How many runs have ended.
    """

    def __init__(self, epochs: Mapping[str, int], done: Mapping[str, int], ended: int):
        self.epochs, self.done, self.ended_runs = epochs, dict(done), ended
        self.first, self.start = self._runs_done(), time.monotonic()
        self.logged = self.start
        form = "{percentage:3.0f}%|{bar:10}| {desc}"
        self.bar = tqdm(total=len(epochs), bar_format=form, leave=False, disable=None, dynamic_ncols=True)

    def _runs_done(self) -> float:
        return sum(min(1, done / self.epochs[name]) for name, done in self.done.items())

    def show(self, done: Mapping[str, int]) -> None:
        """Show how many epochs the runs that are under way have done."""
        self.done |= done
        positions = (f"{name} epoch {min(n + 1, self.epochs[name])}/{self.epochs[name]}" for name, n in done.items())
        self.bar.n = self._runs_done()
        words = "; ".join([f"{self.ended_runs} of {len(self.epochs)} runs ended{self._time_left()}", *positions])
        self.bar.set_description_str(words)
        if self.bar.disable and time.monotonic() > self.logged + LINE_SECONDS:
            self.logged = time.monotonic()
            _logger.info(f"study: {self.bar.n / len(self.epochs):.0%}, {words}")

    def ended(self, name: str, summary: dict | None, failure: str) -> None:
        """Print a line for a run that has ended, with the summary of one that is finished."""
        self.ended_runs += 1
        self.done[name] = self.epochs[name]
        words = f"failed: {failure}"
        if summary:
            words = f"top-1 {summary['last']['eval_top1']:.2f} %, {summary['seconds']} s"
        _logger.info(f"run {self.ended_runs}/{len(self.epochs)}, {name}: {words}{self._time_left()}")

    def _time_left(self) -> str:
        """Return the time that is left in words, if it can be told from the runs of this process."""
        done, left = self._runs_done() - self.first, len(self.epochs) - self._runs_done()
        if done <= 0 or left <= 0:
            return ""
        return f", {tqdm.format_interval(left / done * (time.monotonic() - self.start))} left"


def _claim(path: Path) -> int | None:
    """Return a lock on a run's folder, an open file; None where another process has it.

    A child that it is handed to has it as long as it lives, from its start on and also when the study is killed. On
    Windows it locks nothing: there a run that a killed study left behind is found by the lock of its own.
    """
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path / ".process", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _start(folder: StudyFolder, run: Run, lock: int) -> subprocess.Popen:
    """Start a run in one thread; it has the lock on its folder."""
    path = folder.run_folder(run)
    command = [sys.executable, "-m", "raftmlp", "train", "-c", folder.options_file(run.cell)]
    command += ["--seed", run.seed, "--output", path, "--resume"]
    paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # also: the same sums at every run
    with (path / "train.log").open("ab") as log:
        return subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            pass_fds=[lock] if fcntl else [],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
        )


def _failure(status: int, log: Path) -> str:
    """Return why a run ended without a summary: what it said last."""
    if status < 0:
        return f"it was killed by signal {-status}, for want of memory perhaps"
    lines = log.read_text(errors="replace").strip().splitlines() or ["it ended without a word"]
    return lines[-1].split("error: ", 1)[-1]


def run_study(
    folder: StudyFolder,
    plan: Plan,
    epochs: Mapping[str, int],
    jobs: int,
    report: Callable[[dict[str, str]], None],
    keep: str = "all",
) -> dict[str, str] | None:
    """Run what is not done of a study, ``jobs`` runs at a time in one thread each.

    A run that fails does not end the others. SIGTERM and Ctrl-C are passed on to the runs, which save first.

    Args:
        folder: The study's folder, opened.
        plan: The study.
        epochs: The epochs of a run, by the names of the cells.
        jobs: Processes at a time.
        report: Called with the failures so far whenever a run has ended.
        keep: "all" the checkpoints of the runs that end now, or the "best" weights of each.

    Returns:
        The reasons of the runs that failed, by the names of the runs; None if it was asked to stop.
    """
    runs = plan.runs()
    waiting = [run for run in runs if folder.summary(run) is None]
    if done := len(runs) - len(waiting):
        _logger.info(f"{done} of {len(runs)} runs are done already")
    failures: dict[str, str] = {}
    active: list[tuple[Run, subprocess.Popen]] = []
    lengths = {run.name: epochs[run.cell.name] for run in runs}
    progress = _Progress(lengths, {run.name: folder.epochs_done(run) for run in runs}, done)

    def end(run: Run, status: int) -> None:
        summary = folder.summary(run)
        if summary is None:
            failures[run.name] = _failure(status, folder.run_folder(run) / "train.log")
        elif keep == "best":
            folder.keep_best([run])
        progress.ended(run.name, summary, failures.get(run.name, ""))
        report(failures)

    with (stop := StopSignals()), progress.bar:
        try:
            while (waiting or active) and stop.number is None:
                for run in list(waiting):
                    lock = _claim(folder.run_folder(run)) if len(active) < jobs else None
                    if lock is None:  # a process that a killed study left behind may still be writing
                        continue
                    waiting.remove(run)
                    if folder.summary(run):  # such a process has finished it
                        end(run, 0)
                    else:
                        active.append((run, _start(folder, run, lock)))
                    os.close(lock)
                time.sleep(0.2)
                for run, process in [pair for pair in active if pair[1].poll() is not None and stop.number is None]:
                    active.remove((run, process))
                    end(run, process.returncode)
                progress.show({run.name: folder.epochs_done(run) for run, _ in active})
        finally:
            for _, process in active:  # they save, and end
                process.terminate()
            for _, process in active:
                process.wait()
    return failures if stop.number is None else None
