"""Image sizes, as (height, width) in pixels and in words: "224", "800x1333"."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UserError
from .settings import Number

__all__ = ["Pixels", "as_size", "check_memory", "flat_sides", "parse_size", "size_name"]


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width for "N" or "HEIGHTxWIDTH".

    Raises:
        UserError: If it is neither.
    """
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise UserError(f"{text!r} must be a number of pixels or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


@dataclass(frozen=True)
class Pixels(Number):
    """A side of an image; the text "HEIGHTxWIDTH" gives both."""

    kind: type = int
    minimum: float = 1

    def __call__(self, text: str) -> int | tuple[int, int]:
        return parse_size(text) if "x" in text else super().__call__(text)

    def check(self, value: Any, shown: Any = None) -> Any:
        for side in value if isinstance(value, tuple) else [value]:
            super().check(side, shown)
        return value


def flat_sides(values: Sequence[int | tuple[int, int]]) -> list[int]:
    """Return the sides that ``Pixels`` gave as single numbers."""
    return [side for value in values for side in (value if isinstance(value, tuple) else (value,))]


def as_size(values: Sequence[int | tuple[int, int]]) -> tuple[int, int]:
    """Return height and width for one number or two.

    Raises:
        UserError: If it is another count of numbers.
    """
    values = flat_sides(values)
    if not 1 <= len(values) <= 2:
        raise UserError(f"--img-size takes one number of pixels, or height and width, not {' '.join(map(str, values))}")
    return values[0], values[-1]


def size_name(size: Sequence[int]) -> str:
    """Return (height, width) in words."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def check_memory(shape: Sequence[int], images: int = 1) -> None:
    """Refuse a batch of float32 images of shape (C, H, W) that is larger than the machine's memory.

    Raises:
        UserError: If it is; the message says how much it would take.
    """
    if not hasattr(os, "sysconf"):
        return
    memory, needed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 4 * images * math.prod(shape)
    if needed > memory:
        raise UserError(
            f"{images} image{'s' * (images > 1)} of {size_name(shape[1:])} pixels take{'s' * (images == 1)} "
            f"{needed / 2**30:,.0f} GiB, the memory has {memory / 2**30:,.0f}: choose a smaller image size"
            f"{' or --batch-size' * (images > 1)}"
        )
