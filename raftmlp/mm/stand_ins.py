"""Stand-ins for the objects in mmengine's logs, so that its checkpoints are read without running code from them.

numpy's own classes would let a file build arrays of anything, pointers too.
"""

import pickle

import torch
from torch import Tensor

__all__ = ["STAND_INS", "LogHistory"]

KINDS = dict(  # of the arrays that may stand in a checkpoint, by numpy's code
    b1=torch.bool, i1=torch.int8, u1=torch.uint8, i2=torch.int16, i4=torch.int32, i8=torch.int64, f2=torch.float16,
    f4=torch.float32, f8=torch.float64,
)  # fmt: skip


class PlainDtype:
    """What stands for a numpy dtype in a file that is read: its code, one of KINDS."""

    def __init__(self, code: str, *_):
        if code not in KINDS:
            raise pickle.UnpicklingError(f"an array of {code!r}")
        self.code = code

    def __setstate__(self, state) -> None:
        if len(state) < 8 or state[1] not in ("<", "|") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array of structures")


class PlainArray:
    """What stands for a numpy array in a file that is read: ``values``, a tensor."""

    def __init__(self, *_):
        self.values = torch.empty(0)

    def __setstate__(self, state) -> None:
        _, shape, dtype, fortran, content = state
        self.values = _numbers(dtype, content).reshape(tuple(shape)[::-1] if fortran else tuple(shape))
        if fortran:
            self.values = self.values.permute(*range(len(shape))[::-1])


class LogHistory:
    """What stands for a log's numbers, mmengine's HistoryBuffer, in a file that is read."""


def _numbers(dtype: PlainDtype, content: bytes) -> Tensor:
    if not isinstance(dtype, PlainDtype) or not isinstance(content, bytes):
        raise pickle.UnpicklingError("an array of objects")
    kind = KINDS[dtype.code]
    return torch.frombuffer(bytearray(content), dtype=kind) if content else torch.empty(0, dtype=kind)


def _number(dtype: PlainDtype, content: bytes) -> int | float | bool:
    return _numbers(dtype, content).item()


def _empty() -> bytes:
    """Return what the content of an empty array is, in the words of a pickle."""
    return b""


def _nothing(*_) -> None:
    """Stand for what is not looked up: a log's methods, which lie in the file by name."""


STAND_INS = [
    (PlainDtype, "numpy.dtype"),
    (PlainArray, "numpy.ndarray"),
    (LogHistory, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_nothing, "builtins.getattr"),
    (_empty, "builtins.bytes"),
]
for _module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # the names of numpy 2 and 1
    STAND_INS += [(PlainArray, f"{_module}._reconstruct"), (_number, f"{_module}.scalar")]
