"""The standard streams of a command: they take any text, and closed ones lead nowhere."""

import io
import os
import sys

__all__ = ["discard_output", "prepare_streams"]


def prepare_streams() -> None:
    """Let stdout and stderr take any text, and lead nowhere if they are closed.

    A closed one would hand its number to the next file that is opened, and C libraries print their messages into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
        if name != "stdin" and isinstance(getattr(sys, name), io.TextIOWrapper):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Let stdout lead nowhere, for its reader has closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
