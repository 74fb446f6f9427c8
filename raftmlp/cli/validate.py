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
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import DeviceSettings, ModelSettings, is_folder_name, known_model, weights_file
from ..data.settings import DataSettings, ImageSettings
from ..errors import UserError
from ..files import write_json
from ..sizes import parse_size, size_name
from .console import say
from .options import PICTURES, Parser, option_type, output_file

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset

    from ..evaluate.evaluation import PreparedModel


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_settings(ModelSettings, DataSettings, ImageSettings)
    group = parser.group("evaluation")
    text = (
        "evaluate at each of these image sizes, in place of --img-size; a size that a model cannot take is a row that "
        "says so"
    )
    group.add_argument("--sizes", type=option_type(parse_size), nargs="+", metavar="N|HxW", help=text)
    text = (
        "evaluate these models too, on the same images prepared as each needs them: checkpoints, folders of runs, "
        "folders as local-dir:FOLDER or hf-hub:USER/NAME, and models with their pretrained weights if --pretrained; "
        "--checkpoint and --model-kwargs are for --model alone"
    )
    group.add_argument("--compare", type=weights_file, nargs="+", metavar="NAME|FILE", help=text)
    parser.checks["compare"] = lambda name: os.path.exists(name) or known_model(name)
    text = "average the probabilities of every image and its mirror image"
    group.add_argument("--mirror", action="store_true", help=text)
    text = "top-1 and top-5 against the labels of ImageNet-ReaL too; for ImageNet's 50,000 validation images"
    group.add_argument("--real-labels", action="store_true", help=text)
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


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.sizes and args.img_size:
        raise UserError("--sizes and --img-size exclude each other")
    rows = len([args.model, *(args.compare or ())]) * len(args.sizes or [None])
    for option in ("picture", "confusion", "predictions"):
        if getattr(args, option) and rows > 1:
            raise UserError(f"--{option} goes with one model and one size, not with {rows} rows of results")


def model_settings(args: argparse.Namespace) -> list[ModelSettings]:
    """Return the settings of the model, and of each that it is compared with."""
    options = vars(args)
    choices = [{**options, "pretrained": args.pretrained and not (args.checkpoint and args.compare)}]
    for name in args.compare or ():
        is_file = os.path.exists(name)
        weights = dict(checkpoint=name, model=None) if is_file else dict(checkpoint=None, model=name)
        pretrained = is_folder_name(name) or (args.pretrained and not is_file)
        choices.append({**options, "model_kwargs": {}, "pretrained": pretrained, **weights})
    return [ModelSettings.select(choice) for choice in choices]


def prepare_models(args: argparse.Namespace, dataset: Dataset) -> list[PreparedModel]:
    """Return what the options name, in their order: models, and each at every size."""
    from ..data.datasets import class_names
    from ..data.images import image_count
    from ..evaluate.evaluation import prepare_model, run_once
    from ..evaluate.labels import default_num_classes

    images, classes = ImageSettings.select(vars(args)), default_num_classes(class_names(dataset))
    batch_size, models = min(args.batch_size, image_count(dataset)), []
    for i, settings in enumerate(model_settings(args)):
        model = None
        for size in args.sizes or [settings.img_size]:
            prepared = prepare_model(replace(settings, img_size=size), images, model, classes)
            is_fixed = prepared.model.pretrained_cfg.get("fixed_input_size")  # such a model is built for every size
            model = None if is_fixed else prepared.model
            if i and settings.checkpoint:  # which may be of the same model
                prepared.name += f" ({Path(settings.checkpoint).name})"
            try:
                run_once(prepared.model, prepared.name, prepared.config["input_size"], batch_size)
            except UserError as error:
                prepared.failure = str(error)
            prepared.match(dataset)
            models.append(prepared)
    return models


def refuse_if_all_failed(models: list[PreparedModel]) -> None:
    """Refuse if there is nothing to show but failures."""
    if all(prepared.failure for prepared in models):
        raise UserError(models[0].failure)


# Output


def announce(models: list[PreparedModel]) -> None:
    """Print what matters for the figures: which classes compete, which weights are random."""
    from ..evaluate.evaluation import warn_of_random_weights

    for prepared in {prepared.name: prepared for prepared in models}.values():
        if prepared.outputs:
            say(f"the {len(prepared.outputs)} classes are a part of the model's: {prepared.name} chooses among these")
        elif prepared.classes and len(prepared.classes) < len(prepared.names):
            count = f"{len(prepared.classes)} of the {len(prepared.names)}"
            say(f"the data has images of {count} classes that {prepared.name} knows: it chooses among all of them")
    warn_of_random_weights(models)


def table_line(row: dict, width: int) -> str:
    """Return a row of results as a line of the table; ``width`` is that of the longest model's name."""
    start = f"{row['model']:<{width}}  {row['parameters'] / 1e6:8.2f} M  {size_name(row['img_size']):>9}  "
    if "failure" in row:
        return start + row["failure"]
    real = f"  {row['real_top1']:8.2f}  {row['real_top5']:8.2f}" if "real_top1" in row else ""
    return start + (
        f"{row['crop_pct']:5.3g}  {row['top1']:7.2f}  {row['top5']:7.2f}  {row['loss']:7.4f}{real}  "
        f"{row['images_per_second']:8.0f}"
    )


def summary(row: dict, device: torch.device) -> str:
    """Return a single row of results in a sentence."""
    kinds = {"": "top", "ReaL ": "real_top"} if "real_top1" in row else {"": "top"}
    shares = [f"{words}top-1 {row[key + '1']:.2f} %, top-5 {row[key + '5']:.2f} %" for words, key in kinds.items()]
    speed = f"{row['images']} images, {row['images_per_second']:.0f} images/s on {device}"
    return f"{row['model']}: {', '.join(shares)}, loss {row['loss']:.4f} over {speed}"


def worst_table(worst: list[dict]) -> str:
    """Return the rows of ``Confusion.worst`` as text."""
    from ..evaluate.results import aligned

    lines = [("worst classes", "top-1 %", "images", "most often taken for")]
    for row in worst:
        taken_for = "{name} ({images})".format(**row["taken_for"]) if row["taken_for"] else "-"
        lines.append((row["name"], f"{row['accuracy']:.2f}", str(row["images"]), taken_for))
    return "\n".join(aligned(lines))


def conditions(args: argparse.Namespace, names: list[str] | None, device: torch.device) -> dict:
    """Return what the results depend on besides the models."""
    from ..train.run_logger import versions

    data = dict(dataset=args.dataset or "folder", data_dir=args.data_dir, split=args.val_split)
    execution = dict(device=str(device), precision=args.amp_dtype if args.amp else "float32")
    execution |= {name: getattr(args, name) for name in ("batch_size", "channels_last", "compile", "mirror")}
    return dict(data={**data, "classes": names and len(names)}, run=execution, versions=versions())


def write_files(args: argparse.Namespace, rows: list[dict], about: dict, seen: tuple, dataset: Dataset) -> None:
    """Write the files that are asked for, and say so; ``seen`` are the predictions, gallery and names of one model."""
    from ..evaluate.plots import draw_accuracy, draw_confusion

    predictions, gallery, names = seen
    row, results = rows[-1], dict(rows=rows, **about)
    title = f"{row['model']}: {row.get('top1', 0):.2f} % of {row.get('images')} images right"
    if args.confusion:
        confusion = predictions.confusion(names)
        results["worst_classes"] = confusion.worst()
        say(worst_table(results["worst_classes"]))
        draw_confusion(args.confusion, title, confusion)
    if args.results_file:
        write_json(args.results_file, results)
    if args.predictions:
        predictions.write(args.predictions, dataset, names)
    if args.picture:
        gallery.draw(args.picture, f"{title}, the wrong ones first")
    if args.size_plot:
        draw_accuracy(args.size_plot, rows, len(args.sizes or [None]))
    for name in ("results_file", "predictions", "confusion", "picture", "size_plot"):
        if path := getattr(args, name):
            say(f"{name.replace('_', ' ')}: {path}")


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    check_options(args)
    parser.load_and_check(args)
    from ..data.datasets import class_names
    from ..data.images import file_name
    from ..device import find_device
    from ..evaluate.evaluation import evaluate_prepared
    from ..evaluate.labels import RealLabels
    from ..evaluate.plots import Gallery
    from ..evaluate.results import Predictions
    from ..export.hub import training_options

    device, settings = find_device(args.device), DeviceSettings.select(vars(args))
    dataset = DataSettings.select(vars(args)).create_evaluation(partial(training_options, args.checkpoint))
    models = prepare_models(args, dataset)
    refuse_if_all_failed(models)
    announce(models)

    rows, width, unreadable = [], max(len(prepared.name) for prepared in models), []
    if len(models) > 1:
        real = "  ReaL-1 %  ReaL-5 %" if args.real_labels else ""
        say(f"{'model':<{width}}  parameters       size   crop  top-1 %  top-5 %     loss{real}  images/s")
    for prepared in models:
        predictions, real = Predictions(), RealLabels(dataset) if args.real_labels else None
        gallery = Gallery(prepared.config["mean"], prepared.config["std"], prepared.names) if args.picture else None
        collectors = [collector for collector in (predictions, real, gallery) if collector]
        row = evaluate_prepared(
            prepared, dataset, device, settings, args.batch_size, args.workers, args.mirror, collectors
        )
        if not prepared.failure:
            row |= real.figures() if real else {}
            unreadable = predictions.unreadable()
        rows.append(row)
        if len(models) > 1:
            say(table_line(row, width))
    refuse_if_all_failed(models)
    if len(models) == 1:
        say(summary(row, device))
    if unreadable:
        files = (file_name(dataset, index) for index in unreadable)
        print("\n  ".join(["images that could not be read do not count:", *files]), file=sys.stderr)
    about = conditions(args, class_names(dataset), device)
    write_files(args, rows, about, (predictions, gallery, prepared.names), dataset)
