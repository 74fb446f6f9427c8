"""Image files by their names, by their folders and by patterns."""

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
        if os.path.isfile(name):
            matches = [name]
        else:
            found = walk_images(name) if os.path.isdir(name) else glob.glob(name, recursive=True)
            matches = sorted(found, key=natural_order)
            matches = [file for file in matches if file.lower().endswith(SUFFIXES) and os.path.isfile(file)]
        if not matches:
            raise UserError(
                f"no images at {name!r}: it must be an image, or a folder or a pattern of files {' '.join(SUFFIXES)}"
            )
        files.update(dict.fromkeys(map(Path, matches)))
    return list(files)


def walk_images(root: str) -> list[str]:
    """Return the names of image files below a folder, without hidden ones, whose names begin with a dot.

    Folders that cannot be read and links that lead to a folder above themselves are passed over, which is logged.
    """
    files, passed_over = [], {}
    waiting: list[tuple[str, frozenset]] = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                passed_over[folder] = "a link to a folder above it"
                continue
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            passed_over[folder] = error.strerror
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself, or into a folder that may not be entered
                passed_over[entry.path] = error.strerror
                continue
            if is_folder:
                waiting.append((entry.path, above | {identity}))
            elif entry.name.lower().endswith(SUFFIXES):
                files.append(entry.path)
    if passed_over:
        named = [f"{folder} ({reason})" for folder, reason in sorted(passed_over.items())]
        more = f" and {len(named) - 5} others" if len(named) > 5 else ""
        plural = "s" * (len(named) > 1)
        _logger.warning(f"note: {len(named)} folder{plural} passed over: {', '.join(named[:5])}{more}")
    return files


def natural_order(name: str) -> list:
    """Return a key that sorts 9.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]
