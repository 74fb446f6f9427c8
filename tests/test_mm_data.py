"""Data that do not fit a config are refused in a line that names the file; what is left out is logged."""

import json
import shutil

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, METRICS
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch.utils.data import DataLoader

from helpers import ROOT
from raftmlp.data.scenes import write_scenes
from raftmlp.errors import UserError
from raftmlp.mm import data
from raftmlp.mm.checkpoints import patch_mmengine
from raftmlp.mm.configs import read_config

CONFIGS = dict(detector="detection/mask_rcnn_raftmlp_digits.py", segmentor="segmentation/fpn_raftmlp_digits.py")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=4, val=2, size=64)
    return root


@pytest.fixture
def scenes(original, tmp_path):
    return shutil.copytree(original, tmp_path / "scenes")


@pytest.fixture(scope="module")
def configs():
    """Configs by their kind, and their models without weights."""
    patch_mmengine()
    data.check_coco_files()
    built = {}
    for kind, path in CONFIGS.items():
        config = read_config(ROOT / "configs" / path)
        init_default_scope(config.default_scope)
        with torch.device("meta"):
            built[kind] = config, MODELS.build(config.model)
    return built


@pytest.fixture
def check(scenes, configs):
    """Build a dataset of a config on the scenes, and check it as the commands do; returns it."""

    def check_dataset(kind, loop="train", **changes):
        config, model = configs[kind]
        init_default_scope(config.default_scope)
        dataset = DATASETS.build({**config[f"{loop}_dataloader"].dataset, "data_root": str(scenes), **changes})
        metric = dict(config.val_evaluator)
        if kind == "detector":
            metric["ann_file"] = str(scenes / "annotations" / "instances_validation.json")
        evaluator = Evaluator(METRICS.build(metric)) if loop == "val" else None
        data.check_data(dataset, model, evaluator, f"{loop}_evaluator")
        return dataset

    return check_dataset


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(data._logger, "warning", messages.append)
    return messages


def change_annotations(root, change, split="training"):
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Detection


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["categories"][7].update(name="seven"), "'7'"),
        (lambda c: c["categories"].reverse(), "'9' where the config's classes have '0'"),
        (lambda c: c["categories"][3].update(id=1), "ids of categories: 1"),
        (lambda c: c.pop("categories"), "categories"),
        (lambda c: [a.update(image_id=str(a["image_id"])) for a in c["annotations"]], "no annotation"),
        (lambda c: c["annotations"][1].pop("segmentation"), "no segmentation"),
        (lambda c: c["images"][2].update(width=48), r"2.jpg .*\(64, 64\).* \(64, 48\)"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(scenes, check, change, words):
    change_annotations(scenes, change)
    with pytest.raises(UserError, match=words) as refused:
        check("detector")
    assert str(scenes) in str(refused.value)


def test_what_is_left_out_is_logged(scenes, check, warnings):
    def change(content):
        first = content["annotations"][0]
        content["categories"].append(dict(id=11, name="ten"))
        content["annotations"] += [
            {**first, "id": 1001, "bbox": [1, 1, 0, 5]},
            {**first, "id": 1002, "image_id": 77},
            {**first, "id": 1003, "bbox": [30, 30, 60, 60]},
        ]

    change_annotations(scenes, change)
    check("detector")
    for word in ("'ten'", " 2 annotations are left out", " 1 bboxes reach beyond"):
        assert sum(word in message and "instances_training.json" in message for message in warnings) == 1, warnings


def test_a_part_of_the_categories_may_be_the_classes(check):
    with pytest.raises(UserError, match="bbox_head.num_classes is 10.* 4 classes"):
        check("detector", metainfo=dict(classes=("2", "3", "5", "7")))
    with pytest.raises(UserError, match="'2' where .* '3'"):  # mmdet would swap their names
        check("detector", metainfo=dict(classes=("3", "2", "5", "7")))


def test_the_evaluator_s_annotations_are_checked(scenes, check):
    other = "annotations/instances_other.json"
    shutil.copy(scenes / "annotations" / "instances_validation.json", scenes / other)
    assert len(check("detector", "val", ann_file=other)) == 2
    change_annotations(scenes, lambda c: c["annotations"][0].update(segmentation=[]), "validation")
    with pytest.raises(UserError, match="val_evaluator .*no segmentation"):
        check("detector", "val", ann_file=other)
    change_annotations(scenes, lambda c: c["images"].pop(0), "validation")
    with pytest.raises(UserError, match="val_evaluator .*lacks images"):
        check("detector", "val", ann_file=other)


# Segmentation


def change_map(path, change):
    with Image.open(path) as image:
        changed = change(np.array(image))
    Image.fromarray(changed).save(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels: np.where(labels == 0, 12, labels).astype("uint8"), "12; .* 0 to 10"),
        (lambda labels: np.stack([labels] * 3, -1), "64, 64, 3"),
        (lambda labels: labels.astype("uint16") * 256, r"values \d{3,4};"),
        (lambda labels: labels[::2], "32, 64"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused(scenes, check, change, words):
    change_map(scenes / "annotations" / "validation" / "00001.png", change)
    with pytest.raises(UserError, match=f"validation/00001.png .*{words}"):
        check("segmentor", "val")


def test_ignored_and_reduced_labels_are_allowed(scenes, check, warnings):
    path = scenes / "annotations" / "training" / "00001.png"
    change_map(path, lambda labels: np.where(labels == 0, 255, labels).astype("uint8"))
    check("segmentor")
    change_map(path, lambda labels: np.where(labels == 255, 11, labels).astype("uint8"))
    check("segmentor", reduce_zero_label=True)
    change_map(path, lambda labels: np.where(labels == 11, 12, labels).astype("uint8"))
    with pytest.raises(UserError, match="12; .* 1 to 11"):
        check("segmentor", reduce_zero_label=True)
    assert not warnings
    for path in (scenes / "annotations" / "training").glob("*.png"):
        change_map(path, lambda labels: np.where(labels > 0, 255, 0).astype("uint8"))
    check("segmentor")
    assert len(warnings) == 1 and "0, 255" in warnings[0]


# Files


@pytest.mark.parametrize(
    ("kind", "file"), [("detector", "images/training/00003.jpg"), ("segmentor", "annotations/training/00003.png")]
)
def test_missing_and_damaged_files_are_named(scenes, check, monkeypatch, kind, file):
    """In the sample, or when another process loads them."""
    path = scenes / file
    path.write_bytes(b"no image")
    with pytest.raises(UserError, match=file):
        check(kind)
    monkeypatch.setattr(data, "SAMPLED", 1)
    loader = DataLoader(check(kind), num_workers=1, collate_fn=list)
    with pytest.raises(UserError) as refused:
        list(loader)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    path.unlink()
    with pytest.raises(UserError, match=f"no file .*{file}"):
        check(kind)
