"""Images as batches: the options of data, evaluation in the data set's order, reproducible batches to train on.

Every random number of training is a function of --seed and of the place in the run (epoch, image, update), and of
nothing before it. That is why an interrupted run goes on bit for bit, whatever the number of workers, and why several
processes see the same augmented images as one that accumulates their batches.
"""

import argparse
import atexit
import multiprocessing
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IterableImageDataset, Mixup, create_loader, create_transform, resolve_data_config
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing as BatchErasing
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision.transforms import (
    ColorJitter,
    Compose,
    InterpolationMode,
    RandomAffine,
    RandomCrop,
    RandomErasing,
)

import cli
from raftmlp.data import class_names, create_dataset

UNREAD = -1  # the class of an image that could not be read, in evaluation


# Options and data sets


def add_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that say which data, and how images come to the model."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir", metavar="DIR", help="folder of the data set: of images as SPLIT/CLASS/IMAGE, of SPLIT.tar, ..."
    )
    group.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="'digits' (embedded); torch/cifar10, torch/flowers102, ... (torchvision's); inat/2018; hfds/NAME; wds/; "
        "or another of timm's; empty for a folder of images or tar files",
    )
    group.add_argument("--dataset-download", action="store_true", help="let torchvision fetch the data set")
    group.add_argument("--val-split", default="validation", metavar="NAME", help="split to evaluate on")
    group.add_argument(
        "-b", "--batch-size", type=cli.number(int, 1), default=128, metavar="N", help="images a batch and process"
    )
    group.add_argument(
        "-j",
        "--workers",
        type=cli.number(int, 0, 256),
        default=default_workers(),
        metavar="N",
        help="processes that load images, for each process that trains; 0 to load them in this one",
    )
    add_image_arguments(group)
    return group


def default_workers() -> int:
    """Return how many processes load images: up to 8, as many as there are processors for each process that trains."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, processors // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def add_image_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options that say how images are prepared."""
    group.add_argument(
        "--interpolation",
        choices=("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        help="resizing of images (default: the model's)",
    )
    group.add_argument(
        "--crop-pct",
        type=cli.number(float, 0.01, 1),
        metavar="X",
        help="share of the resized image in the crop (default: the model's)",
    )
    group.add_argument(
        "--mean", type=cli.number(float, 0), nargs="+", metavar="X", help="mean of the pixels (default: the model's)"
    )
    group.add_argument(
        "--std",
        type=cli.number(float, 1e-6),
        nargs="+",
        metavar="X",
        help="deviation of the pixels (default: the model's)",
    )


def create_data(args: argparse.Namespace, split: str, is_training: bool = False) -> Dataset:
    """Return a split of the data set that the options name."""
    with cli.user_errors(ValueError, FileNotFoundError, ImportError):
        return create_dataset(
            args.dataset,
            args.data_dir,
            split,
            is_training=is_training,
            batch_size=args.batch_size,
            download=args.dataset_download,
            seed=getattr(args, "seed", 42),
        )


def check_classes(dataset: Dataset, model: torch.nn.Module) -> None:
    """Refuse to train on more classes than the model tells apart."""
    names = class_names(dataset)
    if names and len(names) > model.num_classes:
        raise cli.UserError(f"the data has {len(names)} classes, the model tells {model.num_classes} apart")


def image_settings(args: argparse.Namespace, model: torch.nn.Module) -> dict:
    """Return how images are prepared: timm's data config of the model, the options over it.

    Args:
        args: What ``add_arguments`` made.
        model: The model; its ``pretrained_cfg`` tells the defaults.
    """
    settings = resolve_data_config(dict(interpolation=args.interpolation, crop_pct=args.crop_pct), model=model)
    channels = getattr(model, "in_chans", settings["input_size"][0])
    height, width = cli.image_size(args.img_size) or settings["input_size"][-2:]
    settings["input_size"] = (channels, height, width)
    if channels not in (1, 3):
        raise cli.UserError(f"images have 1 or 3 channels, the model takes {channels}")
    for name in ("mean", "std"):
        values = tuple(getattr(args, name) or settings[name])
        if getattr(args, name) and len(values) not in (1, channels):
            raise cli.UserError(f"--{name} takes 1 or {channels} numbers, not {len(values)}")
        settings[name] = values * channels if len(values) == 1 else values
        if len(values) == 3 and channels == 1:
            settings[name] = (sum(values) / 3,)
    return settings


def count(dataset: Dataset) -> int:
    """Return the number of images, those of all processes."""
    reader = getattr(dataset, "reader", None)
    return getattr(reader, "num_samples", None) or len(dataset)  # a stream's length is this process's share


def file_name(dataset: Dataset, index: int) -> str:
    """Return the file of an image, or its number where the data set knows no files."""
    try:
        return dataset.filename(index, absolute=True)
    except Exception:  # data sets of torchvision and of Hugging Face name no files
        return f"image {index}"


def read_image(dataset: Dataset, index: int, mode: str) -> tuple[Image.Image, int]:
    """Return one image of a data set, decoded, and its class; raises whatever PIL does on a damaged file."""
    reader = getattr(dataset, "reader", None)
    if reader is None:
        image, target = dataset[index][:2]
    else:  # not through timm's ImageDataset, which takes another image in place of a damaged one
        file, target = reader[index][:2]
        image = Image.open(file)
    return image.convert(mode), int(target)


def seed_everything(*key: int) -> None:
    """Seed the random numbers of Python, NumPy and torch with a function of some numbers."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    if get_worker_info():  # uses no device, whose generators take long to seed
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


# Evaluation


class EvaluationImages(Dataset):
    """The images of a data set as uint8 tensors (C, H, W); one that cannot be read is black and of class UNREAD.

    Args:
        dataset: Any data set of images and classes.
        indices: The ones to take, in their order.
        transform: What makes a tensor of an image.
        shape: Shape (C, H, W) of the tensors.
    """

    def __init__(self, dataset: Dataset, indices: range, transform, shape: tuple[int, int, int]):
        self.dataset, self.indices, self.transform, self.shape = dataset, indices, transform, shape

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int):
        try:
            image, target = read_image(self.dataset, self.indices[i], "L" if self.shape[0] == 1 else "RGB")
        except Exception:  # PIL raises anything on bytes that are no image
            return torch.zeros(self.shape, dtype=torch.uint8), UNREAD
        return self.transform(image), target


def evaluation_loader(
    args: argparse.Namespace, dataset: Dataset, settings: dict, device: torch.device, rank: int = 0, world_size: int = 1
):
    """Return batches of normalised images (B, C, H, W) and classes (B,), in the data set's order, every image once.

    Several processes share the images out: rank r gets images r, r + world_size, ...
    """
    shape = settings["input_size"]
    common = dict(num_workers=args.workers, pin_memory=device.type == "cuda", persistent_workers=False)
    how = {key: settings[key] for key in ("interpolation", "crop_pct", "crop_mode", "mean", "std")}
    if isinstance(dataset, IterableDataset):  # its reader shares the images out
        return create_loader(dataset, shape, args.batch_size, device=device, **how, **common)
    transform = create_transform(shape, use_prefetcher=True, **how)
    images = EvaluationImages(dataset, range(rank, len(dataset), world_size), transform, shape)
    loader = DataLoader(
        images, args.batch_size, collate_fn=fast_collate, worker_init_fn=_leave_signals_to_the_parent, **common
    )
    return PrefetchLoader(loader, how["mean"], how["std"], channels=shape[0], device=device)


# Training


class Batches(Sampler):
    """The order of training: every epoch shuffled by seed and epoch, cut into batches, the same for any process count.

    The images of an update are cut into ``steps * world_size`` batches; process r takes the batches r, r + world_size,
    ... of them, one a step. Yields lists of (epoch, image) for ``TrainingImages``.

    Args:
        images: Number of images.
        batch_size: Images a batch.
        steps: Batches that one process accumulates for an update.
        rank: Number of this process.
        world_size: Number of processes.
        seed: Random seed.
    """

    def __init__(self, images: int, batch_size: int, steps: int, rank: int, world_size: int, seed: int):
        self.images, self.batch_size, self.steps = images, batch_size, steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.updates = images // (batch_size * steps * world_size)
        self.epoch = self.first_update = 0

    def start_at(self, epoch: int, update: int) -> None:
        """Let the next pass be of this epoch, from this update of it on."""
        self.epoch, self.first_update = epoch, update

    def images_of(self, epoch: int, update: int) -> np.ndarray:
        """Return the images of an update, those of all processes."""
        size = self.batch_size * self.steps * self.world_size
        return self._order(epoch)[update * size : (update + 1) * size]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.images)

    def __len__(self) -> int:
        return (self.updates - self.first_update) * self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        batches = self._order(epoch)[: self.updates * self.steps * self.world_size * self.batch_size]
        batches = batches.reshape(-1, self.batch_size)[self.rank :: self.world_size]
        for batch in batches[self.first_update * self.steps :]:
            yield [(epoch, int(index)) for index in batch]


class TooManyUnreadable(Exception):
    """A row of images could not be read."""


class TrainingImages(Dataset):
    """The augmented images of a data set as uint8 tensors (C, H, W), by (epoch, index): the same at every call.

    In place of an image that cannot be read stands the next one, and a line in ``bad_images``: its file and the reason.

    Args:
        dataset: Any data set of images and classes.
        transform: What makes an augmented tensor of an image.
        mode: PIL's mode of the images.
        seed: Random seed.
        bad_images: The file of images that could not be read.
        max_bad_images: So many in a row are passed over.
    """

    def __init__(self, dataset: Dataset, transform, mode: str, seed: int, bad_images: Path, max_bad_images: int):
        self.dataset, self.transform, self.mode, self.seed = dataset, transform, mode, seed
        self.bad_images, self.max_bad_images = bad_images, max_bad_images

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        for offset in range(min(self.max_bad_images + 1, len(self.dataset))):
            taken = (index + offset) % len(self.dataset)
            try:
                image, target = read_image(self.dataset, taken, self.mode)
            except Exception as error:  # PIL raises anything on bytes that are no image
                with self.bad_images.open("a", errors="surrogateescape") as file:  # one write a line: they do not mix
                    reason = re.sub(r" <_io\S* name=.*?>", "", cli.first_words(error))
                    file.write(f"{file_name(self.dataset, taken)}\t{reason}\n")
                continue
            seed_everything(self.seed, 0, epoch, index)
            return self.transform(image), target
        raise TooManyUnreadable


def training_transform(args: argparse.Namespace, settings: dict):
    """Return what makes an augmented uint8 tensor (C, H, W) of an image: timm's transforms, and the release's."""
    size = settings["input_size"][-2:]
    for name in ("scale", "ratio"):
        low, high = getattr(args, name)
        if low > high:
            raise cli.UserError(f"--{name} takes the smaller number first, not {low} {high}")
    try:
        crop, colours, tensor = create_transform(
            size,
            is_training=True,
            separate=True,
            use_prefetcher=True,
            train_crop_mode="rrc" if args.train_crop_mode == "random" else args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation=settings["interpolation"],
            mean=settings["mean"],
            std=settings["std"],
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise cli.UserError(
            f"timm makes no augmentation of these options, --aa {args.aa!r} perhaps: {error!r}"
        ) from error
    crop, colours, tensor = crop.transforms, colours.transforms, tensor.transforms
    if args.train_crop_mode == "random":  # no random resizing: the side that limits becomes size / crop_pct
        resize = create_transform(size, interpolation=settings["interpolation"], crop_pct=settings["crop_pct"])
        crop[:1] = [resize.transforms[0], RandomCrop(size)]
    if args.aa and args.force_color_jitter:
        colours.insert(0, ColorJitter(*[args.color_jitter] * 3))
    if args.affine:
        degrees, shift, scale = args.affine
        if shift > 1 or scale >= 1:
            raise cli.UserError(f"--affine takes a SHIFT up to 1 and a SCALE below 1, not {shift} and {scale}")
        affine = RandomAffine(degrees, (shift, shift), (1 - scale, 1 + scale), interpolation=InterpolationMode.BILINEAR)
        crop.insert(0, affine)
    if args.cutout:
        tensor.append(RandomErasing(args.cutout, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=0))
    return Compose([*crop, *colours, *tensor])


class TrainingLoader:
    """Batches of normalised, augmented images (B, C, H, W) on the device and classes (B,), reproducible by seed.

    Args:
        args: The options of train.py.
        dataset: The data set to train on.
        settings: How images are prepared.
        device: Where the batches go.
        batch_size: Images a batch.
        steps: Batches that one process accumulates for an update.
        rank: Number of this process.
        world_size: Number of processes.
        bad_images: File that names the images that could not be read.
    """

    def __init__(self, args, dataset, settings, device, batch_size, steps, rank, world_size, bad_images: Path):
        self.dataset, self.steps, self.seed, self.rank = dataset, steps, args.seed, rank
        self.bad_images, self.max_bad_images = bad_images, args.max_bad_images
        self._named, self._read = set(), 0
        transform = training_transform(args, settings)
        channels = settings["input_size"][0]
        common = dict(collate_fn=fast_collate, pin_memory=device.type == "cuda")
        common["worker_init_fn"] = _leave_signals_to_the_parent
        self.batches = None
        if isinstance(dataset, IterableDataset):
            # a stream: its order is its reader's; workers start anew every epoch, with seeds of that epoch
            workers = self._stream_workers(args.workers, world_size)
            dataset.transform = transform
            if isinstance(dataset, IterableImageDataset):
                dataset.set_loader_cfg(num_workers=workers)
            loader = DataLoader(dataset, batch_size, num_workers=workers, drop_last=True, **common)
            self.updates_per_epoch = len(loader) // steps
        else:
            self.batches = Batches(len(dataset), batch_size, steps, rank, world_size, args.seed)
            mode = "L" if channels == 1 else "RGB"
            images = TrainingImages(dataset, transform, mode, args.seed, bad_images, args.max_bad_images)
            loader = DataLoader(
                images,
                batch_sampler=self.batches,
                num_workers=args.workers,
                persistent_workers=args.workers > 0,
                **common,
            )
            self.updates_per_epoch = self.batches.updates
        self.loader = PrefetchLoader(loader, settings["mean"], settings["std"], channels=channels, device=device)

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of an epoch from one of its updates on, ``steps`` for every update."""
        seed_everything(self.seed, 1, epoch, self.rank)  # of the workers of a stream
        wanted = (self.updates_per_epoch - first_update) * self.steps
        if self.batches is not None:
            self.batches.start_at(epoch, first_update)
            batches = iter(self.loader)
        else:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            batches = iter(self.loader)
            for _ in range(first_update * self.steps):
                next(batches)
        try:
            for _ in range(wanted):
                yield next(batches)
                self.check_bad_images()
        except TooManyUnreadable as error:
            raise cli.UserError(
                f"more images in a row than --max-bad-images {self.max_bad_images} cannot be read; {self._last_bad()}"
            ) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise cli.UserError(
                f"a process that loads images was killed, for want of memory perhaps: fewer --workers than "
                f"{self.loader.loader.num_workers} or a smaller --batch-size may help ({cli.first_words(error)})"
            ) from error
        except StopIteration as error:
            raise cli.UserError("the data set ended before the epoch did: it has fewer images than it says") from error

    def _stream_workers(self, wanted: int, world_size: int) -> int:
        """Return how many processes read a stream: at least one, and none without a shard of its own."""
        split = getattr(getattr(self.dataset, "reader", None), "split_info", None)
        shards = len(getattr(split, "filenames", ()))
        if not shards:
            return max(1, wanted)
        if shards < world_size:
            raise cli.UserError(f"{shards} shards cannot be shared among {world_size} processes")
        return max(1, min(wanted, shards // world_size))

    def check_bad_images(self) -> None:
        """Name the images that could not be read since the last look; end the run if there are too many."""
        size = self.bad_images.stat().st_size if self.bad_images.exists() else 0
        if size <= self._read:
            return
        with self.bad_images.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        self._read += len(whole) + 1
        for line in whole.decode(errors="backslashreplace").splitlines():
            name, _, reason = line.partition("\t")
            if name not in self._named:
                self._named.add(name)
                cli.say(f"cannot read {name}: {reason}; the next image stands in for it ({len(self._named)} so far)")
        if len(self._named) > self.max_bad_images:
            raise cli.UserError(
                f"{len(self._named)} images could not be read, more than --max-bad-images {self.max_bad_images}: "
                f"{self.bad_images} names them"
            )

    def _last_bad(self) -> str:
        lines = self.bad_images.read_text(errors="backslashreplace").splitlines() if self.bad_images.exists() else []
        return f"the last one: {lines[-1]}" if lines else ""

    @property
    def bad_image_count(self) -> int:
        """How many images could not be read so far."""
        return len(self._named)

    def names(self, epoch: int, update: int) -> list[str]:
        """Return the files of an update's images, those of all processes; none for a stream."""
        if self.batches is None:
            return []
        return [file_name(self.dataset, int(index)) for index in self.batches.images_of(epoch, update)]


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Let a worker outlive a SIGTERM or Ctrl-C that is sent to the whole group, so that its parent can save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kill the workers that are left at the end: a polite SIGTERM they would ignore, and be waited for without end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a killed worker for a failure
    for worker in multiprocessing.active_children():
        worker.kill()


# Augmentation of batches


class BatchAugmentation:
    """What is done to whole batches on the device: random erasing, then mixup or cutmix, or mixup and then cutmix.

    Args:
        args: The options of train.py.
        batch_size: Images a batch.
        num_classes: Number of classes.
        device: Where the batches are.
    """

    def __init__(self, args: argparse.Namespace, batch_size: int, num_classes: int, device: torch.device):
        self.erase = self.mix = None
        if args.reprob:
            self.erase = BatchErasing(args.reprob, mode=args.remode, device=device)
        self.makes_soft_targets = args.mixup > 0 or args.cutmix > 0
        if not self.makes_soft_targets:
            return
        if args.mixup_then_cutmix:
            if not (args.mixup and args.cutmix):
                raise cli.UserError("--mixup-then-cutmix needs --mixup and --cutmix above 0")
            self.mix = MixupThenCutmix(args.mixup, args.cutmix, args.smoothing, num_classes)
            return
        if batch_size % 2:
            raise cli.UserError(
                f"mixup and cutmix pair the images of a batch, which must be even: {batch_size} images, the outcome of "
                f"--batch-size {args.batch_size} and --global-batch-size {args.global_batch_size}, are not"
            )
        self.mix = Mixup(
            args.mixup,
            args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (B, C, H, W) and classes (B,), or shares of classes (B, num_classes) if they are mixed."""
        if self.erase:
            images = self.erase(images)
        return self.mix(images, target) if self.mix else (images, target)


class MixupThenCutmix:
    """Mixup and, on its outcome, cutmix, each with partners of its own: the recipe of the authors' 2021 release.

    The box of cutmix lies wholly inside the image; label smoothing is spread over the mixed shares.

    Args:
        mixup: Alpha of mixup's Beta distribution.
        cutmix: Alpha of cutmix's.
        smoothing: Label smoothing.
        num_classes: Number of classes.
    """

    def __init__(self, mixup: float, cutmix: float, smoothing: float, num_classes: int):
        self.mixup, self.cutmix, self.smoothing, self.num_classes = mixup, cutmix, smoothing, num_classes

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mixed images (B, C, H, W) and shares of classes (B, num_classes)."""
        shares = torch.nn.functional.one_hot(target, self.num_classes).to(images.dtype)
        shares = shares * (1 - self.smoothing) + self.smoothing / self.num_classes

        kept, partner = np.random.beta(self.mixup, self.mixup), torch.randperm(len(images)).to(images.device)
        images = kept * images + (1 - kept) * images[partner]
        shares = kept * shares + (1 - kept) * shares[partner]

        kept, partner = np.random.beta(self.cutmix, self.cutmix), torch.randperm(len(images)).to(images.device)
        top, bottom = self._span(images.shape[2], kept)
        left, right = self._span(images.shape[3], kept)
        images[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        return images, kept * shares + (1 - kept) * shares[partner]

    @staticmethod
    def _span(size: int, kept: float) -> tuple[int, int]:
        """Return where the box begins and ends along one axis, whose share of the axis is sqrt(1 - kept)."""
        length = int(size * (1 - kept) ** 0.5)
        start = np.random.randint(size - length + 1)
        return start, start + length
