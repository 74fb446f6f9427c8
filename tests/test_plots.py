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
    gallery = Gallery((0.5,), (0.5,), ["a", "b"], limit=3)
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.4, 0.6]])
    gallery.add(torch.zeros(5, 1, 2, 2), torch.tensor([0, 0, 1, 1, 1]), probabilities)
    assert [(truth, guess) for _, truth, guess, _ in gallery.wrong] == [(0, 1), (1, 0)]
    assert [(truth, guess) for _, truth, guess, _ in gallery.right] == [(0, 0), (1, 1), (1, 1)]


def test_gallery_leaves_out_what_could_not_be_read():
    gallery = Gallery((0.5,), (0.5,), None)
    gallery.add(torch.zeros(2, 1, 2, 2), torch.tensor([UNREADABLE, 1]), torch.eye(2))
    assert len(gallery.right) == 1 and not gallery.wrong


@pytest.mark.parametrize("classes", [2, 60, 1000])
def test_confusions_are_drawn_for_few_and_many_classes(classes, tmp_path):
    targets = np.arange(classes).repeat(2)
    names = [f"${i} %^$" for i in range(classes)]  # no formulas
    draw_confusion(tmp_path / "c.png", "title", Confusion(targets, targets[::-1].copy(), names))
    assert Image.open(tmp_path / "c.png").width > 500


def drawn_colours(path):
    """The colours of matplotlib's cycle that a picture has, as C0, C1, ..."""
    cycle = ("1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b")
    colours = {tuple(colour) for colour in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()}
    return [f"C{i}" for i, colour in enumerate(cycle) if tuple(bytes.fromhex(colour)) in colours]


def test_accuracy_over_size_has_a_line_for_each_model(tmp_path):
    rows = [
        dict(model=name, img_size=(side, side), top1=top1)
        for name, figures in (("a", (50, 60, 55)), ("b", (70, 80, 75)))
        for side, top1 in zip((32, 64, 128), figures)
    ]
    draw_accuracy(tmp_path / "a.png", rows, 3)
    assert drawn_colours(tmp_path / "a.png") == ["C0", "C1"]


def test_models_of_one_name_are_told_apart_by_their_weights(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    names = [("a", "pretrained"), ("b (last.pth.tar)", "one/last.pth.tar"), ("b (last.pth.tar)", "two/last.pth.tar")]
    rows = [dict(model=model, weights=file, img_size=(32, 32), top1=50.0) for model, file in names]
    draw_accuracy(tmp_path / "a.png", rows, 1)
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert labels == ["a", "b (last.pth.tar), one/last.pth.tar", "b (last.pth.tar), two/last.pth.tar"]


@pytest.mark.parametrize(
    "sizes", [[(32, 32), (30, 32), (32, 30), (224, 224)], [(8 * i, 8 * i + 8) for i in range(1, 31)]]
)
def test_the_labels_of_sizes_do_not_overlap(sizes, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    draw_accuracy(tmp_path / "a.png", [dict(model="a", img_size=size, top1=50.0) for size in sizes], len(sizes))
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    (axis,) = figure.axes
    boxes = sorted((label.get_window_extent() for label in axis.get_xticklabels()), key=lambda box: box.x0)
    assert len(boxes) == len(sizes) and all(left.x1 <= right.x0 for left, right in pairwise(boxes))


def test_speed_and_cost_leave_out_what_did_not_run(tmp_path):
    def result(model, mode, size, **figures):
        return Result(model, mode, "inference", size, 2, **figures)

    ran = dict(milliseconds=2.0, images_per_second=1000.0, memory_mib=3.0)
    results = [
        result(model, "compile", size, gmacs=gmacs, **ran)
        for size in ("32", "40x48")
        for model, gmacs in (("a", 0.5), ("b", 0.6))
    ]
    results.append(result("c", "compile", "32", failure="too small"))
    draw_speed(tmp_path / "speed.png", results)
    draw_cost(tmp_path / "cost.png", results)
    assert drawn_colours(tmp_path / "speed.png") == drawn_colours(tmp_path / "cost.png") == ["C0", "C1"]


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_gallery_is_spread_over_the_classes(order):
    target = torch.arange(1000).repeat_interleave(3)
    if order == "shuffled":
        target = target[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    gallery = Gallery((0.5,), (0.5,), None, limit=8)
    for labels in target.split(100):
        gallery.add(torch.zeros(len(labels), 1, 2, 2), labels, torch.nn.functional.one_hot(labels, 1000).float())
    labels = sorted(label for _, label, *_ in gallery.right)
    assert len(set(labels)) == 8 and np.diff([*labels, 1000 + labels[0]]).max() < 250

    gallery = Gallery((0.5,), (0.5,), None, limit=8)
    labels = torch.tensor([0] * 90 + [1] * 90 + [2] * 2)
    gallery.add(torch.zeros(182, 1, 2, 2), labels, torch.eye(3)[(labels + 1) % 3])
    assert sorted(label for _, label, *_ in gallery.wrong) == [0, 0, 0, 1, 1, 1, 2, 2]


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
