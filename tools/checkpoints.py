"""The folder of a training run: checkpoints that are there whole or not at all, one run at a time."""

import fcntl
import os
import shutil
from pathlib import Path

import torch

import cli
from raftmlp.checkpoint import load_checkpoint

RUN_FILES = (
    ".*.pth.tar",
    "*.pth.tar",
    "args.yaml",
    "bad_batch.txt",
    "bad_images.txt",
    "curves.png",
    "log.csv",
    "summary.json",
)


class RunFolder:
    """A folder with last.pth.tar, previous.pth.tar (the checkpoint before it) and model_best.pth.tar.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.last, self.previous = self.path / "last.pth.tar", self.path / "previous.pth.tar"
        self.best = self.path / "model_best.pth.tar"

    def open(self) -> None:
        """Make the folder, and keep other runs out of it for as long as this process lives.

        Raises:
            UserError: If it cannot be made or written into, or another run is writing into it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise cli.UserError(f"cannot write into {self.path}: {error.strerror}") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise cli.UserError(
                f"another run is writing into {self.path}: name another folder with --output"
            ) from error
        except OSError:
            pass  # a file system without locks

    def has(self, path: Path) -> bool:
        """Return whether a file is one of this folder."""
        return path.parent.resolve() == self.path.resolve()

    def holds_run(self) -> bool:
        """Return whether there is a checkpoint to go on from."""
        return self.last.exists() or self.previous.exists()

    def clear(self) -> None:
        """Remove the files of a run, and no others."""
        for pattern in RUN_FILES:
            for path in self.path.glob(pattern):
                path.unlink()
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    def save(self, state: dict, best: bool = False) -> None:
        """Write a checkpoint as the last one, and as the best one too; a kill at any moment leaves whole ones.

        Raises:
            UserError: If it cannot be written; the checkpoints of before are as they were.
        """
        new = self.path / ".saving.pth.tar"
        try:
            with new.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if best:
                _put(new, self.best)
            if self.last.exists():
                _put(self.last, self.previous)
            os.replace(new, self.last)
            _sync_folder(self.path)
        except (OSError, RuntimeError) as error:
            new.unlink(missing_ok=True)
            raise cli.UserError(
                f"cannot save a checkpoint into {self.path}: {cli.first_words(error)}; the checkpoints of before are "
                f"intact: make room, then the same command with --resume goes on"
            ) from error

    def go_back(self, past_last: bool) -> Path | None:
        """Return the checkpoint that the next --resume goes on from, if any; past the last one, that is put aside."""
        found = [path for path in (self.last, self.previous) if path.exists()]
        if found and past_last:
            os.replace(found.pop(0), self.path / "diverged.pth.tar")
        return found[0] if found else None

    def adopt(self, source: Path) -> None:
        """Take over the best checkpoint of the run that is gone on with from another folder."""
        best = source.with_name(self.best.name)
        _put(best if best.is_file() else source, self.best)

    def find(self) -> Path | None:
        """Return the last whole checkpoint, None if there was never one; a damaged one is put aside, and named.

        Raises:
            UserError: If there are checkpoints, and all are damaged.
        """
        damaged = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                load_checkpoint(path)
            except ValueError as error:
                damaged.append(str(error))
                continue
            if damaged:
                aside = self.path / "damaged.pth.tar"
                os.replace(self.last, aside)
                cli.say(f"{damaged[0]}; it is {aside.name} now, {path.name} takes its place")
            return path
        if damaged:
            hint = f"; --resume {self.best} goes on from the best one" if self.best.exists() else ""
            raise cli.UserError(f"no checkpoint is whole: {'; '.join(damaged)}{hint}")
        return None


def _put(source: Path, target: Path) -> None:
    """Let target be the file that source is; there is a whole target at every moment."""
    beside = target.with_name(f".{target.name}")
    beside.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), beside)
    except OSError:  # a file system without hard links
        try:
            shutil.copyfile(source, beside)
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
        except OSError:
            beside.unlink(missing_ok=True)
            raise
    os.replace(beside, target)


def _sync_folder(path: Path) -> None:
    """Have the names in a folder written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
