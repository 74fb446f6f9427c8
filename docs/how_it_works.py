"""The pictures of docs/how-it-works.md, drawn from tensors of the package's own layers and of the shipped weights.

    python docs/how_it_works.py

writes mixing.png, embedding.png and rules.png into the folder docs, in seconds.
"""

from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.figure import Figure

from raftmlp import RaftMLP, RaftTokenMixing
from raftmlp.data.scenes import SceneMaker
from raftmlp.files import save_figure

DOCS = Path(__file__).parent
GRID, CHANNELS = 7, 8


def panel(axis, values, title, xlabel="", ylabel="", **kwargs):
    """Draw an array as an image."""
    axis.imshow(np.asarray(values), **{"cmap": "viridis", **kwargs})
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(xlabel, fontsize=8)
    axis.set_ylabel(ylabel, fontsize=8)
    axis.tick_params(labelsize=7, length=2)


def dependence(function, at: tuple[int, ...]) -> torch.Tensor:
    """Return how much an output of a layer depends on each input: the size of the gradient, over random maps."""
    x = torch.randn(16, GRID, GRID, CHANNELS, requires_grad=True)
    function(x).reshape(x.shape)[(slice(None), *at)].sum().backward()
    return x.grad.abs().mean(0)


@torch.no_grad()
def mark(values: torch.Tensor, at: tuple[int, ...]) -> torch.Tensor:
    """Return which values are not 0, and 2 where the output itself is."""
    shown = (values > 1e-7).float()
    shown[at] = 2
    return shown


def draw_mixing(path: Path) -> None:
    """Draw which positions, and which channels at them, one output of token mixing depends on."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots(2, 3)
    y, x, channel = at = (2, 4, 5)
    tokens = RaftMLP(img_size=GRID, embed_dims=(CHANNELS,), depths=(1,), patch_sizes=(1,), patch_kernels=((1,),))
    tokens = tokens.stages[0].blocks[0].tokens
    layers = {"vertical": tokens.vertical, "horizontal": tokens.horizontal, "one after the other": tokens}
    for axis, (title, layer) in zip(axes[0], layers.items()):
        shown = mark(dependence(layer, at).sum(2), at[:2])
        panel(axis, shown, f"positions: {title}", "x", "y", vmin=0, vmax=2)
    for axis, raft_size in zip(axes[1], (1, 2, 4)):
        layer = RaftTokenMixing(CHANNELS, GRID, raft_size)
        shown = mark(dependence(layer.mlp, at)[:, x], (y, channel))
        panel(axis, shown, f"vertical, raft size {raft_size}", "channel", f"y, at x = {x}", vmin=0, vmax=2)
    save_figure(figure, path)


@torch.no_grad()
def draw_embedding(path: Path, model: RaftMLP) -> None:
    """Draw the kernels of the embeddings: their weights' sizes, over all channels."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots(2, 3)
    for i, row in enumerate(axes):
        embed = model.stages[i].embed
        weights = {f"kernel of {k}": conv.weight for k, conv in zip(embed.kernels, embed.convs)}
        weights["both, as one convolution"] = embed.merged_weight()
        most, width = max(w.norm(dim=(0, 1)).max() for w in weights.values()), embed.kernels[-1]
        for axis, (title, weight) in zip(row, weights.items()):
            shown, margin = np.full((width, width), np.nan), (width - weight.shape[-1]) // 2
            shown[margin : width - margin, margin : width - margin] = weight.norm(dim=(0, 1))
            panel(axis, shown, f"stage {i + 1}, stride {embed.stride}: {title}", vmin=0, vmax=most)
            low, high = (width - embed.stride) / 2 - 0.5, (width + embed.stride) / 2 - 0.5
            axis.plot([low, high, high, low, low], [low, low, high, high, low], color="tab:red", linewidth=1.5)
            axis.set(xticks=[], yticks=[])
    save_figure(figure, path)


@torch.no_grad()
def draw_rules(path: Path, model: RaftMLP) -> None:
    """Draw the map of the first stage for a scene four times as large as the trained images, by two rules."""
    scene = SceneMaker("validation", size=128).make(2)
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = ((torch.from_numpy(scene.image).permute(2, 0, 1) / 255 - mean) / std)[None]
    maps = {"the embedding": model.stages[0].embed(images.permute(0, 2, 3, 1))}
    for rule in ("full", "residual"):
        for block in model.stages[0].blocks:
            block.resizing = rule
        maps[f'after the block, "{rule}"'] = model.stages[0].mix(maps["the embedding"])
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    axes = figure.subplots(1, 4)
    panel(axes[0], scene.image, "a scene of 128x128 pixels")
    directions = torch.pca_lowrank(maps["the embedding"].flatten(0, 2), 3, niter=8)[2]
    for axis, (title, values) in zip(axes[1:], maps.items()):
        shown = values[0] @ directions
        low, high = (shown.flatten(0, 1).quantile(q, dim=0) for q in (0.02, 0.98))
        panel(axis, ((shown - low) / (high - low)).clamp(0, 1), title)
    save_figure(figure, path, dpi=90)


def main() -> None:
    torch.manual_seed(0)
    draw_mixing(DOCS / "mixing.png")
    trained = timm.create_model("raftmlp_digits", pretrained=True).eval()
    draw_embedding(DOCS / "embedding.png", trained)
    draw_rules(DOCS / "rules.png", trained)


if __name__ == "__main__":
    main()
