"""The mixings in slices: the numbers and the gradients of the plain operators, whatever the slices."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raftmlp import slices
from raftmlp.layers import ChannelMixing, RaftTokenMixing, TokenMixing

MIXINGS = {
    "vertical": lambda **kw: RaftTokenMixing(12, 5, 3, False, **kw),
    "horizontal": lambda **kw: RaftTokenMixing(12, 7, 2, True, **kw),
    "plain": lambda **kw: TokenMixing(12, (5, 7), **kw),
    "channels": lambda **kw: ChannelMixing(12, **kw),
}


def plainly(layer, x):
    """The mixing by the operators that serve every other device."""
    y = layer.mlp(x)
    return (x.reshape(y.shape) + layer.drop_path(y)).reshape(x.shape)


@pytest.fixture(params=MIXINGS)
def layer(request):
    torch.manual_seed(0)
    layer = MIXINGS[request.param](dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.fixture(params=[1, 2000, 10**6], ids=lambda budget: f"{budget} bytes a slice")
def budget(request, monkeypatch):
    monkeypatch.setattr(slices, "BYTES_A_THREAD", request.param // torch.get_num_threads())


def gradients(function, x, tensors, cotangent):
    return torch.autograd.grad((function(x) * cotangent).sum(), [t for t in (x, *tensors) if t.requires_grad])


def test_forward_and_gradients(layer, budget):
    x = torch.randn(3, 5, 7, 12, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    assert layer._goes_in_slices(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plainly(layer, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), plainly(layer, x), rtol=1e-12, atol=1e-12)
    own = gradients(layer, x, layer.parameters(), cotangent)
    for got, wanted in zip(own, gradients(lambda x: plainly(layer, x), x, layer.parameters(), cotangent), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("trained", ["", "norm", "fc1", "fc2", "norm fc2", "fc1 fc2"])
@pytest.mark.parametrize("to_input", [False, True])
def test_gradients_of_a_part(layer, budget, trained, to_input):
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in trained)
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64, requires_grad=to_input)
    if not (trained or to_input):
        assert not layer(x).requires_grad
        return
    cotangent = torch.randn_like(x)
    own = gradients(layer, x, layer.parameters(), cotangent)
    for got, wanted in zip(own, gradients(lambda x: plainly(layer, x), x, layer.parameters(), cotangent), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_second_derivatives(layer):
    x = torch.randn(1, 5, 7, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("kind", MIXINGS)
def test_drop_path_drops_the_same_images(kind, budget):
    layer = MIXINGS[kind](drop_path=0.5).train()
    x = torch.randn(8, 5, 7, 12, requires_grad=True)
    cotangent, outs = torch.randn_like(x), []
    for function in (layer, lambda x: plainly(layer, x)):
        torch.manual_seed(3)
        out = function(x)
        outs.append((out, *torch.autograd.grad((out * cotangent).sum(), [x, *layer.parameters()])))
    for got, wanted in zip(*outs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    kept = (outs[0][0] != x).flatten(1).any(1)
    assert kept.any() and not kept.all()


def test_any_layout_and_an_empty_batch(layer):
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=0)
    empty = torch.randn(0, 5, 7, 12, dtype=torch.float64, requires_grad=True)
    layer(empty).sum().backward()
    assert layer(empty).shape == empty.shape
    assert not layer.fc1.weight.grad.any()


def test_what_lies_between_is_not_kept():
    layer = ChannelMixing(8)
    x = torch.randn(2, 4, 4, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert sum(kept) == x.numel() + sum(p.numel() for p in layer.parameters())


def test_a_layer_that_was_replaced_or_is_watched_is_called():
    layer = ChannelMixing(8)
    x = torch.randn(1, 2, 2, 8)
    seen = []
    handle = layer.fc1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    wanted = layer(x)
    assert seen == [(1, 2, 2, 32)]
    handle.remove()

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    adapted = Adapted(8, 32)
    adapted.load_state_dict(layer.fc1.state_dict())
    layer.fc1 = adapted
    hidden = F.gelu(adapted(layer.norm(x)))
    torch.testing.assert_close(layer(x), x + layer.fc2(hidden))
    assert not torch.allclose(layer(x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_goes_the_plain_way(dtype):
    layer = ChannelMixing(8, dtype=dtype)
    x = torch.randn(3, 2, 2, 8, dtype=dtype)
    assert not layer._goes_in_slices(x) and torch.equal(layer(x), plainly(layer, x))


def test_function_transforms_go_the_plain_way():
    layer = ChannelMixing(8)
    x, t = torch.randn(3, 2, 2, 8), torch.randn(3, 2, 2, 8)
    torch.testing.assert_close(torch.func.vmap(lambda y: layer(y[None])[0])(x), layer(x))
    out, derivative = torch.func.jvp(layer, (x,), (t,))
    torch.testing.assert_close(out, layer(x))
    step = 1e-3
    torch.testing.assert_close(
        derivative, (layer(x + step * t) - layer(x - step * t)) / (2 * step), rtol=1e-2, atol=1e-2
    )
