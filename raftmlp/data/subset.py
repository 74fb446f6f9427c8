"""Parts of a dataset in which every class has its share: splits, and stratified subsets."""

import copy
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Subset

from ..errors import UserError

__all__ = ["SPLITS", "balanced_order", "hold_out", "is_training_split", "take_images"]

SPLITS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"), ("test",))  # names of each kind


def is_training_split(split: str) -> bool:
    """Return whether the name of a split is one of training, and not one of evaluation."""
    if split not in sum(SPLITS, ()):
        raise UserError(f"no split {split!r}: take 'train' or 'validation'")
    return split in SPLITS[0]


def take_images(dataset: Dataset, count: int, seed: int, classes: Sequence[str] | None = None) -> Dataset:
    """Return a stratified subset of ``count`` images, chosen by seed.

    With the same seed, a smaller subset is part of a larger one. Where the dataset does not tell its classes without
    reading all images, the images are chosen whatever their class. ``classes`` are the names of the classes.
    """
    if isinstance(dataset, IterableDataset):
        raise UserError(f"--train-num-samples {count}: no images of a stream can be chosen")
    if count > len(dataset):
        raise UserError(f"--train-num-samples {count}: there are {len(dataset)} images to train on")
    return _part(dataset, np.sort(balanced_order(_labels(dataset), seed)[:count]), classes)


def hold_out(
    dataset: Dataset, share: float, seed: int, classes: Sequence[str] | None = None
) -> tuple[Dataset, Dataset]:
    """Return the images of a dataset to train on, and those held out to evaluate on: a share of every class.

    Both have at least one image of each class that has two or more; a class with one image is trained on. Arguments are
    those of ``take_images``.
    """
    if isinstance(dataset, IterableDataset):
        raise UserError(f"--val-share {share}: no images of a stream can be held out, name a split with --val-split")
    labels = _labels(dataset)
    order, is_held_out = balanced_order(labels, seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        is_held_out[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    if not is_held_out.any():
        raise UserError(f"--val-share {share}: there are too few images to hold any out, {len(labels)} in all")
    return tuple(_part(dataset, np.flatnonzero(chosen), classes) for chosen in (~is_held_out, is_held_out))


def _part(dataset: Dataset, indices: np.ndarray, classes: Sequence[str] | None) -> Dataset:
    reader = getattr(dataset, "reader", None)
    if getattr(reader, "samples", None) is None:
        part = Subset(dataset, indices.tolist())
        part.classes = classes
        return part
    part = copy.copy(dataset)  # a reader names the files of damaged images, and finds images shared by two splits
    part.reader = copy.copy(reader)
    for name in {"samples", "targets"} & vars(reader).keys():
        values = getattr(reader, name)
        setattr(part.reader, name, [values[i] for i in indices])
    return part


def _labels(dataset: Dataset) -> np.ndarray:
    """Return the classes of the images, (N,); all 0 where only reading the images would tell them."""
    for source in (getattr(dataset, "reader", None), dataset):
        for name in ("targets", "labels"):
            if getattr(source, name, None) is not None:
                return np.asarray(getattr(source, name))
        if getattr(source, "samples", None) is not None:
            return np.asarray([target for _, target in source.samples])
    return np.zeros(len(dataset), int)


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return the numbers of images in a random order whose every beginning has each class in its share of all.

    ``labels`` are the classes of the images, (N,).
    """
    rng, places = np.random.default_rng(seed), np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        places[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(places, kind="stable")
