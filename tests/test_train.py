"""Training as it must not fail: exact resume, several processes, bad images, full disks, the release's recipe."""

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import cli
import loaders
import train
from checkpoints import RunFolder
from raftmlp.checkpoint import load_checkpoint

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TINY = [
    "--model", "raftmlp_digits", "--model-kwargs", "embed_dims=(8,8,8,8)", "depths=(1,1,1,1)", "--dataset", "digits",
    "--workers", "0", "--device", "cpu",
]  # fmt: skip
# every source of randomness at once
RANDOM = [
    "--mixup", "0.8", "--cutmix", "1", "--reprob", "0.5", "--drop-path", "0.2", "--drop", "0.1", "--aa", "rand-m5-n2",
    "--cutout", "0.5", "--model-ema", "--model-ema-decay", "0.9",
]  # fmt: skip
SHORT = [*TINY, *RANDOM, "--batch-size", "256", "--warmup-epochs", "1"]  # 5 updates an epoch

# A process that has imported all and computed nothing: every line of options it reads becomes a run in a fork of it.
NURSERY = """
import os, shlex, sys
import cli, train
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.stdin.close()
        sys.argv = ["train.py", *shlex.split(line)]
        cli.run(train.main)
        sys.exit(0)
    print("process", child, flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("status", status, flush=True)
"""


class Nursery:
    """Runs of train.py in processes of their own, without the seconds that imports take."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools"), "OMP_NUM_THREADS": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], env=environment, **pipes)

    def start(self, *options) -> int:
        self.process.stdin.write(" ".join(map(str, options)) + "\n")
        self.process.stdin.flush()
        return int(self._until("process"))

    def wait(self) -> tuple[int, str]:
        return int(self._until("status")), "".join(self.said)

    def wait_until_said(self, words: str) -> None:
        said = []
        for line in self.process.stdout:
            said.append(line)
            assert not line.startswith("status "), "".join(said)
            if words in line:
                return

    def run(self, *options) -> tuple[int, str]:
        self.start(*options)
        return self.wait()

    def _until(self, word: str) -> str:
        self.said = []
        for line in self.process.stdout:
            if line.startswith(f"{word} ") and line.split()[1].lstrip("-").isdigit():
                return line.split()[1]
            self.said.append(line)
        raise AssertionError("".join(self.said))


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait()


@pytest.fixture
def run(run_tool):
    """Run train.py; see ``run_tool``."""
    return partial(run_tool, train)


def outcome(folder) -> dict:
    """Return what must not depend on how a run came to its end: all but times."""
    state = load_checkpoint(Path(folder) / "last.pth.tar")
    best = load_checkpoint(Path(folder) / "model_best.pth.tar")["state_dict_ema"]
    log = [{key: row[key] for key in ("epoch", "train_loss", "eval_loss", "eval_top1", "lr")} for row in state["log"]]
    kept = {key: state[key] for key in ("state_dict", "state_dict_ema", "optimizer", "epoch", "update")}
    return dict(**kept, log=log, best=best)


def assert_same(one, other, path=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{path}/{i}")
    else:
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert same, path


@pytest.fixture(scope="module")
def uninterrupted(nursery, tmp_path_factory):
    """The end of a run of six epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    status, said = nursery.run(*SHORT, "--epochs", 6, "--output", folder)
    assert status == 0, said
    return outcome(folder)


# Exact resume


def test_killed_at_ten_moments_a_run_ends_the_same(nursery, uninterrupted, tmp_path):
    options = [*SHORT, "--epochs", 6, "--output", tmp_path / "run", "--resume", "auto"]
    moments = random.Random(0)
    for number in range(10):
        # two workers now and then: the numbers do not depend on them; a save after every update: kills fall into saves
        child = nursery.start(*options, "--save-every", 1, "--workers", 2 * (number % 3 == 2))
        time.sleep(moments.uniform(0.2, 1.8))
        os.kill(child, signal.SIGKILL)
        nursery.wait()
    status, said = nursery.run(*options)
    assert status == 0, said
    assert_same(outcome(tmp_path / "run"), uninterrupted)
    rows = list(csv.DictReader((tmp_path / "run/log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"summary.json", "curves.png"}


def test_sigterm_saves_and_tells_how_to_go_on(nursery, uninterrupted, tmp_path):
    options = [*SHORT, "--epochs", 6, "--output", tmp_path / "run"]
    child = nursery.start(*options, "--workers", 2, "--log-interval", 1)
    nursery.wait_until_said("update 3/5")
    os.kill(child, signal.SIGTERM)
    status, said = nursery.wait()
    assert status == 0, said
    assert "stopped in epoch " in said and "and saved: the same command with --resume goes on" in said
    assert load_checkpoint(tmp_path / "run/last.pth.tar")["epoch"] < 6
    assert not (tmp_path / "run/summary.json").exists()
    status, said = nursery.run(*options, "--resume")
    assert status == 0, said
    assert_same(outcome(tmp_path / "run"), uninterrupted)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(nursery, uninterrupted, tmp_path):
    options = [*SHORT, "--epochs", 6, "--output", tmp_path / "run"]
    status, said = nursery.run(*options, "--epochs", 6, "--resume")
    assert status == 0, said
    assert "no checkpoint in" in said and "starting at the beginning" in said
    last = tmp_path / "run/last.pth.tar"
    last.write_bytes(last.read_bytes()[:-1000])
    status, said = nursery.run(*options, "--resume")
    assert status == 0, said
    assert "last.pth.tar is damaged" in said and "previous.pth.tar takes its place" in said
    assert "epoch 6/6" in said and "epoch 5/6" not in said
    assert_same(outcome(tmp_path / "run"), uninterrupted)

    status, said = nursery.run(*options, "--resume")  # of a finished run: nothing is trained, nothing is lost
    assert status == 0 and "epoch 6/6" not in said and "best top-1" in said
    assert_same(outcome(tmp_path / "run"), uninterrupted)

    last.write_bytes(b"")
    (tmp_path / "run/previous.pth.tar").write_bytes(b"")
    status, said = nursery.run(*options, "--resume")
    assert status == 2 and "no checkpoint is whole" in said


def test_a_full_disk_leaves_the_checkpoint_of_before(run, tmp_path):
    options = [*TINY, "--batch-size", 256, "--warmup-epochs", 0, "--output", "run"]
    assert run(*options, "--epochs", 1)[0] == 0
    before = Path("run/last.pth.tar").read_bytes()
    Path("run/.saving.pth.tar").symlink_to("/dev/full")
    status, _, err = run(*options, "--epochs", 2, "--resume")
    assert status == 2
    assert "cannot save a checkpoint into run" in err and "No space left on device" in err and "Traceback" not in err
    assert Path("run/last.pth.tar").read_bytes() == before
    status, _, err = run(*options, "--epochs", 2, "--resume")
    assert status == 0, err


def test_saving_is_whole_at_every_step(tmp_path, monkeypatch):
    """A kill between any two system calls of a save leaves a checkpoint that is the old or the new one."""
    folder = RunFolder(tmp_path)
    folder.open()
    state = dict(state_dict=dict(weight=torch.zeros(3)))
    folder.save({**state, "epoch": 0})
    steps = ["fsync", "link", "replace"]
    for kill_at in range(20):
        calls = iter(range(100))
        with monkeypatch.context() as patch:
            for name in steps:
                real = getattr(os, name)

                def call(*args, real=real):
                    if next(calls) == kill_at:
                        raise KeyboardInterrupt
                    return real(*args)

                patch.setattr(os, name, call)
            try:
                folder.save({**state, "epoch": kill_at + 1}, best=True)
                finished = True
            except KeyboardInterrupt:
                finished = False
        found = load_checkpoint(folder.find())["epoch"]
        assert found == kill_at + 1 if finished else found in (kill_at, kill_at + 1)
        if not finished:
            folder.save({**state, "epoch": kill_at + 1})
        assert load_checkpoint(folder.previous)["epoch"] <= kill_at + 1
    assert finished and kill_at > 6


def test_resume_refuses_another_run(run):
    options = [*TINY, "--batch-size", 256, "--warmup-epochs", 0, "--output", "run", "--epochs", 2]
    status, _, err = run(*options)
    assert status == 0, err
    for changed, message in [
        (["--opt", "sgd"], "is of a run with --opt adamw, not sgd"),
        (["--model-ema"], "is of a run with --model-ema False, not True"),
        (["--model-kwargs", "depths=(2,1,1,1)"], "is of a run with --model-kwargs"),
    ]:
        status, _, err = run(*options, *changed, "--resume")
        assert status == 2 and message in err
    status, out, err = run(*options, "--resume", "--epochs", 3, "--lr", 0.5)
    assert status == 0, err
    assert "note: not the options of before: epochs 2 -> 3, lr 0.001 -> 0.5" in out
    status, _, err = run(*options, "--resume", "--epochs", 2)
    assert status == 2 and "is of epoch 3, --epochs says 2" in err
    torch.save({"state_dict": {}, "optimizer": {}}, "foreign.pth")
    status, _, err = run(*options, "--resume", "foreign.pth", "--output", "new")
    assert status == 2 and "cannot resume from foreign.pth" in err
    torch.save({"state_dict": {}}, "weights.pth")
    status, _, err = run(*options, "--resume", "weights.pth", "--output", "new")
    assert status == 2 and "weights.pth holds weights only: --checkpoint starts a new run" in err


def test_two_runs_do_not_share_a_folder(nursery, tmp_path, run):
    child = nursery.start(*SHORT, "--epochs", 50, "--output", tmp_path / "run", "--log-interval", 1)
    nursery.wait_until_said("update 1/5")
    status, _, err = run(*SHORT, "--epochs", 50, "--output", tmp_path / "run", "--resume")
    os.kill(child, signal.SIGKILL)
    nursery.wait()
    assert status == 2 and "another run is writing into" in err


# Several processes


def test_two_processes_train_as_one_does(nursery, tmp_path):
    options = [*TINY, *RANDOM, "--batch-size", 64, "--global-batch-size", 256, "--epochs", 2, "--warmup-epochs", 1]
    status, one = nursery.run(*options, "--output", tmp_path / "one")
    assert status == 0, one
    assert "2 epochs of 5 updates of 256 images: 1 process x 4 x 64" in one
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    command = [*torchrun, ROOT / "tools/train.py", *options, "--output", tmp_path / "two"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 epochs of 5 updates of 256 images: 2 processes x 2 x 64") == 1
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for key in ("state_dict", "state_dict_ema"):
        for name, weight in one[key].items():
            torch.testing.assert_close(two[key][name], weight, rtol=0, atol=1e-5 * float(weight.abs().max()))
    for before, after in zip(one["log"], two["log"]):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-5)
        assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
        assert after["eval_top1"] == before["eval_top1"]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "batch_size, total, world_size, expected",
    [
        (128, None, 2, (128, 1)),
        (256, 2048, 8, (256, 1)),
        (128, 2048, 8, (128, 2)),
        (100, 2048, 8, (64, 4)),
        (10**11, None, 1, (10**11, 1)),
    ],
)
def test_the_global_batch_is_kept(batch_size, total, world_size, expected):
    args = train.build_parser().parse_args(["--batch-size", str(batch_size)])
    args.global_batch_size = total
    assert train.share_batches(args, world_size) == expected
    assert args.global_batch_size == (total or batch_size * world_size) == math.prod(expected) * world_size


def test_a_global_batch_that_cannot_be_shared():
    args = train.build_parser().parse_args(["--global-batch-size", "2048"])
    with pytest.raises(cli.UserError, match="--global-batch-size 2048 cannot be shared among 3 processes"):
        train.share_batches(args, 3)


def test_batches_are_the_same_for_any_number_of_processes():
    alone = loaders.Batches(50, batch_size=4, steps=4, rank=0, world_size=1, seed=3)
    alone.start_at(epoch=2, update=1)
    together = [loaders.Batches(50, 4, 2, rank, 2, seed=3) for rank in range(2)]
    for batches in together:
        batches.start_at(epoch=2, update=1)
    mixed = [batch for pair in zip(*together) for batch in pair]
    assert mixed == list(alone) and len(alone) == 8
    assert [index for batch in mixed[:4] for _, index in batch] == list(alone.images_of(2, 1))
    alone.start_at(epoch=3, update=0)
    seen = [index for batch in alone for _, index in batch]
    assert len(set(seen)) == len(seen) == 48


# Images that cannot be read, losses that are no number


@pytest.fixture
def image_folder(tmp_path):
    """A folder of bright and dark images, train/ and val/, in the working folder."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, low in (("bright", 128), ("dark", 0)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 128, (30 + i, 45, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.jpg")
    return tmp_path / "images"


def folder_options(images, *more) -> list:
    return [*TINY, "--dataset", "", "--data-dir", images, "--batch-size", 4, "--warmup-epochs", 0, *more]


def test_corrupt_images_are_named_and_counted(run, image_folder):
    whole = (image_folder / "train/bright/3.jpg").read_bytes()
    (image_folder / "train/bright/3.jpg").write_bytes(whole[: len(whole) // 2])
    (image_folder / "train/dark/0.jpg").write_bytes(b"")
    (image_folder / "val/dark/1.jpg").write_text("no image")
    options = folder_options(image_folder, "--workers", 2, "--epochs", 2, "--output", "out")
    status, out, err = run(*options)
    assert status == 0, err
    assert out.count("cannot read") == 2
    assert "train/bright/3.jpg: image file is truncated" in out and "train/dark/0.jpg: cannot identify" in out
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["bad_images"] == 2
    assert (summary["last"]["eval_images"], summary["last"]["eval_unread"]) == (5, 1)
    assert {line.split("\t")[0] for line in Path("out/bad_images.txt").read_text().splitlines()} == {
        str(image_folder / "train/bright/3.jpg"), str(image_folder / "train/dark/0.jpg"),
    }  # fmt: skip

    status, _, err = run(*options, "--overwrite", "--max-bad-images", 1)
    assert status == 2
    assert "2 images could not be read, more than --max-bad-images 1" in err and "out/bad_images.txt names them" in err
    for path in (image_folder / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    status, _, err = run(*options, "--overwrite", "--max-bad-images", 3)
    assert status == 2
    assert "--max-bad-images 3" in err and "Traceback" not in err


def test_a_loss_that_is_no_number_names_its_images(run, image_folder):
    options = folder_options(image_folder, "--lr", "1e30", "--epochs", 9, "--smoothing", 0, "--output", "out")
    status, _, err = run(*options)
    assert status == 2 and "Traceback" not in err
    assert "the loss became" in err and "at learning rate 9.9" in err and "out/bad_batch.txt lists its images" in err
    names = Path("out/bad_batch.txt").read_text().splitlines()
    assert len(names) == 4 and all(Path(name).is_file() for name in names)
    assert "there is no checkpoint of before" in err
    assert not Path("out/summary.json").exists() and not Path("out/last.pth.tar").exists()


def test_weights_that_blew_up_are_not_gone_on_with(run, image_folder):
    options = folder_options(image_folder, "--sched", "constant", "--smoothing", 0, "--output", "out", "--epochs", 3)
    status, _, err = run(*options, "--epochs", 1)
    assert status == 0, err
    status, _, err = run(*options, "--resume", "--lr", "1e30", "--save-every", 1)
    assert status == 2 and "the loss became nan in epoch 2, update 2 of 4" in err
    assert "--resume goes on from out/previous.pth.tar, which is of before" in err
    assert Path("out/diverged.pth.tar").exists() and not Path("out/last.pth.tar").exists()
    status, out, err = run(*options, "--resume")
    assert status == 0, err
    assert "going on from out/previous.pth.tar, epoch 2, update 1" in out

    # in a single update an epoch only the evaluation shows it
    options = folder_options(image_folder, "--batch-size", 16, "--lr", "1e30", "--epochs", 1, "--output", "single")
    status, _, err = run(*options)
    assert status == 2 and "the validation loss became nan in epoch 1; there is no checkpoint of before" in err
    assert not Path("single/last.pth.tar").exists() and not Path("single/model_best.pth.tar").exists()


def test_training_on_tars_and_gray_images(run, image_folder):
    import tarfile

    for split in ("train", "val"):
        with tarfile.open(f"{split}.tar", "w") as tar:
            tar.add(image_folder / split, arcname=".")
    options = [*folder_options(".", "--epochs", 1, "--in-chans", 1), "--mean", 0.5, "--std", 0.25, "--output", "out"]
    status, out, err = run(*options)
    assert status == 0, err
    assert "2 classes, 32x32: 16 images to train on, 6 to evaluate on" in out
    state = load_checkpoint("out/last.pth.tar")
    assert state["state_dict"]["stages.0.embed.convs.0.weight"].shape[1] == 1
    assert state["pretrained_cfg"]["label_names"] == ["bright", "dark"]
    assert state["pretrained_cfg"]["mean"] == (0.5,)


def test_training_on_webdataset_shards(run, image_folder):
    import webdataset

    for split in ("train", "val"):
        with webdataset.TarWriter(f"set-{split}-0.tar") as shard:
            for number, path in enumerate(sorted((image_folder / split).rglob("*.jpg"))):
                label = int(path.parent.name == "dark")
                shard.write({"__key__": f"{number:03}", "jpg": path.read_bytes(), "cls": label})
    splits = ["--train-split", "set-train-0.tar|16", "--val-split", "set-val-0.tar|6", "--num-classes", 2]
    options = folder_options(".", "--dataset", "wds/", *splits, "--epochs", 2, "--drop-path", 0.2)
    options += ["--sched", "constant", "--output"]
    status, out, err = run(*options, "one")
    assert status == 0, err
    assert "16 images to train on, 6 to evaluate on" in out
    status, _, err = run(*options, "two", "--epochs", 1)
    assert status == 0, err
    status, _, err = run(*options, "two", "--resume")
    assert status == 0, err
    one, two = (load_checkpoint(f"{name}/last.pth.tar")["state_dict"] for name in ("one", "two"))
    assert_same(one, two)


# What else a run does


def test_export_writes_pretrained_weights_and_a_card(run, monkeypatch):
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", "weights")
    options = ["--model", "raftmlp_digits", "--dataset", "digits", "--workers", 0, "--batch-size", 256, "--epochs", 1]
    options += ["--warmup-epochs", 0, "--output", "out", "--device", "cpu"]
    status, _, err = run(*options, "--export", "mine")
    assert status == 0, err
    card = json.loads(Path("weights/raftmlp_digits.mine.json").read_text())
    assert card["best_top1"] == json.loads(Path("out/summary.json").read_text())["best_top1"]
    assert card["options"]["epochs"] == 1 and card["versions"]["torch"] == torch.__version__
    assert "--export mine" in card["command"] and len(card["sha256"]) == 64 and card["data"] == "digits"
    model = timm.create_model("raftmlp_digits.mine", pretrained=True)
    best = load_checkpoint("out/model_best.pth.tar")["state_dict"]
    assert_same(dict(model.state_dict()), dict(best))
    assert model.pretrained_cfg["label_names"] == tuple("0123456789")
    status, _, err = run(*options, "--export", "mine", "--resume")
    assert status == 2 and "raftmlp_digits.mine.safetensors exists" in err
    before = {name: Path("out", name).read_text() for name in ("args.yaml", "summary.json", "log.csv")}
    status, _, err = run(*options, "--export", "second", "--resume", "--lr", 0.5)  # of a finished run
    assert status == 0, err
    assert json.loads(Path("weights/raftmlp_digits.second.json").read_text())["options"]["lr"] == 0.001
    assert before == {name: Path("out", name).read_text() for name in before}
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", "/proc/nowhere")
    status, _, err = run(*options, "--export", "third", "--resume")
    assert status == 2 and "cannot export to /proc/nowhere/raftmlp_digits.third.safetensors" in err
    status, _, err = run(*options, "--export", "a.b")
    assert status == 2 and "a tag is made of letters" in err


def test_distillation_and_the_other_ways_to_train(run, monkeypatch):
    options = [*TINY, "--batch-size", 256, "--warmup-epochs", 0, "--epochs", 1, "--output"]
    status, _, err = run(*options, "kd", "--kd-model-name", "raftmlp_digits", "--kd-temperature", 2, "--mixup", 0.2)
    assert status == 0, err
    status, _, err = run(*options, "kd2", "--kd-model-name", "raftmlp_s")
    assert status == 2 and "cannot make the teacher raftmlp_s" in err
    status, _, err = run(*options, "half", "--amp", "--amp-dtype", "float16", "--clip-grad", 1, "--grad-checkpointing")
    assert status == 0, err
    assert load_checkpoint("half/last.pth.tar")["amp_scaler"]["scale"] > 0
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **_: compile_(model, backend="aot_eager")
    )  # seconds, not minutes
    status, _, err = run(
        *options, "fast", "--compile", "--channels-last", "--model-ema", "--layer-decay", 0.9, "--sched", "wsd",
        "--opt", "lamb", "--clip-mode", "agc", "--clip-grad", 0.1, "--train-crop-mode", "rkrr",
    )  # fmt: skip
    assert status == 0, err
    plain = load_checkpoint("fast/last.pth.tar")
    assert (
        plain["state_dict"].keys()
        == plain["state_dict_ema"].keys()
        == load_checkpoint("kd/last.pth.tar")["state_dict"].keys()
    )


def test_the_teacher_counts(run):
    options = [*TINY, "--batch-size", 256, "--warmup-epochs", 0, "--epochs", 1, "--output"]
    teacher = ["--kd-model-name", "raftmlp_digits", "--distill-loss-weight"]
    for name, more in (("without", []), ("zero", [*teacher, 0]), ("one", [*teacher, 1])):
        status, _, err = run(*options, name, *more)
        assert status == 0, err
    weights = {name: load_checkpoint(f"{name}/last.pth.tar")["state_dict"] for name in ("without", "zero", "one")}
    assert_same(weights["without"], weights["zero"])
    assert not torch.equal(weights["one"]["head.weight"], weights["zero"]["head.weight"])


def test_tensorboard_and_wandb_are_written_when_asked(run, monkeypatch):
    class Wandb:
        rows: ClassVar[list] = []

        @classmethod
        def init(cls, **kwargs):
            cls.started = kwargs
            return cls

        @classmethod
        def log(cls, row, step):
            cls.rows.append((step, row))

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    options = [*TINY, "--batch-size", 256, "--warmup-epochs", 0, "--epochs", 2, "--output"]
    status, _, err = run(*options, "out", "--log-wandb")
    assert status == 0, err
    assert [step for step, _ in Wandb.rows] == [1, 2] and Wandb.started["config"]["epochs"] == 2
    assert Wandb.rows[1][1]["eval/top1"] == load_checkpoint("out/last.pth.tar")["log"][1]["eval_top1"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, err = run(*options, "out2", "--log-wandb")
    assert status == 2 and "--log-wandb needs Weights & Biases: pip install wandb" in err
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = run(*options, "out2", "--log-tensorboard")
    assert status == 2 and "--log-tensorboard needs TensorBoard" in err


# The recipes


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


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_trains_two_steps(config, run, imagenet):
    options = ["-c", config, "--dataset", "", "--data-dir", imagenet, "--epochs", 1, "--warmup-epochs", 0]
    options += ["--global-batch-size", 2, "--batch-size", 2, "--workers", 0, "--device", "cpu", "--output", "out"]
    told = yaml.safe_load(config.read_text())
    status, out, err = run(*options)
    assert status == 0, err
    assert "1 epochs of 2 updates of 2 images" in out
    model = told.get("model", "raftmlp_s")
    assert out.startswith(f"{model}, ")
    state = load_checkpoint("out/last.pth.tar")
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    shutil.rmtree("out")  # gigabytes, all in all
    expected = timm.create_model(model, num_classes=2)
    assert {k: v.shape for k, v in state["state_dict"].items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }


def read_config(name: str):
    return train.build_parser().parse_args(["-c", str(ROOT / f"configs/{name}.yaml")])


def test_the_configs_are_all_there_and_say_how_they_are_run():
    names = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in CONFIGS}
    variants = {name for name in timm.list_models("raftmlp_*") if "cifar" not in name and "digits" not in name}
    assert names >= {f"imagenet/{name}" for name in variants} and len(variants) == 10
    assert names >= {f"finetune/{name}" for name in ("cifar10", "cifar100", "flowers102", "cars", "inat18", "inat19")}
    for config in CONFIGS:
        text = config.read_text()
        assert f"tools/train.py -c {config.relative_to(ROOT)}" in text
        assert "Not run" in text or config.parent.name == "digits"


@pytest.mark.parametrize("name", ["imagenet/raftmlp_s", "imagenet/raftmlp_36_r2", "finetune/cars"])
def test_the_releases_learning_rate(name):
    args = read_config(name)
    updates = 1_281_167 // args.global_batch_size if "imagenet" in name else 8144 // args.global_batch_size
    optimizer, scheduler = train.create_optimisation(args, torch.nn.Linear(2, 2), updates)
    peak, warmup, epochs = {"imagenet/raftmlp_s": (2e-3, 5, 305), "imagenet/raftmlp_36_r2": (1.5e-3, 5, 305)}.get(
        name, (1e-4, 10, 50)
    )
    total = epochs * updates
    expected = {
        0: 0.0,
        warmup * updates // 2: peak * (warmup * updates // 2) / (warmup * updates),
        warmup * updates: peak,
        (total + warmup * updates) // 2: (peak + 1e-5) / 2,
        total: 1e-5,
    }
    for update, lr in expected.items():
        scheduler.step_update(update)
        tolerance = peak * 2 / total
        assert all(group["lr"] == pytest.approx(lr, abs=tolerance) for group in optimizer.param_groups), update


def test_the_releases_recipe():
    args = read_config("imagenet/raftmlp_s")
    model = timm.create_model("raftmlp_s", drop_path_rate=args.drop_path)
    optimizer, _ = train.create_optimisation(args, model, 625)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [
        (len(list(model.parameters())), 0.05)
    ]
    assert type(optimizer) is torch.optim.AdamW
    rates = {m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"}
    assert rates == {0.1}
    settings = loaders.image_settings(args, model)
    assert (settings["input_size"], settings["interpolation"], settings["crop_pct"]) == (
        (3, 224, 224),
        "bilinear",
        0.875,
    )
    steps = loaders.training_transform(args, settings).transforms
    names = [type(step).__name__ for step in steps]
    assert names == [
        "Resize", "RandomCrop", "RandomHorizontalFlip", "ColorJitter", "RandAugment", "MaybePILToTensor",
        "RandomErasing",
    ]  # fmt: skip
    assert (steps[0].size, steps[1].size, steps[2].p) == (256, (224, 224), 0.5)
    assert steps[3].brightness == steps[3].contrast == steps[3].saturation == (0.6, 1.4) and steps[3].hue is None
    assert steps[4].num_layers == 2 and all(operation.prob == 1 for operation in steps[4].ops)
    assert (steps[6].p, steps[6].scale, steps[6].ratio) == (0.25, (0.02, 1 / 3), (0.3, 1 / 0.3))
    mix = loaders.BatchAugmentation(args, 256, 1000, torch.device("cpu")).mix
    assert (type(mix), mix.mixup, mix.cutmix, mix.smoothing) == (loaders.MixupThenCutmix, 0.8, 0.8, 0.1)
    assert (args.epochs, args.global_batch_size, args.amp, args.model_ema, args.seed) == (305, 2048, False, False, 42)
    modern = read_config("imagenet/raftmlp_s_modern")
    optimizer, _ = train.create_optimisation(modern, model, 625)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, 0.05]
    for group in optimizer.param_groups:
        assert all((parameter.ndim <= 1) == (group["weight_decay"] == 0) for parameter in group["params"])
    tuned = read_config("finetune/inat19")
    assert (tuned.drop_path, tuned.cutout, tuned.weight_decay, tuned.mixup) == (0, 0, 1e-4, 0.8)


def test_mixup_then_cutmix_keeps_account_of_every_pixel():
    """Images of one colour each: the mean colour of a mixed image tells its shares."""
    size, classes = 60, 8
    mix = loaders.MixupThenCutmix(0.8, 0.8, smoothing=0.0, num_classes=classes)
    for seed in range(20):
        loaders.seed_everything(seed)
        images = torch.eye(classes)[:, :, None, None].expand(-1, -1, size, size).clone()
        mixed, shares = mix(images, torch.arange(classes))
        torch.testing.assert_close(shares.sum(1), torch.ones(classes))
        # the box's sides are whole pixels: its share of the image is a little less than the target's
        torch.testing.assert_close(mixed.mean((2, 3)), shares, rtol=0, atol=2 / size)
        assert (shares > 0).sum(1).max() >= 2
    smooth = loaders.MixupThenCutmix(0.8, 0.8, smoothing=0.1, num_classes=classes)(images, torch.arange(classes))[1]
    torch.testing.assert_close(smooth.sum(1), torch.ones(classes))
    assert float(smooth.min()) >= 0.1 / classes - 1e-6


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    args = train.build_parser().parse_args(
        [*TINY, "--aa", "rand-m9-n2", "--cutout", "0.5", "--affine", "10", "0.1", "0.1"]
    )
    settings = dict(input_size=(3, 32, 32), interpolation="bilinear", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    dataset = loaders.create_data(args, "train")
    images = loaders.TrainingImages(dataset, loaders.training_transform(args, settings), "RGB", 0, Path("bad"), 1)
    first, _ = images[(0, 5)]
    other = [images[key][0] for key in ((1, 5), (0, 6))]
    assert torch.equal(images[(0, 5)][0], first)
    assert not any(torch.equal(first, image) for image in other)


def test_an_evaluation_without_a_readable_image_ends_the_run(run, image_folder):
    for path in (image_folder / "val").rglob("*.jpg"):
        path.write_text("no image")
    status, _, err = run(*folder_options(image_folder, "--epochs", 1, "--output", "out"))
    assert status == 2 and "none of the 6 images to evaluate on can be read" in err
    assert not Path("out/model_best.pth.tar").exists()
