"""The layers of RaftMLP: patch embedding, raft-token mixing, plain token mixing, channel mixing.

Every layer takes and returns the **stream**, a contiguous tensor of shape (B, H, W, C). Channels come last because that
is where a block spends its time: LayerNorm and channel mixing read the stream as it lies, bicubic resizing is a matrix
product on it, and raft-token mixing needs one rearrangement in (it moves runs of C / raft_size consecutive numbers) and
none out: the way back is a strided read by the residual addition. On a CPU, plain calls of the mixings go through
``raftmlp.slices``.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as all_modules

from .resize import resize_bicubic
from .slices import Mixing, fits_one_slice, mix_all_in_slices, mix_in_slices

__all__ = [
    "ChannelMixing",
    "MultiScalePatchEmbed",
    "RaftTokenMixing",
    "TokenMixing",
    "can_mix_at_once",
    "is_plain",
    "mix_at_once",
]


# torch 2.6 does not tell an export from a compilation
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class MultiScalePatchEmbed(nn.Module):
    """Patch embedding over patches of several sizes around the same centres: stream in, stream out.

    The paper concatenates the patches of every kernel size and applies one Linear. That is a sum of convolutions of one
    stride, hence one convolution whose kernel is the largest one with the smaller ones added in its middle. The kernels
    are separate parameters, so that training moves each as the paper's Linear does; a call runs one convolution.
    With a single kernel of the stride's size this is the usual (single-scale) patch embedding.

    Source: RaftMLP, arXiv 2108.04384.

    Args:
        in_chans: Channels of the input.
        embed_dim: Channels of the output.
        stride: Distance of the patches in positions; an input that is no multiple of it is first resized bicubically
            up to the next one, height and width apart.
        kernels: Patch sizes in positions, ascending multiples of the stride that differ from it by an even number.

    Raises:
        ValueError: If the kernels are none of that.
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
        # never called, only their weights are used: one module a kernel is what weight tools expect of a stem
        self.convs = nn.ModuleList(
            nn.Conv2d(in_chans, embed_dim, k, stride, bias=False, device=device, dtype=dtype) for k in kernels
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
        x = F.conv2d(x, self.merged_weight(), self.bias, stride=s, padding=self.padding)
        return x.permute(0, 2, 3, 1).contiguous()


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Return whether a module is of one of the kinds, does what that kind does, and has no hooks."""
    watched = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or all_modules._global_forward_hooks
        or all_modules._global_forward_pre_hooks
        or all_modules._global_backward_hooks
        or all_modules._global_backward_pre_hooks
    )
    return type(module) in kinds and "forward" not in module.__dict__ and not watched


class _ResidualMLP(nn.Module):
    """What the three mixings share: x + drop_path(fc2(gelu(fc1(norm(x))))).

    ``order`` says what the MLP's vectors are: the axes of the stream (B, H, W, r, C / r), with the raft size r, as 0,
    the two that a vector of token mixing runs along, and the other two; for channel mixing as they are.
    """

    raft_size: int
    order: list[int]

    def __init__(self, dim: int, features: int, mlp_ratio: float, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        hidden = int(features * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"an MLP ratio of {mlp_ratio} leaves {features} features no hidden unit")
        self.mlp_ratio = mlp_ratio
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.fc1 = nn.Linear(features, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, features, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Mix x of shape (B, H, W, C), whose mixed axes have the trained lengths: returns the same shape."""
        if not torch.jit.is_scripting():
            if self._goes_in_slices(x):
                return self._mix_in_slices(x)
        y = self.mlp(x)
        return (x.reshape(y.shape) + self.drop_path(y)).reshape(x.shape)

    @torch.jit.unused
    def _goes_in_slices(self, x: Tensor) -> bool:
        """Return whether this call is one for ``raftmlp.slices``: a plain one on a CPU, through plain layers."""
        training = torch.is_grad_enabled()  # sums of gradients over slices would lose digits in bfloat16
        return (
            type(x) is Tensor
            and x.device.type == "cpu"
            and (x.dtype in (torch.float32, torch.float64) or (x.dtype == torch.bfloat16 and not training))
            and not _is_exporting()
            and not torch.jit.is_tracing()
            # a compiled graph serves small batches and large ones; what training keeps counts at any size
            and (torch.compiler.is_compiling() or training or not fits_one_slice(x, self.mlp_ratio))
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
            and is_plain(self.norm, nn.LayerNorm)
            and is_plain(self.fc1, nn.Linear)
            and is_plain(self.fc2, nn.Linear)
            and is_plain(self.drop_path, nn.Identity, DropPath)
            and all(type(p) in (Tensor, nn.Parameter) and p.dtype == x.dtype for p in self._parameters_in_order())
        )

    def _parameters_in_order(self) -> list[Tensor]:
        return [p for layer in (self.norm, self.fc1, self.fc2) for p in (layer.weight, layer.bias)]

    def _drops(self) -> bool:
        return self.drop_path.training and isinstance(self.drop_path, DropPath)

    def _mixing(self) -> Mixing:
        return Mixing(self._parameters_in_order(), [self.raft_size, *self.order], self.norm.eps)

    @torch.jit.unused
    def _mix_in_slices(self, x: Tensor) -> Tensor:
        scale = self.drop_path(x.new_ones(x.shape[0], 1, 1, 1)) if self._drops() else None
        return mix_in_slices(x, self._mixing(), scale)


class _TokenMixing(_ResidualMLP):
    """What both token mixings share: vectors are columns of a matrix an image, and the weights stand on the left."""

    def mlp(self, x: Tensor) -> Tensor:
        """Return the MLP's part, (B, H, W, r, C / r), for x of shape (B, H, W, C)."""
        B, H, W, C = x.shape
        y = self.norm(x).reshape(B, H, W, self.raft_size, C // self.raft_size).permute(self.order)
        shape = y.shape
        y = y.flatten(1, 2).flatten(2)  # B features columns
        if self._has_plain_linears():
            y = torch.baddbmm(self.fc1.bias.unsqueeze(1), self.fc1.weight.expand(B, -1, -1), y)
            y = torch.baddbmm(self.fc2.bias.unsqueeze(1), self.fc2.weight.expand(B, -1, -1), F.gelu(y))
        else:  # adapters, quantised layers: they take rows
            y = self.fc2(F.gelu(self.fc1(y.transpose(1, 2)))).transpose(1, 2)
        return y.reshape(shape).permute([self.order.index(axis) for axis in range(5)])

    def _has_plain_linears(self) -> bool:
        if not torch.jit.is_scripting():
            return all(is_plain(fc, nn.Linear) and fc.bias is not None for fc in (self.fc1, self.fc2))
        return True


class RaftTokenMixing(_TokenMixing):
    """Raft-token mixing along one axis, residual included: x + drop_path(MLP(LN(x))).

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
        super().__init__(dim, raft_size * length, mlp_ratio, drop_path, device, dtype)
        self.raft_size = raft_size
        self.horizontal = horizontal
        self.order = [0, 3, 2, 1, 4] if horizontal else [0, 3, 1, 2, 4]  # B (g x) (y o) or B (g y) (x o)

    @torch.jit.ignore
    def mixed_axes(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Return the one of a grid's lengths that this layer mixes along."""
        return grid[1:] if self.horizontal else grid[:1]


class TokenMixing(_TokenMixing):
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
        super().__init__(dim, grid[0] * grid[1], mlp_ratio, drop_path, device, dtype)
        self.raft_size = 1
        self.order = [0, 1, 2, 4, 3]  # B (y x) C

    @torch.jit.ignore
    def mixed_axes(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Return the lengths of a grid that this layer mixes along: both."""
        return grid


class ChannelMixing(_ResidualMLP):
    """Channel mixing, residual included: an MLP over the channels of every position.

    Args:
        dim: Channels C.
        mlp_ratio: Hidden units per channel of the MLP.
        drop_path: Rate of stochastic depth.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__(dim, dim, mlp_ratio, drop_path, device, dtype)
        self.raft_size = 1
        self.order = [0, 1, 2, 3, 4]

    def mlp(self, x: Tensor) -> Tensor:
        """Return the MLP's part for x of shape (B, H, W, C), any H and W, the same shape."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


def can_mix_at_once(mixings: Sequence[nn.Module], x: Tensor) -> bool:
    """Return whether ``mix_at_once`` does what calls of the mixings do, and nobody wants what lies between them."""
    kinds = (RaftTokenMixing, TokenMixing, ChannelMixing)
    return not torch.is_grad_enabled() and all(
        is_plain(m, *kinds) and m._goes_in_slices(x) and not m._drops() for m in mixings
    )


def mix_at_once(mixings: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return the stream x after several mixings, which take the memory of one."""
    return mix_all_in_slices(x, [m._mixing() for m in mixings])
