"""Typed settings: dataclasses whose fields have a help text and know which values are allowed.

The commands make their options of them; Python code gives the values by name. Both are checked in the same way.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, get_origin

from .errors import UserError

__all__ = ["Number", "Settings", "option"]


@dataclass(frozen=True)
class Number:
    """A kind of number with bounds, both allowed; called with a text, it parses it."""

    kind: type
    minimum: float
    maximum: float | None = None

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        return self.check(value, text)

    def check(self, value: Any, shown: Any = None) -> Any:
        """Return the value.

        Raises:
            UserError: If it is not such a number; ``shown`` is what the message names.
        """
        kinds = (int,) if self.kind is int else (int, float)
        upper = sys.float_info.max if self.maximum is None else self.maximum
        if isinstance(value, bool) or not isinstance(value, kinds) or not self.minimum <= value <= upper:
            kind = "a whole number" if self.kind is int else "a number"
            allowed = f"of {self.minimum} or more" if self.maximum is None else f"from {self.minimum} to {self.maximum}"
            raise UserError(f"must be {kind} {allowed}, not {shown if shown is not None else value!r}")
        return value


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    type: Callable[[str], Any] | None = None,
    check: Callable[[Any], Any] | None = None,
    short: str | None = None,
    factory: Callable[[], Any] = MISSING,
    **argument: Any,
) -> Any:
    """Return a dataclass field that a command offers as an option.

    Args:
        default: The default value.
        help: The help text.
        type: A ``Number``, or another function that parses a text; None takes texts as they are.
        check: A function that refuses a value by what only torch or timm knows: a command calls it after it has parsed
            all of its options, since those take seconds to load.
        short: A short name, such as "-b".
        factory: Makes the default value, in place of ``default``.
        **argument: More of argparse's words: choices, nargs, const, metavar.
    """
    metadata = dict(help=help, type=type, check=check, short=short, **argument)
    return field(default=default, default_factory=factory, metadata=metadata)


@dataclass(kw_only=True)
class Settings:
    """The base of all settings: fields made by ``option``, checked when they are given.

    A class that inherits from several is offered in groups, one for each class that has a ``title``.

    Raises:
        UserError: If a value is not allowed; the message names the field.
    """

    title: ClassVar[str] = ""

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None and entry.default is None:
                continue
            try:
                _check(entry.type, entry.metadata, value)
                if value == "" and "" not in (entry.default, *entry.metadata.get("choices", ())):
                    raise UserError("must not be empty")
            except UserError as error:
                raise UserError(f"{entry.name} {error}") from error

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> "Settings":
        """Return settings of the values of that name in a mapping, which may hold others too."""
        return cls(**{entry.name: values[entry.name] for entry in fields(cls) if entry.name in values})


def _check(kind: Any, metadata: Mapping[str, Any], value: Any) -> None:
    if kind in (bool, bool | None) and not isinstance(value, bool):
        raise UserError(f"must be true or false, not {value!r}")
    if kind in (str, str | None) and not isinstance(value, str | os.PathLike):
        raise UserError(f"must be a text, not {value!r}")
    if get_origin(kind) is dict and not isinstance(value, Mapping):
        raise UserError(f"must be a mapping, not {value!r}")
    many = metadata.get("nargs") not in (None, "?")
    count = metadata.get("nargs")
    if many and not isinstance(value, (list, tuple, dict)):
        raise UserError(f"must be a sequence, not {value!r}")
    if (isinstance(count, int) and len(value) != count) or (count == "+" and not len(value)):
        raise UserError(f"takes {'one or more' if count == '+' else count} values, not {value!r}")
    for single in value if many else [value]:
        if isinstance(metadata.get("type"), Number):
            metadata["type"].check(single)
        if metadata.get("choices") and single not in metadata["choices"]:
            choices = ", ".join(map(repr, metadata["choices"]))
            raise UserError(f"must be one of {choices}, not {single!r}")
