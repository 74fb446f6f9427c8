"""The speed of models: time, arithmetic and memory of an iteration, measured in turns.

The models take turns (A B A B) within every round, so that other work on the machine affects all of them alike. Every
round also times a large matrix product and a large copy: at that pace, the arithmetic of a model, and the operands and
results of its matrix products and convolutions, would take a share of its time.
"""

import ast
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, product
from operator import itemgetter
from pathlib import Path
from statistics import median, quantiles
from timeit import timeit
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm

from ..config import REFERENCE, ModelSettings, SpeedSettings
from ..data.workers import processor_count
from ..device import synchronize
from ..errors import UserError, first_words
from ..model.create import create_model
from ..model.ops import plain_operators
from ..model.reference import Reference
from ..sizes import size_name

__all__ = ["MachineLoad", "Meter", "Result", "clock", "count_macs", "measure", "split_name"]

_logger = logging.getLogger(__name__)
BAR = "{desc}: {percentage:.0f}%|{bar}| {remaining} left{postfix}"
NAN = float("nan")


@dataclass
class Result:
    """What was measured of a model in a mode, at a task and a size.

    Times are milliseconds an iteration, of one batch; spread is the interquartile range over the median. A ratio is
    this row's speed over that of the first. Memory is the peak of an iteration without weights and images. The shares
    are what the arithmetic, and the traffic of the products, would take of the time at the device's pace. The other
    load is that of ``MachineLoad``.
    """

    model: str
    mode: str
    task: str
    size: str
    batch_size: int
    milliseconds: float = NAN
    spread: float = NAN
    images_per_second: float = NAN
    ratio: float = NAN
    ratio_low: float = NAN
    ratio_high: float = NAN
    gmacs: float = NAN
    parameters: int = 0
    memory_mib: float = NAN
    arithmetic_share: float = NAN
    traffic_share: float = NAN
    other_load: float | None = None
    failure: str = ""

    def set_times(self, seconds: Sequence[float], ratios: Sequence[float], paces: Sequence[tuple], work: tuple) -> None:
        """Set the figures that follow from the seconds of an iteration in each round, and the ratios of each.

        ``paces`` are those of the device in each round, ``work`` the multiplications of an iteration, and the bytes
        that its products move.
        """
        middle = median(seconds)
        low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (0, 0, 0)
        self.milliseconds, self.images_per_second = 1000 * middle, self.batch_size / middle
        self.spread = (high - low) / middle
        rates = [median(values) for values in zip(*paces)]
        self.arithmetic_share, self.traffic_share = (amount / rate / middle for amount, rate in zip(work, rates))
        if ratios:
            self.ratio, self.ratio_low, self.ratio_high = median(ratios), min(ratios), max(ratios)


# Time


def clock(run: Callable[[], object], iterations: int = 1) -> float:
    """Return the seconds of a call, the mean of so many in a row, with those of an accelerator that it starts."""
    from torch.utils.benchmark import timer  # it loads setuptools, which changes sys.path

    return timeit(run, timer=timer, number=iterations) / iterations


class MachineLoad:
    """How many cores other processes keep busy: the load average of a minute, without what this process added to it.

    ``threads`` is how many threads this process computes with.
    """

    def __init__(self, threads: int):
        self.threads, self.warned = threads, False
        self.time, self.used = time.monotonic(), sum(os.times()[:4])  # with children that have ended
        self.own = self.used / 60  # in the load average; little is older than that

    def read(self) -> float | None:
        """Return the load of others now, and warn once if it leaves too few idle cores; None where it is not known."""
        if not hasattr(os, "getloadavg"):  # on Windows
            return None
        now, used = time.monotonic(), sum(os.times()[:4])
        if (seconds := now - self.time) > 0:  # the kernel's average is of this form
            kept = math.exp(-seconds / 60)
            self.own = kept * self.own + (1 - kept) * (used - self.used) / seconds
            self.time, self.used = now, used
        other, cores = round(max(0.0, os.getloadavg()[0] - self.own), 2), processor_count()
        if not self.warned and other + self.threads > cores + 0.5:  # half a core is what an idle machine does
            self.warned = True
            _logger.warning(
                f"note: the load by other work is {other:.1f} on {cores} cores, and this takes {self.threads} more: "
                f"times, spreads and ratios may be wrong; repeat it on idle cores"
            )
        return other


def device_pace(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Return the multiplications a second of a large matrix product, and the bytes a second that a copy moves."""
    side, size = 1536 if device.type == "cpu" else 8192, 2**26
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    product_time = min(clock(lambda: torch.mm(a, b)) for _ in range(3))
    copy_time = min(clock(lambda: target.copy_(source)) for _ in range(3))
    return side**3 / product_time, 2 * size / copy_time


# A model


def split_name(text: str) -> tuple[str, dict[str, Any]]:
    """Return the model and its arguments that NAME,KEY=VALUE,... or reference:NAME,... names.

    Raises:
        UserError: If an argument is no KEY=VALUE.
    """
    name, _, arguments = text.removeprefix(REFERENCE).partition(",")
    source = f"f({arguments})"
    try:
        call = ast.parse(source, mode="eval").body
        pairs = {keyword.arg: keyword.value for keyword in call.keywords}
    except (SyntaxError, AttributeError):
        pairs = {None: None}
    if None in pairs or call.args:
        raise UserError(f"{text!r}: its arguments must be KEY=VALUE, as in raftmlp_s,resizing=residual")
    for key, value in pairs.items():
        try:
            pairs[key] = ast.literal_eval(value)
        except ValueError:  # a word
            pairs[key] = ast.get_source_segment(source, value)
    return name, pairs


def _counter(mapping: dict | None = None) -> FlopCounterMode:
    """Return torch's counter without its hooks on modules, which would make our layers call each convolution."""
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = nullcontext()
    counter.mod_tracker.parents = {"Global"}
    return counter


def _bytes_moved(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Return the bytes of the operands and results of an operator, in place of its operations."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs, out_val)) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


_bytes_moved._get_raw = True  # tensors, not their shapes


def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return the multiply-accumulates of products and convolutions of a model on the CPU, for an image (C, H, W).

    The model is in eval mode after that.
    """
    with torch.no_grad(), plain_operators(), _counter() as counter:
        model.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


class Meter:
    """Runs a model, named as ``split_name`` reads it, in one of MODES, on one batch of noise.

    The task "inference" is the forward pass, "training" forward, cross entropy and backward, without an optimizer.
    """

    def __init__(
        self, name: str, mode: str, task: str, size: tuple[int, int], settings: SpeedSettings, device: torch.device
    ):
        dtype, is_amp = settings.dtype, settings.precision.startswith("amp_")
        self.autocast = torch.autocast(device.type, dtype, enabled=is_amp)
        self.device, self.training = device, task == "training"
        torch.manual_seed(0)
        timm_name, arguments = split_name(name)
        model = create_model(ModelSettings(model=timm_name, img_size=size, model_kwargs=arguments))
        self.parameters = sum(p.numel() for p in model.parameters())
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        dtype = torch.float32 if is_amp else dtype
        model = model.to(device, dtype, memory_format=layout).train(self.training)
        shape = (settings.batch_size, arguments.get("in_chans", 3), *size)
        self.images = torch.randn(shape).to(device, dtype, memory_format=layout)
        self.classes = torch.randint(model.num_classes, (settings.batch_size,), device=device)
        self.plain = Reference(model) if name.startswith(REFERENCE) else model
        self.model = self.plain
        if mode == "compile":
            self.model = torch.compile(self.plain, mode=settings.compile_mode, dynamic=False)

    def __call__(self) -> None:
        """Run one iteration."""
        with self.autocast, torch.inference_mode(not self.training):
            logits = self.model(self.images)
        if self.training:
            nn.functional.cross_entropy(logits.float(), self.classes).backward()
            for parameter in self.plain.parameters():
                parameter.grad = None

    def work(self) -> tuple[int, int]:
        """Return the multiplications of an iteration, and the bytes that its products read and write.

        Those of the backward pass are counted as twice the forward pass's. Mixings are counted as plain operators,
        whatever kernel the device has.
        """
        counter, traffic = _counter(), _counter(dict.fromkeys(flop_registry, _bytes_moved))
        with torch.no_grad(), plain_operators(), self.autocast, counter, traffic:
            self.plain(self.images)
        passes = 3 if self.training else 1
        return passes * counter.get_total_flops() // 2, passes * traffic.get_total_flops()

    def memory(self) -> float:
        """Return the bytes that an iteration adds at its peak to what was there before; NaN if not known."""
        if self.device.type != "cpu":
            module = torch.get_device_module(self.device)
            if not hasattr(module, "reset_peak_memory_stats"):  # MPS keeps no record
                return NAN
            synchronize(self.device)
            module.reset_peak_memory_stats(self.device)
            before = module.memory_allocated(self.device)
            self()
            return module.max_memory_allocated(self.device) - before
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            self()
        with tempfile.TemporaryDirectory() as folder:  # the only public record of every allocation
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
        changes = [event["args"]["Bytes"] for event in sorted(events, key=itemgetter("ts"))]
        return max(accumulate(changes, initial=0))


# Rows


def measure(
    models: Sequence[str],
    modes: Sequence[str],
    task: str,
    size: tuple[int, int],
    settings: SpeedSettings,
    device: torch.device,
) -> list[Result]:
    """Return the results of all models in all modes at a task and a size, see ``Meter``; ratios are to the first."""
    torch.compiler.reset()  # here, not for every row: it discards what the rows before compiled
    steps, title = len(models) * len(modes) * (1 + settings.rounds), f"{task} at {size_name(size)}"
    bar = tqdm(total=steps, desc=title, bar_format=BAR, smoothing=0.05, disable=None, leave=False)
    meters, results = [], []
    for name, mode in product(models, modes):
        result = Result(name, mode, task, size_name(size), settings.batch_size)
        results.append(result)
        bar.set_postfix_str(f"preparing {name} {mode}")
        try:
            meter, result.batch_size = _fitting_meter(name, mode, task, size, settings, device)
            work = meter.work()
            result.memory_mib = meter.memory() / 2**20
            result.gmacs, result.parameters = work[0] / result.batch_size / 1e9, meter.parameters
            meters.append((meter, result, work, max(1, round(settings.min_time / clock(meter)))))
        except Exception as error:  # a model of timm's list may refuse a size, a compiler raises anything
            result.failure = first_words(error)
            bar.total -= settings.rounds
        bar.update()

    seconds, paces = [[] for _ in meters], []
    for _ in range(settings.rounds):
        paces.append(device_pace(settings.dtype, device))
        for (meter, result, _, iterations), times in zip(meters, seconds):
            bar.set_postfix_str(f"timing {result.model} {result.mode}")
            times.append(clock(meter, iterations))
            bar.update()
    bar.close()
    for (_, result, work, _), times in zip(meters, seconds):
        images = result.batch_size / results[0].batch_size
        ratios = [] if results[0].failure else [first / own * images for first, own in zip(seconds[0], times)]
        result.set_times(times, ratios, paces, work)
    return results


def _fitting_meter(
    name: str, mode: str, task: str, size: tuple[int, int], settings: SpeedSettings, device: torch.device
) -> tuple[Meter, int]:
    """Return a meter that has run twice, and its images a batch: halved until the device's memory is enough."""
    while True:
        try:
            meter = Meter(name, mode, task, size, settings, device)
            meter()
            meter()
            return meter, settings.batch_size
        except torch.OutOfMemoryError:
            if settings.batch_size == 1:
                raise
        meter = None
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()
        settings = replace(settings, batch_size=settings.batch_size // 2)
