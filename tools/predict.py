#!/usr/bin/env python
"""Classify images: the most probable classes with their names, as a table, as JSON and as a picture.

    python tools/predict.py digit.png --model raftmlp_digits --pretrained
    python tools/predict.py photos/ 'more/*.jpg' --checkpoint runs/mine/model_best.pth.tar --topk 3 --picture out.png

An image that cannot be read is named and passed over; the exit status is then 2.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from textwrap import shorten

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import cli
import loaders
from imagenet import names_for_people
from predict_onnx import find_images
from reports import PICTURES

MAX_IMAGES, MAX_BARS = 16, 10  # of a picture


def build_parser() -> cli.Parser:
    parser = cli.Parser("%(prog)s IMAGE ... [OPTION ...]", description=__doc__)
    group = parser.add_argument_group("images")
    group.add_argument(
        "images", nargs="*", metavar="IMAGE", help="an image, a folder (all below it) or a pattern; put these first"
    )
    cli.add_model_arguments(parser)
    loaders.add_image_arguments(group)
    group = parser.add_argument_group("run")
    group.add_argument("-b", "--batch-size", type=cli.number(int, 1), default=32, metavar="N", help="images a batch")
    group.add_argument(
        "-j",
        "--workers",
        type=cli.number(int, 0),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that load images where there are several batches; 0 to load them in this one",
    )
    cli.add_device_arguments(group)
    group = parser.add_argument_group("output")
    group.add_argument("--topk", type=cli.number(int, 1), default=5, metavar="K", help="classes an image")
    group.add_argument(
        "--class-names", metavar="FILE", help="text file, one name a line (default: the model's, ImageNet's, numbers)"
    )
    group.add_argument(
        "--results-file", type=cli.output_file((".json",)), metavar="FILE", help="write the predictions, a .json file"
    )
    group.add_argument(
        "--picture",
        type=cli.output_file(PICTURES),
        metavar="FILE",
        help=f"draw the first {MAX_IMAGES} images, as the model sees them, with up to {MAX_BARS} classes",
    )
    group.add_argument(
        "--saliency",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="in the picture, colour what the first class hangs on: where a grey square makes it less probable",
    )
    return parser


class ImageFiles(Dataset):
    """Image files as tensors (C, H, W), each with its name and the reason why it cannot be read, "" if it can.

    Args:
        files: The files.
        settings: How images are prepared, as ``loaders.image_settings`` tells it.
    """

    def __init__(self, files: list[Path], settings: dict):
        self.files, self.shape, self.transform = files, settings["input_size"], create_transform(**settings)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str, str]:
        name = str(self.files[index]).encode(errors="replace").decode()  # a file's name may be no Unicode
        try:
            with Image.open(self.files[index]) as image:
                return self.transform(image.convert("L" if self.shape[0] == 1 else "RGB")), name, ""
        except Exception as error:  # PIL raises anything on bytes that are no image
            return torch.zeros(self.shape), name, cli.first_words(error)


def class_names(model: torch.nn.Module, path: str | None) -> list[str]:
    """Return a name for every class: from the file, the model's own, ImageNet's by their number, or the index.

    Raises:
        UserError: If the file cannot be read, or has another number of lines than the model has classes.
    """
    if path:
        try:
            names = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise cli.UserError(
                f"cannot read the class names in {path}: {getattr(error, 'strerror', error)}"
            ) from error
        if len(names) != model.num_classes:
            raise cli.UserError(
                f"{path} has {len(names)} lines, the model {model.num_classes} classes: one name a line"
            )
        return names
    names = model.pretrained_cfg.get("label_names") or ()
    if len(names) == model.num_classes:
        return names_for_people([str(name) for name in names])
    if subset := infer_imagenet_subset(model):
        return ImageNetInfo(subset).label_descriptions()
    return [str(index) for index in range(model.num_classes)]


@torch.inference_mode()
def probabilities(
    images: Tensor, model: torch.nn.Module, device: torch.device, autocast: AbstractContextManager
) -> Tensor:
    """Return the probabilities (B, num_classes), on the CPU, of normalised images (B, C, H, W).

    Raises:
        UserError: If the model gives no such thing.
    """
    with autocast:
        logits = model(images.to(device))
    if logits.shape != (len(images), model.num_classes):
        raise cli.UserError(f"the model must give one number a class, not a shape of {list(logits.shape[1:])} an image")
    if not logits.isfinite().all():
        raise cli.UserError("the model's output is not finite: its weights are damaged, or --amp is too coarse for it")
    return logits.float().softmax(1).cpu()


def predict(
    loader: DataLoader, classify: Callable[[Tensor], Tensor], names: list[str], topk: int
) -> Iterator[tuple[dict, Tensor]]:
    """Yield for each file its entry in the JSON, and its image (C, H, W) as the model sees it.

    Args:
        loader: Batches of ``ImageFiles``.
        classify: Makes probabilities (B, num_classes) of images (B, C, H, W).
        names: A name for every class.
        topk: Classes an image.
    """
    no_bar = None if len(loader) > 1 else True  # None: a bar where there is a terminal
    for images, files, errors in tqdm(loader, desc="predicting", unit="batch", leave=False, disable=no_bar):
        top = classify(images).topk(topk)
        for image, file, error, indices, values in zip(
            images, files, errors, top.indices.tolist(), top.values.tolist()
        ):
            if error:
                yield dict(file=file, error=error), image
            else:
                top_classes = [{"class": i, "name": names[i], "probability": p} for i, p in zip(indices, values)]
                yield dict(file=file, predictions=top_classes), image


def report(entry: dict, width: int) -> None:
    """Print an image's rows of the table, or why it has none; width is that of the first column."""
    if "error" in entry:
        tqdm.write(f"cannot read {entry['file']}: {entry['error']}", file=sys.stderr)
        return
    for i, prediction in enumerate(entry["predictions"]):
        file = "" if i else entry["file"]
        cli.say(f"{file:<{width}}  {100 * prediction['probability']:9.2f} %  {prediction['name']}")


def occlusion_map(
    image: Tensor, label: int, classify: Callable[[Tensor], Tensor], batch_size: int = 32, cells: int = 8
) -> Tensor:
    """Return how much of a class's probability hangs on each place: how far it falls under grey squares that cover it.

    The image is a grid of cells; a square is 2x2 cells, slides by one and reaches over the border by one, so that every
    cell is covered four times. A cell's value is the mean of the four.

    Args:
        image: Normalised image (C, H, W); grey is its 0.
        label: The class.
        classify: Makes probabilities (B, num_classes) of images (B, C, H, W).
        batch_size: Images a batch.
        cells: Cells along each axis.

    Returns:
        Falls of the probability, shape (cells, cells), from -1 to 1.
    """
    spans = []
    for size in image.shape[1:]:
        edges = torch.linspace(0, size, cells + 1).round().int().tolist()
        spans.append([slice(edges[max(i - 1, 0)], edges[min(i + 1, cells)]) for i in range(cells + 1)])
    squares = list(product(*spans))

    after = []
    for start in range(0, len(squares), batch_size):
        batch = squares[start : start + batch_size]
        covered = image.repeat(len(batch), 1, 1, 1)
        for copy, (rows, columns) in zip(covered, batch):
            copy[:, rows, columns] = 0
        after.append(classify(covered)[:, label])
    falls = classify(image[None])[0, label] - torch.cat(after)
    return avg_pool2d(falls.view(1, cells + 1, cells + 1), 2, stride=1)[0]


def draw(path: Path, title: str, shown: list[tuple[dict, Tensor]], heats: list[Tensor], settings: dict) -> None:
    """Write a picture: the images as the model sees them beside bars of their classes, red where there is heat.

    Args:
        path: The file.
        title: What stands above.
        shown: Entries of the JSON with their images (C, H, W), as ``predict`` yields them.
        heats: For each image the output of ``occlusion_map``; or none.
        settings: How the images were prepared.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # draws into files, no screen needed

    mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ("mean", "std"))
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    bars = min(MAX_BARS, len(shown[0][0]["predictions"]))
    figure = Figure(figsize=(5.2 * columns, max(1.7, 0.25 * bars + 0.4) * rows + 0.5), layout="constrained")
    if heats:
        title += "\nred: how far the first class's probability falls under a grey square"
    figure.suptitle(title, fontsize=9, parse_math=False)
    pairs = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=(2, 3) * columns).reshape(-1, 2)
    for axis in pairs.flat:
        axis.axis("off")
    for (left, right), (entry, image), heat in zip_longest(pairs[: len(shown)], shown, heats):
        pixels = (image * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
        if heat is None:
            left.imshow(pixels)
        else:
            most = heat.max().item()
            alpha = 0.8 * heat.clamp(min=0).numpy() / max(most, 0.05)
            extent = (-0.5, image.shape[2] - 0.5, image.shape[1] - 0.5, -0.5)
            left.imshow(pixels.mean(2), "gray", vmin=0, vmax=1)
            left.imshow(alpha, ListedColormap(["red"]), alpha=alpha, extent=extent, interpolation="bilinear")
            left.set_title(f"by up to {most:.2f}", fontsize=8)
        for i, prediction in enumerate(entry["predictions"][:bars]):
            share, name = prediction["probability"], shorten(prediction["name"], 42, placeholder=" ...")
            right.barh(i, share, height=0.75, color="lightsteelblue" if i else "skyblue")
            right.text(-0.02, i, f"{100 * share:.1f} %", fontsize=8, va="center", ha="right")
            right.text(0.02, i, name, fontsize=8, va="center", parse_math=False)
        right.set(xlim=(-0.2, 1), ylim=(bars - 0.5, -0.5))
        file = entry["file"]
        right.set_title(file if len(file) <= 46 else f"...{file[-43:]}", loc="left", fontsize=8, parse_math=False)
    cli.save_figure(figure, path)


def main() -> None:
    args = build_parser().parse_args()
    if args.saliency and not args.picture:
        raise cli.UserError("--saliency colours the picture: name its file with --picture")
    with cli.user_errors(ValueError):
        files = find_images(args.images)
    device = cli.find_device(args.device)
    model = cli.create_model(args).eval()
    names = class_names(model, args.class_names)
    settings = loaders.image_settings(args, model)
    weights = args.checkpoint or ("pretrained" if args.pretrained else "random")
    if weights == "random":
        print("note: neither --pretrained nor --checkpoint is given, the weights are random", file=sys.stderr)

    model = model.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    if args.compile:
        model = torch.compile(model)
    classify = partial(probabilities, model=model, device=device, autocast=cli.autocast(args, device))
    workers = args.workers if len(files) > args.batch_size else 0
    loader = DataLoader(ImageFiles(files, settings), args.batch_size, num_workers=workers)

    width = max(len(str(file)) for file in files)
    entries, shown = [], []
    for entry, image in predict(loader, classify, names, min(args.topk, len(names))):
        report(entry, width)
        entries.append(entry)
        if args.picture and "error" not in entry and len(shown) < MAX_IMAGES:
            shown.append((entry, image))

    if args.results_file:
        results = dict(model=args.model, weights=weights, settings=settings, images=entries)
        cli.write_whole(args.results_file, json.dumps(results, indent=2) + "\n")
        print(f"predictions: {args.results_file}")
    if shown:
        heats = []
        if args.saliency:
            for entry, image in tqdm(shown, desc="covering", unit="image", leave=False, disable=None):
                heats.append(occlusion_map(image, entry["predictions"][0]["class"], classify, args.batch_size))
        draw(args.picture, f"{args.model}, weights: {Path(weights).name}", shown, heats, settings)
        print(f"picture: {args.picture}, {len(shown)} of {len(files)} images")
    if unread := sum("error" in entry for entry in entries):
        raise cli.UserError(f"{unread} of {len(files)} images could not be read")


if __name__ == "__main__":
    cli.run(main)
