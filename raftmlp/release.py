"""Checkpoints of the authors' 2021 release: their keys and shapes, and their conversion to this package's format."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .errors import UserError
from .layers import RaftTokenMixing, TokenMixing

if TYPE_CHECKING:
    from .raftmlp import RaftMLP

__all__ = ["ReleaseEntry", "convert_release", "is_release_format", "release_entries"]

StateDict = dict[str, Tensor]


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


def convert_release(state: StateDict, model: "RaftMLP") -> StateDict:
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
