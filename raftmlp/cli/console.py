"""What a command shows: lines, notes, errors in one line, and its exit status."""

import errno
import logging
import os
import shlex
import sys
from collections.abc import Callable

from tqdm import tqdm

from ..data.workers import kill_workers
from ..errors import UserError, first_words
from ..processes import are_connected, is_first_process, process_numbers
from .launcher import discard_output, prepare_streams

__all__ = ["command_line", "run", "say", "show_error"]

# errors of a disk, which a user can repair
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM,
    errno.ENOENT, errno.ENAMETOOLONG,
)  # fmt: skip


def run(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit; user errors, errors of a disk and Ctrl-C end it in one line."""
    prepare_streams()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    log = logging.getLogger("raftmlp")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [_Console()]
    try:
        status = main()
    except UserError as error:
        status = show_error(error)
    except BrokenPipeError:
        discard_output()
        status = 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        status = show_error(error)
    except (MemoryError, RuntimeError) as error:
        import torch

        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        status = show_error(UserError(f"too little memory, a smaller --batch-size may help: {first_words(error)}"))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    finally:
        kill_workers()
    sys.exit(status)


class _Console(logging.Handler):
    """Prints what the package logs: warnings to stderr, the rest as a command's own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            say(record.getMessage())
        elif is_first_process():
            tqdm.write(record.getMessage(), file=sys.stderr)


def say(*words: object) -> None:
    """Print a line at once, above a progress bar; of several processes, the first prints."""
    if not is_first_process():
        return
    try:
        with tqdm.external_write_mode():
            print(*words, flush=True)
    except BrokenPipeError:  # the reader ("| head") has closed: the work goes on in silence
        discard_output()


def show_error(error: Exception) -> int:
    """Print an error's message and return the exit status, 2."""
    local_rank, rank = process_numbers()
    if local_rank == 0 or (are_connected() and not getattr(error, "shared", False)):
        print(f"{program()}: error: {f'[process {rank}] ' if rank else ''}{error}", file=sys.stderr)
    return 2


def program() -> str:
    """Return the name of the running command: "raftmlp train", or the script's file name."""
    return os.path.basename(sys.argv[0])


def command_line() -> str:
    """Return the running command as one would type it."""
    own = [sys.argv[0]] if sys.argv[0].startswith("raftmlp ") else ["python", shlex.quote(sys.argv[0])]
    return " ".join([*own, *map(shlex.quote, sys.argv[1:])])
