"""The layers of RaftMLP: patch embedding, the three mixings, block, stage.

Every layer takes and returns an **NHWC feature map**, a contiguous tensor of shape (B, H, W, C). Channels come last
because that is where a block spends its time: LayerNorm and channel mixing read the map as it lies, bicubic resizing is
a matrix product on it, and raft-token mixing needs one rearrangement before its products (it moves runs of
C / raft_size consecutive numbers) and none after them: the residual addition reads the result with strides.
"""

from collections import OrderedDict
from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import checkpoint_seq, register_notrace_module
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from . import ops
from .arguments import choice, current_names
from .resize import RESIZINGS, from_trained_grid, resize_bicubic

__all__ = [
    "ChannelMixing",
    "MultiScalePatchEmbed",
    "RaftMLPBlock",
    "RaftMLPStage",
    "RaftTokenMixing",
    "TokenMixing",
    "embedded_size",
    "to_nhwc",
]

PLAIN_WEIGHTS = (Tensor, nn.Parameter, NoneType, FakeTensor)  # the last stands for them in torch.export

torch.fx.wrap("resize_bicubic")  # leaves for every tracer: they look at sizes
torch.fx.wrap("from_trained_grid")


def to_nhwc(x: Tensor, in_chans: int) -> Tensor:
    """Return a batch of images, shape (B, in_chans, H, W), as a view of shape (B, H, W, in_chans).

    Raises:
        ValueError: If the shape is not that, or the images have no pixels.
    """
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"expected images of shape (B, {in_chans}, H, W), got {list(x.shape)}")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"expected images of at least 1x1 pixels, got {x.shape[2]}x{x.shape[3]}")
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():  # the graph holds the matrices and grids of one size: it must refuse all others
            for axis in (2, 3):
                x = x.unflatten(axis, (int(x.shape[axis]), 1)).flatten(axis, axis + 1)
    return x.permute(0, 2, 3, 1)


def embedded_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return height and width after a patch embedding."""
    return -(-size[0] // stride), -(-size[1] // stride)


class MultiScalePatchEmbed(nn.Module):
    """Patch embedding over patches of several sizes around the same centers, NHWC in and out.

    The paper concatenates the patches of every kernel size and applies one Linear. That is a sum of convolutions of one
    stride, hence one convolution whose kernel is the largest one with the smaller ones added in its middle. The kernels
    are separate layers, so that training moves each as the paper's Linear does. A call runs one convolution, or, where
    a layer is adapted, quantized or has hooks, calls each of them and adds the results.
    With a single kernel of the stride's size this is the usual (single-scale) patch embedding.

    Source: RaftMLP, arXiv 2108.04384.

    Args:
        in_chans: Channels of the input.
        embed_dim: Channels of the output.
        stride: Distance of the patches in positions; an input that is no multiple of it is first resized bicubically
            up to the next one, height and width apart.
        kernels: Patch sizes in positions, ascending multiples of the stride that differ from it by an even number.

    Raises:
        ValueError: If the kernels are not such multiples.
    """

    def __init__(self, in_chans: int, embed_dim: int, stride: int, kernels: Sequence[int], device=None, dtype=None):
        super().__init__()
        kernels = tuple(kernels)
        if not kernels or kernels != tuple(sorted(set(kernels))):
            raise ValueError(f"patch_kernels {kernels}: give one or more kernels in ascending order")
        if any(k < stride or k % stride or (k - stride) % 2 for k in kernels):
            raise ValueError(
                f"patch_kernels {kernels}: each must be a multiple of its stage's stride {stride} "
                f"and differ from it by an even number"
            )
        self.stride = stride
        self.kernels = kernels
        self.padding = (kernels[-1] - stride) // 2
        kwargs = dict(bias=False, device=device, dtype=dtype)
        self.convs = nn.ModuleList(
            nn.Conv2d(in_chans, embed_dim, k, stride, (k - stride) // 2, **kwargs) for k in kernels
        )
        self.bias = nn.Parameter(torch.empty(embed_dim, device=device, dtype=dtype))
        bound = (in_chans * sum(k * k for k in kernels)) ** -0.5  # PyTorch's default for the one Linear
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def merged_weight(self) -> Tensor:
        """Return the kernel of the one convolution, shape (embed_dim, in_chans, k, k) with the largest k."""
        weight: Tensor = self.convs[-1].weight
        for conv, kernel in zip(self.convs, self.kernels):
            margin = (self.kernels[-1] - kernel) // 2
            if margin > 0:
                weight = weight + F.pad(conv.weight, (margin, margin, margin, margin))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Embed x of shape (B, H, W, in_chans): returns (B, ceil(H / stride), ceil(W / stride), embed_dim)."""
        s = self.stride
        x = resize_bicubic(x, (x.shape[1] + s - 1) // s * s, (x.shape[2] + s - 1) // s * s)
        x = x.contiguous().permute(0, 3, 1, 2)  # B C H W in channels_last memory; a copy for the image alone
        if not torch.jit.is_scripting():
            if torch.compiler.is_compiling():
                # inductor cannot lay out a view of dynamic size that a convolution keeps for its backward pass
                x = x.contiguous()
        return self._convolve(x).permute(0, 2, 3, 1).contiguous()

    def _convolve(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not self._has_plain_convs():
                return self._call_convs(x)
        return F.conv2d(x, self.merged_weight(), self.bias, stride=self.stride, padding=self.padding)

    @torch.jit.unused
    def _has_plain_convs(self) -> bool:
        return all(_is_plain(conv, nn.Conv2d) for conv in self.convs)

    @torch.jit.unused
    def _call_convs(self, x: Tensor) -> Tensor:
        y = sum(conv(x) for conv in self.convs)
        return y + self.bias.to(y.dtype).view(-1, 1, 1)


def _is_plain(module: nn.Module, *kinds: type) -> bool:
    """Return whether using a module's weights does what a call of it does.

    It does for a module of one of the kinds without hooks, whose ``forward`` is not replaced, and whose weights are
    plain tensors: a quantized weight, or another subclass of Tensor, brings operators of its own.
    """
    weights = module._parameters
    return (
        type(module) in kinds
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook())
        and "forward" not in module.__dict__
        and type(weights.get("weight")) in PLAIN_WEIGHTS
        and type(weights.get("bias")) in PLAIN_WEIGHTS
    )


class _Mixing(nn.Module):
    """The common part of the mixings: x + drop_path(mlp(norm(x))), an MLP along an axis of the map.

    Args:
        dim: Channels C.
        features: Inputs of the MLP.
        axis: "height", "width", "both" (height and width together) or "channels".
        raft_size: Number r of channel groups.
        mlp_ratio: Hidden units per input of the MLP.
        drop_path: Rate of stochastic depth.
    """

    raft_size: int
    axis: str

    def __init__(
        self, dim: int, features: int, axis: str, raft_size: int, mlp_ratio: float, drop_path: float, device, dtype
    ):
        super().__init__()
        hidden = int(features * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"an mlp_ratio of {mlp_ratio} leaves {features} features no hidden unit")
        self.axis = axis
        self.raft_size = raft_size
        self.mlp_ratio = mlp_ratio
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.fc1 = nn.Linear(features, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, features, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Mix x of shape (B, H, W, C), whose mixed axes have the trained lengths: returns the same shape."""
        if not torch.jit.is_scripting():
            if ops.may_be_fused(x, self.mlp_ratio):
                fused = self._fused(x)
                if fused is not None:
                    return fused
        y = self.drop_path(self.mlp(self.norm(x)))
        if self.axis == "height" or self.axis == "width":  # B H W r C/r
            return (x.reshape(y.shape) + y).flatten(3)
        return x + y

    def mlp(self, x: Tensor) -> Tensor:
        """Return the MLP of x, (B, H, W, C), in the same shape, or as (B, H, W, r, C / r) in raft-token mixing."""
        if self.axis == "channels":
            return self.fc2(F.gelu(self.fc1(x)))
        if self._has_plain_linears():
            weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return ops.token_mlp(x, *weights, self.raft_size, self.axis)
        H, W = x.shape[1], x.shape[2]
        rows = ops.vectors_to_matrix(x, self.raft_size, self.axis).transpose(1, 2)  # what adapters take
        rows = self.fc2(F.gelu(self.fc1(rows)))
        return ops.vectors_to_map(rows.transpose(1, 2), H, W, self.raft_size, self.axis)

    def _has_plain_linears(self) -> bool:
        if not torch.jit.is_scripting():
            return _is_plain(self.fc1, nn.Linear) and _is_plain(self.fc2, nn.Linear)
        return True

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor | None:
        """Return the mixing by a kernel for inference, or None where the layers inside are to be called."""
        norm, fc1, fc2, drop = self.norm, self.fc1, self.fc2, self.drop_path
        if not (_is_plain(norm, nn.LayerNorm) and _is_plain(fc1, nn.Linear) and _is_plain(fc2, nn.Linear)):
            return None
        if not _is_plain(drop, nn.Identity, DropPath) or (drop.training and type(drop) is DropPath):
            return None
        weights = [p for layer in (norm, fc1, fc2) for p in (layer.weight, layer.bias)]
        return ops.fused(x, weights, norm.eps, self.raft_size, self.axis)


@register_notrace_module
class RaftTokenMixing(_Mixing):
    """Raft-token mixing along one axis, residual included.

    Channels are split into raft_size groups of consecutive ones, channel = g * (C / raft_size) + o. For every o and
    every column (every row, if horizontal) the groups' values along it are one vector, indexed g * length + position,
    and one MLP maps all of these vectors.

    Source: RaftMLP, arXiv 2108.04384.

    Args:
        dim: Channels C.
        length: Positions along the mixed axis: the trained grid's height, or its width if horizontal.
        raft_size: Number of channel groups r.
        horizontal: Mix along the width instead of the height.
        mlp_ratio: Hidden units per input of the MLP (the paper's expansion factor e).
        drop_path: Rate of stochastic depth.

    Raises:
        ValueError: If dim is not divisible by raft_size.
    """

    def __init__(
        self,
        dim: int,
        length: int,
        raft_size: int,
        horizontal: bool = False,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        if raft_size < 1 or dim % raft_size:
            raise ValueError(f"raft_size {raft_size} must be a positive divisor of the stage's width {dim}")
        axis = "width" if horizontal else "height"
        super().__init__(dim, raft_size * length, axis, raft_size, mlp_ratio, drop_path, device, dtype)


@register_notrace_module
class TokenMixing(_Mixing):
    """Plain token mixing of MLP-Mixer, residual included: one MLP over all positions of a channel, row-major.

    Source: the baseline of RaftMLP's release; MLP-Mixer, arXiv 2105.01601.

    Args:
        dim: Channels C.
        grid: Height and width of the trained grid in positions.
        mlp_ratio: Hidden units per position of the MLP.
        drop_path: Rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, grid[0] * grid[1], "both", 1, mlp_ratio, drop_path, device, dtype)


@register_notrace_module
class ChannelMixing(_Mixing):
    """Channel mixing, residual included: an MLP over the channels of every position, for maps of any size.

    Args:
        dim: Channels C.
        mlp_ratio: Hidden units per channel of the MLP.
        drop_path: Rate of stochastic depth.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__(dim, dim, "channels", 1, mlp_ratio, drop_path, device, dtype)


class RaftMLPBlock(nn.Module):
    """A block: vertical, then horizontal raft-token mixing (or plain token mixing), then channel mixing.

    Token mixing works on the trained grid; what it does with a map of another size is the rule ``resizing``, see
    ``RaftMLP``. Channel mixing runs on the map's own grid.

    Args:
        dim: Channels C.
        grid: Height and width of the trained grid in positions.
        token_mixing: "raft", or "plain" for MLP-Mixer's.
        raft_size: Number of channel groups in raft-token mixing.
        token_mlp_ratio: Hidden units per input of the token-mixing MLPs.
        mlp_ratio: Hidden units per channel of the channel-mixing MLP.
        drop_path: Rate of stochastic depth, for each of the mixings.
        resizing: The rule for maps of another size, one of ``raftmlp.model.resize.RESIZINGS``.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        token_mixing: str = "raft",
        raft_size: int = 2,
        token_mlp_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        resizing: str = "full",
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = dict(drop_path=drop_path, device=device, dtype=dtype)
        self.grid = grid
        self.resizing = choice("resizing", current_names(dict(resizing=resizing))["resizing"], RESIZINGS)
        if token_mixing == "raft":
            tokens = OrderedDict(
                vertical=RaftTokenMixing(dim, grid[0], raft_size, False, token_mlp_ratio, **kwargs),
                horizontal=RaftTokenMixing(dim, grid[1], raft_size, True, token_mlp_ratio, **kwargs),
            )
        else:
            tokens = OrderedDict(plain=TokenMixing(dim, grid, token_mlp_ratio, **kwargs))
        self.tokens = nn.Sequential(tokens)
        self.channels = ChannelMixing(dim, mlp_ratio, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x of shape (B, H, W, C), any H and W: returns the same shape."""
        before = resize_bicubic(x, self.grid[0], self.grid[1])
        x = from_trained_grid(x, before, self.tokens(before), self.resizing)
        return self.channels(x)


class RaftMLPStage(nn.Module):
    """A stage: a patch embedding and a row of blocks, NHWC in and out.

    Args:
        in_chans: Channels of the input.
        dim: Channels of the output.
        depth: Number of blocks.
        stride: Stride of the patch embedding.
        kernels: Kernels of the patch embedding.
        grid: Height and width of the trained grid in positions, after the embedding.
        **block_kwargs: Arguments of every block, see RaftMLPBlock.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        depth: int,
        stride: int,
        kernels: Sequence[int],
        grid: tuple[int, int],
        device=None,
        dtype=None,
        **block_kwargs: Any,
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.embed = MultiScalePatchEmbed(in_chans, dim, stride, kernels, device=device, dtype=dtype)
        self.blocks = nn.Sequential(
            *(RaftMLPBlock(dim, grid, device=device, dtype=dtype, **block_kwargs) for _ in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (B, H, W, in_chans) to (B, ceil(H / stride), ceil(W / stride), dim)."""
        return self.mix(self.embed(x))

    def mix(self, x: Tensor) -> Tensor:
        """Pass the embedding's output of shape (B, H, W, dim) through the blocks."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
