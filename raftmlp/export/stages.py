"""What is shown while an exporter works, which prints nothing for minutes."""

import itertools
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["show_stage"]

_logger = logging.getLogger(__name__)
INTERVAL = 0.2  # seconds between two pictures of the spinner


@contextmanager
def show_stage(name: str) -> Iterator[None]:
    """Show what is being done: on a terminal a spinner with the seconds, which goes when it is done; else a line.

    Args:
        name: What is being done, in words.
    """
    if not sys.stderr or not sys.stderr.isatty():
        _logger.info(f"{name} ...")
        yield
        return
    done, start = threading.Event(), time.perf_counter()

    def turn() -> None:
        for picture in itertools.cycle("|/-\\"):
            line.set_description_str(f"{picture} {name}, {time.perf_counter() - start:.0f} s")
            if done.wait(INTERVAL):
                return

    with tqdm(bar_format="{desc}", leave=False) as line:
        thread = threading.Thread(target=turn, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
