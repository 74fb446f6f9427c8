"""The release's sequence of operations: unfolded patches, rearranged vectors, resizing before and after every mixing.

It is slow and obvious: what the model's results and speed are compared with. Images and feature maps are (B, C, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Reference"]


class Reference(nn.Module):
    """A RaftMLP computed with the release's sequence of operations, with the model's weights.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        return logits(x, self.model)


def resize(x, size):
    return x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, size=size, mode="bicubic", align_corners=False)


def layer_norm(x, norm):
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)


def mlp(x, layer):
    return layer.fc2(F.gelu(layer.fc1(x)))


def patch_embed(x, embed):
    s = embed.stride
    height, width = -(-x.shape[2] // s), -(-x.shape[3] // s)
    x = resize(x, (height * s, width * s))
    patches = [F.unfold(x, k, padding=(k - s) // 2, stride=s) for k in embed.kernels]  # (channel, row, column) order
    weight = torch.cat([conv.weight.flatten(1) for conv in embed.convs], dim=1)
    tokens = F.linear(torch.cat(patches, dim=1).transpose(1, 2), weight, embed.bias)
    return tokens.transpose(1, 2).unflatten(2, (height, width))  # b (h w) c -> b c h w


def raft_token_mixing(x, layer):
    g, (B, C, H, W) = layer.raft_size, x.shape
    y = layer_norm(x, layer.norm).reshape(B, g, C // g, H, W)
    if layer.horizontal:
        y = mlp(y.permute(0, 2, 3, 1, 4).flatten(3), layer)  # b (g o) y x -> b o y (g x)
        return x + y.unflatten(3, (g, W)).permute(0, 3, 1, 2, 4).reshape(x.shape)
    y = mlp(y.permute(0, 2, 4, 1, 3).flatten(3), layer)  # b (g o) y x -> b o x (g y)
    return x + y.unflatten(3, (g, H)).permute(0, 3, 1, 4, 2).reshape(x.shape)


def token_mixing(x, layer):
    y = mlp(layer_norm(x, layer.norm).flatten(2), layer)
    return x + y.reshape(x.shape)


def channel_mixing(x, layer):
    return x + mlp(layer_norm(x, layer.norm).permute(0, 2, 3, 1), layer).permute(0, 3, 1, 2)


def block(x, module):
    size = x.shape[2:]
    x = resize(x, module.grid)
    for name, layer in module.tokens.named_children():
        x = token_mixing(x, layer) if name == "plain" else raft_token_mixing(x, layer)
    return channel_mixing(resize(x, size), module.channels)


def features(x, model):
    for stage in model.stages:
        x = patch_embed(x, stage.embed)
        for module in stage.blocks:
            x = block(x, module)
    return layer_norm(x, model.norm)


def logits(x, model):
    return model.head(features(x, model).mean((2, 3)))
