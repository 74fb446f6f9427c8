"""What several test files need: a tiny model's options, small data, the golden weights."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from golden.arrays import original_state_dict

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "data"
CATALOGUE = json.loads((GOLDEN / "catalogue.json").read_text())
VARIANTS = [name for name in CATALOGUE if name != "tiny_training"]
TINY_MODEL = ["--model", "raftmlp_digits", "--model-kwargs", "embed_dims=(8,8,8,8)", "depths=(1,1,1,1)"]
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
