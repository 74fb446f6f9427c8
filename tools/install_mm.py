#!/usr/bin/env python
"""Install mmdet and mmseg (OneDL's continuation) into the environment that runs this: Python's own, or an active one.

    python tools/install_mm.py

The operators of mmcv are compiled against the installed torch, which takes a C++ compiler and some minutes. The wheel
is kept in the user's cache, in a folder named after the versions of Python and torch.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def constraints() -> list[str]:
    """Return pip's constraints: the pins of what is missing, and the installed torch, for which mmcv is compiled."""
    installed = {canonicalize_name(package.name) for package in distributions()}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    missing = [str(pin) for pin in pins if canonicalize_name(pin.name) not in installed]
    return [*missing, *(f"{name}=={version(name)}" for name in KEPT)]


def pip(*args: str, **kwargs) -> None:
    """Run pip of this Python; an error ends this program."""
    subprocess.run([sys.executable, "-m", "pip", *args], check=True, **kwargs)


def build_wheel(folder: Path, jobs: int) -> None:
    """Compile mmcv's operators and keep the wheel in the folder, complete or not at all."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("no C++ compiler found: mmcv's operators must be compiled (on Debian: apt install g++)")
    log = folder / "build.log"
    say(f"compiling mmcv's operators, some minutes; {log} shows how far it is")
    flags = dict(MMCV_WITH_OPS="1", MAX_JOBS=str(jobs), CFLAGS=os.environ.get("CFLAGS", "-O1 -g0 -w"))
    options = ["--verbose", "--no-cache-dir", "--no-deps", "--no-build-isolation"]
    with tempfile.TemporaryDirectory(dir=folder) as temporary, log.open("w") as file:
        output = dict(stdout=file, stderr=subprocess.STDOUT)
        pip("wheel", *options, "--wheel-dir", temporary, MMCV, env={**os.environ, **flags}, **output)
        for wheel in Path(temporary).glob("*.whl"):
            wheel.rename(folder / wheel.name)


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
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "constraints.txt")
        file.write_text("\n".join(constraints()) + "\n")
        pip("install", "--quiet", "--constraint", str(file), "setuptools>=80,<82")
        pip("install", "--quiet", "--constraint", str(file), "--no-build-isolation", "--editable", f"{ROOT}[mm]")
    wheels = f"{MMCV.replace('-', '_').replace('==', '-')}-*.whl"
    if not list(folder.glob(wheels)):
        build_wheel(folder, args.jobs)
    wheel = next(folder.glob(wheels))
    pip("install", "--quiet", "--no-deps", str(wheel), *WITHOUT_DEPENDENCIES)
    subprocess.run([sys.executable, "-c", "import mmcv.ops, mmdet.apis, mmseg.apis"], check=True)
    say(f"mmdet and mmseg are installed; mmcv's wheel: {wheel}")


if __name__ == "__main__":
    run(main)
