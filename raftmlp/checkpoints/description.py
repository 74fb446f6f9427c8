"""What a checkpoint or a card says of its model: one schema, checked once, where the file is read."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

__all__ = [
    "EXIF_NOTES", "INTERPOLATIONS", "check_description", "check_fields", "mapping", "number", "parse_json", "shorten",
    "text",
]  # fmt: skip

Check = Callable[[Any], Any]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
# whether images were turned as EXIF says: timm's cfg has no field for it, and its loaders keep these words in ``notes``
EXIF_NOTES = {True: "EXIF orientation applied", False: "EXIF orientation not applied"}
CROP_MODES = ("center", "squash", "border")
MAX_SIDE = 4096  # of an image in pixels
MAX_CLASSES = 10**6
MAX_NUMBER = 2**31  # in a model's arguments
# surrogates that stand for the bytes of a folder's name that is not UTF-8 (U+DC80 to U+DCFF) are allowed
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udc7f\udd00-\udfff]")
# arguments of timm.create_model that name files to read or to fetch
FILE_ARGUMENTS = re.compile(r"pretrained\w*|checkpoint_path|cache_dir")


def shorten(value: Any) -> str:
    """Return a value as one short line, whatever it is."""
    if not isinstance(value, (str, int, float, bool, type(None))):
        size = f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else ""
        inner = ", ".join(map(shorten, value[:3])) if _is_flat(value) else ""
        more = ", ..." if inner and len(value) > 3 else ""
        return f"[{inner}{more}]" if inner else f"a {type(value).__name__}{size}"
    if isinstance(value, int) and abs(value) > 10**20:
        return "a very large number"
    words = ascii(value) if isinstance(value, str) and UNPRINTABLE.search(value) else repr(value)
    return words if len(words) <= 60 else words[:60] + " ..."


def _is_flat(value: Any) -> bool:
    plain = (str, int, float, bool, type(None))
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(entry, plain) for entry in value[:3])


def parse_json(content: str | bytes, source: str | Path) -> Any:
    """Return what a JSON text says.

    Raises:
        UserError: If it is none, or nested too deep; the message names the source.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise UserError(f"{source} is damaged: its JSON is nested too deep") from error
    except ValueError as error:
        raise UserError(f"{source} is damaged: it is no JSON: {error}") from error


# Kinds of values: functions that return a value, or raise a UserError in words that follow a field's name


def number(kind: type, least: float, most: float) -> Check:
    kinds = (int,) if kind is int else (int, float)

    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            words = "a whole number" if kind is int else "a number"
            raise UserError(f"must be {words} from {least} to {most}, not {shorten(value)}")
        return value

    return check


def text(value: Any) -> str:
    """Return a text that can be printed in one line."""
    if not isinstance(value, str) or len(value) > 1000 or UNPRINTABLE.search(value):
        raise UserError(f"must be a text of at most 1000 printable characters, not {shorten(value)}")
    return value


def choice(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise UserError(f"must be one of {', '.join(allowed)}, not {shorten(value)}")
        return value

    return check


def several(check: Check, least: int, most: int) -> Check:
    count = str(least) if least == most else f"{least} to {most}"

    def check_all(value: Any) -> tuple:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            raise UserError(f"must be a list of {count} values, not {shorten(value)}")
        return tuple(map(check, value))

    return check_all


def mapping(value: Any) -> dict:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"must be a mapping from names to values, not {shorten(value)}")
    return dict(value)


def arguments(value: Any) -> dict:
    """Return a model's arguments, numbers, texts and lists of them, none of which names a file."""
    for name, argument in mapping(value).items():
        if not name.isidentifier() or FILE_ARGUMENTS.fullmatch(name):
            raise UserError(f"must not have an argument {shorten(name)}")
        try:
            _plain(argument)
        except UserError as error:
            raise UserError(f"{name} {error}") from error
    return dict(value)


def _plain(value: Any, depth: int = 0) -> None:
    if isinstance(value, (list, tuple, dict)) and depth < 4 and len(value) <= 1000:
        for entry in value.values() if isinstance(value, dict) else value:
            _plain(entry, depth + 1)
    elif isinstance(value, str):
        text(value)
    elif not isinstance(value, (bool, type(None))):
        number(float, -MAX_NUMBER, MAX_NUMBER)(value)


# The schema

SIDE = number(int, 1, MAX_SIDE)
PRETRAINED_CFG: dict[str, Check] = dict(
    num_classes=number(int, 0, MAX_CLASSES),
    input_size=several(SIDE, 3, 3),
    mean=several(number(float, -1e6, 1e6), 1, 1024),
    std=several(number(float, 1e-6, 1e6), 1, 1024),
    interpolation=choice(*INTERPOLATIONS),
    crop_pct=number(float, 0.01, 2),
    crop_mode=choice(*CROP_MODES),
    label_names=several(text, 0, MAX_CLASSES),
    notes=several(text, 0, 1000),
)
DESCRIPTION: dict[str, Check] = dict(model=text, model_kwargs=arguments, pretrained_cfg=mapping)


def check_fields(values: Mapping[str, Any], schema: Mapping[str, Check], source: str) -> dict[str, Any]:
    """Return those of the values that the schema knows; None counts as absent.

    Raises:
        UserError: If one is not as the schema allows; the message names the source and the field.
    """
    checked = {}
    for field, check in schema.items():
        if values.get(field) is None:
            continue
        try:
            checked[field] = check(values[field])
        except UserError as error:
            raise UserError(f"{source}{field} {error}") from error
    return checked


def check_description(values: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return what a file says of its model: any of ``model``, ``model_kwargs`` and ``pretrained_cfg``.

    Of a ``pretrained_cfg`` (timm's word for how images are prepared and how many classes there are) the fields of
    PRETRAINED_CFG are taken, none of which names files to fetch.

    Raises:
        UserError: If a field is not as the schema allows; the message names the file and the field.
    """
    description = check_fields(values, DESCRIPTION, f"{path}: ")
    if "pretrained_cfg" not in description:
        return description
    cfg = check_fields(description["pretrained_cfg"], PRETRAINED_CFG, f"{path}: pretrained_cfg.")
    counts = {1, 3, cfg.get("input_size", (3,))[0]}
    for field in ("mean", "std"):
        if field in cfg and len(cfg[field]) not in counts:
            raise UserError(
                f"{path}: pretrained_cfg.{field} has {len(cfg[field])} values, allowed are {sorted(counts)}"
            )
    names, classes = cfg.get("label_names"), cfg.get("num_classes")
    if names and classes is not None and len(names) != classes:
        raise UserError(f"{path}: pretrained_cfg.label_names has {len(names)} names for {classes} classes")
    notes = cfg.get("notes", ())
    if not set(notes) & set(EXIF_NOTES.values()):  # of timm, or of version 0.2 of this package, which applied none
        cfg["notes"] = (*notes, EXIF_NOTES[False])
    return {**description, "pretrained_cfg": cfg}
