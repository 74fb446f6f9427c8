"""Any image as 8 bits a channel: 16 bits are scaled, what is transparent lies over a background."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from .settings import known_colour

__all__ = ["PixelReader"]

_logger = logging.getLogger(__name__)


@functools.cache
def _say_transparency(background: str) -> None:
    """Log once that images have transparency."""
    _logger.warning(f"note: some images have transparency: {background} shows through (--background)")


class PixelReader:
    """Makes images of 1 or 3 channels, 8 bits each, of PIL images of any mode; their EXIF orientation is not applied.

    16 bits are scaled, 65535 to 255; transparent pixels lie over the background. Processes that load images share
    what is seen of transparency with the one that made this object.

    Args:
        channels: 1 or 3.
        background: A colour as Pillow names it.

    Raises:
        UserError: If there is no such colour.
    """

    def __init__(self, channels: int, background: str = "white"):
        self.mode = "L" if channels == 1 else "RGB"
        self.background = known_colour(background)
        self.transparent = torch.zeros(1, dtype=torch.bool).share_memory_()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PixelReader":
        """Return the reader for images prepared as a ``data_config`` says."""
        return cls(config["input_size"][0], config.get("background", "white"))

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image, decoded.

        Raises:
            ValueError: If the range of its pixels is not known.
            Exception: Of any kind, as PIL does on bytes that are no image.
        """
        image = _as_8_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[0] < 255:
                self.transparent.fill_(True)
                canvas = Image.new("RGBA", image.size, self.background)
                image = Image.alpha_composite(canvas, image)
        return image.convert(self.mode)

    def say_transparency(self) -> None:
        """Log a note, once in a process, if an image had transparency."""
        if self.transparent.item():
            _say_transparency(self.background)


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
