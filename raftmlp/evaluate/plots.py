"""Pictures of results: images with their predictions, a confusion matrix, accuracy and speed over the image size."""

import math
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.images import UNREADABLE
from ..files import save_figure
from ..sizes import parse_size, size_name
from .labels import class_name, drawable
from .results import Confusion
from .speed import Result

__all__ = ["Gallery", "draw_accuracy", "draw_confusion", "draw_cost", "draw_speed"]

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Gallery:
    """Collects images with their predictions, wrong ones first, spread over the classes, and draws them.

    Args:
        mean: Mean that the images were normalised with, a number a channel.
        std: Standard deviation likewise.
        names: Names of the classes.
        limit: Images in the picture.
    """

    def __init__(self, mean: Iterable[float], std: Iterable[float], names: list[str] | None, limit: int = 40):
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.names, self.limit = names, limit
        self.right: list[tuple] = []
        self.wrong: list[tuple] = []
        self._ranks: tuple[list, list] = [], []  # of the wrong ones and the right ones
        self._seen: Counter = Counter()

    def add(self, images: Tensor, target: Tensor, logits: Tensor) -> None:
        """Keep images of a batch: as many of every class, the first ones, those of few classes if there are many."""
        highest, predicted = logits.softmax(1).max(1)
        rows = zip(images, target.tolist(), predicted.tolist(), highest.tolist())
        for image, label, prediction, probability in rows:
            is_right = label == prediction
            kept, ranks = self.right if is_right else self.wrong, self._ranks[is_right]
            rank = self._seen[is_right, label], label * GOLDEN_RATIO % 1  # such shares of 1 are spread evenly
            place = bisect(ranks, rank)
            if label != UNREADABLE and place < self.limit:
                self._seen[is_right, label] += 1
                pixels = (image.cpu() * self.std + self.mean).clamp(0, 1).permute(1, 2, 0).numpy()
                kept.insert(place, (pixels, label, prediction, probability))
                ranks.insert(place, rank)
                del kept[self.limit :], ranks[self.limit :]

    def draw(self, path: Path, title: str) -> None:
        """Write the picture."""
        from matplotlib.figure import Figure  # draws into files, no screen needed

        shown = (self.wrong + self.right)[: self.limit]
        columns = 8
        rows = max(1, -(-len(shown) // columns))
        figure = Figure(figsize=(columns * 1.25, rows * 1.45 + 0.5), layout="tight")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (pixels, label, prediction, probability) in zip(axes.flat, shown):
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            text, colour, weight = f"{self._short_name(prediction)}  {probability:.0%}", "tab:green", "normal"
            if prediction != label:
                text, colour, weight = f"{text}\nis {self._short_name(label)}", "tab:red", "bold"
            axis.set_title(text, fontsize=8, color=colour, weight=weight, parse_math=False)
        figure.suptitle(title, fontsize=10)
        save_figure(figure, path)

    def _short_name(self, index: int) -> str:
        name = drawable(class_name(self.names, index))
        return name if len(name) <= 14 else f"{name[:13]}…"


def draw_confusion(path: Path, title: str, confusion: Confusion) -> None:
    """Write a confusion matrix as a picture, each row as shares of its class's images."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    classes, counts, count = confusion.classes, confusion.counts, len(confusion.classes)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = np.clip(2 + 0.45 * count, 4, 11)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    # a root, and a step from white to blue, make rare confusions visible, single images among 1000 classes too
    colours = ListedColormap(colormaps["Blues"](np.linspace(0.3, 1, 256)))
    image = axis.imshow(np.ma.masked_equal(shares, 0), cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(image, ax=axis, format=PercentFormatter(1), shrink=0.8, label="share of the class's images")
    axis.set(xlabel="predicted", ylabel="class", title=title)
    ticks = range(0, count, 1 if count <= 50 else count // 10)
    labels = [drawable(class_name(confusion.names if count <= 50 else None, classes[i])) for i in ticks]
    axis.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 3 else 0, parse_math=False)
    axis.set_yticks(ticks, labels, parse_math=False)
    if count <= 20:
        for i, j in zip(*counts.nonzero()):
            colour = "white" if shares[i, j] > 0.25 else "black"
            axis.text(j, i, counts[i, j], ha="center", va="center", fontsize=8, color=colour)
    save_figure(figure, path)


def draw_accuracy(path: Path, rows: Sequence[dict], sizes: int) -> None:
    """Write a picture of top-1 over the image size, one line a model; the sizes stand in order, equally far apart.

    ``rows`` are results of ``evaluate_prepared``, for each model as many in succession as there are sizes. Models of
    one name are told apart by their weights.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    order = sorted(range(sizes), key=lambda i: math.prod(rows[i]["img_size"]))
    lines = [rows[start : start + sizes] for start in range(0, len(rows), sizes)]
    names = [line[0]["model"] for line in lines]
    for name, line in zip(names, lines):
        label = name if names.count(name) == 1 else f"{name}, {line[0]['weights']}"
        axis.plot(range(sizes), [line[i]["top1"] for i in order], marker="o", label=drawable(label))
    labels = [size_name(rows[i]["img_size"]) for i in order]
    is_wide = sum(len(label) + 2 for label in labels) > 60
    axis.set_xticks(range(sizes), labels, rotation=90 if is_wide else 0)
    axis.set(xlabel="image size (pixels)", ylabel="top-1 (%)")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


# Speed


def draw_speed(path: Path, results: Sequence[Result]) -> None:
    """Write a picture of images/s over GMACs at the first size, one panel a task; filled points are compiled."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r.task for r in results))
    models = list(dict.fromkeys(r.model for r in results if not r.failure))
    palette = colormaps["tab10" if len(models) <= 10 else "tab20"]
    looks = {
        name: dict(marker="o" if "raftmlp" in name else "s", edgecolors=[palette(i % palette.N)])
        for i, name in enumerate(models)
    }
    figure = Figure(figsize=(6 * len(tasks) + 2, 4.5), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, task in zip(axes, tasks):
        for r in results:
            if r.task == task and r.size == results[0].size and not r.failure:
                look = looks[r.model]
                face = "none" if r.mode == "eager" else look["edgecolors"]
                axis.scatter(r.gmacs, r.images_per_second, **look, facecolors=face)
        axis.set(xlabel="GMACs an image", ylabel="images a second", title=f"{task} at {results[0].size}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    handles = [axes[-1].scatter([], [], **look, facecolors="none") for look in looks.values()]
    axes[-1].legend(handles, models, fontsize=8, title="filled: compiled", loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def draw_cost(path: Path, results: Sequence[Result]) -> None:
    """Write a picture of time and memory over the image size, one line a model, mode and task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    lines: dict[str, list[tuple]] = {}
    for r in results:
        if not r.failure:
            point = (math.prod(parse_size(r.size)) / 1e6, r.milliseconds / r.batch_size, r.memory_mib / r.batch_size)
            lines.setdefault(f"{_label(r)}, {r.task}", []).append(point)
    for axis, column, name in zip(figure.subplots(1, 2), (1, 2), ("milliseconds an image", "MiB an image at the peak")):
        for label, points in lines.items():
            points = sorted(points)
            axis.plot([p[0] for p in points], [p[column] for p in points], "o-", label=label)
        axis.set(xlabel="megapixels", ylabel=name, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    save_figure(figure, path)


def _label(result: Result) -> str:
    return result.model if result.mode == "eager" else f"{result.model}, {result.mode}"
