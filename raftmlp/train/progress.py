"""How an epoch goes, as the user sees it: a bar on a terminal, lines of log elsewhere."""

import logging
import time
from datetime import timedelta

import torch
from tqdm import tqdm

from ..device import most_memory

__all__ = ["Progress"]

_logger = logging.getLogger(__name__)
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
SHORT = {"learning rate": "lr", "waiting for data": "waiting", "memory": ""}  # on a bar


class Progress:
    """The progress of an epoch of ``updates``, of so many ``images`` each; a context, after which the bar is gone.

    ``first`` updates were done before, in ``seconds_before``; ``waited`` counts the seconds that went by without data.
    Lines come every ``interval`` updates. Only a process that is to ``show`` it does.
    """

    def __init__(
        self,
        title: str,
        first: int,
        seconds_before: float,
        updates: int,
        images: int,
        interval: int,
        device: torch.device,
        show: bool,
    ):
        self.title, self.seconds_before, self.updates, self.images = title, seconds_before, updates, images
        self.interval, self.device, self.show = interval, device, show
        self.waited, self._start = 0.0, time.perf_counter()
        hide = None if show else True  # None: where there is no terminal
        counts = dict(total=updates, initial=first, smoothing=0.05)
        self.bar = tqdm(desc=title, bar_format=BAR, leave=False, disable=hide, **counts)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.bar.close()

    @property
    def seconds(self) -> float:
        """Seconds since the start, and those of before."""
        return self.seconds_before + time.perf_counter() - self._start

    def rate(self, update: int) -> float:
        """Return images a second up to an update."""
        return update * self.images / self.seconds

    def advance(self, update: int, loss: float | None, lr: float) -> None:
        """Show that an update is done at a learning rate, and the mean loss of the epoch's updates, if it is known."""
        rate, memory = self.rate(update), most_memory(self.device)
        figures = {
            **({} if loss is None else {"loss": f"{loss:.3f}"}),
            "images/s": f"{rate:.0f}",
            "learning rate": f"{lr:.3g}",
            "waiting for data": f"{self.waited / (self.seconds - self.seconds_before):.0%}",
            **({} if memory is None else {"memory": f"{memory / 2**30:.1f} GiB"}),
        }
        self.bar.update()
        if not self.bar.disable:
            self._show_what_fits([f"{SHORT.get(key, key)} {value}".strip() for key, value in figures.items()])
        if self.show and self.bar.disable and update % self.interval == 0:
            left = timedelta(seconds=round((self.updates - update) * self.images / rate))
            text = ", ".join(f"{key} {value}" for key, value in figures.items())
            _logger.info(f"{self.title}, update {update}/{self.updates}: {text}, {left} left of the epoch")

    def _show_what_fits(self, texts: list[str]) -> None:
        """Let the bar show those of some figures, the first ones, that leave a bar on the terminal's line."""
        width, state = self.bar.ncols, {**self.bar.format_dict, "ncols": None}  # None: a bar of ten characters
        while width and texts and len(tqdm.format_meter(**{**state, "postfix": ", ".join(texts)})) > width:
            texts = texts[:-1]
        self.bar.set_postfix_str(", ".join(texts), refresh=False)
