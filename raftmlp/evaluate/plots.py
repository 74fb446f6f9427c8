"""Pictures of predictions, accuracy, speed, training and studies, and of what a network has learnt."""

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure  # draws into files, no screen needed
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from ..data.images import UNREADABLE
from ..files import save_figure
from ..sizes import parse_size, size_name
from .inspection import smallest_share
from .labels import class_name, drawable
from .results import Confusion
from .speed import Result

__all__ = [
    "Gallery", "draw_accuracy", "draw_confusion", "draw_cost", "draw_curves", "draw_receptive_fields",
    "draw_speed", "draw_study", "draw_updates", "draw_weights",
]  # fmt: skip

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def _panels(rows: int, columns: int, width: float, height: float, title: str = "") -> tuple[Figure, np.ndarray]:
    """Return a figure of so many inches and its panels (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=9, parse_math=False)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = _panels(1, 1, width, height)
    return figure, axes[0, 0]


# Predictions


class Gallery:
    """Collects images with their predictions, wrong ones first, spread over the classes, and draws them.

    Args:
        mean: Mean that the images were normalized with, a number a channel.
        std: Standard deviation likewise.
        names: Names of the classes.
        limit: Images in the picture.
    """

    def __init__(self, mean: Iterable[float], std: Iterable[float], names: list[str] | None, limit: int = 40):
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.names, self.limit = names, limit
        self.kept: list[tuple] = []  # rank, pixels, class, prediction, probability, in the order of the ranks
        self._seen: Counter = Counter()

    def add(self, images: Tensor, target: Tensor, logits: Tensor) -> None:
        """Keep images of a batch: as many of every class, the first ones, those of few classes if there are many."""
        highest, predicted = logits.softmax(1).max(1)
        rows = zip(images, target.tolist(), predicted.tolist(), highest.tolist())
        for image, label, prediction, probability in rows:
            kind = label == prediction, label
            rank = kind[0], self._seen[kind], label * GOLDEN_RATIO % 1  # such shares of 1 are spread evenly
            if label == UNREADABLE or (len(self.kept) == self.limit and rank > self.kept[-1][0]):
                continue
            self._seen[kind] += 1
            pixels = (image.cpu() * self.std + self.mean).clamp(0, 1).permute(1, 2, 0).numpy()
            insort(self.kept, (rank, pixels, label, prediction, probability), key=itemgetter(0))
            del self.kept[self.limit :]

    def draw(self, path: Path, title: str) -> None:
        """Write the picture."""
        columns = 8
        rows = max(1, -(-len(self.kept) // columns))
        figure, axes = _panels(rows, columns, columns * 1.25, rows * 1.45 + 0.5, title)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (_, pixels, label, prediction, probability) in zip(axes.flat, self.kept):
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            text, color, weight = f"{self._short_name(prediction)}  {probability:.0%}", "tab:green", "normal"
            if prediction != label:
                text, color, weight = f"{text}\nis {self._short_name(label)}", "tab:red", "bold"
            axis.set_title(text, fontsize=8, color=color, weight=weight, parse_math=False)
        save_figure(figure, path)

    def _short_name(self, index: int) -> str:
        name = drawable(class_name(self.names, index))
        return name if len(name) <= 14 else f"{name[:13]}…"


def draw_confusion(path: Path, title: str, confusion: Confusion) -> None:
    """Write a confusion matrix as a picture, each row as shares of its class's images."""
    classes, counts, count = confusion.classes, confusion.counts, len(confusion.classes)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = np.clip(2 + 0.45 * count, 4, 11)
    figure, axis = _panel(side + 1, side)
    # a root, and a step from white to blue, make rare confusions visible, single images among 1000 classes too
    colors = ListedColormap(colormaps["Blues"](np.linspace(0.3, 1, 256)))
    image = axis.imshow(np.ma.masked_equal(shares, 0), cmap=colors, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(image, ax=axis, format=PercentFormatter(1), shrink=0.8, label="share of the class's images")
    axis.set(xlabel="predicted", ylabel="class", title=title)
    ticks = range(0, count, 1 if count <= 50 else count // 10)
    labels = [drawable(class_name(confusion.names if count <= 50 else None, classes[i])) for i in ticks]
    axis.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 3 else 0, parse_math=False)
    axis.set_yticks(ticks, labels, parse_math=False)
    if count <= 20:
        for i, j in zip(*counts.nonzero()):
            color = "white" if shares[i, j] > 0.25 else "black"
            axis.text(j, i, counts[i, j], ha="center", va="center", fontsize=8, color=color)
    save_figure(figure, path)


def draw_accuracy(path: Path, rows: Sequence[dict], sizes: int) -> None:
    """Write a picture of top-1 over the image size, one line a model; the sizes stand in order, equally far apart.

    ``rows`` are results of ``evaluate_prepared``, for each model as many in succession as there are sizes. Models of
    one name are told apart by their weights.
    """
    figure, axis = _panel(7, 4.5)
    order = sorted(range(sizes), key=lambda i: math.prod(rows[i]["img_size"]))
    lines = [rows[start : start + sizes] for start in range(0, len(rows), sizes)]
    names = [line[0]["model"] for line in lines]
    for name, line in zip(names, lines):
        label = name if names.count(name) == 1 else f"{name}, {line[0]['weights']}"
        axis.plot(range(sizes), [line[i].get("top1", math.nan) for i in order], marker="o", label=drawable(label))
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
    shown = [r for r in results if r.size == results[0].size and not r.failure]
    tasks, models = (list(dict.fromkeys(getattr(r, name) for r in shown)) for name in ("task", "model"))
    if not shown:
        return
    palette = colormaps["tab10" if len(models) <= 10 else "tab20"]
    looks = {
        name: dict(marker="o" if "raftmlp" in name else "s", edgecolors=[palette(i % palette.N)])
        for i, name in enumerate(models)
    }
    figure, (axes,) = _panels(1, len(tasks), 6 * len(tasks) + 2, 4.5)
    for axis, task in zip(axes, tasks):
        for r in shown:
            if r.task == task:
                face = "none" if r.mode == "eager" else looks[r.model]["edgecolors"]
                axis.scatter(r.gmacs, r.images_per_second, **looks[r.model], facecolors=face)
        axis.set(xlabel="GMACs an image", ylabel="images a second", title=f"{task} at {results[0].size}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    handles = [axes[-1].scatter([], [], **look, facecolors="none") for look in looks.values()]
    axes[-1].legend(handles, models, fontsize=8, title="filled: compiled", loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def draw_cost(path: Path, results: Sequence[Result]) -> None:
    """Write a picture of time and memory over the image size, one line a model, mode and task."""
    figure, (axes,) = _panels(1, 2, 11, 4.5)
    lines: dict[tuple, list[tuple]] = {}
    for r in results:
        if not r.failure:
            point = (math.prod(parse_size(r.size)) / 1e6, r.milliseconds / r.batch_size, r.memory_mib / r.batch_size)
            lines.setdefault((r.model, *([] if r.mode == "eager" else [r.mode]), r.task), []).append(point)
    for axis, column, name in zip(axes, (1, 2), ("milliseconds an image", "MiB an image at the peak")):
        for labels, points in lines.items():
            points = sorted(points)
            axis.plot([p[0] for p in points], [p[column] for p in points], "o-", label=", ".join(labels))
        axis.set(xlabel="megapixels", ylabel=name, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    save_figure(figure, path)


# Training


def draw_curves(path: Path, log: Sequence[Mapping[str, Any]], loss_parts: Sequence[str] = ()) -> None:
    """Write a picture of loss and accuracy over the epochs of a log; the training loss is with ``loss_parts``."""
    epochs = [row["epoch"] for row in log]
    figure, ((left, right),) = _panels(1, 2, 9, 3.4)
    training, validation = "training", "validation"
    if loss_parts:
        training, validation = f"training, with {', '.join(loss_parts)}", "validation, without"
    left.plot(epochs, [row["train_loss"] for row in log], label=training)
    left.plot(epochs, [row["eval_loss"] for row in log], label=validation)
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    right.plot(epochs, [row["eval_top1"] for row in log], color="tab:green")
    right.set(xlabel="epoch", ylabel="validation top-1 in %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    save_figure(figure, path)


def draw_study(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a picture of the accuracy of every arm, or of every arm over the points; bars are standard deviations.

    ``rows`` are those of ``study.report.make_rows``.
    """
    arms, point = list(dict.fromkeys(row["arm"] for row in rows)), next(iter(rows[0]["point"]), None)
    figure, axis = _panel(7.5, 4.5 if point else 1.2 + 0.34 * len(arms))
    done = [row for row in rows if row["runs"]]
    if point:
        for arm in arms:
            own = [row for row in done if row["arm"] == arm]
            values, means = [row["point"][point] for row in own], [row["top1_mean"] for row in own]
            bars = [row["top1_deviation"] or 0 for row in own]
            axis.errorbar(values, means, bars, marker="o", ms=4, capsize=3, label=arm)
        xs = sorted({row["point"][point] for row in rows})
        if xs[0] > 0 and xs[-1] / xs[0] > 5:
            axis.set_xscale("log")
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
        axis.minorticks_off()
        axis.set(xlabel=point, ylabel="top-1 (%)")
        axis.legend(fontsize=8)
    else:
        for row in done:
            i = arms.index(row["arm"])
            axis.plot(list(row["top1"].values()), [i] * row["runs"], "o", color="0.7", ms=3)
            bar = row["top1_deviation"] or 0
            axis.errorbar(row["top1_mean"], i, xerr=bar, fmt="o", color=f"C{i % 10}", ms=6, capsize=4)
        axis.set_yticks(range(len(arms)), arms, parse_math=False)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.set(xlabel="top-1 (%)")
    seeds = max(row["planned"] for row in rows)
    axis.set_title(f"{title}: mean and standard deviation over {seeds} seeds", fontsize=10, parse_math=False)
    axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=140)


# What a network has learnt


def draw_weights(path: Path, kind: str, title: str, blocks: Mapping[str, np.ndarray]) -> None:
    """Write a picture of one kind of ``mixing_weights``, a row a block.

    Of raft-token mixing, a panel a raft group: the positions of the grid along the axis that is mixed, the units beside
    each other, in the order of the place that they look at, the same in all groups. Of plain token mixing, the 32 units
    of the largest weights, each an image of the grid.
    """
    is_plain = kind == "plain"
    columns = 32 if is_plain else max(weights.shape[1] for weights in blocks.values())
    width, height = {"plain": (0.45, 0.75), "vertical": (3.4, 1.25), "horizontal": (2.6, 1.9)}[kind]
    across = {"vertical": "\ndown: rows; across: units", "horizontal": "\nacross: columns; down: units"}.get(kind, "")
    figure, axes = _panels(len(blocks), columns, 1.6 + width * columns, 0.9 + height * len(blocks), title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], visible=False)
    for row, (block, weights) in zip(axes, blocks.items()):
        if is_plain:
            panels = weights[np.argsort(-np.linalg.norm(weights, axis=(1, 2)))[:columns]]
        else:  # (units, r, L) to r panels of positions and units
            panels = _by_place(weights).transpose((1, 2, 0) if kind == "vertical" else (1, 0, 2))
        limit = np.quantile(np.abs(weights), 0.995) or 1
        look = dict(cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        for i, (axis, panel) in enumerate(zip(row, panels)):
            axis.set_visible(True)
            axis.imshow(panel, **look, aspect="equal" if is_plain else "auto")
            if not is_plain:
                axis.set_title(f"raft group {i + 1}", fontsize=7, pad=2)
        row[0].set_ylabel(block + across, fontsize=7, rotation=0, ha="right", va="center")
    save_figure(figure, path)


def _by_place(weights: np.ndarray) -> np.ndarray:
    """Return weights (units, r, L) with the units in the order of the place that they look at."""
    energy = (weights.astype(np.float64) ** 2).sum(1)
    places = energy @ np.arange(energy.shape[1]) / energy.sum(1).clip(min=1e-30)
    return weights[np.argsort(places, kind="stable")]


def draw_receptive_fields(path: Path, title: str, fields: Mapping[str, np.ndarray]) -> None:
    """Write a picture of receptive fields, each scaled to its largest gradient; the root makes small ones visible."""
    columns = min(len(fields), 6)
    rows = -(-len(fields) // columns)
    figure, axes = _panels(rows, columns, 0.4 + 2.2 * columns, 0.6 + 2.5 * rows, title)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (layer, gradient) in zip(axes.flat, fields.items()):
        axis.imshow(np.sqrt(gradient / (gradient.max() or 1)), cmap="magma", vmin=0, vmax=1)
        axis.set_title(f"{layer}\nhalf of it in {smallest_share(gradient):.1%} of the pixels", fontsize=8)
    save_figure(figure, path)


def draw_updates(path: Path, title: str, norms: dict[str, dict[str, float]]) -> None:
    """Write a picture of the figures of ``update_norms``, a group of bars a block."""
    kinds = list(dict.fromkeys(kind for row in norms.values() for kind in row))
    figure, axis = _panel(2.5 + 0.62 * len(norms), 3.6)
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
