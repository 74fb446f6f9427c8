"""Weights: the release's format, safe reading, whole writing, another trained grid, pretrained=True."""

import argparse
import hashlib
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from test_golden import CATALOGUE, VARIANTS, release_weights

import raftmlp
from raftmlp.checkpoint import (
    find_pretrained,
    load_state_dict,
    read_metadata,
    release_entries,
    save_state_dict,
    unwrap,
)

SMALL = dict(embed_dims=(8, 12, 16, 20))


@pytest.fixture
def digits():
    torch.manual_seed(0)
    return timm.create_model("raftmlp_digits", num_classes=10, **SMALL).eval()


@pytest.fixture(scope="module")
def release_s():
    """The golden weights of raftmlp_s in the release's format, and a model that has them."""
    weights = release_weights("raftmlp_s")
    model = timm.create_model("raftmlp_s").eval()
    model.load_state_dict(weights)
    return weights, model


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# The release's format


@pytest.mark.parametrize("name", VARIANTS)
def test_release_format_is_the_catalogues(name):
    entries = release_entries(timm.create_model(name, device="meta"))
    assert {e.key: list(e.shape) for e in entries} == CATALOGUE[name]["state_dict_shapes"]


@pytest.mark.parametrize("wrap", ["plain", "model", "module", "model and module", "state_dict", "backbone"])
def test_timm_takes_release_checkpoints_as_they_are(release_s, wrap, tmp_path):
    weights, expected = release_s
    file = tmp_path / "release.pth"
    if "module" in wrap:
        weights = {f"module.{key}": value for key, value in weights.items()}
    if wrap == "backbone":
        weights = {f"backbone.{key}": value for key, value in weights.items()} | {"neck.weight": torch.zeros(1)}
    if wrap.startswith(("model", "state_dict")) and wrap != "module":
        weights = {wrap.split()[0]: weights, "epoch": 3}
    torch.save(weights, file)
    assert same_weights(timm.create_model("raftmlp_s", checkpoint_path=str(file)), expected)

    model = timm.create_model("raftmlp_s")
    timm.models.load_checkpoint(model, str(file))
    assert same_weights(model, expected)

    overlay = dict(file=str(file))
    assert same_weights(timm.create_model("raftmlp_s", pretrained=True, pretrained_cfg_overlay=overlay), expected)


def test_release_checkpoint_inside_a_larger_model(release_s):
    weights, expected = release_s
    model = torch.nn.ModuleDict({"net": timm.create_model("raftmlp_s")})
    model.load_state_dict({f"net.{key}": value for key, value in weights.items()})
    assert same_weights(model["net"], expected)


def test_release_checkpoint_with_fewer_channels_and_another_classifier(release_s, tmp_path):
    weights, expected = release_s
    torch.save(weights, tmp_path / "release.pth")
    overlay = dict(file=str(tmp_path / "release.pth"))
    model = timm.create_model("raftmlp_s", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=7)
    for kernel, full in zip(model.stages[0].embed.convs, expected.stages[0].embed.convs):
        torch.testing.assert_close(kernel.weight, full.weight.sum(1, keepdim=True))
    assert model.head.weight.shape == (7, 512)
    assert torch.equal(model.norm.weight, expected.norm.weight)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("heads.0.1.bias"), "Missing key.*norm.bias"),
        (lambda w: w.update({"levels.9.fn.0.fc.bias": torch.zeros(1)}), "Unexpected key.*levels.9.fn.0.fc.bias"),
        (lambda w: w.update({"classifier.bias": torch.zeros(3)}), "size mismatch for head.bias"),
    ],
)
def test_loading_is_strict(release_s, change, message):
    weights = dict(release_s[0])
    change(weights)
    with pytest.raises(RuntimeError, match=message):
        timm.create_model("raftmlp_s").load_state_dict(weights)


def test_another_variants_weights_are_refused(release_s):
    with pytest.raises(ValueError, match=r"levels.0.fn.0.fc.weight has shape \(64, 240\).*convert_checkpoint"):
        timm.create_model("raftmlp_cifar").load_state_dict(release_s[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("raftmlp_m").load_state_dict(release_s[0])
    # r2's vectors are as long as r1's at twice the image size: they must not be resampled into r1
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("raftmlp_12_r1").load_state_dict(release_weights("raftmlp_12_r2"))


# Another trained grid


def test_loading_into_a_larger_grid_resamples(release_s, tmp_path):
    weights, expected = release_s
    torch.save(weights, tmp_path / "release.pth")
    loaded = timm.create_model("raftmlp_s", img_size=(256, 288), checkpoint_path=str(tmp_path / "release.pth"))
    resized = timm.create_model("raftmlp_s")
    resized.load_state_dict(expected.state_dict())
    resized.set_input_size((256, 288))
    assert same_weights(loaded, resized)


def test_loading_what_was_saved_at_the_same_grid_changes_nothing(digits):
    digits.set_input_size((48, 64))
    again = timm.create_model("raftmlp_digits", num_classes=10, img_size=(48, 64), **SMALL)
    again.load_state_dict(digits.state_dict())
    assert same_weights(again, digits)


def test_a_mixers_own_weights_are_never_resampled():
    # 7x28 positions are as many as 14x14: the shapes do not tell them apart
    kwargs = dict(embed_dims=(16,), depths=(2,), img_size=(112, 448))
    made = timm.create_model("raftmlp_mixer_b16", **kwargs)
    again = timm.create_model("raftmlp_mixer_b16", **kwargs)
    again.load_state_dict(made.state_dict())
    assert same_weights(again, made)

    resized = timm.create_model("raftmlp_mixer_b16", **kwargs)
    resized.load_state_dict(made.state_dict())
    resized.set_input_size((448, 112))
    assert not torch.equal(
        resized.stages[0].blocks[0].tokens.plain.fc1.weight, made.stages[0].blocks[0].tokens.plain.fc1.weight
    )


def test_pruned_models_take_release_checkpoints(release_s):
    backbone = timm.create_model("raftmlp_s", features_only=True)
    result = backbone.model.load_state_dict(release_s[0], strict=False)
    assert not result.missing_keys
    assert torch.equal(backbone.model.stages[3].embed.bias, release_s[1].stages[3].embed.bias)


# Files


def test_unwrap():
    weight = torch.ones(2)
    for state in (
        {"a": weight},
        {"model": {"a": weight}, "optimizer": {}},
        {"state_dict": {"module.a": weight}},
        {"state_dict": {"a": weight * 0}, "state_dict_ema": {"a": weight}},
        {"_orig_mod.a": weight},
        {"_orig_mod.module.a": weight},
        {"state_dict": {"backbone.a": weight, "head.b": weight}},
    ):
        unwrapped = unwrap(state)
        assert list(unwrapped) == ["a"]
        assert torch.equal(unwrapped["a"], weight)


def test_save_and_load(digits, tmp_path):
    file = tmp_path / "new" / "folder" / "x.safetensors"
    save_state_dict(digits.state_dict(), file, dict(model="raftmlp_digits"))
    assert read_metadata(file)["model"] == "raftmlp_digits"
    state = load_state_dict(file)
    assert all(torch.equal(state[key], value) for key, value in digits.state_dict().items())
    assert [p.name for p in file.parent.iterdir()] == ["x.safetensors"]


def test_a_failed_write_leaves_the_old_file(digits, tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    save_state_dict({"a": torch.ones(1)}, file)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_state_dict(digits.state_dict(), file)
    assert list(load_state_dict(file)) == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_checkpoints_of_timms_training_script(tmp_path):
    options = argparse.Namespace(model="raftmlp_s", lr=1e-3)
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": options, "arch": "raftmlp_s"}, tmp_path / "timm.pth.tar")
    assert list(load_state_dict(tmp_path / "timm.pth.tar")) == ["a"]


class Evil:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_bad_files(tmp_path, capfd):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing.pth"):
        load_state_dict(tmp_path / "missing.pth")
    bad = {}
    for suffix in ("pth", "safetensors"):
        bad[f"garbage.{suffix}"] = b"this is no checkpoint"
        bad[f"empty.{suffix}"] = b""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    bad["cut.pth"] = (tmp_path / "whole.pth").read_bytes()[:2000]
    whole = safetensors.torch.save({"a": torch.zeros(1000)})
    bad["cut.safetensors"] = whole[:2000]
    bad["evil.pth"] = pickle.dumps(Evil())
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged") as caught:
            load_state_dict(tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.save({"a": Evil()}, tmp_path / "evil_zip.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        load_state_dict(tmp_path / "evil_zip.pth")
    for content in ({"epoch": 3}, [1, 2], torch.zeros(3)):
        torch.save(content, tmp_path / "nothing.pth")
        with pytest.raises(ValueError, match="holds no weights"):
            load_state_dict(tmp_path / "nothing.pth")
    assert "code from a file ran" not in "".join(capfd.readouterr())


# pretrained=True


def test_shipped_digits_model():
    model = timm.create_model("raftmlp_digits", pretrained=True)
    assert model.num_classes == 10
    assert model.pretrained_cfg["tag"] == "sklearn"
    assert "raftmlp_digits.sklearn" in timm.list_models("raftmlp*", pretrained=True)
    assert same_weights(model, timm.create_model("raftmlp_digits.sklearn", pretrained=True))
    timm.create_model("raftmlp_digits", pretrained=True, in_chans=1, num_classes=5, img_size=48)
    timm.create_model("raftmlp_digits", pretrained=True, num_classes=0)
    timm.create_model("raftmlp_digits", pretrained=True, features_only=True)


def test_folder_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"raftmlp_s\.TAG\.safetensors.*published none.*tools/train\.py"):
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

    cfg = timm.models.PretrainedCfg(file=str(tmp_path / "raftmlp_s.mine.safetensors"), num_classes=5, classifier="head")
    assert same_weights(timm.create_model("raftmlp_s", pretrained=True, pretrained_cfg=cfg, img_size=192), made)
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


def test_hub_style_folder(digits, tmp_path):
    # what timm writes for the Hugging Face hub, it reads back
    digits = timm.create_model("raftmlp_digits", num_classes=4, img_size=24)
    timm.models.save_for_hf(digits, str(tmp_path))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same_weights(digits, again)
    assert isinstance(again, raftmlp.RaftMLP)


def test_shipped_files_are_listed_with_their_checksum():
    folder = Path(__file__).parent.parent / "checkpoints"
    table = (folder / "README.md").read_text()
    shipped = list(folder.glob("*.safetensors"))
    assert shipped
    for file in shipped:
        assert f"| {file.name} |" in table
        assert hashlib.sha256(file.read_bytes()).hexdigest() in table
