"""Data sets: the embedded ones, and by one function everything that timm reads."""

from pathlib import Path

from timm.data import create_dataset as create_timm_dataset
from torch.utils.data import Dataset

from .digits import Digits

__all__ = ["Digits", "class_names", "create_dataset"]


def create_dataset(name: str, root: str | None = None, split: str = "validation", **kwargs) -> Dataset:
    """Return a data set by name.

    Args:
        name: "digits" for the embedded one; else what timm's create_dataset knows: "" for an image folder or tar,
            "torch/NAME", "hfds/NAME", "wds/NAME", ...
        root: Folder of the data.
        split: Name of the split; of an image folder, a sub-folder of that name is taken where there is one.
        **kwargs: Whatever else timm's create_dataset takes.

    Raises:
        ValueError: If there is no such data set, or no image in it.
        FileNotFoundError: If its folder is missing.
    """
    if name == "digits":
        return Digits(split)
    if not name or "/" not in name:
        if name not in ("", "folder", "tar"):
            raise ValueError(
                f"unknown data set {name!r}: take 'digits', '' (a folder of images), 'torch/NAME', "
                f"'hfds/NAME', 'wds/NAME' or another of timm's prefixes"
            )
        if not root:
            raise ValueError("name the folder of images with --data-dir, or a data set with --dataset")
        if not Path(root).exists():
            raise FileNotFoundError(f"no data at {root}")
    try:
        return create_timm_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"no data set {name!r} with split {split!r} in {root}: {error}") from error


def class_names(dataset: Dataset) -> list[str] | None:
    """Return a data set's class names by index, or None where it tells none."""
    if hasattr(dataset, "classes"):
        return list(dataset.classes)
    index = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return sorted(index, key=index.get) if index else None
