"""The manners that the tools share: options in YAML files, errors for people, models by name, files that land whole."""

import argparse
import difflib
import errno
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import yaml
from timm.utils import ParseKwargs
from timm.utils.distributed import init_distributed_device_so, is_distributed_env, world_info_from_env
from tqdm import tqdm

from raftmlp import RaftMLP
from raftmlp.checkpoint import adapt_state_dict, describe_differences, load_state_dict, shapes, summary, trained_as


class UserError(Exception):
    """What the user gave cannot be: the message is all that is shown, the exit status is 2.

    Args:
        message: The message.
        shared: Of several processes, all raise it, so that the first alone shows it.
    """

    def __init__(self, message: str, shared: bool = False):
        super().__init__(message)
        self.shared = shared


# what a disk does, and a user can mend
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM,
    errno.ENOENT,
)  # fmt: skip
_started = False  # whether this process knows the others


def run(main: Callable[[], None]) -> None:
    """Run a tool's main function; user errors, errors of a disk and Ctrl-C end it in one line."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        main()
    except UserError as error:
        sys.exit(show_error(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        sys.exit(show_error(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def show_error(error: Exception) -> int:
    """Print an error for people and return the exit status."""
    local_rank, rank, _ = world_info_from_env()
    if local_rank == 0 or (_started and not getattr(error, "shared", False)):
        print(f"{Path(sys.argv[0]).name}: error: {f'[process {rank}] ' if rank else ''}{error}", file=sys.stderr)
    return 2


def is_first() -> bool:
    """Return whether this is the first of several processes, or the only one."""
    return world_info_from_env()[1] == 0


def say(*words) -> None:
    """Print a line at once, above a progress bar; of several processes, the first prints."""
    if not is_first():
        return
    try:
        with tqdm.external_write_mode():
            print(*words, flush=True)
    except BrokenPipeError:  # whoever read ("| head") has enough: the work goes on in silence
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        if value is None or not minimum <= value <= (sys.float_info.max if maximum is None else maximum):
            kinds = "a whole number" if kind is int else "a number"
            allowed = f"of {minimum} or more" if maximum is None else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"must be {kinds} {allowed}, not {text!r}")
        return value

    return parse


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default only where there is one, and the description as it is written."""

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

    Args:
        usage: The first line of the help.
        yaml_config: Whether there is -c/--config.
        **kwargs: What else an ArgumentParser takes.
    """

    def __init__(self, usage: str = "%(prog)s [OPTION ...]", yaml_config: bool = True, **kwargs):
        super().__init__(usage=usage, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.yaml_config = yaml_config
        if yaml_config:
            self.add_argument(
                "-c", "--config", metavar="FILE", help="YAML file of options; the command line wins over it"
            )

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        if self.yaml_config:
            finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            finder.add_argument("-c", "--config")
            config = finder.parse_known_args(args)[0].config
            if config:
                self._apply(read_config(config), config)
        try:
            return super().parse_args(args, namespace)
        except ValueError:  # of timm's ParseKwargs and mmengine's DictAction
            self.error("expected KEY=VALUE pairs")

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
        if value is True and action.nargs == "?":
            return action.const
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
        if message.startswith("unrecognized arguments: --"):
            name = message.split(": ")[1].split()[0].split("=")[0]
            if near := difflib.get_close_matches(name, self._option_string_actions, n=3):
                message += f"; did you mean {' or '.join(near)}?"
        raise SystemExit(show_error(UserError(f"{message} (--help lists the options)")))


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
        "--model",
        type=known_model,
        metavar="NAME",
        help="any model of timm's list (default: the checkpoint's, else raftmlp_s)",
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
        "--in-chans", type=number(int, 1), metavar="N", help="channels of the images: 1 or 3 (default: the model's)"
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


def image_size(values: list[int] | None) -> tuple[int, int] | None:
    """Return height and width for an --img-size of one number or two."""
    if not values:
        return None
    if len(values) > 2:
        raise UserError(f"--img-size takes one number of pixels, or height and width, not {values}")
    return values[0], values[-1]


def create_model(
    args: argparse.Namespace, to_train: bool = False, classes: int | None = None, **kwargs
) -> torch.nn.Module:
    """Return the model that the options name, its pretrained weights or its checkpoint loaded, on the CPU.

    What the options leave open is taken from the checkpoint where it tells: name, arguments, classes, trained size.

    Args:
        args: What ``add_model_arguments`` made; its ``model`` is set.
        to_train: Build a RaftMLP's grid for --img-size, and let a checkpoint's classifier go where it has another
            number of classes.
        classes: Number of classes if nothing else tells it.
        **kwargs: More arguments of the model; those that are None are left out.
    """
    told = {}
    if args.checkpoint and args.pretrained:
        raise UserError("--checkpoint and --pretrained exclude each other")
    if args.checkpoint:
        with user_errors(ValueError, FileNotFoundError):
            told = trained_as(args.checkpoint)
    name = told.get("model") if told.get("model") in timm.list_models() else None
    args.model = args.model or name or "raftmlp_s"
    if args.model != name:
        told = {}
    cfg = dict(told.get("pretrained_cfg", {}))
    given = dict(
        num_classes=args.num_classes or cfg.get("num_classes") or (None if args.pretrained else classes),
        in_chans=args.in_chans or cfg.get("input_size", (None,))[0],
        **kwargs,
    )
    architecture = timm.models.split_model_name_tag(args.model)[0]
    default = timm.models.get_pretrained_cfg(architecture)
    ours = architecture in timm.list_models(module="raftmlp")
    if args.img_size and default and (default.fixed_input_size or (ours and to_train)):  # others take any size
        given["img_size"] = image_size(args.img_size)
    given = {**told.get("model_kwargs", {}), **{k: v for k, v in given.items() if v is not None}, **args.model_kwargs}
    try:
        model = timm.create_model(args.model, pretrained=args.pretrained, pretrained_cfg_overlay=cfg or None, **given)
    except Exception as error:  # constructors raise anything on arguments that they cannot take
        raise UserError(f"cannot make {args.model}: {first_words(error)}") from error
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, to_train, name)
    known = model.pretrained_cfg.get("num_classes")
    if args.pretrained and known and model.num_classes != known:
        if not to_train:
            raise UserError(
                f"the pretrained weights of {args.model} tell {known} classes apart, not {model.num_classes}: the "
                f"classifier would be a random one"
            )
        say(f"the classifier starts anew: {model.num_classes} classes, the pretrained weights have {known}")
    return model


def load_checkpoint(model: torch.nn.Module, path: str, fresh_head: bool, told: str | None) -> None:
    """Load weights strictly; if fresh_head, but for a classifier of another number of classes, and say so.

    Args:
        model: The model.
        path: The checkpoint file.
        fresh_head: Whether the classifier may go.
        told: The model that the file says it is of.
    """
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
    differences = describe_differences(shapes(state), shapes(own))
    if differences:
        hint = ""
        if any("fc1.weight has shape" in line for line in differences):
            hint = "; if it was trained at another image size, say --model-kwargs img_size=N"
        whose = f" (it is of {told})" if told else ""
        raise UserError(f"{path}{whose} does not fit this {type(model).__name__}: {summary(differences)}{hint}")
    if note:
        say(note)
    model.load_state_dict(state)


@contextmanager
def landing(path: Path):
    """Give a file beside path to write, which becomes path at the end, and goes if the writing fails."""
    temporary = path.with_name(f".tmp.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all."""
    with landing(path) as temporary:
        temporary.write_text(text)


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as a file that is there whole or not at all."""
    with landing(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:])


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


def output_folder(text: str) -> Path:
    """Return a folder to write into, made if it is not there: an option type."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write into {text}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write into {text}")
    return path


def find_device(name: str | None) -> torch.device:
    """Return the device of that name, or the GPU if there is one, else the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


@dataclass(frozen=True)
class Processes:
    """This process among those that train together: its device, its number, how many they are."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, or the only one."""
        return self.rank == 0

    def on_first(self, function: Callable, *args):
        """Return in all processes what a function returns in the first, or raise its UserError in all."""
        value = error = None
        if self.is_first:
            try:
                value = function(*args)
            except UserError as raised:
                error = str(raised)
        if self.world_size > 1:
            result = [value, error]
            torch.distributed.broadcast_object_list(result)
            value, error = result
        if error is not None:
            raise UserError(error, shared=True)
        return value


def end_together() -> None:
    """Let all processes come to their end: one that ends while others still work or talk to it may take them down."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(1)  # gloo's threads want the GIL to let go of their last work, and abort where Python has ended
        torch.distributed.destroy_process_group()


def start_processes(name: str | None) -> Processes:
    """Join the processes that torchrun or SLURM started, if any: NCCL between GPUs, gloo between CPUs."""
    global _started
    _started = True
    if not is_distributed_env():
        return Processes(find_device(name))
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):  # each on a GPU of its own
        name = f"cuda:{world_info_from_env()[0]}"
    device = find_device(name)
    try:
        joined = init_distributed_device_so(device.type)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"the processes do not find each other: {first_words(error)}") from error
    return Processes(torch.device(joined["device"]), joined["global_rank"], joined["world_size"])


def add_device_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options that say where a model runs, and in which precision."""
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False, help="mixed precision (autocast)")
    group.add_argument(
        "--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="lower precision of --amp"
    )
    group.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=False, help="channels-last memory layout"
    )
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Return the precision that the options name, as a context."""
    return torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)
