"""What a command shows: lines, notes, errors in one line, and its exit status."""

import logging
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TextIO

from ..data.workers import kill_workers
from ..device import are_connected, is_first_process, process_numbers
from ..errors import UserError, first_words, install_command
from .streams import discard_output, prepare_streams

__all__ = ["command_line", "run", "say", "show_error"]


def run(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit: an error ends it in one line and status 2, Ctrl-C in status 130.

    With RAFTMLP_DEBUG=1 in the environment an error shows its traceback.
    """
    prepare_streams()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    log = logging.getLogger("raftmlp")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [_Console()]
    try:
        status = main()
    except BrokenPipeError:
        discard_output()
        status = 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        if os.environ.get("RAFTMLP_DEBUG"):
            raise
        status = show_error(error)
    finally:
        kill_workers()
    sys.exit(status)


class _Console(logging.Handler):
    """Prints what the package logs: warnings to stderr, the rest as a command's own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), file=sys.stderr if record.levelno >= logging.WARNING else None)


def say(*words: object, file: TextIO | None = None) -> None:
    """Print a line at once, above a progress bar; of several processes, the first prints."""
    if not is_first_process():
        return
    bars = sys.modules.get("tqdm")  # where it is not loaded, there is no bar
    try:
        with bars.tqdm.external_write_mode(file) if bars else nullcontext():
            print(*words, file=file, flush=True)
    except BrokenPipeError:  # the reader ("| head") has closed: the work goes on in silence
        discard_output()


def show_error(error: Exception) -> int:
    """Print an error in one line and return the exit status, 2."""
    local_rank, rank = process_numbers()
    if local_rank == 0 or (are_connected() and not getattr(error, "shared", False)):
        print(f"{program()}: error: {f'[process {rank}] ' if rank else ''}{_in_words(error)}", file=sys.stderr)
    return 2


def _in_words(error: Exception) -> str:
    """Return an error's message; that of another library says how to see where it comes from."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.strerror):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}; what the commands need: {install_command('demo')}"
    words, kind = first_words(error), type(error).__name__
    if kind in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in words:
        return f"too little memory, a smaller --batch-size may help: {words}"
    return f"{words} ({kind}; RAFTMLP_DEBUG=1 shows the traceback)"


def program() -> str:
    """Return the name of the running command: "raftmlp train", or the script's file name."""
    return os.path.basename(sys.argv[0])


def command_line() -> str:
    """Return the running command as one would type it."""
    return " ".join([sys.argv[0], *map(shlex.quote, sys.argv[1:])])
