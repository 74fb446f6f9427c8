"""RaftMLP: an MLP vision backbone with raft-token mixing.

Paper: RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?
    Yuki Tatsunami, Masato Taki. ACCV 2022, https://arxiv.org/abs/2108.04384
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checkpoints.pretrained import resolve_cfg
from ..errors import UserError
from . import arguments
from .conversion import adapt_on_load, checkpoint_filter_fn, resample_grid
from .layers import RaftMLPStage, embedded_size, to_nhwc

__all__ = ["RaftMLP"]  # register_model adds the entry points
torch.fx.wrap("to_nhwc")  # a leaf for every tracer: it looks at sizes


class RaftMLP(nn.Module):
    """RaftMLP, the network of arXiv 2108.04384, for images of any size.

    Images go through 1 to 4 stages, each a patch embedding and a row of blocks, then LayerNorm, pooling and a Linear.
    The token-mixing weights are made for the trained grid that img_size gives. Every block takes maps of other sizes by
    the rule ``resizing``, call by call: ``forward`` writes nothing on the module.

    Between layers feature maps are NHWC, contiguous; ``raftmlp.model.layers`` gives the reason. Images, intermediate
    feature maps and the result of ``forward_features`` are NCHW.

    Args:
        num_classes: Number of classes, 0 for no classifier.
        img_size: Image size in pixels that the trained grid is made for, one number or (height, width).
        in_chans: Channels of the images.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        embed_dims: Channels, one number a stage.
        depths: Number of blocks, one number a stage.
        patch_sizes: Strides of the patch embeddings, one number a stage.
        patch_kernels: Kernels of the patch embeddings, a sequence a stage; None takes the strides (single-scale).
        token_mixing: "raft", or "plain" for MLP-Mixer's.
        raft_size: Channel groups in raft-token mixing, one number or one a stage.
        token_mlp_ratio: Hidden units per input of the token-mixing MLPs.
        mlp_ratio: Hidden units per channel of the channel-mixing MLPs.
        resizing: What a block does with a map of another size than its trained grid: "full" resizes the whole map to
            the grid, mixes, and resizes it back, which is the paper's rule; "residual" resizes only what token mixing
            adds to the map, so that its detail stays. At the grid's size both are the same.
        drop_rate: Rate of dropout before the classifier.
        drop_path_rate: Rate of stochastic depth, the same for every block.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        ValueError: If arguments do not fit together; the message names the value and what is allowed. Calls raise it
            for images of a wrong shape.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        patch_sizes: Sequence[int] = (4, 2, 2, 2),
        patch_kernels: Sequence[Sequence[int]] | None = ((4, 8), (2, 4), (2, 4), (2,)),
        token_mixing: str = "raft",
        raft_size: int | Sequence[int] = 2,
        token_mlp_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        resizing: str = "full",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        per_stage = arguments.per_stage(embed_dims, depths, patch_sizes, patch_kernels, raft_size)
        self.in_chans = operator.index(in_chans)
        self.img_size = arguments.image_size(img_size)

        block_kwargs = dict(
            token_mixing=arguments.choice("token_mixing", token_mixing, ("raft", "plain")),
            token_mlp_ratio=float(token_mlp_ratio),
            mlp_ratio=float(mlp_ratio),
            resizing=resizing,
            drop_path=arguments.share("drop_path_rate", drop_path_rate),
            device=device,
            dtype=dtype,
        )
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        channels, grid, reduction = self.in_chans, self.img_size, 1
        for i, (dim, depth, stride, kernels, raft) in enumerate(per_stage):
            grid, reduction = embedded_size(grid, stride), reduction * stride
            stage = RaftMLPStage(channels, dim, depth, stride, kernels, grid, raft_size=raft, **block_kwargs)
            self.stages.append(stage)
            channels = dim
            # a network of one resolution has features after every block
            names = [f"stages.{i}"] if len(per_stage) > 1 else [f"stages.0.blocks.{j}" for j in range(depth)]
            self.feature_info += [dict(module=name, num_chs=dim, reduction=reduction) for name in names]
        self.num_features = self.head_hidden_size = channels
        self.norm = nn.LayerNorm(self.num_features, device=device, dtype=dtype)
        self.head_drop = nn.Dropout(arguments.share("drop_rate", drop_rate))
        self.reset_classifier(num_classes, global_pool)
        self.register_load_state_dict_pre_hook(adapt_on_load)

    def grids(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the stages' grids, height and width in positions, for an image size in pixels."""
        grids = []
        for stage in self.stages:
            img_size = embedded_size(img_size, stage.embed.stride)
            grids.append(img_size)
        return grids

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the trained grid that of another image size in pixels, resampling the token-mixing weights.

        Parameters are replaced: call it before an optimizer is built.
        """
        img_size = arguments.image_size(img_size)
        old = self.state_dict()
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be trained later on
            new = resample_grid(old, self, self.img_size, img_size)
        for stage, grid in zip(self.stages, self.grids(img_size)):
            for block in stage.blocks:
                block.grid = grid
        for key in old:
            if new[key] is not old[key]:
                name, _, kind = key.rpartition(".")
                linear = self.get_submodule(name)
                requires_grad = getattr(linear, kind).requires_grad
                setattr(linear, kind, nn.Parameter(new[key], requires_grad=requires_grad))
                linear.out_features, linear.in_features = linear.weight.shape
        self.img_size = img_size
        for record in ("_traits", "_model_args"):  # timm's, of how the model was made: its hub export reads them
            setattr(self, record, dict(getattr(self, record, {}), img_size=img_size))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that must not decay: none; timm leaves out biases and norms by itself."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that sort parameters into layers for layer-wise decay: blocks, or stages if coarse.

        An embedding behind the first stage goes with its stage's first block.
        """
        blocks = [(r"^stages\.(\d+)\.embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stages\.0\.embed", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' inner values in the backward pass instead of keeping them, or stop doing so."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, a Linear, or an Identity without classes."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; arguments as in the constructor, None keeps the pooling."""
        if not arguments.is_whole(num_classes, 0):
            raise UserError(f"num_classes {num_classes!r} must be a whole number, 0 or more")
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        weight = self.norm.weight if isinstance(self.norm, nn.LayerNorm) else next(self.parameters())
        sizes = self.num_features * pool.feat_mult(), int(num_classes)
        with torch.inference_mode(False):  # as in set_input_size
            head = nn.Linear(*sizes, device=weight.device, dtype=weight.dtype) if num_classes else nn.Identity()
        self.num_classes, self.global_pool, self.head = sizes[1], pool.train(self.training), head.train(self.training)
        self.dense_head = not pool_type  # without pooling every position gets its logits

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        with_embed: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return feature maps along the way: those of the stages, or of the blocks in a network of one stage.

        Args:
            x: Images of shape (B, in_chans, H, W).
            indices: The maps to return, in this order; negative ones count from the end. A number takes the last n,
                None all.
            norm: Apply the final LayerNorm to the last stage's map, or to all maps in a network of one stage.
            stop_early: Stop after the last map asked for.
            output_fmt: "NCHW" or "NHWC", of the maps.
            intermediates_only: Return the maps alone.
            with_embed: Put one more map first, the output of the first patch embedding, never normalized.

        Returns:
            The maps, contiguous; before them, unless intermediates_only, the result of ``forward_features``.

        Raises:
            ValueError: If an index is out of range, or the format unknown.
        """
        arguments.choice("output_fmt", output_fmt, ("NCHW", "NHWC"))
        layers = self._feature_layers()
        taken, last = feature_take_indices(len(layers), indices)
        has_norm = [info["module"].startswith(f"stages.{len(self.stages) - 1}") for info in self.feature_info]
        x = embedded = self.stages[0].embed(to_nhwc(x, self.in_chans))
        maps: dict[int, Tensor] = {}
        for i, layer in enumerate(layers[: last + 1] if stop_early else layers):
            x = layer(x)
            if i in taken:
                maps[i] = self.norm(x) if norm and has_norm[i] else x
        intermediates = [embedded] * with_embed + [maps[i] for i in taken]
        if output_fmt == "NCHW":
            intermediates = [y.permute(0, 3, 1, 2).contiguous() for y in intermediates]
        if intermediates_only:
            return intermediates
        if has_norm[i]:  # not so where it stopped early
            x = self.norm(x)
        return x.permute(0, 3, 1, 2), intermediates

    def _feature_layers(self) -> list[Callable[[Tensor], Tensor]]:
        """Return what makes each feature map of the one before it; of the first embedding's output, the first one."""
        first, *others = self.stages
        if others:
            return [first.mix, *others]
        if first.grad_checkpointing:
            return [partial(checkpoint, block, use_reentrant=False) for block in first.blocks]
        return list(first.blocks)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the feature maps of the given indices do not need; returns the indices, none negative."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        pruned, has_stages = last + 1 < len(self.feature_info), len(self.stages) > 1
        if has_stages:
            self.stages = self.stages[: last + 1]
        else:
            self.stages[0].blocks = self.stages[0].blocks[: last + 1]
        self.feature_info = self.feature_info[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or (pruned and has_stages):  # it was made for the last stage
            self.norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalized map of the last stage, (B, num_features, H', W'), for images (B, in_chans, H, W)."""
        x = to_nhwc(x, self.in_chans)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the result of ``forward_features``, (B, num_features, H', W').

        Returns logits (B, num_classes), or with pre_logits features (B, num_features); without pooling, one of them
        for each position, (B, num_classes or num_features, H', W').
        """
        x = self.head_drop(self.global_pool(x))
        if pre_logits:
            return x
        if self.dense_head:
            return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_chans, H, W) of any size."""
        return self.forward_head(self.forward_features(x))


class FeatureDict(FeatureGetterNet):
    """timm's wrapper for feature maps, NCHW, as a dict: each under its index, "0", "1", ..."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of images (B, in_chans, H, W)."""
        return dict(zip(map(str, self.out_indices), super().forward(x)))


# timm's "list" and "dict" call a model's children in turn, which its "getter" does not need
FEATURE_CLASSES = {"list": "getter", "dict": FeatureDict}


def _create_raftmlp(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> RaftMLP:
    """Create a variant: S's arguments, those in which the variant and its weights differ, and the caller's."""
    asked = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    cfg, described = resolve_cfg(variant, pretrained, *asked)
    kwargs = {"img_size": tuple(cfg.input_size[-2:]), **RAFTMLP_S, **model_args, **described, **kwargs}
    strides, depths = kwargs["patch_sizes"], kwargs["depths"]
    if (output_stride := kwargs.pop("output_stride", None)) not in (None, math.prod(strides)):
        raise UserError(
            f"output_stride {output_stride} must be {math.prod(strides)}, the product of patch_sizes {strides}: stages "
            f"are not dilated; for another stride give other patch_sizes, and patch_kernels that fit them"
        )
    maps = range(len(depths)) if len(depths) > 1 else range(depths[0])[-3:]  # of all stages, or of three blocks
    feature_cfg = dict(out_indices=tuple(maps), feature_cls="getter")
    if "feature_cls" in kwargs:
        feature_cls = kwargs["feature_cls"]
        kwargs["feature_cls"] = FEATURE_CLASSES.get(feature_cls, feature_cls)
        indices = kwargs.get("out_indices", maps)
        if kwargs["feature_cls"] != "getter" and not isinstance(indices, int) and list(indices) != sorted(set(indices)):
            raise UserError(f"out_indices {indices} must rise: only feature_cls='getter' and 'list' keep an order")
        if feature_cls in ("hook", "fx"):  # these return the maps that are inside, NHWC
            feature_cfg["output_fmt"] = "NHWC"
    how = dict(pretrained_cfg=cfg.to_dict(), pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg)
    return build_model_with_cfg(RaftMLP, variant, pretrained, **how, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": ("stages.0.embed.convs.0", "stages.0.embed.convs.1"),
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/okojoalg/raft-mlp",
        "paper_name": "RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?",
        "paper_ids": "arXiv:2108.04384",
        **kwargs,
    }


ONE_STAGE = dict(pool_size=(14, 14), first_conv="stages.0.embed.convs.0")
default_cfgs = generate_default_cfgs({
    "raftmlp_s": _cfg(),
    "raftmlp_m": _cfg(),
    "raftmlp_l": _cfg(),
    "raftmlp_m_ss": _cfg(first_conv="stages.0.embed.convs.0"),
    "raftmlp_12_r1": _cfg(**ONE_STAGE),
    "raftmlp_12_r2": _cfg(**ONE_STAGE),
    "raftmlp_12_r4": _cfg(**ONE_STAGE),
    "raftmlp_12_r2_ms": _cfg(pool_size=(14, 14)),
    "raftmlp_36_r2": _cfg(**ONE_STAGE),
    "raftmlp_mixer_b16": _cfg(**ONE_STAGE),
    "raftmlp_cifar": _cfg(pool_size=(56, 56), first_conv=tuple(f"stages.0.embed.convs.{k}" for k in range(3))),
    "raftmlp_mixer_cifar": _cfg(pool_size=(56, 56), first_conv="stages.0.embed.convs.0"),
    "raftmlp_digits.sklearn": _cfg(
        file="raftmlp_digits.sklearn.safetensors", num_classes=10, input_size=(3, 32, 32), pool_size=(1, 1),
        crop_pct=1.0, mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD,
        origin_url=None, paper_name=None, paper_ids=None,
    ),
})  # fmt: skip


RAFTMLP_S = dict(depths=(2, 2, 6, 2), patch_sizes=(4, 2, 2, 2))  # what _create_raftmlp asks for
RAFTMLP_12 = dict(embed_dims=(768,), depths=(12,), patch_sizes=(16,), patch_kernels=None)  # of one resolution


@register_model
def raftmlp_s(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """RaftMLP-S of the paper: 9.9 M parameters, 2.1 GMACs at 224."""
    return _create_raftmlp("raftmlp_s", pretrained, {}, kwargs)


@register_model
def raftmlp_m(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """RaftMLP-M of the paper: 21.4 M parameters, 4.3 GMACs at 224."""
    return _create_raftmlp("raftmlp_m", pretrained, dict(embed_dims=(96, 192, 384, 768)), kwargs)


@register_model
def raftmlp_l(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """RaftMLP-L of the paper: 36.2 M parameters, 6.5 GMACs at 224; the second width is 192."""
    return _create_raftmlp("raftmlp_l", pretrained, dict(embed_dims=(128, 192, 512, 1024)), kwargs)


@register_model
def raftmlp_m_ss(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """RaftMLP-M with single-scale patch embeddings: 19.9 M parameters, 3.7 GMACs at 224."""
    return _create_raftmlp("raftmlp_m_ss", pretrained, dict(embed_dims=(96, 192, 384, 768), patch_kernels=None), kwargs)


@register_model
def raftmlp_12_r1(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """12 blocks of one resolution, raft size 1: 58.1 M parameters, 11.4 GMACs at 224."""
    return _create_raftmlp("raftmlp_12_r1", pretrained, dict(RAFTMLP_12, raft_size=1), kwargs)


@register_model
def raftmlp_12_r2(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """12 blocks of one resolution, raft size 2: 58.2 M parameters, 11.6 GMACs at 224."""
    return _create_raftmlp("raftmlp_12_r2", pretrained, RAFTMLP_12, kwargs)


@register_model
def raftmlp_12_r4(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """12 blocks of one resolution, raft size 4: 58.4 M parameters, 12.0 GMACs at 224."""
    return _create_raftmlp("raftmlp_12_r4", pretrained, dict(RAFTMLP_12, raft_size=4), kwargs)


@register_model
def raftmlp_12_r2_ms(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """raftmlp_12_r2 with a multi-scale patch embedding: 60.5 M parameters, 12.1 GMACs at 224."""
    return _create_raftmlp("raftmlp_12_r2_ms", pretrained, dict(RAFTMLP_12, patch_kernels=((16, 32),)), kwargs)


@register_model
def raftmlp_36_r2(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """36 narrow blocks of one resolution, raft size 2: 43.5 M parameters, 9.0 GMACs at 224."""
    return _create_raftmlp("raftmlp_36_r2", pretrained, dict(RAFTMLP_12, embed_dims=(384,), depths=(36,)), kwargs)


@register_model
def raftmlp_mixer_b16(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """The MLP-Mixer baseline of the release: 59.9 M parameters, 12.6 GMACs at 224."""
    return _create_raftmlp("raftmlp_mixer_b16", pretrained, dict(RAFTMLP_12, token_mixing="plain"), kwargs)


@register_model
def raftmlp_cifar(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """The release's CIFAR network; for real CIFAR give img_size=32, num_classes=10."""
    model_args = dict(embed_dims=(128, 256), depths=(2, 2), patch_sizes=(2, 2), raft_size=4)
    return _create_raftmlp("raftmlp_cifar", pretrained, dict(model_args, patch_kernels=((2, 4, 8), (2, 4))), kwargs)


@register_model
def raftmlp_mixer_cifar(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """The release's MLP-Mixer for CIFAR; for real CIFAR give img_size=32, num_classes=10."""
    model_args = dict(RAFTMLP_12, embed_dims=(256,), depths=(4,), patch_sizes=(4,), token_mixing="plain")
    return _create_raftmlp("raftmlp_mixer_cifar", pretrained, model_args, kwargs)


@register_model
def raftmlp_digits(pretrained: bool = False, **kwargs: Any) -> RaftMLP:
    """A small network of ours, for images of 32x32 and below: 0.8 M parameters, four stages for feature pyramids."""
    model_args = dict(embed_dims=(32, 64, 128, 128), depths=(1, 2, 2, 1))
    return _create_raftmlp("raftmlp_digits", pretrained, model_args, kwargs)
