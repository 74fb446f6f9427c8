"""Typed settings: dataclasses of pydantic, whose fields are also the options of commands and the keys of YAML files.

The types below say which values are allowed. Python code, the command line and YAML files are checked by them alike.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from functools import partial, wraps
from typing import Annotated, Any, ClassVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from .errors import UserError

__all__ = [
    "Count", "Float", "Int", "NonNegative", "Settings", "Share", "Text", "between", "in_words", "option", "parser_of",
    "settings", "several",
]  # fmt: skip


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic takes True for 1
        raise ValueError("input should be a number")
    return value


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Count = Annotated[Int, Field(ge=1)]
NonNegative = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Text = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


def between(least: float, most: float | None = None) -> Any:
    """Return the type of numbers from ``least`` to ``most``: of whole ones, if ``least`` is one."""
    return Annotated[Int if isinstance(least, int) else Float, Field(ge=least, le=most)]


def several(kind: Any) -> Any:
    """Return the type of lists of one value or more; a single value makes one too."""
    return Annotated[list[kind], BeforeValidator(_list), Field(min_length=1)]


@dataclass_transform(kw_only_default=True)
def settings(cls: type) -> type:
    """Make a class of settings: a dataclass of pydantic that is given its fields by name, and raises UserErrors."""
    cls = dataclass(cls, kw_only=True, config=CONFIG)
    validate = cls.__init__

    @wraps(validate)
    def __init__(self, **values):
        try:
            validate(self, **values)
        except ValidationError as error:
            raise UserError(" ".join(filter(None, in_words(error)))) from error

    cls.__init__ = __init__
    return cls


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    check: Callable[[Any], Any] | None = None,
    short: str | None = None,
    factory: Callable[[], Any] = MISSING,
    **argument: Any,
) -> Any:
    """Return a field of settings that a command offers as an option.

    Args:
        default: The default value.
        help: The help text.
        check: A function that refuses a value by what only torch or timm knows: a command calls it after it has parsed
            all of its options, since those take seconds to load.
        short: A short name, such as "-b".
        factory: Makes the default value, in place of ``default``.
        **argument: More of argparse's words: action, nargs, const, metavar.
    """
    return field(
        default=default, default_factory=factory, metadata=dict(help=help, check=check, short=short, **argument)
    )


@settings
class Settings:
    """The base of all settings. A class that inherits from several is offered in groups, one for each ``title``.

    Raises:
        UserError: If a value is not allowed; the message names the field.
    """

    title: ClassVar[str] = ""

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> "Settings":
        """Return settings of the values of that name in a mapping, which may hold others too."""
        return cls(**{entry.name: values[entry.name] for entry in fields(cls) if entry.name in values})


def in_words(error: ValidationError) -> tuple[str, str]:
    """Return which field an error of pydantic is about, "" if it is none alone, and what is wrong with its value."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        words = str(cause)
    else:
        message, shown = str(cause or first["msg"]), _shown(first["input"])
        must = message.removeprefix("Input should be")
        words = f"{shown} is not allowed: {message}" if must == message else f"must be{must}, not {shown}"
    return str(first["loc"][0]) if first["loc"] else "", words


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def parser_of(kind: Any) -> Callable[[Any], Any]:
    """Return a function that gives a text as a value of an annotated type, such as ``Count``.

    Raises:
        UserError: If a value is not allowed.
    """

    def parse(adapter: TypeAdapter, value: Any) -> Any:
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            raise UserError(in_words(error)[1]) from error

    return partial(parse, TypeAdapter(kind, config=CONFIG))
