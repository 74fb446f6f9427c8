"""The measuring of speed: work, memory, turns and what is made of the times."""

import io
import math
from itertools import cycle

import pytest
import timm
import torch
from tqdm import tqdm

from raftmlp.evaluate import speed
from raftmlp.evaluate.speed import MachineLoad, Meter, SpeedSettings, clock, iterations_in, measure

CPU = torch.device("cpu")
NAMES = ["reference:raftmlp_digits", "raftmlp_digits"]
QUICK = SpeedSettings(batch_size=2, rounds=3, min_time=0)


def meter(name, task="inference", size=(32, 32), **settings):
    return Meter(name, "eager", task, size, SpeedSettings(**settings), CPU)


@pytest.mark.parametrize(
    "name, gmacs, parameters",  # the table of variants in docs/choosing.md: the release's arithmetic
    [("raftmlp_s", 2.087, 9868768), ("raftmlp_m_ss", 3.747, 19920640), ("raftmlp_digits", 0.005, 756454)],
)
def test_multiplications_are_those_of_the_table(name, gmacs, parameters):
    size = (32, 32) if name == "raftmlp_digits" else (224, 224)
    reference = meter(f"reference:{name}", size=size, batch_size=1)
    macs, traffic = reference.work()
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.0005)
    assert reference.parameters == parameters
    assert traffic > 4 * 0.9 * parameters  # the products read nearly all weights, and more


def test_multiplications_grow_with_the_batch_and_in_training():
    macs, traffic = meter("raftmlp_digits", batch_size=1).work()
    assert meter("raftmlp_digits", batch_size=4).work()[0] == 4 * macs
    assert meter("raftmlp_digits", "training", batch_size=1).work() == (3 * macs, 3 * traffic)


def test_multiplications_of_a_linear_layer():
    """Its 2 * 3 * 5 multiplications read and write 2 * 3 + 3 * 5 + 5 + 2 * 5 numbers of 4 bytes."""
    counted = meter("raftmlp_digits")
    counted.plain, counted.images = torch.nn.Linear(3, 5), torch.randn(2, 3)
    assert counted.work() == (30, 4 * (6 + 15 + 5 + 10))


def test_memory():
    """A linear layer's peak is its result; training keeps the activations, those of the reference are more."""
    single = meter("raftmlp_digits")
    single.model, single.images = torch.nn.Linear(256, 4096), torch.randn(64, 256)
    assert single.memory() == pytest.approx(4 * 64 * 4096, rel=0.05)
    inference = meter("raftmlp_digits", batch_size=32).memory()
    training, reference = (meter(name, "training", (64, 64), batch_size=32).memory() for name in NAMES[::-1])
    assert training > 3 * inference
    assert training < reference


def test_training_takes_gradients_and_drops_them():
    trained, seen = meter("raftmlp_digits", "training", batch_size=2), []
    for parameter in trained.plain.parameters():
        parameter.register_hook(lambda gradient: seen.append(bool(gradient.isfinite().all())))
    trained()
    assert len(seen) == len(list(trained.plain.parameters())) and all(seen)
    assert all(parameter.grad is None for parameter in trained.plain.parameters())


@pytest.mark.parametrize(
    "precision, weights, logits",
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("amp_bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_precision(precision, weights, logits):
    made = meter("raftmlp_digits", precision=precision, batch_size=1)
    outputs = []
    made.plain.head.register_forward_hook(lambda _, __, output: outputs.append(output.dtype))
    made()
    assert next(made.plain.parameters()).dtype == made.images.dtype == weights
    assert outputs == [logits]


def test_the_reference_computes_the_same():
    reference, model = (meter(name, batch_size=2, size=(40, 48)) for name in NAMES)
    with torch.inference_mode():
        expected = reference.plain(reference.images)
        torch.testing.assert_close(model.plain(model.images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["raftmlp_digits,in_chans=1", "resnet18,in_chans=1"])
def test_models_of_other_channels_get_images_of_theirs(name):
    made = meter(name, batch_size=2)
    made()
    assert made.images.shape == (2, 1, 32, 32)


def test_models_of_a_fixed_size_are_built_for_theirs():
    assert timm.models.get_pretrained_cfg_value("test_vit", "fixed_input_size")
    made = meter("test_vit", size=(96, 64), batch_size=1)
    made()
    assert made.plain.patch_embed.img_size == (96, 64)


# Load


def test_the_load_of_others_is_without_our_own(monkeypatch):
    """An average that two threads of this process bring about in a minute is nobody else's."""
    clock, used = iter([0.0, 60.0, 120.0]), iter([0.0, 120.0, 240.0])
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(speed, "_processor_seconds", lambda: next(used))
    monkeypatch.setattr(speed.os, "getloadavg", lambda: (2 * (1 - math.exp(-minutes)) + others, 0, 0))
    load, others, minutes = MachineLoad(2), 0.0, 1
    assert load.read() == 0
    others, minutes = 1.5, 2
    assert load.read() == 1.5


@pytest.mark.parametrize(
    ("others", "threads", "cores", "warns"), [(0.3, 2, 2, 0), (1, 2, 2, 1), (1, 1, 2, 0), (3, 1, 2, 1)]
)
def test_a_warning_counts_our_own_threads(monkeypatch, others, threads, cores, warns):
    warnings = []
    monkeypatch.setattr(speed._logger, "warning", warnings.append)
    monkeypatch.setattr(speed, "_processor_seconds", lambda: 0.0)
    monkeypatch.setattr(speed, "processor_count", lambda: cores)
    monkeypatch.setattr(speed.os, "getloadavg", lambda: (others, 0, 0))
    load = MachineLoad(threads)
    assert load.read() == load.read() == others
    assert len(warnings) == warns


# Times


def test_clock_and_iterations(monkeypatch):
    ticks = iter([10.0, 16.0, 20.0, 20.5, 0.0, 9.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert clock(lambda: calls.append(1), 3, CPU) == 2.0
    assert iterations_in(4.0, lambda: calls.append(1), CPU) == 8
    assert iterations_in(4.0, lambda: calls.append(1), CPU) == 1
    assert len(calls) == 5


def test_results_are_made_of_the_times_of_the_rounds(monkeypatch):
    """Two models take turns in three rounds, with times that are given here."""
    given = [2.0, 1.0, 4.0, 2.5, 3.0, 1.0]  # reference, model, reference, model, ...
    times, turns = cycle(given), []

    def clock(run, iterations, device):
        turns.append(run)
        return next(times)

    monkeypatch.setattr(speed, "clock", clock)
    monkeypatch.setattr(speed, "iterations_in", lambda *_: 1)
    monkeypatch.setattr(speed.DevicePace, "measure", lambda self: (1e9, 1e10))
    first, second = measure(NAMES, ["eager"], "inference", (32, 32), QUICK, CPU)
    assert [run.plain is turns[0].plain for run in turns] == [True, False] * 3
    assert (first.milliseconds, second.milliseconds) == (3000, 1000)  # medians
    assert (first.images_per_second, second.images_per_second) == (pytest.approx(2 / 3), 2)
    assert (first.spread, second.spread) == (pytest.approx(1 / 3), 0.75)  # quartiles 2.5 and 3.5; 1 and 1.75
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert (second.ratio, second.ratio_low, second.ratio_high) == (2, 1.6, 3)
    assert second.arithmetic_share == pytest.approx(second.gmacs * 2)  # of 2 images, at 1e9 a second, in one second
    assert 0 < second.traffic_share < second.arithmetic_share
    assert (second.model, second.mode, second.task, second.size, second.batch_size) == (
        "raftmlp_digits", "eager", "inference", "32", 2
    )  # fmt: skip


def test_failures_are_named_and_the_others_go_on():
    failed, ran = measure(["vit_tiny_patch16_224", "raftmlp_digits"], ["eager"], "inference", (8, 8), QUICK, CPU)
    assert failed.failure and failed.milliseconds != failed.milliseconds  # NaN
    assert not ran.failure and ran.milliseconds > 0
    assert ran.ratio != ran.ratio  # the first did not run
    (failed,) = measure(["vit_tiny_patch16_224"], ["eager"], "inference", (8, 8), QUICK, CPU)
    assert failed.failure


def test_every_mode_of_every_model_is_a_row(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: compiled.append(mode) or model)
    compiled = []
    results = measure(NAMES, ["eager", "compile"], "inference", (32, 32), QUICK, CPU)
    assert [(r.model, r.mode) for r in results] == [(name, mode) for name in NAMES for mode in ("eager", "compile")]
    assert compiled == ["default"] * 2


def test_a_batch_too_large_for_the_memory_is_halved(monkeypatch):
    real = Meter.__call__

    def call(meter):
        if len(meter.images) > 2:
            raise torch.OutOfMemoryError("no memory")
        return real(meter)

    monkeypatch.setattr(Meter, "__call__", call)
    settings = SpeedSettings(batch_size=8, rounds=1, min_time=0)
    (result,) = measure(["raftmlp_digits"], ["eager"], "inference", (32, 32), settings, CPU)
    assert (result.batch_size, result.ratio, result.failure) == (2, 1, "")
    assert result.images_per_second == pytest.approx(2000 / result.milliseconds)
    monkeypatch.setattr(Meter, "__call__", lambda meter: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    (result,) = measure(["raftmlp_digits"], ["eager"], "inference", (32, 32), settings, CPU)
    assert result.failure == "no memory"


def test_the_bar_ends_with_all_that_was_to_be_done(monkeypatch):
    terminal, bars = io.StringIO(), []
    terminal.isatty = lambda: True

    def make_bar(**options):
        bars.append(tqdm(file=terminal, ncols=80, mininterval=0, **options))
        return bars[-1]

    monkeypatch.setattr(speed, "tqdm", make_bar)
    measure([*NAMES, "no_such_model"], ["eager"], "inference", (32, 32), QUICK, CPU)
    assert bars[0].n == bars[0].total == 3 + 2 * QUICK.rounds
    shown = terminal.getvalue().split("\r")
    assert "raftmlp_digits" in shown[-3] and not any("?" in line.replace("? left", "") for line in shown)
