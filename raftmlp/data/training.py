"""Batches to train on, reproducible.

Every random number of training is a function of the seed and of the position in the run (epoch, image, update), and of
nothing before it. That is why an interrupted run resumes bit for bit, whatever the number of workers, and why several
processes see the same augmented images as one that accumulates their batches.
"""

import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ..device import pins_memory
from ..errors import UserError, first_words
from ..sizes import check_memory
from .datasets import class_names
from .images import file_name, read_image, read_stream
from .pixels import PixelReader
from .settings import TrainingDataSettings
from .updates import Updates
from .workers import ignore_signals

__all__ = ["Batches", "TrainingImages", "TrainingLoader", "check_splits", "seed_everything"]

_logger = logging.getLogger(__name__)


def seed_everything(*key: int) -> None:
    """Seed the random numbers of Python, NumPy and torch with a function of some numbers."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    if get_worker_info():  # uses no device, whose generators take long to seed
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def check_splits(train_data: Dataset, val_data: Dataset, share_root: bool = False) -> list[int] | None:
    """Refuse images that are the same for training and evaluation, or that are to be evaluated on other classes.

    ``share_root`` says that they are parts of the same images, which have none in common.

    Returns:
        The number in training of each class to evaluate on, where these are fewer; None where they are the same.
    """
    train_names, val_names = class_names(train_data), class_names(val_data)
    classes = None
    if train_names and val_names and train_names != val_names:
        if not set(val_names) <= set(train_names):
            odd = sorted(set(train_names) ^ set(val_names))
            raise UserError(
                f"the {len(train_names)} classes to train on are not the {len(val_names)} to evaluate on: {odd[:5]} "
                f"{'and others ' if len(odd) > 5 else ''}belong to one of them only"
            )
        classes = [train_names.index(name) for name in val_names]
        if missing := [name for name in train_names if name not in val_names]:
            _logger.warning(
                f"note: no images to evaluate on of {len(missing)} of the {len(train_names)} classes: {missing[:5]}"
                f"{' and others' if len(missing) > 5 else ''}; the model chooses among all classes of training"
            )
    readers = [getattr(data, "reader", None) for data in (train_data, val_data)]
    if not share_root and all(isinstance(reader, (ReaderImageFolder, ReaderImageInTar)) for reader in readers):
        train_root, val_root = (Path(reader.root).resolve() for reader in readers)
        if train_root == val_root or train_root in val_root.parents or val_root in train_root.parents:
            raise UserError(
                f"images to train on in {train_root} and to evaluate on in {val_root} overlap: put them into "
                f"train/ and val/ of the data folder, or name the sub-folders with --train-split and --val-split"
            )
    return classes


class Batches(Sampler):
    """The order of training: every epoch shuffled by seed and epoch, cut into batches, the same for any process count.

    The images of an update are cut into ``steps * world_size`` batches; process r takes the batches r, r + world_size,
    ... of them, one a step. An epoch whose updates have more images than there are begins again with its first ones.
    Yields lists of (epoch, image, size) for ``TrainingImages``; size is the number of one of the sizes of ``updates``.
    """

    def __init__(self, images: int, updates: Updates, seed: int):
        self.images, self.updates, self.seed = images, updates, seed
        self.epoch = self.first_update = 0

    def start_at(self, epoch: int, update: int) -> None:
        """Let the next pass be of this epoch, from this update of it on."""
        self.epoch, self.first_update = epoch, update

    def images_of(self, epoch: int, update: int) -> np.ndarray:
        """Return the images of an update, those of all processes."""
        return next(islice(self._cut(epoch), update, None))

    def _cut(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the images of each update of an epoch."""
        order, start = np.random.default_rng((self.seed, epoch)).permutation(self.images), 0
        for update in range(self.updates.per_epoch):
            end = start + self.updates.share(epoch, update).images
            yield order.take(range(start, end), mode="wrap")
            start = end

    def __len__(self) -> int:
        updates = range(self.first_update, self.updates.per_epoch)
        return sum(self.updates.share(self.epoch, update).steps for update in updates)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, first = self.epoch, self.first_update
        for update, images in enumerate(islice(self._cut(epoch), first, None), first):
            share, size = self.updates.share(epoch, update), self.updates.choice(epoch, update)
            for batch in images.reshape(-1, share.batch_size)[share.rank :: share.world_size]:
                yield [(epoch, int(index), size) for index in batch]


class TooManyUnreadable(Exception):
    """Several images in a row could not be read."""


class TrainingImages(Dataset):
    """The augmented images of a dataset as uint8 tensors (C, H, W), by (epoch, index, size): the same at every call.

    Each size has a transform of its own; the random numbers of an image are the same for all of them.
    An image that cannot be read is replaced by the next one, ``max_bad_images`` in a row at most; a line in the file
    ``bad_images`` has its name and the reason.
    """

    def __init__(
        self,
        dataset: Dataset,
        transforms: Sequence[Callable],
        pixels: PixelReader,
        seed: int,
        bad_images: Path,
        max_bad_images: int,
    ):
        self.dataset, self.transforms, self.pixels, self.seed = dataset, transforms, pixels, seed
        self.bad_images, self.max_bad_images = bad_images, max_bad_images

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        epoch, index, size = key
        for offset in range(min(self.max_bad_images + 1, len(self.dataset))):
            candidate = (index + offset) % len(self.dataset)
            try:
                image, target = read_image(self.dataset, candidate, self.pixels)
            except Exception as error:  # PIL raises anything on bytes that are not an image
                reason = re.sub(r" <_io\S* name=.*?>", "", first_words(error))
                with self.bad_images.open("a", errors="backslashreplace") as file:  # one write a line: they do not mix
                    file.write(f"{file_name(self.dataset, candidate)}\t{reason}\n")
                continue
            seed_everything(self.seed, 0, epoch, index)
            return self.transforms[size](image), target
        raise TooManyUnreadable


class TrainingLoader:
    """Batches of normalized, augmented images (B, C, H, W) on the device and classes (B,), reproducible by seed.

    Args:
        dataset: Any dataset of images and classes.
        transforms: For each size of the updates, what makes an augmented uint8 tensor (C, H, W) of an image.
        config: How images are prepared, see ``data_config``; its size does not count.
        device: Where the batches go.
        updates: The sizes and the numbers of images of the updates.
        settings: Those of the workers, and of images that cannot be read.
        seed: Random seed.
        bad_images: The file that names the images that could not be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        transforms: Sequence[Callable],
        config: dict,
        device: torch.device,
        updates: Updates,
        settings: TrainingDataSettings,
        seed: int,
        bad_images: Path,
    ):
        self.dataset, self.updates, self.seed = dataset, updates, seed
        self.bad_images, self.max_bad_images = bad_images, settings.max_bad_images
        self._named, self._size = set(), 0
        workers, channels = settings.workers, config["input_size"][0]
        for size, share in zip(updates.sizes, updates.shares):
            check_memory((channels, *size), share.batch_size)
        self.pixels = PixelReader.from_config(config)
        common = dict(collate_fn=fast_collate, pin_memory=pins_memory(device), worker_init_fn=ignore_signals)
        self.batches = None
        if isinstance(dataset, IterableDataset):
            # a stream: its order is its reader's; workers start again every epoch, with seeds of that epoch
            if len(updates.sizes) > 1:
                raise UserError("--train-img-sizes takes one size for a stream: its readers make batches of one size")
            workers = self._stream_workers(workers)
            images = read_stream(dataset, self.pixels, transforms[0], workers)
            loader = DataLoader(images, share.batch_size, num_workers=workers, drop_last=True, **common)
            self.updates_per_epoch = len(loader) // share.steps
        else:
            self.batches = Batches(len(dataset), updates, seed)
            images = TrainingImages(dataset, transforms, self.pixels, seed, bad_images, self.max_bad_images)
            workers = dict(num_workers=workers, persistent_workers=workers > 0)
            loader = DataLoader(images, batch_sampler=self.batches, **workers, **common)
            self.updates_per_epoch = updates.per_epoch
        self.loader = PrefetchLoader(loader, config["mean"], config["std"], channels=channels, device=device)

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from one of its updates on, the ``steps`` of its share for every update.

        Raises:
            UserError: If too many images cannot be read, or the dataset ends too early.
        """
        seed_everything(self.seed, 1, epoch, self.updates.shares[0].rank)  # of the workers of a stream
        if self.batches is not None:
            self.batches.start_at(epoch, first_update)
            count, skipped = len(self.batches), 0
        else:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            steps = self.updates.shares[0].steps
            count, skipped = (self.updates_per_epoch - first_update) * steps, first_update * steps
        batches = iter(self.loader)
        try:
            for _ in range(skipped):
                next(batches)
            for _ in range(count):
                yield next(batches)
                self.pixels.say_what_was_seen()
                self.check_bad_images()
        except TooManyUnreadable as error:
            last = self.bad_images.read_text(errors="backslashreplace").splitlines()[-1]
            raise UserError(
                f"more images in a row than --max-bad-images {self.max_bad_images} cannot be read; the last one: {last}"
            ) from error
        except StopIteration as error:
            raise UserError("the dataset ended before the epoch did: it has fewer images than it says") from error

    def end_workers(self) -> None:
        """End the processes that load images; the next epoch starts others."""
        self.loader.loader._iterator = None  # torch ends them when their iterator is gone

    def _stream_workers(self, wanted: int) -> int:
        """Return how many processes read a stream: at least one, and none without a shard of its own."""
        split = getattr(getattr(self.dataset, "reader", None), "split_info", None)
        shards = len(getattr(split, "filenames", ()))
        if not shards:
            return max(1, wanted)
        processes = self.updates.shares[0].world_size
        if shards < processes:
            raise UserError(f"{shards} shards cannot be shared among {processes} processes")
        return max(1, min(wanted, shards // processes))

    def check_bad_images(self) -> None:
        """Name the images that could not be read since the last call; a UserError is raised if they are too many."""
        size = self.bad_images.stat().st_size if self.bad_images.exists() else 0
        if size == self._size:
            return
        self._size, text = size, self.bad_images.read_text(errors="backslashreplace")
        for line in text.splitlines(keepends=True):
            name, _, reason = line.partition("\t")
            if line.endswith("\n") and name not in self._named:  # not a line that is being written
                self._named.add(name)
                _logger.info(
                    f"cannot read {name}: {reason[:-1]}; the next image replaces it ({len(self._named)} so far)"
                )
        if len(self._named) > self.max_bad_images:
            raise UserError(
                f"{len(self._named)} images could not be read, more than --max-bad-images {self.max_bad_images}: "
                f"{self.bad_images} names them"
            )

    @property
    def bad_image_count(self) -> int:
        """How many images could not be read so far."""
        return len(self._named)

    def names(self, epoch: int, update: int) -> list[str]:
        """Return the files of an update's images, those of all processes; none for a stream."""
        if self.batches is None:
            return []
        return [file_name(self.dataset, int(index)) for index in self.batches.images_of(epoch, update)]
