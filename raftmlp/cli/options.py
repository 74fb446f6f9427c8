"""Options of commands: made of settings, given on the command line or in YAML files, checked before anything runs."""

import argparse
import ast
import difflib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ..errors import UserError
from ..settings import Settings, in_words, parser_of
from .config_files import find_config, read_config
from .console import show_error
from .launcher import load_package

__all__ = ["Parser", "option_type", "output_file", "output_folder"]

PICTURES = (".png", ".jpg", ".pdf", ".svg")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default only where there is one, and the description as it is written."""

    def _get_help_string(self, action):
        none = action.default in (None, False, "", argparse.SUPPRESS) or action.default == {}
        return action.help if none or "(default" in action.help else super()._get_help_string(action)


def option_type(kind: Any) -> Callable[[str], Any]:
    """Return an option type of argparse for a type such as ``Count``, or for a function that raises UserErrors."""
    function = kind if inspect.isroutine(kind) else parser_of(kind)

    def parse(text: str) -> Any:
        try:
            return function(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


class KeyValues(argparse.Action):
    """An option of KEY=VALUE pairs: a mapping whose values are Python's where they can be, else texts."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = dict(value.partition("=")[::2] for value in values if value)
        if not all("=" in value for value in values if value):
            raise argparse.ArgumentError(self, "expected KEY=VALUE pairs")
        for key, text in pairs.items():
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pairs[key] = text
        setattr(namespace, self.dest, pairs)


def _argument(kind: Any) -> dict[str, Any]:
    """Return argparse's words for a field of an annotated type."""
    while get_origin(kind) in (Annotated, Union, UnionType):  # without bounds and None
        kind = get_args(kind)[0]
    origin, parts = get_origin(kind), get_args(kind)
    if kind is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if dict in (kind, origin):
        return dict(action=KeyValues, nargs="*")
    if origin is Literal:
        return dict(choices=parts)
    if origin in (list, tuple):
        return {**_argument(parts[0]), "nargs": "+" if origin is list else len(parts)}
    return {int: dict(metavar="N"), float: dict(metavar="X")}.get(kind, {})


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose options can also stand in a YAML file, given with -c/--config; the command line wins.

    Keys are the options' long names with underscores. A file may name one to start from as ``base``.

    Args:
        usage: The first line of the help.
        yaml_config: Whether there is -c/--config.
        **kwargs: More arguments of an ArgumentParser.
    """

    def __init__(self, usage: str = "%(prog)s [OPTION ...]", yaml_config: bool = True, **kwargs):
        super().__init__(usage=usage, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.yaml_config = yaml_config
        self.kinds: list[type[Settings]] = []
        self.checks: dict[str, Callable[[str], Any]] = {}
        self.sources: dict[str, str] = {}
        self.groups: dict[str, argparse._ArgumentGroup] = {}
        if yaml_config:
            self.add_argument(
                "-c",
                "--config",
                metavar="FILE",
                help="YAML file of options, or the name of a shipped one (imagenet/raftmlp_s); the command line wins",
            )

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Return the group of options with this title, a new one if there is none."""
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        return self.groups[title]

    def add_settings(self, *kinds: type[Settings], leave_out: tuple[str, ...] = ()) -> None:
        """Offer the fields of settings as options, in the groups of the classes that they are defined in.

        Args:
            *kinds: The settings.
            leave_out: Names of fields that are no options here.
        """
        self.kinds += kinds
        for kind in kinds:
            owners = {name: owner for owner in kind.__mro__ for name in inspect.get_annotations(owner)}
            for entry in fields(kind):
                if entry.name not in leave_out:
                    self._add_field(self.group(owners[entry.name].title), entry)

    def _add_field(self, group: argparse._ArgumentGroup, entry) -> None:
        """Offer a field of settings as an option; the settings themselves check its value."""
        argument = _argument(entry.type) | entry.metadata
        check, short = argument.pop("check"), argument.pop("short")
        default = entry.default_factory() if entry.default is MISSING else entry.default
        if check:
            self.checks[entry.name] = check
        names = [name for name in (short, f"--{entry.name.replace('_', '-')}") if name]
        group.add_argument(*names, default=default, **argument)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        if self.yaml_config:
            finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            finder.add_argument("-c", "--config", nargs="?")  # without a file, what follows refuses it
            config = finder.parse_known_args(args)[0].config
            if config:
                self._apply(read_config(find_config(config)), config)
        return self._check_settings(super().parse_args(args, namespace))

    def parse_options(self, options: dict, source: str) -> argparse.Namespace:
        """Return what the options of a mapping give, as those of a YAML file do; messages name the source.

        Raises:
            UserError: If an option is unknown or its value not allowed.
        """
        self._apply(options, source)
        return self._check_settings(super().parse_args([]))

    def _check_settings(self, args: argparse.Namespace) -> argparse.Namespace:
        """Give the options the values that the settings make of them.

        Raises:
            UserError: If one is not allowed; the message names the option, or the file that it stands in.
        """
        for kind in self.kinds:
            given = {entry.name: getattr(args, entry.name) for entry in fields(kind) if hasattr(args, entry.name)}
            try:
                checked = kind(**given)
            except UserError as error:
                self._refuse(args, *in_words(error.__cause__))
            for name in given:
                setattr(args, name, getattr(checked, name))
        return args

    def _refuse(self, args: argparse.Namespace, name: str, words: str) -> None:
        """End with an option's name, or the file that it stands in, and what is wrong with its value."""
        action = next((action for action in self._actions if action.dest == name), None)
        if name in self.sources and getattr(args, name) is self.get_default(name):
            raise UserError(f"{self.sources[name]}: {name} {words}")
        self.error(str(argparse.ArgumentError(action, words)))

    def load_and_check(self, args: argparse.Namespace) -> None:
        """Load torch and timm, then check the options whose values only they know: ``checks``, by the options' names.

        Raises:
            UserError: If a value is not allowed; the message names the option, and the file that it stands in.
        """
        load_package()
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if action.dest not in self.checks or value is None:
                continue
            try:
                for single in value if isinstance(value, list) else [value]:
                    self.checks[action.dest](single)
            except UserError as error:
                self._refuse(args, action.dest, str(error))

    def _apply(self, options: dict, path: str) -> None:
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        for key, value in options.items():
            if key not in actions:
                near = difflib.get_close_matches(key, actions, n=3)
                hint = f"; did you mean {' or '.join(near)}?" if near else f"; the keys are {', '.join(actions)}"
                raise UserError(f"{path}: unknown key {key!r}{hint}")
            self.set_defaults(**{key: self._given(actions[key], value, path)})
            self.sources[key] = path

    def _given(self, action: argparse.Action, value, path: str):
        """Return a YAML value as the command line would have given it."""
        if value is True and action.nargs == "?":
            return action.const
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{path}: {action.dest} must be true or false, not {value!r}")
            return value
        if any(action.dest == entry.name for kind in self.kinds for entry in fields(kind)):
            return value  # the settings check it
        values = value if isinstance(value, list) and action.nargs else [value]
        try:
            values = [self._get_value(action, str(single)) for single in values]
            for single in values:
                self._check_value(action, single)
        except argparse.ArgumentError as error:
            raise UserError(f"{path}: {action.dest} {error.message}") from error
        return values if action.nargs else values[0]

    def error(self, message):
        if message.startswith("unrecognized arguments: --"):
            name = message.split(": ")[1].split()[0].split("=")[0]
            if near := difflib.get_close_matches(name, self._option_string_actions, n=3):
                message += f"; did you mean {' or '.join(near)}?"
        raise SystemExit(show_error(UserError(f"{message} (--help lists the options)")))


# Files to write


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """Return an option type: files to write, with one of the suffixes; their folder is made."""

    @option_type
    def parse(text: str) -> Path:
        return check_output(Path(text), suffixes)

    return parse


def check_output(path: Path, suffixes: tuple[str, ...]) -> Path:
    """Return a file to write, whose folder is made if it is not there.

    Raises:
        UserError: If it cannot be written, or has none of the suffixes.
    """
    if path.suffix not in suffixes:
        raise UserError(f"{path} must be named {' or '.join(suffixes)}")
    output_folder(str(path.parent), path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    return path


def output_folder(text: str, shown: Path | None = None) -> Path:
    """Return a folder to write into, made if it is not there; ``shown`` is what the message names.

    Raises:
        UserError: If it cannot be made or written into.
    """
    path, name = Path(text), shown or f"into {text}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write {name}: no permission")
    return path
