"""Another trained grid: token-mixing weights are resampled where they must be, and nowhere else."""

import pytest
import timm
import torch

from helpers import release_weights, same_weights

SMALL = dict(embed_dims=(8, 12, 16, 20))


@pytest.fixture
def digits():
    torch.manual_seed(0)
    return timm.create_model("raftmlp_digits", num_classes=10, **SMALL).eval()


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
