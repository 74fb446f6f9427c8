#!/usr/bin/env python
"""Classify images with an ONNX file of raftmlp export, without PyTorch.

    raftmlp predict-onnx raftmlp_s.onnx photo.jpg photos/ --topk 3 --results-file predictions.json

It needs onnxruntime, numpy and Pillow, nothing else, and no other file of this repository: it can be copied beside the
ONNX file. Images are prepared as the file's metadata describe: 16 bits are scaled to 8, what is transparent lies over
the background, and the EXIF orientation is applied (not for files of version 0.2, which do not say so). Images that
cannot be read are named and left out; the exit status is then 2.
"""

import argparse
import glob
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = tuple(method.name.lower() for method in Image.Resampling)
LARGEST_SIDE = 16384  # pixels


def find_images(names: list[str]) -> list[Path]:
    """Return image files, each once: files as they are named, folders and patterns sorted, without hidden files.

    Raises:
        ValueError: If nothing is named, or one of the names gives no image.
    """
    if not names:
        raise ValueError("name an image, a folder of images or a pattern")
    files: dict[Path, None] = {}
    for name in names:
        if os.path.isfile(name):
            matches = [name]
        else:
            pattern = os.path.join(glob.escape(name), "**") if os.path.isdir(name) else name
            matches = sorted(glob.glob(pattern, recursive=True), key=_natural_order)
            matches = [file for file in matches if file.lower().endswith(SUFFIXES) and os.path.isfile(file)]
        if not matches:
            raise ValueError(
                f"no images at {name!r}: it must be an image, or a folder or a pattern of files {' '.join(SUFFIXES)}"
            )
        files.update(dict.fromkeys(map(Path, matches)))
    return list(files)


def _natural_order(name: str) -> list:
    """Return a key that sorts 9.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def as_8_bits(image: Image.Image, mode: str, background: str = "white") -> tuple[Image.Image, bool]:
    """Return an image with 8 bits a channel, and whether it had transparency, which lies over the background.

    Args:
        image: Of any mode; 16 bits are scaled, 65535 to 255.
        mode: "L" or "RGB".
        background: A colour as Pillow names it.

    Raises:
        ValueError: If the range of its pixels is not known.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = _scaled(image)
    has_transparency = False
    if image.has_transparency_data:
        image = image.convert("RGBA")
        has_transparency = image.getchannel("A").getextrema()[0] < 255
    if has_transparency:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert(mode), has_transparency


def _scaled(image: Image.Image) -> Image.Image:
    """Return an image of 16 or 32 bits with 8 bits, and with the transparency of a key colour as an alpha channel."""
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if image.mode == "F" or low < 0 or high > 65535:
        raise ValueError(f"pixels from {low} to {high} are neither whole numbers of 8 nor of 16 bits")
    if image.mode == "I" and high <= 255:
        return image
    scaled = Image.fromarray(np.round(pixels / 257).astype(np.uint8))
    if "transparency" in image.info:
        scaled.putalpha(Image.fromarray(np.where(pixels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled


def _checked(name: str, value: object, count: int, low: float, high: float, kinds: tuple = (int, float)) -> list:
    """Return a list of so many numbers.

    Raises:
        ValueError: If the value is something else, or a number is not in its range.
    """
    numbers = value if isinstance(value, (list, tuple)) else []
    are_right = (isinstance(x, kinds) and not isinstance(x, bool) and low <= x <= high for x in numbers)
    if len(numbers) != count or not all(are_right):
        raise ValueError(f"{name} must be numbers from {low} to {high}, {count} of them, not {value!r}")
    return list(numbers)


class Preparation:
    """How an image becomes the model's input: timm's transforms for evaluation, in numpy and Pillow.

    Args:
        input_size: Channels (1 or 3), height and width of the input.
        mean: Mean of the pixels, a number a channel, from 0 to 1.
        std: Their deviation.
        interpolation: Pillow's name of the resizing: bilinear, bicubic, ...
        crop_pct: Share of the resized image in the crop.
        crop_mode: "center": the shorter side is resized, the middle cut out; "squash": both sides are resized;
            "border": the longer side is resized, the rest filled with the mean.
        background: Colour behind transparent pixels.
        exif: Whether images are turned as their EXIF orientation says; files of version 0.2 do not say it.

    Raises:
        ValueError: If a value is of another kind or range.
    """

    def __init__(
        self,
        input_size: list[int],
        mean: list[float],
        std: list[float],
        interpolation: str,
        crop_pct: float,
        crop_mode: str,
        background: str = "white",
        exif: bool = False,
    ):
        channels, height, width = _checked("input_size", input_size, 3, 1, LARGEST_SIDE, (int,))
        if channels not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, the model takes {channels}")
        names = dict(crop_mode=(crop_mode, CROP_MODES), interpolation=(interpolation, INTERPOLATIONS))
        for name, (value, known) in names.items():
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; there are {', '.join(known)}")
        if not isinstance(exif, bool):
            raise ValueError(f"exif must be true or false, not {exif!r}")
        (crop_pct,) = _checked("crop_pct", [crop_pct], 1, 0.01, 2)
        mean, std = _checked("mean", mean, channels, -1e6, 1e6), _checked("std", std, channels, 1e-6, 1e6)
        self.mode, self.background, self.saw_transparency = "L" if channels == 1 else "RGB", background, False
        self.size, self.exif = (height, width), exif
        self.resized = math.floor(height / crop_pct), math.floor(width / crop_pct)
        self.crop_mode = crop_mode
        self.resample = Image.Resampling[interpolation.upper()]
        self.mean, self.std = (np.asarray(values, np.float32).reshape(channels, 1, 1) for values in (mean, std))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return an image as an array of shape (C, H, W), float32, normalised."""
        if self.exif:
            image.load()
            with suppress(Exception):  # damaged EXIF data, which say nothing, raise anything
                ImageOps.exif_transpose(image, in_place=True)
        image, has_transparency = as_8_bits(image, self.mode, self.background)
        self.saw_transparency |= has_transparency
        height, width = self._resized_size(image.height, image.width)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), self.resample)
        pixels = np.asarray(self._cropped(image), np.float32)
        pixels = pixels[None] if self.mode == "L" else pixels.transpose(2, 0, 1)
        return (pixels / np.float32(255) - self.mean) / self.std

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if self.crop_mode == "squash":
            return self.resized
        if self.crop_mode == "center" and self.resized[0] == self.resized[1]:
            side, short, long = self.resized[0], min(height, width), max(height, width)
            long = int(side * long / short)
            return (side, long) if height <= width else (long, side)
        ratios = height / self.resized[0], width / self.resized[1]
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def _cropped(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        more_height, more_width = max(height - image.height, 0), max(width - image.width, 0)
        if more_height or more_width:  # a border, the larger half of it below and to the right
            border = Image.new(self.mode, (image.width + more_width, image.height + more_height), self._border())
            border.paste(image, (more_width // 2, more_height // 2))
            image = border
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return image.crop((left, top, left + width, top + height))

    def _border(self) -> int | tuple[int, ...]:
        if self.crop_mode != "border":
            return 0
        colour = tuple(round(255 * float(value)) for value in self.mean.flat)
        return colour[0] if self.mode == "L" else colour


def _described(metadata: dict[str, str]) -> tuple[str, list[str], dict, list[int]]:
    """Return what an ONNX file says of itself: its model, its classes, how images are prepared, the smallest size.

    Raises:
        ValueError: If a value is missing or of another kind; settings are left to ``Preparation``.
    """
    keys = ("model", "class_names", "settings")
    if missing := [key for key in keys if key not in metadata]:
        raise ValueError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    model, names, settings = (json.loads(metadata[key]) for key in keys)
    if not isinstance(model, str):
        raise ValueError(f"model must be a name, not {model!r}")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names must be a list of names, not {names!r}")
    if not isinstance(settings, dict):
        raise ValueError(f"settings must be values by name, not {settings!r}")
    least = json.loads(metadata.get("least_size", "[1, 1]"))
    return model, names, settings, _checked("least_size", least, 2, 1, LARGEST_SIDE, (int,))


class Classifier:
    """An ONNX file of the export command, whose metadata describe how images are prepared and name the classes.

    Args:
        path: The file.
        img_size: Height and width of the images, for a file whose sizes are free; None takes the file's.
        background: Colour behind transparent pixels.
        exif: Whether images are turned as their EXIF orientation says; None takes what the file says.

    Raises:
        ValueError: If the file is missing, damaged or no classifier of the export command, or takes no such size.
    """

    def __init__(
        self,
        path: str,
        img_size: tuple[int, int] | None = None,
        background: str = "white",
        exif: bool | None = None,
    ):
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"onnxruntime is missing ({error}): pip install onnxruntime") from error
        if not os.path.isfile(path):
            raise ValueError(f"no ONNX file at {path}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
        except Exception as error:  # ONNX Runtime has no common kind of error
            raise ValueError(f"{path} is damaged or is no ONNX file: {_first_words(error)}") from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "maps" in metadata:
            raise ValueError(f"{path} gives feature maps: raftmlp export makes a classifier without --features")
        try:
            self.model, self.names, self.settings, least = _described(metadata)
            self.settings |= {} if exif is None else dict(exif=exif)
            self.prepare = Preparation(**self.settings, background=background)
            (images,) = self.session.get_inputs()
            batch, *_ = images.shape
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"the metadata of {path} do not describe how images are prepared and name the classes, as those of "
                f"raftmlp export do: {_first_words(error)}"
            ) from error
        if img_size:
            self.settings["input_size"] = [self.settings["input_size"][0], *img_size]
            self.prepare = Preparation(**self.settings, background=background)
        self._check_size(path, least)
        self.path = path
        self.batch = batch if isinstance(batch, int) else None  # None: any number of images at a time

    def _check_size(self, path: str, least: list[int]) -> None:
        size, made_for = self.prepare.size, self.session.get_inputs()[0].shape[2:]
        for side, fixed, smallest in zip(size, made_for, least):
            if isinstance(fixed, int) and side != fixed:
                raise ValueError(
                    f"{path} is made for images of {made_for[0]}x{made_for[1]} pixels, not {size[0]}x{size[1]}; "
                    f"raftmlp export makes one for any size with --dynamic-size"
                )
            if side < smallest:
                raise ValueError(f"{path} takes images of {smallest} pixels or more, not {size[0]}x{size[1]}")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the probabilities (B, classes) of prepared images (B, C, H, W).

        Raises:
            ValueError: If the file does not give them.
        """
        missing = (self.batch or len(images)) - len(images)
        padded = np.concatenate([images, np.repeat(images[-1:], missing, 0)]) if missing else images
        try:
            logits = self.session.run(None, {self.session.get_inputs()[0].name: padded})[0][: len(images)]
        except Exception as error:  # ONNX Runtime has no common kind of error
            raise ValueError(f"{self.path} cannot take {len(padded)} images: {_first_words(error)}") from error
        if logits.shape != (len(images), len(self.names)):
            raise ValueError(
                f"{self.path} names {len(self.names)} classes and gives a shape of {logits.shape[1:]} an image"
            )
        if not np.isfinite(logits).all():
            raise ValueError(
                f"the output of {self.path} is not finite: its weights are damaged, or float16 is too coarse"
            )
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)


def predict(classifier: Classifier, files: list[Path], batch_size: int, topk: int) -> Iterator[dict]:
    """Yield for each file its result in the JSON: its classes, the most probable first, or why it has none."""
    batch_size = classifier.batch or batch_size
    for start in range(0, len(files), batch_size):
        prepared = []
        for file in files[start : start + batch_size]:
            name = str(file).encode(errors="replace").decode()  # a file's name may be no Unicode
            try:
                with Image.open(file) as image:
                    prepared.append((dict(file=name), classifier.prepare(image)))
            except Exception as error:  # Pillow raises anything on bytes that are no image
                prepared.append((dict(file=name, error=_first_words(error)), None))
        readable = [pixels for _, pixels in prepared if pixels is not None]
        outputs = iter(classifier(np.stack(readable)) if readable else ())
        for result, pixels in prepared:
            if pixels is not None:
                probabilities = next(outputs)
                best = np.argsort(-probabilities, kind="stable")[:topk].tolist()
                result["predictions"] = [
                    {"class": i, "name": classifier.names[i], "probability": float(probabilities[i])} for i in best
                ]
            yield result


def _first_words(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 400 else words[:400] + " ..."


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")
    return int(text)


def _colour(text: str) -> str:
    try:
        if len(ImageColor.getrgb(text)) == 3:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be the name of a colour or #rrggbb, not {text!r}")


def _printable(name: str) -> str:
    """Return a name without characters that move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one line."""

    def error(self, message):
        raise ValueError(f"{message} (--help lists the options)")


def build_parser() -> Parser:
    parser = Parser(
        usage="%(prog)s MODEL.onnx IMAGE ... [OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL.onnx", help="a file that raftmlp export --format onnx wrote")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="an image, a folder (all below it) or a pattern")
    parser.add_argument("--topk", type=_positive, default=5, metavar="K", help="classes an image (default: 5)")
    parser.add_argument(
        "-b",
        "--batch-size",
        type=_positive,
        default=16,
        metavar="N",
        help="images a batch (default: 16, or the file's)",
    )
    parser.add_argument(
        "--img-size",
        type=_positive,
        nargs="+",
        metavar="N",
        help="size of the images in pixels, one number or height and width (default: the file's)",
    )
    parser.add_argument(
        "--background",
        type=_colour,
        default="white",
        metavar="COLOUR",
        help="colour behind transparent pixels, a name or '#rrggbb' (default: white)",
    )
    parser.add_argument(
        "--exif",
        action=argparse.BooleanOptionalAction,
        help="turn images as their EXIF orientation says (default: as the file's model was trained)",
    )
    parser.add_argument("--results-file", metavar="FILE", help="write the predictions, a .json file")
    return parser


def write_text(path: Path, text: str) -> None:
    """Write a text file that is complete or absent."""
    temporary = path.with_name(f".tmp.{path.name}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a class's name may have letters that the terminal cannot show
        sys.stdout.reconfigure(errors="replace")
    args = build_parser().parse_args()
    if args.img_size and len(args.img_size) > 2:
        raise ValueError(f"--img-size takes one number of pixels, or height and width, not {args.img_size}")
    if args.results_file and not args.results_file.endswith(".json"):
        raise ValueError(f"--results-file {args.results_file} must be named .json")
    if args.results_file and os.path.isdir(args.results_file):
        raise ValueError(f"--results-file {args.results_file} is a folder")
    if args.results_file and not os.access(os.path.dirname(args.results_file) or ".", os.W_OK):
        raise ValueError(f"cannot write {args.results_file}: its folder is missing or not writable")
    files = find_images(args.images)
    size = args.img_size and (args.img_size[0], args.img_size[-1])
    classifier = Classifier(args.model, size, args.background, args.exif)
    results, width = [], max(len(str(file)) for file in files)
    for result in predict(classifier, files, args.batch_size, args.topk):
        results.append(result)
        if "error" in result:
            print(f"cannot read {result['file']}: {result['error']}", file=sys.stderr)
        for i, prediction in enumerate(result.get("predictions", ())):
            file = "" if i else result["file"]
            print(f"{file:<{width}}  {100 * prediction['probability']:9.2f} %  {_printable(prediction['name'])}")
    if classifier.prepare.saw_transparency:
        note = f"some images have transparency: {args.background} shows through (--background)"
        print(f"note: {note}", file=sys.stderr)
    if args.results_file:
        content = dict(model=classifier.model, weights=args.model, settings=classifier.settings, images=results)
        write_text(Path(args.results_file), json.dumps(content, indent=2) + "\n")
        print(f"predictions: {args.results_file}")
    if unread := sum("error" in result for result in results):
        raise ValueError(f"{unread} of {len(files)} images could not be read")


def run() -> int:
    """Run the script and return its exit status; bad input ends it in one line."""
    try:
        main()
    except SystemExit as end:  # argparse's
        return end.code
    except BrokenPipeError:  # the reader ("| head") has closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {_first_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
