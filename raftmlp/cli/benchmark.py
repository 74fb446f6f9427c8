"""Compare how fast models are, in turns: A B A B, so that other work on the machine affects all of them alike.

    raftmlp benchmark raftmlp_s reference:raftmlp_s convnext_nano --output runs/benchmark
    raftmlp benchmark raftmlp_s raftmlp_s,resizing=residual --sizes 512 800x1333 -b 1
    raftmlp benchmark raftmlp_s --modes eager compile --tasks inference training --sizes 224 800x1333 -b 4

Ratios are to the first model in the first mode. reference:NAME is one of ours computed with the sequence of operations
of the authors' release. Times are medians over the rounds; ratios are medians of the ratios within a round. Every round
also times a large matrix product and a large copy: "arithmetic" and "traffic" are the shares of a model's time that its
arithmetic, and the operands and results of its matrix products and convolutions, would take at that pace. A batch that
is too large for the memory of a GPU is halved until it fits. A note says if other work leaves too few idle cores;
other_load in the results is the cores' load by others in the minute before, and in that up to the end of each row.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import MODES, REFERENCE, TASKS, SpeedSettings, is_folder_name, known_model
from ..errors import UserError
from ..files import write_csv, write_json
from ..settings import Count
from ..sizes import parse_size, size_name
from .console import command_line, say
from .options import Parser, option_type, output_folder

if TYPE_CHECKING:
    import torch

    from ..evaluate.speed import Result

COLUMNS = (
    "model", "mode", "batch", "ms", "spread", "images/s", "ratio", "(range)", "GMACs", "arithmetic", "traffic", "MiB",
)  # fmt: skip


def build_parser() -> Parser:
    parser = Parser("%(prog)s MODEL ... [OPTION ...]", description=__doc__)
    group = parser.group("what is compared")
    group.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help=f"models of timm's list, or {REFERENCE}NAME; with arguments as in NAME,KEY=VALUE",
    )
    parser.checks["models"] = model_name
    for name, choices in (("mode", MODES), ("task", TASKS)):
        text = f"of {', '.join(choices)} (default: {choices[0]})"
        words = dict(nargs="+", choices=choices, default=[choices[0]], metavar=name.upper())
        group.add_argument(f"--{name}s", **words, help=text)
    text, words = "image sizes, as 224 or 800x1333 (default: 224)", dict(nargs="+", metavar="SIZE")
    group.add_argument("--sizes", type=option_type(parse_size), default=[(224, 224)], **words, help=text)
    parser.add_settings(SpeedSettings)
    group = parser.group("how")
    text = "cpu, cuda, cuda:1, mps, ... (default: the accelerator that torch finds, else cpu)"
    group.add_argument("--device", metavar="NAME", help=text)
    group.add_argument("--threads", type=option_type(Count), metavar="N", help="threads on a CPU (default: PyTorch's)")
    text = "write results.json and results.csv there, speed.png of several models, sizes.png of several sizes"
    parser.group("output").add_argument("--output", type=option_type(output_folder), metavar="DIR", help=text)
    return parser


def model_name(text: str) -> str:
    """Return the name of a model that timm makes, or reference:NAME for one of ours; either may have arguments.

    Raises:
        UserError: If there is none, or it is a file or folder.
    """
    from ..evaluate.speed import split_name

    name, _ = split_name(text)
    if is_folder_name(name):
        raise UserError(f"{text} holds weights, which do not change speed: name its model, as in raftmlp_s")
    known_model(name, "raftmlp*" if text.startswith(REFERENCE) else "")
    return text


def table(results: list[Result]) -> str:
    """Return the results of a task and a size as a table."""
    from ..evaluate.results import aligned

    lines = [COLUMNS]
    for r in results:
        lines.append((r.model, r.mode))
        if not r.failure:
            ratio = (f"{r.ratio:.2f}", f"({r.ratio_low:.2f}-{r.ratio_high:.2f})")
            shares = (f"{r.arithmetic_share:.0%}", f"{r.traffic_share:.0%}")
            speed = (str(r.batch_size), f"{r.milliseconds:.1f}", f"{r.spread:.0%}", f"{r.images_per_second:.1f}")
            lines[-1] += (*speed, *ratio, f"{r.gmacs:.3f}", *shares, f"{r.memory_mib:.0f}")
    header, *rows = aligned(lines, 2)
    failures = [r.failure and f"  did not run: {r.failure}" for r in results]
    return "\n".join([header, *(row + failure for row, failure in zip(rows, failures))])


def conditions(settings: SpeedSettings, device: torch.device) -> dict:
    """Return what the results depend on besides the models."""
    import torch

    from ..train.run_logger import versions

    describe = getattr(torch.get_device_module(device), "get_device_name", None)
    name = describe(device) if describe else platform.processor() or platform.machine()
    about = dict(device=f"{device.type}: {name}", threads=torch.get_num_threads(), command=command_line())
    return {**about, **versions(), **asdict(settings)}


def write(folder: Path, results: list[Result], about: dict) -> None:
    """Write results.json, results.csv and the pictures that the rows allow."""
    from ..evaluate.plots import draw_cost, draw_speed

    rows = [{k: None if v != v else v for k, v in asdict(result).items()} for result in results]  # no NaN in JSON
    write_json(folder / "results.json", dict(about, rows=rows), indent=1)
    write_csv(folder / "results.csv", rows)
    if len({r.model for r in results}) > 1:
        draw_speed(folder / "speed.png", results)
    if len({r.size for r in results}) > 1:
        draw_cost(folder / "sizes.png", results)


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler, which measures memory, prints lines of its own
    parser = build_parser()
    args = parser.parse_args()
    parser.load_and_check(args)
    import torch

    from ..device import find_device
    from ..evaluate.speed import MachineLoad, measure

    torch.backends.cudnn.benchmark = True
    device, settings = find_device(args.device), SpeedSettings.select(vars(args))
    if args.threads:
        torch.set_num_threads(args.threads)
    load = MachineLoad(torch.get_num_threads() if device.type == "cpu" else 1)
    about, results = {**conditions(settings, device), "other_load": load.read()}, []
    say(
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {settings.precision}, batches of "
        f"{settings.batch_size}"
    )
    for task, size in product(args.tasks, args.sizes):
        say(f"\n{task} at {size_name(size)}: ratios to {args.models[0]} {args.modes[0]}")
        measured = measure(args.models, args.modes, task, size, settings, device)
        other_load = load.read()
        for result in measured:
            result.other_load = other_load
        results += measured
        say(table(measured))
        if args.output:
            write(args.output, results, about)
    if args.output:
        say(f"\nresults and pictures: {args.output}")
    if all(result.failure for result in results):
        raise UserError("none of the models ran")
