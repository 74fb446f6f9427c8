"""The accuracy of a classifier over a data set."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from tqdm import tqdm

from ..data.images import UNREADABLE
from ..errors import UserError

__all__ = ["ClassifierView", "evaluate"]


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
        loader: Batches of normalised images (B, C, H, W) and classes (B,); those of class UNREADABLE do not count.
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
    bar = tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=None if progress else True)
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
