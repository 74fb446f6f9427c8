"""Typed settings: checked alike from Python, the command line and YAML files."""

import shlex
from dataclasses import asdict, dataclass

import pytest

from raftmlp.cli.config_files import find_config
from raftmlp.cli.options import Parser, output_file, output_folder
from raftmlp.config import ModelSettings
from raftmlp.errors import UserError
from raftmlp.settings import Number, Settings, option
from raftmlp.sizes import as_size, check_memory, parse_size, size_name


@dataclass(kw_only=True)
class Shape(Settings):
    title = "shape"
    sides: list[int] | None = option(None, "lengths", type=Number(int, 1), nargs=2, metavar="N")
    colour: str = option("red", "colour", choices=("red", "green"))


@dataclass(kw_only=True)
class Drawing(Shape):
    title = "drawing"
    copies: int = option(1, "how many", type=Number(int, 1, 9), short="-n", metavar="N")
    scale: float = option(0.5, "size", type=Number(float, 0), metavar="X")
    framed: bool = option(False, "with a frame")
    size: tuple[int, int] | None = option(None, "size", type=parse_size, metavar="SIZE")
    more: dict = option(factory=dict, help="more", metavar="KEY=VALUE")


@pytest.fixture
def parser():
    parser = Parser(prog="draw", description="Draws.")
    parser.add_settings(Drawing)
    return parser


def test_options_become_settings(parser):
    args = parser.parse_args(shlex.split("-n 3 --sides 4 5 --framed --scale 2 --size 8x9 --more a=1 b=x"))
    settings = Drawing.select({**vars(args), "other": 1})
    expected = dict(sides=[4, 5], colour="red", copies=3, scale=2.0, framed=True, size=(8, 9), more={"a": 1, "b": "x"})
    assert asdict(settings) == expected
    assert asdict(Drawing.select(vars(parser.parse_args([])))) == asdict(Drawing())
    assert parser.parse_args(["--framed", "--no-framed"]).framed is False


def test_help_has_a_group_for_each_class_and_the_defaults(parser):
    text = parser.format_help()
    shape, drawing = text.split("shape:")[1].split("drawing:")
    assert "--sides N N" in shape and "colour (default: red)" in shape and "--copies" not in shape
    assert "-n N, --copies N" in drawing and "how many (default: 1)" in drawing and "with a frame\n" in drawing


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dict(copies=0), "copies must be a whole number from 1 to 9, not 0"),
        (dict(copies=2.0), "copies must be a whole number from 1 to 9, not 2.0"),
        (dict(copies=True), "copies must be a whole number from 1 to 9, not True"),
        (dict(scale=float("nan")), "scale must be a number of 0 or more, not nan"),
        (dict(scale="1"), "scale must be a number of 0 or more, not '1'"),
        (dict(scale=None), "scale must be a number of 0 or more, not None"),
        (dict(sides=[1]), "sides takes 2 values"),
        (dict(sides=3), "sides must be a sequence"),
        (dict(sides=[1, 0]), "sides must be a whole number of 1 or more, not 0"),
        (dict(colour="blue"), "colour must be one of 'red', 'green', not 'blue'"),
        (dict(framed="yes"), "framed must be true or false, not 'yes'"),
    ],
)
def test_values_given_in_python_are_checked(value, message):
    with pytest.raises(ValueError, match=message):
        Drawing(**value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--copies 0", "argument -n/--copies: must be a whole number from 1 to 9, not '0'"),
        ("--scale inf", "argument --scale: must be a number of 0 or more, not 'inf'"),
        ("--sides 3", "--sides: expected 2 arguments"),
        ("--colour blue", "invalid choice: 'blue'"),
        ("--size 3x", "argument --size: '3x' must be a number of pixels or HEIGHTxWIDTH"),
        ("--framd", "unrecognized arguments: --framd; did you mean --framed"),
        ("--more a", "expected KEY=VALUE pairs"),
        ("-c", "argument -c/--config: expected one argument (--help lists the options)"),
    ],
)
def test_values_of_the_command_line_are_checked(parser, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_yaml_files_inherit_and_the_command_line_wins(parser, tmp_path):
    (tmp_path / "base.yaml").write_text("copies: 7\nscale: 0.25\nmore: {a: [1, 2]}\nframed: true\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nscale: 3\nsides: [1, 2]\nsize: 4x5\n")
    args = parser.parse_args(["-c", str(tmp_path / "run.yaml"), "--copies", "2", "--no-framed"])
    assert (args.copies, args.scale, args.sides, args.size) == (2, 3.0, [1, 2], (4, 5))
    assert args.more == {"a": [1, 2]} and args.framed is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("copis: 3", "unknown key 'copis'; did you mean copies"),
        ("copies: big", "copies: must be a whole number from 1 to 9, not 'big'"),
        ("copies:", "copies has no value"),
        ("sides: [1]", "sides takes 2 values"),
        ("framed: perhaps", "framed must be true or false, not 'perhaps'"),
        ("more: [1]", "more must be a mapping"),
        ("a: [1", "run.yaml, line 1: expected"),
        ("- 1", "must be a mapping"),
        ("1: 2", "must be a mapping"),
        ("base: run.yaml", "is its own base"),
        ("base: [a]", "base must be the name of a file"),
        ("base: nowhere.yaml", "cannot read the config"),
        ("copies: 2\nscale: 1\ncopies: 3", "line 3: copies stands here twice"),
        ("more: {a: 1, a: 2}", "line 1: a stands here twice"),
        ("copies: 1:00", "copies: must be a whole number from 1 to 9, not '1:00'"),
        ("size:", "line 1: size has no value"),
        ("colour: [red]", r"colour must be a number or a text, not \['red'\]"),
        ("colour: {a: 1}", "colour must be a number or a text, not {'a': 1}"),
        ("colour: true", "colour must be a number or a text, not True"),
        ("sides: []", "sides must be one or more numbers or texts"),
        ("sides: [[1], 2]", "sides must be one or more numbers or texts"),
        ("more: &a {b: 1}\nsize: *a", "line 2: aliases are not allowed"),
        ("more: " + "[" * 20000, "is nested too deeply"),
        ("copies: " + "9" * 5000, "is no YAML file"),
        ("copies: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_bad_yaml_files_are_named(parser, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parser.parse_args(["-c", str(tmp_path / "run.yaml")])


def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet/raftmlp_s", "imagenet/raftmlp_s.yaml", "configs/imagenet/raftmlp_s.yaml"):
        assert find_config(name).read_text().startswith("# ImageNet-1k, RaftMLP-S")
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "raftmlp_s.yaml").write_text("mine: 1")
    assert find_config("imagenet/raftmlp_s.yaml").read_text() == "mine: 1"
    with pytest.raises(UserError, match="no config imagenet/raftmlp_ss; did you mean imagenet/raftmlp_s"):
        find_config("imagenet/raftmlp_ss")
    with pytest.raises(UserError, match="no config folder; did you mean finetune/folder"):
        find_config("folder")
    with pytest.raises(
        UserError, match="no config mask_rcnn_raftmlp_digit; did you mean detection/mask_rcnn_raftmlp_digits"
    ):
        find_config("mask_rcnn_raftmlp_digit", ".py")
    with pytest.raises(UserError, match="no config missing.yaml; shipped are digits/raftmlp_digits, "):
        find_config("missing.yaml")
    with pytest.raises(UserError, match="no config 'nnn.*File name too long"):
        find_config("n" * 5000)


def test_numbers_in_yaml_are_those_of_yaml_1_2(parser, tmp_path):
    (tmp_path / "run.yaml").write_text("copies: 007\nscale: 1e-3\nmore: {a: 010, b: 1e3, c: 1:30, d: 2024-01-01}\n")
    args = parser.parse_args(["-c", str(tmp_path / "run.yaml")])
    assert (args.copies, args.scale) == (7, 1e-3)
    assert args.more == {"a": 10, "b": 1000.0, "c": "1:30", "d": "2024-01-01"}


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    parse = output_file(".png", ".jpg")
    assert parse(str(tmp_path / "new" / "a.png")).parent.is_dir()
    for name, message in (("a.txt", "must be named .png or .jpg"), ("file/a.png", "cannot write .*file/a.png")):
        with pytest.raises(Exception, match=message):
            parse(str(tmp_path / name))
    with pytest.raises(UserError, match="cannot write into .*file/run"):
        output_folder(str(tmp_path / "file" / "run"))


def test_sizes():
    assert parse_size("224") == (224, 224) and parse_size("800x1333") == (800, 1333)
    assert size_name((224, 224)) == "224" and size_name([800, 1333]) == "800x1333"
    assert as_size([7]) == (7, 7) and as_size([7, 9]) == (7, 9)
    for text in ("0", "axb", "3x", "1x2x3", "-1", "1.5", ""):
        with pytest.raises(ValueError, match="must be a number of pixels or HEIGHTxWIDTH"):
            parse_size(text)
    with pytest.raises(ValueError, match="one number of pixels, or height and width"):
        as_size([1, 2, 3])


def test_sizes_that_cannot_fit_into_the_memory(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**18}[name])  # 1 GiB
    check_memory((1, 16384, 16384))
    with pytest.raises(UserError, match="^1 image of 16384 pixels takes 3 GiB, the memory has 1: .*image size$"):
        check_memory((3, 16384, 16384))
    with pytest.raises(UserError, match="^700 images of 512x800 pixels take 3 GiB, the memory has 1: .*--batch-size$"):
        check_memory((3, 512, 800), 700)


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
        settings = ModelSettings.select(vars(parser.parse_args(options)))
        assert (settings.img_size, settings.size) == (sides, size)


@pytest.mark.parametrize("words", ["0", "28x", "28x0", "x40", "28,40", "28X40"])
def test_image_sizes_that_are_none(capsys, words):
    parser = Parser(prog="draw")
    parser.add_settings(ModelSettings)
    with pytest.raises(SystemExit):
        parser.parse_args(["--img-size", words])
    error = capsys.readouterr().err
    assert "--img-size" in error and words in error and error.count("\n") == 1


def test_more_than_two_sides_are_refused():
    with pytest.raises(UserError, match="--img-size takes .* 28 40 28"):
        _ = ModelSettings(img_size=[(28, 40), 28]).size
