"""Where a run is, the losses on its way there, and whether it may go on from a checkpoint."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any

from torch import Tensor

from ..model.arguments import current_names
from .settings import TrainSettings

__all__ = ["DivergedError", "TrainState", "changed_options", "reason_not_to_resume"]


class DivergedError(Exception):
    """The loss of an update is infinite or no number."""

    def __init__(self, loss: float, update: int, lr: float):
        super().__init__(f"the loss of update {update} became {loss} at learning rate {lr}")
        self.loss, self.update, self.lr = loss, update, lr


@dataclass
class TrainState:
    """Where a run is; losses are read from the device one update late, so that a GPU works on meanwhile.

    Attributes:
        epoch: Epochs that are done.
        update: Updates that are done in the running epoch.
        loss_sum: Sum of their losses, as far as they are read.
        seconds: Seconds that they took, until the last checkpoint.
        log: A row an epoch.
    """

    epoch: int = 0
    update: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)
    _unread: list[tuple[Tensor, int, float]] = field(default_factory=list, repr=False)

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and update."""
        return self.epoch, self.update

    @property
    def best(self) -> dict:
        """The log's row of the best top-1; of equals, the one of the lowest loss."""
        return max(self.log, key=lambda row: (row["eval_top1"], -row["eval_loss"]))

    @property
    def mean_loss(self) -> float | None:
        """The mean of the running epoch's losses, as far as they are read; None if there are none."""
        count = self.update - len(self._unread)
        return self.loss_sum / count if count else None

    def end_update(self, result: Tensor, lr: float) -> None:
        """Count an update, with its loss and how many processes were asked to stop (2,), and its learning rate."""
        self._unread.append((result, self.update, lr))
        self.update += 1

    def read_losses(self, keep: int = 0) -> bool:
        """Add all but the latest ``keep`` losses to the sum; return whether a process was asked to stop.

        Raises:
            DivergedError: If a loss is infinite or no number.
        """
        stop = False
        while len(self._unread) > keep:
            result, update, lr = self._unread.pop(0)
            loss, asked = result.tolist()
            if not math.isfinite(loss):
                raise DivergedError(loss, update, lr)
            self.loss_sum += loss
            stop = stop or asked > 0
        return stop

    def end_epoch(self, row: dict) -> None:
        """Go to the beginning of the next epoch, with the log's row of the one that is done."""
        self.log.append(row)
        self.epoch, self.update, self.loss_sum, self.seconds = self.epoch + 1, 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return {name: value for name, value in vars(self).items() if name != "_unread"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; other entries are ignored."""
        self.epoch, self.update, self.loss_sum = state["epoch"], state["update"], state["loss_sum"]
        self.seconds = state.get("seconds", 0.0)  # older checkpoints have none
        self.log, self._unread = list(state["log"]), []


# Whether a run may go on from a checkpoint

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
    new_run = "(--checkpoint starts a new run from its weights)"
    before = dict(checkpoint.get("options", {}))
    if "model_kwargs" in before:
        before["model_kwargs"] = current_names(before["model_kwargs"])
    for key in STRUCTURAL:
        if key in before and before[key] != recipe[key]:
            return f"is of a run with {_option(key, before[key])}, not {_shown(recipe[key])} {new_run}"
    if (then := _held_out(before)) != (now := _held_out(recipe)):  # images to evaluate on would have been trained on
        return f"is of a run with {then}, not {now}: other images were held out"
    before_names = checkpoint.get("pretrained_cfg", {}).get("label_names")
    if names and before_names and list(before_names) != list(names):
        pairs = enumerate(zip_longest(before_names, names))
        number, (then, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        return f"is of a run whose class {number} is {then!r}; it is {now!r} in this data {new_run}"
    if before.get("kd_sha256", recipe.get("kd_sha256")) != recipe.get("kd_sha256"):
        return "is of a run whose teacher has other weights than this --kd-checkpoint, or these pretrained ones"
    epochs = checkpoint.get("epoch", 0)
    if checkpoint.get("update", 0):
        epochs += 1
        if reason := _other_epoch(checkpoint, recipe, updates_per_epoch):
            return f"is of the middle of an epoch {reason}"
    return f"is of epoch {epochs}, --epochs says {recipe['epochs']}" if epochs > recipe["epochs"] else ""


def _other_epoch(checkpoint: Mapping[str, Any], recipe: Mapping[str, Any], updates_per_epoch: int) -> str:
    """Return what makes the updates of an epoch others than a checkpoint's; "" where they are the same."""
    keys = list(ORDER)
    if recipe["train_size_schedule"] == "progressive":
        keys.append("epochs")
    if recipe["global_batch_size"] is None:  # the sizes of batches say how many images updates have
        keys.append("train_batch_sizes")
    for key in keys:
        then = checkpoint.get("options", {}).get(key, DEFAULTS[key])
        if then != recipe[key]:
            return f"with {_option(key, then)}: {_shown(recipe[key])} cannot continue from there"
    then = checkpoint.get("updates_per_epoch")
    return f"of {then} updates, of which this data makes {updates_per_epoch}" if then != updates_per_epoch else ""


def changed_options(before: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Return the options that a recipe has in another value than before, each as "name before -> now"."""
    return [f"{key} {before[key]} -> {recipe[key]}" for key in recipe if key in before and before[key] != recipe[key]]


def _held_out(options: Mapping[str, Any]) -> str:
    """Return the options that decide which images are held out."""
    share = options.get("val_share")
    return f"--val-share {share} --seed {options['seed']}" if share else "no --val-share"


def _option(key: str, value: Any) -> str:
    return f"--{key.replace('_', '-')} {_shown(value)}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
