"""The backbone for mmdet and mmseg: maps, exactness, freezing, weights, errors."""

import os

import numpy as np
import pytest
import timm
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from mmengine.model import MMDistributedDataParallel
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


@pytest.mark.parametrize("registry", [MODELS, MMDET_MODELS, MMSEG_MODELS], ids=["mmengine", "mmdet", "mmseg"])
def test_every_registry_finds_it(registry):
    assert isinstance(registry.build(dict(type="RaftMLP", arch=SMALL)), RaftMLPBackbone)


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (511, 511), (112, 137), (32, 32), (1, 1), (3000, 20)])
@torch.no_grad()
def test_shapes_of_raftmlp_s(size):
    backbone = build("raftmlp_s").eval()
    assert backbone.out_channels == [64, 128, 256, 512]
    maps = backbone(torch.randn(1, 3, *size))
    height, width = size
    for y, channels, stride in zip(maps, backbone.out_channels, (4, 2, 2, 2)):
        height, width = -(-height // stride), -(-width // stride)
        assert y.shape == (1, channels, height, width) and y.is_contiguous()


@torch.no_grad()
def test_shapes_of_the_mixer():
    backbone = build("raftmlp_mixer_b16").eval()
    assert backbone.out_channels == [768] * 4
    assert [y.shape for y in backbone(torch.randn(1, 3, 112, 137))] == [(1, 768, 7, 9)] * 4


@pytest.mark.parametrize("name", ["raftmlp_s", "raftmlp_m", "raftmlp_l", "raftmlp_mixer_b16"])
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
def test_the_first_map_is_the_first_stage_s_or_its_embedding_s():
    x = torch.randn(1, 3, 64, 64)
    stage, embed = build(first_map="stage").eval(), build(first_map="embed").eval()
    first = stage.model.stages[0]
    embedded = first.embed(x.permute(0, 2, 3, 1))
    torch.testing.assert_close(embed(x)[0], embedded.permute(0, 3, 1, 2))
    torch.testing.assert_close(stage(x)[0], first.blocks(embedded).permute(0, 3, 1, 2))
    for a, b in zip(stage(x)[1:], embed(x)[1:]):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_the_mixer_s_maps_are_its_embedding_and_three_blocks():
    backbone = build(SINGLE).eval()
    x = torch.randn(1, 3, 64, 64)
    features = backbone.model.stages[0].embed(x.permute(0, 2, 3, 1))
    expected = [features]
    for number, block in enumerate(backbone.model.stages[0].blocks, start=1):
        features = block(features)
        if number in (4, 10, 12):
            expected.append(features)
    for y, features in zip(backbone(x), expected, strict=True):
        torch.testing.assert_close(y, features.permute(0, 3, 1, 2))


@pytest.mark.parametrize("arch", [SMALL, SINGLE], ids=["stages", "single"])
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2), (0, 2), (3,)])
@torch.no_grad()
def test_out_indices(arch, indices):
    x = torch.randn(1, 3, 64, 64)
    whole, some = build(arch).eval(), build(arch, out_indices=indices).eval()
    missing, unexpected = whole.load_state_dict(some.state_dict(), strict=False)
    assert not unexpected and bool(missing) == (indices[-1] < 3)  # what lies behind the last map is not built
    for y, i in zip(some(x), indices, strict=True):
        torch.testing.assert_close(y, whole(x)[i])
    assert some.out_channels == [whole.out_channels[i] for i in indices]


@torch.no_grad()
def test_out_norm_normalises_every_map_over_channels():
    maps = build(out_norm=True).eval()(torch.randn(2, 3, 64, 64))
    for y in maps:
        torch.testing.assert_close(y.mean(1), torch.zeros_like(y[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(y.var(1, unbiased=False), torch.ones_like(y[:, 0]), atol=1e-2, rtol=0)


# Training


@pytest.mark.parametrize("first_map", ["stage", "embed"])
@pytest.mark.parametrize("indices", [None, (1, 2)])
@pytest.mark.parametrize("arch", [SMALL, SINGLE], ids=["stages", "single"])
@pytest.mark.parametrize("with_cp", [False, True])
def test_every_parameter_gets_a_gradient(arch, indices, first_map, with_cp):
    """Else data-parallel training would wait for it for ever."""
    backbone = build(arch, out_indices=indices, out_norm=True, first_map=first_map, with_cp=with_cp)
    sum((y * torch.randn_like(y)).sum() for y in backbone(torch.randn(2, 3, 40, 72))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


def test_with_cp_changes_no_number():
    x = torch.randn(2, 3, 40, 72)
    grads = []
    for with_cp in (False, True):
        backbone = build(with_cp=with_cp)
        sum(y.square().sum() for y in backbone(x)).backward()
        grads.append({name: p.grad for name, p in backbone.named_parameters()})
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages(frozen):
    backbone = build(frozen_stages=frozen, out_norm=True, drop_path_rate=0.5)
    for _ in range(2):  # train() anew must not thaw
        backbone.train()
        for i, stage in enumerate(backbone.model.stages):
            assert {p.requires_grad for p in stage.blocks.parameters()} == {i >= frozen}
            if i > 0:
                assert {p.requires_grad for p in stage.embed.parameters()} == {i >= frozen}
            assert stage.blocks.training == (i >= frozen)
            assert all(p.requires_grad == (i >= frozen) for p in backbone.norms[str(i)].parameters())
        stem = [p.requires_grad for p in backbone.model.stages[0].embed.parameters()]
        assert all(stem) if frozen < 0 else not any(stem)
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert all(y.requires_grad == (i >= frozen) for i, y in enumerate(maps))


@pytest.mark.parametrize("frozen, blocks", [(-1, 0), (0, 0), (1, 0), (2, 4), (3, 10), (4, 12)])
def test_frozen_stages_of_a_single_stage(frozen, blocks):
    stage = build(SINGLE, frozen_stages=frozen).model.stages[0]
    assert all(p.requires_grad for p in stage.embed.parameters()) == (frozen < 0)
    for i, block in enumerate(stage.blocks):
        assert {p.requires_grad for p in block.parameters()} == {i >= blocks}


def _train_in_two_processes(rank, file, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = MMDistributedDataParallel(build())
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))[2 * rank : 2 * rank + 2]
    sum(y.square().mean() for y in model(x)).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.module.named_parameters()}, out)
    torch.distributed.barrier()
    os._exit(0)  # torch's destructor waits, with the GIL, for a thread that may need it right after a backward pass


def test_two_processes_have_the_gradients_of_one(tmp_path):
    args = (str(tmp_path / "rendezvous"), str(tmp_path / "grads.pt"))
    torch.multiprocessing.spawn(_train_in_two_processes, args, nprocs=2)
    backbone = build()
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    sum(y.square().mean() for y in backbone(x)).backward()
    expected = {name: p.grad for name, p in backbone.named_parameters()}
    torch.testing.assert_close(torch.load(args[1]), expected)


def test_autocast():
    backbone = build(out_norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(torch.randn(2, 3, 40, 72))
    sum(y.float().square().sum() for y in maps).backward()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters())


@pytest.mark.parametrize("name", ["raftmlp_s", "raftmlp_mixer_b16"])
def test_multiplications_are_counted(name):
    """mmengine hooks every layer; all of them are then called, and mmengine knows to count their work."""
    backbone = build(name).eval()
    info = get_model_complexity_info(backbone, (3, 224, 224), show_table=False, show_arch=False)
    assert info["params"] == sum(p.numel() for p in backbone.parameters())
    expected = dict(raftmlp_s=2.087e9, raftmlp_mixer_b16=12.631e9)  # docs/choosing.md
    assert info["flops"] == pytest.approx(expected[name], rel=0.02)  # LayerNorms are counted too, no classifier
    analyzer = FlopAnalyzer(backbone, torch.randn(1, 3, 224, 224))
    assert analyzer.total() == info["flops"]
    assert set(analyzer.unsupported_ops()) <= {"aten::add", "aten::gelu", "aten::unflatten"}


# Weights


def pretrained(path):
    return dict(type="Pretrained", checkpoint=str(path))


def test_a_name_loads_the_shipped_weights():
    backbone = build("raftmlp_digits", init_cfg=pretrained("raftmlp_digits"))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.init_weights()
    model = timm.create_model("raftmlp_digits", pretrained=True)
    for key, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=0)
        assert not torch.equal(value, before[f"model.{key}"])
    x = torch.randn(1, 3, 32, 32)
    features = timm.create_model("raftmlp_digits", pretrained=True, features_only=True).eval()
    for y, expected in zip(backbone.eval()(x), features(x)):
        torch.testing.assert_close(y, expected)


def test_the_trained_grid_is_resampled():
    backbone = build("raftmlp_digits", img_size=(64, 96), init_cfg=pretrained("raftmlp_digits.sklearn"))
    backbone.init_weights()
    model = timm.create_model("raftmlp_digits", pretrained=True, img_size=(64, 96))
    for key, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=0, atol=0)


@pytest.mark.parametrize("wrapped", ["backbone.model.", "module.backbone.model.", "backbone."])
def test_a_detector_s_backbone_loads(wrapped, tmp_path):
    source = build(out_norm=wrapped != "backbone.")
    for p in source.norms.parameters():
        torch.nn.init.normal_(p)
    prefix = wrapped.removesuffix("model.")
    state = {f"{prefix}{key.removeprefix('model.') if wrapped == 'backbone.' else key}": value
             for key, value in source.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": {**state, "neck.weight": torch.ones(1)}}, tmp_path / "detector.pth")
    target = build(out_norm=wrapped != "backbone.", init_cfg=pretrained(tmp_path / "detector.pth"))
    for p in target.parameters():
        torch.nn.init.zeros_(p)
    target.init_weights()
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_norms_go_with_their_maps(tmp_path):
    source = build(out_norm=True)
    for i, norm in source.norms.items():
        torch.nn.init.constant_(norm.bias, float(i))
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "detector.pth")
    target = build(out_norm=True, out_indices=(1, 3), init_cfg=pretrained(tmp_path / "detector.pth"))
    target.init_weights()
    assert {i: norm.bias.unique().item() for i, norm in target.norms.items()} == {"1": 1, "3": 3}
    with pytest.raises(ValueError, match="norms.0.weight is not known"):
        build(init_cfg=pretrained(tmp_path / "detector.pth")).init_weights()


def test_a_detector_s_grid_is_its_own(tmp_path):
    """Of the plain mixer, a grid of as many positions as the pretrained one's has weights of the same shapes."""
    source = build("raftmlp_mixer_b16", img_size=(112, 448))
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "detector.pth")
    target = build("raftmlp_mixer_b16", img_size=(112, 448), init_cfg=pretrained(tmp_path / "detector.pth"))
    target.init_weights()
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_a_pruned_backbone_takes_a_whole_network_s_weights(tmp_path):
    torch.manual_seed(1)
    whole = RaftMLP(num_classes=7, **SMALL)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    backbone = build(out_indices=(0, 1), init_cfg=pretrained(tmp_path / "whole.pth"))
    backbone.init_weights()
    for key, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[key], rtol=0, atol=0)


def test_a_checkpoint_of_another_variant(tmp_path):
    torch.save(RaftMLP(**{**SMALL, "embed_dims": (8, 16, 24, 40)}).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth does not fit .*stages.3.* has shape \[40.*not \[32.*; \d+ more"):
        build(init_cfg=pretrained(tmp_path / "other.pth")).init_weights()
    torch.save(RaftMLP(**{**SMALL, "depths": (1, 1, 3, 1)}).state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(ValueError, match="stages.2.blocks.2.* is not known"):
        build(init_cfg=pretrained(tmp_path / "deeper.pth")).init_weights()


class Bomb:
    def __reduce__(self):
        return print, ("exploded",)


def test_no_code_in_a_checkpoint_is_run(tmp_path, capsys):
    torch.save({"state_dict": build().state_dict(), "meta": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="bomb.pth is damaged, or holds more than tensors and plain data"):
        build(init_cfg=pretrained(tmp_path / "bomb.pth")).init_weights()
    assert "exploded" not in capsys.readouterr().out


def test_other_init_cfgs_are_mmengine_s():
    backbone = build(init_cfg=dict(type="Constant", val=0.25, bias=0.5, layer="Linear"))
    backbone.init_weights()
    fc1 = backbone.model.stages[0].blocks[0].channels.fc1
    assert (fc1.weight == 0.25).all() and (fc1.bias == 0.5).all()


# Bad input


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(arch="raftmlp_x"), "unknown arch 'raftmlp_x'; did you mean .*raftmlp_"),
        (dict(arch="resnet50"), "unknown arch 'resnet50'; did you mean .*raftmlp_s"),
        (dict(arch=dict(embed_dim=(8, 8))), "unknown key 'embed_dim' in arch; did you mean embed_dims"),
        (dict(arch="raftmlp_s.nosuch"), "arch 'raftmlp_s.nosuch' cannot be built"),
        (dict(arch=None), "arch None must be the name of a variant, or a dict"),
        (dict(arch=dict(embed_dims=8)), "arch {'embed_dims': 8} cannot be built"),
        (dict(arch={**SMALL, "drop_path_rate": 0.5}), "unknown key 'drop_path_rate' in arch"),
        (dict(out_indices=(0, 4)), r"out_indices \(0, 4\) must be a sequence that rises from 0 or more to 3 or less"),
        (dict(out_indices=(2, 1)), r"out_indices \(2, 1\) must be a sequence that rises"),
        (dict(out_indices=()), r"out_indices \(\) must be a sequence that rises"),
        (dict(out_indices=3), "out_indices 3 must be a sequence"),
        (dict(out_indices="0"), "out_indices '0' must be a sequence"),
        (dict(frozen_stages=1.5), "frozen_stages 1.5 must be from -1 to 4"),
        (dict(out_norm="LN"), "out_norm 'LN' must be True or False"),
        (dict(arch="raftmlp_s", img_size="224"), "img_size '224' must be one number of pixels"),
        (dict(drop_path_rate="0.1"), "drop_path_rate '0.1' must be at least 0 and less than 1"),
        (dict(out_indices=(0,), first_map="embed"), r"out_indices \(0,\) takes the patch embedding alone"),
        (dict(frozen_stages=5), "frozen_stages 5 must be from -1 to 4"),
        (dict(first_map="stem"), "first_map 'stem' must be 'stage' or 'embed'"),
        (dict(arch={1: 2}), "unknown key 1 in arch"),
        (dict(arch={**SMALL, "depths": 2.5}), "depths 2.5 must be a sequence of whole numbers"),
        (dict(out_indices=(True, 2)), r"out_indices \(True, 2\) must be a sequence that rises"),
        (dict(out_indices={0}), r"out_indices \{0\} must be a sequence that rises"),
        (dict(frozen_stages=True), "frozen_stages True must be from -1 to 4"),
        (dict(first_map=["embed"]), r"first_map \['embed'\] must be 'stage' or 'embed'"),
        (dict(init_cfg="weights.pth"), "init_cfg 'weights.pth' must be a dict, a list of dicts, or None"),
        (dict(arch={**SINGLE, "depths": (2,)}), "needs 3 blocks or more for its 4 maps, this one has 2"),
        (dict(arch={**SMALL, "raft_size": 3}), "raft_size 3.*8"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_numbers_of_numpy():
    backbone = build(out_indices=np.array([0, 2]), frozen_stages=np.int64(1), img_size=np.int32(32))
    assert (backbone.out_indices, backbone.frozen_stages, backbone.model.img_size) == ((0, 2), 1, (32, 32))
    assert {type(i) for i in backbone.out_indices} == {int}


def test_bad_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*missing.pth"):
        build(init_cfg=pretrained(tmp_path / "missing.pth")).init_weights()
    with pytest.raises(FileNotFoundError, match="no pretrained weights raftmlp_s"):
        build("raftmlp_s", init_cfg=pretrained("raftmlp_s")).init_weights()
    for init_cfg in (dict(prefix="backbone.", **pretrained("raftmlp_digits")), dict(type="Pretrained")):
        with pytest.raises(ValueError, match="must be dict\\(type='Pretrained', checkpoint=FILE or NAME\\)"):
            build(init_cfg=init_cfg).init_weights()
