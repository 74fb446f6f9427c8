"""Errors whose message is made for the user: it names the value and says what is allowed."""

import importlib.metadata
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MissingFileError", "MissingPackageError", "UserError", "first_words", "install_command", "shared_errors"]


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


def install_command(*extras: str) -> str:
    """Return a pip command that installs what these extras of raftmlp lack here.

    It names the packages, since raftmlp itself may be on no index that pip knows.
    """
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("raftmlp")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return shlex.join(["pip", "install", "-e", f"{Path(__file__).parents[1]}[{','.join(extras)}]"])
    requirements = [requirement for requirement in map(Requirement, lines) if requirement.name != "raftmlp"]
    environments = [{"extra": extra} for extra in extras]
    wanted = [r for r in requirements if not r.marker or any(map(r.marker.evaluate, environments))]
    missing = [requirement for requirement in wanted if not _is_installed(requirement)]
    return shlex.join(["pip", "install", *(f"{package.name}{package.specifier}" for package in missing or wanted)])


def _is_installed(requirement) -> bool:
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


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
