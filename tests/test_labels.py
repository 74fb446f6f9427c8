"""Classes by name, the parts of ImageNet, the labels of ImageNet-ReaL."""

import numpy as np
import pytest
import timm
import torch

from helpers import REAL_LABELS, NamedImages
from raftmlp.data.images import UNREADABLE
from raftmlp.errors import UserError
from raftmlp.evaluate.labels import (
    RealLabels,
    class_name,
    default_num_classes,
    matching_outputs,
    model_class_names,
    read_class_names,
    readable_names,
)


def test_readable_names():
    assert readable_names(["n01440764", "n99999999"]) == ["tench", "n99999999"]
    assert readable_names(["0", "1"]) == ["0", "1"]
    assert readable_names(None) is None


def test_class_name():
    assert class_name(["a", "b"], 1) == "b"
    assert class_name(["a", "b"], 2) == class_name(None, 2) == "2"


def test_default_num_classes():
    assert default_num_classes(["n01440764", "n01443537"]) == 1000  # tench and goldfish are of ImageNet-1k
    assert default_num_classes(["n01440764", "n00000001"]) == 2
    assert default_num_classes(["a", "b", "c"]) == 3
    assert default_num_classes(None) is None


def test_matching_outputs():
    model = timm.create_model("raftmlp_digits", num_classes=3)
    model.pretrained_cfg["label_names"] = ("cat", "dog", "fox")
    assert matching_outputs(["fox", "cat"], model) == [2, 0]
    assert matching_outputs(["cat", "dog", "fox"], model) is None
    assert matching_outputs(["0", "1", "2"], model) is None
    assert matching_outputs(None, model) is None
    with pytest.raises(UserError, match=r"not trained on: \['cow'\]; it knows \['cat'"):
        matching_outputs(["cow", "cat"], model)
    with pytest.raises(UserError, match="the data has 4 classes, the model 3"):
        matching_outputs(["0", "1", "2", "3"], model)
    model = timm.create_model("raftmlp_digits", num_classes=1000)
    assert matching_outputs(["n01443537", "n01440764"], model) == [1, 0]


def test_model_class_names():
    model = timm.create_model("raftmlp_digits", num_classes=2)
    assert model_class_names(model) == ["0", "1"]
    model.pretrained_cfg["label_names"] = ("n01440764", "n01443537")
    assert model_class_names(model) == ["tench", "goldfish"]  # synsets in English
    names = model_class_names(timm.create_model("raftmlp_digits", num_classes=1000))
    assert (len(names), names[0]) == (1000, "tench, Tinca tinca")


def test_read_class_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("één\ntwee\n", encoding="utf-8-sig")
    assert read_class_names(str(path), 2) == ["één", "twee"]
    with pytest.raises(UserError, match="has 2 lines, the model 3 classes"):
        read_class_names(str(path), 3)


def test_real_labels_count_as_the_paper_says():
    images = NamedImages()
    real = RealLabels(images)
    generator = torch.Generator().manual_seed(0)
    right = {1: [], 5: []}
    for start in range(0, 50000, 5000):
        logits = torch.rand(5000, 1000, generator=generator)
        numbers = images.order[start : start + 5000]
        for logit, number in zip(logits[::2], numbers[::2]):  # every other one is sure of a label
            if REAL_LABELS[number]:
                logit[REAL_LABELS[number][-1]] = 2
        target = torch.zeros(5000, dtype=torch.long)
        target[7] = UNREADABLE
        for i, (logit, number) in enumerate(zip(logits, numbers)):
            if REAL_LABELS[number] and i != 7:
                best = logit.topk(5).indices.tolist()
                right[1].append(best[0] in REAL_LABELS[number])
                right[5].append(any(c in REAL_LABELS[number] for c in best))
        real.add(torch.zeros(5000, 1, 1, 1), target, logits)
    assert real.figures() == pytest.approx(dict(real_top1=100 * np.mean(right[1]), real_top5=100 * np.mean(right[5])))
    assert 50 < real.figures()["real_top1"] < 51
