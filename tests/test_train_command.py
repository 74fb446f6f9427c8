"""The train command as a user runs it: what it writes, how it resumes, and what it says to bad input."""

import csv
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from helpers import ROOT, TINY, fill_disk, make_image_folder
from raftmlp.cli import export, train, validate
from raftmlp.train import TrainSettings

CONFIG = ["-c", ROOT / "configs/digits/raftmlp_digits.yaml", *TINY]
DIGITS = [*TINY, "--dataset", "digits", "--batch-size", 256, "--warmup-epochs", 0]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A training run of two epochs, made by the script in a process of its own."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, ROOT / "tools/train.py", *CONFIG, "--epochs", 2, "--warmup-epochs", 1]
    done = subprocess.run(list(map(str, [*command, "--output", output])), capture_output=True, text=True)
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


def test_resume_and_what_prevents_it(digits_run, run_command):
    output, _ = digits_run
    config = [*CONFIG, "--warmup-epochs", "1", "--output", output]
    before = (output / "last.pth.tar").read_bytes()
    status, _, err = run_command(train, *config, "--epochs", "3")
    assert status == 2 and "holds a run: resume it with --resume" in err
    assert (output / "last.pth.tar").read_bytes() == before

    status, out, _ = run_command(train, *config, "--epochs", "3", "--resume")
    assert status == 0
    assert "epoch 3/3" in out and "epoch 2/3" not in out
    assert [row["epoch"] for row in csv.DictReader((output / "log.csv").open())] == ["1", "2", "3"]

    status, _, err = run_command(train, *config, "--epochs", "3", "--resume", output / "missing.pth")
    assert status == 2 and "no checkpoint to resume from" in err
    (output / "cut.pth").write_bytes(before[:3000])
    status, _, err = run_command(train, *config, "--epochs", "3", "--resume", output / "cut.pth")
    assert status == 2 and "cut.pth is damaged" in err

    (output / "empty.pth").write_bytes(b"")
    status, _, err = run_command(train, *config, "--epochs", "3", "--resume", output / "empty.pth")
    assert status == 2 and "empty.pth is damaged" in err
    status, _, err = run_command(train, *config, "--epochs", "3", "--resume", "elsewhere/last.pth.tar")
    assert status == 2 and "holds a run" in err

    (output / "mine.txt").write_text("keep")
    status, out, _ = run_command(train, *config, "--epochs", "1", "--warmup-epochs", 0, "--overwrite", "--no-model-ema")
    assert (output / "mine.txt").read_text() == "keep"
    assert status == 0
    assert [row["epoch"] for row in csv.DictReader((output / "log.csv").open())] == ["1"]


def test_a_failed_resume_changes_nothing(digits_run, run_command):
    output, _ = digits_run
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    options = [*TINY, "--dataset", "digits", "--output", output, "--resume", "missing.pth", "--lr", 7]
    assert run_command(train, *options)[0] == 2
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_resume_into_another_folder_and_from_its_options(digits_run, run_command):
    output, _ = digits_run
    status, _, err = run_command(
        train, "-c", output / "args.yaml", "--epochs", 3, "--resume", output / "last.pth.tar", "--output", "new"
    )
    assert status == 0, err
    assert Path(json.loads(Path("new/summary.json").read_text())["best_checkpoint"]).exists()


def test_resume_refuses_another_run(run_command):
    options = [*DIGITS, "--output", "run", "--epochs", 2]
    status, _, err = run_command(train, *options)
    assert status == 0, err
    for changed, message in [
        (["--opt", "sgd"], "is of a run with --opt adamw, not sgd"),
        (["--model-ema"], "is of a run with --model-ema False, not True"),
        (["--model-kwargs", "depths=(2,1,1,1)"], "is of a run with --model-kwargs"),
    ]:
        status, _, err = run_command(train, *options, *changed, "--resume")
        assert status == 2 and message in err
    status, out, err = run_command(train, *options, "--resume", "--epochs", 3, "--lr", 0.5)
    assert status == 0, err
    assert "note: not the options of before: epochs 2 -> 3, lr 0.001 -> 0.5" in out
    status, _, err = run_command(train, *options, "--resume", "--epochs", 2)
    assert status == 2 and "is of epoch 3, --epochs says 2" in err
    torch.save({"state_dict": {}, "optimizer": {}}, "foreign.pth")
    status, _, err = run_command(train, *options, "--resume", "foreign.pth", "--output", "new")
    assert status == 2 and "cannot resume from foreign.pth" in err
    torch.save({"state_dict": {}}, "weights.pth")
    status, _, err = run_command(train, *options, "--resume", "weights.pth", "--output", "new")
    assert status == 2 and "weights.pth holds weights only: --checkpoint starts a new run" in err


def test_resume_refuses_renamed_classes(run_command, tmp_path):
    images = make_image_folder(tmp_path / "images", train=4, val=2)
    options = [*TINY, "--data-dir", images, "--batch-size", 4, "--output", "run"]
    status, _, err = run_command(train, *options, "--epochs", 1)
    assert status == 0, err
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    for split in ("train", "val"):
        (images / split / "bright").rename(images / split / "light")
    status, _, err = run_command(train, *options, "--epochs", 2, "--resume")
    assert status == 2 and "'bright'" in err and "'dark'" in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_resumed_run_loads_no_other_weights(run_command, image_folder):
    model = ["--model", "raftmlp_digits", "--data-dir", image_folder, "--workers", 0, "--batch-size", 12]
    shipped = ROOT / "weights/raftmlp_digits.sklearn.safetensors"
    for name, start in (("a", ["--pretrained"]), ("b", ["--checkpoint", shipped])):
        options = [*model, *start, "--output", name]
        status, out, err = run_command(train, *options, "--epochs", 1)
        assert status == 0 and "random weights" in out, err
        status, out, err = run_command(train, *options, "--epochs", 2, "--resume")
        assert status == 0 and "resuming from" in out and "random weights" not in out, err
        status, out, _ = run_command(train, *options, "--epochs", 1, "--resume", "--output", f"{name}2")
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


def test_few_epochs_shorten_a_warm_up_that_the_command_line_does_not_give(run_command):
    options = [*TINY, "--dataset", "digits", "--batch-size", 512, "--output", "run"]
    status, out, err = run_command(train, *options, "--epochs", 3)
    assert status == 0 and out.count("warm-up") == 1, err
    assert yaml.safe_load(Path("run/args.yaml").read_text())["warmup_epochs"] == 1
    status, _, err = run_command(train, *options, "--epochs", 3, "--warmup-epochs", 3, "--output", "other")
    assert status == 2 and "--warmup-epochs" in err and not Path("other").exists()
    status, out, err = run_command(train, *options, "--epochs", 4, "--warmup-epochs", 1, "--resume")
    assert status == 0 and "warm-up" not in out, err
    Path("recipe.yaml").write_text("epochs: 40\nwarmup_epochs: 4\n")
    recipe = ["-c", "recipe.yaml", *options, "--epochs", 3, "--overwrite"]
    status, out, err = run_command(train, *recipe)
    assert status == 0 and out.count("warm-up") == 1, err
    assert run_command(train, *recipe, "--warmup-epochs", 3)[0] == 2


def test_a_full_disk_leaves_the_checkpoint_of_before(run_command, monkeypatch):
    options = [*DIGITS, "--output", "run"]
    assert run_command(train, *options, "--epochs", 1)[0] == 0
    before = Path("run/last.pth.tar").read_bytes()
    with monkeypatch.context() as patch:
        fill_disk(patch)
        status, _, err = run_command(train, *options, "--epochs", 2, "--resume")
    assert status == 2
    assert "cannot save a checkpoint into run" in err and "No space left on device" in err and "Traceback" not in err
    assert Path("run/last.pth.tar").read_bytes() == before
    status, _, err = run_command(train, *options, "--epochs", 2, "--resume")
    assert status == 0, err


# What else a run does


def test_train_on_a_folder_of_images(image_folder, run_command):
    options = [*TINY, "--data-dir", image_folder, "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0]
    status, out, err = run_command(
        train, *options, "--img-size", 40, 48, "--aa", "rand-m5", "--mixup", 0.8, "--cutmix", 1.0, "--reprob", 0.25,
        "--drop-path", 0.1, "--clip-grad", 1, "--grad-checkpointing", "--amp", "--lr", 1e-3,
    )  # fmt: skip
    assert status == 0, err
    assert "2 classes, 40x48: 24 images to train on, 12 to evaluate on" in out

    # another task's classifier stays behind, and that is said
    finetune = ["--model", "raftmlp_digits", "--pretrained", "--data-dir", image_folder, "--workers", 0]
    status, out, err = run_command(
        train, *finetune, "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0, "--output", "tuned"
    )
    assert status == 0, err
    shipped = ROOT / "weights/raftmlp_digits.sklearn.safetensors"
    options = ["--model", "raftmlp_digits", "--checkpoint", shipped, "--data-dir", image_folder, "--workers", 0]
    status, out, err = run_command(
        train, *options, "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0, "--output", "tuned2"
    )
    assert status == 0, err
    assert "its classifier is missing or another task's" in out


def test_train_at_several_sizes(run_command):
    sizes = ["--train-img-sizes", 24, "16x32", 32, "--train-size-probs", 2, 1, 1]
    status, out, err = run_command(train, *DIGITS, *sizes, "--train-size-schedule", "progressive", "--epochs", 2)
    assert status == 0 and not err
    assert "2 epochs of 5 updates of 256 images: 1 process x 1 x 256, on cpu" in out
    assert "image sizes of the updates: 24 (50 %), 16x32 (25 %), 32 (25 %), from the first to the last" in out
    rows = list(csv.DictReader(Path("runs/train/log.csv").read_text().splitlines()))
    counts = [[int(row[f"updates_{size}"]) for size in ("24", "16x32", "32")] for row in rows]
    assert [sum(count) for count in counts] == [5, 5] and counts[0][0] > counts[1][0]
    summary = json.loads(Path("runs/train/summary.json").read_text())
    assert list(summary["updates_by_size"].values()) == [sum(count) for count in zip(*counts)]
    state = torch.load("runs/train/last.pth.tar", weights_only=True)
    assert state["pretrained_cfg"]["input_size"] == (3, 32, 32)  # of the grid, and of the evaluation
    assert state["options"]["train_img_sizes"] == ["24", "16x32", "32"]
    status, _, err = run_command(train, "-c", "runs/train/args.yaml", "--resume", "--epochs", 3)
    assert status == 0, err
    options = [*DIGITS, "--train-size-probs", 2, 1, "--variable-batch-loss-scale", "--epochs", 1, "--output", "one"]
    status, _, err = run_command(train, *options)
    assert status == 0 and "updates_" not in Path("one/log.csv").read_text()
    assert err.count("needs --train-img-sizes") == 2 and "--train-size-probs (needs" in err


def test_another_model_of_timm_trains_at_several_sizes(run_command):
    options = ["--dataset", "digits", "--workers", 0, "--device", "cpu", "--batch-size", 256, "--img-size", 32]
    options += ["--epochs", 1, "--warmup-epochs", 0, "--train-img-sizes", 32, 48, "--model"]
    status, _, err = run_command(train, *options, "test_resnet")
    assert status == 0, err
    options += ["vit_tiny_patch16_224", "--overwrite", "--model-kwargs", "depth=1"]
    status, _, err = run_command(train, *options)
    assert status == 2 and "--train-img-sizes: vit_tiny_patch16_224 takes no images of 48 pixels: " in err
    status, _, err = run_command(train, *options, "dynamic_img_size=True")
    assert status == 0, err
    options = [*DIGITS, "--epochs", 1, "--train-img-sizes", 32, 48, "--kd-model-name", "raftmlp_digits"]
    status, _, err = run_command(train, *options, "--overwrite")
    assert status == 0, err


def test_a_loss_that_is_not_finite_ends_the_run(run_command):
    options = [*CONFIG, "--warmup-epochs", 0, "--epochs", 3, "--lr", "1e30", "--output", "out"]
    status, _, err = run_command(train, *options)
    assert status == 2
    assert "the loss became" in err and "at learning rate" in err
    assert not Path("out/summary.json").exists()


# Configs and options


def test_the_command_line_wins_over_the_config(tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 7\nlr: 0.5\nmodel_kwargs: {depths: [1, 1]}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nlr: 0.25\nscale: [0.5, 1]\nmodel_ema: true\n")
    parse = train.build_parser().parse_args
    args = parse(["-c", str(tmp_path / "run.yaml"), "--scale", "0.7", "0.9"])
    assert (args.epochs, args.lr, args.scale, args.model_ema) == (7, 0.25, [0.7, 0.9], True)
    assert args.model_kwargs == {"depths": [1, 1]}
    assert parse(["-c", str(tmp_path / "run.yaml"), "--no-model-ema"]).model_ema is False
    (tmp_path / "resume.yaml").write_text("resume: true\n")
    assert train.build_parser().parse_args(["-c", str(tmp_path / "resume.yaml")]).resume == "auto"


def test_help_tells_every_option(run_command):
    status, out, _ = run_command(train, "--help")
    assert status == 0
    assert {field.name for field in fields(TrainSettings)} <= {a.dest for a in train.build_parser()._actions}
    for action in train.build_parser()._actions:
        assert action.help
        assert not action.option_strings or action.option_strings[-1] in out


# Bad input: one line, exit status 2


def test_bad_input(run_command):
    digits = ["--dataset", "digits", "--model", "raftmlp_digits", "--workers", 0]
    for options, message in [
        (["--batch-size", 5000], "1437 images make no update of 5000"),
        (["--opt", "adamx"], "adamx"),
        (["--sched", "cosin"], "invalid choice: 'cosin'"),
        (["--warmup-epochs", "300"], "--warmup-epochs 300 must be less than --epochs 300"),
        (["--opt", "adamww"], "unknown optimiser 'adamww'; did you mean adamw"),
        (["--opt", "adahessian"], "the optimiser adahessian cannot be used: it needs second-order gradients"),
        (["--opt", "KronW"], "the optimiser KronW cannot be used: it compiles its steps, which takes minutes"),
        (["--opt", "fusedlamb", "--device", "cpu"], "--opt fusedlamb, --sched cosine: "),
        (["--global-batch-size", "0"], "must be a whole number of 1 or more"),
        (["--mixup-then-cutmix", "--mixup", "1"], "needs --mixup and --cutmix above 0"),
        (["--mean", "0.5", "0.5"], "--mean takes 1 or 3 numbers"),
        (["--mean", "nan"], "must be a number of 0 or more, not 'nan'"),
        (["--lr", "inf"], "must be a number of 0 or more, not 'inf'"),
        (["--seed", "5000000000"], "must be a whole number from 0 to 4294967295"),
        (["--device", "meta"], "no device 'meta' here"),
        (["--pretrained", "--checkpoint", "x"], "--checkpoint and --pretrained exclude each other"),
        (["--scale", "1", "0.5"], "--scale takes the smaller number first"),
        (["--in-chans", "2"], "images have 1 or 3 channels"),
        (["--aa", "random"], "--aa 'random'"),
        (["--affine", "10", "2", "0.1"], "SHIFT up to 1"),
        (["--mixup", "0.8", "--batch-size", "7"], "must be even: 7 images"),
        (["--lr", "-1"], "must be a number of 0 or more, not '-1'"),
        (["--train-img-sizes"], "expected at least one argument"),
        (["--train-img-sizes", 24, "32x"], "'32x' must be a number of pixels or HEIGHTxWIDTH"),
        (["--train-img-sizes", 24, 0], "'0' must be a number of pixels or HEIGHTxWIDTH"),
        (["--train-img-sizes", 24, "24x24"], "--train-img-sizes must differ, not 24 24"),
        (
            ["--train-img-sizes", 24, 32, "--train-batch-sizes", 8],
            "--train-batch-sizes takes a number for each of the 2",
        ),
        (["--train-img-sizes", 24, 32, "--train-size-probs", 1, -1], "must be a number of 0 or more, not '-1'"),
        (["--train-img-sizes", 24, 32, "--train-size-probs", 1, "nan"], "must be a number of 0 or more, not 'nan'"),
        (["--train-img-sizes", 24, 32, "--train-size-probs", 0, 0], "must add up to a number above 0, not 0.0 0.0"),
        (["--train-img-sizes", 24, "--train-size-schedule", "progressive"], "takes two --train-img-sizes or more"),
        (["--train-img-sizes", 24, 200_000], "choose a smaller image size or --batch-size"),
        (["--train-img-sizes", 24, 32, "--train-batch-sizes", 8, 2000], "1437 images make no update of 2000"),
        (
            ["--train-img-sizes", 24, 32, "--train-batch-sizes", 8, 5, "--mixup", 1],
            "must be even: 5 images, made of --batch-size or --train-batch-sizes",
        ),
        (
            ["--train-img-sizes", 24, 32, "--train-batch-sizes", 8, 4, "--lr-base-size", 8],
            "--lr-base-size is for updates of one number of images: give --global-batch-size",
        ),
        (["--epochs", "1.5"], "must be a whole number of 1 or more, not '1.5'"),
    ]:
        status, _, err = run_command(train, *digits, *options)
        assert status == 2, err
        assert message in err
        assert not Path("runs").exists()
    Path("file").write_text("")
    status, _, err = run_command(train, *digits, "--output", "file/run")
    assert status == 2 and "cannot write into file/run" in err


def test_folders_that_would_spoil_the_figure(image_folder, run_command, tmp_path):
    options = [*TINY, "--batch-size", 4, "--epochs", 1, "--warmup-epochs", 0]
    status, _, err = run_command(train, *options, "--data-dir", image_folder, "--val-split", "train")
    assert status == 2 and "overlap" in err
    for split, names in (("train", "bc"), ("val", "abc")):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / split / name / "1.png")
    status, _, err = run_command(train, *options, "--data-dir", tmp_path / "data")
    assert status == 2 and "classes to train on are not the" in err


@pytest.mark.parametrize("program", [["tools/train.py"], ["-m", "raftmlp", "train"]], ids=" ".join)
def test_every_way_to_start_it_shows_an_error_in_one_line(program):
    command = [sys.executable, *program, "--dataset", "digits", "--model", "raftmlp_x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "train" in line and "error: " in line and "unknown model 'raftmlp_x'" in line


def test_a_run_from_a_checkpoint_records_the_models_arguments(digits_run, run_command):
    """Its checkpoints say all that rebuilds the model, though the command line named none of it."""
    first = torch.load(f"{digits_run[0]}/model_best.pth.tar", weights_only=True)
    assert first["model_kwargs"]
    options = ["--dataset", "digits", "--workers", 0, "--device", "cpu", "--batch-size", 512, "--warmup-epochs", 0]
    options += ["--checkpoint", f"{digits_run[0]}/model_best.pth.tar", "--output", "out"]
    status, _, err = run_command(train, *options, "--epochs", 1, "--drop", 0.1)
    assert status == 0, err
    second = torch.load("out/last.pth.tar", weights_only=True)
    assert {key: list(value) for key, value in second["model_kwargs"].items()} == {
        key: list(value) for key, value in first["model_kwargs"].items()
    }
    status, out, err = run_command(train, *options, "--epochs", 2, "--resume")
    assert status == 0 and "resuming from out/last.pth.tar" in out, err
    status, _, err = run_command(validate, "--dataset", "digits", "--workers", 0, "--checkpoint", "out/last.pth.tar")
    assert status == 0, err
    status, _, err = run_command(export, "--checkpoint", "out/last.pth.tar", "--format", "hf", "--out", "folder")
    assert status == 0, err
    options = [*options[:-4], "--model", "local-dir:folder", "--pretrained", "--output", "third"]
    status, _, err = run_command(train, *options, "--epochs", 1)
    assert status == 0, err
    third = torch.load("third/last.pth.tar", weights_only=True)
    assert third["arch"] == "raftmlp_digits" and list(third["model_kwargs"]["embed_dims"]) == [8] * 4
    status, _, err = run_command(validate, "--dataset", "digits", "--checkpoint", "third/last.pth.tar", "--workers", 0)
    assert status == 0, err
