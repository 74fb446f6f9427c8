"""Classify images with an ONNX file of raftmlp export, without PyTorch.

    raftmlp predict-onnx raftmlp_s.onnx photo.jpg photos/ --topk 3 --results-file predictions.json

It needs onnxruntime, numpy and Pillow, nothing else. Images are prepared as the file's metadata describe: 16 bits are
scaled to 8, what is transparent lies over the background, and the EXIF orientation is applied (not for files of version
0.2, which do not say so). Images that cannot be read are named and left out; the exit status is then 2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.find import find_images
from ..errors import UserError
from ..export.onnx_client import Classifier, predict
from ..files import write_json
from .console import say


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that leaves errors to the console; that of other commands needs more packages."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")
    return int(text)


def build_parser() -> Parser:
    parser = Parser(
        usage="%(prog)s MODEL.onnx IMAGE ... [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("model", metavar="MODEL.onnx", help="a file that raftmlp export --format onnx wrote")
    option("images", nargs="*", metavar="IMAGE", help="an image, a folder (all below it) or a pattern")
    option("--topk", type=count, default=5, metavar="K", help="classes per image (default: 5)")
    option("-b", "--batch-size", type=count, default=16, metavar="N", help="batch size (default: 16, or the file's)")
    size = "size of the images in pixels, one number or height and width (default: the file's)"
    option("--img-size", type=count, nargs="+", metavar="N", help=size)
    background = "color behind transparent pixels, a name or '#rrggbb' (default: white)"
    option("--background", default="white", metavar="COLOR", help=background)
    exif = "turn images as their EXIF orientation says (default: as the file's model was trained)"
    option("--exif", action=argparse.BooleanOptionalAction, help=exif)
    option("--results-file", metavar="FILE", help="write the predictions, a .json file")
    return parser


def show(result: dict, width: int) -> None:
    """Print an image's lines of the table, or why it has none; width is that of the first column."""
    if "error" in result:
        say(f"cannot read {result['file']}: {result['error']}", file=sys.stderr)
    for i, prediction in enumerate(result.get("predictions", ())):
        file = "" if i else result["file"]
        say(f"{file:<{width}}  {100 * prediction['probability']:9.2f} %  {prediction['name']}")


def report(results: Sequence[dict], path: str | Path | None, described: dict[str, Any]) -> None:
    """Write the results and what they were made with, if there is a path, and refuse unreadable images."""
    if path:
        write_json(path, {**described, "images": results})
        say(f"predictions: {path}")
    if unreadable := sum("error" in result for result in results):
        raise UserError(f"{unreadable} of {len(results)} images could not be read")


def main() -> None:
    args = build_parser().parse_args()
    if args.img_size and len(args.img_size) > 2:
        raise UserError(f"--img-size takes one number of pixels, or height and width, not {args.img_size}")
    if args.results_file and not args.results_file.endswith(".json"):
        raise UserError(f"--results-file {args.results_file} must be named .json")
    if args.results_file:
        Path(args.results_file).parent.mkdir(parents=True, exist_ok=True)  # before the work, for what it may fail on
    files = find_images(args.images)
    size = args.img_size and (args.img_size[0], args.img_size[-1])
    classifier = Classifier(args.model, size, args.background, args.exif)
    results, width = [], max(len(str(file)) for file in files)
    for result in predict(classifier, files, args.batch_size, args.topk):
        show(result, width)
        results.append(result)
    described = dict(model=classifier.model, weights=args.model, settings=classifier.settings)
    report(results, args.results_file, described)
