"""Several processes that train a network with BatchNorm: all evaluate what the first one saves."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import Subset

from helpers import assert_same, run_two_processes
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.data import Digits
from raftmlp.device import end_processes, start_processes
from raftmlp.train import Trainer, TrainSettings

KEPT = ("state_dict", "state_dict_ema", "optimizer", "epoch", "update")


def make_trainer(folder, processes=None, **settings):
    """Return a trainer of two epochs of three updates."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    given = dict(batch_size=16, lr=0.01, workers=0, device="cpu", output=str(folder)) | {"epochs": 2, **settings}
    train_data, val_data = Subset(Digits("train"), range(96)), Subset(Digits("validation"), range(60))
    return Trainer(TrainSettings(**given), model, train_data, val_data, processes)


def run(folder: str) -> None:
    """What each of two processes does: whole runs, and one that is stopped in its first epoch and resumed."""
    figures, processes = {}, start_processes("cpu")
    for name, settings in dict(plain={}, ema=dict(model_ema=True), own=dict(dist_bn="", epochs=1)).items():
        trainer = make_trainer(f"{folder}/{name}", processes, **settings)
        trainer.fit()
        means = [b.tolist() for key, b in trainer.train_step.eval_model.named_buffers() if "running_mean" in key]
        figures[name] = [means, trainer.state.log[-1]]
    parts = make_trainer(f"{folder}/parts", processes, model_ema=True)
    update = parts.train_step.update

    def stopping_update(*args):
        parts.stop.number = 15 if parts.state.position == (0, 0) else None
        return update(*args)

    parts.train_step.update = stopping_update
    assert parts.fit() is None
    make_trainer(f"{folder}/parts", processes, model_ema=True).fit(resume="auto")
    Path(f"{folder}/{processes.rank}.json").write_text(json.dumps(figures))
    end_processes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs, and the figures of both processes."""
    folder = tmp_path_factory.mktemp("runs")
    done = run_two_processes(__file__, folder)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["plain", "ema"])
def test_what_is_evaluated_is_what_is_saved(name, runs):
    folder, figures = runs
    assert figures[0][name][0] == figures[1][name][0]
    alone = make_trainer(folder / "alone", model_ema=name == "ema")
    alone.load(folder / name / "last.pth.tar")
    again = alone.evaluate()
    _, logged = figures[0][name]
    assert (again["loss"], again["top1"]) == (pytest.approx(logged["eval_loss"]), logged["eval_top1"])


def test_without_an_exchange_the_processes_have_their_own(runs):
    _, figures = runs
    assert figures[0]["own"][0] != figures[1]["own"][0]


def test_a_run_that_was_stopped_in_an_epoch_ends_the_same(runs):
    folder, _ = runs
    whole, parts = (load_checkpoint(folder / name / "last.pth.tar") for name in ("ema", "parts"))
    assert_same({key: parts[key] for key in KEPT}, {key: whole[key] for key in KEPT})


if __name__ == "__main__":
    run(sys.argv[1])
