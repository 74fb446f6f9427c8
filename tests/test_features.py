"""Feature maps: of forward_intermediates, of timm's wrappers, of pruned networks."""

import copy

import pytest
import timm
import torch
from timm.models import FeatureInfo

from networks import KINDS, SIZES, assert_same, batch, narrow


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request):
    torch.manual_seed(0)
    name, resizing = request.param
    return narrow(name, resizing=resizing).eval()


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
