"""The mixing in one pass over memory, for inference on NVIDIA GPUs: Triton kernels.

A block of the map is read once and written once. LayerNorm, both products, GELU and the addition happen on the chip:
hidden units are made a few at a time, for all vectors of the block, and go into the second product at once. Sums are
taken in float32, products in the 16 bits of the weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["SHARED_MEMORY", "is_supported", "mix"]

TILE = 2**14  # numbers that a program may hold: two of them in float32 fill half of a multiprocessor's registers
UNITS = 32  # hidden units at a time
SHARED_MEMORY = 160 * 1024  # bytes of a multiprocessor that the widest maps need: A100s and H100s have them


@triton.jit
def _gelu(x, in_bfloat16: tl.constexpr):
    """Return x Phi(x) for float32 x that will be rounded to 16 bits: Phi as a logistic function of x q(x^2).

    The error function took a third of the kernels' time. With the polynomials q the error is below 3e-6, and 3e-5 for
    bfloat16, to which the GPU's own tanh adds up to 2^-12 of x: bfloat16 rounds by 2^-9.
    """
    z = x * x
    if in_bfloat16:
        z = tl.minimum(z, 50.0)  # from there tanh is 1, and later q falls
        q = (-0.000351521 * z + 0.0370056742) * z + 0.79750785
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x * q], tl.float32, is_pure=True, pack=1)
        half = 0.5 * x
        return half * tanh + half
    else:
        q = (1.1191076e-06 * z - 3.0581431e-05) * z - 1.2485958e-04
        q = (q * z + 0.036468788) * z + 0.7978281366
        return x / (1.0 + tl.exp2(-2.885390082 * x * q))


@triton.jit
def _mlp(vectors, weight1, bias1, weight2, bias2, feature, exists, features, hidden, UNITS: tl.constexpr):
    """Return the MLP of the rows of a matrix; its column i is feature[i], or none where not exists[i]."""
    bias = tl.load(bias2 + feature, exists, 0.0).to(tl.float32)
    out = tl.zeros(vectors.shape, tl.float32) + bias[None, :]
    for first in range(0, hidden, UNITS):
        unit = first + tl.arange(0, UNITS)
        inside = unit < hidden
        w1 = tl.load(weight1 + unit[None, :] * features + feature[:, None], exists[:, None] & inside[None, :], 0.0)
        w2 = tl.load(weight2 + feature[None, :] * hidden + unit[:, None], exists[None, :] & inside[:, None], 0.0)
        h = tl.dot(vectors, w1) + tl.load(bias1 + unit, inside, 0.0).to(tl.float32)[None, :]
        out = tl.dot(_gelu(h, vectors.dtype == tl.bfloat16).to(vectors.dtype), w2, out)
    return out.to(vectors.dtype)


@triton.jit
def _mix_channels(
    x, out, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps, rows, hidden,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Mix the channels of ROWS positions; WIDTH is CHANNELS up to a power of two."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, WIDTH)
    exists = channel < CHANNELS
    inside = (row < rows) & exists[None, :]
    offsets = row * CHANNELS + channel[None, :]
    values = tl.load(x + offsets, inside, 0.0).to(tl.float32)
    mean = tl.sum(values, 1) / CHANNELS
    centered = tl.where(exists[None, :], values - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centered * centered, 1) / CHANNELS + eps)
    scale = tl.load(norm_weight + channel, exists, 0.0).to(tl.float32)
    shift = tl.load(norm_bias + channel, exists, 0.0).to(tl.float32)
    vectors = (centered * inverse[:, None] * scale[None, :] + shift[None, :]).to(weight1.dtype.element_ty)
    mixed = _mlp(vectors, weight1, bias1, weight2, bias2, channel, exists, CHANNELS, hidden, UNITS)
    tl.store(out + offsets, (tl.load(x + offsets, inside, 0.0) + mixed).to(out.dtype.element_ty), inside)


@triton.jit
def _mix_tokens(
    x, out, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps,
    lines, hidden, image_stride, position_stride, line_stride,
    LENGTH: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    POSITIONS: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Mix LINES lines of LENGTH positions with GROUPS groups of GROUP channels; the other sizes are powers of two."""
    blocks = tl.cdiv(lines, LINES)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    line = (tl.program_id(0) % blocks * LINES + tl.arange(0, LINES))[:, None, None, None]
    within = tl.arange(0, WIDTH)[None, :, None, None]
    group = tl.arange(0, GROUPS)[None, None, :, None]
    position = tl.arange(0, POSITIONS)[None, None, None, :]
    channel = group * GROUP + within
    inside = (line < lines) & (within < GROUP) & (position < LENGTH)
    offsets = image * image_stride + line * line_stride + position * position_stride + channel
    values = tl.load(x + offsets, inside, 0.0).to(tl.float32)  # lines, channels of a group, groups, positions
    count = GROUPS * GROUP
    mean = tl.sum(tl.sum(values, 2), 1) / count  # lines, positions
    centered = tl.where(inside, values - mean[:, None, None, :], 0.0)
    inverse = tl.rsqrt(tl.sum(tl.sum(centered * centered, 2), 1) / count + eps)
    scale = tl.load(norm_weight + channel, within < GROUP, 0.0).to(tl.float32)
    shift = tl.load(norm_bias + channel, within < GROUP, 0.0).to(tl.float32)
    normalized = tl.where(inside, centered * inverse[:, None, None, :] * scale + shift, 0.0)
    vectors = tl.reshape(normalized.to(weight1.dtype.element_ty), (LINES * WIDTH, GROUPS * POSITIONS))
    column = tl.arange(0, GROUPS * POSITIONS)
    feature = column // POSITIONS * LENGTH + column % POSITIONS
    exists = column % POSITIONS < LENGTH
    mixed = _mlp(vectors, weight1, bias1, weight2, bias2, feature, exists, GROUPS * LENGTH, hidden, UNITS)
    mixed = tl.reshape(mixed, (LINES, WIDTH, GROUPS, POSITIONS))
    tl.store(out + offsets, (tl.load(x + offsets, inside, 0.0) + mixed).to(out.dtype.element_ty), inside)


# blocks, warps and stages of loading weights are the fastest of some for S, measured on an H100
def _token_options(length: int, raft_size: int, group: int) -> dict[str, int]:
    """Return the sizes of the blocks of token mixing, powers of two with 16 features or more, and launch options."""
    width = triton.next_power_of_2(group)
    positions = max(triton.next_power_of_2(length), 16 // raft_size)
    sizes = dict(POSITIONS=positions, LINES=max(1, 64 // width), WIDTH=width, UNITS=UNITS)
    return dict(sizes, num_warps=4 if width < 256 else 8, num_stages=3)


def _channel_options(channels: int) -> dict[str, int]:
    """Return the sizes of the blocks of channel mixing, and launch options."""
    width = max(16, triton.next_power_of_2(channels))
    rows, warps = (64, 4) if width <= 128 else (128, 8)
    return dict(ROWS=rows, WIDTH=width, UNITS=UNITS, num_warps=warps, num_stages=3)


def is_supported(features: int, channels: int, raft_size: int, axis: str) -> bool:
    """Return whether there is a kernel for a mixing: by its raft size, and a block's numbers, which stay on the chip.

    Args:
        features: Inputs of the first Linear.
        channels: Channels C.
        raft_size: Number r of channel groups.
        axis: As in ``raftmlp.model.ops.fused``.
    """
    if axis == "channels":
        return triton.next_power_of_2(channels) <= 256
    sizes = _token_options(features // raft_size, raft_size, channels // raft_size)
    is_power = raft_size & (raft_size - 1) == 0
    return is_power and axis != "both" and raft_size * sizes["POSITIONS"] * sizes["LINES"] * sizes["WIDTH"] <= TILE


def mix(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    raft_size: int,
    axis: str,
) -> Tensor:
    """Return x + MLP(LN(x)) for contiguous tensors, x of shape (B, H, W, C).

    Args are those of ``raftmlp.model.ops.fused``; x and the weights of the products are of one type, with 16 bits.
    """
    out = torch.empty_like(x)
    parameters = (norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    hidden, (B, H, W, channels) = len(weight1), x.shape
    if not x.numel():
        return out
    with torch.cuda.device_of(x):
        if axis == "channels":
            rows, options = B * H * W, _channel_options(channels)
            _mix_channels[(triton.cdiv(rows, options["ROWS"]),)](
                x, out, *parameters, eps, rows, hidden, CHANNELS=channels, **options
            )
            return out
        down, across = (H, W * channels), (W, channels)  # lengths and strides of the axes of a map
        (length, stride), (lines, line_stride) = (down, across) if axis == "height" else (across, down)
        group = channels // raft_size
        options = _token_options(length, raft_size, group)
        _mix_tokens[(B * triton.cdiv(lines, options["LINES"]),)](
            x, out, *parameters, eps, lines, hidden, H * W * channels, stride, line_stride,
            LENGTH=length, GROUPS=raft_size, GROUP=group, **options
        )  # fmt: skip
    return out
