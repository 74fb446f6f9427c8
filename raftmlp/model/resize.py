"""Bicubic resizing as matrix products, pure functions.

Bicubic interpolation is linear and separable: for given sizes it is one matrix for the height and one for the width.
Two matrix products therefore give the numbers of ``F.interpolate(mode="bicubic", align_corners=False)`` without
antialias, with a backward pass that is deterministic on every device, out of operators that every exporter knows.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

__all__ = ["RESIZINGS", "bicubic_matrix", "from_trained_grid", "resize_bicubic"]

RESIZINGS = ("full", "residual")  # rules for maps of another size than the trained grid
BAND = 64  # outputs that a large resizing computes at a time


def bicubic_matrix(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix that resizes a signal of one dimension bicubically.

    Args:
        size_in: Length of the signal.
        size_out: Length after resizing.
        dtype: float32 or float64; also the precision of the sampling positions, as in PyTorch.
        device: Where to build it.

    Returns:
        Tensor of shape (size_out, size_in); every row sums to 1 and has at most four entries that are not 0.
    """
    # position of every output sample among the input samples, rounded where PyTorch rounds: the scale, and the result
    # (a GPU divides by a number as it multiplies with the reciprocal)
    sizes = [torch.full((1,), size, dtype=dtype, device=device) for size in (size_in, size_out)]
    scale = sizes[0] / sizes[1]
    position = (torch.arange(size_out, dtype=torch.float64, device=device) + 0.5) * scale.double() - 0.5
    position = position.to(dtype)
    left = torch.floor(position)
    t = position - left
    # weights of the four samples around it: cubic polynomials of t, PyTorch's constant a = -0.75 put in
    weight = torch.stack(
        [
            ((-0.75 * t + 1.5) * t - 0.75) * t,
            ((1.25 * t - 2.25) * t) * t + 1.0,
            ((-1.25 * t + 1.5) * t + 0.75) * t,
            ((0.75 * t - 0.75) * t) * t,
        ],
        dim=1,
    )  # size_out 4
    # samples beyond the border repeat the outermost one
    tap = (left.unsqueeze(1) + torch.arange(-1, 3, dtype=dtype, device=device)).clamp(0, size_in - 1)
    hit = tap.unsqueeze(2) == torch.arange(size_in, dtype=dtype, device=device)
    return (hit * weight.unsqueeze(2)).sum(dim=1)


@lru_cache(maxsize=1024)  # detection at many scales meets some hundred pairs of lengths
def _cached_bicubic_matrix(size_in: int, size_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # an inference tensor could not be used in training later on
    with torch.inference_mode(False), torch.no_grad():
        matrix = bicubic_matrix(size_in, size_out, dtype, torch.device("cpu")).to(device)
    if device.type == "cuda":  # the next caller may be on another stream
        torch.cuda.current_stream(device).synchronize()
    return matrix


def _matrix(x: Tensor, size_in: int, size_out: int) -> Tensor:
    """Return the matrix in x's precision of accumulation: from the cache in eager mode, as plain operators else."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if torch.jit.is_scripting():
        return bicubic_matrix(size_in, size_out, dtype, x.device)
    if torch.jit.is_tracing():
        return bicubic_matrix(int(size_in), int(size_out), dtype, x.device)
    traced = type(x) is not Tensor or torch.compiler.is_compiling()
    if traced or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return bicubic_matrix(size_in, size_out, dtype, x.device)
    return _cached_bicubic_matrix(size_in, size_out, dtype, x.device)


def same_length(size: int, other: int) -> bool:
    """Return whether two lengths are known to be the same.

    Dynamic sizes in a compiled graph are not: a question would cost a graph for every answer, and where nothing changes
    the matrix is the identity.
    """
    if torch.jit.is_scripting():
        return size == other
    if torch.jit.is_tracing():  # sizes are tensors there
        return bool(size == other)
    return symbolic_shapes.statically_known_true(size == other)


def _plain_sizes(x: Tensor) -> bool:
    """Return whether a call's sizes are numbers that may be looked at: in eager mode and in TorchScript."""
    if not torch.jit.is_scripting():
        return type(x) is Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    return True


def _goes_in_bands(x: Tensor, length: int, least: int = 4 * BAND) -> bool:
    """Return whether maps are resized band by band along a side of such a length."""
    return _plain_sizes(x) and length > least


def _bands(size_in: int, size_out: int, length: int = BAND) -> list[tuple[int, int, int, int]]:
    """Return parts of the output and what each needs of the input, as first, end, first and end.

    A bicubic matrix is zero beside its diagonal: of the products of a large one hardly any count.
    """
    bands: list[tuple[int, int, int, int]] = []
    for first in range(0, size_out, length):
        end = min(first + length, size_out)
        low = int((first + 0.5) * size_in / size_out - 0.5) - 2
        high = int((end - 0.5) * size_in / size_out - 0.5) + 4
        bands.append((first, end, max(low, 0), min(high, size_in)))
    return bands


def _resize_height(x: Tensor, height: int) -> Tensor:
    B, H, W, C = x.shape
    if same_length(H, height):
        return x
    matrix, rows = _matrix(x, H, height), x.reshape(B, H, W * C)
    if _goes_in_bands(x, H):
        parts: list[Tensor] = []
        for first, end, low, high in _bands(H, height):
            parts.append(torch.bmm(matrix[first:end, low:high].expand(B, -1, -1), rows[:, low:high]))
        return torch.cat(parts, dim=1).reshape(B, height, W, C)
    return torch.bmm(matrix.expand(B, -1, -1), rows).reshape(B, height, W, C)


def _resize_width(x: Tensor, width: int) -> Tensor:
    B, H, W, C = x.shape
    if same_length(W, width):
        return x
    matrix = _matrix(x, W, width)
    if C >= 16:
        return torch.bmm(matrix.expand(B * H, -1, -1), x.reshape(B * H, W, C)).reshape(B, H, width, C)
    # an image: its rows are long and its pixels short, so a row is a vector
    rows = x.permute(0, 3, 1, 2).reshape(B * C * H, W)
    if _goes_in_bands(x, W):
        parts: list[Tensor] = []
        for first, end, low, high in _bands(W, width):
            parts.append(torch.mm(rows[:, low:high], matrix[first:end, low:high].t()))
        rows = torch.cat(parts, dim=1)
    else:
        rows = torch.mm(rows, matrix.t())
    return rows.reshape(B, C, H, width).permute(0, 2, 3, 1).contiguous()


def _resize_both(x: Tensor, height: int, width: int) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    width_first = False
    if _plain_sizes(x):
        H, W = x.shape[1], x.shape[2]
        width_first = H * width * (W + height) < height * W * (H + width)  # multiplications
    if width_first:
        return _resize_height(_resize_width(x, width), height).to(dtype)
    return _resize_width(_resize_height(x, height), width).to(dtype)


def resize_bicubic(x: Tensor, height: int, width: int) -> Tensor:
    """Resize maps bicubically, as ``F.interpolate(mode="bicubic", align_corners=False)`` does.

    Products are taken in float32 (float64 for float64 maps), also under autocast. Nothing is copied, and x itself
    comes back, where the size is right already.

    Args:
        x: Maps of shape (B, H, W, C), any floating-point dtype.
        height: Height to make, in positions.
        width: Width to make, in positions.

    Returns:
        Maps of shape (B, height, width, C) in x's dtype.
    """
    if same_length(x.shape[1], height) and same_length(x.shape[2], width):
        return x
    if torch.jit.is_scripting():
        return _resize_both(x, height, width)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _resize_both(x, height, width)
    return _resize_both(x, height, width)


# Rules for maps of another size than the trained grid


def from_trained_grid(x: Tensor, before: Tensor, after: Tensor, resizing: str) -> Tensor:
    """Return maps of any size as token mixing on the trained grid leaves them.

    Args:
        x: Maps of shape (B, H, W, C).
        before: The same resized to the trained grid.
        after: These after token mixing.
        resizing: The rule, one of RESIZINGS.

    Returns:
        Maps of x's shape.
    """
    H, W = x.shape[1], x.shape[2]
    if resizing == "full" or (same_length(before.shape[1], H) and same_length(before.shape[2], W)):
        return resize_bicubic(after, H, W)
    return x + resize_bicubic(after - before, H, W)
