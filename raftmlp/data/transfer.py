"""The data sets of the paper's transfer experiments that timm has no name for, in the layouts they come in."""

import json
from pathlib import Path

from PIL import Image
from torch.utils.data import ConcatDataset, Dataset

from ..errors import MissingFileError, UserError

__all__ = ["INaturalist", "create_transfer_dataset"]

TRAIN, EVALUATION = ("train", "training"), ("val", "valid", "validation", "test")


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019 as PIL images and classes, in the layout of the competition.

    ``root`` holds train2018.json and val2018.json (or ...2019.json), and the images where these say.

    Args:
        root: The folder.
        year: 2018 or 2019.
        split: "train" or "validation".

    Raises:
        MissingFileError: If the list of images is missing.
        UserError: If there is no such split, or the list is damaged.
    """

    def __init__(self, root: str | Path, year: int, split: str = "train"):
        self.root = Path(root)
        path = self.root / f"{'train' if _is_training(split) else 'val'}{year}.json"
        if not path.is_file():
            raise MissingFileError(f"no {path}: it comes with iNaturalist {year} and lists its images")
        try:
            content = json.loads(path.read_text())
            names = {image["id"]: image["file_name"] for image in content["images"]}
            self.samples = [(names[a["image_id"]], int(a["category_id"])) for a in content["annotations"]]
            categories = sorted(content.get("categories", []), key=lambda category: category["id"])
            self.classes = tuple(str(category["name"]) for category in categories)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no list of iNaturalist's images: {error!r}") from error
        self.transform = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        name, target = self.samples[index]
        image = Image.open(self.root / name).convert("RGB")
        return image if self.transform is None else self.transform(image), target

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return the file of an image, as timm's data sets do."""
        path = self.root / self.samples[index][0]
        return path.name if basename else str(path if absolute else path.relative_to(self.root))


def create_transfer_dataset(name: str, root: str, split: str, download: bool = False) -> Dataset | None:
    """Return Flowers-102, Stanford Cars or iNaturalist by name, None for any other name.

    Flowers-102 is trained on its "train" and "val" parts together and evaluated on "test", as is the custom.

    Args:
        name: torch/flowers102, torch/stanford_cars, inat/2018 or inat/2019.
        root: Folder of the data.
        split: A name of training, or of evaluation.
        download: Let torchvision fetch it, where it can.

    Raises:
        UserError: If there is no such split or year.
    """
    if name == "torch/flowers102":
        from torchvision.datasets import Flowers102

        parts = ("train", "val") if _is_training(split) else ("test",)
        return ConcatDataset([Flowers102(root, part, download=download) for part in parts])
    if name == "torch/stanford_cars":
        from torchvision.datasets import StanfordCars

        return StanfordCars(root, "train" if _is_training(split) else "test", download=download)
    if name.startswith("inat/"):
        if name not in ("inat/2018", "inat/2019"):
            raise UserError(f"unknown data set {name!r}: take 'inat/2018' or 'inat/2019'")
        return INaturalist(root, int(name[-4:]), split)
    return None


def _is_training(split: str) -> bool:
    if split not in (*TRAIN, *EVALUATION):
        raise UserError(f"no split {split!r}: take 'train' or 'validation'")
    return split in TRAIN
