"""Requests to stop: SIGTERM and Ctrl-C, noted for the time of a run."""

import signal
import threading
import time

__all__ = ["StopSignals"]


class StopSignals:
    """A context in which SIGTERM and the first Ctrl-C are noted, not obeyed; in the main thread alone.

    A second Ctrl-C raises KeyboardInterrupt.

    Attributes:
        number: The signal that came last, None before one came.
    """

    def __init__(self):
        self.number: int | None = None
        self._handlers: dict[int, object] = {}
        self._time = 0.0

    def __enter__(self) -> "StopSignals":
        self.number = None
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._handlers = {}

    def _note(self, number: int, _frame: object) -> None:
        # torchrun passes a Ctrl-C on that the terminal has sent already: two at once are one
        if self.number == signal.SIGINT == number and time.monotonic() > self._time + 2:
            raise KeyboardInterrupt
        self.number, self._time = number, time.monotonic()
