"""A file in its runtime beside the model in PyTorch: outputs, speed and accuracy."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import CALIBRATION_IMAGES
from ..data.images import UNREADABLE, evaluation_loader, image_count
from ..errors import UserError, first_words
from ..evaluate.evaluation import ClassifierView, PreparedModel, evaluate
from ..evaluate.speed import clock, iterations_in
from ..files import new_file
from ..sizes import size_name
from .formats import Format, Graph, Runtime, as_list
from .stages import show_stage

__all__ = [
    "RuntimeModule", "accuracy", "calibration_batches", "compare", "image_source", "sample_sizes", "try_inputs",
    "write_verified",
]  # fmt: skip

_logger = logging.getLogger(__name__)

LIMIT = 1e-4  # of the largest value: what a file in float32 may differ from PyTorch
COARSE_LIMIT = 0.1  # what a file in half or 8-bit precision may differ from itself
SAME_VALUES: dict[str, Callable[[Tensor], Tensor]] = {  # other strides and types of the same images
    "a permuted view": lambda images: images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "channels-last": lambda images: images.to(memory_format=torch.channels_last),
    "every second column": lambda images: images.repeat_interleave(2, 3)[..., ::2],
    "float64": lambda images: images.double(),
}
CPU = torch.device("cpu")


# Images


def sample_sizes(graph: Graph) -> list[tuple[int, tuple[int, int]]]:
    """Return three kinds of images to compare with, as their number and their height and width."""
    height, width = graph.size
    sizes = [graph.size] * 3
    if graph.settings.dynamic_size:  # beside the first: a rectangle, and odd numbers
        odd = height * 3 // 4 | 1, width + 1 | 1
        sizes = [graph.size, (height, width * 3 // 2), tuple(map(max, odd, graph.least_size))]
    return [(graph.settings.batch or number, size) for number, size in zip((1, 3, 16), sizes)]


def image_source(config: dict, dataset: Dataset | None, workers: int = 0) -> Callable[[int, tuple[int, int]], Tensor]:
    """Return a function that makes a number of images of a height and width: the data's if there are, else noise."""
    channels = config["input_size"][0]

    def make_images(number: int, size: tuple[int, int]) -> Tensor:
        if dataset is None:
            return torch.randn(number, channels, *size)
        resized = {**config, "input_size": (channels, *size)}
        images, _ = next(iter(evaluation_loader(dataset, resized, CPU, number, workers)))
        return images.repeat(-(-number // len(images)), 1, 1, 1)[:number]

    return make_images


def calibration_batches(dataset: Dataset, config: dict, batch_size: int, workers: int = 0) -> list[Tensor]:
    """Return batches of up to 256 images, taken evenly from the whole data set; only whole and readable batches count.

    Raises:
        UserError: If there is no such batch.
    """
    step = max(1, -(-image_count(dataset) // CALIBRATION_IMAGES))
    batches, images = [], 0
    for pixels, target in evaluation_loader(dataset, config, CPU, batch_size, workers, 0, step):
        if (target != UNREADABLE).all() and len(pixels) == batch_size:
            batches.append(pixels)
            images += len(pixels)
        if images >= CALIBRATION_IMAGES:
            break
    if not batches:
        raise UserError(f"--quantize static needs {batch_size} readable images or more in the calibration split")
    return batches


# Outputs and speed


@torch.inference_mode()
def compare(
    reference: nn.Module,
    run: Runtime,
    runtime: str,
    make_images: Callable[[int, tuple[int, int]], Tensor],
    samples: list[tuple[int, tuple[int, int]]],
    limit: float | None,
) -> list[dict]:
    """Return a row for each sample: the largest difference as a share of the largest value, and both's milliseconds.

    Args:
        reference: The module in PyTorch, float32.
        run: The file in its runtime.
        runtime: The runtime's name.
        make_images: See ``image_source``.
        samples: Numbers of images with their heights and widths.
        limit: The largest difference that is allowed; None allows any that is finite.

    Raises:
        UserError: If the file does not run or differs more.
    """
    rows = []
    _logger.info(f"{'images':>15}  largest difference  {'PyTorch':>10}  {runtime:>14}")
    for number, size in samples:
        images = make_images(number, size)
        sample = f"{number} x {size_name(size)}"
        try:
            expected = as_list(reference(images))
        except Exception as error:  # models raise anything on sizes that they cannot take
            raise UserError(f"the model takes no {sample} images: {first_words(error)}") from error
        try:
            outputs = run(images)
        except Exception as error:  # runtimes raise anything
            raise UserError(f"{runtime} cannot run the file with {sample} images: {first_words(error)}") from error
        if [y.shape for y in outputs] != [y.shape for y in expected]:
            raise UserError(f"{runtime} gives shapes {[list(y.shape) for y in outputs]}: the file is not written")
        difference = max(map(relative_difference, outputs, expected))
        pytorch_ms, runtime_ms = milliseconds_in_turns(partial(reference, images), partial(run, images))
        _logger.info(
            f"{sample:>15}  {difference:18.1e}  {pytorch_ms:7.2f} ms  {runtime_ms:11.2f} ms  "
            f"{pytorch_ms / runtime_ms:.2f} times as fast"
        )
        if not difference <= (limit or sys.float_info.max):  # refuses NaN too
            raise UserError(
                f"{runtime} differs from PyTorch by {difference:.2g} of the largest value, allowed is "
                f"{limit or 'a finite number'}: the file is not written"
            )
        rows.append(dict(images=sample, difference=difference, pytorch_ms=pytorch_ms, runtime_ms=runtime_ms))
    return rows


@torch.inference_mode()
def try_inputs(
    reference: nn.Module,
    run: Runtime,
    runtime: str,
    make_images: Callable[[int, tuple[int, int]], Tensor],
    graph: Graph,
) -> list[str]:
    """Give a file images of other strides, type, size and number; return which it refuses, the rest being right.

    Args:
        reference: The module in PyTorch, float32.
        run: The file in its runtime.
        runtime: The runtime's name.
        make_images: See ``image_source``.
        graph: What the file shall hold.

    Raises:
        UserError: If the file gives another answer than it should.
    """
    is_exact = graph.settings.precision == "float32"
    images, (height, width) = make_images(graph.settings.batch or 1, graph.size), graph.size
    own = run(images)
    limit = LIMIT if is_exact else COARSE_LIMIT
    trials = [(name, change(images), own, limit) for name, change in SAME_VALUES.items()]
    sizes = [(height + 4, width + 12), (-(-height // 2), -(-width // 2))]
    neighbors = sorted({-1, 1, *(stride - 1 for stride in graph.strides)})  # maps of a neighbor may have the same grid
    sizes += [(height + more, width + more) for more in neighbors if min(height, width) + more > 0]
    if graph.settings.dynamic_size:
        sizes += [graph.least_size, tuple(max(1, side - 1) for side in graph.least_size)]
    shapes = [(len(images), size) for size in sizes] + [(len(images) + 1, graph.size)]
    for number, size in shapes:
        others = make_images(number, size)
        try:
            expected = as_list(reference(others))
        except Exception:  # models raise anything on sizes that they cannot take
            expected = []
        trials.append((f"{number} x {size_name(size)}", others, expected, LIMIT if is_exact else sys.float_info.max))
    refused = []
    for name, others, expected, limit in trials:
        try:
            with silent_stderr():
                outputs = run(others)
        except Exception:  # runtimes raise anything
            refused.append(name)
            continue
        is_right = [y.shape for y in outputs] == [y.shape for y in expected]
        if not is_right or not max(map(relative_difference, outputs, expected)) <= limit:
            raise UserError(f"{runtime} gives a wrong answer, and no error, for {name}: the file is not written")
    return refused


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard what runtimes print of errors that they raise too."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value; 0 if there is none."""
    if torch.equal(actual, expected):
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def milliseconds_in_turns(*functions: Callable[[], object], rounds: int = 3, seconds: float = 0.05) -> list[float]:
    """Return the median milliseconds of a call of each function; they take turns, each for so many seconds."""

    def turn(function: Callable[[], object], calls: int) -> float:
        time.sleep(0.02)  # the other function's threads wait in a busy loop for a while
        function()
        return clock(function, calls, CPU)

    for function in functions:
        function()
    counts = [iterations_in(seconds, function, CPU) for function in functions]
    times = [list(map(turn, functions, counts)) for _ in range(rounds)]
    return [1000 * median(values) for values in zip(*times)]


def write_verified(
    path: Path,
    content: bytes,
    file_format: Format,
    graph: Graph,
    reference: nn.Module,
    make_images: Callable[[int, tuple[int, int]], Tensor],
) -> tuple[Runtime, list[dict]]:
    """Write a file, made of the graph, if its runtime gives PyTorch's numbers; return it and the rows of ``compare``.

    Raises:
        UserError: If the file does not load or run, lacks metadata, or differs.
    """
    runtime = file_format.runtime
    with new_file(path) as temporary:
        temporary.write_bytes(content)
        try:
            with show_stage(f"loading it in {runtime}"):
                run, metadata = file_format.run(temporary)
        except Exception as error:  # runtimes raise anything
            raise UserError(f"{runtime} cannot load the file: {first_words(error)}") from error
        if missing := graph.metadata.keys() - metadata.keys():
            raise UserError(f"{runtime} does not find {sorted(missing)} in the file: it is not written")
        limit = LIMIT if graph.settings.precision == "float32" else None
        rows = compare(reference, run, runtime, make_images, sample_sizes(graph), limit)
        refused = try_inputs(reference, run, runtime, make_images, graph)
        _logger.info(accepted(graph, refused))
        return run, rows


def accepted(graph: Graph, refused: Sequence[str]) -> str:
    """Return which images a file takes and which it refuses, of those that ``try_inputs`` gave it."""
    size = "{}x{} pixels".format(*graph.size)
    if graph.settings.dynamic_size:
        size = f"any height and width from {size_name(graph.least_size)}"
    number = f"{graph.settings.batch} at a time" if graph.settings.batch else "any number at a time"
    also = ", ".join(name for name in SAME_VALUES if name not in refused)
    words = f"the file takes float32 images of {size}, {number}{also and f', also as {also}'}"
    return f"{words}; it refuses {', '.join(refused)}" if refused else f"{words}; it refused none of those tried"


# Accuracy


class RuntimeModule(nn.Module):
    """A file in its runtime as a module of logits; smaller batches are filled up to the one that the file takes.

    Args:
        run: The file in its runtime.
        batch: Images at a time, None for any.
    """

    def __init__(self, run: Runtime, batch: int | None):
        super().__init__()
        self.run, self.batch = run, batch

    def forward(self, images: Tensor) -> Tensor:
        missing = (self.batch or len(images)) - len(images)
        padded = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
        return self.run(padded)[0][: len(images)]


def accuracy(module: nn.Module, prepared: PreparedModel, dataset: Dataset, batch_size: int, workers: int = 0) -> dict:
    """Return the figures of ``evaluate`` of a module with the outputs of a prepared model."""
    loader = evaluation_loader(dataset, prepared.config, CPU, batch_size, workers, classes=prepared.classes)
    return evaluate(ClassifierView(module, prepared.outputs), loader, CPU)
