"""A file in its runtime beside the model in PyTorch: outputs, speed, and images that it must refuse or get right."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import CALIBRATION_IMAGES
from ..data.images import UNREADABLE, evaluation_loader, image_count
from ..errors import UserError
from ..files import new_file
from ..sizes import size_name
from .formats import ExportSpec, Format, Runtime, as_list

__all__ = ["RuntimeModule", "calibration_batches", "image_source", "write_verified"]

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
MakeImages = Callable[[int, tuple[int, int]], Tensor]


# Images


def image_source(config: dict, dataset: Dataset | None, workers: int = 0) -> MakeImages:
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
    batches = []
    for pixels, target in evaluation_loader(dataset, config, CPU, batch_size, workers, 0, step):
        if (target != UNREADABLE).all() and len(pixels) == batch_size:
            batches.append(pixels)
        if len(batches) * batch_size >= CALIBRATION_IMAGES:
            break
    if not batches:
        raise UserError(f"--quantize static needs {batch_size} readable images or more in the calibration split")
    return batches


def sample_sizes(spec: ExportSpec) -> list[tuple[int, tuple[int, int]]]:
    """Return three kinds of images to compare with, as their number and their height and width."""
    height, width = spec.size
    sizes = [spec.size] * 3
    if spec.settings.dynamic_size:  # beside the first: a rectangle, and odd numbers
        odd = height * 3 // 4 | 1, width + 1 | 1
        sizes = [spec.size, (height, width * 3 // 2), tuple(map(max, odd, spec.least_size))]
    return [(spec.settings.batch or number, size) for number, size in zip((1, 3, 16), sizes)]


def other_sizes(spec: ExportSpec) -> list[tuple[int, tuple[int, int]]]:
    """Return images that are not those of ``sample_sizes``, in the same form, for a file to refuse or to get right."""
    height, width = spec.size
    sizes = [(height + 4, width + 12), (-(-height // 2), -(-width // 2))]
    neighbors = sorted({-1, 1, *(stride - 1 for stride in spec.strides)})  # maps of a neighbor may have the same grid
    sizes += [(height + more, width + more) for more in neighbors if min(height, width) + more > 0]
    if spec.settings.dynamic_size:
        sizes += [spec.least_size, tuple(max(1, side - 1) for side in spec.least_size)]
    batch = spec.settings.batch or 1
    return [(batch, size) for size in sizes] + [(batch + 1, spec.size)]


# Outputs and speed


def write_verified(
    path: Path, content: bytes, file_format: Format, spec: ExportSpec, reference: nn.Module, make_images: MakeImages
) -> tuple[Runtime, list[dict]]:
    """Write a file if its runtime gives the numbers of ``reference``, the module in PyTorch in float32.

    Returns:
        The file in its runtime, and a row for each sample: the largest difference as a share of the largest value, and
        both's milliseconds.

    Raises:
        UserError: If the file lacks metadata, differs, or gives a wrong answer to images that it should refuse.
    """
    runtime = file_format.runtime
    with new_file(path) as temporary:
        temporary.write_bytes(content)
        _logger.info(f"loading it in {runtime} ...")
        run, metadata = file_format.run(temporary)
        if missing := spec.metadata.keys() - metadata.keys():
            raise UserError(f"{runtime} does not find {sorted(missing)} in the file: it is not written")
        _logger.info(f"{'images':>15}  largest difference  {'PyTorch':>10}  {runtime:>14}")
        rows = [compare(reference, run, make_images, spec, *sample) for sample in sample_sizes(spec)]
        refused = try_inputs(reference, run, make_images, spec)
        _logger.info(f"tried too, and refused by the file: {', '.join(refused) or 'nothing'}")
    return run, rows


@torch.inference_mode()
def compare(
    reference: nn.Module, run: Runtime, make_images: MakeImages, spec: ExportSpec, number: int, size: tuple[int, int]
) -> dict:
    """Return the row of one sample; in half or 8-bit precision any finite difference is allowed."""
    name, images = f"{number} x {size_name(size)}", make_images(number, size)
    difference = check(name, run(images), as_list(reference(images)), output_limit(spec))
    pytorch_ms, runtime_ms = milliseconds_in_turns(images, reference, run)
    times = f"{pytorch_ms:7.2f} ms  {runtime_ms:11.2f} ms  {pytorch_ms / runtime_ms:.2f} times as fast"
    _logger.info(f"{name:>15}  {difference:18.1e}  {times}")
    return dict(images=name, difference=difference, pytorch_ms=pytorch_ms, runtime_ms=runtime_ms)


@torch.inference_mode()
def try_inputs(reference: nn.Module, run: Runtime, make_images: MakeImages, spec: ExportSpec) -> list[str]:
    """Give a file images of other strides, type, size and number; return which it refuses, the rest being right."""
    images = make_images(spec.settings.batch or 1, spec.size)
    own, limit = run(images), min(output_limit(spec), COARSE_LIMIT)
    trials = [(name, change(images), own, limit) for name, change in SAME_VALUES.items()]
    for number, size in other_sizes(spec):
        images = make_images(number, size)
        trials.append((f"{number} x {size_name(size)}", images, attempt(reference, images), output_limit(spec)))
    refused = []
    for name, images, expected, limit in trials:
        if outputs := attempt(run, images):
            check(name, outputs, expected, limit)
        else:
            refused.append(name)
    return refused


def output_limit(spec: ExportSpec) -> float:
    """Return what a file may differ from PyTorch in float32."""
    return LIMIT if spec.settings.precision == "float32" else sys.float_info.max


def attempt(function: Callable[[Tensor], Tensor | Sequence[Tensor]], images: Tensor) -> list[Tensor]:
    """Return what a function gives for images, nothing if it raises an error, which models and runtimes do of any kind.

    AOTInductor prints errors that it raises too: that is discarded.
    """
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        return as_list(function(images))
    except Exception:
        return []
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def check(name: str, actual: list[Tensor], expected: list[Tensor], limit: float) -> float:
    """Return the largest difference of outputs as a share of each one's largest value; infinite for other shapes.

    Raises:
        UserError: If it is more than the limit; ``name`` is that of the images.
    """
    difference = float("inf")
    if [y.shape for y in actual] == [y.shape for y in expected]:
        pairs = zip(actual, expected)
        shares = [torch.zeros(()) if torch.equal(a, e) else (a - e).abs().max() / e.abs().max() for a, e in pairs]
        difference = torch.stack(shares).max().item()  # NaN if one is
    if not difference <= limit:
        raise UserError(
            f"the file gives a wrong answer for {name}, off by {difference:.2g} of the largest value: it is not written"
        )
    return difference


def milliseconds_in_turns(images: Tensor, *functions: Callable[[Tensor], object]) -> list[float]:
    """Return the median milliseconds of a call of each function with the images; they take turns."""
    from torch.utils.benchmark import Timer  # it loads setuptools, which changes sys.path

    threads = torch.get_num_threads()
    timers = [Timer("run(images)", globals=dict(run=run, images=images), num_threads=threads) for run in functions]
    rounds = [[timer.blocked_autorange(min_run_time=0.05).median for timer in timers] for _ in range(3)]
    return [1000 * median(times) for times in zip(*rounds)]


class RuntimeModule(nn.Module):
    """A file in its runtime as a module of logits; smaller batches are filled up to its own batch, None for any."""

    def __init__(self, run: Runtime, batch: int | None):
        super().__init__()
        self.run, self.batch = run, batch

    def forward(self, images: Tensor) -> Tensor:
        missing = (self.batch or len(images)) - len(images)
        padded = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
        return self.run(padded)[0][: len(images)]
