"""Where a run takes place: the default device, what depends on its kind, several processes, requests to stop."""

import os
import signal
import threading

import pytest
import torch

from raftmlp.cli.study import default_jobs
from raftmlp.data.workers import processor_count
from raftmlp.device import (
    Processes,
    StopSignals,
    default_device,
    find_device,
    most_memory,
    pins_memory,
    start_processes,
)
from raftmlp.errors import UserError


class Accelerator:
    """Stands in for torch.accelerator."""

    def __init__(self, kind, available=True):
        self.kind, self.available = kind, available

    def is_available(self):
        return self.available

    def current_accelerator(self):
        return torch.device(self.kind)


def test_the_default_is_the_accelerator_that_torch_finds(monkeypatch):
    monkeypatch.setattr(torch, "accelerator", Accelerator("xpu"))
    assert default_device() == "xpu"
    monkeypatch.setattr(torch, "accelerator", Accelerator("xpu", available=False))  # built for it, and there is none
    assert default_device() == "cpu" == find_device(None).type
    assert default_jobs() == processor_count()


def test_several_processes_do_not_share_mps(monkeypatch):
    joined = []
    monkeypatch.setattr(torch, "accelerator", Accelerator("mps"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "timm.utils.distributed.init_distributed_device_so",
        lambda kind: joined.append(kind) or dict(device=kind, global_rank=0, world_size=2),
    )
    assert start_processes(None).device.type == "cpu" and joined == ["cpu"]


def test_what_depends_on_the_kind_of_device():
    assert [pins_memory(torch.device(kind)) for kind in ("cpu", "mps", "cuda", "xpu")] == [False, False, True, True]
    assert most_memory(torch.device("cpu")) > 2**20 and most_memory(torch.device("mps")) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_the_first_process_is_raised_in_all(rank, monkeypatch):
    def broadcast(values):
        values[:] = [None, "no such file"]

    def fail():
        raise OSError("no such file")

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    with pytest.raises(UserError, match="no such file") as error:
        Processes(torch.device("cpu"), rank, 2).on_first(fail)
    assert error.value.shared


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
        other = threading.Thread(target=StopSignals().__enter__)  # leaves the handlers alone
        other.start()
        other.join()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with stop:
        assert stop.number is None
