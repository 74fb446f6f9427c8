"""Scenes to classify: one handwritten digit on a photograph, at a random place and size and in a random colour.

Made of the same parts as the scenes to detect (``raftmlp.data.scenes``): the digits are scikit-learn's, the photographs
scikit-image's and scikit-learn's; training and validation share neither.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .digits import Digits
from .scenes import SceneMaker
from .subset import balanced_order, is_training_split

__all__ = ["SceneDigits"]

PHOTOGRAPHS_A_DIGIT = 3
LENGTHS = (0.6, 0.85)  # of the digits, as shares of the image's height
LOW_DATA = 500  # images to train on in the low-data setting


class SceneDigits(Dataset):
    """Digits on photographs, RGB images of 64x64 pixels with their class 0 to 9, the same on every machine.

    Every digit of scikit-learn's stands on three photographs: 4,311 images to train on, 1,080 held out, with other
    digits and other photographs. An image is made when it is first asked for, in about a millisecond, and kept.

    Args:
        split: "train", or "validation" (also "val", "test").
        low_data: Whether 500 images, of as many digits, are all that there is to train on.
        transform: What is done to every image.

    Raises:
        UserError: If there is no such split.
        MissingPackageError: If scikit-learn or scikit-image is not installed.
    """

    size = 64
    classes = Digits.classes

    def __init__(self, split: str = "train", low_data: bool = False, transform: Callable | None = None):
        is_training = is_training_split(split, "the scenes' digits have")
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
