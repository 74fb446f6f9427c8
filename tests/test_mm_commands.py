"""The commands for mmdet and mmseg, end to end: training, resuming, evaluating, predicting."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from mmdet.visualization import DetLocalVisualizer
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmseg.visualization import SegLocalVisualizer
from PIL import Image

from helpers import ROOT
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import eval_mm, predict_mm, train_mm
from raftmlp.data.scenes import write_scenes
from raftmlp.mm.checkpoints import STAND_INS, list_checkpoints
from raftmlp.mm.runs import read_log

DETECTOR = ROOT / "configs" / "detection" / "mask_rcnn_raftmlp_digits.py"
SEGMENTOR = ROOT / "configs" / "segmentation" / "fpn_raftmlp_digits.py"
SMALL = ["default_hooks.logger.interval=1", "param_scheduler.0.end=2"]
for loop, step in (("train", 2), ("val", 1), ("test", 1)):
    SMALL += [f"{loop}_dataloader.batch_size=2", f"{loop}_dataloader.dataset.pipeline.{step}.scale=(64,64)"]
FOUND = "model.test_cfg.rcnn.score_thr=0"  # a detector that has learnt little finds something too


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=6, val=3, size=64)
    return root


def forget_runs():
    """Let mmengine remember no run before."""
    for kind in (MMLogger, MessageHub, DetLocalVisualizer, SegLocalVisualizer, DefaultScope):
        kind._instance_dict.clear()


@pytest.fixture
def run(run_command, monkeypatch):
    """``run_command`` without what takes the most time of a small run, for its log."""
    monkeypatch.setattr("mmengine.runner.runner.collect_env", dict)
    monkeypatch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))

    def run_afresh(command, *args):
        forget_runs()
        return run_command(command, *args)

    return run_afresh


def options(scenes, work_dir, *changes, epochs=None):
    """The options of a small run; with a number of epochs, that of a detector."""
    if epochs:
        changes = (f"train_cfg.max_epochs={epochs}", f"train_cfg.val_interval={epochs}", FOUND, *changes,
                   f"param_scheduler.1.end={epochs}")  # fmt: skip
    return ["--data-dir", scenes, "--work-dir", work_dir, "--cfg-options", *SMALL, *changes]


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """The folder of a detector's run of five epochs, killed after the first and resumed."""
    work_dir = tmp_path_factory.mktemp("runs") / "detector"
    args = [*map(str, [DETECTOR, *options(scenes, work_dir, epochs=5)])]
    with (work_dir.parent / "log").open("w") as log:
        command = [sys.executable, ROOT / "tools" / "train_mm.py", *args]
        child = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT)
        while child.poll() is None and not (work_dir / "epoch_1.pth").exists():
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, (work_dir.parent / "log").read_text()
    assert list_checkpoints(work_dir)[0].name in ("epoch_1.pth", "epoch_2.pth", "epoch_3.pth")  # not run through
    forget_runs()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["raftmlp train-mm", *args, "--resume"])
        train_mm.main()
    return work_dir


# Training


def test_a_killed_run_is_resumed(trained):
    losses, results = read_log(trained)
    assert [entry["step"] for entry in losses] == list(range(1, 16))  # 6 scenes, 2 at a time, 5 epochs
    values = [entry["loss"] for entry in losses]
    assert np.isfinite(values).all() and np.mean(values[-3:]) < np.mean(values[:3])
    assert [entry["step"] for entry in results] == [5] and "coco/segm_mAP_50" in results[0]
    assert {path.name for path in list_checkpoints(trained)} == {"epoch_4.pth", "epoch_5.pth"}
    assert Image.open(trained / "curves.png").size[0] > 500


def test_a_run_is_not_overwritten_by_mistake(trained, scenes, run, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    before = {path: path.read_bytes() for path in copy.glob("*.pth")}
    cases = [
        ([], [], "holds a run"),
        (["--resume", trained / "epoch_4.pth"], [], "holds another run"),
        (["--overwrite"], ["optim_wrapper.optimizer.type=AdamWW"], "AdamWW"),  # such runs cannot begin
        (["--overwrite"], ["model.neck.in_channels=[1,64,128,128]"], "channels"),
        (["--overwrite"], ["model.backbone.init_cfg.checkpoint=raftmlp_s"], "raftmlp_s"),
    ]
    for flags, changes, message in cases:
        status, _, error = run(train_mm, DETECTOR, *options(scenes, copy, *changes, epochs=1), *flags)
        assert status == 2 and message in error and "Traceback" not in error, error
        assert {path: path.read_bytes() for path in copy.glob("*.pth")} == before
    (copy / "notes.txt").write_text("mine")
    status, _, error = run(train_mm, DETECTOR, *options(scenes, copy, epochs=1), "--overwrite")
    assert status == 0, error
    assert [path.name for path in copy.glob("*.pth")] == ["epoch_1.pth"] and (copy / "notes.txt").exists()
    assert len(read_log(copy)[0]) == 3


def test_two_processes_train_and_evaluate_together(scenes, tmp_path):
    """SyncBN and NCCL in a config become what a CPU has."""
    work_dir = tmp_path / "run"
    changes = ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone"]
    command = [*torchrun, ROOT / "tools" / "train_mm.py", SEGMENTOR, *options(scenes, work_dir, *changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "mIoU" in result.stdout and f"checkpoint: {work_dir / 'iter_2.pth'}" in result.stdout
    assert result.stdout.count("checkpoint: ") == 1  # the first process alone speaks


def changed(checkpoint, path, without=(), **changes):
    """Write a checkpoint in which something is changed or left out."""
    content = {**torch.load(checkpoint, weights_only=False), **changes}
    torch.save({key: value for key, value in content.items() if key not in without}, path)
    return path


class Bomb:
    def __reduce__(self):
        return print, ("exploded",)


def test_resuming_needs_a_run_of_the_same_model(trained, scenes, run, tmp_path):
    last = trained / "epoch_5.pth"
    meta = torch.load(last, weights_only=False)["meta"]
    meta["dataset_meta"]["classes"] = ("zero", *"123456789")
    adamw = [f"optim_wrapper.optimizer.{setting}" for setting in ("_delete_=True", "type=AdamW", "lr=1e-3")]
    bare = changed(last, tmp_path / "bare.pth", without=["optimizer"])
    cases = [
        ([], changed(last, tmp_path / "bomb.pth", bomb=Bomb()), "bomb.pth is damaged"),
        ([], changed(last, tmp_path / "renamed.pth", meta=meta), "'zero'"),
        ([], bare, "no optimizer"),
        (["model.roi_head.bbox_head.fc_out_channels=128"], trained, "roi_head.bbox_head"),
        (adamw, trained, "optimizer"),
    ]
    for changes, file, message in cases:
        arguments = options(scenes, tmp_path / "run", *changes, epochs=5)
        status, out, error = run(train_mm, DETECTOR, *arguments, "--resume", file)
        assert status == 2 and message in error and "Traceback" not in error and "exploded" not in out, error
    gone = "model.backbone.init_cfg.checkpoint=gone.pth"  # what the backbone started from is no longer needed
    status, _, error = run(train_mm, DETECTOR, *options(scenes, trained, gone, epochs=5), "--resume")
    assert status == 0, error
    still = "optim_wrapper.optimizer.lr=0"  # but for the schedule's end of 1e-5
    torch.save(dict(state_dict={"x": torch.zeros(1)}), "foreign.pth")
    status, _, error = run(train_mm, DETECTOR, *options(scenes, "foreign", "load_from=foreign.pth", still, epochs=1))
    assert status == 2 and "load_from foreign.pth" in error
    status, _, error = run(train_mm, DETECTOR, *options(scenes, "other", f"load_from={bare}", still, epochs=1))
    assert status == 0, error
    state, before = (load_checkpoint(path, STAND_INS)["state_dict"] for path in ("other/epoch_1.pth", bare))
    assert all((state[key] - value).abs().max() < 1e-3 for key, value in before.items() if key.endswith("weight"))


# Evaluation and prediction


def test_evaluation_gives_the_figures_of_training(trained, scenes, run):
    before = {path: path.read_bytes() for path in trained.glob("*.*")}
    arguments = ["--data-dir", scenes, "--results-file", "results.json", "--show-dir", "shown", "--picture", "all.png"]
    arguments += ["--score-thr", "0", "--cfg-options", "load_from=gone.pth", *SMALL, FOUND]  # the checkpoint counts
    status, out, error = run(eval_mm, DETECTOR, trained, *arguments)
    assert status == 0, error
    _, results = read_log(trained)
    written = json.loads(Path("results.json").read_text())
    for name in ("coco/bbox_mAP", "coco/segm_mAP_50"):
        assert written[name] == pytest.approx(results[-1][name], abs=1e-6)
        assert f"{name} {written[name]:.4g}" in out
    shown = sorted(Path("shown").iterdir())
    assert [path.name for path in shown] == [f"{i:05}.png" for i in range(3)]
    assert Image.open(shown[0]).size == (2 * 64, 64)  # truth and prediction
    assert Image.open("all.png").size[0] > 500
    assert {path: path.read_bytes() for path in trained.glob("*.*")} == before and (trained / "test").is_dir()


def test_mmdet_s_own_inferencer_takes_it(trained, scenes):
    config, checkpoint = str(next(trained.glob("*.py"))), str(trained / "epoch_5.pth")
    inferencer = DetInferencer(config, checkpoint, device="cpu", show_progress=False)
    found = inferencer(str(scenes / "images" / "validation" / "00000.jpg"), no_save_vis=True)["predictions"][0]
    assert len(found["scores"]) == len(found["labels"]) == len(found["bboxes"]) > 0


def test_prediction_at_any_size(trained, scenes, run):
    photo = Image.open(scenes / "images" / "validation" / "00000.jpg")
    Path("photos").mkdir()
    sizes = {"a.png": (1, 1), "b.jpg": (600, 20), "c.jpg": (20, 600), "d.png": (64, 64)}
    for name, size in sizes.items():
        photo.resize(size).save(Path("photos") / name)
    Path("photos/e.jpg").write_bytes(b"no image")
    arguments = [trained / "epoch_5.pth", "photos", "--out", "out", "--score-thr", 0, "--cfg-options", FOUND]
    status, _, error = run(predict_mm, DETECTOR, *arguments)
    assert status == 2 and "photos/e.jpg" in error and "1 of 5 images" in error
    content = json.loads(Path("out/predictions.json").read_text())
    assert [entry["file"] for entry in content["images"]] == [f"photos/{name}" for name in sizes]
    for entry, (width, height) in zip(content["images"], sizes.values()):
        assert Image.open(Path("out") / entry["picture"]).size == (width, height)
    for found in entry["objects"]:
        left, top, right, bottom = found["box"]
        assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
        assert found["name"] in content["classes"] and 0 <= found["score"] <= 1
    assert entry["objects"]


def test_a_segmentor_is_trained_and_evaluated(trained, scenes, run, tmp_path):
    changes = [f"{key}=6" for key in ("train_cfg.max_iters", "train_cfg.val_interval", "param_scheduler.1.end")]
    changes += ["default_hooks.checkpoint.interval=3"]
    status, out, error = run(train_mm, SEGMENTOR, *options(scenes, tmp_path / "run", *changes))
    assert status == 0, error
    assert re.search(r"aAcc [\d.]+, mIoU [\d.]+, mAcc [\d.]+", out)
    losses, results = read_log(tmp_path / "run")
    assert losses[-1]["loss"] < losses[0]["loss"] and results[0]["step"] == 6

    checkpoint = tmp_path / "run" / "iter_6.pth"
    arguments = [*options(scenes, tmp_path / "test"), "--show-dir", "shown", "--results-file", "results.json"]
    status, _, error = run(eval_mm, SEGMENTOR, checkpoint, *arguments)
    assert status == 0, error
    assert json.loads(Path("results.json").read_text())["mIoU"] == pytest.approx(results[0]["mIoU"], abs=1e-6)
    assert sorted(path.name for path in Path("shown").iterdir()) == [f"{i:05}.png" for i in range(3)]
    status, _, error = run(eval_mm, SEGMENTOR, trained, *options(scenes, tmp_path / "test"))
    assert status == 2 and "does not fit" in error  # a detector's

    Image.new("RGB", (1, 1)).save("dot.png")
    status, _, error = run(predict_mm, SEGMENTOR, checkpoint, scenes / "images/validation", "dot.png", "--out", "out")
    assert status == 0, error
    entries = json.loads(Path("out/predictions.json").read_text())["images"]
    labels = [np.asarray(Image.open(Path("out") / entry["label_map"])) for entry in entries]
    assert [label.shape for label in labels] == [(64, 64)] * 3 + [(1, 1)] and max(map(np.max, labels)) <= 10
