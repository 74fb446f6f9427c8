"""The mixing as one operator of PyTorch, ``raftmlp::mixing``, with an implementation for each device.

A mixing is x + MLP(LN(x)). Plain PyTorch operators compute it on any device, for gradients of any order, and under
autocast, ``torch.jit.trace`` and ``torch.func``. For inference, devices have kernels in KERNELS: a CPU works in slices
that fit its cache, a GPU in blocks that stay on the chip (``raftmlp.fused``). The dispatcher chooses; compiled graphs
call the kernel for inference, and have the plain operators otherwise.
"""

import importlib.util
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["add_mixed", "mixing", "token_mlp"]

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
    from . import fused

    tensors, others = parameters[:6], parameters[6:]
    return fused.mix(x.contiguous(), *(p.contiguous() for p in tensors), *others)


def _fits_on_chip(x: Tensor, *parameters) -> bool:
    """Return whether the kernels for GPUs take a mixing: in 16 bits, with biases, and sizes that fit the chip."""
    *tensors, _, raft_size, order = parameters
    if any(p is None for p in tensors) or not _has_triton(x.device):
        return False
    products = tensors[2:]
    lowered = products[0].dtype in (torch.bfloat16, torch.float16) and len({p.dtype for p in products}) == 1
    if not lowered or x.dtype not in (products[0].dtype, torch.float32):
        return False
    from . import fused

    return fused.takes(products[0], x.shape[-1], raft_size, order)


@lru_cache
def _has_triton(device: torch.device) -> bool:
    """Return whether a GPU computes bfloat16 in its tensor cores, and Triton is there to program it."""
    if torch.version.cuda is None or not torch.cuda.is_available():  # AMD's, or a fake tensor's
        return False
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _choose(x: Tensor, *parameters) -> Tensor:
    """Call the kernel of x's device if there is one, and no derivative is asked for."""
    tensors = [x, *(p for p in parameters if isinstance(p, Tensor))]
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    forward = any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if backward or forward or not _has_kernel(x, *parameters):
        return _plain(x, *parameters)
    with torch._C._AutoDispatchBelowAutograd():
        return mixing(x, *parameters)


def _has_kernel(x: Tensor, *parameters) -> bool:
    """Return whether the kernel of x's device takes a mixing."""
    device = x.device.type
    return device in KERNELS and (device != "cuda" or _fits_on_chip(x, *parameters))


def _under_autocast(x: Tensor, *parameters) -> Tensor:
    """Compute the mixing with products in autocast's type; on a GPU in one pass, where no derivative is asked for."""
    if x.device.type == "cuda" and not torch.is_grad_enabled():
        norm, products, others = parameters[:2], parameters[2:6], parameters[6:]
        dtype = torch.get_autocast_dtype("cuda")
        products = tuple(p if p is None else p.to(dtype) for p in products)
        if _fits_on_chip(x, *norm, *products, *others):
            with torch.autocast("cuda", enabled=False):
                return mixing(x, *norm, *products, *others)
    return _plain(x, *parameters)


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
