"""The pictures: what they show is collected right, and they are drawn whatever the classes and names."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from raftmlp.data.images import UNREADABLE
from raftmlp.evaluate import plots
from raftmlp.evaluate.labels import drawable
from raftmlp.evaluate.plots import Gallery, draw_accuracy, draw_confusion, draw_cost, draw_speed
from raftmlp.evaluate.prediction import draw_predictions
from raftmlp.evaluate.results import Confusion
from raftmlp.evaluate.speed import Result


def test_gallery_shows_the_wrong_ones_first():
    gallery = Gallery((0.5,), (0.5,), ["a", "b"], limit=4)
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.4, 0.6], [1, 0]])
    gallery.add(torch.zeros(6, 1, 2, 2), torch.tensor([0, 0, 1, 1, 1, UNREADABLE]), probabilities)
    assert [(truth, guess) for _, _, truth, guess, _ in gallery.kept] == [(0, 1), (1, 0), (0, 0), (1, 1)]


def test_gallery_is_spread_over_the_classes():
    target = torch.arange(1000).repeat_interleave(3)
    gallery = Gallery((0.5,), (0.5,), None, limit=8)
    for labels in target.split(100):
        gallery.add(torch.zeros(len(labels), 1, 2, 2), labels, torch.nn.functional.one_hot(labels, 1000).float())
    labels = sorted(label for _, _, label, *_ in gallery.kept)
    assert len(set(labels)) == 8 and np.diff([*labels, 1000 + labels[0]]).max() < 250

    gallery = Gallery((0.5,), (0.5,), None, limit=8)
    labels = torch.tensor([0] * 90 + [1] * 90 + [2] * 2)
    gallery.add(torch.zeros(182, 1, 2, 2), labels, torch.eye(3)[(labels + 1) % 3])
    assert sorted(label for _, _, label, *_ in gallery.kept) == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("classes", [2, 1000])
def test_confusions_are_drawn_for_few_and_many_classes(classes, tmp_path):
    targets = np.arange(classes).repeat(2)
    names = [f"${i} %^$" for i in range(classes)]  # no formulas
    draw_confusion(tmp_path / "c.png", "title", Confusion(targets, targets[::-1].copy(), names))
    assert Image.open(tmp_path / "c.png").width > 500


@pytest.mark.parametrize("sizes", [[(32, 32), (30, 32), (224, 224)], [(8 * i, 8 * i + 8) for i in range(1, 31)]])
def test_accuracy_over_size(sizes, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    models = [("a", "pretrained"), ("b", "one/last.pth.tar"), ("b", "two/last.pth.tar")]
    rows = [dict(model=model, weights=file, img_size=size, top1=50.0) for model, file in models for size in sizes]
    draw_accuracy(tmp_path / "a.png", rows, len(sizes))
    FigureCanvasAgg(figures[0]).draw()
    (axis,) = figures[0].axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["a", "b, one/last.pth.tar", "b, two/last.pth.tar"]
    boxes = sorted((label.get_window_extent() for label in axis.get_xticklabels()), key=lambda box: box.x0)
    assert len(boxes) == len(sizes) and all(left.x1 <= right.x0 for left, right in pairwise(boxes))


def test_speed_and_cost_leave_out_what_did_not_run(tmp_path):
    def result(model, size, **figures):
        return Result(model, "compile", "inference", size, 2, **figures)

    ran = dict(milliseconds=2.0, images_per_second=1000.0, memory_mib=3.0)
    results = [
        result(model, size, gmacs=gmacs, **ran) for size in ("32", "40x48") for model, gmacs in (("a", 0.5), ("b", 0.6))
    ]
    results.append(result("c", "32", failure="too small"))
    draw_speed(tmp_path / "speed.png", results)
    draw_cost(tmp_path / "cost.png", results)
    for path in tmp_path.glob("*.png"):  # the colors of matplotlib's cycle: two models
        colors = {tuple(color) for color in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()}
        shown = [tuple(bytes.fromhex(text)) in colors for text in ("1f77b4", "ff7f0e", "2ca02c")]
        assert shown == [True, True, False]


def test_names_that_the_font_cannot_draw(tmp_path, recwarn):
    assert drawable("café ŝ x² ж") == "café ŝ x² ж"
    assert drawable("猫 caf\udce9") == "\\u732b caf\\udce9"
    names = ["猫", "caf\udce9"]
    gallery = Gallery((0.5,), (0.5,), names)
    gallery.add(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), torch.eye(2))
    gallery.draw(tmp_path / "g.png", "title")
    draw_confusion(tmp_path / "c.png", "title", Confusion(np.arange(2), np.arange(2), names))
    result = dict(file="猫/caf\udce9.png", predictions=[{"class": 0, "name": names[0], "probability": 1.0}])
    draw_predictions(tmp_path / "p.png", "title", [(result, torch.zeros(1, 2, 2))], [], dict(mean=(0.5,), std=(0.5,)))
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
