"""The mixing as one operator of PyTorch, ``raftmlp::mixing``, with an implementation for each device.

A mixing is x + MLP(LN(x)). Plain PyTorch operators compute it on any device, for gradients of any order, and under
autocast, ``torch.jit.trace`` and ``torch.func``. For inference, devices have kernels in KERNELS: a CPU works in slices
that fit its cache, a GPU in blocks that stay on the chip (``raftmlp.model.triton``). The dispatcher chooses; compiled
graphs call the kernel for inference, and have the plain operators otherwise.
"""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["add_mixed", "mixing", "plain_operators", "token_mlp"]

BYTES_PER_THREAD = 2**21  # of a slice's hidden values: about the size of a core's own cache
SCHEMA = (
    "mixing(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight1, Tensor? bias1, Tensor weight2, "
    "Tensor? bias2, float eps, int raft_size, int[] order) -> Tensor"
)


def _product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return weight @ x + bias, (B, out, N), for x of shape (B, in, N)."""
    weight = weight.expand(x.shape[0], -1, -1)
    if bias is None:
        return torch.bmm(weight, x)
    return torch.baddbmm(bias.unsqueeze(1), weight, x)


def gather_vectors(x: Tensor, raft_size: int, order: list[int]) -> Tensor:
    """Return the vectors of token mixing as a view of x, (B, H, W, C), with five axes in the given order."""
    B, H, W, C = x.shape
    return x.reshape(B, H, W, raft_size, C // raft_size).permute(order)


def scatter_vectors(vectors: Tensor, order: list[int]) -> Tensor:
    """Return such vectors as a view of shape (B, H, W, r, C / r)."""
    return vectors.permute([order.index(axis) for axis in range(5)])


def token_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    raft_size: int,
    order: list[int],
) -> Tensor:
    """Return the MLP of token mixing for a normalised x of shape (B, H, W, C), as (B, H, W, r, C / r).

    Vectors are the columns of a matrix for each image, so that the innermost axis C / r is copied as it is.

    Args:
        x: Normalised NHWC feature map.
        weight1: Weight of the first Linear, (hidden, features).
        bias1: Its bias, or None.
        weight2: Weight of the second Linear, (features, hidden).
        bias2: Its bias, or None.
        raft_size: Number r of channel groups.
        order: The axes of (B, H, W, r, C / r): 0, the two along which a vector runs, and the other two.
    """
    vectors = gather_vectors(x, raft_size, order)
    shape = vectors.shape
    hidden = F.gelu(_product(weight1, vectors.flatten(1, 2).flatten(2), bias1))
    return scatter_vectors(_product(weight2, hidden, bias2).reshape(shape), order)


def add_mixed(x: Tensor, mixed: Tensor) -> Tensor:
    """Return x + mixed in the shape of x; mixed may have the channels in groups."""
    return (x.reshape(mixed.shape) + mixed).reshape(x.shape)


def _mlp(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps, raft_size, order) -> Tensor:
    """Return MLP(LN(x)) for x of shape (B, H, W, C), or (N, C) in channel mixing, where order is empty."""
    x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    if order:
        return token_mlp(x, weight1, bias1, weight2, bias2, raft_size, order)
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def _plain(x: Tensor, *parameters) -> Tensor:
    """Compute the mixing with plain operators, differentiable as they are."""
    x = x.contiguous()
    return add_mixed(x, _mlp(x, *parameters))


def _in_slices(x: Tensor, *parameters) -> Tensor:
    """Compute the mixing for one slice of x's first axis at a time, so that hidden values stay in the CPU's cache."""
    x = x.contiguous()
    out = torch.empty_like(x)
    length = _slice_length(x, parameters[2])
    for part, result in zip(x.split(length), out.split(length)):
        mixed = _mlp(part, *parameters)
        torch.add(part.view(mixed.shape), mixed, out=result.view(mixed.shape))
    return out


def _slice_length(x: Tensor, weight1: Tensor) -> int:
    """Return the length of a slice: work for every thread, and not so little that reading the weights dominates."""
    hidden, features = weight1.shape
    vectors = max(1, x[:1].numel() // features)  # of one entry of the first axis
    entries = max(1, BYTES_PER_THREAD // (vectors * hidden * x.element_size()))
    return max(entries * torch.get_num_threads(), features // vectors)


def _on_chip(x: Tensor, *parameters) -> Tensor:
    """Compute the mixing on a GPU in one pass over memory, where its kernels take it, else with plain operators."""
    if not _fits_on_chip(x, *parameters):
        return _plain(x, *parameters)
    from . import triton

    tensors, others = parameters[:6], parameters[6:]
    return triton.mix(x.contiguous(), *(p.contiguous() for p in tensors), *others)


def _fits_on_chip(x: Tensor, *parameters) -> bool:
    """Return whether the kernels for GPUs take a mixing: in 16 bits, with biases, and sizes that fit the chip."""
    *tensors, _, raft_size, order = parameters
    if x.dtype not in (torch.bfloat16, torch.float16) or any(p is None for p in tensors):
        return False
    if {x.dtype} != {p.dtype for p in tensors[2:]} or {x.device} != {p.device for p in tensors}:
        return False
    if not _has_triton(x.device):
        return False
    from . import triton

    return triton.takes(tensors[2], x.shape[-1], raft_size, order)


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
            ones = torch.ones(16, 16, dtype=torch.float16, device=device)
            triton.mix(ones, *[ones[0], ones[0], ones, ones[0], ones, ones[0]], 1e-5, 1, [])
        except Exception as error:  # Triton needs a C compiler and Python's headers
            warnings.warn(f"plain operators are used on {device}, Triton's kernels do not run: {error}", stacklevel=2)
            return False
    return True


def _choose(x: Tensor, *parameters) -> Tensor:
    """Call the kernel of x's device if there is one, and no derivative is asked for."""
    if _asks_derivative(x, *parameters) or not _has_kernel(x, *parameters):
        return _plain(x, *parameters)
    with torch._C._AutoDispatchBelowAutograd():
        return mixing(x, *parameters)


def _asks_derivative(x: Tensor, *parameters) -> bool:
    """Return whether the result of a call will be differentiated, backward or forward."""
    tensors = [x, *(p for p in parameters if isinstance(p, Tensor))]
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return backward or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _has_kernel(x: Tensor, *parameters) -> bool:
    """Return whether the kernel of x's device takes a mixing."""
    if not _kernels_are_used.get() or x.device.type not in KERNELS:
        return False
    return x.device.type != "cuda" or _fits_on_chip(x, *parameters)


def _under_autocast(x: Tensor, *parameters) -> Tensor:
    """Compute the mixing with products in autocast's type; on a GPU in one pass, where its kernels take it."""
    if x.device.type == "cuda" and not torch.jit.is_tracing() and not _asks_derivative(x, *parameters):
        dtype = torch.get_autocast_dtype("cuda")
        products = tuple(p if p is None else p.to(dtype) for p in parameters[2:6])
        lowered = (*parameters[:2], *products, *parameters[6:])
        if _has_kernel(x, *lowered):
            with torch.autocast("cuda", enabled=False), torch._C._AutoDispatchBelowAutograd():
                return mixing(x, *lowered)
    return _plain(x, *parameters)


@contextmanager
def plain_operators() -> Iterator[None]:
    """Compute mixings with plain operators alone, within this context and outside ``torch.inference_mode``."""
    token = _kernels_are_used.set(False)
    try:
        yield
    finally:
        _kernels_are_used.reset(token)


_kernels_are_used = ContextVar("_kernels_are_used", default=True)
KERNELS = {"cpu": _in_slices, "cuda": _on_chip}  # for inference, by type of device

_library = torch.library.Library("raftmlp", "DEF")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("mixing", _plain, "CompositeExplicitAutograd")
_library.impl("mixing", _choose, "Autograd")
for _key in ("Tracer", "FuncTorchBatched"):
    _library.impl("mixing", _plain, _key)
for _device, _kernel in KERNELS.items():
    _library.impl("mixing", _kernel, _device.upper())
    _library.impl("mixing", _under_autocast, f"Autocast{_device.upper()}")
mixing = torch.ops.raftmlp.mixing.default
