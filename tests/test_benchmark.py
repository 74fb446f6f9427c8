"""tools/benchmark.py: every row it promises, failures in words."""

import csv
import json

import benchmark
import pytest
import torch


def test_rows_ratios_and_files(run_tool, tmp_path):
    status, out, _ = run_tool(
        benchmark,
        "reference:raftmlp_digits",
        "raftmlp_digits",
        *("--tasks", "inference", "training", "--sizes", "32", "40x48", "-b", "2", "--rounds", "3", "--min-time", "0"),
        *("--output", "made"),
    )
    assert status == 0
    content = json.loads((tmp_path / "made" / "results.json").read_text())
    rows = content["rows"]
    assert [(r["model"], r["task"], r["size"]) for r in rows] == [
        (model, task, size)
        for task in ("inference", "training")
        for size in ("32", "40x48")
        for model in ("reference:raftmlp_digits", "raftmlp_digits")
    ]
    for row in rows:
        assert row["milliseconds"] > 0 and row["memory_mib"] > 0 and not row["failure"]
        assert row["images_per_second"] == pytest.approx(2000 / row["milliseconds"])
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert all(r["ratio"] == 1 for r in rows[::2])
    assert content["threads"] == torch.get_num_threads()
    # the reference's multiplications are those of the table of variants
    assert rows[0]["gmacs"] == pytest.approx(0.0048, abs=0.0008)
    assert rows[4]["gmacs"] == pytest.approx(3 * rows[0]["gmacs"])
    with open(tmp_path / "made" / "results.csv") as file:
        assert [row["model"] for row in csv.DictReader(file)] == [row["model"] for row in rows]
    assert {"speed.png", "sizes.png"} <= {path.name for path in (tmp_path / "made").iterdir()}
    assert "inference at 40x48" in out


def test_training_keeps_less_than_the_reference():
    args = benchmark.build_parser().parse_args(["raftmlp_digits", "-b", "32"])
    memory = [
        benchmark.Meter(name, "eager", "training", (64, 64), args, torch.device("cpu")).memory()
        for name in ("raftmlp_digits", "reference:raftmlp_digits")
    ]
    assert memory[0] < 0.6 * memory[1]


def test_what_cannot_run_is_named_and_the_others_go_on(run_tool):
    status, out, _ = run_tool(
        benchmark,
        *("raftmlp_digits", "vit_tiny_patch16_224", "--sizes", "8", "-b", "1"),
        *("--rounds", "1", "--min-time", "0"),
    )
    assert status == 0
    assert "did not run" in out


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
def test_bad_input(run_tool, args, words):
    status, _, err = run_tool(benchmark, *args)
    assert status == 2
    assert words in err and "Traceback" not in err and err.count("\n") == 1
