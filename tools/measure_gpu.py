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
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
REHEARSED = ["tests/test_gpu.py", "-k", "test_gradients"]
PEERS = [
    "resnet18", "resnet34", "resnet50", "convnext_nano", "mixer_s16_224", "resmlp_12_224", "deit_small_patch16_224",
    "poolformer_s12", "fasternet_t2",
]  # fmt: skip
OURS = ["reference:raftmlp_s", "raftmlp_s", "raftmlp_m", "raftmlp_l"]
TIME_LIMIT = 240  # seconds for the tests, and for each model that is compiled beforehand
BENCHMARKS = ("inference", "sizes", "training", "compiled", "autotuned")


def benchmarks(device: torch.device) -> dict[str, tuple[list[str], list[str]]]:
    """Return the models and the other options of every call of `raftmlp benchmark`: on a CPU a rehearsal."""
    inference, training = ["--tasks", "inference"], ["--tasks", "training"]
    if device.type == "cpu":
        models = ["reference:raftmlp_digits", "raftmlp_digits"]
        tiny = ["--sizes", "32", "-b", "2", "--rounds", "1", "--min-time", "0"]
        return {"inference": (models, [*inference, *tiny]), "training": (models, [*training, *tiny])}
    precision = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"  # as the GPU's age is
    models, two = OURS + [name for name in PEERS if timm.is_model(name)], ["raftmlp_s", "resnet34"]
    common = ["--precision", precision, "--channels-last", "--rounds", "5", "--min-time", "0.15"]
    batch, compiled = ["-b", "256", *common], ["--modes", "compile"]
    return {
        "inference": (models, [*inference, "--modes", "eager", "compile", *batch]),
        "sizes": (OURS[:2], [*inference, "--sizes", "800x1333", "1792", "-b", "8", *common]),
        "training": (models, [*training, *batch]),
        "compiled": (two, [*training, *compiled, *batch]),
        "autotuned": (two, [*inference, *compiled, "--compile-mode", "max-autotune", *batch]),
    }


def benchmark_command(models: list[str], options: list[str], device: torch.device) -> list[str]:
    """Return the command of a benchmark."""
    return [sys.executable, "-m", "raftmlp", "benchmark", *models, *options, "--device", str(device)]


def compilations(measured: dict[str, tuple[list[str], list[str]]], device: torch.device) -> list[list[str]]:
    """Return commands that compile what the benchmarks need, a model each: torch keeps it on the disk.

    What is autotuned is not: it is timed while it is compiled.
    """
    quick = ["--modes", "compile", "--rounds", "1", "--min-time", "0"]
    return [
        benchmark_command([model], [*options, *quick], device)
        for name, (models, options) in measured.items()
        if "compile" in options and name != "autotuned"
        for model in models
    ]


def run_tests(path: Path, options: list[str]) -> bool:
    """Run tests, whose output goes to a file, and return whether they pass; it tells where one is that hangs."""
    workers = ["-n", "4"] if options == TESTS and find_spec("xdist") else []
    shown = ["-v", *workers, "--tb", "short", "-o", f"faulthandler_timeout={TIME_LIMIT // 4}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *shown, *options]
    with path.open("w") as out:
        try:
            environment = dict(os.environ, OMP_NUM_THREADS="2")
            done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, env=environment, timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            out.write(f"\nnot done after {TIME_LIMIT} s, ended")
            return False
    return done.returncode == 0


def run_quietly(command: list[str]) -> None:
    """Run a command for its effect, for no longer than the time limit."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        subprocess.run(command, cwd=ROOT, **quiet, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        say(f"not compiled beforehand: {' '.join(command)}")


def build_parser() -> Parser:
    parser = Parser(yaml_config=False, description=__doc__)
    parser.add_argument("--device", metavar="NAME", help="cuda, or cpu for a rehearsal (default: cuda)")
    kinds = dict(nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--benchmarks", **kinds, help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of those that are measured (default: all)")
    number = option_type(Count)
    parser.add_argument("--processes", type=number, default=4, metavar="N", help="that compile (default: 4)")
    folder = "folder for what it writes (default: runs/gpu, or runs/gpu-rehearsal)"
    parser.add_argument("--output", type=option_type(output_folder), metavar="DIR", help=folder)
    return parser


def main() -> int:
    args = build_parser().parse_args()
    if not args.device and not torch.cuda.is_available():
        raise UserError("no CUDA GPU here; make gpu DEVICE=cpu rehearses on the CPU, at a tiny setting")
    device = find_device(args.device or "cuda")
    on_gpu, begun = device.type == "cuda", time.monotonic()
    about = dict(device=torch.cuda.get_device_name(device) if on_gpu else "the CPU, a rehearsal")
    about |= dict(torch=torch.__version__, timm=timm.__version__)
    measured = {}
    for name, (models, options) in benchmarks(device).items():
        models = [model for model in models if not args.models or model in args.models]
        if models and name in args.benchmarks:
            measured[name] = models, options
    if not measured:
        raise UserError("none of these --benchmarks and --models are measured there")
    folder = (args.output or Path("runs", "gpu" if on_gpu else "gpu-rehearsal")).absolute()
    folder.mkdir(parents=True, exist_ok=True)

    with ThreadPoolExecutor(args.processes + 1) as pool:
        testing = pool.submit(run_tests, folder / "tests.txt", TESTS if on_gpu else REHEARSED)
        pool.map(run_quietly, compilations(measured, device) if on_gpu else ())
    about["tests"] = (folder / "tests.txt").read_text().splitlines()[-1].strip("= ")
    say(f"tests: {about['tests']}")
    failed, rows = [] if testing.result() else ["tests"], []
    for name, (models, options) in measured.items():
        results = folder / name / "results.json"
        results.unlink(missing_ok=True)  # of a run before
        done = subprocess.run([*benchmark_command(models, options, device), "--output", str(results.parent)], cwd=ROOT)
        if done.returncode:
            failed.append(f"the benchmark {name} (status {done.returncode})")
        if results.exists():
            rows += [dict(row, benchmark=name) for row in json.loads(results.read_text())["rows"]]
        write_json(folder / "summary.json", dict(about, rows=rows), indent=1)
    say(f"{time.monotonic() - begun:.0f} s; tests, tables and pictures: {folder}")
    if failed:
        say(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    run(main)
