"""What a trained RaftMLP has learnt: weights of token mixing, receptive fields, how much each block changes the map."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..model.layers import TokenMixing
from ..model.raftmlp import RaftMLP

__all__ = ["MixingWeights", "ReceptiveField", "mixing_weights", "receptive_fields", "update_norms"]


@dataclass(frozen=True)
class MixingWeights:
    """The first weights of a token mixing's MLP: what each hidden unit looks at.

    Args:
        block: The block's name, "stage 1, block 1".
        weights: Of raft-token mixing, (units, r, L) for r raft groups and L positions; of plain token mixing,
            (units, H, W).
    """

    block: str
    weights: np.ndarray


def mixing_weights(model: RaftMLP) -> dict[str, list[MixingWeights]]:
    """Return the weights of all token mixings, in the order of the blocks: "vertical" and "horizontal", or "plain"."""
    found: dict[str, list[MixingWeights]] = {}
    for name, block in _blocks(model).items():
        for kind, layer in block.tokens.named_children():
            weight = layer.fc1.weight.detach().float().cpu().numpy()
            shape = block.grid if isinstance(layer, TokenMixing) else (layer.raft_size, -1)
            found.setdefault(kind, []).append(MixingWeights(name, weight.reshape(len(weight), *shape)))
    return found


def _blocks(model: RaftMLP) -> dict[str, nn.Module]:
    return {
        f"stage {i + 1}, block {j + 1}": block
        for i, stage in enumerate(model.stages)
        for j, block in enumerate(stage.blocks)
    }


# Receptive fields


@dataclass(frozen=True)
class ReceptiveField:
    """The effective receptive field of the centre of a feature map.

    Args:
        layer: The layer's name, "stage 1".
        gradient: The mean size of the gradient at every pixel (H, W).
        half: The smallest share of the pixels that has half of it, 0 to 0.5.
    """

    layer: str
    gradient: np.ndarray
    half: float


def receptive_fields(model: RaftMLP, images: Tensor, batch_size: int = 16) -> list[ReceptiveField]:
    """Return the effective receptive field of every stage, or of every block in a network of one stage.

    It is the size of the gradient of the map's middle position, all channels added, at the pixels: the mean over the
    images (B, C, H, W).

    Source: W. Luo et al., Understanding the Effective Receptive Field in Deep Convolutional Neural Networks, 2016.
    """
    model.eval()
    fields, size = [], images.shape[-2:]
    single = len(model.stages) == 1
    for index in range(len(model.feature_info)):
        total = torch.zeros(size)
        for batch in images.split(batch_size):
            batch = batch.detach().requires_grad_()
            (features,) = model.forward_intermediates(batch, [index], stop_early=True, intermediates_only=True)
            middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
            (gradient,) = torch.autograd.grad(middle.sum(), batch)
            total += gradient.abs().sum((0, 1)).cpu()
        gradient = (total / len(images)).numpy()
        layer = f"block {index + 1}" if single else f"stage {index + 1}"
        fields.append(ReceptiveField(layer, gradient, smallest_share(gradient, 0.5)))
    return fields


def smallest_share(values: np.ndarray, part: float) -> float:
    """Return the smallest share of some values, none negative, whose sum is at least this part of all of them."""
    cumulated = np.cumsum(np.sort(values, axis=None)[::-1], dtype=np.float64)
    return float((np.searchsorted(cumulated, part * cumulated[-1]) + 1) / values.size) if cumulated[-1] else 0.0


# Updates


def update_norms(model: RaftMLP, images: Tensor, batch_size: int = 16) -> dict[str, dict[str, float]]:
    """Return how much each mixing changes the map, by block: the norm of what it adds over the norm of the map.

    Norms are over the channels of a position; the figure is the mean over positions and images (B, C, H, W). In an
    image of another size than the trained one a token mixing sees the map on its trained grid.
    """
    norms: dict[str, dict[str, float]] = {}
    handles = []

    def watch(row: dict[str, float], kind: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            before = inputs[0]
            ratio = (output - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
            row[kind] = row.get(kind, 0.0) + ratio.flatten(1).mean(1).sum().item() / len(images)

        return hook

    model.eval()
    try:
        for name, block in _blocks(model).items():
            row = norms.setdefault(name, {})
            for kind, layer in [*block.tokens.named_children(), ("channels", block.channels)]:
                handles.append(layer.register_forward_hook(watch(row, kind)))
        with torch.no_grad():
            for batch in images.split(batch_size):
                model.forward_features(batch)
    finally:
        for handle in handles:
            handle.remove()
    return norms
