"""The mixings in slices: the numbers and the gradients of the plain operators, whatever the slices."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from raftmlp import slices
from raftmlp.layers import ChannelMixing, RaftTokenMixing, TokenMixing
from raftmlp.raftmlp import RaftMLPBlock

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


def test_second_derivatives_where_x_hangs_on_the_parameters(layer):
    layer.fc2.bias.requires_grad_(False)
    x = torch.randn(1, 5, 7, 12, dtype=torch.float64)
    both = []
    for function in (layer, lambda x: plainly(layer, x)):
        tensors = [p for p in layer.parameters() if p.requires_grad]
        first = torch.autograd.grad(function(function(x)).square().sum(), tensors, create_graph=True)
        both.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)])
    for got, wanted in zip(*both, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("budget", [2000], indirect=True)
def test_forward_derivatives(layer, budget):
    x = torch.randn(3, 5, 7, 12, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in (layer, lambda x: plainly(layer, x))
        ]
    torch.testing.assert_close(*tangents)


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

    layer.fc2.forward = lambda hidden: hidden[..., :8]  # as libraries do that move or quantise weights
    torch.testing.assert_close(layer(x), x + F.gelu(layer.fc1(layer.norm(x)))[..., :8])
    del layer.fc2.forward

    adapted = Adapted(8, 32)
    adapted.load_state_dict(layer.fc1.state_dict())
    layer.fc1 = adapted
    hidden = F.gelu(adapted(layer.norm(x)))
    torch.testing.assert_close(layer(x), x + layer.fc2(hidden))
    assert not torch.allclose(layer(x), wanted)


def test_token_mixing_calls_what_replaces_its_linears(layer):
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    wanted = layer(x)

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias
            self.extra = nn.Linear(base.in_features, base.out_features, dtype=torch.float64)
            nn.init.zeros_(self.extra.weight), nn.init.zeros_(self.extra.bias)

        def forward(self, x):
            return self.base(x) + self.extra(x)

    layer.fc1, layer.fc2 = Adapter(layer.fc1), Adapter(layer.fc2)
    out = layer(x)
    torch.testing.assert_close(out, wanted)
    out.square().sum().backward()
    assert layer.fc1.extra.weight.grad.abs().sum() > 0 and layer.fc2.extra.bias.grad.abs().sum() > 0


def test_layers_without_bias(layer):
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    for fc in (layer.fc1, layer.fc2):
        nn.init.zeros_(fc.bias)
    wanted = layer(x)
    layer.fc1.bias = layer.fc2.bias = None
    torch.testing.assert_close(layer(x), wanted)
    layer.norm = nn.LayerNorm(12, elementwise_affine=False, dtype=torch.float64)
    assert layer(x).shape == x.shape


def test_drop_path_has_its_own_mode(layer):
    x = torch.randn(64, 5, 7, 12, dtype=torch.float64)
    layer.drop_path = DropPath(0.5)
    layer.eval().drop_path.train()  # Monte Carlo
    dropped = (layer(x) == x).flatten(1).all(1)
    assert dropped.any() and not dropped.all()
    layer.train().drop_path.eval()
    assert not (layer(x) == x).flatten(1).all(1).any()
    layer.drop_path = nn.Hardtanh()
    torch.testing.assert_close(layer(x), plainly(layer, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_trains_the_plain_way(dtype):
    layer = ChannelMixing(8, dtype=dtype)
    x = torch.randn(3, 2, 2, 8, dtype=dtype)
    assert not layer._goes_in_slices(x) and torch.equal(layer(x), plainly(layer, x))


@torch.no_grad()
@pytest.mark.parametrize("budget", [2000], indirect=True)
def test_inference_in_bfloat16(layer, budget):
    x = torch.randn(3, 5, 7, 12, dtype=torch.float64)
    exact = plainly(layer, x)
    layer, x = layer.bfloat16(), x.bfloat16()
    assert layer._goes_in_slices(x)
    errors = [(out.double() - exact).abs().mean() for out in (layer(x), plainly(layer, x))]
    assert errors[0] < 1.1 * errors[1]


@torch.no_grad()
def test_a_small_batch_has_no_slices(layer):
    assert not layer._goes_in_slices(torch.randn(1, 5, 7, 12, dtype=torch.float64))


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


def block(**kwargs):
    torch.manual_seed(0)
    block = RaftMLPBlock(12, (5, 7), raft_size=3, dtype=torch.float64, **kwargs)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def one_by_one(block, x):
    for mixing in (*block.tokens, block.channels):
        x = plainly(mixing, x)
    return x


@torch.no_grad()
@pytest.mark.parametrize("token_mixing", ["raft", "plain"])
def test_a_block_at_once(token_mixing, budget):
    mixer = block(token_mixing=token_mixing)
    x = torch.randn(3, 5, 7, 12, dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(mixer(x), one_by_one(mixer, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)
    assert mixer(x[:0]).shape == (0, 5, 7, 12)


@pytest.mark.parametrize("budget", [2000], indirect=True)
def test_a_block_at_once_only_where_nobody_looks_between(budget):
    mixer = block(drop_path=0.5).eval()
    x = torch.randn(3, 5, 7, 12, dtype=torch.float64)
    assert not mixer._mixes_at_once(x)  # gradients
    with torch.no_grad():
        assert mixer._mixes_at_once(x) and not mixer._mixes_at_once(x[:, :4])
        assert not mixer.train()._mixes_at_once(x)
        mixer.eval()
        for module in (mixer.tokens, mixer.tokens.horizontal, mixer.channels):
            seen = []
            handle = module.register_forward_hook(lambda module, args, out, seen=seen: seen.extend([*args, out]))
            out = mixer(x)
            handle.remove()
            torch.testing.assert_close(out, one_by_one(mixer, x))
            assert len(seen) == 2
            if module is not mixer.tokens:  # neither was written over
                torch.testing.assert_close(plainly(module, seen[0]), seen[1])
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        assert not mixer._mixes_at_once(x)
        handle.remove()
        mixer.tokens.forward = lambda x: 0 * x
        torch.testing.assert_close(mixer(x), mixer.channels(0 * x))
        mixer.tokens = nn.Identity()
        torch.testing.assert_close(mixer(x), mixer.channels(x))


@pytest.mark.parametrize("budget", [2000], indirect=True)
def test_operators_keep_what_pytorch_asks_of_them(layer, budget):
    x = torch.randn(3, 5, 7, 12, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(3, 1, 1, 1, dtype=torch.float64)
    layer.fc1.weight = nn.Parameter(layer.fc1.weight.detach().t().contiguous().t())
    if isinstance(layer, ChannelMixing):
        x, scale = x.detach().reshape(105, 12).requires_grad_(), torch.rand(105, 1, dtype=torch.float64)
    mixing = layer._mixing()
    for factor in (None, scale):
        torch.library.opcheck(torch.ops.raftmlp.mixing, (x, factor, *mixing))
        needs = [True, False, False, True, True, False, False]
        plain = [tensor.detach() for tensor in mixing.parameters]
        args = (x.detach(), x.detach(), factor, plain, *mixing[1:], needs)
        torch.library.opcheck(torch.ops.raftmlp.mixing_backward, args)
    args = (torch.randn(3, 5, 7, 12, dtype=torch.float64), 2 * plain, 2 * mixing.layout, 2 * [mixing.eps])
    torch.library.opcheck(torch.ops.raftmlp.mixings, args)


def test_compiled_graphs_have_the_operators_and_exported_ones_have_not():
    graphs = []
    mixer, x = block(), torch.randn(2, 5, 7, 12, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    compiled(x)
    with torch.no_grad():
        compiled(x)
        exported = torch.export.export(mixer, (x,))
    ours = [
        sorted({str(node.target) for node in graph.graph.nodes if "raftmlp." in str(node.target)}) for graph in graphs
    ]
    if hasattr(torch.compiler, "is_exporting"):
        assert ours == [["raftmlp.mixing"], ["raftmlp.mixings"]]
    else:  # torch 2.6, which does not tell an export from a compilation
        assert ours == [[], []]
    assert "raftmlp" not in str(exported.graph)


@pytest.mark.parametrize("budget", [1], indirect=True)
def test_operations_are_counted(budget):
    mixer = block()
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)

    def count(function, training):
        with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
            out = function()
            if training:
                out.sum().backward()
        return counter.get_total_flops()

    plain = count(lambda: one_by_one(mixer, x), False)
    assert plain > 0
    assert count(lambda: mixer(x), False) == plain
    with torch.no_grad():
        assert mixer._mixes_at_once(x)
    x.requires_grad_()
    assert count(lambda: mixer(x), True) == 3 * plain
