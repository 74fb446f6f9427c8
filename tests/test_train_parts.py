"""The small parts of a run: its state, its losses, requests to stop, lines of progress."""

import io
import logging
import os
import signal
import threading
from functools import partialmethod

import pytest
import torch
from tqdm import tqdm

from raftmlp.train import progress as progress_module
from raftmlp.train.progress import Progress
from raftmlp.train.signals import StopSignals
from raftmlp.train.state import DivergedError, Losses, RunState

ROWS = [dict(eval_top1=top1, eval_loss=loss) for top1, loss in ((50.0, 1.0), (60.0, 0.9), (60.0, 0.8), (60.0, 0.85))]


def test_the_best_epoch_and_the_state_of_a_run():
    state = RunState(update=4, loss_sum=2.0)
    for row in ROWS:
        state.end_epoch(row)
    assert state.best is ROWS[2] and state.position == (4, 0) and state.loss_sum == 0
    other = RunState()
    other.load_state_dict({**state.state_dict(), "state_dict": {}})
    assert other == state


def test_before_a_loss_is_read_there_is_no_mean():
    losses = Losses(RunState(update=1))
    losses.add(torch.tensor([0.5, 0.0]), update=0, lr=0.1)
    assert losses.read(keep=1) is False and losses.mean is None


def test_losses_are_read_late_and_a_bad_one_is_found():
    state = RunState(update=2)
    losses = Losses(state)
    losses.add(torch.tensor([0.5, 0.0]), update=0, lr=0.1)
    losses.add(torch.tensor([1.5, 2.0]), update=1, lr=0.1)
    assert losses.read(keep=1) is False and state.loss_sum == 0.5 and losses.mean == 0.5
    assert losses.read() is True and state.loss_sum == 2.0 and losses.mean == 1.0
    losses.add(torch.tensor([float("nan"), 0.0]), update=2, lr=0.3)
    with pytest.raises(DivergedError) as error:
        losses.read()
    assert (error.value.update, error.value.lr) == (2, 0.3)


def test_requests_to_stop():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # at once: it came from the launcher too
        assert stop.number == signal.SIGINT
        stop._time -= 10
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with stop:
        assert stop.number is None


def test_another_thread_leaves_the_handlers_alone():
    before, during = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopSignals():
            during.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [before]


@pytest.mark.parametrize("show", [True, False])
def test_lines_of_progress(show, caplog):
    caplog.set_level(logging.INFO, logger="raftmlp")
    caplog.handler.setLevel(logging.INFO)
    logging.getLogger("raftmlp").addHandler(caplog.handler)
    try:
        with Progress(
            "epoch 1/2", 4, 50.0, 8, images=16, interval=2, device=torch.device("cpu"), show=show
        ) as progress:
            for update in range(5, 9):
                progress.advance(update, loss=0.25 if update > 6 else None, lr=0.00123456)
            assert progress.seconds > 50 and 2.56 > progress.rate(8) > 2.5  # 128 images in 50 s and a little
    finally:
        logging.getLogger("raftmlp").removeHandler(caplog.handler)
    lines = [line for line in caplog.messages if line.startswith("epoch 1/2, update ")]
    assert {line.split(":")[0] for line in lines} == (
        {"epoch 1/2, update 6/8", "epoch 1/2, update 8/8"} if show else set()
    )
    assert all("learning rate 0.00123" in line and "left of the epoch" in line for line in lines)
    assert all(("loss 0.250" in line) == ("8/8" in line) and "loss 0.000" not in line for line in lines)


@pytest.mark.parametrize(
    "width, fits", [(45, []), (80, ["6.907"]), (110, ["6.907", "images/s", "0.00123", "waiting", "GiB"])]
)
def test_a_bar_stays_a_bar_and_no_figure_is_cut(width, fits, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    given = dict(file=terminal, ncols=width, mininterval=0)
    monkeypatch.setattr(
        progress_module, "tqdm", type("Bar", (tqdm,), {"__init__": partialmethod(tqdm.__init__, **given)})
    )
    progress = Progress("epoch 10/300", 1200, 250.0, 5004, 2048, 50, torch.device("cpu"), show=True)
    with progress:
        for update in range(1201, 1204):
            progress.advance(update, 6.907, 0.00123)
        shown = terminal.getvalue().rpartition("\r")[2]
    title, bar, figures = shown.split("|")
    assert title == "epoch 10/300 " and len(bar) >= (10 if fits else 1) and len(shown) <= width
    assert figures.split(",")[0] == " 1203/5004" and figures.split(",")[1].endswith("left")
    assert all(text in figures for text in fits)
