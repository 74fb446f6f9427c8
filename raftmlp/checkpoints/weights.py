"""Weights: reading checkpoint files without running code from them, and writing them.

Files are safetensors, or are read by ``torch.load(weights_only=True)``.
"""

import argparse
import errno
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import MissingFileError, UserError, first_words
from ..files import write_bytes
from .description import check_description, parse_json, shorten

__all__ = [
    "check_tensors", "check_types", "describe_differences", "first_readable", "load_checkpoint", "load_state_dict",
    "read_description", "read_hub_config", "read_metadata", "save_state_dict", "shapes", "summary", "unwrap",
]  # fmt: skip

StateDict = dict[str, Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # of buffers that count
HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"  # the files of a folder for the Hugging Face Hub


# Files


def load_state_dict(path: str | Path, stand_ins: Sequence = ()) -> StateDict:
    """Return the weights in a checkpoint file; of a training checkpoint, the averaged ones (EMA) where it has them.

    Arguments and errors are those of ``load_checkpoint``; weights that ``check_tensors`` refuses are an error too.
    """
    state = unwrap(load_checkpoint(path, stand_ins), path)
    if not state:
        raise UserError(f"{path} holds no weights")
    check_tensors(state, path)
    return state


def load_checkpoint(path: str | Path, stand_ins: Sequence = ()) -> Mapping:
    """Return the whole content of a checkpoint file, read without running code from it.

    Args:
        path: The file, safetensors or of ``torch.save``, or a folder for the Hugging Face Hub.
        stand_ins: Functions and classes that may be called for names in the file, in the form that
            ``torch.serialization.safe_globals`` takes; those of plain data may be called anyway.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If the file is damaged, is no checkpoint, or has anything but plain data.
    """
    path = _checkpoint_file(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):  # timm's options are a Namespace
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message says how to run the code in it
        raise UserError(f"{path} is damaged, or holds more than tensors and plain data; it was not loaded") from error
    except Exception as error:  # the readers raise anything on bytes that are no checkpoint
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: it ends too early
            raise
        raise UserError(f"{path} is damaged or is no checkpoint: {first_words(error)}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no weights")
    return content


def first_readable(paths: Iterable[str | Path], stand_ins: Sequence = ()) -> tuple[Path | None, list[str]]:
    """Return the first of several checkpoint files that can be read, None if none can, and why those before it cannot.

    ``stand_ins`` are those of ``load_checkpoint``.
    """
    damaged = []
    for path in paths:
        try:
            load_checkpoint(path, stand_ins)
        except (UserError, OSError) as error:
            damaged.append(str(error))
            continue
        return Path(path), damaged
    return None, damaged


def _checkpoint_file(path: str | Path) -> Path:
    """Return a checkpoint file: the one that is named, or that in a folder for the Hugging Face Hub."""
    path = Path(path)
    if path.is_dir():
        if not all((path / name).is_file() for name in (HUB_WEIGHTS, HUB_CONFIG)):
            raise MissingFileError(f"{path} is a folder: name a checkpoint file in it")
        path = path / HUB_WEIGHTS
    if not path.is_file():
        raise MissingFileError(f"no checkpoint at {path}")
    return path


def read_description(path: str | Path, stand_ins: Sequence = ()) -> dict:
    """Return what a checkpoint file says of its model: any of ``model``, ``model_kwargs`` and ``pretrained_cfg``.

    See ``raftmlp.checkpoints.description`` for the fields and for what is allowed. Of a folder for the Hugging Face
    Hub, or of the weights in it, config.json says it. Arguments and errors are those of ``load_checkpoint``.
    """
    path = _checkpoint_file(path)
    config = path.with_name(HUB_CONFIG)
    if path.name == HUB_WEIGHTS and config.is_file():
        return read_hub_config(config)
    if path.suffix == ".safetensors":
        fields = read_metadata(path)
        for key in fields.keys() & {"model_kwargs", "pretrained_cfg"}:
            fields[key] = parse_json(fields[key], f"{path}: {key}")
    else:
        content = load_checkpoint(path, stand_ins)
        fields = {**content, "model": content.get("arch")}
    return check_description(fields, path)


def read_hub_config(path: Path) -> dict:
    """Return what the config.json of a folder for the Hugging Face Hub says of its model, as ``read_description``."""
    config = parse_json(path.read_bytes(), path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it must be a mapping")
    cfg = config.get("pretrained_cfg")
    if isinstance(cfg, dict):
        cfg |= {key: config[key] for key in ("num_classes", "label_names") if config.get(key) is not None}
    return check_description(
        dict(model=config.get("architecture"), model_kwargs=config.get("model_args"), pretrained_cfg=cfg), path
    )


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, as ``save_state_dict`` wrote it."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or is no checkpoint: {error}") from error


def save_state_dict(state: StateDict, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights and metadata as one safetensors file, complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_bytes(path, safetensors.torch.save(state, {"format": "pt", **(metadata or {})}))


# State dicts


def unwrap(checkpoint: Mapping, source: str | Path = "the checkpoint") -> StateDict:
    """Return the weights inside a checkpoint, without wrapping dicts and key prefixes.

    Takes plain state dicts and those under state_dict_ema, model_ema, state_dict or model; drops ``module.`` (data
    parallel) and ``_orig_mod.`` (compiled) from the keys; of a detector's weights takes the ``backbone.`` part (of one
    with ``raftmlp.mm``, ``backbone.model.``).

    Raises:
        UserError: If a key is no text; the message names the source.
    """
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
            break
    state = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if odd := [key for key in state if not isinstance(key, str)]:
        raise UserError(f"{source} has weights under the key {shorten(odd[0])}: keys must be texts")
    while any(key.startswith(("module.", "_orig_mod.")) for key in state):
        state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}
    backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return {key.removeprefix("model."): value for key, value in backbone.items()} or state


def check_tensors(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse tensors that cannot be weights: such of another kind than dense, or of values that are not finite.

    Integers may be buffers of a model; ``check_types`` decides it.

    Raises:
        UserError: If there is one; the message names the source and the key.
    """
    for key, value in state.items():
        if fault := _fault(value):
            raise UserError(f"{source}: {shorten(key)} {fault}; weights are dense tensors of finite floats")


def _fault(value: Tensor) -> str:
    """Return why a tensor cannot be weights, "" if it can."""
    if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "is no dense tensor"
    if value.dtype not in FLOATS + INTEGERS:
        return f"is of {value.dtype}"
    if value.numel() > max(value.untyped_storage().nbytes(), 2**24):  # a small one that is repeated
        return f"has shape {list(value.shape)}, more than the file holds"
    return "" if value.dtype in INTEGERS or value.isfinite().all() else "has values that are not finite"


def check_types(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights of a type that cannot be what the model has under the same key: integers for floats, or complex.

    Raises:
        UserError: If there is one; the message names the source and the key.
    """
    for key, value in state.items():
        if key in expected and expected[key].dtype in FLOATS and value.dtype not in FLOATS:
            raise UserError(f"{source}: {key} is of {value.dtype}; weights are floats of 16, 32 or 64 bits")


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of weights by key."""
    return {key: tuple(value.shape) for key, value in state.items()}


def describe_differences(given: Mapping[str, tuple], expected: Mapping[str, tuple]) -> list[str]:
    """Return the differences of two sets of keys and shapes, a line each; none if they are the same."""
    lines = [f"{key} is missing" for key in expected if key not in given]
    lines += [f"{key} is not known" for key in given if key not in expected]
    lines += [
        f"{key} has shape {list(given[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in given and given[key] != shape
    ]
    return lines


def summary(differences: Sequence[str]) -> str:
    """Return the first three differences in a line, and how many more there are."""
    more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more
