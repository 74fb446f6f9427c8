"""Images of a dataset as a model takes them: how they are prepared, and batches to evaluate on."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from timm.data import IterableImageDataset, create_transform, resolve_data_config
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision.transforms import Compose

from ..checkpoints.description import EXIF_NOTES
from ..device import pins_memory
from ..errors import UserError
from ..files import printable
from ..sizes import check_memory
from .datasets import class_names
from .folders import wanted_layout
from .pixels import PixelReader
from .settings import ImageSettings
from .workers import ignore_signals

__all__ = [
    "UNREADABLE", "EvaluationImages", "check_classes", "data_config", "evaluation_loader", "file_name", "image_count",
    "open_image", "read_image", "read_stream",
]  # fmt: skip

UNREADABLE = -1  # the class of an image that cannot be read, in evaluation


def data_config(settings: ImageSettings, model: nn.Module, size: tuple[int, int] | None = None) -> dict:
    """Return how images are prepared for a model: timm's data config of it, with the settings in place of its values.

    Args:
        settings: What is changed.
        model: The model; its ``pretrained_cfg`` has the defaults.
        size: Height and width of the images in pixels; None takes the model's.

    Returns:
        input_size (channels, height, width), interpolation, crop_pct, crop_mode, mean, std, background, and exif:
        whether the EXIF orientation is applied.
    """
    resizing = {name: getattr(settings, name) for name in ("interpolation", "crop_pct", "crop_mode")}
    config = resolve_data_config(resizing, model=model)
    channels = getattr(model, "in_chans", config["input_size"][0])
    config["input_size"] = (channels, *(size or config["input_size"][-2:]))
    if channels not in (1, 3):
        raise UserError(f"images have 1 or 3 channels, the model takes {channels}")
    for name in ("mean", "std"):
        given = getattr(settings, name)
        values = tuple(given or config[name])
        if given and len(values) not in (1, 3):
            raise UserError(f"--{name} takes 1 or 3 numbers, not {len(values)}")
        config[name] = values * channels if len(values) == 1 else values
        if len(values) == 3 and channels == 1:
            config[name] = (sum(values) / 3,)
    config["background"] = settings.background
    says_no = EXIF_NOTES[False] in (getattr(model, "pretrained_cfg", {}).get("notes") or ())
    config["exif"] = not says_no if settings.exif is None else settings.exif
    return config


def check_classes(dataset: Dataset, model: nn.Module) -> None:
    """Refuse to train on more classes than the model has, or on a single one."""
    names, root = class_names(dataset), getattr(getattr(dataset, "reader", None), "root", "")
    if names and len(names) == 1:
        layout = f": {wanted_layout(root)}" if root else ""
        raise UserError(f"the images to train on have only one class, {names[0]!r}{layout}")
    if names and len(names) > model.num_classes:
        raise UserError(f"the data has {len(names)} classes, the model {model.num_classes}")


def image_count(dataset: Dataset) -> int:
    """Return the number of images, those of all processes."""
    reader = getattr(dataset, "reader", None)
    return getattr(reader, "num_samples", None) or len(dataset)  # a stream's length is this process's share


def file_name(dataset: Dataset, index: int) -> str:
    """Return the file of an image, escaped where it is not Unicode, or its number if the dataset knows no files."""
    if isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    try:
        return printable(dataset.filename(index, absolute=True))
    except Exception:  # datasets of torchvision and of Hugging Face name no files
        return f"image {index}"


def read_image(dataset: Dataset, index: int, pixels: PixelReader) -> tuple[Image.Image, int]:
    """Return one image of a dataset, decoded, and its class; PIL raises anything on bytes that are not an image."""
    reader = getattr(dataset, "reader", None)
    if reader is None:
        image, target = dataset[index][:2]
        return pixels(image), int(target)
    file, target = reader[index][:2]  # not through timm's ImageDataset, which takes another image for a damaged one
    return open_image(file, pixels), int(target)


def open_image(file: str | Path | BinaryIO, pixels: PixelReader) -> Image.Image:
    """Return the image in a file, decoded."""
    with Image.open(file) as image:
        return pixels(image)


class EvaluationImages(Dataset):
    """The images of these numbers in a dataset as uint8 tensors of a shape (C, H, W).

    An image that cannot be read is black, its class UNREADABLE. ``classes`` are the classes that count for those of the
    dataset; None where these are the same.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: range,
        pixels: PixelReader,
        transform: Callable,
        shape: tuple[int, int, int],
        classes: Sequence[int] | None = None,
    ):
        self.dataset, self.indices, self.pixels, self.transform = dataset, indices, pixels, transform
        self.shape, self.classes = shape, classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int):
        try:
            image, target = read_image(self.dataset, self.indices[i], self.pixels)
        except Exception:  # PIL raises anything on bytes that are not an image
            return torch.zeros(self.shape, dtype=torch.uint8), UNREADABLE
        return self.transform(image), target if self.classes is None else self.classes[target]


class _EvaluationLoader(PrefetchLoader):
    """A loader that says once what the reader of pixels has to say."""

    pixels: PixelReader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().__iter__():
            self.pixels.say_what_was_seen()
            yield batch


def evaluation_loader(
    dataset: Dataset,
    config: dict,
    device: torch.device,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    classes: Sequence[int] | None = None,
) -> PrefetchLoader:
    """Return batches of normalized images (B, C, H, W) and classes (B,), in the dataset's order, every image once.

    Args:
        dataset: Any dataset of images and classes.
        config: How images are prepared, see ``data_config``.
        device: Where the batches go.
        batch_size: Images per batch; a UserError is raised if they are larger than the memory.
        workers: Processes that load images; 0 to load them in this one.
        rank: Number of this process, which gets the images rank, rank + world_size, ...
        world_size: Number of processes.
        classes: The class that counts for each class of the dataset; None where these are the same.
    """
    shape, mean, std = config["input_size"], config["mean"], config["std"]
    check_memory(shape, min(batch_size, image_count(dataset)))
    preparation = {key: config[key] for key in ("interpolation", "crop_pct", "crop_mode", "mean", "std")}
    pixels, transform = PixelReader.from_config(config), create_transform(shape, use_prefetcher=True, **preparation)
    if isinstance(dataset, IterableDataset):  # its reader shares the images out
        images = read_stream(dataset, pixels, transform, workers)
        images.target_transform = None if classes is None else classes.__getitem__  # another model may have set it
    else:
        images = EvaluationImages(dataset, range(rank, len(dataset), world_size), pixels, transform, shape, classes)
    loading = dict(num_workers=workers, pin_memory=pins_memory(device), worker_init_fn=ignore_signals)
    batches = DataLoader(images, batch_size, collate_fn=fast_collate, **loading)
    loader = _EvaluationLoader(batches, mean, std, channels=shape[0], device=device)
    loader.pixels = pixels
    return loader


def read_stream(dataset: IterableDataset, pixels: PixelReader, transform: Callable, workers: int) -> IterableDataset:
    """Return a stream of PIL images, which ``workers`` processes read, as one of tensors."""
    dataset.transform = Compose([pixels, transform])
    if isinstance(dataset, IterableImageDataset):
        dataset.set_loader_cfg(num_workers=workers)
    return dataset
