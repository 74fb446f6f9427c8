"""Where a run is, and the losses on its way there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["DivergedError", "Losses", "RunState"]


@dataclass
class RunState:
    """Where a run is.

    Attributes:
        epoch: Epochs that are done.
        update: Updates that are done in the running epoch.
        loss_sum: Sum of their losses.
        seconds: Seconds that they took, until the last checkpoint.
        log: A row an epoch.
    """

    epoch: int = 0
    update: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and update."""
        return self.epoch, self.update

    @property
    def best(self) -> dict:
        """The log's row of the best top-1; of equals, the one of the lowest loss."""
        return max(self.log, key=lambda row: (row["eval_top1"], -row["eval_loss"]))

    def end_epoch(self, row: dict) -> None:
        """Go to the beginning of the next epoch, with the log's row of the one that is done."""
        self.log.append(row)
        self.epoch, self.update, self.loss_sum, self.seconds = self.epoch + 1, 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; other entries are ignored."""
        self.epoch, self.update, self.loss_sum = state["epoch"], state["update"], state["loss_sum"]
        self.seconds = state.get("seconds", 0.0)  # older checkpoints have none
        self.log = list(state["log"])


class DivergedError(Exception):
    """The loss of an update is infinite or no number."""

    def __init__(self, loss: float, update: int, lr: float):
        super().__init__(f"the loss of update {update} became {loss} at learning rate {lr}")
        self.loss, self.update, self.lr = loss, update, lr


class Losses:
    """Losses of updates, read from the device one update late, so that a GPU works on meanwhile."""

    def __init__(self, state: RunState):
        self.state = state
        self._unread: list[tuple[Tensor, int, float]] = []

    @property
    def mean(self) -> float | None:
        """The mean of the running epoch's losses, as far as they are read; None if there are none."""
        count = self.state.update - len(self._unread)
        return self.state.loss_sum / count if count else None

    def add(self, result: Tensor, update: int, lr: float) -> None:
        """Add the result of an update: its loss, and how many processes were asked to stop (2,)."""
        self._unread.append((result, update, lr))

    def read(self, keep: int = 0) -> bool:
        """Add all but the latest ``keep`` losses to the state's sum; return whether a process was asked to stop.

        Raises:
            DivergedError: If a loss is infinite or no number.
        """
        stop = False
        while len(self._unread) > keep:
            result, update, lr = self._unread.pop(0)
            loss, asked = result.tolist()
            if not math.isfinite(loss):
                raise DivergedError(loss, update, lr)
            self.state.loss_sum += loss
            stop = stop or asked > 0
        return stop
