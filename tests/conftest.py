"""What the tests share: commands run in this process, one thread for a test process of several, no network."""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; torch reads this when it is imported
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test goes to the network
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the same bits on a GPU; it is read once

import gc

import psutil
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs run too, on the CPU; Triton reads this when it is imported

from networks import KINDS, narrow, tiny
from raftmlp.cli import console
from raftmlp.model.resize import RESIZINGS


@pytest.fixture(autouse=True)
def little_memory():
    """Free networks that are in reference cycles, such as traced ones, which Python would keep for long."""
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    if process.memory_info().rss > before + 2**26:
        gc.collect()


@pytest.fixture
def run_command(monkeypatch, capsys, tmp_path):
    """Run a command's main in this process, in an empty folder; returns its exit status and its two outputs."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more cost more than they bring for networks as small as these

    def run(command, *args):
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        monkeypatch.setattr(sys, "argv", [f"raftmlp {name}", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            console.run(command.main)
        return end.value.code or 0, *capsys.readouterr()

    yield run
    torch.set_num_threads(threads)


# Networks of every kind, see networks.py


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request):
    torch.manual_seed(0)
    name, resizing = request.param
    return narrow(name, resizing=resizing).eval()


@pytest.fixture(scope="module", params=RESIZINGS)
def small(request):
    """Two stages, raft sizes 2 and 4, odd depths: enough of everything for the compilers."""
    torch.manual_seed(0)
    return tiny(resizing=request.param).eval()
