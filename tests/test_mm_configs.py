"""The configs of mmdet and mmseg: those that are shipped, and changes in them."""

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
from raftmlp.mm.data import check_data_root

CONFIGS = ROOT / "configs"
SHIPPED = sorted(CONFIGS.glob("*/*.py"))
DETECTOR = CONFIGS / "detection" / "mask_rcnn_raftmlp_digits.py"
SEGMENTOR = CONFIGS / "segmentation" / "fpn_raftmlp_digits.py"
PARAMETERS = dict(  # as the authors report, with the heads of COCO and ADE20K
    retinanet_raftmlp_s_fpn_1x_coco=19_588_332,
    retinanet_raftmlp_m_fpn_1x_coco=31_581_196,
    retinanet_raftmlp_l_fpn_1x_coco=46_783_852,
    mask_rcnn_raftmlp_s_fpn_1x_coco=29_505_768,
    mask_rcnn_raftmlp_m_fpn_1x_coco=40_917_000,
    mask_rcnn_raftmlp_l_fpn_1x_coco=55_538_024,
    fpn_raftmlp_s_40k_ade20k=13_605_006,
    fpn_raftmlp_m_40k_ade20k=25_016_238,
    fpn_raftmlp_l_40k_ade20k=39_637_262,
)


@pytest.fixture(scope="module", autouse=True)
def patched():
    patch_mmengine()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@torch.no_grad()
def test_every_config_builds_and_its_parts_fit(path):
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == PARAMETERS.get(path.stem, parameters)
    maps = model.extract_feat(torch.empty(1, 3, 64, 96, device="meta"))
    assert len(maps) == config.model.neck.num_outs
    head = getattr(model, "rpn_head", None) or getattr(model, "bbox_head", None)
    strides = [s[0] for s in head.prior_generator.strides] if head else model.decode_head.feature_strides
    shapes = [(-(-64 // stride), -(-96 // stride)) for stride in strides]  # the head knows where each cell lies
    assert [tuple(y.shape[2:]) for y in maps] == shapes
    if hasattr(model, "roi_head"):
        for extractor in (model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor):
            assert extractor.featmap_strides == strides[:4]
    if path.stem.endswith("coco"):  # anchors are of the same sizes whatever the strides
        smallest = 4 if hasattr(model, "roi_head") else 8
        assert list(head.prior_generator.base_sizes) == [smallest * 2**level for level in range(5)]


def test_the_recipes_are_the_release_s():
    for path in CONFIGS.glob("*/*raftmlp_s_fpn_1x_coco.py"):
        config = Config.fromfile(path)
        assert config.optim_wrapper.optimizer == dict(type="AdamW", lr=1e-4, weight_decay=1e-4)
        assert config.train_cfg.max_epochs == 12 and config.param_scheduler[1].milestones == [8, 11]
        assert config.train_dataloader.batch_size == 2 and config.model.backbone.first_map == "embed"
    for path in CONFIGS.glob("*/*raftmlp_s_40k_ade20k.py"):
        config = Config.fromfile(path)
        assert config.optim_wrapper.optimizer == dict(type="AdamW", lr=2e-4, weight_decay=1e-4)
        assert config.train_cfg.max_iters == 40000 and config.train_dataloader.batch_size == 4
        [poly] = config.param_scheduler
        assert (poly.type, poly.power, poly.end, poly.eta_min) == ("PolyLR", 0.9, 40000, 0)


def test_a_shipped_config_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in SHIPPED:
        name = str(path.relative_to(CONFIGS).with_suffix(""))
        assert find_config(name, ".py") == find_config(f"configs/{name}.py", ".py") == path
        assert name in re.match(r"(#.*\n)+", path.read_text())[0]  # its header has its own command
    (tmp_path / "detection").mkdir()
    mine = shutil.copy(DETECTOR, tmp_path / "detection")
    assert find_config("detection/mask_rcnn_raftmlp_digits.py", ".py").samefile(mine)  # a file of one's own goes first


def test_changes():
    config = read_config(DETECTOR, {"optim_wrapper.optimizer.lr": 0.5}, data_dir="mine", work_dir="w", launcher="slurm")
    assert config.optim_wrapper.optimizer == dict(type="raftmlp.mm.Muon", lr=0.5, weight_decay=0.05, nesterov=True)
    assert (config.work_dir, config.launcher) == ("w", "slurm")
    assert config.data_root == config.train_dataloader.dataset.data_root == "mine/"
    assert config.val_evaluator.ann_file == "mine/annotations/instances_validation.json"
    plain = read_config(SEGMENTOR, {"model.pretrained": "open-mmlab://resnet50_v1c"}, data_dir="mine")
    assert plain.data_root == "mine" and plain.work_dir == "runs/fpn_raftmlp_digits" and plain.launcher == "none"
    assert ("SyncBN" in plain.pretty_text) == torch.cuda.is_available()  # which a CPU does not have
    drop_pretrained(plain)
    assert "init_cfg" not in plain.model.backbone and plain.model.pretrained is None


def test_changes_that_nothing_would_heed_are_refused(tmp_path):
    with pytest.raises(UserError, match="data_root is mine/"):
        check_data_root(read_config(DETECTOR, {"data_root": "mine/"}), ["train"])
    (tmp_path / "my.py").write_text("model = dict(); default_scope = 'mmdet'")
    assert read_config(tmp_path / "my.py", {"model.x.y": 1, "sync_bn": "torch"}).model.x.y == 1
    for changes, error in ((dict(data_dir="d"), "data_root"), (dict(changes={"modle.x": 1}), "modle.x")):
        with pytest.raises(UserError, match=error):
            read_config(tmp_path / "my.py", **changes)
