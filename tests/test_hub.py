"""The Hub's folder: the record of the training, and the card."""

import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard

from raftmlp.errors import UserError
from raftmlp.export.hub import model_card, own_tag, training_record, write_folder

CONFIG = dict(input_size=(3, 32, 48), interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2,) * 3)
RECORD = dict(
    options=dict(lr=0.5, opt=None, epochs=9, workers=3),
    data="digits",
    command="raftmlp train --lr 0.5",
    versions=dict(torch="2.6"),
    best_top1=87.654,
    best_epoch=7,
    epochs=9,
    best=dict(eval_images=321),
)


def test_record_of_a_run(tmp_path):
    """It is in the checkpoint and beside it; a summary beside another file is not that file's."""
    torch.save(dict(state_dict={}, options=dict(dataset="digits", lr=0.5)), tmp_path / "model_best.pth.tar")
    torch.save(dict(state_dict={}), tmp_path / "other.pth")
    (tmp_path / "summary.json").write_text(json.dumps(dict(best_top1=12.5, command="python tools/train.py")))
    assert training_record(tmp_path / "model_best.pth.tar") == dict(
        best_top1=12.5, command="python tools/train.py", options=dict(dataset="digits", lr=0.5), data="digits"
    )
    assert training_record(tmp_path / "other.pth") == {}


@pytest.mark.parametrize(
    "file, record, tag",
    [
        ("somewhere/raftmlp_s.in1k.safetensors", {}, "in1k"),
        ("runs/mine/model_best.pth.tar", dict(options=dict(export="flowers")), "flowers"),
        ("somewhere/weights.pth", {}, ""),
    ],
)
def test_the_tag_is_that_of_the_weights(file, record, tag):
    assert own_tag("raftmlp_s", Path(file), record) == tag


def test_a_folder_names_the_data_and_no_folder_of_this_machine(tmp_path):
    """The tag is the run's, not that of timm's default weights of the model."""
    run = tmp_path / "private" / "myrun"
    run.mkdir(parents=True)
    data = tmp_path / "private" / "flowers"
    model = timm.create_model("raftmlp_digits", pretrained=True).eval()
    torch.save(dict(state_dict=model.state_dict(), options=dict(data_dir=str(data), dataset="")), run / "best.pth.tar")
    command = f"python {tmp_path}/tools/train.py --data-dir {data} --output={run} --lr 0.5 --model-kwargs a=(1,2)"
    (run / "summary.json").write_text(json.dumps(dict(command=command)))
    record = training_record(run / "best.pth.tar")
    tag = own_tag("raftmlp_digits", run / "best.pth.tar", record)
    config = timm.data.resolve_model_data_config(model)
    card = model_card(model, f"raftmlp_digits.{tag}", config, record, None)
    write_folder(model, config, card, tmp_path / "folder", tag)
    card, config = (Path(tmp_path, "folder", name).read_text() for name in ("README.md", "config.json"))
    cfg = json.loads(config)["pretrained_cfg"]
    assert cfg["tag"] == "myrun" and cfg["notes"] == ["EXIF orientation applied"]
    assert "# raftmlp_digits.myrun\n" in card and "`flowers`, as" in card
    assert "python train.py --data-dir flowers --output=myrun --lr 0.5 --model-kwargs 'a=(1,2)'" in card
    assert "private" not in card + config and str(tmp_path) not in card + config


@pytest.mark.parametrize(
    "card, field",
    [
        ("{", ""), ("[]", ""), ('{"options": [1]}', "options must"), ('{"best_top1": "x"}', "best_top1 must"),
        ('{"best_epoch": 1.5}', "best_epoch must"), ('{"command": "a\\u0007"}', "command must"),
    ],
)  # fmt: skip
def test_a_damaged_record(card, field, tmp_path):
    (tmp_path / "w.json").write_text(card)
    with pytest.raises(UserError, match=f"w.json is damaged: .*{field}"):
        training_record(tmp_path / "w.safetensors")


def test_a_card_with_a_record(tmp_path):
    model = timm.create_model("raftmlp_digits", num_classes=3, img_size=(32, 48))
    measured = dict(top1=12.345, top5=100.0, images=7, data="the data")
    model_card(model, "raftmlp_digits", CONFIG, RECORD, measured).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "timm" and card.data.pipeline_tag == "image-classification"
    assert card.data.tags == ["image-classification", "timm", "raftmlp"]
    for words in (
        "# raftmlp_digits\n", "3 classes, images of 32x48 pixels", "import raftmlp", "raftmlp train --lr 0.5",
        "| lr | 0.5 |", "With torch 2.6; commit unknown", "Top-1 87.65 %", "321 images", "after epoch 7 of 9",
        "top-1 12.35 %, top-5 100.00 % on 7 images of the data", "the grid of 32x48", "optimistic",
        "3x32x48, bicubic, mean 0.4, 0.5, 0.6, deviation 0.2, 0.2, 0.2",
    ):  # fmt: skip
        assert words in card.content
    other = model_card(timm.create_model("test_vit"), "test_vit", CONFIG, {}, None).content
    assert other.count("Not known:") == 2 and "Not measured." in other and "aftmlp" not in other.split("---")[2]
    assert "| opt |" not in card.content and "workers" not in card.content and "Not known" not in card.content


def test_a_folder_that_gives_other_outputs_is_not_written(tmp_path, monkeypatch):
    model = timm.create_model("raftmlp_digits").eval()
    other = timm.create_model("raftmlp_digits").eval()
    monkeypatch.setattr("raftmlp.export.hub.timm.create_model", lambda *_, **__: other)
    with pytest.raises(UserError, match="gives other outputs: it is not written"):
        write_folder(model, CONFIG, model_card(model, "raftmlp_digits", CONFIG, {}, None), tmp_path / "folder")
    assert not list(tmp_path.iterdir())
