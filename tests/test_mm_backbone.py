"""The backbone for mmdet and mmseg: maps, exactness, freezing, weights, errors."""

import numpy as np
import pytest
import timm
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.analysis import get_model_complexity_info
from mmengine.registry import MODELS
from mmseg.registry import MODELS as MMSEG_MODELS

from golden.arrays import images
from helpers import CATALOGUE, GOLDEN, relative_error, release_weights
from raftmlp import RaftMLP
from raftmlp.mm import RaftMLPBackbone

SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), img_size=64)
SINGLE = dict(embed_dims=(16,), depths=(12,), patch_sizes=(16,), patch_kernels=None, token_mixing="plain", img_size=64)


def build(arch=SMALL, **kwargs):
    torch.manual_seed(0)
    return MODELS.build(dict(type="RaftMLP", arch=arch, **kwargs))


# Maps


@pytest.mark.parametrize("size", [(112, 137), (1, 1), (600, 20)])
@torch.no_grad()
def test_shapes(size):
    for registry in (MMDET_MODELS, MMSEG_MODELS):
        assert isinstance(registry.build(dict(type="RaftMLP", arch=SMALL)), RaftMLPBackbone)
    backbone = build().eval()
    height, width = size
    for y, channels, stride in zip(backbone(torch.randn(1, 3, *size)), backbone.out_channels, (4, 2, 2, 2)):
        height, width = -(-height // stride), -(-width // stride)
        assert y.shape == (1, channels, height, width) and y.is_contiguous()
    single = build(SINGLE).eval()
    expected = [(1, 16, -(-size[0] // 16), -(-size[1] // 16))] * 4
    assert [y.shape for y in single(torch.randn(1, 3, *size))] == expected and single.out_channels == [16] * 4


@pytest.mark.parametrize("name", ["raftmlp_s", "raftmlp_mixer_b16"])
@torch.no_grad()
def test_the_release_s_maps(name, tmp_path):
    torch.save({"model": release_weights(name)}, tmp_path / "release.pth")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "release.pth"))
    backbone = build(name, first_map="embed", init_cfg=pretrained)
    backbone.init_weights()
    backbone.eval()
    golden = np.load(GOLDEN / f"{name}.npz")
    for height, width in CATALOGUE[name]["sizes"]:
        at = f"{height}x{width}"
        maps = backbone(torch.from_numpy(images(f"{name}/{at}", 2, height, width)))
        named = {"embed0": maps[0].flatten(2).transpose(1, 2)}  # B (HW) C in the golden files
        if len(backbone.model.stages) > 1:
            named.update({f"stage{i}": maps[i] for i in range(1, 4)})
        else:
            named["stage0"] = maps[-1]
        for key, y in named.items():
            assert list(y.shape) == golden[f"{at}/{key}/shape"].tolist()
            values = y.flatten()[torch.from_numpy(golden[f"{at}/{key}/index"])]
            tolerance = 1e-5 if (height, width) == (224, 224) else 2e-5  # a resize is in the path
            assert relative_error(values, golden[f"{at}/{key}/value"]) < tolerance, (at, key)


@torch.no_grad()
def test_where_the_maps_come_from():
    x = torch.randn(1, 3, 64, 64)
    first = build().eval().model.stages[0]
    embedded = first.embed(x.permute(0, 2, 3, 1))
    torch.testing.assert_close(build(first_map="embed").eval()(x)[0], embedded.permute(0, 3, 1, 2))
    torch.testing.assert_close(build().eval()(x)[0], first.blocks(embedded).permute(0, 3, 1, 2))
    single = build(SINGLE).eval()
    features = single.model.stages[0].embed(x.permute(0, 2, 3, 1))
    expected = [features]
    for number, block in enumerate(single.model.stages[0].blocks, start=1):
        features = block(features)
        if number in (4, 10, 12):
            expected.append(features)
    torch.testing.assert_close(list(single(x)), [y.permute(0, 3, 1, 2) for y in expected])


@pytest.mark.parametrize("arch", [SMALL, SINGLE], ids=["stages", "single"])
@torch.no_grad()
def test_out_indices(arch):
    x = torch.randn(1, 3, 64, 64)
    whole, some = build(arch).eval(), build(arch, out_indices=np.array([1, 2])).eval()
    missing, unexpected = whole.load_state_dict(some.state_dict(), strict=False)
    assert missing and not unexpected  # what lies behind the last map is not built
    torch.testing.assert_close(some(x), whole(x)[1:3])
    assert some.out_channels == whole.out_channels[1:3]


# Training


@pytest.mark.parametrize(
    ("arch", "indices", "first_map", "with_cp"),
    [(SMALL, None, "stage", False), (SMALL, (1, 2), "embed", True), (SINGLE, (0, 2), "stage", True)],
)
def test_every_parameter_gets_a_gradient(arch, indices, first_map, with_cp):
    """Else data-parallel training would wait for it for ever."""
    backbone = build(arch, out_indices=indices, out_norm=True, first_map=first_map, with_cp=with_cp)
    sum((y * torch.randn_like(y)).sum() for y in backbone(torch.randn(2, 3, 40, 72))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
def test_frozen_stages(frozen):
    backbone = build(frozen_stages=frozen, out_norm=True, drop_path_rate=0.5)
    for _ in range(2):  # train() anew must not thaw
        backbone.train()
        for i, stage in enumerate(backbone.model.stages):
            parameters = [*stage.blocks.parameters(), *backbone.norms[str(i)].parameters()]
            assert {p.requires_grad for p in parameters} == {stage.blocks.training} == {i >= frozen}
            trains = frozen < 0 if i == 0 else i >= frozen
            assert {p.requires_grad for p in stage.embed.parameters()} == {trains}


def test_frozen_stages_of_a_single_stage():
    for frozen, blocks in ((-1, 0), (0, 0), (2, 4), (4, 12)):
        stage = build(SINGLE, frozen_stages=frozen).model.stages[0]
        assert all(p.requires_grad for p in stage.embed.parameters()) == (frozen < 0)
        assert [{p.requires_grad for p in b.parameters()} for b in stage.blocks] == [{i >= blocks} for i in range(12)]


def test_multiplications_are_counted():
    """mmengine hooks every layer; all of them are then called, and mmengine knows to count their work."""
    backbone = build("raftmlp_s").eval()
    info = get_model_complexity_info(backbone, (3, 224, 224), show_table=False, show_arch=False)
    assert info["params"] == sum(p.numel() for p in backbone.parameters())
    assert info["flops"] == pytest.approx(2.087e9, rel=0.02)  # docs/choosing.md; LayerNorms too, no classifier


# Weights


def pretrained(path):
    return dict(type="Pretrained", checkpoint=str(path))


@pytest.mark.parametrize("img_size", [32, (64, 96)], ids=["trained", "resampled"])
def test_a_name_loads_the_shipped_weights(img_size):
    backbone = build("raftmlp_digits", img_size=img_size, init_cfg=pretrained("raftmlp_digits.sklearn"))
    backbone.init_weights()
    model = timm.create_model("raftmlp_digits", pretrained=True, img_size=img_size)
    for key, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=0)
    x = torch.randn(1, 3, 32, 32)
    features = timm.create_model("raftmlp_digits", pretrained=True, img_size=img_size, features_only=True).eval()
    for y, expected in zip(backbone.eval()(x), features(x)):
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone."])
def test_a_detector_s_backbone_loads(prefix, tmp_path):
    source = build(out_norm=True)
    for i, norm in source.norms.items():
        torch.nn.init.constant_(norm.bias, float(i))
    state = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "neck.weight": torch.ones(1)}}, tmp_path / "detector.pth")
    for indices in (None, (1, 3)):  # norms go with their maps
        target = build(out_norm=True, out_indices=indices, init_cfg=pretrained(tmp_path / "detector.pth"))
        for p in target.parameters():
            torch.nn.init.zeros_(p)
        target.init_weights()
        for key, value in target.state_dict().items():
            assert torch.equal(value, source.state_dict()[key])
    with pytest.raises(ValueError, match="norms.0.weight is not known"):
        build(init_cfg=pretrained(tmp_path / "detector.pth")).init_weights()


def test_a_detector_s_grid_is_its_own(tmp_path):
    """Of the plain mixer, a grid of as many positions as the pretrained one's has weights of the same shapes."""
    source = build("raftmlp_mixer_b16", img_size=(112, 448))
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "detector.pth")
    target = build("raftmlp_mixer_b16", img_size=(112, 448), init_cfg=pretrained(tmp_path / "detector.pth"))
    target.init_weights()
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


# Bad input


BAD = [
    dict(arch="raftmlp_x"),
    dict(arch="resnet50"),
    dict(arch=dict(embed_dim=(8, 8))),
    dict(arch={**SMALL, "drop_path_rate": 0.5}),  # one of the backbone's own
    dict(arch={**SINGLE, "depths": (2,)}),  # too few blocks for four maps
    *(dict(out_indices=indices) for indices in [(0, 4), (2, 1), ()]),
    dict(out_indices=(0,), first_map="embed"),
    dict(frozen_stages=5),
    dict(drop_path_rate="0.1"),
    dict(first_map="stem"),
]


@pytest.mark.parametrize("kwargs", BAD)
def test_bad_arguments(kwargs):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        build(**kwargs)


def test_bad_weights(tmp_path):
    for arch, file in ((SMALL, tmp_path / "missing.pth"), ("raftmlp_s", "raftmlp_s")):
        with pytest.raises(FileNotFoundError, match=str(file)):
            build(arch, init_cfg=pretrained(file)).init_weights()
    with pytest.raises(ValueError, match="prefix"):  # which we would not heed
        build(init_cfg=dict(prefix="backbone.", **pretrained("raftmlp_digits"))).init_weights()
    torch.save(RaftMLP(**{**SMALL, "embed_dims": (8, 16, 24, 40)}).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth does not fit .*stages.3.* has shape \[40.*not \[32"):
        build(init_cfg=pretrained(tmp_path / "other.pth")).init_weights()
