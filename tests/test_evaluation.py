"""Figures over a loader, and classifiers as they are evaluated."""

import pytest
import timm
import torch
from torch import nn

from raftmlp.data import Digits
from raftmlp.data.images import UNREADABLE, ImageSettings
from raftmlp.errors import UserError
from raftmlp.evaluate.evaluation import ClassifierView, evaluate, prepare_model, run_once
from raftmlp.model.create import ModelSettings

CPU = torch.device("cpu")


def linear(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, outputs))


@torch.no_grad()
def test_figures_of_several_batches():
    model, images = linear(7), torch.randn(9, 3, 4, 4)
    target = torch.tensor([0, 1, 2, 3, UNREADABLE, 4, 5, 6, 0])
    batches = []
    figures = evaluate(
        model, zip(images.split(4), target.split(4)), CPU, on_batch=lambda *batch: batches.append(batch), progress=False
    )
    read = target != UNREADABLE
    logits, labels = model(images)[read], target[read]
    order = logits.argsort(1, descending=True)
    assert (figures["images"], figures["unread"]) == (8, 1)
    assert figures["top1"] == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
    assert figures["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert 0 < figures["top5"] < 100
    assert figures["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), target)
    torch.testing.assert_close(torch.cat([batch[2] for batch in batches]), model(images))


def test_classes_beyond_the_models():
    batch = torch.zeros(2, 3, 4, 4), torch.tensor([1, 3])
    model = linear(3)
    with pytest.raises(UserError, match="the data has a class 3, the model has 3 classes"):
        evaluate(model, [batch], CPU)


@torch.no_grad()
def test_a_view_picks_outputs_and_averages_mirror_images():
    model, images = linear(5).eval(), torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(ClassifierView(model, [4, 0])(images), model(images)[:, [4, 0]])
    mirrored = ClassifierView(model, [4, 0], mirror=True)(images).softmax(1)
    single, flipped = (model(x)[:, [4, 0]].softmax(1) for x in (images, images.flip(3)))
    torch.testing.assert_close(mirrored, (single + flipped) / 2)
    assert not torch.allclose(single, flipped)


def test_a_prepared_model_knows_its_images_and_classes():
    settings = ModelSettings(model="raftmlp_digits", pretrained=True, img_size=[24, 40])
    prepared = prepare_model(settings, ImageSettings(crop_pct=0.5))
    assert (prepared.name, prepared.weights, prepared.outputs) == ("raftmlp_digits", "pretrained", None)
    assert prepared.config["input_size"] == (3, 24, 40) and prepared.config["crop_pct"] == 0.5
    assert not prepared.model.training
    prepared.match(Digits("validation"))
    assert prepared.outputs is None
    again = prepare_model(settings, ImageSettings(), prepared.model)
    assert again.model is prepared.model and again.config["crop_pct"] == 1
    with pytest.raises(UserError, match="--real-labels takes the 50,000 validation images"):
        prepared.match(Digits("validation"), with_real_labels=True)


def test_an_image_size_that_a_model_does_not_take():
    model = timm.create_model("test_vit").eval()
    assert run_once(model, "test_vit", (3, 160, 160)).shape == (1, 1000)
    with pytest.raises(UserError, match="test_vit takes no images of 8x16 pixels: .*divisible by patch size"):
        run_once(model, "test_vit", (3, 8, 16))
