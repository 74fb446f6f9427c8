"""A detector's backbone and neck as ONNX; see docs/export.md."""

import onnxruntime
import torch
from mmengine.registry import MODELS, init_default_scope
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


@torch.no_grad()
def test_onnx():
    torch.manual_seed(0)
    patch_mmengine()
    config = read_config(ROOT / "configs" / "detection" / "mask_rcnn_raftmlp_digits.py")
    config.model.backbone.arch = dict(embed_dims=(32, 64, 128, 128), depths=(1, 1, 1, 1), img_size=32)
    init_default_scope(config.default_scope)
    model = FeaturePyramid(MODELS.build(config.model)).eval()
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(free,), strict=False)
    file = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).model_proto
    assert {node.domain for node in file.graph.node} == {""}
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 160, 64)
    actual = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for a, b in zip(actual, model(images), strict=True):
        assert a.shape == b.shape
        assert (torch.from_numpy(a) - b).abs().max() <= 1e-5 * b.abs().max()
