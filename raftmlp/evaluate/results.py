"""What a model predicts for every image of a data set, which classes it confuses, and tables.

``Predictions.add``, ``plots.Gallery.add`` and ``labels.RealLabels.add`` are what ``evaluate`` calls as ``on_batch``:
they take a batch's images (B, C, H, W), classes (B,) and logits (B, num_classes). Images of class UNREADABLE do not
count.
"""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from ..data.images import UNREADABLE, file_name
from ..files import write_csv
from .labels import class_name

__all__ = ["Confusion", "Predictions", "aligned"]


def aligned(rows: Sequence[Sequence[str]], left: int = 1, separator: str = "  ") -> list[str]:
    """Return rows of texts as lines with columns of one width, the first ``left`` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    sides = ["<" if i < left else ">" for i in range(len(widths))]
    return [separator.join(f"{cell:{s}{w}}" for cell, s, w in zip(row, sides, widths)) for row in rows]


class Predictions:
    """Collects the predictions for all images, in the data set's order."""

    def __init__(self):
        self._batches: list[tuple[np.ndarray, ...]] = []

    def add(self, images: Tensor, target: Tensor, logits: Tensor) -> None:
        """Keep the predictions for a batch."""
        probabilities = logits.softmax(1)
        highest, classes = probabilities.topk(min(5, logits.shape[1]))
        of_class = probabilities.gather(1, target.clamp(min=0)[:, None])[:, 0]
        self._batches.append(tuple(t.cpu().numpy() for t in (target, classes, highest[:, 0], of_class)))

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return classes (N,), top-5 predictions (N, 5), probabilities of the first of them and of the class (N,)."""
        return tuple(np.concatenate(arrays) for arrays in zip(*self._batches))

    def unreadable(self) -> list[int]:
        """Return the numbers of the images that could not be read."""
        return np.flatnonzero(self.arrays()[0] == UNREADABLE).tolist()

    def confusion(self, names: list[str] | None) -> "Confusion":
        """Return how many images of each class were taken for which."""
        classes, top5, *_ = self.arrays()
        read = classes != UNREADABLE
        return Confusion(classes[read], top5[read, 0], names)

    def write(self, path: Path, dataset: Dataset, names: list[str] | None) -> None:
        """Write a CSV file with a row for every image that could be read."""
        rows = [
            {
                "file": file_name(dataset, i),
                "class": label,
                "class_name": class_name(names, label),
                "predicted": top5[0],
                "predicted_name": class_name(names, top5[0]),
                "probability": f"{probability:.6f}",
                "right": int(label == top5[0]),
                "class_probability": f"{of_class:.6f}",
                "top5": " ".join(map(str, top5)),
            }
            for i, (label, top5, probability, of_class) in enumerate(zip(*self.arrays()))
            if label != UNREADABLE
        ]
        write_csv(path, rows)


class Confusion:
    """How many images of each class were taken for which.

    Args:
        targets: Classes (N,) of images.
        predicted: Predicted classes (N,).
        names: Names of the classes.

    Attributes:
        classes: The K classes that occur, as images or as predictions.
        counts: Images by class and by prediction (K, K).
    """

    def __init__(self, targets: np.ndarray, predicted: np.ndarray, names: list[str] | None):
        self.classes, self.names = np.union1d(targets, predicted), names
        rows, columns = (np.searchsorted(self.classes, values) for values in (targets, predicted))
        self.counts = np.zeros((len(self.classes),) * 2, int)
        np.add.at(self.counts, (rows, columns), 1)

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
