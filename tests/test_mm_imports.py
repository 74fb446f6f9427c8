"""Importing raftmlp.mm, its modules and their commands registers the backbone and changes nothing else."""

import subprocess
import sys

from helpers import ROOT

PROGRAM = """
import importlib, logging, multiprocessing, signal, sys
import mmdet, mmseg, mmengine.runner.checkpoint
from mmengine.analysis import complexity_analysis
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import backends
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader

def state():
    checkpoint = mmengine.runner.checkpoint
    return dict(
        signals={number: signal.getsignal(number) for number in signal.valid_signals()},
        children=multiprocessing.active_children(),
        hooks=(sys.excepthook, sys.stdout, sys.stderr, list(logging.getLogger().handlers)),
        functions={name: getattr(checkpoint, name) for name in ("load_from_http", "_safe_torch_load")},
        schemes=dict(CheckpointLoader._schemes),
        backends=(dict(backends.backends), dict(backends.prefix_to_backends)),
        packages=dict(MODULE2PACKAGE),
        operators=dict(complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS),
        models=set(MODELS.module_dict),
        registries={name: set(child.module_dict) for name, child in MODELS.children.items()},
    )

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = state()
assert after.pop("models") - before.pop("models") == {"RaftMLP"}
changed = {key for key in before if before[key] != after[key]}
assert not changed, changed

from raftmlp.mm.checkpoints import patch_mmengine
patch_mmengine()
once = state()
patch_mmengine()
changed = {key for key in before if before[key] != once[key]}
assert changed == {"functions", "schemes", "backends", "packages"}, changed  # the comparison sees what is changed
assert state() == once
"""


def test_nothing_but_the_backbone_is_registered():
    modules = ["raftmlp.mm"] + [f"raftmlp.mm.{path.stem}" for path in (ROOT / "raftmlp" / "mm").glob("[a-z]*.py")]
    modules += ["raftmlp.cli.mm_options", "raftmlp.cli.scenes", "raftmlp.data.scenes"]
    modules += [f"raftmlp.cli.{path.stem}" for path in (ROOT / "raftmlp" / "commands").glob("*_mm.py")]
    assert len(modules) >= 14
    result = subprocess.run([sys.executable, "-c", PROGRAM, *modules], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert not result.stdout
