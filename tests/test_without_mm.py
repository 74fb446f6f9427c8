"""Without mmdet and mmseg: their commands say in one line what is missing; the scenes need neither."""

import subprocess
import sys

import pytest

from helpers import ROOT

CONFIG = "detection/mask_rcnn_raftmlp_digits"
PROGRAM = """
import runpy, sys
sys.modules.update(dict.fromkeys(("mmengine", "mmcv", "mmdet", "mmseg")))  # as if they were not installed
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__") if script.endswith(".py") else runpy.run_module(script, run_name="__main__")
"""


def run(*args):
    command = [sys.executable, "-c", PROGRAM, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["raftmlp", "train-mm", CONFIG],
        ["raftmlp", "eval-mm", CONFIG, "x.pth"],
        [ROOT / "tools" / "eval_mm.py", CONFIG, "x.pth"],
    ],
    ids=["console", "module", "script"],
)
def test_the_commands_say_what_is_missing(command):
    status, out, error = run(*command)
    assert status == 2 and not out
    assert "mmdet and mmseg are not installed" in error and "tools/install_mm.py" in error
    assert len(error.splitlines()) == 1


def test_scenes(tmp_path):
    status, out, error = run("raftmlp", "scenes", tmp_path / "scenes", "--train", 1, "--val", 1, "--size", 64)
    assert status == 0 and "1 + 1 scenes are in" in out, error
