"""The runs of a study as processes of `raftmlp train`, several at a time, and the folder that they are in."""

import csv
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
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
from ..train.run_folder import opening
from ..train.signals import StopSignals
from .plan import Plan, Run

__all__ = ["StudyFolder", "run_study"]

_logger = logging.getLogger(__name__)
PACKAGE_PARENT = Path(__file__).parents[2]


class StudyFolder:
    """The folder of a study: study.yaml, options/ARM.yaml, runs/ARM/seed-N/, and the results; one process at a time.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
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
                file = self.options_file(cell.name)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, yaml.safe_dump(cell.options, sort_keys=False))

    def close(self) -> None:
        """Let other processes into the folder."""
        self._lock.release()

    def check(self, plan: Plan) -> None:
        """Refuse a folder that is not this study's, or not empty.

        Raises:
            UserError: If it is so; the message names the difference.
        """
        hint = "name another folder with --output"
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"cannot write into {self.path}: it is a file")
        if all(entry.name == ".lock" for entry in self.path.iterdir()):
            return
        try:
            before = Plan.from_content(yaml.safe_load((self.path / "study.yaml").read_text()))
        except FileNotFoundError as error:
            raise UserError(f"{self.path} holds something else than a study: {hint}") from error
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise UserError(f"{self.path / 'study.yaml'} is damaged: {hint}") from error
        then, now = ({cell.name: cell.options for cell in p.cells()} for p in (before, plan))
        common = then.keys() & now.keys()
        if not common:
            raise UserError(f"{self.path} holds another study, with the arms {', '.join(before.arms)}: {hint}")
        for name in sorted(common):
            for key in sorted({*then[name], *now[name]}):
                old, new = then[name].get(key), now[name].get(key)
                if json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):  # a tuple is a list there
                    raise UserError(
                        f"{self.path} holds another study: in it, {key} of {name} is {old}, not {new}; {hint}"
                    )

    def options_file(self, cell: str) -> Path:
        """Return the file with the options of an arm at a point."""
        return self.path / "options" / f"{cell}.yaml"

    def run_folder(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.path / "runs" / run.name

    def summary(self, run: Run) -> dict[str, Any] | None:
        """Return the summary of a finished run, None of others."""
        file = self.run_folder(run) / "summary.json"
        return json.loads(file.read_text()) if file.exists() else None

    def epochs_done(self, run: Run) -> int:
        """Return how many epochs of a run are done."""
        try:
            with (self.run_folder(run) / "log.csv").open() as file:
                return sum(1 for _ in csv.DictReader(file))
        except FileNotFoundError:
            return 0


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


class _Process:
    """A run that is under way; it has the lock on its folder."""

    def __init__(self, folder: StudyFolder, run: Run, lock: int):
        self.run, self.path = run, folder.run_folder(run)
        command = [sys.executable, "-m", "raftmlp", "train", "-c", folder.options_file(run.cell.name)]
        command += ["--seed", run.seed, "--output", self.path, "--resume"]
        paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # also: the same sums at every run
        with (self.path / "train.log").open("ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                pass_fds=[lock] if fcntl else [],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
            )

    def failure(self) -> str:
        """Return why the run ended without a summary: what it said last."""
        if self.process.returncode < 0:
            return f"it was killed by signal {-self.process.returncode}, for want of memory perhaps"
        text = (self.path / "train.log").read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it ended without a word"]
        return next((line.split("error: ", 1)[1] for line in reversed(lines) if "error: " in line), lines[-1])


def run_study(
    folder: StudyFolder,
    plan: Plan,
    epochs: Mapping[str, int],
    jobs: int,
    report: Callable[[dict[str, str]], None],
) -> dict[str, str] | None:
    """Run what is not done of a study, ``jobs`` runs at a time in one thread each.

    A run that fails does not end the others. SIGTERM and Ctrl-C are passed on to the runs, which save first.

    Args:
        folder: The study's folder, opened.
        plan: The study.
        epochs: How many a run has, by the names of the cells.
        jobs: Processes at a time.
        report: Called with the failures so far whenever a run has ended.

    Returns:
        The reasons of the runs that failed, by the names of the runs; None if it was asked to stop.
    """
    runs = plan.runs()
    waiting = [run for run in runs if folder.summary(run) is None]
    if len(waiting) < len(runs):
        _logger.info(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
    failures: dict[str, str] = {}
    active: list[_Process] = []
    progress = _Progress(folder, runs, epochs)
    stop = StopSignals()
    with stop, progress.bar:
        try:
            while (waiting or active) and stop.number is None:
                for run in list(waiting):
                    lock = _claim(folder.run_folder(run)) if len(active) < jobs else None
                    if lock is None:  # a process that a killed study left behind may still be writing
                        continue
                    waiting.remove(run)
                    if folder.summary(run) is None:  # such a process may have finished it
                        active.append(_Process(folder, run, lock))
                    os.close(lock)
                time.sleep(0.2)
                for process in [process for process in active if process.process.poll() is not None]:
                    active.remove(process)
                    if stop.number is not None:
                        continue
                    if folder.summary(process.run) is None:
                        failures[process.run.name] = process.failure()
                    progress.ended(process.run, failures)
                    report(failures)
                progress.show(failures)
        finally:
            _end(active)
    return failures if stop.number is None else None


def _end(active: Sequence[_Process]) -> None:
    """Let the runs save and end."""
    for process in active:
        process.process.terminate()
    for process in active:
        process.process.wait()


class _Progress:
    """A bar over the epochs of all runs, with the time left; a line for every run that ends."""

    def __init__(self, folder: StudyFolder, runs: Sequence[Run], epochs: Mapping[str, int]):
        self.folder, self.runs, self.epochs = folder, runs, epochs
        self.total, self.first = sum(epochs[run.cell.name] for run in runs), self._done({})
        self.start = time.monotonic()
        self.ended_runs = sum(folder.summary(run) is not None for run in runs)
        self.bar = tqdm(total=self.total, initial=self.first, desc="study", unit="epoch", leave=False, disable=None)

    def _done(self, failures: dict[str, str]) -> int:
        """Return the epochs that need no more work: also those of runs that failed."""
        return sum(
            self.epochs[run.cell.name] if run.name in failures else self.folder.epochs_done(run) for run in self.runs
        )

    def show(self, failures: dict[str, str]) -> None:
        """Move the bar."""
        if not self.bar.disable:
            self.bar.n = self._done(failures)
            self.bar.set_postfix_str(f"{self.ended_runs} of {len(self.runs)} runs ended")

    def ended(self, run: Run, failures: dict[str, str]) -> None:
        """Print a line."""
        self.ended_runs += 1
        done = self._done(failures)
        seconds = (time.monotonic() - self.start) / max(1, done - self.first) * (self.total - done)
        summary = self.folder.summary(run)
        words, left = f"failed: {failures.get(run.name)}", timedelta(seconds=round(seconds))
        if summary:
            words = f"top-1 {summary['last']['eval_top1']:.2f} %, {summary['seconds']} s"
        _logger.info(f"run {self.ended_runs}/{len(self.runs)}, {run.name}: {words}; {left} left")
