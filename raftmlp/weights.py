"""Weights: reading checkpoint files without running code from them, writing them, adapting them to a model.

Files are safetensors, or are read by ``torch.load(weights_only=True)``.
"""

import argparse
import errno
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import MissingFileError, UserError
from .files import write_bytes
from .regrid import resample_grid
from .release import convert_release, is_release_format

if TYPE_CHECKING:
    from .raftmlp import RaftMLP

__all__ = [
    "adapt_state_dict",
    "checkpoint_filter_fn",
    "describe_differences",
    "first_readable",
    "load_checkpoint",
    "load_state_dict",
    "read_description",
    "read_metadata",
    "save_state_dict",
    "shapes",
    "summary",
    "unwrap",
]

StateDict = dict[str, Tensor]
CFG_KEYS = ("num_classes", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")


# Files


def load_state_dict(path: str | Path, stand_ins: Sequence = ()) -> StateDict:
    """Return the weights in a checkpoint file; of a training checkpoint, the averaged ones (EMA) where it has them.

    Args:
        path: The file, safetensors or of ``torch.save``.
        stand_ins: See ``load_checkpoint``.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If the file is damaged, is no checkpoint, or has no weights or anything but plain data.
    """
    state = unwrap(load_checkpoint(path, stand_ins))
    if not state:
        raise UserError(f"{path} holds no weights")
    return state


def load_checkpoint(path: str | Path, stand_ins: Sequence = ()) -> Mapping:
    """Return the whole content of a checkpoint file, read without running code from it.

    Args:
        path: The file, safetensors or of ``torch.save``.
        stand_ins: Functions and classes that may be called for names in the file, in the form that
            ``torch.serialization.safe_globals`` takes; those of plain data may be called anyway.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If the file is damaged, is no checkpoint, or has anything but plain data.
    """
    path = Path(path)
    if path.is_dir():
        raise MissingFileError(f"{path} is a folder: name a checkpoint file in it")
    if not path.is_file():
        raise MissingFileError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):  # timm's options are a Namespace
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds more than tensors and plain data; it was not loaded") from error
    except OSError as error:
        reason = (
            "is damaged: it ends too early"
            if error.errno == errno.EINVAL
            else f"cannot be read: {error.strerror or error}"
        )
        raise UserError(f"{path} {reason}") from error
    except Exception as error:  # the readers raise anything on bytes that are no checkpoint
        has_reason = isinstance(error, (RuntimeError, safetensors.SafetensorError)) and str(error)
        reason = str(error).splitlines()[0].split(". ")[0] if has_reason else "not a file of torch.save or safetensors"
        raise UserError(f"{path} is damaged or is no checkpoint: {reason}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no weights")
    return content


def first_readable(paths: Iterable[str | Path], stand_ins: Sequence = ()) -> tuple[Path | None, list[str]]:
    """Return the first of several checkpoint files that can be read, and why those before it cannot.

    Args:
        paths: The files, the preferred one first.
        stand_ins: See ``load_checkpoint``.

    Returns:
        The file, None if none can be read; a message for each damaged file.
    """
    damaged = []
    for path in paths:
        try:
            load_checkpoint(path, stand_ins)
        except UserError as error:
            damaged.append(str(error))
            continue
        return Path(path), damaged
    return None, damaged


def read_description(path: str | Path, stand_ins: Sequence = ()) -> dict:
    """Return what a checkpoint file says of its model: any of ``model``, ``model_kwargs`` and ``pretrained_cfg``.

    Of a ``pretrained_cfg`` (timm's word for how images are prepared and how many classes there are) CFG_KEYS are taken.

    Args:
        path: The file, safetensors or of ``torch.save``.
        stand_ins: See ``load_checkpoint``.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If the file is damaged, is no checkpoint, or has anything but plain data.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        description = dict(read_metadata(path))
        try:
            description["pretrained_cfg"] = json.loads(description.get("pretrained_cfg", "{}"))
        except ValueError as error:
            raise UserError(f"{path} has damaged metadata: {error}") from error
    else:
        content = load_checkpoint(path, stand_ins)
        description = {**content, "model": content.get("arch")}
    kinds = dict(model=str, model_kwargs=dict, pretrained_cfg=dict)
    description = {key: description[key] for key, kind in kinds.items() if isinstance(description.get(key), kind)}
    if "pretrained_cfg" in description:  # nothing that names files to fetch
        cfg = {key: value for key, value in description["pretrained_cfg"].items() if key in CFG_KEYS}
        description["pretrained_cfg"] = {key: tuple(v) if isinstance(v, list) else v for key, v in cfg.items()}
    return description


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, as ``save_state_dict`` wrote it.

    Raises:
        UserError: If the file is damaged.
    """
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


def unwrap(checkpoint: Mapping) -> StateDict:
    """Return the weights inside a checkpoint, without wrapping dicts and key prefixes.

    Takes plain state dicts and those under state_dict_ema, model_ema, state_dict or model; drops ``module.`` (data
    parallel) and ``_orig_mod.`` (compiled) from the keys; of a detector's weights takes the ``backbone.`` part (of one
    with ``raftmlp.mm``, ``backbone.model.``).
    """
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
            break
    state = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    while any(key.startswith(("module.", "_orig_mod.")) for key in state):
        state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}
    backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return {key.removeprefix("model."): value for key, value in backbone.items()} or state


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


# A model's weights of any checkpoint


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: "RaftMLP") -> StateDict:
    """Return the weights that ``model.pretrained_cfg`` describes as this model takes them: the hook that timm calls.

    What ``adapt_state_dict`` does; for an image size other than the cfg's, the token-mixing weights are resampled.

    Raises:
        UserError: If the release's checkpoint of another variant is given.
    """
    return resample_grid(_converted(state, model), model, _pretrained_size(model), model.img_size)


def adapt_state_dict(state: Mapping[str, Tensor], model: "RaftMLP") -> StateDict:
    """Return any checkpoint's weights as this model takes them: what the model does itself on ``load_state_dict``.

    Wrapping and prefixes are dropped, the release's format is converted. Token-mixing weights that do not fit are
    resampled if they are made for the image size of ``model.pretrained_cfg``. Other differences are left for
    ``load_state_dict`` to refuse.

    Raises:
        UserError: If the release's checkpoint of another variant is given.
    """
    state = _converted(state, model)
    resampled = resample_grid(state, model, _pretrained_size(model), model.img_size)
    expected = {key: parameter.shape for key, parameter in model.named_parameters()}
    return {key: value if value.shape == expected.get(key) else resampled[key] for key, value in state.items()}


def _converted(state: Mapping[str, Tensor], model: "RaftMLP") -> StateDict:
    state = unwrap(state)
    return convert_release(state, model) if is_release_format(state) else state


def _pretrained_size(model: "RaftMLP") -> tuple[int, int]:
    return tuple(getattr(model, "pretrained_cfg", {}).get("input_size", ()))[-2:] or model.img_size
