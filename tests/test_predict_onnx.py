"""tools/predict_onnx.py: timm's preparation of images to the last digits, the answers of predict, all without torch."""

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
from PIL import Image
from timm.data import create_transform

from helpers import DIGITS, load_script
from raftmlp.commands import export, predict
from raftmlp.data import Digits

predict_onnx = load_script("predict_onnx")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with 20 digits, a photograph-like image, and the ONNX files; made once."""
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "images").mkdir()
    dataset = Digits("validation")
    for i in range(20):
        dataset[i][0].save(folder / "images" / f"{i}.png")
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "odd.png")  # has transparency
    common = [*DIGITS, "--overwrite", "--out"]
    for name, options in (
        ("digits", []),
        ("batch", ["--batch", "8"]),
        ("free", ["--dynamic-size", "--img-size", "64"]),
    ):
        before, sys.argv = sys.argv, ["raftmlp export", *common, str(folder / f"{name}.onnx"), *options]
        try:
            export.main()
        finally:
            sys.argv = before
    strange = onnx.load(folder / "digits.onnx")
    del strange.metadata_props[:]
    onnx.save(strange, folder / "strange.onnx")
    strange.metadata_props.add(key="maps", value="[]")
    onnx.save(strange, folder / "maps.onnx")
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run predict_onnx.py's main as the script does; returns its exit status and its two outputs."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["tools/predict_onnx.py", *map(str, args)])
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
    assert ours["settings"] == expected["settings"] and ours["model"] == expected["model"] == "raftmlp_digits"
    assert printed.replace("a.json", "b.json") == theirs


def test_without_torch(files, tmp_path):
    """The script alone, in an environment of onnxruntime, numpy and Pillow: site-packages are out of sight."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for package in ("numpy", "pillow", "onnxruntime"):
        for file in importlib.metadata.files(package):
            top = file.parts[0]
            if not top.startswith("..") and not (alone / top).exists():
                (alone / top).symlink_to(
                    Path(file.locate()).parents[len(file.parts) - 2] if len(file.parts) > 1 else file.locate()
                )
    shutil.copy(predict_onnx.__file__, tmp_path / "script.py")
    environment = {**os.environ, "PYTHONPATH": str(alone)}
    python = [sys.executable, "-S"]
    for package in ("torch", "timm", "yaml", "tqdm", "raftmlp"):
        seen = subprocess.run([*python, "-c", f"import {package}"], env=environment, capture_output=True, cwd=tmp_path)
        assert b"ModuleNotFoundError" in seen.stderr
    command = [*python, "script.py", files / "digits.onnx", files / "images" / "3.png", "--topk", "1"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(Digits("validation")[3][1])


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
        (["free", "IMAGE", "--img-size", "20", "50"], "takes images of 33 pixels or more, not 20x50"),
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
    ],
)
def test_damaged_metadata(run, files, change, message):
    model = onnx.load(files / "digits.onnx")
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    del model.metadata_props[:]
    if change.keys() & metadata.keys():
        metadata.update(change)
    else:
        metadata["settings"].update(change)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(model, "changed.onnx")
    status, _, err = run("changed.onnx", files / "images" / "1.png")
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


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
