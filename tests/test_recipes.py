"""The recipes in configs/: each trains, and the release's are what its authors trained with."""

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from helpers import ROOT
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import train
from raftmlp.data.augmentation import BatchAugmentation, MixupThenCutmix, training_transform
from raftmlp.data.images import data_config
from raftmlp.train.settings import TrainSettings
from raftmlp.train.train_step import create_optimization

CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "studies")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A fake ImageNet: four tiny images of two classes, for training and for evaluation."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A small network for the two classes, in place of those that timm would download."""
    folder = tmp_path_factory.mktemp("teacher")
    save_for_hf(timm.create_model("test_resnet", num_classes=2), folder)
    return f"local-dir:{folder}"


def read_config(name: str | Path) -> TrainSettings:
    return TrainSettings.select(vars(train.build_parser().parse_args(["-c", str(name)])))


def one_of_each_kind() -> list[Path]:
    """Return the configs without those that differ from another in model, drop path, data or folder alone."""
    kinds = {}
    for config in CONFIGS:
        settings = asdict(read_config(config))
        for key in ("model", "drop_path", "dataset", "output"):
            del settings[key]
        kinds.setdefault(str(settings), config)
    return list(kinds.values())


@pytest.mark.parametrize("config", one_of_each_kind(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_kind_of_recipe_trains_two_steps(config, run_command, imagenet, teacher):
    settings = read_config(config)
    model, kwargs = settings.model or "raftmlp_s", {}
    options = ["-c", config, "--dataset", "", "--data-dir", imagenet, "--epochs", 1, "--warmup-epochs", 0]
    options += ["--global-batch-size", 2, "--batch-size", 2, "--img-size", 64]
    options += ["--workers", 0, "--device", "cpu", "--output", "out"]
    if settings.kd_model_name:
        options += ["--kd-model-name", teacher]
    if model != "raftmlp_36_r2":  # which keeps its width and depth
        levels = len(timm.create_model(model).stages)
        kwargs = dict(embed_dims=(8,) * levels, depths=(1,) * levels)
        options += ["--model-kwargs", *(f"{key}={value}".replace(" ", "") for key, value in kwargs.items())]
    status, out, err = run_command(train, *options)
    assert status == 0, err
    assert "1 epochs of 2 updates of 2 images" in out and out.startswith(f"{model}, ")
    state = load_checkpoint("out/last.pth.tar")["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    expected = timm.create_model(model, num_classes=2, img_size=64, **kwargs).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}


def test_the_configs_are_all_there_and_say_how_they_are_run():
    names = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in CONFIGS}
    variants = {name for name in timm.list_models("raftmlp_*") if "cifar" not in name and "digits" not in name}
    assert names >= {f"imagenet/{name}" for name in variants} and len(variants) == 10
    assert names >= {f"finetune/{name}" for name in ("cifar10", "cifar100", "flowers102", "cars", "inat18", "inat19")}
    for config in CONFIGS:
        text = config.read_text()
        name = config.relative_to(ROOT / "configs").with_suffix("")
        assert re.search(rf"#   (raftmlp train|torchrun .* -m raftmlp train) -c {name}( |$)", text, re.MULTILINE)
        assert "Not run" in text or re.search(r"\d\.\d+ %", text)  # a figure that was seen


@pytest.mark.parametrize(
    "name, images, peak, warmup, epochs",
    [("imagenet/raftmlp_36_r2", 1_281_167, 1.5e-3, 5, 305), ("finetune/cars", 8144, 1e-4, 10, 50)],
)
def test_the_releases_learning_rate(name, images, peak, warmup, epochs):
    settings = read_config(name)
    updates = images // settings.global_batch_size
    optimizer, scheduler = create_optimization(settings, torch.nn.Linear(2, 2), updates)
    start, total = warmup * updates, epochs * updates
    middle = (total + start) // 2
    for update, lr in {0: 0.0, start // 2: peak / 2, start: peak, middle: (peak + 1e-5) / 2, total: 1e-5}.items():
        scheduler.step_update(update)
        assert all(group["lr"] == pytest.approx(lr, abs=peak / start) for group in optimizer.param_groups), update


def test_the_releases_recipe():
    settings = read_config("imagenet/raftmlp_s")
    model = timm.create_model("raftmlp_s", drop_path_rate=settings.drop_path)
    optimizer, _ = create_optimization(settings, model, 625)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [
        (len(list(model.parameters())), 0.05)
    ]
    assert type(optimizer) is torch.optim.AdamW
    rates = {m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"}
    assert rates == {0.1}
    config = data_config(settings, model)
    assert (config["input_size"], config["interpolation"], config["crop_pct"]) == ((3, 224, 224), "bilinear", 0.875)
    steps = training_transform(settings, config).transforms
    names = [type(step).__name__ for step in steps]
    assert names == [
        "Resize", "RandomCrop", "RandomHorizontalFlip", "ColorJitter", "RandAugment", "MaybePILToTensor",
        "RandomErasing",
    ]  # fmt: skip
    assert (steps[0].size, steps[1].size, steps[2].p) == (256, (224, 224), 0.5)
    assert steps[3].brightness == steps[3].contrast == steps[3].saturation == (0.6, 1.4) and steps[3].hue is None
    assert steps[4].num_layers == 2 and all(operation.prob == 1 for operation in steps[4].ops)
    assert (steps[6].p, steps[6].scale, steps[6].ratio) == (0.25, (0.02, 1 / 3), (0.3, 1 / 0.3))
    mix = BatchAugmentation(settings, [256], 1000, settings.smoothing, torch.device("cpu")).mix
    assert (type(mix), mix.mixup, mix.cutmix, mix.smoothing) == (MixupThenCutmix, 0.8, 0.8, 0.1)
    assert (settings.epochs, settings.global_batch_size, settings.amp, settings.model_ema, settings.seed) == (
        305, 2048, False, False, 42,
    )  # fmt: skip
    modern = read_config("imagenet/raftmlp_s_modern")
    optimizer, _ = create_optimization(modern, model, 625)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, 0.05]
    for group in optimizer.param_groups:
        assert all((parameter.ndim <= 1) == (group["weight_decay"] == 0) for parameter in group["params"])
    tuned = read_config("finetune/inat19")
    assert (tuned.drop_path, tuned.cutout, tuned.weight_decay, tuned.mixup) == (0, 0, 1e-4, 0.8)
