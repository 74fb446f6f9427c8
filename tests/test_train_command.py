"""The train command as a user runs it: what it writes, how it resumes, what other commands do with it, bad input."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from helpers import ROOT, TINY, make_image_folder, run_process
from raftmlp.cli import convert, export, predict, train, validate
from raftmlp.data import Digits

CONFIG = ["-c", ROOT / "configs/digits/raftmlp_digits.yaml", *TINY]
DIGITS = [*TINY, "--dataset", "digits", "--batch-size", 256, "--warmup-epochs", 0]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A training run of two epochs, made by the script in a process of its own."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, ROOT / "tools/train.py", *CONFIG, "--epochs", 2, "--warmup-epochs", 1]
    done = run_process(*command, "--output", output)
    assert done.returncode == 0, done.stderr
    return output, done


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A folder of bright and dark images of odd sizes, train/ and val/, one class each."""
    return make_image_folder(tmp_path_factory.mktemp("images"))


def test_train_writes_a_run(digits_run):
    output, done = digits_run
    assert {path.name for path in output.iterdir()} >= {
        "args.yaml", "curves.png", "last.pth.tar", "log.csv", "model_best.pth.tar", "summary.json",
    }  # fmt: skip
    rows = list(csv.DictReader((output / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    summary = json.loads((output / "summary.json").read_text())
    assert summary["best_top1"] == max(float(row["eval_top1"]) for row in rows)
    assert f"best top-1 {summary['best_top1']:.2f} %" in done.stdout
    assert Image.open(output / "curves.png").width > 500
    assert yaml.safe_load((output / "args.yaml").read_text())["epochs"] == 2


def test_other_commands_take_a_run(digits_run, run_command):
    run, _ = digits_run
    checkpoint, best = run / "model_best.pth.tar", json.loads((run / "summary.json").read_text())["best_top1"]
    common = ["--checkpoint", checkpoint, *TINY[4:]]
    written = ["--results-file", "a/result.json", "--picture", "b/picture.png"]
    status, out, err = run_command(validate, *common, "--dataset", "digits", "--workers", 0, *written)
    assert status == 0, err
    (result,) = json.loads(Path("a/result.json").read_text())["rows"]
    assert result["top1"] == pytest.approx(best) and f"top-1 {best:.2f} %" in out
    assert Image.open("b/picture.png").width > 500
    Digits("validation")[0][0].save("digit.png")
    status, out, err = run_command(predict, "digit.png", *common, "--topk", 1)
    assert status == 0 and out.split()[-1] in Digits.classes, err
    status, out, err = run_command(export, *common, "--format", "pt2", "--out", "digits.pt2", "--dataset", "digits")
    assert status == 0, err
    assert out.count(f"top-1 {best:.2f} %") == 2  # in PyTorch and in the file
    status, _, err = run_command(convert, checkpoint, "x.safetensors")  # of other widths than any variant
    assert status == 2 and "raftmlp_digits comes nearest" in err


def test_resume_and_what_prevents_it(digits_run, run_command):
    output, _ = digits_run
    config = [*CONFIG, "--warmup-epochs", "1", "--output", output, "--epochs", "3"]
    (output / "cut.pth").write_bytes((output / "last.pth.tar").read_bytes()[:3000])
    torch.save({"state_dict": {}, "optimizer": {}}, output / "foreign.pth")
    torch.save({"state_dict": {}}, output / "weights.pth")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    for options, message in [
        ([], "holds a run"),
        (["--resume", output / "missing.pth", "--lr", 7], "missing.pth"),
        (["--resume", output / "cut.pth"], "cut.pth is damaged"),
        (["--resume", "elsewhere/last.pth.tar"], "holds a run"),
        (["--resume", output / "foreign.pth"], "foreign.pth"),
        (["--resume", output / "weights.pth"], "weights.pth holds weights only"),
        (["--resume", "--opt", "sgd"], "--opt adamw, not sgd"),
        (["--resume", "--model-kwargs", "depths=(2,1,1,1)"], "--model-kwargs"),
        (["--resume", "--epochs", 1, "--warmup-epochs", 0], "--epochs says 1"),
    ]:
        status, _, err = run_command(train, *config, *options)
        assert status == 2 and message in err, err
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before

    status, out, _ = run_command(train, *config, "--resume", "--lr", 0.5)
    assert status == 0 and "epochs 2 -> 3, lr 0.002 -> 0.5" in out
    assert "epoch 3/3" in out and "epoch 2/3" not in out
    assert [row["epoch"] for row in csv.DictReader((output / "log.csv").open())] == ["1", "2", "3"]
    status, _, err = run_command(
        train, "-c", output / "args.yaml", "--epochs", 4, "--resume", output / "last.pth.tar", "--output", "new"
    )
    assert status == 0, err
    assert Path(json.loads(Path("new/summary.json").read_text())["best_checkpoint"]).exists()

    (output / "mine.txt").write_text("keep")
    status, _, err = run_command(train, *config, "--epochs", "1", "--warmup-epochs", 0, "--overwrite", "--no-model-ema")
    assert status == 0 and (output / "mine.txt").read_text() == "keep", err
    assert [row["epoch"] for row in csv.DictReader((output / "log.csv").open())] == ["1"]


def test_a_resumed_run_loads_no_other_weights(run_command, image_folder):
    options = ["--model", "raftmlp_digits", "--data-dir", image_folder, "--workers", 0, "--batch-size", 12]
    options += ["--checkpoint", ROOT / "weights/raftmlp_digits.sklearn.safetensors", "--output", "a"]
    status, out, err = run_command(train, *options, "--epochs", 1)
    assert status == 0 and "its classifier is missing or another task's" in out, err
    status, out, err = run_command(train, *options, "--epochs", 2, "--resume")
    assert status == 0 and "resuming from" in out and "random weights" not in out, err
    status, out, _ = run_command(train, *options, "--epochs", 1, "--resume", "--output", "b")
    assert status == 0 and "random weights" in out  # there is no run in that folder


def test_the_options_of_a_run_of_version_0_2(run_command):
    """It recorded its default of --min-lr whatever the peak was, and no option that came later."""
    options = [*DIGITS, "--epochs", 1, "--lr", "1e-6", "--output", "run"]
    assert run_command(train, *options)[0] == 0
    args = yaml.safe_load(Path("run/args.yaml").read_text())
    assert args["min_lr"] == 1e-6
    Path("run/args.yaml").write_text(yaml.safe_dump({**args, "min_lr": 1e-5, "epochs": 2}))
    status, _, err = run_command(train, "-c", "run/args.yaml", "--output", "other")
    assert status == 2 and "--min-lr" in err and not Path("other").exists()
    status, out, err = run_command(train, "-c", "run/args.yaml", "--resume")
    assert status == 0 and "epoch 2/2" in out, err
    assert float(list(csv.DictReader(Path("run/log.csv").read_text().splitlines()))[-1]["lr"]) <= 1e-6


def test_few_epochs_shorten_a_warm_up_that_the_command_line_does_not_give(run_command, image_folder):
    Path("recipe.yaml").write_text("epochs: 40\nwarmup_epochs: 4\n")
    options = [*TINY, "-c", "recipe.yaml", "--data-dir", image_folder, "--batch-size", 12, "--epochs", 3]
    status, _, err = run_command(train, *options, "--warmup-epochs", 3)
    assert status == 2 and "--warmup-epochs" in err and not Path("runs").exists()
    status, out, err = run_command(train, *options)
    assert status == 0 and out.count("warm-up") == 1, err
    assert yaml.safe_load(Path("runs/train/args.yaml").read_text())["warmup_epochs"] == 1


# What else a run does


def test_train_on_a_folder_of_images(image_folder, run_command):
    options = [*TINY, "--data-dir", image_folder, "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0]
    status, out, err = run_command(
        train, *options, "--img-size", 40, 48, "--aa", "rand-m5", "--mixup", 0.8, "--cutmix", 1.0, "--reprob", 0.25,
        "--drop-path", 0.1, "--clip-grad", 1, "--grad-checkpointing", "--amp", "--lr", 1e-3,
    )  # fmt: skip
    assert status == 0, err
    assert "2 classes, 40x48: 24 images to train on, 12 to evaluate on" in out


def test_train_at_several_sizes(run_command):
    sizes = ["--train-img-sizes", 24, "16x32", "--train-size-probs", 2, 1, "--train-size-schedule", "progressive"]
    status, out, err = run_command(train, *DIGITS, *sizes, "--epochs", 2)
    assert status == 0 and not err
    assert "2 epochs of 5 updates of 256 images: 1 process x 1 x 256 at 24 or 1 x 256 at 16x32, on cpu" in out
    rows = list(csv.DictReader(Path("runs/train/log.csv").read_text().splitlines()))
    counts = [[int(row[f"updates_{size}"]) for size in ("24", "16x32")] for row in rows]
    assert [sum(count) for count in counts] == [5, 5] and counts[0][0] > counts[1][0]
    state = torch.load("runs/train/last.pth.tar", weights_only=True)
    assert state["pretrained_cfg"]["input_size"] == (3, 32, 32)  # of the grid, and of the evaluation
    assert state["options"]["train_img_sizes"] == ["24", "16x32"]


def test_another_model_of_timm_trains_at_several_sizes(run_command, image_folder):
    options = ["--data-dir", image_folder, "--workers", 0, "--device", "cpu", "--batch-size", 8, "--img-size", 32]
    options += ["--epochs", 1, "--train-img-sizes", 32, 48, "--model", "vit_tiny_patch16_224"]
    status, _, err = run_command(train, *options, "--model-kwargs", "depth=1")
    assert status == 2 and "--train-img-sizes: vit_tiny_patch16_224 takes no images of 48 pixels: " in err
    status, _, err = run_command(train, *options, "--model-kwargs", "depth=1", "dynamic_img_size=True")
    assert status == 0, err


def test_a_run_from_a_checkpoint_records_the_models_arguments(digits_run, image_folder, run_command):
    """Its checkpoints say all that rebuilds the model, though the command line named none of it."""
    data = ["--data-dir", image_folder, "--workers", 0, "--device", "cpu"]
    options = [*data, "--batch-size", 12, "--epochs", 1, "--num-classes", 2]
    checkpoint = f"{digits_run[0]}/model_best.pth.tar"
    status, _, err = run_command(train, *options, "--checkpoint", checkpoint, "--output", "out", "--drop", 0.1)
    assert status == 0, err
    status, _, err = run_command(export, "--checkpoint", "out/last.pth.tar", "--format", "hf", "--out", "folder")
    assert status == 0, err
    status, _, err = run_command(train, *options, "--model", "local-dir:folder", "--pretrained", "--output", "third")
    assert status == 0, err
    for name in ("out", "third"):
        state = torch.load(f"{name}/last.pth.tar", weights_only=True)
        assert state["arch"] == "raftmlp_digits" and list(state["model_kwargs"]["embed_dims"]) == [8] * 4
        status, _, err = run_command(validate, *data, "--checkpoint", f"{name}/last.pth.tar")
        assert status == 0, err


# Bad input: one line, exit status 2


def test_help_tells_every_option(run_command):
    status, out, _ = run_command(train, "--help")
    assert status == 0
    for action in train.build_parser()._actions:
        assert action.help and (not action.option_strings or action.option_strings[-1] in out)


def test_bad_input(run_command):
    digits, sizes = ["--dataset", "digits", "--model", "raftmlp_digits"], ["--train-img-sizes", 24, 32]
    for options, message in [
        (["--batch-size", 5000], "1437 images make no update of 5000"),
        (["--opt", "adahessian"], "second-order gradients"),
        (["--opt", "fusedlamb", "--device", "cpu"], "RAFTMLP_DEBUG"),  # timm's own words
        (["--mixup", "0.8", "--batch-size", "7"], "must be even: 7 images"),
        ([*sizes, "--train-batch-sizes", 8, 2000], "1437 images make no update of 2000"),
        ([*sizes, "--train-batch-sizes", 8, 4, "--lr-base-size", 8], "--lr-base-size"),
        (["--train-img-sizes", 24, 200_000], "choose a smaller image size or --batch-size"),
    ]:
        status, _, err = run_command(train, *digits, "--workers", 0, *options)
        assert status == 2 and message in err, err
        assert not Path("runs").exists()
    Path("file").write_text("")
    status, _, err = run_command(train, *digits, "--output", "file/run")
    assert status == 2 and "file/run" in err


def test_folders_that_would_spoil_the_figure(image_folder, run_command, tmp_path):
    options = [*TINY, "--batch-size", 4, "--epochs", 1]
    status, _, err = run_command(train, *options, "--data-dir", image_folder, "--val-split", "train")
    assert status == 2 and "overlap" in err
    data = make_image_folder(tmp_path / "data", train=2, val=1)
    (data / "train/dark").rename(data / "train/gray")
    status, _, err = run_command(train, *options, "--data-dir", data)
    assert status == 2 and "'dark', 'gray'" in err


def test_an_error_is_one_line():
    done = run_process(sys.executable, "-m", "raftmlp", "train", "--model", "raftmlp_x", cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "train" in line and "error: " in line and "'raftmlp_x'" in line
