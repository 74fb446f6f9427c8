"""The ways to train: teachers, precisions, compiled models, other optimisers and schedules."""

import torch

from helpers import TINY, assert_same
from raftmlp.commands import train
from raftmlp.weights import load_checkpoint

DIGITS = [*TINY, "--dataset", "digits", "--batch-size", 256, "--warmup-epochs", 0]


def test_distillation_and_the_other_ways_to_train(run_command, monkeypatch):
    options = [*DIGITS, "--epochs", 1, "--output"]
    status, _, err = run_command(
        train, *options, "kd", "--kd-model-name", "raftmlp_digits", "--kd-temperature", 2, "--mixup", 0.2
    )
    assert status == 0, err
    status, _, err = run_command(train, *options, "kd2", "--kd-model-name", "raftmlp_s")
    assert status == 2 and "cannot make the teacher raftmlp_s" in err
    status, _, err = run_command(
        train, *options, "half", "--amp", "--amp-dtype", "float16", "--clip-grad", 1, "--grad-checkpointing"
    )
    assert status == 0, err
    assert load_checkpoint("half/last.pth.tar")["amp_scaler"]["scale"] > 0
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **_: compile_(model, backend="aot_eager")
    )  # seconds, not minutes
    status, _, err = run_command(
        train, *options, "fast", "--compile", "--channels-last", "--model-ema", "--layer-decay", 0.9, "--sched", "wsd",
        "--opt", "lamb", "--clip-mode", "agc", "--clip-grad", 0.1, "--train-crop-mode", "rkrr",
    )  # fmt: skip
    assert status == 0, err
    plain = load_checkpoint("fast/last.pth.tar")
    assert (
        plain["state_dict"].keys()
        == plain["state_dict_ema"].keys()
        == load_checkpoint("kd/last.pth.tar")["state_dict"].keys()
    )


def test_the_teacher_counts(run_command):
    options = [*DIGITS, "--epochs", 1, "--output"]
    teacher = ["--kd-model-name", "raftmlp_digits", "--distill-loss-weight"]
    for name, more in (("without", []), ("zero", [*teacher, 0]), ("one", [*teacher, 1])):
        status, _, err = run_command(train, *options, name, *more)
        assert status == 0, err
    weights = {name: load_checkpoint(f"{name}/last.pth.tar")["state_dict"] for name in ("without", "zero", "one")}
    assert_same(weights["without"], weights["zero"])
    assert not torch.equal(weights["one"]["head.weight"], weights["zero"]["head.weight"])
