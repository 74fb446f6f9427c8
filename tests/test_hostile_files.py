"""Files that say or hold what cannot be: an error that names the file and the field; nothing runs, nothing is cast."""

import json
import pickle

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from helpers import TINY
from raftmlp.checkpoints.description import check_description
from raftmlp.checkpoints.weights import load_state_dict, read_description, save_state_dict
from raftmlp.cli import convert, export, predict, train, validate
from raftmlp.config import ModelSettings
from raftmlp.errors import UserError
from raftmlp.model.create import create_model

NAN, DEEP = float("nan"), json.loads("[" * 900 + "]" * 900)
KWARGS = dict(embed_dims=(8,) * 4, depths=(1,) * 4)


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    return timm.create_model("raftmlp_digits", num_classes=10, **KWARGS)


# What a file says


@pytest.mark.parametrize(
    "field, value",
    [
        *(("model", value) for value in (1, "x" * 5000, "a\x1b[31m\n", "\ud800", ["a"], b"a")),
        *(("model_kwargs", value) for value in ("what", [1], {1: 2}, torch.ones(3))),
        *(("pretrained_cfg", value) for value in (True, DEEP)),
        *(("num_classes", value) for value in (True, -1, 0.5, 10**30, 10**5000, NAN, "1")),
        *(("input_size", value) for value in ([32, 32], [3, 0, 0], [3, 10**9, 10**9], [3.0, 32, 32], 3, DEEP)),
        *(("mean", value) for value in ([NAN] * 3, [True] * 3, "gray", [], ["a"], {"a": 1}, [0.5] * 2000)),
        *(("std", value) for value in ([0, 0, 0], [float("inf")] * 3)),
        *(("interpolation", value) for value in ("what", b"bilinear", ["bilinear"])),
        *(("crop_pct", value) for value in (0, -1, 10**30, float("inf"))),
        ("crop_mode", "what"),
        *(("label_names", value) for value in ("abc", [1], ["a\x1b[31m"])),
    ],
    ids=lambda value: repr(type(value).__name__),
)
def test_a_field_of_a_wrong_kind(field, value):
    is_cfg = field not in ("model", "model_kwargs", "pretrained_cfg")
    said = {"pretrained_cfg": {field: value}} if is_cfg else {field: value}
    with pytest.raises(UserError, match=rf"^mine.pth: (pretrained_cfg\.)?{field} must be ") as caught:
        check_description(said, "mine.pth")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "said, message",
    [
        (dict(model_kwargs=dict(embed_dims=[NAN])), ".embed_dims must be"),
        (dict(model_kwargs=dict(embed_dims=(8, 10**12))), ".embed_dims must be"),
        (dict(model_kwargs=dict(depths=DEEP)), ".depths must be"),
        (dict(model_kwargs=dict(a=torch.ones(1))), ".a must be"),
        (dict(model_kwargs=dict(token_mixing="a\n")), ".token_mixing must be"),
        (dict(model_kwargs={"a b": 1}), " must not have an argument 'a b'"),
        (dict(model_kwargs=dict(checkpoint_path="/etc/x")), " must not have an argument 'checkpoint_path'"),
        (dict(model_kwargs=dict(pretrained_cfg={})), " must not have an argument 'pretrained_cfg'"),
        (dict(pretrained_cfg=dict(num_classes=2, label_names=["a"])), ".label_names has 1 names for 2 classes"),
        (dict(pretrained_cfg=dict(input_size=(4, 8, 8), mean=(0.5, 0.5))), ".mean has 2 values, allowed are .1, 3, 4."),
    ],
)
def test_a_part_of_a_field_that_is_wrong(said, message):
    with pytest.raises(UserError, match=f"mine.pth: {next(iter(said))}{message}"):
        check_description(said, "mine.pth")


def test_what_timm_says_of_its_models_is_allowed_and_names_no_files():
    for name in timm.list_models("*mixer*"):
        cfg = timm.get_pretrained_cfg(name)
        checked = check_description(dict(model=name, pretrained_cfg=cfg.to_dict()), name)["pretrained_cfg"]
        assert checked["mean"] == tuple(cfg.mean) and not checked.keys() & {"url", "file", "hf_hub_id", "state_dict"}
    label_names = [b"caf\xe9".decode("utf-8", "surrogateescape")]  # a folder's
    assert check_description(dict(pretrained_cfg=dict(label_names=label_names)), "")["pretrained_cfg"]


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100000, '{"mean": [NaN, 0, 0]}', "\udcff"])
@pytest.mark.parametrize("place", ["metadata", "config.json"])
def test_damaged_json(place, text, tmp_path):
    file = tmp_path / "model.safetensors"
    if place == "metadata":
        save_state_dict({"a": torch.ones(1)}, file, dict(pretrained_cfg=text.replace("\udcff", "\\")))
    else:
        save_state_dict({"a": torch.ones(1)}, file)
        content = b'{"pretrained_cfg": ' + text.encode("utf-8", "surrogateescape") + b"}"
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        read_description(file)


# What a file holds


class Evil:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_bad_files(tmp_path, capfd):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing.pth"):
        load_state_dict(tmp_path / "missing.pth")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    torch.save({"a": Evil()}, tmp_path / "evil_zip.pth")
    bad = {"garbage.pth": b"this is no checkpoint", "garbage.safetensors": b"this is no checkpoint"}
    bad |= {"empty.pth": b"", "empty.safetensors": b"", "evil.pth": pickle.dumps(Evil())}
    bad["cut.pth"] = (tmp_path / "whole.pth").read_bytes()[:2000]
    bad["cut.safetensors"] = safetensors.torch.save({"a": torch.zeros(1000)})[:2000]
    bad["evil_zip.pth"] = (tmp_path / "evil_zip.pth").read_bytes()
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged") as caught:
            load_state_dict(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch's advice would run the code
    for content in ({"epoch": 3}, [1, 2], torch.zeros(3)):
        torch.save(content, tmp_path / "nothing.pth")
        with pytest.raises(ValueError, match="holds no weights"):
            load_state_dict(tmp_path / "nothing.pth")
    torch.save({3: torch.ones(1), "a": torch.ones(1)}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match="under the key 3: keys must be texts"):
        load_state_dict(tmp_path / "mine.pth")
    assert "code from a file ran" not in "".join(capfd.readouterr())


@pytest.mark.filterwarnings("ignore")  # torch's, of kinds that it wants to remove
@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.ones(2, dtype=torch.complex64), "is of torch.complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), "is of torch.float8_e4m3fn"),
        (torch.tensor([1, NAN]), "has values that are not finite"),
        (torch.tensor([float("-inf")], dtype=torch.bfloat16), "has values that are not finite"),
        (torch.eye(2).to_sparse(), "is no dense tensor"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "is no dense tensor"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "is no dense tensor"),
        (torch.ones(2, device="meta"), "is no dense tensor"),
        (torch.ones(1).expand(10**6, 10**6), "more than the file holds"),
    ],
    ids=str,
)
def test_tensors_that_cannot_be_weights(tensor, message, tmp_path):
    torch.save({"model": {"module.a": torch.ones(1), "module.b": tensor}}, tmp_path / "mine.pth")
    with pytest.raises(UserError, match=rf"mine.pth( is damaged.*|: 'b' .*{message}.*)"):
        load_state_dict(tmp_path / "mine.pth")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64], ids=str)
def test_weights_of_a_type_that_would_be_cast(dtype, digits, tmp_path):
    state = {**digits.state_dict(), "head.weight": digits.head.weight.detach().to(dtype)}
    torch.save(state, tmp_path / "mine.pth")
    settings = ModelSettings(model="raftmlp_digits", checkpoint=str(tmp_path / "mine.pth"), model_kwargs=KWARGS)
    with pytest.raises(UserError, match=f"mine.pth: '?head.weight'? is of {dtype}"):
        create_model(settings, classes=10)
    with pytest.raises(UserError, match=f"head.weight is of {dtype}"):
        digits.load_state_dict(state)
    cfg = dict(state_dict=state, num_classes=10, classifier="head", input_size=(3, 32, 32))
    with pytest.raises(UserError, match="head.weight"):
        timm.create_model("raftmlp_digits", pretrained=True, pretrained_cfg=cfg, **KWARGS)


def test_types_that_load_where_they_belong(digits, tmp_path):
    torch.save({key: value.to(torch.bfloat16) for key, value in digits.state_dict().items()}, tmp_path / "mine.pth")
    settings = ModelSettings(model="raftmlp_digits", checkpoint=str(tmp_path / "mine.pth"), model_kwargs=KWARGS)
    loaded = create_model(settings, classes=10)
    torch.testing.assert_close(loaded.head.weight, digits.head.weight, rtol=1e-2, atol=1e-2)
    model = timm.create_model("test_resnet", num_classes=3)
    model.state_dict()["bn1.num_batches_tracked"] += 7  # an integer
    torch.save({"arch": "test_resnet", "state_dict": model.state_dict()}, tmp_path / "mine.pth")
    loaded = create_model(ModelSettings(checkpoint=str(tmp_path / "mine.pth"), num_classes=3))
    assert loaded.bn1.num_batches_tracked == 7


# The commands


def test_the_commands_show_one_line(run_command, digits):
    cfg, state = dict(num_classes=10, input_size=(3, 32, 32)), digits.state_dict()
    good = dict(arch="raftmlp_digits", model_kwargs=KWARGS, pretrained_cfg=cfg, state_dict=state)
    Image.new("RGB", (8, 8)).save("digit.png")
    for name, wrong in {
        "cfg.pth": dict(pretrained_cfg=dict(cfg, mean="gray")),
        "huge.pth": dict(model_kwargs=dict(embed_dims=[2**20] * 4)),
        "flat.pth": dict(state_dict={key: torch.ones(1) for key in state}),
        "nan.pth": dict(state_dict={**state, "head.bias": state["head.bias"] * NAN}),
        "bool.pth": dict(state_dict={**state, "head.bias": state["head.bias"] > 0}),
    }.items():
        torch.save({**good, **wrong}, name)
        for command, *options in (
            (validate, "--dataset", "digits", "--checkpoint", name, "--workers", 0),
            (predict, "digit.png", "--checkpoint", name),
            (train, "--dataset", "digits", "--checkpoint", name, *TINY[:4], "--output", "run"),
            (export, "--checkpoint", name, "--format", "hf", "--out", "out"),
            (convert, name, "out.safetensors"),
        ):
            if command is convert and name in ("cfg.pth", "huge.pth"):
                continue  # it looks at the weights alone
            status, _, err = run_command(command, *options)
            assert status == 2 and len(err.splitlines()) == 1, (name, command.__name__, err)
            assert name in err or command is convert, err
