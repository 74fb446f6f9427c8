"""The folder of a run: complete checkpoints at every moment, full disks, other runs."""

import errno
import os
from pathlib import Path

import pytest
import torch

from helpers import fill_disk
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.errors import UserError
from raftmlp.train.run_folder import RunFolder

STATE = dict(state_dict=dict(weight=torch.zeros(3)))


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open()
    folder.save({**STATE, "epoch": 0})
    yield folder
    folder.close()


def epoch_of(path: Path) -> int:
    return load_checkpoint(path)["epoch"]


def test_saving_is_complete_at_every_step(folder, monkeypatch):
    """A kill between any two system calls of a save leaves a checkpoint that is the old or the new one."""
    for kill_at in range(20):
        calls = iter(range(100))
        with monkeypatch.context() as patch:
            for name in ("fsync", "link", "replace"):
                real = getattr(os, name)

                def call(*args, real=real):
                    if next(calls) == kill_at:
                        raise KeyboardInterrupt
                    return real(*args)

                patch.setattr(os, name, call)
            try:
                folder.save({**STATE, "epoch": kill_at + 1}, best=True)
                finished = True
            except KeyboardInterrupt:
                finished = False
        found = epoch_of(folder.find_checkpoint())
        assert found == kill_at + 1 if finished else found in (kill_at, kill_at + 1)
        if folder.best.exists():
            assert epoch_of(folder.best) <= kill_at + 1
        if not finished:
            folder.save({**STATE, "epoch": kill_at + 1})
        assert epoch_of(folder.previous) <= kill_at + 1
        if finished:
            break
    assert finished and kill_at > 6


def test_a_full_disk_leaves_the_checkpoints_as_they_were(folder, monkeypatch):
    before = folder.last.read_bytes()
    with monkeypatch.context() as patch:
        fill_disk(patch)
        with pytest.raises(UserError, match="cannot save a checkpoint into .*No space left on device"):
            folder.save({**STATE, "epoch": 1})
    assert folder.last.read_bytes() == before
    assert {path.name for path in folder.path.iterdir()} == {".lock", "last.pth.tar"}
    folder.save({**STATE, "epoch": 1})
    assert (epoch_of(folder.last), epoch_of(folder.previous)) == (1, 0)


def test_a_file_system_without_hard_links(folder, monkeypatch):
    def refuse(*_paths):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    folder.save({**STATE, "epoch": 1}, best=True)
    assert [epoch_of(path) for path in (folder.last, folder.previous, folder.best)] == [1, 0, 1]


def test_one_run_at_a_time(folder):
    other = RunFolder(folder.path)
    with pytest.raises(UserError, match="another run is writing into .*--output"):
        other.prepare("auto", overwrite=False)
    folder.close()
    assert other.prepare("auto", overwrite=False) == folder.last
    other.close()


def test_what_a_killed_run_left_is_removed(folder):
    folder.close()
    (folder.path / "..new.pth.abc.tar").write_text("cut")
    (folder.path / ".mine").write_text("keep")
    folder.open()
    assert {path.name for path in folder.path.iterdir()} == {".lock", ".mine", "last.pth.tar"}


def test_which_checkpoint_is_resumed_from(folder, tmp_path):
    folder.save({**STATE, "epoch": 1})
    with pytest.raises(UserError, match="holds a run.*--resume.*--output.*--overwrite"):
        folder.prepare(None, overwrite=False)
    with pytest.raises(UserError, match="no checkpoint to resume from at .*missing.pth"):
        folder.prepare(folder.path / "missing.pth", overwrite=False)
    assert folder.prepare(None, overwrite=True) is None
    assert folder.prepare(folder.previous, overwrite=False) == folder.previous
    folder.last.write_bytes(b"cut")
    assert folder.prepare("auto", overwrite=False) == folder.previous
    assert (folder.path / "damaged.pth.tar").read_bytes() == b"cut"
    assert RunFolder(tmp_path / "new").prepare("auto", overwrite=False) is None


def test_rollback(folder):
    assert folder.roll_back(past_last=False) == folder.last
    folder.save({**STATE, "epoch": 1})
    assert folder.roll_back(past_last=True) == folder.previous
    assert epoch_of(folder.path / "diverged.pth.tar") == 1 and not folder.last.exists()
    folder.clear()
    assert folder.roll_back(past_last=True) is None
