#!/usr/bin/env python
"""Build the sdist and the wheel, and try both alone: no checkout, a new environment for every Python at hand.

    python tools/release_check.py

For each Python: install the wheel, train and evaluate on the digits in an empty folder, then the same from the sdist.
An environment takes some gigabytes and is removed after its turn; what is built stays in --output.
"""

import os
import re
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
    (["--version"], f"raftmlp {__version__}"),
    (["validate", "--model", "raftmlp_digits", "--pretrained", "--dataset", "digits"], "top-1 100.00 %"),
    (["train", "-c", "digits/raftmlp_digits", "--epochs", "1", "--warmup-epochs", "0", "--overwrite"], "best top-1"),
)


def call(*command: object, **kwargs) -> str:
    """Run a command and return what it prints.

    Raises:
        UserError: If it fails; the message ends with its last lines.
    """
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    if done.returncode:
        raise UserError("\n".join([f"{' '.join(map(str, command))} failed:", *done.stdout.splitlines()[-15:]]))
    return done.stdout


def check_version() -> None:
    """Refuse to go on where the files that tell the version do not agree.

    Raises:
        UserError: If they do not; the message names the file.
    """
    for name, line in (("CITATION.cff", f"version: {__version__}"), ("CHANGELOG.md", f"## {__version__}")):
        if not re.search(rf"^{re.escape(line)}\b", (ROOT / name).read_text(), re.MULTILINE):
            raise UserError(f"{name} has no line {line!r}, the version of raftmlp/__init__.py")


def find_python(name: str) -> str | None:
    """Return the full version of a Python, None if there is none of that name."""
    try:
        return call(name, "-c", "import platform, venv, ensurepip; print(platform.python_version())").strip()
    except (UserError, OSError):
        return None


def build(folder: Path) -> tuple[Path, Path]:
    """Build and check the sdist and the wheel, and return their paths, the wheel first."""
    call(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    files = tuple(folder / f"raftmlp-{__version__}{end}" for end in ("-py3-none-any.whl", ".tar.gz"))
    call(sys.executable, "-m", "twine", "check", "--strict", *files)
    return files


def try_archive(python: Path, archive: Path, options: list[str]) -> None:
    """Install an archive into an environment and run the trials in an empty folder.

    Raises:
        UserError: If one of them fails, or prints something else.
    """
    call(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *options, archive)
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as empty:
        for command, expected in TRIALS:
            shown = call(python.with_name("raftmlp"), *command, cwd=empty, env=outside)
            if expected not in shown:
                raise UserError(f"raftmlp {' '.join(command)} printed no {expected!r}:\n{shown}")


def main() -> None:
    parser = Parser(yaml_config=False, description=__doc__)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="NAME", help="Pythons to try, those at hand")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="DIR", help="for the sdist and the wheel")
    args = parser.parse_args()

    check_version()
    versions = {name: version for name in args.pythons if (version := find_python(name))}
    if not versions:
        raise UserError(f"--pythons: none of {', '.join(args.pythons)} is at hand")
    wheel, sdist = build(args.output)
    say(f"built and checked: {wheel}, {sdist}")
    for name, version in versions.items():
        say(f"Python {version}: installing and trying, some minutes")
        with tempfile.TemporaryDirectory() as folder:
            call(name, "-m", "venv", folder)
            python = Path(folder, "bin", "python")
            try_archive(python, Path(f"{wheel}[demo]"), [])
            try_archive(python, sdist, ["--force-reinstall", "--no-deps"])
        say(f"Python {version}: wheel and sdist install and work alone")
    if missing := [name for name in args.pythons if name not in versions]:
        say(f"not at hand, not tried: {', '.join(missing)}")


if __name__ == "__main__":
    run(main)
