"""Checkpoints of mmengine: read without running code from them, written complete, found in the folder of a run."""

import logging
import pickle
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

from ..checkpoints import weights
from ..device import is_first_process
from ..errors import MissingFileError, UserError
from ..files import write_bytes

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


# Objects in a checkpoint: numpy's own classes would let a file build arrays of anything, pointers too

KINDS = dict(  # of the arrays that may be in a checkpoint, by numpy's code
    b1=torch.bool, i1=torch.int8, u1=torch.uint8, i2=torch.int16, i4=torch.int32, i8=torch.int64, f2=torch.float16,
    f4=torch.float32, f8=torch.float64,
)  # fmt: skip


class PlainDtype:
    """Stands for a numpy dtype in a file that is read: its code, one of KINDS."""

    def __init__(self, code: str, *_):
        if code not in KINDS:
            raise pickle.UnpicklingError(f"an array of {code!r}")
        self.code = code

    def __setstate__(self, state) -> None:
        if len(state) < 8 or state[1] not in ("<", "|") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array of structures")


class PlainArray:
    """Stands for a numpy array in a file that is read: ``values``, a tensor."""

    def __init__(self, *_):
        self.values = torch.empty(0)

    def __setstate__(self, state) -> None:
        _, shape, dtype, fortran, content = state
        self.values = _numbers(dtype, content).reshape(tuple(shape)[::-1] if fortran else tuple(shape))
        if fortran:
            self.values = self.values.permute(*range(len(shape))[::-1])


class LogHistory:
    """Stands for a log's numbers, mmengine's HistoryBuffer, in a file that is read."""


def _numbers(dtype: PlainDtype, content: bytes) -> Tensor:
    if not isinstance(dtype, PlainDtype) or not isinstance(content, bytes):
        raise pickle.UnpicklingError("an array of objects")
    kind = KINDS[dtype.code]
    return torch.frombuffer(bytearray(content), dtype=kind) if content else torch.empty(0, dtype=kind)


STAND_INS = [
    (PlainDtype, "numpy.dtype"),
    (PlainArray, "numpy.ndarray"),
    (LogHistory, "mmengine.logging.history_buffer.HistoryBuffer"),
    (lambda *_: None, "builtins.getattr"),  # a log's methods, which are in the file by name
    (lambda: b"", "builtins.bytes"),  # the content of an empty array
]
for _module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # the names of numpy 2 and 1
    STAND_INS.append((PlainArray, f"{_module}._reconstruct"))
    STAND_INS.append((lambda dtype, content: _numbers(dtype, content).item(), f"{_module}.scalar"))


# Reading


def load_from_local(filename: str | Path, map_location=None) -> dict:
    """Return a checkpoint of mmengine on the CPU, its logs as HistoryBuffers, without running code from the file."""
    checkpoint = dict(weights.load_checkpoint(Path(filename).expanduser(), STAND_INS))
    scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
    for key, history in scalars.items():
        if isinstance(history, LogHistory):
            values, counts = history._log_history.values, history._count_history.values
            scalars[key] = HistoryBuffer(values.tolist(), counts.tolist())
    return checkpoint


def load_from_http(filename: str, map_location=None, model_dir: str | None = None, progress: bool = True) -> dict:
    """Return a checkpoint at an address, downloaded once into torch's own cache and read as a file is."""
    path = Path(model_dir or Path(torch.hub.get_dir()) / "checkpoints") / Path(urlparse(filename).path).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(filename, str(path), progress=progress and is_first_process())
    return load_from_local(path)


def _refuse(file, map_location=None, weights_only=None):
    raise UserError("checkpoints are read from files and over http alone")


# Finding


def list_checkpoints(work_dir: str | Path) -> list[Path]:
    """Return the checkpoints in the folder of a run, the newest first."""
    matches = {path: re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name) for path in Path(work_dir).glob("*.pth")}
    return sorted(filter(matches.get, matches), key=lambda path: int(matches[path][1]), reverse=True)


def find_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint: the file itself, or the newest readable one in the folder of a run."""
    found, damaged = Path(path), []
    if found.is_dir():
        found, damaged = weights.first_readable(list_checkpoints(path), STAND_INS)
    if found is None or not found.is_file():
        raise MissingFileError("; ".join([f"no checkpoint at {path}", *damaged]))
    for message in damaged:
        _logger.info(f"{message}; {found.name} takes its place")
    return found


# Weights


def check_weights(model: nn.Module, checkpoint: Mapping, path: Path) -> Mapping[str, Tensor]:
    """Return the weights in the content of a file if they are exactly those of a complete detector or segmentor.

    Raises:
        UserError: If they are not: mmengine would load those that fit.
    """
    state = checkpoint.get("state_dict", checkpoint)
    weights.check_tensors(state, path)
    expected = unwrap_model(model).state_dict()
    if differences := weights.describe_differences(weights.shapes(state), weights.shapes(expected)):
        raise UserError(f"{path} does not fit the config's model: {weights.summary(differences)}")
    weights.check_types(state, expected, path)
    return state


def trained_classes(checkpoint: Mapping) -> list[str]:
    """Return the names of the classes in a checkpoint of a training run, none if it has none."""
    return list(checkpoint.get("meta", {}).get("dataset_meta", {}).get("classes") or ())


def load_weights(model: nn.Module, path: Path) -> dict:
    """Load a checkpoint's weights strictly into a detector or segmentor, and return the checkpoint."""
    checkpoint = load_from_local(path)
    unwrap_model(model).load_state_dict(check_weights(model, checkpoint, path))
    return checkpoint
