"""make gpu: its rehearsal on a CPU, and what it says where it cannot measure."""

import json
import subprocess
import sys

import pytest
import torch

from helpers import ROOT, load_script

measure_gpu = load_script("measure_gpu")


def test_the_rehearsal():
    command = ["make", "gpu", "DEVICE=cpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests: 1 passed, 1 skipped" in done.stdout and "images/s in the best mode" in done.stdout
    summary = json.loads((ROOT / "runs/gpu-rehearsal/summary.json").read_text())
    rows = [(row["benchmark"], row["model"]) for row in summary["rows"]]
    assert rows == [(b, m) for b in ("inference", "training") for m in ("reference:raftmlp_digits", "raftmlp_digits")]
    assert all(row["images_per_second"] > 0 for row in summary["rows"])


def test_what_fails_is_named_and_the_rest_is_measured(tmp_path, monkeypatch, capfd):
    tiny = ["--tasks", "inference", "--sizes", "32", "-b", "1", "--rounds", "1", "--min-time", "0"]
    measured = [measure_gpu.Benchmark(name, [name], ["eager"], tiny) for name in ("no_such_model", "raftmlp_digits")]
    monkeypatch.setattr(measure_gpu, "benchmarks", lambda device: measured)
    monkeypatch.setattr(measure_gpu, "BENCHMARKS", ("no_such_model", "raftmlp_digits"))
    monkeypatch.setattr(measure_gpu, "REHEARSED", ["tests/no_such_test.py"])
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        measure_gpu.run(measure_gpu.main)
    assert end.value.code == 1
    assert "failed: tests, the benchmark no_such_model (status 2)" in capfd.readouterr().out
    assert [row["model"] for row in json.loads((tmp_path / "summary.json").read_text())["rows"]] == ["raftmlp_digits"]


def test_what_is_measured_on_gpus_old_and_new(monkeypatch, capsys):
    monkeypatch.setattr(measure_gpu, "PEERS", ["resnet18", "resnet_of_tomorrow"])
    for capability, precision in (((9, 0), "bfloat16"), ((7, 5), "float16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        measured = measure_gpu.benchmarks(torch.device("cuda"))
        assert [b.name for b in measured] == list(measure_gpu.BENCHMARKS)
        assert all(precision in b.options for b in measured)
        assert measured[0].models[-2:] == ["raftmlp_l", "resnet18"]
    out = capsys.readouterr().out
    assert "does not have resnet_of_tomorrow: left out" in out and out.count("bfloat16 is left out") == 1


def test_a_test_that_hangs_is_ended():
    hanging = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    quick = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    assert measure_gpu.finish([quick], 60)
    assert not measure_gpu.finish([hanging, quick], 0.3)
    assert hanging.returncode == -9


def test_failures_and_the_test_that_hung_are_named(tmp_path, capsys):
    (tmp_path / "tests.txt").write_text(
        "tests/test_gpu.py::test_a[cuda] FAILED [ 10%]\n"
        '  File "/x/tests/test_gpu.py", line 9 in test_b\n  File "/x/python.py", line 1 in run\n'
    )
    outcome = measure_gpu.outcome_of_tests(tmp_path / "tests.txt", False)
    assert outcome.endswith("ended, in test_b")
    assert capsys.readouterr().out == "failed: tests/test_gpu.py::test_a[cuda]\n"


@pytest.mark.parametrize(
    ("options", "version", "words"),
    [
        ([], "1.0.31", "no CUDA GPU here"),
        (["--device", "cpu", "--models", "resnet18"], "1.0.31", "none of them is measured"),
        (
            ["--device", "cpu", "--models", "raftmlp_digits", "raftmlp_x"],
            "1.0.31",
            "--models raftmlp_x: none of them is measured there; take of raftmlp_digits",
        ),
        (["--device", "cpu", "--benchmarks", "sizes"], "1.0.31", "--benchmarks sizes: not measured on cpu"),
        (["--processes", "0"], "1.0.31", "must be a whole number of 1 or more"),
        ([], "1.0.29", "need timm 1.0.31 or newer, this is 1.0.29"),
    ],
)
def test_bad_input(options, version, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure_gpu.timm, "__version__", version)
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py", *options])
    with pytest.raises(SystemExit) as end:
        measure_gpu.run(measure_gpu.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and words in err and "Traceback" not in err
