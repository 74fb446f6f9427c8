"""Image files by their names, by their folders and by patterns."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

__all__ = ["SUFFIXES", "find_images"]

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
            pattern = os.path.join(glob.escape(name), "**") if os.path.isdir(name) else name
            matches = sorted(glob.glob(pattern, recursive=True), key=_natural_order)
            matches = [file for file in matches if file.lower().endswith(SUFFIXES) and os.path.isfile(file)]
        if not matches:
            raise UserError(
                f"no images at {name!r}: it must be an image, or a folder or a pattern of files {' '.join(SUFFIXES)}"
            )
        files.update(dict.fromkeys(map(Path, matches)))
    return list(files)


def _natural_order(name: str) -> list:
    """Return a key that sorts 9.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]
