"""Token-mixing weights for another trained grid, resampled bicubically."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arguments import check_weight
from .resize import bicubic_matrix

if TYPE_CHECKING:
    from .raftmlp import RaftMLP

__all__ = ["resample_grid"]

StateDict = dict[str, Tensor]


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
                before, after = (mixing.raft_size * math.prod(axes) for axes in (old, new))  # features
                units = int(before * mixing.mlp_ratio)
                made_for_old = [(units, before), (units,), (before, units), (before,)]
                if old == new or [getattr(value, "shape", None) for value in mlp.values()] != made_for_old:
                    continue
                hidden = int(after * mixing.mlp_ratio)
                check_weight("img_size and token_mlp_ratio", after, hidden)
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
