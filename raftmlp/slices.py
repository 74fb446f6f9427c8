"""The mixings on a CPU, a slice of the stream at a time, so that what lies between its two products stays in the cache.

A mixing x + scale * MLP(LN(x)) makes a tensor of 2 or 4 times the stream's size between its products. For a batch that
is more than any cache holds: a CPU then waits for memory, not for arithmetic. Vectors are independent of each other, so
a slice of them goes all the way before the next one starts. The backward pass does the same and computes each slice
anew from x, which is all that is kept for it.

The numbers are those of the plain operators in ``raftmlp.layers``, which serve every other device, compiled graphs,
TorchScript, exports and function transforms.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Axes", "mix_in_slices"]

BYTES_A_THREAD = 2**19  # between the products of a slice; with all that is around it, what a core's own cache holds


class Axes(NamedTuple):
    """Which numbers of a stream (B, H, W, C) form a vector that an MLP maps.

    Args:
        kind: "vertical" or "horizontal" for raft-token mixing, "plain" for token mixing, "channels" for channel mixing.
        raft_size: Number of channel groups of raft-token mixing.
    """

    kind: str
    raft_size: int = 1

    def gather(self, x: Tensor) -> Tensor:
        """Return the vectors of a stream as the columns of a matrix, (features, N)."""
        B, H, W, C = x.shape
        r = self.raft_size
        if self.kind == "channels":
            return x.reshape(B * H * W, C).t()
        if self.kind == "plain":
            return x.reshape(B, H * W, C).transpose(0, 1).reshape(H * W, B * C)
        x = x.reshape(B, H, W, r, C // r)
        if self.kind == "vertical":
            return x.permute(3, 1, 0, 2, 4).reshape(r * H, B * W * (C // r))
        return x.permute(3, 2, 0, 1, 4).reshape(r * W, B * H * (C // r))

    def scatter(self, columns: Tensor, shape: torch.Size) -> Tensor:
        """Return a view of such a matrix with the numbers at their places in a stream of a shape, (B, H, W, r, C/r)."""
        B, H, W, C = shape
        r = self.raft_size
        if self.kind == "channels":
            return columns.t().view(B, H, W, 1, C)
        if self.kind == "plain":
            return columns.view(H, W, B, 1, C).permute(2, 0, 1, 3, 4)
        if self.kind == "vertical":
            return columns.view(r, H, B, W, C // r).permute(2, 1, 3, 0, 4)
        return columns.view(r, W, B, H, C // r).permute(2, 3, 1, 0, 4)

    def split(self, x: Tensor, hidden_ratio: float) -> Iterator[tuple[slice, slice]]:
        """Return the images and the rows of each slice."""
        B, H, W, C = x.shape
        budget = BYTES_A_THREAD * torch.get_num_threads()
        image = max(1, int(H * W * C * x.element_size() * hidden_ratio))
        if self.kind == "channels" and image > budget:  # any position is a vector
            rows = max(1, H * budget // image)
            for b in range(B):
                for top in range(0, H, rows):
                    yield slice(b, b + 1), slice(top, top + rows)
            return
        images = max(1, budget // image)
        for b in range(0, B, images):
            yield slice(b, b + images), slice(None)


def _matmul(weight: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return weight @ columns + bias, laid out as the columns are."""
    if columns.is_contiguous():
        return torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    rows = columns.t()
    return (torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())).t()


def _mlp(x: Tensor, parameters: tuple[Tensor, ...], axes: Axes, eps: float) -> Tensor:
    """Return MLP(LN(x)) as a view of shape (B, H, W, r, C / r)."""
    norm_weight, norm_bias, weight1, bias1, weight2, bias2 = parameters
    columns = axes.gather(F.layer_norm(x, x.shape[3:], norm_weight, norm_bias, eps))
    columns = _matmul(weight2, F.gelu(_matmul(weight1, columns, bias1)), bias2)
    return axes.scatter(columns, x.shape)


def _hidden_ratio(parameters: tuple[Tensor, ...]) -> float:
    """Return how many hidden units there are for an input of the MLP."""
    hidden, features = parameters[2].shape
    return hidden / features


def _forward(x: Tensor, scale: Tensor | None, parameters: tuple[Tensor, ...], axes: Axes, eps: float) -> Tensor:
    out = torch.empty_like(x)
    for images, rows in axes.split(x, _hidden_ratio(parameters)):
        part = x[images, rows]
        y = _mlp(part, parameters, axes, eps)
        if scale is not None:
            y = y * scale[images].unsqueeze(4)
        torch.add(part.reshape(y.shape), y, out=out[images, rows].view(y.shape))
    return out


class _Mixing(torch.autograd.Function):
    """The mixing with a backward pass in slices."""

    @staticmethod
    def forward(ctx, x, scale, axes, eps, *parameters):
        ctx.save_for_backward(x, scale, *parameters)
        ctx.axes, ctx.eps = axes, eps
        return _forward(x, scale, parameters, axes, eps)

    @staticmethod
    def backward(ctx, grad_out):
        x, scale, *parameters = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        if torch.is_grad_enabled():  # a derivative of the derivative is asked for
            grads = _plain_gradients(grad_out, x, scale, parameters, ctx.axes, ctx.eps, needs)
        else:
            grads = _gradients(grad_out.contiguous(), x, scale, parameters, ctx.axes, ctx.eps, needs)
        return grads[0], None, None, None, *grads[1:]


def _gradients(grad_out, x, scale, parameters, axes, eps, needs):
    norm_weight, norm_bias, weight1, bias1, weight2, _ = parameters
    needs_x, needs_norm, needs_first, needs_second = needs[0], any(needs[1:3]), any(needs[3:5]), any(needs[5:7])
    before_gelu = needs_x or needs_norm or needs_first
    grad_x = torch.empty_like(x) if needs_x else None
    grads = [torch.zeros_like(parameter) for parameter in parameters]
    for images, rows in axes.split(x, _hidden_ratio(parameters)):
        part, grad = x[images, rows], grad_out[images, rows]
        normed, mean, rstd = torch.native_layer_norm(part, part.shape[3:], norm_weight, norm_bias, eps)
        columns = axes.gather(normed)
        hidden = _matmul(weight1, columns, bias1)
        grad_y = axes.gather(grad if scale is None else grad * scale[images])
        if needs_second:
            grads[4].addmm_(grad_y, F.gelu(hidden).t())
            grads[5] += grad_y.sum(1)
        if not before_gelu:
            continue
        grad_hidden = torch.ops.aten.gelu_backward(_matmul(weight2.t(), grad_y), hidden)
        if needs_first:
            grads[2].addmm_(grad_hidden, columns.t())
            grads[3] += grad_hidden.sum(1)
        if not (needs_x or needs_norm):
            continue
        grad_normed = axes.scatter(_matmul(weight1.t(), grad_hidden), part.shape).reshape(part.shape)
        mask = [needs_x, needs_norm, needs_norm]
        grad_part, *grad_norm = torch.ops.aten.native_layer_norm_backward(
            grad_normed, part, part.shape[3:], mean, rstd, norm_weight, norm_bias, mask
        )
        if needs_norm:
            grads[0] += grad_norm[0]
            grads[1] += grad_norm[1]
        if needs_x:
            torch.add(grad_part, grad, out=grad_x[images, rows])
    return [grad if needed else None for grad, needed in zip([grad_x, *grads], needs)]


def _plain_gradients(grad_out, x, scale, parameters, axes, eps, needs):
    y = _mlp(x, parameters, axes, eps).reshape(x.shape)
    out = x + (y if scale is None else y * scale)
    inputs = [tensor for tensor, needed in zip((x, *parameters), needs) if needed]
    found = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def mix_in_slices(x: Tensor, scale: Tensor | None, parameters: tuple[Tensor, ...], axes: Axes, eps: float) -> Tensor:
    """Return x + scale * MLP(LN(x)).

    Args:
        x: The stream, (B, H, W, C), on a CPU.
        scale: What each image's MLP counts, (B, 1, 1, 1), without gradient; None for 1.
        parameters: Weight and bias of the LayerNorm, of the first and of the second Linear.
        axes: What the MLP's vectors are.
        eps: The LayerNorm's.
    """
    x = x.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)):
        return _Mixing.apply(x, scale, axes, eps, *parameters)
    return _forward(x, scale, parameters, axes, eps)
