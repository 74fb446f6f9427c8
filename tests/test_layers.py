"""Every layer against its slow, obvious reference: values and gradients, in float64."""

import pytest
import timm
import torch

from raftmlp import ChannelMixing, MultiScalePatchEmbed, RaftTokenMixing, TokenMixing
from raftmlp.model import reference
from raftmlp.model.resize import RESIZINGS


def assert_equal_with_gradients(fast, slow, x, module):
    """Compare fast(x) on a B H W C map with slow(x) on B C H W maps, and the gradients of everything."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = x.double().requires_grad_()
    expected = slow(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    actual = fast(x)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    inputs = [x, *module.parameters()]
    expected = torch.autograd.grad((expected * weight).sum(), inputs)
    actual = torch.autograd.grad((actual * weight).sum(), inputs)
    for a, b in zip(actual, expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("stride, kernels", [(4, (4,)), (4, (4, 8)), (2, (2, 4, 8)), (2, (4,)), (3, (3, 9)), (1, (1,))])
@pytest.mark.parametrize("size", [(8, 12), (9, 5), (1, 1)])
def test_patch_embed(stride, kernels, size):
    embed = MultiScalePatchEmbed(3, 10, stride, kernels, dtype=torch.float64)
    x = torch.randn(2, *size, 3)
    assert_equal_with_gradients(embed, lambda x: reference.patch_embed(x, embed), x, embed)


def test_patch_embed_is_one_convolution():
    embed = MultiScalePatchEmbed(3, 16, 2, (2, 4, 8))
    with torch.profiler.profile() as profile, torch.no_grad():
        embed(torch.randn(1, 16, 16, 3))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::conv2d"] == 1
    assert not {"aten::im2col", "aten::unfold"} & counts.keys()


@pytest.mark.parametrize("raft_size", [1, 2, 4])
@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("size", [(6, 5), (1, 7)])
def test_raft_token_mixing(raft_size, horizontal, size):
    mixing = RaftTokenMixing(8, size[horizontal], raft_size, horizontal, dtype=torch.float64)
    x = torch.randn(2, *size, 8)
    assert_equal_with_gradients(mixing, lambda x: reference.raft_token_mixing(x, mixing), x, mixing)


def test_token_mixing():
    mixing = TokenMixing(8, (5, 3), dtype=torch.float64)
    x = torch.randn(2, 5, 3, 8)
    assert_equal_with_gradients(mixing, lambda x: reference.token_mixing(x, mixing), x, mixing)


def test_channel_mixing():
    mixing = ChannelMixing(8, dtype=torch.float64)
    x = torch.randn(2, 5, 3, 8)
    assert_equal_with_gradients(mixing, lambda x: reference.channel_mixing(x, mixing), x, mixing)


@pytest.mark.parametrize("resizing", RESIZINGS)
@pytest.mark.parametrize("size", [(32, 32), (45, 30), (80, 100), (9, 17), (32, 71), (1, 40)])
def test_whole_network(size, resizing):
    for kwargs in (dict(), dict(token_mixing="plain")):
        kwargs |= dict(embed_dims=(8, 12, 16, 20), dtype=torch.float64, resizing=resizing)
        model = timm.create_model("raftmlp_digits", **kwargs)
        fast = lambda x: model(x.permute(0, 3, 1, 2))[:, None, None]
        slow = lambda x: reference.logits(x, model)[:, :, None, None]
        assert_equal_with_gradients(fast, slow, torch.randn(2, *size, 3), model)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RaftTokenMixing(10, 7, 4), "raft_size 4 must be a positive divisor of the stage's width 10"),
        (lambda: RaftTokenMixing(10, 7, 0), "raft_size 0"),
        (lambda: MultiScalePatchEmbed(3, 8, 4, (4, 6)), "multiple of its stage's stride 4"),
        (lambda: MultiScalePatchEmbed(3, 8, 4, ()), "one or more kernels"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
