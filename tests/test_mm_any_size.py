"""docs/any_size.py, the ablation of rules for other sizes: its arms fit their configs."""

import pytest
from mmengine.registry import DATASETS, MODELS, init_default_scope

from helpers import ROOT
from raftmlp.cli import train_mm
from raftmlp.cli.mm_options import load_config
from raftmlp.data.scenes import write_scenes

with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(ROOT / "docs")
    import any_size  # by its name: the runs' configs import it too


@pytest.mark.parametrize(("number", "task"), list(enumerate(any_size.TASKS)))
def test_every_arm_fits_its_config(number, task, tmp_path):
    settings = any_size.TASKS[task]
    data = tmp_path / settings["data"].removeprefix("runs/")
    write_scenes(data, 2, 1, size=128) if data.name == "scenes" else any_size.shapes.write_shapes(data, 4, 2)
    for arm in [*any_size.ARMS][number :: len(any_size.TASKS)]:
        options = [*any_size.options_of(task, arm, 1), *any_size.evaluation_options(arm, 96)]
        options = [value for value in options if "checkpoint" not in value and "overlay" not in value]  # of pretraining
        words = [settings["config"], "--data-dir", str(data), "--work-dir", str(tmp_path), "--cfg-options", *options]
        config = load_config(train_mm.build_parser().parse_args(words))
        init_default_scope(config.default_scope)
        for loop in ("train", "test"):
            sample = DATASETS.build(config[f"{loop}_dataloader"].dataset)[0]["inputs"]
        assert sample.shape == (3, *[any_size.ARMS[arm].resized or 96] * 2) and config.randomness.seed == 1
        if config.model.backbone.type != "RaftMLP":
            config.model.backbone.pretrained = False
        model = MODELS.build(config.model)
        assert [len(m[0]) for m in model.extract_feat(sample[None].float())] == [64] * 4
