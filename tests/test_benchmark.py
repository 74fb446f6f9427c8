"""raftmlp benchmark: work, memory, turns and what is made of the times; its tables, files and messages."""

import csv
import json
import math
import os
from itertools import cycle
from pathlib import Path

import pytest
import torch
from PIL import Image

from raftmlp.cli import benchmark
from raftmlp.config import SpeedSettings
from raftmlp.errors import UserError
from raftmlp.evaluate import speed
from raftmlp.evaluate.speed import MachineLoad, Meter, measure, split_name

CPU = torch.device("cpu")
NAMES = ["reference:raftmlp_digits", "raftmlp_digits"]
QUICK = SpeedSettings(batch_size=2, rounds=3, min_time=0)
OPTIONS = ("-b", "2", "--rounds", "1", "--min-time", "0")


def meter(name, task="inference", size=(32, 32), **settings):
    return Meter(name, "eager", task, size, SpeedSettings(**settings), CPU)


def test_arguments_of_a_model():
    assert split_name("reference:a") == ("a", {}) and split_name("a.b,x=gelu") == ("a.b", dict(x="gelu"))
    assert split_name("a,x=[1,(2,3)],y=True,z='1'") == ("a", dict(x=[1, (2, 3)], y=True, z="1"))
    for text in ("a,b", "a,x=", "a,x=1),f(y=2", "a,**x"):
        with pytest.raises(UserError):
            split_name(text)


# Work and memory


def test_multiplications_are_those_of_the_table():
    """The table of variants in docs/choosing.md: the release's arithmetic."""
    reference = meter("reference:raftmlp_s", size=(224, 224), batch_size=1)
    macs, traffic = reference.work()
    assert macs / 1e9 == pytest.approx(2.087, abs=0.0005)
    assert reference.parameters == 9868768
    assert traffic > 4 * 0.9 * reference.parameters  # the products read nearly all weights, and more


def test_multiplications_of_a_linear_layer():
    """Its 2 * 3 * 5 multiplications read and write 2 * 3 + 3 * 5 + 5 + 2 * 5 numbers of 4 bytes."""
    for task, passes in (("inference", 1), ("training", 3)):
        counted = meter("raftmlp_digits", task)
        counted.plain, counted.images = torch.nn.Linear(3, 5), torch.randn(2, 3)
        assert counted.work() == (passes * 30, passes * 4 * (6 + 15 + 5 + 10))


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


def test_precision():
    made, outputs = meter("raftmlp_digits", precision="amp_bfloat16", batch_size=1), []
    made.plain.head.register_forward_hook(lambda _, __, output: outputs.append(output.dtype))
    made()
    assert (made.images.dtype, outputs) == (torch.float32, [torch.bfloat16])


# Load


@pytest.mark.parametrize(("others", "threads", "warns"), [(0.0, 2, 0), (1.0, 2, 1), (1.0, 1, 0)])
def test_the_load_of_others_is_without_our_own(monkeypatch, others, threads, warns):
    """An average that two threads of this process bring about in a minute is nobody else's."""
    clock, used, warnings = iter([0.0, 60.0]), iter([0.0, 120.0]), []
    monkeypatch.setattr(speed._logger, "warning", warnings.append)
    monkeypatch.setattr(speed, "processor_count", lambda: 2)
    monkeypatch.setattr(speed.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(speed.os, "times", lambda: [next(used), 0, 0, 0, 0])
    monkeypatch.setattr(speed.os, "getloadavg", lambda: (2 * (1 - math.exp(-1)) + others, 0, 0))
    assert MachineLoad(threads).read() == others
    assert len(warnings) == warns


# Times


def test_results_are_made_of_the_times_of_the_rounds(monkeypatch):
    """Two models take turns in three rounds, with times that are given here."""
    given = [2.0, 1.0, 4.0, 2.5, 3.0, 1.0]  # reference, model, reference, model, ...
    times, turns = cycle(given), []

    def clock(run, *iterations):
        turns.extend([run] * len(iterations))
        return next(times) if iterations else 1.0

    monkeypatch.setattr(speed, "clock", clock)
    monkeypatch.setattr(speed, "device_pace", lambda *_: (1e9, 1e10))
    first, second = measure(NAMES, ["eager"], "inference", (32, 32), QUICK, CPU)
    assert [run.plain is turns[0].plain for run in turns] == [True, False] * 3
    assert (first.milliseconds, second.milliseconds) == (3000, 1000)  # medians
    assert (first.images_per_second, second.images_per_second) == (pytest.approx(2 / 3), 2)
    assert (first.spread, second.spread) == (pytest.approx(1 / 3), 0.75)  # quartiles 2.5 and 3.5; 1 and 1.75
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert (second.ratio, second.ratio_low, second.ratio_high) == (2, 1.6, 3)
    assert second.arithmetic_share == pytest.approx(second.gmacs * 2)  # of 2 images, at 1e9 a second, in one second
    assert 0 < second.traffic_share < second.arithmetic_share


def test_every_mode_of_every_model_is_a_row(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: compiled.append(mode) or model)
    models, modes = ["no_such_model", "raftmlp_digits,in_chans=1"], ["eager", "compile"]
    results = measure(models, modes, "inference", (32, 32), QUICK, CPU)
    assert [(r.model, r.mode) for r in results] == [(name, mode) for name in models for mode in modes]
    assert [bool(r.failure) for r in results] == [True, True, False, False] and compiled == ["default"]
    assert math.isnan(results[2].ratio)  # the first did not run


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


# The command


def test_rows_and_files(run_command, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    options = ["--tasks", "inference", "training", "--sizes", "32", "40x48", *OPTIONS, "--output", "made"]
    status, out, err = run_command(benchmark, *NAMES, *options)
    assert status == 0, err
    content = json.loads(Path("made/results.json").read_text())
    rows = content["rows"]
    assert [(r["model"], r["task"], r["size"]) for r in rows] == [
        (model, task, size) for task in ("inference", "training") for size in ("32", "40x48") for model in NAMES
    ]
    for row in rows:
        assert row["milliseconds"] > 0 and row["memory_mib"] > 0 and not row["failure"]
    table = [line.split() for line in out.splitlines() if line.startswith(("reference:", "raftmlp_"))]
    assert [(line[0], line[3]) for line in table] == [(row["model"], f"{row['milliseconds']:.1f}") for row in rows]
    assert [r["ratio"] for r in rows[::2]] == [1] * 4
    assert rows[4]["gmacs"] == pytest.approx(3 * rows[0]["gmacs"]) and rows[2]["gmacs"] > 1.8 * rows[0]["gmacs"]
    assert (content["threads"], content["precision"], content["rounds"]) == (torch.get_num_threads(), "float32", 1)
    assert content["command"] == " ".join(["raftmlp benchmark", *NAMES, *options])
    with open("made/results.csv") as file:
        written = list(csv.DictReader(file))
    assert [float(row["memory_mib"]) for row in written] == [row["memory_mib"] for row in rows]
    assert all(Image.open(f"made/{name}.png").width > 500 for name in ("speed", "sizes"))
    loads = [content["other_load"], *(row["other_load"] for row in rows)]
    assert err.count("load") == 1 and all(value > 50 for value in loads)


def test_what_cannot_run_is_named_and_the_others_go_on(run_command, monkeypatch):
    monkeypatch.delattr(os, "getloadavg")  # as on Windows
    status, out, _ = run_command(benchmark, "raftmlp_digits", "vit_tiny_patch16_224", "--sizes", "8", *OPTIONS)
    (line,) = (line for line in out.splitlines() if line.startswith("vit_tiny"))
    assert status == 0 and "did not run: " in line
    options = ["vit_tiny_patch16_224", "--sizes", "8", *OPTIONS, "--output", "made"]
    status, out, err = run_command(benchmark, *options)
    assert status == 2 and "none of the models ran" in err and "did not run" in out
    (row,) = json.loads(Path("made/results.json").read_text())["rows"]
    assert row["failure"] and row["milliseconds"] is row["other_load"] is None


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["raftmlp_x"], "did you mean raftmlp_s"),
        (["reference:resnet18"], "did you mean raftmlp"),
        (["run/model_best.pth.tar"], "run/model_best.pth.tar"),
        (["raftmlp_s", "--sizes", "axb"], "'axb'"),
        (["raftmlp_s", "--device", "tpu"], "'tpu'"),
    ],
)
def test_bad_input(run_command, args, named):
    status, _, err = run_command(benchmark, *args)
    assert status == 2 and named in err and err.count("\n") == 1
