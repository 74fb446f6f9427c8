"""What the tests of the scripts share."""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; torch reads this when it is imported
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import cli


@pytest.fixture
def run_tool(monkeypatch, capsys, tmp_path):
    """Run a script's main in this process, in an empty folder; returns its exit status and its two outputs."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more cost more than they bring for networks as small as these

    def run(tool, *args):
        monkeypatch.setattr(sys, "argv", [f"tools/{tool.__name__}.py", *map(str, args)])
        status = 0
        try:
            cli.run(tool.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    yield run
    torch.set_num_threads(threads)
