"""Evaluate models on a data set: top-1, top-5, loss, images per second, at any image sizes.

    raftmlp validate --model raftmlp_digits --pretrained --dataset digits --confusion confusion.png
    raftmlp validate --model raftmlp_s --checkpoint raftmlp_s.pth --data-dir imagenet --real-labels
    raftmlp validate --checkpoint s.safetensors --data-dir imagenet --sizes 160 224 256x320 --size-plot s.png
    raftmlp validate --checkpoint s.safetensors --data-dir imagenet --pretrained --compare resmlp_12_224 m.safetensors

Prints one line, or a table if there are several models or sizes; writes files if they are named. The data may be a
part of ImageNet, in folders named by synsets (ImageNet-A, ImageNet-R, ...): a model of all of ImageNet then chooses
among these classes. images/s are those of the whole evaluation, with reading images and with compiling.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..config import DeviceSettings, ModelSettings, is_folder_name, known_model, weights_file
from ..data.settings import DataSettings, ImageSettings
from ..errors import MissingFileError, UserError
from ..files import write_json
from ..sizes import parse_size, size_name
from .console import say
from .options import PICTURES, Parser, option_type, output_file

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset

    from ..evaluate.evaluation import PreparedModel
    from ..evaluate.plots import Gallery


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    for settings in (ModelSettings, DataSettings, ImageSettings):
        parser.add_settings(settings)
    group = parser.group("evaluation")
    group.add_argument(
        "--sizes",
        type=option_type(parse_size),
        nargs="+",
        metavar="N|HxW",
        help="evaluate at each of these image sizes, in place of --img-size; a size that a model cannot take is a row "
        "that says so",
    )
    group.add_argument(
        "--compare",
        type=weights_file,
        nargs="+",
        metavar="NAME|FILE",
        help="evaluate these models too, on the same images prepared as each needs them: checkpoints, folders of runs, "
        "folders as local-dir:FOLDER or hf-hub:USER/NAME, and models with their pretrained weights if --pretrained; "
        "--checkpoint and --model-kwargs are for --model alone",
    )
    parser.checks["compare"] = known_model_or_checkpoint
    group.add_argument(
        "--mirror", action="store_true", help="average the probabilities of every image and its mirror image"
    )
    group.add_argument(
        "--real-labels",
        action="store_true",
        help="top-1 and top-5 against the labels of ImageNet-ReaL too; for ImageNet's 50,000 validation images",
    )
    parser.add_settings(DeviceSettings)
    group = parser.group("output")
    for name, suffixes, text in (
        ("results-file", (".json",), "write the figures, a .json file"),
        ("size-plot", PICTURES, "draw top-1 over the image sizes, one line a model"),
        ("picture", PICTURES, "draw images with their predictions, wrong ones marked; for one model and size"),
        ("confusion", PICTURES, "draw the confusion matrix and list the worst classes; for one model and size"),
        ("predictions", (".csv",), "write every image's class and prediction, a .csv file; for one model and size"),
    ):
        group.add_argument(f"--{name}", type=output_file(*suffixes), metavar="FILE", help=text)
    return parser


def known_model_or_checkpoint(text: str) -> str:
    """Return the name if timm knows such a model, or the file or folder of that name.

    Raises:
        UserError: If there is none.
    """
    if text.endswith((".pth", ".pt", ".tar", ".safetensors")) and not os.path.exists(text):
        raise MissingFileError(f"no checkpoint at {text}")
    return text if os.path.exists(text) else known_model(text)


def compared_models(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the options of each model to compare with."""
    for name in args.compare or ():
        is_file = os.path.exists(name)
        weights = dict(checkpoint=name if is_file else None, pretrained=not is_file and args.pretrained)
        if is_folder_name(name):
            weights = dict(checkpoint=None, pretrained=True)
        yield {**vars(args), "model": None if is_file else name, "model_kwargs": {}, **weights}


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.sizes and args.img_size:
        raise UserError("--sizes and --img-size exclude each other")
    if args.pretrained and args.checkpoint and not args.compare:
        raise UserError("--pretrained and --checkpoint exclude each other, but for the models of --compare")
    if args.size_plot and len(args.sizes or ()) < 2:
        raise UserError("--size-plot needs --sizes with two sizes or more")
    rows = len([args.model, *(args.compare or ())]) * len(args.sizes or [None])
    for option in ("picture", "confusion", "predictions"):
        if getattr(args, option) and rows > 1:
            raise UserError(f"--{option} goes with one model and one size, not with {rows} rows of results")


def prepare_models(args: argparse.Namespace, dataset: Dataset) -> list[PreparedModel]:
    """Return what the options name, in their order: models, and each at every size."""
    from ..data.datasets import class_names
    from ..data.images import image_count
    from ..evaluate.evaluation import SizeError, prepare_model, run_once
    from ..evaluate.labels import default_num_classes

    options, images = vars(args), ImageSettings.select(vars(args))
    choices = [{**options, "pretrained": args.pretrained and not args.checkpoint}]
    choices += compared_models(args)
    models = []
    for i, settings in enumerate(map(ModelSettings.select, choices)):
        model = None
        for size in args.sizes or [settings.img_size]:
            settings = replace(settings, img_size=size)
            prepared = prepare_model(settings, images, model, default_num_classes(class_names(dataset)))
            is_fixed = prepared.model.pretrained_cfg.get("fixed_input_size")  # such a model is built for every size
            model = None if is_fixed else prepared.model
            if i and settings.checkpoint:  # which may be of the same model
                prepared.name += f" ({Path(settings.checkpoint).name})"
            batch_size = min(args.batch_size, image_count(dataset))
            try:
                run_once(prepared.model, prepared.name, prepared.config["input_size"], batch_size)
            except SizeError as error:
                if not args.sizes:
                    raise
                prepared.failure = str(error)
            prepared.match(dataset, args.real_labels)
            models.append(prepared)
    refuse_if_all_failed(models)
    return models


def refuse_if_all_failed(models: list[PreparedModel]) -> None:
    """Refuse if there is nothing to show but failures."""
    from ..evaluate.evaluation import SizeError

    if all(prepared.failure for prepared in models):
        raise SizeError(models[0].failure)


# Output


def announce(models: list[PreparedModel]) -> None:
    """Print what matters for the figures: which classes compete, which weights are random."""
    from timm.data import infer_imagenet_subset

    from ..evaluate.evaluation import warn_of_random_weights

    for prepared in {prepared.name: prepared for prepared in models}.values():
        if prepared.outputs:
            subset = (infer_imagenet_subset(prepared.model) or "the model's").replace("imagenet", "ImageNet")
            say(f"the {len(prepared.outputs)} classes are a part of {subset}: {prepared.name} chooses among these")
        elif prepared.classes and len(prepared.classes) < len(prepared.names):
            count = f"{len(prepared.classes)} of the {len(prepared.names)}"
            say(f"the data has images of {count} classes that {prepared.name} knows: it chooses among all of them")
    warn_of_random_weights(models)


def table_header(width: int, with_real_labels: bool) -> str:
    """Return the line above those of ``table_line``."""
    real = "  ReaL-1 %  ReaL-5 %" if with_real_labels else ""
    return f"{'model':<{width}}  parameters       size   crop  top-1 %  top-5 %     loss{real}  images/s"


def table_line(row: dict, width: int) -> str:
    """Return a row of results as a line of the table; ``width`` is that of the longest model's name."""
    real = f"  {row['real_top1']:8.2f}  {row['real_top5']:8.2f}" if "real_top1" in row else ""
    start = f"{row['model']:<{width}}  {row['parameters'] / 1e6:8.2f} M  {size_name(row['img_size']):>9}  "
    if "failure" in row:
        return start + row["failure"]
    return start + (
        f"{row['crop_pct']:5.3g}  {row['top1']:7.2f}  {row['top5']:7.2f}  {row['loss']:7.4f}{real}  "
        f"{row['images_per_second']:8.0f}"
    )


def explain_fall(model: torch.nn.Module, rows: list[dict]) -> None:
    """Print why, and what helps, if a RaftMLP's top-1 falls by more than 5 points beside its trained size."""
    from ..model.raftmlp import RaftMLP

    trained = next((row for row in rows if tuple(row["img_size"]) == getattr(model, "img_size", None)), None)
    worst = min(rows, key=lambda row: row.get("top1", math.inf))
    if isinstance(model, RaftMLP) and trained and trained.get("top1", 0) - worst.get("top1", 0) > 5:
        best, least = (f"{row['top1']:.2f} % at {size_name(row['img_size'])}" for row in (trained, worst))
        say(
            f"{worst['model']}: top-1 falls from {best}, its trained size, to {least}: its token mixing was trained "
            "on one grid, and other maps are resized to it; model.set_input_size and fine-tuning at the new size, or "
            "training at several sizes (raftmlp train --train-img-sizes), help"
        )


def summary(row: dict, device: torch.device) -> str:
    """Return a single row of results in a sentence."""
    real = f"ReaL top-1 {row['real_top1']:.2f} %, top-5 {row['real_top5']:.2f} %, " if "real_top1" in row else ""
    return (
        f"{row['model']}: top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, {real}loss {row['loss']:.4f} over "
        f"{row['images']} images, {row['images_per_second']:.0f} images/s on {device}"
    )


def worst_table(worst: list[dict]) -> str:
    """Return the rows of ``Confusion.worst`` as text."""
    width = max(len("worst classes"), *(len(row["name"]) for row in worst))
    lines = [f"{'worst classes':<{width}}  top-1 %  images  most often taken for"]
    for row in worst:
        taken_for = "{name} ({images})".format(**row["taken_for"]) if row["taken_for"] else "-"
        lines.append(f"{row['name']:<{width}}  {row['accuracy']:>7.2f}  {row['images']:>6}  {taken_for}")
    return "\n".join(lines)


def name_unreadable(unreadable: list[int], total: int, dataset: Dataset) -> None:
    """Print the names of images that could not be read."""
    from ..data.images import file_name

    if unreadable:
        print(f"{len(unreadable)} of {total} images could not be read and do not count:", file=sys.stderr)
    for index in unreadable:
        print(f"  {file_name(dataset, index)}", file=sys.stderr)


def draw_pictures(args: argparse.Namespace, title: str, gallery: Gallery, rows: list[dict]) -> None:
    """Draw images with their predictions, and the accuracy over the image sizes, if they are asked for."""
    from ..evaluate.plots import draw_accuracy

    if args.picture:
        gallery.draw(args.picture, f"{title}, the wrong ones first")
        say(f"picture: {args.picture}")
    if args.size_plot:
        draw_accuracy(args.size_plot, [{"top1": math.nan, **row} for row in rows], len(args.sizes))
        say(f"accuracy over size: {args.size_plot}")


def conditions(args: argparse.Namespace, names: list[str] | None, device: torch.device) -> dict:
    """Return what the results depend on beside the models."""
    import timm
    import torch

    data = dict(dataset=args.dataset or "folder", data_dir=args.data_dir, split=args.val_split)
    data["classes"] = names and len(names)
    execution = dict(device=str(device), precision=args.amp_dtype if args.amp else "float32")
    execution |= {name: getattr(args, name) for name in ("batch_size", "channels_last", "compile", "mirror")}
    versions = dict(
        python=platform.python_version(), torch=torch.__version__, timm=timm.__version__, raftmlp=__version__
    )
    return dict(data=data, run=execution, versions=versions)


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    check_options(args)
    parser.load_and_check(args)
    from ..data.datasets import class_names
    from ..device import find_device
    from ..evaluate.evaluation import SizeError, evaluate_prepared
    from ..evaluate.plots import Gallery, draw_confusion
    from ..evaluate.results import Predictions
    from ..export.hub import training_options

    device, settings = find_device(args.device), DeviceSettings.select(vars(args))
    dataset = DataSettings.select(vars(args)).create_evaluation(partial(training_options, args.checkpoint))
    models = prepare_models(args, dataset)
    announce(models)

    rows, width = [], max(len(prepared.name) for prepared in models)
    if len(models) > 1:
        say(table_header(width, args.real_labels))
    for prepared in models:
        predictions = Predictions()
        names, gallery = prepared.names, Gallery(prepared.config["mean"], prepared.config["std"], prepared.names)
        collectors = [predictions, gallery] if args.picture else [predictions]
        if not prepared.failure:
            try:
                row = evaluate_prepared(
                    prepared, dataset, device, settings, args.batch_size, args.workers, args.mirror, collectors
                )
                unreadable = predictions.unreadable()
            except SizeError as error:
                if not args.sizes:
                    raise
                prepared.failure = str(error)
        rows.append({**prepared.description(), "failure": prepared.failure} if prepared.failure else row)
        if len(models) > 1:
            say(table_line(rows[-1], width))
    refuse_if_all_failed(models)
    if len(models) == 1:
        say(summary(row, device))
    for start in range(0, len(rows), len(args.sizes or [None])):
        explain_fall(models[start].model, rows[start : start + len(args.sizes or [None])])
    name_unreadable(unreadable, row["images"] + row["unread"], dataset)

    results, title = dict(rows=rows), f"{row['model']}: {row['top1']:.2f} % of {row['images']} images right"
    if args.confusion:
        confusion = predictions.confusion(names)
        results["worst_classes"] = confusion.worst()
        say(worst_table(results["worst_classes"]))
    if args.results_file:
        write_json(args.results_file, results | conditions(args, class_names(dataset), device))
        say(f"figures: {args.results_file}")
    if args.predictions:
        predictions.write(args.predictions, dataset, names)
        say(f"predictions: {args.predictions}")
    if args.confusion:
        draw_confusion(args.confusion, title, confusion)
        say(f"confusion matrix: {args.confusion}")
    draw_pictures(args, title, gallery, rows)
