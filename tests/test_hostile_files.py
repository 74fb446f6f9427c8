"""Files that say or hold what cannot be: one clear line for every field and every kind of value, nothing cast."""

import json

import pytest
import timm
import torch
from PIL import Image

from helpers import TINY
from raftmlp.checkpoints.description import check_description
from raftmlp.checkpoints.weights import load_state_dict, read_description, save_state_dict
from raftmlp.cli import convert, export, predict, train, validate
from raftmlp.errors import UserError
from raftmlp.export.hub import training_record
from raftmlp.model.create import ModelSettings, create_model


def nested(depth, value=0):
    for _ in range(depth):
        value = [value]
    return value


# kinds of values, and the fields that may be so
KINDS = {
    "text": ("what", {"model"}),
    "long": ("x" * 5000, set()),
    "escape": ("a\x1b[31m\n", set()),
    "surrogate": ("\ud800", set()),
    "empty": ("", {"model"}),
    "true": (True, set()),
    "minus": (-1, set()),
    "zero": (0, {"num_classes"}),
    "half": (0.5, {"crop_pct"}),
    "large": (10**30, set()),
    "larger": (10**5000, set()),
    "nan": (float("nan"), set()),
    "infinite": (float("inf"), set()),
    "list": ([], {"label_names"}),
    "texts": (["a", "b", "c"], {"label_names"}),
    "numbers": ([0.5, 0.5, 0.5], {"mean", "std"}),
    "nans": ([float("nan")] * 3, set()),
    "trues": ([True] * 3, set()),
    "two": ([32, 32], set()),
    "sizes": ([3, 32, 32], {"input_size", "mean", "std"}),
    "zeros": ([0, 0, 0], {"mean"}),
    "large sizes": ([3, 10**9, 10**9], set()),
    "escapes": (["a\x1b[31m"], set()),
    "deep": (nested(5000), set()),
    "mapping": ({"a": 1}, {"model_kwargs", "pretrained_cfg"}),
    "numbered": ({1: 2}, set()),
    "tensor": (torch.ones(3), set()),
    "bytes": (b"bilinear", set()),
}
CFG = (
    "num_classes", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names",
)  # fmt: skip
FIELDS = ("model", "model_kwargs", "pretrained_cfg", *CFG)
ROWS = [(field, kind) for field in FIELDS for kind, (_, allowed) in KINDS.items() if field not in allowed]


@pytest.mark.parametrize("field, kind", ROWS)
def test_a_field_of_a_wrong_kind(field, kind):
    value = KINDS[kind][0]
    said = {"pretrained_cfg": {field: value}} if field in CFG else {field: value}
    with pytest.raises(UserError, match=rf"^mine.pth: (pretrained_cfg\.)?{field} (must be|has) ") as caught:
        check_description(said, "mine.pth")
    message = str(caught.value)
    assert message.isprintable() and len(message) < 300, message


@pytest.mark.parametrize("field, kind", [(f, k) for f in FIELDS for k, (_, allowed) in KINDS.items() if f in allowed])
def test_a_field_of_a_kind_that_is_allowed(field, kind):
    value = KINDS[kind][0]
    check_description({"pretrained_cfg": {field: value}} if field in CFG else {field: value}, "mine.pth")


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"embed_dims": [float("nan")]}, "embed_dims must be a number"),
        ({"embed_dims": (8, 10**12)}, "embed_dims must be a number"),
        ({"depths": nested(9)}, "depths must be a number"),
        ({"a": torch.ones(1)}, "a must be a number"),
        ({"token_mixing": "a\n"}, "token_mixing must be a text"),
        ({"a b": 1}, "must not have an argument 'a b'"),
        ({"checkpoint_path": "/etc/x"}, "must not have an argument 'checkpoint_path'"),
        ({"pretrained_cfg": {}}, "must not have an argument 'pretrained_cfg'"),
    ],
)
def test_arguments_of_a_wrong_kind(kwargs, message):
    with pytest.raises(UserError, match=f"mine.pth: model_kwargs {message}"):
        check_description(dict(model_kwargs=kwargs), "mine.pth")


def test_fields_that_do_not_fit_each_other():
    for cfg, message in (
        (dict(num_classes=2, label_names=["a"]), "label_names has 1 names for 2 classes"),
        (dict(input_size=(4, 8, 8), mean=(0.5, 0.5)), "mean has 2 values, allowed are .1, 3, 4."),
    ):
        with pytest.raises(UserError, match=message):
            check_description(dict(pretrained_cfg=cfg), "mine.pth")


def test_what_timm_says_of_its_models_is_allowed():
    for name in timm.list_models():
        cfg = timm.get_pretrained_cfg(name)
        checked = check_description(dict(model=name, pretrained_cfg=cfg and cfg.to_dict()), name)
        assert not cfg or checked["pretrained_cfg"]["mean"] == tuple(cfg.mean)
    bytes_of_a_folder = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert check_description(dict(pretrained_cfg=dict(label_names=[bytes_of_a_folder])), "")["pretrained_cfg"]


# The readers


@pytest.mark.parametrize("text", ["{", "[1]", '"a"', "[" * 100000, '{"mean": "a"}', '{"mean": [NaN, 0, 0]}', "\udcff"])
@pytest.mark.parametrize("place", ["metadata", "config.json", "card"])
def test_damaged_json(place, text, tmp_path):
    file = tmp_path / "model.safetensors"
    data = text.encode("utf-8", "surrogateescape")
    if place == "metadata":
        save_state_dict({"a": torch.ones(1)}, file, dict(pretrained_cfg=text.replace("\udcff", "\\")))
        read, name = read_description, file
    elif place == "config.json":
        save_state_dict({"a": torch.ones(1)}, file)
        (tmp_path / "config.json").write_bytes(b'{"pretrained_cfg": ' + data + b"}")
        read, name = read_description, tmp_path
    else:
        file.with_suffix(".json").write_bytes(data.replace(b"mean", b"best_top1"))
        read, name = training_record, file
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        read(name)
    assert "\n" not in str(caught.value)


NAN = torch.tensor([1.0, float("nan")])
TENSORS = {
    "complex": (torch.ones(2, dtype=torch.complex64), "is of torch.complex64"),
    "float8": (torch.ones(2).to(torch.float8_e4m3fn), "is of torch.float8_e4m3fn"),
    "uint16": (torch.ones(2).to(torch.uint16), "is of torch.uint16"),
    "nan": (NAN, "has values that are not finite"),
    "infinite": (NAN.nan_to_num(float("-inf")).to(torch.bfloat16), "has values that are not finite"),
    "sparse": (torch.eye(2).to_sparse(), "is a sparse tensor"),
    "csr": (torch.eye(2).to_sparse_csr(), "is a sparse tensor"),
    "quantised": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "is a quantised tensor"),
    "nested": (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "is a nested tensor"),
    "meta": (torch.ones(2, device="meta"), "is a meta tensor"),
    "terabytes": (torch.ones(1).expand(10**6, 10**6), "more than the file holds"),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of kinds that it wants to remove
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_cannot_be_weights(kind, tmp_path):
    tensor, message = TENSORS[kind]
    torch.save({"model": {"module.a": torch.ones(1), "module.b": tensor}}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=rf"mine.pth( is damaged.*|: 'b' .*{message}.*)") as caught:
        load_state_dict(tmp_path / "mine.pth")
    assert "\n" not in str(caught.value)


def test_keys_that_are_no_texts(tmp_path):
    torch.save({3: torch.ones(1), "a": torch.ones(1)}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match="under the key 3: keys must be texts"):
        load_state_dict(tmp_path / "mine.pth")


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    return timm.create_model("raftmlp_digits", num_classes=10, embed_dims=(8,) * 4, depths=(1,) * 4)


TYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e5m2, torch.complex64,
)  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_weights_of_a_type_that_would_be_cast(dtype, digits, tmp_path):
    state = {**digits.state_dict(), "head.weight": digits.head.weight.detach().to(dtype)}
    torch.save(state, tmp_path / "mine.pth")
    settings = dict(model="raftmlp_digits", model_kwargs=dict(embed_dims=(8,) * 4, depths=(1,) * 4))
    with pytest.raises(UserError, match=f"mine.pth: '?head.weight'? is of {dtype}"):
        create_model(ModelSettings(checkpoint=str(tmp_path / "mine.pth"), num_classes=10, **settings))
    with pytest.raises(UserError, match=f"head.weight is of {dtype}"):
        digits.load_state_dict(state)
    cfg = dict(state_dict=state, num_classes=10, classifier="head", input_size=(3, 32, 32))
    with pytest.raises(UserError, match="head.weight"):
        timm.create_model("raftmlp_digits", pretrained=True, pretrained_cfg=cfg, **settings["model_kwargs"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_load(dtype, digits, tmp_path):
    torch.save({key: value.to(dtype) for key, value in digits.state_dict().items()}, tmp_path / "mine.pth")
    kwargs = dict(embed_dims=(8,) * 4, depths=(1,) * 4)
    settings = ModelSettings(model="raftmlp_digits", checkpoint=str(tmp_path / "mine.pth"), model_kwargs=kwargs)
    loaded = create_model(settings, classes=10)
    torch.testing.assert_close(loaded.head.weight, digits.head.weight, rtol=1e-2, atol=1e-2)


def test_integers_of_other_models_load_where_they_belong(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    model.state_dict()["bn1.num_batches_tracked"] += 7
    torch.save({"arch": "test_resnet", "state_dict": model.state_dict()}, tmp_path / "mine.pth")
    loaded = create_model(ModelSettings(checkpoint=str(tmp_path / "mine.pth"), num_classes=3))
    assert loaded.bn1.num_batches_tracked == 7
    state = {**model.state_dict(), "bn1.weight": model.bn1.weight.detach().to(torch.int8)}
    torch.save({"arch": "test_resnet", "state_dict": state}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match="mine.pth: bn1.weight is of torch.int8"):
        create_model(ModelSettings(checkpoint=str(tmp_path / "mine.pth"), num_classes=3))


# load_state_dict of foreign weights: torch's own error


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 3), (1, 1, 1), (10**4, 2)], ids=str)
def test_foreign_shapes_get_torchs_error(shape, digits):
    for key in digits.state_dict():
        if tuple(digits.state_dict()[key].shape) != shape:
            with pytest.raises(RuntimeError, match=r"size mismatch|While copying"):
                digits.load_state_dict({**digits.state_dict(), key: torch.ones(shape)})
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key"):
        digits.load_state_dict({"conv.weight": torch.ones(shape), "fc": torch.ones(shape)})


def test_release_weights_of_foreign_shapes(digits):
    for shape in ((), (3,), (3, 3)):
        state = {key: torch.ones(shape) for key in ("levels.0.fn.0.fc.weight", "levels.0.fn.2.1.norm.1.weight")}
        with pytest.raises((UserError, RuntimeError), match="another variant's|size mismatch"):
            digits.load_state_dict(state)


# The commands: one line, exit status 2


def hostile_files(digits):
    """Write checkpoints of the digits model with one thing wrong in each; return their names."""
    good = dict(arch="raftmlp_digits", model_kwargs=dict(embed_dims=[8] * 4, depths=[1] * 4))
    cfg, state = dict(num_classes=10, input_size=(3, 32, 32)), digits.state_dict()
    files = {
        "cfg.pth": dict(good, state_dict=state, pretrained_cfg=dict(cfg, mean="grey")),
        "size.pth": dict(good, state_dict=state, pretrained_cfg=dict(cfg, input_size=[3, 10**8, 10**8])),
        "arch.pth": dict(good, state_dict=state, pretrained_cfg=cfg, arch=[1]),
        "huge.pth": dict(arch="raftmlp_digits", model_kwargs=dict(embed_dims=[2**20] * 4), state_dict=state),
        "flat.pth": dict(good, pretrained_cfg=cfg, state_dict={key: torch.ones(1) for key in state}),
        "point.pth": dict(good, pretrained_cfg=cfg, state_dict={key: torch.tensor(1.0) for key in state}),
        "nan.pth": dict(good, pretrained_cfg=cfg, state_dict={**state, "head.bias": state["head.bias"] * torch.nan}),
        "bool.pth": dict(good, pretrained_cfg=cfg, state_dict={**state, "head.bias": state["head.bias"] > 0}),
        "keys.pth": dict(good, pretrained_cfg=cfg, state_dict={**state, 5: torch.ones(1)}),
    }
    for name, content in files.items():
        torch.save(content, name)
    return files


def test_the_commands_show_one_line(run_command, digits):
    files = hostile_files(digits)
    Image.new("RGB", (8, 8)).save("digit.png")
    for name in files:
        for command, *options in (
            (validate, "--dataset", "digits", "--checkpoint", name, "--workers", 0),
            (predict, "digit.png", "--checkpoint", name),
            (train, "--dataset", "digits", "--checkpoint", name, *TINY[:4], "--output", "run"),
            (export, "--checkpoint", name, "--format", "hf", "--out", "out"),
            (convert, name, "out.safetensors"),
        ):
            if command is convert and name in ("cfg.pth", "size.pth", "arch.pth", "huge.pth"):
                continue  # it looks at the weights alone
            status, _, err = run_command(command, *options)
            lines = err.splitlines()
            assert status == 2 and "Traceback" not in err, (name, command.__name__, err)
            assert (command is convert or len(lines) == 1) and name in err, err


def test_a_card_and_a_path(tmp_path, run_command):
    for card in ({"best_top1": "much"}, {"best_epoch": 1.5}, {"options": []}, {"command": "a\x07"}):
        (tmp_path / "w.json").write_text(json.dumps(card))
        with pytest.raises(UserError, match=rf"w.json is damaged: {next(iter(card))} must be"):
            training_record(tmp_path / "w.safetensors")
    status, _, err = run_command(validate, "--dataset", "digits", "--checkpoint", "x" * 5000)
    assert status == 2 and "File name too long" in err and len(err) < 300
