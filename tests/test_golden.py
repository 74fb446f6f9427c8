"""The authors' 2021 release, number for number: its outputs for weights and images that anyone can make again."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import raftmlp
from golden.arrays import images, uniform
from helpers import CATALOGUE, GOLDEN, VARIANTS, relative_error, release_weights


def tiny_model():
    return raftmlp.RaftMLP(
        num_classes=10,
        img_size=64,
        embed_dims=(16, 24, 32, 48),
        depths=(1, 1, 2, 1),
        raft_size=(2, 2, 4, 2),
    )


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """A variant's name and the model with the golden weights; made once for all that ask about it."""
    model = timm.create_model(request.param).eval()
    model.load_state_dict(release_weights(request.param))
    return request.param, model


def test_every_variant_has_golden_files():
    assert set(VARIANTS) == set(timm.list_models("raftmlp*")) - {"raftmlp_digits"}


def test_parameter_count(variant):
    name, model = variant
    assert sum(p.numel() for p in model.parameters()) == CATALOGUE[name]["parameters"]


@torch.no_grad()
def test_logits_and_features(variant):
    name, model = variant
    golden = np.load(GOLDEN / f"{name}.npz")
    for height, width in CATALOGUE[name]["sizes"]:
        tolerance = 1e-5 if (height, width) == (224, 224) else 2e-5  # a resize is in the path
        at = f"{height}x{width}"
        seen = {}
        hooks = [model.stages[0].embed.register_forward_hook(lambda m, i, out: seen.update(embed0=out.flatten(1, 2)))]
        for i, stage in enumerate(model.stages):
            hooks.append(
                stage.register_forward_hook(
                    lambda m, inp, out, i=i: seen.update({f"stage{i}": out.permute(0, 3, 1, 2)})
                )
            )
        logits = model(torch.from_numpy(images(f"{name}/{at}", 2, height, width)))
        for hook in hooks:
            hook.remove()

        assert relative_error(logits, golden[f"{at}/logits"]) < tolerance, at
        assert {f"{at}/{key}/value" for key in seen} == {key for key in golden if key.startswith(at) and "value" in key}
        for key, map_ in seen.items():
            assert list(map_.shape) == golden[f"{at}/{key}/shape"].tolist(), (at, key)
            values = map_.flatten()[torch.from_numpy(golden[f"{at}/{key}/index"])]
            assert relative_error(values, golden[f"{at}/{key}/value"]) < tolerance, (at, key)


def test_training():
    golden = np.load(GOLDEN / "tiny_training.npz")
    model = tiny_model().train()
    model.load_state_dict(release_weights("tiny_training"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for step in range(20):
        labels = torch.from_numpy((uniform(f"labels/{step}", (8,)) + 1) * 5).long().clip(0, 9)
        loss = F.cross_entropy(model(torch.from_numpy(images(f"train/{step}", 8, 64, 64))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, golden["losses"], atol=1e-4, rtol=0)

    model.eval()
    for height, width in CATALOGUE["tiny_training"]["sizes"]:
        with torch.no_grad():
            logits = model(torch.from_numpy(images(f"tiny/{height}x{width}", 2, height, width)))
        tolerance = 1e-5 if (height, width) == (64, 64) else 2e-5
        assert relative_error(logits, golden[f"{height}x{width}/logits"]) < tolerance
