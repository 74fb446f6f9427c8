"""What a checkpoint or a card says of its model: one table of fields, checked once, where the file is read."""

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

__all__ = [
    "CROP_MODES", "EXIF_NOTES", "INTERPOLATIONS", "MAPPING", "TEXT", "Kind", "check_description", "check_fields",
    "number", "parse_json", "shorten",
]  # fmt: skip

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
_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict = 2, 3, 3, 3
_short.maxstring = _short.maxother = _short.maxlong = 60


def shorten(value: Any) -> str:
    """Return a value as one short line, whatever it is."""
    try:
        return " ".join(_short.repr(value).split())
    except ValueError:  # Python prints no number of thousands of digits
        return f"a very large {type(value).__name__}"


def parse_json(content: str | bytes, source: str | Path) -> Any:
    """Return what a JSON text says.

    Raises:
        UserError: If it is none, or nested too deep; the message names the source.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is damaged: it is no JSON: {error}") from error


class Kind(NamedTuple):
    """The values that a field may have, in words and as a test."""

    words: str
    allows: Callable[[Any], bool]


def number(kind: type, least: float, most: float) -> Kind:
    """Return the kind of numbers within bounds, both allowed."""
    kinds = (int,) if kind is int else (int, float)

    def allows(value: Any) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most

    return Kind(f"a {'whole ' * (kind is int)}number from {least} to {most}", allows)


def several(kind: Kind, least: int, most: int) -> Kind:
    def allows(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and least <= len(value) <= most and all(map(kind.allows, value))

    return Kind(f"a list of {least} to {most} values, each {kind.words}", allows)


def _choice(*allowed: str) -> Kind:
    return Kind(f"one of {', '.join(allowed)}", lambda value: isinstance(value, str) and value in allowed)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and not UNPRINTABLE.search(value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple, dict)):
        entries = value.values() if isinstance(value, dict) else value
        return depth < 4 and len(value) <= 1000 and all(_is_plain(entry, depth + 1) for entry in entries)
    return isinstance(value, (bool, type(None))) or _is_text(value) or ARGUMENT_NUMBER.allows(value)


TEXT = Kind("a text of at most 1000 printable characters", _is_text)
MAPPING = Kind("a mapping from names to values", _is_mapping)
ARGUMENT_NUMBER = number(float, -MAX_NUMBER, MAX_NUMBER)
ARGUMENT = Kind("a text, a number of at most 2**31, or a short list of them", _is_plain)
DESCRIPTION = dict(model=TEXT, model_kwargs=MAPPING, pretrained_cfg=MAPPING)
PRETRAINED_CFG = dict(
    num_classes=number(int, 0, MAX_CLASSES),
    input_size=several(number(int, 1, MAX_SIDE), 3, 3),
    mean=several(number(float, -1e6, 1e6), 1, 1024),
    std=several(number(float, 1e-6, 1e6), 1, 1024),
    interpolation=_choice(*INTERPOLATIONS),
    crop_pct=number(float, 0.01, 2),
    crop_mode=_choice(*CROP_MODES),
    label_names=several(TEXT, 0, MAX_CLASSES),
    notes=several(TEXT, 0, 1000),
)


def check_fields(values: Mapping[str, Any], kinds: Mapping[str, Kind], source: str) -> dict[str, Any]:
    """Return those of the values whose kind is given, lists as tuples; None counts as absent.

    Raises:
        UserError: If one is of another kind; the message names the source and the field.
    """
    known = {field: values[field] for field in kinds if values.get(field) is not None}
    for field, value in known.items():
        if not kinds[field].allows(value):
            raise UserError(f"{source}{field} must be {kinds[field].words}, not {shorten(value)}")
    return {field: tuple(value) if isinstance(value, list) else value for field, value in known.items()}


def check_description(values: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return what a file says of its model: any of ``model``, ``model_kwargs`` and ``pretrained_cfg``.

    Of a ``pretrained_cfg`` (timm's word for how images are prepared and how many classes there are) the fields of
    PRETRAINED_CFG are taken, none of which names files to fetch.

    Raises:
        UserError: If a field is not as the tables allow; the message names the file and the field.
    """
    description = check_fields(values, DESCRIPTION, f"{path}: ")
    arguments = description.get("model_kwargs", {})
    for name in arguments:
        if not name.isidentifier() or FILE_ARGUMENTS.fullmatch(name):
            raise UserError(f"{path}: model_kwargs must not have an argument {shorten(name)}")
    check_fields(arguments, dict.fromkeys(arguments, ARGUMENT), f"{path}: model_kwargs.")
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
