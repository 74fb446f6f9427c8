"""make gpu: its rehearsal on a CPU, and what it says where it cannot measure."""

import json
import sys

import pytest
import torch

from helpers import load_script

measure_gpu = load_script("measure_gpu")


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Run the script; returns its exit status."""

    def measure(*options):
        monkeypatch.setattr(sys, "argv", ["measure_gpu.py", "--output", str(tmp_path), *options])
        with pytest.raises(SystemExit) as end:
            measure_gpu.run(measure_gpu.main)
        return end.value.code

    return measure


def test_a_rehearsal_names_what_fails_and_measures_the_rest(measure, tmp_path, monkeypatch, capfd):
    real = measure_gpu.benchmarks

    def benchmarks(device):
        (models, options), *_ = real(device).values()
        return {"inference": (models, options), "training": (["no_such_model"], options)}

    monkeypatch.setattr(measure_gpu, "benchmarks", benchmarks)
    assert measure("--device", "cpu") == 1
    out = capfd.readouterr().out
    assert "failed: the benchmark training (status 2)" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tests"].startswith("1 passed")
    assert [row["model"] for row in summary["rows"]] == ["reference:raftmlp_digits", "raftmlp_digits"]
    assert all(row["images_per_second"] > 0 for row in summary["rows"])


def test_what_is_measured_on_gpus_old_and_new(monkeypatch):
    monkeypatch.setattr(measure_gpu, "PEERS", ["resnet18", "resnet_of_tomorrow"])
    device = torch.device("cuda")
    for capability, precision in (((9, 0), "bfloat16"), ((7, 5), "float16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        measured = measure_gpu.benchmarks(device)
        assert tuple(measured) == measure_gpu.BENCHMARKS
        assert all(precision in options for _, options in measured.values())
        assert measured["inference"][0][-2:] == ["raftmlp_l", "resnet18"]
        assert len(measure_gpu.compilations(measured, device)) == 5 + 2


def test_a_test_that_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(measure_gpu, "TIME_LIMIT", 0.5)
    assert not measure_gpu.run_tests(tmp_path / "tests.txt", ["--version"] * 2)
    assert "ended" in (tmp_path / "tests.txt").read_text()
    measure_gpu.run_quietly([sys.executable, "-c", "import time; time.sleep(60)"])


def test_bad_input(measure, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure() == 2 and "no CUDA GPU here" in capsys.readouterr().err
    assert measure("--device", "cpu", "--models", "resnet18") == 2
    assert measure("--device", "cpu", "--benchmarks", "sizes") == 2
