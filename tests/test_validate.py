"""raftmlp validate: its figures against ones computed here in the plainest way, its tables, files and errors."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from helpers import (
    DIGITS,
    REAL_LABELS,
    ROOT,
    TINY_MODEL,
    NamedImages,
    make_image_folder,
    make_run_folder,
    release_weights,
)
from raftmlp.cli import export, validate
from raftmlp.data import Digits, create_dataset
from raftmlp.data.settings import DataSettings
from raftmlp.evaluate import evaluation

DIGITS = [*DIGITS, "--dataset", "digits"]
SYNSETS = ["n01443537", "n01440764", "n02012849", "n03126707"]  # goldfish, tench, and the two cranes
MEAN, STD = 0.5, 0.5  # of raftmlp_digits


@pytest.fixture
def run(run_command):
    """Run the command; see ``run_command``."""
    return lambda *args: run_command(validate, *args, "--workers", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def shipped():
    """The shipped digits model."""
    return timm.create_model("raftmlp_digits", pretrained=True).eval()


def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def read_rows(path="r.json"):
    return json.loads(Path(path).read_text())["rows"]


def colour_image(number, size=(20, 20)):
    """An image of one colour that no other number has."""
    return Image.new("RGB", size, (number * 20 % 256, number * 45 % 256, number * 70 % 256))


def image_folder(root, classes, images=3):
    """Make a folder of images of one colour each, ``images`` a class; returns them as {file: (class, image)}."""
    made = {}
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images):
            made[str(root / name / f"{i}.png")] = (name, colour_image(len(made)))
            made[str(root / name / f"{i}.png")][1].save(root / name / f"{i}.png")
    return made


def as_batch(images, size):
    """The batch of some images as raftmlp_digits takes them: shorter side to ``size``, bilinear, centre, normalised."""
    arrays = []
    for image in images:
        height, width = size
        side = max(size)
        image = image.resize((side, side), Image.Resampling.BILINEAR)
        top, left = (side - height) // 2, (side - width) // 2
        arrays.append(np.asarray(image)[top : top + height, left : left + width])
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    return (pixels - MEAN) / STD


def digits_at(size):
    digits = create_dataset("digits")
    return as_batch([digits[i][0] for i in range(len(digits))], size), torch.from_numpy(digits.labels)


@torch.no_grad()
def figures_of(probabilities, labels):
    """Top-1, top-5 and loss, an image at a time."""
    top1 = top5 = loss = 0
    for values, label in zip(probabilities.double(), labels.tolist()):
        order = sorted(range(len(values)), key=lambda c: -values[c])
        top1 += order[0] == label
        top5 += label in order[:5]
        loss -= values[label].log().item()
    return dict(top1=100 * top1 / len(labels), top5=100 * top5 / len(labels), loss=loss / len(labels))


def assert_figures(row, expected):
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4), row


# Figures


@torch.no_grad()
def test_figures_at_several_sizes(run, shipped):
    sizes = {"16": (16, 16), "24x32": (24, 32), "32": (32, 32)}
    status, out, err = run(
        *DIGITS, "--sizes", *sizes, "--batch-size", 100, "--results-file", "r.json", "--size-plot", "plot.png"
    )
    assert status == 0, err
    results = json.loads(Path("r.json").read_text())
    assert [tuple(row["img_size"]) for row in results["rows"]] == list(sizes.values())
    for row, size in zip(results["rows"], sizes.values()):
        images, labels = digits_at(size)
        assert_figures(row, figures_of(shipped(images).softmax(1), labels))
        assert (row["model"], row["images"], row["unread"], row["crop_pct"]) == ("raftmlp_digits", 360, 0, 1)
        assert row["parameters"] == 756454 and row["images_per_second"] > 0
    assert results["versions"]["torch"] == torch.__version__
    assert results["data"] == {"dataset": "digits", "data_dir": None, "split": "validation", "classes": 10}

    header, *lines = out.splitlines()[:4]
    assert header.split()[:3] == ["model", "parameters", "size"]
    assert len({len(line) for line in [header, *lines]}) == 1
    for line, size, row in zip(lines, sizes, results["rows"]):
        assert line.split()[:7] == [
            "raftmlp_digits", "0.76", "M", size, "1", f"{row['top1']:.2f}", f"{row['top5']:.2f}"
        ]  # fmt: skip
    assert Image.open("plot.png").width > 500


@torch.no_grad()
def test_mirror_averages_probabilities(run, shipped):
    status, _, err = run(*DIGITS, "--mirror", "--results-file", "r.json")
    assert status == 0, err
    images, labels = digits_at((32, 32))
    expected = figures_of((shipped(images).softmax(1) + shipped(images.flip(3)).softmax(1)) / 2, labels)
    assert_figures(read_rows()[0], expected)
    assert expected["top1"] < 100  # or the mirror was no other image


@torch.no_grad()
def test_crop_pct(run, shipped):
    status, _, err = run(*DIGITS, "--img-size", 24, "--crop-pct", 0.75, "--results-file", "r.json")
    assert status == 0, err
    images, labels = digits_at((32, 32))
    row = read_rows()[0]
    assert_figures(row, figures_of(shipped(images[:, :, 4:28, 4:28]).softmax(1), labels))
    assert row["crop_pct"] == 0.75


@torch.no_grad()
def test_predictions_confusion_and_worst_classes(run, shipped):
    status, out, err = run(
        *DIGITS, "--img-size", 20, "--batch-size", 100, "--predictions", "p.csv", "--confusion", "c.png",
        "--picture", "g.png", "--results-file", "r.json",
    )  # fmt: skip
    assert status == 0, err
    images, labels = digits_at((20, 20))
    probabilities = shipped(images).softmax(1)
    predicted = probabilities.argmax(1)
    rows = read_csv("p.csv")
    assert [row["file"] for row in rows] == [f"image {i}" for i in range(360)]
    for row, label, guess, values in zip(rows, labels.tolist(), predicted.tolist(), probabilities):
        assert (int(row["class"]), row["class_name"]) == (label, str(label))
        assert (int(row["predicted"]), row["predicted_name"], int(row["right"])) == (guess, str(guess), guess == label)
        assert float(row["probability"]) == pytest.approx(values.max().item(), abs=1e-4)
        assert float(row["class_probability"]) == pytest.approx(values[label].item(), abs=1e-4)
        assert [int(c) for c in row["top5"].split()] == values.argsort(descending=True)[:5].tolist()

    worst = json.loads(Path("r.json").read_text())["worst_classes"]
    assert len(worst) == 10
    assert [row["accuracy"] for row in worst] == sorted(row["accuracy"] for row in worst)
    assert worst[0]["accuracy"] < 95  # or there is nothing to see
    for row in worst:
        guesses = predicted[labels == row["class"]].tolist()
        assert row["name"] == str(row["class"]) and row["images"] == len(guesses)
        assert row["accuracy"] == pytest.approx(100 * guesses.count(row["class"]) / len(guesses))
        wrong = [guess for guess in guesses if guess != row["class"]]
        assert bool(wrong) == bool(row["taken_for"])
        if wrong:
            assert row["taken_for"]["images"] == max(map(wrong.count, wrong)) == wrong.count(row["taken_for"]["class"])
    first = worst[0]["taken_for"]
    assert f"{worst[0]['accuracy']:.2f}" in out and f"{first['name']} ({first['images']})" in out
    assert Image.open("c.png").width > 500 and Image.open("g.png").width > 500


# Side by side


@torch.no_grad()
def test_compare(run, shipped):
    weights = {key: value * 1.5 for key, value in shipped.state_dict().items()}
    torch.save(weights, "other.pth")
    shipped15 = timm.create_model("raftmlp_digits", num_classes=10).eval()
    shipped15.load_state_dict(weights)
    status, out, err = run(
        *DIGITS,
        "--checkpoint",
        "other.pth",
        "--compare",
        "raftmlp_digits",
        "--img-size",
        24,
        "--results-file",
        "r.json",
    )
    assert status == 0, err
    images, labels = digits_at((24, 24))
    first, second = read_rows()
    assert (first["weights"], second["weights"]) == ("other.pth", "pretrained")
    assert_figures(first, figures_of(shipped15(images).softmax(1), labels))
    assert_figures(second, figures_of(shipped(images).softmax(1), labels))
    assert len(out.splitlines()) == 4 and not err


def test_compare_checkpoints_and_folders_of_the_hub(run, run_command, shipped):
    torch.save({"arch": "raftmlp_digits", "state_dict": shipped.state_dict()}, "same.pth")
    status, _, err = run_command(export, *DIGITS[:3], "--format", "hf", "--out", "folder")
    assert status == 0, err
    compare = ["same.pth", "folder", "folder/model.safetensors", "local-dir:folder"]
    status, out, err = run(*DIGITS, "--compare", *compare, "--results-file", "r.json")
    assert status == 0, err
    first, *others = read_rows()
    assert [row["model"] for row in others] == [
        "raftmlp_digits (same.pth)", "raftmlp_digits (folder)", "raftmlp_digits (model.safetensors)", "raftmlp_digits",
    ]  # fmt: skip
    assert [row["weights"] for row in others] == compare
    for row in others:
        assert {key: row[key] for key in ("top1", "loss", "crop_pct")} == {
            key: pytest.approx(first[key]) for key in ("top1", "loss", "crop_pct")
        }
    for options in (["--model", "local-dir:folder", "--pretrained"], ["--checkpoint", "folder"]):
        status, out, err = run(*options, "--dataset", "digits")
        assert (status, err) == (0, "") and f"raftmlp_digits: top-1 {first['top1']:.2f} %" in out
    status, _, err = run("--model", "local-dir:folder", "--dataset", "digits")
    assert status == 0 and "the weights of raftmlp_digits are random" in err
    for options, message in (
        (["--model", "local-dir:nowhere"], "cannot read nowhere/config.json"),
        (["--model", "hf-hub:a/b/c"], "cannot fetch hf-hub:a/b/c"),
        (["--compare", "none.pth"], "no checkpoint at none.pth"),
    ):
        status, _, err = run("--dataset", "digits", *options)
        assert status == 2 and message in err and len(err.splitlines()) == 1


def test_every_model_has_its_own_settings_and_size(run):
    image_folder(Path("images"), "ab")
    status, out, err = run(
        *TINY_MODEL, "--data-dir", "images", "--compare", "test_vit", "resnet10t", "--results-file", "r.json"
    )
    assert status == 0, err
    rows = read_rows()
    assert [(row["model"], row["img_size"]) for row in rows] == [
        ("raftmlp_digits", [32, 32]), ("test_vit", [160, 160]), ("resnet10t", [176, 176]),
    ]  # fmt: skip
    for row in rows:
        config = timm.get_pretrained_cfg(row["model"])
        assert (row["crop_pct"], row["interpolation"]) == (config.crop_pct, config.interpolation)
    assert "the weights of raftmlp_digits, test_vit, resnet10t are random" in err
    # a model whose size is fixed is built for every size; --model-kwargs are not for it
    status, out, err = run(
        *TINY_MODEL, "--data-dir", "images", "--compare", "vit_tiny_patch16_224", "--sizes", 32, "48x64"
    )
    assert status == 0, err
    assert [line.split()[3] for line in out.splitlines()[1:5]] == ["32", "48x64"] * 2


def test_channels_last_and_compile(run, monkeypatch):
    seen, compiled = [], []
    create = evaluation.create_model

    def create_model(*args, **kwargs):
        model = create(*args, **kwargs)
        model.register_forward_pre_hook(lambda _, x: seen.append(x[0].is_contiguous(memory_format=torch.channels_last)))
        return model

    monkeypatch.setattr(evaluation, "create_model", create_model)
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    options = [*DIGITS, "--batch-size", 180, "--results-file", "r.json"]
    status, _, err = run(*options, "--channels-last", "--compile", "--mirror")
    assert status == 0, err
    assert seen == [False, *[True] * 4]  # one image to see that the model takes it, then batches and their mirrors
    weight = compiled[0].stages[0].embed
    assert any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in weight.parameters()
    )
    figures = read_rows()[0]
    assert run(*options, "--mirror")[0] == 0
    assert_figures(figures, {k: read_rows()[0][k] for k in ("top1", "loss")})
    assert len(compiled) == 1


# Images that cannot be read


def test_images_that_cannot_be_read_do_not_count(run):
    image_folder(Path("images"), "ab", images=4)
    torch.manual_seed(0)
    torch.save(timm.create_model("raftmlp_digits", num_classes=2).state_dict(), "model.pth")
    options = ["--model", "raftmlp_digits", "--checkpoint", "model.pth", "--batch-size", 3, "--results-file", "r.json"]
    Path("images/b/1.png").unlink()
    assert run(*options, "--data-dir", "images")[0] == 0
    whole = read_rows()[0]
    Path("images/b/1.png").write_bytes(b"no image")
    outputs = ["--predictions", "p.csv", "--confusion", "c.png", "--picture", "g.png"]
    status, _, err = run(*options, "--data-dir", "images", *outputs)
    assert status == 0, err
    results = json.loads(Path("r.json").read_text())
    row = results["rows"][0]
    assert (whole["images"], whole["unread"], row["images"], row["unread"]) == (7, 0, 7, 1)
    assert_figures(row, {key: whole[key] for key in ("top1", "top5", "loss")})
    assert err.splitlines()[-2:] == ["1 of 8 images could not be read and do not count:", "  images/b/1.png"]
    assert "images/b/1.png" not in Path("p.csv").read_text()
    assert len(Path("p.csv").read_text().splitlines()) == 8
    assert sum(worst["images"] for worst in results["worst_classes"]) == 7

    for path in Path("images").rglob("*.png"):
        path.write_bytes(b"no image")
    status, _, err = run(*options, "--data-dir", "images")
    assert status == 2 and "none of the 8 images can be read" in err


# ImageNet


@torch.no_grad()
def test_a_part_of_imagenet(run):
    made = image_folder(Path("images"), SYNSETS)
    torch.manual_seed(0)
    model = timm.create_model("raftmlp_digits", num_classes=1000).eval()
    torch.nn.init.normal_(model.head.weight, std=3)
    torch.save(model.state_dict(), "model.pth")
    options = ["--model", "raftmlp_digits", "--data-dir", "images"]
    status, out, err = run(*options, "--checkpoint", "model.pth", "--results-file", "r.json", "--predictions", "p.csv")
    assert status == 0, err
    assert out.splitlines()[0] == "the 4 classes are a part of ImageNet-1k: raftmlp_digits chooses among these"
    synsets = sorted(SYNSETS)
    outputs = [0, 1, 134, 517]  # tench, goldfish, crane (the bird), crane (the machine)
    files = sorted(made)
    logits = model(as_batch([made[file][1] for file in files], (32, 32)))[:, outputs]
    labels = torch.tensor([synsets.index(made[file][0]) for file in files])
    assert_figures(read_rows()[0], figures_of(logits.softmax(1), labels))
    rows = read_csv("p.csv")
    assert [Path(row["file"]).resolve() for row in rows] == [Path(file).resolve() for file in files]
    assert [int(row["predicted"]) for row in rows] == logits.argmax(1).tolist()
    names = ["tench", "goldfish", "crane (n02012849)", "crane (n03126707)"]
    assert [row["class_name"] for row in rows] == [names[label] for label in labels]

    # nothing says the number of classes: not the folder's 4, though a model of another data set's 4 takes these
    status, out, err = run(*options)
    assert status == 0 and "chooses among these" in out
    status, out, err = run(*options, "--num-classes", 4)
    assert status == 0 and "chooses among these" not in out

    Path(f"images/{SYNSETS[0]}").rename("images/n00000001")
    status, out, err = run(*options, "--num-classes", 1000, "--checkpoint", "model.pth")
    assert (status, out) == (2, "")
    assert "the data has classes that the model was not trained on: ['n00000001']; it knows ['n01440764'" in err


def test_numbered_folders_as_of_imagenet_v2(run):
    image_folder(Path("images"), map(str, range(12)), images=1)
    status, _, err = run(*TINY_MODEL, "--data-dir", "images", "--predictions", "p.csv")
    assert status == 0, err
    rows = read_csv("p.csv")
    assert [(row["class"], Path(row["file"]).parent.name) for row in rows] == [(str(i), str(i)) for i in range(12)]


def test_release_checkpoint(run):
    made = image_folder(Path("images"), SYNSETS[:2], images=1)
    weights = release_weights("raftmlp_s")
    torch.save({"model": {f"module.{key}": value for key, value in weights.items()}}, "release.pth")
    options = ["--model", "raftmlp_s", "--checkpoint", "release.pth", "--data-dir", "images"]
    mean = ["--mean", MEAN, "--std", STD, "--interpolation", "bilinear", "--crop-pct", 1]
    status, _, err = run(*options, *mean, "--img-size", 32, "--results-file", "r.json")
    assert status == 0, err
    model = timm.create_model("raftmlp_s").eval()
    model.load_state_dict(weights)
    files = sorted(made)
    with torch.no_grad():
        probabilities = model(as_batch([made[file][1] for file in files], (32, 32)))[:, [0, 1]].softmax(1)
    labels = torch.tensor([sorted(SYNSETS[:2]).index(made[file][0]) for file in files])
    assert_figures(read_rows()[0], figures_of(probabilities, labels))


def test_real_labels(run, monkeypatch):
    class Constant(torch.nn.Module):
        """Gives class 65 of every image; the label of 50 images of ImageNet's, and of some more by ReaL."""

        num_classes, pretrained_cfg, in_chans = 1000, dict(input_size=(3, 1, 1), crop_pct=1.0), 3

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.eye(1000)[65].expand(len(x), 1000)

    monkeypatch.setattr(DataSettings, "create", lambda *_: NamedImages())
    monkeypatch.setattr(evaluation, "create_model", lambda *_, **__: Constant())
    monkeypatch.setattr(
        evaluation,
        "evaluation_loader",
        lambda *_, **__: ((torch.zeros(1000, 3, 1, 1), torch.arange(1000)) for _ in range(50)),
    )
    status, out, err = run("--model", "raftmlp_s", "--pretrained", "--real-labels", "--results-file", "r.json")
    assert status == 0, err
    row = read_rows()[0]
    labelled = [labels for labels in REAL_LABELS if labels]
    expected = 100 * sum(65 in labels for labels in labelled) / len(labelled)
    assert (row["top1"], row["real_top1"]) == (pytest.approx(0.1), pytest.approx(expected))
    assert f"ReaL top-1 {expected:.2f} %" in out

    Constant.num_classes = 2000
    monkeypatch.delattr(NamedImages, "classes")
    status, out, err = run("--model", "raftmlp_s", "--pretrained", "--real-labels")
    assert (status, out) == (2, "")
    assert "--real-labels takes models of ImageNet-1k, raftmlp_s has 2000 classes" in err


# Bad input: one line, exit status 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sizes", "224", "big"], "'big' must be a number of pixels or HEIGHTxWIDTH"),
        (["--sizes", "0"], "'0' must be a number of pixels or HEIGHTxWIDTH"),
        (["--sizes", "32x"], "'32x' must be a number of pixels or HEIGHTxWIDTH"),
        (["--sizes", "32", "--img-size", "32"], "--sizes and --img-size exclude each other"),
        (["--size-plot", "p.png"], "--size-plot needs --sizes with two sizes or more"),
        (["--size-plot", "p.png", "--sizes", "32"], "--size-plot needs --sizes with two sizes or more"),
        (["--size-plot", "p.txt", "--sizes", "32", "64"], "p.txt must be named .png or .jpg or .pdf or .svg"),
        (["--confusion", "c.csv"], "c.csv must be named .png"),
        (["--predictions", "p.png"], "p.png must be named .csv"),
        (["--predictions", "file/p.csv"], "cannot write file/p.csv"),
        (["--sizes", "24", "32", "--picture", "p.png"], "--picture goes with one model and one size, not with 2 rows"),
        (
            ["--compare", "resnet10t", "--confusion", "c.png"],
            "--confusion goes with one model and one size, not with 2",
        ),
        (["--sizes", "24", "32", "--predictions", "p.csv"], "--predictions goes with one model and one size"),
        (["--compare", "resnet_10"], "unknown model 'resnet_10'; did you mean"),
        (["--compare", "raftmlp_s"], "no pretrained weights raftmlp_s.TAG.safetensors"),
        (["--real-labels"], "ILSVRC2012_val_00000001.JPEG and so on; the data has 360 images, image 0 among them"),
        (["--sizes", "100000000", "90000000"], "raftmlp_digits takes no images of 100000000 pixels"),
    ],
)
def test_bad_input(run, monkeypatch, options, message):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("the work began"))
    Path("file").write_text("")
    status, out, err = run(*DIGITS, *options)
    assert (status, out) == (2, "")
    assert message in err and err.startswith("raftmlp validate: error: ") and len(err.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_sizes_of_which_a_model_can_take_none(run, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("the work began"))
    status, out, err = run("--model", "test_vit", "--dataset", "digits", "--sizes", 8, 24)
    assert (status, out) == (2, "")
    assert err == (
        "raftmlp validate: error: test_vit takes no images of 8 pixels: "
        "Input height (8) should be divisible by patch size (16).\n"
    )


def test_a_size_that_a_model_cannot_take_is_a_row(run, monkeypatch):
    """Before the work, as a size too small, and in it, as one too large for the memory."""
    evaluate = evaluation.evaluate

    def with_little_memory(model, loader, *args):
        if next(iter(loader))[0].shape[-1] > 48:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(model, loader, *args)

    monkeypatch.setattr(evaluation, "evaluate", with_little_memory)
    status, out, err = run(
        "--model", "test_vit", "--dataset", "digits", "--sizes", "24x32", 32, 64, "16x48",
        "--results-file", "r.json", "--size-plot", "plot.png",
    )  # fmt: skip
    assert status == 0, err
    rows = read_rows()
    failures = [
        "test_vit takes no images of 24x32 pixels: Input height (24) should be divisible by patch size (16).", None,
        "test_vit: --batch-size 128 is too much for the memory", None,
    ]  # fmt: skip
    assert [row.get("failure") for row in rows] == failures
    assert [(row["img_size"], "top1" in row) for row in rows] == [
        ([24, 32], False), ([32, 32], True), ([64, 64], False), ([16, 48], True)
    ]  # fmt: skip
    for line, failure in zip(out.splitlines()[1:], failures):
        assert failure is None or line.endswith(failure)
    assert Image.open("plot.png").width > 500


@pytest.mark.parametrize(
    "sizes, falls", [((32, 16), True), (("16x24", 32, "24x32"), True), ((32,), False), ((16, 24), False)]
)
def test_a_fall_beside_the_trained_size_is_explained(run, shipped, sizes, falls):
    status, out, err = run(*DIGITS, "--sizes", *sizes, "--results-file", "r.json")
    assert status == 0, err
    lines = [line for line in out.splitlines() if "top-1 falls" in line]
    assert len(lines) == falls
    if falls:
        worst, trained = (f(row["top1"] for row in read_rows()) for f in (min, max))
        assert f"from {trained:.2f} % at 32, its trained size, to {worst:.2f} % at 16" in lines[0]
        assert "set_input_size" in lines[0] and "--train-img-sizes" in lines[0]


def test_too_large_a_batch(run, monkeypatch):
    def evaluate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    status, _, err = run(*DIGITS, "--batch-size", 77)
    assert status == 2
    assert err.splitlines() == ["raftmlp validate: error: raftmlp_digits: --batch-size 77 is too much for the memory"]


# Classes by name


def test_classes_are_found_by_their_names(run, tmp_path):
    """A checkpoint with the names of its classes is evaluated among all of them, whatever classes the data has."""
    model = timm.create_model("raftmlp_digits", pretrained=True)
    digits = Digits("validation")
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for i in range(60):
        image, target = digits[i]
        if target in (3, 7, 8):
            (tmp_path / "val" / words[target]).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "val" / words[target] / f"{i}.png")
    cfg = dict(num_classes=10, input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, label_names=words)
    torch.save(dict(arch="raftmlp_digits", pretrained_cfg=cfg, state_dict=model.state_dict()), "named.pth")
    options = ["--checkpoint", "named.pth", "--data-dir", tmp_path, "--workers", 0]
    outputs = ["--predictions", "p.csv", "--confusion", "c.png", "--picture", "g.png", "--results-file", "r.json"]
    status, out, err = run(*options, "--img-size", 16, *outputs)
    assert status == 0, err
    assert "the data has images of 3 of the 10 classes that raftmlp_digits knows: it chooses among all of them" in out
    rows = read_csv("p.csv")
    with torch.no_grad():
        images = as_batch([Image.open(row["file"]) for row in rows], (16, 16))
        expected = model.eval()(images).argmax(1).tolist()
    assert [int(row["predicted"]) for row in rows] == expected and set(expected) - {3, 7, 8}
    assert all(words[int(row["class"])] == row["class_name"] == Path(row["file"]).parent.name for row in rows)
    assert all(words[int(row["predicted"])] == row["predicted_name"] for row in rows)
    assert read_rows()[0]["top1"] == pytest.approx(100 * sum(int(row["right"]) for row in rows) / len(rows))
    (tmp_path / "val/three").rename(tmp_path / "val/drei")
    status, _, err = run(*options)
    assert status == 2 and "the data has classes that the model was not trained on: ['drei']" in err


def test_pretrained_weights_are_not_evaluated_with_a_random_classifier(run):
    options = ["--model", "raftmlp_digits", "--pretrained", "--dataset", "digits", "--num-classes", 12]
    status, _, err = run(*options)
    assert status == 2 and "are for 10 classes, not 12" in err


# A training run's checkpoint


def test_a_training_checkpoint(run):
    """The weights with moving averages are taken, model and preparation are the checkpoint's."""
    kwargs = dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))
    torch.manual_seed(0)
    model, averaged = (timm.create_model("raftmlp_digits", **kwargs).eval() for _ in range(2))
    cfg = {**model.pretrained_cfg, "num_classes": 10, "input_size": (3, 32, 32)}
    content = dict(arch="raftmlp_digits", model_kwargs=kwargs, pretrained_cfg=cfg, epoch=1)
    torch.save(dict(content, state_dict=model.state_dict(), state_dict_ema=averaged.state_dict()), "best.pth.tar")
    options = ["--checkpoint", "best.pth.tar", "--dataset", "digits"]
    status, out, err = run(*options, "--results-file", "a/result.json", "--picture", "b/picture.png")
    assert status == 0, err
    (row,) = read_rows("a/result.json")
    images, labels = digits_at((32, 32))
    with torch.no_grad():
        expected = figures_of(averaged(images).softmax(1), labels)
        assert expected != figures_of(model(images).softmax(1), labels)
    assert_figures(row, expected)
    assert f"top-1 {expected['top1']:.2f} %" in out
    assert Image.open("b/picture.png").width > 500


def test_a_folder_at_another_size_with_amp(run, tmp_path):
    folder = make_image_folder(tmp_path / "images")
    options = [*TINY_MODEL, "img_size=(40,48)", "--data-dir", folder, "--img-size", 40, 48, "--amp"]
    status, out, err = run(*options, "--results-file", "r.json")
    assert status == 0, err
    assert "over 12 images" in out and read_rows()[0]["img_size"] == [40, 48]
    assert json.loads(Path("r.json").read_text())["run"]["precision"] == "bfloat16"
    shipped = ROOT / "weights/raftmlp_digits.sklearn.safetensors"
    status, _, err = run("--model", "raftmlp_digits", "--checkpoint", shipped, "--data-dir", folder)
    assert status == 2 and "classes that the model was not trained on: ['bright', 'dark']" in err


def test_other_models_of_timm(run):
    status, out, err = run("--model", "resnet10t", "--dataset", "digits", "--img-size", 32, "--batch-size", 360)
    assert status == 0, err
    assert "resnet10t: top-1" in out


# Options and bad input


def test_help_shows_every_option(run):
    status, out, _ = run("--help")
    assert status == 0
    for action in validate.build_parser()._actions:
        assert action.help
        assert not action.option_strings or action.option_strings[-1] in out


def test_files_to_write_are_checked_before_the_work(run):
    Path("file").write_text("")
    for options, message in [
        (["--picture", "picture"], "picture must be named .png"),
        (["--results-file", "file/result.json"], "cannot write file/result.json"),
        (["--results-file", "result.txt"], "result.txt must be named .json"),
    ]:
        status, out, err = run(*DIGITS, *options)
        assert status == 2
        assert message in err and "Traceback" not in err
        assert not out


def test_the_script_in_a_process_of_its_own():
    command = [sys.executable, ROOT / "tools/validate.py", "--model", "raftmlp_x", "--dataset", "digits"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "validate.py: error: argument --model: unknown model 'raftmlp_x'; did you mean raftmlp_s or "
    )


def test_folders_of_runs_stand_for_their_best_weights(run):
    for name in ("one", "other"):
        make_run_folder(Path(name))
    Path("other/model_best.pth.tar").unlink()
    options = ["--dataset", "digits", "--checkpoint", "one", "--compare", "other", "--results-file", "r.json"]
    assert run(*options)[0] == 0
    one, other = read_rows()
    assert (one["weights"], other["weights"]) == ("one/model_best.pth.tar", "other/last.pth.tar")
    assert one["top1"] == 100 and other["top1"] < 20
