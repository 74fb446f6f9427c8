"""raftmlp predict-onnx: timm's preparation of images to the last digits, the answers of predict, all without torch."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import ExifTags, Image
from timm.data import create_transform

import raftmlp_onnx as predict_onnx
from helpers import DIGITS, time_little
from raftmlp.cli import export, predict
from raftmlp.data import Digits
from raftmlp.evaluate.prediction import ImageFiles


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with 20 digits, a photograph-like image, and the ONNX files; made once."""
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "images").mkdir()
    dataset = Digits("validation")
    for i in range(20):
        dataset[i][0].save(folder / "images" / f"{i}.png")
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 4), dtype=np.uint8)  # RGBA
    Image.fromarray(pixels).save(folder / "images" / "odd.png")
    common = [*DIGITS, "--overwrite", "--out"]
    with pytest.MonkeyPatch.context() as patched:
        time_little(patched)
        for name, options in (("digits", []), ("free", ["--dynamic-size", "--img-size", "64"])):
            patched.setattr(sys, "argv", ["raftmlp export", *common, str(folder / f"{name}.onnx"), *options])
            export.main()
    fixed = onnx.load(folder / "digits.onnx")  # what --batch 8 writes, without the time of another export
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(fixed, folder / "batch.onnx")
    strange = onnx.load(folder / "digits.onnx")
    del strange.metadata_props[:]
    onnx.save(strange, folder / "strange.onnx")
    strange.metadata_props.add(key="maps", value="[]")
    onnx.save(strange, folder / "maps.onnx")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command as the launcher does; returns its exit status and its two outputs."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["raftmlp predict-onnx", *map(str, args)])
        status = predict_onnx.run()
        return status, *capsys.readouterr()

    return run


# Preparation


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("input_size", [(3, 32, 32), (1, 224, 224), (3, 40, 71), (3, 97, 64)])
def test_images_are_prepared_as_timm_does(crop_mode, interpolation, input_size):
    channels = input_size[0]
    rng = np.random.default_rng(1)
    for crop_pct in (1.0, 0.875, 0.9):
        settings = dict(
            input_size=input_size,
            interpolation=interpolation,
            mean=(0.485, 0.456, 0.406)[:channels],
            std=(0.229, 0.224, 0.225)[:channels],
            crop_pct=crop_pct,
            crop_mode=crop_mode,
        )
        expected, prepare = create_transform(**settings), predict_onnx.Preparation(**settings)
        for height, width in ((8, 8), (32, 32), (61, 83), (200, 31), (40, 71), (1, 9)):
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            truth = expected(image.convert("L" if channels == 1 else "RGB")).numpy()
            pixels = prepare(image)
            assert pixels.dtype == np.float32 and pixels.shape == truth.shape == input_size
            assert np.abs(pixels - truth).max() <= 1e-6


@pytest.mark.parametrize("wrong", [dict(crop_mode="left"), dict(input_size=(4, 32, 32))])
def test_unknown_preparation(wrong):
    settings = dict(
        input_size=(3, 32, 32), mean=(0,), std=(1,), interpolation="bilinear", crop_pct=1, crop_mode="center"
    )
    with pytest.raises(ValueError, match=r"crop_mode 'left'|takes 4"):
        predict_onnx.Preparation(**settings | wrong)


GREY = np.array([[0, 127, 255]], np.uint8)


def grey(kind):
    """The grey pixels with 16 bits."""
    return Image.fromarray((GREY.astype(np.int64) * 257).astype(kind))


def with_alpha(mode, *alpha):
    image = Image.fromarray(GREY).convert(mode[:-1]).convert(mode)
    image.putalpha(Image.fromarray(np.array([alpha], np.uint8)))
    return image


def with_key(image, key, tmp_path):
    """An image as read from a PNG file whose pixels of one value are transparent."""
    image.save(tmp_path / "key.png", transparency=key)
    return Image.open(tmp_path / "key.png")


def test_16_bits_are_scaled_and_transparency_lies_over_the_background(tmp_path):
    cases = [
        (grey("<u2"), [0, 127, 255]),
        (grey(">u2"), [0, 127, 255]),
        (grey("i4"), [0, 127, 255]),
        (Image.fromarray(GREY.astype("i4")), [0, 127, 255]),
        (Image.fromarray(np.array([[128, 129, 65535]], "<u2")), [0, 1, 255]),
        (with_alpha("LA", 255, 255, 255), [0, 127, 255]),
        (with_alpha("RGBA", 0, 255, 255), [255, 127, 255]),
        (with_alpha("RGBA", 51, 255, 255), [204, 127, 255]),
        (with_alpha("PA", 0, 255, 255), [255, 127, 255]),
        (with_key(Image.fromarray(GREY).convert("P"), 0, tmp_path), [255, 127, 255]),
        (with_key(grey("<u2"), 127 * 257, tmp_path), [0, 255, 255]),
    ]
    for image, expected in cases:
        for mode in ("L", "RGB"):
            pixels, has_transparency = predict_onnx.as_8_bits(image, mode)
            assert pixels.mode == mode and has_transparency == (expected != [0, 127, 255] and expected != [0, 1, 255])
            assert np.asarray(pixels).reshape(3, -1)[:, 0].tolist() == expected, image.mode
    pixels, _ = predict_onnx.as_8_bits(with_alpha("RGBA", 0, 0, 255), "RGB", "#102030")
    assert np.asarray(pixels)[0].tolist() == [[16, 32, 48], [16, 32, 48], [255, 255, 255]]
    for wrong in (np.int32([[-1, 9]]), np.int32([[70000, 9]]), np.float32([[0.5, 0.1]])):
        with pytest.raises(ValueError, match="neither whole numbers of 8 nor of 16 bits"):
            predict_onnx.as_8_bits(Image.fromarray(wrong), "RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_predict_does(orientation, tmp_path):
    settings = dict(
        input_size=(3, 32, 48), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="nearest", crop_pct=1, crop_mode="squash"
    )
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png", exif=exif)
    read = []
    for applied in (True, False):
        expected = ImageFiles([tmp_path / "1.png"], settings | dict(exif=applied))[0][0].numpy()
        with Image.open(tmp_path / "1.png") as image:
            read.append(predict_onnx.Preparation(**settings, exif=applied)(image))
        assert np.abs(read[-1] - expected).max() < 1e-6
    assert np.array_equal(*read) == (orientation == 1)
    with Image.open(tmp_path / "1.png") as image:  # version 0.2 did not say it
        assert np.array_equal(predict_onnx.Preparation(**settings)(image), read[1])


# Predictions


def assert_same_entries(actual, expected):
    assert [entry["file"] for entry in actual] == [entry["file"] for entry in expected]
    for a, b in zip(actual, expected):
        assert [p["class"] for p in a["predictions"]] == [p["class"] for p in b["predictions"]]
        assert [p["name"] for p in a["predictions"]] == [p["name"] for p in b["predictions"]]
        probabilities = [[p["probability"] for p in entry["predictions"]] for entry in (a, b)]
        np.testing.assert_allclose(*probabilities, atol=1e-5)


@pytest.mark.parametrize("name, options", [("digits", ["-b", "6"]), ("batch", []), ("free", ["--img-size", "64"])])
def test_answers_are_those_of_predict(run, run_command, files, name, options):
    status, printed, err = run(
        files / f"{name}.onnx", files / "images", "--topk", 3, "--results-file", "a.json", *options
    )
    assert status == 0, err
    size = ["--img-size", "64"] if name == "free" else []
    status, theirs, err = run_command(
        predict, files / "images", *DIGITS, "--topk", 3, "--results-file", "b.json", *size
    )
    assert status == 0, err
    ours, expected = (json.loads(Path(f"{name}.json").read_text()) for name in "ab")
    assert_same_entries(ours["images"], expected["images"])
    assert {**ours["settings"], "background": "white"} == expected["settings"]
    assert ours["model"] == expected["model"] == "raftmlp_digits"
    assert printed.replace("a.json", "b.json") == theirs


def test_without_torch(files, tmp_path):
    """The command, and the file alone, with onnxruntime, numpy and Pillow: site-packages are out of sight."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for package in ("numpy", "pillow", "onnxruntime"):
        for file in importlib.metadata.files(package):
            top = file.parts[0]
            if not top.startswith("..") and not (alone / top).exists():
                (alone / top).symlink_to(
                    Path(file.locate()).parents[len(file.parts) - 2] if len(file.parts) > 1 else file.locate()
                )
    shutil.copy(predict_onnx.__file__, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(alone)}
    python = [sys.executable, "-S"]
    for package in ("torch", "timm", "yaml", "tqdm", "raftmlp"):
        seen = subprocess.run([*python, "-c", f"import {package}"], env=environment, capture_output=True, cwd=tmp_path)
        assert b"ModuleNotFoundError" in seen.stderr
    options = [files / "digits.onnx", files / "images" / "3.png", "--topk", "1"]
    for command in (["raftmlp_onnx.py"],):
        done = subprocess.run(
            [*python, *command, *options], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == str(Digits("validation")[3][1])


def test_deep_and_transparent_images_get_the_answer_of_the_plain_ones(run, files):
    """On today's clients a 16-bit digit is black and white, and a transparent one a white square."""
    plain = Image.open(files / "images" / "1.png").convert("L")
    plain.save("plain.png")
    Image.fromarray(np.asarray(plain).astype("<u2") * 257).save("deep.png")
    white = Image.new("L", plain.size, 255)
    negative = Image.merge("LA", (white, plain))  # the digit is white, and the background shows where it is not
    negative.save("negative.png")
    status, _, err = run(
        files / "digits.onnx", "*.png", "--background", "black", "--topk", 10, "--results-file", "a.json"
    )
    assert status == 0 and err == "note: some images have transparency: black shows through (--background)\n"
    deep, negative, plain = (
        [p["probability"] for p in sorted(image["predictions"], key=lambda p: p["class"])]
        for image in json.loads(Path("a.json").read_text())["images"]
    )
    np.testing.assert_allclose(deep, plain, atol=1e-6)
    np.testing.assert_allclose(negative, plain, atol=1e-6)


def test_names_that_the_terminal_cannot_show(files, tmp_path):
    model = onnx.load(files / "digits.onnx")
    for entry in model.metadata_props:
        if entry.key == "class_names":
            entry.value = json.dumps(["\x1b[2J\nzéro", "\ud800", *"αβγδεζηθ"])
    onnx.save(model, tmp_path / "greek.onnx")
    image = tmp_path / "Ψηφίο.png"
    shutil.copy(files / "images" / "1.png", image)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, predict_onnx.__file__, "greek.onnx", image, "nowhere/Ω.png"]
    for names, status in ((command[:-1], 0), (command, 2)):
        done = subprocess.run([*names, "--topk", "10"], env=environment, cwd=tmp_path, capture_output=True)
        assert done.returncode == status and b"Traceback" not in done.stderr
        assert done.stdout.isascii() and done.stderr.isascii()
        assert len(done.stdout.splitlines()) == (0 if status else 10) and b"\x1b" not in done.stdout
    assert b"no images at" in done.stderr


def test_images_that_cannot_be_read(run, files):
    Path("broken.png").write_bytes(b"no image")
    image = files / "images" / "1.png"
    status, printed, err = run(files / "digits.onnx", "broken.png", image, "--results-file", "out.json")
    assert status == 2 and "cannot read broken.png: cannot identify image file" in err
    assert "error: 1 of 2 images could not be read" in err
    bad, good = json.loads(Path("out.json").read_text())["images"]
    assert "error" in bad and good["predictions"][0]["probability"] > 0.5
    assert str(image) in printed


@pytest.mark.parametrize(
    "options, message",
    [
        (["nowhere.onnx", "IMAGE"], "no ONNX file at nowhere.onnx"),
        (["broken.onnx", "IMAGE"], "broken.onnx is damaged or is no ONNX file"),
        (["strange", "IMAGE"], "do not describe how images are prepared"),
        (["maps", "IMAGE"], "maps.onnx gives feature maps"),
        (["digits"], "name an image, a folder of images or a pattern"),
        (["digits", "nowhere.png"], "no images at 'nowhere.png'"),
        (["digits", "IMAGE", "--img-size", "40"], "is made for images of 32x32 pixels, not 40x40"),
        (["free", "IMAGE", "--img-size", "99999"], "input_size must be numbers from 1 to 16384"),
        (["digits", "IMAGE", "--background", "whiet"], "must be the name of a colour or #rrggbb, not 'whiet'"),
        (["digits", "IMAGE", "--background", "#ffffff80"], "must be the name of a colour or #rrggbb"),
        (["digits", "IMAGE", "--img-size", "1", "2", "3"], "--img-size takes one number of pixels"),
        (["digits", "IMAGE", "--results-file", "digits.onnx"], "--results-file digits.onnx must be named .json"),
        (["digits", "IMAGE", "--topk", "0"], "must be a whole number of 1 or more, not '0'"),
        (["digits", "IMAGE", "--results-file", "."], "must be named .json"),
        (["digits", "IMAGE", "--results-file", "no/folder/out.json"], "cannot write no/folder/out.json"),
    ],
)
def test_bad_input(run, files, options, message):
    Path("broken.onnx").write_bytes((files / "digits.onnx").read_bytes()[:9999])
    names = {
        "IMAGE": files / "images" / "1.png",
        **{name: files / f"{name}.onnx" for name in ("digits", "strange", "maps", "free")},
    }
    status, _, err = run(*[names.get(option, option) for option in options])
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["broken.onnx"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(settings=[]), "do not describe"),
        (dict(settings={"input_size": 3}), "do not describe"),
        (dict(crop_pct=0), "do not describe"),
        (dict(interpolation="random"), "do not describe"),
        (dict(mean=[0.5, 0.5]), "do not describe"),
        (dict(input_size=[3, 40, 40]), "is made for images of 32x32 pixels, not 40x40"),
        (dict(input_size=[1, 32, 32], mean=[0.5], std=[0.5]), "cannot take 1 images"),
        (dict(class_names=None), "do not describe"),
        (dict(class_names=["a", "b"]), "names 2 classes and gives a shape of (10,)"),
        (dict(least_size=[33, 33]), "takes images of 33 pixels or more, not 32x32"),
    ],
)
def test_damaged_metadata(run, files, change, message):
    model = onnx.load(files / "digits.onnx")
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    del model.metadata_props[:]
    if change.keys() & {*metadata, "least_size"}:
        metadata.update(change)
    else:
        metadata["settings"].update(change)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(model, "changed.onnx")
    status, _, err = run("changed.onnx", files / "images" / "1.png")
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


WRONG = [None, True, 0, -1, 2.5, float("nan"), float("inf"), 10**400, "", "x", [], [1], [[]], {}, {"a": 1}, [None] * 3]
WRONG += [["0.5"] * 3, [float("nan")] * 3, [True] * 3, [1e300] * 3, [-(10**30)] * 3, [3, 32, 32, 32]]
FIELDS = ["input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "exif"]
FIELDS += ["model", "class_names", "settings", "least_size"]


def test_any_value_of_a_wrong_kind_in_the_metadata(files):
    """Every field with every kind of value is refused with one kind of error before a run, and so are odd texts."""
    model = onnx.load(files / "digits.onnx")
    right = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    right_kind = [("model", ""), ("model", "x"), ("class_names", ["0.5"] * 3), ("exif", True)]
    wrong = [(field, value) for field in FIELDS for value in WRONG if (field, value) not in right_kind]
    assert len(wrong) > 200
    for field, value in wrong:
        metadata = {**right, field: value} if field in right or field == "least_size" else dict(right)
        if field in right["settings"]:
            metadata["settings"] = {**right["settings"], field: value}
        try:
            _, _, settings, _ = predict_onnx._described({key: json.dumps(v) for key, v in metadata.items()})
            predict_onnx.Preparation(**settings)
        except (ValueError, TypeError):
            continue
        pytest.fail(f"{field} = {value!r} is taken")
    for text in ("[" * 100_000, "{", "NaN", "1" * 5000):
        del model.metadata_props[:]
        for key, value in (right | dict(settings=None)).items():
            model.metadata_props.add(key=key, value=text if key == "settings" else json.dumps(value))
        onnx.save(model, files / "odd.onnx")
        with pytest.raises(ValueError, match="do not describe how images are prepared"):
            predict_onnx.Classifier(str(files / "odd.onnx"))


def test_output_that_is_not_finite(run, files):
    model = onnx.load(files / "digits.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("head.bias"):
            tensor.raw_data = np.full(10, np.nan, np.float32).tobytes()
    onnx.save(model, "nan.onnx")
    status, printed, err = run("nan.onnx", files / "images" / "1.png", "--results-file", "out.json")
    assert status == 2 and "is not finite" in err and not printed and not Path("out.json").exists()


def test_onnxruntime_is_missing(run, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, _, err = run(files / "digits.onnx", files / "images")
    assert status == 2 and "pip install onnxruntime" in err
