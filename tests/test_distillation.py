"""A teacher: its loss by the formula, its gradients, exact resume, and what is refused."""

from pathlib import Path

import pytest
import timm
import torch

from helpers import TINY, assert_same
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import train
from raftmlp.train.distillation import DistillationTask, create_teacher

DIGITS = [*TINY, "--dataset", "digits", "--batch-size", 256, "--warmup-epochs", 0, "--mixup", 0.5]
TEACHER = ["--kd-model-name", "raftmlp_digits"]


def slow_loss(student, taught, target, kind, temperature):
    """The loss of half the labels and twice the teacher, image by image."""
    total = 0.0
    for s, t, label in zip(student, taught, target):
        if kind == "hard":
            kd = -s.log_softmax(0)[t.argmax()]
        else:
            p, q = (t / temperature).softmax(0), (s / temperature).softmax(0)
            kd = temperature**2 * sum(p[c] * (p[c].log() - q[c].log()) for c in range(len(p)))
        total = total + 0.5 * -s.log_softmax(0)[label] + 2 * kd
    return total / len(student)


@pytest.mark.parametrize("kind, temperature", [("kl", 1.0), ("kl", 3.0), ("hard", 1.0)])
def test_the_loss_is_the_formula(kind, temperature):
    torch.manual_seed(0)
    student = timm.create_model("raftmlp_digits", embed_dims=(8,) * 4, depths=(1,) * 4)
    student.pretrained_cfg = {**student.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    teacher = create_teacher("raftmlp_digits", None, student, [(3, 32, 32)])
    task = DistillationTask(
        student, teacher, torch.nn.CrossEntropyLoss(), kind, temperature, 2.0, 0.5, torch.device("cpu")
    ).train()
    assert not teacher.training
    pixels, target = torch.rand(6, 3, 32, 32), torch.arange(6)
    stats = [[torch.tensor(m.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std")] for m in (student, teacher)]
    images, theirs = [(pixels - mean) / std for mean, std in stats]
    task(images, target)["loss"].backward()
    fast = [p.grad.clone() for p in student.parameters()]
    loss = slow_loss(student(images), teacher(theirs), target, kind, temperature)
    torch.testing.assert_close(task(images, target)["loss"], loss, rtol=1e-4, atol=1e-5)
    student.zero_grad()
    loss.backward()
    for parameter, gradient in zip(student.parameters(), fast):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_run_with_a_teacher_resumes_to_the_same_bits_and_not_with_another(run_command):
    status, _, err = run_command(train, *DIGITS, *TEACHER, "--epochs", 2, "--output", "whole", "--sched", "constant")
    assert status == 0, err
    options = [*DIGITS, "--output", "parts", "--sched", "constant"]
    assert run_command(train, *options, *TEACHER, "--epochs", 1)[0] == 0
    before = Path("parts/last.pth.tar").read_bytes()
    other = timm.create_model("raftmlp_digits")
    torch.save(other.state_dict(), "other.pth")
    for changed, message in [
        ([], "is of a run with --kd-model-name raftmlp_digits, not None"),
        ([*TEACHER, "--kd-checkpoint", "other.pth"], "is of a run whose teacher has other weights"),
    ]:
        status, _, err = run_command(train, *options, *changed, "--epochs", 2, "--resume")
        assert status == 2 and message in err
        assert Path("parts/last.pth.tar").read_bytes() == before
    status, _, err = run_command(train, *options, *TEACHER, "--epochs", 2, "--resume")
    assert status == 0, err
    whole, parts = (load_checkpoint(f"{name}/last.pth.tar") for name in ("whole", "parts"))
    for key in ("state_dict", "optimizer"):
        assert_same(whole[key], parts[key])
    assert not any("teacher" in key for key in whole["state_dict"])


def test_what_is_refused(run_command):
    Path("damaged.pth").write_bytes(b"no weights")
    torch.save(timm.create_model("raftmlp_digits", num_classes=7).state_dict(), "seven.pth")
    for options, message in [
        (["--kd-model-name", "raftmlp_digit"], "unknown model 'raftmlp_digit'; did you mean raftmlp_digits"),
        ([*TEACHER, "--kd-checkpoint", "missing.pth"], "cannot make the teacher raftmlp_digits: no checkpoint at"),
        ([*TEACHER, "--kd-checkpoint", "damaged.pth"], "damaged.pth is damaged"),
        ([*TEACHER, "--kd-checkpoint", "seven.pth"], "head.weight has shape [7, "),
        ([*TEACHER, "--num-classes", 12], "the teacher raftmlp_digits has 10 classes, the model 12"),
        (["--kd-temperature", 2], "--kd-temperature needs a teacher: name it with --kd-model-name"),
        (["--kd-loss-type", "soft"], "invalid choice: 'soft'"),
    ]:
        status, _, err = run_command(train, *DIGITS, *options, "--epochs", 1)
        assert status == 2 and message in err and len(err.splitlines()) == 1, (options, err)
        assert not Path("runs").exists()
