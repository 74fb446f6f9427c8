"""The entry points of torch.hub."""

import importlib

import pytest
import timm
import torch

from helpers import ROOT, same_weights
from raftmlp import RaftMLP

TINY = dict(embed_dims=(8,), depths=(1,), patch_sizes=(4,), patch_kernels=((4,),), raft_size=1, img_size=16)


@pytest.mark.parametrize("name", timm.list_models("raftmlp_*", module="raftmlp"))
def test_entry_point(name):
    model = torch.hub.load(str(ROOT), name, source="local", **TINY, num_classes=3)
    assert isinstance(model, RaftMLP) and model.num_classes == 3


def test_shipped_weights():
    model = torch.hub.load(str(ROOT), "raftmlp_digits", source="local", pretrained=True)
    assert same_weights(model, timm.create_model("raftmlp_digits", pretrained=True))


def test_dependencies(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    hubconf = importlib.import_module("hubconf")
    assert hubconf.dependencies == ["torch", "timm", "safetensors"]
