"""Pretrained weights, NAME.TAG.safetensors: where they are looked for when ``pretrained=True`` asks for them."""

import os
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg

from .errors import MissingFileError, UserError
from .files import shipped_folder
from .weights import read_description

__all__ = ["checkpoint_folders", "find_pretrained", "local_cfg", "pretrained_file"]


def checkpoint_folders() -> list[Path]:
    """Return the folders of pretrained weights: those in $RAFTMLP_CHECKPOINTS, then the one that is shipped."""
    named = os.environ.get("RAFTMLP_CHECKPOINTS", "").split(os.pathsep)
    return [Path(name).expanduser() for name in named if name] + [shipped_folder("checkpoints")]


def find_pretrained(name: str, tag: str | None = None) -> Path | None:
    """Return the file NAME.TAG.safetensors in the first checkpoint folder that has one, or None.

    Raises:
        UserError: If no tag is given and a folder has several of them.
    """
    for folder in checkpoint_folders():
        files = sorted(folder.glob(f"{name}.{tag or '*'}.safetensors"))
        if len(files) > 1:
            tags = ", ".join(map(_tag, files))
            raise UserError(f"{folder} has several {name} checkpoints: name one as {name}.TAG, TAG of {tags}")
        if files:
            return files[0]
    return None


def pretrained_file(variant: str, tag: str | None = None) -> Path:
    """Return the file with the pretrained weights of a variant, those of its default tag if none is given.

    Raises:
        MissingFileError: If there is none.
    """
    tag = tag or get_pretrained_cfg(variant).tag
    path = find_pretrained(variant, tag)
    if path is None:
        raise MissingFileError(
            f"no pretrained weights {variant}.{tag or 'TAG'}.safetensors in {shipped_folder('checkpoints')} or "
            f"$RAFTMLP_CHECKPOINTS. The authors of RaftMLP published none: train some with raftmlp train, or make them "
            f"of a checkpoint of the authors' code with raftmlp convert"
        )
    return path


def local_cfg(variant: str, tag: str | None) -> dict[str, Any]:
    """Return what a file in a checkpoint folder changes in the variant's pretrained_cfg."""
    path = pretrained_file(variant, tag)
    return {**read_description(path).get("pretrained_cfg", {}), "file": str(path), "tag": _tag(path)}


def _tag(path: Path) -> str:
    return path.name.removesuffix(".safetensors").split(".", 1)[1]
