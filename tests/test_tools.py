"""The scripts as a user runs them: what they write, and what they say to bad input."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from test_golden import release_weights

import convert_checkpoint
import train
from raftmlp.checkpoint import load_state_dict, read_metadata

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


def test_resume_goes_on(digits_run, run_tool):
    output, _ = digits_run
    config = ["-c", ROOT / "configs/digits/raftmlp_digits.yaml", *TINY, "--warmup-epochs", "1", "--output", output]
    before = (output / "last.pth.tar").read_bytes()
    status, _, err = run_tool(train, *config, "--epochs", "3")
    assert status == 2 and "holds a run: go on with --resume" in err
    assert (output / "last.pth.tar").read_bytes() == before

    status, out, _ = run_tool(train, *config, "--epochs", "3", "--resume")
    assert status == 0
    assert "epoch 3/3" in out and "epoch 2/3" not in out
    assert [row["epoch"] for row in csv.DictReader((output / "log.csv").open())] == ["1", "2", "3"]

    status, _, err = run_tool(train, *config, "--epochs", "3", "--resume", output / "missing.pth")
    assert status == 2 and "no checkpoint to resume from" in err
    (output / "cut.pth").write_bytes(before[:3000])
    status, _, err = run_tool(train, *config, "--epochs", "3", "--resume", output / "cut.pth")
    assert status == 2 and "cut.pth is damaged" in err

    (output / "empty.pth").write_bytes(b"")
    status, _, err = run_tool(train, *config, "--epochs", "3", "--resume", output / "empty.pth")
    assert status == 2 and "empty.pth is damaged" in err
    status, _, err = run_tool(train, *config, "--epochs", "3", "--resume", "elsewhere/last.pth.tar")
    assert status == 2 and "holds a run" in err

    (output / "mine.txt").write_text("keep")
    status, out, _ = run_tool(train, *config, "--epochs", "1", "--warmup-epochs", 0, "--overwrite", "--no-model-ema")
    assert (output / "mine.txt").read_text() == "keep"
    assert status == 0
    assert [row["epoch"] for row in csv.DictReader((output / "log.csv").open())] == ["1"]


def test_train_on_a_folder_of_images(image_folder, run_tool):
    options = [*TINY, "--data-dir", image_folder, "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0]
    status, out, err = run_tool(
        train, *options, "--img-size", 40, 48, "--aa", "rand-m5", "--mixup", 0.8, "--cutmix", 1.0, "--reprob", 0.25,
        "--drop-path", 0.1, "--clip-grad", 1, "--grad-checkpointing", "--amp", "--lr", 1e-3,
    )  # fmt: skip
    assert status == 0, err
    assert "2 classes, 40x48: 24 images to train on, 12 to evaluate on" in out

    # another task's classifier stays behind, and that is said
    finetune = ["--model", "raftmlp_digits", "--pretrained", "--data-dir", image_folder, "--workers", 0]
    status, out, err = run_tool(
        train, *finetune, "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0, "--output", "tuned"
    )
    assert status == 0, err
    shipped = ROOT / "checkpoints/raftmlp_digits.sklearn.safetensors"
    options = ["--model", "raftmlp_digits", "--checkpoint", shipped, "--data-dir", image_folder, "--workers", 0]
    status, out, err = run_tool(
        train, *options, "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0, "--output", "tuned2"
    )
    assert status == 0, err
    assert "its classifier is missing or another task's" in out


def test_a_loss_that_is_not_finite_ends_the_run(run_tool):
    options = ["-c", ROOT / "configs/digits/raftmlp_digits.yaml", *TINY, "--warmup-epochs", 0, "--epochs", 3]
    status, _, err = run_tool(train, *options, "--lr", "1e30", "--output", "out")
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


@pytest.mark.parametrize("tool", [train, convert_checkpoint])
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
@pytest.mark.parametrize("tool", [train], ids=lambda tool: tool.__name__)
def test_bad_input(run_tool, tool, options, message):
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


def test_train_only_bad_input(run_tool):
    digits = ["--dataset", "digits", "--model", "raftmlp_digits", "--workers", 0]
    for options, message in [
        (["--batch-size", 5000], "1437 images make no update of 5000"),
        (["--opt", "adamx"], "adamx"),
        (["--sched", "cosin"], "invalid choice: 'cosin'"),
        (["--warmup-epochs", "300"], "--warmup-epochs 300 must be less than --epochs 300"),
        (["--opt", "adamww"], "unknown optimiser 'adamww'; did you mean adamw"),
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
        (["--epochs", "1.5"], "must be a whole number of 1 or more, not '1.5'"),
    ]:
        status, _, err = run_tool(train, *digits, *options)
        assert status == 2, err
        assert message in err
        assert not Path("runs").exists()
    Path("file").write_text("")
    status, _, err = run_tool(train, *digits, "--output", "file/run")
    assert status == 2 and "cannot write into file/run" in err


def test_folders_that_would_spoil_the_figure(image_folder, run_tool, tmp_path):
    options = [*TINY, "--batch-size", 4, "--epochs", 1, "--warmup-epochs", 0]
    status, _, err = run_tool(train, *options, "--data-dir", image_folder / "train")
    assert status == 2 and "overlap" in err
    for split, names in (("train", "abc"), ("val", "bc")):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / split / name / "1.png")
    status, _, err = run_tool(train, *options, "--data-dir", tmp_path / "data")
    assert status == 2 and "classes to train on are not the" in err


def test_a_failed_resume_changes_nothing(digits_run, run_tool):
    output, _ = digits_run
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    options = [*TINY, "--dataset", "digits", "--output", output, "--resume", "missing.pth", "--lr", 7]
    assert run_tool(train, *options)[0] == 2
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_resume_into_another_folder_and_from_its_options(digits_run, run_tool):
    output, _ = digits_run
    status, _, err = run_tool(
        train, "-c", output / "args.yaml", "--epochs", 3, "--resume", output / "last.pth.tar", "--output", "new"
    )
    assert status == 0, err
    assert Path(json.loads(Path("new/summary.json").read_text())["best_checkpoint"]).exists()


def test_import_needs_torch_and_timm_alone_and_is_silent():
    optional = "('mmengine', 'sklearn', 'matplotlib', 'tqdm', 'einops')"
    code = (
        f"import sys, timm; had = set(sys.modules); import raftmlp; print(set({optional}) & (set(sys.modules) - had))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, cwd="/")
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


# Conversion


def test_convert_finds_the_variant(run_tool):
    for name in ("raftmlp_s", "raftmlp_m_ss", "raftmlp_12_r2", "raftmlp_cifar"):
        weights = release_weights(name)
        torch.save({"model": {f"module.{key}": value for key, value in weights.items()}}, "release.pth")
        status, out, err = run_tool(convert_checkpoint, "release.pth", f"{name}.safetensors")
        assert status == 0, err
        assert f"release.pth: {name} in the release format" in out
        assert f"written: {name}.safetensors" in out
        expected = timm.create_model(name)
        expected.load_state_dict(weights)
        state = load_state_dict(f"{name}.safetensors")
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
        assert read_metadata(f"{name}.safetensors")["model"] == name


def test_converted_files_are_pretrained_weights(run_tool, monkeypatch):
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", ".")
    torch.manual_seed(0)
    made = timm.create_model("raftmlp_s", num_classes=6, img_size=96, in_chans=1)
    torch.save({"state_dict": made.state_dict()}, "ours.pth")
    status, out, err = run_tool(convert_checkpoint, "ours.pth", "raftmlp_s.mine.safetensors", "--img-size", 96)
    assert status == 0, err
    assert "6 classes, trained grid of 96x96" in out
    loaded = timm.create_model("raftmlp_s", pretrained=True)
    assert (loaded.num_classes, loaded.img_size, loaded.in_chans) == (6, (96, 96), 1)
    assert torch.equal(loaded.head.weight, made.head.weight)


def test_convert_refuses(run_tool):
    weights = release_weights("raftmlp_s")
    torch.save(weights, "release.pth")
    odd = {key: value for key, value in weights.items() if key != "heads.0.1.bias"}
    odd["levels.1.fn.0.fc.bias"] = torch.zeros(5)
    torch.save({**odd, "extra.weight": torch.zeros(2)}, "odd.pth")
    torch.save({**weights, "classifier.bias": torch.full((1000,), float("nan"))}, "nan.pth")
    torch.save({key: value for key, value in weights.items() if key != "classifier.bias"}, "head.pth")
    Path("there.safetensors").write_text("mine")
    for options, messages in [
        (["release.pth", "out.pth"], ["must be named .safetensors"]),
        (["release.pth", "there.safetensors"], ["there.safetensors exists; --overwrite"]),
        (["missing.pth", "out.safetensors"], ["no checkpoint at missing.pth"]),
        (["release.pth", "out.safetensors", "--model", "raftmlp_x"], ["unknown model 'raftmlp_x'"]),
        (["release.pth", "out.safetensors", "--model", "resnet18"], ["unknown model 'resnet18'"]),
        (["nan.pth", "out.safetensors"], ["not finite"]),
        (["head.pth", "out.safetensors"], ["its classifier is damaged: head.bias is missing"]),
        (
            ["odd.pth", "out.safetensors"],
            [
                "odd.pth is no variant of RaftMLP; raftmlp_s comes nearest, with 3 differences:",
                "  heads.0.1.bias is missing",
                "  extra.weight is not known",
                "  levels.1.fn.0.fc.bias has shape [5], not [128]",
            ],
        ),
        (
            ["release.pth", "out.safetensors", "--model", "raftmlp_m"],
            ["release.pth is no raftmlp_m, with", "levels.0.fn.0.fc.weight has shape [64, 240], not [96, 240]"],
        ),
    ]:
        status, out, err = run_tool(convert_checkpoint, *options)
        assert status == 2, options
        assert all(message in err for message in messages), err
        assert not out
        assert not Path("out.safetensors").exists()
    assert Path("there.safetensors").read_text() == "mine"
