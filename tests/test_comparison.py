"""The comparison of a file in its runtime with PyTorch."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from raftmlp.data import Digits
from raftmlp.errors import UserError
from raftmlp.export import comparison
from raftmlp.export.comparison import (
    RuntimeModule,
    accepted,
    calibration_batches,
    compare,
    image_source,
    milliseconds_in_turns,
    relative_difference,
    sample_sizes,
    try_inputs,
)
from raftmlp.export.formats import ExportSettings, Graph

CONFIG = dict(
    input_size=(3, 32, 32), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1, crop_mode="center"
)
SAMPLES = [(1, (4, 4)), (3, (4, 6))]


def graph(**settings):
    return Graph(None, 3, (32, 40), ExportSettings(**settings), [4, 8], ["logits"], {}, least_size=(17, 17))


def test_samples_have_the_free_axes_of_the_file():
    assert sample_sizes(graph()) == [(1, (32, 40)), (3, (32, 40)), (16, (32, 40))]
    assert sample_sizes(graph(batch=2)) == [(2, (32, 40))] * 3
    assert sample_sizes(graph(dynamic_size=True)) == [(1, (32, 40)), (3, (32, 60)), (16, (25, 41))]


def test_relative_difference():
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    assert relative_difference(a, b) == 0.125
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert math.isnan(relative_difference(a * float("nan"), b))


def test_functions_take_turns():
    calls = []
    times = milliseconds_in_turns(lambda: calls.append("a"), lambda: calls.append("b"), rounds=4, seconds=0)
    turns = "".join(calls).replace("aa", "a").replace("bb", "b")
    assert len(times) == 2 and turns.endswith("abababab")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda y: y * 1.001, "differs from PyTorch by 0.001"),
        (lambda y: y * float("nan"), "differs from PyTorch by nan"),
        (lambda y: y[:, :9], r"gives shapes \[\[1, 9\]\]"),
        (lambda y: y.no_such_name, "cannot run the file with 1 x 4 images"),
    ],
)
def test_a_file_that_differs_is_refused(wrong, message, monkeypatch):
    monkeypatch.setattr(comparison, "milliseconds_in_turns", lambda *_: (1.0, 2.0))
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    rows = compare(model, lambda images: [model(images)], "runtime", image_source(CONFIG, None), SAMPLES, 1e-4)
    expected = dict(difference=0.0, pytorch_ms=1.0, runtime_ms=2.0)
    assert rows == [dict(images="1 x 4", **expected), dict(images="3 x 4x6", **expected)]
    with pytest.raises(UserError, match=message):
        compare(model, lambda images: [wrong(model(images))], "runtime", image_source(CONFIG, None), SAMPLES, 1e-4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda x: x.as_strided(x.shape, x.contiguous().stride()), "for a permuted view"),
        (
            lambda x: x.as_strided(x.shape, x.contiguous().stride()) if x.stride(3) == 2 else x,
            "for every second column",
        ),
        (lambda x: x[..., :32, :40], "for 1 x 36x52"),
        (lambda x: x[..., :32, :40] if x.shape[-1] < 44 else x, "for 1 x 33x41"),
        (lambda x: x[:1], "for 2 x 32x40"),
        (lambda x: x.float() if x.dtype == torch.float32 else x.view(torch.float32)[..., :40], "for float64"),
    ],
)
def test_wrong_answers_without_an_error_are_refused(wrong, message):
    """As compiled code does, which reads its input as memory of the type, size and strides that it was made for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    noise, wanted = image_source(CONFIG, None), graph()

    def strict(images):
        if images.shape[1:] != (3, 32, 40) or images.dtype != torch.float32:
            raise RuntimeError
        return [model(images)]

    assert try_inputs(model, lambda x: [model(x.float())], "runtime", noise, wanted) == []
    sizes = ["36x52", "16x20", "31x39", "33x41", "35x43", "39x47"]
    assert try_inputs(model, strict, "runtime", noise, wanted) == ["float64", *(f"1 x {size}" for size in sizes)]
    with pytest.raises(UserError, match=f"gives a wrong answer, and no error, {message}: the file is not written"):
        try_inputs(model, lambda x: [model(wrong(x).float())], "runtime", noise, wanted)


def test_what_a_file_takes_and_what_it_refuses_contradict_each_other_nowhere():
    words = accepted(graph(), ["float64", "1 x 36x52", "channels-last"])
    takes, refuses = words.split("refuses")
    assert "32x40" in takes and "any number" in takes and "a permuted view" in takes
    assert not {"float64", "channels-last", "36x52"} & {word.strip(",;") for word in takes.split()}
    assert refuses.strip() == "float64, 1 x 36x52, channels-last"
    words = accepted(graph(dynamic_size=True, batch=3), [])
    assert "any height and width from 17" in words and "3 at a time" in words and "float64" in words


def test_any_finite_difference_without_a_limit(monkeypatch):
    monkeypatch.setattr(comparison, "milliseconds_in_turns", lambda *_: (1.0, 2.0))
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    make_images = image_source(CONFIG, None)
    (row,) = compare(model, lambda images: [model(images) * 3], "runtime", make_images, SAMPLES[:1], None)
    assert row["difference"] == pytest.approx(2)
    for factor in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="allowed is a finite number"):
            compare(model, lambda images: [model(images) * factor], "runtime", make_images, SAMPLES[:1], None)


def test_images_of_the_data_are_repeated_where_there_are_too_few():
    digits = Digits("validation")
    images = image_source(CONFIG, torch.utils.data.Subset(digits, range(3)))(8, (16, 24))
    assert images.shape == (8, 3, 16, 24)
    assert torch.equal(images[:3], images[3:6]) and not torch.equal(images[0], images[1])


class Damaged(Dataset):
    """Ten images, one of which cannot be read."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 4:
            raise OSError
        return Digits("validation")[index]


def test_calibration_takes_whole_and_readable_batches():
    assert [len(batch) for batch in calibration_batches(Damaged(), CONFIG, 3)] == [3, 3]
    batches = calibration_batches(Digits("train"), CONFIG, 16)
    assert sum(map(len, batches)) in range(224, 257)  # of 1437 images every sixth
    with pytest.raises(UserError, match="--quantize static needs 11 readable images or more"):
        calibration_batches(Damaged(), CONFIG, 11)


def test_batches_are_filled_up_for_a_file_of_a_fixed_batch():
    seen = []

    def run(images):
        seen.append(len(images))
        return [images.flatten(1)]

    images = torch.randn(2, 3, 1, 1)
    assert torch.equal(RuntimeModule(run, 5)(images), images.flatten(1))
    assert torch.equal(RuntimeModule(run, None)(images), images.flatten(1))
    assert seen == [5, 2]
