"""Detectors and segmentors as ONNX: a detector's backbone and neck, a segmentor whole; see docs/export.md."""

import onnxruntime
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from helpers import ROOT
from raftmlp.mm.checkpoints import patch_mmengine
from raftmlp.mm.configs import read_config


class Wrapped(nn.Module):
    """A detector's feature maps, or a segmentor's scores."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        if hasattr(self.model, "roi_head"):
            return self.model.extract_feat(images)
        return (self.model(images, mode="tensor"),)


@pytest.mark.parametrize(
    "config, outputs, free, size",
    [("detection/mask_rcnn", 4, (0, 2, 3), (160, 64)), ("segmentation/fpn", 1, (0,), (96, 128))],
    ids=["detector", "segmentor"],  # whose head turns sizes into plain numbers
)
@torch.no_grad()
def test_onnx(config, outputs, free, size):
    torch.manual_seed(0)
    patch_mmengine()  # the segmentor's config has bases of mmseg
    arch = dict(embed_dims=(32, 64, 128, 128), depths=(1, 1, 1, 1), img_size=32)
    config = read_config(ROOT / "configs" / f"{config}_raftmlp_digits.py")
    config.model.backbone.arch = arch
    init_default_scope(config.default_scope)
    model = Wrapped(MODELS.build(config.model)).eval()
    free = dict.fromkeys(free, torch.export.Dim.AUTO)
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(free,), strict=False)
    file = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).model_proto
    assert {node.domain for node in file.graph.node} == {""}
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, *size)
    actual = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert len(actual) == outputs
    for a, b in zip(actual, model(images), strict=True):
        assert a.shape == b.shape
        assert (torch.from_numpy(a) - b).abs().max() <= 1e-5 * b.abs().max()
