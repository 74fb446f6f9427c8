"""The files of a config's data: missing and damaged ones are named."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
from mmengine.config import Config
from mmengine.dataset import Compose
from PIL import Image

from ..errors import MissingFileError, UserError, first_words


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


class _DamagedFile(Exception):
    """An image or a label map cannot be read; the message is for the user."""


class _Pipeline:
    """A data set's pipeline whose errors name the file that cannot be read."""

    def __init__(self, pipeline: Compose):
        self.pipeline = pipeline
        self.transforms = pipeline.transforms

    def __call__(self, data: dict) -> dict | None:
        try:
            return self.pipeline(data)
        except (cv2.error, OSError, AssertionError) as error:
            names = [data[key] for key in ("img_path", "seg_map_path") if data.get(key)]
            for name in names:
                try:
                    with Image.open(name) as image:
                        image.load()
                except OSError as reason:
                    raise _DamagedFile(f"cannot read {name}: {first_words(reason)}") from error
            raise


def name_damaged_files(dataset) -> None:
    """Let a data set of mmdet or mmseg, and those inside of it, name the file that it cannot read."""
    for part in getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]:
        if part is not None:
            name_damaged_files(part)
    if isinstance(getattr(dataset, "pipeline", None), Compose):
        dataset.pipeline = _Pipeline(dataset.pipeline)


@contextmanager
def damaged_files() -> Iterator[None]:
    """Turn the error of a data set that ``name_damaged_files`` prepared into a user error."""
    try:
        yield
    except _DamagedFile as error:  # of another process it is the last line
        raise UserError(str(error).strip().splitlines()[-1].rpartition("_DamagedFile: ")[2]) from error
