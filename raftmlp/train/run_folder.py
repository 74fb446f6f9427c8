"""The folder of a training run: checkpoints that are complete or absent, one run at a time."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ..checkpoints.weights import first_readable, load_checkpoint
from ..errors import MissingFileError, UserError, first_words
from ..files import new_file

__all__ = ["RunFolder", "opening"]

_logger = logging.getLogger(__name__)
TEMPORARY = (".*.tar", ".args.*.yaml", ".bad_batch.*.txt", ".curves.*.png", ".log.*.csv", ".summary.*.json")
RUN_FILES = ("*.pth.tar", "args.yaml", "bad_batch.txt", "bad_images.txt", "curves.png", "log.csv", "summary.json")


@contextmanager
def opening(path: Path, lock: FileLock, user: str) -> Iterator[None]:
    """Make a folder and take its lock, unless another ``user`` ("run" or "study") has it; then write into it first."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        yield
    except Timeout as error:
        raise UserError(f"another {user} is writing into {path}: name another folder with --output") from error


class RunFolder:
    """A folder with last.pth.tar, previous.pth.tar (the checkpoint before it) and model_best.pth.tar."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.last, self.previous = self.path / "last.pth.tar", self.path / "previous.pth.tar"
        self.best, self.summary = self.path / "model_best.pth.tar", self.path / "summary.json"
        self._lock = FileLock(self.path / ".lock", timeout=0)

    def prepare(self, resume: str | Path | None, overwrite: bool) -> Path | None:
        """Keep other runs out of the folder, and return the checkpoint to resume from, if any.

        Args:
            resume: A checkpoint file; "auto" for the last complete one in the folder, if any; None to start a new run.
            overwrite: Whether a run in the folder may be lost.
        """
        if (self.path / "study.yaml").exists():
            raise UserError(f"{self.path} holds a study: name another folder with --output")
        file = Path(resume) if resume not in (None, "auto") else None
        if self.holds_run() and not overwrite and resume != "auto" and not (file and self.contains(file)):
            raise UserError(
                f"{self.path} holds a run: resume it with --resume, name another folder with --output, or --overwrite "
                f"it"
            )
        if file and not file.is_file():
            hint = f"; to resume the run in that folder: --output {resume} --resume" if file.is_dir() else ""
            raise MissingFileError(f"no checkpoint to resume from at {resume}{hint}")
        self.open()
        path = file or (self.find_checkpoint() if resume else None)
        if resume and not path:
            _logger.info(f"no checkpoint in {self.path} yet: starting at the beginning")
        return path

    def open(self) -> None:
        """Make the folder, and keep other runs out of it until ``close`` or the end of this process."""
        with opening(self.path, self._lock, "run"):
            self._remove(TEMPORARY)  # what a run left that was killed while it wrote

    def close(self) -> None:
        """Let other runs into the folder."""
        self._lock.release()

    def contains(self, path: Path) -> bool:
        """Return whether a file is one of this folder."""
        return path.parent.resolve() == self.path.resolve()

    def holds_run(self) -> bool:
        """Return whether there is a checkpoint to resume from, or a finished run of which the best weights are kept."""
        return bool(self._checkpoints()) or self._keeps_best()

    def _checkpoints(self) -> list[Path]:
        return [path for path in (self.last, self.previous) if path.exists()]

    def _keeps_best(self) -> bool:
        return not self._checkpoints() and self.best.exists() and self.summary.exists()

    def resumes(self, resume: str | Path | None) -> bool:
        """Return whether a run is resumed: from a file, or as "auto" from a checkpoint that is in the folder."""
        return bool(resume) and (resume != "auto" or self.holds_run())

    def clear(self) -> None:
        """Remove the files of a run, and no others."""
        self._remove(RUN_FILES)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    def _remove(self, patterns: Sequence[str]) -> None:
        for pattern in patterns:
            for path in self.path.glob(pattern):
                path.unlink()

    def save(self, state: dict, best: bool = False) -> None:
        """Write a checkpoint as the last one, and as the best one too; a kill at any moment leaves complete ones."""
        new = self.path / ".new.pth.tar"
        try:
            with new_file(new) as temporary, temporary.open("wb") as file:
                torch.save(state, file)
            if best:
                _copy(new, self.best)
        except (OSError, RuntimeError) as error:
            new.unlink(missing_ok=True)
            raise UserError(
                f"cannot save a checkpoint into {self.path}: {first_words(error)}; the earlier checkpoints are intact: "
                f"free some space, then the same command with --resume continues"
            ) from error
        if self.last.exists():
            os.replace(self.last, self.previous)
        os.replace(new, self.last)

    def keep_best(self) -> None:
        """Keep the best weights of a finished run, and no other checkpoint, optimizer or weights before averaging."""
        checkpoint = load_checkpoint(self.best)
        dropped = {"optimizer", "amp_scaler"} | ({"state_dict"} if "state_dict_ema" in checkpoint else set())
        with new_file(self.best) as temporary:
            torch.save({key: value for key, value in checkpoint.items() if key not in dropped}, temporary)
        self.last.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)

    def roll_back(self, past_last: bool) -> Path | None:
        """Return the checkpoint to resume from, if any; ``past_last`` renames the last one, which does not count."""
        if past_last and self.last.exists():
            os.replace(self.last, self.path / "diverged.pth.tar")
        return next(iter(self._checkpoints()), None)

    def take_best_of(self, checkpoint: Path) -> None:
        """Take over the best checkpoint of another folder's run, which is resumed from a checkpoint of it."""
        best = checkpoint.with_name(self.best.name)
        _copy(best if best.is_file() else checkpoint, self.best)

    def find_checkpoint(self) -> Path | None:
        """Return the last complete checkpoint, None if there was never one; a damaged one is renamed, and logged."""
        if self._keeps_best():
            raise UserError(
                f"{self.path} holds a finished run of which only the best weights are kept, {self.best.name}: it "
                f"cannot be resumed; name another folder with --output, or --overwrite it without --resume"
            )
        path, damaged = first_readable(self._checkpoints())
        if damaged and path is None:
            hint = f"; --resume {self.best} starts from the best one" if self.best.exists() else ""
            raise UserError(f"no checkpoint is complete: {'; '.join(damaged)}{hint}")
        if damaged:
            renamed = self.path / "damaged.pth.tar"
            os.replace(self.last, renamed)
            _logger.info(f"{damaged[0]}; it is {renamed.name} now, {path.name} takes its place")
        return path


def _copy(source: Path, target: Path) -> None:
    with new_file(target) as temporary:
        shutil.copyfile(source, temporary)
