#!/usr/bin/env python
"""Test and measure on a GPU what a CPU cannot show, in some minutes: `make gpu`.

    make gpu PYTHON=python3                  # with the packages of that Python; no network
    python tools/measure_gpu.py --device cpu # a rehearsal on a CPU, at a tiny setting

First the tests that a GPU can fail, and beside them, in several processes, the compilations that the benchmarks need;
then the benchmarks, alone on the machine: inference and training of all models, large images, and what torch.compile
autotunes. The folder has the tests' output (tests.txt), a folder for every benchmark as `raftmlp benchmark` writes
it, and summary.json with all rows.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import timm
import torch

from raftmlp.commands.console import run, say
from raftmlp.commands.options import Parser, output_folder
from raftmlp.device import find_device
from raftmlp.errors import UserError
from raftmlp.files import write_text

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["tests/test_gpu.py", "tests/test_fused.py", "tests/test_ops.py", "tests/test_resize.py"]
REHEARSED = ["tests/test_gpu.py", "-k", "channels_last"]
PEERS = [
    "resnet18", "resnet34", "resnet50", "convnext_nano", "mixer_s16_224", "resmlp_12_224", "deit_small_patch16_224",
    "poolformer_s12", "fasternet_t2",
]  # fmt: skip
OURS = ["reference:raftmlp_s", "raftmlp_s", "raftmlp_m", "raftmlp_l"]
TASKS = ("inference", "training")
BENCHMARKS = ("inference", "sizes", "training", "autotuned")


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
    autotuned = ["--tasks", *TASKS, "--compile-mode", "max-autotune", *batch]
    return [
        Benchmark("inference", OURS + known, ["eager", "compile"], ["--tasks", "inference", *batch]),
        Benchmark("sizes", OURS[:2], ["eager"], ["--tasks", "inference", *large]),
        Benchmark("training", OURS + known, ["eager", "compile"], ["--tasks", "training", *batch]),
        Benchmark("autotuned", ["reference:raftmlp_s", "raftmlp_s", "resnet34"], ["compile"], autotuned),
    ]


def start_compilations(measured: list[Benchmark], device: torch.device, processes: int) -> list[subprocess.Popen]:
    """Start what the benchmarks compile, in so many processes: torch keeps it on the disk."""
    quick = ["--device", str(device), "--rounds", "1", "--min-time", "0"]
    shares = [[] for _ in range(processes)]
    compiled = [(b, model) for b in measured if "compile" in b.modes for model in b.models]
    for i, (b, model) in enumerate(compiled):
        alone = Benchmark(b.name, [model], ["compile"], [*b.options, *quick])
        shares[i % processes].append(alone.command())
    script = "import json, subprocess, sys\nfor command in json.loads(sys.argv[1]): subprocess.run(command)"
    quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [subprocess.Popen([sys.executable, "-c", script, json.dumps(share)], **quiet) for share in shares if share]


def run_tests(folder: Path, options: list[str]) -> str:
    """Run the tests, say which fail, and return pytest's last line; all that it printed goes to tests.txt."""
    workers = ["-n", "4"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb", "short", *workers, *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    write_text(folder / "tests.txt", done.stdout)
    lines = done.stdout.splitlines() or ["no output"]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            say(line)
    return lines[-1].strip("= ")


def summarise(folder: Path, measured: list[Benchmark], about: dict) -> None:
    """Write summary.json: about the run, and the rows of all benchmarks; say how S stands beside others."""
    rows = []
    for benchmark in measured:
        path = folder / benchmark.name / "results.json"
        if path.exists():
            rows += [dict(row, benchmark=benchmark.name) for row in json.loads(path.read_text())["rows"]]
    write_text(folder / "summary.json", json.dumps(dict(about, rows=rows), indent=1) + "\n")
    speeds = {}  # the best of all modes
    for row in rows:
        if row["size"] == rows[0]["size"] and row["images_per_second"]:
            speeds.setdefault(row["task"], {}).setdefault(row["model"], []).append(row["images_per_second"])
    for task, models in speeds.items():
        best = {model: max(values) for model, values in models.items()}
        say(f"{task}, images/s in the best mode: " + ", ".join(f"{model} {best[model]:.0f}" for model in best))
    if "raftmlp_s" in (trained := speeds.get("training", {})):
        hours = 300 * 1281167 / max(trained["raftmlp_s"]) / 8 / 3600
        say(f"an estimate: 300 epochs of ImageNet with raftmlp_s take 8 such cards {hours:.1f} hours, if data keep up")


def main() -> None:
    parser = Parser(yaml_config=False, description=__doc__)
    parser.add_argument("--device", metavar="NAME", help="cuda, or cpu for a rehearsal (default: cuda)")
    parser.add_argument(
        "--output", type=output_folder, default=Path("runs/gpu"), metavar="DIR", help="for what it writes"
    )
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        choices=BENCHMARKS,
        default=list(BENCHMARKS),
        help=f"of {', '.join(BENCHMARKS)}",
        metavar="NAME",
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of those that are measured (default: all of them)")
    parser.add_argument("--processes", type=int, default=8, metavar="N", help="that compile (default: 8)")
    args = parser.parse_args()
    if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31):
        raise UserError(f"raftmlp's commands need timm 1.0.31 or newer, this is {timm.__version__}")
    if not args.device and not torch.cuda.is_available():
        raise UserError("no CUDA GPU here; make gpu DEVICE=cpu rehearses on the CPU, at a tiny setting")
    device = find_device(args.device or "cuda")
    on_gpu, started = device.type == "cuda", time.monotonic()
    name = torch.cuda.get_device_name(device) if on_gpu else "the CPU, a rehearsal"
    say(f"{name}, torch {torch.__version__}, timm {timm.__version__}")
    measured = [b for b in benchmarks(device) if b.name in args.benchmarks]
    for benchmark in measured:
        benchmark.models = [model for model in benchmark.models if not args.models or model in args.models]
    folder = args.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)

    compilations = start_compilations(measured, device, args.processes) if on_gpu else []
    tests = run_tests(folder, TESTS if on_gpu else REHEARSED)
    say(f"tests: {tests}")
    for process in compilations:
        process.wait()
    about = dict(device=name, torch=torch.__version__, timm=timm.__version__, tests=tests)
    for benchmark in measured:
        options = ["--device", str(device), "--output", str(folder / benchmark.name)]
        done = subprocess.run([*benchmark.command(), *options], cwd=ROOT)
        if done.returncode:
            say(f"the benchmark {benchmark.name} ended with status {done.returncode}")
        summarise(folder, measured, about)
    say(f"{time.monotonic() - started:.0f} s; tests, tables and pictures: {args.output}")


if __name__ == "__main__":
    run(main)
