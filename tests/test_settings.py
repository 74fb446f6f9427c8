"""Typed settings: checked alike from Python, the command line and YAML files."""

import math
import shlex
from dataclasses import asdict, fields
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import AfterValidator

from raftmlp.cli.config_files import find_config
from raftmlp.cli.options import Parser, option_type, output_file, output_folder
from raftmlp.cli.train import build_parser
from raftmlp.config import ModelSettings
from raftmlp.errors import UserError
from raftmlp.settings import Count, NonNegative, Settings, Text, between, option, settings
from raftmlp.sizes import Sides, as_size, check_memory, parse_size, size_name
from raftmlp.train.settings import TrainSettings, without_effect


@settings
class Shape(Settings):
    title = "shape"
    sides: tuple[Count, Count] | None = option(None, "lengths")
    color: Literal["red", "green"] = option("red", "color")


@settings
class Drawing(Shape):
    title = "drawing"
    copies: between(1, 9) = option(1, "how many", short="-n")
    scale: NonNegative = option(0.5, "size")
    framed: bool = option(False, "with a frame")
    size: Sides | None = option(None, "size", metavar="SIZE")
    name: Annotated[Text, AfterValidator(str.upper)] | None = option(None, "title")
    more: dict = option(factory=dict, help="more", metavar="KEY=VALUE")


@pytest.fixture
def parser():
    parser = Parser(prog="draw", description="Draws.")
    parser.add_settings(Drawing)
    return parser


def test_options_become_settings(parser):
    args = parser.parse_args(shlex.split("-n 3 --sides 4 5 --framed --scale 2 --size 8x9 --name a --more a=1 b=x"))
    drawing = Drawing.select({**vars(args), "other": 1})
    expected = dict(sides=(4, 5), color="red", copies=3, scale=2.0, framed=True, size=[8, 9], name="A")
    assert asdict(drawing) == {**expected, "more": {"a": 1, "b": "x"}}
    assert asdict(Drawing.select(vars(parser.parse_args([])))) == asdict(Drawing())
    assert parser.parse_args(["--framed", "--no-framed"]).framed is False


def test_help_has_a_group_for_each_class_and_the_defaults(parser):
    text = parser.format_help()
    shape, drawing = text.split("shape:")[1].split("drawing:")
    assert "--sides N N" in shape and "color (default: red)" in shape and "--copies" not in shape
    assert "-n N, --copies N" in drawing and "how many (default: 1)" in drawing and "with a frame\n" in drawing


# values that no field of their kind takes, and what the message names
WRONG = [
    ("copies", 0, "0"),
    ("copies", 10, "10"),
    ("copies", 2.5, "2.5"),
    ("copies", True, "True"),
    ("copies", "1:00", "1:00"),
    ("copies", None, "None"),
    ("scale", math.nan, "nan"),
    ("scale", -1, "-1"),
    ("scale", {"a": 1}, "{'a': 1}"),
    ("sides", [1], "sides"),
    ("sides", [1, 0], "0"),
    ("sides", [], "sides"),
    ("color", "blue", "blue"),
    ("color", ["red"], "red"),
    ("framed", "perhaps", "perhaps"),
    ("name", "", "''"),
    ("name", [None], "None"),
    ("size", [1, 2, 3], "3"),
    ("more", [1], "1"),
]


@pytest.mark.parametrize(("name", "value", "named"), WRONG)
def test_wrong_values(parser, tmp_path, name, value, named):
    with pytest.raises(UserError, match=f"^{name} ") as error:
        Drawing.select({name: value})
    assert named in str(error.value)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({name: value}))
    with pytest.raises(UserError, match=f"run.yaml: {name} ") as error:
        parser.parse_args(["-c", str(tmp_path / "run.yaml")])
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["modes: [eager, fast]", "modes: 3", "count: many", "flag: 1"])
def test_options_that_are_no_settings(parser, tmp_path, text):
    parser.add_argument("--modes", nargs="+", choices=("eager", "compile"))
    parser.add_argument("--count", type=option_type(Count))
    parser.add_argument("--flag", action="store_true")
    (tmp_path / "run.yaml").write_text("modes: eager\ncount: 3\nflag: true\n")
    args = parser.parse_args(["-c", str(tmp_path / "run.yaml")])
    assert (args.modes, args.count, args.flag) == (["eager"], 3, True)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=f"run.yaml: {text.partition(':')[0]} "):
        parser.parse_args(["-c", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("entry", fields(TrainSettings), ids=lambda entry: entry.name)
def test_no_option_of_training_takes_what_has_no_meaning(entry):
    """A mapping of lists is a value of no option but those of KEY=VALUE pairs; not a number neither."""
    for value in ({"a": [1]}, math.nan):
        if not (entry.name == "model_kwargs" or (value != value and "str" in str(entry.type))):
            with pytest.raises(UserError, match=entry.name):
                TrainSettings.select({entry.name: value})


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--copies 0", "-n/--copies"),
        ("--scale inf", "--scale"),
        ("--sides 3", "--sides"),
        ("--color blue", "blue"),
        ("--size 3x", "3x"),
        ("--name=", "--name"),
        ("--framd", "did you mean --framed"),
        ("--more a", "KEY=VALUE"),
        ("-c", "-c/--config"),
    ],
)
def test_wrong_words_of_the_command_line(parser, capsys, words, named):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and named in error and error.count("\n") == 1


def test_yaml_files_inherit_and_the_command_line_wins(parser, tmp_path):
    (tmp_path / "base.yaml").write_text("copies: 7\nscale: 0.25\nmore: {a: [1, 2]}\nframed: true\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nscale: 3\nsides: [1, 2]\nsize: 4x5\nname: 12\n")
    args = parser.parse_args(["-c", str(tmp_path / "run.yaml"), "--copies", "2", "--no-framed"])
    assert (args.copies, args.scale, args.sides, args.size, args.name) == (2, 3.0, (1, 2), [4, 5], "12")
    assert args.more == {"a": [1, 2]} and args.framed is False


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("copis: 3", "did you mean copies"),
        ("copies:", "copies"),
        ("a: [1", "line 1"),
        ("- 1", "mapping"),
        ("base: run.yaml", "its own base"),
        ("base: [a]", "base"),
        ("base: nowhere.yaml", "nowhere.yaml"),
        ("copies: 2\nscale: 1\ncopies: 3", "line 3: copies"),
        ("more: {a: 1, a: 2}", "line 1: a"),
        ("more: &a {b: 1}\nsize: *a", "line 2"),
        ("more: " + "[" * 20000, "nested"),
        ("copies: " + "9" * 5000, "run.yaml"),
        ("copies: !!python/object/apply:os.getcwd []", "constructor"),
    ],
)
def test_bad_yaml_files_are_named(parser, tmp_path, text, named):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=named):
        parser.parse_args(["-c", str(tmp_path / "run.yaml")])


def test_numbers_in_yaml_are_those_of_yaml_1_2(parser, tmp_path):
    (tmp_path / "run.yaml").write_text("copies: 007\nscale: 1e-3\nmore: {a: 010, b: 1e3, c: 1:30, d: 2024-01-01}\n")
    args = parser.parse_args(["-c", str(tmp_path / "run.yaml")])
    assert (args.copies, args.scale) == (7, 1e-3)
    assert args.more == {"a": 10, "b": 1000.0, "c": "1:30", "d": "2024-01-01"}


def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet/raftmlp_s", "imagenet/raftmlp_s.yaml", "configs/imagenet/raftmlp_s.yaml"):
        assert "base: " in find_config(name).read_text()
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "raftmlp_s.yaml").write_text("mine: 1")
    assert find_config("imagenet/raftmlp_s.yaml").read_text() == "mine: 1"
    for name, suffix, named in (
        ("imagenet/raftmlp_ss", ".yaml", "did you mean imagenet/raftmlp_s"),
        ("folder", ".yaml", "did you mean finetune/folder"),
        ("mask_rcnn_raftmlp_digit", ".py", "detection/mask_rcnn_raftmlp_digits"),
        ("missing.yaml", ".yaml", "digits/raftmlp_digits, "),
        ("n" * 5000, ".yaml", "File name too long"),
    ):
        with pytest.raises(UserError, match=named):
            find_config(name, suffix)


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    parse = output_file(".png", ".jpg")
    assert parse(str(tmp_path / "new" / "a.png")).parent.is_dir()
    for name in ("a.txt", "file/a.png"):
        with pytest.raises(Exception, match=name):
            parse(str(tmp_path / name))
    with pytest.raises(UserError, match="file/run"):
        output_folder(str(tmp_path / "file" / "run"))


def test_sizes():
    assert parse_size("224") == (224, 224) and parse_size("800x1333") == (800, 1333)
    assert size_name((224, 224)) == "224" and size_name([800, 1333]) == "800x1333"
    assert as_size([7]) == (7, 7) and as_size([7, 9]) == (7, 9) and as_size("7x9") == (7, 9)
    for text in ("0", "axb", "3x", "1x2x3", "-1", "1.5", "", "28,40", "28X40"):
        with pytest.raises(UserError):
            as_size(text)
        with pytest.raises(UserError):
            parse_size(text)


@pytest.mark.parametrize(
    ("words", "yaml", "sides", "size"),
    [
        ("64", "64", [64], (64, 64)),
        ("28x40", "28x40", [28, 40], (28, 40)),
        ("320 480", "[320, 480]", [320, 480], (320, 480)),
    ],
)
def test_image_sizes(tmp_path, words, yaml, sides, size):
    parser = Parser(prog="draw")
    parser.add_settings(ModelSettings)
    (tmp_path / "run.yaml").write_text(f"img_size: {yaml}\n")
    for options in (["--img-size", *words.split()], ["-c", str(tmp_path / "run.yaml")]):
        args = parser.parse_args(options)
        assert (args.img_size, ModelSettings.select(vars(args)).size) == (sides, size)


def test_sizes_that_cannot_fit_into_the_memory(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**18}[name])  # 1 GiB
    check_memory((1, 16384, 16384))
    with pytest.raises(UserError, match="16384 pixels .* 3 GiB"):
        check_memory((3, 16384, 16384))
    with pytest.raises(UserError, match="700 images of 512x800 pixels .*--batch-size"):
        check_memory((3, 512, 800), 700)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(), []),
        (dict(mixup_prob=0.5), ["--mixup-prob"]),
        (dict(mixup_prob=0.5, cutmix=1.0), []),
        (dict(mixup_prob=0.5, mixup=1.0, cutmix=1.0, mixup_then_cutmix=True), ["--mixup-prob"]),
        (dict(scale=(0.5, 1.0), train_crop_mode="random"), ["--scale"]),
        (dict(color_jitter=0.1, aa="rand-m9"), ["--color-jitter"]),
        (dict(clip_mode="agc", model_ema_decay=0.9), ["--clip-mode", "--model-ema-decay"]),
    ],
)
def test_options_without_an_effect_are_named(given, named):
    assert [line.split()[0] for line in without_effect(TrainSettings(**given))] == named


def test_recipes_of_training_are_read_as_they_are_written():
    args = build_parser().parse_args(["-c", "imagenet/raftmlp_s_modern"])
    again = TrainSettings.select(yaml.safe_load(yaml.safe_dump(asdict(TrainSettings.select(vars(args))))))
    assert again == TrainSettings.select(vars(args))
