"""Runs: from Python, stopped, killed and resumed to the same bits, by several processes, diverged and rolled back."""

import csv
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import Subset

from helpers import ROOT, TINY, StoppingDigits, assert_same, make_image_folder, run_process, run_two_processes
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import console, train
from raftmlp.data import Digits
from raftmlp.errors import UserError
from raftmlp.train import Trainer, TrainSettings

FROM_PYTHON = """
import timm
from raftmlp.data import create_dataset
from raftmlp.train import Trainer, TrainSettings

if __name__ == "__main__":
    model = timm.create_model("raftmlp_digits", num_classes=10, embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))
    settings = TrainSettings(epochs=1, warmup_epochs=0, batch_size=256, workers=2, device="cpu", output="run")
    trainer = Trainer(settings, model, create_dataset("digits", split="train"), create_dataset("digits"))
    print(trainer.fit(resume="auto")["best_epoch"])
"""

DIGITS = [*TINY, "--dataset", "digits"]
# every source of randomness at once
RANDOM = [
    "--mixup", "0.8", "--cutmix", "1", "--reprob", "0.5", "--drop-path", "0.2", "--drop", "0.1", "--aa", "rand-m5-n2",
    "--cutout", "0.5", "--model-ema", "--model-ema-decay", "0.9",
]  # fmt: skip
SHORT = [*DIGITS, *RANDOM, "--batch-size", "256", "--img-size", "24", "--warmup-epochs", "1"]  # 5 updates an epoch

SERVER = multiprocessing.get_context("forkserver")  # its processes have imported all, and computed nothing
SERVER.set_forkserver_preload(["raftmlp.cli.train", "raftmlp.train.trainer"])


def run_train(options, output):
    """Run the train command with its output in a file."""
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # workers of the server would outlive a run that is killed
    sys.argv = ["raftmlp train", *options]
    console.run(train.main)


class Run:
    """A run of the train command in a process of its own; one that takes more than four minutes is killed."""

    def __init__(self, *options):
        self.file = Path(tempfile.mkstemp()[1])
        self.process = SERVER.Process(target=run_train, args=(list(map(str, options)), self.file))
        self.process.start()

    def wait_for(self, words, times=1):
        """Wait until the words were written so often, or the run has ended without them."""
        end = time.monotonic() + 240
        while self.file.read_text().count(words) < times and self.process.is_alive() and time.monotonic() < end:
            time.sleep(0.01)

    def end(self, number=0):
        """Send it a signal, if any; return its exit status and its output when it has ended."""
        if number:
            os.kill(self.process.pid, number)
        self.process.join(240)
        self.process.kill()
        self.process.join()
        output = self.file.read_text()
        self.file.unlink()
        return self.process.exitcode, output


def outcome(folder) -> dict:
    """Return what must not depend on how a run came to its end: all but times."""
    state = load_checkpoint(Path(folder) / "last.pth.tar")
    best = load_checkpoint(Path(folder) / "model_best.pth.tar")["state_dict_ema"]
    log = [{key: row[key] for key in ("epoch", "train_loss", "eval_loss", "eval_top1", "lr")} for row in state["log"]]
    kept = {key: state[key] for key in ("state_dict", "state_dict_ema", "optimizer", "epoch", "update")}
    return dict(**kept, log=log, best=best)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The end of a run of six epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    status, output = Run(*SHORT, "--epochs", 6, "--output", folder).end()
    assert status == 0, output
    return outcome(folder)


# From Python


def make_trainer(folder, train_data, **settings):
    torch.manual_seed(0)
    model = timm.create_model("raftmlp_digits", embed_dims=(8,) * 4, depths=(1,) * 4, drop_path_rate=0.2)
    small = dict(epochs=3, warmup_epochs=1, batch_size=48, workers=0, device="cpu", output=str(folder))
    settings = TrainSettings(**{**small, "mixup": 0.8, "aa": "rand-m5-n2", "model_ema": True, **settings})
    return Trainer(settings, model, train_data, Subset(Digits("validation"), range(40)))


def test_a_trainer_trains_stops_and_resumes(tmp_path):
    data = Subset(StoppingDigits("train"), range(192))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    whole = make_trainer(tmp_path / "whole", data)
    summary = whole.fit()
    assert (summary["model"], summary["epochs"], len(whole.state.log)) == ("raftmlp_digits", 3, 3)
    assert summary["best"]["eval_top1"] == whole.state.best["eval_top1"] == max(r["eval_top1"] for r in whole.state.log)

    StoppingDigits.stop_at = int(whole.loader.batches.images_of(0, 0)[0])
    parts = make_trainer(tmp_path / "parts", data)
    assert parts.fit() is None
    assert parts.stop.number == signal.SIGTERM and parts.state.position == (0, 2)  # of (3, 4)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    with pytest.raises(UserError, match="holds a run"):
        make_trainer(tmp_path / "parts", data).fit()
    last = tmp_path / "parts/last.pth.tar"
    state = load_checkpoint(last)
    torch.save({**state, "seconds": 1000.0}, last)  # as if the first two updates of the epoch had taken so long
    resumed = make_trainer(tmp_path / "parts", data)
    assert 1000 < resumed.fit(resume="auto")["seconds"] < 1100
    rows = resumed.state.log
    assert rows[0]["train_images_per_second"] == pytest.approx(0.192, rel=0.1) and rows[1]["seconds"] < 100
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    parts.fit(resume="auto")  # the one that was stopped has the last state too
    assert_same(parts.state_dict()["state_dict"], whole.state_dict()["state_dict"])
    assert not {"output", "workers", "device"} & state["options"].keys()
    again = {key: resumed.evaluate()[key] for key in ("loss", "top1")}
    assert again == {key: whole.state.log[-1][f"eval_{key}"] for key in ("loss", "top1")}


def test_a_trainer_of_several_sizes_stops_and_resumes(tmp_path, monkeypatch):
    sizes = dict(epochs=2, train_img_sizes=[16, 24], train_batch_sizes=[24, 8], variable_batch_loss_scale=True)
    data = Subset(StoppingDigits("train"), range(96))
    whole = make_trainer(tmp_path / "whole", data, **sizes)
    seen, update = [], whole.train_step.update

    def watch(batches, steps, number, scale):
        batches = list(batches)
        seen.append([steps, scale, *((len(images), *images.shape[2:]) for images, _ in batches)])
        return update(batches, steps, number, scale)

    monkeypatch.setattr(whole.train_step, "update", watch)
    counts = whole.fit()["updates_by_size"]
    choices = [whole.updates.choice(epoch, number) for epoch in range(2) for number in range(6)]
    assert seen == [[[1, 1.5, (24, 16, 16)], [1, 0.5, (8, 24, 24)]][choice] for choice in choices]
    assert set(choices) == {0, 1} and [row["updates_24"] for row in whole.state.log] == [
        sum(choices[:6]), sum(choices[6:]),
    ]  # fmt: skip
    assert whole.val_loader.dataset.shape == (3, 32, 32)
    StoppingDigits.stop_at = int(whole.loader.batches.images_of(0, 2)[0])
    parts = make_trainer(tmp_path / "parts", data, **sizes)
    assert parts.fit() is None and parts.state.position == (0, 3)  # of (2, 6)
    resumed = make_trainer(tmp_path / "parts", data, **sizes, workers=2)
    assert resumed.fit(resume="auto")["updates_by_size"] == counts
    state = load_checkpoint(tmp_path / "parts/last.pth.tar")["state_dict"]
    assert_same(dict(state), dict(whole.state_dict()["state_dict"]))


def test_a_program_with_workers_ends(tmp_path):
    (tmp_path / "program.py").write_text(FROM_PYTHON)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_process(sys.executable, "program.py", timeout=120, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_checkpoint_to_resume_from_that_says_what_cannot_be(tmp_path):
    one = make_trainer(tmp_path / "one", Subset(Digits("train"), range(96)))
    for changed in (dict(options=3), dict(epoch="many"), dict(log=3), dict(state_dict={"a": 1})):
        torch.save({**one.state_dict(), **changed}, tmp_path / "odd.pth.tar")
        with pytest.raises(UserError, match=r"odd\.pth\.tar"):
            one.load(tmp_path / "odd.pth.tar")


# Exact resume


def test_killed_at_ten_moments_a_run_ends_the_same(uninterrupted, tmp_path):
    options = [*SHORT, "--epochs", 6, "--output", tmp_path / "run", "--resume", "auto"]
    moments = random.Random(0)
    in_the_middle = 0
    for number in range(10):
        # two workers now and then: the numbers do not depend on them; a save after every update: kills fall into saves
        workers = 2 * (number % 3 == 2)
        run = Run(*options, "--save-every", 1, "--log-interval", 1, "--workers", workers)
        if number % 5 == 4:
            time.sleep(moments.uniform(0.2, 1.8))  # mostly before it trains
        else:
            run.wait_for(", update ", times=moments.randint(1, 2))
            time.sleep(moments.uniform(0, 0.2))
        status, output = run.end(signal.SIGKILL)
        in_the_middle += status == -signal.SIGKILL and ", update " in output
    assert in_the_middle > 5
    status, output = Run(*options).end()
    assert status == 0, output
    assert_same(outcome(tmp_path / "run"), uninterrupted)
    rows = list(csv.DictReader((tmp_path / "run/log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"summary.json", "curves.png"}
    assert not list((tmp_path / "run").glob(".*.tar"))  # left by kills in saves


def test_signals_save_and_name_the_way_to_resume(uninterrupted, tmp_path):
    options = [*SHORT, "--epochs", 6, "--output", tmp_path / "run"]
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        run = Run(*options, "--workers", 2, "--log-interval", 1, "--resume")
        run.wait_for("update 3/5")
        exit_status, output = run.end(number)
        assert exit_status == status, output
        assert "stopped in epoch " in output and "--resume" in output.splitlines()[-1]
    assert load_checkpoint(tmp_path / "run/last.pth.tar")["epoch"] < 6
    assert not (tmp_path / "run/summary.json").exists()
    status, output = Run(*options, "--resume").end()
    assert status == 0, output
    assert_same(outcome(tmp_path / "run"), uninterrupted)

    last = tmp_path / "run/last.pth.tar"
    last.write_bytes(last.read_bytes()[:-1000])  # the one before takes its place
    status, output = Run(*options, "--resume").end()
    assert status == 0 and "epoch 6/6" in output and "epoch 5/6" not in output, output
    assert_same(outcome(tmp_path / "run"), uninterrupted)
    status, output = Run(*options, "--resume").end()  # of a finished run: nothing is trained, nothing is lost
    assert status == 0 and "epoch 6/6" not in output and "best top-1" in output
    assert_same(outcome(tmp_path / "run"), uninterrupted)


def test_two_processes_train_as_one_does(tmp_path):
    options = [*DIGITS, *RANDOM, "--batch-size", 64, "--global-batch-size", 256, "--epochs", 2, "--warmup-epochs", 1]
    options += ["--kd-model-name", "raftmlp_digits", "--train-img-sizes", 24, 32, "--train-batch-sizes", 128, 32]
    status, output = Run(*options, "--output", tmp_path / "one").end()
    assert status == 0, output
    done = run_two_processes(ROOT / "tools/train.py", *options, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for count, shares, text in ((1, "2 x 128 at 24 or 8 x 32", output), (2, "1 x 128 at 24 or 4 x 32", done.stdout)):
        assert text.count("2 epochs of 5 updates of 256 images") == text.count(f": {count} process") == 1
        assert shares in text
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    for key in ("state_dict", "state_dict_ema"):
        for name, weight in one[key].items():
            torch.testing.assert_close(two[key][name], weight, rtol=0, atol=1e-5 * float(weight.abs().max()))
    for before, after in zip(one["log"], two["log"]):
        assert after == {key: pytest.approx(value, rel=1e-5) for key, value in before.items()}


# Losses that are no number


def test_weights_that_diverged_are_not_resumed_from(run_command, tmp_path):
    images = make_image_folder(tmp_path / "images", train=8, val=3, suffix=".jpg")
    options = [*TINY, "--data-dir", images, "--warmup-epochs", 0, "--smoothing", 0, "--sched", "constant"]
    single = [*options, "--batch-size", 16, "--lr", "1e30", "--epochs", 1, "--output", "single"]
    options += ["--batch-size", 4, "--output", "out", "--epochs", 3]
    status, _, err = run_command(train, *options, "--epochs", 1)
    assert status == 0, err
    status, _, err = run_command(train, *options, "--resume", "--lr", "1e30", "--save-every", 1)
    assert status == 2 and "the loss became nan in epoch 2, update 2 of 4, at learning rate 1e+30" in err
    assert "out/bad_batch.txt" in err and "--resume continues from out/previous.pth.tar" in err
    names = Path("out/bad_batch.txt").read_text().splitlines()
    assert len(names) == 4 and all(Path(name).is_file() for name in names)
    assert Path("out/diverged.pth.tar").exists() and not Path("out/last.pth.tar").exists()
    status, out, err = run_command(train, *options, "--resume")
    assert status == 0, err
    assert "resuming from out/previous.pth.tar, epoch 2, update 1" in out

    status, _, err = run_command(train, *single)  # in a single update an epoch only the evaluation shows it
    assert status == 2 and "the validation loss became nan in epoch 1; there is no checkpoint from before" in err
    files = {path.name for path in Path("single").iterdir()}
    assert "diverged.pth.tar" in files and not files & {"last.pth.tar", "model_best.pth.tar", "summary.json"}
