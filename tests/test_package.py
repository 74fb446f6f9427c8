"""The package as pip installs it: built from a copy of the checkout, used in an empty folder without one."""

import contextlib
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import ROOT, TINY_MODEL, load_script
from raftmlp.cli.launcher import NAMES
from raftmlp.errors import install_command

FOLDERS = ("weights", "configs", "raftmlp")
FILES = ("LICENSE", "README.md", "pyproject.toml")


def run(*command, **kwargs):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the sdist and the wheel."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, copy)
    return folder


def test_the_archives_are_whole(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    files = set(zipfile.ZipFile(wheel).namelist())
    inside = {path.relative_to(ROOT) for path in (ROOT / "raftmlp").rglob("*.py")}
    shipped = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "configs").rglob("*.py")]
    shipped += (ROOT / "weights").glob("raftmlp_*")
    inside |= {"raftmlp" / path.relative_to(ROOT) for path in shipped}
    assert len(inside) > 60 and "raftmlp/py.typed" in files
    assert {path.as_posix() for path in inside} <= files
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"configs/imagenet/raftmlp_s.yaml", "weights/raftmlp_digits.sklearn.safetensors"} <= names


def test_commands_without_a_checkout(built, tmp_path):
    (wheel,), folder = built.glob("*.whl"), tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    (tmp_path / "empty").mkdir()

    def raftmlp(*command):
        return run(sys.executable, "-m", "raftmlp", *command, env=environment, cwd=tmp_path / "empty")

    shown = raftmlp("--help")
    assert all(f"  {name} " in shown for name in NAMES)
    options = ["--epochs", 1, "--warmup-epochs", 0, "--output", "run", *TINY_MODEL]
    assert "best top-1" in raftmlp("train", "-c", "digits/raftmlp_digits", *options)
    shown = raftmlp("validate", "--model", "raftmlp_digits", "--pretrained", "--dataset", "digits")
    assert "top-1 100.00 %" in shown and "360 images" in shown
    assert "written: hub/" in raftmlp("export", "--checkpoint", "run", "--format", "hf", "--out", "hub")


# The versions


def pins():
    """Return what constraints.txt and install_mm.py fix for this Python and platform: "==VERSION" by canonical name."""
    toolboxes = load_script("install_mm")
    lines = [*(ROOT / "constraints.txt").read_text().splitlines(), toolboxes.MMCV, *toolboxes.WITHOUT_DEPENDENCIES]
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(str(requirement.specifier).startswith("==") for requirement in requirements)
    here = [requirement for requirement in requirements if not requirement.marker or requirement.marker.evaluate()]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in here}


def needed(requirements, extras=("",)):
    """Yield the names of packages that requirements lead to, through all that are installed."""
    pending, seen = [(Requirement(line), extras) for line in requirements], set()
    while pending:
        requirement, extras = pending.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        yield name
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines = importlib.metadata.requires(name) or ()
            pending += [(Requirement(line), ("", *requirement.extras)) for line in lines]


def test_all_that_the_tests_install_is_pinned():
    """No package is open: a new release of one that nobody named must not change what is tested."""
    pinned = pins()
    toolboxes = {"onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation", "imaug"}  # without their dependencies
    names = toolboxes | set(needed(["raftmlp[all,mm]"])) - {"raftmlp"}
    assert len(names) > 100 and {"pillow", "torch", "setuptools", "ninja", "opencv-python-headless"} <= names
    assert sorted(names - pinned.keys()) == []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # without "make test", mmdet's are missing
            found = importlib.metadata.version(name)
            assert pinned[name].contains(found, prereleases=True), f"{name} {found} is installed, not {pinned[name]}"


def test_the_command_that_installs_what_is_missing(monkeypatch):
    def version(name):
        if name in ("pyyaml", "scikit-learn", "onnx"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0.20" if name == "timm" else real(name)

    real = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", version)
    assert shlex.split(install_command("demo")) == ["pip", "install", "timm>=1.0.31", "pyyaml", "scikit-learn"]
    assert "onnx" in shlex.split(install_command("demo", "export"))
    monkeypatch.setattr("importlib.metadata.requires", lambda name: version("onnx"))  # a checkout, not installed
    assert shlex.split(install_command("demo")) == ["pip", "install", "-e", f"{ROOT}[demo]"]


def test_a_command_names_what_it_lacks():
    code = "import sys; from raftmlp.cli.launcher import main; sys.modules['yaml'] = None; main()"
    done = subprocess.run([sys.executable, "-c", code, "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install " in done.stderr and "raftmlp[" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
