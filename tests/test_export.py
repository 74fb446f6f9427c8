"""raftmlp export: every format against the model in its own runtime, the Hub's folder, quantization, bad input."""

import errno
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import pytest
import timm
import torch

from helpers import DIGITS, ROOT, make_run_folder, time_little
from raftmlp import RaftMLP
from raftmlp.checkpoints.weights import load_state_dict, save_state_dict
from raftmlp.cli import export
from raftmlp.export import formats

SUFFIXES = dict(onnx="onnx", pt2="pt2", aoti="pt2", torchscript="pt")
METADATA = {"model", "weights", "settings", "class_names", "precision", "raftmlp", "torch"}
KWARGS = dict(embed_dims=(16, 32), depths=(1, 1), patch_sizes=(4, 2), patch_kernels=((4, 8), (2, 4)))
CFG = dict(num_classes=10, input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")


@pytest.fixture
def run(run_command, monkeypatch):
    """Run the command, which measures no speed; see ``run_command``."""
    time_little(monkeypatch)
    return partial(run_command, export)


def save_small(path, **kwargs):
    """A model that exporters are quick with, and a checkpoint that describes it."""
    torch.manual_seed(0)
    kwargs, cfg = KWARGS | kwargs, dict(CFG, crop_pct=1, label_names=tuple("abcdefghij"))
    model = timm.create_model("raftmlp_digits", num_classes=10, **kwargs).eval()
    content = dict(arch="raftmlp_digits", state_dict=model.state_dict(), model_kwargs=kwargs, pretrained_cfg=cfg)
    torch.save(content, path)
    return model, path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return what ``save_small`` does, for many tests."""
    return save_small(tmp_path_factory.mktemp("small") / "small.pth")


@pytest.fixture(scope="module")
def digits():
    return timm.create_model("raftmlp_digits", pretrained=True).eval()


def load(path, how):
    """Return a function from images to a list of outputs, and the metadata."""
    return formats.FORMATS[how].run(Path(path))


def lines(err):
    """The number of lines of stderr but for the note on random weights."""
    return len([line for line in err.splitlines() if not line.startswith("note: ")])


@torch.inference_mode()
def assert_same(actual, expected, limit=1e-5):
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    assert [y.shape for y in actual] == [y.shape for y in expected]
    for a, b in zip(actual, expected):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= limit * b.abs().max()


# Formats


@pytest.mark.parametrize(
    "how, size", [("onnx", (33, 47)), ("pt2", (40, 72)), ("torchscript", (33, 47)), ("aoti", (32, 32))]
)
def test_any_batch(run, small, how, size):
    """Images of other strides are taken; of another size, number of channels or type too, or there is an error."""
    (model, path), out = small, Path(f"model.{SUFFIXES[how]}")
    status, printed, err = run("--checkpoint", path, "--format", how, "--img-size", *size, "--out", out)
    assert status == 0, err
    assert "16 x " in printed and "times as fast" in printed and f"written: {out}, batch free" in printed
    file, metadata = load(out, how)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, *size)
        assert_same(file(images), model(images))
    images, larger = torch.randn(2, 3, *size), torch.randn(2, 3, size[0] + 5, 2 * size[1])
    from_array = torch.from_numpy(images.permute(0, 2, 3, 1).contiguous().numpy()).permute(0, 3, 1, 2)
    for view in (from_array, images.to(memory_format=torch.channels_last), larger[..., 5:, ::2]):
        assert_same(file(view), model(view.contiguous()))
        assert_same(file(view[1:]), model(view[1:].contiguous()))
    narrow = torch.randn(2, 3, size[0], size[1] // 2)
    for others in (larger, narrow, images.mT.contiguous(), images[:, :1], images[0], images.double()):
        try:
            outputs = file(others)
        except Exception:
            continue
        assert_same(outputs, model(others.float()))
    settings = {**CFG, "input_size": (3, *size), "crop_pct": 1, "crop_mode": "center", "exif": False}
    del settings["num_classes"]
    assert metadata.keys() >= METADATA and json.loads(metadata["settings"]) == json.loads(json.dumps(settings))
    assert json.loads(metadata["class_names"]) == list("abcdefghij")
    assert str(ROOT).encode() not in out.read_bytes() or how == "aoti"
    assert [path.name for path in Path().iterdir()] == [out.name]


@pytest.mark.parametrize("how, resizing", [*((how, "full") for how in SUFFIXES), ("onnx", "residual")])
def test_any_size(run, how, resizing):
    less = dict(embed_dims=(8,), depths=(1,), patch_sizes=(8,), patch_kernels=((8,),))  # symbolic sizes take minutes
    model, path = save_small(Path("small.pth"), resizing=resizing, **({} if how == "torchscript" else less))
    out = f"model.{SUFFIXES[how]}"
    status, printed, err = run("--checkpoint", path, "--format", how, "--dynamic-size", "--out", out)
    assert status == 0, err
    least = " from 9" if how in ("pt2", "aoti") else ""
    assert f"written: {out}, batch and height and width free{least}\n" in printed
    file, metadata = load(out, how)
    assert json.loads(metadata.get("least_size", "[1, 1]")) == ([9, 9] if least else [1, 1])
    smaller = [(1, (8, 8)), (3, (5, 40)), (1, (1, 1))]  # the operators of ONNX take a last map of one position too
    for batch, size in [(1, (32, 32)), (2, (40, 72)), (5, (33, 47)), (2, (9, 130))] + smaller * (not least):
        images = torch.randn(batch, 3, *size)
        assert_same(file(images), model(images))
    if how == "pt2":
        options = ["--checkpoint", path, "--format", how, "--dynamic-size", "--img-size", 8, "--out", "other.pt2"]
        status, _, err = run(*options)
        assert status == 2 and "takes images of 9 pixels or more" in err and not Path("other.pt2").exists()


@pytest.mark.parametrize("how", ["onnx", "torchscript"])
def test_feature_maps(run, small, how):
    model, path = small
    out = Path(f"maps.{SUFFIXES[how]}")
    status, _, err = run("--checkpoint", path, "--format", how, "--features", "--img-size", 44, 61, "--out", out)
    assert status == 0, err
    file, metadata = load(out, how)
    images = torch.randn(2, 3, 44, 61)
    assert_same(file(images), model.forward_intermediates(images, intermediates_only=True))
    maps = json.loads(metadata["maps"])
    assert maps == [dict(name="map_0", channels=16, stride=4), dict(name="map_1", channels=32, stride=8)]
    assert "class_names" not in metadata


@pytest.mark.parametrize("options", ["--batch 7", "--quantize dynamic", "--quantize static"])
def test_accuracy_with_data(run, digits, options):
    """The last batch of the data is filled up for a fixed batch."""
    data = ["--dataset", "digits", "--results-file", "figures.json"]
    status, printed, err = run(*DIGITS, *options.split(), *data, "--out", "model.onnx")
    assert status == 0, err
    assert printed.count("top-1 100.00 % on 360 images") == 2
    figures, file = json.loads(Path("figures.json").read_text()), onnx.load("model.onnx")
    assert figures["ONNX Runtime"]["images"] == 360 and figures["ONNX Runtime"]["top1"] == 100
    model, metadata = load("model.onnx", "onnx")
    images = torch.randn(7, 3, 32, 32)
    assert [entry.domain for entry in file.opset_import] == [""] == list({node.domain for node in file.graph.node})
    if options == "--batch 7":
        assert "no axis free" in printed
        assert figures["PyTorch"]["loss"] == pytest.approx(figures["ONNX Runtime"]["loss"], rel=1e-4)
        assert [row["images"] for row in figures["rows"]] == ["7 x 32"] * 3
        assert all(row["difference"] < 1e-5 and row["runtime_ms"] > 0 for row in figures["rows"])
        assert_same(model(images), digits(images))
        with pytest.raises(Exception, match="dimension"):
            model(images[:2])
    else:
        assert json.loads(metadata["precision"]) == f"int8, {options.split()[1]}"
        assert Path("model.onnx").stat().st_size < 0.6 * 4 * sum(p.numel() for p in digits.parameters())
        assert not torch.allclose(model(images)[0], digits(images), rtol=1e-5)
        assert any("Integer" in node.op_type or "Quantize" in node.op_type for node in file.graph.node)


@pytest.mark.parametrize("how, dtype, limit", [("onnx", "float16", 0.01), ("torchscript", "bfloat16", 0.05)])
def test_half_precision(run, small, how, dtype, limit):
    model, path = small
    out = Path(f"model.{SUFFIXES[how]}")
    status, _, err = run("--checkpoint", path, "--format", how, "--half", dtype, "--out", out)
    assert status == 0, err
    images = torch.randn(4, 3, 32, 32)
    file, metadata = load(out, how)
    assert_same(file(images), model(images), limit)
    with pytest.raises(AssertionError):
        assert_same(file(images), model(images))
    assert json.loads(metadata["precision"]) == dtype


def test_the_onnx_file(run, small):
    assert run("--checkpoint", small[1], "--simplify", "--out", "model.onnx")[0] == 0
    model = onnx.load("model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not model.functions and {node.domain for node in model.graph.node} == {""}
    assert not {node.op_type for node in model.graph.node} & {"Resize", "If", "Loop", "Einsum", "GridSample"}
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert images.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_another_model_of_timm(run):
    status, _, err = run("--model", "test_convnext", "--format", "pt2", "--img-size", 96, "--out", "other.pt2")
    assert status == 0, err
    assert load("other.pt2", "pt2")[0](torch.randn(2, 3, 96, 96))[0].shape == (2, 1000)
    for how in ("pt2", "torchscript"):
        out = f"free.{SUFFIXES[how]}"
        status, _, err = run("--model", "test_vit", "--format", how, "--dynamic-size", "--out", out)
        assert status == 2 and not Path(out).exists() and lines(err) == 1


# The Hub's folder


@pytest.mark.parametrize("options", [[], ["--half", "bfloat16"]])
def test_hub_round_trip(run, digits, options):
    status, printed, err = run(*DIGITS, "--format", "hf", "--out", "folder", "--dataset", "digits", *options)
    assert "raftmlp_digits: top-1 100.00 % on 360 images of digits, validation" in printed
    assert status == 0, err
    assert {path.name for path in Path("folder").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in Path("folder").iterdir())
    assert "license" not in Path("folder/config.json").read_text()
    again = timm.create_model("local-dir:folder", pretrained=True).eval()
    assert isinstance(again, RaftMLP) and again.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    images = torch.randn(2, 3, 40, 40)
    assert_same([again(images)], digits(images), 0.05 if options else 0)
    kept = {value.dtype for value in load_state_dict("folder/model.safetensors").values()}
    assert kept == {torch.bfloat16 if options else torch.float32}
    card = Path("folder/README.md").read_text()
    for words in (
        f"0.76 million parameters in {'bfloat16' if options else 'float32'}", "after epoch 30 of 30", "| lr | 0.002 |",
        "raftmlp train -c digits/raftmlp_digits", "| train_img_sizes |", "top-1 100.00 %, top-5 100.00 % on 360 images",
    ):  # fmt: skip
        assert words in card
    assert [path.name for path in Path().iterdir()] == ["folder"]


def test_hub_folder_of_other_weights(run):
    model = timm.create_model("raftmlp_digits", num_classes=3, img_size=(48, 32), raft_size=4, in_chans=1)
    cfg = json.dumps(dict(num_classes=3, input_size=(1, 48, 32)))
    save_state_dict(model.state_dict(), Path("odd.safetensors"), dict(model="raftmlp_digits", pretrained_cfg=cfg))
    kwargs = ["--model-kwargs", "img_size=(48,32)", "raft_size=4"]
    status, printed, err = run("--checkpoint", "odd.safetensors", *kwargs, "--format", "hf", "--out", "a/folder")
    assert status == 0, err
    assert "README.md says that data and recipe are not known" in printed
    again = timm.create_model("local-dir:a/folder", pretrained=True).eval()
    images = torch.randn(2, 1, 48, 32)
    assert torch.equal(again(images), model.eval()(images))


def test_the_folder_of_a_run_stands_for_its_best_weights(run):
    make_run_folder(Path("run"))
    assert run("--checkpoint", "run", "--format", "hf", "--out", "hub")[0] == 0
    assert torch.equal(load_state_dict("hub")["head.bias"], load_state_dict("run/model_best.pth.tar")["head.bias"])
    (Path("hub") / "last.pth.tar").touch()  # a folder for the Hub stays one
    assert run("--checkpoint", "hub", "--format", "hf", "--out", "again", "--results-file", "r.json")[0] == 0
    assert json.loads(Path("r.json").read_text())["weights"] == "hub"


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ("", "--out names the .onnx file to write"),
        ("--out model.pt", "model.pt must be named .onnx"),
        ("--batch 0 --out m.onnx", "'0'"),
        ("--format pt2 --quantize static --out m.pt2", "--quantize does not go with --format pt2"),
        ("--format hf --dynamic-size --out folder", "--dynamic-size does not go with --format hf"),
        ("--opset 17 --out m.onnx", "18"),
        ("--out m.onnx --calibration-split x", "--calibration-split goes with --quantize static only"),
        ("--out m.onnx --val-split test", "--val-split goes with --dataset or --data-dir only"),
        ("--out m.onnx --dataset digits --batch 2 --batch-size 3", "--batch-size goes with a free batch only"),
        ("--format hf --out a.json --results-file a.json", "--results-file a.json and --out a.json are one"),
        ("--checkpoint m.pt --format torchscript --out m.pt", "m.pt is the checkpoint or its record"),
        ("--checkpoint m.safetensors --out m.onnx --results-file m.json", "m.json is the checkpoint or its record"),
        ("--quantize static --out m.onnx", "--quantize static takes the scales from images"),
        ("--quantize dynamic --half --out m.onnx", "leave --half and --features out"),
        ("--half bfloat16 --out m.onnx", "ONNX Runtime has no bfloat16 convolution"),
        ("--format torchscript --batch 2 --out m.pt", "a TorchScript module takes any batch"),
        ("--format torchscript --features --dynamic-size --out m.pt", "can be traced only, for one size"),
        ("--dataset digits --num-classes 9 --out m.onnx", "the data has 10 classes, the model 9"),
    ],
)
def test_bad_options(run, options, message):
    status, _, err = run("--model", "raftmlp_digits", *options.split())
    assert status == 2 and message in err and lines(err) == 1
    assert not list(Path().iterdir())


def test_what_exists_stays(run):
    Path("model.onnx").write_text("precious")
    Path("folder").mkdir()
    Path("folder/precious").touch()
    status, _, err = run(*DIGITS, "--out", "model.onnx")
    assert status == 2 and "model.onnx exists" in err
    status, _, err = run(*DIGITS, "--format", "hf", "--out", "folder", "--overwrite")
    assert status == 2 and "folder exists" in err
    assert Path("model.onnx").read_text() == "precious" and Path("folder/precious").exists()


@pytest.mark.parametrize("options", ["--format torchscript --out model.pt", "--format hf --out folder"])
def test_a_full_disk(run, monkeypatch, options):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "write_text", full)
    status, _, err = run(*DIGITS, *options.split())
    assert status == 2 and "No space left on device" in err and lines(err) == 1
    assert not list(Path().iterdir())


def test_what_this_machine_lacks_is_named(run, monkeypatch):
    find = formats.importlib.util.find_spec
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    status, _, err = run(*DIGITS, "--out", "model.onnx")
    assert status == 2 and "needs the package onnxscript: pip install " in err and "raftmlp[" not in err
    monkeypatch.setenv("PATH", "")
    status, _, err = run(*DIGITS, "--format", "aoti", "--out", "model.pt2")
    assert status == 2 and "--format aoti needs a C++ compiler" in err


def test_a_file_that_differs_or_does_not_load_is_not_written(run, small, monkeypatch):
    def run_wrong(path):
        model, metadata = formats.run_torchscript(path)
        return lambda images: [1.001 * y for y in model(images)], metadata

    monkeypatch.setitem(formats.FORMATS, "torchscript", replace(formats.FORMATS["torchscript"], run=run_wrong))
    status, _, err = run("--checkpoint", small[1], "--format", "torchscript", "--out", "model.pt")
    assert status == 2 and "off by 0.001 of the largest value: it is not written" in err
    options = ["--checkpoint", small[1], "--quantize", "static", "--dataset", "digits", "--opset", 21]
    status, _, err = run(*options, "--out", "model.onnx")
    assert status == 2 and lines(err) == 1 and not list(Path().iterdir())
