"""The commands for mmdet and mmseg, end to end: training, resuming, evaluating, predicting, messages on bad input."""

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
from raftmlp import RaftMLP
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import eval_mm, predict_mm, train_mm
from raftmlp.data.scenes import write_scenes
from raftmlp.mm.checkpoints import list_checkpoints
from raftmlp.mm.runs import read_log
from raftmlp.mm.stand_ins import STAND_INS

CONFIGS = ROOT / "configs"
DETECTOR = CONFIGS / "detection" / "mask_rcnn_raftmlp_digits.py"
SEGMENTOR = CONFIGS / "segmentation" / "fpn_raftmlp_digits.py"
FAST = ["train_dataloader.batch_size=2", "val_dataloader.batch_size=2", "default_hooks.logger.interval=1"]
EVERYTHING = ["model.test_cfg.rcnn.score_thr=0"]  # a detector that has learnt little finds something too


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=8, val=4, size=96)
    return root


@pytest.fixture
def run(run_command):
    """``run_command`` where mmengine remembers no run before."""

    def run_afresh(command, *args):
        for kind in (MMLogger, MessageHub, DetLocalVisualizer, SegLocalVisualizer, DefaultScope):
            kind._instance_dict.clear()
        return run_command(command, *args)

    return run_afresh


def options(scenes, work_dir, *changes, epochs=None):
    """The command line of a small run."""
    if epochs:
        changes = (f"train_cfg.max_epochs={epochs}", f"train_cfg.val_interval={epochs}", "param_scheduler.0.end=2",
                   f"param_scheduler.1.end={epochs}", *EVERYTHING, *changes)  # fmt: skip
    return ["--data-dir", scenes, "--work-dir", work_dir, "--cfg-options", *FAST, *changes]


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """The folder of a detector's run of six epochs, killed in the third and resumed."""
    work_dir = tmp_path_factory.mktemp("runs") / "detector"
    command = [sys.executable, ROOT / "tools" / "train_mm.py", DETECTOR, *options(scenes, work_dir, epochs=6)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (work_dir.parent / "log").open("w") as log:
        child = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment, cwd=ROOT)
        while child.poll() is None and not (work_dir / "epoch_2.pth").exists():
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, (work_dir.parent / "log").read_text()
    killed_at = list_checkpoints(work_dir)[0].name
    assert killed_at in ("epoch_2.pth", "epoch_3.pth")  # not run through
    result = subprocess.run([*map(str, command), "--resume"], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert f"resumed epoch: {killed_at[6]}" in result.stdout + result.stderr
    assert f"checkpoint: {work_dir / 'epoch_6.pth'}" in result.stdout
    return work_dir


# Training


def test_the_loss_falls_over_kill_and_resume(trained):
    losses, results = read_log(trained)
    assert [entry["step"] for entry in losses] == list(range(1, 25))  # 8 scenes, 2 at a time, 6 epochs
    values = [entry["loss"] for entry in losses]
    assert np.isfinite(values).all() and np.mean(values[-4:]) < 0.8 * np.mean(values[:4])
    assert [entry["step"] for entry in results] == [6] and "coco/segm_mAP_50" in results[0]
    assert {path.name for path in list_checkpoints(trained)} == {"epoch_5.pth", "epoch_6.pth"}
    assert Image.open(trained / "curves.png").size[0] > 500


def test_a_finished_run_is_resumed_to_nothing(trained, scenes, run):
    before = {path: path.read_bytes() for path in trained.glob("*.pth")}
    status, out, _ = run(train_mm, DETECTOR, *options(scenes, trained, epochs=6), "--resume")
    assert status == 0 and out.count(f"{trained / 'epoch_6.pth'} is the end of its run: nothing is left to train") == 1
    assert {path: path.read_bytes() for path in trained.glob("*.pth")} == before


def test_a_run_is_not_overwritten_by_mistake(trained, scenes, run, tmp_path):
    status, _, error = run(train_mm, DETECTOR, *options(scenes, trained, epochs=6))
    assert status == 2 and f"{trained} holds a run: give --resume, --overwrite or another --work-dir" in error
    copy = shutil.copytree(trained, tmp_path / "copy")
    status, _, error = run(train_mm, DETECTOR, *options(scenes, copy, epochs=6), "--resume", trained / "epoch_5.pth")
    assert status == 2 and f"{copy} holds another run than that of {trained / 'epoch_5.pth'}" in error
    (copy / "notes.txt").write_text("mine")
    changes = ["model.backbone.frozen_stages=2", "model.backbone.with_cp=True"]
    status, _, error = run(train_mm, DETECTOR, *options(scenes, "copy", *changes, epochs=1), "--overwrite")
    assert status == 0, error
    assert [path.name for path in copy.glob("*.pth")] == ["epoch_1.pth"] and (copy / "notes.txt").exists()
    assert len(read_log(copy)[0]) == 4
    shipped = load_checkpoint(ROOT / "weights" / "raftmlp_digits.sklearn.safetensors")
    state = load_checkpoint(copy / "epoch_1.pth", STAND_INS)["state_dict"]
    name = "channels.fc1.weight"  # what is frozen is still what was shipped
    assert torch.equal(state[f"backbone.model.stages.1.blocks.0.{name}"], shipped[f"stages.1.blocks.0.{name}"])
    assert not torch.equal(state[f"backbone.model.stages.2.blocks.0.{name}"], shipped[f"stages.2.blocks.0.{name}"])


def test_two_processes_train_evaluate_and_stop_together(scenes, tmp_path):
    """SyncBN and NCCL in a config become what a CPU has."""
    work_dir = tmp_path / "run"
    changes = ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone"]
    command = [*torchrun, ROOT / "tools" / "train_mm.py", SEGMENTOR, *options(scenes, work_dir, *changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("mIoU") and f"checkpoint: {work_dir / 'iter_2.pth'}" in result.stdout
    assert result.stdout.count("checkpoint: ") == 1  # the first process alone speaks

    for more, message in (
        ([], "holds a run"),  # before the processes have joined
        (["optim_wrapper.type=OptimWraper", "--overwrite"], "cannot build the optimizer"),  # after
    ):
        line = [*map(str, command), *more]
        refused = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
        assert refused.returncode != 0 and refused.stderr.count(message) == 1, refused.stderr


class Bomb:
    def __reduce__(self):
        return print, ("exploded",)


def test_no_code_in_a_checkpoint_is_run(trained, scenes, run, tmp_path):
    torch.save({**torch.load(trained / "epoch_6.pth", weights_only=False), "bomb": Bomb()}, tmp_path / "bomb.pth")
    arguments = options(scenes, tmp_path / "run", epochs=6)
    for command, args in (
        (train_mm, [DETECTOR, *arguments, "--resume", tmp_path / "bomb.pth"]),
        (eval_mm, [DETECTOR, tmp_path / "bomb.pth", *arguments]),
        (predict_mm, [DETECTOR, tmp_path / "bomb.pth", scenes / "images"]),
    ):
        status, out, error = run(command, *args)
        assert status == 2 and "bomb.pth is damaged, or holds more than tensors and plain data" in error
        assert "exploded" not in out


def zeroed(checkpoint, path, **changes):
    """Write a checkpoint with all weights 0, and what else is changed."""
    content = load_checkpoint(checkpoint, STAND_INS)
    content["state_dict"] = {key: torch.zeros_like(value) for key, value in content["state_dict"].items()}
    content = {**content, **changes}
    torch.save({key: value for key, value in content.items() if value is not None and key != "message_hub"}, path)
    return path


def test_load_from_is_where_training_starts_and_nothing_to_evaluation(trained, scenes, run, tmp_path):
    zero = zeroed(trained / "epoch_6.pth", tmp_path / "zero.pth", optimizer=None)
    load_from, still = f"load_from={zero}", "optim_wrapper.optimizer.lr=0"  # but for the schedule's end of 1e-5
    status, _, error = run(train_mm, DETECTOR, *options(scenes, tmp_path / "run", load_from, still, epochs=1))
    assert status == 0, error
    state = load_checkpoint(tmp_path / "run" / "epoch_1.pth", STAND_INS)["state_dict"]
    fewer = ["model.roi_head.bbox_head.fc_out_channels=32", f"load_from={trained / 'epoch_6.pth'}"]
    status, out, error = run(train_mm, DETECTOR, *options(scenes, tmp_path / "fewer", *fewer, epochs=1))
    assert status == 0 and "fits in part" in out and "roi_head.bbox_head.shared_fcs" in out, error
    assert max(value.abs().max() for key, value in state.items() if key.endswith(("weight", "bias"))) < 1e-3
    arguments = [*options(scenes, tmp_path / "test", load_from, *EVERYTHING), "--results-file", "results.json"]
    status, _, error = run(eval_mm, DETECTOR, trained, *arguments)
    assert status == 0, error
    _, results = read_log(trained)
    written = json.loads(Path("results.json").read_text())
    assert written["coco/bbox_mAP_50"] == pytest.approx(results[-1]["coco/bbox_mAP_50"], abs=1e-6)


def test_a_run_s_config_survives_its_evaluation(trained, scenes, run, monkeypatch):
    before = {path: path.read_bytes() for path in trained.glob("*.*")}
    status, _, error = run(
        eval_mm, DETECTOR, trained, "--data-dir", scenes, "--cfg-options", f"work_dir={trained}", *FAST
    )
    assert status == 0, error
    assert {path: path.read_bytes() for path in trained.glob("*.*")} == before
    assert list((trained / "test").iterdir())


def test_resuming_needs_a_run_of_the_same_model(trained, scenes, run, tmp_path):
    zero = zeroed(trained / "epoch_6.pth", tmp_path / "zero.pth", optimizer=None)
    strange = zeroed(trained / "epoch_6.pth", tmp_path / "strange.pth", state_dict=[1, 2])
    other = "model.roi_head.bbox_head.fc_out_channels=128"
    gone = "model.backbone.init_cfg.checkpoint=gone.pth"
    adamw = [f"optim_wrapper.optimizer.{setting}" for setting in ("_delete_=True", "type=AdamW", "lr=1e-3")]
    content = torch.load(trained / "epoch_6.pth", weights_only=False)
    content["meta"]["dataset_meta"]["classes"] = ("zero", *"123456789")
    torch.save(content, tmp_path / "renamed.pth")
    cases = [
        ([], tmp_path / "renamed.pth", 2, "cannot be resumed: it was trained on the classes 'zero', '1'"),
        ([], zero, 2, f"{zero} cannot be resumed: it has no message_hub; to start from its weights give --cfg-options"),
        ([], strange, 2, "holds no weights of a model of mmdet or mmseg"),
        ([other], trained, 2, "does not fit the config's model: roi_head.bbox_head"),
        (adamw, trained, 2, "cannot be resumed: it is of a run with raftmlp.mm.Muon, the config has AdamW; to start"),
        ([gone], trained, 0, ""),  # what the backbone started from is no longer needed
    ]
    for number, (changes, file, expected, message) in enumerate(cases):
        arguments = options(scenes, tmp_path / str(number), *changes, epochs=6)
        status, _, error = run(train_mm, DETECTOR, *arguments, "--resume", file)
        assert status == expected and message in error and "Traceback" not in error, error


def test_a_run_survives_an_overwrite_that_cannot_begin(trained, scenes, run, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    shutil.copy(copy / "epoch_6.pth", copy / "best_coco_bbox_mAP_epoch_6.pth")
    before = {path.name for path in copy.glob("*.*")}
    torch.save({"state_dict": {"weight": torch.ones(3)}}, tmp_path / "other.pth")
    cases = [
        ("model.backbone.arch=raftmlp_q", "unknown arch"),
        ("optim_wrapper.optimizer.type=AdamWW", "cannot build the optimizer or its schedules"),
        ("optim_wrapper.optimizer.type=raftmlp.mm.Muonn", "raftmlp.mm.Muonn is no optimizer of mmengine and no class"),
        ("optim_wrapper.optimizer.lr=fast", "cannot build the optimizer or its schedules"),
        ("param_scheduler.0.type=LinearLRR", "cannot build the optimizer or its schedules"),
        (f"load_from={tmp_path}/missing.pth", "no checkpoint at"),
        (f"load_from={tmp_path}/other.pth", "it has no weights of the config's model"),
    ]
    for wrong, message in cases:
        status, _, error = run(train_mm, DETECTOR, *options(scenes, copy, wrong, epochs=1), "--overwrite")
        assert status == 2 and message in error and "Traceback" not in error, error
        assert {path.name for path in copy.glob("*.*")} == before and len(read_log(copy)[0]) == 24
    for path in copy.glob("epoch_*"):
        path.unlink()
    status, _, error = run(train_mm, DETECTOR, *options(scenes, copy, epochs=1))
    assert status == 2 and "holds a run" in error and (copy / "best_coco_bbox_mAP_epoch_6.pth").exists()


@pytest.mark.parametrize(
    ("config", "file", "content", "workers"),
    [
        (DETECTOR, "images/training/00003.jpg", b"no image", 0),
        (DETECTOR, "images/training/00003.jpg", b"", 2),
        (SEGMENTOR, "images/training/00003.jpg", b"", 0),
        (SEGMENTOR, "annotations/training/00005.png", b"no image", 2),
        (SEGMENTOR, "annotations/training/00005.png", "images/training/00005.jpg", 2),  # in place of a label map
    ],
)
@pytest.mark.parametrize("sampled", [1, 8])
def test_a_damaged_file_is_named(scenes, run, tmp_path, monkeypatch, config, file, content, workers, sampled):
    """Before training if it is in the sample, else when it is loaded, by another process too."""
    monkeypatch.setattr("raftmlp.mm.data.SAMPLED", sampled)
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    path = copy / file
    path.write_bytes(content if isinstance(content, bytes) else (copy / content).read_bytes())
    change = f"train_dataloader.num_workers={workers}"
    status, out, error = run(train_mm, config, *options(copy, tmp_path / "run", change))
    assert status == 2 and re.search(f"error: (cannot read )?{path}", error) and "Traceback" not in error
    assert sampled == 1 or "loss:" not in out + error


def test_damaged_annotations_are_named(scenes, run, tmp_path):
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    path = copy / "annotations" / "instances_training.json"
    content = json.loads(path.read_text())
    cases = [
        (b"{", "Expecting"),
        (json.dumps({**content, "images": [], "annotations": []}).encode(), "no image is left"),
    ]
    for written, message in cases:
        path.write_bytes(written)
        status, _, error = run(train_mm, DETECTOR, *options(copy, tmp_path / "run", epochs=1))
        assert status == 2 and message in error and "annotations/instances_training.json" in error, error


def test_images_without_objects(scenes, run, tmp_path):
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    path = copy / "annotations" / "instances_training.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] >= 6]
    path.write_text(json.dumps(content))
    keep = "train_dataloader.dataset.filter_cfg.filter_empty_gt=False"
    for change, iterations in ((keep, 4), (keep.replace("False", "True"), 1)):
        status, _, error = run(train_mm, DETECTOR, *options(copy, tmp_path / change[-5:], change, epochs=1))
        assert status == 0, error
        losses, _ = read_log(tmp_path / change[-5:])
        assert len(losses) == iterations and np.isfinite([entry["loss"] for entry in losses]).all()


def test_a_segmentor_is_trained_and_evaluated(scenes, run, tmp_path):
    changes = [
        "train_cfg.max_iters=8",
        "train_cfg.val_interval=8",
        "param_scheduler.0.end=2",
        "param_scheduler.1.end=8",
    ]
    changes += ["default_hooks.checkpoint.interval=4"]
    status, out, error = run(train_mm, SEGMENTOR, *options(scenes, tmp_path / "run", *changes))
    assert status == 0, error
    assert re.search(r"aAcc [\d.]+, mIoU [\d.]+, mAcc [\d.]+", out)
    losses, results = read_log(tmp_path / "run")
    assert losses[-1]["loss"] < losses[0]["loss"] and results[0]["step"] == 8

    checkpoint = tmp_path / "run" / "iter_8.pth"
    arguments = [*options(scenes, tmp_path / "test"), "--show-dir", "shown", "--results-file", "results.json"]
    status, _, error = run(eval_mm, SEGMENTOR, checkpoint, *arguments)
    assert status == 0, error
    assert json.loads(Path("results.json").read_text())["mIoU"] == pytest.approx(results[0]["mIoU"], abs=1e-6)
    assert sorted(path.name for path in Path("shown").iterdir()) == [f"{i:05}.png" for i in range(4)]

    images = scenes / "images" / "validation"
    status, _, error = run(predict_mm, SEGMENTOR, checkpoint, images, "--out", "out")
    assert status == 0, error
    Image.new("RGB", (1, 1)).save("dot.png")
    status, out, error = run(predict_mm, SEGMENTOR, checkpoint, "dot.png", "--out", "dot")
    assert status == 0 and Image.open("dot/00000_dot_labels.png").size == (1, 1), error
    entries = json.loads(Path("out/predictions.json").read_text())["images"]
    labels = np.asarray(Image.open(Path("out") / entries[0]["label_map"]))
    assert len(entries) == 4 and labels.shape == (96, 96) and labels.max() <= 10


# Evaluation and prediction


def test_evaluation_gives_the_figures_of_training(trained, scenes, run):
    arguments = [*options(scenes, "test", *EVERYTHING), "--results-file", "results.json"]
    arguments += ["--show-dir", "shown", "--score-thr", "0"]
    status, out, error = run(eval_mm, DETECTOR, trained / "epoch_6.pth", *arguments)
    assert status == 0, error
    _, results = read_log(trained)
    written = json.loads(Path("results.json").read_text())
    for name in ("coco/bbox_mAP", "coco/segm_mAP_50"):
        assert written[name] == pytest.approx(results[-1][name], abs=1e-6)
        assert f"{name} {written[name]:.4g}" in out
    shown = sorted(Path("shown").iterdir())
    assert [path.name for path in shown] == [f"{i:05}.png" for i in range(4)]
    assert Image.open(shown[0]).size == (2 * 96, 96)  # truth and prediction


def test_mmdet_s_own_inferencer_takes_it(trained, scenes):
    config, checkpoint = str(next(trained.glob("*.py"))), str(trained / "epoch_6.pth")
    inferencer = DetInferencer(config, checkpoint, device="cpu", show_progress=False)
    found = inferencer(str(scenes / "images" / "validation" / "00000.jpg"), no_save_vis=True)["predictions"][0]
    assert len(found["scores"]) == len(found["labels"]) == len(found["bboxes"]) > 0


def test_prediction_at_any_size(trained, scenes, run):
    photo = Image.open(scenes / "images" / "validation" / "00000.jpg")
    Path("photos").mkdir()
    for name, size in (("a.png", (1, 1)), ("b.jpg", (3000, 20)), ("c.jpg", (20, 3000)), ("d.png", (96, 96))):
        photo.resize(size).save(Path("photos") / name)
    Path("photos/e.jpg").write_bytes(b"no image")
    command = [DETECTOR, trained / "epoch_6.pth", "photos", "--out", "out", "--score-thr", 0]
    status, _, error = run(predict_mm, *command, "--cfg-options", *EVERYTHING)
    assert status == 2
    assert "cannot read photos/e.jpg" in error and "1 of 5 images could not be read" in error
    content = json.loads(Path("out/predictions.json").read_text())
    assert [entry["file"] for entry in content["images"]] == [
        f"photos/{n}" for n in ("a.png", "b.jpg", "c.jpg", "d.png")
    ]
    for entry in content["images"]:
        width, height = Image.open(entry["file"]).size
        assert Image.open(Path("out") / entry["picture"]).size == (width, height)
        for found in entry["objects"]:
            left, top, right, bottom = found["box"]
            assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
            assert found["name"] in content["classes"] and 0 <= found["score"] <= 1
    assert entry["objects"]


# Bad input


def test_bad_input(scenes, run, tmp_path):
    broken, part = tmp_path / "broken.py", tmp_path / "part.py"
    broken.write_text("model = dict(")
    part.write_text("model = dict()")
    inheriting = tmp_path / "inheriting.py"
    inheriting.write_text(f"_base_ = {str(SEGMENTOR)!r}\ndata_root = 'mine/'")
    torch.save(RaftMLP(img_size=32).state_dict(), tmp_path / "other.pth")
    weights = "model.backbone.init_cfg.checkpoint="
    cases = [
        (["missing.py"], "no config missing.py; shipped are"),
        ([broken], "cannot read the config"),
        ([part], "is a part of a config"),
        ([DETECTOR, "--data-dir", "nowhere"], "no data at nowhere/annotations/instances_training.json (train_"),
        ([DETECTOR, "--resum"], "did you mean --resume"),
        ([DETECTOR, "--cfg-options", "data_root=mine/"], "data_root is mine/, but train_dataloader.dataset looks into"),
        ([inheriting], "the config's data_root is mine/, but train_dataloader.dataset looks into runs/scenes"),
        ([DETECTOR, "--work-dir", f"{part}/x"], f"{part} is a file"),
        ([DETECTOR, "--amp"], "--amp needs a GPU"),
        ([DETECTOR, "--auto-scale-lr"], "does not say the batch size of its learning rate"),
        ([DETECTOR, "--resume", "--overwrite"], "exclude each other"),
        ([DETECTOR, "--resume", "missing.pth"], "no checkpoint at missing.pth"),
        ([DETECTOR, "--cfg-options", "optim_wraper.optimizer.lr=1"], "no 'optim_wraper'; did you mean optim_wrapper"),
        ([DETECTOR, "--cfg-options", "lr"], "KEY=VALUE"),
        ([DETECTOR, "--cfg-options", "model.backbone.arch=raftmlp_q"], "unknown arch 'raftmlp_q'; did you mean"),
        ([DETECTOR, "--cfg-options", "model.backbone.out_indices=(0,7)"], "out_indices (0, 7) must be a sequence that"),
        ([DETECTOR, "--launcher", "pytorch"], "start the processes with torchrun"),
        ([DETECTOR, "--cfg-options", "model.backbone.arch=raftmlp_m"], "[32, 64, 128, 128] does not fit raftmlp_m: its "
         "maps have [96, 192, 384, 768] channels"),
        ([DETECTOR, "--cfg-options", f"{weights}{tmp_path}/other.pth"], "does not fit the backbone raftmlp_digits"),
        ([DETECTOR, "--cfg-options", f"{weights}raftmlp_s"], "no pretrained weights raftmlp_s"),
        ([DETECTOR, "--cfg-options", "model.type=MaskRCN"], "MaskRCN"),
    ]  # fmt: skip
    for args, message in cases:
        args = [*args[:1], "--work-dir", tmp_path / "run", *args[1:]]
        if "--data-dir" not in args and "data_root" not in message:
            args += ["--data-dir", scenes]
        status, _, error = run(train_mm, *args)
        assert status == 2 and message in error and "Traceback" not in error, (args, error)
    assert not list(tmp_path.glob("run/*.pth"))


def test_bad_input_of_evaluation_and_prediction(trained, scenes, run, tmp_path):
    Path("empty").mkdir()
    common = ["--data-dir", scenes, "--work-dir", tmp_path / "test"]
    checkpoint = trained / "epoch_6.pth"
    torch.save({"state_dict": {}}, tmp_path / "nothing.pth")
    content = torch.load(checkpoint, weights_only=False)
    content["meta"]["dataset_meta"]["classes"] = tuple("012345678")
    torch.save(content, tmp_path / "nine.pth")
    cases = [
        (eval_mm, [DETECTOR, "missing.pth", *common], "no checkpoint at missing.pth"),
        (eval_mm, [DETECTOR, tmp_path / "nothing.pth", *common], "does not fit the config's model"),
        (eval_mm, [SEGMENTOR, checkpoint, *common], "does not fit the config's model"),
        (eval_mm, [DETECTOR, checkpoint, *common, "--results-file", "x.txt"], "must be named .json"),
        (predict_mm, [DETECTOR, tmp_path / "nine.pth", scenes / "images"], "10, but the checkpoint"),
        (predict_mm, [DETECTOR, checkpoint, "empty"], "no images at 'empty'"),
        (predict_mm, [DETECTOR, checkpoint, scenes / "images", "--device", "cuda:7"], "no device 'cuda:7'"),
        (predict_mm, [SEGMENTOR, checkpoint, scenes / "images"], "does not fit the config's model"),
    ]
    for command, args, message in cases:
        status, _, error = run(command, *args)
        assert status == 2 and message in error and "Traceback" not in error, (args, error)
    status, _, error = run(eval_mm, DETECTOR, tmp_path / "nine.pth", *common)  # a file's names may be other words
    assert status == 0 and "nine.pth was trained on the classes" in error
