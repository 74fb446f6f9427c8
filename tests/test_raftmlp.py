"""What timm and its users ask of a model: construction, calls at any size, features, compilers, weights."""

import copy
import threading

import numpy as np
import pytest
import timm
import torch
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from timm.models._features_fx import GraphExtractNet
from timm.optim import param_groups_layer_decay
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import raftmlp
from helpers import ROOT, same_weights
from raftmlp.model.resize import RESIZINGS

VARIANTS = timm.list_models("raftmlp*")
OTHER_RULES = [("raftmlp_digits", "residual"), ("raftmlp_mixer_b16", "residual")]
# one of each kind: several stages, one stage, plain token mixing, another rule
KINDS = [("raftmlp_digits", "full"), ("raftmlp_12_r2_ms", "full"), ("raftmlp_mixer_b16", "full"), *OTHER_RULES[:1]]
SIZES = [(64, 64), (33, 49), (96, 40)]  # the trained grid's, an odd one, a rectangle


def narrow(name, **kwargs):
    """Create a variant with its structure but small widths, depths and images."""
    model = timm.create_model(name, device="meta")
    stages = len(model.stages)
    depth = 4 if stages == 1 else 1
    small = dict(embed_dims=(16, 24, 32, 48)[:stages], depths=(depth,) * stages, img_size=64, num_classes=7)
    return timm.create_model(name, **{**small, **kwargs})


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request):
    torch.manual_seed(0)
    name, resizing = request.param
    return narrow(name, resizing=resizing).eval()


@pytest.fixture(scope="module", params=RESIZINGS)
def small(request):
    """Two stages, raft sizes 2 and 4, odd depths: enough of everything for the compilers."""
    torch.manual_seed(0)
    return tiny(resizing=request.param).eval()


def tiny(**kwargs):
    small = dict(embed_dims=(16, 24), depths=(1, 2), raft_size=(2, 4), img_size=64, num_classes=7)
    small |= dict(patch_sizes=(4, 2), patch_kernels=((4, 8), (2, 4)))
    return timm.create_model("raftmlp_digits", **{**small, **kwargs})


def assert_same(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def batch(size, count=2, channels=3):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(sum(size)))


# Names and construction


def test_registered():
    assert timm.list_models(module="raftmlp") == VARIANTS
    assert len(VARIANTS) == 13


@pytest.mark.parametrize("name", VARIANTS)
def test_default_cfg(name):
    model = timm.create_model(name, device="meta")
    cfg = model.default_cfg
    assert (cfg["interpolation"], cfg["license"]) == ("bilinear", "apache-2.0")
    assert cfg["crop_pct"] == (1.0 if name == "raftmlp_digits" else 0.875)
    state = model.state_dict()
    first_conv = cfg["first_conv"]
    for layer in (first_conv,) if isinstance(first_conv, str) else first_conv:
        assert f"{layer}.weight" in state
    assert f"stages.0.embed.convs.{len(model.stages[0].embed.convs) - 1}" in str(first_conv)
    assert state[f"{cfg['classifier']}.weight"].shape[0] == cfg["num_classes"] == model.num_classes
    assert model.grids(cfg["input_size"][-2:])[-1] == tuple(cfg["pool_size"])


def test_entry_points_of_torch_hub():
    one_stage = dict(embed_dims=(8,), depths=(1,), patch_sizes=(4,), patch_kernels=((4,),), raft_size=1, img_size=16)
    for name in VARIANTS:
        model = torch.hub.load(str(ROOT), name, source="local", **one_stage, num_classes=3)
        assert isinstance(model, raftmlp.RaftMLP) and model.num_classes == 3
    model = torch.hub.load(str(ROOT), "raftmlp_digits", source="local", pretrained=True)
    assert same_weights(model, timm.create_model("raftmlp_digits", pretrained=True))


def test_initialization_is_that_of_the_papers_linears():
    torch.manual_seed(0)
    model = timm.create_model("raftmlp_s")
    embed = model.stages[0].embed
    bound = (3 * (4 * 4 + 8 * 8)) ** -0.5
    for parameter in embed.parameters():
        assert 0.9 * bound < parameter.abs().max() <= bound
    fc1 = model.stages[0].blocks[0].tokens.vertical.fc1
    assert 0.99 * 112**-0.5 < fc1.weight.abs().max() <= 112**-0.5


def test_the_callers_arguments_win():
    model = timm.create_model(
        "raftmlp_s",
        embed_dims=(16, 36),
        depths=(1, 2),
        patch_sizes=(8, 3),
        patch_kernels=((8, 16), (3, 9)),
        raft_size=(4, 3),
        token_mlp_ratio=1.5,
        mlp_ratio=3,
        img_size=(96, 144),
        in_chans=1,
        num_classes=5,
        global_pool="catavgmax",
        drop_rate=0.2,
        drop_path_rate=0.1,
        dtype=torch.float64,
    )
    mixing = model.stages[1].blocks[1]
    assert model.grids((96, 144)) == [(12, 18), (4, 6)]
    assert mixing.tokens.vertical.fc1.weight.shape == (18, 3 * 4)
    assert mixing.tokens.horizontal.fc1.weight.shape == (27, 3 * 6)
    assert mixing.channels.fc1.weight.shape == (108, 36)
    assert mixing.tokens.vertical.drop_path.drop_prob == model.stages[0].blocks[0].channels.drop_path.drop_prob == 0.1
    assert model.head_drop.p == 0.2
    assert model.head.weight.shape == (5, 72)
    assert model(torch.randn(2, 1, 96, 144, dtype=torch.float64)).shape == (2, 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(raft_size=3), "raft_size 3 must be a positive divisor of the stage's width 64"),
        (dict(raft_size=(2, 2)), "the same number of stages everywhere.*raft_size \\(2, 2\\)"),
        (dict(depths=(2, 0, 6, 2)), "depths \\(2, 0, 6, 2\\)"),
        (dict(depths=(2, 2, 6, 10**9)), "depths .* from 1 to 1000"),
        (dict(embed_dims=5), "embed_dims 5"),
        (dict(patch_sizes=(4, 2, 2, 2.5)), "patch_sizes"),
        (dict(patch_kernels=((4, 6), (2, 4), (2, 4), (2,))), "patch_kernels \\(4, 6\\).*stride 4"),
        (dict(patch_kernels=((8, 4), (2, 4), (2, 4), (2,))), "patch_kernels \\(8, 4\\).*ascending"),
        (dict(patch_sizes=(3, 2, 2, 2), patch_kernels=((3, 6), (2,), (2,), (2,))), "\\(3, 6\\).*even number"),
        (dict(token_mixing="mlp"), "token_mixing 'mlp' must be one of 'raft', 'plain'"),
        (dict(resizing="crop"), "resizing 'crop' must be one of 'full', 'residual'"),
        (dict(num_classes=-1), "num_classes -1"),
        (dict(num_classes=True), "num_classes True"),
        (dict(img_size=0), "img_size 0"),
        (dict(img_size=(224, 224, 3)), "img_size \\(224, 224, 3\\)"),
        (dict(drop_path_rate=1.0), "drop_path_rate 1.0"),
        (dict(token_mlp_ratio=0.001), "ratio of 0.001"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("raftmlp_s", **arguments)


def test_numbers_of_numpy():
    plain = dict(num_classes=3, img_size=8, embed_dims=(4, 8), depths=(1, 1), patch_sizes=(2, 2), mlp_ratio=2.5)
    made = {name: np.float32(2.5) if name == "mlp_ratio" else np.array(value)[()] for name, value in plain.items()}
    model = raftmlp.RaftMLP(**made, patch_kernels=None)
    assert str(model) == str(raftmlp.RaftMLP(**plain, patch_kernels=None))
    assert (type(model.img_size[0]), type(model.num_classes), type(model.num_features)) == (int, int, int)
    torch.jit.script(model)


def test_failed_calls_change_nothing(small):
    before = str(small), small.num_classes, small.img_size
    for call in (
        lambda: small.reset_classifier(-1, "max"),
        lambda: small.reset_classifier(5, "token"),
        lambda: small.set_input_size((0, 64)),
        lambda: small.prune_intermediate_layers([7]),
    ):
        with pytest.raises((ValueError, AssertionError)):
            call()
    assert (str(small), small.num_classes, small.img_size) == before


def test_names_of_before_are_taken():
    for before, now in (("map", "full"), ("update", "residual")):
        assert tiny(resizing=before).stages[0].blocks[0].resizing == now


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 1, 64, 64), "shape \\(B, 3, H, W\\), got \\[2, 1, 64, 64\\]"),
        ((3, 64, 64), "got \\[3, 64, 64\\]"),
        ((2, 3, 0, 64), "at least 1x1 pixels, got 0x64"),
    ],
)
def test_bad_images(small, shape, message):
    with pytest.raises(ValueError, match=message):
        small(torch.randn(shape))
    with pytest.raises(ValueError, match=message):
        small.forward_intermediates(torch.randn(shape))


# Calls


@torch.no_grad()
@pytest.mark.parametrize("size", [*SIZES, (1, 1), (2, 131)])
def test_any_size(model, size):
    logits = model(batch(size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_every_parameter_gets_a_gradient(model):
    trained = copy.deepcopy(model).train()
    for size in SIZES[:2]:
        trained.zero_grad()
        trained(batch(size)).square().mean().backward()
        for name, parameter in trained.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (name, size)


@torch.no_grad()
def test_a_call_leaves_no_trace(small):
    def snapshot():
        return str([(name, sorted(vars(module).items())) for name, module in small.named_modules()])

    before = snapshot()
    expected = {size: small(batch(size)) for size in SIZES}
    for size in reversed(SIZES):
        assert torch.equal(small(batch(size)), expected[size])
    assert snapshot() == before


def test_two_threads_with_different_sizes(small):
    with torch.no_grad():
        expected, wrong = {size: small(batch(size)) for size in SIZES}, []

    def work(size):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(small(batch(size)), expected[size]):
                    wrong.append(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in SIZES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
@pytest.mark.parametrize("name, rule", OTHER_RULES)
def test_every_rule_gives_the_same_bits_at_the_trained_size(name, rule):
    model, other = narrow(name).eval(), narrow(name, resizing=rule).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch((64, 64))), model(batch((64, 64))))
    assert not torch.allclose(other(batch((96, 80))), model(batch((96, 80))))


@torch.no_grad()
def test_residual_keeps_what_token_mixing_does_not_change():
    """Where the second Linear of token mixing is zero, a block sees every pixel by itself: nothing is blurred."""
    block = raftmlp.model.layers.RaftMLPBlock(8, (4, 4), resizing="residual")
    for mixing in (*block.tokens, block.channels):
        torch.nn.init.zeros_(mixing.fc2.weight)
        torch.nn.init.zeros_(mixing.fc2.bias)
    x = torch.randn(2, 9, 13, 8)
    assert torch.equal(block(x), x)


def test_training_after_inference_mode_at_an_odd_size():
    # what inference mode caches must not be an inference tensor
    model = tiny()
    size = (37, 41)  # no other test's
    with torch.inference_mode():
        model(batch(size))
    model(batch(size)).mean().backward()


@torch.no_grad()
def test_low_precision(small):
    for size in SIZES:
        expected = small(batch(size))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(small(batch(size)).float(), expected, 0.05)
        half = copy.deepcopy(small).bfloat16()
        assert_same(half(batch(size).bfloat16()).float(), expected, 0.05)


def test_drop_path_is_off_in_eval_and_constant_over_depth():
    model = tiny(drop_path_rate=0.5)
    rates = {m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"}
    assert rates == {0.5}
    x = batch(SIZES[0])
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_devices_without_data():
    model = timm.create_model("raftmlp_s", device="meta")
    assert model(torch.empty(2, 3, 100, 60, device="meta")).shape == (2, 1000)


# Head


@torch.no_grad()
def test_head(model):
    model = copy.deepcopy(model)
    x = batch(SIZES[1])
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert_same(pooled, features.mean((2, 3)))
    assert_same(model.forward_head(features), model(x))
    assert model.get_classifier() is model.head

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(5, "")  # a map of logits
    assert model(x).shape == (2, 5, *features.shape[2:])
    model.reset_classifier(5, "catavgmax")
    assert model(x).shape == (2, 5)
    assert model.head.in_features == 2 * model.num_features


def test_reset_classifier_keeps_dtype_and_mode():
    model = tiny(dtype=torch.float64).eval()
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training


# Features


@torch.no_grad()
def test_intermediates(model):
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    for size in SIZES:
        x = batch(size)
        final, maps = model.forward_intermediates(x)
        assert_same(final, model.forward_features(x))
        assert [m.shape[1] for m in maps] == info.channels()
        # each stage rounds up: not the ceiling of the size over the reduction, but never less
        for map_, reduction in zip(maps, info.reduction()):
            assert all(n * reduction >= pixels for n, pixels in zip(map_.shape[2:], size))
        if len(model.stages) > 1:
            assert [tuple(m.shape[2:]) for m in maps] == model.grids(size)
        names = dict(model.named_modules())
        seen = []
        hooks = [names[n].register_forward_hook(lambda m, i, out: seen.append(out)) for n in info.module_name()]
        model(x)
        for hook in hooks:
            hook.remove()
        for map_, expected in zip(maps, seen, strict=True):
            assert torch.equal(map_, expected.permute(0, 3, 1, 2))


@torch.no_grad()
def test_intermediates_options(model):
    x = batch(SIZES[1])
    count = len(model.feature_info)
    final, maps = model.forward_intermediates(x)
    some = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
    assert torch.equal(some[0], maps[0]) and torch.equal(some[1], maps[-1])
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(last_two, maps[-2:], strict=True))
    nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(nhwc, maps, strict=True))
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[-1], final)
    if len(model.stages) > 1:
        assert all(torch.equal(a, b) for a, b in zip(normed[:-1], maps[:-1]))

    called = []
    last = dict(model.named_modules())[model.feature_info[-1]["module"]]
    hook = last.register_forward_hook(lambda *_: called.append(1))
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    hook.remove()
    assert torch.equal(early[0], maps[0])
    assert not called

    for indices in ([count], [-count - 1], count + 1, 0, []):
        with pytest.raises((AssertionError, ValueError)):
            model.forward_intermediates(x, indices=indices)
    again = model.forward_intermediates(x, indices=[-1, 0, 0], intermediates_only=True)
    assert all(torch.equal(a, maps[i]) for a, i in zip(again, (-1, 0, 0), strict=True))
    with pytest.raises(ValueError, match="output_fmt 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@torch.no_grad()
@pytest.mark.parametrize("name", ["raftmlp_digits", "raftmlp_cifar", "raftmlp_mixer_b16"])
def test_features_only(name):
    torch.manual_seed(0)
    plain = narrow(name).eval()
    wrapped = narrow(name, features_only=True).eval()
    wrapped.model.load_state_dict(plain.state_dict(), strict=False)
    x = batch(SIZES[1])
    maps = wrapped(x)
    assert [m.shape[1] for m in maps] == wrapped.feature_info.channels()
    expected = plain.forward_intermediates(x, indices=len(maps), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))

    narrow(name, features_only=True, depths=(2,) * len(plain.stages))  # fewer blocks than maps by default
    first = narrow(name, features_only=True, out_indices=(0,)).eval()
    assert first.feature_info.channels() == [16] and first(x)[0].shape[1] == 16
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in plain.parameters())

    traced = narrow(name, features_only=True, feature_cls="fx").eval()
    assert str(traced.output_fmt) == "Format.NHWC"
    assert [m.shape[3] for m in traced(x)] == traced.feature_info.channels()


@torch.no_grad()
def test_features_in_any_order_as_a_list_or_a_dict():
    small = dict(features_only=True, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))
    model = timm.create_model("raftmlp_digits", **small, out_indices=(2, 0, 2)).eval()
    images = torch.randn(1, 3, 32, 40)
    maps = model(images)
    assert [y.shape[1] for y in maps] == model.feature_info.channels() == [24, 8, 24]
    same = timm.create_model("raftmlp_digits", **small, out_indices=(2, 0, 2), feature_cls="list").eval()
    same.load_state_dict(model.state_dict())
    assert all(map(torch.equal, same(images), maps))
    with_names = timm.create_model("raftmlp_digits", **small, feature_cls="dict").eval()
    with_names.load_state_dict(model.state_dict(), strict=False)
    found = with_names(images)
    assert list(found) == ["0", "1", "2", "3"] and torch.equal(found["2"], maps[0])
    for cls in ("dict", "hook", "fx"):
        with pytest.raises(ValueError, match="out_indices .* must rise"):
            timm.create_model("raftmlp_digits", **small, out_indices=(2, 0), feature_cls=cls)


def test_output_stride_is_that_of_the_patch_sizes():
    small = dict(embed_dims=(8,) * 4, depths=(1,) * 4)
    strides = dict(patch_sizes=(4, 2, 2, 1), patch_kernels=((4,), (2,), (2,), (1,)), output_stride=16)
    model = timm.create_model("raftmlp_digits", **small, **strides, features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16, 16]
    with pytest.raises(ValueError, match="output_stride 8 must be 32, the product of patch_sizes .4, 2, 2, 2."):
        timm.create_model("raftmlp_digits", **small, output_stride=8)


@torch.no_grad()
def test_pruning(model):
    pruned = copy.deepcopy(model)
    taken = pruned.prune_intermediate_layers([0, 1])
    assert taken == [0, 1]
    x = batch(SIZES[0])
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    actual = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert pruned(x).shape[1] == pruned.num_features
    assert len(pruned.feature_info) == 2


# Training aids


def test_grad_checkpointing(model):
    plain, checkpointed = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    checkpointed.set_grad_checkpointing()
    called = []
    for m in (plain, checkpointed):
        m.stages[0].blocks[0].register_forward_pre_hook(lambda *_: called.append(1))
    for forward in (lambda m, x: m(x), lambda m, x: m.forward_intermediates(x)[0]):
        grads, calls = [], []
        for m in (plain, checkpointed):
            m.zero_grad()
            forward(m, batch(SIZES[1])).square().mean().backward()
            grads.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
            calls.append(len(called))
            called.clear()
        assert calls == [1, 2]  # once more in the backward pass
        assert len(grads[0]) == len(grads[1])
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads))


def test_group_matcher_sorts_every_parameter_by_depth(model):
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    # one step a block; an embedding goes with the first block of its stage, the first one is the stem
    blocks = [(i, j) for i, stage in enumerate(model.stages) for j in range(len(stage.blocks))]
    scales = [scale[id(named[f"stages.{i}.blocks.{j}.channels.fc1.weight"])] for i, j in blocks]
    assert scales == [0.5 ** (len(blocks) - k) for k in range(len(blocks))]
    assert scale[id(named["stages.0.embed.bias"])] == scales[0] / 2
    assert scale[id(named["norm.weight"])] == scales[-1]
    assert scale[id(named["head.weight"])] == 1
    assert model.no_weight_decay() == set()


# Another trained grid


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (64, 96)])
def test_set_input_size_larger(model, size):
    resized = copy.deepcopy(model)
    resized.set_input_size(size)
    fresh = narrow_like(model, img_size=size)
    assert {k: v.shape for k, v in resized.state_dict().items()} == {k: v.shape for k, v in fresh.state_dict().items()}
    fresh.load_state_dict(resized.state_dict())
    assert_same(fresh(batch(size)), resized(batch(size)))

    # a larger grid changes no number: resize, mix, resize back, without the residual
    x = torch.randn(2, *resized.grids(size)[0], resized.feature_info[0]["num_chs"])
    for (name, old), new in zip(model.stages[0].blocks[0].tokens.named_children(), resized.stages[0].blocks[0].tokens):
        grid = model.grids((64, 64))[0]
        mixed = {"vertical": (grid[0], x.shape[2]), "horizontal": (x.shape[1], grid[1])}.get(name, grid)
        normed = old.norm(x)
        small = raftmlp.resize_bicubic(normed, *mixed)
        norm, old.norm = old.norm, torch.nn.Identity()
        branch = old(small) - small
        old.norm = norm
        expected = x + raftmlp.resize_bicubic(branch, *x.shape[1:3])
        assert_same(new(x), expected)


def narrow_like(model, **kwargs):
    dims, rule = tuple(stage.embed.bias.numel() for stage in model.stages), model.stages[0].blocks[0].resizing
    return narrow(model.pretrained_cfg["architecture"], embed_dims=dims, resizing=rule, **kwargs)


@torch.no_grad()
def test_set_input_size_smaller(model):
    resized = copy.deepcopy(model)
    resized.set_input_size(32)
    assert resized.img_size == (32, 32)
    fresh = narrow_like(model, img_size=32)
    fresh.load_state_dict(resized.state_dict())
    assert_same(fresh(batch((32, 32))), resized(batch((32, 32))))
    # hidden units are kept or dropped whole, so each bias is one of the old ones
    for old, new in zip(model.stages[0].blocks[0].tokens, resized.stages[0].blocks[0].tokens):
        assert new.fc1.bias.numel() < old.fc1.bias.numel()
        assert set(new.fc1.bias.tolist()) < set(old.fc1.bias.tolist())


@torch.no_grad()
def test_set_input_size_smaller_keeps_what_matters():
    # where the dropped hidden units do nothing, no number changes but by the resizing
    old = tiny(embed_dims=(16,), depths=(1,), patch_sizes=(8,), patch_kernels=((8,),), raft_size=2)
    layer = old.stages[0].blocks[0].tokens.vertical
    layer.fc2.weight[:, ::2] = 0
    new = copy.deepcopy(old)
    new.set_input_size(32)
    x = torch.randn(2, 4, 4, 16)
    layer.norm, new.stages[0].blocks[0].tokens.vertical.norm = torch.nn.Identity(), torch.nn.Identity()
    large = raftmlp.resize_bicubic(x, 8, 4)
    expected = x + raftmlp.resize_bicubic(layer(large) - large, 4, 4)
    assert_same(new.stages[0].blocks[0].tokens.vertical(x), expected)


# Compilers


@torch.no_grad()
def test_torchscript(model):
    scripted = torch.jit.script(model)
    for size in SIZES:
        assert_same(scripted(batch(size)), model(batch(size)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_trace(model):
    for size in SIZES[:2]:
        traced = torch.jit.trace(model, batch(size))
        assert_same(traced(batch(size, count=3)), model(batch(size, count=3)))


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
def test_any_tracer(model):
    traced = create_feature_extractor(model, [get_graph_node_names(model)[1][-1]]).eval()
    for size in SIZES:
        (logits,) = traced(batch(size)).values()
        assert_same(logits, model(batch(size)))
    assert torch.equal(*copy.deepcopy(traced)(batch(size)).values(), logits)


def test_fx_backward(small):
    traced = create_feature_extractor(
        copy.deepcopy(small).train(),
        ["head"],
        tracer_kwargs=dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions()),
    )
    traced.train()(batch(SIZES[1]))["head"].square().mean().backward()
    assert all(p.grad is not None for p in traced.parameters())


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
