"""The Triton kernels of the mixings: on a GPU, and without one in Triton's interpreter, which knows no bfloat16."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from raftmlp.model import ops
from raftmlp.model.layers import ChannelMixing, RaftTokenMixing, TokenMixing

pytest.importorskip("triton", reason="torch brings Triton on Linux and Windows for GPUs of NVIDIA alone")
from raftmlp.model import triton as fused

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16][: 1 + HAS_GPU]
MIXINGS = {
    "vertical": lambda: RaftTokenMixing(12, 5, 2),  # lengths and widths that are no powers of two
    "horizontal": lambda: RaftTokenMixing(12, 7, 2, horizontal=True),
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
    weights = [p for part in (layer.norm, layer.fc1, layer.fc2) for p in (part.weight, part.bias)]
    return x, *weights, layer.norm.eps, layer.raft_size, layer.axis


def plain(x, *parameters):
    """The mixing with plain operators."""
    return x + ops._mlp(x, *parameters).reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MIXINGS)
def test_the_kernels_round_no_more_than_the_plain_operators(kind, dtype):
    layer, x = make(kind, dtype)
    x, *parameters = arguments(layer, x)
    exact = plain(x.double(), *(p.double() if isinstance(p, torch.Tensor) else p for p in parameters))
    out = fused.mix(x, *parameters)
    assert out.dtype == dtype and out.shape == x.shape
    errors = [(y.double() - exact).abs().mean() for y in (out, plain(x, *parameters))]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["vertical", "channels"])
def test_large_hidden_values(kind, dtype):
    layer, x = make(kind, dtype)
    layer.fc1.bias.copy_(torch.linspace(-60, 60, len(layer.fc1.bias)))
    x, *parameters = arguments(layer, x)
    expected = plain(x, *parameters).double()
    assert (fused.mix(x, *parameters).double() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("kind", ["vertical", "horizontal"])
def test_positions_that_are_padded_do_not_count(kind):
    layer, x = make(kind, torch.float16)
    layer.norm.eps = 0.0  # their deviation is 0
    assert fused.mix(*arguments(layer, x)).isfinite().all()


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
    features, channels = layer.fc1.weight.shape[1], layer.norm.weight.numel()
    assert fused.is_supported(features, channels, layer.raft_size, layer.axis) == expected


def test_which_mixings_go_to_the_kernels(monkeypatch):
    monkeypatch.setattr(ops, "_has_triton", lambda device: True)
    layer, x = make("vertical", torch.float16)
    x, *given = arguments(layer, x)
    tensors, others = given[:6], given[7:]
    assert torch.equal(ops._triton(x.transpose(1, 2).contiguous().transpose(1, 2), *given), fused.mix(x, *given))
    assert ops._fits_triton(x, tensors, *others)
    wide = [p.float() for p in tensors]
    for other, weights in ((x, [*tensors[:5], None]), (x.float(), wide), (x, wide), (x.double(), tensors)):
        assert not ops._fits_triton(other, weights, *others)
    assert not ops._fits_triton(x, tensors, 3, "height")
    monkeypatch.setattr(ops, "_has_triton", lambda device: False)
    assert not ops._fits_triton(x, tensors, *others)


@pytest.mark.parametrize("answer", [False, True])
def test_a_compilation_asks_too(monkeypatch, answer):
    monkeypatch.setattr(ops, "_has_triton", lambda device: answer)
    torch.compiler.reset()
    layer, x = make("vertical", torch.float16)
    x, *given = arguments(layer, x)
    decide = torch.compile(lambda y: y + ops._fits_triton(y, given[:6], *given[7:]), fullgraph=True, backend="eager")
    assert torch.equal(decide(x), x + answer)


def test_gpus_whose_kernels_do_not_run_have_plain_operators(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    has_triton, device = ops._has_triton.__wrapped__, torch.device(DEVICE)
    assert has_triton(device)
    with FakeTensorMode():  # asked for the first time by a compilation
        assert has_triton(device)
    properties.shared_memory_per_block_optin = 99 * 1024
    assert not has_triton(device)
    properties.shared_memory_per_block_optin = 163 * 1024
    monkeypatch.setattr(fused, "mix", lambda *args: (_ for _ in ()).throw(RuntimeError("no C compiler")))
    with pytest.warns(UserWarning, match="plain operators are used on .*: no C compiler"):
        assert not has_triton(device)
