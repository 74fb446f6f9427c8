"""The configs of mmdet and mmseg: those that are shipped, changes in them, and what is checked before a run."""

import re
import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from helpers import ROOT
from raftmlp.cli.config_files import find_config
from raftmlp.errors import UserError
from raftmlp.mm.checkpoints import patch_mmengine
from raftmlp.mm.configs import drop_pretrained, read_config

CONFIGS = ROOT / "configs"
SHIPPED = sorted(CONFIGS.glob("*/*.py"))
DETECTOR = CONFIGS / "detection" / "mask_rcnn_raftmlp_digits.py"
SEGMENTOR = CONFIGS / "segmentation" / "fpn_raftmlp_digits.py"

pytestmark = pytest.mark.usefixtures("patched")


@pytest.fixture(scope="module")
def patched():
    patch_mmengine()


# Those that are shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_config_builds_and_its_neck_fits(path):
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    expected = {  # as the authors report, with the heads of COCO and ADE20K
        "retinanet_raftmlp_s_fpn_1x_coco": 19_588_332,
        "retinanet_raftmlp_m_fpn_1x_coco": 31_581_196,
        "retinanet_raftmlp_l_fpn_1x_coco": 46_783_852,
        "mask_rcnn_raftmlp_s_fpn_1x_coco": 29_505_768,
        "mask_rcnn_raftmlp_m_fpn_1x_coco": 40_917_000,
        "mask_rcnn_raftmlp_l_fpn_1x_coco": 55_538_024,
        "fpn_raftmlp_s_40k_ade20k": 13_605_006,
        "fpn_raftmlp_m_40k_ade20k": 25_016_238,
        "fpn_raftmlp_l_40k_ade20k": 39_637_262,
    }
    assert expected.keys() <= {path.stem for path in SHIPPED}
    assert parameters == expected.get(path.stem, parameters)
    with torch.no_grad():
        maps = model.extract_feat(torch.randn(1, 3, 64, 96))
    assert len(maps) == config.model.neck.num_outs
    strides = {  # of the heads, which must know where each cell of a map lies
        "rpn_head": lambda head: [s[0] for s in head.prior_generator.strides],
        "bbox_head": lambda head: [s[0] for s in head.prior_generator.strides],
        "decode_head": lambda head: head.feature_strides,
    }
    for name, strides_of in strides.items():
        if hasattr(model, name):
            expected_shapes = [(-(-64 // stride), -(-96 // stride)) for stride in strides_of(getattr(model, name))]
            assert [tuple(y.shape[2:]) for y in maps] == expected_shapes
    if hasattr(model, "rpn_head"):
        strides = [s[0] for s in model.rpn_head.prior_generator.strides]
        for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
            assert extractor.featmap_strides == strides[:4]
    if path.stem.endswith("coco"):  # anchors are of the same sizes whatever the strides
        two_stages = hasattr(model, "rpn_head")
        generator = (model.rpn_head if two_stages else model.bbox_head).prior_generator
        assert list(generator.base_sizes) == [(4 if two_stages else 8) * 2**level for level in range(5)]


def test_the_recipes_are_the_release_s():
    for path in CONFIGS.glob("*/*1x_coco.py"):
        config = Config.fromfile(path)
        assert config.optim_wrapper.optimizer == dict(type="AdamW", lr=1e-4, weight_decay=1e-4)
        assert config.train_cfg.max_epochs == 12 and config.param_scheduler[1].milestones == [8, 11]
        warm_up = config.param_scheduler[0]
        assert (warm_up.type, warm_up.start_factor, warm_up.end) == ("LinearLR", 0.001, 500)
        assert config.train_dataloader.batch_size == 2 and config.model.data_preprocessor.pad_size_divisor == 32
        assert config.train_dataloader.dataset.pipeline[2].scale == (1333, 800)
        assert config.model.backbone.get("drop_path_rate", 0) == 0 and config.model.backbone.first_map == "embed"
    for path in CONFIGS.glob("*/*ade20k.py"):
        config = Config.fromfile(path)
        assert config.optim_wrapper.optimizer == dict(type="AdamW", lr=2e-4, weight_decay=1e-4)
        assert config.train_cfg.max_iters == 40000 and config.train_dataloader.batch_size == 4
        [poly] = config.param_scheduler
        assert (poly.type, poly.power, poly.end, poly.eta_min) == ("PolyLR", 0.9, 40000, 0)
        assert config.model.data_preprocessor.size == config.crop_size == (512, 512)


def test_headers_name_their_own_file():
    for path in SHIPPED:
        header = re.match(r"(#.*\n)+", path.read_text())[0]
        name = path.relative_to(CONFIGS).with_suffix("")
        assert f"tools/train_mm.py configs/{name}.py" in header or f"raftmlp train-mm {name}\n" in header
        assert "Expected" in header


def test_a_shipped_config_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in SHIPPED:
        name = str(path.relative_to(CONFIGS).with_suffix(""))
        assert find_config(name, ".py") == find_config(f"configs/{name}.py", ".py") == path
    (tmp_path / "detection").mkdir()
    mine = shutil.copy(DETECTOR, tmp_path / "detection")
    assert find_config("detection/mask_rcnn_raftmlp_digits.py", ".py").samefile(mine)  # a file of one's own goes first


def test_configs_are_the_same_wherever_the_folder_is(tmp_path):
    copy = shutil.copytree(CONFIGS, tmp_path / "site-packages" / "raftmlp" / "configs")
    for path in SHIPPED[::4]:
        assert Config.fromfile(copy / path.relative_to(CONFIGS)).to_dict() == Config.fromfile(path).to_dict()


# Changes


def test_changes():
    config = read_config(DETECTOR, {"optim_wrapper.optimizer.lr": 0.5}, data_dir="mine", work_dir="w", launcher="slurm")
    assert config.optim_wrapper.optimizer == dict(type="raftmlp.mm.Muon", lr=0.5, weight_decay=0.05, nesterov=True)
    assert (config.work_dir, config.launcher) == ("w", "slurm")
    assert config.data_root == config.train_dataloader.dataset.data_root == "mine/"
    assert config.val_evaluator.ann_file == "mine/annotations/instances_validation.json"
    plain = read_config(SEGMENTOR, data_dir="mine")
    assert plain.data_root == "mine" and plain.work_dir == "runs/fpn_raftmlp_digits" and plain.launcher == "none"


@pytest.mark.skipif(torch.cuda.is_available(), reason="SyncBN stays where there is a GPU")
def test_what_a_cpu_cannot_do_is_replaced():
    assert "SyncBN" in Config.fromfile(SEGMENTOR).pretty_text
    assert "SyncBN" not in read_config(SEGMENTOR).pretty_text


def test_drop_pretrained():
    config = read_config(SEGMENTOR, {"model.pretrained": "open-mmlab://resnet50_v1c"})
    drop_pretrained(config)
    assert "init_cfg" not in config.model.backbone and config.model.pretrained is None
    assert config.model.backbone.arch == "raftmlp_digits"


@pytest.mark.parametrize(
    "text, changes, message",
    [
        ("model = dict(); default_scope = 'mmdet'", dict(data_dir="d"), "no data_root that --data-dir could replace"),
        ("model = dict(); default_scope = 'mmdet'", dict(changes={"modle.x": 1}), "no 'modle'; did you mean model"),
        ("model = dict(); default_scope = 'mmdet'", dict(changes={"model.x.y": 1, "sync_bn": "torch"}), None),
        ("model = dict(); default_scope = 'mmdet'", dict(changes={"custom_imports.imports": ["nowhere"]}), "nowhere"),
    ],
)
def test_bad_configs(tmp_path, text, changes, message):
    (tmp_path / "my.py").write_text(text)
    if message is None:
        assert read_config(tmp_path / "my.py", **changes).model.x.y == 1
        return
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "my.py", **changes)
