"""Looking inside a network: its weights where they belong, receptive fields by hand, norms by hand, pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from helpers import ROOT
from raftmlp.cli import inspect as command
from raftmlp.evaluate.inspection import mixing_weights, receptive_fields, smallest_share, update_norms
from raftmlp.evaluate.plots import draw_weights

SHIPPED = ROOT / "weights/raftmlp_digits.sklearn.safetensors"


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("raftmlp_digits", **{"embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), **kwargs})


def test_weights_are_those_of_a_group_and_a_position():
    model = make(img_size=(32, 64), raft_size=4)
    weights = mixing_weights(model)
    assert list(weights) == ["vertical", "horizontal"]
    assert list(weights["vertical"]) == [f"stage {i}, block 1" for i in range(1, 5)]
    vertical, horizontal = (weights[kind]["stage 1, block 1"] for kind in ("vertical", "horizontal"))
    assert vertical.shape == (64, 4, 8) and horizontal.shape == (128, 4, 16)
    fc1 = model.stages[0].blocks[0].tokens.horizontal.fc1.weight
    assert horizontal[5, 2, 7] == fc1[5, 2 * 16 + 7].item()
    model = timm.create_model(
        "raftmlp_mixer_b16", img_size=(8, 16), embed_dims=(8,), depths=(2,), patch_sizes=(4,), num_classes=3
    )
    (plain,) = mixing_weights(model).values()
    assert plain["stage 1, block 2"].shape == (16, 2, 4)
    assert plain["stage 1, block 2"][3, 1, 2] == model.stages[0].blocks[1].tokens.plain.fc1.weight[3, 1 * 4 + 2].item()


def test_the_receptive_field_of_vertical_mixing_alone_is_a_column():
    model = make(patch_kernels=((4,), (2,), (2,), (2,)))
    block = model.stages[0].blocks[0]
    for layer in (block.tokens.horizontal, block.channels):
        torch.nn.init.zeros_(layer.fc2.weight)
    images = torch.randn(6, 3, 32, 32)
    field = receptive_fields(model, images, batch_size=4)["stage 1"]
    columns = np.flatnonzero(field.sum(0))
    assert columns.tolist() == [16, 17, 18, 19] and (field[:, 16] > 0).all()
    torch.nn.init.zeros_(block.tokens.vertical.fc2.weight)
    field = receptive_fields(model, images)["stage 1"]
    assert np.flatnonzero(field.sum(1)).tolist() == [16, 17, 18, 19]  # a patch of the embedding
    assert smallest_share(field) <= 8 / 1024
    assert len(receptive_fields(model, images)) == 4
    alone = receptive_fields(model, images[:2], 1)["stage 1"]
    together = receptive_fields(model, images[:2], 2)["stage 1"]
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-7)


def test_the_smallest_share():
    assert smallest_share(np.array([1.0, 0, 5, 2]), 0.5) == 0.25
    assert smallest_share(np.ones((4, 5)), 0.5) == 0.5
    assert smallest_share(np.zeros(3), 0.5) == 0


def test_the_norms_of_updates():
    model, images = make(), torch.randn(5, 3, 32, 32)
    norms = update_norms(model, images, batch_size=2)
    assert {tuple(row) for row in norms.values()} == {("vertical", "horizontal", "channels")} and len(norms) == 4
    x = model.stages[0].embed(images.permute(0, 2, 3, 1))
    added = model.stages[0].blocks[0].tokens.vertical(x) - x
    expected = (added.norm(dim=-1) / x.norm(dim=-1)).mean().item()
    assert norms["stage 1, block 1"]["vertical"] == pytest.approx(expected, rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())
    torch.nn.init.zeros_(model.stages[1].blocks[0].channels.fc2.weight)
    torch.nn.init.zeros_(model.stages[1].blocks[0].channels.fc2.bias)
    assert update_norms(model, images)["stage 2, block 1"]["channels"] == 0


def test_the_pictures_of_the_shipped_checkpoint(run_command):
    status, out, err = run_command(command, "--checkpoint", SHIPPED, "--out", "a/b", "--dataset", "digits", "-j", 0)
    assert status == 0 and not err, err
    for name in ("vertical", "horizontal", "receptive_fields", "updates"):
        assert Image.open(f"a/b/{name}.png").width > 300
    content = json.loads(Path("a/b/inspection.json").read_text())
    assert (content["model"], content["data"], content["images"]) == ("raftmlp_digits", "digits", 64)
    shares = list(content["half_of_the_gradient_in"].values())
    assert shares == sorted(shares) and shares[0] < 0.2 and len(shares) == 4  # deeper stages see more
    assert "stage 4: half of the gradient of its middle is in" in out and len(content["updates"]) == 6


def test_noise_and_plain_mixing(run_command):
    options = ["--model", "raftmlp_mixer_b16", "--img-size", 32, "--images", 3, "--out", "out"]
    options += ["--model-kwargs", "embed_dims=(8,)", "depths=(2,)", "patch_sizes=(8,)", "img_size=32"]
    status, _, err = run_command(command, *options)
    assert status == 0 and "the weights of raftmlp_mixer_b16 are random" in err
    assert Image.open("out/plain.png").width > 300 and not Path("out/vertical.png").exists()
    assert json.loads(Path("out/inspection.json").read_text())["data"] == "noise"


def test_rows_of_several_lengths_in_one_picture(tmp_path):
    blocks = mixing_weights(make(raft_size=(1, 2, 1, 1)))["vertical"]
    draw_weights(tmp_path / "v.png", "vertical", "title", blocks)
    assert Image.open(tmp_path / "v.png").width > 500


def test_another_model_has_no_token_mixing(run_command):
    status, _, err = run_command(command, "--model", "resnet18", "--out", "out")
    assert status == 2 and "resnet18 is no RaftMLP" in err and err.count("\n") == 1
