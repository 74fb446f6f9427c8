"""What a trained RaftMLP has learnt: weights of token mixing, receptive fields, how much each block changes the map."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..files import save_figure
from ..model.layers import TokenMixing
from ..model.raftmlp import RaftMLP

__all__ = [
    "MixingWeights", "ReceptiveField", "draw_receptive_fields", "draw_updates", "draw_weights", "mixing_weights",
    "receptive_fields", "update_norms",
]  # fmt: skip


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
    sums: dict[tuple[str, str], float] = {}
    handles = []

    def watch(key: tuple[str, str]):
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            before = inputs[0]
            ratio = (output - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
            sums[key] = sums.get(key, 0.0) + ratio.flatten(1).mean(1).sum().item()

        return hook

    model.eval()
    try:
        for name, block in _blocks(model).items():
            layers = {**dict(block.tokens.named_children()), "channels": block.channels}
            handles += [layer.register_forward_hook(watch((name, kind))) for kind, layer in layers.items()]
        with torch.no_grad():
            for batch in images.split(batch_size):
                model.forward_features(batch)
    finally:
        for handle in handles:
            handle.remove()
    norms: dict[str, dict[str, float]] = {}
    for (name, kind), total in sums.items():
        norms.setdefault(name, {})[kind] = total / len(images)
    return norms


# Pictures


def draw_weights(path: Path, kind: str, title: str, blocks: Sequence[MixingWeights]) -> None:
    """Write a picture of the weights of one kind of token mixing, a row a block.

    Of raft-token mixing, a panel a raft group: the positions of the grid along the axis that is mixed, the units beside
    each other, in the order of the place that they look at, the same in all groups. Of plain token mixing, the 32 units
    of the largest weights, each an image of the grid.
    """
    from matplotlib.figure import Figure  # draws into files, no screen needed

    columns = 32 if kind == "plain" else max(block.weights.shape[1] for block in blocks)
    side = {"plain": (0.45, 0.75), "vertical": (3.4, 1.25), "horizontal": (2.6, 1.9)}[kind]
    figure = Figure(figsize=(1.6 + side[0] * columns, 0.9 + side[1] * len(blocks)), layout="constrained")
    axes = figure.subplots(len(blocks), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_visible(False)
    for row, block in zip(axes, blocks):
        if kind == "plain":
            norms = np.linalg.norm(block.weights.reshape(len(block.weights), -1), axis=1)
            panels = list(block.weights[np.argsort(-norms)[:columns]])
        else:  # (units, r, L) to r panels of positions and units
            panels = list(_by_place(block.weights).transpose((1, 2, 0) if kind == "vertical" else (1, 0, 2)))
        limit = np.quantile(np.abs(block.weights), 0.995) or 1
        for i, (axis, panel) in enumerate(zip(row, panels)):
            axis.set_visible(True)
            aspect = "equal" if kind == "plain" else "auto"
            axis.imshow(panel, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect=aspect, interpolation="nearest")
            if kind != "plain":
                axis.set_title(f"raft group {i + 1}", fontsize=7, pad=2)
        across = {"vertical": "down: rows; across: units", "horizontal": "across: columns; down: units", "plain": ""}
        label = f"{block.block}\n{across[kind]}".rstrip()
        row[0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def _by_place(weights: np.ndarray) -> np.ndarray:
    """Return weights (units, r, L) with the units in the order of the place that they look at."""
    energy = (weights.astype(np.float64) ** 2).sum(1)
    places = energy @ np.arange(energy.shape[1]) / energy.sum(1).clip(min=1e-30)
    return weights[np.argsort(places, kind="stable")]


def draw_receptive_fields(path: Path, title: str, fields: Sequence[ReceptiveField]) -> None:
    """Write a picture of receptive fields, each scaled to its largest gradient; the root makes small ones visible."""
    from matplotlib.figure import Figure

    columns = min(len(fields), 6)
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(0.4 + 2.2 * columns, 0.6 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, field in zip(axes.flat, fields):
        axis.imshow(np.sqrt(field.gradient / (field.gradient.max() or 1)), cmap="magma", vmin=0, vmax=1)
        axis.set_title(f"{field.layer}\nhalf of it in {field.half:.1%} of the pixels", fontsize=8)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def draw_updates(path: Path, title: str, norms: dict[str, dict[str, float]]) -> None:
    """Write a picture of the figures of ``update_norms``, a group of bars a block."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind for row in norms.values() for kind in row))
    figure = Figure(figsize=(2.5 + 0.62 * len(norms), 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        places = np.arange(len(norms)) + (i - (len(kinds) - 1) / 2) * width
        axis.bar(places, [row.get(kind, 0) for row in norms.values()], width, label=kind)
    axis.set_xticks(range(len(norms)), norms, rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("norm of the update / norm of the map")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)
    save_figure(figure, path)
