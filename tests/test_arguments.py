"""A network's arguments of a wrong kind: one clear line that names the argument, and nothing half done."""

import copy
import inspect
import math

import numpy as np
import pytest
import timm
import torch

from raftmlp import RaftMLP

SMALL = dict(
    num_classes=3, img_size=8, embed_dims=(4, 8), depths=(1, 1), patch_sizes=(2, 2), patch_kernels=((2, 4), (2,))
)
KINDS = [
    None, True, 2.5, math.nan, math.inf, -1, 0, 1, 10**12, 10**400, 1e300, "10", "", b"1", "avg", 1j, object(), (), [1],
    {1: 2}, {1}, (2.5, 2), ("2", "2"), (True, 2), (0, 2), (-4, 8), (None, 4), (4, math.nan), (10**12, 4), ((4,), 8),
    ((2.5,), (2,)), ((2, True), (2,)), ((), (2,)), np.float32(2.5), np.bool_(True), np.array([[1, 2]]), torch.tensor(2),
    torch.int64, torch.device("cpu"), lambda: 1,
]  # fmt: skip
# what each argument does take among the kinds
TAKEN = dict(
    num_classes=[0, 1], img_size=[1], in_chans=[1], global_pool=["avg", ""], embed_dims=[], depths=[], patch_sizes=[],
    patch_kernels=[None], token_mixing=[], raft_size=[1], token_mlp_ratio=[1, 2.5, np.float32(2.5)],
    mlp_ratio=[1, 2.5, np.float32(2.5)], resizing=[], drop_rate=[0], drop_path_rate=[0],
    device=[None, torch.device("cpu"), 0, 1], dtype=[None],
)  # fmt: skip


def wrong(argument, allowed=TAKEN):
    """The kinds that an argument does not take."""
    for value in KINDS:
        if not any(type(value) is type(taken) and value == taken for taken in allowed[argument]):
            yield value


CASES = [(argument, value) for argument in TAKEN for value in wrong(argument)]


def test_every_argument_has_rows():
    assert TAKEN.keys() == inspect.signature(RaftMLP).parameters.keys()
    assert len(CASES) > 500


@pytest.mark.parametrize("argument, value", CASES, ids=lambda value: str(value)[:20])
def test_constructor(argument, value):
    with pytest.raises((ValueError, TypeError), match=argument) as caught:
        RaftMLP(**{**SMALL, argument: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(img_size=2**20), "img_size, embed_dims, token_mlp_ratio and mlp_ratio are too large together"),
        (dict(embed_dims=(4, 2**17)), "mlp_ratio are too large together: a weight of 131072 x 524288 numbers"),
        (dict(patch_sizes=(2**15, 2), patch_kernels=None), "patch_sizes and patch_kernels are too large together"),
        (dict(num_classes=2**30), "num_classes and embed_dims are too large together"),
        (dict(depths=(1, 1001)), "depths \\(1, 1001\\): every entry must be at most 1000"),
        (dict(mlp_ratio=1e-9), "mlp_ratio of 1e-09 leaves 4 features no hidden unit"),
    ],
)
def test_too_large_or_too_small(arguments, message):
    with pytest.raises(ValueError, match=message):
        RaftMLP(**{**SMALL, **arguments})


def test_variants_name_arguments_too():
    for name, value in (("embed_dims", 5), ("depths", [2.5])):
        with pytest.raises(ValueError, match=f"{name} .*whole number"):
            timm.create_model("raftmlp_s", **{name: value})


def test_numbers_of_numpy():
    plain = dict(SMALL, in_chans=1, raft_size=2, token_mlp_ratio=1.5, mlp_ratio=2.0, drop_rate=0.5, drop_path_rate=0.25)
    made = {name: np.float32(value) if isinstance(value, float) else value for name, value in plain.items()}
    made |= {name: np.int64(value) for name, value in plain.items() if isinstance(value, int)}
    made |= {name: np.array(SMALL[name]) for name in ("embed_dims", "depths", "patch_sizes")}
    made["patch_kernels"] = [np.array(kernels) for kernels in SMALL["patch_kernels"]]
    model, expected = RaftMLP(**made), RaftMLP(**plain)
    assert str(model) == str(expected)
    assert (type(model.img_size[0]), type(model.num_classes), type(model.num_features)) == (int, int, int)
    model.reset_classifier(np.int64(5))
    model.set_input_size((np.int32(16), np.int64(8)))
    maps = model.forward_intermediates(torch.randn(1, 1, 16, 8), np.array([1, 0]), intermediates_only=True)
    assert (model.num_classes, model.img_size, [y.shape[1] for y in maps]) == (5, (16, 8), [8, 4])
    torch.jit.script(model)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return RaftMLP(**SMALL).eval()


def looks(model):
    """What a failed call must leave as it was."""
    attributes = {key: value for key, value in vars(model).items() if isinstance(value, int | str | tuple)}
    return str(model), attributes, {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = looks(model)
    assert after[:2] == before[:2] and after[2].keys() == before[2].keys()
    assert all(torch.equal(after[2][key], value) for key, value in before[2].items())


METHODS = {
    "num_classes": lambda model, value: model.reset_classifier(value, "max"),
    "global_pool": lambda model, value: model.reset_classifier(5, value),
    "img_size": lambda model, value: model.set_input_size(value),
    "indices": lambda model, value: model.forward_intermediates(torch.randn(1, 3, 8, 8), value),
    "indices ": lambda model, value: model.prune_intermediate_layers(value),
    "output_fmt": lambda model, value: model.forward_intermediates(torch.randn(1, 3, 8, 8), output_fmt=value),
}
TAKEN_BY_METHODS = {
    "num_classes": TAKEN["num_classes"], "global_pool": ["avg", "", None], "img_size": TAKEN["img_size"],
    "indices": [None, 1, [1]], "indices ": [None, 1, [1]], "output_fmt": [],
}  # fmt: skip
METHOD_CASES = [(argument, value) for argument in METHODS for value in wrong(argument, TAKEN_BY_METHODS)]


@pytest.mark.parametrize("argument, value", METHOD_CASES, ids=lambda value: str(value)[:20])
def test_methods_change_nothing_when_they_fail(model, argument, value):
    before = looks(model)
    with pytest.raises((ValueError, TypeError), match=argument.strip()):
        METHODS[argument](model, value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("start", [(8, 8), (32, 16)], ids=["larger", "smaller"])
def test_set_input_size_in_inference_mode_and_on_meta(start):
    torch.manual_seed(0)
    model = RaftMLP(**dict(SMALL, img_size=start))
    expected, meta = copy.deepcopy(model), copy.deepcopy(model).to("meta")
    expected.set_input_size((16, 24))
    with torch.inference_mode():
        model.set_input_size((16, 24))
        model.reset_classifier(5)
    meta.set_input_size((16, 24))
    for key, value in expected.stages.state_dict().items():
        assert torch.equal(model.stages.state_dict()[key], value)
    assert {key: value.shape for key, value in meta.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items()
    }
    assert all(value.is_meta for value in meta.state_dict().values())
    model(torch.randn(2, 3, 16, 24)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_indices_keep_their_order(model):
    images = torch.randn(1, 3, 8, 8)
    first, second = model.forward_intermediates(images, intermediates_only=True)
    for indices, expected in (((1, 0), (second, first)), ((0, 0), (first, first)), ((-1, 0), (second, first))):
        maps = model.forward_intermediates(images, indices, intermediates_only=True)
        assert len(maps) == 2 and all(map(torch.equal, maps, expected))


@torch.no_grad()
def test_features_only_in_any_order_or_refused():
    small = dict(features_only=True, embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))
    model = timm.create_model("raftmlp_digits", **small, out_indices=(2, 0, 2)).eval()
    maps = model(torch.randn(1, 3, 32, 32))
    assert [y.shape[1] for y in maps] == model.feature_info.channels() == [24, 8, 24]
    same = timm.create_model("raftmlp_digits", **small, out_indices=(2, 0, 2), feature_cls="list").eval()
    same.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert all(map(torch.equal, same(images), model(images)))
    for cls in ("dict", "hook", "fx"):
        for indices in ((2, 0), (1, 1), (-1, 0)):
            with pytest.raises(ValueError, match="out_indices .* must rise: only feature_cls='getter' and 'list'"):
                timm.create_model("raftmlp_digits", **small, out_indices=indices, feature_cls=cls)
    with pytest.raises(ValueError, match="feature_cls 'tuple' must be one of 'getter', 'list', 'dict', 'hook' or 'fx'"):
        timm.create_model("raftmlp_digits", **small, feature_cls="tuple")


@torch.no_grad()
@pytest.mark.parametrize(
    "name, widths, depths, keys",
    [
        ("raftmlp_digits", (8,) * 4, (1,) * 4, ["0", "1", "2", "3"]),
        ("raftmlp_12_r2", (8,), (4,), ["1", "2", "3"]),  # after the last three blocks
    ],
)
def test_features_as_a_dict(name, widths, depths, keys):
    kwargs = dict(embed_dims=widths, depths=depths, img_size=32, features_only=True)
    model = timm.create_model(name, **kwargs, feature_cls="dict").eval()
    as_list = timm.create_model(name, **kwargs).eval()
    as_list.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 40, 56)
    maps = model(images)
    assert list(maps) == keys and str(model.output_fmt) == "Format.NCHW"
    assert all(map(torch.equal, maps.values(), as_list(images)))


def test_output_stride_is_that_of_the_patch_sizes():
    small = dict(embed_dims=(8,) * 4, depths=(1,) * 4)
    timm.create_model("raftmlp_digits", **small, output_stride=32)
    narrow = dict(patch_sizes=(4, 2, 2, 1), patch_kernels=((4,), (2,), (2,), (1,)), output_stride=16)
    model = timm.create_model("raftmlp_digits", **small, **narrow, features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16, 16]
    with pytest.raises(ValueError, match="output_stride 8 must be 32, the product of patch_sizes .4, 2, 2, 2."):
        timm.create_model("raftmlp_digits", **small, output_stride=8)
