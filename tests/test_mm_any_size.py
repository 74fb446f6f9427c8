"""docs/any_size.py, the ablation of rules for other sizes: its arms fit their configs, its shapes are as painted."""

import json

import numpy as np
import pytest
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image

from helpers import ROOT
from raftmlp.cli import train_mm
from raftmlp.cli.config_files import find_config
from raftmlp.cli.mm_options import config_changes
from raftmlp.mm.checkpoints import patch_mmengine
from raftmlp.mm.configs import read_config

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "docs")
    import any_size  # by its name: the runs' configs import it too
shapes = any_size.shapes


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with small sets of both kinds."""
    from raftmlp.data.scenes import write_scenes

    folder = tmp_path_factory.mktemp("runs")
    write_scenes(folder / "scenes", 2, 1, size=128)
    shapes.write_shapes(folder / "shapes", 4, 2)
    return folder


@pytest.mark.parametrize("task", any_size.TASKS)
@pytest.mark.parametrize("arm", any_size.ARMS)
def test_every_arm_fits_its_config(task, arm, sets, tmp_path):
    patch_mmengine()
    settings = any_size.TASKS[task]
    options = [*any_size.options_of(task, arm, 1), *any_size.evaluation_options(arm, 96)]
    options = [value for value in options if "checkpoint" not in value and "overlay" not in value]  # of pretraining
    data = sets / settings["data"].removeprefix("runs/")
    args = train_mm.build_parser().parse_args(
        [settings["config"], "--data-dir", str(data), "--work-dir", str(tmp_path), "--cfg-options", *options]
    )
    path = find_config(args.config, ".py")
    changes = config_changes(args.cfg_options)
    config = read_config(path, changes, args.data_dir, args.work_dir, args.launcher)
    init_default_scope(config.default_scope)
    size = any_size.ARMS[arm].resized or 96
    for loop in ("train", "test"):
        sample = DATASETS.build(config[f"{loop}_dataloader"].dataset)[0]
        assert sample["inputs"].shape[0] == 3 and (loop == "train" or sample["inputs"].shape[1:] == (size, size))
    if config.model.backbone.type == "RaftMLP":
        config.model.backbone.init_cfg = None
    else:
        config.model.backbone.pretrained = False
    model = MODELS.build(config.model)
    maps = model.extract_feat(sample["inputs"][None].float())
    assert [len(m[0]) for m in maps] == [64] * 4
    assert config.randomness.seed == 1


def test_the_shapes_are_what_is_painted(sets):
    for split, count in (("training", 4), ("validation", 2)):
        content = json.loads((sets / "shapes" / "annotations" / f"instances_{split}.json").read_text())
        assert len(content["images"]) == count
        assert [entry["name"] for entry in content["categories"]] == list(shapes.CLASSES)
        for entry in content["annotations"]:
            pixels = np.asarray(Image.open(sets / f"shapes/images/{split}/{entry['image_id']:05}.jpg"), dtype=float)
            points = np.array(entry["segmentation"][0]).reshape(-1, 2)
            left, top, width, height = entry["bbox"]
            np.testing.assert_allclose([left, top], points.min(0), atol=0.01)
            np.testing.assert_allclose([left + width, top + height], points.max(0), atol=0.01)
            assert min(left, top) >= 0 and max(left + width, top + height) < 128
            assert len(points) == shapes.CORNERS[entry["category_id"] - 1]
            x, y = points.mean(0).round().astype(int)
            assert pixels[y - 2 : y + 3, x - 2 : x + 3].std((0, 1)).max() < 20  # one colour and noise
