"""The network the slow and obvious way, with the operations of the authors' 2021 release.

Patches are unfolded, vectors rearranged for Linear, maps resized by F.interpolate. Feature maps x are NCHW. The
functions take a ``RaftMLP`` or its layers for their weights; tests and the benchmark compare with them.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from .layers import MultiScalePatchEmbed, RaftMLPBlock, RaftTokenMixing
from .raftmlp import RaftMLP

__all__ = ["Reference", "channel_mixing", "logits", "patch_embed", "raft_token_mixing", "token_mixing"]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize x of shape (B, C, H, W) bicubically to a height and width."""
    return x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, size=size, mode="bicubic", align_corners=False)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Apply a LayerNorm over the channels at every position of x, (B, C, H, W)."""
    x = rearrange(x, "b c h w -> b h w c")
    return rearrange(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps), "b h w c -> b c h w")


def mlp(x: Tensor, layer: nn.Module) -> Tensor:
    """Apply a mixing's two Linears to vectors, (..., features)."""
    return layer.fc2(F.gelu(layer.fc1(x)))


def patch_embed(x: Tensor, embed: MultiScalePatchEmbed) -> Tensor:
    """Map x, (B, in_chans, H, W), to (B, embed_dim, ceil(H / stride), ceil(W / stride))."""
    s = embed.stride
    height, width = -(-x.shape[2] // s), -(-x.shape[3] // s)
    x = resize(x, (height * s, width * s))
    patches = [F.unfold(x, k, padding=(k - s) // 2, stride=s) for k in embed.kernels]  # (channel, row, column) order
    weight = torch.cat([conv.weight.flatten(1) for conv in embed.convs], dim=1)
    tokens = F.linear(rearrange(torch.cat(patches, dim=1), "b n hw -> b hw n"), weight, embed.bias)
    return rearrange(tokens, "b (h w) c -> b c h w", h=height)


def raft_token_mixing(x: Tensor, layer: RaftTokenMixing) -> Tensor:
    """Mix x, (B, C, H, W), along its height or its width."""
    vectors = "b o h (g w)" if layer.axis == "width" else "b o w (g h)"
    y = rearrange(layer_norm(x, layer.norm), f"b (g o) h w -> {vectors}", g=layer.raft_size)
    return x + rearrange(mlp(y, layer), f"{vectors} -> b (g o) h w", g=layer.raft_size)


def token_mixing(x: Tensor, layer: nn.Module) -> Tensor:
    """Mix x, (B, C, H, W), over all its positions."""
    y = rearrange(layer_norm(x, layer.norm), "b c h w -> b c (h w)")
    return x + rearrange(mlp(y, layer), "b c (h w) -> b c h w", h=x.shape[2])


def channel_mixing(x: Tensor, layer: nn.Module) -> Tensor:
    """Mix the channels of x, (B, C, H, W), at every position."""
    y = mlp(rearrange(layer_norm(x, layer.norm), "b c h w -> b h w c"), layer)
    return x + rearrange(y, "b h w c -> b c h w")


def mix_tokens(x: Tensor, module: RaftMLPBlock) -> Tensor:
    """Apply a block's token mixing to x, (B, C, h, w), of the trained grid's size."""
    for name, layer in module.tokens.named_children():
        x = token_mixing(x, layer) if name == "plain" else raft_token_mixing(x, layer)
    return x


def block(x: Tensor, module: RaftMLPBlock) -> Tensor:
    """Map x, (B, C, H, W), to the same shape; token mixing runs on the trained grid."""
    size, grid = x.shape[2:], module.grid
    if module.resizing == "full" or tuple(size) == tuple(grid):
        x = resize(mix_tokens(resize(x, grid), module), size)
    else:
        small = resize(x, grid)
        x = x + resize(mix_tokens(small, module) - small, size)
    return channel_mixing(x, module.channels)


def features(x: Tensor, model: RaftMLP) -> Tensor:
    """Map images, (B, in_chans, H, W), to the normalized map of the last stage, (B, C, H', W')."""
    for stage in model.stages:
        x = patch_embed(x, stage.embed)
        for module in stage.blocks:
            x = block(x, module)
    return layer_norm(x, model.norm)


def logits(x: Tensor, model: RaftMLP) -> Tensor:
    """Map images, (B, in_chans, H, W), to logits, (B, num_classes)."""
    return model.head(reduce(features(x, model), "b c h w -> b c", "mean"))


class Reference(nn.Module):
    """A module that computes the logits of a model with the release's operations."""

    def __init__(self, model: RaftMLP):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Map images, (B, in_chans, H, W), to logits, (B, num_classes)."""
        return logits(x, self.model)
