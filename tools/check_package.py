#!/usr/bin/env python
"""Build the sdist and the wheel, and try both alone: no checkout, a new environment for every Python at hand.

    python tools/check_package.py

For each Python: install the wheel, train and evaluate on the digits in an empty folder, then the same from the sdist.
An environment takes some gigabytes and is removed after its turn; what is built stays in --output.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from raftmlp import __version__
from raftmlp.cli.console import run, say
from raftmlp.cli.options import Parser
from raftmlp.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = [f"python3.{minor}" for minor in (10, 11, 12, 13)]
TRIALS = (  # of the installed package, in an empty folder: a command of raftmlp and what it must print
    ("--version", f"raftmlp {__version__}"),
    ("validate --model raftmlp_digits --pretrained --dataset digits", "top-1 100.00 %"),
    ("train -c digits/raftmlp_digits --epochs 1 --warmup-epochs 0 --overwrite", "best top-1"),
)


def call(*command: object, **kwargs) -> str:
    """Run a command and return what it prints, or raise an error that ends with its last lines."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    if done.returncode:
        raise UserError("\n".join([f"{' '.join(map(str, command))} failed:", *done.stdout.splitlines()[-15:]]))
    return done.stdout


def try_archive(python: Path, archive: str, *options: str) -> None:
    """Install an archive into an environment and run the trials in an empty folder."""
    call(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *options, archive)
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as empty:
        for command, expected in TRIALS:
            shown = call(python.with_name("raftmlp"), *command.split(), cwd=empty, env=outside)
            if expected not in shown:
                raise UserError(f"raftmlp {command} printed no {expected!r}:\n{shown}")


def main() -> None:
    parser = Parser(yaml_config=False, description=__doc__)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="NAME", help="Pythons to try, those at hand")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="DIR", help="for the sdist and the wheel")
    args = parser.parse_args()

    for name, line in (("CITATION.cff", f"version: {__version__}"), ("CHANGELOG.md", f"## {__version__}")):
        if not re.search(rf"^{re.escape(line)}\b", (ROOT / name).read_text(), re.MULTILINE):
            raise UserError(f"{name} has no line {line!r}, the version of raftmlp/__init__.py")
    call(sys.executable, "-m", "build", "--outdir", args.output, ROOT)
    wheel, sdist = (f"{args.output}/raftmlp-{__version__}{end}" for end in ("-py3-none-any.whl", ".tar.gz"))
    call(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    say(f"built and checked: {wheel}, {sdist}")
    for name in args.pythons:
        if not shutil.which(name):
            say(f"{name} is not at hand: not tried")
            continue
        say(f"{name}: installing and trying, some minutes")
        with tempfile.TemporaryDirectory() as folder:
            call(name, "-m", "venv", folder)
            python = Path(folder, "bin", "python")
            try_archive(python, f"{wheel}[demo]")
            try_archive(python, sdist, "--force-reinstall", "--no-deps")
        say(f"{name}: wheel and sdist install and work alone")


if __name__ == "__main__":
    run(main)
