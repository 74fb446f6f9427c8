"""The runs of a study as processes of `raftmlp train`, several at a time, and the folder that they are in."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from ..device import StopSignals
from ..errors import UserError
from ..files import write_text
from ..train.run_folder import RunFolder, opening
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
        own_preparation: Returns how the model of a cell prepares images where no option sets it, as in the studies of
            version 0.2.
    """

    def __init__(self, path: str | Path, own_preparation: Callable[[Cell], Mapping[str, Any]] = lambda cell: {}):
        self.path, self.own_preparation = Path(path), own_preparation

    @contextmanager
    def open(self, plan: Plan) -> Iterator[None]:
        """Make the folder this study's, and keep others out of it.

        A study that is there already may get more arms, points and seeds.

        Raises:
            UserError: If the folder holds anything else, cannot be written into, or is in use.
        """
        self.check(plan)
        lock = FileLock(self.path / ".lock", timeout=0)
        with opening(self.path, lock, "study"):
            content = dict(recipe=plan.recipe, arms=plan.arms, seeds=plan.seeds, points=plan.points)
            write_text(self.path / "study.yaml", yaml.safe_dump(content, sort_keys=False))
            for cell in plan.cells():
                self.options_file(cell).parent.mkdir(parents=True, exist_ok=True)
                write_text(self.options_file(cell), yaml.safe_dump(cell.options, sort_keys=False))
        try:
            yield
        finally:
            lock.release()

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
        if not then.keys() & now.keys():
            raise UserError(f"{self.path} holds another study, with the arms {', '.join(before.arms)}: {HINT}")
        for name in sorted(then.keys() & now.keys()):
            self._check_cell(then[name].options, now[name])

    def _check_cell(self, old: dict[str, Any], cell: Cell) -> None:
        """Refuse an arm that is in the folder with other options, or whose images were prepared in another way."""
        new = cell.options
        for key in [*sorted({*old, *new} - {*PREPARATION}), *PREPARATION]:
            before, after = old.get(key), new.get(key)
            if key in PREPARATION and before is None and after is not None:
                before = self.own_preparation(cell).get(key)  # its model is the same: that is compared before
            if _comparable(key, before) != _comparable(key, after):
                difference = f"in it, {key} of {cell.name} is {before}, not {after}"
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

    def keep_best(self, run: Run) -> None:
        """Remove what a finished run needs no more: all checkpoints but the best weights."""
        folder = RunFolder(self.run_folder(run))
        try:
            if self.summary(run) and (folder.last.exists() or folder.previous.exists()):
                folder.keep_best()
        except (OSError, UserError) as error:
            _logger.warning(f"{run.name}: all checkpoints are kept: {error}")

    def epochs_done(self, run: Run) -> int:
        """Return how many epochs of a run are done: lines of its log, but the first."""
        log = self.run_folder(run) / "log.csv"
        return max(0, len(log.read_text().splitlines()) - 1) if log.exists() else 0


def _comparable(key: str, value: Any) -> str:
    """Return a value of an option as a text: the same for 64 and [64, 64], and for a tuple and a list."""
    if key in PREPARATION and isinstance(value, list | tuple) and len({*value}) == 1:
        value = value[0]
    return json.dumps(value, sort_keys=True)


class _Progress:
    """A bar over all runs, or a line a minute where there is no terminal; a line for every run that ends."""

    def __init__(self, runs: Sequence[Run], epochs: Mapping[str, int], folder: StudyFolder):
        self.runs, self.epochs, self.folder, self.logged = runs, epochs, folder, time.monotonic()
        self.ended_runs = sum(folder.summary(run) is not None for run in runs)
        self.hidden = None if sys.stderr.isatty() else open(os.devnull, "w")  # noqa: SIM115  it counts there too
        counts = dict(total=len(runs), initial=self._runs_done(), smoothing=0)
        form = "{percentage:3.0f}%|{bar:10}| {desc}, {remaining} left"
        self.bar = tqdm(**counts, bar_format=form, leave=False, dynamic_ncols=True, file=self.hidden)

    def _runs_done(self) -> float:
        return sum(self.folder.epochs_done(run) / self.epochs[run.cell.name] for run in self.runs)

    def show(self, active: Sequence[Run]) -> None:
        """Show how far the runs are that are under way."""
        self.bar.n = self._runs_done()
        words = [f"{self.ended_runs} of {len(self.runs)} runs ended"]
        for run in active:
            epochs = self.epochs[run.cell.name]
            words.append(f"{run.name} epoch {min(self.folder.epochs_done(run) + 1, epochs)}/{epochs}")
        self.bar.set_description_str("; ".join(words))
        if self.hidden and time.monotonic() > self.logged + LINE_SECONDS:
            self.logged = time.monotonic()
            _logger.info(f"study: {self._meter('{percentage:.0f}%, {desc}, {remaining} left')}")

    def ended(self, run: Run, words: str) -> None:
        """Print a line for a run that has ended."""
        self.ended_runs += 1
        self.bar.n = self._runs_done()
        _logger.info(f"run {self.ended_runs}/{len(self.runs)}, {run.name}: {words}; {self._meter('{remaining} left')}")

    def _meter(self, form: str) -> str:
        return tqdm.format_meter(**{**self.bar.format_dict, "bar_format": form, "ncols": None})


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
        return handle
    except OSError:
        os.close(handle)
        return None


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


def _start_waiting(
    folder: StudyFolder, waiting: list[Run], active: dict[Run, subprocess.Popen], jobs: int
) -> list[Run]:
    """Start as many waiting runs as there is room for; return those that need no start: others have finished them."""
    finished = []
    for run in list(waiting):
        lock = _claim(folder.run_folder(run)) if len(active) < jobs else None
        if lock is None:  # a process that a killed study left behind may still be writing
            continue
        waiting.remove(run)
        if folder.summary(run):  # such a process has finished it
            finished.append(run)
        else:
            active[run] = _start(folder, run, lock)
        os.close(lock)
    return finished


def _outcome(summary: dict | None, status: int, log: Path) -> str:
    """Return how a run ended: its figures, or without a summary what it said last."""
    if summary:
        return f"top-1 {summary['last']['eval_top1']:.2f} %, {summary['seconds']} s"
    if status < 0:
        return f"it was killed by signal {-status}, for want of memory perhaps"
    lines = log.read_text(errors="replace").strip().splitlines() or ["it ended without a word"]
    return lines[-1].split("error: ", 1)[-1]


def run_study(
    folder: StudyFolder,
    runs: Sequence[Run],
    epochs: Mapping[str, int],
    jobs: int,
    report: Callable[[dict[str, str]], object],
    keep: str = "all",
) -> dict[str, str] | None:
    """Run what is not done of a study, ``jobs`` runs at a time in one thread each.

    A run that fails does not end the others. SIGTERM and Ctrl-C are passed on to the runs, which save first.

    Args:
        folder: The study's folder, opened.
        runs: All runs of the study.
        epochs: The epochs of a run, by the names of the cells.
        jobs: Processes at a time.
        report: Called with the failures so far whenever a run has ended.
        keep: "all" the checkpoints of the runs that end now, or the "best" weights of each.

    Returns:
        The reasons of the runs that failed, by the names of the runs; None if it was asked to stop.
    """
    waiting = [run for run in runs if folder.summary(run) is None]
    if len(waiting) < len(runs):
        _logger.info(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
    failures: dict[str, str] = {}
    active: dict[Run, subprocess.Popen] = {}
    progress = _Progress(runs, epochs, folder)

    def end(run: Run, status: int = 0) -> None:
        summary = folder.summary(run)
        words = _outcome(summary, status, folder.run_folder(run) / "train.log")
        if not summary:
            failures[run.name] = words
        elif keep == "best":
            folder.keep_best(run)
        progress.ended(run, words if summary else f"failed: {words}")
        report(failures)

    with (stop := StopSignals()), progress.bar:
        try:
            while (waiting or active) and stop.number is None:
                for run in _start_waiting(folder, waiting, active, jobs):
                    end(run)
                time.sleep(0.2)
                for run, process in list(active.items()):
                    if process.poll() is not None and stop.number is None:
                        end(run, active.pop(run).returncode)
                progress.show([*active])
        finally:
            for process in active.values():  # they save, and end
                process.terminate()
            for process in active.values():
                process.wait()
    return failures if stop.number is None else None
