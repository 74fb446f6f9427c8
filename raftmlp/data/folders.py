"""Images in folders of classes, and in tar files of such folders: timm's readers with our classes and errors."""

import logging
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from ..errors import UserError
from ..files import printable
from .find import natural_order, walk_images
from .subset import SPLITS

__all__ = ["FolderReader", "TarReader", "wanted_layout"]

_logger = logging.getLogger(__name__)


def wanted_layout(root: str) -> str:
    """Return in words where images must lie below the folder of a split, or in its tar file."""
    return f"put the images into {printable(os.path.join(root, 'CLASS', 'IMAGE'))}, one folder for each class"


def class_labels(names: Sequence[str], root: str) -> tuple[list[int], dict[str, int]]:
    """Return the class of each image, which is the first folder of its name, and the index of each class by name.

    The images are named from ``root``, with slashes. The classes have timm's order; "A" and "a" come in the same order
    in every run.
    """
    if not names:
        raise UserError(f"0 images in {printable(root)}")
    if outside := [name for name in names if "/" not in name]:
        raise UserError(
            f"{len(outside)} of the {len(names)} images in {printable(root)} lie outside of class folders, "
            f"{printable(outside[0])} for one: {wanted_layout(root)}"
        )
    if deeper := [name for name in names if name.count("/") > 1]:
        _logger.warning(
            f"note: {len(deeper)} of the {len(names)} images in {printable(root)} lie deeper than CLASS/IMAGE, "
            f"{printable(deeper[0])} for one: their class is the first folder, {printable(deeper[0].split('/')[0])!r}"
        )
    labels = [name.partition("/")[0] for name in names]
    index = {name: i for i, name in enumerate(sorted(sorted(set(labels)), key=natural_order))}
    return [index[label] for label in labels], index


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder, with its order of images and classes, which finds the files of ``walk_images``.

    ``root`` is the folder; an image's class is the folder below it, however deep in that the image lies.
    """

    def __init__(self, root: str):
        self.root = root
        files, start = walk_images(root), len(os.path.join(root, ""))
        targets, self.class_to_idx = class_labels([file[start:].replace(os.sep, "/") for file in files], root)
        self.samples = sorted(zip(files, targets), key=lambda sample: natural_order(sample[0]))


class TarReader(ReaderImageInTar):
    """timm's reader of a tar file, with the classes of ``FolderReader`` and without hidden files.

    A tar file inside counts as a folder. A folder around all others is passed over if it has the name of a split or of
    the tar file: train/ in train.tar.
    """

    def __init__(self, root: str):
        try:
            super().__init__(root)
        except Exception as error:  # timm and tarfile name no file
            raise UserError(f"0 images in {printable(root)}: {error}") from error
        names = [_name_in_tar(sample) for sample in self.samples]
        shown = [i for i, name in enumerate(names) if not any(part.startswith(".") for part in name.split("/"))]
        names, passed_over = [names[i] for i in shown], {Path(root).stem, *sum(SPLITS, ())}
        while len(tops := {name.partition("/")[0] for name in names}) == 1 and tops <= passed_over:
            names = [name.partition("/")[2] for name in names]
        targets, self.class_name_to_idx = class_labels(names, root)
        self.samples, self.targets = self.samples[shown], np.array(targets)


def _name_in_tar(sample: np.ndarray) -> str:
    """Return the name of timm's sample: an entry of a tar file, or of a tar file inside it."""
    entry, _, inner_tar = sample
    folder = posixpath.splitext(inner_tar.path)[0] if inner_tar else ""
    return posixpath.normpath(posixpath.join("/", folder, entry.path.lstrip("/")))[1:]
