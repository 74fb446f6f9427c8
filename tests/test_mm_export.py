"""Detectors and segmentors as ONNX: a detector's backbone and neck, a segmentor whole; see docs/export.md."""

import onnx
import onnxruntime
import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmseg.registry import MODELS as MMSEG_MODELS
from torch import nn

from helpers import ROOT
from raftmlp.mm.checkpoints import patch_mmengine
from raftmlp.mm.configs import read_config


class FeaturePyramid(nn.Module):
    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        return self.detector.extract_feat(images)


class Segmentor(nn.Module):
    def __init__(self, segmentor):
        super().__init__()
        self.segmentor = segmentor

    def forward(self, images):
        return (self.segmentor(images, mode="tensor"),)


@pytest.mark.parametrize(
    "config, registry, wrap, outputs, free, sizes",
    [
        ("detection/mask_rcnn", MMDET_MODELS, FeaturePyramid, 4, (0, 2, 3), [(128, 128), (96, 160), (224, 64)]),
        # its head turns sizes into plain numbers
        ("segmentation/fpn", MMSEG_MODELS, Segmentor, 1, (0,), [(96, 128)]),
    ],
    ids=["detector", "segmentor"],
)
@torch.no_grad()
def test_onnx(config, registry, wrap, outputs, free, sizes):
    torch.manual_seed(0)
    patch_mmengine()  # the segmentor's config has bases of mmseg
    config = read_config(ROOT / "configs" / f"{config}_raftmlp_digits.py")
    model = wrap(registry.build(config.model)).eval()
    free = dict.fromkeys(free, torch.export.Dim.AUTO)
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(free,), strict=False)
    file = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).model_proto
    assert {node.domain for node in file.graph.node} == {""}
    onnx.checker.check_model(file)
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for number, size in enumerate(sizes, start=1):
        images = torch.randn(number, 3, *size)
        expected = model(images)
        actual = session.run(None, {name: images.numpy()})
        assert len(actual) == len(expected) == outputs
        for a, b in zip(actual, expected):
            assert a.shape == b.shape
            assert (torch.from_numpy(a) - b).abs().max() <= 1e-5 * b.abs().max()
