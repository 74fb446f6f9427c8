"""The manners that the tools share: options in YAML files, errors for people, models and data by name."""

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import yaml
from timm.data import create_loader, resolve_data_config
from timm.utils import ParseKwargs

from raftmlp import RaftMLP
from raftmlp.checkpoint import adapt_state_dict, load_state_dict
from raftmlp.data import class_names, create_dataset


class UserError(Exception):
    """What the user gave cannot be: the message is all that is shown, the exit status is 2."""


def run(main: Callable[[], None]) -> None:
    """Run a tool's main function; user errors and Ctrl-C end it in one line."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        main()
    except UserError as error:
        sys.exit(_line(error))
    except KeyboardInterrupt:
        print("\ninterrupted; training goes on with --resume after the last finished epoch", file=sys.stderr)
        sys.exit(130)


def _line(error: Exception) -> int:
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    return 2


@contextmanager
def user_errors(*kinds: type[Exception]):
    """Turn exceptions of the given kinds, whose messages are made for people, into user errors."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def number(kind: type, minimum: float, maximum: float | None = None) -> Callable[[str], float]:
    """Return an option type: numbers from minimum to maximum, both allowed."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value <= (float("inf") if maximum is None else maximum):
            kinds = "a whole number" if kind is int else "a number"
            allowed = f"of {minimum} or more" if maximum is None else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"must be {kinds} {allowed}, not {text!r}")
        return value

    return parse


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only where there is one."""

    def _get_help_string(self, action):
        none = action.default in (None, False, "", argparse.SUPPRESS) or action.default == {}
        return action.help if none or "(default" in action.help else super()._get_help_string(action)


def first_words(error: Exception) -> str:
    """Return an exception's message in one line of bounded length."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 400 else words[:400] + " ..."


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose options can also stand in a YAML file, given with -c/--config; the command line wins.

    Keys are the options' long names with underscores. A file may name one to start from as ``base``.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("-c", "--config", metavar="FILE", help="YAML file of options; the command line wins over it")

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("-c", "--config")
        config = finder.parse_known_args(args)[0].config
        if config:
            self._apply(read_config(config), config)
        try:
            return super().parse_args(args, namespace)
        except ValueError:  # of timm's ParseKwargs
            self.error("--model-kwargs takes KEY=VALUE pairs")

    def _apply(self, options: dict, path: str) -> None:
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        for key, value in options.items():
            if key not in actions:
                near = difflib.get_close_matches(key, actions, n=3)
                hint = f"; did you mean {' or '.join(near)}?" if near else f"; the keys are {', '.join(actions)}"
                raise UserError(f"{path}: unknown key {key!r}{hint}")
            self.set_defaults(**{key: self._checked(actions[key], value, path)})

    def _checked(self, action: argparse.Action, value, path: str):
        """Return a YAML value as the command line would have given it."""
        if value is None and action.default is not None:
            raise UserError(f"{path}: {action.dest} has no value")
        if value is None or isinstance(action, ParseKwargs):
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{path}: {action.dest} must be a mapping, not {value!r}")
            return value
        if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{path}: {action.dest} must be true or false, not {value!r}")
            return value
        many = isinstance(action.nargs, int) or action.nargs in ("+", "*")
        values = value if many and isinstance(value, list) else [value]
        if isinstance(action.nargs, int) and len(values) != action.nargs:
            raise UserError(f"{path}: {action.dest} takes {action.nargs} values, not {value!r}")
        try:
            checked = [self._get_value(action, str(v)) for v in values]
            for v in checked:
                self._check_value(action, v)
        except argparse.ArgumentError as error:
            raise UserError(f"{path}: {action.dest}: {error.message}") from error
        return checked if many else checked[0]

    def error(self, message):
        raise SystemExit(_line(UserError(f"{message} (--help lists the options)")))


def read_config(path: str | Path, above: tuple[Path, ...] = ()) -> dict:
    """Return the options in a YAML file, those of its ``base`` file under them."""
    path = Path(path)
    if path.resolve() in above:
        raise UserError(f"{path} is its own base")
    try:
        options = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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


def known_model(name: str, among: str = "") -> str:
    """Return the name if timm knows such a model, one that matches the pattern; else say which are near."""
    known = timm.list_models(among)
    if timm.models.split_model_name_tag(name)[0] not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or timm.list_models("raftmlp*")
        raise UserError(f"unknown model {name!r}; did you mean {' or '.join(near)}?")
    return name


def add_model_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that say which model: the ones of ``create_model``."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=known_model, default="raftmlp_s", metavar="NAME", help="any model of timm's list"
    )
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start from the model's pretrained weights",
    )
    group.add_argument("--checkpoint", metavar="FILE", help="start from the weights in this file")
    group.add_argument(
        "--num-classes", type=number(int, 1), metavar="N", help="classes (default: the data set's, else the model's)"
    )
    group.add_argument(
        "--img-size",
        type=number(int, 1),
        nargs="+",
        metavar="N",
        help="size of the images in pixels, one number or height and width (default: the model's)",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="KEY=VALUE",
        help="more arguments of the model",
    )
    return group


def add_data_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that say which data, and how images come to the model."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", metavar="DIR", help="folder of the data set")
    group.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="'digits' (embedded), or one of timm's: torch/NAME, hfds/NAME, wds/NAME; empty for a folder of images",
    )
    group.add_argument("--dataset-download", action="store_true", help="let torchvision fetch the data set")
    group.add_argument("--val-split", default="validation", metavar="NAME", help="split to evaluate on")
    group.add_argument("-b", "--batch-size", type=number(int, 1), default=128, metavar="N", help="images a batch")
    group.add_argument(
        "-j",
        "--workers",
        type=number(int, 0),
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that load images, 0 to load them in this one",
    )
    group.add_argument(
        "--interpolation",
        choices=("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        help="resizing of images (default: the model's)",
    )
    group.add_argument(
        "--crop-pct",
        type=number(float, 0.01, 1),
        metavar="X",
        help="share of the image in the centre crop (default: the model's)",
    )
    group.add_argument("--mean", type=float, nargs=3, metavar="X", help="mean of the pixels (default: the model's)")
    group.add_argument(
        "--std", type=number(float, 1e-6), nargs=3, metavar="X", help="deviation of the pixels (default: the model's)"
    )
    return group


def image_size(values: list[int] | None) -> tuple[int, int] | None:
    """Return height and width for an --img-size of one number or two."""
    if not values:
        return None
    if len(values) > 2:
        raise UserError(f"--img-size takes one number of pixels, or height and width, not {values}")
    return values[0], values[-1]


def create_model(args: argparse.Namespace, fresh_head: bool = False, **kwargs) -> torch.nn.Module:
    """Return the model that the options name, its pretrained weights or its checkpoint loaded, on the CPU.

    Args:
        args: What ``add_model_arguments`` made.
        fresh_head: Let a checkpoint's classifier go where it has another number of classes.
        **kwargs: More arguments of the model; those that are None are left out.
    """
    given = dict(num_classes=args.num_classes, **kwargs)
    cfg = timm.models.get_pretrained_cfg(timm.models.split_model_name_tag(args.model)[0])
    if args.img_size and cfg and cfg.fixed_input_size:  # must be told; others take any size
        given["img_size"] = image_size(args.img_size)
    given = {**given, **args.model_kwargs}
    try:
        model = timm.create_model(args.model, pretrained=args.pretrained, **given)
    except (ValueError, FileNotFoundError, TypeError, RuntimeError) as error:
        raise UserError(f"cannot make {args.model}: {first_words(error)}") from error
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, fresh_head)
    return model


def load_checkpoint(model: torch.nn.Module, path: str, fresh_head: bool) -> None:
    """Load weights strictly; if fresh_head, but for a classifier of another number of classes, and say so."""
    with user_errors(ValueError, FileNotFoundError):
        state = load_state_dict(path)
        if isinstance(model, RaftMLP):
            state = adapt_state_dict(state, model)
    own, note = model.state_dict(), ""
    if fresh_head:
        classifier = model.pretrained_cfg.get("classifier") or ()
        for name in (classifier,) if isinstance(classifier, str) else classifier:
            if len(state.get(f"{name}.bias", ())) != model.num_classes:
                note = f"{path}: its classifier is missing or another task's; this model keeps its own, fresh one"
                state.update({key: value for key, value in own.items() if key.startswith(f"{name}.")})
    differences = describe_differences(
        {key: tuple(value.shape) for key, value in state.items()},
        {key: tuple(value.shape) for key, value in own.items()},
    )
    if differences:
        more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
        if any("fc1.weight has shape" in line for line in differences):
            more += "; if it was trained at another image size, say --model-kwargs img_size=N"
        raise UserError(f"{path} does not fit this {type(model).__name__}: {'; '.join(differences[:3])}{more}")
    if note:
        print(note)
    model.load_state_dict(state)


def describe_differences(found: dict[str, tuple], expected: dict[str, tuple]) -> list[str]:
    """Return what separates two sets of keys and shapes, a line each; none if they are the same."""
    lines = [f"{key} is missing" for key in expected if key not in found]
    lines += [f"{key} is not known" for key in found if key not in expected]
    lines += [
        f"{key} has shape {list(found[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    return lines


def create_data(args: argparse.Namespace, split: str, is_training: bool = False):
    """Return a split of the data set that the options name."""
    with user_errors(ValueError, FileNotFoundError, ImportError):
        return create_dataset(
            args.dataset,
            args.data_dir,
            split,
            is_training=is_training,
            batch_size=args.batch_size,
            download=args.dataset_download,
        )


def check_classes(dataset, model: torch.nn.Module) -> None:
    """Refuse a data set of more classes than the model tells apart."""
    names = class_names(dataset)
    if names and len(names) > model.num_classes:
        raise UserError(f"the data has {len(names)} classes, the model tells {model.num_classes} apart")


def image_settings(args: argparse.Namespace, model: torch.nn.Module) -> dict:
    """Return how images are prepared: timm's data config of the model with the options over it."""
    settings = resolve_data_config(vars(args) | dict(img_size=None), model=model)
    if size := image_size(args.img_size):
        settings["input_size"] = (settings["input_size"][0], *size)
    return settings


def evaluation_loader(args: argparse.Namespace, dataset, settings: dict, device: torch.device):
    """Return a loader of batches to evaluate on, in the data set's order, every image once."""
    return create_loader(
        dataset,
        input_size=settings["input_size"],
        batch_size=args.batch_size,
        interpolation=settings["interpolation"],
        mean=settings["mean"],
        std=settings["std"],
        crop_pct=settings["crop_pct"],
        crop_mode=settings["crop_mode"],
        num_workers=args.workers,
        device=device,
        pin_memory=device.type == "cuda",
    )


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format=path.suffix[1:])
    temporary.replace(path)


def output_file(suffixes: tuple[str, ...]) -> Callable[[str], Path]:
    """Return an option type: files to write, with one of the suffixes; their folder is made."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix not in suffixes:
            raise argparse.ArgumentTypeError(f"{text} must be named {' or '.join(suffixes)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from error
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"cannot write {text}")
        return path

    return parse


def find_device(name: str | None) -> torch.device:
    """Return the device of that name, or the GPU if there is one, else the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device
