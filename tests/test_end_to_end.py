"""The commands one after the other, as a user runs them: train, validate, predict, export."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers import ROOT, TINY
from raftmlp.cli import convert, export, predict, validate
from raftmlp.data import Digits


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A training run of two epochs, made by the script in a process of its own."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, ROOT / "tools/train.py", "-c", "digits/raftmlp_digits", *TINY]
    command += ["--epochs", 2, "--warmup-epochs", 1, "--output", output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def test_validate_gives_the_runs_figure(digits_run, run_command):
    options = ["--checkpoint", digits_run / "model_best.pth.tar", "--dataset", "digits", "--workers", 0, *TINY[4:]]
    written = ["--results-file", "a/result.json", "--picture", "b/picture.png"]
    status, out, err = run_command(validate, *options, *written)
    assert status == 0, err
    (result,) = json.loads(Path("a/result.json").read_text())["rows"]
    best = json.loads((digits_run / "summary.json").read_text())["best_top1"]
    assert result["top1"] == pytest.approx(best)
    assert f"top-1 {best:.2f} %" in out
    assert Image.open("b/picture.png").width > 500


def test_a_run_predicts_and_is_exported(digits_run, run_command):
    checkpoint = digits_run / "model_best.pth.tar"
    Digits("validation")[0][0].save("digit.png")
    status, out, err = run_command(predict, "digit.png", "--checkpoint", checkpoint, *TINY[4:], "--topk", 1)
    assert status == 0, err
    predicted = out.split()[-1]
    assert predicted in Digits.classes
    export_options = ["--checkpoint", checkpoint, *TINY[4:], "--format", "pt2", "--out", "digits.pt2"]
    status, out, err = run_command(export, *export_options, "--dataset", "digits")
    assert status == 0, err
    best = json.loads((digits_run / "summary.json").read_text())["best_top1"]
    assert out.count(f"top-1 {best:.2f} %") == 2  # in PyTorch and in the file
    status, _, err = run_command(convert, checkpoint, "x.safetensors")  # of other widths than any variant
    assert status == 2 and "is no variant of RaftMLP; raftmlp_digits comes nearest" in err
