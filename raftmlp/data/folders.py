"""Images in folders of classes."""

import os

from timm.data.readers.reader_image_folder import ReaderImageFolder

from .find import natural_order, walk_images

__all__ = ["FolderReader"]


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder, with its order of images and classes, which finds the files of ``walk_images``.

    Args:
        root: The folder; an image's class is the name of the folder that it lies in.

    Raises:
        RuntimeError: If there is no image in it.
    """

    def __init__(self, root: str):
        self.root = root
        files = walk_images(root)
        if not files:
            raise RuntimeError("0 images in it")
        folders = [os.path.dirname(file) for file in files]
        labels = ["" if folder == root else os.path.basename(folder) for folder in folders]
        names = sorted(sorted(set(labels)), key=natural_order)  # "A" and "a" in the same order at every run
        self.class_to_idx = {name: i for i, name in enumerate(names)}
        samples = [(file, self.class_to_idx[label]) for file, label in zip(files, labels)]
        self.samples = sorted(samples, key=lambda sample: natural_order(sample[0]))
