"""Classes of image files: their probabilities, which parts of an image they depend on, and a picture of both."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import product, zip_longest
from pathlib import Path
from textwrap import shorten

import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.images import open_image
from ..data.pixels import PixelReader
from ..errors import UserError, first_words
from ..files import printable, save_figure
from .labels import drawable

__all__ = ["ImageFiles", "class_probabilities", "draw_predictions", "occlusion_map", "predict"]

MAX_BARS = 10  # of an image in the picture


class ImageFiles(Dataset):
    """Image files as tensors (C, H, W), each with its name and the reason why it cannot be read, "" if it can.

    ``config`` says how images are prepared, see ``data_config``.
    """

    def __init__(self, files: Sequence[Path], config: dict):
        preparation = {key: value for key, value in config.items() if key not in ("background", "exif")}
        self.pixels = PixelReader.from_config(config)
        self.files, self.shape, self.transform = files, config["input_size"], create_transform(**preparation)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str, str]:
        name = printable(self.files[index])
        try:
            return self.transform(open_image(self.files[index], self.pixels)), name, ""
        except Exception as error:  # PIL raises anything on bytes that are no image
            return torch.zeros(self.shape), name, first_words(error)


@torch.inference_mode()
def class_probabilities(
    images: Tensor, model: nn.Module, device: torch.device, autocast: AbstractContextManager
) -> Tensor:
    """Return a model's probabilities (B, num_classes), on the CPU, of normalized images (B, C, H, W)."""
    with autocast:
        logits = model(images.to(device))
    if logits.shape != (len(images), model.num_classes):
        raise UserError(f"the model must give one number a class, not a shape of {list(logits.shape[1:])} an image")
    if not logits.isfinite().all():
        raise UserError("the model's output is not finite: its weights are damaged, or --amp is too coarse for it")
    return logits.float().softmax(1).cpu()


def predict(
    loader: DataLoader, classify: Callable[[Tensor], Tensor], names: Sequence[str], topk: int
) -> Iterator[tuple[dict, Tensor]]:
    """Yield for each of the loader's ``ImageFiles`` its result, and its image (C, H, W) as the model sees it.

    A result has ``file``, and ``predictions`` (``class``, ``name`` and ``probability`` of each) or ``error``.
    ``classify`` makes probabilities (B, num_classes) of images (B, C, H, W).
    """
    hide_bar = None if len(loader) > 1 else True  # None: a bar where there is a terminal
    for images, files, errors in tqdm(loader, desc="predicting", unit=" batches", leave=False, disable=hide_bar):
        loader.dataset.pixels.say_what_was_seen()
        top = classify(images).topk(topk)
        for image, file, error, *best in zip(images, files, errors, top.indices.tolist(), top.values.tolist()):
            if error:
                yield dict(file=file, error=error), image
            else:
                classes = [{"class": i, "name": names[i], "probability": p} for i, p in zip(*best)]
                yield dict(file=file, predictions=classes), image


def occlusion_map(
    image: Tensor, label: int, classify: Callable[[Tensor], Tensor], batch_size: int = 32, cells: int = 8
) -> Tensor:
    """Return how much a class's probability depends on each part: how far it falls if a gray square covers the part.

    The image is a grid of cells. A square covers 2x2 cells and moves by one; at the border it covers fewer, so that
    every cell is covered four times. A cell's value is the mean of the four.

    Args:
        image: Normalized image (C, H, W); gray is its 0.
        label: The class.
        classify: Makes probabilities (B, num_classes) of images (B, C, H, W).
        batch_size: Images per batch.
        cells: Cells along each axis.

    Returns:
        Falls of the probability, shape (cells, cells), from -1 to 1.
    """
    spans = []
    for size in image.shape[1:]:
        edges = torch.linspace(0, size, cells + 1).round().int().tolist()
        spans.append([slice(edges[max(i - 1, 0)], edges[min(i + 1, cells)]) for i in range(cells + 1)])
    squares = list(product(*spans))

    covered_probabilities = []
    for start in range(0, len(squares), batch_size):
        batch = squares[start : start + batch_size]
        covered = image.repeat(len(batch), 1, 1, 1)
        for copy, (rows, columns) in zip(covered, batch):
            copy[:, rows, columns] = 0
        covered_probabilities.append(classify(covered)[:, label])
    falls = classify(image[None])[0, label] - torch.cat(covered_probabilities)
    return avg_pool2d(falls.view(1, cells + 1, cells + 1), 2, stride=1)[0]


def draw_predictions(
    path: Path, title: str, shown: Sequence[tuple[dict, Tensor]], maps: Sequence[Tensor], config: dict
) -> None:
    """Write a picture: images as the model sees them, next to bars of their classes.

    Args:
        path: The file.
        title: The title above.
        shown: What ``predict`` yielded for them, none with an error.
        maps: An ``occlusion_map`` of each image, drawn in red; or none.
        config: How the images were prepared.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # draws into files, no screen needed

    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    bars = min(MAX_BARS, len(shown[0][0]["predictions"]))
    figure = Figure(figsize=(5.2 * columns, max(1.7, 0.25 * bars + 0.4) * rows + 0.5), layout="constrained")
    if maps:
        title += "\nred: how far the first class's probability falls under a gray square"
    figure.suptitle(title, fontsize=9, parse_math=False)
    pairs = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=(2, 3) * columns).reshape(-1, 2)
    for axis in pairs.flat:
        axis.axis("off")
    for (left, right), (result, image), falls in zip_longest(pairs[: len(shown)], shown, maps):
        pixels = (image * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
        if falls is None:
            left.imshow(pixels)
        else:
            most = falls.max().item()
            alpha = 0.8 * falls.clamp(min=0).numpy() / max(most, 0.05)
            extent = (-0.5, image.shape[2] - 0.5, image.shape[1] - 0.5, -0.5)
            left.imshow(pixels.mean(2), "gray", vmin=0, vmax=1)
            left.imshow(alpha, ListedColormap(["red"]), alpha=alpha, extent=extent, interpolation="bilinear")
            left.set_title(f"by up to {most:.2f}", fontsize=8)
        for i, prediction in enumerate(result["predictions"][:bars]):
            probability, name = prediction["probability"], shorten(drawable(prediction["name"]), 42, placeholder=" ...")
            right.barh(i, probability, height=0.75, color="lightsteelblue" if i else "skyblue")
            right.text(-0.02, i, f"{100 * probability:.1f} %", fontsize=8, va="center", ha="right")
            right.text(0.02, i, name, fontsize=8, va="center", parse_math=False)
        file = drawable(result["file"])
        right.set(xlim=(-0.2, 1), ylim=(bars - 0.5, -0.5))
        right.set_title(file if len(file) <= 46 else f"...{file[-43:]}", loc="left", fontsize=8, parse_math=False)
    save_figure(figure, path)
