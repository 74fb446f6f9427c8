"""Write a model as a file for another runtime, or as a folder for the Hugging Face Hub.

    raftmlp export --checkpoint runs/mine/model_best.pth.tar --format onnx --out mine.onnx
    raftmlp export --checkpoint FILE --format aoti --img-size 320 480 --batch 1 --out mine.pt2
    raftmlp export --checkpoint FILE --quantize static --data-dir imagenet --out int8.onnx
    raftmlp export --checkpoint FILE --format hf --out folder

onnx: ONNX Runtime, TensorRT and others; pt2: torch.export; aoti: AOTInductor, machine code for this kind of processor;
torchscript: TorchScript; hf: a folder that timm.create_model("local-dir:FOLDER") and, once uploaded, "hf-hub:" load.

The file takes normalised images (B, C, H, W) in float32, and has metadata on how they are prepared. Before it gets its
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


class Once(argparse.Action):
    """An option that names one file: given twice, it is refused."""

    def __call__(self, parser, namespace, values, option_string=None):
        if (before := getattr(namespace, self.dest)) is not None and before != self.default:
            raise argparse.ArgumentError(self, f"names one file, not both {before} and {values}")
        setattr(namespace, self.dest, values)


def build_parser() -> Parser:
    parser = Parser("%(prog)s --format FORMAT --out FILE [OPTION ...]", description=__doc__)
    for settings in (ModelSettings, ExportSettings, DataSettings, ImageSettings):
        parser.add_settings(settings)
    group = parser.group("file")
    group.add_argument("--out", action=Once, metavar="FILE", help="file to write (.onnx, .pt2, .pt), or folder (hf)")
    group.add_argument("--overwrite", action="store_true", help="write over an existing file, never over a folder")
    group.add_argument(
        "--results-file",
        action=Once,
        type=output_file(".json"),
        metavar="FILE",
        help="write what was measured, a .json file",
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
    ignored = {
        "calibration_split": args.quantize != "static" and "--quantize static",
        "batch_size": (args.batch and "a free batch") or (not has_data(args) and "--dataset or --data-dir"),
    }
    ignored |= {
        name: not has_data(args) and "--dataset or --data-dir" for name in ("val_split", "workers", "dataset_download")
    }
    for name, partner in ignored.items():
        if partner and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} goes with {partner} only: without, it would be ignored")
    if args.quantize == "static" and not has_data(args):
        raise UserError("--quantize static takes the scales from images: name them with --dataset or --data-dir")
    out, results = (Path(path).resolve() if path else None for path in (args.out, args.results_file))
    if out and results and (out == results or out in results.parents):
        raise UserError(f"--results-file {args.results_file} and --out {args.out} are one: name another file")
    if args.checkpoint:
        checkpoint = Path(args.checkpoint).resolve()
        for option, path in (("--out", out), ("--results-file", results)):
            if path in (checkpoint, checkpoint.with_suffix(".json"), checkpoint.parent / "summary.json"):
                raise UserError(f"{option} {path} is the checkpoint or its record: name another file")


def check_path(args: argparse.Namespace) -> Path:
    """Return the file or folder to write, after a check that it can be written."""
    from ..export.formats import FORMATS

    suffix = "" if args.format == "hf" else FORMATS[args.format].suffix
    if not args.out:
        raise UserError(f"--out names the {suffix + ' file' if suffix else 'folder'} to write")
    out = Path(args.out)
    if not suffix and out.exists():
        raise UserError(f"{out} exists: name a folder that does not, or remove it")
    check_output(out, (suffix or out.suffix,))
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists; --overwrite writes over it")
    return out


def create_data(args: argparse.Namespace, prepared: PreparedModel) -> Dataset | None:
    """Return the data that the options name, if they do, and they are the model's."""
    if not has_data(args):
        return None
    from ..export.hub import training_options

    dataset = DataSettings.select(vars(args)).create_evaluation(partial(training_options, args.checkpoint))
    prepared.match(dataset)
    return dataset


def has_data(args: argparse.Namespace) -> bool:
    return bool(args.dataset or args.data_dir)


def measure(args: argparse.Namespace, name: str, module: nn.Module, prepared: PreparedModel, dataset: Dataset) -> dict:
    """Return the figures of a module and the name of the data, after printing its top-1."""
    from ..export.comparison import accuracy
    from ..export.hub import data_name

    figures = accuracy(module, prepared, dataset, args.batch or args.batch_size, args.workers)
    figures["data"] = f"{data_name(args.dataset, args.data_dir)}, {args.val_split}"
    say(f"{name}: top-1 {figures['top1']:.2f} % on {figures['images']} images of {figures['data']}")
    return figures


def write_results(path: Path | None, prepared: PreparedModel, settings: ExportSettings, **measured) -> None:
    """Write what was measured, if a file is named."""
    if path:
        about = dict(model=prepared.name, weights=prepared.weights)
        about |= dict(format=settings.format, precision=settings.precision)
        write_json(path, about | measured)
        say(f"figures: {path}")


def export_file(args: argparse.Namespace, settings: ExportSettings, prepared: PreparedModel, out: Path) -> None:
    """Write a file for another runtime."""
    import torch

    from ..evaluate.speed import MachineLoad
    from ..export.comparison import RuntimeModule, calibration_batches, image_source, write_verified
    from ..export.formats import FORMATS, FeatureMaps, Logits, build_graph, quantize_onnx

    file_format, dataset, model = FORMATS[settings.format], create_data(args, prepared), prepared.model
    graph = build_graph(prepared, settings)
    batches = []
    if settings.quantize == "static":
        calibration = DataSettings.select(vars(args)).create(args.calibration_split)
        batches = calibration_batches(calibration, prepared.config, settings.batch or 32, args.workers)
    say(f"{prepared.name}, {prepared.weights} weights: exporting for {file_format.runtime} ...")
    start, load = time.perf_counter(), MachineLoad(torch.get_num_threads())
    content = file_format.write(graph)
    if settings.quantize:
        content = quantize_onnx(content, settings.quantize, batches)
    say(f"made in {time.perf_counter() - start:.0f} s, {len(content) / 2**20:.1f} MiB")
    reference = (FeatureMaps if settings.features else Logits)(model, torch.float32).eval()
    make_images = image_source(prepared.config, dataset, args.workers)
    run_file, rows = write_verified(out, content, file_format, graph, reference, make_images)
    other_load = load.read()
    figures = {}
    if dataset and settings.features:
        say("feature maps have no accuracy: the data's images were compared only")
    elif dataset:
        for name, module in (("PyTorch", model), (file_format.runtime, RuntimeModule(run_file, settings.batch))):
            figures[name] = measure(args, name, module, prepared, dataset)
    measured = dict(bytes=len(content), other_load=other_load, rows=rows)
    write_results(args.results_file, prepared, settings, **measured, **figures)
    free = ["batch"] * (not settings.batch) + ["height and width"] * settings.dynamic_size
    least = f" from {size_name(graph.least_size)}" if settings.dynamic_size and max(graph.least_size) > 1 else ""
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
