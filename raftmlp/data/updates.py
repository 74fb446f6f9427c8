"""The updates of a run: which image size each has, and how its images are split among the processes.

Both are functions of the seed, the epoch and the update alone, so that they are the same in every process, and in a run
that is resumed.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from ..errors import MissingPackageError, UserError
from ..settings import Count, NonNegative, Settings, option, settings, several
from ..sizes import parse_size, size_name

__all__ = ["BatchSplit", "SizeSettings", "Updates", "share_batches"]

_logger = logging.getLogger(__name__)


def normal_size(text: str) -> str:
    """Return a size "N" or "HxW" in its shortest form.

    Raises:
        UserError: If it is no size.
    """
    return size_name(parse_size(text))


@settings
class SizeSettings(Settings):
    """At which image sizes to train, where there are several.

    Raises:
        UserError: If they do not fit each other.
    """

    title = "several image sizes"
    train_img_sizes: several(Annotated[str, AfterValidator(normal_size)]) | None = option(
        None,
        "train at these image sizes: every update has one of them, drawn by seed, epoch and update; the trained grid "
        "and the evaluation keep --img-size; with --compile the graphs are for free sizes from the second size on",
        metavar="N|HxW",
    )
    train_batch_sizes: several(Count) | None = option(
        None,
        "images a batch and process for each of them (default: --batch-size for all); without --global-batch-size an "
        "update has one batch a process, and with its size the number of its images changes",
    )
    train_size_probs: several(NonNegative) | None = option(
        None,
        "how probable each of them is, up to a common factor (default: all alike)",
    )
    train_size_schedule: Literal["constant", "progressive"] = option(
        "constant",
        "progressive: from the first size in the first epoch to the last in the last, others now and then",
    )
    variable_batch_loss_scale: bool = option(
        False, "multiply the loss of an update by its images over the average, where their number changes"
    )

    def __post_init__(self):
        if not self.train_img_sizes:
            return
        sizes = self.train_img_sizes
        shown = " ".join(sizes)
        if len(set(sizes)) < len(sizes):
            raise UserError(f"--train-img-sizes must differ, not {shown}")
        for name, values in (("batch-sizes", self.train_batch_sizes), ("size-probs", self.train_size_probs)):
            if values is not None and len(values) != len(sizes):
                raise UserError(
                    f"--train-{name} takes a number for each of the {len(sizes)} --train-img-sizes {shown}, not "
                    f"{len(values)}: {' '.join(map(str, values))}"
                )
        if self.train_size_probs is not None and not 0 < sum(self.train_size_probs) < math.inf:
            shown = " ".join(map(str, self.train_size_probs))
            raise UserError(f"--train-size-probs must add up to a number above 0, not {shown}")
        if self.train_size_schedule == "progressive" and len(sizes) == 1:
            raise UserError(
                f"--train-size-schedule progressive takes two --train-img-sizes or more, not {sizes[0]} alone"
            )


@dataclass(frozen=True)
class BatchSplit:
    """How the images of an update are split: ``steps`` batches of ``batch_size`` for each process."""

    batch_size: int
    steps: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def images(self) -> int:
        """Images of an update, those of all processes."""
        return self.batch_size * self.steps * self.world_size


def share_batches(batch_size: int, global_batch_size: int | None, rank: int = 0, world_size: int = 1) -> BatchSplit:
    """Return how an update's images are split, in batches of ``batch_size`` or less; None is one batch per process.

    Raises:
        UserError: If the processes cannot have equal shares.
    """
    total = global_batch_size or batch_size * world_size
    images, rest = divmod(total, world_size)
    if rest or not images:
        raise UserError(f"--global-batch-size {total} cannot be shared among {world_size} processes")
    largest = size = min(images, batch_size)
    while images % size:
        size -= 1
    if size < largest / 2:
        _logger.info(
            f"note: batches of {size} images, not of {batch_size}: a process's share of an update, {images} images, "
            f"divides into no others"
        )
    return BatchSplit(size, images // size, rank, world_size)


class Updates:
    """The updates of a run on so many images, each at one of some sizes; all epochs have as many updates.

    ``fixed_images`` is the number of images of every update, None where it changes with the size.

    Args:
        images: Images to train on.
        sizes: The sizes, as (height, width).
        shares: How an update's images are split, for each size.
        probs: How probable each size is; None for all alike.
        schedule: "constant", or "progressive" from the first size to the last over the epochs.
        epochs: Epochs of the run.
        seed: Random seed.
    """

    def __init__(
        self,
        images: int,
        sizes: Sequence[tuple[int, int]],
        shares: Sequence[BatchSplit],
        probs: Sequence[float] | None = None,
        schedule: str = "constant",
        epochs: int = 1,
        seed: int = 0,
    ):
        self.sizes, self.shares = sizes, shares
        self.images, self.probs, self.schedule, self.epochs, self.seed = images, probs, schedule, epochs, seed
        counts = {share.images for share in shares}
        self.fixed_images = counts.pop() if len(counts) == 1 else None
        self.average_images = self.fixed_images or self._sampler(1).average_batch_size
        self.per_epoch = int(images // self.average_images)
        self._epoch, self._choices = -1, []

    def _sampler(self, updates: int):
        """Return timm's sampler, which draws the sizes of an epoch of so many updates."""
        try:
            from timm.data import ScheduledBatchSampler
        except ImportError as error:
            raise MissingPackageError("--train-img-sizes needs a newer timm: pip install 'timm>=1.0.31'") from error
        batch_sizes = [share.images for share in self.shares]
        schedule = dict(num_batches=updates, choice_schedule=self.schedule, schedule_epochs=self.epochs)
        return ScheduledBatchSampler(range(self.images), batch_sizes, self.probs, self.seed, **schedule)

    def choice(self, epoch: int, update: int) -> int:
        """Return which of the sizes an update has."""
        if len(self.sizes) == 1:
            return 0
        if epoch != self._epoch:
            sampler = self._sampler(self.per_epoch)
            sampler.set_epoch(epoch)
            self._epoch, self._choices = epoch, [choice for choice, _ in sampler.schedule]
        return self._choices[update]

    def share(self, epoch: int, update: int) -> BatchSplit:
        """Return how the images of an update are split."""
        return self.shares[self.choice(epoch, update)]

    def counts(self, epoch: int) -> dict[str, int]:
        """Return how many updates of an epoch have each size, by its name."""
        counts = Counter(self.choice(epoch, update) for update in range(self.per_epoch))
        return {size_name(size): counts[i] for i, size in enumerate(self.sizes)}

    def mean_images(self, epoch: int) -> float:
        """Return the mean number of images of an epoch's updates."""
        if len(self.sizes) == 1:
            return self.shares[0].images
        return sum(self.share(epoch, update).images for update in range(self.per_epoch)) / self.per_epoch
