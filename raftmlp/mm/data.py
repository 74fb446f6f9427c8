"""The data of a config: what mmdet and mmseg would drop, shift or misread without a word is refused or logged."""

import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from PIL import Image
from torch import nn

from ..errors import UserError, first_words

SAMPLED = 16  # images of a dataset that are loaded for a check before a run

_logger = logging.getLogger(__name__)


class DataError(UserError):
    """Data do not fit their config, or a file cannot be read; the message names the file."""

    def __str__(self) -> str:  # of a worker, torch gives the traceback, whose last line is the message
        return super().__str__().strip().splitlines()[-1].removeprefix(f"{__name__}.DataError: ")


def check_data_root(config: Config, loops: Sequence[str]) -> None:
    """Refuse a config whose data_root is not where a data set looks: the one does not change with the other."""
    for loop in loops:
        dataset = config[f"{loop}_dataloader"].dataset
        while "dataset" in dataset:  # inside of RepeatDataset and the like
            dataset = dataset["dataset"]
        names = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
        paths = [os.path.join(dataset.get("data_root") or "", name) for name in names if name]
        data_root = config.get("data_root")
        if data_root and paths and not any(path.startswith(data_root) for path in paths):
            raise UserError(
                f"the config's data_root is {data_root}, but {loop}_dataloader.dataset looks for {paths[0]}: give "
                "--data-dir"
            )


def listed(values: Sequence, limit: int = 10) -> str:
    """Return values in words: the first ones, and how many there are besides."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(repr, values[:limit])) + more


# Annotation files in COCO's format


def check_coco_files() -> None:
    """Let mmdet's datasets check the COCO annotations that they read; calling it again changes nothing."""
    from mmdet.datasets import CocoDataset  # registers all of mmdet's datasets, so not at import

    CocoDataset.COCOAPI = _read_coco  # mmdet calls a class here; a function is called as a method


def _read_coco(dataset, path: str):
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.api_wrappers import COCO

    file, classes = dataset.ann_file, dataset.metainfo["classes"]
    try:
        coco = COCO(path)
        # Objects365's own function sorts the categories before it numbers them
        check_categories(coco.dataset, classes, file, type(dataset).load_data_list is CocoDataset.load_data_list)
    except (KeyError, json.JSONDecodeError) as error:
        raise DataError(f"{file} cannot be read: {type(error).__name__} {error}") from error
    further = {key: entry["name"] for key, entry in coco.cats.items() if entry["name"] not in classes}
    if further:
        _logger.warning(f"{file}: categories that the config's classes leave out: {listed([*further.values()])}")
    annotations = [a for a in coco.anns.values() if a["category_id"] not in further]
    dataset.annotated = len(annotations)
    if "annotations" in coco.dataset and not any(a["image_id"] in coco.imgs for a in annotations):
        raise DataError(f"{file} has no annotation of an image in it and a class of the config")
    return coco


def check_categories(content: dict, classes: Sequence[str], file: str, in_order: bool = True) -> None:
    """Refuse categories that are not the config's classes in their order; further ones are allowed.

    mmdet numbers the classes as the file lists them and skips names that it does not find, which shifts the others.
    """
    for part in ("categories", "images"):
        if repeated := [key for key, count in Counter(entry["id"] for entry in content[part]).items() if count > 1]:
            raise DataError(f"{file} repeats ids of {part}: {listed(repeated)}")
    names = [category["name"] for category in content["categories"]]
    found, wanted = [name for name in names if name in classes], list(classes)
    if not in_order:
        found, wanted = sorted(found), sorted(wanted)
    for name, expected in zip_longest(found, wanted):
        if name != expected:
            raise DataError(
                f"{file} has the category {name!r} where the config's classes have {expected!r}; mmdet numbers them in "
                f"the file's order, so give metainfo.classes in that order. The file has {listed(names, 100)}"
            )


def _check_coco_metric(metric, dataset, source: str) -> None:
    """Refuse mmdet's COCO metric whose annotations are of other classes or images than the dataset, or lack masks."""
    coco, classes = metric._coco_api, dataset.metainfo["classes"]
    check_categories(coco.dataset, classes, source)
    if unknown := {dataset.get_data_info(i)["img_id"] for i in range(len(dataset))} - coco.imgs.keys():
        raise DataError(f"{source} lacks images of the dataset: id {listed(sorted(unknown))}")
    if "segm" in metric.metrics and not metric.format_only:
        wanted = {key for key, category in coco.cats.items() if category["name"] in classes}
        annotations = [a for a in coco.anns.values() if a["category_id"] in wanted]
        if bare := [a["id"] for a in annotations if not a.get("segmentation")]:
            raise DataError(f"{source} has no segmentation to evaluate for annotations: id {listed(bare)}")


# The datasets that are built


def check_data(dataset, model: nn.Module, evaluator=None, name: str = "") -> None:
    """Refuse a dataset, or a wrapper of some, that does not fit its model or the evaluator of that name in the config.

    From here on the dataset checks every file that it loads.
    """
    classes, parts, present = dataset.metainfo.get("classes") or (), list(_parts(dataset)), set()
    if not any(getattr(part, "return_classes", False) for part in parts):  # those models take classes as text
        check_heads(model, dataset.metainfo.get("thing_classes") or classes)
    metrics = evaluator.metrics if evaluator else []
    ignored = {getattr(reader, "ignore_index", 255) for reader in metrics or [head for _, head in _heads(model)]}
    for part in parts:
        part.pipeline = _CheckedPipeline(part, classes, ignored)
        present |= _check_entries(part)
        states = random.getstate(), np.random.get_state()  # a run draws the same with and without the samples
        with torch.random.fork_rng(devices=[]):
            for index in sorted({len(part) * i // SAMPLED for i in range(SAMPLED)}):
                part[index]  # its errors would end the run later
        random.setstate(states[0])
        np.random.set_state(states[1])
        seen = part.pipeline.seen
        if seen and len(seen - ignored) < 2 <= len(classes):
            _logger.warning(
                f"{part.data_prefix.get('seg_map_path')}: the sampled label maps have only the values "
                f"{listed(sorted(seen))}, of which {listed(sorted(ignored))} is ignored: do they number the classes?"
            )
    if present and not evaluator and (absent := [name for i, name in enumerate(classes) if i not in present]):
        _logger.warning(f"{parts[0].ann_file}: nothing to train on of the classes {listed(absent)}")
    for metric in metrics:
        if getattr(metric, "_coco_api", None):
            _check_coco_metric(metric, dataset, f"the ann_file of {name}")


def check_heads(model: nn.Module, classes: Sequence[str]) -> None:
    """Refuse a model whose heads have another number of classes than a dataset."""
    for name, head in _heads(model):
        if classes and head.num_classes != len(classes) and not getattr(head, "class_agnostic", False):
            raise UserError(f"model.{name}.num_classes is {head.num_classes}, but the data have {len(classes)} classes")


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if re.search(r"(^|\.)(bbox|mask|decode)_head(\.\d+)?$", name) and hasattr(module, "num_classes"):
            yield name.removeprefix("module."), module


def _parts(dataset) -> Iterator:
    """Yield the datasets inside of wrappers, those with a pipeline of mmengine."""
    for part in getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]:
        if part is not None:
            yield from _parts(part)
    if isinstance(getattr(dataset, "pipeline", None), Compose):
        yield dataset


def _check_entries(dataset) -> set[int]:
    """Look through a dataset's entries for missing files and masks; returns the labels of its objects."""
    with_mask, with_map = (any(getattr(s, k, 0) for s in dataset.pipeline.loaders) for k in ("with_mask", "with_seg"))
    labels, beyond = [], 0
    for entry in map(dataset.get_data_info, range(len(dataset))):
        for path in (entry.get("seg_map_path") if with_map else None, entry.get("img_path")):
            if path and "://" not in path and not os.path.exists(path):
                raise DataError(f"no file {path}, which the dataset lists")
        for instance in entry.get("instances", ()):
            labels.append(instance["bbox_label"])
            right, bottom = instance["bbox"][2:]
            beyond += right > entry.get("width", right) + 1 or bottom > entry.get("height", bottom) + 1
            if with_mask and "mask" not in instance:
                raise DataError(f"{dataset.ann_file} has no segmentation, for the masks, of an object in {path}")
    if beyond:
        _logger.warning(f"{dataset.ann_file}: {beyond} bboxes reach beyond their image: left, top, width and height?")
    if (left_out := getattr(dataset, "annotated", 0) - len(labels)) > 0:
        _logger.warning(f"{dataset.ann_file}: {left_out} annotations are left out: no image, category or area")
    return set(labels)


class _CheckedPipeline:
    """A dataset's pipeline that checks what its steps load, and whose errors name the file."""

    def __init__(self, dataset, classes: Sequence[str], ignored: set[int]):
        self.steps, self.classes, self.ignored = dataset.pipeline.transforms, classes, ignored
        self.loaders = [step for step in self.steps if type(step).__name__.startswith("Load")]
        self.seen: set[int] = set()  # values of label maps

    def __call__(self, data: dict | None) -> dict | None:
        for step in self.steps:
            data = self._load(data, step) if step in self.loaders else step(data)
            if data is None:
                return None
        return data

    def _load(self, data: dict, step) -> dict | None:
        files = " and ".join(str(data[key]) for key in ("img_path", "seg_map_path") if data.get(key))
        try:
            loaded = step(data)
        except Exception as error:  # the readers raise anything on what is no image and no annotation
            raise DataError(f"cannot load {files}, or its annotations: {first_words(error)}") from error
        if loaded and "ori_shape" in loaded:
            size = height, width = tuple(loaded["ori_shape"][:2])
            if (stated := (loaded.get("height", height), loaded.get("width", width))) != size:
                raise DataError(f"{files} has height and width {size}, its annotations are of {stated}")
            if type(step).__name__ == "LoadAnnotations" and "seg_fields" in loaded:  # mmseg's
                self._check_label_map(loaded, size)
        return loaded

    def _check_label_map(self, loaded: dict, size: tuple[int, int]) -> None:
        labels, file = loaded["gt_seg_map"], loaded["seg_map_path"]
        if labels.shape != size:
            raise DataError(f"{file} has the shape {labels.shape}; a label map is {size}, as its image, of one channel")
        limit, first = max(len(self.classes), 2), int(bool(loaded["reduce_zero_label"]))  # one class is learned as two
        values = {int(value) for value in np.flatnonzero(np.bincount(labels.ravel()))}
        self.seen |= values
        wrong = sorted(value + first for value in values - self.ignored if value >= limit)
        with suppress(OSError), Image.open(file) as image:
            if image.mode.startswith("I") and (highest := np.max(image)) > 255:  # mmseg keeps the lower 8 bits
                wrong = [int(highest)]
        if wrong:
            raise DataError(f"{file} has the values {listed(wrong)}; the config's are {first} to {limit + first - 1}")
