"""Augmentation: what is random about it is tested with the batches; here its arithmetic and its limits."""

import pytest
import torch

from raftmlp.data.augmentation import AugmentationSettings, BatchAugmentation, MixupThenCutmix, training_transform
from raftmlp.data.training import seed_everything
from raftmlp.errors import UserError

CONFIG = dict(input_size=(3, 32, 32), interpolation="bilinear", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_mixup_then_cutmix_keeps_account_of_every_pixel():
    """Images of one colour each: the mean colour of a mixed image tells its shares."""
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
        (dict(ratio=(2, 1)), "--ratio takes the smaller number first"),
        (dict(affine=(10, 2, 0.1)), "SHIFT up to 1"),
        (dict(affine=(10, 0.1, 1)), "SCALE below 1"),
        (dict(aa="random"), "--aa 'random'"),
        (dict(aa="rand-mX"), "--aa takes .*'mX'"),
        (dict(aa="rand-m9-0.5"), "--aa takes .*'0.5'"),
        (dict(aa="augmix-m5-tweights"), "--aa takes .*'tweights'"),
        (dict(scale=(0.5, 3)), "--scale takes shares of the image's area, up to 1, not 3"),
    ],
)
def test_a_transform_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        training_transform(AugmentationSettings(**settings), CONFIG)


@pytest.mark.parametrize(
    "settings, batch_sizes, message",
    [
        (dict(mixup=0.8), [7], "must be even: 7 images"),
        (dict(cutmix=0.8), [8, 5], "must be even: 5 images"),
        (dict(mixup=0.8, mixup_then_cutmix=True), [8], "needs --mixup and --cutmix above 0"),
    ],
)
def test_a_batch_augmentation_that_cannot_be(settings, batch_sizes, message):
    with pytest.raises(UserError, match=message):
        BatchAugmentation(AugmentationSettings(**settings), batch_sizes, 10, 0.1, torch.device("cpu"))


@pytest.mark.parametrize("settings", [dict(), dict(mixup=1.0), dict(cutmix=1.0), dict(reprob=1.0)], ids=str)
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
