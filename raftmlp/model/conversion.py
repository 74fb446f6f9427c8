"""The weights of any checkpoint as a model takes them: those of the authors' 2021 release, and those of other grids."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.weights import check_tensors, check_types, unwrap
from ..errors import UserError
from .layers import RaftTokenMixing, TokenMixing
from .resize import bicubic_matrix

__all__ = [
    "ReleaseEntry", "adapt_on_load", "adapt_state_dict", "checkpoint_filter_fn", "is_release_format",
    "release_entries", "resample_grid",
]  # fmt: skip

StateDict = dict[str, Tensor]

AXES = {"height": slice(0, 1), "width": slice(1, 2), "both": slice(2)}  # of a grid, by the axis of token mixing


# The authors' 2021 release


def is_release_format(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are those of the authors' 2021 release."""
    return any(re.match(r"levels\.\d+\.fn\.", key) for key in state)


@dataclass(frozen=True)
class ReleaseEntry:
    """One tensor of the release's format: its key, its shape, and what it becomes here."""

    key: str
    shape: tuple[int, ...]
    convert: Callable[[Tensor], StateDict]


def release_entries(model: nn.Module) -> list[ReleaseEntry]:
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
            name = f"{target}.{kind}"
            shape = tuple(ours[name].shape)
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


def convert_release(state: StateDict, model: nn.Module) -> StateDict:
    """Return a release's state dict in our format; what has no place here keeps its key, for strict loading to name."""
    state = dict(state)
    converted: StateDict = {}
    for entry in release_entries(model):
        if entry.key not in state:
            continue
        value = state.pop(entry.key)
        try:
            converted.update(entry.convert(value))
        except (RuntimeError, IndexError) as error:  # the shape does not let it be rearranged
            raise UserError(
                f"the checkpoint's {entry.key} has shape {tuple(value.shape)}, this model needs {entry.shape}: it is "
                f"another variant's (`raftmlp convert` finds out which)"
            ) from error
    if not model.num_classes:  # a model without classifier: the checkpoint's is dropped
        state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    return {**converted, **state}


# Other grids


def resample_grid(
    state: Mapping[str, Tensor], model: nn.Module, source: tuple[int, int], target: tuple[int, int]
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
                old, new = old_grid[AXES[mixing.axis]], new_grid[AXES[mixing.axis]]
                prefix = f"stages.{i}.blocks.{j}.tokens.{name}."
                mlp = {key: state.get(prefix + key) for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
                before, after = (mixing.raft_size * math.prod(axes) for axes in (old, new))  # features
                units = int(before * mixing.mlp_ratio)
                made_for_old = [(units, before), (units,), (before, units), (before,)]
                if old == new or [getattr(value, "shape", None) for value in mlp.values()] != made_for_old:
                    continue
                hidden = int(after * mixing.mlp_ratio)
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
        units = torch.arange(hidden) * len(bias1) // hidden  # on the CPU: the meta device cannot count
        copies = units.bincount(minlength=len(bias1))[units].to(fc1.device)
        units = units.to(fc1.device)
    result = {
        "fc1.weight": fc1[units],
        "fc1.bias": bias1[units],
        "fc2.weight": fc2[:, units] / copies,
        "fc2.bias": bias2,
    }
    return {key: value.to(mlp[key].dtype) for key, value in result.items()}


# Any checkpoint


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> StateDict:
    """Return the weights that ``model.pretrained_cfg`` describes as this model takes them: the hook that timm calls.

    What ``adapt_state_dict`` does; for an image size other than the cfg's, the token-mixing weights are resampled.

    Raises:
        UserError: If the release's checkpoint of another variant is given, or what ``check_tensors`` or
            ``check_types`` refuses.
    """
    state = unwrap(state)
    check_tensors(state, "the checkpoint")
    return resample_grid(_converted(state, model), model, _pretrained_size(model), model.img_size)


def adapt_state_dict(state: Mapping[str, Tensor], model: nn.Module, source: str | Path = "the checkpoint") -> StateDict:
    """Return any checkpoint's weights as this model takes them: what the model does itself on ``load_state_dict``.

    Wrapping and prefixes are dropped, the release's format is converted. Token-mixing weights that do not fit are
    resampled if they are made for the image size of ``model.pretrained_cfg``. Other differences are left for
    ``load_state_dict`` to refuse.

    Args:
        state: The weights.
        model: The model.
        source: What messages call them.

    Raises:
        UserError: If the release's checkpoint of another variant is given, or what ``check_types`` refuses.
    """
    state = _converted(state, model, source)
    resampled = resample_grid(state, model, _pretrained_size(model), model.img_size)
    expected = {key: parameter.shape for key, parameter in model.named_parameters()}
    return {key: value if value.shape == expected.get(key) else resampled[key] for key, value in state.items()}


def adapt_on_load(model: nn.Module, state_dict: StateDict, prefix: str, *args) -> None:
    """Adapt a checkpoint's weights in place before they are loaded, for a model at any prefix: a hook of the model."""
    weights = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    weights = adapt_state_dict({key.removeprefix(prefix): value for key, value in weights.items()}, model)
    state_dict.update({prefix + key: value for key, value in weights.items()})


def _converted(state: Mapping[str, Tensor], model: nn.Module, source: str | Path = "the checkpoint") -> StateDict:
    state = unwrap(state, source)
    state = convert_release(state, model) if is_release_format(state) else state
    check_types(state, model.state_dict(), source)
    return state


def _pretrained_size(model: nn.Module) -> tuple[int, int]:
    return tuple(getattr(model, "pretrained_cfg", {}).get("input_size", ()))[-2:] or model.img_size
