"""The embedded data sets, and the names that lead to others."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from raftmlp.data import Digits, INaturalist, class_names, create_dataset
from raftmlp.data.images import evaluation_loader


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


# The data sets of the transfer experiments


def test_inaturalist_in_the_layout_it_comes_in(tmp_path):
    names = [f"train_val2018/{part}/{number}.jpg" for number, part in enumerate(("Aves/7", "Aves/7", "Fungi/9"))]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + i, 8), (50 * i, 0, 0)).save(tmp_path / name)
    categories = [dict(id=1, name="Fungi/9"), dict(id=0, name="Aves/7")]
    for split, chosen in (("train", (0, 2)), ("val", (1,))):
        content = dict(
            images=[dict(id=10 + i, file_name=names[i]) for i in chosen],
            annotations=[dict(image_id=10 + i, category_id=int(i == 2)) for i in chosen],
            categories=categories,
        )
        (tmp_path / f"{split}2018.json").write_text(json.dumps(content))
    train = create_dataset("inat/2018", str(tmp_path), "train")
    held_out = create_dataset("inat/2018", str(tmp_path), "validation")
    assert [(image.size, target) for image, target in train] == [((8, 8), 0), ((10, 8), 1)]
    assert [(image.size, target) for image, target in held_out] == [((9, 8), 0)]
    assert class_names(train) == ["Aves/7", "Fungi/9"]
    assert train.filename(1) == names[2] and train.filename(1, absolute=True) == str(tmp_path / names[2])

    with pytest.raises(FileNotFoundError, match="train2019.json: it comes with iNaturalist 2019"):
        create_dataset("inat/2019", str(tmp_path), "train")
    with pytest.raises(ValueError, match="unknown data set 'inat/2021'"):
        create_dataset("inat/2021", str(tmp_path), "train")
    with pytest.raises(ValueError, match="no split 'all'"):
        create_dataset("inat/2018", str(tmp_path), "all")
    (tmp_path / "val2018.json").write_text("{}")
    with pytest.raises(ValueError, match=r"val2018.json is no list of iNaturalist's images"):
        INaturalist(tmp_path, 2018, "val")


def test_stanford_cars_in_the_layout_it_comes_in(tmp_path):
    from scipy.io import savemat

    root = tmp_path / "stanford_cars"
    record = [("fname", object), ("class", object)]
    for split in ("train", "test"):
        (root / f"cars_{split}").mkdir(parents=True)
        rows = np.array([(f"{i}.jpg", i + 1) for i in range(2)], dtype=record)
        (root / "devkit").mkdir(exist_ok=True)
        annotations = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        savemat(root / annotations, {"annotations": rows})
        for i in range(2):
            Image.new("RGB", (8 + i, 8)).save(root / f"cars_{split}/{i}.jpg")
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})
    for split in ("train", "validation"):
        cars = create_dataset("torch/stanford_cars", str(tmp_path), split)
        assert [(image.size, target) for image, target in cars] == [((8, 8), 0), ((9, 8), 1)]
        assert class_names(cars) == ["Audi", "BMW"]


def test_flowers_are_trained_on_train_and_val(monkeypatch):
    class Flowers102:
        def __init__(self, root, split, download):
            self.split = split

        def __len__(self):
            return 3

    monkeypatch.setattr("torchvision.datasets.Flowers102", Flowers102)
    train, held_out = (create_dataset("torch/flowers102", "root", split) for split in ("train", "validation"))
    assert [part.split for part in train.datasets] == ["train", "val"]
    assert [part.split for part in held_out.datasets] == ["test"]
    with pytest.raises(ValueError, match="--data-dir"):
        create_dataset("torch/flowers102")


def test_tar_files_beside_each_other(tmp_path):
    import tarfile

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "1.png")
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / "images", arcname=".")
    for split in ("train", "validation"):
        images = create_dataset("", str(tmp_path), split)
        assert len(images) == 2 and class_names(images) == ["cat", "dog"]


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
