"""The embedded data sets, and the names that lead to others."""

import numpy as np
import pytest
from PIL import Image

from raftmlp.data import Digits, class_names, create_dataset


def test_digits_are_split_by_class_and_never_shared():
    train, held_out = Digits("train"), Digits("validation")
    assert (len(train), len(held_out)) == (1437, 360)
    shares = [np.bincount(part.labels) / len(part) for part in (train, held_out)]
    assert np.abs(shares[0] - shares[1]).max() < 0.01
    pixels = [{image.tobytes() for image in part.images} for part in (train, held_out)]
    assert not pixels[0] & pixels[1]
    again = Digits("val")
    assert (again.images == held_out.images).all() and (again.labels == held_out.labels).all()


def test_digits_are_images():
    image, label = Digits("validation")[0]
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert 0 <= label <= 9
    pixels = np.asarray(image)
    assert pixels[0, 0].max() < 50 and pixels.max() > 200  # light on black
    brightness, _ = Digits("validation", transform=lambda image: np.asarray(image).mean())[0]
    assert brightness == pixels.mean()


def test_digits_splits():
    with pytest.raises(ValueError, match="no split 'training'"):
        Digits("training")


def test_create_dataset(tmp_path):
    assert class_names(create_dataset("digits", split="train")) == list("0123456789")
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / name / "1.png")
    folder = create_dataset("", str(tmp_path), "validation")
    assert len(folder) == 2
    assert class_names(folder) == ["cat", "dog"]


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'digit'"):
        create_dataset("digit")
    with pytest.raises(ValueError, match="--data-dir"):
        create_dataset("")
    with pytest.raises(FileNotFoundError, match="no data at"):
        create_dataset("", str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="no data set '' with split 'train'.*0 images"):
        create_dataset("", str(tmp_path), "train")
    with pytest.raises(ValueError, match="torch/nothing"):
        create_dataset("torch/nothing", str(tmp_path))
