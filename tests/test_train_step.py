"""A step of training: teachers, precisions, compiled models, optimizers and schedules."""

from pathlib import Path

import pytest
import timm.optim
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import TINY, assert_same
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import train
from raftmlp.device import Processes
from raftmlp.errors import UserError
from raftmlp.train import TrainSettings
from raftmlp.train.distillation import DistillationTask, create_teacher
from raftmlp.train.muon import Muon
from raftmlp.train.train_step import TrainStep, create_optimization

ALONE = Processes(torch.device("cpu"))
DIGITS = [*TINY, "--dataset", "digits", "--batch-size", 256, "--warmup-epochs", 0]
TEACHER = ["--kd-model-name", "raftmlp_digits"]


def tiny_model():
    torch.manual_seed(0)
    return timm.create_model("raftmlp_digits", embed_dims=(8,) * 4, depths=(1,) * 4)


def test_half_precision_and_compiled_models(run_command, monkeypatch):
    options = [*DIGITS, "--epochs", 1, "--output"]
    half = ["--amp", "--amp-dtype", "float16", "--clip-grad", 1, "--grad-checkpointing"]
    status, _, err = run_command(train, *options, "half", *half)
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
    torch.compiler.reset()  # its graphs hold on to the weights
    assert status == 0, err
    fast = load_checkpoint("fast/last.pth.tar")
    assert fast["state_dict"].keys() == fast["state_dict_ema"].keys() == tiny_model().state_dict().keys()


# Optimizers and schedules


@pytest.mark.parametrize("images, base, lr", [(8, 32, 5e-4), (128, 32, 2e-3), (8, None, 1e-3)])
def test_the_learning_rate_changes_with_the_root_of_the_images_of_an_update(images, base, lr):
    settings = TrainSettings(lr=1e-3, lr_base_size=base, global_batch_size=images, epochs=2, warmup_epochs=0)
    optimizer, scheduler = create_optimization(settings, torch.nn.Linear(2, 2), 10)
    scheduler.step_update(0)
    assert all(group["lr"] == pytest.approx(lr) for group in optimizer.param_groups)


@pytest.mark.parametrize("sched", ["cosine", "tanh", "wsd", "constant"])
def test_no_learning_rate_is_above_the_peak(sched):
    settings = TrainSettings(epochs=4, sched=sched, lr=1e-6, layer_decay=0.5)
    optimizer, scheduler = create_optimization(settings, tiny_model(), 5)
    rates = []
    for update in range(21):
        scheduler.step_update(update)
        rates.append(max(group["lr"] for group in optimizer.param_groups))
    assert max(rates) == pytest.approx(settings.peak_lr) and max(rates) < 1.001e-6
    assert rates[0] == 0 and rates[10] > 0  # the default warm-up is shorter than four epochs


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(min_lr=1e-5), "--min-lr 1e-05"),
        (dict(warmup_lr=2e-6), "--warmup-lr 2e-06"),
        (dict(min_lr=1e-5, sched="constant"), ""),  # there it has no effect
        (dict(warmup_lr=1, warmup_epochs=0), ""),
        (dict(epochs=5, warmup_epochs=5), "--warmup-epochs 5"),
    ],
)
def test_a_schedule_that_is_given_and_does_not_fit_is_refused(given, words):
    settings = TrainSettings(**{"lr": 1e-6, **given})
    if words:
        with pytest.raises(UserError, match=words):
            settings.with_schedule()
    else:
        settings.with_schedule()


def test_the_scale_of_the_loss_scales_the_step_and_not_the_figure():
    settings = dict(opt="momentum", momentum=0.0, lr=0.1, sched="constant", warmup_epochs=0, epochs=1, weight_decay=0.0)
    images, target, steps = torch.randn(4, 3, 32, 32), torch.arange(4), []
    for scale in (1.0, 0.5):
        model = tiny_model()
        step = TrainStep(TrainSettings(**settings), model, 1, ALONE)
        before = model.head.weight.detach().clone()
        step.start_at(0)
        loss = step.update(iter([(images, target)]), 1, 1, scale)
        steps.append((loss, model.head.weight.detach() - before))
    assert steps[0][0] == steps[1][0] and steps[0][1].abs().max() > 0
    torch.testing.assert_close(steps[1][1], 0.5 * steps[0][1])


# Teachers


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


@pytest.mark.parametrize("kind, temperature", [("kl", 3.0), ("hard", 1.0)])
def test_the_loss_is_the_formula(kind, temperature):
    student = tiny_model()
    student.pretrained_cfg = {**student.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    teacher = create_teacher("raftmlp_digits", None, student, [(3, 32, 32)])
    weights = dict(temperature=temperature, distill_loss_weight=2.0, task_loss_weight=0.5)
    task = DistillationTask(student, teacher, torch.nn.CrossEntropyLoss(), loss_type=kind, **weights).train()
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
    common = [*DIGITS, "--mixup", 0.5, "--sched", "constant"]
    status, _, err = run_command(train, *common, *TEACHER, "--epochs", 2, "--output", "whole")
    assert status == 0, err
    options = [*common, "--output", "parts"]
    assert run_command(train, *options, *TEACHER, "--epochs", 1)[0] == 0
    before = Path("parts/last.pth.tar").read_bytes()
    torch.save(timm.create_model("raftmlp_digits").state_dict(), "other.pth")
    status, _, err = run_command(train, *options, *TEACHER, "--kd-checkpoint", "other.pth", "--epochs", 2, "--resume")
    assert status == 2 and "whose teacher has other weights" in err
    assert Path("parts/last.pth.tar").read_bytes() == before
    status, _, err = run_command(train, *options, *TEACHER, "--epochs", 2, "--resume")
    assert status == 0, err
    whole, parts = (load_checkpoint(f"{name}/last.pth.tar") for name in ("whole", "parts"))
    for key in ("state_dict", "optimizer"):
        assert_same(whole[key], parts[key])
    assert not any("teacher" in key for key in whole["state_dict"])


def test_teachers_that_are_refused(run_command):
    torch.save(timm.create_model("raftmlp_digits", num_classes=7).state_dict(), "seven.pth")
    for options, message in [
        ([*TEACHER, "--kd-checkpoint", "missing.pth"], "missing.pth"),
        ([*TEACHER, "--kd-checkpoint", "seven.pth"], "head.weight has shape [7, "),
        ([*TEACHER, "--num-classes", 12], "has 10 classes, the model 12"),
        (["--kd-temperature", 2], "--kd-model-name"),
    ]:
        status, _, err = run_command(train, *DIGITS, *options, "--epochs", 1)
        assert status == 2 and message in err and len(err.splitlines()) == 1, (options, err)
        assert not Path("runs").exists()


# Muon


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of what the operators in this context return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.add(out.dtype)
        return out


def test_muon_is_timms_in_float32():
    shapes = [(12, 20), (20, 12), (8, 6, 3, 3), (7,)]
    weights, *gradients = [[torch.randn(s, generator=torch.manual_seed(n)) for s in shapes] for n in range(3)]
    results = []
    for kind in (Muon, timm.optim.Muon):
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
        optimizer = kind(parameters, lr=0.1, weight_decay=0.05, nesterov=True)
        with Dtypes() as dtypes:
            for values in gradients:
                for parameter, value in zip(parameters, values):
                    parameter.grad = value.clone()
                optimizer.step()
        results.append(([parameter.detach() for parameter in parameters], optimizer, dtypes.seen))
    (ours, optimizer, dtypes), (timms, other, dtypes_of_timm) = results
    assert dtypes == {torch.float32} and torch.bfloat16 in dtypes_of_timm
    for weight, mine, its in zip(weights, ours, timms):
        assert (mine - its).norm() < 0.01 * (its - weight).norm()
    assert torch.equal(ours[3], timms[3]) and not torch.equal(ours[0], timms[0])  # a vector's AdamW has no bfloat16
    other.load_state_dict(optimizer.state_dict())  # their states are the same


@pytest.mark.parametrize("name", timm.optim.list_optimizers("*muon"))
def test_every_muon_of_the_train_command_is_this_one(name):
    assert type(create_optimization(TrainSettings(opt=name), tiny_model(), 1)[0]) is Muon
