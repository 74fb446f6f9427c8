"""raftmlp predict: its table, its JSON, its picture, and what it is made of."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from helpers import DIGITS, make_run_folder
from raftmlp.cli import predict
from raftmlp.data import Digits
from raftmlp.evaluate.prediction import draw_predictions, occlusion_map


@pytest.fixture
def run(run_command):
    """Run the command; see ``run_command``."""
    return partial(run_command, predict)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of 40 held-out digits; the class of N.png is in its sub-folder's name."""
    root = tmp_path_factory.mktemp("digits")
    dataset = Digits("validation")
    for i in range(40):
        image, target = dataset[i]
        (root / str(target)).mkdir(exist_ok=True)
        image.save(root / str(target) / f"{i}.png")
    return root


def results(path="out.json"):
    return json.loads(Path(path).read_text())


# Predictions


def test_digits_are_recognized(run, digits):
    status, out, err = run(digits, *DIGITS, "--topk", 3, "--batch-size", 16, "--results-file", "out.json")
    assert status == 0, err
    written = results()
    assert (written["model"], written["weights"], len(written["images"])) == ("raftmlp_digits", "pretrained", 40)
    assert written["settings"]["input_size"] == [3, 32, 32]
    for entry in written["images"]:
        first, *others = entry["predictions"]
        assert first["name"] == str(first["class"]) == Path(entry["file"]).parent.name
        assert first["probability"] > 0.5
        assert len(others) == 2 and first["probability"] >= others[0]["probability"] >= others[1]["probability"]
        line = next(line for line in out.splitlines() if line.startswith(entry["file"]))
        assert line.split()[1:] == [f"{100 * first['probability']:.2f}", "%", first["name"]]
    assert "note" not in err


@pytest.mark.parametrize("channels", [1, 3])
def test_probabilities_are_those_of_a_direct_call(run, digits, channels):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (50, 70, 4), dtype=np.uint8)).save("odd.png")  # has transparency, is no square
    image = next(digits.rglob("*.png"))
    options = ["--in-chans", channels, "--topk", 99, "--crop-pct", 0.9, "--interpolation", "bicubic", "--std", 0.4]
    options += ["--model-kwargs", "drop_rate=0.5"]  # does nothing in eval mode
    options += ["--background", "#102030"]
    status, _, err = run(image, "odd.png", *DIGITS, *options, "--results-file", "out.json")
    assert status == 0, err

    model = timm.create_model("raftmlp_digits", pretrained=True, in_chans=channels).eval()
    transform = create_transform(
        (channels, 32, 32), crop_pct=0.9, interpolation="bicubic", mean=(0.5,) * channels, std=(0.4,) * channels
    )
    for entry in results()["images"]:
        stored = Image.open(entry["file"]).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", stored.size, "#102030"), stored)
        x = transform(image.convert("L" if channels == 1 else "RGB"))
        with torch.no_grad():
            expected = model(x[None])[0].softmax(0)
        predicted = {p["class"]: p["probability"] for p in entry["predictions"]}
        assert len(predicted) == 10
        assert [predicted[i] for i in range(10)] == pytest.approx(expected.tolist(), abs=1e-6)


# Images that cannot be read


def test_unreadable_images_are_left_out(run, digits):
    whole = sorted((digits / "3").iterdir())[:2]
    Path("1.png").write_bytes(whole[0].read_bytes()[:90])
    Path("2.png").write_text("no image")
    files = [whole[0], "1.png", "2.png", whole[1]]
    options = [*DIGITS, "--topk", 1, "--results-file", "out.json", "--picture", "out.png"]
    status, out, err = run(*files, *options, "--batch-size", 2, "--workers", 1)
    assert status == 2
    assert "cannot read 1.png: " in err and "cannot read 2.png: " in err and "Traceback" not in err
    assert err.splitlines()[-1] == "raftmlp predict: error: 2 of 4 images could not be read"
    assert [line.split()[0] for line in out.splitlines()[:2]] == [str(file) for file in whole]
    entries = results()["images"]
    assert [entry["file"] for entry in entries] == list(map(str, files))
    assert ["error" in entry for entry in entries] == ["predictions" not in entry for entry in entries]
    assert ["error" in entry for entry in entries] == [False, True, True, False]
    assert "picture: out.png, 2 of 4 images" in out

    assert run("1.png", *DIGITS, "--picture", "none.png")[0] == 2 and not Path("none.png").exists()


# Pictures


def test_pictures(run, digits):
    Path("$^$.png").write_bytes(next(digits.rglob("*.png")).read_bytes())  # not a formula, and a broken one at that
    for suffix in (".png", ".pdf"):
        status, out, err = run("$^$.png", *DIGITS, "--picture", f"out{suffix}", "--saliency")
        assert status == 0 and f"picture: out{suffix}, 1 of 1 images" in out, err
        assert Path(f"out{suffix}").stat().st_size > 5000
    image = Image.open("out.png")
    assert 500 < image.width < 800 and 200 < image.height < 400
    status, out, err = run(digits, *DIGITS, "--picture", "out.png", "--topk", 1)
    assert status == 0 and "picture: out.png, 16 of 40 images" in out, err
    image = Image.open("out.png")
    assert 1000 < image.width < 1500 and 1200 < image.height < 2500
    assert {path.name for path in Path().iterdir()} == {"$^$.png", "out.png", "out.pdf"}


# Options and bad input


@pytest.mark.parametrize(
    "options, message",
    [
        (["1.png", "missing.png"], "no images at 'missing.png'"),
        (["1.png", "--saliency"], "name its file with --picture"),
        (["1.png", "--topk", "0"], "--topk"),
        (["1.png", "--results-file", "out.txt"], "out.txt must be named .json"),
        (["1.png", "--picture", "1.png/out.png"], "cannot write 1.png/out.png"),
        (["1.png", "--class-names", "1.txt"], "1.txt has 9 lines, the model 10 classes"),
        (["1.png", "--checkpoint", "nan.pth"], "nan.pth: 'head.bias' has values that are not finite"),
        (["1.png", "--checkpoint", "large.pth"], "the model's output is not finite"),
        (["1.png", "--model-kwargs", "num_classes=0"], "one number"),
        (["1.png", "--img-size", "10000000"], "1 image of 10000000 pixels takes"),
    ],
)
def test_bad_input(run, options, message):
    Image.new("RGB", (32, 32)).save("1.png")
    Path("1.txt").write_text("a\n" * 9)
    state = timm.create_model("raftmlp_digits", pretrained=True).state_dict()
    torch.save({**state, "head.bias": torch.full((10,), float("nan"))}, "nan.pth")
    torch.save({**state, "head.weight": torch.full((10, 128), 3e38)}, "large.pth")
    before = sorted(Path().iterdir())
    status, out, err = run(*options, "--model", "raftmlp_digits")
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1] and "Traceback" not in err
    assert sorted(Path().iterdir()) == before


def test_names_options_of_a_file_and_the_folder_of_a_run(run, digits):
    """The best weights stand for the folder of a run; a checkpoint's names, and those of a file."""
    folder = make_run_folder(Path("run"))
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    state = torch.load(folder / "model_best.pth.tar", weights_only=True)
    cfg = {**timm.create_model("raftmlp_digits").pretrained_cfg, "label_names": words}
    torch.save({**state, "pretrained_cfg": cfg}, folder / "model_best.pth.tar")
    Path("mine.yaml").write_text(f"images: [{digits / '7'}]\ncheckpoint: run\ntopk: 2\n")
    options = ["-c", "mine.yaml", "--topk", 1, "--results-file", "out.json"]
    status, out, err = run(*options, "--img-size", "24x40")
    assert status == 0, err
    assert out.splitlines()[0].endswith("seven") and len(out.splitlines()) == len(list((digits / "7").iterdir())) + 1
    assert results()["settings"]["input_size"] == [3, 24, 40]
    assert results()["weights"] == str(folder / "model_best.pth.tar")
    Path("names.txt").write_text("\n".join(["nul", "één", *words[2:7], "zeven", "acht", "negen"]), encoding="utf-8")
    status, out, _ = run(*options, "--class-names", "names.txt")
    assert status == 0 and out.splitlines()[0].endswith("zeven")
    (folder / "model_best.pth.tar").unlink()
    assert run(*options)[0] == 0 and results()["weights"] == str(folder / "last.pth.tar")


# What it is made of


@pytest.mark.parametrize("size", [(64, 64), (40, 90)])
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
    image[:, :, :24] = -1  # the left half is black, the right half gray
    shown = [(dict(file="x", predictions=[{"class": 0, "name": "a", "probability": 1.0}]), image)]
    heat = torch.zeros(8, 8)
    heat[7, 7] = 0.5  # the lower right corner
    gray, black, red = {}, {}, {}
    for name, heats in (("plain.png", []), ("heat.png", [heat])):
        draw_predictions(Path(name), "", shown, heats, dict(mean=(0.5,) * 3, std=(0.5,) * 3))
        pixels = np.asarray(Image.open(name).convert("RGB"), dtype=int)
        gray[name] = np.argwhere((abs(pixels - 127.5) < 1).all(2))
        black[name] = np.argwhere((pixels == 0).all(2))
        red[name] = np.argwhere(pixels[..., 0] - pixels[..., 1] > 100)
    assert len(red["plain.png"]) == 0 and len(red["heat.png"]) > 100
    assert (red["heat.png"].min(0) > np.median(gray["heat.png"], 0)).all()
    assert len(gray["heat.png"]) > 0.8 * len(gray["plain.png"]) > 3000
    assert len(black["heat.png"]) > 0.8 * len(black["plain.png"]) > 3000
