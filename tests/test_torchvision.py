"""The networks in torchvision: values inside them, and detectors over their feature maps."""

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from raftmlp.model.resize import RESIZINGS

TINY = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), img_size=32)
NETWORKS = [
    ("raftmlp_digits", TINY),
    ("raftmlp_12_r2", dict(embed_dims=(8,), depths=(2,), img_size=32)),
    ("raftmlp_mixer_b16", dict(embed_dims=(8,), depths=(2,), img_size=32)),
    ("raftmlp_cifar", dict(embed_dims=(8, 16), depths=(1, 1), img_size=32)),
]
ANCHORS = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # evaluation has no stochastic depth
@pytest.mark.parametrize("resizing", RESIZINGS)
@pytest.mark.parametrize("name, kwargs", NETWORKS)
def test_values_inside(name, kwargs, resizing):
    model = timm.create_model(name, **kwargs, resizing=resizing, drop_path_rate=0.2)
    assert all("head" in names for names in get_graph_node_names(model))
    extractor = create_feature_extractor(model, {"stages.0.blocks": "map", "head": "logits"})
    extractor.train()(torch.randn(2, 3, 37, 50))["logits"].square().mean().backward()
    assert all(p.grad is not None for p in extractor.parameters())

    extractor.eval(), model.eval()
    for size in ((32, 32), (37, 50)):
        images = torch.randn(1, 3, *size)
        values = extractor(images)
        (first, *_) = model.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
        torch.testing.assert_close(values["logits"], model(images))
        if len(model.stages) > 1:  # in a network of one stage the maps are those of blocks
            torch.testing.assert_close(values["map"], first)
    for wrong in (torch.randn(1, 4, 32, 32), torch.randn(3, 32, 32)):
        with pytest.raises(ValueError, match="expected images of shape"):
            extractor(wrong)


@pytest.mark.parametrize(
    "detector, kwargs",
    [
        (FasterRCNN, dict(rpn_anchor_generator=ANCHORS, box_detections_per_img=5)),
        (MaskRCNN, dict(rpn_anchor_generator=ANCHORS, box_detections_per_img=5)),
        (RetinaNet, dict(anchor_generator=ANCHORS)),
    ],
)
def test_detectors(detector, kwargs):
    torch.manual_seed(0)
    maps = timm.create_model("raftmlp_digits", **TINY, features_only=True, feature_cls="dict", resizing="residual")
    backbone = nn.Sequential(maps, FeaturePyramidNetwork(maps.feature_info.channels(), 8, LastLevelMaxPool()))
    backbone.out_channels = 8
    model = detector(backbone, num_classes=3, min_size=64, max_size=96, **kwargs)
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 64)]
    targets = [
        dict(
            boxes=torch.tensor([[5.0, 5.0, 30.0, 40.0]]),
            labels=torch.tensor([1]),
            masks=torch.ones(1, *image.shape[1:], dtype=torch.uint8),
        )
        for image in images
    ]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    sum(model(images, targets).values()).backward()
    assert all(p.grad.any() for p in maps.parameters())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert all(result["boxes"].shape == (len(result["scores"]), 4) for result in model(images))
