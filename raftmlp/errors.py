"""Errors whose message is made for the user: it names the value and says what is allowed."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MissingFileError", "MissingPackageError", "UserError", "first_words", "shared_errors"]


class UserError(ValueError):
    """Something that the user gave cannot be used; a command shows the message alone and exits with status 2.

    Args:
        message: What is wrong, and what is allowed.
        shared: Whether all processes of a run raise it, so that the first one alone shows it.
    """

    def __init__(self, message: str, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class MissingFileError(UserError, FileNotFoundError):
    """A file that the user named does not exist."""


class MissingPackageError(UserError, ImportError):
    """An optional package is not installed; the message says how to install it."""


@contextmanager
def shared_errors() -> Iterator[None]:
    """Mark the user errors raised inside as those of all processes, so that the first one alone shows them."""
    try:
        yield
    except UserError as error:
        error.shared = True
        raise


def first_words(error: Exception) -> str:
    """Return an exception's message in one line of at most 400 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 400 else words[:400] + " ..."
