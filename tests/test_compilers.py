"""The networks in torch.compile, torch.export, TorchScript and fx."""

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models._features_fx import GraphExtractNet
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from networks import KINDS, SIZES, assert_same, batch, narrow, tiny
from raftmlp.model.resize import RESIZINGS


@torch.no_grad()
def test_torchscript(model):
    scripted = torch.jit.script(model)
    for size in SIZES:
        assert_same(scripted(batch(size)), model(batch(size)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_refuses_every_other_size():
    """Of the neighbors, some have maps of the same grid once a convolution has cut off the rest."""
    backbone = timm.create_model("raftmlp_digits", embed_dims=(8,) * 4, depths=(1,) * 4, features_only=True).eval()
    for size in (32, 40):  # the trained size, and another
        traced = torch.jit.trace(backbone, torch.randn(2, 3, size, size), check_trace=False)
        for height, width in [(size + more, size) for more in range(-4, 5)] + [(size, size + 1), (1, size), (size, 1)]:
            if (height, width) != (size, size):
                with pytest.raises(RuntimeError):
                    traced(torch.randn(2, 3, height, width))


@torch.no_grad()
def test_fx(model):
    tracer = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=tracer
    ).eval()
    scripted = torch.jit.script(traced)
    for size in SIZES:
        (logits,) = traced(batch(size)).values()
        assert torch.equal(logits, model(batch(size)))
        with torch.enable_grad():  # TorchScript has the operators that eager mode takes where gradients are asked for
            (logits,) = scripted(batch(size)).values()
            assert torch.equal(logits, model(batch(size)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["raftmlp_s", "raftmlp_mixer_cifar"])
def test_fx_gives_the_same_bits(name):
    # as timm's own test_model_forward_fx asks of every model at its full size
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = batch(model.default_cfg["input_size"][1:], count=1)
    assert torch.equal(GraphExtractNet(model, ["head"])(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("size, strict", [(SIZES[1], True), (SIZES[2], False)])
def test_export(small, size, strict):
    dynamic = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(small, (batch(size),), dynamic_shapes=(dynamic,), strict=strict).module()
    for count in (1, 2, 5):
        assert_same(exported(batch(size, count)), small(batch(size, count)))


@torch.no_grad()
@pytest.mark.parametrize("name, resizing", KINDS[1:])
def test_compile_makes_one_graph(name, resizing):
    torch._dynamo.reset()
    model = narrow(name, resizing=resizing).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for size in SIZES:
        assert_same(compiled(batch(size)), model(batch(size)))


@torch.no_grad()
@pytest.mark.parametrize("resizing", RESIZINGS)
def test_compile_with_dynamic_sizes_does_not_make_a_graph_a_size(resizing):
    torch._dynamo.reset()
    graphs = []
    model = tiny(embed_dims=(8, 8), depths=(1, 1), raft_size=2, resizing=resizing).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g)
    for size in [*SIZES, (64, 65), (50, 70), (31, 31), (77, 13)]:
        assert_same(compiled(batch(size)), model(batch(size)))
    assert len(graphs) <= 5


def test_compile_with_inductor():
    torch._dynamo.reset()
    model = one_stage()
    compiled = torch.compile(model, fullgraph=True)
    for size in SIZES[:2]:  # the second compiles anew, with dynamic sizes
        grads = []
        for version in (model, compiled):
            model.zero_grad()
            version(batch(size)).square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for actual, expected in zip(*grads):
            assert_same(actual, expected, 1e-4)


def one_stage():
    torch.manual_seed(0)
    return tiny(embed_dims=(16,), depths=(1,), patch_sizes=(8,), patch_kernels=((8, 16),), raft_size=2)
