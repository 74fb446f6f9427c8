"""Pretrained weights of the variants, found in the checkpoint folders when they are asked for."""

from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg

from .checkpoint import find_pretrained, tag_of, trained_as

__all__ = ["local_cfg", "pretrained_file"]


def pretrained_file(variant: str, tag: str | None = None) -> Path:
    """Return the file with the pretrained weights of a variant, those of its default tag if none is given.

    Raises:
        FileNotFoundError: If there is none.
    """
    tag = tag or get_pretrained_cfg(variant).tag
    path = find_pretrained(variant, tag)
    if path is None:
        raise FileNotFoundError(
            f"no pretrained weights {variant}.{tag or 'TAG'}.safetensors in checkpoints/ or $RAFTMLP_CHECKPOINTS. "
            f"The authors of RaftMLP published none: train some with tools/train.py, or make them of a checkpoint "
            f"of the authors' code with tools/convert_checkpoint.py"
        )
    return path


def local_cfg(variant: str, tag: str | None) -> dict[str, Any]:
    """Return what a file in a checkpoint folder changes in the variant's pretrained_cfg."""
    path = pretrained_file(variant, tag)
    return {**trained_as(path).get("pretrained_cfg", {}), "file": str(path), "tag": tag_of(path)}
