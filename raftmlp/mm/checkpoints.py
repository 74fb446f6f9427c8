"""Checkpoints of mmengine: read without running code from them, written complete, found in the folder of a run."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import mmengine.runner.checkpoint
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..checkpoints.weights import (
    check_tensors,
    check_types,
    describe_differences,
    first_readable,
    load_checkpoint,
    shapes,
    summary,
)
from ..device import is_first_process
from ..errors import MissingFileError, UserError, first_words
from ..files import write_bytes
from .stand_ins import STAND_INS, LogHistory

_logger = logging.getLogger(__name__)


def patch_mmengine() -> None:
    """Let mmengine read checkpoints without running code from them, write complete files and find ``mmseg::`` configs.

    This holds for the whole process; calling it again changes nothing.
    """
    CheckpointLoader.register_scheme("", load_from_local, force=True)
    CheckpointLoader.register_scheme(("http://", "https://"), load_from_http, force=True)
    # the loaders of mmengine's other addresses (torchvision://, open-mmlab://, s3://, ...) end in one of these two
    mmengine.runner.checkpoint.load_from_http = load_from_http
    mmengine.runner.checkpoint._safe_torch_load = _refuse
    register_backend("local", CompleteFileBackend, prefixes="", force=True)
    MODULE2PACKAGE["mmseg"] = "mmseg"  # the folder that mmengine looks for: OneDL's distribution has another name


class CompleteFileBackend(LocalBackend):
    """mmengine's access to files, but a file that it writes is complete or absent."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file; its folder is made if it is not there."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(filepath, obj)


# Reading


def load_from_local(filename: str | Path, map_location=None) -> dict:
    """Return a checkpoint of mmengine on the CPU, its logs as HistoryBuffers, without running code from the file.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If it is damaged, or has anything but plain data.
    """
    checkpoint = dict(load_checkpoint(Path(filename).expanduser(), STAND_INS))
    hub = checkpoint.get("message_hub")
    scalars = hub.get("log_scalars") if isinstance(hub, dict) else None
    for key, history in scalars.items() if isinstance(scalars, dict) else ():
        if isinstance(history, LogHistory):
            try:
                values, counts = (getattr(history, name).values.tolist() for name in ("_log_history", "_count_history"))
            except AttributeError as error:
                raise UserError(f"{filename} is damaged: its log {key!r} is no list of numbers") from error
            scalars[key] = HistoryBuffer(values, counts)
    return checkpoint


def load_from_http(filename: str, map_location=None, model_dir: str | None = None, progress: bool = True) -> dict:
    """Return a checkpoint at an address, downloaded once into torch's own cache and read as a file is.

    Raises:
        UserError: If it cannot be downloaded, is damaged, or has anything but plain data.
    """
    path = Path(model_dir or Path(torch.hub.get_dir()) / "checkpoints") / Path(urlparse(filename).path).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(filename, str(path), progress=progress and is_first_process())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot fetch {filename}: {first_words(error)}") from error
    return load_from_local(path)


def _refuse(file, map_location=None, weights_only=None):
    raise UserError("checkpoints are read from files and over http alone")


# Finding


def list_checkpoints(work_dir: str | Path) -> list[Path]:
    """Return the checkpoints in the folder of a run, the newest first."""
    numbers = {}
    for path in Path(work_dir).glob("*.pth"):
        if match := re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name):
            numbers[path] = int(match[1])
    return sorted(numbers, key=numbers.get, reverse=True)


def newest_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the newest readable checkpoint in the folder of a run, None if it has none; damaged ones are logged.

    Raises:
        UserError: If all are damaged.
    """
    path, damaged = first_readable(list_checkpoints(work_dir), STAND_INS)
    if damaged and path is None:
        raise UserError(f"no checkpoint in {work_dir} can be read: {'; '.join(damaged)}")
    for message in damaged:
        _logger.info(f"{message}; {path.name} takes its place")
    return path


def find_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint: the file itself, or the newest readable one in the folder of a run.

    Raises:
        UserError: If there is none, or all in the folder are damaged.
    """
    if Path(path).is_file():
        return Path(path)
    if not Path(path).is_dir():
        raise MissingFileError(f"no checkpoint at {path}")
    newest = newest_checkpoint(path)
    if newest is None:
        raise MissingFileError(f"no checkpoint in the folder {path}")
    return newest


# Weights


def check_weights(model: nn.Module, checkpoint: Mapping, path: Path) -> Mapping[str, Tensor]:
    """Return the weights in the content of a file if they are exactly those of a complete detector or segmentor.

    Raises:
        UserError: If they are not.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path} holds no weights of a model of mmdet or mmseg")
    check_tensors(state, path)
    expected = unwrap_model(model).state_dict()
    if differences := describe_differences(shapes(state), shapes(expected)):
        raise UserError(f"{path} does not fit the config's model: {summary(differences)}")
    check_types(state, expected, path)
    return state


def trained_classes(checkpoint: Mapping) -> list[str]:
    """Return the names of the classes that a checkpoint of a training run holds, none if it holds none."""
    meta = checkpoint.get("meta")
    meta = meta.get("dataset_meta") if isinstance(meta, dict) else None
    return list(meta.get("classes") or ()) if isinstance(meta, dict) else []


def load_weights(model: nn.Module, path: Path) -> dict:
    """Load a checkpoint's weights strictly into a detector or segmentor, and return the checkpoint.

    Raises:
        UserError: If the file is missing, damaged or another model's.
    """
    checkpoint = load_from_local(path)
    unwrap_model(model).load_state_dict(check_weights(model, checkpoint, path))
    return checkpoint
