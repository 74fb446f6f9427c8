"""Image sizes, as (height, width) in pixels and in words: "224", "800x1333"."""

import math
import os
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from .errors import UserError
from .settings import Count, parser_of

__all__ = ["Sides", "as_size", "check_memory", "parse_size", "size_name"]


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width for "N" or "HEIGHTxWIDTH".

    Raises:
        UserError: If it is neither.
    """
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise UserError(f"{text!r} must be a number of pixels or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def flat_sides(value: Any) -> list:
    """Return the sides in "N", "HxW", a number, or a sequence of those, as one list."""
    if isinstance(value, list | tuple):
        return [side for single in value for side in flat_sides(single)]
    return list(parse_size(value)) if isinstance(value, str) and "x" in value else [value]


Sides = Annotated[list[Count], BeforeValidator(flat_sides), Field(min_length=1, max_length=2)]  # height and width


def as_size(value: Any) -> tuple[int, int]:
    """Return height and width for one number or two, "N" or "HxW".

    Raises:
        UserError: If it is neither.
    """
    sides = parser_of(Sides)(value)
    return sides[0], sides[-1]


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
