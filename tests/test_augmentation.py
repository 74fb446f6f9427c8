"""Augmentation: what is random about it is tested with the batches; here its arithmetic and its limits."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT
from raftmlp.cli import train
from raftmlp.data.augmentation import AugmentationSettings, BatchAugmentation, MixupThenCutmix, training_transform
from raftmlp.data.training import seed_everything
from raftmlp.errors import UserError

RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "studies")
POLICIES = ("original", "v0r", "3a", "rand-m20-mmax20-n4", "rand-m0-n4-inc0", "augmix-m10-w2")
CONFIG = dict(input_size=(3, 32, 32), interpolation="bilinear", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_mixup_then_cutmix_keeps_account_of_every_pixel():
    """Images of one color each: the mean color of a mixed image tells its shares."""
    size, classes = 60, 8
    mix = MixupThenCutmix(0.8, 0.8, smoothing=0.0, num_classes=classes)
    for seed in range(20):
        seed_everything(seed)
        images = torch.eye(classes)[:, :, None, None].expand(-1, -1, size, size).clone()
        mixed, shares = mix(images, torch.arange(classes))
        torch.testing.assert_close(shares.sum(1), torch.ones(classes))
        # the box's sides are whole pixels: its share of the image is a little less than the target's
        torch.testing.assert_close(mixed.mean((2, 3)), shares, rtol=0, atol=2 / size)
        assert (shares > 0).sum(1).max() >= 2
    smooth = MixupThenCutmix(0.8, 0.8, smoothing=0.1, num_classes=classes)(images, torch.arange(classes))[1]
    torch.testing.assert_close(smooth.sum(1), torch.ones(classes))
    assert float(smooth.min()) >= 0.1 / classes - 1e-6


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(scale=(1, 0.5)), "--scale takes the smaller number first"),
        (dict(scale=(0.5, 3)), "--scale takes shares of the image's area"),
        (dict(affine=(10, 2, 0.1)), "translation values"),
        (dict(aa="random"), "--aa 'random'"),
        (dict(aa="rand-m9-0.5"), "--aa takes .*'0.5'"),
        (dict(aa="augmix-m5-tweights"), "--aa takes .*'tweights'"),
    ],
)
def test_a_transform_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        training_transform(AugmentationSettings(**settings), CONFIG)


@pytest.fixture(scope="module")
def odd_images():
    """Images of odd kinds, of three channels and of one: noise, tiny, narrow, constant, a photograph's gradient."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape) for shape in ((20, 24, 3), (1, 1, 3), (1, 30, 3), (30, 1, 3))]
    arrays += [np.full((9, 9, 3), value) for value in (0, 255)] + [np.indices((16, 16, 3)).sum(0) * 7]
    images = [Image.fromarray(array.astype(np.uint8)) for array in arrays]
    return {3: [*images, images[0].convert("L").convert("RGB")], 1: [image.convert("L") for image in images]}


def draw(settings, images, count, seed=0):
    """Draw augmented images of 16 x 16 pixels, and check what they are."""
    seed_everything(seed)
    channels = len(images[0].getbands())
    config = {**CONFIG, "input_size": (channels, 16, 16), "mean": (0.5,) * channels, "std": (0.5,) * channels}
    transform = training_transform(settings, config)
    for i in range(count):
        drawn = transform(images[i % len(images)])
        assert drawn.shape == (channels, 16, 16) and drawn.dtype == torch.uint8


def test_thousands_of_images_of_every_recipe(odd_images):
    recipes = []
    for path in RECIPES:
        settings = AugmentationSettings.select(vars(train.build_parser().parse_args(["-c", str(path)])))
        recipes += [settings] * (settings not in recipes)
    assert any(settings.aa for settings in recipes)
    for settings in recipes:
        for channels, images in odd_images.items():
            draw(settings, images, 2000 if settings.aa and channels == 3 else 500)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_draws_images_of_odd_kinds(policy, odd_images):
    for images in odd_images.values():
        draw(AugmentationSettings(aa=policy), images, 500)


@pytest.mark.parametrize("level, bits", [(20, 1), (10, 1), (5, 2), (0, 4)])
def test_posterizing_keeps_at_least_one_bit(level, bits):
    settings = AugmentationSettings(aa=f"rand-m{level}-mmax20-inc1", hflip=0, scale=(1, 1), ratio=(1, 1))
    policy = training_transform(settings, {**CONFIG, "input_size": (3, 16, 16)}).transforms[1]
    (operation,) = (operation for operation in policy.ops if operation.name == "PosterizeIncreasing")
    operation.prob = 1
    gradient = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert len(np.unique(np.asarray(operation(gradient)))) == 2**bits


def test_batch_augmentations_that_cannot_be():
    for settings, message in (
        (dict(cutmix=0.8), "must be even: 5 images"),
        (dict(mixup=0.8, mixup_then_cutmix=True), "needs --mixup and --cutmix above 0"),
    ):
        with pytest.raises(UserError, match=message):
            BatchAugmentation(AugmentationSettings(**settings), [8, 5], 10, 0.1, torch.device("cpu"))


@pytest.mark.parametrize("settings", [dict(), dict(cutmix=1.0), dict(reprob=1.0)], ids=str)
def test_batches_are_erased_and_mixed(settings):
    settings = AugmentationSettings(**settings)
    augment = BatchAugmentation(settings, [8], 10, 0.0, torch.device("cpu"))
    seed_everything(0)
    images, target = torch.randn(8, 3, 16, 16), torch.arange(8)
    mixed, shares = augment(images.clone(), target)
    assert mixed.shape == images.shape
    assert torch.equal(mixed, images) == (not (settings.makes_soft_targets or settings.reprob))
    if settings.makes_soft_targets:
        torch.testing.assert_close(shares.sum(1), torch.ones(8))
    else:
        assert torch.equal(shares, target)
