"""How a study goes: how far its runs are, and the time that is left."""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from statistics import mean

from tqdm import tqdm
from tqdm.std import EMA

from .plan import Run

__all__ = ["StudyProgress", "epochs_in_log"]

_logger = logging.getLogger(__name__)
UPDATE = re.compile(r"^epoch (\d+)/\d+, update (\d+)/(\d+):", re.MULTILINE)  # a line of a run's log
LINE_SECONDS = 60  # between lines where there is no terminal
SMOOTHING = 0.1  # weight of the latest estimate of the end, one a second


def epochs_in_log(text: str) -> float:
    """Return how many epochs are done as the last line of progress in a run's log says; 0 without one."""
    lines = UPDATE.findall(text)
    if not lines:
        return 0.0
    epoch, update, updates = map(int, lines[-1])
    return epoch - 1 + update / updates


class _Pace:
    """How fast a run goes that is under way: the seconds that it will have taken."""

    def __init__(self, share: float):
        self.start, self.start_share = time.monotonic(), share
        self.first: tuple[float, float] | None = None

    def seconds(self, share: float) -> float | None:
        """Return the seconds of the whole run, of which a share is done; None while that cannot be told."""
        elapsed = time.monotonic() - self.start
        if self.first is None and share > self.start_share:
            self.first = (elapsed, share)  # until then the process started, which is not part of the pace
        if self.first is None or share <= self.first[1]:
            return None
        before, first = self.first
        pace = (elapsed - before) / (share - first)
        return before + (1 - first + self.start_share) * pace


class StudyProgress:
    """A bar over all runs, or a line a minute where there is no terminal; a line for every run that ends.

    The time left is that of the runs that are left, at the mean seconds of the same arm's other runs, and smoothed.

    Args:
        runs: All runs of the study.
        epochs: How many a run has, by the names of the cells.
        finished: The summaries of the runs that are finished, by their names.
        jobs: Runs at a time.
    """

    def __init__(self, runs: Sequence[Run], epochs: Mapping[str, int], finished: Mapping[str, dict], jobs: int):
        self.runs, self.epochs, self.jobs = runs, epochs, jobs
        self.shares = dict.fromkeys(finished, 1.0)  # of runs that are done or under way, by their names
        self.took: dict[str, list[float]] = {}  # seconds of finished runs, by the names of the cells
        self.ended_runs, self.paces = len(finished), {}
        self.end, self.shown, self.logged = EMA(SMOOTHING), 0.0, time.monotonic()
        for run in runs:
            if run.name in finished:
                self.took.setdefault(run.cell.name, []).append(finished[run.name]["seconds"])
        form = "{percentage:3.0f}%|{bar:10}| {desc}"
        self.bar = tqdm(total=len(runs), bar_format=form, leave=False, disable=None, dynamic_ncols=True)

    def show(self, epochs_done: Sequence[tuple[Run, float]]) -> None:
        """Show how many epochs the runs that are under way have done; once a second at most."""
        now = time.monotonic()
        if now < self.shown + 1:
            return
        self.shown = now
        known = {cell: mean(seconds) for cell, seconds in self.took.items()}
        for run, done in epochs_done:
            self.shares[run.name] = share = done / self.epochs[run.cell.name]
            seconds = self.paces.setdefault(run.name, _Pace(share)).seconds(share)
            if seconds is not None:
                known.setdefault(run.cell.name, seconds)
        if known:
            self.end(now + self._left(known))
        words = "; ".join([self._count(), *(self._position(run, done) for run, done in epochs_done)])
        self.bar.n = sum(self.shares.values())
        self.bar.set_description_str(words)
        if self.bar.disable and now > self.logged + LINE_SECONDS:
            self.logged = now
            _logger.info(f"study: {words}")

    def ended(self, run: Run, summary: dict | None, failure: str) -> None:
        """Print a line for a run that has ended, with the summary of one that is finished."""
        self.ended_runs += 1
        self.shares[run.name] = 1.0
        pace = self.paces.pop(run.name, None)
        words = f"failed: {failure}"
        if summary:
            words = f"top-1 {summary['last']['eval_top1']:.2f} %, {summary['seconds']} s"
            # with the start of the process, which is what another run of the arm takes
            seconds = max(summary["seconds"], time.monotonic() - pace.start if pace else 0)
            self.took.setdefault(run.cell.name, []).append(seconds)
        left = self._time_left()
        _logger.info(f"run {self.ended_runs}/{len(self.runs)}, {run.name}: {words}{left and f'; {left}'}")

    def _left(self, known: Mapping[str, float]) -> float:
        """Return the seconds that are left, where the arms' runs take as long as is known of some."""
        usual = mean(known.values())
        rest = [(1 - self.shares.get(run.name, 0)) * known.get(run.cell.name, usual) for run in self.runs]
        return max(sum(rest) / self.jobs, *rest)

    def _time_left(self) -> str:
        end = self.end()
        if not end or self.ended_runs == len(self.runs):
            return ""
        return f"{timedelta(seconds=round(max(0, end - time.monotonic())))} left"

    def _count(self) -> str:
        return ", ".join(filter(None, [f"{self.ended_runs} of {len(self.runs)} runs ended", self._time_left()]))

    def _position(self, run: Run, done: float) -> str:
        """Return where a run is: "mean/seed-0 epoch 2/3, 45 %", the percent of the whole run."""
        epochs = self.epochs[run.cell.name]
        return f"{run.name} epoch {min(int(done) + 1, epochs)}/{epochs}, {done / epochs:.0%}"
