"""Small networks of every kind, for the tests of models and of compilers."""

import timm
import torch

import raftmlp  # noqa: F401  registers the models

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


def tiny(**kwargs):
    small = dict(embed_dims=(16, 24), depths=(1, 2), raft_size=(2, 4), img_size=64, num_classes=7)
    small |= dict(patch_sizes=(4, 2), patch_kernels=((4, 8), (2, 4)))
    return timm.create_model("raftmlp_digits", **{**small, **kwargs})


def assert_same(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def batch(size, count=2, channels=3):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(sum(size)))
