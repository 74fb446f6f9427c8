"""Image files, their probabilities, what these depend on, and the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from raftmlp.data import Digits
from raftmlp.data.images import evaluation_loader
from raftmlp.errors import UserError
from raftmlp.evaluate.prediction import ImageFiles, class_probabilities, draw_predictions, occlusion_map, predict

CPU = torch.device("cpu")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_prepared_as_in_evaluation(channels, tmp_path):
    config = dict(
        input_size=(channels, 24, 40),
        interpolation="bicubic",
        mean=(0.4,) * channels,
        std=(0.3,) * channels,
        crop_pct=0.9,
        crop_mode="center",
    )
    digits = Digits("validation")
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for i, file in enumerate(files):
        digits[i][0].save(file)
    evaluated, _ = next(iter(evaluation_loader(digits, config, CPU, 8)))
    images = ImageFiles(files, config)
    seen = torch.stack([images[i][0] for i in range(len(images))])
    torch.testing.assert_close(seen, evaluated, rtol=0, atol=1e-6)


def test_predictions_in_the_order_of_the_files(tmp_path):
    for name, colour in (("a.png", 0), ("c.png", 255)):
        Image.new("RGB", (8, 8), (colour,) * 3).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"no image")
    files = sorted(tmp_path.iterdir())
    config = dict(input_size=(3, 4, 4), mean=(0,) * 3, std=(1,) * 3, interpolation="bilinear", crop_pct=1)

    def classify(images):
        brightness = images.mean((1, 2, 3))
        return torch.stack([1 - brightness, torch.zeros_like(brightness), brightness], 1)

    loader = DataLoader(ImageFiles(files, config), 2)
    results, images = zip(*predict(loader, classify, ["dark", "grey", "bright"], 2))
    assert [result["file"] for result in results] == list(map(str, files))
    assert [image.mean().item() for image in images] == [0, 0, 1]
    assert results[0]["predictions"][0] == {"class": 0, "name": "dark", "probability": 1}
    assert results[2]["predictions"][0] == {"class": 2, "name": "bright", "probability": 1}
    assert len(results[0]["predictions"]) == 2
    assert results[1].keys() == {"file", "error"} and "cannot identify image file" in results[1]["error"]


@pytest.mark.parametrize(
    "logits, message", [(torch.ones(1, 2, 3), "one number a class"), (torch.tensor([[1.0, np.nan]]), "not finite")]
)
def test_what_is_no_classifier(logits, message):
    model = torch.nn.Module()
    model.num_classes, model.forward = 2, lambda images: logits
    with pytest.raises(UserError, match=message):
        class_probabilities(torch.zeros(1, 3, 4, 4), model, CPU, torch.autocast("cpu", enabled=False))


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (5, 3)])
def test_occlusion_peaks_where_the_object_is(size):
    height, width = size
    rows, columns = slice(height // 2, height // 2 + max(1, height // 8)), slice(0, max(1, width // 8))

    def classify(images):
        assert len(images) <= 7
        share = images[:, 0, rows, columns].mean((1, 2))
        return torch.stack([1 - share, share], 1)

    image = torch.zeros(3, height, width)
    image[:, rows, columns] = 0.75
    before = image.clone()
    falls = occlusion_map(image, 1, classify, batch_size=7)
    assert falls.shape == (8, 8)
    assert torch.equal(image, before)
    peak = falls == falls.max()
    y, x = ((peak * torch.arange(8.0)[:, None]).sum() / peak.sum(), (peak * torch.arange(8.0)).sum() / peak.sum())
    assert abs((y + 0.5) / 8 * height - (rows.start + rows.stop) / 2) <= max(1, height / 8)
    assert abs((x + 0.5) / 8 * width - (columns.start + columns.stop) / 2) <= max(1, width / 8)
    torch.testing.assert_close(occlusion_map(image, 0, classify, batch_size=7), -falls)
    if height == 64:  # the object is one cell: all squares over it cover it whole, none elsewhere touches it
        assert falls[4, 0] == 0.75
        assert (falls[:3] == 0).all() and (falls[6:] == 0).all() and (falls[:, 2:] == 0).all()


def test_the_picture_is_red_where_the_probability_falls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = torch.zeros(3, 32, 48)
    image[:, :, :24] = -1  # the left half is black, the right half grey
    shown = [(dict(file="x", predictions=[{"class": 0, "name": "a", "probability": 1.0}]), image)]
    heat = torch.zeros(8, 8)
    heat[7, 7] = 0.5  # the lower right corner
    grey, black, red = {}, {}, {}
    for name, heats in (("plain.png", []), ("heat.png", [heat])):
        draw_predictions(Path(name), "", shown, heats, dict(mean=(0.5,) * 3, std=(0.5,) * 3))
        pixels = np.asarray(Image.open(name).convert("RGB"), dtype=int)
        grey[name] = np.argwhere((abs(pixels - 127.5) < 1).all(2))
        black[name] = np.argwhere((pixels == 0).all(2))
        red[name] = np.argwhere(pixels[..., 0] - pixels[..., 1] > 100)
    assert len(red["plain.png"]) == 0 and len(red["heat.png"]) > 100
    assert (red["heat.png"].min(0) > np.median(grey["heat.png"], 0)).all()
    assert len(grey["heat.png"]) > 0.8 * len(grey["plain.png"]) > 3000
    assert len(black["heat.png"]) > 0.8 * len(black["plain.png"]) > 3000
