"""What several test files need: a tiny model's options, small data, the golden weights."""

import importlib.util
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from golden.arrays import original_state_dict
from raftmlp.data import Digits

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "data"
CATALOGUE = json.loads((GOLDEN / "catalogue.json").read_text())
VARIANTS = [name for name in CATALOGUE if name != "tiny_training"]
REAL_LABELS = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
TINY_MODEL = ["--model", "raftmlp_digits", "--model-kwargs", "embed_dims=(8,8,8,8)", "depths=(1,1,1,1)"]
DIGITS = ["--model", "raftmlp_digits", "--pretrained"]
TINY = ["--workers", "0", "--device", "cpu", *TINY_MODEL]


def release_weights(name):
    """Return the golden weights of a variant in the release's format."""
    entry = CATALOGUE[name]
    arrays = original_state_dict(entry["state_dict_shapes"], entry["norm_modules"])
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def relative_error(actual, expected):
    """Return the largest difference of a tensor to a golden array, as a share of the largest value."""
    actual = actual.numpy()
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def make_image_folder(root, train=12, val=6, suffix=".png"):
    """Write a folder of bright and dark images of odd sizes, train/ and val/; the numbers are images a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, low in (("bright", 128), ("dark", 0)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 128, (30 + i, 45, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}{suffix}")
    return root


def same_weights(a, b):
    """Return whether two models have the same keys and bit-equal weights."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def make_run_folder(path):
    """Write a folder with the checkpoints of a training run: the best weights are the shipped ones, the last are 0."""
    path.mkdir()
    state = timm.create_model("raftmlp_digits", pretrained=True).state_dict()
    torch.save(dict(arch="raftmlp_digits", state_dict=state), path / "model_best.pth.tar")
    state = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save(dict(arch="raftmlp_digits", state_dict=state), path / "last.pth.tar")
    return path


def fill_disk(monkeypatch):
    """Let new checkpoints be on a disk that is full."""
    real = tempfile.mkstemp

    def mkstemp(dir, prefix, suffix):
        if suffix != ".tar":
            return real(dir=dir, prefix=prefix, suffix=suffix)
        path = Path(dir) / f"{prefix}full{suffix}"
        path.symlink_to("/dev/full")
        return os.open(path, os.O_WRONLY), str(path)

    monkeypatch.setattr("tempfile.mkstemp", mkstemp)


def assert_same(one, other, path=""):
    """Assert that nested dicts and lists hold equal values, tensors bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{path}/{i}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, path


def run_process(*command, timeout=300, **options):
    """Run a command to its end, or end it and fail after so many seconds; returns it with its two outputs."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(list(map(str, command)), **pipes, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.terminate()  # torchrun ends its own processes then
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_two_processes(*command):
    """Run a program as two processes of torchrun that meet at 127.0.0.1, whatever the host's name leads to."""
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, *meet]
    return run_process(*torchrun, *command, cwd=ROOT, env=environment)


class NamedImages(torch.utils.data.Dataset):
    """50,000 images of one pixel under the names of ImageNet's validation images, in a random order."""

    classes = tuple(map(str, range(1000)))

    def __init__(self):
        self.order = np.random.default_rng(0).permutation(50000)

    def __len__(self):
        return 50000

    def __getitem__(self, i):
        return Image.new("RGB", (1, 1), (i // 256, i % 256, 0)), int(i % 1000)

    def filename(self, i, basename=False, absolute=False):
        return f"somewhere/ILSVRC2012_val_{self.order[i] + 1:08d}.JPEG"


class StoppingDigits(Digits):
    """Digits of which one asks this process to stop when it is loaded for the first time."""

    stop_at: int | None = None

    def __getitem__(self, index):
        if index == self.stop_at:
            StoppingDigits.stop_at = None
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def load_script(name, folder="tools"):
    """Return the module of a script in tools/ or docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def time_little(monkeypatch):
    """Let exports measure no speed."""
    monkeypatch.setattr("raftmlp.export.comparison.milliseconds_in_turns", lambda *_: [1.0, 2.0])
