"""What a trained RaftMLP has learnt: weights of token mixing, receptive fields, how much each block changes the map."""

import numpy as np
import torch
from torch import Tensor, nn

from ..model.layers import TokenMixing
from ..model.raftmlp import RaftMLP

__all__ = ["mixing_weights", "receptive_fields", "smallest_share", "update_norms"]


def mixing_weights(model: RaftMLP) -> dict[str, dict[str, np.ndarray]]:
    """Return the first weights of all token mixings, what each hidden unit looks at, by kind and block.

    Kinds are "vertical" and "horizontal", with weights (units, r, L) for r raft groups and L positions, or "plain",
    with weights (units, H, W).
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, block in _blocks(model).items():
        for kind, layer in block.tokens.named_children():
            weight = layer.fc1.weight.detach().float().cpu().numpy()
            shape = block.grid if isinstance(layer, TokenMixing) else (layer.raft_size, -1)
            found.setdefault(kind, {})[name] = weight.reshape(len(weight), *shape)
    return found


def _blocks(model: RaftMLP) -> dict[str, nn.Module]:
    return {
        f"stage {i + 1}, block {j + 1}": block
        for i, stage in enumerate(model.stages)
        for j, block in enumerate(stage.blocks)
    }


def receptive_fields(model: RaftMLP, images: Tensor, batch_size: int = 16) -> dict[str, np.ndarray]:
    """Return the effective receptive field (H, W) of every stage, or of every block in a network of one stage.

    It is the size of the gradient of the map's middle position, all channels added, at the pixels: the mean over the
    images (B, C, H, W).

    Source: W. Luo et al., Understanding the Effective Receptive Field in Deep Convolutional Neural Networks, 2016.
    """
    model.eval()
    fields, kind = {}, "block" if len(model.stages) == 1 else "stage"
    for index in range(len(model.feature_info)):
        total = torch.zeros(images.shape[-2:])
        for batch in images.split(batch_size):
            batch = batch.detach().requires_grad_()
            (features,) = model.forward_intermediates(batch, [index], stop_early=True, intermediates_only=True)
            middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
            (gradient,) = torch.autograd.grad(middle.sum(), batch)
            total += gradient.abs().sum((0, 1)).cpu()
        fields[f"{kind} {index + 1}"] = (total / len(images)).numpy()
    return fields


def smallest_share(values: np.ndarray, part: float = 0.5) -> float:
    """Return the smallest share of some values, none negative, whose sum is at least this part of all of them."""
    cumulated = np.cumsum(np.sort(values, axis=None)[::-1], dtype=np.float64)
    return float((np.searchsorted(cumulated, part * cumulated[-1]) + 1) / values.size) if cumulated[-1] else 0.0


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
