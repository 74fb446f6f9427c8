"""The accuracy of classifiers over a data set: figures of a loader, and rows of results, a model at an image size."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..config import DeviceSettings, ModelSettings
from ..data.datasets import class_names
from ..data.images import UNREADABLE, data_config, evaluation_loader, file_name
from ..data.settings import ImageSettings
from ..errors import UserError, first_words
from ..model.create import create_model
from ..sizes import check_memory, size_name
from .labels import are_synsets, matching_outputs, model_class_names, readable_names

_logger = logging.getLogger(__name__)

__all__ = [
    "ClassifierView", "PreparedModel", "check_sizes", "evaluate", "evaluate_prepared", "prepare_model", "run_once",
    "warn_of_random_weights",
]  # fmt: skip


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    autocast: AbstractContextManager | None = None,
    on_batch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    distributed: bool = False,
    progress: bool = True,
) -> dict[str, float]:
    """Return a model's figures over a loader: loss, top1 and top5 in percent, images, unread, images_per_second.

    Args:
        model: Any classifier; it is put into eval mode.
        loader: Batches of normalized images (B, C, H, W) and classes (B,); those of class UNREADABLE do not count.
        device: Where the model is.
        autocast: The context that the model runs in; None for none.
        on_batch: Called with every batch's images, classes and logits (B, num_classes).
        distributed: Add up over the processes; each has its own part of the images.
        progress: Show a progress bar where there is a terminal.

    Raises:
        UserError: If the data has a class that the model has not.
    """
    model.eval()
    totals = ClassificationEvaluator(device)
    start, unread = time.perf_counter(), 0
    bar = tqdm(loader, desc="evaluating", unit=" batches", leave=False, disable=None if progress else True)
    for images, target in bar:
        with autocast or nullcontext():
            logits = model(images)
        logits = logits.float()
        if target.max() >= logits.shape[1]:
            raise UserError(f"the data has a class {target.max()}, the model has {logits.shape[1]} classes")
        read = target != UNREADABLE
        totals.update(logits[read], target[read])
        unread += len(target) - int(read.sum())
        if on_batch:
            on_batch(images, target, logits)
    counts = torch.tensor([totals.num_samples, unread], device=device)
    if distributed:
        torch.distributed.all_reduce(counts)
    images, unread = counts.tolist()
    rate = images / (time.perf_counter() - start)
    return dict(**totals.compute(distributed), images=images, unread=unread, images_per_second=rate)


class ClassifierView(nn.Module):
    """A classifier as it is evaluated on other data: logits (B, classes) of images (B, C, H, W).

    Args:
        model: The classifier.
        outputs: The model's outputs that count, one a class of the data, in their order; None for all.
        mirror: Average the probabilities of every image and its mirror image.
        memory_format: Memory format of the images.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: list[int] | None = None,
        mirror: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        super().__init__()
        self.model, self.mirror, self.memory_format = model, mirror, memory_format
        self.register_buffer("outputs", None if outputs is None else torch.tensor(outputs))

    def forward(self, images: Tensor) -> Tensor:
        logits = self._logits(images)
        if self.mirror:  # the logarithm of probabilities, up to a constant, is a set of logits for them
            mirrored = self._logits(images.flip(-1))
            logits = torch.logaddexp(logits.log_softmax(1), mirrored.log_softmax(1))
        return logits

    def _logits(self, images: Tensor) -> Tensor:
        logits = self.model(images.contiguous(memory_format=self.memory_format)).float()
        return logits if self.outputs is None else logits[:, self.outputs]


# Models at an image size


@dataclass
class PreparedModel:
    """A model ready for images of one size.

    Attributes:
        name: The model's name.
        weights: Where its weights come from: a file, "pretrained" or "random".
        model: The model, in eval mode, on the CPU.
        config: How images are prepared for it, see ``data_config``.
        outputs: The model's outputs that count, one a class of the data; None for all.
        classes: The model's class for each class of the data, where all outputs count; None where these are the same.
        names: Names of the classes that are evaluated, None where the data tell none.
        failure: Why it cannot take images of this size, or so many at once.
    """

    name: str
    weights: str
    model: nn.Module
    config: dict
    outputs: list[int] | None = None
    classes: list[int] | None = None
    names: list[str] | None = None
    failure: str = ""

    def description(self) -> dict[str, Any]:
        """Return the part of a row of results that says what the model is."""
        parameters = sum(p.numel() for p in self.model.parameters())
        about = dict(
            model=self.name, weights=self.weights, parameters=parameters, img_size=self.config["input_size"][-2:]
        )
        return {**about, "failure": self.failure} if self.failure else about

    def match(self, dataset: Dataset) -> None:
        """Find the outputs for the classes of the data: all of them, or for a part of ImageNet those of the part.

        Raises:
            UserError: If the model does not know these classes.
        """
        names = class_names(dataset)
        self.outputs, self.names = matching_outputs(names, self.model), readable_names(names)
        if self.outputs and not are_synsets(names):  # as in training
            self.outputs, self.classes, self.names = None, self.outputs, model_class_names(self.model)


def prepare_model(
    settings: ModelSettings, images: ImageSettings, model: nn.Module | None = None, classes: int | None = None
) -> PreparedModel:
    """Return a model, made of the settings unless it is given, with how images are prepared for it.

    ``classes`` is its number of classes if nothing else says it.
    """
    model = create_model(settings, classes=classes).eval() if model is None else model
    return PreparedModel(settings.name(model), settings.weights, model, data_config(images, model, settings.size))


def warn_of_random_weights(models: Iterable[PreparedModel]) -> None:
    """Log which models have random weights, if any has."""
    names = ", ".join(dict.fromkeys(prepared.name for prepared in models if prepared.weights == "random"))
    if names:
        _logger.warning(f"note: without --pretrained or --checkpoint, the weights of {names} are random")


@torch.inference_mode()
def run_once(model: nn.Module, name: str, input_size: tuple[int, int, int], batch_size: int = 1) -> Any:
    """Return what a model gives for one black image of shape input_size (C, H, W).

    Raises:
        UserError: If it takes no such image, or ``batch_size`` of them are larger than the memory.
    """
    try:
        check_memory(input_size, batch_size)
        return model(torch.zeros(1, *input_size, device=next(model.parameters()).device))
    except Exception as error:  # models raise anything on sizes that they cannot take
        size = size_name(input_size[1:])
        raise UserError(f"{name} takes no images of {size} pixels: {first_words(error)}") from error


def check_sizes(model: nn.Module, name: str, shapes: Sequence[tuple[int, int, int]], where: str) -> None:
    """Refuse images of shapes (C, H, W), which come from ``where``, that a model cannot take; it is in eval mode then.

    Raises:
        UserError: If there is one.
    """
    for shape in shapes:
        run_once(model.eval(), f"{where}: {name}", shape)


def evaluate_prepared(
    prepared: PreparedModel,
    dataset: Dataset,
    device: torch.device,
    settings: DeviceSettings,
    batch_size: int,
    workers: int = 0,
    mirror: bool = False,
    collectors: Sequence[Any] = (),
) -> dict[str, Any]:
    """Return a row of results: what the model is, how images are prepared, and the figures of ``evaluate``.

    A model that cannot take the images has a ``failure`` in place of figures. ``collectors`` are objects whose ``add``
    takes every batch's images, classes and logits.

    Raises:
        UserError: If no image can be read.
    """
    if prepared.failure:
        return prepared.description()
    model = prepared.model.to(device, memory_format=settings.memory_format)
    if settings.compile:
        torch.compiler.reset()  # every size is compiled for itself
        model = torch.compile(model)
    classifier = ClassifierView(model, prepared.outputs, mirror, settings.memory_format).to(device)
    loader = evaluation_loader(dataset, prepared.config, device, batch_size, workers, classes=prepared.classes)

    def on_batch(*batch: Tensor) -> None:
        for collector in collectors:
            collector.add(*batch)

    try:
        figures = evaluate(classifier, loader, device, settings.autocast(device), on_batch)
    except torch.OutOfMemoryError:
        prepared.failure = f"{prepared.name}: --batch-size {batch_size} is too much for the memory"
        return prepared.description()
    finally:
        prepared.model.to("cpu")
    if not figures["images"]:
        raise UserError(f"none of the {figures['unread']} images can be read: {file_name(dataset, 0)} ...")
    preparation = {key: prepared.config[key] for key in ("crop_pct", "interpolation")}
    return {**prepared.description(), **preparation, **figures}
