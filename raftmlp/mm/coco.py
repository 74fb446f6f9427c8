"""Annotation files in COCO's format: what mmdet would drop, shift or mix up without a word is refused or logged."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from ..errors import UserError

_logger = logging.getLogger(__name__)


class DataError(UserError):
    """Data do not fit their config, or a file cannot be read; the message names the file."""


def check_coco_files() -> None:
    """Let mmdet's datasets check the COCO annotations that they read; calling it again changes nothing."""
    from mmdet.datasets import CocoDataset  # registers all of mmdet's datasets, so not at import

    CocoDataset.COCOAPI = _read  # mmdet calls a class here; a function is called as a method


def _read(dataset, path: str):
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.api_wrappers import COCO

    file, classes = dataset.ann_file, dataset.metainfo["classes"]
    try:
        annotations = COCO(path)
        # Objects365's own function sorts the categories before it numbers them
        in_order = type(dataset).load_data_list is CocoDataset.load_data_list
        check_categories(annotations.dataset, classes, file, in_order)
        _check_annotations(annotations.dataset, file)
    except KeyError as error:
        raise DataError(f"{file}, or an entry in it, has no {error}") from error
    further = [entry["name"] for entry in annotations.dataset["categories"] if entry["name"] not in classes]
    if further:
        _logger.warning(f"{file}: categories that the config's classes leave out: {listed(further)}")
    return annotations


def check_categories(content: dict, classes: Sequence[str], file: str, in_order: bool = True) -> None:
    """Refuse categories that are not the config's classes; further ones are allowed.

    mmdet numbers the classes as the file lists them and skips names that it does not find, which shifts the others.

    Raises:
        DataError: If a class is missing, they come in another order, or an id of a category or an image is repeated.
    """
    for part in ("categories", "images"):
        if repeated := [key for key, count in Counter(entry["id"] for entry in content[part]).items() if count > 1]:
            raise DataError(f"{file} repeats ids of {part}: {listed(repeated)}")
    names = [category["name"] for category in content["categories"]]
    if missing := [name for name in classes if name not in names]:
        further = listed([name for name in names if name not in classes])
        raise DataError(
            f"{file} has no category {listed(missing)}, which the config's classes name"
            f"{f'; it has {further}, which they do not name' if further else ''}: rename them in the file, or set "
            "metainfo.classes of the datasets"
        )
    found = [name for name in names if name in classes]
    if repeated := [name for name, count in Counter(found).items() if count > 1]:
        raise DataError(f"{file} has several categories of the same name: {listed(repeated)}")
    if in_order and found != list(classes):
        place, name = next((place, name) for place, name in enumerate(found) if name != classes[place])
        raise DataError(
            f"{file} has category {name!r} where the config's classes have {classes[place]!r} (number {place}): mmdet "
            "numbers them in the file's order, so give metainfo.classes in that order"
        )


def _check_annotations(content: dict, file: str) -> None:
    """Refuse annotations that mmdet would misread; those that it leaves out are counted and logged."""
    images = {image["id"]: (image["width"], image["height"], image["file_name"]) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    annotations = content.get("annotations", [])
    odd = defaultdict(list)
    for annotation in annotations:
        number, box, area = annotation["id"], annotation["bbox"], annotation["area"]
        if annotation["category_id"] not in categories:
            raise DataError(f"{file}: annotation {number} has the unknown category_id {annotation['category_id']!r}")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
            raise DataError(f"{file}: the bbox of annotation {number} is {box}, not left, top, width and height")
        if annotation["image_id"] not in images:
            odd["belong to no image of the file and are left out"].append(number)
            continue
        width, height, _ = images[annotation["image_id"]]
        right, bottom = box[0] + box[2], box[1] + box[3]
        is_inside = min(right, width) > max(box[0], 0) and min(bottom, height) > max(box[1], 0)
        if not is_inside or min(box[2:]) < 1 or area <= 0:  # mmdet's conditions
            odd["have no area of at least a pixel in their image and are left out"].append(number)
        elif right > width + 1 or bottom > height + 1:
            odd["reach beyond their image; a bbox is left, top, width and height"].append(number)
    for problem, numbers in odd.items():
        message = f"{file}: {len(numbers)} of {len(annotations)} annotations {problem} (id {listed(numbers, 3)})"
        if len(numbers) == len(annotations):
            raise DataError(message)
        _logger.warning(message)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_coco_metric(metric, dataset, file: str) -> None:
    """Refuse mmdet's COCO metric whose annotations do not fit the dataset that it evaluates.

    Raises:
        DataError: If they are of other classes or images, or have no masks to compare with.
    """
    content, classes = metric._coco_api.dataset, dataset.metainfo["classes"]
    check_categories(content, classes, file)
    images = {dataset.get_data_info(i)["img_id"] for i in range(len(dataset))}
    if unknown := images - metric._coco_api.imgs.keys():
        raise DataError(f"{file}, which the evaluator reads, lacks images of the dataset: id {listed(sorted(unknown))}")
    if "segm" in metric.metrics and not metric.format_only:
        numbers = {category["id"] for category in content["categories"] if category["name"] in classes}
        evaluated = [a for a in content.get("annotations", []) if a["category_id"] in numbers]
        if bare := [a["id"] for a in evaluated if not a.get("segmentation")]:
            raise DataError(f"{file}: {len(bare)} annotations have no segmentation to evaluate (id {listed(bare, 3)})")


def listed(values: Sequence, limit: int = 10) -> str:
    """Return values in words: the first ones, and how many there are besides."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(repr, values[:limit])) + more
