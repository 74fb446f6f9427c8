"""Scenes to detect, segment and classify: real handwritten digits on real photographs, the same on any machine.

    raftmlp scenes OUT --train 400 --val 100

The digits are scikit-learn's (see ``raftmlp.data.digits``), the photographs scikit-image's and scikit-learn's. Training
and validation share neither. A folder of scenes is for mmdet and mmseg alike::

    images/{training,validation}/00000.jpg            RGB
    annotations/instances_{training,validation}.json  COCO: boxes, masks as RLE, categories 1 to 10 named "0" to "9"
    annotations/{training,validation}/00000.png       one label per pixel: 0 is the background, 1 to 10 the digits
    contact_sheet.png                                 some of them with their boxes
    scenes.json                                       how they were made
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from ..errors import UserError
from ..files import new_folder
from .digits import Digits
from .subset import balanced_order, is_training_split

__all__ = ["Scene", "SceneDigits", "SceneMaker", "write_scenes"]

SPLITS = ("training", "validation")
PHOTOGRAPHS = {  # by split and the module that has them
    "training": {
        "skimage.data": (
            "astronaut", "brick", "camera", "cell", "clock", "coffee", "coins", "gravel", "immunohistochemistry",
            "moon", "retina", "rocket",
        ),
        "sklearn.datasets": ("china.jpg",),
    },
    "validation": {
        "skimage.data": ("chelsea", "grass", "hubble_deep_field"),
        "sklearn.datasets": ("flower.jpg",),
    },
}  # fmt: skip
VERSION = 2  # rises when a seed makes other scenes


@dataclass(frozen=True)
class Scene:
    """An image, and the digits in it from back to front."""

    image: np.ndarray  # (H, W, 3) of 8 bits
    masks: np.ndarray  # the visible pixels of each digit, (N, H, W) of bool
    digits: tuple[int, ...]

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Return the boxes around the masks, each left, top, width and height in pixels."""
        boxes = [Image.fromarray(mask).getbbox() for mask in self.masks]
        return [(left, top, right - left, bottom - top) for left, top, right, bottom in boxes]

    def label_map(self) -> np.ndarray:
        """Return a label for each pixel, (H, W) of 8 bits: 0 for the background, 1 to 10 for the digits 0 to 9."""
        labels = np.zeros(self.image.shape[:2], np.uint8)
        for mask, digit in zip(self.masks, self.digits):
            labels[mask] = digit + 1
        return labels


class SceneMaker:
    """Makes the scenes of a split, "training" or "validation": scene i depends on the seed, the split and i alone.

    ``size`` is the height and width of the scenes in pixels.
    """

    def __init__(self, split: str, size: int = 256, seed: int = 0):
        self.split, self.size, self.seed = SPLITS.index(split), size, seed
        self.digits = Digits("train" if split == "training" else "validation")
        self.photographs = _photographs(split)

    def make(self, index: int) -> Scene:
        """Return the scene of that number: two to five digits; none covers more than a tenth of another."""
        rng = np.random.default_rng([self.seed, self.split, index])
        image, masks, digits = self._background(rng), [], []
        count = rng.integers(2, 6)
        for _ in range(8 * count):  # some do not find room
            if len(masks) == count:
                break
            which = rng.integers(len(self.digits))
            ink = self._ink(self.digits.images[which], rng)
            mask = ink > 0.5
            if not mask.any() or any((old & mask).sum() > 0.1 * min(old.sum(), mask.sum()) for old in masks):
                continue
            self._paint(image, ink, mask, rng)
            masks = [old & ~mask for old in masks]
            masks.append(mask)
            digits.append(int(self.digits.labels[which]))
        return Scene(_with_noise(image, rng), np.array(masks), tuple(digits))

    def make_single(self, index: int, lengths: tuple[float, float]) -> Scene:
        """Return a scene of one digit, that of the number ``index`` in ``digits``, which starts again after its end.

        ``lengths`` are the shares of the scene's height that the digit has at least and at most, its margin included.
        """
        rng = np.random.default_rng([self.seed, self.split, index, 1])
        which, image = index % len(self.digits), self._background(rng)
        ink = self._ink(self.digits.images[which], rng, lengths)
        mask = ink > 0.5
        self._paint(image, ink, mask, rng)
        return Scene(_with_noise(image, rng), mask[None], (int(self.digits.labels[which]),))

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random part of a random photograph, rotated by quarter turns and mirrored at random."""
        photograph = self.photographs[rng.integers(len(self.photographs))]
        side = int(rng.uniform(0.3, 1) * min(photograph.size))
        left, top = (int(rng.integers(length - side + 1)) for length in photograph.size)
        part = photograph.resize(
            (self.size, self.size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
        )
        pixels = np.rot90(np.asarray(part, dtype=np.float32), rng.integers(4))
        return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels.copy()

    def _ink(
        self, digit: np.ndarray, rng: np.random.Generator, lengths: tuple[float, float] = (0.3, 0.55)
    ) -> np.ndarray:
        """Return a handwritten digit (8, 8) at a random size, angle and place, 0 to 1 for every pixel of the scene."""
        length = int(self.size * rng.uniform(*lengths))
        digit = Image.fromarray(np.pad(digit, 1)).resize((length, length), Image.Resampling.BICUBIC)
        digit = digit.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        left, top = (int(rng.integers(max(1, self.size - side + 1))) for side in digit.size)
        canvas = Image.new("L", (self.size, self.size))
        canvas.paste(digit, (left, top))
        threshold = rng.uniform(0.4, 0.6)  # a thick or a thin pen
        return ((np.asarray(canvas, dtype=np.float32) / 255 - threshold) * 6 + 0.5).clip(0, 1)

    def _paint(self, image: np.ndarray, ink: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> None:
        """Put ink (H, W) onto an image (H, W, 3) in a random color that stands out from the pixels under the mask."""
        under = image[mask].mean()
        for distance in range(120, 0, -5):
            color = rng.uniform(0, 255, 3)
            if abs(color.mean() - under) > distance:
                break
        image += (ink * rng.uniform(0.8, 1))[..., None] * (color.astype(np.float32) - image)


def _with_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put the noise of a camera onto an image, and return its pixels of 8 bits."""
    image += rng.normal(0, 3, image.shape)
    return np.uint8(image.clip(0, 255))


def _photographs(split: str) -> list[Image.Image]:
    import skimage.data
    from sklearn.datasets import load_sample_image

    names = PHOTOGRAPHS[split]
    arrays = [getattr(skimage.data, name)() for name in names["skimage.data"]]
    arrays += [load_sample_image(name) for name in names["sklearn.datasets"]]
    return [Image.fromarray(array).convert("RGB") for array in arrays]


def write_scenes(root: str | Path, train: int = 400, val: int = 100, size: int = 256, seed: int = 0) -> bool:
    """Write a folder of scenes, complete or not at all; return False where exactly these are there already.

    ``train`` and ``val`` are the numbers of scenes, ``size`` is their height and width in pixels.

    Raises:
        UserError: If the folder holds anything else.
    """
    root = Path(root)
    description = dict(train=train, val=val, size=size, seed=seed, version=VERSION)
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        written = root / "scenes.json"
        if written.is_file() and written.read_text() == json.dumps(description) + "\n":
            return False
        raise UserError(f"{root} holds something else: name another folder, or remove it")
    makers = [SceneMaker(split, size, seed) for split in SPLITS]
    with new_folder(root) as folder:
        for split, maker, count in zip(SPLITS, makers, (train, val)):
            _write_split(folder, split, maker, count)
        _draw_contact_sheet([makers[0].make(i) for i in range(min(train, 24))]).save(folder / "contact_sheet.png")
        (folder / "scenes.json").write_text(json.dumps(description) + "\n")
    return True


def _write_split(root: Path, split: str, maker: SceneMaker, count: int) -> None:
    from tqdm import tqdm

    (root / "images" / split).mkdir(parents=True)
    (root / "annotations" / split).mkdir(parents=True)
    images, annotations = [], []
    for index in tqdm(range(count), desc=f"{split} scenes", unit=" scenes", disable=None):
        scene, name = maker.make(index), f"{index:05}"
        Image.fromarray(scene.image).save(root / "images" / split / f"{name}.jpg", quality=90)
        Image.fromarray(scene.label_map()).save(root / "annotations" / split / f"{name}.png")
        images.append(dict(id=index, file_name=f"{name}.jpg", height=maker.size, width=maker.size))
        for mask, box, digit in zip(scene.masks, scene.boxes(), scene.digits):
            numbers = dict(id=len(annotations) + 1, image_id=index, category_id=digit + 1, iscrowd=0)
            area, segmentation = int(mask.sum()), _run_lengths(mask)
            annotations.append(dict(numbers, bbox=box, area=area, segmentation=segmentation))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(Digits.classes)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _run_lengths(mask: np.ndarray) -> dict:
    """Return a mask (H, W) as COCO's run lengths: column after column, zeros first."""
    pixels = mask.flatten(order="F")
    starts = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff(np.concatenate([[0], starts, [pixels.size]])).tolist()
    return dict(size=list(mask.shape), counts=[0, *counts] if pixels[0] else counts)


def _draw_contact_sheet(scenes: list[Scene], columns: int = 6) -> Image.Image:
    """Return a picture of scenes with their boxes and classes."""
    scale = max(1, 256 // scenes[0].image.shape[0])
    size = scale * scenes[0].image.shape[0]
    sheet = Image.new("RGB", (columns * size, -(-len(scenes) // columns) * size))
    for i, scene in enumerate(scenes):
        tile = Image.fromarray(scene.image).resize((size, size), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(tile)
        for (left, top, width, height), digit in zip(scene.boxes(), scene.digits):
            corners = [scale * edge for edge in (left, top, left + width, top + height)]
            draw.rectangle(corners, outline="yellow")
            draw.text((corners[0] + 3, corners[1]), Digits.classes[digit], fill="yellow")
        sheet.paste(tile, (i % columns * size, i // columns * size))
    return sheet


# Scenes to classify

PHOTOGRAPHS_A_DIGIT = 3
LENGTHS = (0.6, 0.85)  # of the digits, as shares of the image's height
LOW_DATA = 500  # images to train on in the low-data setting


class SceneDigits(Dataset):
    """One digit on a photograph, RGB images of 64x64 pixels with their class 0 to 9, the same on every machine.

    Every digit of scikit-learn's stands on three photographs: 4,311 images to train on, 1,080 held out, with other
    digits and other photographs. An image is made when it is first asked for, in about a millisecond, and kept.

    Args:
        split: "train", or "validation" (also "val", "test").
        low_data: Whether 500 images, of as many digits, are all that there is to train on.
        transform: What is done to every image.
    """

    size = 64
    classes = Digits.classes

    def __init__(self, split: str = "train", low_data: bool = False, transform: Callable | None = None):
        is_training = is_training_split(split)
        self.maker = SceneMaker("training" if is_training else "validation", self.size)
        self.maker.photographs = [_reduced(photograph, 4 * self.size) for photograph in self.maker.photographs]
        labels = self.maker.digits.labels
        self.scenes = np.arange(PHOTOGRAPHS_A_DIGIT * len(labels))
        if is_training and low_data:
            self.scenes = np.sort(balanced_order(labels, seed=0)[:LOW_DATA])
        self.labels = labels[self.scenes % len(labels)]
        self.transform = transform
        self._made: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        if index not in self._made:
            self._made[index] = self.maker.make_single(int(self.scenes[index]), LENGTHS).image
        image = Image.fromarray(self._made[index])
        return image if self.transform is None else self.transform(image), int(self.labels[index])


def _reduced(photograph: Image.Image, side: int) -> Image.Image:
    """Return a photograph whose shorter side is at most so long: parts of a large one would take long to resize."""
    scale = side / min(photograph.size)
    if scale >= 1:
        return photograph
    return photograph.resize(tuple(round(scale * length) for length in photograph.size), Image.Resampling.BILINEAR)
