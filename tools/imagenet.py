"""What timm knows of ImageNet: which of a model's outputs a part of it has, names in English, the labels of ReaL."""

import re
from collections import Counter
from pathlib import Path

from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset
from torch import Tensor, nn
from torch.utils.data import Dataset

import cli
import loaders


def are_synsets(names: list[str] | None) -> bool:
    """Return whether classes are named as ImageNet names them: n01440764."""
    return bool(names) and all(re.fullmatch(r"n\d{8}", str(name)) for name in names)


def classes_to_build(names: list[str] | None) -> int | None:
    """Return how many classes a model for the data tells apart where nothing else says it; a part of ImageNet: 1000."""
    if are_synsets(names) and set(names) <= set(ImageNetInfo("imagenet-1k").label_names()):
        return 1000
    return names and len(names)


def outputs_for(names: list[str] | None, model: nn.Module) -> list[int] | None:
    """Return the model's outputs for the classes of the data; None where these are the model's classes as they are.

    The model's classes are known by the names that its checkpoint tells, or by ImageNet's synsets.

    Raises:
        UserError: If the data has a class that the model does not know, or another number of classes.
    """
    if not names:
        return None
    known = list(model.pretrained_cfg.get("label_names") or ())
    if len(known) != model.num_classes:
        subset = infer_imagenet_subset(model)
        part = subset and are_synsets(names) and len(names) < model.num_classes
        known = ImageNetInfo(subset).label_names() if part else None
    if known and names != known and names != [str(i) for i in range(len(names))]:
        index = {name: i for i, name in enumerate(known)}
        if strange := [name for name in names if name not in index]:
            raise cli.UserError(
                f"the data has classes that the model was not trained on: {strange[:5]}; it knows "
                f"{known[:5]}{' ...' if len(known) > 5 else ''}"
            )
        return [index[name] for name in names]
    if len(names) != model.num_classes:
        raise cli.UserError(f"the data has {len(names)} classes, the model tells {model.num_classes} apart")
    return None


def names_for_people(names: list[str] | None) -> list[str] | None:
    """Return the names of classes, in English where they are synsets: tench for n01440764."""
    if not are_synsets(names):
        return names
    english = ImageNetInfo("imagenet-22k-ms").label_descriptions(as_dict=True)
    words = [english.get(name, name).split(",")[0] for name in names]
    count = Counter(words)  # there are two cranes
    return [word if count[word] == 1 else f"{word} ({name})" for word, name in zip(words, names)]


class RealLabels:
    """Collects top-1 and top-5 against ImageNet-ReaL: several labels an image, none for some, which do not count.

    Args:
        dataset: The 50,000 validation images of ImageNet-1k in any order, by their names.

    Raises:
        UserError: If it is other images.
    """

    def __init__(self, dataset: Dataset):
        files = [Path(loaders.file_name(dataset, index)).name for index in range(len(dataset))]
        wanted = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 50001)]
        if sorted(files) != wanted:
            others = sorted(set(files) - set(wanted))
            raise cli.UserError(
                f"--real-labels takes the 50,000 validation images of ImageNet, {wanted[0]} and so on; the data has "
                f"{len(files):,} images{f', {others[0]} among them' if others else ''}"
            )
        self.evaluator = RealLabelsImagenet(files)

    def add(self, images: Tensor, target: Tensor, logits: Tensor) -> None:
        """Look at a batch."""
        for offset in (target == loaders.UNREAD).nonzero()[:, 0].tolist():
            self.evaluator.real_labels[self.evaluator.filenames[self.evaluator.sample_idx + offset]] = []
        self.evaluator.add_result(logits)

    def figures(self) -> dict[str, float]:
        """Return both in percent."""
        return dict(real_top1=self.evaluator.get_accuracy(1), real_top5=self.evaluator.get_accuracy(5))
