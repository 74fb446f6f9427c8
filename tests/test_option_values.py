"""Every field of the settings with values of every wrong kind, from YAML and from Python: one clear error."""

import math
from dataclasses import fields

import pytest
import yaml

from raftmlp.cli.train import build_parser
from raftmlp.errors import UserError
from raftmlp.settings import Number
from raftmlp.train.settings import TrainSettings, without_effect

PARSER = build_parser()
ANY = ([], [[1]], [None], {"a": 1}, True, math.nan, -(10**30), "", "1:00")
FIELDS = fields(TrainSettings)


def is_allowed(entry, value) -> bool:
    """Return whether a field takes a value of ANY."""
    if entry.type in (bool, bool | None):
        return value is True
    if isinstance(entry.default_factory, type(dict)) and entry.default_factory is dict:
        return isinstance(value, dict)
    if isinstance(entry.metadata["type"], Number) or entry.metadata.get("choices"):
        return value in entry.metadata.get("choices", ())
    return isinstance(value, str) and (value != "" or entry.default == "")


def is_text(entry) -> bool:
    """Return whether a field takes any text: a number in YAML is one."""
    return entry.type in (str, str | None) and not entry.metadata.get("choices")


def is_number(value) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


CASES = [(entry, value) for entry in FIELDS for value in ANY if not is_allowed(entry, value)]


def ids(case):
    return getattr(case, "name", None) or repr(case)


@pytest.mark.parametrize(
    ("entry", "value"), [(e, v) for e, v in CASES if not (is_text(e) and (is_number(v) or v == ""))], ids=ids
)
def test_yaml(tmp_path, entry, value):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({entry.name: value}))
    with pytest.raises(UserError, match=f"run.yaml: {entry.name}"):
        PARSER.parse_args(["-c", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(("entry", "value"), CASES, ids=ids)
def test_python(entry, value):
    with pytest.raises(UserError, match=f"^{entry.name} (must|takes)"):
        TrainSettings(**{entry.name: value})


@pytest.mark.parametrize("name", ["output", "checkpoint", "data_dir", "export"])
def test_an_empty_text_of_the_command_line(name):
    args = build_parser().parse_args([f"--{name.replace('_', '-')}", ""])
    with pytest.raises(UserError, match=f"{name} must not be empty"):
        TrainSettings.select(vars(args))


def test_there_are_many_cases():
    assert len(CASES) > 400


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(), []),
        (dict(mixup_prob=0.5), ["--mixup-prob"]),
        (dict(mixup_prob=0.5, cutmix=1.0), []),
        (dict(mixup_prob=0.5, mixup=1.0, cutmix=1.0, mixup_then_cutmix=True), ["--mixup-prob"]),
        (dict(mixup_then_cutmix=True), ["--mixup-then-cutmix"]),
        (dict(scale=(0.5, 1.0), train_crop_mode="random"), ["--scale"]),
        (dict(color_jitter=0.1, aa="rand-m9"), ["--color-jitter"]),
        (dict(clip_mode="agc", model_ema_decay=0.9), ["--clip-mode", "--model-ema-decay"]),
    ],
)
def test_options_without_an_effect_are_named(given, named):
    assert [line.split()[0] for line in without_effect(TrainSettings(**given))] == named
