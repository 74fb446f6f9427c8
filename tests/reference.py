"""The network the slow and obvious way: unfolded patches, rearranged vectors, F.interpolate. Images are B C H W."""

import torch
import torch.nn.functional as F
from einops import rearrange


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
    return rearrange(tokens, "b (h w) c -> b c h w", h=height)


def raft_token_mixing(x, layer):
    g, h, w = layer.raft_size, x.shape[2], x.shape[3]
    y = layer_norm(x, layer.norm)
    if layer.horizontal:
        y = mlp(rearrange(y, "b (g o) y x -> b o y (g x)", g=g), layer)
        return x + rearrange(y, "b o y (g x) -> b (g o) y x", g=g, x=w)
    y = mlp(rearrange(y, "b (g o) y x -> b o x (g y)", g=g), layer)
    return x + rearrange(y, "b o x (g y) -> b (g o) y x", g=g, y=h)


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
