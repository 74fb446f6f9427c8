"""The parts of a run: state and losses, resume or not, the folder of checkpoints, what is logged and exported."""

import csv
import io
import json
import logging
import os
import sys
from functools import partialmethod
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
from tqdm import tqdm

from helpers import TINY, assert_same, fill_disk
from raftmlp import list_pretrained
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import train
from raftmlp.device import Processes
from raftmlp.errors import UserError
from raftmlp.evaluate import plots
from raftmlp.train import TrainSettings, run_logger
from raftmlp.train.run_folder import RunFolder
from raftmlp.train.run_logger import Progress, RunLogger, summarize
from raftmlp.train.settings import make_recipe
from raftmlp.train.state import DivergedError, TrainState, reason_not_to_resume

DIGITS = [*TINY, "--dataset", "digits", "--batch-size", 256, "--warmup-epochs", 0]
ALONE = Processes(torch.device("cpu"))

# State


def test_the_best_epoch_and_the_state_of_a_run():
    state, figures = TrainState(update=4, loss_sum=2.0), [(50.0, 1.0), (60.0, 0.9), (60.0, 0.8), (60.0, 0.85)]
    rows = [dict(eval_top1=top1, eval_loss=loss) for top1, loss in figures]
    for row in rows:
        state.end_epoch(row)
    assert state.best is rows[2] and state.position == (4, 0) and state.loss_sum == 0
    other = TrainState()
    other.load_state_dict({**state.state_dict(), "state_dict": {}})
    assert other == state


def test_losses_are_read_late_and_a_bad_one_is_found():
    state = TrainState()
    state.end_update(torch.tensor([0.5, 0.0]), lr=0.1)
    assert state.read_losses(keep=1) is False and state.mean_loss is None
    state.end_update(torch.tensor([1.5, 2.0]), lr=0.1)
    assert state.read_losses(keep=1) is False and state.mean_loss == state.loss_sum == 0.5
    assert state.read_losses() is True and state.loss_sum == 2.0 and state.mean_loss == 1.0
    state.end_update(torch.tensor([float("nan"), 0.0]), lr=0.3)
    with pytest.raises(DivergedError) as error:
        state.read_losses()
    assert (error.value.update, error.value.lr) == (2, 0.3)


# Whether a run may be resumed

RECIPE = make_recipe(TrainSettings(epochs=3, global_batch_size=8))
CHECKPOINT = dict(optimizer={}, options=RECIPE, epoch=2, update=1, updates_per_epoch=5)
OPEN = {**RECIPE, "global_batch_size": None, "train_batch_sizes": [8, 4]}
OLD = dict(resizing="update")  # as version 0.2 called it
PROGRESSIVE = {**RECIPE, "train_img_sizes": ["24", "32"], "train_size_schedule": "progressive"}


@pytest.mark.parametrize(
    "changes, recipe, reason",
    [
        ({}, {}, ""),
        (dict(options={**RECIPE, "lr": 1, "epochs": 9}), {}, ""),
        (dict(options={}, update=0), {}, ""),  # of a version that did not say them
        (dict(options={key: value for key, value in RECIPE.items() if "train_" not in key}), {}, ""),
        (dict(options={**RECIPE, "opt": "sgd"}), {}, "--opt sgd, not adamw"),
        (dict(options={**RECIPE, "model_kwargs": OLD}), dict(model_kwargs=dict(resizing="residual")), ""),
        (dict(options={**RECIPE, "val_share": 0.1}), {}, "--val-share 0.1 --seed 42, not no --val-share"),
        (dict(options={**RECIPE, "kd_sha256": "a"}), dict(kd_sha256="b"), "--kd-checkpoint"),
        (dict(options={**RECIPE, "seed": 1}), {}, "--seed 1"),
        (dict(options={**RECIPE, "seed": 1}, update=0), {}, ""),
        (dict(updates_per_epoch=6), {}, "6 updates, of which this data makes 5"),
        (dict(options={**RECIPE, "train_img_sizes": ["24", "32"]}), {}, "--train-img-sizes 24 32: None"),
        (dict(options={**PROGRESSIVE, "epochs": 9}), PROGRESSIVE, "--epochs 9: 3"),
        (dict(options={**OPEN, "train_batch_sizes": [9, 4]}), OPEN, "--train-batch-sizes 9 4: 8 4"),
        (dict(options={**RECIPE, "train_batch_sizes": [9, 4]}), {}, ""),
        (dict(epoch=3), {}, "epoch 4, --epochs says 3"),
        (dict(epoch=3, update=0), {}, ""),
        (dict(pretrained_cfg=dict(label_names=("cat", "dog"))), {}, ""),
        (dict(pretrained_cfg=dict(label_names=["cat", "hound"])), {}, "class 1 is 'hound'; it is 'dog'"),
    ],
)
def test_reason_not_to_resume(changes, recipe, reason):
    given = reason_not_to_resume({**CHECKPOINT, **changes}, {**RECIPE, **recipe}, 5, ["cat", "dog"])
    assert reason in given and bool(reason) == bool(given)


# The folder

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
            for name in ("fsync", "replace"):
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
        if finished:
            break
        folder.save({**STATE, "epoch": kill_at + 1})
        assert epoch_of(folder.previous) <= kill_at + 1
    assert finished and kill_at >= 4


def test_a_full_disk_leaves_the_checkpoints_as_they_were(folder, monkeypatch):
    before = folder.last.read_bytes()
    with monkeypatch.context() as patch:
        fill_disk(patch)
        with pytest.raises(UserError, match="cannot save a checkpoint into .*No space left on device"):
            folder.save({**STATE, "epoch": 1})
    assert folder.last.read_bytes() == before
    assert {path.name for path in folder.path.iterdir()} == {".lock", "last.pth.tar"}


def test_one_run_at_a_time(folder):
    other = RunFolder(folder.path)
    with pytest.raises(UserError, match="another run is writing into .*--output"):
        other.prepare("auto", overwrite=False)
    folder.close()
    (folder.path / "..new.pth.abc.tar").write_text("cut")  # of a run that was killed
    (folder.path / ".mine").write_text("keep")
    assert other.prepare("auto", overwrite=False) == folder.last
    assert {path.name for path in folder.path.iterdir()} == {".lock", ".mine", "last.pth.tar"}
    other.close()


def test_which_checkpoint_is_resumed_from(folder, tmp_path):
    folder.save({**STATE, "epoch": 1})
    assert (epoch_of(folder.last), epoch_of(folder.previous)) == (1, 0)
    with pytest.raises(UserError, match="holds a run.*--resume.*--output.*--overwrite"):
        folder.prepare(None, overwrite=False)
    with pytest.raises(UserError, match=r"missing\.pth"):
        folder.prepare(folder.path / "missing.pth", overwrite=False)
    assert folder.prepare(None, overwrite=True) is None
    assert folder.prepare(folder.previous, overwrite=False) == folder.previous
    folder.last.write_bytes(b"cut")
    assert folder.prepare("auto", overwrite=False) == folder.previous
    assert (folder.path / "damaged.pth.tar").read_bytes() == b"cut"
    folder.previous.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is complete"):
        folder.prepare("auto", overwrite=False)
    assert RunFolder(tmp_path / "new").prepare("auto", overwrite=False) is None


# What is logged


def test_lines_of_progress(caplog):
    caplog.set_level(logging.INFO, logger="raftmlp")
    logging.getLogger("raftmlp").addHandler(caplog.handler)
    try:
        for rank in (0, 1):
            state = TrainState(update=4, seconds=50.0)
            with Progress("epoch 1/2", state, 8, 16, 2, Processes(ALONE.device, rank, 2)) as progress:
                for _ in range(4):
                    state.end_update(torch.tensor([0.25, 0]), lr=0.1)
                    progress.advance(lr=0.00123456)
                assert progress.seconds > 50 and 2.56 > progress.rate > 2.5  # 128 images in 50 s and a little
    finally:
        logging.getLogger("raftmlp").removeHandler(caplog.handler)
    lines = [line for line in caplog.messages if line.startswith("epoch 1/2, update ")]
    assert [line.split(":")[0] for line in dict.fromkeys(lines)] == ["epoch 1/2, update 6/8", "epoch 1/2, update 8/8"]
    assert all("learning rate 0.00123" in line and "left of the epoch" in line for line in lines)


@pytest.mark.parametrize("width, fits", [(45, []), (110, ["6.907", "images/s", "0.00123", "waiting", "GiB"])])
def test_a_bar_stays_a_bar_and_no_figure_is_cut(width, fits, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    given = dict(file=terminal, ncols=width, mininterval=0)
    bar = type("Bar", (tqdm,), {"__init__": partialmethod(tqdm.__init__, **given)})
    monkeypatch.setattr(run_logger, "tqdm", bar)
    state = TrainState(update=1200, seconds=250.0)
    with Progress("epoch 10/300", state, 5004, 2048, 50, ALONE) as progress:
        for _ in range(3):
            state.update, state.loss_sum = state.update + 1, 6.907 * (state.update + 1)
            progress.advance(0.00123)
        shown = terminal.getvalue().rpartition("\r")[2]
    title, bar, figures = shown.split("|")
    assert title == "epoch 10/300 " and len(bar) >= (10 if fits else 1) and len(shown) <= width
    assert figures.split(",")[0] == " 1203/5004" and figures.split(",")[1].endswith("left")
    assert all(text in figures for text in fits)


def test_the_log_of_a_run_that_goes_on_at_other_sizes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    row = dict(train_loss=1.0, eval_loss=0.5, eval_top1=50.0, bad_images=0, seconds=1.0)
    log = [dict(row, epoch=1), dict(row, epoch=2, updates_24=3, updates_32=4), dict(row, epoch=3, updates_24=7)]
    recipe = dict(smoothing=0.1, mixup=0.8, cutmix=0.0, kd_model_name=None)
    RunLogger(tmp_path, recipe, tensorboard=False, wandb=False, writes=True).write(log)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [(row["updates_24"], row["updates_32"]) for row in rows] == [("", ""), ("3", "4"), ("7", "")]
    assert summarize(log, log[-1])["updates_by_size"] == {"24": 10, "32": 4}
    assert "updates_by_size" not in summarize(log[:1], log[0])
    axes = figures[0].axes
    assert all(float(tick).is_integer() for axis in axes for tick in axis.get_xticks())
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels == ["training, with label smoothing, mixup", "validation, without"]


def test_tensorboard_and_wandb_are_written_when_asked(run_command, monkeypatch):
    class Wandb:
        rows: ClassVar[list] = []

        @classmethod
        def init(cls, **kwargs):
            cls.started = kwargs
            return cls

        @classmethod
        def log(cls, row, step):
            cls.rows.append((step, row))

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    options = [*DIGITS, "--epochs", 2, "--output"]
    status, _, err = run_command(train, *options, "out", "--log-wandb")
    assert status == 0, err
    assert [step for step, _ in Wandb.rows] == [1, 2] and Wandb.started["config"]["epochs"] == 2
    assert Wandb.rows[1][1]["eval/top1"] == load_checkpoint("out/last.pth.tar")["log"][1]["eval_top1"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = run_command(train, *options, "out2", "--log-tensorboard")
    assert status == 2 and "tensorboard" in err


def test_export_writes_pretrained_weights_and_a_card(run_command, monkeypatch):
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", "weights")
    options = [*DIGITS, "--epochs", 1, "--output", "out", "--export"]
    status, _, err = run_command(train, *options, "mine")
    assert status == 0 and "raftmlp_digits.mine" in list_pretrained(), err
    card = json.loads(Path("weights/raftmlp_digits.mine.json").read_text())
    assert card["best_top1"] == json.loads(Path("out/summary.json").read_text())["best_top1"]
    assert card["options"]["epochs"] == 1 and card["versions"]["torch"] == torch.__version__
    assert "--export mine" in card["command"] and len(card["sha256"]) == 64 and card["data"] == "digits"
    model = timm.create_model("raftmlp_digits.mine", pretrained=True)  # the file says how it is made
    assert_same(dict(model.state_dict()), dict(load_checkpoint("out/model_best.pth.tar")["state_dict"]))
    assert model.pretrained_cfg["label_names"] == tuple("0123456789")
    status, _, err = run_command(train, *options, "mine", "--resume")
    assert status == 2 and "raftmlp_digits.mine.safetensors exists" in err
    before = {name: Path("out", name).read_text() for name in ("args.yaml", "summary.json", "log.csv")}
    status, _, err = run_command(train, *options, "second", "--resume", "--lr", 0.5)  # of a finished run
    assert status == 0, err
    assert json.loads(Path("weights/raftmlp_digits.second.json").read_text())["options"]["lr"] == 0.001
    assert before == {name: Path("out", name).read_text() for name in before}
    status, _, err = run_command(train, *options, "a.b")
    assert status == 2 and "a.b" in err
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", "/proc/nowhere")
    status, _, err = run_command(train, *options, "third", "--resume")
    assert status == 2 and "/proc/nowhere" in err
