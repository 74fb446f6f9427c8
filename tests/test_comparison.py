"""What a file shall hold, and the comparison of a file in its runtime with PyTorch."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from raftmlp.config import ExportSettings, ModelSettings
from raftmlp.data import Digits
from raftmlp.data.settings import ImageSettings
from raftmlp.errors import UserError
from raftmlp.evaluate.evaluation import prepare_model
from raftmlp.export.comparison import (
    RuntimeModule,
    calibration_batches,
    check,
    image_source,
    sample_sizes,
    try_inputs,
)  # fmt: skip
from raftmlp.export.formats import ExportSpec, create_spec

CONFIG = dict(
    input_size=(3, 32, 32), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1, crop_mode="center"
)
SMALL = dict(embed_dims=(8, 16), depths=(1, 1), patch_sizes=(4, 2), patch_kernels=((4, 8), (2, 4)))


def prepare(**kwargs):
    return prepare_model(ModelSettings(model="raftmlp_digits", model_kwargs=SMALL, **kwargs), ImageSettings())


def spec(**settings):
    return ExportSpec(None, 3, (32, 40), ExportSettings(**settings), [4, 8], ["logits"], {}, least_size=(17, 17))


def test_a_spec_is_of_a_copy_in_its_precision():
    prepared = prepare(img_size=[32, 44])
    spec = create_spec(prepared, ExportSettings(half="bfloat16"))
    logits = spec.module(torch.randn(2, 3, 32, 44))
    assert logits.dtype == torch.float32 and spec.size == (32, 44) and spec.strides == [4, 8]
    assert {p.dtype for p in prepared.model.parameters()} == {torch.float32}
    spec.settings.dynamic_size = True
    assert len(set(spec.example().shape)) == 4  # two axes of one length would be taken for one
    assert spec.takes((40, 3)) and spec.takes((1, 1))
    spec.module = nn.MaxPool2d(2)
    assert not spec.takes((1, 1))
    prepared.model = nn.Identity()
    with pytest.raises(UserError, match="raftmlp_digits has no feature maps"):
        create_spec(prepared, ExportSettings(features=True))


def test_samples_have_the_free_axes_of_the_file():
    assert sample_sizes(spec()) == [(1, (32, 40)), (3, (32, 40)), (16, (32, 40))]
    assert sample_sizes(spec(batch=2)) == [(2, (32, 40))] * 3
    assert sample_sizes(spec(dynamic_size=True)) == [(1, (32, 40)), (3, (32, 60)), (16, (25, 41))]


@pytest.mark.parametrize(
    "wrong, limit",
    [
        (lambda y: y * 1.001, 1e-4),
        (lambda y: y * float("nan"), 1e300),
        (lambda y: y * float("inf"), 1e300),
        (lambda y: y[:, :9], 1e300),
    ],
)
def test_outputs_that_differ_are_refused(wrong, limit):
    logits = torch.randn(2, 10)
    assert check("images", [logits], [logits], 0) == check("images", [logits * 0], [logits * 0], 0) == 0
    assert check("images", [torch.tensor([1.0, -4])], [torch.tensor([1.5, -4])], 1) == 0.125
    for outputs in ([wrong(logits), logits], [logits, wrong(logits)]):
        with pytest.raises(UserError, match="wrong answer for images, off by .*: it is not written"):
            check("images", outputs, [logits, logits], limit)


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda x: x.as_strided(x.shape, x.contiguous().stride()), "a permuted view"),
        (lambda x: x.as_strided(x.shape, x.contiguous().stride()) if x.stride(3) == 2 else x, "every second column"),
        (lambda x: x[..., :32, :40], "1 x 36x52"),
        (lambda x: x[..., :32, :40] if x.shape[-1] < 44 else x, "1 x 33x41"),
        (lambda x: x[:1], "2 x 32x40"),
        (lambda x: x.float() if x.dtype == torch.float32 else x.view(torch.float32)[..., :40], "float64"),
    ],
)
def test_wrong_answers_without_an_error_are_refused(wrong, name, capfd):
    """As compiled code does, which reads its input as memory of the type, size and strides that it was made for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    noise = image_source(CONFIG, None)

    def strict(images):
        if images.shape[1:] != (3, 32, 40) or images.dtype != torch.float32:
            raise RuntimeError
        return [model(images)]

    assert try_inputs(model, lambda x: [model(x.float())], noise, spec()) == []
    sizes = ["36x52", "16x20", "31x39", "33x41", "35x43", "39x47"]
    assert try_inputs(model, strict, noise, spec()) == ["float64", *(f"1 x {size}" for size in sizes)]
    with pytest.raises(UserError, match=f"gives a wrong answer for {name}, "):
        try_inputs(model, lambda x: [model(wrong(x).float())], noise, spec())


def test_images_of_the_data_are_repeated_where_there_are_too_few():
    images = image_source(CONFIG, Subset(Digits("validation"), range(3)))(8, (16, 24))
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
    for batch in (5, None):
        assert torch.equal(RuntimeModule(run, batch)(images), images.flatten(1))
    assert seen == [5, 2]
