"""Bad input to the commands that take a model and data: one line, exit status 2, nothing written."""

import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from helpers import DIGITS
from raftmlp.cli import train, validate


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "raftmpl_s"], "did you mean raftmlp_s"),
        (["--data-dir", "missing"], "missing"),
        ([], "--data-dir"),
        (["--dataset", "digit"], "digit"),
        (["--dataset", "digits", "--val-split", "x"], "'x'"),
        (["--data-dir", "splits", "--val-split", "test"], "it has train"),
        (["--data-dir", "tars"], "tars"),
        (["--data-dir", "n" * 300], "File name too long"),
        (["--dataset", "digits", "--data-dir", "splits"], "'digits'"),
        (["--dataset", "digits", "--checkpoint", "missing.pth"], "missing.pth"),
        (["--dataset", "digits", "--checkpoint", "cut.pth"], "cut.pth"),
        (["--dataset", "digits", "--checkpoint", "foreign.pth"], "foreign.pth does not fit this RaftMLP: stages.0"),
        (["--dataset", "digits", "--checkpoint", "."], "name a checkpoint file in it"),
        (["--dataset", "digits", "--pretrained"], "raftmlp_s.TAG.safetensors"),
        (["--dataset", "digits", "--model", "raftmlp_s.mine"], "mine"),
        (["--dataset", "digits", "--model-kwargs", "raft_size=3"], "raft_size 3"),
        (["--dataset", "digits", "--model-kwargs", "raft_sise=2"], "raft_sise"),
        (["--dataset", "digits", "--model-kwargs", "resizing=foo"], "resizing 'foo'"),
        (["--dataset", "digits", *DIGITS, "--model-kwargs", "raft_size=4"], "size mismatch"),
        (["--dataset", "digits", "--model-kwargs", "num_classes=7"], "the data has 10 classes, the model 7"),
        (["--dataset", "digits", "--img-size", "10000000"], "10000000 pixels take"),
        (["--dataset", "digits", "--background", "whiet"], "whiet"),
        (["--dataset", "digits", "--device", "gpu"], "gpu"),
        (["-c", "wrong.yaml"], "wrong.yaml: batch_size"),
    ],
)
@pytest.mark.parametrize("command", [train, validate], ids=lambda command: command.__name__.rpartition(".")[2])
def test_one_line_and_nothing_written(run_command, command, options, message):
    Path("cut.pth").write_bytes(b"PK\x03\x04 cut")
    torch.save({"conv.weight": torch.zeros(3)}, "foreign.pth")
    Path("wrong.yaml").write_text("batch_size: big")
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
