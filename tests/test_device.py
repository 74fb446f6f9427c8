"""Where a model runs: the default device, and what depends on its kind."""

import pytest
import torch

from raftmlp.cli.study import default_jobs
from raftmlp.data.workers import processor_count
from raftmlp.device import default_device, find_device, most_memory, pins_memory
from raftmlp.processes import start_processes


class Accelerator:
    """Stands in for torch.accelerator."""

    def __init__(self, kind, available=True):
        self.kind, self.available = kind, available

    def is_available(self):
        return self.available

    def current_accelerator(self):
        return torch.device(self.kind)


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_default_is_the_accelerator_that_torch_finds(kind, monkeypatch):
    monkeypatch.setattr(torch, "accelerator", Accelerator(kind))
    assert default_device() == kind
    monkeypatch.setattr(torch, "accelerator", Accelerator(kind, available=False))  # built for it, and there is none
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
