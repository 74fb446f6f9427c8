"""The classes of data and of models: their names, the part of ImageNet that they are, the labels of ImageNet-ReaL."""

import re
from collections import Counter
from pathlib import Path

from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.images import UNREADABLE, file_name
from ..errors import UserError

__all__ = [
    "RealLabels", "are_synsets", "class_name", "default_num_classes", "drawable", "matching_outputs",
    "model_class_names", "read_class_names", "readable_names",
]  # fmt: skip


def are_synsets(names: list[str] | None) -> bool:
    """Return whether classes are named as ImageNet names them: n01440764."""
    return bool(names) and all(re.fullmatch(r"n\d{8}", str(name)) for name in names)


def default_num_classes(names: list[str] | None) -> int | None:
    """Return how many classes a model has for data of these classes if nothing else says it.

    It is 1000 for a part of ImageNet-1k, else the number of names; None if there are no names.
    """
    if are_synsets(names) and set(names) <= set(ImageNetInfo("imagenet-1k").label_names()):
        return 1000
    return names and len(names)


def matching_outputs(names: list[str] | None, model: nn.Module) -> list[int] | None:
    """Return the model's outputs for the classes of the data; None if the classes are the model's in its order.

    The model's classes are known by the names in its checkpoint, or by ImageNet's synsets.

    Raises:
        UserError: If the data has a class that the model does not know, or another number of classes.
    """
    if not names:
        return None
    known = list(model.pretrained_cfg.get("label_names") or ())
    if len(known) != model.num_classes:
        subset = infer_imagenet_subset(model)
        is_part = subset and are_synsets(names) and len(names) < model.num_classes
        known = ImageNetInfo(subset).label_names() if is_part else None
    if known and names != known and names != [str(i) for i in range(len(names))]:
        index = {name: i for i, name in enumerate(known)}
        if unknown := [name for name in names if name not in index]:
            raise UserError(
                f"the data has classes that the model was not trained on: {unknown[:5]}; it knows "
                f"{known[:5]}{' ...' if len(known) > 5 else ''}"
            )
        return [index[name] for name in names]
    if len(names) != model.num_classes:
        raise UserError(f"the data has {len(names)} classes, the model {model.num_classes}")
    return None


# Names


def class_name(names: list[str] | None, index: int) -> str:
    """Return a class's name, or its number if it has none."""
    return str(names[index] if names and index < len(names) else index)


def readable_names(names: list[str] | None) -> list[str] | None:
    """Return the names of classes, in English if they are synsets: tench for n01440764."""
    if not are_synsets(names):
        return names
    english = ImageNetInfo("imagenet-22k-ms").label_descriptions(as_dict=True)
    words = [english.get(name, name).split(",")[0] for name in names]
    count = Counter(words)  # there are two cranes
    return [word if count[word] == 1 else f"{word} ({name})" for word, name in zip(words, names)]


def model_class_names(model: nn.Module) -> list[str]:
    """Return a name for every class of a model: those in its checkpoint, else ImageNet's, else the numbers."""
    names = model.pretrained_cfg.get("label_names") or ()
    if len(names) == model.num_classes:
        return readable_names([str(name) for name in names])
    if subset := infer_imagenet_subset(model):
        return ImageNetInfo(subset).label_descriptions()
    return [str(index) for index in range(model.num_classes)]


def read_class_names(path: str, count: int) -> list[str]:
    """Return the class names in a text file, one a line.

    Raises:
        UserError: If the file has not ``count`` lines.
    """
    names = Path(path).read_text(encoding="utf-8-sig").splitlines()
    if len(names) != count:
        raise UserError(f"{path} has {len(names)} lines, the model {count} classes: give one name a line")
    return names


def drawable(text: str) -> str:
    """Return a text with escapes in place of what the font of matplotlib's pictures has no glyphs for."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(
        char if font.get_char_index(ord(char)) else char.encode("ascii", "backslashreplace").decode() for char in text
    )


# ImageNet-ReaL


class RealLabels:
    """Collects top-1 and top-5 against ImageNet-ReaL: several labels an image; images without a label do not count.

    Args:
        dataset: The 50,000 validation images of ImageNet-1k in any order, by their names.

    Raises:
        UserError: If it is other images.
    """

    def __init__(self, dataset: Dataset):
        files = [Path(file_name(dataset, index)).name for index in range(len(dataset))]
        if sorted(files) != [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 50001)]:
            raise UserError(
                f"--real-labels takes the 50,000 validation images of ImageNet, ILSVRC2012_val_00000001.JPEG and so "
                f"on, not {len(files):,} images such as {files[0]}"
            )
        self.evaluator = RealLabelsImagenet(files)

    def add(self, images: Tensor, target: Tensor, logits: Tensor) -> None:
        """Count a batch: images (B, C, H, W), classes (B,) and logits (B, 1000)."""
        if logits.shape[1] != 1000:
            raise UserError(f"--real-labels takes models of ImageNet-1k, not of {logits.shape[1]} classes")
        for offset in (target == UNREADABLE).nonzero()[:, 0].tolist():
            self.evaluator.real_labels[self.evaluator.filenames[self.evaluator.sample_idx + offset]] = []
        self.evaluator.add_result(logits)

    def figures(self) -> dict[str, float]:
        """Return both in percent."""
        return dict(real_top1=self.evaluator.get_accuracy(1), real_top5=self.evaluator.get_accuracy(5))
