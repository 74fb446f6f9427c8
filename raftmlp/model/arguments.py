"""Checks of a network's arguments where a wrong value would go unnoticed, or fail far from its cause."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from timm.layers import to_2tuple

from ..errors import UserError

__all__ = ["choice", "current_names", "image_size", "is_sequence", "is_whole", "per_stage", "share"]

MOST_BLOCKS = 1000  # of a stage: a number in a file must not keep a machine busy
RENAMED = {"map": "full", "update": "residual"}  # values of resizing, as version 0.2 called them


def current_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network's arguments with ``resizing`` as it is called today."""
    resizing = arguments.get("resizing")
    known = isinstance(resizing, str) and resizing in RENAMED
    return {**arguments, "resizing": RENAMED[resizing]} if known else dict(arguments)


def is_sequence(value: Any) -> bool:
    """Return whether a value is a list, a tuple, an array of one dimension or the like; a string is none."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_whole(value: Any, least: int, most: float = float("inf")) -> bool:
    """Return whether a value is a whole number, Python's or NumPy's, from ``least`` to ``most``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most


def whole_numbers(name: str, values: Any, most: float = float("inf")) -> tuple[int, ...]:
    """Return a sequence of one or more whole numbers, at least 1, as a tuple of Python's own."""
    if not is_sequence(values) or not len(values) or not all(is_whole(value, 1, most) for value in values):
        raise UserError(f"{name} {values!r} must be a sequence of whole numbers from 1 to {most}, one a stage")
    return tuple(map(int, values))


def image_size(value: Any) -> tuple[int, int]:
    """Return height and width in pixels for one number or two."""
    sides = tuple(value) if is_sequence(value) else to_2tuple(value)
    if len(sides) != 2 or not all(is_whole(side, 1) for side in sides):
        raise UserError(f"img_size {value!r} must be one number of pixels, or (height, width), 1 or more")
    return int(sides[0]), int(sides[1])


def per_stage(embed_dims: Any, depths: Any, patch_sizes: Any, patch_kernels: Any, raft_size: Any) -> list[tuple]:
    """Return a network's arguments that have an entry a stage, stage by stage."""
    given: dict[str, tuple] = dict(
        embed_dims=whole_numbers("embed_dims", embed_dims),
        depths=whole_numbers("depths", depths, MOST_BLOCKS),
        patch_sizes=whole_numbers("patch_sizes", patch_sizes),
    )
    kernels = [(size,) for size in given["patch_sizes"]] if patch_kernels is None else patch_kernels
    given["patch_kernels"] = tuple(whole_numbers("an entry of patch_kernels", entry) for entry in kernels)
    raft_sizes = raft_size if is_sequence(raft_size) else (raft_size,) * len(given["embed_dims"])
    given["raft_size"] = whole_numbers("raft_size", raft_sizes)
    if len(set(map(len, given.values()))) != 1:
        text = ", ".join(f"{name} {value}" for name, value in given.items())
        raise UserError(f"give one entry a stage, and the same number of stages everywhere: {text}")
    return list(zip(*given.values()))


def share(name: str, value: Any) -> float:
    """Return a rate of dropping."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < 1:
        raise UserError(f"{name} {value!r} must be at least 0 and less than 1")
    return float(value)


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return a string that is one of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{name} {value!r} must be one of {', '.join(map(repr, allowed))}")
    return value
