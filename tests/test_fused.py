"""The Triton kernels of the mixings: on a GPU, and without one in Triton's interpreter, which knows no bfloat16."""

import pytest
import torch
from torch import nn

from raftmlp import fused, ops
from raftmlp.layers import ChannelMixing, RaftTokenMixing, TokenMixing

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16][: 1 + HAS_GPU]
MIXINGS = {
    "vertical": lambda: RaftTokenMixing(12, 5, 2),  # lengths and widths that are no powers of two
    "horizontal": lambda: RaftTokenMixing(12, 7, 2, horizontal=True),
    "one group": lambda: RaftTokenMixing(32, 5, 1),
    "four groups": lambda: RaftTokenMixing(64, 7, 4, horizontal=True),
    "wide": lambda: RaftTokenMixing(300, 5, 2),  # a line at a time
    "many hidden units": lambda: RaftTokenMixing(12, 5, 2, mlp_ratio=7),
    "channels": lambda: ChannelMixing(12),
    "more channels": lambda: ChannelMixing(130, mlp_ratio=1),
}


def make(kind, dtype):
    torch.manual_seed(0)
    layer = MIXINGS[kind]().to(DEVICE, torch.float64).requires_grad_(False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 5, 7, layer.norm.weight.numel(), dtype=torch.float64, device=DEVICE)
    return layer.to(dtype), x.to(dtype)


def arguments(layer, x):
    return x if layer.order else x.flatten(0, 2), *layer._weights(), layer.norm.eps, layer.raft_size, layer.order


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MIXINGS)
def test_the_kernels_round_no_more_than_the_plain_operators(kind, dtype):
    layer, x = make(kind, dtype)
    x, *parameters = arguments(layer, x)
    exact = ops._plain(x.double(), *(p.double() if isinstance(p, torch.Tensor) else p for p in parameters))
    out = fused.mix(x, *parameters)
    assert out.dtype == dtype and out.shape == x.shape
    errors = [(y.double() - exact).abs().mean() for y in (out, ops._plain(x, *parameters))]
    assert errors[0] < 1.1 * errors[1]


def test_a_map_of_float32_keeps_its_precision():
    layer, x = make("vertical", torch.float16)
    x, *parameters = arguments(layer, x.float())
    out = fused.mix(x, *parameters)
    exact = ops._plain(x.double(), *(p.double() if isinstance(p, torch.Tensor) else p for p in parameters))
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() < 4e-3 * (exact - x).abs().max()  # products are taken in 16 bits


def test_an_empty_batch():
    for kind in ("vertical", "channels"):
        layer, x = make(kind, torch.float16)
        assert fused.mix(*arguments(layer, x[:0])).numel() == 0


@pytest.mark.parametrize(
    "layer, expected",
    [
        (RaftTokenMixing(64, 56, 2), True),
        (RaftTokenMixing(768, 14, 4), True),
        (RaftTokenMixing(12, 7, 3), False),  # three groups
        (RaftTokenMixing(64, 500, 2), False),  # long lines
        (TokenMixing(64, (7, 7)), False),
        (ChannelMixing(192), True),
        (ChannelMixing(512), False),
    ],
)
def test_what_the_kernels_take(layer, expected):
    channels = layer.norm.weight.numel()
    assert fused.takes(layer.fc1.weight, channels, layer.raft_size, layer.order) == expected


def test_other_mixings_are_computed_with_plain_operators(monkeypatch):
    """What a GPU's kernel does with a mixing, here of the tensors at hand."""
    monkeypatch.setattr(ops, "_has_triton", lambda device: True)
    layer, x = make("vertical", torch.float16)
    x, *given = arguments(layer, x)
    tensors, others = given[:6], given[6:]
    assert torch.equal(ops._on_chip(x, *given), fused.mix(x, *given))
    assert torch.equal(ops._on_chip(x.transpose(1, 2).contiguous().transpose(1, 2), *given), fused.mix(x, *given))
    without_bias = [*tensors[:5], None, *others]
    wide = [p.float() for p in tensors]
    for other, parameters in (
        (x, without_bias),
        (x.float(), [*wide, *others]),
        (x.double(), [*map(torch.Tensor.double, wide), *others]),
    ):
        assert torch.equal(ops._on_chip(other, *parameters), ops._plain(other, *parameters))
    monkeypatch.setattr(ops, "_has_triton", lambda device: False)
    x, parameters = x.half(), [p.half() for p in tensors]
    assert torch.equal(ops._on_chip(x, *parameters, *others), ops._plain(x, *parameters, *others))
