"""mmengine's checkpoints: read without running code, written complete, the newest readable one of a run."""

import os

import mmengine.runner.checkpoint
import numpy as np
import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, save_checkpoint

from raftmlp.errors import UserError
from raftmlp.mm import checkpoints


class Pickled:
    """Pickles as a call of a function, and then a state."""

    def __init__(self, function, args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


BOMB = Pickled(print, ("exploded",))


@pytest.fixture
def two(tmp_path):
    """A folder of two checkpoints without more."""
    for epoch in (9, 10):
        torch.save({"state_dict": {"x": torch.ones(100)}}, tmp_path / f"epoch_{epoch}.pth")
    (tmp_path / "best_epoch_9.pth").write_bytes(b"")
    return tmp_path


# Reading


def test_what_mmengine_saves_is_read(tmp_path):
    history = HistoryBuffer([0.5, 0.25, 0.125], [1, 1, 2])
    arrays = dict(longs=np.arange(6).reshape(2, 3), none=np.zeros((0, 3), np.float32), flags=np.array([True, False]))
    arrays["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    scalars = dict(score=np.float64(0.25), count=np.int64(3), flag=np.bool_(True))
    torch.save({"message_hub": {"log_scalars": {"loss": history}}, **arrays, **scalars}, tmp_path / "x.pth")
    content = checkpoints.load_from_local(tmp_path / "x.pth")
    for name, array in arrays.items():
        np.testing.assert_array_equal(content[name].values.numpy(), array)
    assert {name: content[name] for name in scalars} == dict(score=0.25, count=3, flag=True)
    read = content["message_hub"]["log_scalars"]["loss"]
    assert isinstance(read, HistoryBuffer) and read.mean(3) == history.mean(3)
    assert [values.tolist() for values in read.data] == [values.tolist() for values in history.data]


def crafted():
    """Yield code, and dtypes and arrays that numpy itself would build: with pointers in them, or with too few bytes."""
    yield BOMB
    pointers = Pickled(np.dtype, ("f8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 8, 1))
    yield pointers
    make, args, _ = np.zeros(1).__reduce__()
    yield Pickled(make, args, (1, (1,), pointers, False, b"AAAAAAAA"))
    yield Pickled(make, args, (1, (1 << 20,), np.dtype("f8"), False, b"AAAAAAAA"))
    yield Pickled(np.float64(0).__reduce__()[0], (np.dtype("O"), b"AAAAAAAA"))
    yield Pickled(getattr, (dict, "get"), {"x": 1})


@pytest.mark.parametrize("thing", list(crafted()))
def test_crafted_files_are_refused(thing, tmp_path, capsys):
    checkpoints.patch_mmengine()
    torch.save({"state_dict": {}, "thing": thing}, tmp_path / "crafted.pth")
    with pytest.raises(UserError, match="crafted.pth is damaged"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "crafted.pth"), "cpu")
    assert "exploded" not in capsys.readouterr().out


def test_checkpoints_of_an_address_are_read_as_safely(two, monkeypatch, capsys):
    checkpoints.patch_mmengine()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(two / "cache"))
    torch.save({"bomb": BOMB}, two / "bomb.pth")
    assert checkpoints.load_from_http((two / "epoch_9.pth").as_uri()).keys() == {"state_dict"}
    with pytest.raises(UserError, match="bomb.pth is damaged"):
        checkpoints.load_from_http((two / "bomb.pth").as_uri())
    assert "exploded" not in capsys.readouterr().out
    assert mmengine.runner.checkpoint.load_from_http is checkpoints.load_from_http
    monkeypatch.setattr(mmengine.runner.checkpoint, "load_from_http", lambda url, **_: dict(url=url))
    url = CheckpointLoader.load_checkpoint("torchvision://resnet50", "cpu")["url"]
    assert url.startswith("https://")  # goes through ours
    with pytest.raises(UserError):
        mmengine.runner.checkpoint._safe_torch_load("x.pth")


def test_weights_must_be_all_and_no_others(two):
    model = torch.nn.Linear(1, 1)
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, two / "whole.pth")
    checkpoints.load_weights(model, two / "whole.pth")
    assert model.weight == 1
    for key, value in (("bias", None), ("other", torch.ones(1)), ("bias", torch.tensor([np.nan]))):
        wrong = {name: tensor for name, tensor in {**state, key: value}.items() if tensor is not None}
        torch.save({"state_dict": wrong}, two / "wrong.pth")
        with pytest.raises(UserError, match=key):
            checkpoints.load_weights(model, two / "wrong.pth")


# Finding and writing


def test_the_newest_readable_checkpoint_is_found(two, caplog):
    assert [path.name for path in checkpoints.list_checkpoints(two)] == ["epoch_10.pth", "epoch_9.pth"]
    assert checkpoints.find_checkpoint(two) == two / "epoch_10.pth"
    content = (two / "epoch_10.pth").read_bytes()
    (two / "epoch_10.pth").write_bytes(content[: len(content) // 2])
    with caplog.at_level("INFO", logger="raftmlp"):
        assert checkpoints.find_checkpoint(two) == two / "epoch_9.pth"
    assert "epoch_10.pth" in caplog.text and "epoch_9.pth" in caplog.text
    (two / "epoch_9.pth").write_bytes(b"")
    with pytest.raises(UserError, match="epoch_10.*epoch_9"):
        checkpoints.find_checkpoint(two)
    (two / "empty").mkdir()
    for missing in ("empty", "missing.pth"):
        with pytest.raises(FileNotFoundError, match=missing):
            checkpoints.find_checkpoint(two / missing)


def test_mmengine_writes_complete_files(tmp_path, monkeypatch):
    checkpoints.patch_mmengine()
    path = tmp_path / "new" / "epoch_1.pth"
    save_checkpoint(dict(state_dict={}), str(path))
    assert type(get_file_backend(str(path))) is checkpoints.CompleteFileBackend

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(dict(state_dict={"x": 1}), str(path))
    assert CheckpointLoader.load_checkpoint(str(path), "cpu") == dict(state_dict={})
    assert list(path.parent.iterdir()) == [path]
