"""Numpy's arrays in mmengine's checkpoints: read as plain tensors; crafted ones are refused."""

import numpy as np
import pytest
import torch

from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.mm.stand_ins import STAND_INS


class Pickled:
    """Pickles as a call of a function, and then a state."""

    def __init__(self, function, args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def test_numbers_of_numpy_are_read_as_plain_ones(tmp_path):
    arrays = dict(
        doubles=np.linspace(0, 1, 7), longs=np.arange(6).reshape(2, 3), none=np.zeros((0, 3), np.float32),
        fortran=np.asfortranarray(np.arange(6.0).reshape(2, 3)), flags=np.array([True, False]),
    )  # fmt: skip
    scalars = dict(score=np.float64(0.25), count=np.int64(3), flag=np.bool_(True))
    torch.save({"arrays": arrays, "scalars": scalars}, tmp_path / "x.pth")
    content = load_checkpoint(tmp_path / "x.pth", STAND_INS)
    assert content["scalars"] == dict(score=0.25, count=3, flag=True)
    for name, array in arrays.items():
        np.testing.assert_array_equal(content["arrays"][name].values.numpy(), array)


def crafted():
    """Yield dtypes and arrays that numpy itself would build: with pointers in them, or with too few bytes."""
    pointers = Pickled(np.dtype, ("f8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 8, 1))
    yield pointers
    make, args, _ = np.zeros(1).__reduce__()
    yield Pickled(make, args, (1, (1,), pointers, False, b"AAAAAAAA"))
    yield np.array([{}], dtype=object)
    yield np.zeros(1, dtype=[("a", "O")])
    yield Pickled(make, args, (1, (1 << 20,), np.dtype("f8"), False, b"AAAAAAAA"))
    yield Pickled(make, args, (1, (1,), np.dtype("f8"), False, b"AAA"))
    yield Pickled(np.float64(0).__reduce__()[0], (np.dtype("O"), b"AAAAAAAA"))
    yield Pickled(getattr, (dict, "get"), {"x": 1})


@pytest.mark.parametrize("thing", list(crafted()))
def test_crafted_arrays_are_refused(thing, tmp_path):
    torch.save({"state_dict": {}, "thing": thing}, tmp_path / "crafted.pth")
    with pytest.raises(ValueError, match="crafted.pth is damaged"):
        load_checkpoint(tmp_path / "crafted.pth", STAND_INS)
