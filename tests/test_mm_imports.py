"""Importing raftmlp.mm and its modules registers the backbone and changes nothing else."""

import subprocess
import sys

from helpers import ROOT

PROGRAM = """
import importlib, sys
import mmdet, mmseg, mmengine.runner.checkpoint as checkpoint
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import backends
from mmengine.registry import MODELS

def state():
    functions = checkpoint.load_from_http, checkpoint._safe_torch_load
    files = dict(backends.backends), dict(backends.prefix_to_backends)
    return functions, files, dict(checkpoint.CheckpointLoader._schemes), dict(MODULE2PACKAGE), sys.excepthook

before, models = state(), set(MODELS.module_dict)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert state() == before and set(MODELS.module_dict) - models == {"RaftMLP"}
importlib.import_module("raftmlp.mm.checkpoints").patch_mmengine()
assert state() != before
"""


def test_nothing_but_the_backbone_is_registered():
    modules = [f"raftmlp.mm.{path.stem}" for path in (ROOT / "raftmlp" / "mm").glob("[a-z]*.py")]
    result = subprocess.run([sys.executable, "-c", PROGRAM, *modules], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and not result.stdout, result.stderr
