"""The mixings on a CPU, a slice of the stream at a time, so that what lies between its two products stays in the cache.

A mixing x + scale * MLP(LN(x)) makes a tensor of 2 or 4 times the stream's size between its products. For a batch that
is more than any cache holds: a CPU then waits for memory, not for arithmetic. Vectors are independent of each other, so
a slice of them goes all the way before the next one starts. The backward pass does the same and computes each slice
anew from x, which is all that is kept for it. For PyTorch a mixing is one operator, in compiled graphs too.

The numbers are those of the plain operators in ``raftmlp.layers``, which serve every other device, small batches where
no gradients are asked for, TorchScript, exports and function transforms.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Mixing", "fits_one_slice", "mix_all_in_slices", "mix_in_slices"]

BYTES_A_THREAD = 2**21  # between the products of a slice: about what a core's own cache holds
COLUMNS = 512  # that a product is split into; more of them and MKL gets slower
ONE = 16.0  # GELU leaves it as it is, exactly, and a bias can be divided by a power of two without loss


class _ChannelMLP:
    """The MLP of channel mixing for a stream (N, C): vectors are rows."""

    def __init__(self, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor):
        self.weight1, self.bias1, self.weight2, self.bias2 = weight1, bias1, weight2, bias2

    def slices(self, x: Tensor) -> list[slice]:
        """Return the rows of each slice; not so few that reading the weights would cost more than they do."""
        hidden, features = self.weight1.shape
        return _split(len(x), max(features, BYTES_A_THREAD * torch.get_num_threads() // (hidden * x.element_size())))

    def gather(self, x: Tensor) -> Tensor:
        """Return vectors, or their gradients, as the products take them."""
        return x

    def enter(self, x: Tensor) -> Tensor:
        """Return vectors as the first product takes them."""
        return x

    def leave(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradients of what ``enter`` took, laid out as it is."""
        return grad

    def first(self, vectors: Tensor) -> Tensor:
        """Return the first product."""
        return torch.addmm(self.bias1, vectors, self.weight1.t())

    def add_second(self, x: Tensor, scale: Tensor | None, hidden: Tensor, out: Tensor) -> None:
        """Write x + scale * (second product) to out."""
        if scale is None:
            torch.add(x, self.bias2, out=out)
            torch.addmm(out, hidden, self.weight2.t(), out=out)
        else:
            torch.addcmul(x, torch.addmm(self.bias2, hidden, self.weight2.t()), scale, out=out)

    def first_backward(self, grad: Tensor) -> Tensor:
        """Return the gradients of what the first product takes."""
        return torch.mm(grad, self.weight1)

    def second_backward(self, grad: Tensor) -> Tensor:
        """Return the gradients of what the second product takes."""
        return torch.mm(grad, self.weight2)

    def first_gradients(self, grad: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the first product's weight and bias."""
        return torch.mm(grad.t(), vectors), grad.sum(0)

    second_gradients = first_gradients


class _TokenMLP:
    """The MLP of token mixing for a stream (B, H, W, C): vectors are columns of matrices (B, features, N).

    PyTorch writes a bias that goes with weights on the left into the whole result before it multiplies. Here biases are
    a column of the weights, and vectors have a row of ones for it: ``enter`` puts them beside one, and a row of the
    first weights, of zeros but for the bias, makes the next.
    """

    def __init__(self, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, layout: Sequence[int]):
        self.features = len(bias2)
        one = F.pad(bias1.new_full((1, 1), ONE), (self.features, 0))
        self.weight1 = torch.cat([torch.cat([weight1, bias1[:, None]], 1), one])
        self.weight2 = torch.cat([weight2, bias2[:, None] / ONE], 1)
        self.raft_size, *self.order = layout
        self.entered = bias1.new_empty(0)

    def slices(self, x: Tensor) -> list[slice]:
        """Return the images of each slice."""
        image = math.prod(x.shape[1:]) * len(self.weight1) // self.features * x.element_size()
        return _split(len(x), BYTES_A_THREAD * torch.get_num_threads() // image)

    def _arrange(self, x: Tensor) -> tuple[list[int], list[int]]:
        """Return a shape of six axes to view x in, and the order of axes (B, N0, F1, F2, N1, N2) that gathers columns.

        The outer axis of columns is split, N0 x N1, so that a product has COLUMNS columns or less where that can be.
        """
        B, H, W, C = x.shape
        shape = [B, H, W, self.raft_size, C // self.raft_size]
        _, first, second, split, other = self.order
        length, columns = shape[split], shape[split] * shape[other]
        pieces = next((n for n in range(1, length) if length % n == 0 and columns // n <= COLUMNS), length)
        shape[split : split + 1] = [pieces, length // pieces]
        moved = [axis + (axis > split) for axis in (first, second, other)]
        return shape, [0, split, *moved[:2], split + 1, moved[2]]

    def _gather(self, x: Tensor) -> Tensor:
        """Return the columns of x as a view of six axes."""
        shape, order = self._arrange(x)
        return x.view(shape).permute(order)

    def _scatter(self, columns: Tensor, x: Tensor) -> Tensor:
        """Return such columns as a view of six axes in the order of the stream x."""
        shape, order = self._arrange(x)
        columns = columns.view([shape[axis] for axis in order])
        return columns.permute([order.index(axis) for axis in range(6)])

    def gather(self, x: Tensor) -> Tensor:
        return self._gather(x).flatten(4).flatten(2, 3).flatten(0, 1)

    def enter(self, x: Tensor) -> Tensor:
        view = self._gather(x)
        items, columns = view.shape[0] * view.shape[1], view.shape[4] * view.shape[5]
        if len(self.entered) < items:
            self.entered = x.new_ones(items, self.features + 1, columns)
        vectors = self.entered[:items]
        vectors[:, :-1].view(view.shape).copy_(view)
        return vectors

    def leave(self, grad: Tensor, x: Tensor) -> Tensor:
        return self._scatter(grad, x).reshape(x.shape)

    def first(self, vectors: Tensor) -> Tensor:
        return torch.bmm(self.weight1.expand(len(vectors), -1, -1), vectors)

    def add_second(self, x: Tensor, scale: Tensor | None, hidden: Tensor, out: Tensor) -> None:
        y = self._scatter(torch.bmm(self.weight2.expand(len(hidden), -1, -1), hidden), x)
        x, out = x.view(y.shape), out.view(y.shape)
        if scale is None:
            torch.add(x, y, out=out)
        else:
            torch.addcmul(x, y, scale.view(-1, 1, 1, 1, 1, 1), out=out)

    def first_backward(self, grad: Tensor) -> Tensor:
        return torch.bmm(self.weight1[:, :-1].t().expand(len(grad), -1, -1), grad)

    def second_backward(self, grad: Tensor) -> Tensor:
        return torch.bmm(self.weight2.t().expand(len(grad), -1, -1), grad)

    def first_gradients(self, grad: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.bmm(grad, vectors.mT).sum(0)[:-1]
        return both[:, :-1], both[:, -1]

    def second_gradients(self, grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.bmm(grad, hidden.mT).sum(0)
        return both[:, :-1], both[:, -1] / ONE


def _split(length: int, most: int) -> list[slice]:
    """Return equal slices of a length, none longer than most (or 1)."""
    count = -(-length // max(1, most))
    return [slice(length * i // count, length * (i + 1) // count) for i in range(count)]


def _mlp(parameters: Sequence[Tensor], layout: Sequence[int]) -> _ChannelMLP | _TokenMLP:
    return _ChannelMLP(*parameters[2:]) if _of_channels(layout) else _TokenMLP(*parameters[2:], layout)


def _of_channels(layout: Sequence[int]) -> bool:
    return list(layout[1:]) == [0, 1, 2, 3, 4]


def _forward(x, scale, parameters, layout, eps, out) -> None:
    """Write x + scale * MLP(LN(x)) to out, which may be x."""
    norm_weight, norm_bias = parameters[:2]
    mlp = _mlp(parameters, layout)
    for part in mlp.slices(x):
        normed = F.layer_norm(x[part], x.shape[-1:], norm_weight, norm_bias, eps)
        hidden = torch.ops.aten.gelu_(mlp.first(mlp.enter(normed)))
        mlp.add_second(x[part], None if scale is None else scale[part], hidden, out[part])


# The operators take what Mixing holds. For channel mixing x is (N, C), and scale (N, 1): of a stream whose H and W are
# dynamic, inductor could not tell how the strides are ordered.


@torch.library.custom_op(
    "raftmlp::mixing",
    mutates_args=(),
    schema="(Tensor x, Tensor? scale, Tensor[] parameters, int[] layout, float eps) -> Tensor",
)
def _mixing(x, scale, parameters, layout, eps):
    x = x.contiguous()
    out = torch.empty_like(x)
    _forward(x, scale, parameters, layout, eps, out)
    return out


@_mixing.register_fake
def _(x, scale, parameters, layout, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# Several mixings one after the other, without gradients: all but the first write over what they read.
@torch.library.custom_op(
    "raftmlp::mixings",
    mutates_args=(),
    schema="(Tensor x, Tensor[] parameters, int[] layouts, float[] eps) -> Tensor",
)
def _mixings(x, parameters, layouts, eps):
    x = x.contiguous()
    out = torch.empty_like(x)
    for i in range(len(eps)):
        layout, before = layouts[6 * i : 6 * i + 6], out if i else x
        shape = (-1, x.shape[3]) if _of_channels(layout) else x.shape
        _forward(before.view(shape), None, parameters[6 * i : 6 * i + 6], layout, eps[i], out.view(shape))
    return out


@_mixings.register_fake
def _(x, parameters, layouts, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# The gradients of x and of the parameters; empty where they are not needed.
@torch.library.custom_op(
    "raftmlp::mixing_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor x, Tensor? scale, Tensor[] parameters, int[] layout, float eps, bool[] needs) "
    "-> Tensor[]",
)
def _mixing_backward(grad_out, x, scale, parameters, layout, eps, needs):
    grad_out, x = grad_out.contiguous(), x.contiguous()
    norm_weight, norm_bias = parameters[:2]
    mlp = _mlp(parameters, layout)
    needs_x, needs_norm, needs_first, needs_second = needs[0], any(needs[1:3]), any(needs[3:5]), any(needs[5:7])
    before_gelu = needs_x or needs_norm or needs_first
    grad_x = torch.empty_like(x) if needs_x else None
    grads = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters]
    for part in mlp.slices(x):
        grad = grad_out[part]
        normed, mean, rstd = torch.native_layer_norm(x[part], x.shape[-1:], norm_weight, norm_bias, eps)
        vectors = mlp.enter(normed)
        hidden = mlp.first(vectors)
        grad_y = mlp.gather(grad if scale is None else grad * scale[part])
        if needs_second:
            _add(grads[4:6], mlp.second_gradients(grad_y, F.gelu(hidden)))
        if not before_gelu:
            continue
        grad_hidden = torch.ops.aten.gelu_backward(mlp.second_backward(grad_y), hidden)
        if needs_first:
            _add(grads[2:4], mlp.first_gradients(grad_hidden, vectors))
        if not (needs_x or needs_norm):
            continue
        grad_normed = mlp.leave(mlp.first_backward(grad_hidden), normed)
        mask = [needs_x, needs_norm, needs_norm]
        grad_part, *grad_norm = torch.ops.aten.native_layer_norm_backward(
            grad_normed, x[part], x.shape[-1:], mean, rstd, norm_weight, norm_bias, mask
        )
        if needs_norm:
            _add(grads[:2], grad_norm)
        if needs_x:
            torch.add(grad_part, grad, out=grad_x[part])
    return [grad if needed else x.new_empty(0) for grad, needed in zip([grad_x, *grads], needs)]


@_mixing_backward.register_fake
def _(grad_out, x, scale, parameters, layout, eps, needs):
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for tensor, needed in zip([x, *parameters], needs)
    ]


def _add(sums, parts) -> None:
    for total, part in zip(sums, parts):
        total += part


def _keep(ctx, inputs, output):
    x, scale, parameters, *ctx.how = inputs
    ctx.save_for_backward(x, scale, *parameters)


def _gradients(ctx, grad_out):
    x, scale, *parameters = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2]]
    if torch.is_grad_enabled():  # a derivative of the derivative is asked for
        grads = _plain_gradients(grad_out, x, scale, parameters, *ctx.how, needs)
    else:
        grads = torch.ops.raftmlp.mixing_backward(grad_out, x, scale, parameters, *ctx.how, needs)
    grads = [grad if needed else None for grad, needed in zip(grads, needs)]
    return grads[0], None, grads[1:], None, None


_mixing.register_autograd(_gradients, setup_context=_keep)


def _plain_gradients(grad_out, x, scale, parameters, layout, eps, needs) -> list[Tensor | None]:
    # views: x may hang on the parameters, and they on each other, and what is asked for are the partial derivatives
    x, *parameters = (tensor.view_as(tensor) for tensor in (x, *parameters))
    norm_weight, norm_bias, weight1, bias1, weight2, bias2 = parameters
    y = F.layer_norm(x.contiguous(), x.shape[-1:], norm_weight, norm_bias, eps)
    if _of_channels(layout):
        y = F.linear(F.gelu(F.linear(y, weight1, bias1)), weight2, bias2)
    else:
        mlp = _mlp(parameters, layout)
        vectors = weight2 @ F.gelu(weight1 @ mlp.gather(y) + bias1[:, None]) + bias2[:, None]
        y = mlp.leave(vectors, y)
    out = x + (y if scale is None else y * scale)
    inputs = [tensor for tensor, needed in zip((x, *parameters), needs) if needed]
    found = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def fits_one_slice(x: Tensor, mlp_ratio: float) -> bool:
    """Return whether a stream is so small that slices gain nothing."""
    return x.numel() * x.element_size() * mlp_ratio <= BYTES_A_THREAD * torch.get_num_threads()


class Mixing(NamedTuple):
    """What a mixing computes with.

    Args:
        parameters: Weight and bias of the LayerNorm, of the first and of the second Linear.
        layout: The raft size r, and the axes of the stream (B, H, W, r, C / r) in an order: 0, the two that a vector of
            token mixing runs along, and the other two. For channel mixing 1, and the axes as they are.
        eps: The LayerNorm's.
    """

    parameters: list[Tensor]
    layout: list[int]
    eps: float


def mix_in_slices(x: Tensor, mixing: Mixing, scale: Tensor | None = None) -> Tensor:
    """Return x + scale * MLP(LN(x)).

    Args:
        x: The stream, (B, H, W, C), on a CPU.
        mixing: What is computed.
        scale: What each image's MLP counts, (B, 1, 1, 1), without gradient; None for 1.
    """
    if not _of_channels(mixing.layout):
        return torch.ops.raftmlp.mixing(x, scale, *mixing)
    B, H, W, C = x.shape
    if scale is not None:
        scale = scale.expand(B, H, W, 1).reshape(B * H * W, 1)
    return torch.ops.raftmlp.mixing(x.reshape(B * H * W, C), scale, *mixing).reshape(B, H, W, C)


def mix_all_in_slices(x: Tensor, mixings: Sequence[Mixing]) -> Tensor:
    """Return the stream x after several mixings, without gradients; it needs memory for one stream."""
    parameters, layouts = ([entry for mixing in mixings for entry in mixing[i]] for i in range(2))
    return torch.ops.raftmlp.mixings(x, parameters, layouts, [mixing.eps for mixing in mixings])
