"""raftmlp validate: its figures against ones computed here in the plainest way, its tables, files and errors."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from helpers import DIGITS, TINY_MODEL, make_run_folder
from raftmlp.cli import export, validate
from raftmlp.data import Digits, create_dataset
from raftmlp.evaluate import evaluation
from raftmlp.evaluate import labels as labels_module

DIGITS = [*DIGITS, "--dataset", "digits"]
SYNSETS = ["n01443537", "n01440764", "n02012849", "n03126707"]  # goldfish, tench, and the two cranes


@pytest.fixture
def run(run_command):
    """Run the command, which must end well; returns its two outputs."""

    def run(*args):
        status, out, err = run_command(validate, *args, "--workers", 0, "--device", "cpu")
        assert status == 0, err
        return out, err

    return run


@pytest.fixture
def refused(run_command):
    """Run the command, which must end in one line; returns it."""

    def refused(*args):
        status, out, err = run_command(validate, *args, "--workers", 0, "--device", "cpu")
        *notes, error = err.splitlines()
        assert (status, out) == (2, "") and error.startswith("raftmlp validate: error: ")
        assert all(note.startswith("note: ") for note in notes)
        return error

    return refused


@pytest.fixture(scope="module")
def shipped():
    """The shipped digits model."""
    return timm.create_model("raftmlp_digits", pretrained=True).eval()


def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def read_rows():
    return json.loads(Path("r.json").read_text())["rows"]


def image_folder(root, classes, images=3):
    """Make a folder of images of one color each, ``images`` a class; returns them as {file: (class, image)}."""
    made = {}
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images):
            number, file = len(made), str(root / name / f"{i}.png")
            image = Image.new("RGB", (20, 20), (number * 20 % 256, number * 45 % 256, number * 70 % 256))
            made[file] = (name, image)
            image.save(file)
    return made


def as_batch(images, size):
    """The batch of some images as raftmlp_digits takes them: shorter side to ``size``, bilinear, center, normalized."""
    arrays = []
    for image in images:
        height, width = size
        side = max(size)
        image = image.resize((side, side), Image.Resampling.BILINEAR)
        top, left = (side - height) // 2, (side - width) // 2
        arrays.append(np.asarray(image)[top : top + height, left : left + width])
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    return (pixels - 0.5) / 0.5


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
    sizes = {"16": (16, 16), "24x32": (24, 32)}
    written = ["--results-file", "r.json", "--size-plot", "plot.png"]
    out, _ = run(*DIGITS, "--sizes", *sizes, "--batch-size", 100, *written)
    results = json.loads(Path("r.json").read_text())
    assert [tuple(row["img_size"]) for row in results["rows"]] == list(sizes.values())
    for row, size in zip(results["rows"], sizes.values()):
        images, labels = digits_at(size)
        assert_figures(row, figures_of(shipped(images).softmax(1), labels))
        assert (row["model"], row["images"], row["unread"], row["crop_pct"]) == ("raftmlp_digits", 360, 0, 1)
        assert row["parameters"] == 756454 and row["images_per_second"] > 0
    assert results["versions"]["torch"] == torch.__version__
    assert results["data"] == {"dataset": "digits", "data_dir": None, "split": "validation", "classes": 10}
    header, *lines = out.splitlines()[:3]
    assert len({len(line) for line in [header, *lines]}) == 1
    for line, size, row in zip(lines, sizes, results["rows"]):
        top = f"{row['top1']:.2f}", f"{row['top5']:.2f}"
        assert line.split()[:7] == ["raftmlp_digits", "0.76", "M", size, "1", *top]
    assert Image.open("plot.png").width > 500


class AllReal:
    """Stands in for RealLabels: counts the images."""

    def __init__(self, dataset):
        self.count = 0

    def add(self, images, target, logits):
        self.count += len(logits)

    def figures(self):
        return dict(real_top1=self.count, real_top5=100.0)


@torch.no_grad()
def test_mirror_crop_memory_format_and_real_labels(run, shipped, monkeypatch):
    compiled = []
    monkeypatch.setattr(labels_module, "RealLabels", AllReal)
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    options = ["--mirror", "--img-size", 24, "--crop-pct", 0.75, "--channels-last", "--compile"]
    out, _ = run(*DIGITS, *options, "--real-labels", "--results-file", "r.json")
    assert read_rows()[0]["real_top1"] == 360 and "ReaL top-1 360.00 %" in out
    images, labels = digits_at((32, 32))
    images = images[:, :, 4:28, 4:28]
    expected = figures_of((shipped(images).softmax(1) + shipped(images.flip(3)).softmax(1)) / 2, labels)
    assert_figures(read_rows()[0], expected)
    assert expected["top1"] < 100  # or the mirror was no other image
    kernels = [p for p in compiled[0].parameters() if p.dim() == 4 and not p.is_contiguous()]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


@torch.no_grad()
def test_predictions_confusion_and_worst_classes(run, shipped):
    written = ["--predictions", "p.csv", "--confusion", "c.png", "--picture", "g.png", "--results-file", "r.json"]
    out, _ = run(*DIGITS, "--img-size", 20, "--batch-size", 100, *written)
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
    assert [row["accuracy"] for row in worst] == sorted(row["accuracy"] for row in worst) and len(worst) == 10
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
def test_compare_checkpoints_and_folders(run, run_command, shipped):
    weights = {key: value * 1.5 for key, value in shipped.state_dict().items()}
    torch.save({"arch": "raftmlp_digits", "state_dict": weights}, "other.pth")
    assert run_command(export, *DIGITS[:3], "--format", "hf", "--out", "folder")[0] == 0
    for name in ("run", "stopped"):
        make_run_folder(Path(name))
    Path("stopped/model_best.pth.tar").unlink()
    compare = ["other.pth", "folder", "local-dir:folder", "run", "stopped"]
    out, _ = run(*DIGITS, "--compare", *compare, "--img-size", 24, "--results-file", "r.json")
    images, labels = digits_at((24, 24))
    first, other, *same, stopped = read_rows()
    assert first["weights"] == "pretrained" and len(out.splitlines()) == 8
    assert_figures(first, figures_of(shipped(images).softmax(1), labels))
    for row in same:
        assert_figures(row, {key: first[key] for key in ("top1", "loss")})
    names = ["raftmlp_digits (folder)", "raftmlp_digits", "raftmlp_digits (model_best.pth.tar)"]
    assert [row["model"] for row in same] == names
    assert [row["weights"] for row in same] == ["folder", "local-dir:folder", "run/model_best.pth.tar"]
    assert stopped["weights"] == "stopped/last.pth.tar" and stopped["top1"] < 20
    model = timm.create_model("raftmlp_digits", num_classes=10).eval()
    model.load_state_dict(weights)
    assert_figures(other, figures_of(model(images).softmax(1), labels))


def test_every_model_has_its_own_settings_and_size(run):
    image_folder(Path("images"), "ab")
    options = [*TINY_MODEL, "--data-dir", "images", "--compare"]
    _, err = run(*options, "test_vit", "resnet10t", "--results-file", "r.json")
    rows = read_rows()
    assert [(row["model"], row["img_size"]) for row in rows] == [
        ("raftmlp_digits", [32, 32]), ("test_vit", [160, 160]), ("resnet10t", [176, 176]),
    ]  # fmt: skip
    for row in rows:
        config = timm.get_pretrained_cfg(row["model"])
        assert (row["crop_pct"], row["interpolation"]) == (config.crop_pct, config.interpolation)
    assert "the weights of raftmlp_digits, test_vit, resnet10t are random" in err
    # a model whose size is fixed is built for every size; --model-kwargs are not for it
    out, _ = run(*options, "test_vit", "--sizes", 32, "48x64", "--amp", "--results-file", "r.json")
    assert json.loads(Path("r.json").read_text())["run"]["precision"] == "bfloat16"
    assert [line.split()[3] for line in out.splitlines()[1:5]] == ["32", "48x64"] * 2


def test_a_size_that_a_model_cannot_take_is_a_row(run, refused, monkeypatch):
    """Before the work, as a size too small, and in it, as one too large for the memory."""
    evaluate = evaluation.evaluate

    def with_little_memory(model, loader, *args):
        if next(iter(loader))[0].shape[-1] > 48:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(model, loader, *args)

    monkeypatch.setattr(evaluation, "evaluate", with_little_memory)
    options = ["--model", "test_vit", "--dataset", "digits", "--sizes"]
    out, _ = run(*options, "24x32", 32, 64, "16x48", "--results-file", "r.json", "--size-plot", "plot.png")
    failures = [row.get("failure", "") for row in read_rows()]
    assert "no images of 24x32 pixels" in failures[0] and "--batch-size 128" in failures[2]
    assert ["top1" in row for row in read_rows()] == [False, True, False, True] == [not text for text in failures]
    assert all(line.endswith(failure) for line, failure in zip(out.splitlines()[1:], failures))
    assert Image.open("plot.png").width > 500
    assert "test_vit takes no images of 8 pixels" in refused(*options, 8, 24)


# Images that cannot be read


def test_images_that_cannot_be_read_do_not_count(run, refused):
    image_folder(Path("images"), "ab", images=4)
    torch.manual_seed(0)
    torch.save(timm.create_model("raftmlp_digits", num_classes=2).state_dict(), "model.pth")
    options = ["--model", "raftmlp_digits", "--checkpoint", "model.pth", "--batch-size", 3, "--data-dir", "images"]
    Path("images/b/1.png").unlink()
    run(*options, "--results-file", "r.json")
    whole = read_rows()[0]
    Path("images/b/1.png").write_bytes(b"no image")
    _, err = run(*options, "--results-file", "r.json", "--predictions", "p.csv", "--confusion", "c.png")
    results = json.loads(Path("r.json").read_text())
    row = results["rows"][0]
    assert (whole["images"], whole["unread"], row["images"], row["unread"]) == (7, 0, 7, 1)
    assert_figures(row, {key: whole[key] for key in ("top1", "top5", "loss")})
    assert err.splitlines()[-2:] == ["images that could not be read do not count:", "  images/b/1.png"]
    assert "images/b/1.png" not in Path("p.csv").read_text() and len(read_csv("p.csv")) == 7
    assert sum(worst["images"] for worst in results["worst_classes"]) == 7

    for path in Path("images").rglob("*.png"):
        path.write_bytes(b"no image")
    assert "none of the 8 images can be read" in refused(*options)


# ImageNet


@torch.no_grad()
def test_a_part_of_imagenet(run, refused):
    made = image_folder(Path("images"), SYNSETS)
    torch.manual_seed(0)
    model = timm.create_model("raftmlp_digits", num_classes=1000).eval()
    torch.nn.init.normal_(model.head.weight, std=3)
    torch.save(model.state_dict(), "model.pth")
    options = ["--model", "raftmlp_digits", "--data-dir", "images"]
    out, _ = run(*options, "--checkpoint", "model.pth", "--results-file", "r.json", "--predictions", "p.csv")
    assert "chooses among these" in out
    outputs = [0, 1, 134, 517]  # tench, goldfish, crane (the bird), crane (the machine)
    files = sorted(made)
    logits = model(as_batch([made[file][1] for file in files], (32, 32)))[:, outputs]
    labels = torch.tensor([sorted(SYNSETS).index(made[file][0]) for file in files])
    assert_figures(read_rows()[0], figures_of(logits.softmax(1), labels))
    rows = read_csv("p.csv")
    assert [Path(row["file"]).resolve() for row in rows] == [Path(file).resolve() for file in files]
    assert [int(row["predicted"]) for row in rows] == logits.argmax(1).tolist()
    names = ["tench", "goldfish", "crane (n02012849)", "crane (n03126707)"]
    assert [row["class_name"] for row in rows] == [names[label] for label in labels]
    # nothing says the number of classes: not the folder's 4, though a model of another data set's 4 takes these
    assert "chooses among these" in run(*options)[0]
    assert "chooses among these" not in run(*options, "--num-classes", 4)[0]
    Path(f"images/{SYNSETS[0]}").rename("images/n00000001")
    assert "'n00000001'" in refused(*options, "--num-classes", 1000, "--checkpoint", "model.pth")


# Classes by name, and a training run's checkpoint


@torch.no_grad()
def test_classes_are_found_by_their_names(run, refused, tmp_path, shipped):
    """A checkpoint with the names of its classes is evaluated among all of them; its averaged weights are taken."""
    digits = Digits("validation")
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for i in range(60):
        image, target = digits[i]
        if target in (3, 7, 8):
            (tmp_path / "val" / words[target]).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "val" / words[target] / f"{i}.png")
    cfg = dict(num_classes=10, input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, label_names=words)
    weights, content = shipped.state_dict(), dict(arch="raftmlp_digits", pretrained_cfg=cfg, epoch=1)
    raw = {key: torch.zeros_like(value) for key, value in weights.items()}
    torch.save(dict(content, state_dict=raw, state_dict_ema=weights), "best.pth.tar")
    options = ["--checkpoint", "best.pth.tar", "--data-dir", tmp_path]
    out, _ = run(*options, "--img-size", 16, "--predictions", "a/p.csv", "--picture", "g.png")
    assert "3 of the 10 classes" in out and Image.open("g.png").width > 500
    rows = read_csv("a/p.csv")
    expected = shipped(as_batch([Image.open(row["file"]) for row in rows], (16, 16))).argmax(1).tolist()
    assert [int(row["predicted"]) for row in rows] == expected and set(expected) - {3, 7, 8}
    assert all(words[int(row["class"])] == row["class_name"] == Path(row["file"]).parent.name for row in rows)
    assert all(words[int(row["predicted"])] == row["predicted_name"] for row in rows)
    (tmp_path / "val/three").rename(tmp_path / "val/drei")
    assert "'drei'" in refused(*options)


@pytest.mark.parametrize(
    "options, named",
    [
        (["--sizes", "32", "--img-size", "32"], "--img-size"),
        (["--confusion", "c.csv"], "c.csv"),
        (["--predictions", "file/p.csv"], "file/p.csv"),
        (["--sizes", "24", "32", "--picture", "p.png"], "--picture"),
        (["--compare", "resnet10t", "--confusion", "c.png"], "--confusion"),
        (["--compare", "resnet_10"], "'resnet_10'"),
        (["--num-classes", "12"], "12"),
        (["--real-labels"], "360 images"),
        (["--sizes", "100000000", "90000000"], "no images of 100000000 pixels"),
    ],
)
def test_bad_input(refused, monkeypatch, options, named):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("the work began"))
    Path("file").write_text("")
    assert named in refused(*DIGITS, *options)
    assert [path.name for path in Path().iterdir()] == ["file"]
