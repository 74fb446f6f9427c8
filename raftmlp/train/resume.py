"""Whether a run may be resumed from a checkpoint: decided by what the checkpoint says alone."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any

from ..model.arguments import current_names
from .settings import TrainSettings

__all__ = ["changed_options", "reason_not_to_resume"]

# options without which a checkpoint's state does not fit
STRUCTURAL = (
    "model", "model_kwargs", "num_classes", "in_chans", "opt", "layer_decay", "filter_bias_and_bn", "model_ema",
    "kd_model_name",
)  # fmt: skip
# options that decide the order of an epoch's images, and their sizes
ORDER = (
    "global_batch_size", "seed", "train_num_samples", "train_img_sizes", "train_size_probs", "train_size_schedule",
)  # fmt: skip
DEFAULTS = {entry.name: entry.default for entry in fields(TrainSettings)}  # older checkpoints do not name all options


def reason_not_to_resume(
    checkpoint: Mapping[str, Any],
    recipe: Mapping[str, Any],
    updates_per_epoch: int,
    names: Sequence[str] | None = None,
) -> str:
    """Return why a run cannot be resumed from a checkpoint, in words that follow its name; "" where it can.

    Args:
        checkpoint: The content of the file.
        recipe: The run's own, see ``make_recipe``.
        updates_per_epoch: The run's own.
        names: The run's own names of classes, None where its data tell none.
    """
    if "optimizer" not in checkpoint:
        return "holds weights only: --checkpoint starts a new run from them"
    before = dict(checkpoint.get("options", {}))
    if "model_kwargs" in before:
        before["model_kwargs"] = current_names(before["model_kwargs"])
    for key in STRUCTURAL:
        if key in before and before[key] != recipe[key]:
            return (
                f"is of a run with --{_name(key)} {before[key]}, not {recipe[key]}: it cannot be resumed so "
                f"(--checkpoint starts a new run from its weights)"
            )
    if (then := _held_out(before)) != (now := _held_out(recipe)):  # images to evaluate on would have been trained on
        return f"is of a run with {then}, not {now}: it cannot be resumed so, for other images were held out"
    before_names = checkpoint.get("pretrained_cfg", {}).get("label_names")
    if names and before_names and list(before_names) != list(names):
        pairs = enumerate(zip_longest(before_names, names))
        number, (then, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        return (
            f"is of a run whose class {number} is {then!r}; it is {now!r} in this data: give the classes their names "
            f"of before (--checkpoint starts a new run from its weights)"
        )
    if before.get("kd_sha256", recipe.get("kd_sha256")) != recipe.get("kd_sha256"):
        return "is of a run whose teacher has other weights than this --kd-checkpoint, or these pretrained ones"
    epoch, update = checkpoint.get("epoch", 0), checkpoint.get("update", 0)
    if update:
        keys = list(ORDER)
        if recipe["train_size_schedule"] == "progressive":
            keys.append("epochs")
        if recipe["global_batch_size"] is None:  # the sizes of batches say how many images updates have
            keys.append("train_batch_sizes")
        for key in keys:
            then = before.get(key, DEFAULTS[key])
            if then != recipe[key]:
                option = f"--{_name(key)} {_shown(then)}"
                return f"is of the middle of an epoch with {option}: {_shown(recipe[key])} cannot continue from there"
        if checkpoint.get("updates_per_epoch") != updates_per_epoch:
            return (
                f"is of the middle of an epoch of {checkpoint.get('updates_per_epoch')} updates, of which this data "
                f"makes {updates_per_epoch}"
            )
    if epoch + (update > 0) > recipe["epochs"]:
        return f"is of epoch {epoch + (update > 0)}, --epochs says {recipe['epochs']}"
    return ""


def changed_options(before: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Return the options that a recipe has in another value than before, each as "name before -> now"."""
    return [f"{key} {before[key]} -> {recipe[key]}" for key in recipe if key in before and before[key] != recipe[key]]


def _held_out(options: Mapping[str, Any]) -> str:
    """Return the options that decide which images are held out."""
    share = options.get("val_share")
    return f"--val-share {share} --seed {options['seed']}" if share else "no --val-share"


def _name(key: str) -> str:
    return key.replace("_", "-")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
