"""raftmlp predict-onnx: timm's preparation of images to the last digits, the answers of predict, all without torch."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from helpers import ROOT, TINY_MODEL, time_little
from raftmlp.cli import export, predict, predict_onnx
from raftmlp.data import Digits
from raftmlp.data.images import ImageSettings, data_config
from raftmlp.data.pixels import _say_once
from raftmlp.errors import UserError
from raftmlp.export.onnx_client import Classifier, Preparation

MODELS = dict(fixed=TINY_MODEL, batch=TINY_MODEL, free=["--model", "test_resnet", "--model-kwargs", "num_classes=10"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with digits, a noisy image with transparency, a checkpoint, and its ONNX files; exported once."""
    folder = tmp_path_factory.mktemp("onnx")
    (folder / "images").mkdir()
    dataset = Digits("validation")
    for i in range(10):
        dataset[i][0].save(folder / "images" / f"{i}.png")
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "odd.png")
    torch.manual_seed(0)
    model = timm.create_model("raftmlp_digits", embed_dims=(8,) * 4, depths=(1,) * 4)
    torch.nn.init.normal_(model.head.weight)  # clear answers
    torch.save(dict(arch="raftmlp_digits", state_dict=model.state_dict()), folder / "tiny.pth")
    with pytest.MonkeyPatch.context() as patched:
        time_little(patched)
        command = [*MODELS["fixed"], "--checkpoint", folder / "tiny.pth", "--out", folder / "fixed.onnx"]
        patched.setattr(sys, "argv", ["raftmlp export", *map(str, command)])
        export.main()
    change(folder / "fixed.onnx", folder / "batch.onnx", batch=8)
    other = timm.create_model("test_resnet", num_classes=10).eval()  # its export takes little time
    torch.save(dict(arch="test_resnet", state_dict=other.state_dict()), folder / "free.pth")
    axes = dict(images={0: "batch", 2: "height", 3: "width"})
    names = dict(input_names=["images"], dynamic_axes=axes, dynamo=False)
    torch.onnx.export(other, torch.randn(2, 3, 32, 32), folder / "free.onnx", **names)
    settings = data_config(ImageSettings(), other)
    del settings["background"]
    metadata = dict(model='"test_resnet"', class_names=list("0123456789"), settings=settings)
    change(folder / "free.onnx", folder / "free.onnx", **metadata)
    return folder


def change(source, target, batch=None, **metadata):
    """Write a copy of an ONNX file with another batch size, and other metadata: None leaves them out."""
    model = onnx.load(source)
    if batch:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    entries = {entry.key: entry.value for entry in model.metadata_props}
    del model.metadata_props[:]
    entries |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    for key, value in entries.items():
        if value != "null":
            model.metadata_props.add(key=key, value=value)
    onnx.save(model, target)


@pytest.fixture
def run(run_command):
    return partial(run_command, predict_onnx)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation, input_size", [("bicubic", (3, 32, 32)), ("lanczos", (1, 40, 71))])
def test_images_are_prepared_as_timm_does(crop_mode, interpolation, input_size):
    channels, rng = input_size[0], np.random.default_rng(1)
    for crop_pct in (1.0, 0.9):
        settings = dict(input_size=input_size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode)
        settings |= dict(mean=(0.485, 0.456, 0.406)[:channels], std=(0.229, 0.224, 0.225)[:channels])
        expected, prepare = create_transform(**settings), Preparation(**settings)
        for height, width in ((8, 8), (32, 32), (61, 83), (200, 31), (1, 9)):
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            truth = expected(image.convert("L" if channels == 1 else "RGB")).numpy()
            pixels = prepare(image)
            assert pixels.dtype == np.float32 and pixels.shape == truth.shape == input_size
            assert np.abs(pixels - truth).max() <= 1e-6


@pytest.mark.parametrize("name", ["fixed", "batch", "free"])
def test_answers_are_those_of_predict(run, run_command, files, name):
    _say_once.cache_clear()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(files / "images" / "odd.png").save("turned.png", exif=exif)
    images, size = [files / "images", "turned.png"], ["--img-size", 48, 64] if name == "free" else []
    common = ["--topk", 3, "--background", "#102030", "-b", 6, "--exif", *size, "--results-file"]
    status, printed, err = run(files / f"{name}.onnx", *images, *common, "a.json")
    assert status == 0 and "some images have transparency: #102030" in err, err
    model = [*MODELS[name], "--checkpoint", files / ("free.pth" if name == "free" else "tiny.pth")]
    status, theirs, err = run_command(predict, *images, *model, *common, "b.json")
    assert status == 0, err
    ours, expected = (json.loads(Path(f"{name}.json").read_text()) for name in "ab")
    for a, b in zip(ours["images"], expected["images"], strict=True):
        assert a["file"] == b["file"]
        for one, other in zip(a["predictions"], b["predictions"], strict=True):
            assert one == {**other, "probability": pytest.approx(other["probability"], abs=1e-5)}
    assert {**ours["settings"], "background": "#102030"} == expected["settings"]
    assert ours["model"] == expected["model"]
    printed, theirs = (re.sub(r"\d+\.\d\d %|[ab].json", "", text) for text in (printed, theirs))
    assert printed == theirs  # without the last digits


def test_without_torch(files, tmp_path):
    """The command and the class with onnxruntime, numpy and Pillow: other packages are out of sight."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "raftmlp").symlink_to(ROOT / "raftmlp")
    for package in ("numpy", "pillow", "onnxruntime"):
        for file in importlib.metadata.files(package):
            top = file.parts[0]
            if not top.startswith("..") and not (alone / top).exists():
                (alone / top).symlink_to(Path(importlib.metadata.distribution(package).locate_file(top)))
    environment, python = {**os.environ, "PYTHONPATH": str(alone)}, [sys.executable, "-S"]
    image = str(files / "images" / "3.png")
    code = f"""
import importlib.util
assert not any(map(importlib.util.find_spec, ("torch", "timm", "yaml", "tqdm", "packaging", "pydantic")))
from PIL import Image
from raftmlp.export.onnx_client import Classifier
classifier = Classifier({str(files / "fixed.onnx")!r})
print(classifier(classifier.prepare(Image.open({image!r}))[None]).argmax())
"""
    command = ["-m", "raftmlp", "predict-onnx", files / "fixed.onnx", image, "broken.png", "--topk", "1"]
    (tmp_path / "broken.png").write_bytes(b"not an image")
    shown = []
    for arguments, status in (["-c", code], 0), (command, 2):
        done = subprocess.run([*python, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        shown.append(done.stdout.split()[-1])
    assert shown[0] == shown[1]
    assert done.stderr.splitlines()[0].startswith("cannot read broken.png: ") and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[1] == "raftmlp predict-onnx: error: 1 of 2 images could not be read"


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("nowhere", [], "no ONNX file at"),
        ("broken", [], "broken.onnx is damaged or is not an ONNX file"),
        ("fixed", ["--img-size", "40"], "is made for images of 32x32 pixels, not 40x40"),
        ("free", ["--img-size", "9999999"], "input_size"),
        ("fixed", ["--background", "whiet"], "whiet"),
        ("fixed", ["--topk", "0"], "must be a whole number of 1 or more"),
        ("fixed", ["--results-file", "out.txt"], "must be named .json"),
    ],
)
def test_bad_input(run, files, model, options, message):
    (files / "broken.onnx").write_bytes((files / "fixed.onnx").read_bytes()[:9999])
    status, printed, err = run(files / f"{model}.onnx", files / "images" / "1.png", *options)
    assert status == 2 and message in err and not printed and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "settings, metadata, message",
    [
        ({}, dict(settings="[" * 100_000), "do not describe"),
        ({}, dict(settings=[]), "do not describe"),
        ({}, dict(class_names=["\x1b[2J"] * 10), "do not describe"),
        ({}, dict(maps=[]), "gives feature maps"),
        ({}, dict(least_size=[33, 33]), "takes images of 33 pixels or more, not 32"),
        (dict(crop_pct=0), {}, "do not describe"),
        (dict(crop_mode="left"), {}, "crop_mode"),
        (dict(mean=[0.5, 0.5]), {}, "do not describe"),
        (dict(std=["0.5"] * 3), {}, "std"),
        (dict(input_size=[4, 32, 32]), {}, "1 or 3 channels"),
        (dict(input_size=[3, 40, 40]), {}, "is made for images of 32x32 pixels, not 40x40"),
    ],
)
def test_damaged_metadata(files, tmp_path, settings, metadata, message):
    if settings:
        original = Classifier(str(files / "fixed.onnx")).settings
        metadata = dict(settings={key: value for key, value in (original | settings).items() if value is not None})
    change(files / "fixed.onnx", tmp_path / "changed.onnx", **metadata)
    with pytest.raises(UserError, match=message):
        Classifier(str(tmp_path / "changed.onnx"))


def test_output_that_is_wrong_is_not_shown(run, files):
    change(files / "fixed.onnx", "two.onnx", class_names=["a", "b"])
    model = onnx.load(files / "fixed.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("head.bias"):
            tensor.raw_data = np.full(10, np.nan, np.float32).tobytes()
    onnx.save(model, "nan.onnx")
    for name, message in (("nan", "is not finite"), ("two", "names 2 classes")):
        status, printed, err = run(f"{name}.onnx", files / "images" / "1.png", "--results-file", "out.json")
        assert status == 2 and message in err and not printed and not Path("out.json").exists()
