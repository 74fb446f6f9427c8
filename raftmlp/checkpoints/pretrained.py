"""Pretrained weights, NAME.TAG.safetensors: where they are looked for when ``pretrained=True`` asks for them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, get_pretrained_cfg, list_models, resolve_pretrained_cfg

from ..errors import MissingFileError, UserError
from ..files import shipped_folder
from .weights import read_description

__all__ = ["checkpoint_folders", "find_pretrained", "list_pretrained", "pretrained_file", "resolve_cfg"]


def checkpoint_folders() -> list[Path]:
    """Return the folders of pretrained weights: those in $RAFTMLP_CHECKPOINTS, then the one that is shipped."""
    names = filter(None, os.environ.get("RAFTMLP_CHECKPOINTS", "").split(os.pathsep))
    return [*(Path(name).expanduser() for name in names), shipped_folder("weights")]


def list_pretrained(variant: str = "*") -> list[str]:
    """Return the pretrained weights in the checkpoint folders, as the names NAME.TAG that ``timm.create_model`` takes.

    ``variant`` is a model's name or a pattern. ``timm.list_pretrained`` knows only what is registered at the import.
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
            raise UserError(f"{folder} has several {name} checkpoints: name {name}.TAG, TAG of {', '.join(tags)}")
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
            f"no pretrained weights {variant}.{tag or 'TAG'}.safetensors in {shipped_folder('weights')} or "
            f"$RAFTMLP_CHECKPOINTS, which have {', '.join(list_pretrained()) or 'none'}. The authors of RaftMLP "
            f"published none: train some with raftmlp train, or make them of a checkpoint of the authors' code with "
            f"raftmlp convert"
        )
    return path


def resolve_cfg(
    variant: str,
    pretrained: bool,
    pretrained_cfg: str | PretrainedCfg | Mapping[str, Any] | None,
    overlay: Mapping[str, Any] | None,
) -> tuple[PretrainedCfg, dict[str, Any]]:
    """Return the pretrained_cfg of a variant, and the model's arguments as the file of its weights describes them.

    A file of a checkpoint folder is taken if ``pretrained`` and no other source is named; there are no such arguments
    otherwise.

    Args:
        variant: The variant.
        pretrained: Whether its weights are asked for.
        pretrained_cfg: As ``timm.create_model`` takes it: a tag, or what ``timm.get_pretrained_cfg`` returns.
        overlay: Values that win over those of the cfg.

    Raises:
        MissingFileError: If the weights are asked for, and there are none.
        UserError: If the file of the weights is damaged.
    """
    overlay = dict(overlay or {})
    cfg = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    tag = cfg.get("tag") if isinstance(cfg, Mapping) else cfg
    registered = f"{variant}.{tag}.safetensors"  # a cfg of timm's registry names a file of the folders so
    given = {**(cfg if isinstance(cfg, Mapping) else {}), **overlay}
    has_file = given.get("file") and (given["file"] != registered or os.path.exists(registered))
    if pretrained and has_file and not os.path.exists(given["file"]):
        raise MissingFileError(f"no checkpoint at {given['file']}")
    if not pretrained or has_file or any(given.get(key) for key in ("url", "hf_hub_id", "state_dict", "source")):
        return resolve_pretrained_cfg(variant, cfg, overlay), {}
    path = pretrained_file(variant, tag)
    description = read_description(path)
    found = dict(file=str(path), tag=path.name.removesuffix(".safetensors").split(".", 1)[1])
    overlay = {**description.get("pretrained_cfg", {}), **overlay, **found}
    cfg = cfg if isinstance(cfg, Mapping) else None
    return resolve_pretrained_cfg(variant, cfg, overlay), description.get("model_kwargs", {})
