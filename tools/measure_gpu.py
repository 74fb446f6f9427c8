#!/usr/bin/env python
"""Test and measure on a GPU what a CPU cannot show, in some minutes: `make gpu`.

    make gpu PYTHON=python3                  # with the packages of that Python; no network
    python tools/measure_gpu.py --device cpu # a rehearsal on a CPU, at a tiny setting

First the tests that a GPU can fail, beside them, in several processes, the compilations that the benchmarks need, then
the benchmarks, alone on the machine: inference of all models, large images, training of all models, and of two that
are compiled, and what torch.compile autotunes.
The folder has the tests' output (tests.txt), a folder for every benchmark as `raftmlp benchmark` writes it, and
summary.json with all rows. Where tests or a benchmark fail the rest is still measured, and the exit status is 1.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import timm
import torch

from raftmlp.cli.console import run, say
from raftmlp.cli.options import Parser, option_type, output_folder
from raftmlp.device import find_device
from raftmlp.errors import UserError
from raftmlp.files import write_json
from raftmlp.settings import Count

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["tests/test_gpu.py", "tests/test_fused.py", "-k", "not cpu"]
REHEARSED = ["tests/test_gpu.py", "-k", "channels_last"]
PEERS = [
    "resnet18", "resnet34", "resnet50", "convnext_nano", "mixer_s16_224", "resmlp_12_224", "deit_small_patch16_224",
    "poolformer_s12", "fasternet_t2",
]  # fmt: skip
OURS = ["reference:raftmlp_s", "raftmlp_s", "raftmlp_m", "raftmlp_l"]
TIME_LIMIT = 240  # seconds for the tests and what is compiled beforehand
BENCHMARKS = ("inference", "sizes", "training", "compiled", "autotuned")


@dataclass
class Benchmark:
    """A call of `raftmlp benchmark`: its name, which its folder has, models, modes and other options."""

    name: str
    models: list[str]
    modes: list[str]
    options: list[str] = field(default_factory=list)

    def command(self) -> list[str]:
        """Return the command."""
        return [sys.executable, "-m", "raftmlp", "benchmark", *self.models, "--modes", *self.modes, *self.options]


def benchmarks(device: torch.device) -> list[Benchmark]:
    """Return what is measured: on a CPU a rehearsal."""
    if device.type == "cpu":
        models = ["reference:raftmlp_digits", "raftmlp_digits"]
        tiny = ["--sizes", "32", "-b", "2", "--rounds", "1", "--min-time", "0"]
        return [
            Benchmark("inference", models, ["eager"], ["--tasks", "inference", *tiny]),
            Benchmark("training", models, ["eager"], ["--tasks", "training", *tiny]),
        ]
    precision = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if precision == "float16":
        say("this GPU is older than bfloat16: float16 is measured, bfloat16 is left out")
    known = [name for name in PEERS if timm.is_model(name)]
    if left_out := [name for name in PEERS if name not in known]:
        say(f"timm {timm.__version__} does not have {', '.join(left_out)}: left out")
    common = ["--precision", precision, "--channels-last", "--rounds", "5", "--min-time", "0.15"]
    batch = ["-b", "256", *common]
    large = ["--sizes", "800x1333", "1792", "-b", "8", *common]
    two, autotuned = ["raftmlp_s", "resnet34"], ["--tasks", "inference", "--compile-mode", "max-autotune", *batch]
    return [
        Benchmark("inference", OURS + known, ["eager", "compile"], ["--tasks", "inference", *batch]),
        Benchmark("sizes", OURS[:2], ["eager"], ["--tasks", "inference", *large]),
        Benchmark("training", OURS + known, ["eager"], ["--tasks", "training", *batch]),
        Benchmark("compiled", two, ["compile"], ["--tasks", "training", *batch]),
        Benchmark("autotuned", two, ["compile"], autotuned),
    ]


def start_compilations(measured: list[Benchmark], device: torch.device, processes: int) -> list[subprocess.Popen]:
    """Start what the benchmarks compile, in so many processes: torch keeps it on the disk.

    What is autotuned is not: it is timed while it is compiled.
    """
    quick = ["--device", str(device), "--rounds", "1", "--min-time", "0"]
    shares = [[] for _ in range(processes)]
    compiled = [(b, model) for b in measured if "compile" in b.modes and b.name != "autotuned" for model in b.models]
    for i, (b, model) in enumerate(compiled):
        alone = Benchmark(b.name, [model], ["compile"], [*b.options, *quick])
        shares[i % processes].append(alone.command())
    script = "import json, subprocess, sys\nfor command in json.loads(sys.argv[1]): subprocess.run(command)"
    quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    return [subprocess.Popen([sys.executable, "-c", script, json.dumps(share)], **quiet) for share in shares if share]


def start_tests(path: Path, options: list[str]) -> subprocess.Popen:
    """Start the tests, whose output goes to a file; it tells where a test is that takes more than a minute."""
    workers = ["-n", "4"] if find_spec("xdist") and options == TESTS else []
    shown = ["-vv", "--tb", "short", "-o", "faulthandler_timeout=60"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *shown, *workers, *options]
    with open(path, "w") as out:
        kwargs = dict(cwd=ROOT, stdout=out, stderr=out, env=dict(os.environ, OMP_NUM_THREADS="2"))
        return subprocess.Popen(command, **kwargs, start_new_session=True)


def finish(processes: list[subprocess.Popen], seconds: float = TIME_LIMIT) -> bool:
    """Wait for processes; end those that are left after so many seconds, with theirs. Return whether none was."""
    end, left = time.monotonic() + seconds, list(processes)
    try:
        while left and time.monotonic() < end:
            left = [process for process in left if process.poll() is None]
            time.sleep(0.1)
        return not left
    finally:  # after Ctrl-C too
        for process in left:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def outcome_of_tests(path: Path, in_time: bool) -> str:
    """Say which tests failed, and return the outcome in a line."""
    lines = path.read_text().splitlines() or ["no output"]
    for name in dict.fromkeys(re.findall(r"(?:FAILED|ERROR) (\S+)|(\S+) (?:FAILED|ERROR)", "\n".join(lines))):
        say(f"failed: {''.join(name)}")
    if in_time:
        return lines[-1].strip("= ")
    running = re.findall(r'File ".*", line \d+ in (test_\w+)', "\n".join(lines))
    where = f", in {', '.join(dict.fromkeys(running))}" if running else ""
    return f"not done after {TIME_LIMIT} s, ended{where}"


def read_rows(folder: Path, name: str) -> list[dict]:
    """Return the rows of a benchmark: none where it has failed."""
    path = folder / name / "results.json"
    return [dict(row, benchmark=name) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def say_speeds(rows: list[dict]) -> None:
    """Say the images/s of every model in its best mode, at the first size, and what they mean for ImageNet."""
    best = {}
    for row in rows:
        if row["size"] == rows[0]["size"] and row["images_per_second"]:
            speeds = best.setdefault(row["task"], {})
            speeds[row["model"]] = max(row["images_per_second"], speeds.get(row["model"], 0))
    for task, speeds in best.items():
        say(f"{task}, images/s in the best mode: " + ", ".join(f"{name} {value:.0f}" for name, value in speeds.items()))
    if speed := best.get("training", {}).get("raftmlp_s"):
        hours = 300 * 1281167 / speed / 8 / 3600
        say(
            f"an estimate: 300 epochs of ImageNet with raftmlp_s take 8 such devices {hours:.1f} hours, if data keep up"
        )


def build_parser() -> Parser:
    parser = Parser(yaml_config=False, description=__doc__)
    parser.add_argument("--device", metavar="NAME", help="cuda, or cpu for a rehearsal (default: cuda)")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        choices=BENCHMARKS,
        default=list(BENCHMARKS),
        metavar="NAME",
        help=f"of {', '.join(BENCHMARKS)} (default: all)",
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of those that are measured (default: all)")
    number = option_type(Count)
    parser.add_argument("--processes", type=number, default=4, metavar="N", help="that compile (default: 4)")
    folder = dict(type=option_type(output_folder), metavar="DIR")
    parser.add_argument(
        "--output", **folder, help="folder for what it writes (default: runs/gpu, or runs/gpu-rehearsal)"
    )
    return parser


def main() -> int:
    args = build_parser().parse_args()
    if tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < (1, 0, 31):
        raise UserError(f"raftmlp's commands need timm 1.0.31 or newer, this is {timm.__version__}")
    if not args.device and not torch.cuda.is_available():
        raise UserError("no CUDA GPU here; make gpu DEVICE=cpu rehearses on the CPU, at a tiny setting")
    device = find_device(args.device or "cuda")
    on_gpu, begun = device.type == "cuda", time.monotonic()
    name = torch.cuda.get_device_name(device) if on_gpu else "the CPU, a rehearsal"
    say(f"{name}, torch {torch.__version__}, timm {timm.__version__}")
    measured = [b for b in benchmarks(device) if b.name in args.benchmarks]
    known = {model for b in measured for model in b.models}
    if unknown := [model for model in args.models or [] if model not in known]:
        names = f"{' '.join(unknown)}: none of them is measured there; take of {' '.join(sorted(known))}"
        raise UserError(f"--models {names}")
    for benchmark in measured:
        benchmark.models = [model for model in benchmark.models if not args.models or model in args.models]
    measured = [b for b in measured if b.models]
    if not measured:
        raise UserError(f"--benchmarks {' '.join(args.benchmarks)}: not measured on {device.type}")
    output = args.output or Path("runs", "gpu" if on_gpu else "gpu-rehearsal")
    folder = output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for benchmark in measured:  # of a run before
        (folder / benchmark.name / "results.json").unlink(missing_ok=True)

    compiling = start_compilations(measured, device, args.processes) if on_gpu else []
    testing = start_tests(folder / "tests.txt", TESTS if on_gpu else REHEARSED)
    finish([testing, *compiling])
    tests = outcome_of_tests(folder / "tests.txt", testing.returncode != -signal.SIGKILL)
    say(f"tests: {tests}")
    failed = ["tests"] if testing.returncode else []
    about, rows = dict(device=name, torch=torch.__version__, timm=timm.__version__, tests=tests), []
    for benchmark in measured:
        options = ["--device", str(device), "--output", str(folder / benchmark.name)]
        done = subprocess.run([*benchmark.command(), *options], cwd=ROOT)
        if done.returncode:
            failed.append(f"the benchmark {benchmark.name} (status {done.returncode})")
        rows += read_rows(folder, benchmark.name)
        write_json(folder / "summary.json", dict(about, rows=rows), indent=1)
    say_speeds(rows)
    say(f"{time.monotonic() - begun:.0f} s; tests, tables and pictures: {output}")
    if failed:
        say(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    run(main)
