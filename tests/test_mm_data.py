"""Data that do not fit a config are refused before a run, in a line that names the file; what is left out is logged."""

import json
import shutil

import numpy as np
import pytest
from mmdet.visualization import DetLocalVisualizer
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmseg.visualization import SegLocalVisualizer
from PIL import Image

from helpers import ROOT
from raftmlp.data.scenes import write_scenes
from raftmlp.errors import UserError
from raftmlp.mm import coco, data
from raftmlp.mm.checkpoints import patch_mmengine
from raftmlp.mm.configs import build_runner, read_config

DETECTOR = ROOT / "configs" / "detection" / "mask_rcnn_raftmlp_digits.py"
SEGMENTOR = ROOT / "configs" / "segmentation" / "fpn_raftmlp_digits.py"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=4, val=2, size=96)
    return root


@pytest.fixture
def scenes(original, tmp_path):
    return shutil.copytree(original, tmp_path / "scenes")


@pytest.fixture
def build(scenes, tmp_path, monkeypatch):
    """Build the runner of a config on the scenes, as the commands do before anything is trained or evaluated."""
    patch_mmengine()
    monkeypatch.setattr("mmengine.runner.runner.collect_env", dict)  # these two take most of the time, for a log
    monkeypatch.setattr("mmengine.config.Config.pretty_text", "")

    def build_from(config, *loops, **changes):
        for kind in (MMLogger, MessageHub, DetLocalVisualizer, SegLocalVisualizer, DefaultScope):
            kind._instance_dict.clear()
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        return build_runner(read_config(config, changes, str(scenes), str(tmp_path / "run")), loops)

    return build_from


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    for module in (coco, data):
        monkeypatch.setattr(module._logger, "warning", messages.append)
    return messages


def change_annotations(root, change, split="training"):
    """Let a function change the content of a COCO file, and return the file."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


# Detection


def set_all(part, key, value):
    def change(content):
        for entry in content[part]:
            entry[key] = value(entry[key]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["categories"][7].update(name="seven"), ["'7'", "'seven'"]),
        (lambda c: c["categories"].pop(), ["'9'"]),
        (lambda c: c["categories"].reverse(), ["'9' where", "'0'"]),
        (lambda c: c["categories"].append(dict(id=11, name="7")), ["'7'", "same name"]),
        (lambda c: c["categories"][3].update(id=1), ["ids of categories", "1"]),
        (lambda c: c["images"][3].update(id=c["images"][0]["id"]), ["ids of images"]),
        (lambda c: c["annotations"][1].update(category_id=11), ["category_id 11"]),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, float("nan"), 4]), ["bbox", "nan"]),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), ["bbox", "[1, 2, 3]"]),
        (lambda c: c["annotations"][1].pop("area"), ["'area'"]),
        (lambda c: c.pop("categories"), ["'categories'"]),
        (set_all("annotations", "image_id", str), ["no image of the file"]),
        (set_all("annotations", "bbox", [0.1, 0.1, 0.5, 0.5]), ["a pixel"]),
        (lambda c: c["annotations"][1].pop("segmentation"), ["1 annotations have no segmentation", "00000.jpg"]),
        (lambda c: c["annotations"][1].update(segmentation=[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]), ["00000.jpg"]),
    ],
)
def test_annotations_that_do_not_fit_are_refused(scenes, build, change, words):
    path = change_annotations(scenes, change)
    with pytest.raises(UserError) as refused:
        build(DETECTOR, "train")
    message = str(refused.value)
    assert all(word in message for word in [*words, "images" if words[-1] == "00000.jpg" else str(path)])
    assert "\n" not in message


@pytest.mark.parametrize("loops", [("train", "val"), ("test",)])
def test_the_validation_file_is_checked_before_training(scenes, build, loops):
    path = change_annotations(scenes, lambda c: c["categories"][7].update(name="seven"), "validation")
    with pytest.raises(UserError, match="'seven'") as refused:
        build(DETECTOR, *loops)
    assert str(path) in str(refused.value)


def test_images_that_do_not_fit_are_refused(scenes, build):
    image = scenes / "images" / "training" / "00002.jpg"
    with Image.open(image) as opened:
        opened.resize((48, 96)).save(image)
    with pytest.raises(UserError, match="48 x 96 .* 96 x 96") as refused:
        build(DETECTOR, "train")
    assert str(image) in str(refused.value)
    image.unlink()
    with pytest.raises(UserError, match="00002.jpg"):
        build(DETECTOR, "train")


def test_what_is_left_out_is_logged(scenes, build, warnings):
    def change(content):
        first = content["annotations"][0]
        content["categories"].append(dict(id=11, name="ten"))
        content["annotations"] += [
            {**first, "id": 1001, "bbox": [1, 1, 0, 5]},
            {**first, "id": 1002, "image_id": 77},
            {**first, "id": 1003, "bbox": [50, 50, 90, 90]},
        ]

    change_annotations(scenes, change)
    build(DETECTOR, "train")
    for word in ("'ten'", "1001", "1002", "1003"):
        assert sum(word in message and "instances_training.json" in message for message in warnings) == 1, warnings


def test_a_part_of_the_categories_may_be_the_classes(build, warnings):
    heads = {f"model__roi_head__{head}__num_classes": 4 for head in ("bbox_head", "mask_head")}
    classes = {"train_dataloader__dataset__metainfo__classes": ("2", "3", "5", "7")}
    dataset = build(DETECTOR, "train", **heads, **classes).train_dataloader.dataset
    assert len(dataset) and any("'0', '1', '4', '6', '8', '9'" in message for message in warnings)
    with pytest.raises(UserError, match="bbox_head.num_classes is 10.* 4 classes"):
        build(DETECTOR, "train", **classes)
    classes["train_dataloader__dataset__metainfo__classes"] = ("3", "2", "5", "7")  # mmdet would swap their names
    with pytest.raises(UserError, match="'2' where .* '3'"):
        build(DETECTOR, "train", **heads, **classes)


def test_the_evaluator_s_annotations_are_checked(scenes, build):
    path = scenes / "annotations" / "instances_validation.json"
    content = json.loads(path.read_text())
    other = path.with_name("other.json")
    cases = [
        ({**content, "images": content["images"][1:]}, "lacks images"),
        ({**content, "annotations": [{**a, "segmentation": []} for a in content["annotations"]]}, "no segmentation"),
        ({**content, "categories": content["categories"][::-1]}, "where"),
    ]
    for changed, words in cases:
        other.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words) as refused:
            build(DETECTOR, "val", val_evaluator__ann_file=str(other))
        assert str(other) in str(refused.value)


# Segmentation


def changed_map(path, change):
    with Image.open(path) as image:
        changed = change(np.array(image))
    Image.fromarray(changed).save(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels: np.where(labels == 0, 12, labels).astype("uint8"), "12.* 0 to 10"),
        (lambda labels: np.stack([labels] * 3, -1), "3 channels"),
        (lambda labels: labels.astype("uint16") * 256, r"values \d{3,4};"),
        (lambda labels: labels[::2], "pixels"),
    ],
)
@pytest.mark.parametrize("split", ["training", "validation"])
def test_label_maps_that_do_not_fit_are_refused(scenes, build, change, words, split):
    path = scenes / "annotations" / split / "00001.png"
    changed_map(path, change)
    with pytest.raises(UserError, match=words) as refused:
        build(SEGMENTOR, "train", "val")
    assert str(path) in str(refused.value)


def test_a_missing_label_map_is_named(scenes, build):
    path = scenes / "annotations" / "validation" / "00001.png"
    path.unlink()
    with pytest.raises(UserError, match="no file") as refused:
        build(SEGMENTOR, "train", "val")
    assert str(path) in str(refused.value)


def test_ignored_and_reduced_labels_are_allowed(scenes, build, warnings):
    path = scenes / "annotations" / "training" / "00001.png"
    changed_map(path, lambda labels: np.where(labels == 0, 255, labels).astype("uint8"))
    build(SEGMENTOR, "train")
    changed_map(path, lambda labels: np.where(labels == 255, 11, labels).astype("uint8"))
    reduced = dict(train_dataloader__dataset__reduce_zero_label=True)
    build(SEGMENTOR, "train", **reduced)
    changed_map(path, lambda labels: np.where(labels == 11, 12, labels).astype("uint8"))
    with pytest.raises(UserError, match="12.* 1 to 11"):
        build(SEGMENTOR, "train", **reduced)
    assert not warnings


def test_label_maps_of_0_and_255_are_noticed(scenes, build, warnings):
    for path in (scenes / "annotations" / "training").glob("*.png"):
        changed_map(path, lambda labels: np.where(labels > 0, 255, 0).astype("uint8"))
    build(SEGMENTOR, "train")
    assert len(warnings) == 1 and "255" in warnings[0] and "'background'" in warnings[0]


def test_a_segmentor_s_number_of_classes_is_checked(build):
    with pytest.raises(UserError, match="decode_head.num_classes is 12.* 11 classes"):
        build(SEGMENTOR, "train", model__decode_head__num_classes=12)
