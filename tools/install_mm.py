#!/usr/bin/env python
"""Install mmdet and mmseg (OneDL's continuation) into the environment that runs this: Python's own, or an active one.

    python tools/install_mm.py

The operators of mmcv are compiled against the installed torch, which takes a C++ compiler and some minutes. The wheel
is kept in the user's cache, in a folder named after the versions of Python and torch.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

from raftmlp.cli.console import run, say
from raftmlp.cli.options import Parser, option_type
from raftmlp.data.workers import processor_count
from raftmlp.errors import UserError
from raftmlp.settings import Count

ROOT = Path(__file__).resolve().parent.parent
# These require two builds of OpenCV at once, one of which needs libGL: they are installed without their dependencies,
# which the extra "mm" lists, with one OpenCV.
MMCV = "onedl-mmcv==2.3.6"
WITHOUT_DEPENDENCIES = ("onedl-mmdetection==3.5.1", "onedl-mmsegmentation==1.4.2", "imaug==0.4.3")
KEPT = ("torch", "torchvision", "timm", "numpy")
CHECK = "import mmcv.ops, mmdet.apis, mmseg.apis"


def constraints() -> list[str]:
    """Return pip's constraints: the pins of what is missing, and the installed torch, for which mmcv is compiled."""
    installed = {canonicalize_name(package.name) for package in distributions()}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    missing = [str(pin) for pin in pins if canonicalize_name(pin.name) not in installed]
    return [*missing, *(f"{name}=={version(name)}" for name in KEPT)]


def pip(*args: str) -> None:
    """Run pip of this Python.

    Raises:
        UserError: If it fails; pip itself shows why.
    """
    if subprocess.run([sys.executable, "-m", "pip", *args]).returncode:
        raise UserError(f"pip {' '.join(args)} failed, see above")


def find_wheel(folder: Path) -> Path | None:
    """Return the wheel of mmcv in a folder, None if there is none."""
    name = MMCV.replace("-", "_").replace("==", "-")
    return next(folder.glob(f"{name}-*.whl"), None)


def build_wheel(folder: Path, jobs: int) -> Path:
    """Compile mmcv's operators and keep the wheel in the folder, complete or not at all.

    Raises:
        UserError: If that fails; the message names the log.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise UserError("no C++ compiler found: mmcv's operators must be compiled (on Debian: apt install g++)")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-cache-dir", "--no-deps"]
        command += ["--no-build-isolation", "--wheel-dir", temporary, MMCV]
        flags = dict(MMCV_WITH_OPS="1", MAX_JOBS=str(jobs), CFLAGS=os.environ.get("CFLAGS", "-O1 -g0 -w"))
        build = subprocess.Popen(
            command, env={**os.environ, **flags}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        interval = 0.1 if sys.stderr.isatty() else 30
        shown = dict(bar_format="{desc}: {n_fmt} of {total_fmt} files, {elapsed}", mininterval=interval)
        with log.open("w") as file, tqdm(desc="compiling mmcv", **shown) as bar:
            for line in build.stdout:
                file.write(line)
                if step := re.match(r"\s*\[(\d+)/(\d+)\]", line):
                    bar.total = int(step[2])
                    bar.update(int(step[1]) - bar.n)
        wheels = list(Path(temporary).glob("*.whl"))
        if build.wait() or not wheels:
            raise UserError(f"mmcv could not be compiled: {log} says why")
        return Path(shutil.move(wheels[0], folder / wheels[0].name))


def main() -> None:
    parser = Parser(yaml_config=False, description=__doc__)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raftmlp"
    parser.add_argument("--cache", type=Path, default=cache, metavar="DIR", help="where wheels are kept")
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    jobs = max(1, min(processor_count(), int(gigabytes / 2)))
    parser.add_argument("--jobs", type=option_type(Count), default=jobs, metavar="N", help="compilers at once")
    args = parser.parse_args()

    python = "{}.{}".format(*platform.python_version_tuple())
    kind = "cuda" if torch.cuda.is_available() else "cpu"  # of mmcv's operators; with CUDA they take nvcc
    folder = args.cache / f"torch{torch.__version__}-{kind}-python{python}-{platform.machine()}"
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "constraints.txt")
        file.write_text("\n".join(constraints()) + "\n")
        pip("install", "--quiet", "--constraint", str(file), "setuptools>=80,<82")
        pip("install", "--quiet", "--constraint", str(file), "--no-build-isolation", "--editable", f"{ROOT}[mm]")
    wheel = find_wheel(folder) or build_wheel(folder, args.jobs)
    pip("install", "--quiet", "--no-deps", str(wheel), *WITHOUT_DEPENDENCIES)
    check = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    if check.returncode:
        reason = (check.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"importing mmdet and mmseg fails ({reason}); was {wheel} built on another machine?")
    say(f"mmdet and mmseg are installed; mmcv's wheel: {wheel}")


if __name__ == "__main__":
    run(main)
