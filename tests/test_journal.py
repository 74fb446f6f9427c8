"""What a run writes beside its checkpoints: pretrained weights with a card, TensorBoard, Weights & Biases."""

import csv
import json
import sys
from pathlib import Path
from typing import ClassVar

import timm
import torch

from helpers import TINY, assert_same
from raftmlp import list_pretrained
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import train
from raftmlp.model.create import ModelSettings, create_model
from raftmlp.train import journal

DIGITS = [*TINY, "--dataset", "digits", "--batch-size", 256, "--warmup-epochs", 0]


def test_export_writes_pretrained_weights_and_a_card(run_command, monkeypatch):
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", "weights")
    options = ["--model", "raftmlp_digits", "--dataset", "digits", "--workers", 0, "--batch-size", 256, "--epochs", 1]
    options += ["--warmup-epochs", 0, "--output", "out", "--device", "cpu"]
    status, _, err = run_command(train, *options, "--export", "mine")
    assert status == 0, err
    card = json.loads(Path("weights/raftmlp_digits.mine.json").read_text())
    assert card["best_top1"] == json.loads(Path("out/summary.json").read_text())["best_top1"]
    assert card["options"]["epochs"] == 1 and card["versions"]["torch"] == torch.__version__
    assert "--export mine" in card["command"] and len(card["sha256"]) == 64 and card["data"] == "digits"
    model = timm.create_model("raftmlp_digits.mine", pretrained=True)
    best = load_checkpoint("out/model_best.pth.tar")["state_dict"]
    assert_same(dict(model.state_dict()), dict(best))
    assert model.pretrained_cfg["label_names"] == tuple("0123456789")
    status, _, err = run_command(train, *options, "--export", "mine", "--resume")
    assert status == 2 and "raftmlp_digits.mine.safetensors exists" in err
    before = {name: Path("out", name).read_text() for name in ("args.yaml", "summary.json", "log.csv")}
    status, _, err = run_command(train, *options, "--export", "second", "--resume", "--lr", 0.5)  # of a finished run
    assert status == 0, err
    assert json.loads(Path("weights/raftmlp_digits.second.json").read_text())["options"]["lr"] == 0.001
    assert before == {name: Path("out", name).read_text() for name in before}
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", "/proc/nowhere")
    status, _, err = run_command(train, *options, "--export", "third", "--resume")
    assert status == 2 and "cannot export to /proc/nowhere/raftmlp_digits.third.safetensors" in err
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", "weights")
    status, _, err = run_command(train, *DIGITS, "--epochs", 1, "--output", "tiny", "--export", "tiny")
    assert status == 0 and "raftmlp_digits.tiny" in list_pretrained()
    for name in ("raftmlp_digits.tiny", "raftmlp_digits.mine"):  # the file says how the model is made
        made = timm.create_model(name, pretrained=True)
        file = ModelSettings(checkpoint=f"weights/{name}.safetensors")
        assert_same(dict(made.state_dict()), dict(create_model(file).state_dict()))
    status, _, err = run_command(train, *options, "--export", "a.b")
    assert status == 2 and "a tag is made of letters" in err


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
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, err = run_command(train, *options, "out2", "--log-wandb")
    assert status == 2 and "--log-wandb needs Weights & Biases: pip install wandb" in err
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = run_command(train, *options, "out2", "--log-tensorboard")
    assert status == 2 and "--log-tensorboard needs TensorBoard" in err


def test_the_log_of_a_run_that_goes_on_at_other_sizes(tmp_path):
    figures = dict(train_loss=1.0, eval_loss=0.5, eval_top1=50.0, bad_images=0, seconds=1.0)
    log = [
        dict(figures, epoch=1),
        dict(figures, epoch=2, updates_24=3, updates_32=4),
        dict(figures, epoch=3, updates_24=7),
    ]
    recipe = dict(smoothing=0.0, mixup=0.0, cutmix=0.0, kd_model_name=None)
    journal.Journal(tmp_path, recipe, tensorboard=False, wandb=False, writes=True).write(log)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [(row["updates_24"], row["updates_32"]) for row in rows] == [("", ""), ("3", "4"), ("7", "")]
    assert journal.summarise(log, log[-1])["updates_by_size"] == {"24": 10, "32": 4}
    assert "updates_by_size" not in journal.summarise(log[:1], log[0])


def test_curves_have_whole_epochs_and_say_what_the_training_loss_is_with(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(journal, "save_figure", lambda figure, path: figures.append(figure))
    recipe = dict(smoothing=0.1, mixup=0.8, cutmix=0.0, kd_model_name=None)
    for parts, log in ((recipe, [1, 2]), (dict.fromkeys(recipe), [1])):
        rows = [dict(epoch=epoch, train_loss=1.0, eval_loss=0.5, eval_top1=50.0) for epoch in log]
        journal.Journal(tmp_path, parts, tensorboard=False, wandb=False, writes=True).write(rows)
    for figure in figures:
        assert all(float(tick).is_integer() for axis in figure.axes for tick in axis.get_xticks())
    labels = [[text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in figures]
    assert labels == [
        ["training, with label smoothing, mixup", "validation, without"],
        ["training", "validation"],
    ]
