"""raftmlp benchmark: its tables and files, and its messages for bad input."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import ROOT
from raftmlp.cli import benchmark
from raftmlp.evaluate.speed import split_name
from raftmlp.model.create import ModelSettings, create_model

QUICK = ("-b", "2", "--rounds", "2", "--min-time", "0")


def test_rows_and_files(run_command, tmp_path):
    models, sizes = ["reference:raftmlp_digits", "raftmlp_digits"], ["32", "40x48"]
    options = ["--tasks", "inference", "training", "--sizes", *sizes, *QUICK, "--output", "made"]
    status, out, err = run_command(benchmark, *models, *options)
    assert status == 0, err
    content = json.loads(Path("made/results.json").read_text())
    rows = content["rows"]
    assert [(r["model"], r["task"], r["size"]) for r in rows] == [
        (model, task, size) for task in ("inference", "training") for size in sizes for model in models
    ]
    for row in rows:
        assert row["milliseconds"] > 0 and row["memory_mib"] > 0 and not row["failure"]
    table = [line.split() for line in out.splitlines() if line.startswith(("reference:", "raftmlp_"))]
    assert [(line[0], line[3]) for line in table] == [(row["model"], f"{row['milliseconds']:.1f}") for row in rows]
    assert [r["ratio"] for r in rows[::2]] == [1] * 4
    inference, training = rows[:4], rows[4:]
    for before, after in zip(inference, training):
        assert after["gmacs"] == pytest.approx(3 * before["gmacs"])
        assert after["memory_mib"] > 2 * before["memory_mib"]  # the activations are kept
    assert rows[2]["gmacs"] > 1.8 * rows[0]["gmacs"]  # 1.9 times the pixels
    assert (content["threads"], content["precision"], content["rounds"]) == (torch.get_num_threads(), "float32", 2)
    assert content["command"] == " ".join(["raftmlp benchmark", *models, *options])
    with open("made/results.csv") as file:
        written = list(csv.DictReader(file))
    assert [float(row["memory_mib"]) for row in written] == [row["memory_mib"] for row in rows]
    for name in ("speed.png", "sizes.png"):
        assert Image.open(f"made/{name}").width > 500


@pytest.mark.parametrize("load", [99.0, 0.0, None])
def test_a_busy_machine_is_noted(run_command, monkeypatch, load):
    if load is None:  # as on Windows
        monkeypatch.delattr(os, "getloadavg")
    else:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    options = ("raftmlp_digits", "--sizes", "32", "40", *QUICK, "--threads", "1", "--output", "made")
    status, _, err = run_command(benchmark, *options)
    assert status == 0, err
    content = json.loads(Path("made/results.json").read_text())
    with open("made/results.csv") as file:
        written = [row["other_load"] for row in csv.DictReader(file)]
    loads = [content["other_load"], *(row["other_load"] for row in content["rows"])]
    assert err.count("load") == (load == 99)
    if load == 99:
        assert all(value > 50 for value in loads) and written == list(map(str, loads[1:]))
    else:
        assert loads == [load] * 3


def test_a_file_is_no_model_and_its_model_is_named(run_command, tmp_path):
    arguments = dict(embed_dims=[8, 8, 8, 8], depths=[1, 1, 1, 1], patch_kernels=[[4], [2], [2], [2]])
    model = create_model(ModelSettings(model="raftmlp_digits", model_kwargs=arguments))
    Path("run").mkdir()
    content = dict(arch="raftmlp_digits", model_kwargs=arguments, state_dict=model.state_dict())
    torch.save({**content, "pretrained_cfg": dict(input_size=(3, 32, 32))}, "run/model_best.pth.tar")
    for path in ("run/model_best.pth.tar", "run"):
        status, _, err = run_command(benchmark, path)
        assert status == 2 and err.count("\n") == 1 and f"{path} holds weights" in err
        name, *options = shlex.split(err.split("name its model: ")[1].split(" (--help")[0])
        assert split_name(name) == ("raftmlp_digits", arguments) and options == ["--sizes", "32"]
    status, _, err = run_command(benchmark, name, *options, *QUICK)
    assert status == 0, err
    Path("photo.jpg").touch()
    status, _, err = run_command(benchmark, "photo.jpg")
    assert status == 2 and "photo.jpg holds weights" in err and "resnet18" in err


def test_what_cannot_run_is_named_and_the_others_go_on(run_command):
    status, out, _ = run_command(benchmark, "raftmlp_digits", "vit_tiny_patch16_224", "--sizes", "8", *QUICK)
    assert status == 0
    (line,) = (line for line in out.splitlines() if line.startswith("vit_tiny"))
    assert "did not run: " in line
    status, out, err = run_command(benchmark, "vit_tiny_patch16_224", "--sizes", "8", *QUICK, "--output", "made")
    assert status == 2 and "none of the models ran" in err and "did not run" in out
    (row,) = json.loads(Path("made/results.json").read_text())["rows"]
    assert row["failure"] and row["milliseconds"] is None


def test_the_script_needs_no_tests_and_no_einops(tmp_path):
    (tmp_path / "einops.py").write_text("raise ImportError")
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); "
        f"sys.argv = ['benchmark.py', 'reference:raftmlp_digits', '--sizes', '32', *{QUICK!r}]; "
        f"runpy.run_path({str(ROOT / 'tools' / 'benchmark.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if "load" not in line]  # the machine may be busy
    assert (done.returncode, lines) == (0, [])
    assert "reference:raftmlp_digits" in done.stdout


def test_help_shows_every_option(run_command):
    status, out, _ = run_command(benchmark, "--help")
    assert status == 0
    for action in benchmark.build_parser()._actions:
        assert action.help and (not action.option_strings or action.option_strings[-1] in out)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["raftmlp_x"], "unknown model 'raftmlp_x'; did you mean raftmlp_s"),
        (["reference:resnet18"], "unknown model 'resnet18'; did you mean raftmlp"),
        (["raftmlp_s", "--sizes", "axb"], "'axb' must be a number of pixels or HEIGHTxWIDTH"),
        (["raftmlp_s", "--modes", "fast"], "invalid choice: 'fast'"),
        (["raftmlp_s", "--rounds", "0"], "must be a whole number of 1 or more, not '0'"),
        (["raftmlp_s", "--device", "tpu"], "no device 'tpu' here"),
    ],
)
def test_bad_input(run_command, args, words):
    status, _, err = run_command(benchmark, *args)
    assert status == 2
    assert words in err and "Traceback" not in err and err.count("\n") == 1
