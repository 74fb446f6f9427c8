"""The data of a config: files that are missing, are damaged or do not fit are named, early where that is cheap."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from PIL import Image
from torch import nn

from ..errors import MissingFileError, UserError, first_words
from .coco import DataError, check_coco_metric, listed

SAMPLED = 16  # images of a dataset that are loaded for a check before a run

_logger = logging.getLogger(__name__)


def check_files(config: Config, loops: tuple[str, ...]) -> None:
    """Refuse a config whose files of data are missing, or whose data_root is not where a data set looks.

    Raises:
        UserError: If it is one; the message names the file and the key.
    """
    for loop in loops:
        dataset = config.get(f"{loop}_dataloader", {}).get("dataset", {})
        while "dataset" in dataset:  # inside of RepeatDataset and the like
            dataset = dataset["dataset"]
        root = dataset.get("data_root") or ""
        files = dict(ann_file=dataset.get("ann_file"), **(dataset.get("data_prefix") or {}))
        paths = {f"{loop}_dataloader.dataset {key}": os.path.join(root, value) for key, value in files.items() if value}
        evaluator = config.get(f"{loop}_evaluator") if loop != "train" else None
        if isinstance(evaluator, dict) and evaluator.get("ann_file"):
            paths[f"{loop}_evaluator.ann_file"] = evaluator["ann_file"]
        data_root = config.get("data_root")
        if data_root and paths and not any(path.startswith(data_root) for path in paths.values()):
            raise UserError(
                f"the config's data_root is {data_root}, but {loop}_dataloader.dataset looks into "
                f"{root or next(iter(paths.values()))}: the one does not change with the other; give --data-dir"
            )
        for key, path in paths.items():
            if "://" not in path and not os.path.exists(path):
                raise MissingFileError(f"no data at {path} ({key}): name the folder with --data-dir")


# The datasets that are built


def check_data(dataset, model: nn.Module, evaluator=None, settings: Sequence[dict] = ()) -> None:
    """Refuse data that do not fit the model or each other; from here on the dataset checks every file that it loads.

    Args:
        dataset: A dataset of mmdet or mmseg, or a wrapper of some.
        model: What is trained or evaluated on it.
        evaluator: mmengine's evaluator, if it is no training.
        settings: The config of each of the evaluator's metrics.

    Raises:
        UserError: If they do not; the message names the file, or the part of the config.
    """
    classes, parts, present = dataset.metainfo.get("classes") or (), list(_parts(dataset)), set()
    if not any(getattr(part, "return_classes", False) for part in parts):  # those models take classes as text
        things = dataset.metainfo.get("thing_classes") or classes  # of panoptic segmentation
        check_heads(model, things, f"the dataset of {getattr(parts[0], 'ann_file', '') or 'the config'}")
    readers = evaluator.metrics if evaluator else [head for _, head in _heads(model)]
    ignored = {reader.ignore_index for reader in readers if hasattr(reader, "ignore_index")}
    for part in parts:
        part.pipeline = _Pipeline(part, classes, ignored)
        present |= _check_entries(part, classes)
        _check_sample(part, classes, ignored)
    if present and evaluator is None and (absent := [name for i, name in enumerate(classes) if i not in present]):
        _logger.warning(f"{parts[0].ann_file}: nothing to train on of the classes {listed(absent)}")
    for metric, setting in zip(evaluator.metrics if evaluator else (), settings):
        if getattr(metric, "_coco_api", None):
            check_coco_metric(metric, dataset, setting["ann_file"])


def check_heads(model: nn.Module, classes: Sequence[str], source: str) -> None:
    """Refuse a model whose heads have another number of classes than their source.

    Raises:
        UserError: If it is one.
    """
    for name, head in _heads(model):
        if classes and head.num_classes != len(classes) and not getattr(head, "class_agnostic", False):
            raise UserError(f"model.{name}.num_classes is {head.num_classes}, but {source} has {len(classes)} classes")


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


def _check_entries(dataset, classes: Sequence[str]) -> set[int]:
    """Look through a dataset's entries for missing files, masks and classes; returns the labels of its objects."""
    needs = {name for name in ("with_mask", "with_seg") for step in dataset.pipeline.loaders if getattr(step, name, 0)}
    keys = ("img_path", "seg_map_path") if "with_seg" in needs else ("img_path",)
    missing, bare, labels = [], [], set()
    for index in range(len(dataset)):
        entry = dataset.get_data_info(index)
        paths = [entry[key] for key in keys if isinstance(entry.get(key), str)]
        missing += [path for path in paths if "://" not in path and not os.path.exists(path)]
        for instance in entry.get("instances", ()):
            labels.add(instance.get("bbox_label"))
            if "with_mask" in needs and "mask" not in instance:
                bare.append(entry.get("img_path"))
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise DataError(f"no file {missing[0]}{more}, which the dataset lists")
    if bare:
        raise DataError(
            f"{dataset.ann_file}: {len(bare)} annotations have no segmentation, which the config's masks need; the "
            f"first is of {bare[0]}"
        )
    labels.discard(None)
    if labels and max(labels) >= len(classes):
        raise DataError(f"{dataset.ann_file} has the label {max(labels)}, the config has {len(classes)} classes")
    return labels


def _check_sample(dataset, classes: Sequence[str], ignored: set[int]) -> None:
    """Load some of a dataset's images and annotations, evenly spaced; their errors would end the run later."""
    pipeline, values = dataset.pipeline, set()
    if not pipeline.loaders or pipeline.transforms[0] is not pipeline.loaders[0]:  # nothing to load before other steps
        return
    indices = sorted({len(dataset) * i // SAMPLED for i in range(SAMPLED)})
    for index in indices:
        loaded = pipeline.load(dataset.get_data_info(index))
        if loaded and "seg_fields" in loaded and "gt_seg_map" in loaded:
            values |= set(np.unique(loaded["gt_seg_map"]).tolist())
    if values and len(values - ignored) < 2 <= len(classes):
        found = listed([classes[value] for value in values - ignored]) or "none"
        _logger.warning(
            f"{dataset.data_prefix.get('seg_map_path')}: {len(indices)} sampled label maps have only class {found}, "
            f"and the value {listed(sorted(ignored))} is ignored: do their values number the classes?"
        )


class _Pipeline:
    """A dataset's pipeline that checks what its steps load, and whose errors name the file."""

    def __init__(self, dataset, classes: Sequence[str], ignored: set[int]):
        self.transforms, self.classes, self.ignored = dataset.pipeline.transforms, classes, ignored
        self.loaders = [step for step in self.transforms if type(step).__name__.startswith("Load")]

    def __call__(self, data: dict) -> dict | None:
        return self._run(data, self.transforms)

    def load(self, data: dict) -> dict | None:
        """Run the steps that load files, and no others."""
        return self._run(data, self.loaders)

    def _run(self, data: dict | None, steps: list) -> dict | None:
        for step in steps:
            data = self._load(data, step) if step in self.loaders else step(data)
            if data is None:
                return None
        return data

    def _load(self, data: dict, step) -> dict | None:
        files = [data[key] for key in ("img_path", "seg_map_path") if data.get(key)]
        try:
            loaded = step(data)
        except Exception as error:  # the readers raise anything on what is no image and no annotation
            for file in files:
                try:
                    with Image.open(file) as image:
                        image.load()
                except OSError as reason:
                    raise DataError(f"cannot read {file}: {first_words(reason)}") from error
            reason = f"{type(error).__name__}: {first_words(error)}"
            raise DataError(f"cannot load {' and '.join(map(str, files))}, or its annotations: {reason}") from error
        size = tuple(loaded["ori_shape"][:2]) if loaded and "ori_shape" in loaded else None
        if size and size != (loaded.get("height", size[0]), loaded.get("width", size[1])):
            raise DataError(
                f"{files[0]} has {size[1]} x {size[0]} pixels, but its annotations are of {loaded['width']} x "
                f"{loaded['height']}"
            )
        if type(step).__name__ == "LoadAnnotations" and loaded and "seg_fields" in loaded:  # mmseg's
            self._check_label_map(loaded["gt_seg_map"], loaded["seg_map_path"], size, loaded["reduce_zero_label"])
        return loaded

    def _check_label_map(self, labels: np.ndarray, file: str, size: tuple[int, int] | None, reduced: bool) -> None:
        if labels.ndim != 2:
            raise DataError(f"{file} is no label map: it has {labels.shape[-1]} channels, not one that numbers classes")
        if size and labels.shape != size:
            width, height = labels.shape[::-1]
            raise DataError(f"{file} has {width} x {height} pixels, its image has {size[1]} x {size[0]}")
        limit, first = max(len(self.classes), 2), int(bool(reduced))  # one class is learned as two, with a sigmoid
        values = np.flatnonzero(cv2.calcHist([labels], [0], None, [256], [0, 256]))
        wrong = [int(value) + first for value in values if value >= limit and value not in self.ignored]
        with suppress(OSError), Image.open(file) as image:
            if image.mode.startswith("I") and (highest := np.max(image)) > 255:  # mmseg keeps the lower 8 bits
                wrong = [int(highest)]
        if wrong:
            raise DataError(f"{file} has the values {listed(wrong)}; the config's are {first} to {limit + first - 1}")


@contextmanager
def data_errors() -> Iterator[None]:
    """Turn the error of a checked dataset, of another process too, into one line."""
    try:
        yield
    except DataError as error:  # of another process it is the last line
        raise UserError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from error
