"""The MLP of a mixing as a function, and kernels that compute a whole mixing for inference.

A mixing is x + MLP(LN(x)) along an axis of the map: "height", "width", "both" (plain token mixing) or "channels".
Its layers are called one by one for gradients, exports and small maps. For inference a CPU works in chunks that fit
its cache, and a GPU in blocks that stay on the chip (``raftmlp.model.triton``). Compiled graphs call these kernels as
the operator ``raftmlp::mixing``.
"""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["fused", "may_be_fused", "plain_operators", "token_mlp", "vectors_to_map", "vectors_to_matrix"]

BYTES_PER_THREAD = 2**21  # of a chunk's hidden values: about the size of a core's own cache
SCHEMA = (
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight1, Tensor? bias1, Tensor weight2, "
    "Tensor? bias2, float eps, int raft_size, str axis) -> Tensor"
)

_kernels_are_used = ContextVar("_kernels_are_used", default=True)


def vectors_to_matrix(x: Tensor, raft_size: int, axis: str) -> Tensor:
    """Return the vectors of token mixing in a map, (B, H, W, C), as the columns of a matrix for each image.

    Its shape is (B, r H, W C/r) along the height, (B, r W, H C/r) along the width, (B, H W, C) along both, with the
    raft size r: the innermost axis is copied as it is.
    """
    B, H, W, C = x.shape
    if axis == "both":
        return x.reshape(B, H * W, C)
    x = x.reshape(B, H, W, raft_size, C // raft_size)
    if axis == "height":
        return x.permute(0, 3, 1, 2, 4).reshape(B, raft_size * H, W * (C // raft_size))
    return x.permute(0, 3, 2, 1, 4).reshape(B, raft_size * W, H * (C // raft_size))


def vectors_to_map(matrix: Tensor, H: int, W: int, raft_size: int, axis: str) -> Tensor:
    """Return such a matrix as a view: a map (B, H, W, r, C/r), or (B, H, W, C) for vectors along both axes."""
    B, _, N = matrix.shape
    if axis == "both":
        return matrix.reshape(B, H, W, N)
    if axis == "height":
        return matrix.reshape(B, raft_size, H, W, N // W).permute(0, 2, 3, 1, 4)
    return matrix.reshape(B, raft_size, W, H, N // H).permute(0, 3, 2, 1, 4)


def _product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return weight @ x + bias, (B, out, N), for x of shape (B, in, N)."""
    weight = weight.expand(x.shape[0], -1, -1)
    if bias is None:
        return torch.bmm(weight, x)
    return torch.baddbmm(bias.unsqueeze(1), weight, x)


def token_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    raft_size: int,
    axis: str,
) -> Tensor:
    """Return the MLP of token mixing for a normalized map, (B, H, W, C), in a shape of ``vectors_to_map``.

    Args:
        x: Normalized map.
        weight1: Weight of the first Linear, (hidden, features).
        bias1: Its bias, or None.
        weight2: Weight of the second Linear, (features, hidden).
        bias2: Its bias, or None.
        raft_size: Number r of channel groups, 1 along both axes.
        axis: "height", "width" or "both".
    """
    H, W = x.shape[1], x.shape[2]
    hidden = F.gelu(_product(weight1, vectors_to_matrix(x, raft_size, axis), bias1))
    return vectors_to_map(_product(weight2, hidden, bias2), H, W, raft_size, axis)


def _mlp(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps, raft_size, axis) -> Tensor:
    """Return MLP(LN(x)) for x of shape (B, H, W, C), or (N, C) along channels."""
    x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    if axis == "channels":
        return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
    return token_mlp(x, weight1, bias1, weight2, bias2, raft_size, axis)


# Kernels for inference


def _chunked_cpu(x: Tensor, *parameters) -> Tensor:
    """Compute the mixing for some images, or rows, at a time, so that hidden values stay in the CPU's cache."""
    x = x.contiguous()
    out = torch.empty_like(x)
    ways = (x.flatten(0, 2), out.flatten(0, 2)) if parameters[-1] == "channels" else (x, out)
    length = _chunk_length(ways[0], parameters[2])
    for part, result in zip(*(way.split(length) for way in ways)):
        mixed = _mlp(part, *parameters)
        torch.add(part.view(mixed.shape), mixed, out=result.view(mixed.shape))
    return out


def _chunk_length(x: Tensor, weight1: Tensor) -> int:
    """Return the length of a chunk: work for every thread, and not so little that reading the weights dominates."""
    hidden, features = weight1.shape
    vectors = max(1, x[:1].numel() // features)  # of one entry of the first axis
    entries = max(1, BYTES_PER_THREAD // (vectors * hidden * x.element_size()))
    return max(entries * torch.get_num_threads(), features // vectors)


def _triton(x: Tensor, *parameters) -> Tensor:
    """Compute the mixing on a GPU in one pass over memory."""
    from . import triton

    tensors, others = parameters[:6], parameters[6:]
    return triton.mix(x.contiguous(), *(p.contiguous() for p in tensors), *others)


def _fits_triton(x: Tensor, tensors: Sequence[Tensor | None], raft_size: int, axis: str) -> bool:
    """Return whether the kernels for GPUs take a mixing: in 16 bits, with biases, and sizes that fit the chip."""
    if x.dtype not in (torch.bfloat16, torch.float16) or any(p is None for p in tensors):
        return False
    if any(p.dtype != x.dtype for p in tensors[2:]) or any(p.device != x.device for p in tensors):
        return False
    return _is_supported(x.device, tensors[2].shape[1], tensors[0].shape[0], raft_size, axis)


@torch.compiler.assume_constant_result
def _is_supported(device: torch.device, features: int, channels: int, raft_size: int, axis: str) -> bool:
    if not _has_triton(device):
        return False
    from . import triton

    return triton.is_supported(features, channels, raft_size, axis)


@lru_cache
def _has_triton(device: torch.device) -> bool:
    """Return whether the kernels run on a GPU: Triton is there and compiles, and the chip has the memory."""
    is_nvidia = torch.version.cuda is not None and torch.cuda.is_available()  # not AMD's, nor a fake tensor's
    if not is_nvidia or importlib.util.find_spec("triton") is None:
        return False
    from . import triton

    memory = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    if memory < triton.SHARED_MEMORY:
        return False
    with _disable_current_modes():  # the first call may be a compilation's, of fake tensors
        try:
            ones = torch.ones(1, 1, 16, 16, dtype=torch.float16, device=device)
            weight, bias = ones[0, 0], ones[0, 0, 0]
            triton.mix(ones, bias, bias, weight, bias, weight, bias, 1e-5, 1, "channels")
        except Exception as error:  # Triton needs a C compiler and Python's headers
            warnings.warn(f"plain operators are used on {device}, Triton's kernels do not run: {error}", stacklevel=2)
            return False
    return True


# The choice


def may_be_fused(x: Tensor, mlp_ratio: float) -> bool:
    """Return whether a call is one for kernels: inference on a CPU or a GPU, and more than one chunk on a CPU.

    Exports, traces and transforms such as ``torch.func.vmap`` have the plain operators.
    """
    if torch.is_grad_enabled() or type(x) is not Tensor or torch.jit.is_tracing():
        return False
    if torch.compiler.is_compiling():  # without a question about sizes, which would be a graph for every answer
        return not torch.compiler._is_exporting_flag
    if x.is_cpu and x.numel() * mlp_ratio * x.element_size() <= BYTES_PER_THREAD * torch.get_num_threads():
        return False
    in_transform = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return _kernels_are_used.get() and not in_transform


def fused(x: Tensor, tensors: Sequence[Tensor | None], eps: float, raft_size: int, axis: str) -> Tensor | None:
    """Return the mixing by a kernel, or None where none takes it.

    Args:
        x: Map of shape (B, H, W, C).
        tensors: Weight and bias of the LayerNorm, the first and the second Linear.
        eps: The LayerNorm's.
        raft_size: Number r of channel groups, 1 along both axes and along channels.
        axis: "height", "width", "both" or "channels".
    """
    device = x.device.type
    if device not in KERNELS or (device == "cpu" and torch.is_autocast_enabled("cpu")):
        return None
    if device == "cuda":
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            tensors = [*tensors[:2], *(p if p is None else p.to(dtype) for p in tensors[2:])]
        if not _fits_triton(x, tensors, raft_size, axis):
            return None
    compute = torch.ops.raftmlp.mixing.default if torch.compiler.is_compiling() else KERNELS[device]
    return compute(x, *tensors, eps, raft_size, axis)


@contextmanager
def plain_operators() -> Iterator[None]:
    """Compute mixings with plain operators alone within this context, in eager mode."""
    token = _kernels_are_used.set(False)
    try:
        yield
    finally:
        _kernels_are_used.reset(token)


KERNELS = {"cpu": _chunked_cpu, "cuda": _triton}  # by type of device

torch.library.define("raftmlp::mixing", SCHEMA, tags=torch.Tag.pt2_compliant_tag)
torch.library.register_fake(
    "raftmlp::mixing", lambda x, *parameters: torch.empty(x.shape, dtype=x.dtype, device=x.device)
)
for _device, _kernel in KERNELS.items():
    torch.library.impl("raftmlp::mixing", _device, _kernel)
