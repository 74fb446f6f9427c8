"""Weights: safe reading, complete writing, what a checkpoint holds, pretrained=True."""

import argparse
import hashlib
import json

import pytest
import timm
import torch

import raftmlp
from helpers import ROOT, assert_same, same_weights
from raftmlp.checkpoints.pretrained import find_pretrained
from raftmlp.checkpoints.weights import load_state_dict, read_metadata, save_state_dict
from raftmlp.train.run_logger import export_path

SMALL = dict(embed_dims=(8, 12, 16, 20))


@pytest.fixture
def digits():
    torch.manual_seed(0)
    return timm.create_model("raftmlp_digits", num_classes=10, **SMALL).eval()


def test_what_wraps_weights_is_taken_off(tmp_path):
    weight = torch.ones(2)
    for state in (
        {"a": weight},
        {"model": {"a": weight}, "optimizer": {}},
        {"state_dict": {"module.a": weight}},
        {"state_dict": {"a": weight * 0}, "state_dict_ema": {"a": weight}},
        {"_orig_mod.a": weight},
        {"_orig_mod.module.a": weight},
        {"state_dict": {"backbone.a": weight, "head.b": weight}},
        {"state_dict": {"a": weight}, "args": argparse.Namespace(lr=1e-3), "arch": "of timm's script"},
    ):
        torch.save(state, tmp_path / "any.pth")
        unwrapped = load_state_dict(tmp_path / "any.pth")
        assert list(unwrapped) == ["a"]
        assert torch.equal(unwrapped["a"], weight)


def test_save_and_load(digits, tmp_path):
    file = tmp_path / "new" / "folder" / "x.safetensors"
    save_state_dict(digits.state_dict(), file, dict(model="raftmlp_digits"))
    assert read_metadata(file)["model"] == "raftmlp_digits"
    assert_same(load_state_dict(file), dict(digits.state_dict()))
    assert [p.name for p in file.parent.iterdir()] == ["x.safetensors"]


def test_a_failed_write_leaves_the_old_file(digits, tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    save_state_dict({"a": torch.ones(1)}, file)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_state_dict(digits.state_dict(), file)
    assert list(load_state_dict(file)) == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# pretrained=True


def test_shipped_digits_model():
    model = timm.create_model("raftmlp_digits", pretrained=True)
    assert model.num_classes == 10
    assert model.pretrained_cfg["tag"] == "sklearn"
    assert "raftmlp_digits.sklearn" in timm.list_models("raftmlp*", pretrained=True)
    assert same_weights(model, timm.create_model("raftmlp_digits.sklearn", pretrained=True))
    timm.create_model("raftmlp_digits", pretrained=True, in_chans=1, num_classes=5, img_size=48, features_only=True)


def test_folder_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"raftmlp_s\.TAG\.safetensors.*published none.*raftmlp train"):
        timm.create_model("raftmlp_s", pretrained=True)

    torch.manual_seed(0)
    made = timm.create_model("raftmlp_s", num_classes=5, img_size=192)
    cfg = json.dumps(dict(num_classes=5, input_size=(3, 192, 192), mean=(0.1, 0.2, 0.3)))
    save_state_dict(made.state_dict(), tmp_path / "raftmlp_s.mine.safetensors", dict(pretrained_cfg=cfg))
    for name in ("raftmlp_s", "raftmlp_s.mine"):
        model = timm.create_model(name, pretrained=True)
        assert same_weights(model, made)
        assert model.pretrained_cfg["tag"] == "mine"
        assert tuple(model.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
        assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 192, 192)
    assert timm.create_model("raftmlp_s", pretrained=True, img_size=224).img_size == (224, 224)

    (tmp_path / "raftmlp_s.cut.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cut.safetensors is damaged"):
        timm.create_model("raftmlp_s.cut", pretrained=True)
    (tmp_path / "raftmlp_s.cut.safetensors").unlink()

    with pytest.raises(FileNotFoundError, match=r"raftmlp_s\.other\.safetensors"):
        timm.create_model("raftmlp_s.other", pretrained=True)
    save_state_dict(made.state_dict(), tmp_path / "raftmlp_s.yours.safetensors")
    with pytest.raises(ValueError, match=r"several raftmlp_s checkpoints.*mine, yours"):
        find_pretrained("raftmlp_s")
    assert find_pretrained("raftmlp_s", "yours").name == "raftmlp_s.yours.safetensors"
    save_state_dict({}, tmp_path / "resnet18.b.safetensors")
    assert raftmlp.list_pretrained() == ["raftmlp_digits.sklearn", "raftmlp_s.mine", "raftmlp_s.yours"]
    assert raftmlp.list_pretrained("raftmlp_s") == ["raftmlp_s.mine", "raftmlp_s.yours"]
    assert export_path("raftmlp_digits.sklearn", "mine") == tmp_path / "raftmlp_digits.mine.safetensors"


def test_a_cfg_of_timms_registry():
    """The object that timm.get_pretrained_cfg returns names the shipped file, not where it is."""
    cfg = timm.get_pretrained_cfg("raftmlp_digits")
    shipped = timm.create_model("raftmlp_digits", pretrained=True)
    assert same_weights(timm.create_model("raftmlp_digits", pretrained=True, pretrained_cfg=cfg), shipped)
    with pytest.raises(FileNotFoundError, match=r"no pretrained weights raftmlp_s\.TAG\.safetensors"):
        timm.create_model("raftmlp_s", pretrained=True, pretrained_cfg=timm.get_pretrained_cfg("raftmlp_s"))
    for named in (
        dict(pretrained_cfg=timm.models.PretrainedCfg(file="no.pth")),
        dict(pretrained_cfg_overlay=dict(file="no.pth")),
    ):
        with pytest.raises(FileNotFoundError, match=r"no\.pth"):  # other weights do not take its place
            timm.create_model("raftmlp_digits", pretrained=True, **named)


def test_shipped_files_are_listed_with_their_checksum():
    folder = ROOT / "weights"
    table = (folder / "README.md").read_text()
    for file in [folder / "raftmlp_digits.sklearn.safetensors", *folder.glob("*.safetensors")]:
        assert f"| {file.name} |" in table
        assert hashlib.sha256(file.read_bytes()).hexdigest() in table
