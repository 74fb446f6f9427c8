"""mmengine's checkpoints: read without running code, written complete, the newest readable one of a run."""

import os

import mmengine.runner.checkpoint
import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner, save_checkpoint

from raftmlp.errors import UserError
from raftmlp.mm.checkpoints import (
    CompleteFileBackend,
    find_checkpoint,
    list_checkpoints,
    load_from_http,
    load_from_local,
    load_weights,
    newest_checkpoint,
    patch_mmengine,
)


class Line(BaseModel):
    """A model of two parameters."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode):
        return dict(loss=self.layer(inputs).square().mean())


def train(folder):
    """Train two epochs of three iterations, with a checkpoint each."""
    patch_mmengine()
    Runner(
        Line(),
        str(folder),
        train_dataloader=torch.utils.data.DataLoader([dict(inputs=torch.ones(1))] * 3),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        default_hooks=dict(checkpoint=dict(type=CheckpointHook, interval=1)),
        experiment_name=folder.name,
    ).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "line"
    train(folder)
    return folder


@pytest.fixture
def two(tmp_path):
    """A folder of two checkpoints without more."""
    for epoch in (9, 10):
        torch.save({"state_dict": {"x": torch.ones(100)}}, tmp_path / f"epoch_{epoch}.pth")
    (tmp_path / "best_epoch_9.pth").write_bytes(b"")
    return tmp_path


class Bomb:
    def __reduce__(self):
        return print, ("exploded",)


def test_logs_are_mmengine_s_own_again(folder):
    checkpoint = load_from_local(folder / "epoch_2.pth")
    expected = torch.load(folder / "epoch_2.pth", weights_only=False)["message_hub"]["log_scalars"]
    history = checkpoint["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(history, HistoryBuffer) and len(history.data[0]) == 6
    for values, known in zip(history.data, expected["train/loss"].data):
        assert values.tolist() == known.tolist()
    assert history.mean(6) == expected["train/loss"].mean(6)


def test_the_newest_readable_checkpoint_is_found(two, caplog):
    assert [path.name for path in list_checkpoints(two)] == ["epoch_10.pth", "epoch_9.pth"]
    assert newest_checkpoint(two) == find_checkpoint(two) == two / "epoch_10.pth"
    content = (two / "epoch_10.pth").read_bytes()
    (two / "epoch_10.pth").write_bytes(content[: len(content) // 2])
    with caplog.at_level("INFO", logger="raftmlp"):
        assert newest_checkpoint(two) == two / "epoch_9.pth"
    assert "epoch_10.pth is damaged" in caplog.text and "epoch_9.pth takes its place" in caplog.text
    (two / "epoch_9.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read: .*epoch_10.*epoch_9"):
        newest_checkpoint(two)
    (two / "empty").mkdir()
    assert newest_checkpoint(two / "empty") is None
    for missing in ("empty", "missing.pth"):
        with pytest.raises(UserError, match=f"no checkpoint .*{missing}"):
            find_checkpoint(two / missing)


def test_weights_must_be_all_and_no_others(folder, two):
    model = Line()
    assert load_weights(model, folder / "epoch_2.pth")["meta"]["epoch"] == 2
    assert torch.equal(model.layer.weight, load_from_local(folder / "epoch_2.pth")["state_dict"]["layer.weight"])
    for state, message in ((model.layer.state_dict(), "layer.weight is missing"), ([1], "holds no weights")):
        torch.save({"state_dict": state}, two / "other.pth")
        with pytest.raises(UserError, match=message):
            load_weights(model, two / "other.pth")


def test_files_are_written_complete(tmp_path, monkeypatch):
    path = tmp_path / "new" / "epoch_1.pth"
    backend = CompleteFileBackend()
    backend.put(b"old", path)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        backend.put(b"new", path)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_mmengine_uses_them(tmp_path):
    patch_mmengine()
    patch_mmengine()
    save_checkpoint(dict(state_dict={}), str(tmp_path / "x.pth"))
    assert CheckpointLoader.load_checkpoint(str(tmp_path / "x.pth"), "cpu") == dict(state_dict={})
    assert type(get_file_backend(str(tmp_path / "x.pth"))) is CompleteFileBackend
    torch.save({"bomb": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="bomb.pth is damaged, or holds more than tensors"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "bomb.pth"), "cpu")


def test_checkpoints_of_an_address_are_read_as_safely(folder, tmp_path, monkeypatch, capsys):
    patch_mmengine()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.save({"bomb": Bomb()}, tmp_path / "bomb.pth")
    assert load_from_http((folder / "epoch_2.pth").as_uri())["meta"]["epoch"] == 2
    with pytest.raises(UserError, match="bomb.pth is damaged, or holds more than tensors"):
        load_from_http((tmp_path / "bomb.pth").as_uri())
    with pytest.raises(UserError, match="cannot fetch"):
        load_from_http((tmp_path / "missing.pth").as_uri())
    assert "exploded" not in capsys.readouterr().out
    load = CheckpointLoader.load_checkpoint
    assert mmengine.runner.checkpoint.load_from_http is load_from_http
    monkeypatch.setattr(mmengine.runner.checkpoint, "load_from_http", lambda url, **_: dict(url=url))
    assert load("torchvision://resnet50", "cpu")["url"].startswith("https://")  # goes through ours
    with pytest.raises(UserError, match="from files and over http alone"):
        mmengine.runner.checkpoint._safe_torch_load("x.pth")
