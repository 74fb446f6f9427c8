"""Without mmdet and mmseg their commands say in one line what is missing."""

import subprocess
import sys

from helpers import ROOT

PROGRAM = """
import runpy, sys
sys.modules.update(dict.fromkeys(("mmengine", "mmcv", "mmdet", "mmseg")))  # as if they were not installed
sys.argv = ["raftmlp", "train-mm", "detection/mask_rcnn_raftmlp_digits"]
runpy.run_module("raftmlp", run_name="__main__")
"""


def test_the_commands_say_what_is_missing():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and not result.stdout
    assert "tools/install_mm.py" in result.stderr and len(result.stderr.splitlines()) == 1
