"""Bad input to the commands that take a model and data: one line, exit status 2, nothing written."""

import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from raftmlp.cli import train, validate


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
        (["--dataset", "digits", "--model-kwargs", "resizing=foo"], "error: resizing 'foo' must be 'map' or 'update'"),
        (
            ["--dataset", "digits", "--model", "raftmlp_digits", "--pretrained", "--model-kwargs", "resizing=foo"],
            "error: resizing 'foo' must be 'map' or 'update'",
        ),
        (
            ["--dataset", "digits", "--model", "raftmlp_digits", "--pretrained", "--model-kwargs", "raft_size=4"],
            "error: cannot make raftmlp_digits: its pretrained weights do not fit --model-kwargs raft_size=4",
        ),
        (["--dataset", "digits", "--checkpoint", "."], ". is a folder: name a checkpoint file in it"),
        (["--data-dir", "splits", "--val-split", "test"], "no split 'test' in splits: it has train"),
        (["--data-dir", "tars"], "no data set '' with split"),
        (["--dataset", "digits", "--pretrained"], "no pretrained weights raftmlp_s.TAG.safetensors"),
        (["--dataset", "digits", "--img-size", "0"], "must be a whole number of 1 or more, not '0'"),
        (["--dataset", "digits", "--img-size", "1", "2", "3"], "--img-size takes"),
        (["--dataset", "digits", "--img-size", "10000000"], "10000000 pixels take"),
        (["--dataset", "digits", "--background", "whiet"], "must be the name of a colour or #rrggbb, not 'whiet'"),
        (["--data-dir", "n" * 300], "File name too long: 'nnnn"),
        (["--dataset", "digits", "--checkpoint", "n" * 300], "nnnn"),
        (
            ["--dataset", "digits", "--model-kwargs", "num_classes=7"],
            "the data has 10 classes, the model 7",
        ),
        (["--dataset", "digits", "--crop-pct", "3"], "must be a number from 0.01 to 1, not '3'"),
        (["--dataset", "digits", "--interpolation", "cubic"], "invalid choice: 'cubic'"),
        (["--dataset", "digits", "--device", "gpu"], "no device 'gpu'"),
        (["--dataset", "digits", "--batch-size", "many"], "must be a whole number of 1 or more, not 'many'"),
        (
            ["--dataset", "digits", "--batchsize", "3"],
            "unrecognized arguments: --batchsize 3; did you mean --batch-size",
        ),
        (["--dataset", "digits", "--data-dir", "splits"], "'digits' is embedded and reads nothing in splits"),
        (["-c", "twice.yaml"], "twice.yaml, line 2: batch_size stands here twice"),
        (["-c", "missing.yaml"], "no config missing.yaml; shipped are"),
        (["-c", "unknown.yaml"], "unknown.yaml: unknown key 'batchsize'; did you mean batch_size"),
        (["-c", "broken.yaml"], "broken.yaml, line 1: expected"),
        (["-c", "list.yaml"], "list.yaml must be a mapping"),
        (["-c", "wrong.yaml"], "wrong.yaml: batch_size: must be a whole number of 1 or more, not 'big'"),
        (["-c", "flag.yaml"], "flag.yaml: amp must be true or false, not 'perhaps'"),
        (["-c", "base.yaml"], "cannot read the config"),
        (["-c", "number.yaml"], "number.yaml must be a mapping"),
        (["-c", "circle.yaml"], "circle.yaml is its own base"),
        (["-c", "badbase.yaml"], "badbase.yaml: base must be the name of a file"),
        (["-c", "null.yaml"], "null.yaml, line 1: batch_size has no value"),
        (["--dataset", "digits", "--model", "raftmlp_s.mine"], "Invalid pretrained tag"),
        (["--dataset", "torch/cifar10"], "torch/cifar10"),
        (["--dataset", "digits", "--model-kwargs", "raft_size"], "expected KEY=VALUE pairs"),
    ],
)
@pytest.mark.parametrize("command", [train, validate], ids=lambda command: command.__name__.rpartition(".")[2])
def test_one_line_and_nothing_written(run_command, command, options, message):
    Path("cut.pth").write_bytes(b"PK\x03\x04 cut")
    torch.save({"conv.weight": torch.zeros(3)}, "foreign.pth")
    for name, text in {
        "unknown": "batchsize: 3", "broken": "a: [1", "list": "- 1", "wrong": "batch_size: big", "flag": "amp: perhaps",
        "count": "scale: [1]", "base": "base: nowhere.yaml", "number": "1: 2", "circle": "base: circle.yaml",
        "badbase": "base: [a]", "null": "batch_size:",
        "twice": "batch_size: 2\nbatch_size: 3",
    }.items():  # fmt: skip
        Path(f"{name}.yaml").write_text(text)
    Path("splits/train/a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("splits/train/a/1.png")
    Path("tars").mkdir()
    for name in ("train", "val"):
        Path(f"tars/{name}.tar").write_text("no tar")
    before = sorted(Path().iterdir())
    status, out, err = run_command(command, *options)
    assert status == 2
    assert message in err
    assert re.match(r"raftmlp (train|validate): error: ", err.splitlines()[-1])
    assert "Traceback" not in err
    assert not out
    assert sorted(Path().iterdir()) == before


def test_arguments_that_do_not_fit_a_checkpoint(run_command):
    torch.save(timm.create_model("raftmlp_digits", num_classes=10, img_size=48).state_dict(), "48.pth")
    options = ["--dataset", "digits", "--model", "raftmlp_digits", "--checkpoint", "48.pth"]
    for arguments, message in (
        (["raft_size=4"], "; was it trained with --model-kwargs raft_size=4?"),
        (["depths=(1,1,1,1)", "img_size=48"], "; was it trained with --model-kwargs depths=(1, 1, 1, 1)?"),
        (["resizing=update"], "; if it was trained at another image size, give --model-kwargs img_size=N"),
    ):
        status, _, err = run_command(validate, *options, "--model-kwargs", *arguments)
        assert status == 2 and err.endswith(message + "\n"), err
