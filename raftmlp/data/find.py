"""Image files by their names, by their folders and by patterns; needs neither torch nor timm."""

import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

__all__ = ["SUFFIXES", "find_images", "natural_order", "walk_images"]

_logger = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_images(names: Sequence[str]) -> list[Path]:
    """Return image files, each once: files as they are named, folders and patterns sorted, without hidden files.

    Raises:
        UserError: If nothing is named, or one of the names gives no image.
    """
    if not names:
        raise UserError("name an image, a folder of images or a pattern")
    files: dict[Path, None] = {}
    for name in names:
        found = [name]
        if not os.path.isfile(name):
            found = walk_images(name) if os.path.isdir(name) else glob.glob(name, recursive=True)
            found = [file for file in found if file.lower().endswith(SUFFIXES) and os.path.isfile(file)]
        if not found:
            raise UserError(
                f"no images at {name!r}: it must be an image, or a folder or a pattern of files {' '.join(SUFFIXES)}"
            )
        files.update(dict.fromkeys(map(Path, sorted(found, key=natural_order))))
    return list(files)


def walk_images(root: str) -> list[str]:
    """Return the names of image files below a folder, without hidden ones, whose names begin with a dot.

    Folders that cannot be read and links that lead to a folder above themselves are passed over, which is logged.
    """
    files: list[str] = []
    passed_over: list[str] = []
    walk = os.walk(root, onerror=lambda e: passed_over.append(f"{e.filename} ({e.strerror})"), followlinks=True)
    for folder, subfolders, names in walk:
        shown = sorted((name for name in subfolders if not name.startswith(".")), reverse=True)
        paths = {name: os.path.join(folder, name) for name in shown}
        circular = [name for name in shown if os.path.islink(paths[name]) and _leads_up(paths[name])]
        passed_over += [f"{paths[name]} (a link to a folder above it)" for name in circular]
        subfolders[:] = [name for name in shown if name not in circular]
        files += [
            os.path.join(folder, name)
            for name in sorted(names)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    if passed_over:
        more = f" and {len(passed_over) - 5} others" if len(passed_over) > 5 else ""
        plural = "s" * (len(passed_over) > 1)
        shown = ", ".join(sorted(passed_over)[:5])
        _logger.warning(f"note: {len(passed_over)} folder{plural} passed over: {shown}{more}")
    return files


def _leads_up(link: str) -> bool:
    return any(os.path.samefile(link, above) for above in Path(link).parents)


def natural_order(name: str) -> list:
    """Return a key that sorts 9.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]
