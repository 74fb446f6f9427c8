"""The networks in transformers: folders for the Hub as classifiers there and back, backbones, LoRA."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoImageProcessor,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    pipeline,
)

from helpers import TINY_MODEL, same_weights
from raftmlp.cli import export, predict
from raftmlp.export.hub import model_card, write_folder

NAMES = ["nought", "one", "two"]
TINY = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1))


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model whose folder for the Hub is "folder" in the current one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("raftmlp_digits", **TINY, num_classes=3, img_size=(32, 48), in_chans=1).eval()
    model.pretrained_cfg.update(num_classes=3, label_names=NAMES)
    config = dict(input_size=(1, 32, 48), interpolation="bicubic", mean=(0.5,), std=(0.25,))
    write_folder(model, config, model_card(model, "raftmlp_digits", config, {}, None), Path("folder"))
    return model


def test_config_of_a_folder(model):
    config = json.loads(Path("folder/config.json").read_text())
    assert config["label_names"] == NAMES and config["num_classes"] == 3
    assert "label_names" not in config["pretrained_cfg"] and "num_classes" not in config["model_args"]


@torch.no_grad()
def test_classifier_there_and_back(model):
    wrapped = TimmWrapperForImageClassification.from_pretrained("folder").eval()
    assert list(wrapped.config.id2label.values()) == NAMES
    images = torch.randn(2, 1, 32, 48)
    output = wrapped(images, output_hidden_states=True)
    assert torch.equal(output.logits, model(images)) and len(output.hidden_states) == 4
    features = TimmWrapperModel.from_pretrained("folder").eval()(images).pooler_output
    assert torch.equal(features, model.forward_head(model.forward_features(images), pre_logits=True))
    assert AutoImageProcessor.from_pretrained("folder").data_config["input_size"] == (1, 32, 48)

    wrapped.save_pretrained("again")
    again = timm.create_model("local-dir:again", pretrained=True)
    assert again.pretrained_cfg["label_names"] == NAMES and same_weights(again, model)


def test_exported_and_tuned_folders_in_the_commands(run_command):
    assert run_command(export, *TINY_MODEL, "--format", "hf", "--out", "exported")[0] == 0
    TimmWrapperForImageClassification.from_pretrained("exported").save_pretrained("tuned")
    Image.fromarray(np.full((40, 40, 3), 99, np.uint8)).save("image.png")
    (label, *_) = pipeline("image-classification", "tuned")("image.png")
    for folder in ("exported", "tuned"):
        status, printed, err = run_command(predict, "image.png", "--checkpoint", folder, "--results-file", "a.json")
        assert status == 0, err
        assert f"{100 * label['score']:.2f} %" in printed


@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [1, 3]])
@torch.no_grad()
def test_backbone(indices):
    config = TimmBackboneConfig(backbone="raftmlp_s", out_indices=indices)
    backbone = TimmBackbone(config).eval()
    maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
    assert [y.shape[1:] for y in maps] == [(64 << i, 16 >> i, 24 >> i) for i in indices]
    assert backbone.channels == [64 << i for i in indices]


@pytest.mark.parametrize("targets", [["fc1", "fc2"], r".*stages\.3\..*\.channels\.fc[12]"])
def test_lora(targets, tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("raftmlp_digits", pretrained=True).eval()
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["head"], init_lora_weights=False)
    adapted = get_peft_model(timm.create_model("raftmlp_digits", pretrained=True), config)
    images = torch.randn(2, 3, 32, 40)
    adapted.train()(images).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in adapted.parameters())
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(timm.create_model("raftmlp_digits", pretrained=True), tmp_path).eval()
    with torch.no_grad():
        logits = adapted.eval()(images)
        assert not torch.allclose(logits, plain(images), atol=1e-2)
        torch.testing.assert_close(again(images), logits)
        merged = adapted.merge_and_unload()
        assert merged.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(merged(images), logits, atol=1e-4, rtol=1e-4)
