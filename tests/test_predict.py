"""raftmlp predict: its table, its JSON, its picture, and its messages for bad input."""

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


def test_digits_are_recognised(run, digits):
    status, out, err = run(digits, *DIGITS, "--topk", 3, "--batch-size", 16, "--results-file", "out.json")
    assert status == 0, err
    written = results()
    assert (written["model"], written["weights"], written["settings"]["input_size"]) == (
        "raftmlp_digits",
        "pretrained",
        [3, 32, 32],
    )
    assert len(written["images"]) == 40
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


def test_precision_and_layout_options(run, digits):
    image = next(digits.rglob("*.png"))
    probabilities = []
    for options in ([], ["--amp"], ["--channels-last"]):
        status, _, err = run(image, *DIGITS, *options, "--results-file", "out.json")
        assert status == 0, err
        probabilities.append(results()["images"][0]["predictions"][0]["probability"])
    assert probabilities == pytest.approx([probabilities[0]] * 3, abs=1e-2)
    assert probabilities[1] != probabilities[0]


# Class names


def test_imagenet_names_and_random_weights(run):
    Image.new("RGB", (60, 80), "green").save("green.png")
    status, out, err = run("green.png", "--topk", 1000, "--results-file", "out.json")
    assert status == 0
    assert "the weights of raftmlp_s are random" in err
    assert "great white shark, white shark" in out
    written = results()
    assert (written["model"], written["weights"]) == ("raftmlp_s", "random")
    names = {p["class"]: p["name"] for p in written["images"][0]["predictions"]}
    assert (len(names), names[0], names[999]) == (
        1000,
        "tench, Tinca tinca",
        "toilet tissue, toilet paper, bathroom tissue",
    )


def test_names_of_a_checkpoint_and_of_a_file(run, digits):
    image = next((digits / "7").iterdir())
    model = timm.create_model("raftmlp_digits", pretrained=True)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    cfg = {**model.pretrained_cfg, "label_names": words}
    torch.save(dict(arch="raftmlp_digits", state_dict=model.state_dict(), pretrained_cfg=cfg), "mine.pth")
    status, out, err = run(image, "--checkpoint", "mine.pth", "--topk", 1, "--results-file", "out.json")
    assert status == 0, err
    assert out.splitlines()[0].endswith("%  seven")
    assert (results()["model"], results()["weights"]) == ("raftmlp_digits", "mine.pth")

    Path("names.txt").write_text(
        "\n".join(["nul", "één", "twee", "drie", "vier", "vijf", "zes", "zeven", "acht", "negen"]), encoding="utf-8"
    )
    status, out, _ = run(image, "--checkpoint", "mine.pth", "--topk", 1, "--class-names", "names.txt")
    assert status == 0 and out.splitlines()[0].endswith("%  zeven")
    Path("names.txt").write_text("\n".join(words[:9]))
    status, out, err = run(image, "--checkpoint", "mine.pth", "--class-names", "names.txt")
    assert (status, out) == (2, "") and "names.txt has 9 lines, the model 10 classes" in err


# Images that cannot be read


def test_unreadable_images_are_left_out(run, digits):
    whole = sorted((digits / "3").iterdir())[:2]
    Path("1.png").write_bytes(whole[0].read_bytes()[:90])
    Path("2.png").write_text("no image")
    files = [whole[0], "1.png", "2.png", whole[1]]
    options = [*DIGITS, "--topk", 1, "--results-file", "out.json", "--picture", "out.png"]
    status, out, err = run(*files, *options, "--batch-size", 2, "--workers", 1)
    assert status == 2
    assert "cannot read 1.png: " in err and "cannot read 2.png: " in err
    assert err.splitlines()[-1] == "raftmlp predict: error: 2 of 4 images could not be read"
    assert "Traceback" not in err
    assert [line.split()[0] for line in out.splitlines()[:2]] == [str(file) for file in whole]
    entries = results()["images"]
    assert [entry["file"] for entry in entries] == list(map(str, files))
    assert ["error" in entry for entry in entries] == [False, True, True, False]
    assert ["predictions" in entry for entry in entries] == [True, False, False, True]
    assert "picture: out.png, 2 of 4 images" in out

    status, out, err = run("1.png", *DIGITS, "--picture", "none.png", "--results-file", "none.json")
    assert (status, len(results("none.json")["images"])) == (2, 1)
    assert not Path("none.png").exists()


# Pictures


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".pdf", ".svg"])
def test_picture(run, digits, suffix):
    Path("$^$.png").write_bytes(next(digits.rglob("*.png")).read_bytes())  # no formula, a broken one at that
    status, out, err = run("$^$.png", *DIGITS, "--picture", f"out{suffix}", "--saliency")
    assert status == 0, err
    assert f"picture: out{suffix}, 1 of 1 images" in out
    content = Path(f"out{suffix}").read_bytes()
    assert len(content) > 5000
    if suffix in (".png", ".jpg"):
        image = Image.open(f"out{suffix}")
        assert 500 < image.width < 800 and 200 < image.height < 400
    assert {path.name for path in Path().iterdir()} == {"$^$.png", f"out{suffix}"}


def test_picture_of_many_images_shows_the_first(run, digits):
    status, out, err = run(digits, *DIGITS, "--picture", "out.png", "--topk", 1)
    assert status == 0, err
    assert "picture: out.png, 16 of 40 images" in out
    image = Image.open("out.png")
    assert 1000 < image.width < 1500 and 1200 < image.height < 2500


# Options and bad input


def test_options_of_a_file(run, digits):
    Path("mine.yaml").write_text(f"images: [{digits / '3'}]\nmodel: raftmlp_digits\npretrained: true\ntopk: 2\n")
    status, out, err = run("-c", "mine.yaml", "--topk", 1)
    assert status == 0, err
    assert len(out.splitlines()) == len(list((digits / "3").iterdir()))


def test_help_shows_every_option(run):
    status, out, _ = run("--help")
    assert status == 0
    for action in predict.build_parser()._actions:
        assert action.help
        assert not action.option_strings or action.option_strings[-1] in out
    assert all(f"\n{group}:\n" in out for group in ("images", "model", "run", "output"))


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "name an image, a folder of images or a pattern"),
        (["missing.png"], "no images at 'missing.png'"),
        (["1.png", "*.jpeg"], "no images at '*.jpeg'"),
        (["empty"], "no images at 'empty'"),
        ([""], "no images at ''"),
        (["1.png", "--saliency"], "--saliency colours the picture: name its file with --picture"),
        (["1.png", "--topk", "0"], "must be a whole number of 1 or more, not '0'"),
        (["1.png", "--results-file", "out.txt"], "out.txt must be named .json"),
        (["1.png", "--picture", "out.bmp"], "out.bmp must be named .png or .jpg or .pdf or .svg"),
        (["1.png", "--picture", "1.png/out.png"], "cannot write 1.png/out.png"),
        (["1.png", "--class-names", "missing.txt"], "cannot read the class names in missing.txt: No such file"),
        (["1.png", "--class-names", "1.png"], "cannot read the class names in 1.png: 'utf-8' codec"),
        (["1.png", "--model", "raftmlp_x"], "unknown model 'raftmlp_x'"),
        (["1.png", "--checkpoint", "missing.pth"], "no checkpoint at missing.pth"),
        (["1.png", "--checkpoint", "nan.pth"], "nan.pth: 'head.bias' has values that are not finite"),
        (["1.png", "--checkpoint", "large.pth"], "the model's output is not finite"),
        (["1.png", "--model-kwargs", "num_classes=0"], "the model must give one number a class"),
        (["1.png", "--mean", "0.1", "0.2"], "--mean takes 1 or 3 numbers, not 2"),
        (["1.png", "--background", "whiet"], "must be the name of a colour or #rrggbb, not 'whiet'"),
        (["1.png", "--background", "#ffffff80"], "must be the name of a colour or #rrggbb, not '#ffffff80'"),
        (["1.png", "--img-size", "10000000"], "1 image of 10000000 pixels takes"),
        (["n" * 300], "no images at 'nnnn"),
        (["1.png", "--device", "gpu"], "no device 'gpu'"),
        (["1.png", "--top", "1"], "unrecognized arguments: --top"),
    ],
)
def test_bad_input(run, options, message):
    Image.new("RGB", (32, 32)).save("1.png")
    Path("empty").mkdir()
    state = timm.create_model("raftmlp_digits", pretrained=True).state_dict()
    torch.save({**state, "head.bias": torch.full((10,), float("nan"))}, "nan.pth")
    torch.save({**state, "head.weight": torch.full((10, 128), 3e38)}, "large.pth")
    before = sorted(Path().iterdir())
    status, out, err = run(*options, *([] if "--model" in options else ["--model", "raftmlp_digits"]))
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("raftmlp predict: error: ")
    assert "Traceback" not in err
    assert sorted(Path().iterdir()) == before


def test_the_folder_of_a_run_stands_for_its_best_weights(run, digits):
    folder = make_run_folder(Path("run"))
    for name in ("model_best.pth.tar", "last.pth.tar"):
        assert run(digits, "--checkpoint", folder, "--results-file", "out.json")[0] == 0
        assert results()["weights"] == str(folder / name)
        right = [e["predictions"][0]["name"] == Path(e["file"]).parent.name for e in results()["images"]]
        assert all(right) == (name == "model_best.pth.tar")
        (folder / name).unlink()
    status, _, err = run(digits, "--checkpoint", folder)
    assert status == 2 and f"{folder} is a folder" in err and err.count("\n") == 1


def test_height_and_width_in_one_word(run, digits):
    for size in (["24x40"], ["24", "40"]):
        assert run(digits, *DIGITS, "--img-size", *size, "--results-file", "out.json")[0] == 0
        assert results()["settings"]["input_size"] == [3, 24, 40]
