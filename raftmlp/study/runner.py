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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from ..device import StopSignals
from ..errors import UserError
from ..files import write_text
from ..train.run_folder import RunFolder, opening
from .plan import PREPARATION, Cell, Plan, Run
from .progress import StudyProgress, epochs_in_log

__all__ = ["StudyFolder", "run_study"]

_logger = logging.getLogger(__name__)
PACKAGE_PARENT = Path(__file__).parents[2]
LOG_LINES = 20  # of progress in an epoch of a run
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
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"cannot write into {self.path}: it is a file")
        if all(entry.name == ".lock" for entry in self.path.iterdir()):
            return
        try:
            before = Plan.from_content(yaml.safe_load((self.path / "study.yaml").read_text()))
        except FileNotFoundError as error:
            what = "a training run" if RunFolder(self.path).holds_run() else "something else than a study"
            raise UserError(f"{self.path} holds {what}: {HINT}") from error
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise UserError(f"{self.path / 'study.yaml'} is damaged: {HINT}") from error
        then, now = ({cell.name: cell for cell in p.cells()} for p in (before, plan))
        common = sorted(then.keys() & now.keys())
        if not common:
            raise UserError(f"{self.path} holds another study, with the arms {', '.join(before.arms)}: {HINT}")
        for name in common:
            self._check_cell(then[name], now[name])

    def _check_cell(self, then: Cell, now: Cell) -> None:
        """Refuse an arm that is in the folder with other options, or whose images were prepared in another way."""
        unset = [key for key in PREPARATION if then.options.get(key) is None and self.own_preparation]
        for key in sorted({*then.options, *now.options} - {*unset}):
            self._compare(now, key, then.options.get(key), now.options.get(key))
        if any(now.options.get(key) is not None for key in unset):
            own = self.own_preparation(then)
            for key in unset:
                hint = f"set {key} in the arm to continue it, or {HINT}"
                new = now.options.get(key)
                self._compare(now, key, own[key], own[key] if new is None else new, hint)

    def _compare(self, cell: Cell, key: str, old: Any, new: Any, hint: str = HINT) -> None:
        if _comparable(key, old) != _comparable(key, new):
            raise UserError(f"{self.path} holds another study: in it, {key} of {cell.name} is {old}, not {new}; {hint}")

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

    def __init__(self, folder: StudyFolder, run: Run, updates: int, lock: int):
        self.run, self.folder, self.path = run, folder, folder.run_folder(run)
        command = [sys.executable, "-m", "raftmlp", "train", "-c", folder.options_file(run.cell.name)]
        command += ["--seed", run.seed, "--output", self.path]
        if "log_interval" not in run.cell.options:
            command += ["--log-interval", max(1, updates // LOG_LINES)]
        command += ["--resume"]
        paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # also: the same sums at every run
        with (self.path / "train.log").open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                pass_fds=[lock] if fcntl else [],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
            )

    def epochs_done(self) -> float:
        """Return how many epochs are done, with the part of the one that is under way."""
        with (self.path / "train.log").open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_start, end - 4096))
            text = log.read().decode(errors="replace")
        return max(self.folder.epochs_done(self.run), epochs_in_log(text))

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
    lengths: Mapping[str, tuple[int, int]],
    jobs: int,
    report: Callable[[dict[str, str]], None],
    keep: str = "all",
) -> dict[str, str] | None:
    """Run what is not done of a study, ``jobs`` runs at a time in one thread each.

    A run that fails does not end the others. SIGTERM and Ctrl-C are passed on to the runs, which save first.

    Args:
        folder: The study's folder, opened.
        plan: The study.
        lengths: The epochs of a run and the updates of an epoch, by the names of the cells.
        jobs: Processes at a time.
        report: Called with the failures so far whenever a run has ended.
        keep: "all" the checkpoints of the runs that end now, or the "best" weights of each.

    Returns:
        The reasons of the runs that failed, by the names of the runs; None if it was asked to stop.
    """
    runs = plan.runs()
    finished = {run.name: summary for run in runs if (summary := folder.summary(run)) is not None}
    waiting = [run for run in runs if run.name not in finished]
    if finished:
        _logger.info(f"{len(finished)} of {len(runs)} runs are done already")
    failures: dict[str, str] = {}
    active: list[_Process] = []
    progress = StudyProgress(runs, {name: epochs for name, (epochs, _) in lengths.items()}, finished, jobs)
    with (stop := StopSignals()), progress.bar:
        try:
            while (waiting or active) and stop.number is None:
                for run in list(waiting):
                    lock = _claim(folder.run_folder(run)) if len(active) < jobs else None
                    if lock is None:  # a process that a killed study left behind may still be writing
                        continue
                    waiting.remove(run)
                    if summary := folder.summary(run):  # such a process has finished it
                        progress.ended(run, summary, "")
                    else:
                        active.append(_Process(folder, run, lengths[run.cell.name][1], lock))
                    os.close(lock)
                time.sleep(0.2)
                for process in [process for process in active if process.process.poll() is not None]:
                    active.remove(process)
                    if stop.number is not None:
                        continue
                    summary = folder.summary(process.run)
                    if summary is None:
                        failures[process.run.name] = process.failure()
                    elif keep == "best":
                        folder.keep_best([process.run])
                    progress.ended(process.run, summary, failures.get(process.run.name, ""))
                    report(failures)
                progress.show([(process.run, process.epochs_done()) for process in active])
        finally:
            _end(active)
    return failures if stop.number is None else None


def _end(active: Sequence[_Process]) -> None:
    """Let the runs save and end."""
    for process in active:
        process.process.terminate()
    for process in active:
        process.process.wait()
