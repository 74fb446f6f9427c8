"""Pretrained weights, NAME.TAG.safetensors: where they are looked for when ``pretrained=True`` asks for them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, list_models

from .description import shorten
from .errors import MissingFileError, UserError
from .files import shipped_folder
from .weights import read_description

__all__ = ["checkpoint_folders", "find_pretrained", "is_local", "list_pretrained", "local_cfg", "pretrained_file"]


def checkpoint_folders() -> list[Path]:
    """Return the folders of pretrained weights: those in $RAFTMLP_CHECKPOINTS, then the one that is shipped.

    Raises:
        UserError: If there can be no folder of a name in $RAFTMLP_CHECKPOINTS.
    """
    folders = []
    for name in filter(None, os.environ.get("RAFTMLP_CHECKPOINTS", "").split(os.pathsep)):
        try:
            folders.append(Path(name).expanduser())
            folders[-1].exists()
        except (OSError, RuntimeError) as error:  # a name that is too long, a user who is not known
            reason = getattr(error, "strerror", None) or "there is no such user"
            raise UserError(f"$RAFTMLP_CHECKPOINTS names the folder {shorten(name)}: {reason}") from error
    return [*folders, shipped_folder("checkpoints")]


def list_pretrained(variant: str = "*") -> list[str]:
    """Return the pretrained weights in the checkpoint folders, as the names NAME.TAG that ``timm.create_model`` takes.

    ``timm.list_pretrained`` lists those alone that are registered at the import, which looks at no folder.

    Args:
        variant: A model's name, or a pattern of names.
    """
    known = list_models(variant, module="raftmlp")
    return sorted({f"{name}.{tag}" for folder in checkpoint_folders() for name, tag in _names(folder) if name in known})


def find_pretrained(name: str, tag: str | None = None) -> Path | None:
    """Return the file NAME.TAG.safetensors in the first checkpoint folder that has one, or None.

    Raises:
        UserError: If no tag is given and a folder has several of them.
    """
    for folder in checkpoint_folders():
        tags = [its for of, its in _names(folder) if of == name and its == (tag or its)]
        if len(tags) > 1:
            raise UserError(
                f"{folder} has several {name} checkpoints: name one as {name}.TAG, TAG of {', '.join(tags)}"
            )
        if tags:
            return folder / f"{name}.{tags[0]}.safetensors"
    return None


def _names(folder: Path) -> list[tuple[str, str]]:
    """Return the names and tags of the files NAME.TAG.safetensors in a folder."""
    parts = [path.name.removesuffix(".safetensors").partition(".") for path in sorted(folder.glob("*.*.safetensors"))]
    return [(name, tag) for name, _, tag in parts]


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
            f"$RAFTMLP_CHECKPOINTS, which have {', '.join(list_pretrained()) or 'none'}. The authors of RaftMLP "
            f"published none: train some with raftmlp train, or make them of a checkpoint of the authors' code with "
            f"raftmlp convert"
        )
    return path


def local_cfg(variant: str, tag: str | None) -> dict[str, Any]:
    """Return what a file in a checkpoint folder changes in the variant's pretrained_cfg."""
    path = pretrained_file(variant, tag)
    return {
        **read_description(path).get("pretrained_cfg", {}),
        "file": str(path),
        "tag": path.name.split(".", 1)[1].removesuffix(".safetensors"),
    }


def is_local(cfg: Mapping[str, Any]) -> bool:
    """Return whether a pretrained_cfg names no source of weights but a file that the checkpoint folders may have."""
    sources = ("url", "hf_hub_id", "state_dict", "source")
    return not any(cfg.get(key) for key in sources) and not os.path.exists(cfg.get("file") or "")
