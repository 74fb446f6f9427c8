#!/usr/bin/env python
"""Write a model as a file for another runtime, or as a folder for the Hugging Face Hub.

    python tools/export.py --checkpoint runs/mine/model_best.pth.tar --format onnx --out mine.onnx
    python tools/export.py --checkpoint FILE --format aoti --img-size 320 480 --batch 1 --out mine.pt2
    python tools/export.py --checkpoint FILE --quantize static --data-dir imagenet --out int8.onnx
    python tools/export.py --checkpoint FILE --format hf --out folder

onnx: ONNX Runtime, TensorRT and others; pt2: torch.export; aoti: AOTInductor, machine code for this kind of processor;
torchscript: TorchScript; hf: what timm.create_model("local-dir:FOLDER") and, once uploaded, "hf-hub:" load.

The file takes images (B, C, H, W) in float32, normalised, and tells itself how they are to be prepared. Before it is
there under its name it is loaded in its runtime and compared with PyTorch, in numbers and in speed. docs/export.md
tells what works in which format. tools/predict_onnx.py classifies images with an ONNX file, without PyTorch.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import cli
import hub
import loaders
import raftmlp
from formats import FORMATS, FeatureMaps, Graph, Logits, Runtime, quantize_onnx
from imagenet import outputs_for
from predict import class_names
from raftmlp import data
from raftmlp.checkpoint import find_pretrained
from reports import size_name
from validate import Evaluated, evaluate

OPSET = 18
LIMIT = 1e-4  # of the largest value: what a file in float32 may differ from PyTorch
CALIBRATION_IMAGES = 256
ONNX_ONLY = ("quantize", "simplify", "opset")


def build_parser() -> cli.Parser:
    parser = cli.Parser("%(prog)s --format FORMAT --out FILE [OPTION ...]", description=__doc__)
    cli.add_model_arguments(parser)
    group = parser.add_argument_group("file")
    group.add_argument("--format", choices=(*FORMATS, "hf"), default="onnx", help="what to write")
    group.add_argument("--out", metavar="FILE", help="file to write (.onnx, .pt2, .pt), or folder (hf)")
    group.add_argument("--overwrite", action="store_true", help="write over an existing file; folders stay")
    group.add_argument(
        "--batch", type=batch, default="dynamic", metavar="N", help="images at a time: a number, or 'dynamic'"
    )
    group.add_argument(
        "--dynamic-size",
        action="store_true",
        help="leave height and width free too (slower); the last map must have more than one position",
    )
    group.add_argument("--features", action="store_true", help="give the feature maps instead of logits")
    group.add_argument(
        "--half",
        nargs="?",
        const="float16",
        choices=("float16", "bfloat16"),
        help="weights and products in half precision; what goes in and comes out stays float32",
    )
    group.add_argument(
        "--quantize",
        choices=("dynamic", "static"),
        help="ONNX: 8-bit weights; activations quantised as they come, or (static) by what the data show",
    )
    group.add_argument("--simplify", action="store_true", help="ONNX: simplify the graph with onnxslim")
    group.add_argument(
        "--opset", type=cli.number(int, 18, 23), metavar="N", help=f"ONNX: version of the operators (default: {OPSET})"
    )
    group.add_argument(
        "--results-file", type=cli.output_file((".json",)), metavar="FILE", help="write what was measured, a .json file"
    )
    group = loaders.add_arguments(parser)
    group.description = "With --dataset or --data-dir, the accuracy of a classifier is measured before and after."
    group.add_argument(
        "--calibration-split",
        default="train",
        metavar="NAME",
        help=f"split that --quantize static looks at, {CALIBRATION_IMAGES} images or fewer",
    )
    return parser


def batch(text: str) -> int | None:
    """Return a number of images, or None for "dynamic": an option type."""
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, or 'dynamic', not {text!r}")
    return int(text)


def check_options(args: argparse.Namespace) -> Path:
    """Refuse what does not go together or could not be written; return the path to write."""
    suffix = "" if args.format == "hf" else FORMATS[args.format].suffix
    if not args.out:
        raise cli.UserError(f"--out names the {suffix + ' file' if suffix else 'folder'} to write")
    out = Path(args.out)
    for name in dict(onnx=(), hf=(*ONNX_ONLY, "batch", "features", "dynamic_size")).get(args.format, ONNX_ONLY):
        if getattr(args, name):
            raise cli.UserError(f"--{name.replace('_', '-')} does not go with --format {args.format}")
    if args.quantize and (args.half or args.features):
        raise cli.UserError("--quantize goes with logits in float32: leave --half and --features out")
    if args.quantize == "static" and not has_data(args):
        raise cli.UserError("--quantize static looks at images: name them with --dataset or --data-dir")
    if not suffix and out.exists():
        raise cli.UserError(f"{out} exists: name a folder that does not, or remove it")
    try:
        cli.output_file((suffix or out.suffix,))(args.out)
    except argparse.ArgumentTypeError as error:
        raise cli.UserError(f"--out: {error}") from error
    if out.exists() and not args.overwrite:
        raise cli.UserError(f"{out} exists; --overwrite writes over it")
    return out


def has_data(args: argparse.Namespace) -> bool:
    return bool(args.dataset or args.data_dir)


@dataclass
class Evaluation:
    """The images that accuracy is measured on.

    Attributes:
        name: What people call them.
        dataset: The data set.
        outputs: The model's outputs that count, None for all.
    """

    name: str
    dataset: Dataset
    outputs: list[int] | None


def find_evaluation(args: argparse.Namespace, model: nn.Module) -> Evaluation | None:
    """Return the data that the options name, if they do, and they are the model's."""
    if not has_data(args):
        return None
    dataset = loaders.create_data(args, args.val_split)
    outputs = outputs_for(data.class_names(dataset), model)
    return Evaluation(f"{args.dataset or args.data_dir}, {args.val_split}", dataset, outputs)


def precision(args: argparse.Namespace) -> str:
    """Return what the file's weights and products are in, in words."""
    return f"int8, {args.quantize}" if args.quantize else args.half or "float32"


# The graph


def build_graph(args: argparse.Namespace, model: nn.Module, settings: dict, weights: str) -> Graph:
    """Return what the file shall hold, the model in the precision that the options name."""
    dtype = getattr(torch, args.half or "float32")
    if args.features and not hasattr(model, "forward_intermediates"):
        raise cli.UserError(f"--features: {args.model} has no feature maps in timm")
    module = (FeatureMaps if args.features else Logits)(copy.deepcopy(model).to(dtype), dtype).eval()
    channels, *size = settings["input_size"]
    with torch.inference_mode():
        try:
            outputs = module(torch.zeros(1, channels, *size))
        except Exception as error:  # models raise anything on sizes that they cannot take
            raise cli.UserError(
                f"{args.model} takes no images of {size_name(size)} pixels: {cli.first_words(error)}"
            ) from error
    names = [f"map_{i}" for i in range(len(outputs))] if args.features else ["logits"]
    metadata = dict(model=args.model, weights=Path(weights).name, settings=settings, precision=precision(args))
    info = getattr(model, "feature_info", None) or [dict(reduction=32)]
    if args.features:
        strides = [entry["reduction"] for entry in info] if len(info) == len(outputs) else [None] * len(outputs)
        metadata["maps"] = [
            dict(name=name, channels=y.shape[1], stride=stride) for name, y, stride in zip(names, outputs, strides)
        ]
    elif model.num_classes:
        metadata["class_names"] = class_names(model, None)
    metadata.update(raftmlp=raftmlp.__version__, torch=torch.__version__)
    return Graph(
        module=module,
        channels=channels,
        size=tuple(size),
        batch=args.batch,
        dynamic_size=args.dynamic_size,
        reduction=max(entry["reduction"] for entry in info),
        outputs=names,
        metadata={key: json.dumps(value) for key, value in metadata.items()},
        opset=args.opset or OPSET,
        simplify=args.simplify,
    )


def calibration(args: argparse.Namespace, settings: dict) -> list[Tensor]:
    """Return batches of training images, drawn evenly from the whole set."""
    dataset = loaders.create_data(args, args.calibration_split)
    own = copy.copy(args)
    own.batch_size = args.batch or 32
    step = max(1, -(-loaders.count(dataset) // CALIBRATION_IMAGES))
    batches, images = [], 0
    for pixels, target in loaders.evaluation_loader(own, dataset, settings, torch.device("cpu"), 0, step):
        if (target != loaders.UNREAD).all() and len(pixels) == own.batch_size:
            batches.append(pixels)
            images += len(pixels)
        if images >= CALIBRATION_IMAGES:
            break
    if not batches:
        raise cli.UserError(
            f"--quantize static needs {own.batch_size} images or more that can be read in the split "
            f"{args.calibration_split!r}"
        )
    return batches


# The comparison


def cases(graph: Graph) -> list[tuple[int, tuple[int, int]]]:
    """Return three kinds of images to compare, as their number and their height and width."""
    height, width = graph.size
    sizes = [graph.size] * 3
    if graph.dynamic_size:  # beside the first: a rectangle, and odd numbers
        odd = height * 3 // 4 | 1, width + 1 | 1
        sizes = [graph.size, (height, width * 3 // 2), tuple(map(max, odd, graph.least_size))]
    return [(graph.batch or number, size) for number, size in zip((1, 3, 16), sizes)]


def source_of_images(
    args: argparse.Namespace, settings: dict, evaluation: Evaluation | None
) -> Callable[[int, tuple[int, int]], Tensor]:
    """Return what makes images to compare: the data's, where data are named, else random numbers."""
    channels = settings["input_size"][0]
    if not evaluation:
        return lambda number, size: torch.randn(number, channels, *size)
    own = copy.copy(args)

    def images_of(number: int, size: tuple[int, int]) -> Tensor:
        own.batch_size = number
        there = {**settings, "input_size": (channels, *size)}
        images, _ = next(iter(loaders.evaluation_loader(own, evaluation.dataset, there, torch.device("cpu"))))
        return images.repeat(-(-number // len(images)), 1, 1, 1)[:number]

    return images_of


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value; 0 where there is none."""
    if torch.equal(found, expected):
        return 0.0
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.inference_mode()
def compare(
    reference: nn.Module,
    run: Runtime,
    name: str,
    images_of: Callable[[int, tuple[int, int]], Tensor],
    cases: list[tuple[int, tuple[int, int]]],
    limit: float | None,
) -> list[dict]:
    """Return a row a case: largest difference as a share of the largest value, and milliseconds of both, in turns.

    Args:
        reference: The module in PyTorch, float32.
        run: The file in its runtime.
        name: The runtime's name.
        images_of: Makes a number of images of a height and width.
        cases: Numbers, heights and widths.
        limit: The largest difference that is right; None if any is that is finite.

    Raises:
        UserError: If the file does not run or differs more.
    """
    rows = []
    cli.say(f"{'images':>15}  largest difference  {'PyTorch':>10}  {name:>14}")
    for number, size in cases:
        images = images_of(number, size)
        words = f"{number} x {size_name(size)}"
        try:
            expected = reference(images)
        except Exception as error:  # models raise anything on sizes that they cannot take
            raise cli.UserError(f"the model takes no {words} images: {cli.first_words(error)}") from error
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        try:
            found = run(images)
        except Exception as error:  # runtimes raise anything
            raise cli.UserError(f"{name} cannot run the file with {words} images: {cli.first_words(error)}") from error
        if [y.shape for y in found] != [y.shape for y in expected]:
            raise cli.UserError(f"{name} gives shapes {[list(y.shape) for y in found]}: the file is not written")
        difference = max(relative_difference(a, b) for a, b in zip(found, expected))
        ours, theirs = in_turns(partial(reference, images), partial(run, images))
        cli.say(
            f"{words:>15}  {difference:18.1e}  {ours:7.2f} ms  {theirs:11.2f} ms  {ours / theirs:.2f} times as fast"
        )
        if not difference <= (limit or float("inf")):  # not a number is no right difference either
            raise cli.UserError(
                f"{name} differs from PyTorch by {difference:.2g} of the largest value, allowed is "
                f"{limit or 'a finite number'}: the file is not written"
            )
        rows.append(dict(images=words, difference=difference, pytorch_ms=ours, runtime_ms=theirs))
    return rows


def in_turns(*functions: Callable[[], object], rounds: int = 4, least: float = 0.05) -> list[float]:
    """Return the median milliseconds of a call of each function; they take turns, each for a while."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, found in zip(functions, times):
            time.sleep(0.02)  # the other's threads wait in a loop for a while, and would be in the way
            function()
            calls, start = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - start < least:
                function()
                calls += 1
            found.append(1000 * (time.perf_counter() - start) / calls)
    return [statistics.median(found[1:]) for found in times]  # the first is to warm up


class Ran(nn.Module):
    """A file in its runtime, as a module; images are filled up to the batch that the file takes."""

    def __init__(self, run: Runtime, batch: int | None):
        super().__init__()
        self.run, self.batch = run, batch

    def forward(self, images: Tensor) -> Tensor:
        missing = (self.batch or len(images)) - len(images)
        padded = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
        return self.run(padded)[0][: len(images)]


def accuracy(args: argparse.Namespace, module: nn.Module, evaluation: Evaluation, settings: dict) -> dict:
    """Return what ``validate.evaluate`` finds of a module with the model's outputs, and the name of the data."""
    own = copy.copy(args)
    own.batch_size = args.batch or args.batch_size
    loader = loaders.evaluation_loader(own, evaluation.dataset, settings, torch.device("cpu"))
    module = Evaluated(module, evaluation.outputs, False, torch.contiguous_format)
    return dict(**evaluate(module, loader, torch.device("cpu")), data=evaluation.name)


def accuracy_line(name: str, figures: dict) -> str:
    """Return what ``accuracy`` found as a line for people."""
    return f"{name}: top-1 {figures['top1']:.2f} % on {figures['images']} images of {figures['data']}"


# Main


def export_graph(args: argparse.Namespace, model: nn.Module, settings: dict, weights: str, out: Path) -> None:
    """Write the file, if it gives PyTorch's numbers in its runtime."""
    kind = FORMATS[args.format]
    evaluation = find_evaluation(args, model)
    graph = build_graph(args, model, settings, weights)
    batches = calibration(args, settings) if args.quantize == "static" else []
    cli.say(f"{args.model}, {weights} weights: exporting for {kind.runtime} ...")
    start = time.perf_counter()
    content = kind.write(graph)
    if args.quantize:
        content = quantize_onnx(content, args.quantize, batches)
    cli.say(f"made in {time.perf_counter() - start:.0f} s, {len(content) / 2**20:.1f} MiB")
    reference = (FeatureMaps if args.features else Logits)(model, torch.float32).eval()
    with cli.landing(out) as temporary:
        temporary.write_bytes(content)
        try:
            run, metadata = kind.run(temporary)
        except Exception as error:  # runtimes raise anything
            raise cli.UserError(f"{kind.runtime} cannot load the file: {cli.first_words(error)}") from error
        if missing := graph.metadata.keys() - metadata.keys():
            raise cli.UserError(f"{kind.runtime} does not find {sorted(missing)} in the file: it is not written")
        exact = not (args.half or args.quantize)
        limit = LIMIT if exact else None
        rows = compare(reference, run, kind.runtime, source_of_images(args, settings, evaluation), cases(graph), limit)
        results = dict(
            model=args.model,
            weights=weights,
            format=args.format,
            precision=(args.quantize and f"int8, {args.quantize}") or args.half or "float32",
            bytes=len(content),
            rows=rows,
        )
        if evaluation and not args.features:
            for name, module in (("PyTorch", model), (kind.runtime, Ran(run, graph.batch))):
                results[name] = accuracy(args, module, evaluation, settings)
                cli.say(accuracy_line(name, results[name]))
    if args.results_file:
        cli.write_whole(args.results_file, json.dumps(results, indent=2) + "\n")
        cli.say(f"figures: {args.results_file}")
    free = [name for name, is_free in (("batch", not args.batch), ("height and width", args.dynamic_size)) if is_free]
    from_on = f" from {size_name(graph.least_size)}" if graph.dynamic_size and max(graph.least_size) > 1 else ""
    cli.say(f"written: {out}, {' and '.join(free) or 'no axis'} free{from_on}")


def export_hub(args: argparse.Namespace, model: nn.Module, settings: dict, weights: str, out: Path) -> None:
    """Write the folder for the Hugging Face Hub."""
    evaluation, dtype = find_evaluation(args, model), getattr(torch, args.half or "float32")
    model = model.to(dtype)
    measured = accuracy(args, Logits(model, dtype), evaluation, settings) if evaluation else None
    if measured:
        cli.say(accuracy_line(args.model, measured))
    file = Path(args.checkpoint) if args.checkpoint else None
    if args.pretrained:
        file = find_pretrained(*args.model.partition(".")[::2])
    with cli.user_errors(ValueError, FileNotFoundError):
        facts = hub.training_facts(file) if file else {}
    name = args.model.partition(".")[0]
    hub.write_folder(model, settings, hub.model_card(model, name, settings, facts, measured), out)
    if not facts:
        cli.say("the weights have no card of tools/train.py: README.md says that data and recipe are not told")
    if args.results_file:
        results = dict(model=args.model, weights=weights, format="hf", precision=precision(args), measured=measured)
        cli.write_whole(args.results_file, json.dumps(results, indent=2) + "\n")
        cli.say(f"figures: {args.results_file}")
    cli.say(f"written: {out}/, which timm.create_model('local-dir:{out}', pretrained=True) loads")


def main() -> None:
    args = build_parser().parse_args()
    out = check_options(args)
    model = cli.create_model(args).eval()
    settings = loaders.image_settings(args, model)
    weights = args.checkpoint or ("pretrained" if args.pretrained else "random")
    if weights == "random":
        cli.say("note: neither --pretrained nor --checkpoint is given, the weights are random")
    (export_hub if args.format == "hf" else export_graph)(args, model, settings, weights, out)


if __name__ == "__main__":
    cli.run(main)
