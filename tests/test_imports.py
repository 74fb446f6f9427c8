"""An import changes nothing: no child processes, handlers, exit hooks, patches or output."""

import pkgutil
import subprocess
import sys

import raftmlp

MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(raftmlp.__path__, "raftmlp.", onerror=lambda name: None)
    if not name.startswith(("raftmlp.mm", "raftmlp.__main__")) and not name.endswith("_mm")  # these need mmengine
)

CODE = """
import atexit, importlib, logging, multiprocessing, os, signal, sys, warnings
import torch, timm, torchvision, torch.utils.data, torch.distributed, torch.utils.flop_counter
import tqdm, yaml, PIL.Image, matplotlib.figure, huggingface_hub, filelock, timm.task, timm.data
import torch.export, torch.fx, torch.profiler, torch._inductor.codegen.cpp_wrapper_cpu

def state():
    return dict(
        signals={n: signal.getsignal(n) for n in signal.valid_signals()},
        exit_hooks=atexit._ncallbacks(),
        children=multiprocessing.active_children(),
        environment=dict(os.environ),
        path=list(sys.path),
        hook=sys.excepthook,
        handlers=[*logging.root.handlers, *logging.getLogger("raftmlp").handlers],
        level=(logging.root.level, logging.getLogger("raftmlp").level),
        filters=list(warnings.filters),
        threads=torch.get_num_threads(),
        precision=torch.get_float32_matmul_precision(),
        seed=torch.initial_seed(),
        functions=(torch.load, torch.save, timm.create_model, timm.models.load_checkpoint),
        folder=os.getcwd(),
    )

before, models = state(), set(timm.list_models())
for name in sys.argv[1:]:
    importlib.import_module(name)
    after = state()
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, (name, changed, [(before[key], after[key]) for key in changed])
assert all(model.startswith("raftmlp_") for model in set(timm.list_models()) - models)
"""


def test_imports_change_nothing():
    assert len(MODULES) > 30
    done = subprocess.run([sys.executable, "-c", CODE, *MODULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_the_model_needs_torch_and_timm_alone_and_is_silent():
    optional = "('mmengine', 'sklearn', 'matplotlib', 'tqdm', 'yaml', 'filelock', 'pydantic', 'einops')"
    code = (
        f"import sys, timm; had = set(sys.modules); import raftmlp; print(set({optional}) & (set(sys.modules) - had))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_the_import_does_not_look_for_weights():
    code = """
import sys, timm
seen = []
events = ("open", "os.listdir", "os.scandir", "pathlib.Path.glob")
sys.addaudithook(lambda event, args: seen.append(1) if event in events and str(args[0]).endswith("weights") else 0)
import raftmlp
assert not seen, seen
timm.create_model("raftmlp_digits", pretrained=True)
assert seen
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
