"""RaftMLP as a backbone of mmdet and mmseg: ``backbone=dict(type="RaftMLP", arch="raftmlp_s")`` in a config.

A config finds it by ``custom_imports = dict(imports=["raftmlp.mm"])``. It is registered once, in mmengine's root
registry, where those of mmdet and mmseg look too.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor

from ..checkpoints.pretrained import pretrained_file
from ..checkpoints.weights import describe_differences, load_state_dict, read_description, shapes, summary
from ..errors import UserError
from ..model.conversion import adapt_state_dict, checkpoint_filter_fn
from ..model.raftmlp import RaftMLP
from .checkpoints import STAND_INS

__all__ = ["RaftMLPBackbone"]

EMBEDDING = -1  # stands for the first patch embedding among the indices of stages or blocks
HEAD = ("norm.", "head.", "heads.0.1.", "classifier.")  # keys of the final norm and the classifier, ours and theirs


@MODELS.register_module(name="RaftMLP")
class RaftMLPBackbone(BaseModule):
    """RaftMLP for dense prediction: a batch of images of any size in, a tuple of feature maps (B, C, H, W) out.

    A network of several stages has a map of each: stride 4, 8, 16 and 32 in S, M and L. A network of one stage has four
    maps of one stride, as the release's MLP-Mixer does: the patch embedding's output and those of the blocks 4, 10 and
    12 of 12, or at the same fractions of another depth.

    Args:
        arch: Name of a variant, such as "raftmlp_s", or a dict of arguments of ``raftmlp.RaftMLP``.
        img_size: Image size in pixels that the trained grid is made for, one number or (height, width); None is the
            variant's own. Images of other sizes are resized inside; pretrained weights are resampled.
        out_indices: The maps to return, rising from 0; None is all. Layers after the last one are not built.
        out_norm: Put a LayerNorm over channels on each returned map; the release has none. A neck must then use all
            maps: RetinaNet's does not use the first one, so take it out of out_indices and of the neck.
        frozen_stages: What does not train: nothing (-1), the first patch embedding (0), the first k stages (k); in a
            network of one stage, all that its first k maps need.
        with_cp: Gradient checkpointing: compute the blocks again in the backward pass, to save memory.
        drop_path_rate: Rate of stochastic depth.
        resizing: What blocks do with maps of another size than the trained grid's, see ``raftmlp.RaftMLP``.
        first_map: "stage", or "embed" to return the first patch embedding's output in place of the first stage's, as
            the release does.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)``, with a file (ours, the release's, or that of a whole
            detector) or the name of pretrained weights ("raftmlp_digits"). Weights must fit, but for the classifier.

    Attributes:
        out_channels: Channels of the returned maps, what a neck needs as ``in_channels``.

    Raises:
        ValueError: If an argument is not allowed; the message names the value and what is allowed.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "raftmlp_s",
        img_size: int | Sequence[int] | None = None,
        out_indices: Sequence[int] | None = None,
        out_norm: bool = False,
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float = 0.0,
        resizing: str = "full",
        first_map: str = "stage",
        init_cfg: Mapping[str, Any] | None = None,
    ):
        super().__init__(init_cfg)
        if first_map not in ("stage", "embed"):
            raise UserError(f"first_map {first_map!r} must be 'stage' or 'embed'")
        self._network = dict(arch=arch, img_size=img_size, drop_path_rate=drop_path_rate, resizing=resizing)
        self.model = _create(**self._network)
        self._sources = _sources(self.model, first_map)
        count = len(self._sources)
        self.out_indices = tuple(map(int, range(count) if out_indices is None else out_indices))
        if not self.out_indices or [i for i in range(count) if i in self.out_indices] != list(self.out_indices):
            raise UserError(f"out_indices {out_indices!r} must rise from 0 or more to {count - 1} or less")
        if frozen_stages not in range(-1, count + 1):
            raise UserError(f"frozen_stages {frozen_stages!r} must be from -1 to {count}")
        self.frozen_stages = int(frozen_stages)
        sources = [self._sources[i] for i in self.out_indices]
        self.layers, self.with_embed = [index for index in sources if index != EMBEDDING], EMBEDDING in sources
        if not self.layers:
            raise UserError(f"out_indices {self.out_indices} takes the patch embedding alone: take a later map too")
        self.out_channels = [self.model.feature_info[max(index, 0)]["num_chs"] for index in sources]
        self._single = len(self.model.stages) == 1
        self.model.prune_intermediate_layers(self.layers, prune_norm=True)
        self.model.set_grad_checkpointing(with_cp)
        normalized = zip(self.out_indices, self.out_channels) if out_norm else ()
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(channels) for i, channels in normalized})
        self.train()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps, contiguous, for images of shape (B, in_chans, H, W)."""
        maps = self.model.forward_intermediates(
            x, self.layers, stop_early=True, output_fmt="NHWC", intermediates_only=True, with_embed=self.with_embed
        )
        if self.norms:
            maps = [norm(y) for norm, y in zip(self.norms.values(), maps)]
        return tuple(y.permute(0, 3, 1, 2).contiguous() for y in maps)

    def train(self, mode: bool = True) -> "RaftMLPBackbone":
        """Switch between training and evaluation; frozen layers stay in evaluation, and without gradients."""
        super().train(mode)
        for module in self._frozen():
            module.eval().requires_grad_(False)
        return self

    def _frozen(self) -> Iterator[nn.Module]:
        stages = self.model.stages
        if self.frozen_stages >= 0:
            yield stages[0].embed
        if self._single:
            yield from stages[0].blocks[: self._sources[self.frozen_stages - 1] + 1 if self.frozen_stages > 0 else 0]
        else:
            yield from stages[: max(self.frozen_stages, 0)]
        yield from (norm for i, norm in self.norms.items() if int(i) < self.frozen_stages)

    def init_weights(self) -> None:
        """Load the weights that ``init_cfg`` names, without running code from the file; other kinds are mmengine's.

        Raises:
            FileNotFoundError: If there is no such file.
            UserError: If the file is damaged, or does not fit this network.
        """
        if not isinstance(self.init_cfg, Mapping) or self.init_cfg.get("type") != "Pretrained":
            super().init_weights()
            return
        if self.init_cfg.keys() != {"type", "checkpoint"}:
            raise UserError(f"init_cfg {dict(self.init_cfg)} must be dict(type='Pretrained', checkpoint=FILE or NAME)")
        self._load(_weights_file(self.init_cfg["checkpoint"]))
        self.is_init = True

    def _load(self, path: Path) -> None:
        description, state = read_description(path, STAND_INS), load_state_dict(path, STAND_INS)
        norms = {key: state.pop(key) for key in list(state) if key.startswith("norms.")}
        whole = _create(**self._network, device="meta")  # with the layers that are not built here
        if "input_size" in description.get("pretrained_cfg", {}):  # the image size of the file's trained grid
            whole.pretrained_cfg = {**getattr(whole, "pretrained_cfg", {}), **description["pretrained_cfg"]}
            state = checkpoint_filter_fn(state, whole)
        else:
            state = adapt_state_dict(state, whole)
        built = self.state_dict()
        left_out = {f"model.{key}" for key in whole.state_dict()}
        if self.norms:
            left_out |= {f"norms.{i}.{kind}" for i in range(len(self._sources)) for kind in ("weight", "bias")}
        if self.norms and not norms:  # a classifier's file, or that of a detector without
            print_log(f"{path} has no norms of feature maps: they keep their initial values", logger="current")
            norms = self.norms.state_dict(prefix="norms.")
        state = {f"model.{key}": value for key, value in state.items() if not key.startswith(HEAD)} | norms
        state = {key: value for key, value in state.items() if key in built or key not in left_out}
        if differences := describe_differences(shapes(state), shapes(built)):
            whose = f" (it is of {description['model']})" if "model" in description else ""
            raise UserError(f"{path}{whose} does not fit the backbone {self._network['arch']}: {summary(differences)}")
        self.load_state_dict(state)


def _create(arch: str | Mapping[str, Any], img_size, **kwargs: Any) -> RaftMLP:
    """Return the network without a classifier."""
    kwargs |= dict(num_classes=0, global_pool="")
    size = {} if img_size is None else dict(img_size=img_size)
    if isinstance(arch, str):
        return timm.create_model(arch, **kwargs, **size)
    return RaftMLP(**{**arch, **size}, **kwargs)


def _sources(model: RaftMLP, first_map: str) -> list[int]:
    """Return where each map comes from: a stage's or block's index for ``forward_intermediates``, or EMBEDDING."""
    stages = len(model.stages)
    if stages > 1:
        return [EMBEDDING if first_map == "embed" else 0, *range(1, stages)]
    depth = len(model.stages[0].blocks)
    if depth < 3:
        raise UserError(f"a network of one stage needs 3 blocks or more for its 4 maps, this one has {depth}")
    return [EMBEDDING, *(block * depth // 12 - 1 for block in (4, 10, 12))]


def _weights_file(checkpoint: str) -> Path:
    variant, tag = timm.models.split_model_name_tag(checkpoint)
    if variant in timm.list_models(module="raftmlp") and not Path(checkpoint).exists():
        return pretrained_file(variant, tag or None)
    return Path(checkpoint).expanduser()
