"""What an evaluation shows of its images: galleries, confusions, per-image results, accuracy over size.

The classes with ``add`` collect from ``validate.evaluate``: its ``on_batch`` hands them every batch's images
(B, C, H, W), classes (B,) and logits (B, num_classes). Images of class UNREAD do not count anywhere.
"""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import cli
import loaders

PICTURES = (".png", ".jpg", ".pdf", ".svg")
CSV_COLUMNS = (
    "file", "class", "class_name", "predicted", "predicted_name", "probability", "right", "class_probability", "top5",
)  # fmt: skip


def class_name(names: list[str] | None, index: int) -> str:
    """Return a class's name, or its number where it has none."""
    return str(names[index] if names and index < len(names) else index)


def size_name(size: tuple[int, int]) -> str:
    """Return height and width in the words of --sizes."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


# Images


class Gallery:
    """Collects images with their predictions, wrong ones first, and draws them.

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

    def add(self, images: Tensor, target: Tensor, logits: Tensor) -> None:
        """Look at a batch."""
        chance, predicted = logits.softmax(1).max(1)
        for image, truth, guess, share in zip(images, target.tolist(), predicted.tolist(), chance.tolist()):
            kept = self.right if truth == guess else self.wrong
            if truth != loaders.UNREAD and len(kept) < self.limit:
                pixels = (image.cpu() * self.std + self.mean).clamp(0, 1).permute(1, 2, 0).numpy()
                kept.append((pixels, truth, guess, share))

    def draw(self, path: Path, title: str) -> None:
        """Write the picture."""
        from matplotlib.figure import Figure

        shown = (self.wrong + self.right)[: self.limit]
        columns = 8
        rows = max(1, -(-len(shown) // columns))
        figure = Figure(figsize=(columns * 1.25, rows * 1.45 + 0.5), layout="tight")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (image, truth, guess, share) in zip(axes.flat, shown):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            label, colour, weight = f"{self._label(guess)}  {share:.0%}", "tab:green", "normal"
            if guess != truth:
                label, colour, weight = f"{label}\nis {self._label(truth)}", "tab:red", "bold"
            axis.set_title(label, fontsize=8, color=colour, weight=weight, parse_math=False)
        figure.suptitle(title, fontsize=10)
        cli.save_figure(figure, path)

    def _label(self, index: int) -> str:
        name = class_name(self.names, index)
        return name if len(name) <= 14 else f"{name[:13]}…"


class Predictions:
    """Collects what the model says of every image, in the data set's order."""

    def __init__(self):
        self._batches: list[tuple[np.ndarray, ...]] = []

    def add(self, images: Tensor, target: Tensor, logits: Tensor) -> None:
        """Look at a batch."""
        probabilities = logits.softmax(1)
        highest, classes = probabilities.topk(min(5, logits.shape[1]))
        of_truth = probabilities.gather(1, target.clamp(min=0)[:, None])[:, 0]
        self._batches.append(tuple(t.cpu().numpy() for t in (target, classes, highest[:, 0], of_truth)))

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return classes (N,), top-5 classes (N, 5), probabilities of the first of these and of the true class (N,)."""
        return tuple(np.concatenate(arrays) for arrays in zip(*self._batches))

    def unread(self) -> list[int]:
        """Return the numbers of the images that could not be read."""
        return np.flatnonzero(self.arrays()[0] == loaders.UNREAD).tolist()

    def confusion(self, names: list[str] | None) -> "Confusion":
        """Return how many images of each class were taken for which."""
        truth, top5, *_ = self.arrays()
        read = truth != loaders.UNREAD
        return Confusion(truth[read], top5[read, 0], names)

    def write(self, path: Path, dataset: Dataset, names: list[str] | None) -> None:
        """Write a CSV file with a row for every image that could be read."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for index, (truth, top5, probability, of_truth) in enumerate(zip(*self.arrays())):
            if truth == loaders.UNREAD:
                continue
            guess = top5[0]
            row = [
                loaders.file_name(dataset, index),
                truth,
                class_name(names, truth),
                guess,
                class_name(names, guess),
                f"{probability:.6f}",
                int(truth == guess),
                f"{of_truth:.6f}",
                " ".join(map(str, top5)),
            ]
            writer.writerow(row)
        cli.write_whole(path, text.getvalue().encode(errors="backslashreplace").decode())  # names that are no UTF-8


# Confusion


class Confusion:
    """How many images of each class were taken for which.

    Args:
        targets: Classes (N,) of images.
        predicted: What they were taken for (N,).
        names: Names of the classes.

    Attributes:
        classes: The K classes that occur, as images or as predictions.
        counts: Images by class and by prediction (K, K).
    """

    def __init__(self, targets: np.ndarray, predicted: np.ndarray, names: list[str] | None):
        from sklearn.metrics import confusion_matrix

        self.classes, self.names = np.union1d(targets, predicted), names
        self.counts = confusion_matrix(targets, predicted, labels=self.classes)

    def worst(self, limit: int = 10) -> list[dict]:
        """Return the classes of lowest accuracy, each with its most frequent wrong class as ``taken_for``."""
        images, right = self.counts.sum(1), self.counts.diagonal()
        accuracy = 100 * right / images.clip(min=1)
        wrong = self.counts - np.diag(right)
        rows = []
        for i in [i for i in np.argsort(accuracy, kind="stable") if images[i]][:limit]:
            most = wrong[i].argmax()
            taken_for = {**self._class(most), "images": int(wrong[i, most])} if wrong[i, most] else None
            figures = {"accuracy": float(accuracy[i]), "images": int(images[i]), "taken_for": taken_for}
            rows.append({**self._class(i), **figures})
        return rows

    def _class(self, i: int) -> dict:
        return {"class": int(self.classes[i]), "name": class_name(self.names, self.classes[i])}

    def draw(self, path: Path, title: str) -> None:
        """Write the matrix as a picture, each row as shares of its class's images."""
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap, PowerNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter

        count = len(self.classes)
        shares = self.counts / self.counts.sum(1, keepdims=True).clip(min=1)
        side = np.clip(2 + 0.45 * count, 4, 11)
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axis = figure.subplots()
        # rare confusions shall be seen, single images among 1000 classes too: a root, and a step from white to blue
        colours = ListedColormap(colormaps["Blues"](np.linspace(0.3, 1, 256)))
        image = axis.imshow(
            np.ma.masked_equal(shares, 0), cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest"
        )
        figure.colorbar(image, ax=axis, format=PercentFormatter(1), shrink=0.8, label="share of the class's images")
        axis.set(xlabel="predicted", ylabel="class", title=title)
        ticks = range(0, count, 1 if count <= 50 else count // 10)
        labels = [class_name(self.names if count <= 50 else None, self.classes[i]) for i in ticks]
        axis.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 3 else 0, parse_math=False)
        axis.set_yticks(ticks, labels, parse_math=False)
        if count <= 20:
            for i, j in zip(*self.counts.nonzero()):
                colour = "white" if shares[i, j] > 0.25 else "black"
                axis.text(j, i, self.counts[i, j], ha="center", va="center", fontsize=8, color=colour)
        cli.save_figure(figure, path)


def worst_table(worst: list[dict]) -> str:
    """Return the rows of ``Confusion.worst`` as text."""
    width = max(len("worst classes"), *(len(row["name"]) for row in worst))
    lines = [f"{'worst classes':<{width}}  top-1 %  images  most often taken for"]
    for row in worst:
        taken = "{name} ({images})".format(**row["taken_for"]) if row["taken_for"] else "-"
        lines.append(f"{row['name']:<{width}}  {row['accuracy']:>7.2f}  {row['images']:>6}  {taken}")
    return "\n".join(lines)


# Models and sizes


def results_header(width: int, real: bool) -> str:
    """Return the headline above ``results_line``."""
    more = "  ReaL-1 %  ReaL-5 %" if real else ""
    return f"{'model':<{width}}  parameters       size   crop  top-1 %  top-5 %     loss{more}  images/s"


def results_line(row: dict, width: int) -> str:
    """Return one row of the results as a line of the table; ``width`` is that of the longest model's name."""
    more = f"  {row['real_top1']:8.2f}  {row['real_top5']:8.2f}" if "real_top1" in row else ""
    return (
        f"{row['model']:<{width}}  {row['parameters'] / 1e6:8.2f} M  {size_name(row['img_size']):>9}  "
        f"{row['crop_pct']:5.3g}  {row['top1']:7.2f}  {row['top5']:7.2f}  {row['loss']:7.4f}{more}  "
        f"{row['images_per_second']:8.0f}"
    )


def draw_sizes(path: Path, rows: list[dict], count: int) -> None:
    """Write a picture of accuracy over image size, one line a model; each model has ``count`` rows, one a size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    sides = [math.sqrt(math.prod(row["img_size"])) for row in rows]
    for start in range(0, len(rows), count):
        points = sorted((sides[i], rows[i]["top1"]) for i in range(start, start + count))
        axis.plot(*zip(*points), marker="o", label=rows[start]["model"])
    labels = [size_name(row["img_size"]) for row in rows[:count]]
    axis.set_xticks(sides[:count], labels, rotation=45 if count > 8 else 0)
    axis.set(xlabel="image size (pixels)", ylabel="top-1 (%)")
    axis.grid(alpha=0.3)
    axis.legend()
    cli.save_figure(figure, path)
