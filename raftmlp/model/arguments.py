"""Checks of a network's arguments: each returns the value as Python's own type, or says what is allowed."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from ..errors import UserError

__all__ = [
    "check_device", "check_dtype", "check_weight", "choice", "feature_indices", "image_size", "is_sequence", "is_whole",
    "per_stage", "rate", "ratio", "whole", "whole_numbers",
]  # fmt: skip

MOST_BLOCKS = 1000  # of a stage
MOST = 2**31 - 1  # of any number, and of the numbers in a weight: 8 GiB in float32
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def whole(name: str, value: Any, least: int = 1, most: int = MOST) -> int:
    """Return a whole number from ``least`` to ``most``, which NumPy's may be."""
    if fault := _fault(value, least, most):
        raise UserError(f"{name} {_shown(value)} {fault}")
    return int(value)


def whole_numbers(name: str, values: Any, least: int = 1, most: int = MOST) -> tuple[int, ...]:
    """Return a sequence of one or more whole numbers from ``least`` to ``most`` as a tuple."""
    if not is_sequence(values) or not len(values):
        raise UserError(f"{name} {_shown(values)} must be a sequence of whole numbers, {least} or more")
    for value in values:
        if fault := _fault(value, least, most):
            raise UserError(f"{name} {_shown(values)}: every entry {fault}")
    return tuple(map(int, values))


def is_sequence(value: Any) -> bool:
    """Return whether a value is a list, a tuple, an array of one dimension or the like; a string is none."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_whole(value: Any, least: int, most: float = math.inf) -> bool:
    """Return whether a value is a whole number, Python's or NumPy's, from ``least`` to ``most``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most


def image_size(name: str, value: Any) -> tuple[int, int]:
    """Return height and width in pixels for one number or two."""
    sides = tuple(value) if is_sequence(value) else (value, value)
    if len(sides) != 2 or not all(is_whole(side, 1, MOST) for side in sides):
        allowed = f"one number of pixels, or (height, width), 1 or more and at most {MOST}"
        raise UserError(f"{name} {_shown(value)} must be {allowed}")
    return int(sides[0]), int(sides[1])


def per_stage(embed_dims: Any, depths: Any, patch_sizes: Any, patch_kernels: Any, raft_size: Any) -> dict[str, tuple]:
    """Return the network's arguments that have an entry a stage."""
    given: dict[str, tuple] = dict(
        embed_dims=whole_numbers("embed_dims", embed_dims),
        depths=whole_numbers("depths", depths, most=MOST_BLOCKS),
        patch_sizes=whole_numbers("patch_sizes", patch_sizes),
    )
    kernels = [(size,) for size in given["patch_sizes"]] if patch_kernels is None else patch_kernels
    if not is_sequence(kernels):
        raise UserError(f"patch_kernels {_shown(kernels)} must be a sequence with a sequence a stage, or None")
    given["patch_kernels"] = tuple(whole_numbers("patch_kernels", entry) for entry in kernels)
    if is_sequence(raft_size):
        given["raft_size"] = whole_numbers("raft_size", raft_size)
    else:
        given["raft_size"] = (whole("raft_size", raft_size),) * len(given["embed_dims"])
    if len(set(map(len, given.values()))) != 1:
        text = ", ".join(f"{name} {value}" for name, value in given.items())
        raise UserError(f"give one entry a stage, and the same number of stages everywhere: {text}")
    return given


def feature_indices(num_maps: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Return the indices of the feature maps asked for, in their order, none negative, and the largest.

    Args:
        num_maps: Number of maps that the network has.
        indices: A sequence of indices, negative ones from the end; or a number for the last so many, None for all.
    """
    indices = num_maps if indices is None else indices
    many = is_sequence(indices)
    taken, bounds = (indices, (-num_maps, num_maps - 1)) if many else ([indices], (1, num_maps))
    if not len(taken) or not all(is_whole(i, *bounds) for i in taken):
        raise UserError(
            f"feature indices {indices!r}: this model takes a sequence of indices from {-num_maps} to "
            f"{num_maps - 1}, or a number of maps from 1 to {num_maps}"
        )
    taken = [int(i) % num_maps for i in (taken if many else range(-indices, 0))]
    return taken, max(taken)


def rate(name: str, value: Any) -> float:
    """Return a rate of dropping."""
    if not _is_real(value) or not 0 <= value < 1:
        raise UserError(f"{name} {_shown(value)} must be at least 0 and less than 1")
    return float(value)


def ratio(name: str, value: Any) -> float:
    """Return the ratio of two widths."""
    if not _is_real(value) or not 0 < value <= MOST:
        raise UserError(f"{name} {_shown(value)} must be a number above 0, at most {MOST}")
    return float(value)


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return a string that is one of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        *others, last = map(repr, allowed)
        words = f"{', '.join(others)} or {last}"
        raise UserError(f"{name} {_shown(value)} must be {'one of ' if len(allowed) > 2 else ''}{words}")
    return value


def check_device(value: Any) -> None:
    """Refuse what names no device; None is the current one."""
    try:
        if not isinstance(value, str | torch.device | None) and not is_whole(value, 0, 127):
            raise TypeError
        torch.device("cpu" if value is None else value)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"device {_shown(value)} must name a device of torch, such as 'cpu' or 'cuda:0'") from error


def check_dtype(value: Any) -> None:
    """Refuse what is no type of parameters; None is torch's default."""
    if value is not None and not (isinstance(value, torch.dtype) and value in DTYPES):
        raise UserError(f"dtype {_shown(value)} must be one of {', '.join(map(str, DTYPES))}, or None")


def check_weight(names: str, *shape: float) -> None:
    """Refuse a weight of more numbers than any machine has a use for; ``names`` are the arguments that make it."""
    if math.prod(shape) > MOST:
        shown = " x ".join(f"{side:.6g}" for side in shape)
        raise UserError(f"{names} are too large together: a weight of {shown} numbers, at most {MOST} are allowed")


def _fault(value: Any, least: int, most: int) -> str:
    if is_whole(value, least, most):
        return ""
    return f"must be at most {most}" if is_whole(value, least) else f"must be {least} or more, a whole number"


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:120]} ..."
