#!/usr/bin/env python
"""Evaluate models on a data set: top-1, top-5, loss, images per second, at any image sizes.

    python tools/validate.py --model raftmlp_digits --pretrained --dataset digits --confusion confusion.png
    python tools/validate.py --model raftmlp_s --checkpoint raftmlp_s.pth --data-dir imagenet --real-labels
    python tools/validate.py --checkpoint s.safetensors --data-dir imagenet --sizes 160 224 256x320 --size-plot s.png
    python tools/validate.py --checkpoint s.safetensors --data-dir imagenet --pretrained --compare resmlp_12_224

Prints one line, or a table where there are several models or sizes; writes files where they are asked for. The data
may be a part of ImageNet, in folders named by synsets (ImageNet-A, ImageNet-R, ...): a model of all of ImageNet then
chooses among these classes. images/s are those of the whole evaluation, with reading images and with compiling.
"""

import argparse
import copy
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import timm
import torch
from timm.data import infer_imagenet_subset
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import cli
import loaders
import raftmlp
import reports
from imagenet import RealLabels, classes_to_build, names_for_people, outputs_for
from raftmlp.data import class_names
from reports import Gallery, Predictions


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    cli.add_model_arguments(parser)
    loaders.add_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--sizes",
        type=image_size,
        nargs="+",
        metavar="N|HxW",
        help="evaluate at each of these image sizes; in place of --img-size",
    )
    group.add_argument(
        "--compare",
        type=cli.known_model,
        nargs="+",
        metavar="NAME",
        help="evaluate these models too, on the same images prepared as each wants them, with their pretrained weights "
        "if --pretrained; --checkpoint and --model-kwargs are for --model alone",
    )
    group.add_argument(
        "--mirror", action="store_true", help="average the probabilities of every image and its mirror image"
    )
    group.add_argument(
        "--real-labels",
        action="store_true",
        help="top-1 and top-5 against the labels of ImageNet-ReaL too; for ImageNet's 50,000 validation images",
    )
    group = parser.add_argument_group("run")
    cli.add_device_arguments(group)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--results-file", type=cli.output_file((".json",)), metavar="FILE", help="write the figures, a .json file"
    )
    group.add_argument(
        "--size-plot",
        type=cli.output_file(reports.PICTURES),
        metavar="FILE",
        help="draw top-1 over the image sizes, one line a model",
    )
    group.add_argument(
        "--picture",
        type=cli.output_file(reports.PICTURES),
        metavar="FILE",
        help="draw images with their predictions, the wrong ones marked; for one model and size",
    )
    group.add_argument(
        "--confusion",
        type=cli.output_file(reports.PICTURES),
        metavar="FILE",
        help="draw the confusion matrix and list the worst classes; for one model and size",
    )
    group.add_argument(
        "--predictions",
        type=cli.output_file((".csv",)),
        metavar="FILE",
        help="write every image's class and prediction, a .csv file; for one model and size",
    )
    return parser


def image_size(text: str) -> tuple[int, int]:
    """Return height and width for N or HxW."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be N or HxW pixels, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.sizes and args.img_size:
        raise cli.UserError("--sizes and --img-size exclude each other")
    if args.size_plot and len(args.sizes or ()) < 2:
        raise cli.UserError("--size-plot needs --sizes with two sizes or more")
    rows = len([args.model, *(args.compare or ())]) * len(args.sizes or [None])
    for option in ("picture", "confusion", "predictions"):
        if getattr(args, option) and rows > 1:
            raise cli.UserError(f"--{option} goes with one model and one size, not with {rows} rows of results")


# Evaluation


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    autocast=None,
    on_batch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    distributed: bool = False,
) -> dict[str, float]:
    """Return a model's figures over a loader: loss, top1 and top5 in percent, images, unread, images_per_second.

    Args:
        model: Any classifier; it is put into eval mode.
        loader: Batches of normalised images (B, C, H, W) and class indices (B,); images of class UNREAD do not count.
        device: Where the model is.
        autocast: The context that the model runs in; None for none.
        on_batch: Called with every batch's images, classes and logits (B, num_classes).
        distributed: Add up over the processes; each has its own part of the images.
    """
    model.eval()
    totals = ClassificationEvaluator(device)
    start, unread = time.perf_counter(), 0
    bar = tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=None if cli.is_first() else True)
    for images, target in bar:
        with autocast or nullcontext():
            logits = model(images)
        logits = logits.float()
        if target.max() >= logits.shape[1]:
            raise cli.UserError(f"the data has a class {target.max()}, the model tells {logits.shape[1]} apart")
        read = target != loaders.UNREAD
        totals.update(logits[read], target[read])
        unread += len(target) - int(read.sum())
        if on_batch:
            on_batch(images, target, logits)
    counts = torch.tensor([totals.num_samples, unread], device=device)
    if distributed:
        torch.distributed.all_reduce(counts)
    images, unread = counts.tolist()
    rate = images / (time.perf_counter() - start)
    return dict(**totals.compute(distributed), images=images, unread=unread, images_per_second=rate)


class Evaluated(nn.Module):
    """A classifier in the way it is evaluated: logits (B, classes) of images (B, C, H, W).

    Args:
        model: The classifier.
        outputs: The model's outputs that count, one a class of the data, in their order; None for all.
        mirror: Average the probabilities of every image and its mirror image.
        memory_format: Memory format of the images.
    """

    def __init__(self, model: nn.Module, outputs: list[int] | None, mirror: bool, memory_format: torch.memory_format):
        super().__init__()
        self.model, self.mirror, self.memory_format = model, mirror, memory_format
        self.register_buffer("outputs", None if outputs is None else torch.tensor(outputs))

    def forward(self, images: Tensor) -> Tensor:
        logits = self._logits(images)
        if self.mirror:  # the logarithm of probabilities, up to a constant, is a set of logits for them
            mirrored = self._logits(images.flip(-1))
            logits = torch.logaddexp(logits.log_softmax(1), mirrored.log_softmax(1))
        return logits

    def _logits(self, images: Tensor) -> Tensor:
        logits = self.model(images.contiguous(memory_format=self.memory_format)).float()
        return logits if self.outputs is None else logits[:, self.outputs]


# Models and sizes


@dataclass
class Entry:
    """A model at an image size, as a row of the results has it.

    Attributes:
        name: The model's name.
        weights: Where its weights come from: a file, "pretrained" or "random".
        model: The model, on the CPU.
        settings: How images are prepared for it.
        outputs: The outputs that count, None for all.
        real_labels: Counts against the labels of ImageNet-ReaL where that is asked for.
    """

    name: str
    weights: str
    model: nn.Module
    settings: dict
    outputs: list[int] | None
    real_labels: RealLabels | None = None


def create_entries(args: argparse.Namespace, dataset: Dataset) -> list[Entry]:
    """Return what the options ask to evaluate, in their order: models, and for each the sizes."""
    entries = []
    for position, name in enumerate([args.model, *(args.compare or ())]):
        own = copy.copy(args)
        if position > 0:
            own.checkpoint, own.model_kwargs = None, {}
        own.model, own.pretrained = name, args.pretrained and not own.checkpoint
        weights = own.checkpoint or ("pretrained" if own.pretrained else "random")
        model = None
        for size in args.sizes or [None]:
            own.img_size = list(size or ()) or args.img_size
            if model is None or model.pretrained_cfg.get("fixed_input_size"):  # such a model is built for its size
                model = cli.create_model(own, classes=classes_to_build(class_names(dataset))).eval()
            entries.append(create_entry(own, weights, model, dataset))
    return entries


def create_entry(args: argparse.Namespace, weights: str, model: nn.Module, dataset: Dataset) -> Entry:
    """Return the row of a model at the options' image size; refuse what would fail with its first batch."""
    outputs = outputs_for(class_names(dataset), model)
    entry = Entry(args.model, weights, model, loaders.image_settings(args, model), outputs)
    channels, *size = entry.settings["input_size"]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, channels, *size))
    except Exception as error:  # models raise anything on sizes that they cannot take
        raise cli.UserError(
            f"{args.model} takes no images of {reports.size_name(size)} pixels: {cli.first_words(error)}"
        ) from error
    if args.real_labels:
        entry.real_labels = RealLabels(dataset)
        count = len(entry.outputs or range(model.num_classes))
        if count != 1000:
            raise cli.UserError(f"--real-labels takes models of ImageNet-1k, {args.model} tells {count} classes apart")
    return entry


def measure(args: argparse.Namespace, entry: Entry, dataset: Dataset, device: torch.device, collectors: list) -> dict:
    """Return a row of the results; the collectors see every batch."""
    if entry.real_labels:
        collectors = [*collectors, entry.real_labels]
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = entry.model.to(device, memory_format=layout)
    if args.compile:
        torch.compiler.reset()  # every size is compiled for itself
        model = torch.compile(model)
    classifier = Evaluated(model, entry.outputs, args.mirror, layout).to(device)
    loader = loaders.evaluation_loader(args, dataset, entry.settings, device)

    def on_batch(*batch: Tensor) -> None:
        for collector in collectors:
            collector.add(*batch)

    try:
        figures = evaluate(classifier, loader, device, cli.autocast(args, device), on_batch)
    except torch.OutOfMemoryError as error:
        raise cli.UserError(f"{entry.name}: --batch-size {args.batch_size} is too much for the memory") from error
    entry.model.to("cpu")
    if not figures["images"]:
        raise cli.UserError(f"none of the {figures['unread']} images can be read: {loaders.file_name(dataset, 0)} ...")
    return dict(
        model=entry.name,
        weights=entry.weights,
        parameters=sum(p.numel() for p in entry.model.parameters()),
        img_size=entry.settings["input_size"][-2:],
        crop_pct=entry.settings["crop_pct"],
        interpolation=entry.settings["interpolation"],
        **figures,
        **(entry.real_labels.figures() if entry.real_labels else {}),
    )


# Output


def announce(entries: list[Entry]) -> None:
    """Say what a reader of the figures should know beforehand: which classes compete, which weights are random."""
    for entry in {entry.name: entry for entry in entries}.values():
        if entry.outputs:
            subset = (infer_imagenet_subset(entry.model) or "the model's").replace("imagenet", "ImageNet")
            cli.say(f"the {len(entry.outputs)} classes are a part of {subset}: {entry.name} chooses among these")
    random = dict.fromkeys(entry.name for entry in entries if entry.weights == "random")
    if random:
        names = ", ".join(random)
        print(f"note: without --pretrained or --checkpoint, the weights of {names} are random", file=sys.stderr)


def print_summary(row: dict, device: torch.device) -> None:
    """Print the figures of a single row."""
    real = "ReaL top-1 {real_top1:.2f} %, top-5 {real_top5:.2f} %, ".format(**row) if "real_top1" in row else ""
    cli.say(
        f"{row['model']}: top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, {real}loss {row['loss']:.4f} "
        f"over {row['images']} images, {row['images_per_second']:.0f} images/s on {device}"
    )


def name_unread(unread: list[int], row: dict, dataset: Dataset) -> None:
    """Name the images that could not be read."""
    if unread:
        total = row["images"] + row["unread"]
        print(f"{len(unread)} of {total} images could not be read and do not count:", file=sys.stderr)
    for index in unread:
        print(f"  {loaders.file_name(dataset, index)}", file=sys.stderr)


def write_results(args: argparse.Namespace, results: dict, classes: int | None, device: torch.device) -> None:
    """Write the results, and what else they depend on, as JSON."""
    results["data"] = dict(
        dataset=args.dataset or "folder", data_dir=args.data_dir, split=args.val_split, classes=classes
    )
    results["run"] = dict(
        device=str(device),
        precision=args.amp_dtype if args.amp else "float32",
        batch_size=args.batch_size,
        channels_last=args.channels_last,
        compile=args.compile,
        mirror=args.mirror,
    )
    results["versions"] = dict(
        python=platform.python_version(), torch=torch.__version__, timm=timm.__version__, raftmlp=raftmlp.__version__
    )
    cli.write_whole(args.results_file, json.dumps(results, indent=2) + "\n")


def main() -> None:
    args = build_parser().parse_args()
    check_options(args)
    device = cli.find_device(args.device)
    dataset = loaders.create_data(args, args.val_split)
    names = names_for_people(class_names(dataset))
    entries = create_entries(args, dataset)
    announce(entries)

    rows, width = [], max(len(entry.name) for entry in entries)
    if len(entries) > 1:
        cli.say(reports.results_header(width, args.real_labels))
    for entry in entries:
        predictions, gallery = Predictions(), Gallery(entry.settings["mean"], entry.settings["std"], names)
        collectors = [predictions, gallery] if args.picture else [predictions]
        row = measure(args, entry, dataset, device, collectors)
        rows.append(row)
        if len(entries) > 1:
            cli.say(reports.results_line(row, width))
    if len(entries) == 1:
        print_summary(row, device)
    name_unread(predictions.unread(), row, dataset)

    results, title = dict(rows=rows), f"{row['model']}: {row['top1']:.2f} % of {row['images']} images right"
    if args.confusion:
        confusion = predictions.confusion(names)
        results["worst_classes"] = confusion.worst()
        cli.say(reports.worst_table(results["worst_classes"]))
    if args.results_file:
        write_results(args, results, names and len(names), device)
        cli.say(f"figures: {args.results_file}")
    if args.predictions:
        predictions.write(args.predictions, dataset, names)
        cli.say(f"predictions: {args.predictions}")
    if args.confusion:
        confusion.draw(args.confusion, title)
        cli.say(f"confusion matrix: {args.confusion}")
    if args.picture:
        gallery.draw(args.picture, f"{title}, the wrong ones first")
        cli.say(f"picture: {args.picture}")
    if args.size_plot:
        reports.draw_sizes(args.size_plot, rows, len(args.sizes))
        cli.say(f"accuracy over size: {args.size_plot}")


if __name__ == "__main__":
    cli.run(main)
