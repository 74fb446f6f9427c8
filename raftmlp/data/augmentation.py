"""Augmentation: of single images, by timm's transforms and the release's, and of whole batches."""

import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing as BatchErasing
from torch import Tensor
from torchvision.transforms import ColorJitter, Compose, InterpolationMode, RandomAffine, RandomCrop, RandomErasing

from ..errors import UserError
from .settings import AugmentationSettings

__all__ = ["BatchAugmentation", "MixupThenCutmix", "training_transform"]


def training_transform(settings: AugmentationSettings, config: dict) -> Callable:
    """Return the transform of PIL images, prepared as a ``data_config`` says, to augmented uint8 tensors (C, H, W).

    Posterizing of an ``aa`` policy keeps at least one bit, where timm asks for 0 bits or fewer at the strongest levels:
    Pillow 13 refuses those, and earlier versions drew a black image.

    Raises:
        UserError: If the settings do not fit each other.
    """
    size, crop_mode = config["input_size"][-2:], settings.train_crop_mode
    for name in ("scale", "ratio"):
        low, high = getattr(settings, name)
        if low > high:
            raise UserError(f"--{name} takes the smaller number first, not {low} {high}")
    if crop_mode == "rrc" and settings.scale[1] > 1:
        raise UserError(f"--scale takes shares of the image's area, up to 1, not {settings.scale[1]}")
    _check_policy(settings.aa)
    options = dict(use_prefetcher=True, interpolation=config["interpolation"], mean=config["mean"], std=config["std"])
    options |= dict(scale=settings.scale, ratio=settings.ratio, hflip=settings.hflip, auto_augment=settings.aa)
    options |= dict(train_crop_mode="rrc" if crop_mode == "random" else crop_mode, color_jitter=settings.color_jitter)
    try:
        parts = create_transform(size, is_training=True, separate=True, **options)
    except (AssertionError, KeyError, ValueError) as error:  # timm's say little
        raise UserError(
            f"timm makes no augmentation of these options, --aa {settings.aa!r} perhaps: {error!r}"
        ) from error
    crop, colors, tensor = (part.transforms for part in parts)
    if settings.aa:
        _keep_one_bit(colors[0])
    if crop_mode == "random":  # no random resizing: the side that limits becomes size / crop_pct
        resize = create_transform(size, interpolation=config["interpolation"], crop_pct=config["crop_pct"])
        crop[:1] = [resize.transforms[0], RandomCrop(size)]
    if settings.aa and settings.force_color_jitter:
        colors.insert(0, ColorJitter(*[settings.color_jitter] * 3))
    if settings.affine:
        degrees, shift, scale = settings.affine
        bilinear = InterpolationMode.BILINEAR
        crop.insert(0, RandomAffine(degrees, (shift, shift), (1 - scale, 1 + scale), interpolation=bilinear))
    if settings.cutout:
        tensor.append(RandomErasing(settings.cutout, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=0))
    return Compose([*crop, *colors, *tensor])


def _check_policy(policy: str | None) -> None:
    """Refuse parts of an --aa policy that timm would pass over: those that are no key with a number."""
    name, *parts = (policy or "").split("-")
    for part in parts:
        if not re.fullmatch(r"[a-z]+\d+(\.\d+)?", part) and not (name == "rand" and re.fullmatch("t[a-z0-9]+", part)):
            raise UserError(
                f"--aa takes a policy's name, keys and numbers, as rand-m9-mstd0.5, not {policy!r}: {part!r}"
            )


def _keep_one_bit(policy: Callable) -> None:
    """Let the posterizing operations of timm's AutoAugment, RandAugment or AugMix keep at least one bit."""
    operations = policy.ops if hasattr(policy, "ops") else chain.from_iterable(policy.policy)
    for operation in operations:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    return posterize(image, max(bits, 1))


class BatchAugmentation:
    """Augmentation of whole batches on their device: random erasing, then mixup or cutmix, or mixup and then cutmix.

    ``smoothing`` is the label smoothing of mixed targets. Settings that do not fit each other or one of the batch sizes
    are refused.
    """

    def __init__(
        self,
        settings: AugmentationSettings,
        batch_sizes: Sequence[int],
        num_classes: int,
        smoothing: float,
        device: torch.device,
    ):
        self.erase = self.mix = None
        if settings.reprob:
            self.erase = BatchErasing(settings.reprob, mode=settings.remode, device=device)
        if settings.mixup_then_cutmix and settings.makes_soft_targets:
            if not (settings.mixup and settings.cutmix):
                raise UserError("--mixup-then-cutmix needs --mixup and --cutmix above 0")
            self.mix = MixupThenCutmix(settings.mixup, settings.cutmix, smoothing, num_classes)
        elif settings.makes_soft_targets:
            if odd := [size for size in batch_sizes if size % 2]:
                raise UserError(
                    f"mixup and cutmix pair the images of a batch, which must be even: {odd[0]} images, made of "
                    f"--batch-size or --train-batch-sizes and --global-batch-size, are not"
                )
            prob, switch_prob = settings.mixup_prob, settings.mixup_switch_prob
            options = dict(prob=prob, switch_prob=switch_prob, label_smoothing=smoothing, num_classes=num_classes)
            self.mix = Mixup(settings.mixup, settings.cutmix, **options)

    def __call__(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W) and classes (B,), or shares of classes (B, num_classes) if they are mixed."""
        if self.erase:
            images = self.erase(images)
        return self.mix(images, target) if self.mix else (images, target)


class MixupThenCutmix:
    """Mixup and, on its result, cutmix, each with partners of its own: the recipe of the authors' 2021 release.

    ``mixup`` and ``cutmix`` are the alphas of their Beta distributions. The box of cutmix lies wholly inside the image.
    """

    def __init__(self, mixup: float, cutmix: float, smoothing: float, num_classes: int):
        self.mixup, self.cutmix, self.smoothing, self.num_classes = mixup, cutmix, smoothing, num_classes

    def __call__(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images (B, C, H, W) and shares of classes (B, num_classes)."""
        shares = torch.nn.functional.one_hot(target, self.num_classes).to(images.dtype)
        shares = shares * (1 - self.smoothing) + self.smoothing / self.num_classes

        kept, partner = np.random.beta(self.mixup, self.mixup), torch.randperm(len(images)).to(images.device)
        images = kept * images + (1 - kept) * images[partner]
        shares = kept * shares + (1 - kept) * shares[partner]

        kept, partner = np.random.beta(self.cutmix, self.cutmix), torch.randperm(len(images)).to(images.device)
        top, bottom = self._span(images.shape[2], kept)
        left, right = self._span(images.shape[3], kept)
        images[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        return images, kept * shares + (1 - kept) * shares[partner]

    @staticmethod
    def _span(size: int, kept: float) -> tuple[int, int]:
        """Return where the box begins and ends along one axis, whose share of the axis is sqrt(1 - kept)."""
        length = int(size * (1 - kept) ** 0.5)
        start = np.random.randint(size - length + 1)
        return start, start + length
