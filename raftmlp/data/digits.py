"""Real handwritten digits: the 1,797 images that scikit-learn carries, as an image data set.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998; the
8x8 test part of it, as ``sklearn.datasets.load_digits`` gives it.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..errors import MissingPackageError, install_command
from .subset import is_training_split, split_images

__all__ = ["Digits"]


class Digits(Dataset):
    """Handwritten digits, light on black, as RGB images of 32x32 pixels with their class 0 to 9.

    Both parts are the same on every machine and have every class in the same proportion: 1,437 digits to train on, 360
    held out.

    Args:
        split: "train", or "validation" (also "val", "test").
        transform: What is done to every image.

    Raises:
        UserError: If there is no such split.
        MissingPackageError: If scikit-learn is not installed.
    """

    size = 32
    classes = tuple("0123456789")

    def __init__(self, split: str = "train", transform: Callable | None = None):
        is_training = is_training_split(split, "the digits have")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise MissingPackageError(f"the digits come with scikit-learn: {install_command('demo')}") from error
        pixels, labels = load_digits(return_X_y=True)
        part = split_images(labels, is_training)
        self.images = np.uint8(pixels[part].reshape(-1, 8, 8) * (255 / 16))
        self.labels = labels[part]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index]).resize((self.size, self.size), Image.Resampling.BICUBIC)
        image = image.convert("RGB")
        return image if self.transform is None else self.transform(image), int(self.labels[index])
