"""YAML files of options: found by name, read strictly, one on top of another."""

import difflib
import re
from pathlib import Path
from typing import ClassVar

import yaml

from ..errors import MissingFileError, UserError
from ..files import shipped_folder

__all__ = ["find_config", "read_config"]


class _Loader(yaml.SafeLoader):
    """Reads plain data, and refuses repeated keys, keys without a value, and aliases.

    Numbers are those of YAML 1.2: in 1.1, which PyYAML reads, 1:00 is 60, 010 is 8, and 1e-3 is a text.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, value in node.value:
            is_empty = isinstance(value, yaml.ScalarNode) and value.tag.endswith(":null") and not value.value
            if is_empty or str(key.value) in keys:
                problem = f"{key.value} {'has no value' if is_empty else 'stands here twice'}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


_PREFIX = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _letter, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _kept = [(tag, regexp) for tag, regexp in _resolvers if tag in (f"{_PREFIX}bool", f"{_PREFIX}null")]
    _Loader.yaml_implicit_resolvers[_letter] = _kept
_Loader.add_implicit_resolver(f"{_PREFIX}int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_PREFIX}float", re.compile(f"^({_FLOAT})$"), list("-+0123456789."))
_Loader.add_constructor(f"{_PREFIX}int", lambda loader, node: int(loader.construct_scalar(node)))


def find_config(name: str, suffix: str = ".yaml") -> Path:
    """Return the file of a config: the file itself, or a shipped one by its name, as "imagenet/raftmlp_s".

    Raises:
        MissingFileError: If there is none; the message names similar ones.
    """
    folder, stem = shipped_folder("configs"), name.removesuffix(suffix).removeprefix("configs/")
    shipped = folder / f"{stem}{suffix}"
    try:
        if Path(name).exists():
            return Path(name)
        if shipped.is_file():
            return shipped
    except (OSError, ValueError) as error:  # a name that no file can have
        raise UserError(f"no config {name[:100]!r}: {error}") from error
    known = [str(path.relative_to(folder).with_suffix("")) for path in folder.glob(f"*/*{suffix}")]
    last_parts = {name.rpartition("/")[2]: name for name in known}
    matches = difflib.get_close_matches(stem, [*last_parts, *known], n=3)
    near = list(dict.fromkeys(last_parts.get(name, name) for name in matches))
    hint = f"did you mean {' or '.join(near)}?" if near else f"shipped are {', '.join(sorted(known))}"
    raise MissingFileError(f"no config {name}; {hint}")


def read_config(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """Return the options in a YAML file, those of its ``base`` file under them.

    Raises:
        UserError: If the file or a base of it cannot be read, or is no mapping.
    """
    if path.resolve() in above:
        raise UserError(f"{path} is its own base")
    try:
        options = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{path} is no YAML file of options: it is nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{where}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # also numbers and texts that Python cannot read
        raise UserError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    options = {} if options is None else options
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise UserError(f"{path} must be a mapping from options to values")
    base = options.pop("base", None)
    if base is None:
        return options
    if not isinstance(base, str):
        raise UserError(f"{path}: base must be the name of a file, not {base!r}")
    return {**read_config(path.parent / base, (*above, path.resolve())), **options}
