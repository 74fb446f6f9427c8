#!/usr/bin/env python
"""Compare how fast models are, in turns: A B A B, so that whatever else the machine does meets all of them alike.

    python tools/benchmark.py raftmlp_s reference:raftmlp_s convnext_nano --output runs/benchmark
    python tools/benchmark.py raftmlp_s --modes eager compile --tasks inference training --sizes 224 800x1333 -b 4

The first model in the first mode is what the ratios are of. reference:NAME is one of ours computed with the sequence of
operations of the authors' release. Times are medians over the rounds; ratios are medians of the ratios within a round.
Every round also times a large matrix product and a large copy: the two floors are the time that a model's arithmetic,
and the operands and results of its matrix products and convolutions, would take at that pace.
"""

import argparse
import csv
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from statistics import median, quantiles

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets otherwise
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm

import cli
from reports import size_name

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import reference

REFERENCE = "reference:"
MODES = ("eager", "compile")
TASKS = ("inference", "training")
PRECISIONS = ("float32", "bfloat16", "float16", "amp_bfloat16", "amp_float16")  # timm's names


def build_parser() -> cli.Parser:
    parser = cli.Parser("%(prog)s MODEL ... [OPTION ...]", description=__doc__)
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "models", nargs="+", type=_model_name, metavar="MODEL", help="models of timm's list, or reference:NAME"
    )
    group.add_argument(
        "--modes", nargs="+", choices=MODES, default=["eager"], metavar="MODE", help=f"of {', '.join(MODES)}"
    )
    group.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=["inference"], metavar="TASK", help=f"of {', '.join(TASKS)}"
    )
    group.add_argument(
        "--sizes", nargs="+", type=_size, default=[(224, 224)], metavar="SIZE", help="image sizes, as 224 or 800x1333"
    )
    group.add_argument("-b", "--batch-size", type=cli.number(int, 1), default=16, metavar="N", help="images a batch")
    group = parser.add_argument_group("how")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the weights, or of autocast")
    group.add_argument("--channels-last", action="store_true", help="channels-last memory layout")
    group.add_argument("--threads", type=cli.number(int, 1), metavar="N", help="threads on a CPU (default: PyTorch's)")
    group.add_argument("--rounds", type=cli.number(int, 1), default=7, metavar="N", help="rounds, after one of warm-up")
    group.add_argument(
        "--min-time", type=cli.number(float, 0), default=0.5, metavar="S", help="seconds a turn lasts at least"
    )
    group.add_argument(
        "--compile-mode",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        default="default",
        help="of torch.compile",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=cli.output_folder,
        metavar="DIR",
        help="write results.json and results.csv there, speed.png of several models, sizes.png of several sizes",
    )
    return parser


def _model_name(text: str) -> str:
    try:
        ours = text.startswith(REFERENCE)
        cli.known_model(text.removeprefix(REFERENCE), "raftmlp*" if ours else "")
    except cli.UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _size(text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of pixels or HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


class Reference(nn.Module):
    """One of our networks, computed with the release's sequence of operations."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return reference.logits(x, self.model)


@dataclass
class Result:
    """What was measured of a model in a mode, at a task and a size.

    Times are milliseconds an iteration, of one batch; spread is the interquartile range over the median. Ratios say how
    many times the first row's speed this one has. Memory is what an iteration takes at its peak beside weights and
    images. The shares are what the arithmetic, and the traffic of the products, would take of the time at the device's
    pace.
    """

    model: str
    mode: str
    task: str
    size: str
    batch_size: int
    milliseconds: float = float("nan")
    spread: float = float("nan")
    images_per_second: float = float("nan")
    ratio: float = float("nan")
    ratio_low: float = float("nan")
    ratio_high: float = float("nan")
    gmacs: float = float("nan")
    parameters: int = 0
    memory_mib: float = float("nan")
    arithmetic_share: float = float("nan")
    traffic_share: float = float("nan")
    failure: str = ""


class Meter:
    """Runs a model on one batch of noise, forward or forward and backward.

    Args:
        name: A model of timm's list, or reference:NAME.
        mode: One of MODES.
        task: "inference" or "training": forward, cross entropy and backward, without an optimiser.
        size: Height and width of the images.
        args: The options.
        device: Where it runs.
    """

    def __init__(self, name: str, mode: str, task: str, size: tuple[int, int], args: argparse.Namespace, device):
        self.dtype = getattr(torch, args.precision.removeprefix("amp_"))  # of the products
        amp = args.precision.startswith("amp_")
        dtype = torch.float32 if amp else self.dtype
        self.autocast = torch.autocast(device.type, self.dtype, enabled=amp)
        self.device, self.training = device, task == "training"
        torch.manual_seed(0)
        kwargs = {}
        plain = name.removeprefix(REFERENCE)
        if timm.models.get_pretrained_cfg_value(plain, "fixed_input_size"):
            kwargs["img_size"] = size
        model = timm.create_model(plain, **kwargs)
        self.parameters = sum(p.numel() for p in model.parameters())
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        model = model.to(device, dtype, memory_format=layout).train(self.training)
        self.images = torch.randn(args.batch_size, 3, *size).to(device, dtype, memory_format=layout)
        self.classes = torch.randint(model.num_classes, (args.batch_size,), device=device)
        if name.startswith(REFERENCE):
            model = Reference(model)
        self.plain = model
        if mode == "compile":
            model = torch.compile(model, mode=args.compile_mode)
        self.model = model

    def __call__(self) -> None:
        """Run one iteration."""
        with self.autocast:
            if not self.training:
                with torch.inference_mode():
                    self.model(self.images)
                return
            loss = nn.functional.cross_entropy(self.model(self.images).float(), self.classes)
        loss.backward()
        for parameter in self.plain.parameters():
            parameter.grad = None

    def work(self) -> tuple[int, int]:
        """Return the multiplications of an iteration, and the bytes that its products read and write.

        Those of the backward pass are counted as twice the forward pass's.
        """
        with torch.no_grad(), self.autocast, FlopCounterMode(display=False) as counter, _ProductTraffic() as traffic:
            self.plain(self.images)
        times = 3 if self.training else 1
        return times * counter.get_total_flops() // 2, times * traffic.bytes

    def memory(self) -> int:
        """Return the bytes that an iteration takes at its peak, beside what was there before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self()
            return torch.cuda.max_memory_allocated(self.device) - before
        with tempfile.TemporaryDirectory() as folder:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            ) as profile:
                self()
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        held = peak = 0
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
            held += event["args"]["Bytes"]
            peak = max(peak, held)
        return peak

    def iterations(self, seconds: float) -> int:
        """Return how many iterations last so long."""
        return max(1, round(seconds / max(clock(self, 1, self.device), 1e-9)))


class _ProductTraffic(TorchDispatchMode):
    """Counts the bytes of the operands and results of matrix products and convolutions."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket not in flop_registry:
            with self:
                out = func.decompose(*args, **kwargs)  # of Linear and the like
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def clock(run: Callable[[], None], iterations: int, device: torch.device) -> float:
    """Return the seconds of an iteration, the mean of so many in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(iterations):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / iterations


class Floor:
    """A large matrix product and a large copy: the pace that this device has at the time.

    Args:
        dtype: Type of the numbers.
        device: The device.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.device, self.side = device, 8192 if device.type == "cuda" else 1536
        self.a, self.b = (torch.randn(self.side, self.side, device=device).to(dtype) for _ in range(2))
        self.source = torch.zeros(2**26, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def pace(self) -> tuple[float, float]:
        """Return multiplications a second, and bytes a second read or written."""
        product = min(clock(lambda: torch.mm(self.a, self.b), 1, self.device) for _ in range(3))
        copy = min(clock(lambda: self.target.copy_(self.source), 1, self.device) for _ in range(3))
        return self.side**3 / product, 2 * self.source.numel() / copy


@dataclass
class Row:
    """A model that runs, what an iteration multiplies and moves, and the seconds of an iteration in each round."""

    result: Result
    meter: Meter
    macs: int
    traffic: int
    iterations: int
    seconds: list[float]


def measure(task: str, size: tuple[int, int], args: argparse.Namespace, device: torch.device) -> list[Result]:
    """Return the results of all models and modes at a task and a size; the rows take turns."""
    torch.compiler.reset()  # here, not for every row: it takes back what the rows before compiled
    bar = tqdm(desc=f"{task} at {size_name(size)}", unit="turn", disable=None, leave=False)
    rows, results = [], []
    for name, mode in product(args.models, args.modes):
        result = Result(name, mode, task, size_name(size), args.batch_size)
        results.append(result)
        bar.set_postfix_str(f"prepares {name} {mode}")
        try:
            meter = Meter(name, mode, task, size, args, device)
            macs, traffic = meter.work()
            meter()
            meter()
            result.memory_mib = meter.memory() / 2**20
            rows.append(Row(result, meter, macs, traffic, meter.iterations(args.min_time), []))
        except Exception as error:  # a model of timm's list may refuse a size, a compiler anything
            result.failure = cli.first_words(error)
            continue
        result.gmacs, result.parameters = macs / args.batch_size / 1e9, meter.parameters
    if not rows:
        bar.close()
        return results

    floor, paces = Floor(rows[0].meter.dtype, device), []
    for _ in range(args.rounds):
        paces.append(floor.pace())
        for row in rows:
            bar.set_postfix_str(f"{row.result.model} {row.result.mode}")
            row.seconds.append(clock(row.meter, row.iterations, device))
            bar.update()
    bar.close()
    macs_a_second, bytes_a_second = (median(pace) for pace in zip(*paces))
    for row in rows:
        result, middle = row.result, median(row.seconds)
        result.milliseconds, result.images_per_second = 1000 * middle, args.batch_size / middle
        result.spread = spread(row.seconds) / middle
        result.arithmetic_share = row.macs / macs_a_second / middle
        result.traffic_share = row.traffic / bytes_a_second / middle
        if not results[0].failure:  # what the ratios are of did run
            ratios = [base / own for base, own in zip(rows[0].seconds, row.seconds)]
            result.ratio, result.ratio_low, result.ratio_high = median(ratios), min(ratios), max(ratios)
    return results


def spread(values: list[float]) -> float:
    """Return the interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


COLUMNS = ("model", "mode", "ms", "spread", "images/s", "ratio", "(range)", "GMACs", "arithmetic", "traffic", "MiB")


def table(results: list[Result]) -> str:
    """Return the results of a task and a size as a table."""
    lines = [COLUMNS]
    for r in results:
        if r.failure:
            lines.append((r.model, r.mode, f"did not run: {r.failure}"))
            continue
        lines.append(
            (
                r.model,
                r.mode,
                f"{r.milliseconds:.1f}",
                f"{r.spread:.0%}",
                f"{r.images_per_second:.1f}",
                f"{r.ratio:.2f}",
                f"({r.ratio_low:.2f}-{r.ratio_high:.2f})",
                f"{r.gmacs:.3f}",
                f"{r.arithmetic_share:.0%}",
                f"{r.traffic_share:.0%}",
                f"{r.memory_mib:.0f}",
            )
        )
    widths = [max(len(line[i]) for line in lines if len(line) > 3 or i < 2) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def facts(args: argparse.Namespace, device: torch.device) -> dict:
    """Return what the results hang on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return dict(
        device=f"{device.type}: {name}",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
        precision=args.precision,
        channels_last=args.channels_last,
        compile_mode=args.compile_mode,
        rounds=args.rounds,
        command=" ".join(["python", "tools/benchmark.py", *sys.argv[1:]]),
    )


def write(folder: Path, results: list[Result], about: dict) -> None:
    """Write results.json, results.csv and the pictures that the rows allow."""
    rows = [{k: None if v != v else v for k, v in asdict(result).items()} for result in results]
    cli.write_whole(folder / "results.json", json.dumps(dict(about, rows=rows), indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    cli.write_whole(folder / "results.csv", text.getvalue())
    if len({r.model for r in results}) > 1:
        draw_speed(folder / "speed.png", results)
    if len({r.size for r in results}) > 1:
        draw_sizes(folder / "sizes.png", results)


def _label(result: Result) -> str:
    return result.model if result.mode == "eager" else f"{result.model}, {result.mode}"


def draw_speed(path: Path, results: list[Result]) -> None:
    """Draw images/s against GMACs, one panel a task, at the first size."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r.task for r in results))
    figure = Figure(figsize=(6 * len(tasks), 4.5), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        shown = [r for r in results if r.task == task and r.size == results[0].size and not r.failure]
        for i, r in enumerate(shown):
            ours = "raftmlp" in r.model
            axis.scatter(r.gmacs, r.images_per_second, color=f"C{i}", marker="o" if ours else "s", label=_label(r))
        axis.set(xlabel="GMACs an image", ylabel="images a second", title=f"{task} at {results[0].size}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    cli.save_figure(figure, path)


def draw_sizes(path: Path, results: list[Result]) -> None:
    """Draw time and memory over the input size, one line a model, mode and task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    lines: dict[tuple, list[tuple]] = {}
    for r in results:
        if not r.failure:
            height, width = _size(r.size)
            line = lines.setdefault((_label(r), r.task), [])
            line.append((height * width / 1e6, r.milliseconds / r.batch_size, r.memory_mib / r.batch_size))
    for axis, column, name in zip(figure.subplots(1, 2), (1, 2), ("milliseconds an image", "MiB an image at the peak")):
        for (label, task), points in lines.items():
            points = sorted(points)
            axis.plot([p[0] for p in points], [p[column] for p in points], "o-", label=f"{label}, {task}")
        axis.set(xlabel="megapixels", ylabel=name, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    cli.save_figure(figure, path)


def main() -> None:
    args = build_parser().parse_args()
    device = cli.find_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    about, results = facts(args, device), []
    cli.say(
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {args.precision}, "
        f"batches of {args.batch_size}"
    )
    for task, size in product(args.tasks, args.sizes):
        cli.say(f"\n{task} at {size_name(size)}: ratios to {args.models[0]} {args.modes[0]}")
        results += measure(task, size, args, device)
        cli.say(table(results[-len(args.models) * len(args.modes) :]))
        if args.output:
            write(args.output, results, about)
    if args.output:
        cli.say(f"\nresults and pictures: {args.output}")
    if all(result.failure for result in results):
        raise cli.UserError("nothing ran")


if __name__ == "__main__":
    cli.run(main)
