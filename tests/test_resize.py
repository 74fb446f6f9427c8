"""Bicubic resizing against F.interpolate."""

import pytest
import torch
import torch.nn.functional as F

from raftmlp.model.resize import bicubic_matrix, resize_bicubic

LENGTHS = [1, 2, 3, 7, 14, 33, 56, 97, 333]
SIZES = [((h, w), (w, h)) for h in LENGTHS for w in LENGTHS if h != w] + [((1, 1), (5, 9)), ((31, 800), (56, 56))]
SIZES += [((801, 1333), (804, 1336)), ((427, 641), (428, 644))]


def reference(x, size):
    x = x.permute(0, 3, 1, 2)
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


def maps(size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(size[0] * 1000 + size[1])
    return torch.randn(2, *size, 3, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_interpolate(dtype):
    for old, new in SIZES:
        x = maps(old, dtype)
        expected = reference(x, new)
        actual = resize_bicubic(x, *new)
        assert actual.dtype == dtype and actual.is_contiguous()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max(), (old, new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    # F.interpolate rounds its weights too; the truth is what float32 gives for the same input, rounded
    for old, new in SIZES[::5]:
        x = maps(old, dtype)
        assert torch.equal(resize_bicubic(x, *new), resize_bicubic(x.float(), *new).to(dtype))
        error = (resize_bicubic(x, *new).double() - reference(x.double(), new)).abs().max()
        assert error <= torch.finfo(dtype).eps / 2 * reference(x.double(), new).abs().max() + 1e-5


def test_gradient_equals_interpolates():
    for old, new in [((7, 9), (14, 5)), ((33, 20), (8, 8)), ((1, 1), (4, 4)), ((300, 270), (304, 70))]:
        x = maps(old, torch.float64).requires_grad_()
        weight = maps(new, torch.float64)
        (ours,) = torch.autograd.grad((resize_bicubic(x, *new) * weight).sum(), x)
        (theirs,) = torch.autograd.grad((reference(x, new) * weight).sum(), x)
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("channels", [1, 15, 16, 40])
def test_any_number_of_channels(channels):
    """Few channels (an image) go another way than many, long sides another than short ones."""
    for old, new in [((9, 7), (12, 14)), ((300, 20), (64, 56)), ((20, 300), (40, 64)), ((270, 260), (272, 300))]:
        x = torch.randn(1, *old, channels, dtype=torch.float64)
        actual = resize_bicubic(x, *new)
        assert actual.is_contiguous() and torch.allclose(actual, reference(x, new), atol=1e-12)


def test_matrix():
    matrix = bicubic_matrix(10, 23, torch.float64, torch.device("cpu"))
    assert matrix.shape == (23, 10)
    assert torch.allclose(matrix.sum(1), torch.ones(23, dtype=torch.float64))
    assert (matrix != 0).sum(1).max() <= 4
    identity = bicubic_matrix(6, 6, torch.float32, torch.device("cpu"))
    assert torch.equal(identity, torch.eye(6))


def test_autocast_changes_nothing():
    x = maps((9, 7))
    expected = resize_bicubic(x, 14, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_bicubic(x, 14, 14), expected)


def test_scripted():
    scripted = torch.jit.script(resize_bicubic)
    for old, new in SIZES[::7]:
        assert torch.allclose(scripted(maps(old), *new), resize_bicubic(maps(old), *new), atol=1e-6)
