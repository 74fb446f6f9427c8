"""The ways to train: teachers, precisions, compiled models, other optimisers and schedules."""

import pytest
import timm
import torch

from helpers import TINY, assert_same
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import train
from raftmlp.errors import UserError
from raftmlp.processes import Processes
from raftmlp.train import TrainSettings
from raftmlp.train.learner import Learner, create_optimisation

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


@pytest.mark.parametrize("images, base, lr", [(8, 32, 5e-4), (32, 32, 1e-3), (128, 32, 2e-3), (8, None, 1e-3)])
def test_the_learning_rate_changes_with_the_root_of_the_images_of_an_update(images, base, lr):
    settings = TrainSettings(lr=1e-3, lr_base_size=base, global_batch_size=images, epochs=2, warmup_epochs=0)
    optimizer, scheduler = create_optimisation(settings, torch.nn.Linear(2, 2), 10)
    scheduler.step_update(0)
    assert all(group["lr"] == pytest.approx(lr) for group in optimizer.param_groups)


@pytest.mark.parametrize("sched", ["cosine", "tanh", "wsd", "constant"])
@pytest.mark.parametrize(
    "given", [dict(lr=1e-6), dict(lr=4e-6, lr_base_size=64, global_batch_size=4), dict(lr=1e-6, layer_decay=0.5)]
)
def test_no_learning_rate_is_above_the_peak(sched, given):
    settings = TrainSettings(epochs=4, sched=sched, **given)
    model = timm.create_model("raftmlp_digits", embed_dims=(8,) * 4, depths=(1,) * 4)
    optimizer, scheduler = create_optimisation(settings, model, 5)
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
        (dict(lr=1e-5, lr_base_size=64, global_batch_size=4, min_lr=1e-5), "--min-lr 1e-05"),
        (dict(min_lr=1e-5, sched="constant"), ""),  # there they have no effect
        (dict(warmup_lr=1, warmup_epochs=0), ""),
        (dict(min_lr=1e-6, warmup_lr=1e-6), ""),
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


@pytest.mark.parametrize("epochs, warmup", [(300, 5), (6, 5), (5, 1), (3, 1), (1, 0)])
def test_the_default_warm_up_fits(epochs, warmup):
    settings = TrainSettings(epochs=epochs).with_schedule()
    assert (settings.warmup_epochs, settings.min_lr) == (warmup, 1e-5) and settings.with_schedule() == settings


def test_the_scale_of_the_loss_scales_the_step_and_not_the_figure():
    settings = dict(opt="momentum", momentum=0.0, lr=0.1, sched="constant", warmup_epochs=0, epochs=1, weight_decay=0.0)
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    steps = []
    for scale in (1.0, 0.5):
        torch.manual_seed(0)
        model = timm.create_model("raftmlp_digits", embed_dims=(8,) * 4, depths=(1,) * 4)
        learner = Learner(TrainSettings(**settings), model, 1, Processes(torch.device("cpu")))
        before = model.head.weight.detach().clone()
        learner.start_at(0)
        loss = learner.update(iter([(images, target)]), 1, 1, scale)
        steps.append((loss, model.head.weight.detach() - before))
    assert steps[0][0] == steps[1][0] and steps[0][1].abs().max() > 0
    torch.testing.assert_close(steps[1][1], 0.5 * steps[0][1])


def test_an_optimiser_that_cannot_be_used_is_refused_from_python_too():
    with pytest.raises(UserError, match="adahessian cannot be used: it needs second-order gradients"):
        create_optimisation(TrainSettings(opt="adahessian", epochs=9), torch.nn.Linear(2, 2), 10)
