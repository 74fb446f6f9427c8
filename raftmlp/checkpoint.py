"""Weights: reading and writing files safely, the release's format, another trained grid, the shipped checkpoints.

Everything but the reading and writing of files is a pure function of state dicts. Nothing here ever runs code from a
file: safetensors, or ``torch.load(weights_only=True)``.
"""

import argparse
import errno
import json
import math
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .layers import RaftTokenMixing, TokenMixing
from .resize import bicubic_matrix

if TYPE_CHECKING:
    from .raftmlp import RaftMLP

__all__ = [
    "adapt_state_dict",
    "checkpoint_filter_fn",
    "describe_differences",
    "find_pretrained",
    "is_release_format",
    "load_checkpoint",
    "load_state_dict",
    "read_metadata",
    "release_entries",
    "resample_grid",
    "save_state_dict",
    "shapes",
    "summary",
    "tag_of",
    "trained_as",
    "unwrap",
    "write_bytes",
]

StateDict = dict[str, Tensor]
KINDS = dict(  # of the arrays that may stand in a checkpoint, by numpy's code
    b1=torch.bool, i1=torch.int8, u1=torch.uint8, i2=torch.int16, i4=torch.int32, i8=torch.int64, f2=torch.float16,
    f4=torch.float32, f8=torch.float64,
)  # fmt: skip
CFG_KEYS = ("num_classes", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")


# Files


def load_state_dict(path: str | Path) -> StateDict:
    """Return the weights in a checkpoint file (safetensors, or any ``torch.save`` file), read without running code.

    Of a training checkpoint, the averaged weights (EMA) are taken where there are some.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no checkpoint, or holds anything but plain data.
    """
    state = unwrap(load_checkpoint(path))
    if not state:
        raise ValueError(f"{path} holds no weights")
    return state


def load_checkpoint(path: str | Path) -> Mapping:
    """Return all that is in a checkpoint file (safetensors, or any ``torch.save`` file), read without running code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no checkpoint, or holds anything but plain data.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: name a checkpoint file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals(_plain_globals()):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors and plain data; it was not loaded") from error
    except OSError as error:
        reason = (
            "is damaged: it ends too early"
            if error.errno == errno.EINVAL
            else f"cannot be read: {error.strerror or error}"
        )
        raise ValueError(f"{path} {reason}") from error
    except Exception as error:  # the readers raise anything on bytes that are no checkpoint
        told = isinstance(error, (RuntimeError, safetensors.SafetensorError)) and str(error)
        reason = str(error).splitlines()[0].split(". ")[0] if told else "not a file of torch.save or safetensors"
        raise ValueError(f"{path} is damaged or is no checkpoint: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no weights")
    return content


class PlainDtype:
    """What stands for a numpy dtype in a file that is read: its code, one of KINDS."""

    def __init__(self, code: str, *_):
        if code not in KINDS:
            raise pickle.UnpicklingError(f"an array of {code!r}")
        self.code = code

    def __setstate__(self, state) -> None:
        if len(state) < 8 or state[1] not in ("<", "|") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array of structures")


class PlainArray:
    """What stands for a numpy array in a file that is read: ``values``, a tensor."""

    def __init__(self, *_):
        self.values = torch.empty(0)

    def __setstate__(self, state) -> None:
        _, shape, dtype, fortran, content = state
        self.values = _numbers(dtype, content).reshape(tuple(shape)[::-1] if fortran else tuple(shape))
        if fortran:
            self.values = self.values.permute(*range(len(shape))[::-1])


class LogHistory:
    """What stands for a log's numbers, mmengine's HistoryBuffer, in a file that is read."""


def _numbers(dtype: PlainDtype, content: bytes) -> Tensor:
    if not isinstance(dtype, PlainDtype) or not isinstance(content, bytes):
        raise pickle.UnpicklingError("an array of objects")
    kind = KINDS[dtype.code]
    return torch.frombuffer(bytearray(content), dtype=kind) if content else torch.empty(0, dtype=kind)


def _number(dtype: PlainDtype, content: bytes) -> int | float | bool:
    return _numbers(dtype, content).item()


def _empty() -> bytes:
    """Return what the content of an empty array is, in the words of a pickle."""
    return b""


def _nothing(*_) -> None:
    """Stand for what is not looked up: a log's methods, which lie in the file by name."""


def _plain_globals() -> list:
    """Return what may stand in a checkpoint beside tensors: timm's options; of mmengine's logs, stand-ins alone.

    numpy's own classes would let a file build arrays of anything, pointers too.
    """
    stand_ins = [
        (PlainDtype, "numpy.dtype"),
        (PlainArray, "numpy.ndarray"),
        (LogHistory, "mmengine.logging.history_buffer.HistoryBuffer"),
        (_nothing, "builtins.getattr"),
        (_empty, "builtins.bytes"),
    ]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # numpy 2's name, and 1's
        stand_ins += [(PlainArray, f"{module}._reconstruct"), (_number, f"{module}.scalar")]
    return [argparse.Namespace, *stand_ins]


def trained_as(path: str | Path) -> dict:
    """Return what a checkpoint file tells of its model: ``model``, ``model_kwargs``, ``pretrained_cfg``, if it does.

    Of a ``pretrained_cfg`` (timm's word for how images are prepared and how many classes there are) CFG_KEYS are taken.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no checkpoint, or holds anything but plain data.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        told = read_metadata(path)
        try:
            told["pretrained_cfg"] = json.loads(told.get("pretrained_cfg", "{}"))
        except ValueError as error:
            raise ValueError(f"{path} has damaged metadata: {error}") from error
    else:
        content = load_checkpoint(path)
        told = {**content, "model": content.get("arch")}
    kinds = dict(model=str, model_kwargs=dict, pretrained_cfg=dict)
    told = {key: told[key] for key, kind in kinds.items() if isinstance(told.get(key), kind)}
    if "pretrained_cfg" in told:  # plain facts only, nothing that names files to fetch
        cfg = {key: value for key, value in told["pretrained_cfg"].items() if key in CFG_KEYS}
        told["pretrained_cfg"] = {key: tuple(v) if isinstance(v, list) else v for key, v in cfg.items()}
    return told


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, as ``save_state_dict`` wrote it.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or is no checkpoint: {error}") from error


def save_state_dict(state: StateDict, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights and metadata as one safetensors file, which is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_bytes(path, safetensors.torch.save(state, {"format": "pt", **(metadata or {})}))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, and is on the disk when this returns."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def checkpoint_folders() -> list[Path]:
    """Return the folders where pretrained weights are looked for: $RAFTMLP_CHECKPOINTS, then a checkout's own."""
    named = os.environ.get("RAFTMLP_CHECKPOINTS", "").split(os.pathsep)
    return [Path(name).expanduser() for name in named if name] + [Path(__file__).parent.parent / "checkpoints"]


def find_pretrained(name: str, tag: str | None = None) -> Path | None:
    """Return the file NAME.TAG.safetensors in the first checkpoint folder that has one, or None.

    Raises:
        ValueError: If no tag is given and a folder has several of them.
    """
    for folder in checkpoint_folders():
        found = sorted(folder.glob(f"{name}.{tag or '*'}.safetensors"))
        if len(found) > 1:
            tags = ", ".join(tag_of(path) for path in found)
            raise ValueError(f"{folder} has several {name} checkpoints: name one as {name}.TAG, TAG of {tags}")
        if found:
            return found[0]
    return None


def tag_of(path: Path) -> str:
    """Return the TAG of a file NAME.TAG.safetensors."""
    return path.name.removesuffix(".safetensors").split(".", 1)[1]


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


def describe_differences(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> list[str]:
    """Return what separates two sets of keys and shapes, a line each; none if they are the same."""
    lines = [f"{key} is missing" for key in expected if key not in found]
    lines += [f"{key} is not known" for key in found if key not in expected]
    lines += [
        f"{key} has shape {list(found[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    return lines


def summary(differences: Sequence[str]) -> str:
    """Return the first differences in a line, and how many more there are."""
    more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more


def is_release_format(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are those of the authors' 2021 release."""
    return any(re.match(r"levels\.\d+\.fn\.", key) for key in state)


@dataclass(frozen=True)
class ReleaseEntry:
    """One tensor of the release's format: its key, its shape, and what it becomes here."""

    key: str
    shape: tuple[int, ...]
    convert: Callable[[Tensor], StateDict]


def release_entries(model: "RaftMLP") -> list[ReleaseEntry]:
    """Return what the release's checkpoint of this very network consists of.

    Its LayerNorms of raft-token mixing are stored in another channel order than the stream: entry o * r + g belongs to
    channel g * (C / r) + o. Its embeddings are Linears over flattened patches: (channel, row, column) order, kernel
    after kernel, where the network is multi-scale; (row, column, channel) order where it is single-scale.
    """
    ours = model.state_dict()
    entries: list[ReleaseEntry] = []
    multi_scale = any(len(stage.embed.kernels) > 1 for stage in model.stages)

    def add(key: str, target: str, convert: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        if f"{target}.weight" not in ours:  # pruned
            return
        for kind in ("weight", "bias"):
            shape = tuple(ours[f"{target}.{kind}"].shape)
            name = f"{target}.{kind}"
            entries.append(ReleaseEntry(f"{key}.{kind}", shape, lambda x, name=name: {name: convert(x)}))

    for i, stage in enumerate(model.stages):
        embed, fn = stage.embed, f"levels.{i}.fn"
        target = f"stages.{i}.embed"
        dim, in_chans = embed.convs[0].weight.shape[:2]
        columns = in_chans * sum(k * k for k in embed.kernels)
        if multi_scale:
            key, convert = f"{fn}.0.fc", lambda x, t=target, k=embed.kernels: _split_kernels(x, t, k)
        else:
            key, convert = f"{fn}.1", lambda x, t=target, k=embed.kernels[0]: _single_kernel(x, t, k)
        entries.append(ReleaseEntry(f"{key}.weight", (dim, columns), convert))
        entries.append(ReleaseEntry(f"{key}.bias", (dim,), lambda x, t=target: {f"{t}.bias": x}))
        for j, block in enumerate(stage.blocks):
            target = f"stages.{i}.blocks.{j}"
            mixings = {f"{target}.tokens.{name}": mixing for name, mixing in block.tokens.named_children()}
            mixings[f"{target}.channels"] = block.channels
            for k, (target, mixing) in enumerate(mixings.items()):
                source = f"{fn}.{2 + j}.{2 * k + 1}"
                if isinstance(mixing, RaftTokenMixing):
                    r = mixing.raft_size
                    add(f"{source}.norm.1", f"{target}.norm", lambda x, r=r: x.unflatten(0, (-1, r)).T.flatten())
                else:
                    add(f"{source}.norm.1" if isinstance(mixing, TokenMixing) else f"{source}.norm", f"{target}.norm")
                add(f"{source}.fn.0", f"{target}.fc1")
                add(f"{source}.fn.3", f"{target}.fc2")
    add("heads.0.1", "norm")
    if model.num_classes > 0:
        add("classifier", "head")
    return entries


def _split_kernels(x: Tensor, target: str, kernels: Sequence[int]) -> StateDict:
    channels = x.shape[1] // sum(k * k for k in kernels)  # the checkpoint's, timm may have to adapt them
    parts = x.split([channels * k * k for k in kernels], dim=1)
    kernel_weights = [part.unflatten(1, (channels, k, k)) for part, k in zip(parts, kernels)]
    return {f"{target}.convs.{i}.weight": weight for i, weight in enumerate(kernel_weights)}


def _single_kernel(x: Tensor, target: str, kernel: int) -> StateDict:
    return {f"{target}.convs.0.weight": x.unflatten(1, (kernel, kernel, -1)).permute(0, 3, 1, 2).contiguous()}


def _convert_release(state: StateDict, model: "RaftMLP") -> StateDict:
    """Return a release's state dict in our format; what has no place here keeps its key, for strict loading to name."""
    state = dict(state)
    converted: StateDict = {}
    for entry in release_entries(model):
        if entry.key not in state:
            continue
        value = state.pop(entry.key)
        try:
            converted.update(entry.convert(value))
        except RuntimeError as error:  # the shape does not let it be rearranged
            raise ValueError(
                f"the checkpoint's {entry.key} has shape {tuple(value.shape)}, this model needs {entry.shape}: it is "
                f"another variant's (tools/convert_checkpoint.py finds out which)"
            ) from error
    if not model.num_classes:  # a model without classifier: the checkpoint's is dropped
        state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    return {**converted, **state}


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: "RaftMLP") -> StateDict:
    """Return the weights that ``model.pretrained_cfg`` describes as this model takes them: the hook that timm calls.

    What ``adapt_state_dict`` does, and for an image size other than the cfg's the token-mixing weights are resampled.

    Raises:
        ValueError: If the release's checkpoint of another variant is given.
    """
    return resample_grid(_converted(state, model), model, _pretrained_size(model), model.img_size)


def adapt_state_dict(state: Mapping[str, Tensor], model: "RaftMLP") -> StateDict:
    """Return any checkpoint's weights as this model takes them: what the model does itself on ``load_state_dict``.

    Wrapping and prefixes are dropped, the release's format is converted. Token-mixing weights that do not fit are
    resampled if they are made for the image size of ``model.pretrained_cfg``. Whatever else does not fit is left for
    ``load_state_dict`` to refuse.

    Raises:
        ValueError: If the release's checkpoint of another variant is given.
    """
    state = _converted(state, model)
    resampled = resample_grid(state, model, _pretrained_size(model), model.img_size)
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    return {key: value if value.shape == shapes.get(key) else resampled[key] for key, value in state.items()}


def _converted(state: Mapping[str, Tensor], model: "RaftMLP") -> StateDict:
    state = unwrap(state)
    return _convert_release(state, model) if is_release_format(state) else state


def _pretrained_size(model: "RaftMLP") -> tuple[int, int]:
    return tuple(getattr(model, "pretrained_cfg", {}).get("input_size", ()))[-2:] or model.img_size


def resample_grid(
    state: Mapping[str, Tensor], model: "RaftMLP", source: tuple[int, int], target: tuple[int, int]
) -> StateDict:
    """Return the weights with token mixing resampled from the trained grid of one image size to another's.

    A layer that is not made for the source is passed on as it is.

    Args:
        state: Weights in our format, made for images of the source size.
        model: Any model of the same architecture.
        source: Height and width of the images in pixels.
        target: Height and width of the images in pixels.
    """
    state = dict(state)
    for i, (old_grid, new_grid) in enumerate(zip(model.grids(source), model.grids(target))):
        for j, block in enumerate(model.stages[i].blocks):
            for name, mixing in block.tokens.named_children():
                old, new = mixing.mixed_axes(old_grid), mixing.mixed_axes(new_grid)
                prefix = f"stages.{i}.blocks.{j}.tokens.{name}."
                mlp = {key: state.get(prefix + key) for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
                features = mixing.raft_size * math.prod(old)
                if old == new or any(value is None for value in mlp.values()) or mlp["fc1.weight"].shape[1] != features:
                    continue
                hidden = int(mixing.raft_size * math.prod(new) * mixing.mlp_ratio)
                mlp = _resample_token_mlp(mlp, old, new, hidden, mixing.raft_size)
                state.update({prefix + key: value for key, value in mlp.items()})
    return state


def _resample_token_mlp(mlp: StateDict, old: Sequence[int], new: Sequence[int], hidden: int, groups: int) -> StateDict:
    """Return a token-mixing MLP for another grid.

    The new MLP resizes its input bicubically to the old grid, mixes, and resizes the result to the new grid, all of it
    folded into its weights. Of hidden units, a larger grid repeats some and shares their output weights out, which
    changes no number; a smaller one keeps those of the largest weights.
    """
    fc1, bias1, fc2, bias2 = (mlp[key].double() for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
    down = up = torch.ones(1, 1, dtype=fc1.dtype, device=fc1.device)
    for n_old, n_new in zip(old, new):
        down = torch.kron(down, bicubic_matrix(n_new, n_old, fc1.dtype, fc1.device))
        up = torch.kron(up, bicubic_matrix(n_old, n_new, fc1.dtype, fc1.device))
    fc1 = (fc1.unflatten(1, (groups, -1)) @ down).flatten(1)
    fc2 = (up @ fc2.unflatten(0, (groups, -1))).flatten(0, 1)
    bias2 = (bias2.unflatten(0, (groups, -1)) @ up.T).flatten()
    if hidden < len(bias1):
        units = (fc1.norm(dim=1) * fc2.norm(dim=0)).topk(hidden).indices.sort().values
        copies = torch.ones_like(units)
    else:
        units = torch.arange(hidden, device=fc1.device) * len(bias1) // hidden
        copies = units.bincount(minlength=len(bias1))[units]
    result = {
        "fc1.weight": fc1[units],
        "fc1.bias": bias1[units],
        "fc2.weight": fc2[:, units] / copies,
        "fc2.bias": bias2,
    }
    return {key: value.to(mlp[key].dtype) for key, value in result.items()}
