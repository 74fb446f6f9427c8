"""Parts of a data set, with as many images of every class as its share of all: splits, and so many of its images."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from ..errors import UserError

__all__ = ["Part", "balanced_order", "is_training_split", "split_images", "take_images"]


def is_training_split(split: str, owner: str) -> bool:
    """Return whether a split of embedded images is "train", and not "validation" (also "val", "test").

    Raises:
        UserError: If it is none of these; the message begins with the owner, "the digits have".
    """
    if split not in ("train", "validation", "val", "test"):
        raise UserError(f"{owner} no split {split!r}: take 'train' or 'validation'")
    return split == "train"


def split_images(labels: np.ndarray, is_training: bool) -> np.ndarray:
    """Return the numbers of four fifths of the images, or of the other fifth; the same on every machine."""
    from sklearn.model_selection import train_test_split

    parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return parts[0] if is_training else parts[1]


class Part(Dataset):
    """Some of a data set's images, by their numbers.

    Args:
        dataset: Any data set of images and classes that has a length.
        indices: The numbers of the images.
        classes: The names of the classes by index, None where they are not known.
    """

    def __init__(self, dataset: Dataset, indices: np.ndarray, classes: Sequence[str] | None = None):
        self.dataset, self.indices, self.classes = dataset, indices, classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]


def take_images(dataset: Dataset, count: int, seed: int, classes: Sequence[str] | None = None) -> Dataset:
    """Return a data set of ``count`` images of another, every class in its share, chosen by seed.

    Of the same seed, fewer images are among the more ones. Where the data set does not tell its classes without reading
    all images, the images are chosen whatever their class.

    Args:
        dataset: Any data set of images and classes that has a length.
        count: Number of images.
        seed: Another one chooses others.
        classes: The names of the classes by index, None where they are not known.

    Raises:
        UserError: If there are fewer images, or the data set is a stream.
    """
    if isinstance(dataset, IterableDataset):
        raise UserError(f"--train-num-samples {count}: of a stream no images can be chosen")
    if count > len(dataset):
        raise UserError(f"--train-num-samples {count}: there are {len(dataset)} images to train on")
    reader = getattr(dataset, "reader", None)
    samples = getattr(reader, "samples", None)
    labels = next((list(got) for got in map(_labels, (reader, dataset)) if got is not None), [0] * len(dataset))
    indices = np.sort(balanced_order(np.asarray(labels), seed)[:count])
    if samples is None:
        return Part(dataset, indices, classes)
    part = copy.copy(dataset)  # a reader names the files of damaged images, and finds images shared by two splits
    part.reader = copy.copy(reader)
    for name in {"samples", "targets"} & vars(reader).keys():
        values = getattr(reader, name)
        setattr(part.reader, name, [values[i] for i in indices])
    return part


def _labels(source: Any) -> Any:
    """Return the classes that a data set or its reader tells of its images, None where it tells none."""
    for name in ("targets", "labels"):
        if getattr(source, name, None) is not None:
            return getattr(source, name)
    samples = getattr(source, "samples", None)
    return None if samples is None else [target for _, target in samples]


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return the numbers of images in a random order whose every beginning has each class in its share of all.

    Args:
        labels: The classes of the images, (N,).
        seed: Another one makes another order.
    """
    rng, places = np.random.default_rng(seed), np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        places[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(places, kind="stable")
