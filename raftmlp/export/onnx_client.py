"""A classifier in an ONNX file, with images prepared in numpy and Pillow: neither torch nor timm is needed.

The file's metadata, which the export command writes, describe how images are prepared and name the classes.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.description import MAPPING, MAX_CLASSES, PRETRAINED_CFG, TEXT, check_fields, number, several
from ..data.pixels import PixelReader
from ..errors import MissingFileError, MissingPackageError, UserError, first_words
from ..files import printable

__all__ = ["Classifier", "Preparation", "predict"]

SIDE = number(int, 1, 16384)
SETTINGS = PRETRAINED_CFG | dict(input_size=several(SIDE, 3, 3))
DESCRIPTION = dict(
    settings=MAPPING, model=TEXT, class_names=several(TEXT, 1, MAX_CLASSES), least_size=several(SIDE, 2, 2)
)


class Preparation:
    """Make the model's input of an image, as timm's transforms for evaluation do, in numpy and Pillow.

    Args:
        input_size: Channels (1 or 3), height and width of the input.
        mean: Mean of the pixels, one number for each channel, from 0 to 1.
        std: Their deviation.
        interpolation: Pillow's name of the resizing: bilinear, bicubic, ...
        crop_pct: Center crop fraction.
        crop_mode: "center": the shorter side is resized, the middle cut out; "squash": both sides are resized;
            "border": the longer side is resized, the rest filled with the mean.
        background: Color behind transparent pixels.
        exif: Whether images are turned as their EXIF orientation says; files of version 0.2 do not say it.
    """

    def __init__(
        self,
        input_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        crop_pct: float,
        crop_mode: str,
        background: str = "white",
        exif: bool = False,
    ):
        channels, *self.size = input_size
        if channels not in (1, 3):
            raise UserError(f"images have 1 or 3 channels, the model takes {channels}")
        self.reader = PixelReader(channels, background, exif)
        self.resized = tuple(math.floor(side / crop_pct) for side in self.size)
        self.crop_mode, self.resample = crop_mode, Image.Resampling[interpolation.upper()]
        self.mean, self.std = (np.asarray(values, np.float32).reshape(channels, 1, 1) for values in (mean, std))
        self.color = tuple(round(255 * float(value)) for value in self.mean.flat)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return an image as an array of shape (C, H, W), float32, normalized."""
        image = self.reader(image)
        image = image.resize(self._resized_size(*image.size), self.resample)
        pixels = np.asarray(self._cropped(image), np.float32)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return (pixels / np.float32(255) - self.mean) / self.std

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        if self.crop_mode == "squash":
            return self.resized[1], self.resized[0]
        if self.crop_mode == "center" and self.resized[0] == self.resized[1]:
            side, long = self.resized[0], int(self.resized[0] * max(height, width) / min(height, width))
            return (side, long) if width < height else (long, side)
        ratios = height / self.resized[0], width / self.resized[1]
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return round(width / ratio), round(height / ratio)

    def _cropped(self, image: Image.Image) -> Image.Image:
        """Return the middle of an image, or an image with a border, the larger half of it below and to the right."""
        is_mean = self.crop_mode == "border"
        canvas = Image.new(image.mode, (self.size[1], self.size[0]), self.color if is_mean else 0)
        offsets = [size - side for size, side in zip(reversed(self.size), image.size)]
        canvas.paste(image, tuple(offset // 2 if offset > 0 else -round(-offset / 2) for offset in offsets))
        return canvas


class Classifier:
    """An ONNX file of the export command.

    Args:
        path: The file.
        img_size: Height and width of the images, for a file whose sizes are free; None takes the file's.
        background: Color behind transparent pixels.
        exif: Whether images are turned as their EXIF orientation says; None takes what the file says.

    Raises:
        UserError: If the file is missing, damaged or not a classifier of the export command, or takes no such size.
    """

    def __init__(
        self,
        path: str,
        img_size: tuple[int, int] | None = None,
        background: str = "white",
        exif: bool | None = None,
    ):
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingPackageError(f"onnxruntime is missing ({error}): pip install onnxruntime") from error
        if not os.path.isfile(path):
            raise MissingFileError(f"no ONNX file at {path}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self.path = path
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
        except Exception as error:  # ONNX Runtime has no common kind of error
            raise UserError(f"{path} is damaged or is not an ONNX file: {first_words(error)}") from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "maps" in metadata:
            raise UserError(f"{path} gives feature maps: raftmlp export makes a classifier without --features")
        try:
            least_size = self._read(metadata)
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise UserError(
                f"the metadata of {path} do not describe how images are prepared and name the classes, as those of "
                f"raftmlp export do: {first_words(error)}"
            ) from error
        if img_size:
            self.settings["input_size"] = [self.settings["input_size"][0], *img_size]
        if exif is not None:
            self.settings["exif"] = exif
        check_fields(self.settings, SETTINGS, "")
        self._check_size(self.settings["input_size"][1:], least_size)
        self.prepare = Preparation(**self.settings, background=background)

    def _read(self, metadata: Mapping[str, str]) -> Sequence[int]:
        """Take over what the metadata say, and return the least height and width."""
        content = {key: json.loads(metadata[key]) for key in ("model", "class_names", "settings")}
        content["least_size"] = json.loads(metadata.get("least_size", "[1, 1]"))
        described = check_fields(content, DESCRIPTION, "")
        self.model, self.names, self.settings = (described[key] for key in ("model", "class_names", "settings"))
        check_fields(self.settings, SETTINGS, "settings.")
        Preparation(**self.settings)
        (images,) = self.session.get_inputs()
        self.input_name, (batch, _, *self.made_for) = images.name, images.shape
        self.batch: int | None = batch if isinstance(batch, int) else None  # None: any number of images at a time
        return described["least_size"]

    def _check_size(self, size: Sequence[int], least_size: Sequence[int]) -> None:
        for side, fixed, least in zip(size, self.made_for, least_size):
            if isinstance(fixed, int) and side != fixed:
                raise UserError(
                    f"{self.path} is made for images of {_words(self.made_for)} pixels, not {_words(size)}; "
                    f"raftmlp export makes one for any size with --dynamic-size"
                )
            if side < least:
                raise UserError(f"{self.path} takes images of {least} pixels or more, not {_words(size)}")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the probabilities (B, classes) of prepared images (B, C, H, W)."""
        missing = (self.batch or len(images)) - len(images)
        padded = np.concatenate([images, np.repeat(images[-1:], missing, 0)]) if missing else images
        logits = self.session.run(None, {self.input_name: padded})[0][: len(images)]
        if logits.shape != (len(images), len(self.names)):
            raise UserError(
                f"{self.path} names {len(self.names)} classes and gives a shape of {logits.shape[1:]} per image"
            )
        if not np.isfinite(logits).all():
            raise UserError(
                f"the output of {self.path} is not finite: its weights are damaged, or float16 is too coarse"
            )
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)


def _words(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def predict(classifier: Classifier, files: Sequence[Path], batch_size: int, topk: int) -> Iterator[dict[str, Any]]:
    """Yield for each file its ``file``, and ``predictions``, the most probable first, or ``error``."""
    batch_size = classifier.batch or batch_size
    for start in range(0, len(files), batch_size):
        prepared = {}
        results = [dict(file=printable(file)) for file in files[start : start + batch_size]]
        for i, result in enumerate(results):
            try:
                with Image.open(files[start + i]) as image:
                    prepared[i] = classifier.prepare(image)
            except Exception as error:  # Pillow raises anything on bytes that are not an image
                result["error"] = first_words(error)
        outputs = classifier(np.stack(list(prepared.values()))) if prepared else ()
        for i, probabilities in zip(prepared, outputs):
            best = np.argsort(-probabilities, kind="stable")[:topk].tolist()
            results[i]["predictions"] = [
                {"class": k, "name": classifier.names[k], "probability": float(probabilities[k])} for k in best
            ]
        classifier.prepare.reader.say_what_was_seen()
        yield from results
