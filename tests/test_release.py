"""The release's checkpoints, which models take as they are, and weights of another trained grid."""

import pytest
import timm
import torch

from helpers import CATALOGUE, VARIANTS, release_weights, same_weights
from raftmlp.model.conversion import release_entries


@pytest.fixture(scope="module")
def release_s():
    """The golden weights of raftmlp_s in the release's format, and a model that has them."""
    weights = release_weights("raftmlp_s")
    model = timm.create_model("raftmlp_s").eval()
    model.load_state_dict(weights)
    return weights, model


@pytest.mark.parametrize("name", VARIANTS)
def test_release_format_is_the_catalogues(name):
    entries = release_entries(timm.create_model(name, device="meta"))
    assert {e.key: list(e.shape) for e in entries} == CATALOGUE[name]["state_dict_shapes"]


@pytest.mark.parametrize("wrap", ["plain", "model and module", "state_dict", "backbone"])
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
    with pytest.raises(ValueError, match=r"levels.0.fn.0.fc.weight has shape \(64, 240\).*raftmlp convert"):
        timm.create_model("raftmlp_cifar").load_state_dict(release_s[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("raftmlp_m").load_state_dict(release_s[0])
    # r2's vectors are as long as r1's at twice the image size: they must not be resampled into r1
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("raftmlp_12_r1").load_state_dict(release_weights("raftmlp_12_r2"))


def test_pruned_models_take_release_checkpoints(release_s):
    backbone = timm.create_model("raftmlp_s", features_only=True)
    result = backbone.model.load_state_dict(release_s[0], strict=False)
    assert not result.missing_keys
    assert torch.equal(backbone.model.stages[3].embed.bias, release_s[1].stages[3].embed.bias)


# Another trained grid


def test_loading_into_a_larger_grid_resamples(tmp_path):
    weights = release_weights("raftmlp_s")
    expected = timm.create_model("raftmlp_s")
    expected.load_state_dict(weights)
    torch.save(weights, tmp_path / "release.pth")
    loaded = timm.create_model("raftmlp_s", img_size=(256, 288), checkpoint_path=str(tmp_path / "release.pth"))
    resized = timm.create_model("raftmlp_s")
    resized.load_state_dict(expected.state_dict())
    resized.set_input_size((256, 288))
    assert same_weights(loaded, resized)


def test_loading_what_was_saved_at_the_same_grid_changes_nothing():
    small = dict(num_classes=10, embed_dims=(8, 12, 16, 20))
    digits = timm.create_model("raftmlp_digits", **small)
    digits.set_input_size((48, 64))
    again = timm.create_model("raftmlp_digits", **small, img_size=(48, 64))
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
