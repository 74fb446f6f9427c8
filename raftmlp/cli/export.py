"""Write a model as a file for another runtime, or as a folder for the Hugging Face Hub.

    raftmlp export --checkpoint runs/mine/model_best.pth.tar --format onnx --out mine.onnx
    raftmlp export --checkpoint FILE --format aoti --img-size 320 480 --batch 1 --out mine.pt2
    raftmlp export --checkpoint FILE --quantize static --data-dir imagenet --out int8.onnx
    raftmlp export --checkpoint FILE --format hf --out folder

onnx: ONNX Runtime, TensorRT and others; pt2: torch.export; aoti: AOTInductor, machine code for this kind of processor;
torchscript: TorchScript; hf: a folder that timm.create_model("local-dir:FOLDER") and, once uploaded, "hf-hub:" load.

The file takes normalized images (B, C, H, W) in float32, and has metadata on how they are prepared. Before it gets its
name it is loaded in its runtime and compared with PyTorch, in outputs and in speed. docs/export.md lists what works in
which format. raftmlp predict-onnx classifies images with an ONNX file, without PyTorch.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import CALIBRATION_IMAGES, ExportSettings, ModelSettings, is_folder_name
from ..data.settings import DataSettings, ImageSettings
from ..errors import UserError
from ..files import write_json
from ..sizes import size_name
from .console import say
from .options import Parser, check_output, output_file

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from ..evaluate.evaluation import PreparedModel


def build_parser() -> Parser:
    parser = Parser("%(prog)s --format FORMAT --out FILE [OPTION ...]", description=__doc__)
    parser.add_settings(ModelSettings, ExportSettings, DataSettings, ImageSettings)
    group = parser.group("file")
    group.add_argument("--out", metavar="FILE", help="file to write (.onnx, .pt2, .pt), or folder (hf)")
    group.add_argument("--overwrite", action="store_true", help="write over an existing file, never over a folder")
    group.add_argument(
        "--results-file", type=output_file(".json"), metavar="FILE", help="write what was measured, a .json file"
    )
    group = parser.group("data")
    group.description = "With --dataset or --data-dir, the accuracy of a classifier is measured before and after."
    group.add_argument(
        "--calibration-split",
        default="train",
        metavar="NAME",
        help=f"split for the scales of --quantize static, {CALIBRATION_IMAGES} images or fewer",
    )
    return parser


def check_options(args: argparse.Namespace, parser: Parser) -> None:
    """Refuse options that would be ignored, and outputs that would be written over each other or over an input."""
    no_data = not has_data(args) and "--dataset or --data-dir"
    ignored = dict.fromkeys(("val_split", "workers", "dataset_download"), no_data)
    ignored["calibration_split"] = args.quantize != "static" and "--quantize static"
    ignored["batch_size"] = (args.batch and "a free batch") or no_data
    for name, partner in ignored.items():
        if partner and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} goes with {partner} only: without, it would be ignored")
    if args.quantize == "static" and no_data:
        raise UserError("--quantize static takes the scales from images: name them with --dataset or --data-dir")
    outputs = [Path(path).resolve() for path in (args.out, args.results_file) if path]
    if len(outputs) == 2 and outputs[0] in (outputs[1], *outputs[1].parents):
        raise UserError(f"--results-file {args.results_file} and --out {args.out} are one: name another file")
    if args.checkpoint:
        file = Path(args.checkpoint).resolve()
        if clash := {file, file.with_suffix(".json"), file.with_name("summary.json")}.intersection(outputs):
            raise UserError(f"{clash.pop()} is the checkpoint or its record: name another file")


def check_path(args: argparse.Namespace) -> Path:
    """Return the file or folder to write, after a check that it can be written."""
    from ..export.formats import FORMATS

    suffix = "" if args.format == "hf" else FORMATS[args.format].suffix
    if not args.out:
        raise UserError(f"--out names the {suffix + ' file' if suffix else 'folder'} to write")
    out = check_output(Path(args.out), (suffix,)) if suffix else Path(args.out)
    if out.exists() and not (args.overwrite and suffix):
        raise UserError(f"{out} exists: {'--overwrite writes over it' if suffix else 'name another folder'}")
    return out


def has_data(args: argparse.Namespace) -> bool:
    return bool(args.dataset or args.data_dir)


def create_data(args: argparse.Namespace, prepared: PreparedModel) -> Dataset | None:
    """Return the data that the options name, if they do, and they are the model's."""
    if not has_data(args):
        return None
    from ..export.hub import training_options

    dataset = DataSettings.select(vars(args)).create_evaluation(partial(training_options, args.checkpoint))
    prepared.match(dataset)
    return dataset


def measure(args: argparse.Namespace, name: str, module: nn.Module, prepared: PreparedModel, dataset: Dataset) -> dict:
    """Return the figures of ``evaluate`` of a module with a prepared model's outputs, after printing its top-1."""
    import torch

    from ..data.images import evaluation_loader
    from ..evaluate.evaluation import ClassifierView, evaluate
    from ..export.hub import data_name

    device, batch_size = torch.device("cpu"), args.batch or args.batch_size
    loader = evaluation_loader(dataset, prepared.config, device, batch_size, args.workers, classes=prepared.classes)
    figures = evaluate(ClassifierView(module, prepared.outputs), loader, device)
    figures["data"] = f"{data_name(args.dataset, args.data_dir)}, {args.val_split}"
    say(f"{name}: top-1 {figures['top1']:.2f} % on {figures['images']} images of {figures['data']}")
    return figures


def write_results(path: Path | None, prepared: PreparedModel, settings: ExportSettings, **measured) -> None:
    """Write what was measured, if a file is named."""
    if path:
        about = dict(model=prepared.name, weights=prepared.weights, format=settings.format)
        write_json(path, {**about, "precision": settings.precision, **measured})
        say(f"figures: {path}")


def export_file(args: argparse.Namespace, settings: ExportSettings, prepared: PreparedModel, out: Path) -> None:
    """Write a file for another runtime."""
    import torch

    from ..evaluate.speed import MachineLoad
    from ..export.comparison import RuntimeModule, calibration_batches, image_source, write_verified
    from ..export.formats import FORMATS, FeatureMaps, Logits, create_spec, quantize_onnx

    file_format, dataset, model = FORMATS[settings.format], create_data(args, prepared), prepared.model
    spec, batches = create_spec(prepared, settings), []
    if settings.quantize == "static":
        calibration = DataSettings.select(vars(args)).create(args.calibration_split)
        batches = calibration_batches(calibration, prepared.config, settings.batch or 32, args.workers)
    say(f"{prepared.name}, {prepared.weights} weights: exporting for {file_format.runtime} ...")
    start, load = time.perf_counter(), MachineLoad(torch.get_num_threads())
    content = file_format.write(spec)
    if settings.quantize:
        content = quantize_onnx(content, settings.quantize, batches)
    say(f"made in {time.perf_counter() - start:.0f} s, {len(content) / 2**20:.1f} MiB")
    reference = (FeatureMaps if settings.features else Logits)(model, torch.float32).eval()
    make_images = image_source(prepared.config, dataset, args.workers)
    run_file, rows = write_verified(out, content, file_format, spec, reference, make_images)
    measured = dict(bytes=len(content), other_load=load.read(), rows=rows)
    if dataset and settings.features:
        say("feature maps have no accuracy: the data's images were compared only")
    elif dataset:
        for name, module in (("PyTorch", model), (file_format.runtime, RuntimeModule(run_file, settings.batch))):
            measured[name] = measure(args, name, module, prepared, dataset)
    write_results(args.results_file, prepared, settings, **measured)
    free = ["batch"] * (not settings.batch) + ["height and width"] * settings.dynamic_size
    least = f" from {size_name(spec.least_size)}" if settings.dynamic_size and max(spec.least_size) > 1 else ""
    say(f"written: {out}, {' and '.join(free) or 'no axis'} free{least}")


def export_folder(args: argparse.Namespace, settings: ExportSettings, prepared: PreparedModel, out: Path) -> None:
    """Write a folder for the Hugging Face Hub."""
    from ..checkpoints.pretrained import find_pretrained
    from ..export.formats import Logits
    from ..export.hub import model_card, own_tag, training_record, write_folder

    dataset, model = create_data(args, prepared), prepared.model.to(settings.dtype)
    measured = measure(args, prepared.name, Logits(model, settings.dtype), prepared, dataset) if dataset else None
    architecture, _, tag = prepared.name.partition(".")
    file = Path(args.checkpoint) if args.checkpoint else None
    if args.pretrained and not is_folder_name(args.model):
        file = find_pretrained(architecture, tag)
    record = training_record(file) if file else {}
    tag = own_tag(architecture, file, record) if file else ""
    card = model_card(model, f"{architecture}.{tag}" if tag else architecture, prepared.config, record, measured)
    write_folder(model, prepared.config, card, out, tag)
    if not record:
        say("the weights have no record of their training: README.md says that data and recipe are not known")
    write_results(args.results_file, prepared, settings, measured=measured)
    say(f"written: {out}/, which timm.create_model('local-dir:{out}', pretrained=True) loads")


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    settings = ExportSettings.select(vars(args))
    check_options(args, parser)
    parser.load_and_check(args)
    from ..evaluate.evaluation import prepare_model, warn_of_random_weights

    out = check_path(args)
    prepared = prepare_model(ModelSettings.select(vars(args)), ImageSettings.select(vars(args)))
    warn_of_random_weights([prepared])
    (export_folder if settings.format == "hf" else export_file)(args, settings, prepared, out)
