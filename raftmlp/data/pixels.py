"""Any image upright, with 8 bits a channel; needs neither torch nor timm."""

import functools
import logging
from collections.abc import Mapping
from contextlib import suppress
from ctypes import c_bool
from multiprocessing.sharedctypes import RawValue
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps

__all__ = ["PixelReader"]

_logger = logging.getLogger(__name__)


@functools.cache
def _say_once(note: str) -> None:
    """Log a note once in a process."""
    _logger.warning(note)


class PixelReader:
    """Makes images of 1 or 3 channels, 8 bits each, of PIL images of any mode, turned as their EXIF orientation says.

    16 bits are scaled, 65535 to 255; transparent pixels lie over the background. Processes that load images share
    what is seen of transparency, and of orientations that are not applied, with the one that made this object.

    Args:
        channels: 1 or 3.
        background: A color as Pillow names it.
        exif: Whether the EXIF orientation is applied.
    """

    def __init__(self, channels: int, background: str = "white", exif: bool = True):
        self.mode = "L" if channels == 1 else "RGB"
        self.background, self.color, self.exif = background, ImageColor.getcolor(background, "RGB"), exif
        self.transparent, self.lying = RawValue(c_bool), RawValue(c_bool)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PixelReader":
        """Return the reader for images prepared as a ``data_config`` says."""
        return cls(config["input_size"][0], config.get("background", "white"), config.get("exif", True))

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image, decoded.

        Raises:
            ValueError: If the range of its pixels is not known.
            Exception: Of any kind, as PIL does on bytes that are not an image.
        """
        image.load()
        with suppress(Exception):  # damaged EXIF data, which say nothing, raise anything
            if self.exif:
                ImageOps.exif_transpose(image, in_place=True)
            elif image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
                self.lying.value = True
        image = _as_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[0] < 255:
                self.transparent.value = True
                image = Image.alpha_composite(Image.new("RGBA", image.size, self.color), image)
        return image.convert(self.mode)

    def say_what_was_seen(self) -> None:
        """Log a note, once in a process, if an image had transparency, or an EXIF orientation that was not applied."""
        if self.transparent.value:
            _say_once(f"note: some images have transparency: {self.background} shows through (--background)")
        if self.lying.value:
            _say_once("note: some images have an EXIF orientation, which is not applied (--exif applies it)")


def _as_8_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16 bits or more as one of 8, any other as it is."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if image.mode == "F" or low < 0 or high > 65535:
        raise ValueError(f"pixels from {low} to {high} are neither whole numbers of 8 nor of 16 bits")
    if image.mode == "I" and high <= 255:
        return image
    scaled = Image.fromarray(((pixels.astype(np.int32) + 128) // 257).astype(np.uint8))  # value / 257, rounded
    if "transparency" in image.info:
        opaque = pixels != image.info["transparency"]
        scaled.putalpha(Image.fromarray(np.uint8(opaque) * 255))
    return scaled
