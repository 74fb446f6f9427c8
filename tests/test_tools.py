"""The scripts as a user runs them: what they write, and what they say to bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import convert_checkpoint
import numpy as np
import predict
import pytest
import torch
import validate
from PIL import Image

from raftmlp.commands import train

ROOT = Path(__file__).parent.parent
TINY = ["--workers", "0", "--model", "raftmlp_digits", "--model-kwargs", "embed_dims=(8,8,8,8)", "depths=(1,1,1,1)"]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A training run of two epochs, made by the script in a process of its own."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, ROOT / "tools/train.py", "-c", ROOT / "configs/digits/raftmlp_digits.yaml", *TINY]
    command += ["--epochs", 2, "--warmup-epochs", 1, "--output", output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A folder of bright and dark images of odd sizes, train/ and val/, one class each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, low in (("bright", 128), ("dark", 0)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 128, (30 + i, 45, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


# Training and evaluation


def test_validate_gives_the_runs_figure(digits_run, run_tool):
    output, _ = digits_run
    options = [*TINY, "--checkpoint", output / "model_best.pth.tar", "--dataset", "digits"]
    status, out, _ = run_tool(validate, *options, "--results-file", "a/result.json", "--picture", "b/picture.png")
    assert status == 0
    (result,) = json.loads(Path("a/result.json").read_text())["rows"]
    best = json.loads((output / "summary.json").read_text())["best_top1"]
    assert result["top1"] == pytest.approx(best)
    assert f"top-1 {best:.2f} %" in out
    assert Image.open("b/picture.png").width > 500


def test_gallery_shows_the_wrong_ones_first():
    gallery = validate.Gallery((0.5,), (0.5,), ["a", "b"], limit=3)
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.4, 0.6]])
    gallery.add(torch.zeros(5, 1, 2, 2), torch.tensor([0, 0, 1, 1, 1]), probabilities)
    assert [(truth, guess) for _, truth, guess, _ in gallery.wrong] == [(0, 1), (1, 0)]
    assert [(truth, guess) for _, truth, guess, _ in gallery.right] == [(0, 0), (1, 1), (1, 1)]


def test_validate_on_a_folder_of_images(image_folder, run_tool):
    options = [*TINY, "--data-dir", image_folder, "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0]
    status, out, err = run_tool(
        train, *options, "--img-size", 40, 48, "--aa", "rand-m5", "--mixup", 0.8, "--cutmix", 1.0, "--reprob", 0.25,
        "--drop-path", 0.1, "--clip-grad", 1, "--grad-checkpointing", "--amp", "--lr", 1e-3,
    )  # fmt: skip
    assert status == 0, err
    status, out, err = run_tool(
        validate, *TINY, "img_size=(40,48)", "--checkpoint", "runs/train/last.pth.tar",
        "--data-dir", image_folder, "--img-size", 40, 48, "--amp",
    )  # fmt: skip
    assert status == 0, err
    assert "over 12 images" in out

    shipped = ROOT / "checkpoints/raftmlp_digits.sklearn.safetensors"
    options = ["--model", "raftmlp_digits", "--checkpoint", shipped, "--data-dir", image_folder, "--workers", 0]
    status, _, err = run_tool(validate, *options)
    assert status == 2 and "classes that the model was not trained on: ['bright', 'dark']" in err


def test_other_models_of_timm(run_tool):
    status, out, err = run_tool(
        validate, "--model", "resnet10t", "--dataset", "digits", "--img-size", 32, "--workers", 0, "--batch-size", 360
    )
    assert status == 0, err
    assert "resnet10t: top-1" in out


# Configs and options


@pytest.mark.parametrize("tool", [validate, predict, convert_checkpoint])
def test_help_tells_every_option(tool, run_tool):
    status, out, _ = run_tool(tool, "--help")
    assert status == 0
    for action in tool.build_parser()._actions:
        assert action.help
        assert not action.option_strings or action.option_strings[-1] in out


# Bad input: one line, exit status 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "raftmpl_s"], "unknown model 'raftmpl_s'; did you mean raftmlp_s"),
        (["--data-dir", "missing"], "no data at missing"),
        ([], "--data-dir"),
        (["--dataset", "digit"], "unknown data set 'digit'"),
        (["--dataset", "digits", "--val-split", "x"], "no split 'x'"),
        (["--dataset", "digits", "--checkpoint", "missing.pth"], "no checkpoint at missing.pth"),
        (["--dataset", "digits", "--checkpoint", "cut.pth"], "cut.pth is damaged"),
        (["--dataset", "digits", "--checkpoint", "foreign.pth"], "foreign.pth does not fit this RaftMLP: stages.0"),
        (["--dataset", "digits", "--model-kwargs", "raft_size=3"], "raft_size 3 must be a positive divisor"),
        (["--dataset", "digits", "--model-kwargs", "raft_sise=2"], "raft_sise"),
        (["--dataset", "digits", "--checkpoint", "."], ". is a folder: name a checkpoint file in it"),
        (["--data-dir", "splits"], "no split 'validation' in splits: it has train"),
        (["--data-dir", "tars"], "no data set '' with split"),
        (["--dataset", "digits", "--pretrained"], "no pretrained weights raftmlp_s.TAG.safetensors"),
        (["--dataset", "digits", "--img-size", "0"], "must be a whole number of 1 or more, not '0'"),
        (["--dataset", "digits", "--img-size", "1", "2", "3"], "--img-size takes"),
        (
            ["--dataset", "digits", "--model-kwargs", "num_classes=7"],
            "the data has 10 classes, the model tells 7 apart",
        ),
        (["--dataset", "digits", "--crop-pct", "3"], "must be a number from 0.01 to 1, not '3'"),
        (["--dataset", "digits", "--interpolation", "cubic"], "invalid choice: 'cubic'"),
        (["--dataset", "digits", "--device", "gpu"], "no device 'gpu'"),
        (["--dataset", "digits", "--batch-size", "many"], "must be a whole number of 1 or more, not 'many'"),
        (
            ["--dataset", "digits", "--batchsize", "3"],
            "unrecognized arguments: --batchsize 3; did you mean --batch-size",
        ),
        (["-c", "missing.yaml"], "cannot read the config missing.yaml"),
        (["-c", "unknown.yaml"], "unknown.yaml: unknown key 'batchsize'; did you mean batch_size"),
        (["-c", "broken.yaml"], "broken.yaml is no YAML file"),
        (["-c", "list.yaml"], "list.yaml must be a mapping"),
        (["-c", "wrong.yaml"], "wrong.yaml: batch_size: must be a whole number of 1 or more, not 'big'"),
        (["-c", "flag.yaml"], "flag.yaml: amp must be true or false, not 'perhaps'"),
        (["-c", "count.yaml"], "count.yaml: scale takes 2 values"),
        (["-c", "number.yaml"], "number.yaml must be a mapping"),
        (["-c", "circle.yaml"], "circle.yaml is its own base"),
        (["-c", "badbase.yaml"], "badbase.yaml: base must be the name of a file"),
        (["-c", "null.yaml"], "null.yaml: batch_size has no value"),
        (["--dataset", "digits", "--model", "raftmlp_s.mine"], "Invalid pretrained tag"),
        (["--dataset", "torch/cifar10"], "torch/cifar10"),
        (["--dataset", "digits", "--model-kwargs", "raft_size"], "expected KEY=VALUE pairs"),
    ],
)
@pytest.mark.parametrize("tool", [validate], ids=lambda tool: tool.__name__)
def test_bad_input(run_tool, tool, options, message):
    if "count.yaml" in options and tool is validate:
        options, message = ["-c", "base.yaml"], "cannot read the config"
    Path("cut.pth").write_bytes(b"PK\x03\x04 cut")
    torch.save({"conv.weight": torch.zeros(3)}, "foreign.pth")
    for name, text in {
        "unknown": "batchsize: 3", "broken": "a: [1", "list": "- 1", "wrong": "batch_size: big", "flag": "amp: perhaps",
        "count": "scale: [1]", "base": "base: nowhere.yaml", "number": "1: 2", "circle": "base: circle.yaml",
        "badbase": "base: [a]", "null": "batch_size:",
    }.items():  # fmt: skip
        Path(f"{name}.yaml").write_text(text)
    Path("splits/train/a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("splits/train/a/1.png")
    Path("tars").mkdir()
    for name in ("train", "val"):
        Path(f"tars/{name}.tar").write_text("no tar")
    before = sorted(Path().iterdir())
    status, out, err = run_tool(tool, *options)
    assert status == 2
    assert message in err
    assert f"{tool.__name__}.py: error: " in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not out
    assert sorted(Path().iterdir()) == before


def test_validate_checks_what_it_shall_write_before_the_work(run_tool):
    Path("file").write_text("")
    for options, message in [
        (["--picture", "picture"], "picture must be named .png"),
        (["--results-file", "file/result.json"], "cannot write file/result.json"),
        (["--results-file", "result.txt"], "result.txt must be named .json"),
    ]:
        status, out, err = run_tool(
            validate, "--model", "raftmlp_digits", "--pretrained", "--dataset", "digits", *options
        )
        assert status == 2
        assert message in err and "Traceback" not in err
        assert not out


def test_no_traceback_from_a_process():
    command = [sys.executable, ROOT / "tools/validate.py", "--model", "raftmlp_x", "--dataset", "digits"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "validate.py: error: unknown model 'raftmlp_x'; did you mean raftmlp_s or raftmlp_m or raftmlp_l?"
    ]


def test_import_needs_torch_and_timm_alone_and_is_silent():
    optional = "('mmengine', 'sklearn', 'matplotlib', 'tqdm', 'einops')"
    code = (
        f"import sys, timm; had = set(sys.modules); import raftmlp; print(set({optional}) & (set(sys.modules) - had))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, cwd="/")
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
