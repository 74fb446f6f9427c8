"""Figures over a loader, classifiers as they are evaluated, classes by name, and what is collected of predictions."""

import csv

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import TensorDataset

from helpers import REAL_LABELS, NamedImages
from raftmlp.config import ModelSettings
from raftmlp.data.images import UNREADABLE
from raftmlp.data.settings import ImageSettings
from raftmlp.errors import UserError
from raftmlp.evaluate.evaluation import ClassifierView, evaluate, prepare_model, run_once
from raftmlp.evaluate.labels import (
    RealLabels,
    class_name,
    default_num_classes,
    matching_outputs,
    model_class_names,
    read_class_names,
    readable_names,
)
from raftmlp.evaluate.results import Confusion, Predictions

CPU = torch.device("cpu")


def linear(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, outputs))


@torch.no_grad()
def test_figures_of_several_batches():
    model, images = linear(7), torch.randn(9, 3, 4, 4)
    target = torch.tensor([0, 1, 2, 3, UNREADABLE, 4, 5, 6, 0])
    batches = []
    figures = evaluate(
        model, zip(images.split(4), target.split(4)), CPU, on_batch=lambda *batch: batches.append(batch), progress=False
    )
    read = target != UNREADABLE
    logits, labels = model(images)[read], target[read]
    order = logits.argsort(1, descending=True)
    assert (figures["images"], figures["unread"]) == (8, 1)
    assert figures["top1"] == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
    assert figures["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert 0 < figures["top5"] < 100
    assert figures["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), target)
    torch.testing.assert_close(torch.cat([batch[2] for batch in batches]), model(images))
    with pytest.raises(UserError, match="the data has a class 3, the model has 3 classes"):
        evaluate(linear(3), [(images[:2], torch.tensor([1, 3]))], CPU)


@torch.no_grad()
def test_a_view_picks_outputs_and_averages_mirror_images():
    model, images = linear(5).eval(), torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(ClassifierView(model, [4, 0])(images), model(images)[:, [4, 0]])
    mirrored = ClassifierView(model, [4, 0], mirror=True)(images).softmax(1)
    single, flipped = (model(x)[:, [4, 0]].softmax(1) for x in (images, images.flip(3)))
    torch.testing.assert_close(mirrored, (single + flipped) / 2)
    assert not torch.allclose(single, flipped)


def test_a_prepared_model_knows_its_images_and_sizes():
    settings = ModelSettings(model="test_vit", img_size=[160, 160])
    prepared = prepare_model(settings, ImageSettings(crop_pct=0.5))
    assert (prepared.name, prepared.weights, prepared.outputs) == ("test_vit", "random", None)
    assert prepared.config["input_size"] == (3, 160, 160) and prepared.config["crop_pct"] == 0.5
    again = prepare_model(settings, ImageSettings(), prepared.model)
    assert again.model is prepared.model and again.config["crop_pct"] == 0.95
    assert run_once(prepared.model, "test_vit", (3, 160, 160)).shape == (1, 1000)
    with pytest.raises(UserError, match="test_vit takes no images of 8x16 pixels: .*divisible by patch size"):
        run_once(prepared.model, "test_vit", (3, 8, 16))


# Classes by name


def test_names(tmp_path):
    assert readable_names(["n01440764", "n99999999"]) == ["tench", "n99999999"]
    assert readable_names(["0", "1"]) == ["0", "1"] and readable_names(None) is None
    assert class_name(["a", "b"], 1) == "b" and class_name(["a", "b"], 2) == class_name(None, 2) == "2"
    assert default_num_classes(["n01440764", "n01443537"]) == 1000  # tench and goldfish are of ImageNet-1k
    assert default_num_classes(["n01440764", "n00000001"]) == 2 and default_num_classes(["a", "b", "c"]) == 3
    path = tmp_path / "names.txt"
    path.write_text("één\ntwee\n", encoding="utf-8-sig")
    assert read_class_names(str(path), 2) == ["één", "twee"]
    with pytest.raises(UserError, match="has 2 lines, the model 3 classes"):
        read_class_names(str(path), 3)


def test_a_models_names_and_the_outputs_for_those_of_data():
    model = timm.create_model("raftmlp_digits", num_classes=3)
    assert model_class_names(model) == ["0", "1", "2"]
    model.pretrained_cfg["label_names"] = ("cat", "dog", "n01440764")
    assert matching_outputs(["n01440764", "cat"], model) == [2, 0]
    assert matching_outputs(["cat", "dog", "n01440764"], model) is None
    assert matching_outputs(["0", "1", "2"], model) is None and matching_outputs(None, model) is None
    for names, words in ((["cow", "cat"], r"\['cow'\]; it knows \['cat'"), (["0", "1", "2", "3"], "4 classes")):
        with pytest.raises(UserError, match=words):
            matching_outputs(names, model)
    model.pretrained_cfg["label_names"] = ("n01440764", "n01443537", "n01484850")
    assert model_class_names(model)[:2] == ["tench", "goldfish"]  # synsets in English
    model = timm.create_model("raftmlp_digits", num_classes=1000)
    assert matching_outputs(["n01443537", "n01440764"], model) == [1, 0]
    names = model_class_names(model)
    assert (len(names), names[0]) == (1000, "tench, Tinca tinca")


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
        for i, (best, number) in enumerate(zip(logits.topk(5).indices.tolist(), numbers)):
            if REAL_LABELS[number] and i != 7:
                right[1].append(best[0] in REAL_LABELS[number])
                right[5].append(any(c in REAL_LABELS[number] for c in best))
        real.add(torch.zeros(5000, 1, 1, 1), target, logits)
    assert real.figures() == pytest.approx(dict(real_top1=100 * np.mean(right[1]), real_top5=100 * np.mean(right[5])))
    assert 50 < real.figures()["real_top1"] < 51


# Predictions


def test_predictions_of_all_batches(tmp_path):
    predictions = Predictions()
    logits = torch.tensor([[0.0, 2, 1], [3, 0, 0], [0, 0, 9]])
    predictions.add(torch.zeros(2, 1, 1, 1), torch.tensor([2, UNREADABLE]), logits[:2])
    predictions.add(torch.zeros(1, 1, 1, 1), torch.tensor([2]), logits[2:])
    assert predictions.unreadable() == [1]
    assert predictions.confusion(None).counts.tolist() == [[0, 0], [1, 1]]  # of classes 1 and 2
    predictions.write(tmp_path / "p.csv", TensorDataset(torch.zeros(3)), ["a", "b", "ç"])
    first, second = csv.DictReader((tmp_path / "p.csv").read_text().splitlines())
    chances = logits.softmax(1)
    assert first == {
        "file": "image 0", "class": "2", "class_name": "ç", "predicted": "1", "predicted_name": "b", "right": "0",
        "probability": f"{chances[0, 1]:.6f}", "class_probability": f"{chances[0, 2]:.6f}", "top5": "1 2 0",
    }  # fmt: skip
    assert (second["file"], second["right"]) == ("image 2", "1")


def test_a_confusion_of_some_classes_of_many():
    confusion = Confusion(np.array([7, 7, 7, 900, 900]), np.array([7, 3, 3, 900, 900]), None)
    assert confusion.classes.tolist() == [3, 7, 900]
    assert confusion.counts.tolist() == [[0, 0, 0], [2, 1, 0], [0, 0, 2]]
    seven, last = confusion.worst()  # no image is of class 3
    assert (seven["class"], seven["images"], seven["taken_for"]) == (7, 3, {"class": 3, "name": "3", "images": 2})
    assert (last["accuracy"], last["taken_for"]) == (100, None)
