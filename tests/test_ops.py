"""The mixings: the numbers of the layers called one by one, for every way to call them."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from raftmlp.model import ops
from raftmlp.model.layers import ChannelMixing, RaftMLPBlock, RaftTokenMixing, TokenMixing

MIXINGS = {
    "vertical": lambda **kw: RaftTokenMixing(12, 5, 3, False, **kw),
    "horizontal": lambda **kw: RaftTokenMixing(12, 7, 2, True, **kw),
    "plain": lambda **kw: TokenMixing(12, (5, 7), **kw),
    "channels": lambda **kw: ChannelMixing(12, **kw),
}


def one_by_one(layer, x):
    """The mixing by calls of the layers inside."""
    return x + layer.drop_path(layer.mlp(layer.norm(x))).reshape(x.shape)


@pytest.fixture(params=MIXINGS)
def layer(request):
    torch.manual_seed(0)
    layer = MIXINGS[request.param](dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.fixture(params=[1, 2000], ids=lambda budget: f"{budget} bytes a slice")
def budget(request, monkeypatch):
    monkeypatch.setattr(ops, "BYTES_PER_THREAD", request.param // torch.get_num_threads())


@pytest.fixture
def passes(monkeypatch):
    """The lengths of what went through LayerNorm and the products in one pass."""
    lengths, compute = [], ops._mlp
    monkeypatch.setattr(ops, "_mlp", lambda x, *args: lengths.append(len(x)) or compute(x, *args))
    return lengths


@torch.no_grad()
def test_inference_has_the_numbers_of_the_layers(layer, budget):
    x = torch.randn(3, 5, 7, 12, dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(layer(x), one_by_one(layer, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


def test_second_derivatives(layer):
    x = torch.randn(1, 5, 7, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_goes_in_chunks(layer, dtype, passes, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    layer, x = layer.to(dtype), torch.randn(8, 5, 7, 12, dtype=dtype)
    whole = layer(x)
    assert not passes  # all of it fits one chunk: the layers are called
    monkeypatch.setattr(ops, "BYTES_PER_THREAD", 1)
    in_chunks = layer(x)
    assert len(passes) > 2 and len(set(passes)) <= 2
    error = (in_chunks - whole).abs().max() / whole.abs().max()
    assert error <= torch.finfo(dtype).eps
    assert layer(x[:0]).shape == (0, 5, 7, 12)
    passes.clear()
    with torch.enable_grad():
        layer(x)
    with ops.plain_operators():
        layer(x)
    assert not passes


@pytest.mark.parametrize("name", ["norm", "fc1", "fc2", "drop_path"])
@pytest.mark.parametrize("kind", ["vertical", "channels"])
@pytest.mark.parametrize("budget", [1], indirect=True)
def test_hooks_are_called(kind, name, budget):
    layer, x, called = MIXINGS[kind](drop_path=0.5).eval(), torch.randn(2, 5, 7, 12), []
    module = getattr(layer, name)
    module.register_forward_hook(lambda *_: called.append("forward"))
    with torch.no_grad():
        layer(x)
    assert called == ["forward"]
    module.register_full_backward_hook(lambda *_: called.append("backward"))
    layer(x).sum().backward()
    assert called == ["forward", "forward", "backward"]


@pytest.mark.parametrize("budget", [1], indirect=True)
@torch.no_grad()
def test_a_layer_that_was_replaced_is_called(budget):
    layer = ChannelMixing(8)
    x = torch.randn(1, 2, 2, 8)
    wanted = layer(x)

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    layer.fc2.forward = lambda hidden: hidden[..., :8]  # as libraries do that move or quantize weights
    torch.testing.assert_close(layer(x), x + F.gelu(layer.fc1(layer.norm(x)))[..., :8])
    del layer.fc2.forward

    adapted = Adapted(8, 32)
    adapted.load_state_dict(layer.fc1.state_dict())
    layer.fc1 = adapted
    hidden = F.gelu(adapted(layer.norm(x)))
    torch.testing.assert_close(layer(x), x + layer.fc2(hidden))
    assert not torch.allclose(layer(x), wanted)


@pytest.mark.parametrize("budget", [1], indirect=True)
@torch.no_grad()
def test_layers_without_bias(layer, budget):
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    for fc in (layer.fc1, layer.fc2):
        nn.init.zeros_(fc.bias)
    wanted = layer(x)
    layer.fc1.bias = layer.fc2.bias = None
    torch.testing.assert_close(layer(x), wanted)
    layer.norm = nn.LayerNorm(12, elementwise_affine=False, dtype=torch.float64)
    assert layer(x).shape == x.shape


@torch.no_grad()
def test_drop_path_has_its_own_mode(layer, budget):
    x = torch.randn(64, 5, 7, 12, dtype=torch.float64)
    layer.drop_path = DropPath(0.5)
    layer.eval().drop_path.train()  # Monte Carlo
    dropped = (layer(x) == x).flatten(1).all(1)
    assert dropped.any() and not dropped.all()
    layer.train().drop_path.eval()
    assert not (layer(x) == x).flatten(1).all(1).any()
    layer.drop_path = nn.Hardtanh()
    torch.testing.assert_close(layer(x), one_by_one(layer, x))


@pytest.mark.parametrize("budget", [1], indirect=True)
def test_low_precision(layer, budget):
    dtype = torch.bfloat16
    x = torch.randn(3, 5, 7, 12, dtype=torch.float64)
    exact = one_by_one(layer, x).detach()
    layer, x = layer.to(dtype), x.to(dtype)
    wanted = one_by_one(layer, x)
    assert torch.equal(layer(x), wanted)
    with torch.no_grad():
        errors = [(out.double() - exact).abs().mean() for out in (layer(x), wanted)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("budget", [1], indirect=True)
def test_autocast(training, budget):
    layer, x = ChannelMixing(8), torch.randn(3, 2, 2, 8)
    with torch.set_grad_enabled(training):
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), one_by_one(layer, x)) and not torch.equal(layer(x), exact)


class Wrapped(torch.Tensor):
    """A tensor subclass that knows PyTorch's operators alone, as those of quantization and sharding do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten"
        args, kwargs = tree_map_only(Wrapped, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapped, func(*args, **kwargs))


@pytest.mark.parametrize("mode", [torch.inference_mode])
@pytest.mark.parametrize("budget", [1], indirect=True)
def test_tensor_subclasses_meet_no_other_operators(layer, mode, budget):
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    with mode():
        wanted = layer(x)
        torch.testing.assert_close(layer(Wrapped(x)).inner, wanted)
        for name in ("weight", "bias"):
            setattr(layer.fc1, name, nn.Parameter(Wrapped(getattr(layer.fc1, name).detach()), requires_grad=False))
        torch.testing.assert_close(layer(x).inner, wanted)


@pytest.mark.parametrize("budget", [1], indirect=True)
def test_function_transforms(budget):
    layer = ChannelMixing(8)
    x, t = torch.randn(3, 2, 2, 8), torch.randn(3, 2, 2, 8)
    torch.testing.assert_close(torch.func.vmap(lambda y: layer(y[None])[0])(x), layer(x))
    out, derivative = torch.func.jvp(layer, (x,), (t,))
    torch.testing.assert_close(out, layer(x))
    step = 1e-3
    torch.testing.assert_close(
        derivative, (layer(x + step * t) - layer(x - step * t)) / (2 * step), rtol=1e-2, atol=1e-2
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (t,)), (out, derivative))
        torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], out)
    gradient = torch.func.vmap(torch.func.grad(lambda y: layer(y[None]).square().sum()))(x)
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).square().sum(), x)[0])


def block(**kwargs):
    torch.manual_seed(0)
    block = RaftMLPBlock(12, (5, 7), raft_size=3, dtype=torch.float64, **kwargs)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("budget", [2000], indirect=True)
def test_operator_keeps_what_pytorch_asks_of_it(layer, budget):
    x = torch.randn(3, 5, 7, 12, dtype=torch.float64)
    layer.requires_grad_(False).fc1.weight = nn.Parameter(layer.fc1.weight.t().contiguous().t(), requires_grad=False)
    weights = [p for part in (layer.norm, layer.fc1, layer.fc2) for p in (part.weight, part.bias)]
    torch.library.opcheck(torch.ops.raftmlp.mixing, (x, *weights, 1e-5, layer.raft_size, layer.axis))


def operators(graph):
    return {str(node.target) for node in graph.nodes if "raftmlp" in str(node.target)}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiled_graphs_have_the_operator_for_inference_alone(context):
    graphs = []
    mixer, x = block(), torch.randn(2, 5, 7, 12, dtype=torch.float64)
    keep = make_boxed_compiler(lambda graph, _: graphs.append(graph.graph) or graph)
    torch._dynamo.reset()
    with context():
        out = torch.compile(mixer, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(x)
        torch.testing.assert_close(out, mixer(x))
    if context is torch.enable_grad:
        out.sum().backward()
        assert len(graphs) == 2 and not any(map(operators, graphs))
    else:
        assert [operators(graph) for graph in graphs] == [{"raftmlp.mixing.default"}]


@torch.no_grad()
def test_exported_and_traced_graphs_have_not():
    mixer, x = block(), torch.randn(2, 5, 7, 12, dtype=torch.float64)
    assert not operators(torch.export.export(mixer, (x,)).graph)
    assert not operators(torch.fx.symbolic_trace(mixer).graph)
    for graph in (torch.jit.trace(mixer, x).inlined_graph, torch.jit.script(mixer).inlined_graph):
        assert "aten::gelu" in str(graph) and "raftmlp::" not in str(graph)


@pytest.mark.parametrize("budget", [1], indirect=True)
def test_operations_are_counted(budget):
    mixer = block()
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64, requires_grad=True)

    def count(training):
        with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
            out = mixer(x)
            if training:
                out.sum().backward()
        return counter.get_total_flops()

    tokens = 2 * 2 * 12 * 5 * 7 * 2 * (15 + 21) * 2  # two products, images, numbers, factors, hidden units for each
    channels = 2 * 2 * 5 * 7 * 12 * 48 * 2
    assert count(False) == tokens + channels
    assert count(True) == 3 * count(False)
