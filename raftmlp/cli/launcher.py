"""The console command ``raftmlp``: lists the others in groups, and runs one.

It loads no torch, which takes seconds: the list, a wrong name and a command's options do not wait for it.
"""

import difflib
import importlib
import importlib.metadata
import os
import sys

from .streams import discard_output, prepare_streams

COMMANDS = {
    "classification": {
        "train": "train a model on images, on one device or many",
        "validate": "evaluate models on a data set, at any image sizes",
        "predict": "classify images",
        "inspect": "draw what a trained RaftMLP has learnt: weights, receptive fields, updates",
        "study": "train several networks with several seeds, and compare them",
    },
    "files": {
        "export": "write a model as ONNX, torch.export, AOTInductor, TorchScript, or for the Hugging Face Hub",
        "convert": "turn a checkpoint, the authors' 2021 release's or ours, into a safetensors file",
        "predict-onnx": "classify images with an exported ONNX file, without PyTorch",
    },
    "detection and segmentation (needs mmdet and mmseg)": {
        "train-mm": "train a detector or a segmentor",
        "eval-mm": "evaluate one, and draw its predictions beside the truth",
        "predict-mm": "find objects in images, or segment them",
        "scenes": "write scenes of handwritten digits to train them on",
    },
    "speed": {
        "benchmark": "compare how fast models are",
    },
}
# rounds that a waiting thread of OpenMP keeps its core; the default of 300,000 costs ten times the time on busy cores
SPINS = "10000"
NAMES = [name for group in COMMANDS.values() for name in group]


def help_text() -> str:
    """Return the list of commands."""
    lines = ["usage: raftmlp COMMAND [OPTION ...]", "", "RaftMLP, an MLP vision backbone (arXiv 2108.04384)."]
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<12} {text}" for name, text in commands.items())]
    lines += [
        "",
        "raftmlp COMMAND --help lists a command's options. Recipes by name: raftmlp train -c imagenet/raftmlp_s",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command that the command line names."""
    prepare_streams()
    if "OMP_WAIT_POLICY" not in os.environ:  # OpenMP reads both when torch is loaded
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        name = choose()
        sys.argv = [f"raftmlp {name}", *sys.argv[2:]]
        from .console import run

        run(lambda: importlib.import_module(f"raftmlp.cli.{name.replace('-', '_')}").main())
    except KeyboardInterrupt:  # later, the command handles it
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # "| head"
        discard_output()
        sys.exit(1)


def load_package() -> None:
    """Import torch, timm and our models, after the options have been parsed without them; a terminal shows a line."""
    shown = sys.stderr if sys.stderr.isatty() and "torch" not in sys.modules else None
    if shown:
        print("loading PyTorch ...", end="", file=shown, flush=True)
    try:
        importlib.import_module("raftmlp.model.raftmlp")
    finally:
        if shown:
            print("\r" + " " * 19 + "\r", end="", file=shown, flush=True)


def choose() -> str:
    """Return the name of the command on the command line; lists them, or refuses an unknown one, and exits."""
    name = (sys.argv[1:] or ["--help"])[0]
    if name in ("-h", "--help"):
        print(help_text())
        sys.exit()
    if name == "--version":
        print(f"raftmlp {importlib.metadata.version('raftmlp')}")
        sys.exit()
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(NAMES)}"
        print(f"raftmlp: error: unknown command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    return name
