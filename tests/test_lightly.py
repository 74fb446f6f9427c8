"""Pretraining without labels, with the parts of lightly."""

import pytest
import timm
import torch
from lightly.loss import NTXentLoss, VICRegLoss
from lightly.models.modules import (
    SimCLRProjectionHead,
)
from lightly.models.modules.heads import VICRegProjectionHead
from lightly.transforms import SimCLRTransform

from raftmlp.cli import train
from raftmlp.data import create_dataset

HALF = dict(mean=[0.5] * 3, std=[0.5] * 3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    arguments = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), img_size=32, num_classes=0)
    return timm.create_model("raftmlp_digits", **arguments)


@pytest.fixture
def views():
    """Two views of each of 32 digits, (32, 3, 32, 32)."""
    torch.manual_seed(0)
    data = create_dataset("digits", split="train")
    data.transform = SimCLRTransform(32, min_scale=0.5, hf_prob=0, gaussian_blur=0, normalize=HALF)
    (batch,) = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(32)), 32)
    (first, second), _ = batch
    return first, second


def pretrain(model, heads, loss_of, after=lambda: None, updates=20):
    """Return the losses of updates on one batch, whose gradients are finite and change every weight of the model."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(updates):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        after()
        losses.append(loss.item())
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())
    return losses


@pytest.mark.parametrize("head, loss", [(SimCLRProjectionHead, NTXentLoss), (VICRegProjectionHead, VICRegLoss)])
def test_pairs_of_views(model, views, head, loss):
    head, criterion = head(model.num_features, 32, 16), loss()
    losses = pretrain(model, head, lambda: criterion(*(head(model(view)) for view in views)))
    assert losses[-1] < 0.95 * losses[0]


def test_weights_in_a_classifier(model, views, run_command):
    head, criterion = SimCLRProjectionHead(model.num_features, 32, 16), NTXentLoss()
    pretrain(model, head, lambda: criterion(*(head(model(view)) for view in views)), updates=1)
    torch.save(model.state_dict(), "unlabeled.pth")
    arguments = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), img_size=32, num_classes=0)
    classifier = timm.create_model("raftmlp_digits", **arguments, checkpoint_path="unlabeled.pth")
    classifier.reset_classifier(10)
    torch.testing.assert_close(classifier.forward_features(views[0]), model.forward_features(views[0]))
    assert classifier(views[0]).shape == (32, 10)

    options = ["--dataset", "digits", "--train-num-samples", 64, "--batch-size", 32, "--workers", 0, "--epochs", 1]
    options += ["--warmup-epochs", 0, "--lr", 0, "--min-lr", 0, "--model", "raftmlp_digits", "--output", "run"]
    options += ["--model-kwargs", "embed_dims=(8,8,16,16)", "depths=(1,1,1,1)", "--checkpoint", "unlabeled.pth"]
    status, out, err = run_command(train, *options)
    assert status == 0, err
    assert "its classifier is missing" in out + err
    tuned = torch.load("run/last.pth.tar", weights_only=False)["state_dict"]
    assert all(torch.equal(tuned[name], value) for name, value in model.state_dict().items())
