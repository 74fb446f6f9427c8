"""A run folder and an exported file that version 0.2 (commit 9a1c4b8) wrote: what it measured is measured again."""

import csv
import json
import zipfile
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from raftmlp.cli import export, train, validate
from raftmlp.config import ModelSettings
from raftmlp.data import Digits
from raftmlp.export.onnx_client import Classifier
from raftmlp.model.create import create_model


@pytest.fixture
def old(run_command):
    """Lay out the files: run/, three epochs of a tiny network on the digits, and tiny.onnx; return the run's rows."""
    zipfile.ZipFile(ROOT / "tests/version_0_2.zip").extractall()
    return read_log()


def read_log():
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(Path("run/log.csv").open())]


def test_a_checkpoint_is_evaluated_and_exported(old, run_command):
    options = ["--checkpoint", "run", "--dataset", "digits", "--workers", 0, "--results-file", "results.json"]
    status, _, err = run_command(validate, *options)
    assert status == 0, err
    (row,) = json.loads(Path("results.json").read_text())["rows"]
    assert (row["top1"], row["loss"]) == pytest.approx((old[0]["eval_top1"], old[0]["eval_loss"]))
    assert run_command(export, "--checkpoint", "run", "--format", "hf", "--out", "hub")[0] == 0
    card = Path("hub/README.md").read_text()
    assert "Top-1 10.28 % on the images that were held out in training, 360 images, after epoch 1 of 3" in card


def test_a_run_is_resumed(old, run_command):
    Path("run/last.pth.tar").unlink()  # previous.pth.tar is of the second epoch
    status, _, err = run_command(train, "-c", "run/args.yaml", "--resume")
    assert status == 0, err
    new = read_log()
    for key in ("epoch", "train_loss", "eval_loss", "eval_top1", "lr"):
        assert [row[key] for row in new] == pytest.approx([row[key] for row in old], rel=1e-4)
    assert json.loads(Path("run/summary.json").read_text())["best_epoch"] == 1


def test_an_onnx_file_gives_the_models_answers(old):
    classifier = Classifier("tiny.onnx")
    images = torch.stack([torch.from_numpy(classifier.prepare(Digits("validation")[i][0])) for i in range(4)])
    model = create_model(ModelSettings(checkpoint="run/model_best.pth.tar")).eval()
    with torch.inference_mode():
        expected = model(images).softmax(1)
    assert torch.allclose(torch.from_numpy(classifier(images.numpy())), expected, atol=1e-5)
