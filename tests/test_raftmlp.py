"""What timm and its users ask of a model: construction, calls at any size, features, weights."""

import copy
import threading

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

import raftmlp
from helpers import ROOT, same_weights
from networks import OTHER_RULES, SIZES, VARIANTS, assert_same, batch, narrow, tiny

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
        **dict(token_mlp_ratio=1.5, mlp_ratio=3, img_size=(96, 144), in_chans=1, num_classes=5, drop_rate=0.2),
        **dict(global_pool="catavgmax", drop_path_rate=0.1, dtype=torch.float64),
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
