"""``raftmlp convert``: it finds the variant, writes pretrained weights, refuses what does not fit."""

from pathlib import Path

import timm
import torch

from helpers import release_weights
from raftmlp.checkpoints.weights import load_state_dict, read_metadata
from raftmlp.cli import convert


def test_convert_finds_the_variant(run_command):
    for name in ("raftmlp_s", "raftmlp_12_r2", "raftmlp_cifar"):
        weights = release_weights(name)
        torch.save({"model": {f"module.{key}": value for key, value in weights.items()}}, "release.pth")
        status, out, err = run_command(convert, "release.pth", f"{name}.safetensors")
        assert status == 0, err
        assert f"release.pth: {name} in the release format" in out
        assert f"written: {name}.safetensors" in out
        expected = timm.create_model(name)
        expected.load_state_dict(weights)
        state = load_state_dict(f"{name}.safetensors")
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
        assert read_metadata(f"{name}.safetensors")["model"] == name


def test_converted_files_are_pretrained_weights(run_command, monkeypatch):
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", ".")
    torch.manual_seed(0)
    made = timm.create_model("raftmlp_s", num_classes=6, img_size=96, in_chans=1)
    torch.save({"state_dict": made.state_dict()}, "ours.pth")
    status, out, err = run_command(convert, "ours.pth", "raftmlp_s.mine.safetensors", "--img-size", 96)
    assert status == 0, err
    assert "6 classes, trained grid of 96x96" in out
    loaded = timm.create_model("raftmlp_s", pretrained=True)
    assert (loaded.num_classes, loaded.img_size, loaded.in_chans) == (6, (96, 96), 1)
    assert torch.equal(loaded.head.weight, made.head.weight)


def test_convert_refuses(run_command):
    weights = release_weights("raftmlp_s")
    torch.save(weights, "release.pth")
    odd = {key: value for key, value in weights.items() if key != "heads.0.1.bias"}
    odd["levels.1.fn.0.fc.bias"] = torch.zeros(5)
    torch.save({**odd, "extra.weight": torch.zeros(2)}, "odd.pth")
    torch.save({key: value for key, value in weights.items() if key != "classifier.bias"}, "head.pth")
    Path("there.safetensors").write_text("mine")
    for options, messages in [
        (["release.pth", "out.pth"], ["must be named .safetensors"]),
        (["release.pth", "there.safetensors"], ["there.safetensors exists; --overwrite"]),
        (["missing.pth", "out.safetensors"], ["no checkpoint at missing.pth"]),
        (["release.pth", "out.safetensors", "--model", "raftmlp_x"], ["unknown model 'raftmlp_x'"]),
        (["head.pth", "out.safetensors"], ["head.bias"]),
        (["odd.pth", "out.safetensors"], ["raftmlp_s comes nearest, with 3 differences:", "heads.0.1.bias is missing"]),
        (["release.pth", "out.safetensors", "--model", "raftmlp_m"], ["shape [64, 240], not [96, 240]"]),
    ]:
        status, out, err = run_command(convert, *options)
        assert status == 2, options
        assert all(message in err for message in messages), err
        assert not out
        assert not Path("out.safetensors").exists()
    assert Path("there.safetensors").read_text() == "mine"
