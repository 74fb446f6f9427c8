"""Data sets by name: the embedded digits, those of the transfer experiments, and all that timm reads."""

import tarfile
from pathlib import Path

from timm.data import create_dataset as create_timm_dataset
from torch.utils.data import Dataset

from ..errors import MissingFileError, UserError
from .digits import Digits
from .transfer import create_transfer_dataset

__all__ = ["class_names", "create_dataset"]


def create_dataset(name: str, root: str | None = None, split: str = "validation", **kwargs) -> Dataset:
    """Return a data set by name.

    Args:
        name: "digits" for the embedded one; "torch/flowers102", "torch/stanford_cars", "inat/2018", "inat/2019"; else
            what timm's create_dataset knows: "" for images in folders or a tar, "torch/NAME", "hfds/NAME", ...
        root: Folder of the data, or a tar file.
        split: Name of the split; of a folder, the sub-folder or tar file of that name is taken where there is one.
        **kwargs: Whatever else timm's create_dataset takes.

    Raises:
        UserError: If there is no such data set, or no image in it.
        MissingFileError: If its folder is missing.
    """
    if name == "digits":
        if root:
            raise UserError(
                f"the data set 'digits' is embedded and reads nothing in {root}: for a folder, --dataset folder"
            )
        return Digits(split)
    if not name or "/" not in name:
        if name not in ("", "folder", "tar"):
            raise UserError(
                f"unknown data set {name!r}: take 'digits', '' (a folder of images), 'torch/NAME', "
                f"'hfds/NAME', 'wds/NAME' or another of timm's prefixes"
            )
        if not root:
            raise UserError("name the folder of images with --data-dir, or a data set with --dataset")
        if not Path(root).exists():
            raise MissingFileError(f"no data at {root}")
        synonyms = (split, "val", "validation") if split in ("val", "validation") else (split,)
        tars = [Path(root) / f"{name}.tar" for name in synonyms]
        root = str(next((tar for tar in tars if tar.is_file()), root))
        _check_split(Path(root), split)
    elif not root and not name.startswith("hfds/"):
        raise UserError(f"name the folder of {name} with --data-dir")
    try:
        if found := create_transfer_dataset(name, root, split, kwargs.get("download", False)):
            return found
        return create_timm_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, RuntimeError, TypeError, ImportError, tarfile.TarError, EOFError) as error:
        reason = str(error) or "not found"
        raise UserError(f"no data set {name!r} with split {split!r} in {root}: {reason}") from error


def _check_split(root: Path, split: str) -> None:
    """Refuse a split that a folder of splits does not have; timm would take all of the folder for it."""
    kinds = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
    names = next((kind for kind in kinds if split in kind), (split,))
    splits = sorted(path.name for path in root.glob("*") if path.stem in (*kinds[0], *kinds[1], "test"))
    if (
        root.is_dir()
        and not any((root / name).is_dir() for name in names)
        and (splits or split not in kinds[0] + kinds[1])
    ):
        raise UserError(f"no split {split!r} in {root}: it has {', '.join(splits) or 'no folders of splits'}")


def class_names(dataset: Dataset) -> list[str] | None:
    """Return a data set's class names by index, or None where it tells none."""
    if getattr(dataset, "classes", None):
        return [name if isinstance(name, str) else ", ".join(name) for name in dataset.classes]  # ImageNet: synonyms
    reader = getattr(dataset, "reader", None)
    index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # folder; tar
    return sorted(index, key=index.get) if index else None
