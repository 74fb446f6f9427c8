"""Predictions for every image, and confused classes."""

import csv

import numpy as np
import torch
from torch.utils.data import TensorDataset

from raftmlp.data.images import UNREADABLE
from raftmlp.evaluate.results import Confusion, Predictions


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
