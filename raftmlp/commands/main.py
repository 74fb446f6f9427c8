"""The console command ``raftmlp``: lists the others in groups, and runs one."""

import difflib
import importlib
import sys

COMMANDS = {
    "classification": {
        "train": "train a model on images, on one device or many",
        "validate": "evaluate models on a data set, at any image sizes",
        "predict": "classify images",
    },
    "files": {
        "export": "write a model as ONNX, torch.export, AOTInductor, TorchScript, or for the Hugging Face Hub",
        "convert": "turn a checkpoint, the authors' 2021 release's or ours, into a safetensors file",
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
NAMES = [name for group in COMMANDS.values() for name in group]


def help_text() -> str:
    """Return the list of commands."""
    lines = ["usage: raftmlp COMMAND [OPTION ...]", "", "RaftMLP, an MLP vision backbone (arXiv 2108.04384)."]
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<11} {text}" for name, text in commands.items())]
    lines += [
        "",
        "raftmlp COMMAND --help lists a command's options. Recipes by name: raftmlp train -c imagenet/raftmlp_s",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command that the command line names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return
    if name == "--version":
        from .. import __version__

        print(f"raftmlp {__version__}")
        return
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(NAMES)}"
        print(f"raftmlp: error: unknown command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"raftmlp {name}", *rest]
    module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    from .console import run  # with torch behind it: not for --help

    run(module.main)
